from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels in Triton's interpreter if there is no GPU (see tests/conftest.py)."""
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the outputs that a launcher allocates with NaN: what no program writes shows."""

    def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> Tensor:
            tensor = empty(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


@pytest.fixture(params=[pytest.param("cuda", marks=pytest.mark.gpu) if GPU else "cpu"])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU if there is one, which marks every test of a kernel `gpu`; else the CPU."""
    return torch.device(request.param)


@pytest.fixture
def distant_rows(device: torch.device) -> Callable[[int, int], Tensor]:
    """distant_rows(rows, columns): float16 zeros whose rows are 2³¹ elements apart."""

    def make(rows: int, columns: int) -> Tensor:
        size = (rows - 1) * 2**31 + columns
        if device.type == "cuda":
            storage = torch.zeros(size, dtype=torch.float16, device=device)
        else:
            storage = torch.from_numpy(np.zeros(size, np.float16))  # pages appear when touched
        return storage.as_strided((rows, columns), (2**31, 1))

    return make


@pytest.fixture(
    params=[torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(
    params=[(1, 48, 32), (3, 1, 1), (7, 65, 33), (37, 64, 144), (70, 1040, 16)],
    ids=lambda shape: "n{}-in{}-out{}".format(*shape),
)
def shape(request: pytest.FixtureRequest) -> tuple[int, int, int]:
    """(n, d_in, d_out): one row, one column, odd, multiples of 16, more than one block."""
    return request.param


@pytest.fixture(params=["contiguous", "slice", "transposed"])
def make(
    request: pytest.FixtureRequest, device: torch.device
) -> Callable[[int, int, torch.dtype], Tensor]:
    """make(rows, columns, dtype): random values of mean 1 and deviation 3, in a memory layout."""
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(rows, columns, generator=generator) * 3 + 1
        return values.to(device, dtype)

    def make(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        if request.param == "slice":
            return random(2 * rows + 1, columns + 3, dtype)[1::2, 2:-1]
        if request.param == "transposed":
            return random(columns, rows, dtype).T
        return random(rows, columns, dtype)

    return make
