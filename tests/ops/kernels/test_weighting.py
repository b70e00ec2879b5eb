from __future__ import annotations

from collections.abc import Callable

import torch

from ultraedit_kernels.ops import reference
from ultraedit_kernels.ops.kernels import edit_values
from ultraedit_kernels.ops.statistics import Statistics

Make = Callable[[int, int, torch.dtype], torch.Tensor]
Shape = tuple[int, int, int]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def statistics(keys: torch.Tensor, grads: torch.Tensor) -> Statistics:
    """Statistics of the rows and of five more, so that a single row is not its own mean."""
    stats = Statistics.empty(keys.shape[1], grads.shape[1], keys.device)
    for h, g in ((keys, grads), (torch.randn(5, keys.shape[1]), torch.randn(5, grads.shape[1]))):
        stats = reference.update_statistics(
            stats, h.double().to(keys.device), g.double().to(keys.device)
        )
    return stats


def test_matches_reference(make: Make, shape: Shape, dtype: torch.dtype) -> None:
    n, d_in, d_out = shape
    keys, grads = make(n, d_in, dtype), make(n, d_out, dtype)
    stats = statistics(keys, grads)
    got = edit_values(keys, grads, stats, 1e-6)
    assert got.shape == (n, d_out)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.edit_values(keys.double(), grads.double(), stats, 1e-6)
    assert relative_error(got, expected) < (1e-13 if dtype == torch.float64 else 1e-7)


def test_no_rows(device: torch.device) -> None:
    stats = Statistics.empty(5, 3, device)
    got = edit_values(torch.ones(0, 5, device=device), torch.ones(0, 3, device=device), stats, 1.0)
    assert got.shape == (0, 3)


def test_first_row_ever_gives_zero_not_nan(device: torch.device) -> None:
    """One row: the deviation is zero, and so are z - mean and the values."""
    keys, grads = torch.randn(1, 5, device=device), torch.randn(1, 3, device=device)
    stats = reference.update_statistics(
        Statistics.empty(5, 3, device), keys.double(), grads.double()
    )
    assert torch.equal(edit_values(keys, grads, stats, 1.0), torch.zeros(1, 3, device=device))


def test_features_that_never_vary_are_ignored(device: torch.device) -> None:
    keys, grads = torch.randn(6, 5, device=device), torch.randn(6, 3, device=device)
    keys[:, 2] = 7.0
    stats = reference.update_statistics(
        Statistics.empty(5, 3, device), keys.double(), grads.double()
    )
    expected = reference.edit_values(keys.double(), grads.double(), stats, 1e-3)
    assert relative_error(edit_values(keys, grads, stats, 1e-3), expected) < 1e-7


def test_mean_much_larger_than_deviation(device: torch.device) -> None:
    """h - mean in float32 would be wrong in the second digit."""
    keys = 1000 + torch.randn(20, 40, device=device) * 1e-3
    grads = torch.randn(20, 8, device=device)
    stats = reference.update_statistics(
        Statistics.empty(40, 8, device), keys.double(), grads.double()
    )
    expected = reference.edit_values(keys.double(), grads.double(), stats, 1e-6)
    assert relative_error(edit_values(keys, grads, stats, 1e-6), expected) < 1e-7


def test_offsets_beyond_32_bits(
    device: torch.device, distant_rows: Callable[[int, int], torch.Tensor]
) -> None:
    keys, grads = distant_rows(2, 6), distant_rows(2, 3)
    keys[1], grads[1] = 2.0, 4.0
    stats = statistics(keys, grads)
    expected = reference.edit_values(keys.double(), grads.double(), stats, 1.0)
    assert relative_error(edit_values(keys, grads, stats, 1.0), expected) < 1e-7
