"""The versions of an edited model: in memory, or in a directory that outlives the process.

    lock                          held by the process that writes here
    000007.safetensors            a turn: its delta, the statistics after it, keys, watch, record
    snapshot-000100.safetensors   everything at a version: weights, statistics, anchors, all records
    rollback-to-000003            empty: a rollback that was decided and is not finished

A file is written whole under another name, synced and then renamed: it exists completely or not at
all. It is a safetensors file whose metadata name the format's version, the untouched weights that
it belongs to, and the SHA-256 of all else in it. A crash leaves at most a file that was never
acknowledged.

Bound: every `keep` versions a snapshot is written, and what precedes the one before it goes. So
there are at most two snapshots (three while one is replaced) and 2 · keep turns on disk, a start
replays at most `keep` turns, and at least the newest `keep` versions can be returned to, besides
version 0. Only the records of all versions are kept, in the snapshot.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.ops.statistics import Statistics, from_tensors, to_tensors
from ultraedit_kernels.store.delta import EditDelta

FORMAT_VERSION = "1"
LOCK_SECONDS = 10.0
"""How long a start waits for the directory: an engine can outlive its killed server a little."""
CHUNK = 2**23
"""Bytes that are copied, hashed and written at a time."""
NO_SUM = "0" * 64
"""Stands where the checksum goes while it is computed."""
MAX_HEADER = 10**8
"""Bytes that a safetensors header may have."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One committed turn."""

    delta: EditDelta
    statistics: dict[str, Statistics]
    held: dict[str, Tensor]
    """Module → keys [n, d_in] of the edits that held: anchors of the turns to come."""
    watch: Watch
    """What is watched from this turn on: edits that held, and prompts that the operator named."""
    leads: Tensor
    """[2, r] lead and drift of the first r tokens that are watched then, see `Watch`."""
    released: list[int]
    """What is no longer: indices into all that was watched before, named prompts included."""
    record: dict[str, Any]
    """What the turn was: JSON-able; holds at least "version" and "digest"."""

    def cpu(self) -> Entry:
        """The same on the CPU: the accelerator's memory is the model's."""
        return Entry(
            self.delta,
            {name: stats.to("cpu") for name, stats in self.statistics.items()},
            {name: keys.cpu() for name, keys in self.held.items()},
            Watch.from_tensors(self.watch.tensors()),
            self.leads.cpu(),
            self.released,
            self.record,
        )


@dataclass(frozen=True)
class Snapshot:
    """All that the turns so far have come to."""

    weights: dict[str, Tensor]
    """Module → W [d_out, d_in]."""
    statistics: dict[str, Statistics]
    anchors: Anchors


