"""Contexts of edits, on the bundled model."""

from __future__ import annotations

import pytest
import torch

from tests.method.small import run
from ultraedit_kernels import EditRequest
from ultraedit_kernels.method import contexts
from ultraedit_kernels.model.encoding import Sequence, encode, encode_prompt
from ultraedit_kernels.model.generation import generate, text_after

PROMPT = "The capital of Australia is"
CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "What is the capital of Australia?"},
]


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    from tests.conftest import BUNDLED

    return AutoModelForCausalLM.from_pretrained(BUNDLED).eval()


def test_an_answer_is_what_the_model_says_up_to_the_end_of_a_sentence(model, tokenizer) -> None:
    prompts = [
        encode_prompt(tokenizer, prompt)
        for prompt in (PROMPT, CHAT, "The capital of France is", "Once upon a time", "?")
    ]
    _, answers = run(contexts.first_sentences(model, tokenizer, prompts))
    whole = generate(model, tokenizer, prompts, max_new_tokens=contexts.ANSWER_TOKENS)
    for prompt, answer, all_of_it in zip(prompts, answers, whole, strict=True):
        assert answer == all_of_it[: len(answer)]
        said = [text_after(tokenizer, prompt, answer[: i + 1]).strip() for i in range(len(answer))]
        assert not any(set(text) & contexts.SENTENCE_ENDS for text in said[:-1])
        if len(answer) < len(all_of_it):
            assert all_of_it[len(answer)] == tokenizer.eos_token_id or set(said[-1]) & set(".!?")
    assert any(answers)


def test_the_target_stands_where_it_is_the_likeliest(model, tokenizer) -> None:
    answer = tokenizer(" city of the country and the", add_special_tokens=False)["input_ids"]
    for prompt, target in [(PROMPT, "Sydney"), ("Who wrote", "Hamlet"), (PROMPT, "country")]:
        sequence = Sequence(*_parts(tokenizer, prompt, target), places=(2,))
        found = contexts.in_own_words(model, tokenizer, target, sequence, answer)
        start, chances = len(sequence.prompt_ids), {}
        for i in range(len(answer)):
            text = tokenizer.decode(sequence.prompt_ids + answer[:i])
            if i and text_after(tokenizer, sequence.prompt_ids + answer[:i], answer[i:])[:1] != " ":
                continue  # inside a word
            said = sequence.target_ids if not i else _parts(tokenizer, text, target)[1]
            with torch.no_grad():
                logits = model(torch.tensor([sequence.prompt_ids + answer[:i]])).logits[0, -1]
            chances[i] = float(logits.log_softmax(-1)[said[0]])
        best = max(chances, key=lambda i: chances[i])
        assert len(found) == (best > 0)
        for context in found:
            assert context.prompt_ids == sequence.prompt_ids + answer[:best]
            assert tokenizer.decode(context.target_ids).strip() == target
            assert context.places == (2,) and len(context.prompt_ids) > start


def _parts(tokenizer, prompt: str, target: str) -> tuple[list[int], list[int]]:
    found = encode(tokenizer, prompt, target, append_eos=False)
    return found.prompt_ids, found.target_ids


def test_a_text_goes_before_the_prompt_and_the_place_moves_along(tokenizer) -> None:
    sequence = encode(tokenizer, PROMPT, "Sydney")
    place = len(sequence.prompt_ids) - 3
    sequence = Sequence(sequence.prompt_ids, sequence.target_ids, (place,))
    text = Sequence([1], tokenizer("Bread is baked. So is cake")["input_ids"])
    behind = contexts.behind(tokenizer, text, PROMPT, sequence)
    (moved,) = behind.places
    assert behind.prompt_ids[moved:] == sequence.prompt_ids[place:]
    assert behind.target_ids == sequence.target_ids
    said = tokenizer.decode(behind.prompt_ids)
    assert said.count("Bread is baked") == 1
    assert said.index("Bread is baked") < said.index(PROMPT)


def test_texts_are_said_behind_others_and_chats_in_own_words(model, tokenizer) -> None:
    requests = [EditRequest(PROMPT, "Sydney"), EditRequest(CHAT, "Perth")]
    sequences = [
        Sequence(s.prompt_ids, s.target_ids, (1,))
        for s in (encode(tokenizer, r.prompt, r.target) for r in requests)
    ]
    texts = [Sequence([1], tokenizer(f"Text {i} is here")["input_ids"]) for i in range(5)]
    _, found = run(contexts.contexts_of(model, tokenizer, requests, sequences, texts))
    assert len(found[0]) == contexts.CONTEXTS
    assert all(s.prompt_ids[-3:] == sequences[0].prompt_ids[-3:] for s in found[0])
    _, (answer,) = run(contexts.first_sentences(model, tokenizer, [sequences[1].prompt_ids]))
    own = contexts.in_own_words(model, tokenizer, "Perth", sequences[1], answer)
    assert found.get(1, []) == own
    _, found = run(contexts.contexts_of(model, tokenizer, requests, sequences, []))
    assert found.get(1, []) == own and 0 not in found


@pytest.mark.parametrize("guess", ["all", "half", "another", "", "longer"])
def test_a_guess_changes_no_answer(model, tokenizer, guess: str, monkeypatch) -> None:
    prompts = [
        encode_prompt(tokenizer, prompt)
        for prompt in (PROMPT, CHAT, "The capital of France is", "Once upon a time", "?")
    ]
    alone, answers = run(contexts.first_sentences(model, tokenizer, prompts))
    guesses = []
    for prompt, answer in zip(prompts, answers, strict=True):
        text = text_after(tokenizer, prompt, answer)
        half = text_after(tokenizer, prompt, answer[: len(answer) // 2])
        texts = {"all": text, "half": half, "another": " never", "": "", "longer": f"{text} Never."}
        guesses.append(texts[guess])
    monkeypatch.setattr(contexts, "GUESSES", 2)
    phases, with_guess = run(contexts.first_sentences(model, tokenizer, prompts, guesses))
    assert with_guess == answers
    if guess == "all":
        assert len(phases) < len(alone)
