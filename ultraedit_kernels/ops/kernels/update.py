"""W ← W + YᵀH: W is read once and written once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.ops import torch_backend
from ultraedit_kernels.ops.kernels.launch import INTERPRETED, arch, launch, tl, triton

TILE = {
    "BLOCK_O": 128, "BLOCK_I": 128, "BLOCK_N": 32,
    "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True,
}  # fmt: skip
"""For any number of rows: with few of them the time goes into W alone. For keys in bfloat16 it
takes at most 128 registers a thread on sm_80 to sm_90 and sm_120, so that two programs share an SM
and one multiplies while the other moves its tile of W. At d_in 14336, d_out 4096, n 300 that is
3 × 35 GFLOP for 235 MB: 107 and 50 µs at an H200's peaks. A tile reads 768 bytes of Y and H (from
L2: they are small) per 98 kFLOP; smaller tiles would be bound by L2."""

WIDE_TILE = TILE | {"BLOCK_N": 16}
"""For other keys: below 192 registers on NVIDIA GPUs, where 32 rows a step would take more."""

ANY_LAYOUT_TILE = TILE | {"BLOCK_O": 64, "BLOCK_I": 64, "BLOCK_N": 16}
"""For tensors that are not aligned row by row: the addresses of a larger tile overflow the
registers."""

IN_INTERPRETER = tl.constexpr(INTERPRETED)


def config(weight: Tensor, coeff: Tensor, keys: Tensor) -> dict[str, Any]:
    """Block sizes and options for these tensors.

    Y has large entries that cancel in YᵀH (nearly equal keys, λ = 1), so that one tf32 product
    (2⁻¹¹) would reach past the rounding of W. Keys in bfloat16 are multiplied with three bfloat16
    parts of Y. Together these are Y exactly (3 × 8 = 24 bits), and products of bfloat16 are exact
    in float32. Other keys take three tf32 products, at twice the cost: 2⁻²², nearly float32. AMD
    has no tf32x3, but float32 matrix cores.
    """
    split = keys.dtype == torch.bfloat16
    wide = "ieee" if arch(weight).startswith("gfx") else "tf32x3"
    tile = TILE if split else WIDE_TILE
    if not all(map(_aligned, (weight, coeff, keys))):
        tile = ANY_LAYOUT_TILE
    return tile | {"PRECISION": "bf16_parts" if split else wide}


def _aligned(x: Tensor) -> bool:
    """Whether x is row by row, with widths, strides and address in multiples of 16."""
    row, column = x.stride()
    return column == 1 and not (row % 16 or x.shape[1] % 16 or x.data_ptr() % 16)


@triton.jit
def mix(x):
    """A bijection of uint32 in which every bit of x moves every bit of the result: two rounds of
    multiply and xor-shift, with the constants of the `lowbias32` search. As `torch_backend.mix`."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def round_to(b_x, DTYPE: tl.constexpr):
    """float32 → DTYPE, to nearest, ties to even."""
    if IN_INTERPRETER and tl.bfloat16 == DTYPE:  # Triton's interpreter would truncate
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        return (b_bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return b_x.to(DTYPE)


@triton.jit
def round_stochastically(b_x, b_noise, DTYPE: tl.constexpr):
    """float32 → DTYPE, to either neighbour, the nearer one more often: on average to b_x itself.

    Adds noise, uniform below one unit in the last place, to the bits, and cuts off what DTYPE does
    not hold. See `torch_backend.round_stochastically`, which gives the same bits.
    """
    KEPT: tl.constexpr = 0xFFFF0000 if tl.bfloat16 == DTYPE else 0xFFFFE000
    LARGEST: tl.constexpr = 3.3895313892515355e38 if tl.bfloat16 == DTYPE else 65504.0
    b_shifted = b_x
    if tl.float16 == DTYPE:
        # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, as the numbers from there to 2⁻¹³ have.
        b_lift = tl.where(tl.abs(b_x) < 2.0**-14, tl.where(b_x < 0, -(2.0**-14), 2.0**-14), 0.0)
        b_shifted = b_x + b_lift
    b_bits = b_shifted.to(tl.uint32, bitcast=True) + (b_noise & (0xFFFFFFFF - KEPT))
    b_cut = (b_bits & KEPT).to(tl.float32, bitcast=True)
    if tl.float16 == DTYPE:
        b_cut -= b_lift
    return tl.where(tl.abs(b_x) <= LARGEST, b_cut.to(DTYPE), round_to(b_x, DTYPE))


@triton.jit(do_not_specialize=["n", "seed"])
def rank_k_update_kernel(
    weight, coeff, keys, n, d_out, d_in, seed,
    stride_weight_o, stride_weight_i, stride_coeff_n, stride_coeff_o, stride_keys_n, stride_keys_i,
    STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W[o, i] ← round(W[o, i] + Σ_n Y[n, o] · H[n, i]), one tile of W a program.

    The sum is taken in float32 and added to W last, with one rounding.
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
        b_h = tl.load(p_h, mask=m_n[:, None] & m_i[None, :], other=0.0)
        if PRECISION == "bf16_parts":
            for _ in tl.static_range(3):
                b_part = (b_y.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
                b_y -= b_part
                if IN_INTERPRETER:  # where products of bfloat16 are garbage
                    b_delta = tl.dot(b_part, b_h.to(tl.float32), b_delta)
                else:
                    b_delta = tl.dot(b_part.to(tl.bfloat16), b_h, b_delta)
        else:
            b_delta = tl.dot(b_y, b_h.to(tl.float32), b_delta, input_precision=PRECISION)
    p_w = weight + o_o[:, None] * stride_weight_o + o_i[None, :] * stride_weight_i
    m_w = m_o[:, None] & m_i[None, :]
    # W passes once: it should not push Y and H out of the L2 cache.
    b_w = tl.load(p_w, mask=m_w, other=0.0, eviction_policy="evict_first").to(tl.float32) + b_delta
    if STOCHASTIC:
        b_row = mix(o_o.to(tl.uint32) ^ seed.to(tl.uint32))
        b_noise = mix(b_row[:, None] ^ o_i.to(tl.uint32)[None, :])
        b_rounded = round_stochastically(b_w, b_noise, weight.dtype.element_ty)
    else:
        b_rounded = round_to(b_w, weight.dtype.element_ty)
    tl.store(p_w, b_rounded, mask=m_w, eviction_policy="evict_first")


def rank_k_update_(
    weight: Tensor, coeff: Tensor, keys: Tensor, *, rounding: str = "nearest", seed: int = 0
) -> Tensor:
    """See `ultraedit_kernels.ops.operations.rank_k_update_`."""
    if weight.dtype == torch.float64:
        # Only tests have float64 weights; BLAS adds to them in place as well.
        return torch_backend.rank_k_update_(weight, coeff, keys)
    n, (d_out, d_in) = len(coeff), weight.shape
    if n == 0:
        return weight
    meta = config(weight, coeff, keys)
    stochastic = rounding == "stochastic" and weight.dtype.itemsize == 2
    grid = (triton.cdiv(d_in, meta["BLOCK_I"]), triton.cdiv(d_out, meta["BLOCK_O"]))
    with torch.cuda.device_of(weight):
        launch(
            rank_k_update_kernel, grid,
            weight, coeff, keys, n, d_out, d_in, torch_backend.mix_seed(seed),
            *weight.stride(), *coeff.stride(), *keys.stride(),
            STOCHASTIC=stochastic, **meta,
        )  # fmt: skip
    return weight
