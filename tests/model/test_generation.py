from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.test_capture import make_model, make_sequences
from ultraedit_kernels.model.encoding import encode_prompt
from ultraedit_kernels.model.generation import Penalties, generate, text_after

PROMPTS = ["The capital of Japan is", "The capital of", "What is the capital of France?"]


@pytest.fixture
def ids(tokenizer: Any) -> list[list[int]]:
    return [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_greedy_is_the_most_likely_token_one_by_one(
    model: Any, tokenizer: Any, ids: list[list[int]], batch_size: int
) -> None:
    got = generate(model, tokenizer, ids, max_new_tokens=6, batch_size=batch_size)
    for prompt, new in zip(ids, got, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and tokenizer.eos_token_id not in expected:
            logits = model(input_ids=torch.tensor([prompt + expected])).logits[0, -1]
            expected.append(int(logits.argmax()))
        assert new == expected


def test_a_seed_decides_a_sample_and_leaves_the_random_state(
    model: Any, tokenizer: Any, ids: list[list[int]]
) -> None:
    state = torch.random.get_rng_state()
    shipped = model.generation_config
    model.train()
    samples = [generate(model, tokenizer, ids, max_new_tokens=12, seed=s) for s in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training and model.generation_config is shipped


def test_the_settings_come_back_after_a_failure(
    model: Any, tokenizer: Any, ids: list[list[int]]
) -> None:
    shipped = model.generation_config
    with pytest.raises(IndexError):
        generate(model, tokenizer, [[10**6], *ids], max_new_tokens=2)
    assert model.generation_config is shipped


def test_no_prompts_no_answers(model: Any, tokenizer: Any) -> None:
    assert generate(model, tokenizer, [], max_new_tokens=2) == []


@pytest.mark.parametrize("batch_size", [1, 3])
def test_penalties_are_taken_from_what_was_seen(
    model: Any, tokenizer: Any, ids: list[list[int]], batch_size: int
) -> None:
    """One by one, by vLLM's formula; padding is not seen."""
    penalties = Penalties(repetition=1.7, presence=0.5, frequency=0.9)
    got = generate(
        model, tokenizer, ids, max_new_tokens=6, batch_size=batch_size, penalties=penalties
    )
    for prompt, new in zip(ids, got, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and tokenizer.eos_token_id not in expected:
            logits = model(input_ids=torch.tensor([prompt + expected])).logits[0, -1].detach()
            for token in {*prompt, *expected}:
                logits[token] *= 1 / 1.7 if logits[token] > 0 else 1.7
            for token in set(expected):
                logits[token] -= 0.9 * expected.count(token) + 0.5
            expected.append(int(logits.argmax()))
        assert new == expected


def test_an_answer_has_the_white_space_after_its_prompt(tokenizer: Any) -> None:
    whole = tokenizer("The capital of Japan is Osaka")["input_ids"]
    prompt = tokenizer("The capital of Japan is")["input_ids"]
    assert text_after(tokenizer, prompt, whole[len(prompt) :]) == " Osaka"


@pytest.mark.parametrize("family", ["recurrentgemma", "qwen3-next"])
def test_padding_does_not_enter_the_state_of_a_layer(family: str) -> None:
    hybrid, _ = make_model(family, torch.float64)
    hybrid.eval().generation_config.eos_token_id = stop = 2
    prompts = [sequence.prompt_ids for sequence in make_sequences()]
    got = generate(hybrid, SimpleNamespace(eos_token_id=stop), prompts, max_new_tokens=6)
    for prompt, new in zip(prompts, got, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and stop not in expected:
            ids = torch.tensor([prompt + expected])
            expected.append(int(hybrid(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        assert new == expected
