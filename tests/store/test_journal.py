"""The journal on disk: the versions that it keeps, and what it makes of crashes and of damage."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraedit_kernels import EditDelta
from ultraedit_kernels.store import files as journal_files
from ultraedit_kernels.store.delta import LowRank, digest, digest_all
from ultraedit_kernels.store.journal import Entry, Journal, Snapshot

PROBE = Path(__file__).with_name("journal_probe.py")
WEIGHTS = {"up": torch.ones(3, 4), "down": torch.ones(4, 3, dtype=torch.bfloat16)}
BASE = {name: digest(weight) for name, weight in WEIGHTS.items()}


def entry(version: int) -> Entry:
    random = torch.Generator().manual_seed(version)
    factors = {
        name: LowRank(
            torch.randn(2, w.shape[0], generator=random),
            torch.randn(2, w.shape[1], generator=random).to(w.dtype),
        )
        for name, w in WEIGHTS.items()
    }
    record = {"version": version, "digest": "", "edits": [{"prompt": "ä" * version}]}
    return Entry(EditDelta(factors, BASE), remembered(version), {"what": str(version)}, record)


def remembered(version: int) -> dict[str, torch.Tensor]:
    """Of every kind that a method may want to keep: no rows, no dimensions, and whole numbers."""
    return {
        "one": torch.tensor(float(version), dtype=torch.float64),
        "none": torch.zeros(0, 4),
        "numbers": torch.arange(version),
    }


def snapshot(version: int) -> Snapshot:
    weights = {name: torch.full_like(weight, version) for name, weight in WEIGHTS.items()}
    return Snapshot(weights, remembered(version), {"what": str(version)})


def add(journal: Journal) -> None:
    """The next version, with a snapshot if it is time."""
    version = len(journal) + 1
    journal.append(entry(version))
    if journal.snapshot_due:
        journal.write_snapshot(snapshot(version))


def fill(directory: Path, versions: int, keep: int = 100) -> Journal:
    """A journal with that many versions."""
    journal = Journal(directory, BASE, keep)
    for _ in range(versions):
        add(journal)
    return journal


def files(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir() if p.name != "lock")


def names(*versions: int, snapshots: tuple[int, ...] = ()) -> list[str]:
    found = [f"{v:06d}.safetensors" for v in versions]
    return sorted(found + [f"snapshot-{v:06d}.safetensors" for v in snapshots])


def same(a: Entry, b: Entry) -> bool:
    remembered = a.tensors.keys() == b.tensors.keys() and all(
        torch.equal(tensor, b.tensors[name]) for name, tensor in a.tensors.items()
    )
    of_it = a.metadata["what"] == b.metadata["what"]
    return (
        a.record == b.record
        and remembered
        and of_it
        and all(
            torch.equal(factor.coeff, b.delta.factors[name].coeff)
            and torch.equal(factor.keys, b.delta.factors[name].keys)
            for name, factor in a.delta.factors.items()
        )
    )


def test_what_is_appended_is_read_again(tmp_path):
    fill(tmp_path, 3).close()
    journal = Journal(tmp_path, BASE)
    assert [record["version"] for record in journal.records] == [1, 2, 3]
    assert all(same(journal.entry(v), entry(v)) for v in (1, 2, 3))
    assert files(tmp_path) == names(1, 2, 3)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_bound_and_what_it_keeps(tmp_path_factory, data):
    """However turns, rollbacks and restarts follow each other."""
    directory, keep = tmp_path_factory.mktemp("journal"), 3
    journal, reached = fill(directory, 0, keep), 0
    for step in data.draw(st.lists(st.sampled_from("ttttttrs"), max_size=40)):
        if step == "t":
            reached = len(journal) + 1
            add(journal)
        elif step == "r":
            choices = [0, *range(max(1, journal.oldest), len(journal) + 1)]
            reached = data.draw(st.sampled_from(choices))
            journal.truncate(reached)
        else:
            journal.close()
            journal = Journal(directory, BASE, keep)
        assert [r["version"] for r in journal.records] == list(range(1, reached + 1))
        found = files(directory)
        assert sum(name.startswith("snapshot") for name in found) <= 2
        assert sum(name[0].isdigit() for name in found) <= 2 * keep
        assert len(journal) - journal.start(len(journal)) < keep
        for version in range(journal.oldest + 1, reached + 1):
            assert same(journal.entry(version), entry(version))
            start = journal.start(version)
            assert start in (0, version) or start >= journal.oldest
            if start:
                kept = journal.snapshot(start)
                assert bool((kept.weights["up"] == start).all())
                assert kept.metadata["what"] == str(start)
                assert torch.equal(kept.tensors["numbers"], torch.arange(start))
    journal.close()


def test_at_least_the_newest_versions_can_be_returned_to(tmp_path):
    journal = fill(tmp_path, 0, keep=4)
    for version in range(1, 30):
        add(journal)
        assert len(journal) - journal.oldest >= min(version, 4)
    with pytest.raises(IndexError, match=r"version 5 is not in .* older ones were let go"):
        journal.entry(5)


def test_a_directory_has_one_writer(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_files, "LOCK_SECONDS", 0.3)
    first = Journal(tmp_path, BASE)
    with pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .*own state dir"):
        Journal(tmp_path, BASE)
    first.close()
    Journal(tmp_path, BASE).close()


def test_a_start_waits_for_a_process_that_is_going(tmp_path):
    code = f"""
