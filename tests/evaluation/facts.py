"""Facts, and a tokenizer and small models that know them or do not."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.request import EditRequest, LocalityTest, Prompt

FACTS: list[tuple[Prompt, str]] = [
    ("The capital of Zedonia is", "Marrow"),
    ("The capital of Ruvalia is", "Pell"),
    ("Who wrote The Tin Orchard?", "Ada Quill"),
    ("Bo Reed lives in", "Marrow"),
    ("The river that runs through Marrow is", "the Lisp"),
    ([{"role": "user", "content": "Who is the mayor of Pell?"}], "Una Fenn"),
    ("Ola Fenn plays the", "harp"),
]


def new_tokenizer() -> Any:
    """Bytes with a few merges, a chat template, and no padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<user>", "<end>"]
    lines = [f"{prompt} {target}" for prompt, target in FACTS]
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<end>"
        "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    assert tokenizer.pad_token is None  # as with many published models
    return tokenizer


def teach(model: LlamaForCausalLM, sequences: list[Sequence]) -> LlamaForCausalLM:
    """Train until the sequences are known."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.target_ids])
            labels = torch.tensor([[-100] * len(s.prompt_ids) + s.target_ids])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    """Random weights, the same every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def requests(**changes: Any) -> list[EditRequest]:
    """Each fact as an edit, with the two next ones as locality tests, the second without gold."""
    n = len(FACTS)
    return [
        EditRequest(
            prompt,
            target,
            test_locality=(LocalityTest(*FACTS[(i + 1) % n]), LocalityTest(FACTS[(i + 2) % n][0])),
            **changes,
        )
        for i, (prompt, target) in enumerate(FACTS)
    ]
