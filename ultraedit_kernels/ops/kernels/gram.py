"""The ridge system: HHᵀ in float64 by a kernel, then the Cholesky solve of PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.ops import torch_backend
from ultraedit_kernels.ops.kernels.launch import launch, tl, triton

CONFIG = {"BLOCK_N": 32, "BLOCK_D": 32, "num_warps": 4, "enable_fp_fusion": True}
"""32 × 32 tiles of float64: float64 tensor cores on sm_80 and sm_90 and (from Triton 3.8) sm_100,
FMA elsewhere. From 64 rows on, Triton 3.6 and 3.7 choose tcgen05 for sm_100 and fail.

Float64 throughout is also what GPUs with 1/64 of float32's rate for it get. At n 300 and d_in
14336 it is 1.4 GFLOP, 1 to 3 ms where float64 runs at 0.5 to 1.4 TFLOP/s, and the Cholesky solve
that follows costs as much. Sums in float32, even of exact products of bfloat16, are not exact
enough, and splitting into integers would be a second kernel."""

STAGES = {torch.float32: 4, torch.float64: 3}
"""Blocks in flight; what does not spill on any GPU."""

PROGRAMS = 512
"""Programs to aim for: several per SM of any GPU. A constant, so that the order of summation, and
with it every bit of the result, does not depend on how many SMs there are."""

MIN_SPLIT = 256
"""Fewest columns of H that are worth a program."""


@triton.jit(do_not_specialize=["n", "blocks"])
def gram_kernel(
    h, gram, n, d, blocks, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """gram[i_s] = Σ_k h_k h_kᵀ over the columns k of split i_s.

    A program computes one tile of the lower half and writes it and its mirror image.

    Products and sums in float64: under λ = 1 and ‖h‖ = 10³, HHᵀ has entries of 10⁶ whose small
    eigenvalues matter; sums in float32 would already be off by 0.1.
    """
    i_r, i_c, i_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i_r < i_c:
        return
    o_r = i_r.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = i_c.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_r, m_c = o_r < n, o_c < n
    b_gram = tl.full([BLOCK_N, BLOCK_N], 0.0, tl.float64)
    start = i_s * blocks * BLOCK_D
    for i_d in range(start, tl.minimum(start + blocks * BLOCK_D, d), BLOCK_D):
        o_d = i_d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = o_d < d
        p_r = h + o_r[:, None] * stride_n + o_d[None, :] * stride_d
        p_c = h + o_c[:, None] * stride_n + o_d[None, :] * stride_d
        b_r = tl.load(p_r, mask=m_r[:, None] & m_d[None, :], other=0.0).to(tl.float64)
        b_c = tl.load(p_c, mask=m_c[:, None] & m_d[None, :], other=0.0).to(tl.float64)
        b_gram = tl.dot(b_r, tl.trans(b_c), b_gram, out_dtype=tl.float64)
    p_gram = gram + i_s.to(tl.int64) * n * n
    # Only the lower half of a tile on the diagonal: its two stores would meet, and may differ.
    m_gram = m_r[:, None] & (o_r[:, None] >= o_c[None, :])
    tl.store(p_gram + o_r[:, None] * n + o_c[None, :], b_gram, mask=m_gram)
    tl.store(p_gram + o_c[None, :] * n + o_r[:, None], b_gram, mask=m_gram)


def gram_matrix(rows: Tensor) -> Tensor:
    """HHᵀ [n, n] in float64 for rows H [n, d] of any floating-point dtype and strides."""
    n, d = rows.shape
    if n == 0:
        return torch.zeros((0, 0), dtype=torch.float64, device=rows.device)
    if rows.dtype.itemsize == 2:
        # Triton below 3.9 cannot lower a float64 product whose operands are loaded as 16 bits.
        rows = rows.float()
    block_n, block_d = CONFIG["BLOCK_N"], CONFIG["BLOCK_D"]
    tiles = triton.cdiv(n, block_n)
    splits = min(triton.cdiv(d, MIN_SPLIT), max(1, PROGRAMS * 2 // (tiles * (tiles + 1))))
    blocks = triton.cdiv(triton.cdiv(d, splits), block_d)
    splits = triton.cdiv(d, blocks * block_d)
    gram = torch.empty((splits, n, n), dtype=torch.float64, device=rows.device)
    with torch.cuda.device_of(rows):
        launch(
            gram_kernel, (tiles, tiles, splits),
            rows, gram, n, d, blocks, *rows.stride(), num_stages=STAGES[rows.dtype], **CONFIG,
        )  # fmt: skip
    return gram[0] if splits == 1 else gram.sum(0)


def solve(
    keys: Tensor, values: Tensor, ridge: float = 1.0, anchors: Tensor | None = None
) -> Tensor:
    """See `ultraedit_kernels.ops.operations.solve`."""
    rows = keys if anchors is None else torch.cat([keys, anchors])
    n, d_in = rows.shape
    if n > d_in:
        # The primal system is at most d_in wide: too small for the kernel to matter.
        return torch_backend.solve(keys, values, ridge, anchors)
    return torch_backend.solve_gram(gram_matrix(rows), values, ridge)
