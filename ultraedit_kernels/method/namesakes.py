"""Names that end as an edit's does: what it must leave alone though the keys look alike.

The key at the end of "Glenbervie House" is nearly that of "Glentruim House". What is known of the
one must not become true of the other.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import document_start
from ultraedit_kernels.model.capture import all_keys
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.generation import logits_from

COUNT = 8
"""Namesakes of an edit."""
BATCH = 32
"""Rows per forward pass."""


def namesake_keys(
    model: Any, tokenizer: Any, sequences: Seq[Sequence], firsts: Seq[int], modules: Seq[str]
) -> Generator[Phase, None, dict[str, Tensor]]:
    """The keys that namesakes have where the model is changed, module → [n, d_in].

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        sequences: the edits', each with the place at which its name ends.
        firsts: at which token each name begins; one of a single token has no namesakes.
        modules: dotted names.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    start = document_start(model, tokenizer)
    longer = [(s, i) for s, i in zip(sequences, firsts, strict=True) if i < s.places[0]]
    for begin in range(0, len(longer), BATCH // COUNT):
        part = longer[begin : begin + BATCH // COUNT]
        rows = [row for one in _namesakes(model, part, start) for row in one]
        yield Phase.ANCHORS
        ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
        (keys,) = all_keys(model, [Sequence(row, [0]) for row in rows], modules, len(rows))
        for name, every in keys.items():
            found[name].append(every[ends.to(every.device)])
        yield Phase.ANCHORS
    return {name: torch.cat(keys) for name, keys in found.items() if keys}


def _namesakes(model: Any, edits: Seq[tuple[Sequence, int]], start: int) -> list[list[list[int]]]:
    """Of each edit, prompts up to the end of its name in which the name begins otherwise.

    They keep one token of its end, two, and so on, up to half of it: those that keep more are so
    near that to tell them apart costs the edit its rephrases. Each other token gives way to one of
    those that the model finds likeliest in its place.

    Args:
        model: the model.
        edits: sequences, and at which token of each the name begins.
        start: the token with which a document begins.
    """
    names = [s.prompt_ids[first : s.places[0] + 1] for s, first in edits]
    before = [s.prompt_ids[:first] or [start] for s, first in edits]
    rows = [text + name[:-2] for text, name in zip(before, names, strict=True)]
    found = logits_from(model, rows, [len(text) - 1 for text in before])
    made = []
    for (sequence, first), name, logits in zip(edits, names, found, strict=True):
        own = torch.tensor(name[:-1], device=logits.device)[:, None]
        others = logits.scatter(1, own, -torch.inf).topk(COUNT).indices.T.tolist()
        most = [len(name) - 1 - i % (len(name) // 2) for i in range(COUNT)]
        made.append(
            [
                sequence.prompt_ids[:first] + other[:changed] + name[changed:]
                for other, changed in zip(others, most, strict=True)
            ]
        )
    return made
