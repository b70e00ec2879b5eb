"""What an engine may compile; the other hooks are tested with the worker, in `test_worker`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("mode", "compiled"), [("NONE", 0), ("VLLM_COMPILE", 1)])
def test_an_eager_engine_compiles_nothing_until_it_is_told(mode: str, compiled: int) -> None:
    from vllm.config import CompilationMode

    from ultraedit_kernels.integrations.vllm.engine_hooks import compile_nothing

    seen = []

    def backend(graph: Any, _inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    config: Any = SimpleNamespace(compilation_config=SimpleNamespace(mode=CompilationMode[mode]))
    try:
        compile_nothing(config, True)
        assert float(double(torch.tensor(2.0))) == 4
        assert len(seen) == compiled
    finally:
        compile_nothing(config, False)
    assert float(double(torch.tensor(3.0))) == 6
    assert len(seen) == 1
