"""Whether a space joins a text and its target, as the model itself would write it.

What the characters suggest stands, unless the model would clearly write the other.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from collections.abc import Sequence as Seq
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.model.generation import logits_from
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.model.spacing import may_join, needs_space

SURE = 4.0
"""Nats by which the model must prefer to write a space, or none, to overrule the characters."""
BATCH = 32
"""Prompts per forward pass."""
_SPACES = ("\u0120", "\u2581", " ")
"""How tokenizers write the space that a token begins with."""


def spaces_of(
    model: Any, tokenizer: Any, requests: Seq[EditRequest]
) -> Generator[Phase, None, list[list[bool]]]:
    """Per edit, and its prompt and rephrases, whether a space joins it and the target: as the
    request says, or as the model would write it. Messages have none."""
    pairs: dict[tuple[int, int], tuple[str, str]] = {}
    joined: list[list[bool]] = []
    for i, request in enumerate(requests):
        prompts = (request.prompt, *request.rephrases)
        joined.append([bool(request.space)] * len(prompts))
        if request.space is None:
            pairs |= {
                (i, j): (p, request.target) for j, p in enumerate(prompts) if isinstance(p, str)
            }
    places = list(pairs)
    for start in range(0, len(places), BATCH):
        part = places[start : start + BATCH]
        for (i, j), space in zip(
            part, choose_spaces(model, tokenizer, [pairs[place] for place in part]), strict=True
        ):
            joined[i][j] = space
        yield Phase.ANCHORS
    return joined


def choose_spaces(model: Any, tokenizer: Any, pairs: Seq[tuple[str, str]]) -> list[bool]:
    """For each prompt and target whether a space joins them: what `needs_space` says, unless the
    model's next token says otherwise.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        pairs: prompts, and what continues them.
    """
    chosen = [needs_space(prompt, target) for prompt, target in pairs]
    asked = [i for i, pair in enumerate(pairs) if may_join(*pair)]
    rows = [list(tokenizer(pairs[i][0])["input_ids"]) for i in asked]
    last = [len(row) - 1 for row in rows]
    for i, logits in zip(asked, logits_from(model, rows, last), strict=True):
        lead = lead_of_space(tokenizer, logits[0].cpu(), pairs[i][1])
        if abs(lead) > SURE:
            chosen[i] = lead > 0
    return chosen


def lead_of_space(tokenizer: Any, logits: Tensor, target: str) -> float:
    """log P(a space, and what the target begins with) - log P(the same without), for the next
    token; logits [vocabulary]."""
    spaced, bare = _beginnings(tokenizer, "word" if target[0].isalnum() else target[0])
    known = len(logits)
    with_space, without = (
        logits[ids[ids < known]].logsumexp(0) if len(ids) else torch.tensor(-torch.inf)
        for ids in (spaced, bare)
    )
    lead = float(with_space - without)
    return 0.0 if math.isnan(lead) else lead


@lru_cache(maxsize=64)
def _beginnings(tokenizer: Any, kind: str) -> tuple[Tensor, Tensor]:
    """The tokens that begin a space and then a word, or this character; and those that begin with
    it at once. A space by itself is of the first."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spaced: list[int] = []
    bare: list[int] = []
    for i, token in enumerate(tokens):
        if i in special or not token:
            continue
        token = token.decode("utf-8", "replace") if isinstance(token, bytes) else token
        rest = token[1:] if token[0] in _SPACES else token
        begins = "word" if rest[:1].isalnum() or rest.startswith("<0x") else rest[:1]
        if begins == kind or not rest:
            (bare if rest == token else spaced).append(i)
    return torch.tensor(spaced, dtype=torch.long), torch.tensor(bare, dtype=torch.long)