class Journal:
    """The versions 1 .. len(journal), on disk those that were not let go.

    Args:
        directory: where they are kept; in memory, and all of them, if None.
        base: module → digest of its untouched weight: the model that a directory belongs to.
        keep: newest versions of a directory that can at least be returned to.
        writes: if not, follow another process that writes the same versions to the directory.

    Raises:
        ValueError: the directory is in use, of another model or another format, or has a missing
            or damaged file.
        OSError: it cannot be read or written.
    """

    _lock: int | None = None

    def __init__(
        self,
        directory: str | Path | None = None,
        base: Mapping[str, str] | None = None,
        keep: int = 100,
        writes: bool = True,
    ) -> None:
        self._directory = Path(directory).absolute() if directory is not None else None
        self._base, self._keep, self._writes = dict(base or {}), keep, writes
        self._entries: list[Entry] = []
        self._records: list[dict[str, Any]] = []
        self._snapshots: list[int] = []
        if self._directory is not None and not writes:
            self._read_records()
        elif self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._directory / "lock")
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Leave the directory to others; the journal is of no use any more."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of every version, oldest first."""
        return list(self._records)

    @property
    def oldest(self) -> int:
        """The oldest version that can be returned to, besides 0: later ones have their turns."""
        if self._directory is None or not self._snapshots or self._path(1).exists():
            return 0
        return self._snapshots[0]

    @property
    def snapshot_due(self) -> bool:
        """Whether it is time for `write_snapshot`."""
        newest = self._snapshots[-1] if self._snapshots else 0
        return self._directory is not None and len(self) - newest >= self._keep

    def start(self, version: int) -> int:
        """From where a version is replayed: the last snapshot up to it, or 0."""
        return max((s for s in self._snapshots if s <= version), default=0)

    def entry(self, version: int) -> Entry:
        """Version `version`, 1 .. len(journal). Raises IndexError for others and for old ones."""
        if not self.oldest < version <= len(self):
            raise IndexError(
                f"version {version} is not in the journal, expected {self.oldest + 1} to "
                f"{len(self)}" + ("; older ones were let go" if 0 < version <= len(self) else "")
                if len(self)
                else f"version {version} is not in the journal, which is empty"
            )
        if self._directory is None:
            return self._entries[version - 1]
        return self._read_entry(version)

    def snapshot(self, version: int) -> Snapshot:
        """The snapshot of a version that `start` named."""
        with self._reading(self._snapshot_path(version)) as (tensors, metadata):
            weights = _part(tensors, "weight.")
            keys, outputs = _part(tensors, "shield.keys."), _part(tensors, "shield.outputs.")
            return Snapshot(
                weights,
                from_tensors(tensors, json.loads(metadata["statistics_d_in"])),
                Anchors(keys, outputs, Watch.from_tensors(_part(tensors, "watch."))),
            )

    def append(self, entry: Entry) -> None:
        """Add the next version; on disk once this returns, and left out if it raises."""
        if self._directory is None:
            self._entries.append(entry)
        elif self._writes:
            self._finish_rollback()
            path = self._path(len(self) + 1)
            if path.exists():
                raise ValueError(
                    f"{path} exists already, expected version {len(self) + 1} to be new; another "
                    "process writes to this directory, give each its own"
                )
            self._write(path, *self._parts(entry))
        self._records.append(entry.record)

    def write_snapshot(self, snapshot: Snapshot) -> None:
        """Keep everything at the newest version, and let go of what is old.

        Raises OSError if there is no room; nothing is lost then.
        """
        assert self._directory is not None
        if not self._writes:
            self._snapshots = self._versions("snapshot-")[-2:]
            return
        version = len(self)
        statistics, d_in = to_tensors(snapshot.statistics)
        records = json.dumps(self._records).encode()
        parts = {
            "weight": snapshot.weights,
            "shield.keys": snapshot.anchors.keys,
            "shield.outputs": snapshot.anchors.outputs,
            "watch": snapshot.anchors.watch.tensors(),
        }
        tensors = {f"{part}.{n}": t for part, named in parts.items() for n, t in named.items()}
        tensors |= statistics | {"records": torch.frombuffer(bytearray(records), dtype=torch.uint8)}
        metadata = {"statistics_d_in": json.dumps(d_in)}
        self._write(self._snapshot_path(version), tensors, metadata)
        self._snapshots.append(version)
        self._let_go()

    def truncate(self, version: int) -> None:
        """Forget all versions after `version`: all of them, or none if it raises."""
        if version == len(self):
            return
        on_disk = self._directory is not None and self._writes
        if on_disk:
            assert self._directory is not None
            self._finish_rollback()
            # Takes no room, so that a full disk does not stand in the way.
            marker = self._directory / f"rollback-to-{version:06d}"
            marker.touch()
            try:
                _sync(self._directory)
            except OSError:
                marker.unlink()
                raise
        del self._records[version:], self._entries[version:]
        self._snapshots = [s for s in self._snapshots if s <= version]
        if on_disk:
            with suppress(OSError):  # the next change of the journal, or start, goes on with it
                self._finish_rollback()

    def _path(self, version: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{version:06d}.safetensors"

    def _snapshot_path(self, version: int) -> Path:
        assert self._directory is not None
        return self._directory / f"snapshot-{version:06d}.safetensors"

    def _versions(self, prefix: str) -> list[int]:
        """Versions that have a file, ascending."""
        assert self._directory is not None
        names = (path.name for path in self._directory.iterdir())
        found = (re.fullmatch(rf"{prefix}(\d{{6,}})\.safetensors", name) for name in names)
        return sorted(int(match[1]) for match in found if match)

    def _open(self) -> None:
        """Tidy up after a crash, then check what is there."""
        assert self._directory is not None
        for path in self._directory.glob("*.tmp"):
            logger.warning("%s is of a write that never finished; removed", path)
            path.unlink()
        self._finish_rollback()
        for prefix in ("snapshot-", ""):
            for version in self._versions(prefix)[-1:]:
                self._drop_torn(self._directory / f"{prefix}{version:06d}.safetensors")
        self._snapshots = self._versions("snapshot-")
        self._let_go()
        self._read_records()

    def _read_records(self) -> None:
        self._snapshots = self._versions("snapshot-")[-2:]
        turns = self._versions("")
        first = self._snapshots[0] + 1 if self._snapshots and turns[:1] != [1] else 1
        for expected, version in enumerate(turns, start=first):
            if version != expected:
                raise ValueError(
                    f"{self._directory} has {self._path(version).name} where "
                    f"{self._path(expected).name} was expected; restore the missing version, or "
                    "remove all later ones"
                )
        if self._snapshots:
            with self._reading(self._snapshot_path(self._snapshots[-1])) as (tensors, _):
                self._records = json.loads(tensors["records"].numpy().tobytes())
        for version in turns:
            metadata = self._metadata(self._path(version))
            if version > len(self._records):
                self._records.append(json.loads(metadata["record"]))

    def _drop_torn(self, path: Path) -> None:
        """Move the newest file aside if it is cut short: no such file was ever acknowledged."""
        if _cut_short(path):
            aside = path.with_name(f"{path.name}.torn-{time.time_ns()}")
            path.rename(aside)
            logger.warning("%s was cut short and is left out; moved to %s", path, aside.name)

    def _let_go(self) -> None:
        """Remove what the last two snapshots have made superfluous."""
        old, self._snapshots = self._snapshots[:-2], self._snapshots[-2:]
        for version in old:
            self._snapshot_path(version).unlink()
        if len(self._snapshots) == 2:
            for version in self._versions(""):
                if version <= self._snapshots[0]:
                    self._path(version).unlink()

    def _finish_rollback(self) -> None:
        assert self._directory is not None
        for marker in self._directory.glob("rollback-to-[0-9]*"):
            kept = int(marker.name.removeprefix("rollback-to-"))
            for prefix in ("snapshot-", ""):
                for version in self._versions(prefix):
                    if version > kept:
                        (self._directory / f"{prefix}{version:06d}.safetensors").unlink()
            _sync(self._directory)
            marker.unlink()

    def _parts(self, entry: Entry) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of a turn's file."""
        statistics, d_in = to_tensors(entry.statistics)
        metadata = entry.delta.metadata() | {
            "statistics_d_in": json.dumps(d_in),
            "released": json.dumps(entry.released),
            "record": json.dumps(entry.record),
        }
        held = {f"held.{name}": keys for name, keys in entry.held.items()}
        watch = {f"watch.{name}": rows for name, rows in entry.watch.tensors().items()}
        leads = {"leads": entry.leads}
        return entry.delta.tensors() | statistics | held | watch | leads, metadata

    def _write(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Write a safetensors file: synced, checksummed, and whole or not there."""
        # First in the file, so that it is found whatever the rest holds.
        own = {"sha256": NO_SUM, "journal_version": FORMAT_VERSION}
        own["model"] = json.dumps(self._base, sort_keys=True)
        # Wide dtypes first keeps all of them aligned.
        ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("wb") as file:
                header = _header(ordered, {**own, **metadata})
                state = hashlib.sha256(header)
                file.write(header)
                for tensor in ordered.values():
                    for chunk in _chunks(tensor):
                        state.update(chunk)
                        file.write(chunk)
                file.seek(0)
                file.write(header.replace(NO_SUM.encode(), state.hexdigest().encode(), 1))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync(path.parent)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            raise

    def _metadata(self, path: Path) -> dict[str, str]:
        """A file's metadata, if it is of this format and this model."""
        with _damage(path), safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        version = metadata.get("journal_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has journal format {version}, expected {FORMAT_VERSION}; use the library "
                f"version that wrote it ({metadata.get('library_version', 'unknown')}), or another "
                "state directory"
            )
        with _damage(path):
            base = json.loads(metadata["model"])
        if base != self._base:
            name = next(n for n in sorted(base | self._base) if base.get(n) != self._base.get(n))
            there, here = (str(of.get(name, "not edited"))[:12] for of in (base, self._base))
            raise ValueError(
                f"{path} belongs to another checkpoint or dtype, or to other modules: the digest "
                f"of the untouched {name} is {there} there and {here} here; use another state "
                "directory for this model"
            )
        return metadata

    @contextmanager
    def _reading(self, path: Path) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
        """A file's tensors and metadata, checked; an error inside says that it is damaged."""
        metadata = self._metadata(path)
        with _damage(path):
            if (found := _checksum(path)) != metadata["sha256"]:
                raise ValueError(f"its SHA-256 is {found}, it says {metadata['sha256']}")
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            yield tensors, metadata

    def _read_entry(self, version: int) -> Entry:
        with self._reading(self._path(version)) as (tensors, metadata):
            statistics = from_tensors(tensors, json.loads(metadata["statistics_d_in"]))
            ours = ("statistics.", "held.", "watch.", "leads")
            factors = {name: t for name, t in tensors.items() if not name.startswith(ours)}
            return Entry(
                EditDelta.from_tensors(factors, metadata, str(self._path(version))),
                statistics,
                _part(tensors, "held."),
                Watch.from_tensors(_part(tensors, "watch.")),
                tensors["leads"],
                json.loads(metadata["released"]),
                self._records[version - 1],
            )


def _lock(path: Path) -> int:
    """A handle that holds the lock until it is closed or the process ends, however it ends."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
                    raise ValueError(
                        f"{path.parent} is in use by {holder or 'another process'}, expected it to "
                        "be free; give each server its own state directory, or stop the other one"
                    ) from None
                time.sleep(0.1)
        with suppress(OSError):  # the disk may be full; the text only tells who it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        return handle
    except BaseException:
        os.close(handle)
        raise


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a safetensors file."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _chunks(tensor: Tensor) -> Iterator[bytes]:
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for i in range(0, len(flat), CHUNK):
        yield flat[i : i + CHUNK].cpu().numpy().tobytes()


def _checksum(path: Path) -> str:
    """SHA-256 of a file with zeros in the place of its own."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        own = json.loads(header)["__metadata__"]["sha256"].encode()
        state = hashlib.sha256(size + header.replace(own, NO_SUM.encode(), 1))
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def _cut_short(path: Path) -> bool:
    """Whether a file ends before its header says, as after a crash that lost what was written."""
    length = path.stat().st_size
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, MAX_HEADER)).decode(errors="replace")
        whole_header = file.tell() == 8 + size
    if size == 0 or size > MAX_HEADER:
        return size == 0
    try:
        entries, end = json.JSONDecoder().raw_decode(header)
    except ValueError:
        return not whole_header
    if not whole_header or size % 8 or header[end:].strip(" "):
        return False  # all of the header is there: its length is damaged, as reading will say
    with suppress(TypeError, KeyError, AttributeError):
        named = (entry for name, entry in entries.items() if name != "__metadata__")
        return length < 8 + size + max((entry["data_offsets"][1] for entry in named), default=0)
    return False


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Say of an error in reading a file that it is damaged, and what to do."""
    try:
        yield
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore it from a backup, or remove it and all later "
            "versions"
        ) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
