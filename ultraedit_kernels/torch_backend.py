"""The four operations from PyTorch operations with bounded extra memory; the backend without a GPU.

No full-size copy of W is made, [keys ; grads] is never concatenated, and the ridge system is the
smaller of n × n and d_in × d_in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.statistics import EPS, Statistics

UPDATE_ROWS = 256
"""Rows of a half-precision W that are widened to float32 at a time."""


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """See `ultraedit_kernels.operations.update_statistics`."""
    if len(keys) == 0:
        return stats
    parts = [_moments(x.to(_compute_dtype(x))) for x in (keys, grads)]
    mean, m2 = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return stats.merge(len(keys), mean, m2)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 of the columns of x [n, d], float64.

    Two passes over deviations from the first row, so that a constant column has M2 zero. Sums are
    products with a row of ones, which run at the speed of memory where column sums do not.
    """
    ones = x.new_ones(1, len(x))
    deviation = x - x[0]
    shift = (ones @ deviation).squeeze(0) / len(x)
    m2 = ones @ deviation.sub_(shift).square_()
    return x[0].double() + shift.double(), m2.squeeze(0).double()


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """See `ultraedit_kernels.operations.edit_values`."""
    dtype = _compute_dtype(keys)
    mean, scale = stats.mean.to(dtype), (1 / (stats.std + EPS)).to(dtype)
    h_hat = (keys.to(dtype) - mean[: stats.d_in]).mul_(scale[: stats.d_in])
    step = torch.linalg.vector_norm(h_hat, dim=1, keepdim=True).square_().mul_(-lr)
    return (grads.to(dtype) - mean[stats.d_in :]).mul_(scale[stats.d_in :]).mul_(step)


def solve(keys: Tensor, values: Tensor, ridge: float, anchors: Tensor | None) -> Tensor:
    """See `ultraedit_kernels.operations.solve`."""
    dtype = _compute_dtype(values)
    rows = keys.double() if anchors is None else torch.cat([keys.double(), anchors.double()])
    padded = torch.zeros(len(rows), values.shape[1], dtype=torch.float64, device=values.device)
    padded[: len(values)] = values
    n, d_in = rows.shape
    if n <= d_in:
        return solve_gram(rows @ rows.T, padded, ridge).to(dtype)
    # Primal: X = HᵀY from the smaller system, then Y from (HHᵀ + λI) Y = V.
    x = solve_gram(rows.T @ rows, rows.T @ padded, ridge)
    return padded.addmm_(rows, x, alpha=-1).div_(ridge).to(dtype)


def solve_gram(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(gram + λI)⁻¹ right by Cholesky; gram [m, m] float64 is overwritten."""
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def rank_k_update_(weight: Tensor, coeff: Tensor, keys: Tensor) -> Tensor:
    """See `ultraedit_kernels.operations.rank_k_update_`."""
    dtype = _compute_dtype(weight)
    coeff, keys = coeff.to(dtype), keys.to(dtype)
    if weight.dtype == dtype:
        return weight.addmm_(coeff.T, keys)
    for start in range(0, len(weight), UPDATE_ROWS):
        rows = weight[start : start + UPDATE_ROWS]
        rows.copy_(rows.to(dtype).addmm_(coeff[:, start : start + UPDATE_ROWS].T, keys))
    return weight
