"""The reference against loops over numbers; its golden vectors are in `test_operations.py`."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.ops import reference
from ultraedit_kernels.ops.statistics import EPS, Statistics


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(5, 4, generator=generator, dtype=torch.float64) + 2
    return keys, torch.randn(5, 3, generator=generator, dtype=torch.float64)


def test_statistics_and_values_number_by_number(rows):
    keys, grads = rows
    stats = reference.update_statistics(Statistics.empty(4, 3), keys[:2], grads[:2])
    stats = reference.update_statistics(stats, keys[2:], grads[2:])
    assert float(stats.count) == 5
    z = torch.cat([keys, grads], 1)
    for column, (mean, m2) in enumerate(zip(stats.mean.tolist(), stats.m2.tolist(), strict=True)):
        numbers = z[:, column].tolist()
        assert mean == pytest.approx(sum(numbers) / 5)
        assert m2 == pytest.approx(sum((x - mean) ** 2 for x in numbers))
    values = reference.edit_values(keys, grads, stats, 0.1)
    scaled = [
        [(x - m) / (s + EPS) for x, m, s in zip(row, stats.mean, stats.std, strict=True)]
        for row in z
    ]
    for row, expected in zip(values, scaled, strict=True):
        length = sum(x**2 for x in expected[:4])
        assert row.tolist() == pytest.approx([float(-0.1 * length * g) for g in expected[4:]])


def test_no_rows_change_no_statistics():
    stats = Statistics.empty(4, 3)
    assert reference.update_statistics(stats, torch.zeros(0, 4), torch.zeros(0, 3)) is stats


def test_the_change_moves_keys_to_their_values_and_anchors_nowhere(rows):
    """With hardly any ridge, and fewer rows than columns."""
    keys, _ = rows
    values = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, -1.0]], dtype=torch.float64)
    coeff = reference.solve(keys[:2], values, 1e-12, anchors=keys[2:3])
    assert coeff.shape == (3, 3)
    weight = torch.zeros(3, 4, dtype=torch.float64)
    assert reference.rank_k_update_(weight, coeff, keys[:3]) is weight
    torch.testing.assert_close(keys[:2] @ weight.T, values, rtol=1e-6, atol=1e-6)
    assert (keys[2] @ weight.T).abs().max() < 1e-6
