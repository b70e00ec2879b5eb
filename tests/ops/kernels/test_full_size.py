"""One turn at the size of a 7B model's down_proj, against float64 on the same GPU."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.ops import kernels, reference
from ultraedit_kernels.ops.statistics import Statistics

N, D_IN, D_OUT = 300, 14336, 4096


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_turn(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    keys = torch.randn(N, D_IN, device="cuda").to(dtype)
    grads = (torch.randn(N, D_OUT, device="cuda") * 1e-3).to(dtype)
    weight = (torch.randn(D_OUT, D_IN, device="cuda") * 0.02).to(dtype)
    empty = Statistics.empty(D_IN, D_OUT, "cuda")
    stats = kernels.update_statistics(empty, keys, grads)
    values = kernels.edit_values(keys, grads, stats, 1e-6)
    coeff = kernels.solve(keys, values)

    h, g = keys.double(), grads.double()
    stats64 = reference.update_statistics(empty, h, g)
    values64 = reference.edit_values(h, g, stats64, 1e-6)
    coeff64 = reference.solve(h, values64)
    torch.testing.assert_close(stats.mean, stats64.mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(stats.m2, stats64.m2, rtol=1e-9, atol=1e-12)
    assert (values.double() - values64).norm() < 1e-6 * values64.norm()
    assert (coeff.double() - coeff64).norm() < 1e-6 * coeff64.norm()

    exact = weight.double() + coeff.double().T @ h
    kernels.rank_k_update_(weight, coeff, keys)
    half_ulp = torch.exp2(exact.abs().log2().floor()) * torch.finfo(dtype).eps / 2
    assert ((weight.double() - exact).abs() - half_ulp).max() < 1e-6 * exact.abs().max()
