from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ultraedit_kernels.ops import reference
from ultraedit_kernels.ops.kernels import gram, solve

Make = Callable[[int, int, torch.dtype], torch.Tensor]
Shape = tuple[int, int, int]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp_min(1e-300))


def test_gram_matches_reference(make: Make, shape: Shape, dtype: torch.dtype) -> None:
    n, d_in, _ = shape
    rows = make(n, d_in, dtype)
    got = gram.gram_matrix(rows)
    assert got.dtype == torch.float64
    assert relative_error(got, rows.double() @ rows.double().T) < 1e-14


def test_gram_is_the_same_every_time(device: torch.device) -> None:
    rows = torch.randn(40, 600, device=device)
    assert torch.equal(gram.gram_matrix(rows), gram.gram_matrix(rows))


def test_solve_matches_reference(make: Make, shape: Shape, dtype: torch.dtype) -> None:
    n, d_in, d_out = shape
    keys, values = make(n, d_in, dtype), make(n, d_out, dtype)
    got = solve(keys, values)
    assert got.shape == (n, d_out)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = reference.solve(keys.double(), values.double())
    assert relative_error(got, expected) < (1e-9 if dtype == torch.float64 else 1e-7)


@pytest.mark.parametrize("anchor_dtype", [torch.float32, torch.bfloat16])
def test_anchors(device: torch.device, anchor_dtype: torch.dtype) -> None:
    keys, values = torch.randn(5, 40, device=device), torch.randn(5, 7, device=device)
    anchors = torch.randn(3, 40, device=device).to(anchor_dtype)
    got = solve(keys, values, ridge=0.1, anchors=anchors)
    expected = reference.solve(keys.double(), values.double(), 0.1, anchors.double())
    assert got.shape == (8, 7)
    assert relative_error(got, expected) < 1e-7


def test_no_rows(device: torch.device) -> None:
    keys, values = torch.ones(0, 6, device=device), torch.ones(0, 4, device=device)
    assert gram.gram_matrix(keys).shape == (0, 0)
    assert solve(keys, values).shape == (0, 4)
    assert not solve(keys, values, anchors=torch.ones(2, 6, device=device)).any()


def test_exact_enough_for_ridge_1_under_keys_of_norm_1000(device: torch.device) -> None:
    """Nearly equal keys with different values: the answer lives in eigenvalues of HHᵀ near λ."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 256, generator=generator) + 1e-3 * torch.randn(
        24, 256, generator=generator
    )
    keys = (keys / keys.norm(dim=1, keepdim=True) * 1e3).to(device)
    values = torch.randn(24, 16, generator=generator).to(device)
    exact = keys.double() @ keys.double().T
    assert float((gram.gram_matrix(keys) - exact).abs().max()) < 1e-8

    expected = reference.solve(keys.double(), values.double()).T @ keys.double()
    # The coefficients come back in float32: that alone is 1e-5 here.
    assert relative_error(solve(keys, values).double().T @ keys.double(), expected) < 1e-4

    rounded = (keys @ keys.T).double() + torch.eye(24, dtype=torch.float64, device=device)
    coeff = torch.linalg.solve(rounded, values.double())
    assert relative_error(coeff.T @ keys.double(), expected) > 1e-3, "float32 would do as well"


def test_offsets_beyond_32_bits(
    device: torch.device, distant_rows: Callable[[int, int], torch.Tensor]
) -> None:
    rows = distant_rows(2, 20)
    rows[1] = 2.0
    assert gram.gram_matrix(rows).tolist() == [[0.0, 0.0], [0.0, 80.0]]


@pytest.mark.parametrize("n", [6, 40])
def test_one_key_under_values_that_conflict(device: torch.device, n: int) -> None:
    """Below and above d_in: all but one direction of Y cancels in YᵀH."""
    key = torch.randn(1, 12, device=device)
    keys = (1e3 * key / key.norm()).expand(n, 12)
    values = torch.randn(n, 3, device=device)
    # ΔWᵀ = h Σv / (n ‖h‖² + λ)
    h = keys[0].double()
    expected = h[:, None] * values.double().sum(0) / (n * h.square().sum() + 1)
    assert relative_error(keys.double().T @ solve(keys, values).double(), expected) < 1e-5
