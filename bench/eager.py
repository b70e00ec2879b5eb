"""What a practitioner would write instead of this package: the dual form in plain PyTorch.

The same formulas as `reference` (UltraEdit, arXiv 2505.14679, §3; the push-through identity), in
the fastest eager operations known to us: no row is concatenated, column sums are products with a
row of ones, the n × n system is float64, half-precision W takes one rounding. No checks, no primal
form, statistics in float32. `torch.compile` of `turn_` is the other baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines import EPS, Moments


def update_moments(moments: Moments, keys: Tensor, grads: Tensor) -> Moments:
    """Merge keys [n, d_in] and grads [n, d_out], n ≥ 1, as `baselines.update_moments` does."""
    n, total = len(keys), moments.rows + len(keys)
    ones = torch.ones(1, n, device=keys.device)
    means, squares = [], []
    for x in (keys.float(), grads.float()):
        means.append((ones @ x).squeeze(0) / n)
        squares.append((ones @ (x - means[-1]).square()).squeeze(0))
    delta = torch.cat(means) - moments.mean
    m2 = moments.m2 + torch.cat(squares) + delta.square() * (moments.rows * n / total)
    return Moments(total, moments.mean + delta * (n / total), m2)


def edit_values(keys: Tensor, grads: Tensor, moments: Moments, lr: float) -> Tensor:
    """v_i = -lr · ‖ĥ_i‖² · ĝ_i, [n, d_out]."""
    d_in, scale = keys.shape[1], 1 / (moments.std + EPS)
    h_hat = (keys.float() - moments.mean[:d_in]) * scale[:d_in]
    g_hat = (grads.float() - moments.mean[d_in:]) * scale[d_in:]
    return -lr * h_hat.square().sum(1, keepdim=True) * g_hat


def solve(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    """Y with (HHᵀ + λI) Y = V, [n, d_out]."""
    rows = keys.double()
    gram = rows @ rows.T
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(values.double(), torch.linalg.cholesky(gram)).float()


def update_(weight: Tensor, coeff: Tensor, keys: Tensor) -> Tensor:
    """W ← W + YᵀH in place, products in float32."""
    if weight.dtype == torch.float32:
        return weight.addmm_(coeff.T, keys)
    return weight.add_(coeff.T @ keys.float())


def turn_(
    weight: Tensor, keys: Tensor, grads: Tensor, moments: Moments, lr: float, ridge: float = 1.0
) -> Moments:
    """All steps of one turn on one module: W [d_out, d_in] in place; returns the new moments."""
    moments = update_moments(moments, keys, grads)
    coeff = solve(keys, edit_values(keys, grads, moments, lr), ridge)
    update_(weight, coeff, keys)
    return moments
