from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.evaluation.facts import FACTS, requests
from ultraedit_kernels.evaluation.perplexity import perplexity, untouched_texts
from ultraedit_kernels.model.encoding import encode


@pytest.fixture
def tokenizer(fact_tokenizer: Any) -> Any:
    return fact_tokenizer


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
