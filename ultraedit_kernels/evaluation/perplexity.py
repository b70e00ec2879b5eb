"""How a model reads texts that edits should leave alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.model.capture import evaluation_mode
from ultraedit_kernels.model.encoding import Sequence, encode, pad_right
from ultraedit_kernels.model.request import EditRequest, Prompt

EVERY = 8
"""Tokens for one whose distribution a reading keeps: all of them are gigabytes."""


@dataclass(frozen=True)
class Reading:
    """What a model expects at the tokens of some texts, n in all, on the CPU."""

    best: Tensor
    """Most likely token, int64 [n]."""
    nats: Tensor
    """Minus the log-probability of the text's own token, float32 [n]."""
    spread: Tensor
    """Log-probabilities at every `EVERY`th token, float32 [n / EVERY, vocabulary], or [0, 0]."""

    def moved(self, now: Reading) -> dict[str, float]:
        """How far another reading of the same texts, later, is from this one.

        Returns:
            "top1", share of tokens whose most likely one is the same; "kl", from this distribution
            to the other, nats, mean over every `EVERY`th token; "perplexity", its change as a share
            of what it was.
        """
        kl = (self.spread.exp() * (self.spread - now.spread)).sum(-1).mean()
        return {
            "top1": float((self.best == now.best).float().mean()),
            "kl": float(kl),
            "perplexity": math.expm1(float((now.nats - self.nats).double().mean())),
        }


@torch.no_grad()
def read(
    model: Any, sequences: Seq[Sequence], *, spread: bool = True, batch_size: int = 4
) -> Reading:
    """Read texts; the tokens of `target_ids` count, each given all before it.

    Args:
        spread: keep distributions; without them the reading has none.

    Raises:
        ValueError: no texts.
    """
    if not sequences:
        raise ValueError("got no texts, expected at least one; pass prompts with their answers")
    ordered = sorted(sequences, key=lambda s: len(s.prompt_ids) + len(s.target_ids))
    device = model.get_input_embeddings().weight.device
    best: list[Tensor] = []
    nats: list[Tensor] = []
    kept: list[Tensor] = []
    seen = 0
    with evaluation_mode(model):
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            ids, mask = pad_right([s.prompt_ids + s.target_ids for s in part], device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, s in zip(logits, part, strict=True):
                first = len(s.prompt_ids) - 1
                told = row[first : first + len(s.target_ids)].float().log_softmax(-1)
                own = torch.tensor(s.target_ids, device=device)[:, None]
                best.append(told.argmax(-1).cpu())
                nats.append(-told.gather(1, own)[:, 0].cpu())
                if spread:
                    kept.append(told[-seen % EVERY :: EVERY].cpu())
                seen += len(told)
    return Reading(
        torch.cat(best), torch.cat(nats), torch.cat(kept) if spread else torch.zeros(0, 0)
    )


def perplexity(
    model: Any, tokenizer: Any, texts: Seq[tuple[Prompt, str]], *, batch_size: int = 32
) -> float:
    """Per-token perplexity of prompts with their answers and the end of sequence.

    Every token but the first of a text counts, given those before it.

    Raises:
        ValueError: no texts.
    """
    encoded = [encode(tokenizer, prompt, answer) for prompt, answer in texts]
    rows = [s.prompt_ids + s.target_ids for s in encoded]
    wholes = [Sequence(ids[:1], ids[1:]) for ids in rows]
    reading = read(model, wholes, spread=False, batch_size=batch_size)
    return math.exp(float(reading.nats.double().mean()))


def untouched_texts(requests: Seq[EditRequest]) -> list[tuple[Prompt, str]]:
    """The locality tests that have a gold answer, each once: texts for `perplexity`."""
    tests = {
        json.dumps([test.prompt, test.answer]): (test.prompt, test.answer)
        for request in requests
        for test in request.test_locality
        if test.answer is not None
    }
    return list(tests.values())
