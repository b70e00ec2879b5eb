"""What was gathered about a model is found again, for that model and those settings only."""

import pytest
import torch

from ultraedit_kernels.store import cache

MODEL = {"mlp": "0" * 64}
TENSORS = {"keys": torch.arange(6.0).reshape(2, 3), "owner": torch.tensor([1, 2])}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAEDIT_CACHE", str(tmp_path / "cache"))
    cache.save({"texts": 3}, MODEL, TENSORS, {"said": "yes"})
    return tmp_path / "cache"


def test_what_was_kept_is_found(kept):
    tensors, metadata = cache.load({"texts": 3}, MODEL)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata["said"] == "yes"
    assert len(list(kept.iterdir())) == 1


def test_nothing_is_found_for_other_settings_or_another_model(kept):
    assert cache.load({"texts": 4}, MODEL) is None
    assert cache.load({"texts": 3}, {"mlp": "1" * 64}) is None


def test_a_damaged_file_is_warned_about_and_removed(kept, caplog):
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    file.write_bytes(file.read_bytes()[:-9])
    assert cache.load({"texts": 3}, MODEL) is None
    assert "gathered anew" in caplog.text and not file.exists()


def test_a_directory_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ULTRAEDIT_CACHE", str(tmp_path / "file"))
    cache.save({"texts": 3}, MODEL, TENSORS, {})
    assert "cannot be written" in caplog.text


def test_an_empty_variable_keeps_nothing_and_none_means_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAEDIT_CACHE", "")
    cache.save({"texts": 3}, MODEL, TENSORS, {})
    assert cache.directory() is None and cache.load({"texts": 3}, MODEL) is None
    monkeypatch.delenv("ULTRAEDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.directory() == tmp_path / "ultraedit"
