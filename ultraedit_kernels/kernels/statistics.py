"""Running statistics of z = [keys ; grads], without the concatenation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ultraedit_kernels.statistics import Statistics

CONFIG = {"BLOCK_N": 32, "BLOCK_D": 64, "num_warps": 4, "enable_fp_fusion": True}
"""64 columns give d_in 14336 over two programs per SM of a large GPU, and rows of 128 bytes in
bf16; 32 rows of float64 are then 32 registers a thread."""


@triton.jit(do_not_specialize=["n"])
def merge_statistics_kernel(
    x, mean, m2, merged_mean, merged_m2, n, d, stride_n, stride_d, count: tl.float64,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge the rows of x [n, d] into (count, mean, M2), one block of r rows after the other:

        x̄     = Σ x / r
        δ     = x̄ - mean
        mean ← mean + δ · r / (count + r)
        M2   ← M2 + Σ (x - x̄)² + δ² · count · r / (count + r)
        count ← count + r

    In float64: the work is bound by memory, and the mean may be much larger than the deviation.
    """
    o_d = tl.program_id(0).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    b_mean = tl.load(mean + o_d, mask=m_d, other=0.0)
    b_m2 = tl.load(m2 + o_d, mask=m_d, other=0.0)
    for i_n in range(0, n, BLOCK_N):
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


def merge_statistics(
    x: Tensor, count: float, mean: Tensor, m2: Tensor, merged_mean: Tensor, merged_m2: Tensor
) -> None:
    """Write the merge of x [n, d] and (count, mean, m2) to merged_mean and merged_m2 [d]."""
    n, d = x.shape
    with torch.cuda.device_of(x):
        merge_statistics_kernel[(triton.cdiv(d, CONFIG["BLOCK_D"]),)](
            x, mean, m2, merged_mean, merged_m2, n, d, *x.stride(), count, **CONFIG
        )


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """See `ultraedit_kernels.operations.update_statistics`."""
    if len(keys) == 0:
        return stats
    mean = torch.empty(stats.mean.shape, dtype=torch.float64, device=keys.device)
    m2 = torch.empty(stats.m2.shape, dtype=torch.float64, device=keys.device)
    for x, part in ((keys, slice(stats.d_in)), (grads, slice(stats.d_in, None))):
        merge_statistics(
            x, float(stats.count), stats.mean[part], stats.m2[part], mean[part], m2[part]
        )
    return Statistics(stats.count + len(keys), mean, m2, stats.d_in)
