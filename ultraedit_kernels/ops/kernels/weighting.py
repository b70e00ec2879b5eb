"""Values v = -lr · ‖ĥ‖² · ĝ; the normalised features live in registers only."""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.ops.kernels.launch import launch, tl, triton
from ultraedit_kernels.ops.statistics import EPS, Statistics

CONFIG = {"BLOCK_N": 16, "BLOCK_D": 256, "num_warps": 4, "enable_fp_fusion": True}
"""16 rows share one read of the statistics, and one root and division per column, which cost as
much as the rest where float64 is slow. Every program has one such tile and no loop: at n 300 and
d_in 14336 that is 1064 of them, 8 per SM of a large GPU, and n 1 still has 56."""


@triton.jit
def normalised(
    x, mean, m2, o_n, o_d, m_n, m_d, stride_n, stride_d, degrees, EPS: tl.constexpr
):  # fmt: skip
    """The tile (x - mean) / (sqrt(M2 / max(count - 1, 1)) + eps) of x [n, d]; 0 where masked.

    In float64: the work is bound by memory, and x - mean must not cancel in float32.
    """
    p_x = x + o_n[:, None] * stride_n + o_d[None, :] * stride_d
    b_x = tl.load(p_x, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float64)
    b_mean = tl.load(mean + o_d, mask=m_d, other=0.0)
    b_scale = 1.0 / (tl.sqrt(tl.load(m2 + o_d, mask=m_d, other=0.0) / degrees) + EPS)
    return (b_x - b_mean[None, :]) * b_scale[None, :]


@triton.jit(do_not_specialize=["n"])
def squared_norms_kernel(
    keys, mean, m2, squares, n, d_in, stride_keys_n, stride_keys_d, degrees: tl.float64,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """squares[i_d, n] = Σ ĥ² over block i_d of the columns."""
    i_d = tl.program_id(1)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < n, o_d < d_in
    b_h = normalised(keys, mean, m2, o_n, o_d, m_n, m_d, stride_keys_n, stride_keys_d, degrees, EPS)
    tl.store(squares + i_d.to(tl.int64) * n + o_n, tl.sum(b_h * b_h, axis=1), mask=m_n)


@triton.jit(do_not_specialize=["n"])
def values_kernel(
    grads, mean, m2, squares, values, n, d_out, stride_grads_n, stride_grads_d,
    degrees: tl.float64, lr: tl.float64,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """v = -lr · ‖ĥ‖² · ĝ with squares[n] = ‖ĥ‖²; mean and M2 are those of the gradients."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < n, o_d < d_out
    b_g = normalised(
        grads, mean, m2, o_n, o_d, m_n, m_d, stride_grads_n, stride_grads_d, degrees, EPS
    )
    b_v = -lr * tl.load(squares + o_n, mask=m_n, other=0.0)[:, None] * b_g
    p_v = values + o_n[:, None] * d_out + o_d[None, :]
    tl.store(p_v, b_v.to(values.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


def degrees(stats: Statistics) -> float:
    """max(count - 1, 1)"""
    return max(float(stats.count) - 1, 1.0)


def squared_norms(keys: Tensor, stats: Statistics) -> Tensor:
    """‖ĥ‖² [n] float64; where the columns of H are spread over ranks, to be summed over them."""
    n, d_in = keys.shape
    blocks = triton.cdiv(d_in, CONFIG["BLOCK_D"])
    squares = torch.empty((blocks, n), dtype=torch.float64, device=keys.device)
    with torch.cuda.device_of(keys):
        launch(
            squared_norms_kernel, (triton.cdiv(n, CONFIG["BLOCK_N"]), blocks),
            keys, stats.mean, stats.m2, squares, n, d_in, *keys.stride(), degrees(stats),
            EPS=EPS, **CONFIG,
        )  # fmt: skip
    return squares.sum(0)


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """See `ultraedit_kernels.ops.operations.edit_values`."""
    n, d_out = grads.shape
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    values = torch.empty((n, d_out), dtype=dtype, device=keys.device)
    if n == 0:
        return values
    squares = squared_norms(keys, stats)
    with torch.cuda.device_of(keys):
        launch(
            values_kernel,
            (triton.cdiv(n, CONFIG["BLOCK_N"]), triton.cdiv(d_out, CONFIG["BLOCK_D"])),
            grads, stats.mean[stats.d_in :], stats.m2[stats.d_in :], squares, values, n, d_out,
            *grads.stride(), degrees(stats), float(lr), EPS=EPS, **CONFIG,
        )  # fmt: skip
    return values
