"""Chat: what users' messages become, and what the assistant's answer to them is, as text.

The chat template decides both, and nothing else does: it may trim an answer, put an empty thought
before it, and end the turn with a token of its own. A tokenizer renders as its server does if its
`apply_chat_template` does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Messages = list[dict[str, str]]

STANDIN = "ultraedit"
"""An answer that no template changes: around it stands what the template adds to an answer."""
_THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
_OPENED = re.compile(rf"([<\[])({_THOUGHT})([>\]])\s*\Z", re.IGNORECASE)
_CLOSED = re.compile(rf"\A.*[<\[]/{_THOUGHT}[>\]]", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Turn:
    """The assistant's turn, as the chat template has it."""

    prompt: str
    """All up to where the model begins to write."""
    answer: str
    """What it writes: the target as the template leaves it, after an empty thought if the template
    opens one or puts one there."""
    end: int | None
    """The token that ends the turn; None if there is none."""


class Refused(ValueError):
    """The template does not take the messages."""


def with_arguments(tokenizer: Any, arguments: Mapping[str, Any]) -> Any:
    """The tokenizer with default arguments of its chat template, as a server has them in
    `--default-chat-template-kwargs`, such as {"enable_thinking": False}. The one given stays as it
    is.

    Raises:
        TypeError: they are no mapping of names.
    """
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise TypeError(
            f"chat template arguments are {arguments!r}, expected an object of names and values; "
            'write {"enable_thinking": false}'
        )
    own = copy.copy(tokenizer)

    def apply_chat_template(*messages: Any, **options: Any) -> Any:
        return tokenizer.apply_chat_template(*messages, **(dict(arguments) | options))

    own.apply_chat_template = apply_chat_template
    return own


def render_prompt(tokenizer: Any, messages: Messages) -> str:
    """Messages as the model reads them, up to where it begins to answer.

    Raises:
        ValueError: the tokenizer has no chat template; as Refused, it refuses the messages.
    """
    return _render(tokenizer, messages, add_generation_prompt=True)


def render_turn(tokenizer: Any, messages: Messages, target: str) -> Turn:
    """Messages and the answer to them. Raises as `render_prompt`."""
    prompt = render_prompt(tokenizer, messages)
    eos: int | None = tokenizer.eos_token_id
    try:
        around, whole = (
            _render(tokenizer, [*messages, {"role": "assistant", "content": content}])
            for content in (STANDIN, target)
        )
    except Refused:  # no place for an answer behind these messages
        return Turn(prompt, _closing(prompt) + target, eos)
    head, found, tail = around.rpartition(STANDIN)
    if not found:
        return Turn(prompt, _closing(prompt) + target, eos)
    inside = len(whole) - len(head) - len(tail)
    if inside > 0 and whole.startswith(head) and whole.endswith(tail):
        target = whole[len(head) : len(head) + inside]
    before = head[len(prompt) :] if head.startswith(prompt) else _closing(prompt)
    return Turn(prompt, before + target, _first_mark(tokenizer, tail, eos))


def spoken(answer: str) -> str:
    """An answer without the thought before it, if that is closed."""
    return _CLOSED.sub("", answer)


def _render(tokenizer: Any, messages: Messages, **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompt is a list of chat messages but the tokenizer has no chat template; "
            "pass the prompt as text, or set tokenizer.chat_template"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except ImportError:  # of jinja2
        raise
    except Exception as error:  # a template is a program, which raises what it likes
        raise Refused(
            f"the model's chat template refuses the messages: {error}, expected messages that it "
            "takes; leave out a role that it does not know, such as system"
        ) from error
    return text


def _closing(prompt: str) -> str:
    """What closes a thought that the prompt opens, or nothing: a target inside it is no answer."""
    opened = _OPENED.search(prompt)
    return "\n{}/{}{}\n\n".format(*opened.groups()) if opened else ""


def _first_mark(tokenizer: Any, tail: str, otherwise: int | None) -> int | None:
    """The first token of a text that is no ordinary one."""
    marks = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return next((i for i in ids if i in marks), otherwise)
