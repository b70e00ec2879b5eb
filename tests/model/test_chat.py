"""What the chat template makes of messages and answers."""

from __future__ import annotations

from typing import Any

import pytest

from ultraedit_kernels.model.chat import render_turn, spoken
from ultraedit_kernels.model.encoding import encode

CHAT = [{"role": "user", "content": "What is the capital of Japan?"}]
TRIMMED = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PADDED = TRIMMED.replace("{{ eos_token }}", "<|pad|>")
PLAIN = TRIMMED.replace(" | trim", "").replace("{{ eos_token }}", "\n")
OPENED = TRIMMED.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
EMPTY_THOUGHT = TRIMMED.replace(
    "{{ message['content'] | trim }}",
    "{% if message['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message['content'] | trim }}",
)
NO_ANSWERS = (
    "{% for message in messages %}{% if message['role'] != 'user' %}"
    "{{ raise_exception('users only') }}{% endif %}{{ message['content'] }}{% endfor %}:"
)


@pytest.fixture
def shown(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def turn(template: str, target: str) -> Any:
        monkeypatch.setattr(tokenizer, "chat_template", template)
        return render_turn(tokenizer, CHAT, target)

    return turn


@pytest.mark.parametrize("target", ["Osaka", " Osaka", "Osaka\n", "\n Osaka "])
@pytest.mark.parametrize(("template", "end"), [(TRIMMED, 1), (PADDED, 2)])
def test_a_target_is_trimmed_where_the_template_trims(
    shown: Any, target: str, template: str, end: int
) -> None:
    turn = shown(template, target)
    assert (turn.answer, turn.end) == ("Osaka", end)


@pytest.mark.parametrize("target", ["<|pad|>", "end", "eos", "assistant", "a", "ultraedit"])
def test_the_end_does_not_depend_on_the_target(shown: Any, target: str) -> None:
    """Also where the target is found again in what follows it."""
    assert shown(TRIMMED, target).end == 1
    assert shown(PADDED, target).end == 2


def test_a_template_without_an_end_leaves_the_tokenizer_s(shown: Any) -> None:
    turn = shown(PLAIN, " Osaka\n")
    assert (turn.answer, turn.end) == (" Osaka\n", 1)
    assert shown(NO_ANSWERS, "Osaka").answer == "Osaka"


def test_an_answer_comes_after_the_thought(shown: Any) -> None:
    """Opened by the prompt, or put there empty as the template shows past answers."""
    turn = shown(OPENED, "Osaka")
    assert turn.prompt.endswith("<think>\n")
    assert turn.answer == "\n</think>\n\nOsaka"
    turn = shown(EMPTY_THOUGHT, "Osaka")
    assert turn.answer == "<think>\n\n</think>\n\nOsaka"
    both = EMPTY_THOUGHT.replace("<|assistant|>{% endif %}", "<|assistant|><think>\n{% endif %}")
    assert shown(both, "Osaka").answer == "\n</think>\n\nOsaka"


def test_what_is_spoken_is_what_follows_the_thought() -> None:
    assert spoken("\n</think>\n\nOsaka") == "\n\nOsaka"
    assert spoken("<think>Kyoto?</think>Osaka") == "Osaka"
    assert spoken("[THINK]no[/THINK] Osaka") == " Osaka"
    assert spoken("a <b> Osaka") == "a <b> Osaka"


def test_the_tokens_are_those_of_the_whole_turn(tokenizer: Any, shown: Any) -> None:
    for template in (TRIMMED, PADDED, EMPTY_THOUGHT):
        turn = shown(template, " Osaka ")
        sequence = encode(tokenizer, CHAT, " Osaka ")
        whole = tokenizer.apply_chat_template(
            [*CHAT, {"role": "assistant", "content": " Osaka "}], tokenize=False
        )
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        assert sequence.prompt_ids + sequence.target_ids == ids
        assert sequence.target_ids[-1] == turn.end
