"""The baselines are the same mathematics as the float64 reference, and as our capture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import baselines, eager
from bench.baselines import Moments
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.ops import reference
from ultraedit_kernels.ops.statistics import Statistics

D_IN, D_OUT = 24, 7
DTYPES = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-4)], ids=["f64", "f32"]
)


def rows(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, D_IN, generator=generator, dtype=torch.float64) + 0.5
    return keys, 1e-2 * torch.randn(n, D_OUT, generator=generator, dtype=torch.float64)


def none_yet(dtype: torch.dtype) -> Moments:
    return Moments(0.0, torch.zeros(D_IN + D_OUT, dtype=dtype), torch.zeros(D_IN + D_OUT).to(dtype))


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert got.shape == expected.shape
    assert float((got.double() - expected).norm()) <= tolerance * float(expected.norm())


@DTYPES
def test_moments_of_batches_are_those_of_all_rows(dtype, tolerance):
    moments, batches = none_yet(dtype), [rows(n, n) for n in (1, 9, 2)]
    for keys, grads in batches:
        moments = baselines.update_moments(moments, baselines.features(keys, grads).to(dtype))
    z = torch.cat([torch.cat(batch, dim=1) for batch in batches])
    assert moments.rows == len(z) == 12
    assert_close(moments.mean, z.mean(0), tolerance)
    assert_close(moments.std, z.std(0, correction=1), tolerance)


@DTYPES
@pytest.mark.parametrize("n", [1, 10, 40], ids=["one", "wide", "tall"])
def test_two_turns_equal_the_reference(n, dtype, tolerance):
    start = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(5)).double()
    weight, moments = start.to(dtype, copy=True), none_yet(dtype)
    expected, stats = start.clone(), Statistics.empty(D_IN, D_OUT)
    for seed in (1, 2):
        keys, grads = rows(n, seed)
        moments = baselines.turn_(weight, keys.to(dtype), grads.to(dtype), moments, 0.05, 0.7)
        stats = reference.update_statistics(stats, keys, grads)
        coeff = reference.solve(keys, reference.edit_values(keys, grads, stats, 0.05), 0.7)
        reference.rank_k_update_(expected, coeff, keys)
    assert moments.rows == float(stats.count) == 2 * n
    assert_close(moments.mean, stats.mean, tolerance)
    assert_close(weight - start.to(dtype), expected - start, tolerance)


def test_solve_fulfils_the_primal_equations():
    keys, values = rows(10, 3)
    x = baselines.solve(keys, values, ridge=0.3)
    assert x.shape == (D_IN, D_OUT)
    assert_close(keys.T @ (keys @ x) + 0.3 * x, keys.T @ values, 1e-12)


def test_edit_values_of_one_known_row():
    z_hat = torch.tensor([[3.0, 4.0, 2.0, -1.0]])
    values = baselines.edit_values(z_hat, d_in=2, lr=0.1)
    assert_close(values, torch.tensor([[-5.0, 2.5]]).double(), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("n", [1, 10, 40], ids=["one", "wide", "tall"])
def test_two_eager_turns_equal_the_reference(n, dtype):
    start = 1e-3 * torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(5)).double()
    weight, moments = start.to(dtype, copy=True), none_yet(torch.float32)
    expected, stats = weight.double(), Statistics.empty(D_IN, D_OUT)
    for seed in (1, 2):
        keys, grads = (x.to(dtype) for x in rows(n, seed))
        moments = eager.turn_(weight, keys, grads, moments, 0.05, 0.7)
        keys, grads = keys.double(), grads.double()
        stats = reference.update_statistics(stats, keys, grads)
        coeff = reference.solve(keys, reference.edit_values(keys, grads, stats, 0.05), 0.7)
        reference.rank_k_update_(expected, coeff, keys)
    assert_close(moments.mean, stats.mean, 1e-4)
    assert_close(weight, expected, 1e-4 + torch.finfo(dtype).eps)


def test_the_full_backward_pass_gives_what_our_capture_gives(model):
    modules = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
    sequences = [Sequence([5, 6, 7, 8], [9, 10]), Sequence([11, 12], [13]), Sequence([14], [15, 1])]
    got = baselines.capture(model, sequences, modules)
    expected = capture(model, sequences, modules)
    for name in modules:
        assert_close(got[name][0], expected.keys[name].double(), 1e-4)
        assert_close(got[name][1], expected.grads[name].double(), 1e-4)
