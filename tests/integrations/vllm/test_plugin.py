"""The general plugin: which layers it leaves unpacked. In a process of its own: test_serve."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from ultraedit_kernels.integrations.vllm.plugin import register


@pytest.mark.parametrize("named", [None, "", "other", "other,ultra"])
def test_where_it_is_not_named_vllm_is_not_even_imported(
    monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if named is not None:
        monkeypatch.setenv("VLLM_PLUGINS", named)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)  # importing it raises
    register()


@pytest.mark.parametrize("cpu", [True, False])
def test_where_it_is_named_the_layers_of_a_cpu_stay_plain(
    monkeypatch: pytest.MonkeyPatch, cpu: bool
) -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.platforms import current_platform

    # vLLM's own switch, which it looks for and does not have by itself
    monkeypatch.setattr(LinearBase, "_cpu_skip_gemm_dispatch", False, raising=False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _self: cpu)
    monkeypatch.setenv("VLLM_PLUGINS", "other,ultraedit")
    register()
    assert LinearBase._cpu_skip_gemm_dispatch is cpu


def test_vllm_finds_it() -> None:
    (point,) = metadata.entry_points(group="vllm.general_plugins", name="ultraedit")
    assert point.load() is register
