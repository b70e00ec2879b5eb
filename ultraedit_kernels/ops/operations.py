"""The four operations of a turn: check the tensors, then hand them to the backend at hand.

Backends: `kernels/` for tensors on a GPU, from the ahead-of-time library or compiled by Triton, and
`torch_backend` for all others. The environment variable ULTRAEDIT_KERNELS=aot|triton|torch forces
one; a forced backend that cannot run raises.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from ultraedit_kernels.ops import checks, torch_backend
from ultraedit_kernels.ops.statistics import Statistics

BACKENDS = ("aot", "triton", "torch")


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """Merge one batch into the running statistics of z = [keys ; grads].

    Args:
        stats: statistics so far; not changed.
        keys: [n, d_in] floating point, n ≥ 0: inputs of the edited linear layer.
        grads: [n, d_out] floating point: loss gradients at its output, same positions.

    Returns:
        The merged statistics (float64, same device).

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, or NaN or Inf in a tensor.

    Source: UltraEdit (arXiv 2505.14679) §3, with an exact pairwise merge: one-row batches are fine.
    """
    _check_statistics(stats)
    checks.features(keys, grads, stats.d_in, stats.d_out, stats.mean.device)
    merged: Statistics = backend(keys).update_statistics(stats, keys, grads)
    return merged


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """The output shift wanted at each answer position: v_i = -lr · ‖ĥ_i‖² · ĝ_i.

    ẑ_i = [ĥ_i ; ĝ_i] = (z_i - mean) / (std + 2⁻²³); it is never written to memory.

    Args:
        keys: [n, d_in] floating point.
        grads: [n, d_out] floating point.
        stats: statistics that already hold these rows.
        lr: step size, above 0; the paper uses 1e-6.

    Returns:
        [n, d_out], float32 (float64 if keys are).

    Raises:
        TypeError, ValueError: as `update_statistics`; or `lr` not above 0.

    Source: UltraEdit (arXiv 2505.14679) §3.
    """
    _check_statistics(stats)
    checks.features(keys, grads, stats.d_in, stats.d_out, stats.mean.device)
    checks.positive("lr", lr)
    values: Tensor = backend(keys).edit_values(keys, grads, stats, lr)
    return values


def solve(
    keys: Tensor, values: Tensor, ridge: float = 1.0, anchors: Tensor | None = None
) -> Tensor:
    """Coefficients Y of the ridge regression whose weight change is ΔW = Yᵀ [keys ; anchors].

    Y = (HHᵀ + λI)⁻¹ V, the dual of ΔWᵀ = (HᵀH + λI)⁻¹HᵀV. Solved in float64, in the smaller of the
    dual (n × n) and the primal (d_in × d_in) form.

    Dependent keys under values that conflict have large coefficients that cancel in ΔW. Where that
    would cost float32 coefficients their digits, the part of Y that the keys annihilate is left
    out: ΔW is the same. Float64 coefficients are always Y itself, so that the outputs of the keys
    move by V - λY.

    Args:
        keys: [n, d_in] floating point.
        values: [n, d_out] floating point: wanted output shifts.
        ridge: λ above 0; the paper uses 1.
        anchors: [m, d_in] keys whose outputs must stay: rows with value zero.

    Returns:
        [n + m, d_out], float32 (float64 if values are); rows of keys first, then of anchors.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, NaN or Inf, ridge not above 0.

    Source: UltraEdit (arXiv 2505.14679) §3; the push-through identity gives the dual.
    """
    checks.matrix("keys", keys)
    checks.matrix("values", values)
    checks.same_rows(keys=keys, values=values)
    checks.same_device(keys=keys, values=values)
    checks.finite(keys=keys, values=values)
    checks.positive("ridge", ridge)
    if anchors is not None:
        checks.matrix("anchors", anchors, columns=keys.shape[1])
        checks.same_device(keys=keys, anchors=anchors)
        checks.finite(anchors=anchors)
    coeff: Tensor = backend(keys).solve(keys, values, ridge, anchors)
    return coeff


@torch.no_grad()
def rank_k_update_(
    weight: Tensor,
    coeff: Tensor,
    keys: Tensor,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
) -> Tensor:
    """W ← W + YᵀH in place: products accumulate in float32 (or wider), then one rounding.

    Args:
        weight: [d_out, d_in] floating point, any strides; changed in place.
        coeff: [n, d_out] floating point, n ≥ 0.
        keys: [n, d_in] floating point.
        rounding: "nearest" (ties to even) or, for half-precision weights, "stochastic": to either
            neighbour, with probabilities whose mean is the sum itself. Without effect on others.
        seed: in [0, 2³²), for stochastic rounding. The same sum at the same row and column of
            `weight` under the same seed rounds to the same number on every device.

    Returns:
        `weight`.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape or device, NaN or Inf, no such rounding, or
            a seed out of range; nothing is changed.
    """
    checks.update(weight, coeff, keys)
    checks.rounding(rounding, seed)
    if len(coeff):
        backend(weight).rank_k_update_(weight, coeff, keys, rounding=rounding, seed=seed)
    return weight


def backend(tensor: Tensor) -> ModuleType:
    """The module that implements the operations for this tensor's device."""
    forced = os.environ.get("ULTRAEDIT_KERNELS")
    if forced not in (None, *BACKENDS):
        raise ValueError(
            f"ULTRAEDIT_KERNELS is {forced!r}, expected one of {', '.join(BACKENDS)}; "
            "or unset it to choose by device"
        )
    if forced == "torch" or (forced is None and not tensor.is_cuda):
        return torch_backend
    from ultraedit_kernels.ops import kernels
    from ultraedit_kernels.ops.kernels import library
    from ultraedit_kernels.ops.kernels.launch import HAS_TRITON

    if forced == "triton":
        if not (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
            raise RuntimeError(
                f"ULTRAEDIT_KERNELS=triton but the tensors are on {tensor.device}, expected a GPU; "
                "move them there, or set TRITON_INTERPRET=1 to run the kernels on the CPU for "
                "testing"
            )
        if not HAS_TRITON:
            raise RuntimeError(
                "ULTRAEDIT_KERNELS=triton but triton cannot be imported; "
                "install it with: pip install 'ultraedit-kernels[triton]'"
            )
    elif forced == "aot" or not HAS_TRITON:
        missing = library.unavailable(tensor.device)
        if missing and forced:
            raise RuntimeError(f"ULTRAEDIT_KERNELS=aot but {missing}")
        if missing:
            return torch_backend
    return kernels


def _check_statistics(stats: Any) -> None:
    if not isinstance(stats, Statistics):
        raise TypeError(
            f"stats is a {type(stats).__name__}, expected a Statistics; "
            "start with Statistics.empty(d_in, d_out)"
        )
