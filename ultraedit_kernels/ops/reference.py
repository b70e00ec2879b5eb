"""The four operations in plain PyTorch, written as the formulas read. Float64 is the ground truth.

Every fast implementation (`torch_backend`, `kernels/`) has functions of the same names, and is
tested against these. Notation: keys H [n, d_in], gradients G [n, d_out], weight W [d_out, d_in].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.ops.statistics import EPS, Statistics


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """Merge the rows z = [h ; g] into the running count, mean and M2."""
    z = torch.cat([keys, grads], dim=1)
    if len(z) == 0:
        return stats
    mean = z.mean(0)
    return stats.merge(len(z), mean, (z - mean).square().sum(0))


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """v_i = -lr · ‖ĥ_i‖² · ĝ_i with ẑ = (z - mean) / (std + eps), [n, d_out]."""
    z = torch.cat([keys, grads], dim=1)
    z_hat = (z - stats.mean.to(z.dtype)) / (stats.std.to(z.dtype) + EPS)
    h_hat, g_hat = z_hat[:, : stats.d_in], z_hat[:, stats.d_in :]
    return -lr * h_hat.square().sum(1, keepdim=True) * g_hat


def solve(
    keys: Tensor, values: Tensor, ridge: float = 1.0, anchors: Tensor | None = None
) -> Tensor:
    """Y = (HHᵀ + λI)⁻¹ V, so that ΔWᵀ = HᵀY = (HᵀH + λI)⁻¹HᵀV; [n + anchors, d_out].

    Anchors are further rows of H whose values are zero.
    """
    if anchors is not None:
        keys = torch.cat([keys, anchors])
        values = torch.cat([values, values.new_zeros(len(anchors), values.shape[1])])
    gram = keys @ keys.T + ridge * torch.eye(len(keys), dtype=keys.dtype, device=keys.device)
    coeff: Tensor = torch.linalg.solve(gram, values)
    return coeff


def rank_k_update_(weight: Tensor, coeff: Tensor, keys: Tensor) -> Tensor:
    """W ← W + YᵀH, in place."""
    return weight.add_(coeff.T @ keys)
