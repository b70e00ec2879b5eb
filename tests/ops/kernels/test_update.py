from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ultraedit_kernels.ops import torch_backend
from ultraedit_kernels.ops.kernels import rank_k_update_

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


def test_offsets_beyond_32_bits(
    device: torch.device, distant_rows: Callable[[int, int], Tensor]
) -> None:
    weight, coeff, keys = distant_rows(2, 16), distant_rows(2, 2), distant_rows(2, 16)
    coeff.copy_(torch.tensor([[1.0, 2.0], [10.0, 20.0]]))
    keys.copy_(torch.tensor([[1.0], [3.0]]).expand(2, 16))
    rank_k_update_(weight, coeff, keys)
    assert weight.tolist() == [[31.0] * 16, [62.0] * 16]


def awkward_numbers(dtype: torch.dtype) -> Tensor:
    """Normal float32 numbers: of all sizes, on and between the dtype's, and at its limits."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(500, generator=generator)
    random *= torch.exp2(torch.randint(-30, 15, (500,), generator=generator))
    info = torch.finfo(dtype)
    above = [info.max, info.max * (1 + info.eps / 8), info.max * (1 + info.eps / 3)]
    below = [0, info.tiny, info.tiny * (1 - info.eps / 3), info.tiny / 3, info.tiny * info.eps / 3]
    edges = torch.tensor([*above, *below])
    numbers = torch.cat([random, random.to(dtype).float(), edges, -edges])
    return numbers[(numbers == 0) | (numbers.abs() >= torch.finfo(torch.float32).tiny)]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stochastic_rounding_is_that_of_the_torch_backend(
    half: torch.dtype, keys_dtype: torch.dtype, make: Make
) -> None:
    """Sums of numbers of few bits are exact in both, so that the results have the same bits."""
    weight = make(150, 140, half)
    coeff, keys = make(3, 150, torch.float32), make(3, 140, keys_dtype)
    coeff.copy_((coeff * 4).round() / 2**12)
    keys.copy_((keys * 4).round() / 4)
    expected = weight.cpu().clone()
    nearest = rank_k_update_(weight.clone(), coeff, keys).cpu()
    before = weight.cpu().clone()
    rank_k_update_(weight, coeff, keys, rounding="stochastic", seed=2**32 - 7)
    torch_backend.rank_k_update_(
        expected, coeff.cpu(), keys.cpu(), rounding="stochastic", seed=2**32 - 7
    )
    assert torch.equal(weight.cpu(), expected)
    assert not torch.equal(expected, nearest) and not torch.equal(expected, before)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_of_awkward_numbers(half: torch.dtype, device: torch.device) -> None:
    """The sum is the coefficient times a key of 1, added to a weight of 0."""
    numbers = awkward_numbers(half)
    bits = torch_backend.random_bits(5, 0, len(numbers), 1)
    expected = torch_backend.round_stochastically(numbers[:, None], bits, half)
    weight = torch.zeros(len(numbers), 1, dtype=half, device=device)
    one = torch.ones(1, 1, dtype=torch.bfloat16, device=device)
    rank_k_update_(weight, numbers[None].to(device), one, rounding="stochastic", seed=5)
    assert torch.equal(weight.cpu(), expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_keeps_what_is_not_finite(
    half: torch.dtype, device: torch.device
) -> None:
    weight = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1.0]]).to(device, half)
    one = torch.ones(1, 1, device=device)
    rank_k_update_(weight, 0 * one, one.expand(1, 4), rounding="stochastic", seed=3)
    assert str(weight.tolist()) == "[[inf, -inf, nan, 1.0]]"


def test_wide_weights_are_rounded_to_nearest(device: torch.device) -> None:
    coeff, keys = torch.randn(3, 20, device=device), torch.randn(3, 30, device=device)
    nearest, stochastic = torch.ones(2, 20, 30, device=device)
    rank_k_update_(nearest, coeff, keys)
    rank_k_update_(stochastic, coeff, keys, rounding="stochastic", seed=1)
    assert torch.equal(nearest, stochastic)