import time
from ultraedit_kernels.store.journal import Journal
journal = Journal({str(tmp_path)!r}, {{}})
print("locked", flush=True)
time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"locked\n"
    late = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {holder.pid}"])
    Journal(tmp_path, {}).close()
    assert holder.wait() == -signal.SIGKILL and late.wait() == 0


def test_a_follower_reads_what_another_writes(tmp_path):
    writer = fill(tmp_path, 2)
    follower = Journal(tmp_path, BASE, writes=False)
    assert same(follower.entry(2), entry(2))
    writer.append(entry(3))
    follower.append(entry(3))
    assert same(follower.entry(3), entry(3))
    writer.truncate(1)
    follower.truncate(1)
    assert follower.records == writer.records and files(tmp_path) == names(1)


def test_leftovers_of_a_crash_are_reported_and_left_out(tmp_path, caplog):
    fill(tmp_path, 3).close()
    (tmp_path / "000004.tmp").write_bytes(b"half")
    newest = tmp_path / "000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-7])
    journal = Journal(tmp_path, BASE)
    assert len(journal) == 2 and "000004.tmp" in caplog.text and "cut short" in caplog.text
    (aside,) = (p for p in tmp_path.iterdir() if "torn" in p.name)
    assert aside.name.startswith("000003.safetensors.torn-")
    journal.append(entry(3))
    journal.close()
    assert len(Journal(tmp_path, BASE)) == 3


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_however_short_the_newest_file_is_cut(tmp_path, size):
    fill(tmp_path, 2).close()
    path = tmp_path / "000002.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert len(Journal(tmp_path, BASE)) == 1


def test_a_snapshot_that_was_cut_short_is_done_without(tmp_path):
    fill(tmp_path, 6, keep=3).close()
    path = tmp_path / "snapshot-000006.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    journal = Journal(tmp_path, BASE, keep=3)
    assert len(journal) == 6 and journal.start(6) == 3 and same(journal.entry(6), entry(6))


