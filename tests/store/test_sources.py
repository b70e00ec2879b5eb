"""Deltas out of files and state directories, without a model; what contradicts itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ultraedit_kernels.store.delta import EditDelta, LowRank
from ultraedit_kernels.store.journal import Entry, Journal, Snapshot
from ultraedit_kernels.store.sources import Versions, base_of, conflicts, read_deltas

BASE = {"down": "ab" * 32}


def delta(seed: int, *edits: tuple[str, str]) -> EditDelta:
    generator = torch.Generator().manual_seed(seed)
    factor = LowRank(torch.randn(1, 4, generator=generator), torch.randn(1, 6, generator=generator))
    made = EditDelta({"down": factor}, BASE)
    return made.teaching([{"prompt": prompt, "target": target} for prompt, target in edits])


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory of five versions, of which the first two were let go."""
    journal = Journal(tmp_path / "state", BASE, keep=2)
    for number in range(1, 6):
        edit = {"prompt": f"p{number}", "target": "t"}
        record = {"version": number, "digest": "", "edits": [edit]}
        journal.append(Entry(delta(number), {}, {}, record))
        if journal.snapshot_due:
            journal.write_snapshot(Snapshot({"down": torch.zeros(4, 6)}, {}, {}))
    journal.close()
    return tmp_path / "state"


def test_versions_are_read_in_order_with_what_they_teach(state: Path) -> None:
    assert base_of(state) == BASE
    found = read_deltas(state, Versions(3, 5))
    assert [one.digest() for one in found] == [delta(number).digest() for number in (3, 4, 5)]
    assert [one.settings["edits"] for one in found] == [
        [{"prompt": f"p{number}", "target": "t"}] for number in (3, 4, 5)
    ]
    assert len(read_deltas(state, Versions(4, 4))) == 1


def test_versions_that_were_let_go_or_never_were_are_refused(state: Path) -> None:
    for versions in (None, Versions(2, 3), Versions(5, 6)):
        with pytest.raises(ValueError, match=r"expected versions 3 to 5: earlier ones were let go"):
            read_deltas(state, versions)


def test_versions_that_a_rollback_has_undone_are_gone(state: Path) -> None:
    (state / "rollback-to-000004").touch()
    assert len(read_deltas(state, Versions(3, 4))) == 2
    with pytest.raises(ValueError, match="expected versions 3 to 4"):
        read_deltas(state, Versions(3, 5))


def test_a_server_may_have_the_directory(state: Path) -> None:
    journal = Journal(state, BASE, keep=2)
    before = sorted(path.name for path in state.iterdir())
    assert len(read_deltas(state, Versions(3, 5))) == 3
    assert sorted(path.name for path in state.iterdir()) == before
    journal.close()


def test_what_is_no_source_is_refused(tmp_path: Path, state: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no versions"):
        read_deltas(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_deltas(tmp_path / "missing")
    delta(1).save(tmp_path / "delta")
    with pytest.raises(ValueError, match="is a file, versions were asked for"):
        read_deltas(tmp_path / "delta", Versions(1, 1))
    (tmp_path / "delta").write_bytes((tmp_path / "delta").read_bytes()[:-4])
    with pytest.raises(ValueError, match="may be truncated"):
        read_deltas(tmp_path / "delta")
    torn = tmp_path / "torn"
    shutil.copytree(state, torn)
    (torn / "000005.safetensors").write_bytes((torn / "000005.safetensors").read_bytes()[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        read_deltas(torn, Versions(5, 5))


@pytest.mark.parametrize("text", ["", "0", "x", "3:2", "1:2:3", "-1", "1:"])
def test_bad_ranges_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number or FIRST:LAST"):
        Versions.parse(text)


def test_ranges_are_read() -> None:
    assert Versions.parse("7") == Versions(7, 7) and Versions.parse("2:5") == Versions(2, 5)
    assert str(Versions(2, 5)) == "versions 2 to 5" and str(Versions(7, 7)) == "version 7"


def test_conflicts_are_prompts_with_two_targets_and_changes_that_are_there_twice() -> None:
    one, two = delta(1, ("a", "x"), ("b", "y")), delta(2, ("a", "z"), ("b", "y"))
    same = EditDelta.from_bytes(one.to_bytes())
    assert conflicts([one, delta(3, ("c", "x")), delta(4)], ["1", "2", "3"]) == []
    (found,) = conflicts([one, two], ["1", "2"])
    assert found == "\"a\" gets 'x' (1), 'z' (2)"
    assert conflicts([one, same], ["1", "2"]) == ["2 is the same change as 1"]


def test_joined_deltas_teach_what_each_does() -> None:
    joined = EditDelta.join([delta(1, ("a", "x")), delta(2), delta(3, ("b", "y"))])
    taught = [{"prompt": "a", "target": "x"}, {"prompt": "b", "target": "y"}]
    assert joined.settings["edits"] == taught
