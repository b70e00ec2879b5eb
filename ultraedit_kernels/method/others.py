"""What a model answers to the questions of its edits in forms in which they were not taught."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from ultraedit_kernels.model.encoding import encode, encode_prompt, says_just
from ultraedit_kernels.model.forms import form_of, other_forms
from ultraedit_kernels.model.generation import generate, text_after
from ultraedit_kernels.model.request import EditRequest, Prompt

SPARE_TOKENS = 4
"""Tokens beyond the target's that are read."""


@dataclass(frozen=True)
class OtherForm:
    """The question of an edit in a form that was not taught, and what it gets."""

    form: str
    """"text", "chat" or "chat with a system prompt"."""
    prompt: Prompt
    after: str
    """The greedy answer, white space as it stands."""
    says_target: bool
    """Whether that is just the target."""


def ask_other_forms(
    model: Any, tokenizer: Any, requests: Seq[EditRequest], batch_size: int = 32
) -> list[tuple[OtherForm, ...]]:
    """Of each edit, what its question gets in every other form that the chat template and the
    model's length allow.

    Args:
        model: the model as it is now.
        tokenizer: its tokenizer.
        requests: the edits.
        batch_size: prompts generated from at a time.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    asked: list[tuple[int, Prompt, list[int]]] = []
    longest = 1
    for i, request in enumerate(requests):
        for prompt in other_forms(request.prompt, request.rephrases):
            try:
                one = encode(tokenizer, prompt, request.target)
                ids = encode_prompt(tokenizer, prompt)
            except ValueError:  # the template is none, or does not take it
                continue
            most = len(one.target_ids) + SPARE_TOKENS
            if ids and (limit is None or len(ids) + most <= limit):
                asked.append((i, prompt, ids))
                longest = max(longest, most)
    answers = generate(
        model,
        tokenizer,
        [ids for *_, ids in asked],
        max_new_tokens=longest,
        batch_size=batch_size,
    )
    found: list[list[OtherForm]] = [[] for _ in requests]
    for (i, prompt, ids), tokens in zip(asked, answers, strict=True):
        said = text_after(tokenizer, ids, tokens)
        just = says_just(said, requests[i].target)
        found[i].append(OtherForm(form_of(prompt), prompt, said, just))
    return [tuple(others) for others in found]
