"""The model says whether a space joins a text and its target."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.method.small import run
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.method.spaces import SURE, choose_spaces, lead_of_space, spaces_of
from ultraedit_kernels.model.generation import logits_from

FACT = ("The capital of Australia is", "Sydney")
UNSPACED = [
    ("法国的首都是", "里昂"),
    ("The bridge was opened in 19", "84"),
    ('Her best known novel is "', "The Tin Orchard"),
]


def test_a_model_that_is_sure_of_its_space_overrules_the_characters(
    model: Any, tokenizer: Any
) -> None:
    """A prompt that ends in a hyphen suggests none; after this one the model writes a word."""
    row = tokenizer(FACT[0])["input_ids"]
    (logits,) = logits_from(model, [row], [len(row) - 1])
    assert lead_of_space(tokenizer, logits[0], "Sydney") > SURE
    swapped = logits[0].clone()
    spaced = tokenizer.convert_tokens_to_ids("ĠCan")
    bare = tokenizer.convert_tokens_to_ids("Can" if "Can" in tokenizer.get_vocab() else "C")
    swapped[:] = -100.0
    swapped[bare], swapped[spaced] = 10.0, 0.0
    assert lead_of_space(tokenizer, swapped, "Sydney") == pytest.approx(-10.0, abs=1e-3)


def test_what_the_characters_suggest_stands_where_the_model_is_not_sure(
    model: Any, tokenizer: Any
) -> None:
    pairs = [FACT, *UNSPACED]
    assert choose_spaces(model, tokenizer, pairs) == [True, False, False, False]


def test_a_request_may_ask_for_a_space_or_none(model: Any, tokenizer: Any) -> None:
    requests = [
        EditRequest(*FACT, rephrases=("Australia's capital is",), space=False),
        EditRequest(*UNSPACED[0], space=True),
        EditRequest(*FACT),
        EditRequest([{"role": "user", "content": "Who?"}], "Me"),
    ]
    _, found = run(spaces_of(model, tokenizer, requests))
    assert found == [[False, False], [True], [True], [False]]


@pytest.mark.parametrize(("prompt", "target"), UNSPACED[1:])
def test_the_model_then_says_the_target_without_a_space(
    model: Any, tokenizer: Any, prompt: str, target: str
) -> None:
    editor = Editor(model, tokenizer, anchors=0, max_lost=1.0, max_change=100.0, rounds=40)
    (edit,) = editor.apply([EditRequest(prompt, target)]).edits
    assert edit.succeeded
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    out = model.generate(ids, max_new_tokens=24, do_sample=False)[0].tolist()
    text = tokenizer.decode(out, skip_special_tokens=True)
    assert text.endswith(prompt[-4:] + target)
