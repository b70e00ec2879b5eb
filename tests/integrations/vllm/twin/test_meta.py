"""The empty model: which class, which share of it, and the values that no checkpoint carries."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.twin.meta import (
    fill_buffers,
    match_long_rope,
    meta_models,
)
from ultraedit_kernels.integrations.vllm.twin.refuse import UnsupportedModelError


def test_one_rank_has_the_whole_model_and_it_has_no_numbers(llama: Any, vllm_config: Any) -> None:
    whole, model = meta_models(False, vllm_config)
    assert whole is model and type(model) is type(llama)
    shapes = {name: p.shape for name, p in llama.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    assert all(p.is_meta and p.dtype == torch.float32 for p in model.parameters())


def test_the_served_configuration_stays_as_it_is(llama: Any, vllm_config: Any) -> None:
    llama.set_attn_implementation("eager")  # vLLM's Transformers backend names one of its own
    before = copy.deepcopy(vars(llama.config))
    meta_models(False, vllm_config)
    assert vars(llama.config) == before


@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_soft_cap_asks_for_the_attention_that_applies_it(
    tiny_sizes: dict[str, Any], vllm_config: Any, cap: float | None
) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(**tiny_sizes, attn_logit_softcapping=cap)
    vllm_config.model_config.hf_config = config
    _, model = meta_models(False, vllm_config)
    ids = torch.zeros(1, 3, dtype=torch.long)
    model.to_empty(device="cpu")
    scores = model(ids, use_cache=False, output_attentions=True).attentions
    assert bool(scores) == (cap is not None)  # the eager attention alone has any to show


def test_two_ranks_have_half_of_the_heads_and_of_the_width(vllm_config: Any) -> None:
    vllm_config.parallel_config.tensor_parallel_size = 2
    whole, model = meta_models(False, vllm_config)
    shapes = [
        {name: tuple(p.shape) for name, p in one.model.layers[0].named_parameters()}
        for one in (whole, model)
    ]
    assert [s["self_attn.q_proj.weight"] for s in shapes] == [(64, 64), (32, 64)]
    assert [s["mlp.down_proj.weight"] for s in shapes] == [(64, 128), (64, 64)]
    assert [s["self_attn.k_proj.weight"] for s in shapes] == [(32, 64)] * 2  # one head, on both


def test_refuses_a_model_that_cannot_be_divided(vllm_config: Any) -> None:
    vllm_config.parallel_config.tensor_parallel_size = 3
    with pytest.raises(UnsupportedModelError, match="for LlamaConfig in 3 parts: 2 attention head"):
        meta_models(False, vllm_config)


def test_refuses_a_model_that_is_no_causal_language_model(vllm_config: Any) -> None:
    from transformers import T5Config

    vllm_config.model_config.hf_text_config = T5Config()
    with pytest.raises(
        UnsupportedModelError, match="no causal language model for T5Config: Unrecognized"
    ):
        meta_models(True, vllm_config)


@pytest.mark.parametrize(
    ("length", "used"),
    [(48, [1.0, 1.0]), (49, [1.0, 1.2])],
)
def test_long_rope_is_that_of_the_longest_text(length: int, used: list[float]) -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0],
        "long_factor": [1.0, 1.2],
        "original_max_position_embeddings": 48,
    }
    match_long_rope(SimpleNamespace(rope_parameters=rope), length)
    assert rope["short_factor"] == rope["long_factor"] == used


@pytest.mark.parametrize("rope", [None, {}, {"rope_type": "default", "short_factor": [2.0]}])
def test_other_rotations_stay_as_they_are(rope: Any) -> None:
    config = SimpleNamespace(rope_parameters=copy.copy(rope))
    match_long_rope(config, 64)
    assert config.rope_parameters == rope


def test_buffers_get_the_values_of_a_loaded_model(llama: Any, vllm_config: Any) -> None:
    _, model = meta_models(False, vllm_config)
    fill_buffers(model, torch.device("cpu"))
    buffers = dict(model.named_buffers())
    assert buffers.keys() == dict(llama.named_buffers()).keys() and buffers
    for name, buffer in llama.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    assert all(p.is_meta for p in model.parameters())


def test_refuses_a_buffer_that_only_a_checkpoint_has() -> None:
    class Model(nn.Module):
        def _init_weights(self, module: nn.Module) -> None:
            pass

    model = Model()
    model.inner = nn.Module()
    model.inner.register_buffer("table", torch.empty(3, device="meta"))
    with pytest.raises(UnsupportedModelError, match=r"buffer inner\.table of Model cannot be reb"):
        fill_buffers(model, torch.device("cpu"))
