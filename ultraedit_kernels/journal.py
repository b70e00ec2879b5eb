"""The versions of an edited model: one entry a turn, in memory or as one file each in a directory.

A file `000001.safetensors` holds the turn's delta, the statistics after it, keys and record. It is
written whole, synced and then renamed, so that a version exists completely or not at all.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ultraedit_kernels.delta import EditDelta
from ultraedit_kernels.statistics import Statistics, from_tensors, to_tensors
from ultraedit_kernels.watch import Watch


@dataclass(frozen=True)
class Entry:
    """One committed turn."""

    delta: EditDelta
    statistics: dict[str, Statistics]
    held: dict[str, Tensor]
    """Module → keys [n, d_in] of the edits that held: anchors of the turns to come."""
    watch: Watch
    """What is watched from this turn on: edits that held, and prompts that the operator named."""
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
            self.released,
            self.record,
        )


class Journal:
    """Entries 1 .. len(journal).

    Raises:
        ValueError: a directory with a missing or damaged file.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self._directory = Path(directory) if directory is not None else None
        self._entries: list[Entry] = []
        self._records: list[dict[str, Any]] = []
        if self._directory is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            found = sorted(self._directory.glob("[0-9]*.safetensors"))
            for version, path in enumerate(found, start=1):
                if path != self._path(version):
                    raise ValueError(
                        f"{self._directory} has {path.name} where {self._path(version).name} was "
                        "expected; restore the missing version, or remove all later ones"
                    )
                self._records.append(self._read_record(version))

    def __len__(self) -> int:
        return len(self._records)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The record of every version, oldest first."""
        return list(self._records)

    def entry(self, version: int) -> Entry:
        """Version `version`, 1 .. len(journal)."""
        if not 1 <= version <= len(self):
            raise IndexError(
                f"version {version} is not in the journal, expected 1 to {len(self)}"
                if len(self)
                else f"version {version} is not in the journal, which is empty"
            )
        return self._entries[version - 1] if self._directory is None else self._read(version)

    def append(self, entry: Entry) -> None:
        """Add the next version; on disk once this returns."""
        if self._directory is None:
            self._entries.append(entry)
        else:
            self._write(len(self) + 1, entry)
        self._records.append(entry.record)

    def truncate(self, version: int) -> None:
        """Forget all versions after `version`, newest first."""
        while len(self) > version:
            if self._directory is not None:
                self._path(len(self)).unlink()
                _sync(self._directory)
            self._records.pop()
            del self._entries[len(self._records) :]

    def _path(self, version: int) -> Path:
        assert self._directory is not None
        return self._directory / f"{version:06d}.safetensors"

    def _write(self, version: int, entry: Entry) -> None:
        path = self._path(version)
        if path.exists():
            raise ValueError(
                f"{path} exists already, expected version {version} to be new; another process "
                "writes to this directory, give each its own"
            )
        statistics, d_in = to_tensors(entry.statistics)
        metadata = entry.delta.metadata() | {
            "statistics_d_in": json.dumps(d_in),
            "released": json.dumps(entry.released),
            "record": json.dumps(entry.record),
        }
        temporary = path.with_suffix(".tmp")
        held = {f"held.{name}": keys.contiguous() for name, keys in entry.held.items()}
        watch = {f"watch.{name}": rows for name, rows in entry.watch.tensors().items()}
        tensors = entry.delta.tensors() | statistics | held | watch
        safetensors.torch.save_file(tensors, temporary, metadata)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)

    @contextmanager
    def _open(self, version: int) -> Iterator[tuple[Any, dict[str, str]]]:
        """A version's file and its metadata; an error inside says that the file is damaged."""
        path = self._path(version)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                yield file, file.metadata() or {}
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); restore it from a backup, or remove it and all "
                "later versions"
            ) from error

    def _read_record(self, version: int) -> dict[str, Any]:
        with self._open(version) as (_, metadata):
            return json.loads(metadata["record"])

    def _read(self, version: int) -> Entry:
        with self._open(version) as (file, metadata):
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            statistics = from_tensors(tensors, json.loads(metadata["statistics_d_in"]))
            held, watch = (
                {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
                for part in ("held.", "watch.")
            )
            watched, released = Watch.from_tensors(watch), json.loads(metadata["released"])
        ours = ("statistics.", "held.", "watch.")
        factors = {name: t for name, t in tensors.items() if not name.startswith(ours)}
        delta = EditDelta.from_tensors(factors, metadata, str(self._path(version)))
        return Entry(delta, statistics, held, watched, released, self._records[version - 1])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
