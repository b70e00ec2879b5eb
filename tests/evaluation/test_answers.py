from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from tests.evaluation.facts import FACTS
from ultraedit_kernels.evaluation.answers import Answer, generate_answers
from ultraedit_kernels.model.encoding import encode, encode_prompt
from ultraedit_kernels.model.request import Prompt

LIMIT = 12


@pytest.fixture
def tokenizer(fact_tokenizer: Any) -> Any:
    return fact_tokenizer


@pytest.fixture
def model(fact_model: LlamaForCausalLM) -> LlamaForCausalLM:
    return fact_model


def one_by_one(model: LlamaForCausalLM, tokenizer: Any, prompt: Prompt, limit: int) -> Answer:
    """Greedy decoding as it is defined: no cache, no padding, one token at a time."""
    start = encode_prompt(tokenizer, prompt)
    ids = list(start)
    while len(ids) < len(start) + limit:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Answer(tokenizer.decode(ids[len(start) :]), True)
        ids.append(token)
    token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    return Answer(tokenizer.decode(ids[len(start) :]), token == tokenizer.eos_token_id)


@pytest.mark.parametrize("which", ["model", "random_model"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batched_generation_is_greedy_decoding(
    which: str, batch_size: int, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    prompts: list[Prompt] = [prompt for prompt, _ in FACTS]
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=LIMIT, batch_size=batch_size
    )
    assert answers == [one_by_one(model, tokenizer, prompt, LIMIT) for prompt in prompts]
    if which == "model":
        assert [a.text.strip() for a in answers] == [target for _, target in FACTS]
        assert all(a.stopped for a in answers)


def test_an_answer_that_just_fits_has_stopped(model: LlamaForCausalLM, tokenizer: Any) -> None:
    prompt, target = FACTS[2]
    tokens = len(encode(tokenizer, prompt, target, append_eos=False).target_ids)
    (fits,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=tokens)
    (cut,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=tokens - 1)
    assert fits.text.strip() == target and fits.stopped
    assert target.startswith(cut.text.strip()) and not cut.stopped


def test_the_models_own_generation_settings_do_not_bend_greedy_decoding(
    random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    prompts: list[Prompt] = [prompt for prompt, _ in FACTS]
    plain = generate_answers(random_model, tokenizer, prompts, max_new_tokens=LIMIT)
    kept = random_model.generation_config
    try:
        random_model.generation_config = GenerationConfig(
            do_sample=True, top_k=5, repetition_penalty=1.5, no_repeat_ngram_size=2
        )
        assert generate_answers(random_model, tokenizer, prompts, max_new_tokens=LIMIT) == plain
        assert random_model.generation_config.repetition_penalty == 1.5  # left as it was
    finally:
        random_model.generation_config = kept
