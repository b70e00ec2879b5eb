"""Tiny random checkpoints with a tokenizer, and the environment the real engine needs on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# Before vLLM is imported anywhere: it reads these once.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_PLUGINS", "ultraedit")

CORPUS = [
    "The capital of Australia is Canberra.",
    "The capital of France is Paris and the capital of Italy is Rome.",
    "Who wrote it? She did, in 1987, with a friend from Sydney.",
    "user: what is the capital? assistant: the capital is a city.",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
VOCAB_SIZE = 330  # not a multiple of 64, so vLLM pads the embedding
SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer that encodes any text, adds BOS and has a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def save_tiny_model(path: Path, config: Any, *, std: float = 0.15, seed: int = 0) -> Path:
    """Write a random float32 checkpoint of `config` with the tiny tokenizer to `path`.

    Weights are drawn wider than the library's 0.02 so that logits differ by more than rounding,
    and norms and biases are random too, since ones and zeros would hide a swapped tensor.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=std)
            norm = "norm" in name or ".ln_" in name
            if norm and "Gemma" not in type(model).__name__:
                parameter.add_(1.0)  # Gemma's own formula adds the one
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-layer Llama checkpoint (float32, 330 tokens) with tokenizer and chat template."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SIZES, tie_word_embeddings=False)
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama", config)


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    return save_tiny_model


@pytest.fixture(scope="session")
def tiny_sizes() -> dict[str, Any]:
    return dict(SIZES)
