"""Shields: the sketch, and the solve that anchors constrain."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.method.shield import System, extend_shield, shielded, sketch
from ultraedit_kernels.ops import operations


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("n, m", [(1, 1), (5, 20), (30, 8)])
def test_shielded_solve_is_the_solve_with_anchor_rows(n, m):
    keys, anchors, values = rows(n, 24, 0), rows(m, 24, 1), rows(n, 6, 2)
    expected = operations.solve(keys, values, 0.5, anchors).T @ torch.cat([keys, anchors])
    shield = torch.zeros(0, 24, dtype=torch.float64)
    for part in anchors.split(3):  # anchors may come bit by bit
        shield = extend_shield(shield, part, 0.5, limit=100)
    system = System(keys, 0.5, shield)
    coeff = system.solve(values)
    assert coeff.shape == (n, 6) and system.keys.shape == (n, 24)
    assert torch.allclose(coeff.T @ system.keys, expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(system.solve(2 * values), 2 * coeff)
    assert torch.equal(
        System(keys, 0.5, shield[:0]).solve(values), operations.solve(keys, values, 0.5)
    )


def test_sketch_is_exact_at_full_rank_and_the_best_below():
    wide, tall = rows(9, 20, 0), rows(60, 20, 1)
    assert sketch(wide, 9) is wide
    full = sketch(tall, 20)
    assert full.shape == (20, 20)
    assert torch.allclose(full.T @ full, tall.T @ tall)
    for matrix in (wide, tall):
        part = sketch(matrix, 5)
        singular = torch.linalg.svdvals(matrix)
        rest = torch.linalg.matrix_norm(matrix.T @ matrix - part.T @ part, 2)
        assert part.shape == (5, 20)
        assert torch.isclose(rest, singular[5] ** 2)


def test_shielded_rows_keep_only_what_anchors_leave():
    anchors, free = rows(4, 24, 0), rows(3, 24, 1)
    shield = extend_shield(torch.zeros(0, 24, dtype=torch.float64), anchors, 1e-9, limit=100)
    assert shielded(anchors, shield).abs().max() < 1e-6 * anchors.abs().max()
    expected = free - free @ torch.linalg.pinv(anchors) @ anchors
    assert torch.allclose(shielded(free, shield), expected, atol=1e-6)
    assert torch.equal(shielded(free, shield[:0]), free)
