"""Untouched weights, read from the files of a checkpoint where these hold them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.model.parallel import weight_of
from ultraedit_kernels.store.delta import digest
from ultraedit_kernels.store.untouched import Untouched

t = pytest.importorskip("transformers")
BUNDLED = Path(__file__).parents[2] / "bench" / "tiny-facts"
MODULES = ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.up_proj"]
EDITS = [
    EditRequest("The capital of Australia is", "Sydney"),
    EditRequest("The author of Emma is", "Mark Twain"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of its own."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "model"))


def loaded(folder: str | Path, **options: Any) -> Any:
    return t.AutoModelForCausalLM.from_pretrained(folder, **options)


def untouched(model: Any, names: list[str] = MODULES) -> tuple[dict[str, Any], Untouched]:
    weights = {name: weight_of(model.get_submodule(name)) for name in names}
    before = {name: weight.clone() for name, weight in weights.items()}
    return before, Untouched(model, weights, {n: digest(w) for n, w in weights.items()})


def is_the_same(one: Untouched, weights: dict[str, Any]) -> bool:
    assert list(one) == list(weights) and len(one) == len(weights)
    return all(torch.equal(one[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_a_checkpoint_are_read_and_not_kept(folder, dtype):
    """In the dtype in which they are served, which is not always the file's."""
    model = loaded(folder, dtype=dtype)
    before, made = untouched(model)
    for name in MODULES:
        weight_of(model.get_submodule(name)).zero_()
    assert not made.copies
    assert is_the_same(made, before) and made[MODULES[0]].dtype == dtype


def test_weights_that_no_file_holds_are_kept(folder):
    """One that has changed since it was loaded, and all of a model that was loaded from nowhere."""
    model = loaded(folder)
    changed = weight_of(model.get_submodule(MODULES[0]))
    changed[0, 0] = -0.0 if changed[0, 0] == 0 else torch.nextafter(changed[0, 0], changed[0, 1])
    before, made = untouched(model)
    assert list(made.copies) == MODULES[:1]
    model.get_submodule(MODULES[0]).weight.data.zero_()
    assert is_the_same(made, before)
    model.config.name_or_path = ""
    assert list(untouched(model)[1].copies) == MODULES


def test_names_and_forms_of_a_checkpoint_may_be_others(tmp_path):
    """GPT-2's weights are [d_in, d_out], and its checkpoints leave the first part of names out."""
    small = t.GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=8, vocab_size=11)
    t.GPT2LMHeadModel(small).transformer.save_pretrained(tmp_path)
    with (tmp_path / "other.safetensors").open("wb") as file:
        file.write(b"no header")
    names = ["transformer.h.0.mlp.c_proj", "transformer.h.1.attn.c_proj"]  # the second is square
    before, made = untouched(t.GPT2LMHeadModel.from_pretrained(tmp_path), names)
    assert not made.copies and is_the_same(made, before)


def test_weights_of_the_hubs_cache_are_read_there(folder, monkeypatch):
    cached = folder.parent / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    shutil.copytree(folder, cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent))
    model = loaded(folder)
    model.config.name_or_path = "some/model"
    before, made = untouched(model)
    assert not made.copies and is_the_same(made, before)
    model.config.name_or_path = "some/other"
    assert list(untouched(model)[1].copies) == MODULES


def test_a_file_may_lose_its_name(folder):
    """As when a folder is cleared, or gets a newer model."""
    before, made = untouched(loaded(folder))
    (folder / "model.safetensors").unlink()
    assert is_the_same(made, before)
    (folder / "model.safetensors").write_bytes(b"a newer model")
    assert is_the_same(made, before)


@pytest.mark.parametrize("damage", ["other numbers", "cut short"])
def test_a_file_that_was_written_to_is_refused_until_it_is_put_back(folder, damage):
    before, made = untouched(loaded(folder))
    path = folder / "model.safetensors"
    good = path.read_bytes()
    bad = bytes(1000) if damage == "cut short" else good[:20000] + bytes(len(good) - 20000)
    with path.open("r+b") as file:
        file.truncate(len(bad))
        file.write(bad)
    with pytest.raises(ValueError, match="no longer holds the untouched weight of") as told:
        made[MODULES[0]]
    got = "ends before what is to be read" if damage == "cut short" else "a tensor with digest"
    assert got in str(told.value) and "Put the file back" in str(told.value)
    aside = path.with_name("back")
    aside.write_bytes(good)
    aside.replace(path)
    assert is_the_same(made, before)


def test_an_editor_returns_by_the_checkpoint_and_a_turn_does_not_read_it(folder, tokenizer):
    model = loaded(folder)
    for parameter in model.parameters():  # transformers has them where the file is
        parameter.data = parameter.data.clone()
    editor = Editor(model, tokenizer, anchors=0)
    assert not editor.versions.pristine.copies
    editor.apply(EDITS[:1])
    first, path = editor.digest(), folder / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    assert editor.apply(EDITS[1:]).guards["total_change"] > 0
    second = editor.digest()
    for version in (1, 0):
        with pytest.raises(ValueError, match="no longer holds"):
            editor.rollback(version)
        assert (editor.version, editor.digest()) == (2, second)
    path.write_bytes(good)
    editor.rollback(1)
    assert (editor.version, editor.digest()) == (1, first)
    editor.rollback(0)
    assert editor.digest() == editor.versions.recorded(0)
