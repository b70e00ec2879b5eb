"""A small random model, in float64, for tests of the method's parts."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ultraedit_kernels.model.encoding import Sequence

T = TypeVar("T")
MODULES = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]


def random_model(seed: int = 0) -> Any:
    """Two layers, 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).double().eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    """Module → its weight."""
    return {name: model.get_submodule(name).weight.data for name in MODULES}


def prompts(count: int, seed: int, length: int = 4) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (count, length), generator=generator).tolist()


def said(model: Any, asked: list[list[int]], tokens: int = 2) -> list[Sequence]:
    """Prompts of one length, each with the greedy continuation."""
    ids = torch.tensor(asked)
    with torch.no_grad():
        for _ in range(tokens):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    answers = ids[:, -tokens:].tolist()
    return [Sequence(prompt, answer) for prompt, answer in zip(asked, answers, strict=True)]


def run(work: Generator[Any, None, T]) -> tuple[list[Any], T]:
    """What a generator yields, and what it returns."""
    yielded = []
    while True:
        try:
            yielded.append(next(work))
        except StopIteration as done:
            return yielded, done.value
