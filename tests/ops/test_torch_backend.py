"""What only this backend has: the random bits and the stochastic rounding that kernels repeat."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraedit_kernels.ops import torch_backend

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


def test_random_bits_are_uniform_and_independent():
    bits = torch_backend.random_bits(0, 0, 512, 1024)
    ones = torch.stack([(bits >> i) & 1 for i in range(32)]).double()
    sigma = 0.5 / bits.numel() ** 0.5
    assert ((ones.mean((1, 2)) - 0.5).abs() < 5 * sigma).all()
    # Neighbours in a row, in a column and in seed agree in half of their bits.
    others = [bits.roll(1, 0), bits.roll(1, 1), torch_backend.random_bits(1, 0, 512, 1024)]
    for other in others:
        agree = torch.stack([((bits ^ other) >> i) & 1 for i in range(32)]).double()
        assert ((agree.mean((1, 2)) - 0.5).abs() < 5 * sigma).all()
    low = (bits & 0xFF).flatten().bincount(minlength=256).double()
    expected = bits.numel() / 256
    chi_square = ((low - expected).square() / expected).sum()
    assert chi_square < 255 + 6 * (2 * 255) ** 0.5


@HALVES
@settings(deadline=None, max_examples=30)
@given(value=st.floats(-60000, 60000, width=32), seed=st.integers(0, 2**31))
def test_stochastic_rounding_is_unbiased(half, value, seed):
    """To one of the two neighbours, and on average to the number itself, within five deviations."""
    count = 40_000
    x = torch.full((1, count), value)
    got = torch_backend.round_stochastically(x, torch_backend.random_bits(seed, 0, 1, count), half)
    seen = got.double().unique()
    nearest = torch.tensor(value).to(half)
    assert len(seen) <= 2 and nearest.double() in seen
    if len(seen) == 1:
        step = torch.finfo(half).eps * abs(value) + torch.finfo(half).smallest_normal
        assert abs(float(seen) - value) <= 1e-3 * step
    else:
        low, high = seen.tolist()
        assert low < value < high
        assert torch.nextafter(seen[:1].to(half), torch.tensor([float("inf")], dtype=half)) == high
        assert abs(float(got.double().mean()) - value) <= 5 * 0.5 * (high - low) / count**0.5


@HALVES
def test_numbers_of_the_dtype_stay_under_every_seed(half):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(half)
    weight = every[~every.isnan()].reshape(1, -1)
    for seed in range(5):
        got = weight.clone()
        torch_backend.rank_k_update_(
            got,
            torch.zeros(1, 1),
            torch.zeros(1, weight.shape[1]),
            rounding="stochastic",
            seed=seed,
        )
        assert torch.equal(got, weight)


@pytest.mark.parametrize("n", [1, torch_backend.GRAM_ROWS + 1])
def test_gram_matrix_is_the_lower_half_in_float64(n):
    """Over more rows and columns than one step takes."""
    rows = torch.randn(n, torch_backend.COLUMNS + 3, generator=torch.Generator().manual_seed(0))
    gram = torch_backend.gram_matrix(rows.bfloat16())
    wide = rows.bfloat16().double()
    assert gram.dtype == torch.float64
    torch.testing.assert_close(gram.tril(), (wide @ wide.T).tril(), rtol=1e-12, atol=1e-9)


def test_cholesky_leaves_the_matrix_as_it_is():
    matrix = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
    kept = matrix.clone()
    factor = torch_backend.cholesky(matrix, 0.5)
    assert torch.equal(matrix, kept)
    expected = kept + 0.5 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(factor @ factor.T, expected)
