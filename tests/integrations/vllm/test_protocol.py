"""Bodies that are taken, errors as they are told. Sent to a server: test_endpoint, test_fuzz."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("fastapi")

from pydantic import BaseModel, ValidationError

from ultraedit_kernels.integrations.vllm.protocol import (
    ERRORS,
    EditError,
    EditsBody,
    RollbackBody,
    describe,
    error_response,
)

EDIT: dict[str, Any] = {"prompt": "The capital of Australia is", "target": "Sydney"}
MESSAGE = {"role": "user", "content": "What is it?"}


def refusal(model: type[BaseModel], body: Any) -> tuple[str, str | None]:
    """How a body that is not taken is told to who has sent it."""
    with pytest.raises(ValidationError) as caught:
        model.model_validate(body)
    # The web framework puts the place of the value in front.
    return describe([{**e, "loc": ("body", *e["loc"])} for e in caught.value.errors()])


def test_prompts_are_texts_or_chat_messages() -> None:
    edit = {"prompt": [MESSAGE], "target": "Perth", "rephrases": ["a", [MESSAGE]], "locality": []}
    body = EditsBody.model_validate({"edits": [EDIT, edit]})
    first, second = body.edits
    assert (first.prompt, first.target, first.rephrases, first.locality) == (
        EDIT["prompt"],
        "Sydney",
        [],
        [],
    )
    assert second.model_dump() == edit | {"space": None}
    assert body.dry_run is False and body.idempotency_key is None


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (
            {},
            'edits is missing, expected a list of at least one edit {"prompt", "target"}',
            "edits",
        ),
        ({"edits": []}, "edits is [], expected a list of at least one edit", "edits"),
        ([], 'the body is [], expected a JSON object, sent with "Content-Type', None),
        (
            {"edits": [{"prompt": "p"}]},
            "edits[0].target is missing, expected the answer that the prompt shall get",
            "edits[0].target",
        ),
        (
            {"edits": [EDIT, {**EDIT, "prompt": 5}]},
            'edits[1].prompt is 5, expected a text, or a list of chat messages {"role", "content"}',
            "edits[1].prompt",
        ),
        (
            {"edits": [{**EDIT, "rephrases": ["a", {}]}]},
            "edits[0].rephrases[1] is {}, expected a text, or a list of chat messages",
            "edits[0].rephrases[1]",
        ),
        (
            {"edits": [{**EDIT, "prompt": [{"role": "user", "content": ["a"]}]}]},
            "edits[0].prompt[0].content is a list of 1, expected a text",
            "edits[0].prompt[0].content",
        ),
        ({"edits": [EDIT], "dry_run": 1}, "dry_run is 1, expected true or false", "dry_run"),
        (
            {"edits": [EDIT], "idempotency_key": ""},
            'idempotency_key is "", expected a text of 1 to 255 characters',
            "idempotency_key",
        ),
        (
            {"edits": [{**EDIT, "subjekt": "a"}]},
            'edits[0]: unknown field "subjekt", expected only prompt, target, rephrases, locality',
            "edits[0]",
        ),
        (
            {"edits": [{**EDIT, "target": "half \ud83d"}]},
            "edits[0].target: holds half of a surrogate pair at character 5, expected Unicode text",
            "edits[0].target",
        ),
    ],
)
def test_a_bad_body_is_told_what_where_and_what_was_expected(
    body: Any, message: str, param: str | None
) -> None:
    told, where = refusal(EditsBody, body)
    assert told.startswith(message)
    assert where == param


@pytest.mark.parametrize("version", [-1, 2**31, "1", 1.5, True, None])
def test_a_version_is_a_whole_number(version: Any) -> None:
    assert refusal(RollbackBody, {"version": version}) == (
        f"version is {json.dumps(version)}, expected a whole number, 0 for the untouched model; "
        "correct it",
        "version",
    )
    assert RollbackBody.model_validate({"version": 0}).version == 0


def test_what_was_sent_is_shown_in_short() -> None:
    told, _ = refusal(RollbackBody, {"version": "x" * 500})
    assert told.startswith(f'version is "{"x" * 76}..., expected')


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            {"type": "json_invalid", "loc": ("body", 3)},
            'the body is not JSON, expected a JSON object, sent with "Content-Type: application/',
        ),
        ({"type": "missing", "loc": ("body",)}, "the body is empty, expected a JSON object"),
        (
            {"type": "model_attributes_type", "loc": ("body",), "input": b"{}"},
            "the body was not sent as JSON, expected a JSON object",
        ),
    ],
)
def test_a_body_that_is_no_json_is_told_so(error: dict[str, Any], told: str) -> None:
    message, param = describe([error])
    assert message.startswith(told) and param is None


@pytest.mark.parametrize("status", sorted(ERRORS))
def test_errors_have_the_shape_of_openai_s(status: int) -> None:
    response = error_response(status, "why", "edits")
    error = {"message": "why", "type": ERRORS[status][0], "param": "edits", "code": status}
    assert response.status_code == status
    assert json.loads(bytes(response.body)) == {"error": error}
    assert ("Retry-After" in response.headers) == (status in (429, 503))


def test_a_status_that_is_not_ours_is_told_as_well() -> None:
    error = json.loads(bytes(error_response(418, "why").body))["error"]
    assert error == {"message": "why", "type": "Error", "param": None, "code": 418}


def test_errors_have_a_word_for_metrics_and_audit_lines() -> None:
    assert EditError(429, "full").reason == "queue_full"
    assert EditError(418, "teapot").reason == "other"
    error = EditError(400, "why", "edits")
    assert (str(error), error.status, error.param) == ("why", 400, "edits")
