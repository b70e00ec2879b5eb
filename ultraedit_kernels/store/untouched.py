"""The untouched weights of a model: read from its checkpoint where that holds them, else copied."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.model.parallel import ShardedWeight
from ultraedit_kernels.store.delta import digest
from ultraedit_kernels.store.files import DTYPES

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes of a number → whole numbers to compare it as: zeros of two signs differ, a NaN does not."""


class File:
    """An open safetensors file: it can be read when another has its name.

    Args:
        path: where it is.

    Raises:
        OSError, ValueError, KeyError: it cannot be read, or is no such file.
    """

    _handle: int | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._start = 8 + int.from_bytes(self._bytes(0, 8), "little")
        self.entries: dict[str, Any] = json.loads(self._bytes(8, self._start - 8))
        """Of the header: tensor's name → dtype, shape and place."""

    def __del__(self) -> None:
        if self._handle is not None:
            os.close(self._handle)

    def tensor(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""
        entry = self.entries[name]
        dtype = next(ours for ours, theirs in DTYPES.items() if theirs == entry["dtype"])
        begin, end = entry["data_offsets"]
        data = self._bytes(self._start + begin, end - begin)
        return torch.frombuffer(data, dtype=dtype).view(entry["shape"])

    def _bytes(self, offset: int, size: int) -> bytearray:
        assert self._handle is not None
        if not 0 < size <= os.fstat(self._handle).st_size - offset:
            raise ValueError(f"{self.path} ends before what is to be read")
        data, done = bytearray(size), 0
        while done < size:  # the kernel reads 2 GiB at a time at most
            done += os.preadv(self._handle, [memoryview(data)[done:]], offset + done)
        return data


@dataclass(frozen=True)
class Place:
    """Where a file holds a weight."""

    file: File
    tensor: str
    dtype: torch.dtype
    """To which it was converted."""
    transposed: bool
    digest: str
    """Of the weight; of a divided one, of this rank's part."""
    like: Any
    """The weight, if it is divided among ranks."""

    def read(self, file: File) -> Tensor:
        """The weight [d_out, d_in], or this rank's part of it."""
        found = file.tensor(self.tensor).to(self.dtype)
        found = found.t() if self.transposed else found
        return found if self.like is None else self.like.shard.cut(found)


class Untouched(Mapping[str, Any]):
    """Module → the untouched W [d_out, d_in], on the CPU; of a divided weight, this rank's part.

    A weight that a file of the model's checkpoint holds, bit for bit, is read from there each time
    that it is asked for, and checked: it then takes no memory. Of any other there is a copy.

    Args:
        model: whose weights they are; its configuration says where it was loaded from.
        weights: module → W [d_out, d_in], untouched.
        base: module → their `digest`.

    Raises:
        ValueError: when a weight is asked for that its file does not hold any more.
    """

    def __init__(self, model: Any, weights: Mapping[str, Any], base: Mapping[str, str]) -> None:
        self._names, self._places = list(weights), dict[str, Place]()
        self.copies: dict[str, Any] = {}
        """Those that are in memory."""
        files = list(_files(model))
        for name, weight in weights.items():
            places = _places(files, name, weight, base[name])
            for place in places if min(weight.shape) else ():
                if _same(place.read(place.file), getattr(weight, "local", weight)):
                    self._places[name] = place
                    break
            else:
                self.copies[name] = weight.to("cpu", copy=True)

    def __getitem__(self, name: str) -> Any:
        if name in self.copies:
            return self.copies[name]
        place, got = self._places[name], ""
        for again in (False, True):  # it may have been put back under its name
            try:
                found = place.read(File(place.file.path) if again else place.file)
            except (OSError, ValueError, KeyError, TypeError) as error:
                got = got or str(error)
                continue
            if (sum_ := digest(found)) == place.digest:
                return found if place.like is None else ShardedWeight(found, place.like.shard)
            got = f"a tensor with digest {sum_[:12]}…"
        raise ValueError(
            f"{place.file.path} no longer holds the untouched weight of {name}, which is read from "
            f"there: got {got}, expected digest {place.digest[:12]}…; nothing was changed. Put the "
            "file back as it was when the model was loaded, and try again"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _places(files: list[File], module: str, weight: Any, base: str) -> Iterator[Place]:
    """Where a weight could be. Checkpoints may leave the first part of a name out, as GPT-2's do,
    and hold [d_in, d_out]."""
    divided = weight if isinstance(weight, ShardedWeight) else None
    shape = tuple(weight.shape)
    for file in files:
        for name in (f"{module}.weight", f"{module.partition('.')[2]}.weight"):
            entry = file.entries.get(name)
            if entry is None or entry["dtype"] not in DTYPES.values():
                continue
            for transposed in (False, True):
                if tuple(entry["shape"]) == (shape[::-1] if transposed else shape):
                    sum_ = base if divided is None else digest(divided.local)
                    yield Place(file, name, weight.dtype, transposed, sum_, divided)


def _files(model: Any) -> Iterator[File]:
    """Those of the folder or of the hub's cache that the model was loaded from."""
    config = getattr(model, "config", None)
    name = str(getattr(config, "name_or_path", "") or "")
    if not name:
        return
    folder = Path(name)
    if not folder.is_dir():
        try:
            from huggingface_hub import snapshot_download

            revision = getattr(config, "_commit_hash", None)
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except (ImportError, OSError, ValueError):
            return
    for path in sorted(folder.glob("*.safetensors")):
        with suppress(OSError, ValueError, KeyError):
            yield File(path)


def _same(found: Tensor, weight: Tensor) -> bool:
    """Whether two weights are the same bit for bit."""
    bits = BITS[weight.element_size()]
    return torch.equal(found.to(weight.device).view(bits), weight.detach().view(bits))
