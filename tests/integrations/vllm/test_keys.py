"""Who is let in to /v1/edits. On a server with vLLM's own check behind it: test_operators."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

pytest.importorskip("starlette")

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse

from ultraedit_kernels.integrations.vllm.keys import NO_KEY, SCOPE, EditKeys

API, EDIT = ["api", "api2"], ["edit", "edit2"]


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it got to see."""
    request = Request(scope)
    seen = {"id": scope.get(SCOPE), "authorization": request.headers.get("Authorization")}
    await JSONResponse(seen)(scope, receive, send)


def ask(
    app: EditKeys, authorization: str | None = None, path: str = "/v1/edits", **options: Any
) -> httpx.Response:
    async def request() -> httpx.Response:
        transport = httpx.ASGITransport(app, root_path=options.pop("root_path", ""))
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {} if authorization is None else {"Authorization": authorization}
            return await client.request(options.pop("method", "POST"), path, headers=headers)

    return asyncio.run(request())


def identity(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


@pytest.mark.parametrize("key", EDIT)
@pytest.mark.parametrize("path", ["/v1/edits", "/v1/edits/", "/v1/edits/1/delta"])
def test_an_edit_key_is_let_in_and_goes_on_as_an_api_key(key: str, path: str) -> None:
    response = ask(EditKeys(application, EDIT, API), f"Bearer {key}", path)
    assert response.json() == {"id": identity(key), "authorization": "Bearer api"}


def test_without_edit_keys_the_api_keys_are_asked_for() -> None:
    app = EditKeys(application, [], API)
    assert ask(app, "bearer  api2 ").json()["id"] == identity("api2")
    assert ask(app, "Bearer edit").status_code == 401


def test_without_any_key_everybody_is_let_in() -> None:
    app = EditKeys(application, [], [])
    for authorization in (None, "Bearer anything"):
        expected = {"id": NO_KEY, "authorization": authorization}
        assert ask(app, authorization).json() == expected


@pytest.mark.parametrize(
    ("authorization", "got"),
    [
        (None, "no key was sent"),
        ("Bearer ", "no key was sent"),
        ("Basic edit", "no key was sent"),
        ("Bearer other", "the key is not known"),
        ("Bearer edit edit", "the key is not known"),
    ],
)
@pytest.mark.parametrize(("keys", "wanted"), [(EDIT, "an edit key"), ([], "the server's API key")])
def test_others_are_told_what_is_missing(
    authorization: str | None, got: str, keys: list[str], wanted: str
) -> None:
    response = ask(EditKeys(application, keys, API), authorization)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"]) == (401, 401, "AuthenticationError")
    assert error["message"].startswith(f"{got}, expected {wanted}; send it as ")
    assert response.headers["WWW-Authenticate"] == "Bearer"


def test_an_api_key_may_not_edit_where_there_are_edit_keys() -> None:
    response = ask(EditKeys(application, EDIT, API), "Bearer api2")
    assert response.status_code == 403
    assert response.json()["error"]["type"] == "PermissionDeniedError"
    assert "may not edit, expected an edit key" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/editsandmore", "/v1", "/other/v1/edits"])
def test_other_routes_are_left_alone(path: str) -> None:
    response = ask(EditKeys(application, EDIT, API), "Bearer other", path)
    assert response.json() == {"id": None, "authorization": "Bearer other"}


def test_a_root_path_is_looked_through() -> None:
    app = EditKeys(application, EDIT, API)
    response = ask(app, "Bearer other", "/here/v1/edits", root_path="/here")
    assert response.status_code == 401


def test_a_browser_may_ask_beforehand() -> None:
    assert ask(EditKeys(application, EDIT, API), method="OPTIONS").status_code == 200
