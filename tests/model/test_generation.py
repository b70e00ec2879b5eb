from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.model.test_capture import make_model, make_sequences
from ultraedit_kernels.model.encoding import encode_prompt
from ultraedit_kernels.model.generation import Penalties, generate, sample, text_after

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


def samples(model: Any, tokenizer: Any, count: int = 6, batch: int = 4, seed: int = 1) -> Any:
    return list(
        sample(
            model,
            tokenizer,
            tokenizer.bos_token_id,
            count,
            max_new_tokens=12,
            batch_size=batch,
            seed=seed,
        )
    )


def test_a_seed_decides_a_sample_and_nobody_elses_numbers(model: Any, tokenizer: Any) -> None:
    state = torch.random.get_rng_state()
    model.train()
    first, again, other = (samples(model, tokenizer, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training


def test_a_sample_comes_batch_by_batch_and_says_how_far_it_is(model: Any, tokenizer: Any) -> None:
    told = samples(model, tokenizer)
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and 0 < shares[0] < 0.1 and shares[-1] == 1
    batches = [texts for _, texts in told if texts]
    assert [len(texts) for texts in batches] == [4, 2]
    for text in (text for texts in batches for text in texts):
        assert 0 < len(text) <= 12
        assert tokenizer.eos_token_id not in text[:-1]
        assert len(text) == 12 or text[-1] == tokenizer.eos_token_id


def test_a_sample_follows_the_models_distribution(model: Any, tokenizer: Any) -> None:
    """Its first tokens; the chance of each is the model's."""
    first = torch.tensor([[tokenizer.bos_token_id]])
    chances = model(first).logits[0, -1].softmax(-1)
    count = 4000
    told = sample(
        model,
        tokenizer,
        tokenizer.bos_token_id,
        count,
        max_new_tokens=1,
        batch_size=count,
        seed=5,
    )
    (texts,) = [texts for _, texts in told]
    counts = torch.bincount(torch.tensor(texts)[:, 0], minlength=len(chances))
    error = (chances * (1 - chances) / count).sqrt() * 5 + 1 / count
    assert ((counts / count - chances).abs() < error).all()


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
