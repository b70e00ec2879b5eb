"""One file of the journal: whole or not there, checked when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ultraedit_kernels.store import files

MODEL = {"up": "0" * 64}
TENSORS = {
    "flags": torch.arange(3, dtype=torch.uint8),
    "half": torch.ones(3, 5, dtype=torch.bfloat16),
    "wide": torch.rand(2, 3, dtype=torch.float64),
    "none": torch.zeros(0, 4),
}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "one.safetensors"
    files.write(path, TENSORS, {"note": "ä"}, MODEL)
    return path


def test_a_file_is_read_as_it_was_written(file):
    with files.reading(file, MODEL) as (tensors, metadata):
        assert tensors.keys() == TENSORS.keys() and metadata["note"] == "ä"
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert [p.name for p in file.parent.iterdir()] == ["one.safetensors"]


def test_any_safetensors_reader_reads_it(file):
    assert torch.equal(safetensors.torch.load_file(file)["wide"], TENSORS["wide"])
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    assert header["__metadata__"]["sha256"] == files.checksum(file)
    assert size % 8 == 0 and all(
        entry["data_offsets"][0] % TENSORS[name].element_size() == 0
        for name, entry in header.items()
        if name != "__metadata__"
    )


def test_an_error_while_reading_says_that_the_file_is_damaged(file):
    with (
        pytest.raises(ValueError, match=r"one.safetensors is damaged \('missing'\)"),
        files.reading(file, MODEL) as (tensors, _),
    ):
        _ = tensors["missing"]


def test_another_model_is_refused(file):
    with pytest.raises(ValueError, match="digest of the untouched up is 000000000000 there"):
        files.read_metadata(file, {"up": "1" * 64})


def test_a_file_that_was_cut_short_is_known(file):
    good = file.read_bytes()
    assert not files.cut_short(file)
    for length in (0, 7, 8, 50, len(good) - 1):
        file.write_bytes(good[:length])
        assert files.cut_short(file)


def test_large_tensors_are_cut(monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 5)
    parts = list(files.chunks(TENSORS["half"]))
    assert [len(part) for part in parts] == [5, 5, 5, 5, 5, 5]
    assert b"".join(parts) == TENSORS["half"].view(torch.uint8).numpy().tobytes()


def test_a_part_of_the_tensors():
    named = {"a.x": TENSORS["flags"], "a.y.z": TENSORS["half"], "b.x": TENSORS["none"]}
    assert list(files.part(named, "a.")) == ["x", "y.z"]
