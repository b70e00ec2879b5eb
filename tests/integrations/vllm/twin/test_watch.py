"""Another's write to what vLLM serves is noticed, whatever it is written by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.twin import build_twin, build_weights
from ultraedit_kernels.integrations.vllm.twin.watch import fingerprint

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"


def scaled(layer: Any) -> None:
    layer.weight.data.mul_(1.001)


def one_number(layer: Any) -> None:
    layer.weight.data[-1, -1] += 1e-3


def rows_swapped(layer: Any) -> None:
    layer.weight.data.copy_(layer.weight.data.roll(1, 0))


def moved(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.clone(), requires_grad=False)


def being_loaded(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)


@pytest.mark.parametrize("build", [build_twin, build_weights])
@pytest.mark.parametrize("write", [scaled, one_number, rows_swapped, moved, being_loaded])
def test_a_write_to_an_edited_weight_is_noticed(
    served: Any, vllm_config: Any, build: Any, write: Callable[[Any], None]
) -> None:
    twin = build(served, vllm_config, [UP, DOWN])
    assert len(twin.layers) == 2
    with torch.inference_mode():
        assert not twin.watch.look()
        twin.model.get_submodule(UP).weight.add_(1)
        assert not twin.watch.look()  # the shadow is nobody's but ours
        twin.publish()
        assert not twin.watch.look()
        write(served.get_submodule(DOWN))
        assert twin.watch.look() and twin.watch.foreign


def test_a_write_to_another_weight_is_none_of_it(served: Any, vllm_config: Any) -> None:
    twin = build_twin(served, vllm_config, [UP])
    merged = served.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    merged.data[:128] += 1  # the gate, beside it in memory
    served.get_parameter("model.norm.weight").data += 1
    assert not twin.watch.look()
    merged.data[128:] += 1
    assert twin.watch.look() and twin.watch.foreign


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [0, 1, 6, 7, 64])
def test_fingerprints_take_any_shape(dtype: torch.dtype, columns: int) -> None:
    weight = torch.randn(5, columns).to(dtype)
    assert torch.equal(fingerprint(weight), fingerprint(weight.clone()))
    if columns > 1:
        assert len(fingerprint(weight.t())) == 5  # as a Conv1D has it
    if columns:
        changed = weight.clone()
        changed[2, -1] += 0.5
        (where,) = (fingerprint(changed) != fingerprint(weight)).nonzero()
        assert int(where) == 2
