from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ultraedit_kernels.kernels import rank_k_update_

Make = Callable[[int, int, torch.dtype], torch.Tensor]
Shape = tuple[int, int, int]


def assert_rounded_once(got: Tensor, exact: Tensor, dtype: torch.dtype, noise: float) -> None:
    """`got` is `exact` rounded to the nearest number of its dtype, up to `noise` in the sum."""
    half_ulp = torch.exp2(exact.abs().log2().floor()) * torch.finfo(dtype).eps / 2
    excess = (got.double() - exact).abs() - half_ulp
    assert float(excess.max()) < noise


def test_matches_reference(
    make: Make, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    n, d_in, d_out = shape
    weight, keys = make(d_out, d_in, dtype), make(n, d_in, dtype)
    coeff = make(n, d_out, torch.float64 if dtype == torch.float64 else torch.float32)
    exact = weight.double() + coeff.double().T @ keys.double()
    size = (coeff.double().abs().T @ keys.double().abs()).max()
    assert rank_k_update_(weight, coeff, keys) is weight
    noise = 1e-15 if dtype == torch.float64 else 1e-6
    assert_rounded_once(weight, exact, dtype, noise * float(size))


def test_writes_only_its_slice(device: torch.device) -> None:
    whole = torch.full((40, 50), 2.0, device=device)
    coeff, keys = torch.ones(3, 17, device=device), torch.ones(3, 21, device=device)
    rank_k_update_(whole[5:22, 9:30], coeff, keys)
    expected = torch.full((40, 50), 2.0, device=device)
    expected[5:22, 9:30] = 5.0
    assert torch.equal(whole, expected)


def test_many_small_terms_are_not_rounded_one_by_one(device: torch.device) -> None:
    """64 terms of 2⁻¹⁰ on a bf16 weight of 1: each alone would round away."""
    weight = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    coeff = torch.full((64, 16), 2.0**-10, device=device)
    rank_k_update_(weight, coeff, torch.ones(64, 16, dtype=torch.bfloat16, device=device))
    assert torch.equal(weight, torch.full_like(weight, 1 + 2**-4))


def test_large_coefficients_that_cancel(device: torch.device) -> None:
    """Nearly equal keys give Y large entries of opposite sign; a bf16 or tf32 Y would fail."""
    keys = torch.randn(1, 32, device=device).expand(2, 32).bfloat16()
    coeff = torch.tensor([[1000.125], [-1000.0]], device=device).expand(2, 16)
    weight = torch.zeros(16, 32, device=device)
    rank_k_update_(weight, coeff, keys)
    expected = (0.125 * keys[:1].float()).expand(16, 32)
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)


def test_ties_go_to_even(device: torch.device) -> None:
    weight = torch.tensor([[1.0, 1 + 2**-7]], dtype=torch.bfloat16, device=device)
    rank_k_update_(
        weight, torch.tensor([[2.0**-8]], device=device), torch.ones(1, 2, device=device)
    )
    assert weight.tolist() == [[1.0, 1 + 2**-6]]


def test_no_rows(device: torch.device) -> None:
    weight = torch.randn(4, 6, device=device)
    before = weight.clone()
    rank_k_update_(weight, torch.ones(0, 4, device=device), torch.ones(0, 6, device=device))
    assert torch.equal(weight, before)


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    size = 2**31 + 16
    if device.type == "cuda":
        storage = torch.zeros(size, dtype=torch.float16, device=device)
    else:
        storage = torch.from_numpy(np.zeros(size, np.float16))  # pages appear when touched
    weight = storage.as_strided((3, 16), (2**30, 1))
    coeff = torch.tensor([[1.0, 2.0, 3.0]], device=device)
    rank_k_update_(weight, coeff, torch.ones(1, 16, device=device))
    assert weight.tolist() == [[1.0] * 16, [2.0] * 16, [3.0] * 16]
