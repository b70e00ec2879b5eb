from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ultraedit_kernels.ops import reference
from ultraedit_kernels.ops.kernels import update_statistics
from ultraedit_kernels.ops.statistics import Statistics

Make = Callable[[int, int, torch.dtype], torch.Tensor]
Shape = tuple[int, int, int]


def assert_close(got: Statistics, expected: Statistics, rtol: float = 1e-12) -> None:
    assert float(got.count) == float(expected.count)
    assert got.mean.dtype == got.m2.dtype == torch.float64
    torch.testing.assert_close(got.mean, expected.mean, rtol=rtol, atol=rtol)
    torch.testing.assert_close(got.m2, expected.m2, rtol=rtol, atol=rtol)


def test_matches_reference(
    make: Make, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    n, d_in, d_out = shape
    got = expected = Statistics.empty(d_in, d_out, device)
    for rows in (n, 3, 1):
        keys, grads = make(rows, d_in, dtype), make(rows, d_out, dtype)
        got = update_statistics(got, keys, grads)
        expected = reference.update_statistics(expected, keys.double(), grads.double())
        assert_close(got, expected)


def test_does_not_change_its_input(device: torch.device) -> None:
    stats = Statistics.empty(5, 3, device)
    update_statistics(stats, torch.ones(4, 5, device=device), torch.ones(4, 3, device=device))
    assert not stats.mean.any() and not stats.m2.any() and float(stats.count) == 0


def test_no_rows_change_nothing(device: torch.device) -> None:
    stats = update_statistics(
        Statistics.empty(5, 3, device),
        torch.ones(2, 5, device=device),
        torch.ones(2, 3, device=device),
    )
    assert_close(update_statistics(stats, torch.ones(0, 5), torch.ones(0, 3)), stats, rtol=0)


def test_keys_and_gradients_of_different_dtypes(device: torch.device) -> None:
    keys = torch.randn(5, 6, device=device).bfloat16()
    grads = torch.randn(5, 4, device=device)
    empty = Statistics.empty(6, 4, device)
    expected = reference.update_statistics(empty, keys.double(), grads.double())
    assert_close(update_statistics(empty, keys, grads), expected)


def test_mean_much_larger_than_deviation(device: torch.device) -> None:
    """Σx² - (Σx)²/n would lose every digit of this M2."""
    x = 1e6 + torch.randn(100, 8, dtype=torch.float64, device=device) * 1e-3
    stats = update_statistics(Statistics.empty(4, 4, device), x[:, :4], x[:, 4:])
    torch.testing.assert_close(stats.m2, (x - x.mean(0)).square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("count", [2**24 + 1, 2**31 + 1])
def test_count_beyond_32_bits(device: torch.device, count: int) -> None:
    """The running count enters the merge in float64: a float32 counter stops at 2²⁴."""
    old = torch.ones(2, dtype=torch.float64, device=device)
    stats = Statistics(torch.tensor(float(count), dtype=torch.float64), old, old, 1)
    row = torch.full((1, 1), 1.0 + count, device=device, dtype=torch.float64)
    assert_close(update_statistics(stats, row, row), reference.update_statistics(stats, row, row))


def test_order_of_batches_does_not_matter(device: torch.device) -> None:
    x = torch.randn(50, 9, device=device)
    whole = update_statistics(Statistics.empty(5, 4, device), x[:, :5], x[:, 5:])
    parts = Statistics.empty(5, 4, device)
    for batch in reversed(x.split([1, 1, 33, 15])):
        parts = update_statistics(parts, batch[:, :5], batch[:, 5:])
    assert_close(parts, whole)


def test_offsets_beyond_32_bits(
    device: torch.device, distant_rows: Callable[[int, int], torch.Tensor]
) -> None:
    keys, grads = distant_rows(2, 6), distant_rows(2, 3)
    keys[1], grads[1] = 2.0, 4.0
    stats = update_statistics(Statistics.empty(6, 3, device), keys, grads)
    assert stats.mean.tolist() == [1.0] * 6 + [2.0] * 3
    assert stats.m2.tolist() == [2.0] * 6 + [8.0] * 3
