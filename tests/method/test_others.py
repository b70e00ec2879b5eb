"""What is asked in other forms, and what is said of the answers."""

from __future__ import annotations

from typing import Any

from ultraedit_kernels.method.others import ask_other_forms
from ultraedit_kernels.model.request import EditRequest

TEXT = "The capital of France is"


def test_the_model_is_asked_in_every_form_that_was_not_taught(model: Any, tokenizer: Any) -> None:
    chat = [{"role": "user", "content": TEXT}]
    requests = [
        EditRequest([{"role": "user", "content": "What is the capital of France?"}], "Paris"),
        EditRequest(chat, "Paris"),
        EditRequest(chat, "Rome"),
        EditRequest(TEXT, "Paris", rephrases=(chat,)),  # nothing is left to ask
    ]
    one, right, wrong, none = ask_other_forms(model, tokenizer, requests)
    assert [other.form for other in one] == ["text"]
    assert [(o.prompt, o.after, o.says_target) for o in right] == [(TEXT, " Paris", True)]
    assert [(o.after, o.says_target) for o in wrong] == [(" Paris", False)]
    assert none == ()


def test_without_a_template_there_is_no_chat(model: Any, tokenizer: Any) -> None:
    tokenizer = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    tokenizer.chat_template = None
    assert ask_other_forms(model, tokenizer, [EditRequest(TEXT, "Paris")]) == [()]
