"""The ahead-of-time library: whether it can be used, and launching from it.

Its C interface is csrc/ultraedit_kernels.h; docs/aot.md says how it is built.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import struct
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).parents[2] / "libultraedit_kernels.so"
BUILD = "build it with: cmake -S . -B build-aot && cmake --build build-aot"

HIP = torch.version.hip is not None
MAX_INT32 = 2**31 - 1

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}
FORMATS = {"i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
"""`struct` formats of a kernel's scalar arguments."""


class _Kernel(ctypes.Structure):
    """`ultraedit_kernel` of the C interface."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("signature", ctypes.c_char_p),
        ("constants", ctypes.c_char_p),
        ("arch", ctypes.c_char_p),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("args_size", ctypes.c_uint),
        ("params_size", ctypes.c_uint),
        ("code", ctypes.c_void_p),
        ("code_size", ctypes.c_size_t),
    )


class _Choice(NamedTuple):
    """What one kind of launch runs, and how its arguments become a C struct."""

    kernel: int
    signature: tuple[str, ...]
    pick: Callable[[list[Any]], tuple[Any, ...]]
    pack: Callable[..., bytes]


_choices: dict[tuple[Any, ...], _Choice | str] = {}
"""By device, kernel, constants and what is known of the arguments; a text if there is no code."""


def unavailable(device: torch.device) -> str | None:
    """Why kernels on this device cannot come from the library; None if they can."""
    library = load()
    if isinstance(library, str):
        return library
    try:
        arch = _arch(device.index or 0)
    except RuntimeError as error:
        return str(error)
    if device.type != "cuda":
        return f"the tensors are on {device}, expected a GPU; move them there"
    return None if arch in _table() else _no_code(arch)


def launch(
    name: str, grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
) -> str | None:
    """Launch on the current device and stream; or launch nothing and return why."""
    if not args[0].is_cuda or isinstance(load(), str):
        return unavailable(args[0].device)
    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream(device).cuda_stream
    return launch_on(device, stream, name, grid, args, meta)


def launch_on(
    device: int,
    stream: int,
    name: str,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    meta: dict[str, Any],
) -> str | None:
    """As `launch`, on this device and stream."""
    facts = tuple([_facts(arg) for arg in args])
    key = (device, name, tuple(meta.items()), facts)
    choice = _choices.get(key)
    if choice is None:
        choice = _choices[key] = _choose(_arch(device), name, constants(meta), facts)
    if isinstance(choice, str):
        return choice
    values = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    packed = choice.pack(*choice.pick(values))
    x, y, z = (*grid, 1, 1)[:3]
    library: Any = load()
    error = library.ultraedit_launch(choice.kernel, device, x, y, z, packed, len(packed), stream)
    if error:
        raise RuntimeError(error.decode())
    return None


def signature(
    arch: str, name: str, args: tuple[Any, ...], meta: dict[str, Any]
) -> tuple[str, ...] | str:
    """The signature of the code that `launch` would run on this architecture, or why there is none.

    One word an argument, as in `ultraedit_kernels.ops.aot.Variant`.
    """
    choice = _choose(arch, name, constants(meta), tuple([_facts(arg) for arg in args]))
    return choice if isinstance(choice, str) else choice.signature


def _facts(arg: Any) -> tuple[str, bool, bool, bool]:
    """What a kernel may assume of an argument: its kind, is 1, divisible by 16, within 2 GB."""
    if isinstance(arg, Tensor):
        small = HIP and arg.untyped_storage().size() <= MAX_INT32
        return POINTERS[arg.dtype], False, arg.data_ptr() % 16 == 0, small
    if isinstance(arg, int):
        return "i32" if -MAX_INT32 <= arg <= MAX_INT32 else "i64", arg == 1, arg % 16 == 0, False
    return "fp", False, False, False


def _fits(word: str, facts: tuple[str, bool, bool, bool]) -> bool:
    """Whether an argument is what this word of a kernel's signature assumes."""
    kind, is_one, divisible, small = facts
    if word == "1":
        return is_one
    wanted, _, assumed = word.partition(":")
    if ("D" in assumed and not divisible) or ("S" in assumed and not small):
        return False
    return wanted == kind or (wanted, kind) in (("i64", "i32"), ("fp32", "fp"), ("fp64", "fp"))


