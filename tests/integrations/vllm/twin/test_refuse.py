"""What cannot be edited in place, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn

from ultraedit_kernels.integrations.vllm.twin.locate import served_tensors
from ultraedit_kernels.integrations.vllm.twin.refuse import (
    UnsupportedModelError,
    check_complete,
    check_config,
    check_editable,
    check_weights,
)


def test_a_plain_configuration_passes(vllm_config: Any) -> None:
    check_config(vllm_config)
    vllm_config.offload_config = None
    check_config(vllm_config)


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("load_config.load_format", "ipc_cache", "ipc_cache"),
        ("offload_config.uva.cpu_offload_gb", 1.0, "--cpu-offload-gb"),
        ("offload_config.prefetch.offload_group_size", 2, "offload group"),
        ("quant_config", SimpleNamespace(get_name=lambda: "fp8"), r"is quantised \(fp8\)"),
    ],
)
def test_refuses_a_configuration(vllm_config: Any, path: str, value: Any, reason: str) -> None:
    *owners, field = path.split(".")
    owner = vllm_config
    for name in owners:
        owner = getattr(owner, name)
    assert hasattr(owner, field)
    setattr(owner, field, value)
    with pytest.raises(UnsupportedModelError, match=reason):
        check_config(vllm_config)


def test_refuses_weights_that_are_compiled_in(vllm_config: Any) -> None:
    from vllm.config import CompilationMode

    with torch._inductor.config.patch(freezing=True):
        check_config(vllm_config)  # nothing is compiled
        vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
        with pytest.raises(UnsupportedModelError, match="TORCHINDUCTOR_FREEZING"):
            check_config(vllm_config)
    check_config(vllm_config)


def test_served_weights_pass(served: Any) -> None:
    check_weights(dict(served_tensors(served)))


def test_refuses_a_model_without_weights() -> None:
    with pytest.raises(UnsupportedModelError, match="no parameters"):
        check_weights({})


# AWQ and GPTQ, compressed tensors, FP8
@pytest.mark.parametrize(
    "leaf", ["qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv"]
)
def test_refuses_a_quantised_layer_by_its_name(served: Any, leaf: str) -> None:
    down = served.model.layers.get_submodule("0").mlp.down_proj
    down.register_parameter(leaf, nn.Parameter(torch.zeros(1)))
    with pytest.raises(
        UnsupportedModelError,
        match=rf"mlp\.down_proj\.{leaf} \(torch\.float32\) belongs to a quantised layer",
    ):
        check_weights(dict(served_tensors(served)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int32])
def test_refuses_a_quantised_layer_by_its_numbers(dtype: torch.dtype) -> None:
    weight = torch.zeros(2, 2, dtype=dtype)
    with pytest.raises(UnsupportedModelError, match=str(dtype).removeprefix("torch.")):
        check_weights({"mlp.down_proj.weight": weight})


def test_refuses_experts(served: Any) -> None:
    served.model.layers.get_submodule("0").mlp.experts = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError, match="mixture-of-experts"):
        check_weights(dict(served_tensors(served)))


def test_refuses_weights_that_are_packed_for_the_cpu() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"packed the weight for the CPU .* `ultraedit serve`"
    ):
        check_weights({"mlp.down_proj.weight": torch.empty(0)})


def test_an_edit_must_reach_every_layer_that_has_the_weight(llama: Any) -> None:
    weight = llama.lm_head.weight
    plain, packed = nn.Linear(64, 330), nn.Linear(64, 330)
    packed.cpu_linear = lambda x, w, b: x  # type: ignore[assignment]
    plain.cpu_linear = nn.functional.linear  # type: ignore[assignment]
    check_editable("lm_head", weight, None, llama, {"lm_head": plain}, 1)
    with pytest.raises(
        UnsupportedModelError, match="computes embed from a packed copy of its weight"
    ):
        check_editable("lm_head", weight, None, llama, {"lm_head": plain, "embed": packed}, 1)


DOWN, QKV = "model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"


def layer(view: torch.Tensor, sizes: list[int]) -> Any:
    return SimpleNamespace(weight=view, output_partition_sizes=sizes)


@pytest.mark.parametrize(
    ("name", "shape", "dim", "sizes", "reason"),
    [
        ("lm_head", (165, 64), 0, [165], "the output head is divided by the vocabulary"),
        (DOWN, (64, 63), 1, [64], r"the ranks' parts make \[64, 126\] of its \[64, 128\]"),
        (QKV, (64, 64), 0, [64], r"the ranks' parts make \[128, 64\] of its \[64, 64\]"),
        (QKV, (32, 64), 0, [16, 16], "it is several layers in one, of each of which"),
    ],
)
def test_a_rank_must_hold_the_part_that_it_is_taken_for(
    llama: Any, name: str, shape: tuple[int, int], dim: int, sizes: list[int], reason: str
) -> None:
    view = torch.zeros(shape)
    with pytest.raises(UnsupportedModelError, match=f"{name} cannot be edited under .*{reason}"):
        check_editable(name, view, dim, llama, {name: layer(view, sizes)}, 2)


def test_a_right_part_passes(llama: Any) -> None:
    check_editable(DOWN, (down := torch.zeros(64, 64)), 1, llama, {DOWN: layer(down, [64])}, 2)
    query = torch.zeros(32, 64)  # a view of a merged weight's rows
    merged = {"qkv": layer(torch.zeros(96, 64), [32, 32, 32])}
    check_editable(QKV, query, 0, llama, merged, 2)


@pytest.mark.parametrize("where", ["parameter", "buffer", "attribute"])
def test_nothing_may_be_left_without_a_value(where: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    check_complete(model)
    value = torch.empty(2, device="meta")
    if where == "parameter":
        model[0].register_parameter("left", nn.Parameter(value))
    elif where == "buffer":
        model[0].register_buffer("left", value)
    else:
        model[0].left = value
    with pytest.raises(UnsupportedModelError, match=r"0\.left of Sequential has no value"):
        check_complete(model)
