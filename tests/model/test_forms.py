"""The forms in which a question can be asked."""

from __future__ import annotations

from ultraedit_kernels.model.forms import SYSTEM_PROMPT, form_of, forms_of, other_forms

ASK = "Who?"
USER = {"role": "user", "content": ASK}
BRIEF = {"role": "system", "content": "Be brief."}


def test_a_prompt_has_one_form() -> None:
    assert [form_of(p) for p in (ASK, [USER], [BRIEF, USER])] == [
        "text",
        "chat",
        "chat with a system prompt",
    ]
    assert forms_of([ASK, [USER], "Why?"]) == ["text", "chat"]


def test_the_others_are_those_that_are_not_taught() -> None:
    assert other_forms(ASK) == [[USER]]
    assert other_forms([USER]) == [ASK, [{"role": "system", "content": SYSTEM_PROMPT}, USER]]
    assert other_forms([BRIEF, USER]) == [ASK, [USER]]
    assert other_forms([BRIEF, USER], [[USER], ASK]) == []
    assert other_forms([BRIEF]) == []
