"""How a kernel is started: from the ahead-of-time library, or by Triton's JIT.

Kernel files take `triton` and `tl` from here: the library needs no Triton to run, and without it
`triton` and `tl` are stand-ins that let the kernel files be imported.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.ops.kernels import library

__all__ = ["HAS_TRITON", "INTERPRETED", "arch", "launch", "tl", "triton"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    def _jit(function: Any = None, **options: Any) -> Any:
        return function or (lambda function: function)

    triton = SimpleNamespace(
        jit=_jit,
        cdiv=lambda a, b: -(-a // b),
        knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)),
    )
    tl = SimpleNamespace(constexpr=lambda value: value)

INTERPRETED = bool(triton.knobs.runtime.interpret)

recorder: Callable[[Any, tuple[Any, ...], dict[str, Any]], None] | None = None
"""Set by `ultraedit_kernels.ops.aot` to learn what launchers launch, instead of launching it."""
recorded_arch = ""
"""The architecture that launchers then see."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` over `grid` on the current device and stream.

    Args:
        kernel: a Triton kernel.
        grid: up to three numbers of programs.
        args: the kernel's run-time arguments, in order: tensors and numbers.
        meta: its constexprs, and num_warps, num_stages and other compile options.

    Raises:
        RuntimeError: the library has no such code, and Triton is missing or was not to be used.
    """
    if recorder is not None:
        return recorder(kernel, args, meta)
    forced = os.environ.get("ULTRAEDIT_KERNELS")
    if not INTERPRETED and forced != "triton":
        missing = library.launch(kernel.__name__, grid, args, meta)
        if missing is None:
            return
        if forced == "aot" or not HAS_TRITON:
            raise RuntimeError(missing)
    kernel[grid](*args, **meta)


def arch(tensor: Tensor) -> str:
    """The architecture that a kernel on this tensor runs on: "sm_90", "gfx942", ...; or "cpu"."""
    if recorder is not None:
        return recorded_arch
    return _arch(tensor.get_device()) if tensor.is_cuda else "cpu"


@functools.cache
def _arch(device: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
