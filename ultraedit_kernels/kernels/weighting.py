"""Values v = -lr · ‖ĥ‖² · ĝ; the normalised features live in registers only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultraedit_kernels.statistics import EPS, Statistics

CONFIG = {"BLOCK_N": 4, "BLOCK_D": 1024, "num_warps": 8, "enable_fp_fusion": True}
"""4 rows share one read of the statistics and still spread 300 rows over 75 programs; 1024 columns
keep 16 independent loads in flight per thread."""


@triton.jit
def inverse_std(p_m2, mask, degrees: tl.float64, EPS: tl.constexpr):
    """1 / (sqrt(M2 / max(count - 1, 1)) + eps)"""
    return 1.0 / (tl.sqrt(tl.load(p_m2, mask=mask, other=0.0) / degrees) + EPS)


@triton.jit(do_not_specialize=["n"])
def edit_values_kernel(
    keys, grads, mean, m2, values, n, d_in, d_out,
    stride_keys_n, stride_keys_d, stride_grads_n, stride_grads_d,
    degrees: tl.float64, lr: tl.float64,
    EPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """For each row: v = -lr · ‖ĥ‖² · ĝ with [ĥ ; ĝ] = ([h ; g] - mean) / (std + eps).

    In float64: the work is bound by memory, and h - mean must not cancel in float32.
    """
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_squares = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float64)
    for i_d in range(0, d_in, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = o_d < d_in
        b_mean = tl.load(mean + o_d, mask=m_d, other=0.0)
        b_scale = inverse_std(m2 + o_d, m_d, degrees, EPS)
        m_h = m_n[:, None] & m_d[None, :]
        p_h = keys + o_n[:, None] * stride_keys_n + o_d[None, :] * stride_keys_d
        b_h = tl.load(p_h, mask=m_h, other=0.0).to(tl.float64)
        b_h = (b_h - b_mean[None, :]) * b_scale[None, :]  # 0 in masked columns
        b_squares += b_h * b_h
    b_step = -lr * tl.sum(b_squares, axis=1)
    for i_d in range(0, d_out, BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = o_d < d_out
        b_mean = tl.load(mean + d_in + o_d, mask=m_d, other=0.0)
        b_scale = inverse_std(m2 + d_in + o_d, m_d, degrees, EPS)
        m_g = m_n[:, None] & m_d[None, :]
        p_g = grads + o_n[:, None] * stride_grads_n + o_d[None, :] * stride_grads_d
        b_g = tl.load(p_g, mask=m_g, other=0.0).to(tl.float64)
        b_v = b_step[:, None] * (b_g - b_mean[None, :]) * b_scale[None, :]
        p_v = values + o_n[:, None] * d_out + o_d[None, :]
        tl.store(p_v, b_v.to(values.dtype.element_ty), mask=m_g)


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """See `ultraedit_kernels.operations.edit_values`."""
    n, d_in = keys.shape
    d_out = grads.shape[1]
    dtype = torch.float64 if keys.dtype == torch.float64 else torch.float32
    values = torch.empty((n, d_out), dtype=dtype, device=keys.device)
    if n == 0:
        return values
    with torch.cuda.device_of(keys):
        edit_values_kernel[(triton.cdiv(n, CONFIG["BLOCK_N"]),)](
            keys, grads, stats.mean, stats.m2, values, n, d_in, d_out,
            *keys.stride(), *grads.stride(), max(float(stats.count) - 1, 1.0), float(lr),
            EPS=EPS, **CONFIG,
        )  # fmt: skip
    return values
