"""The golden vectors through the public operations, with Triton as their backend."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_operations import STREAMS, check_golden
from ultraedit_kernels.ops import operations


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("stream", STREAMS)
def test_golden_vectors(stream, dtype, tolerance, device, monkeypatch):
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "triton")
    assert (
        operations.backend(torch.empty(0, device=device)).__name__
        == "ultraedit_kernels.ops.kernels"
    )
    check_golden(stream, operations, dtype, tolerance, device)
