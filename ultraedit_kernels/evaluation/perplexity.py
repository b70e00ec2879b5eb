"""Perplexity of texts that edits should leave alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from typing import Any

import torch
import torch.nn.functional as F

from ultraedit_kernels.model.capture import evaluation_mode
from ultraedit_kernels.model.encoding import encode, pad_right
from ultraedit_kernels.model.request import EditRequest, Prompt

IGNORED = -100
"""Label of a position without a loss, as cross entropy has it."""


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, texts: Seq[tuple[Prompt, str]], *, batch_size: int = 32
) -> float:
    """Per-token perplexity of prompts with their answers and the end of sequence.

    Every token but the first of a text counts, given those before it.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("got no texts, expected at least one; pass prompts with their answers")
    encoded = [encode(tokenizer, prompt, answer) for prompt, answer in texts]
    rows = sorted((s.prompt_ids + s.target_ids for s in encoded), key=len)
    device = model.get_input_embeddings().weight.device
    loss, tokens = 0.0, 0
    with evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            ids, mask = pad_right(rows[start : start + batch_size], device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
            nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            loss += nats.item()
            tokens += int((labels != IGNORED).sum())
    return math.exp(loss / tokens)


def untouched_texts(requests: Seq[EditRequest]) -> list[tuple[Prompt, str]]:
    """The locality tests that have a gold answer, each once: texts for `perplexity`."""
    tests = {
        json.dumps([test.prompt, test.answer]): (test.prompt, test.answer)
        for request in requests
        for test in request.test_locality
        if test.answer is not None
    }
    return list(tests.values())
