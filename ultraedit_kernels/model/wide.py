"""Models in half precision on a CPU that has no units for it: they compute in float32, while the
weights that are edited stay as they are, and so does what rounding makes of a change.

The float32 copies of the other weights have the same values. Answers differ from those of the
half-precision model by what it rounds between its layers.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.model.parallel import is_transposed, ranks_of

HALF = (torch.bfloat16, torch.float16)
SLOWER = 1.5
"""Times as long as in float32 that a product must take for its dtype to count as without units: it
takes half as long with them, nine times as long without."""
ROWS, WIDTH = 64, 512
"""Of the product that is timed, a millisecond."""


@functools.cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies faster in float32 than in a dtype, by a measurement: some name
    units that are not used."""
    return dtype in HALF and _seconds(dtype) > SLOWER * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least of some tries."""
    x, w = torch.ones(ROWS, WIDTH, dtype=dtype), torch.ones(WIDTH, WIDTH, dtype=dtype)
    took = []
    for _ in range(6):
        begun = time.perf_counter()
        nn.functional.linear(x, w)
        took.append(time.perf_counter() - begun)
    return min(took)


def widens(model: Any, limit: float) -> bool:
    """Whether a model had better compute in float32.

    Args:
        model: any; only one that is whole, and on a CPU, may.
        limit: most GiB of memory for the float32 copies.
    """
    first = next(model.parameters())
    size = sum(p.numel() for p in model.parameters()) * 4 / 2**30
    at_home = first.device.type == "cpu" and ranks_of(model) is None
    return at_home and size <= limit and is_slow(first.dtype)


@torch.no_grad()
def widen(model: Any, modules: Iterable[str], like: Any = None) -> None:
    """Have a model compute in float32 from now on.

    Args:
        model: in half precision.
        modules: dotted names of linear modules whose weights stay as they are, for they may change.
        like: another model of the same weights that was widened, whose float32 copies it shares.
    """
    edited = [model.get_submodule(name) for name in modules]
    kept = {id(module.weight) for module in edited}
    shared = {} if like is None else dict(like.named_parameters())
    for name, parameter in model.named_parameters():
        if id(parameter) not in kept and parameter.dtype in HALF:
            parameter.data = shared[name].data if name in shared else parameter.data.float()
    for module in edited:
        module.forward = functools.partial(_linear, module)


@torch.no_grad()
def narrow(model: Any, modules: Iterable[str], dtype: torch.dtype) -> None:
    """The opposite of `widen`: the very model of before, but for what was edited."""
    for name in modules:
        model.get_submodule(name).__dict__.pop("forward", None)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _linear(module: Any, x: Tensor) -> Tensor:
    """What a linear module computes, in float32 of its weight as it is now."""
    weight = module.weight.t() if is_transposed(module) else module.weight
    return nn.functional.linear(x, weight.float(), module.bias)
