"""The client, against the server's routes."""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.fleet.conftest import AUSTRALIA, JAPAN
from tests.fleet.local_server import LocalServer
from ultraedit_kernels import AsyncClient, Client, EditDelta, ServerError


def answering(*answers: httpx.Response | Exception) -> tuple[httpx.MockTransport, list[Any]]:
    """A wire that gives these answers, one after the other, and the requests that went over it."""
    left, seen = list(answers), []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        given = left.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    return httpx.MockTransport(answer), seen


def test_edits_are_made_read_and_taken_back(serve: Callable[..., LocalServer]) -> None:
    with serve().client as client:
        before = client.health(digest=True)
        dry = client.dry_run(AUSTRALIA)
        assert (dry.version, dry.edits[0].succeeded, dry.rejected) == (0, True, None)
        made = client.edit([AUSTRALIA, {"prompt": JAPAN.prompt, "target": JAPAN.target}])
        assert made.version == 1 and [edit.succeeded for edit in made.edits] == [True, True]

        record = client.version(1)
        assert client.history().data == [record]
        assert client.health().digest == record["digest"] != before.digest
        delta = client.delta(1)
        assert delta.settings["edits"] == [
            {"prompt": AUSTRALIA.prompt, "target": AUSTRALIA.target},
            {"prompt": JAPAN.prompt, "target": JAPAN.target},
        ]

        back = client.rollback(0)
        assert (back.version, back.digest) == (0, before.ranks[0].digest)
        assert client.apply(delta).digest == record["digest"]


def test_a_delta_is_tried_applied_once_and_only_where_it_belongs(
    serve: Callable[..., LocalServer], deltas: dict[str, EditDelta]
) -> None:
    with serve().client as client:
        start = client.health(digest=True)
        assert start.digest == start.ranks[0].digest  # of version 0, which has no record
        tried = client.apply(deltas["australia"], dry_run=True)
        assert (tried.version, tried.before, tried.rejected) == (0, start.digest, None)
        assert client.health(digest=True) == start and client.history().data == []

        with pytest.raises(ServerError, match="another change came between") as caught:
            client.apply(deltas["australia"], serving=tried.digest)
        assert (caught.value.status, caught.value.param) == (409, "serving")
        first = client.apply(deltas["australia"], idempotency_key="a", serving=start.digest)
        assert (first.version, first.digest, first.again) == (1, tried.digest, False)
        again = client.apply(deltas["australia"], idempotency_key="a", serving=start.digest)
        assert (again.version, again.digest, again.again) == (1, tried.digest, True)
        with pytest.raises(ServerError, match="another body"):
            client.apply(deltas["japan"], idempotency_key="a")

        with pytest.raises(ServerError, match="another change came between"):
            client.rollback(0, serving=start.digest)
        assert client.rollback(0, serving=first.digest).digest == start.digest


def test_the_async_client_has_the_same_methods_and_does_the_same(
    serve: Callable[..., LocalServer], deltas: dict[str, EditDelta]
) -> None:
    def methods(client: type) -> dict[str, Any]:
        return {
            name: list(inspect.signature(value).parameters)
            for name, value in vars(client).items()
            if not name.startswith("_")
        }

    assert methods(Client) == methods(AsyncClient)

    async def use(server: LocalServer) -> None:
        async with AsyncClient(server.url, server.key) as client:
            start = await client.wait(10)
            assert (await client.dry_run(AUSTRALIA)).edits[0].succeeded
            assert (await client.edit(AUSTRALIA)).version == 1
            assert (await client.version(1))["kind"] == "edit"
            assert (await client.history()).data[0]["version"] == 1
            fetched = await client.delta(1)
            assert (await client.rollback(0)).digest == start.digest
            assert (await client.apply(fetched)).version == 1
            assert (await client.health(digest=True)).status == "ok"
            with pytest.raises(ServerError, match="version 9 is not in the journal"):
                await client.version(9)

    asyncio.run(use(serve()))


