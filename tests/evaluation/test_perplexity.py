from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.evaluation.facts import FACTS, requests
from ultraedit_kernels.evaluation.perplexity import EVERY, perplexity, read, untouched_texts
from ultraedit_kernels.model.encoding import encode


@pytest.fixture
def tokenizer(fact_tokenizer: Any) -> Any:
    return fact_tokenizer


@pytest.fixture
def model(fact_model: LlamaForCausalLM) -> LlamaForCausalLM:
    return fact_model


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_every_token_but_the_first(
    random_model: LlamaForCausalLM, tokenizer: Any, batch_size: int
) -> None:
    loss, tokens = 0.0, 0
    for prompt, target in FACTS:
        s = encode(tokenizer, prompt, target)
        ids = torch.tensor([s.prompt_ids + s.target_ids])
        logits = random_model(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    got = perplexity(random_model, tokenizer, FACTS, batch_size=batch_size)
    assert got == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    with pytest.raises(ValueError, match="got no texts"):
        perplexity(random_model, tokenizer, [])


def test_untouched_texts_are_the_locality_tests_with_an_answer() -> None:
    edits = requests()
    texts = untouched_texts([*edits, *edits])
    assert sorted(map(str, texts)) == sorted(map(str, FACTS))


def test_a_reading_says_how_far_the_model_moved(
    model: LlamaForCausalLM, random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    texts = [encode(tokenizer, prompt, answer) for prompt, answer in FACTS]
    before, after = (read(m, texts, batch_size=3) for m in (random_model, model))
    rows = []
    for s in sorted(texts, key=lambda s: len(s.prompt_ids) + len(s.target_ids)):
        ids, first = torch.tensor([s.prompt_ids + s.target_ids]), len(s.prompt_ids) - 1
        both = [m(input_ids=ids).logits[0].log_softmax(-1) for m in (random_model, model)]
        places = range(first, ids.shape[1] - 1)
        rows += [(both[0][i], both[1][i], int(ids[0, i + 1])) for i in places]
    same = [b.argmax() == a.argmax() for b, a, _ in rows]
    kl = [float((b.exp() * (b - a)).sum()) for b, a, _ in rows[::EVERY]]
    less = [float(b[t] - a[t]) for b, a, t in rows]
    assert before.moved(after) == {
        "top1": pytest.approx(sum(same) / len(rows)),
        "kl": pytest.approx(sum(kl) / len(kl), rel=1e-4),
        "perplexity": pytest.approx(math.expm1(sum(less) / len(less)), rel=1e-4),
    }
    assert before.moved(before) == {"top1": 1.0, "kl": 0.0, "perplexity": 0.0}
