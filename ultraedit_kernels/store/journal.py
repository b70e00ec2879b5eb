"""The versions of an edited model: in memory, or in a directory that outlives the process.

    lock                          held by the process that writes here
    000007.safetensors            a turn: its delta, what it left to be remembered, its record
    snapshot-000100.safetensors   everything at a version: weights, what is remembered, all records
    rollback-to-000003            empty: a rollback that was decided and is not finished

Every file is whole or not there, see `files`: a crash leaves at most a file that was never
acknowledged. What is remembered are tensors and metadata that the journal keeps and does not read.

Bound: every `keep` versions a snapshot is written, and what precedes the one before it goes. So
there are at most two snapshots (three while one is replaced) and 2 · keep turns on disk, a start
replays at most `keep` turns, and at least the newest `keep` versions can be returned to, besides
version 0. Only the records of all versions are kept, in the snapshot.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.store import files
from ultraedit_kernels.store.delta import EditDelta

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One committed turn."""

    delta: EditDelta
    tensors: dict[str, Tensor]
    """What the turn left to be remembered, on the CPU; no name is one of the delta's file."""
    metadata: dict[str, str]
    """What belongs to these tensors; no name is one of the delta's, or "record"."""
    record: dict[str, Any]
    """What the turn was: JSON-able; holds at least "version" and "digest"."""
    source: str = "the journal"
    """Where it was read, for errors."""


@dataclass(frozen=True)
class Snapshot:
    """All that the turns so far have come to."""

    weights: dict[str, Tensor]
    """Module → W [d_out, d_in]."""
    tensors: dict[str, Tensor]
    """What is remembered; no name begins with "weight.", none is "records"."""
    metadata: dict[str, str]
    source: str = "the journal"


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

    _handle: int | None = None

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
            self._handle = files.lock(self._directory / "lock")
            try:
                self._open()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Leave the directory to others; the journal is of no use any more."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

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
        with files.reading(self._path(version), self._base) as (tensors, metadata):
            own = EditDelta.tensor_names(json.loads(metadata["base"]))
            delta = {name: tensors.pop(name) for name in own if name in tensors}
            return Entry(
                EditDelta.from_tensors(delta, metadata, str(self._path(version))),
                tensors,
                metadata,
                self._records[version - 1],
                str(self._path(version)),
            )

    def snapshot(self, version: int) -> Snapshot:
        """The snapshot of a version that `start` named."""
        path = self._snapshot_path(version)
        with files.reading(path, self._base) as (tensors, metadata):
            weights = files.part(tensors, "weight.")
            return Snapshot(weights, tensors, metadata, str(path))

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
            tensors = entry.delta.tensors() | entry.tensors
            metadata = entry.delta.metadata() | entry.metadata
            metadata["record"] = json.dumps(entry.record)
            files.write(path, tensors, metadata, self._base)
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
        records = json.dumps(self._records).encode()
        tensors = {f"weight.{name}": weight for name, weight in snapshot.weights.items()}
        tensors |= snapshot.tensors
        tensors["records"] = torch.frombuffer(bytearray(records), dtype=torch.uint8)
        files.write(self._snapshot_path(version), tensors, snapshot.metadata, self._base)
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
                files.sync(self._directory)
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
            with files.reading(self._snapshot_path(self._snapshots[-1]), self._base) as found:
                self._records = json.loads(found[0]["records"].numpy().tobytes())
        for version in turns:
            metadata = files.read_metadata(self._path(version), self._base)
            if version > len(self._records):
                with files.damage(self._path(version)):
                    self._records.append(json.loads(metadata["record"]))

    def _drop_torn(self, path: Path) -> None:
        """Move the newest file aside if it is cut short: no such file was ever acknowledged."""
        if files.cut_short(path):
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
            files.sync(self._directory)
            marker.unlink()
