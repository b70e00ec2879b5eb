"""A Llama as vLLM keeps it, without vLLM: merged projections and a padded vocabulary."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

PARTS = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
PADDED = 384
"""Rows of the vocabulary's weights, of which the model has 330."""


@pytest.fixture
def llama(tiny_sizes: dict[str, Any]) -> Any:
    """A random Hugging Face Llama of two layers, float32, with biases; two query heads share one
    key-value head."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        **tiny_sizes | {"num_hidden_layers": 2},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15)
    return model.eval()


@pytest.fixture
def served(llama: Any) -> Any:
    """The numbers of `llama` under the names and in the shapes in which vLLM serves them."""
    weights = dict(llama.named_parameters())
    core: Any = nn.Module()
    core.packed_modules_mapping = PARTS
    for name, weight in weights.items():
        *path, module, leaf = name.split(".")
        whole = next((w for w, parts in PARTS.items() if module in parts), None)
        if whole is not None:
            parts = PARTS[whole]
            if module != parts[0]:
                continue
            value = torch.cat([weights[".".join([*path, p, leaf])] for p in parts])
            module = whole
        elif module in ("embed_tokens", "lm_head"):
            value = torch.cat([weight, weight.new_zeros(PADDED - len(weight), weight.shape[1])])
        else:
            value = weight.clone()
        owner = core
        for part in [*path, module]:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False))
    return core


@pytest.fixture
def vllm_config(llama: Any) -> Any:
    """vLLM's own configuration, of one process that compiles nothing. Only the model's part of it
    is made up, since vLLM's reads a checkpoint."""
    pytest.importorskip("vllm")
    from vllm.config import CompilationConfig, CompilationMode, VllmConfig

    config: Any = VllmConfig(compilation_config=CompilationConfig(mode=CompilationMode.NONE))
    config.model_config = SimpleNamespace(
        hf_config=llama.config,
        hf_text_config=llama.config,
        is_multimodal_model=False,
        max_model_len=64,
        dtype=torch.float32,
        trust_remote_code=False,
    )
    return config