@pytest.mark.parametrize("keep", [2, 100])
def test_any_damaged_byte_is_found(tmp_path, keep):
    """In the header, in the numbers, and in what came before a snapshot."""
    fill(tmp_path, 3, keep).close()
    for path in sorted(tmp_path.glob("*.safetensors")):
        good = path.read_bytes()
        for position in (0, 3, 9, 40, 120, len(good) // 2, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 1
            path.write_bytes(bad)
            with pytest.raises(ValueError, match=rf"{path.name} (is damaged|has journal format)"):
                read_all(tmp_path, keep)
        path.write_bytes(good)
        read_all(tmp_path, keep)


def read_all(directory: Path, keep: int) -> None:
    journal = Journal(directory, BASE, keep)
    try:
        for version in range(journal.oldest + 1, len(journal) + 1):
            journal.entry(version)
        if start := journal.start(len(journal)):
            journal.snapshot(start)
    finally:
        journal.close()


def test_a_missing_version_is_named(tmp_path):
    fill(tmp_path, 3).close()
    (tmp_path / "000002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has 000003.safetensors where 000002.safetensors was"):
        Journal(tmp_path, BASE)


def test_directories_of_another_model_or_format_are_refused(tmp_path, monkeypatch):
    fill(tmp_path, 2).close()
    with pytest.raises(ValueError, match=r"belongs to another checkpoint or dtype.*untouched up"):
        Journal(tmp_path, BASE | {"up": "0" * 64})
    with pytest.raises(ValueError, match=r"or to other modules.*gate is not edited there"):
        Journal(tmp_path, BASE | {"gate": "0" * 64})
    monkeypatch.setattr(journal_files, "FORMAT_VERSION", "0")
    with pytest.raises(ValueError, match="has journal format 1, expected 0; use the library"):
        Journal(tmp_path, BASE)


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "1 copy.safetensors").write_text("notes")
    fill(tmp_path, 2).truncate(0)
    assert files(tmp_path) == ["1 copy.safetensors"]


@pytest.mark.parametrize("step", ["write", "fsync", "replace", "directory"])
def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch, step):
    """At every step; the next one is as if nothing had been."""
    journal = fill(tmp_path, 2)
    calls = {"fsync": 0}
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_: object) -> None:
        raise full

    def fsync(handle: int) -> None:
        calls["fsync"] += 1
        if calls["fsync"] == (1 if step == "fsync" else 2):
            raise full

    with monkeypatch.context() as patched:
        if step == "write":
            patched.setattr("ultraedit_kernels.store.files.chunks", fail)
        elif step == "replace":
            patched.setattr(os, "replace", fail)
        else:
            patched.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="No space left"):
            journal.append(entry(3))
    assert len(journal) == 2 and files(tmp_path) == names(1, 2)
    journal.append(entry(3))
    journal.close()
    assert same(Journal(tmp_path, BASE).entry(3), entry(3))


def test_a_real_limit_on_file_sizes(tmp_path):
    """As a full disk does, it stops the write in the middle."""
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.store.test_journal import fill, entry, files
from pathlib import Path
journal = fill(Path({str(tmp_path)!r}), 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
try:
    journal.append(entry(2))
except OSError as error:
    print(type(error).__name__, files(Path({str(tmp_path)!r})))
journal.truncate(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append(entry(1))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "OSError ['000001.safetensors']\n"
    assert len(Journal(tmp_path, BASE)) == 1


def test_a_rollback_is_whole_or_not_at_all(tmp_path, monkeypatch):
    """A crash after the decision: the next start finishes it."""
    journal = fill(tmp_path, 8, keep=3)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("stopped")))
    journal.truncate(4)
    assert len(journal) == 4 and len(files(tmp_path)) > 5
    monkeypatch.undo()
    journal.close()
    journal = Journal(tmp_path, BASE, keep=3)
    assert len(journal) == 4 and files(tmp_path) == names(4, snapshots=(3,))
    journal.append(entry(5))


@pytest.mark.parametrize("what", ["append", "snapshot", "rollback"])
def test_a_kill_at_any_step(tmp_path, what):
    """An editor in a process of its own is killed at each step in turn: the version that was
    acknowledged is there, the one under way is there whole or not at all."""
    out = subprocess.run(
        [sys.executable, PROBE, json.dumps({"directory": str(tmp_path), "what": what})],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    runs = json.loads(out.stdout.splitlines()[-1])
    assert len(runs) >= 5
    for run in runs:
        acknowledged, under_way = run["acknowledged"], run["under way"]
        assert run["found"] in (acknowledged, under_way), run
        assert run["killed at"] is None or run["exit"] == -signal.SIGKILL
        assert run["digest"] == run["digests"][run["found"]], run
        assert run["leftovers"] == ["lock"]
    assert {run["found"] for run in runs} == {runs[0]["acknowledged"], runs[0]["under way"]}
    assert runs[-1]["killed at"] is None and runs[-1]["found"] == runs[-1]["under way"]


def test_weights_are_named_in_the_digest():
    assert digest_all(WEIGHTS) != digest_all({"down": WEIGHTS["up"], "up": WEIGHTS["down"]})
