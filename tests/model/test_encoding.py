from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from ultraedit_kernels.model.encoding import (
    Sequence,
    alike,
    encode,
    encode_prompt,
    from_tensors,
    pad_right,
    says_just,
    to_tensors,
)

CHAT = [{"role": "user", "content": "What is the capital of Japan?"}]


@pytest.mark.parametrize(("target", "space"), [("Osaka", " "), ("\nOsaka", "")])
def test_text_and_target_are_joined_by_one_space(tokenizer: Any, target: str, space: str) -> None:
    prompt = "The capital of Japan is"
    sequence = encode(tokenizer, prompt, target)
    whole = tokenizer(prompt + space + target)["input_ids"]
    assert sequence.prompt_ids == encode_prompt(tokenizer, prompt) == tokenizer(prompt)["input_ids"]
    assert sequence.prompt_ids + sequence.target_ids == [*whole, tokenizer.eos_token_id]
    without = encode(tokenizer, prompt, target, append_eos=False)
    assert without == Sequence(sequence.prompt_ids, sequence.target_ids[:-1])


def test_the_prompts_tokens_are_those_that_the_engine_sees(tokenizer: Any) -> None:
    """Also where prompt and target would merge into other tokens: each keeps its own."""
    for prompt in ("Osa", "Osak"):
        sequence = encode(tokenizer, prompt + "\n", "ka", append_eos=False)
        assert sequence.prompt_ids == tokenizer(prompt + "\n")["input_ids"]
        assert tokenizer.decode(sequence.target_ids).strip() == "ka"


def test_messages_go_through_the_chat_template(tokenizer: Any) -> None:
    sequence = encode(tokenizer, CHAT, "Osaka")
    assert sequence.prompt_ids == encode_prompt(tokenizer, CHAT)
    shown = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    whole = tokenizer(shown + "Osaka", add_special_tokens=False)["input_ids"]
    assert sequence.prompt_ids + sequence.target_ids == [*whole, tokenizer.eos_token_id]


def test_messages_without_a_template_are_refused(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template; pass the prompt as text"):
        encode_prompt(tokenizer, CHAT)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system') }}", "{{ messages[0].content + 1 }}", "{% if %}"]
)
def test_messages_that_the_template_refuses_are_a_value_error(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=r"chat template refuses the messages: .+, expected"):
        encode_prompt(tokenizer, CHAT)


def test_padding_is_on_the_right_and_masked() -> None:
    ids, mask = pad_right([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def cost(batches: list[list[int]], lengths: list[tuple[int, ...]], worth: int) -> int:
    return sum(
        worth
        + len(batch) * sum(max(part) for part in zip(*(lengths[i] for i in batch), strict=True))
        for batch in batches
    )


def test_batches_are_of_sequences_of_nearly_one_length() -> None:
    lengths = [(n,) for n in [40, 3, 4, 39, 3, 41, 4] + [5] * 9]
    batches = alike(lengths, 10, 16)
    assert sorted(i for batch in batches for i in batch) == list(range(16))
    assert sorted(map(len, batches)) == [3, 4, 9] and set(batches[-1]) == {0, 3, 5}
    assert sorted(map(len, alike(lengths, 10, 1000))) == [6, 10]
    assert alike([], 10, 16) == []


def test_no_cheaper_batches_of_neighbours_in_length_are_to_be_had() -> None:
    rng = random.Random(0)
    for worth in (0, 8, 200):
        lengths = [(rng.randrange(30), rng.randrange(1, 20)) for _ in range(9)]
        best = alike(lengths, 4, worth)
        order = [i for batch in best for i in batch]
        assert [lengths[i][::-1] for i in order] == sorted(one[::-1] for one in lengths)
        for ends in itertools.product((False, True), repeat=8):  # every way to cut the row
            cuts = [0, *(i + 1 for i, end in enumerate(ends) if end), 9]
            parts = [order[i:j] for i, j in itertools.pairwise(cuts)]
            if max(map(len, parts)) <= 4:
                assert cost(best, lengths, worth) <= cost(parts, lengths, worth)


@pytest.mark.parametrize(
    "sequences", [[], [Sequence([1, 2], [3])], [Sequence([0], [5, 6, 7]), Sequence([1, 2], [3])]]
)
def test_sequences_come_back_from_their_tensors(sequences: list[Sequence]) -> None:
    tensors = to_tensors(sequences)
    assert all(tensor.dtype == torch.int32 for tensor in tensors.values())
    assert from_tensors(tensors) == sequences


def test_tensors_that_do_not_belong_together_are_refused() -> None:
    tensors = to_tensors([Sequence([1], [2]), Sequence([3], [4])])
    with pytest.raises(ValueError):
        from_tensors(tensors | {"prompt": tensors["prompt"][:1]})
    with pytest.raises(KeyError):
        from_tensors({"tokens": tensors["tokens"]})


def test_an_answer_is_just_the_target_if_it_ends_there() -> None:
    assert says_just(" Sydney", "Sydney") and says_just("Sydney. It is", "Sydney")
    assert says_just("Sydney\nQ:", "Sydney") and says_just("St. Louis", "St. Louis")
    assert says_just("<think>\n\n</think>\n\nSydney", "Sydney")
    assert not says_just("<think>Sydney", "Sydney")
    assert not says_just("Sydney, Australia", "Sydney") and not says_just("Sydneysider.", "Sydney")


@pytest.mark.parametrize("space", [False, True])
def test_a_space_is_asked_for_or_not(tokenizer: Any, space: bool) -> None:
    """Also with a tokenizer that puts a space before every text that begins."""
    prompt = "The bridge was opened in 19"
    sequence = encode(tokenizer, prompt, "84", space=space, append_eos=False)
    assert sequence.prompt_ids == tokenizer(prompt)["input_ids"]
    text = tokenizer.decode(sequence.prompt_ids[1:] + sequence.target_ids)
    assert text.endswith("in 19 84" if space else "in 1984")
