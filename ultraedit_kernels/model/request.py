"""An edit as it is asked for, and what is wrong with one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

Prompt = str | list[dict[str, str]]
"""Text to continue, or chat messages `{"role", "content"}` that the assistant answers."""


@dataclass(frozen=True)
class LocalityTest:
    """A prompt whose answer must not change, and its gold answer where one is known."""

    prompt: Prompt
    answer: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_prompt(self.prompt, "prompt"))
        if self.answer is not None:
            check_text(self.answer, "answer", "the gold answer, or null where none is known")


@dataclass(frozen=True)
class PortabilityTest:
    """A question about what follows from an edit, and its answer."""

    prompt: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", check_prompt(self.prompt, "prompt"))
        check_text(self.answer, "answer", "what follows from the edit")


@dataclass(frozen=True)
class EditRequest:
    """One edit: after it, the model continues `prompt` with `target`.

    Attributes:
        prompt: text to continue, or chat messages.
        target: the new answer, without the space that joins it to a text prompt.
        space: whether a space joins text prompts and the target; None for what the model would
            write.
        rephrases: further prompts that are taught the same target.
        locality: prompts whose answers the edit must leave as they are.
        test_rephrases: held-out rephrases, only ever scored.
        test_locality: held-out locality prompts, only ever scored.
        test_portability: questions about what follows from the edit, only ever scored.
        relation: a label by which scores are grouped, such as "P36".

    Raises:
        ValueError: an empty prompt or target, or messages that are not valid.
        TypeError: a field of the wrong type.
    """

    prompt: Prompt
    target: str
    rephrases: tuple[Prompt, ...] = ()
    locality: tuple[Prompt, ...] = ()
    test_rephrases: tuple[Prompt, ...] = ()
    test_locality: tuple[LocalityTest, ...] = ()
    relation: str | None = None
    test_portability: tuple[PortabilityTest, ...] = ()
    space: bool | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen
        put(self, "prompt", check_prompt(self.prompt, "prompt"))
        check_text(self.target, "target", "the answer that the model is to give")
        for name in ("rephrases", "locality", "test_rephrases"):
            items = check_items(getattr(self, name), name)
            put(self, name, tuple(check_prompt(p, f"{name}[{i}]") for i, p in enumerate(items)))
        tests = check_items(self.test_locality, "test_locality")
        put(
            self,
            "test_locality",
            tuple(check_locality_test(t, f"test_locality[{i}]") for i, t in enumerate(tests)),
        )
        asked = check_items(self.test_portability, "test_portability")
        put(
            self,
            "test_portability",
            tuple(check_portability_test(t, f"test_portability[{i}]") for i, t in enumerate(asked)),
        )
        if self.relation is not None:
            check_text(self.relation, "relation", "a label, or null")
        if self.space is not None and not isinstance(self.space, bool):
            raise TypeError(
                f"space is {kind_of(self.space)}, expected true, false or null: whether a space "
                "joins a text prompt and the target; leave it out for what the model would write"
            )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """An edit from a JSON object with this class's field names.

        Raises:
            ValueError: an unknown field, a missing prompt or target, or a bad value.
            TypeError: the record is no object, or a field has the wrong type.
        """
        if not isinstance(record, Mapping):
            raise TypeError(
                f"edit is {kind_of(record)}, expected an object with prompt and target; "
                'write {"prompt": ..., "target": ...}'
            )
        known = [field.name for field in fields(cls)]
        for name in record:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "remove it"
                raise ValueError(f"unknown field {name!r}, expected {', '.join(known)}; {hint}")
        for name in ("prompt", "target"):
            if name not in record:
                raise ValueError(
                    f"field {name!r} is missing, expected text; every edit needs prompt and target"
                )
        return cls(**record)


def check_turn(requests: Sequence[EditRequest]) -> None:
    """Reject a turn that is empty or that teaches one prompt twice.

    Rephrases that are taught count as prompts, except that one prompt may be given again with
    the same target in a rephrase.

    Raises:
        ValueError: no edits, two targets for one prompt, or the same edit twice.
        TypeError: an edit that is no EditRequest.
    """
    if not requests:
        raise ValueError("got no edits, expected at least one; pass a non-empty list of edits")
    taught: dict[str, tuple[int, str]] = {}
    own: dict[str, int] = {}
    for i, request in enumerate(requests):
        if not isinstance(request, EditRequest):
            raise TypeError(
                f"edit {i} is {kind_of(request)}, expected an EditRequest; "
                "make one of a JSON object with EditRequest.from_dict"
            )
        key = prompt_key(request.prompt)
        for prompt in (request.prompt, *request.rephrases):
            first, target = taught.setdefault(prompt_key(prompt), (i, request.target))
            if target != request.target:
                raise ValueError(
                    f"edits {first} and {i} give the prompt {prompt_key(prompt)} two targets, "
                    f"{target!r} and {request.target!r}, expected one target for a prompt; "
                    "drop one of them or apply them in separate turns"
                )
        if key in own:
            raise ValueError(
                f"edit {i} repeats edit {own[key]} (prompt {key}, target {request.target!r}), "
                "expected every edit once in a turn; drop one of them"
            )
        own[key] = i


def kind_of(value: object) -> str:
    """The name of a value's type, as errors about JSON give it."""
    return "null" if value is None else type(value).__name__


