"""One file of the journal: a safetensors file that is there whole or not at all.

It is written under another name, synced and then renamed. Its metadata name the format's version,
the untouched weights that it belongs to, and the SHA-256 of all else in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

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


def write(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], model: Mapping[str, str]
) -> None:
    """Write a file: synced, checksummed, and whole or not there.

    Args:
        path: where; nothing may be there.
        tensors: by name, on any device.
        metadata: further metadata.
        model: module → digest of its untouched weight.

    Raises:
        OSError: it cannot be written; nothing is left of it then.
    """
    # First in the file, so that it is found whatever the rest holds.
    own = {"sha256": NO_SUM, "journal_version": FORMAT_VERSION}
    own["model"] = json.dumps(model, sort_keys=True)
    # Wide dtypes first keeps all of them aligned.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            header = _header(ordered, {**own, **metadata})
            state = hashlib.sha256(header)
            file.write(header)
            for tensor in ordered.values():
                for chunk in chunks(tensor):
                    state.update(chunk)
                    file.write(chunk)
            file.seek(0)
            file.write(header.replace(NO_SUM.encode(), state.hexdigest().encode(), 1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        raise


def read_metadata(path: Path, model: Mapping[str, str]) -> dict[str, str]:
    """A file's metadata.

    Raises:
        ValueError: the file is damaged, of another format, or of another model than `model`, module
            → digest of its untouched weight.
    """
    with damage(path), safetensors.safe_open(path, framework="pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    version = metadata.get("journal_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has journal format {version}, expected {FORMAT_VERSION}; use the library "
            f"version that wrote it ({metadata.get('library_version', 'unknown')}), or another "
            "state directory"
        )
    with damage(path):
        there = json.loads(metadata["model"])
    if there != model:
        name = next(n for n in sorted({*there, *model}) if there.get(n) != model.get(n))
        was, is_now = (str(of.get(name, "not edited"))[:12] for of in (there, model))
        raise ValueError(
            f"{path} belongs to another checkpoint or dtype, or to other modules: the digest "
            f"of the untouched {name} is {was} there and {is_now} here; use another state "
            "directory for this model"
        )
    return metadata


@contextmanager
def reading(
    path: Path, model: Mapping[str, str]
) -> Iterator[tuple[dict[str, Tensor], dict[str, str]]]:
    """A file's tensors and metadata, checked as `read_metadata` does and by the checksum; an error
    inside the block says that the file is damaged."""
    metadata = read_metadata(path, model)
    with damage(path):
        if (found := checksum(path)) != metadata["sha256"]:
            raise ValueError(f"its SHA-256 is {found}, it says {metadata['sha256']}")
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        yield tensors, metadata


def checksum(path: Path) -> str:
    """SHA-256 of a file with zeros in the place of its own."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        own = json.loads(header)["__metadata__"]["sha256"].encode()
        state = hashlib.sha256(size + header.replace(own, NO_SUM.encode(), 1))
        while chunk := file.read(CHUNK):
            state.update(chunk)
    return state.hexdigest()


def chunks(tensor: Tensor) -> Iterator[bytes]:
    """A tensor's bytes, at most CHUNK at a time."""
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    for i in range(0, len(flat), CHUNK):
        yield flat[i : i + CHUNK].cpu().numpy().tobytes()


def cut_short(path: Path) -> bool:
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


def lock(path: Path) -> int:
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


def sync(path: Path) -> None:
    """Return once the file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with a prefix, by the rest of their name."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by part and name, as a file names them: the inverse of `part`."""
    return {f"{of}.{name}": t for of, named in parts.items() for name, t in named.items()}


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another path for the block to write to, which becomes this one at its end; nothing is left
    if it fails."""
    own = path.with_name(f".{path.name}.part")
    try:
        yield own
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder for the block to write to, which becomes this one at its end; nothing is left if it
    fails.

    Raises:
        ValueError: there is something, other than an empty folder.
    """
    check_new(path)
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    own = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    try:
        yield own
        own.chmod(0o755)
        own.replace(path)
    finally:
        shutil.rmtree(own, ignore_errors=True)


def check_new(path: Path) -> None:
    """Raise ValueError unless a folder can be made there."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty directory; name a new one with -o")


@contextmanager
def damage(source: object) -> Iterator[None]:
    """Say of an error in reading a file that it is damaged, and what to do."""
    try:
        yield
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{source} is damaged ({error}); restore it from a backup, or remove it and all later "
            "versions"
        ) from error


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
