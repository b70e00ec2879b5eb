"""On a GPU: the library computes the same bits as Triton's JIT from the same sources."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ultraedit_kernels.ops import operations
from ultraedit_kernels.ops.kernels import library as library_module
from ultraedit_kernels.ops.statistics import Statistics


def turn(keys: Tensor, grads: Tensor, weight: Tensor) -> list[Tensor]:
    empty = Statistics.empty(keys.shape[1], grads.shape[1], "cuda")
    stats = operations.update_statistics(empty, keys, grads)
    values = operations.edit_values(keys, grads, stats, 1e-6)
    coeff = operations.solve(keys, values)
    nearest = operations.rank_k_update_(weight.clone(), coeff, keys)
    stochastic = operations.rank_k_update_(
        weight.clone(), coeff, keys, rounding="stochastic", seed=7
    )
    return [stats.mean, stats.m2, values, coeff, nearest, stochastic]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("width", [1024, 1023], ids=["aligned", "any layout"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bits_as_triton(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    width: int,
) -> None:
    if not library_module.PATH.exists():
        monkeypatch.setattr(library_module, "PATH", request.getfixturevalue("library"))
        library_module.forget()
    if missing := library_module.unavailable(torch.device("cuda", 0)):
        pytest.skip(missing)
    torch.manual_seed(0)
    keys, grads, weight = (
        torch.randn(rows, columns, device="cuda").to(dtype)
        for rows, columns in ((300, width), (300, 512), (512, width))
    )
    results = {}
    for forced in ("aot", "triton"):
        monkeypatch.setenv("ULTRAEDIT_KERNELS", forced)
        results[forced] = turn(keys, grads, weight)
    for aot, triton in zip(results["aot"], results["triton"], strict=True):
        assert torch.equal(aot, triton)