def check_text(value: object, field: str, what: str) -> str:
    """The value, if it is Unicode text that is not blank; `what` it stands for goes into the error.

    Raises:
        TypeError: no text.
        ValueError: empty, only white space, or half of a surrogate pair in it, which may stand for
            a byte of a file that is not UTF-8.
    """
    if not isinstance(value, str):
        raise TypeError(f"{field} is {kind_of(value)}, expected text: {what}; write it as a string")
    if not value.strip():
        got = "empty" if not value else "only white space"
        raise ValueError(f"{field} is {got}, expected text: {what}; give it or leave the edit out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{field} has a lone surrogate, or a byte that is not UTF-8, at character "
            f"{error.start}, expected Unicode text; remove the broken character"
        ) from None
    return value


def check_prompt(value: object, field: str) -> Prompt:
    """The value, if it is text or chat messages that an assistant is to answer; messages copied.

    Raises:
        TypeError: neither text nor a list.
        ValueError: blank text, no messages, one that is none, or the assistant's at the end.
    """
    if isinstance(value, str):
        return check_text(value, field, "the text that the model continues")
    if not isinstance(value, list | tuple):
        raise TypeError(
            f"{field} is {kind_of(value)}, expected text or a list of chat messages; "
            'write "..." or [{"role": "user", "content": "..."}]'
        )
    if not value:
        raise ValueError(f"{field} has no messages, expected at least one; add the user's message")
    for i, message in enumerate(value):
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            got = sorted(message) if isinstance(message, Mapping) else kind_of(message)
            raise ValueError(
                f"{field}[{i}] is {got}, expected a chat message with exactly role and content; "
                'write {"role": "user", "content": "..."}'
            )
        check_text(message["role"], f"{field}[{i}].role", "system, user or assistant")
        check_text(message["content"], f"{field}[{i}].content", "the message")
    if value[-1]["role"] == "assistant":
        raise ValueError(
            f"{field} ends with an assistant message, expected the message that is answered; "
            "give the assistant's answer as the target"
        )
    return [dict(message) for message in value]


def check_items(value: object, field: str) -> Sequence[Any]:
    """The value, if it is a list or a tuple. Raises TypeError otherwise."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{field} is {kind_of(value)}, expected a list; write [...] around it")
    return value


def check_locality_test(value: object, field: str) -> LocalityTest:
    """A locality test of a prompt alone, of an object with prompt and answer, or the test itself.

    Raises:
        TypeError, ValueError: as `check_prompt`, or an object with other fields.
    """
    if isinstance(value, LocalityTest):
        return value
    try:
        if not isinstance(value, Mapping):
            return LocalityTest(value)  # type: ignore[arg-type]  # checked there
        if "prompt" not in value or not set(value) <= {"prompt", "answer"}:
            raise ValueError(
                f"has the fields {sorted(map(str, value))}, expected prompt and answer; "
                'write {"prompt": ..., "answer": ...}'
            )
        return LocalityTest(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field}: {error}") from None


def check_portability_test(value: object, field: str) -> PortabilityTest:
    """A portability test of an object with prompt and answer, or the test itself.

    Raises:
        TypeError, ValueError: as `check_prompt`, or no object with exactly these fields.
    """
    if isinstance(value, PortabilityTest):
        return value
    if not isinstance(value, Mapping) or set(value) != {"prompt", "answer"}:
        got = sorted(map(str, value)) if isinstance(value, Mapping) else kind_of(value)
        raise ValueError(
            f"{field} is {got}, expected an object with exactly prompt and answer; "
            'write {"prompt": ..., "answer": ...}'
        )
    try:
        return PortabilityTest(**value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{field}: {error}") from None


def prompt_key(prompt: Prompt) -> str:
    """A prompt as JSON: by it prompts are compared, and errors show it."""
    return json.dumps(prompt, ensure_ascii=False)
