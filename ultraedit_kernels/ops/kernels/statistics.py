"""Running statistics of z = [keys ; grads], without the concatenation."""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.ops.kernels.launch import launch, tl, triton
from ultraedit_kernels.ops.statistics import Statistics

CONFIG = {"BLOCK_N": 32, "BLOCK_D": 64, "STAGES": 3, "num_warps": 4, "enable_fp_fusion": True}
"""64 columns give d_in 14336 and d_out 4096 two programs per SM of a large GPU, and rows of 128
bytes in bf16. 3 blocks of 32 rows are then 24 KB in flight per SM, what it takes to hide 700 ns at
4 TB/s; a block in float64 is 32 registers a thread."""


@triton.jit
def merge_columns(
    x, mean, m2, merged_mean, merged_m2, i_d, n, d, stride_n, stride_d, count,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The kernel's formula for block i_d of the columns of x [n, d]."""
    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    b_mean = tl.load(mean + o_d, mask=m_d, other=0.0)
    b_m2 = tl.load(m2 + o_d, mask=m_d, other=0.0)
    for i_n in tl.range(0, n, BLOCK_N, num_stages=STAGES):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_x = (o_n < n)[:, None] & m_d[None, :]
        p_x = x + o_n[:, None] * stride_n + o_d[None, :] * stride_d
        b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float64)
        rows = tl.minimum(n - i_n, BLOCK_N).to(tl.float64)
        total = count + rows
        b_block_mean = tl.sum(b_x, axis=0) / rows
        b_deviation = tl.where(m_x, b_x - b_block_mean[None, :], 0.0)
        b_shift = b_block_mean - b_mean
        b_mean += b_shift * (rows / total)
        b_m2 += tl.sum(b_deviation * b_deviation, axis=0)
        b_m2 += b_shift * b_shift * (count * rows / total)
        count = total
    tl.store(merged_mean + o_d, b_mean, mask=m_d)
    tl.store(merged_m2 + o_d, b_m2, mask=m_d)


@triton.jit(do_not_specialize=["n"])
def merge_statistics_kernel(
    keys, grads, mean, m2, merged_mean, merged_m2, n, d_in, d_out,
    stride_keys_n, stride_keys_d, stride_grads_n, stride_grads_d, count: tl.float64,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the rows z = [h ; g] into (count, mean, M2), one block of r rows after the other:

        z̄     = Σ z / r
        δ     = z̄ - mean
        mean ← mean + δ · r / (count + r)
        M2   ← M2 + Σ (z - z̄)² + δ² · count · r / (count + r)
        count ← count + r

    In float64: the work is bound by memory, and the mean may be much larger than the deviation.
    """
    i_d = tl.program_id(0)
    key_blocks = tl.cdiv(d_in, BLOCK_D)
    if i_d < key_blocks:
        merge_columns(
            keys, mean, m2, merged_mean, merged_m2, i_d, n, d_in, stride_keys_n, stride_keys_d,
            count, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip
    else:
        merge_columns(
            grads, mean + d_in, m2 + d_in, merged_mean + d_in, merged_m2 + d_in, i_d - key_blocks,
            n, d_out, stride_grads_n, stride_grads_d, count, BLOCK_N, BLOCK_D, STAGES,
        )  # fmt: skip


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """See `ultraedit_kernels.ops.operations.update_statistics`."""
    n, d_in = keys.shape
    if n == 0:
        return stats
    d_out, block = grads.shape[1], CONFIG["BLOCK_D"]
    mean, m2 = torch.empty_like(stats.mean), torch.empty_like(stats.m2)
    with torch.cuda.device_of(keys):
        launch(
            merge_statistics_kernel, (triton.cdiv(d_in, block) + triton.cdiv(d_out, block),),
            keys, grads, stats.mean, stats.m2, mean, m2, n, d_in, d_out,
            *keys.stride(), *grads.stride(), float(stats.count), **CONFIG,
        )  # fmt: skip
    return Statistics(stats.count + n, mean, m2, stats.d_in)
