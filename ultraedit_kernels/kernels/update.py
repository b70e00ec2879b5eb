"""W ← W + YᵀH: W is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultraedit_kernels import torch_backend

CONFIG = {
    "BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_N": 16,
    "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True,
}  # fmt: skip
"""The largest tile of W that sm_80 to sm_120 hold without spilling: 64 float32 accumulators a
thread, and 16 split rows. Y and H are small and are read again for every tile, from L2."""

PRECISION = "ieee" if torch.version.hip else "tf32x3"
"""How tl.dot multiplies float32. Y has large entries that cancel in YᵀH (nearly equal keys, λ = 1),
so one tf32 product (2⁻¹¹) would reach past the rounding of a bf16 W; three of them (2⁻²²) keep the
accuracy of float32 at tensor-core speed. AMD has no tf32x3, but float32 tensor cores."""

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def round_to(b_x, DTYPE: tl.constexpr):
    """float32 → DTYPE, to nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:  # Triton's interpreter would truncate
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        return (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit(do_not_specialize=["n"])
def rank_k_update_kernel(
    weight, coeff, keys, n, d_out, d_in,
    stride_weight_o, stride_weight_i, stride_coeff_n, stride_coeff_o, stride_keys_n, stride_keys_i,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W[o, i] ← round(W[o, i] + Σ_n Y[n, o] · H[n, i]), one tile of W a program.

    The sum is taken in float32 and added to W last, with one rounding to nearest even. Operands
    are widened to float32, so Y is not rounded to the dtype of a bf16 model.
    """
    o_i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    o_o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_i, m_o = o_i < d_in, o_o < d_out
    b_delta = tl.full([BLOCK_O, BLOCK_I], 0.0, tl.float32)
    for i_n in range(0, n, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < n
        p_y = coeff + o_n[None, :] * stride_coeff_n + o_o[:, None] * stride_coeff_o
        p_h = keys + o_n[:, None] * stride_keys_n + o_i[None, :] * stride_keys_i
        b_y = tl.load(p_y, mask=m_o[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        b_h = tl.load(p_h, mask=m_n[:, None] & m_i[None, :], other=0.0).to(tl.float32)
        b_delta = tl.dot(b_y, b_h, b_delta, input_precision=PRECISION)
    p_w = weight + o_o[:, None] * stride_weight_o + o_i[None, :] * stride_weight_i
    m_w = m_o[:, None] & m_i[None, :]
    b_w = tl.load(p_w, mask=m_w, other=0.0).to(tl.float32) + b_delta
    tl.store(p_w, round_to(b_w, weight.dtype.element_ty), mask=m_w)


def rank_k_update_(weight: Tensor, coeff: Tensor, keys: Tensor) -> Tensor:
    """See `ultraedit_kernels.operations.rank_k_update_`."""
    if weight.dtype == torch.float64:
        # Only tests have float64 weights; BLAS adds to them in place as well.
        return torch_backend.rank_k_update_(weight, coeff, keys)
    n, (d_out, d_in) = len(coeff), weight.shape
    if n == 0:
        return weight
    grid = (triton.cdiv(d_in, CONFIG["BLOCK_I"]), triton.cdiv(d_out, CONFIG["BLOCK_O"]))
    with torch.cuda.device_of(weight):
        rank_k_update_kernel[grid](
            weight, coeff, keys, n, d_out, d_in,
            *weight.stride(), *coeff.stride(), *keys.stride(), PRECISION=PRECISION, **CONFIG,
        )  # fmt: skip
    return weight
