"""Second moments of wide rows are sketched; what a shield of them takes is nearly the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultraedit_kernels.method import moments
from ultraedit_kernels.method.moments import ROOM, Moments

D, LIMIT, WEIGHT, RIDGE = 96, 32, 3.0, 1.0
CPU = torch.device("cpu")


def rows(n: int, seed: int) -> Tensor:
    """Rows with a spectrum that falls off, as that of keys, in directions of its own."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.manual_seed(0))).Q
    scale = torch.arange(1, D + 1) ** -0.7 * 10
    return torch.randn(n, D, generator=torch.manual_seed(seed)) * scale @ basis.T


def gathered(parts: list[Tensor], **options) -> Moments:
    found = Moments(D, LIMIT, CPU, **options)
    for part in parts:
        found.add(part)
        if found.full:
            found.compress()
    return found


def left(shield: Tensor, keys: Tensor) -> Tensor:
    """kᵀ(I - BᵀB)k of each key."""
    keys, shield = keys.double(), shield.double()
    return keys.square().sum(1) - (keys @ shield.T).square().sum(1)


@pytest.fixture
def sketched(monkeypatch):
    monkeypatch.setattr(moments, "WHOLE", D - 1)


def test_a_sketch_leaves_nearly_what_the_whole_moments_leave(monkeypatch) -> None:
    parts = list(rows(4000, seed=1).split(100))
    whole = gathered(parts)
    monkeypatch.setattr(moments, "WHOLE", D - 1)
    sketch = gathered(parts)
    assert whole.whole and not sketch.whole and not whole.full
    assert sketch.trace == pytest.approx(float(torch.cat(parts).square().sum()), rel=1e-5)
    a, b = (left(one.shield(WEIGHT, RIDGE), rows(500, seed=2)) for one in (whole, sketch))
    assert a.shape == b.shape and float((b / a).median()) == pytest.approx(1, abs=0.05)
    assert float((b / a).min()) > 0.7 and float((b / a).max()) < 1.5


def test_a_sketch_of_few_rows_is_exact(sketched) -> None:
    few = rows(LIMIT - 5, seed=1)
    shield = gathered([few[:10], few[10:]]).shield(WEIGHT, RIDGE).double()
    a = WEIGHT**0.5 * few.double()
    expected = a.T @ torch.linalg.solve(a @ a.T + RIDGE * torch.eye(len(a)), a)
    assert shield.shape == (LIMIT, D)
    torch.testing.assert_close(shield.T @ shield, expected, atol=1e-4, rtol=1e-4)


def test_a_sketch_asks_to_be_compressed_before_it_outgrows_its_room(sketched) -> None:
    found = Moments(D, LIMIT, CPU)
    found.add(rows(ROOM, seed=1))
    assert found.full
    found.compress()
    assert not found.full
    found.add(rows(1, seed=2))
    assert found.full


def test_another_ranks_moments_are_weighed_and_asked_for_no_less(sketched) -> None:
    parts = [rows(100, seed) for seed in range(3)]
    ours, theirs = gathered(parts), gathered(parts, mine=False)
    assert theirs.trace == ours.trace and theirs.full == ours.full
    assert not theirs.shield(WEIGHT, RIDGE).any()
    assert theirs.shield(WEIGHT, RIDGE).shape == ours.shield(WEIGHT, RIDGE).shape
