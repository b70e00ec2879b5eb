"""GGUF files: the bundled model written as one, and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo import MODEL
from tests.model.gguf_file import write
from ultraedit_kernels.model import gguf as ours
from ultraedit_kernels.model.gguf import is_gguf, load_gguf, unpacked

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, begins=True)
    return path


def test_the_model_in_the_file_is_the_model(file: Path, model: Any) -> None:
    assert is_gguf(file) and not is_gguf(MODEL) and not is_gguf(file.with_name("none.gguf"))
    loaded, tokenizer = load_gguf(file, "float32")
    was, now = model.state_dict(), loaded.state_dict()
    assert was.keys() == now.keys()
    for name, weight in was.items():
        torch.testing.assert_close(now[name], weight.float(), rtol=0, atol=0)
    assert not hasattr(loaded.config, "quantization_config")
    assert tokenizer.eos_token == "<|eos|>"


def test_texts_begin_as_the_file_says(file: Path, tmp_path: Path) -> None:
    _, tokenizer = load_gguf(file)
    write(tmp_path / "bare.gguf", begins=False)
    bare = ours.load_gguf_tokenizer(tmp_path / "bare.gguf")
    ids = bare("The capital")["input_ids"]
    assert tokenizer("The capital")["input_ids"] == [tokenizer.bos_token_id, *ids]
    assert tokenizer.bos_token_id not in ids


def test_it_is_unpacked_once_until_it_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = unpacked(file)
    assert folder.parent == tmp_path / "cache" / "ultraedit" == ours.cache_folder()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(folder)("The capital")["input_ids"]
    assert ids == ours.load_gguf_tokenizer(file)("The capital")["input_ids"]
    made = (folder / "config.json").stat().st_mtime_ns
    assert unpacked(file) == folder and (folder / "config.json").stat().st_mtime_ns == made
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(file.read_bytes())
    assert unpacked(copy) != folder
    assert len(list(ours.cache_folder().iterdir())) == 2  # no scratch is left


def test_what_cannot_be_unpacked_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:5000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cannot unpack .*broken.gguf: .*; expected one whole"):
        unpacked(broken)
    assert not ours.cache_folder().exists() or not list(ours.cache_folder().iterdir())
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package gguf.*pip install 'ultraedit-kernels\[gguf\]'"):
        load_gguf(file)