def test_errors_are_the_servers_words_and_what_to_do(
    serve: Callable[..., LocalServer], deltas: dict[str, EditDelta]
) -> None:
    server = serve()
    with server.client as client:
        with pytest.raises(ServerError, match="unknown field") as caught:
            client.edit({"prompt": "a", "target": "b", "colour": "red"})
        assert caught.value.status == 400 and caught.value.url == server.url
        with pytest.raises(ServerError, match="unknown parameter dry_rum"):
            httpx_error(server, "/v1/edits/apply?dry_rum=true", deltas["japan"].to_bytes())
        foreign = EditDelta(deltas["japan"].factors, dict.fromkeys(deltas["japan"].base, "0" * 64))
        with pytest.raises(ServerError, match="belongs to another checkpoint"):
            client.apply(foreign)
        with pytest.raises(ServerError, match="truncated"):
            client.apply(deltas["japan"].to_bytes()[:-8])
        assert client.history().data == []
    with Client(server.url, "wrong") as client:
        with pytest.raises(ServerError, match=r"key is not known.*ULTRAEDIT_API_KEY") as caught:
            client.wait(10)  # it does not wait for a key to become right
        assert caught.value.status == 401
    server.kill()
    with server.client as client, pytest.raises(ServerError, match="no answer to GET") as caught:
        client.health()
    assert caught.value.status is None


def httpx_error(server: LocalServer, path: str, content: bytes) -> None:
    """Raise as the client does."""
    headers = {"Authorization": f"Bearer {server.key}"}
    response = httpx.post(server.url + path, content=content, headers=headers)
    raise ServerError(server.url, response.json()["error"]["message"], response.status_code)


def test_waiting_ends_when_the_server_is_there(serve: Callable[..., LocalServer]) -> None:
    server = serve()
    server.kill()
    with server.client as client:
        begun = time.monotonic()
        with pytest.raises(ServerError, match=r"not ready after 1 s.*look at its log"):
            client.wait(1)
        assert 1 <= time.monotonic() - begun < 10
        starting = threading.Thread(target=server.start)
        starting.start()
        assert client.wait(60).version == 0
        starting.join()


def test_a_lost_answer_is_asked_for_again_with_the_same_key() -> None:
    lost = httpx.ReadError("gone")
    answer = {"version": 1, "edits": [], "specificity": {"score": None, "prompts": []}}
    answer["protected"] = 1.0
    answer["timings"] = dict.fromkeys(
        ("queue_ms", "capture_ms", "solve_ms", "commit_ms", "pause_ms", "total_ms"), 0.0
    )
    wire, seen = answering(lost, httpx.Response(200, json=answer))
    with Client("http://server", transport=wire) as client:
        assert client.edit(AUSTRALIA).version == 1
    first, second = (json.loads(request.content)["idempotency_key"] for request in seen)
    assert first == second

    # Without a key an applied delta might be applied twice.
    wire, seen = answering(lost)
    client = Client("http://server", transport=wire)
    with client, pytest.raises(ServerError, match="no answer to POST /v1/edits/apply"):
        client.apply(b"delta")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("response", "message"),
    [
        (httpx.Response(404, json={"detail": "Not Found"}), "takes no edits; start it with"),
        (httpx.Response(502, text="<html>Bad Gateway"), "502 .*Bad Gateway.*takes no edits"),
        (httpx.Response(200, text="hello"), "none that ultraedit-kernels .* knows"),
        (httpx.Response(200, json={"status": "ok"}), "use the same version"),
    ],
)
def test_what_is_no_such_server_is_said(response: httpx.Response, message: str) -> None:
    wire, _ = answering(response)
    client = Client("http://server", transport=wire)
    with client, pytest.raises(ServerError, match=message):
        client.health()


def test_ranks_that_differ_are_an_answer_and_an_error_is_none() -> None:
    rank = {"engine": 0, "rank": 0, "version": 1, "digest": None}
    health = {"status": "diverged", "version": 1, "turn": False, "traffic_keys": 0}
    health |= {"queue": [], "gathered": 1.0}
    error = {"message": "asleep", "type": "ServiceUnavailableError", "param": None, "code": 503}
    wire, _ = answering(
        httpx.Response(503, json=health | {"ranks": [rank]}),
        httpx.Response(503, json={"error": error}, headers={"Retry-After": "5"}),
    )
    with Client("http://server", transport=wire) as client:
        assert client.health().status == "diverged"
        with pytest.raises(ServerError, match="asleep") as caught:
            client.health()
    assert caught.value.retry_after == 5


def test_an_address_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Client("localhost:8000")
