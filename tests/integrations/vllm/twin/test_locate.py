"""Which of vLLM's tensors, and which part of it, is which parameter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ultraedit_kernels.integrations.vllm.twin.locate import (
    language_model,
    layers_by_storage,
    locator,
    merged_modules,
    served_tensors,
    storage,
)
from ultraedit_kernels.integrations.vllm.twin.refuse import UnsupportedModelError

QKV = "model.layers.1.self_attn.qkv_proj"


def served_rows(core: nn.Module, name: str, first: int, rows: int) -> torch.Tensor:
    return core.get_parameter(name)[first : first + rows]


def test_every_parameter_is_found_with_its_numbers_and_without_a_copy(
    llama: Any, served: Any
) -> None:
    locate = locator(llama, served, dict(served_tensors(served)), 1)
    shared = {storage(p) for p in served.parameters()}
    for name, parameter in llama.named_parameters():
        view = locate(name)
        assert view is not None and torch.equal(view, parameter), name
        assert storage(view) in shared


@pytest.mark.parametrize(
    ("part", "whole", "first", "rows"),
    [
        ("model.layers.1.self_attn.q_proj.weight", f"{QKV}.weight", 0, 64),
        ("model.layers.1.self_attn.k_proj.weight", f"{QKV}.weight", 64, 32),
        ("model.layers.1.self_attn.v_proj.bias", f"{QKV}.bias", 96, 32),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_up_proj.weight", 128, 128),
        ("lm_head.weight", "lm_head.weight", 0, 330),  # what pads it is left out
    ],
)
def test_a_part_of_a_merged_weight_is_a_view_of_its_rows(
    llama: Any, served: Any, part: str, whole: str, first: int, rows: int
) -> None:
    view = locator(llama, served, dict(served_tensors(served)), 1)(part)
    expected = served_rows(served, whole, first, rows)
    assert view is not None and view.shape == expected.shape
    assert view.data_ptr() == expected.data_ptr()


def test_a_rank_takes_its_part_of_the_vocabulary_whole(llama: Any, served: Any) -> None:
    half = nn.Parameter(served.lm_head.weight[:192].clone(), requires_grad=False)
    served.lm_head.weight = half  # with the padding, which the last rank has
    view = locator(llama, served, dict(served_tensors(served)), 2)("lm_head.weight")
    assert view is not None and view.data_ptr() == half.data_ptr() and len(view) == 192
    served.lm_head.weight = nn.Parameter(half[:128].clone(), requires_grad=False)
    assert locator(llama, served, dict(served_tensors(served)), 2)("lm_head.weight") is None


@pytest.mark.parametrize("rows", [-1, 1])
def test_only_the_vocabulary_may_have_rows_left_over(llama: Any, served: Any, rows: int) -> None:
    name = "model.layers.0.mlp.down_proj"
    module = served.get_submodule(name)
    module.weight = nn.Parameter(torch.zeros(64 + rows, 128), requires_grad=False)
    assert locator(llama, served, dict(served_tensors(served)), 1)(f"{name}.weight") is None


def test_a_name_that_is_not_served_is_not_found(llama: Any, served: Any) -> None:
    sources = dict(served_tensors(served))
    del sources["model.norm.weight"], sources[f"{QKV}.weight"]
    locate = locator(llama, served, sources, 1)
    assert locate("model.norm.weight") is None
    assert locate("model.layers.1.self_attn.k_proj.weight") is None
    assert locate("model.layers.0.self_attn.k_proj.weight") is not None


def test_a_conv1d_is_the_transpose_of_what_is_served() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=330))
    layers = ("c_attn.weight", "c_fc.weight", "c_proj.weight")  # one of them is square
    sources = {
        name: p.data.T.contiguous() if name.endswith(layers) else p.data
        for name, p in model.named_parameters()
    }
    locate = locator(model, model, sources, 1)
    for name, parameter in model.named_parameters():
        view = locate(name)
        assert view is not None and torch.equal(view, parameter), name
        assert view.data_ptr() == sources[name].data_ptr()
    sources["transformer.h.0.mlp.c_fc.weight"] = model.transformer.h[0].mlp.c_fc.weight
    assert locate("transformer.h.0.mlp.c_fc.weight") is None  # served as it is in the file


def test_names_are_mapped_as_vllm_maps_them(llama: Any, served: Any) -> None:
    utils = pytest.importorskip("vllm.model_executor.models.utils")
    served.hf_to_vllm_mapper = utils.WeightsMapper(orig_to_new_prefix={"model.": "inner."})
    served.add_module("inner", served.model)
    del served.model
    locate = locator(llama, served, dict(served_tensors(served)), 1)
    for name, parameter in llama.named_parameters():
        view = locate(name)
        assert view is not None and torch.equal(view, parameter), name


def test_merged_modules_are_what_the_model_and_its_mapper_say() -> None:
    core: Any = nn.Module()
    core.inner = nn.Module()
    stacked = {".q.": (".qkv.", "q"), ".k.": (".qkv.", "k"), ".a.": (".ab.", 0), ".b.": (".ab.", 1)}
    core.inner.hf_to_vllm_mapper = SimpleNamespace(orig_to_new_stacked=stacked)
    assert merged_modules(core)["b"] == ("ab", ["a", "b"])
    core.packed_modules_mapping = {"qkv": ["q", "k", "v"]}  # the documented attribute wins
    merged = merged_modules(core)
    assert merged["k"] == ("qkv", ["q", "k", "v"]) and merged["b"] == ("ab", ["a", "b"])


def test_served_tensors_can_be_differentiated_and_share_the_memory() -> None:
    with torch.inference_mode():
        core = nn.Linear(3, 2)
    assert core.weight.is_inference()
    tensors = dict(served_tensors(core))
    weight = tensors["weight"]
    assert not weight.is_inference() and weight.data_ptr() == core.weight.data_ptr()
    x = torch.ones(1, 3, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    assert torch.equal(x.grad, core.weight.sum(0, keepdim=True))  # type: ignore[arg-type]


def test_lora_wrappers_are_looked_through() -> None:
    core: Any = nn.Module()
    core.proj = nn.Module()
    core.proj.base_layer = nn.Linear(3, 2)
    core.proj.lora_a = nn.Module()
    core.proj.lora_a.weight = nn.Parameter(torch.zeros(1))
    assert list(dict(served_tensors(core))) == ["proj.weight", "proj.bias"]


def test_layers_of_one_storage_are_all_named() -> None:
    core: Any = nn.Module()
    core.embed, core.head, core.norm = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False), nn.Module()
    core.head.weight = core.embed.weight
    assert layers_by_storage(core) == {
        storage(core.embed.weight): {"embed": core.embed, "head": core.head}
    }


def test_the_text_model_is_found_in_a_multimodal_one() -> None:
    text, multimodal = nn.Module(), SimpleNamespace(model_config=None)
    multimodal.model_config = SimpleNamespace(is_multimodal_model=True)
    plain: Any = SimpleNamespace(model_config=SimpleNamespace(is_multimodal_model=False))
    whole: Any = nn.Module()
    assert language_model(whole, plain) is whole
    with pytest.raises(UnsupportedModelError, match=r"multimodal .* serve a text-only checkpoint"):
        language_model(whole, multimodal)  # type: ignore[arg-type]
    whole.get_language_model = lambda: text
    with pytest.raises(UnsupportedModelError, match="Module is multimodal"):
        language_model(whole, multimodal)  # type: ignore[arg-type]
    text.lm_head = nn.Linear(1, 1)
    assert language_model(whole, multimodal) is text  # type: ignore[arg-type]