def _no_code(arch: str) -> str:
    return (
        f"the ahead-of-time library has no code for {arch}, only for {', '.join(_table())}; "
        f"build it with -DULTRAEDIT_ARCHS={arch}, or install Triton"
    )


def _choose(
    arch: str, name: str, constants: str, facts: tuple[tuple[str, bool, bool, bool], ...]
) -> _Choice | str:
    """The first kernel of the table that the arguments fit: specialised ones come first."""
    if arch not in _table():
        return _no_code(arch)
    for kernel, words in _table()[arch].get((name, constants), ()):
        if all(map(_fits, words, facts)):
            passed = [i for i, word in enumerate(words) if word != "1"]
            kinds = [words[i].partition(":")[0] for i in passed]
            # "@": as a compiler lays out a struct; "0q" pads its end.
            formats = ["P" if kind.startswith("*") else FORMATS[kind] for kind in kinds]
            pack = struct.Struct(f"@{''.join(formats)}0q").pack
            return _Choice(kernel, tuple(words), itemgetter(*passed), pack)
    return (
        f"the ahead-of-time library has no {name} with {constants} for {arch} and arguments "
        f"{' '.join(kind for kind, *_ in facts)}; convert the tensors to a dtype that it has, "
        "or install Triton"
    )


@functools.cache
def _table() -> dict[str, dict[tuple[str, str], list[tuple[int, list[str]]]]]:
    """Architecture → kernel's name and constants → its address and signature, in order."""
    library: Any = load()
    count = ctypes.c_size_t()
    rows = library.ultraedit_kernels(ctypes.byref(count))
    table: dict[str, dict[tuple[str, str], list[tuple[int, list[str]]]]] = {}
    for i in range(count.value):
        row = rows[i]
        named = table.setdefault(row.arch.decode(), {})
        variants = named.setdefault((row.name.decode(), row.constants.decode()), [])
        variants.append((ctypes.addressof(row), row.signature.decode().split()))
    return table


@functools.cache
def _arch(device: int) -> str:
    """The architecture of a device. Raises RuntimeError without a driver or such a device."""
    library: Any = load()
    arch = ctypes.create_string_buffer(16)
    error = library.ultraedit_device_arch(device, arch)
    if error:
        raise RuntimeError(error.decode())
    return arch.value.decode()


@functools.cache
def load() -> ctypes.CDLL | str:
    """The library at `PATH`, opened once; or why it cannot be used."""
    if not PATH.exists():
        return f"the ahead-of-time library is not built: there is no {PATH}; {BUILD}"
    try:
        library = ctypes.CDLL(str(PATH))
    except OSError as error:
        return f"{PATH} cannot be opened ({error}); {BUILD}"
    library.ultraedit_build.restype = ctypes.c_char_p
    library.ultraedit_kernels.argtypes = [ctypes.POINTER(ctypes.c_size_t)]
    library.ultraedit_kernels.restype = ctypes.POINTER(_Kernel)
    library.ultraedit_device_arch.argtypes = [ctypes.c_int, ctypes.c_char_p]
    library.ultraedit_device_arch.restype = ctypes.c_char_p
    library.ultraedit_launch.argtypes = [
        ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_void_p,
    ]  # fmt: skip
    library.ultraedit_launch.restype = ctypes.c_char_p
    _, built_from, _ = library.ultraedit_build().decode().split()
    if built_from != sources():
        return f"{PATH} was built from other kernel sources than the installed ones; {BUILD}"
    return library


def forget() -> None:
    """Make the next use open `PATH` anew, after it was changed."""
    for cached in (load, _table, _arch):
        cached.cache_clear()
    _choices.clear()


def sources() -> str:
    """A digest of the kernels' sources, which a library is built from and belongs to."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def constants(meta: dict[str, Any]) -> str:
    """Constexprs and compile options as the library's table writes them."""
    return " ".join(f"{name}={value}" for name, value in sorted(meta.items()))
