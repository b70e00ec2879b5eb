"""Requests that nobody means, against the real server: none is answered with 5xx, and after all of
them the model is as it was. `make soak` sends 10,000.

Half come from the routes' own description, valid and invalid, half are those with something broken:
bytes, JSON, headers, method, path. What would change the model is sent as a dry run.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import httpx
import pytest
import safetensors.torch
import schemathesis
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from schemathesis import GenerationMode

pytest.importorskip("vllm")
pytestmark = [pytest.mark.vllm, pytest.mark.soak]

CAPITAL = {"prompt": "The capital of Australia is", "target": "Sydney"}
HUGE = (b"1" * 5000, b"1e400", b"-1e-400", b"9007199254740993", b"2147483648", b"NaN", b"Infinity")
TEXTS = ("\0", "\ufeff", "\u202e", "é" * 300, "🦊" * 50, "</s>", "{{ 7 * 7 }}", "%s%n", "\\ud800")
TYPES = (
    "",
    "application/json; charset=utf-16",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "text/plain",
    "application/vnd.api+json",
    "a",
    "/",
)
HEADERS = (
    ("Accept", "text/html"),
    ("Accept-Encoding", "br;q=x"),
    ("Authorization", "Bearer wrong"),
    ("Authorization", "Basic c2VjcmV0"),
    ("Content-Encoding", "gzip"),
    ("Cookie", "a=b; =; ;;"),
    ("Expect", "100-continue"),
    ("Host", "elsewhere"),
    ("Origin", "https://elsewhere"),
    ("X-Forwarded-For", "1, 2, 3"),
    ("X-Request-Id", "é"),
    ("X-Request-Id", "a" * 5000),
)
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "BREW")
PATHS = ("/", "/0", "/-0", "/00", "/1e3", "/٣", "/%00", "/apply/", "/rollback?version=0", "/../..")


@dataclass(frozen=True)
class Call:
    """One request as it is sent."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    content: bytes


@st.composite
def broken(draw: Callable[..., Any], calls: st.SearchStrategy[Call]) -> Call:
    """A call with one to three things broken."""
    call = draw(calls)
    for _ in range(draw(st.integers(1, 3))):
        call = draw(st.sampled_from(BREAKS))(draw, call)
    return call


def _cut(draw: Any, call: Call) -> Call:
    return replace(call, content=call.content[: draw(st.integers(0, len(call.content)))])


def _splice(draw: Any, call: Call) -> Call:
    at = draw(st.integers(0, len(call.content)))
    end = draw(st.integers(at, min(len(call.content), at + 8)))
    part = draw(st.binary(max_size=8) | st.sampled_from(HUGE))
    return replace(call, content=call.content[:at] + part + call.content[end:])


def _text(draw: Any, call: Call) -> Call:
    edit = {"prompt": draw(st.sampled_from(TEXTS)), "target": draw(st.sampled_from(TEXTS))}
    field = draw(st.sampled_from(["prompt", "target", "rephrases", "locality", "idempotency_key"]))
    value = draw(
        st.sampled_from([*TEXTS, None, [], {}, 0, [[[[]]]], [{"role": "x", "content": "y"}]])
    )
    edit[field] = value
    return replace(call, content=json.dumps({"edits": [edit] * draw(st.integers(1, 3))}).encode())


def _nest(draw: Any, call: Call) -> Call:
    depth = draw(st.sampled_from([10, 1_000, 100_000]))
    opening = draw(st.sampled_from([b"[", b'{"edits":', b'{"a":[']))
    return replace(call, content=opening * depth + call.content)


def _large(draw: Any, call: Call) -> Call:
    part = draw(st.sampled_from([b" ", b"a", b'"', b"\xff"]))
    return replace(call, content=call.content + part * draw(st.sampled_from([2**16, 2**20])))


def _type(draw: Any, call: Call) -> Call:
    others = tuple(h for h in call.headers if h[0].lower() != "content-type")
    return replace(call, headers=(*others, ("Content-Type", draw(st.sampled_from(TYPES)))))


def _header(draw: Any, call: Call) -> Call:
    return replace(call, headers=(*call.headers, draw(st.sampled_from(HEADERS))))


def _method(draw: Any, call: Call) -> Call:
    return replace(call, method=draw(st.sampled_from(METHODS)))


def _path(draw: Any, call: Call) -> Call:
    return replace(call, url=f"/v1/edits{draw(st.sampled_from(PATHS))}")


BREAKS = [_cut, _splice, _text, _nest, _large, _type, _header, _method, _path]


def described(description: dict[str, Any]) -> st.SearchStrategy[Call]:
    """Calls of every route as it is described, valid and invalid in about equal parts."""
    schema = schemathesis.openapi.from_dict(description).include(path_regex="^/v1/edits")
    operations = [result.ok() for result in schema.get_all_operations()]
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = [o.as_strategy(generation_mode=mode) for o in operations for mode in modes]
    return st.one_of(cases).map(_call)


def _call(case: Any) -> Call:
    import requests

    options = case.as_transport_kwargs(base_url="http://server")
    names = ("method", "url", "headers", "params", "json", "data", "cookies", "files")
    sent = requests.Request(**{k: v for k, v in options.items() if k in names}).prepare()
    content = sent.body or b""
    headers = [(k, v) for k, v in sent.headers.items() if k.lower() != "content-length"]
    return Call(
        sent.method,
        sent.url.removeprefix("http://server"),
        tuple((k, v.decode("latin-1") if isinstance(v, bytes) else v) for k, v in headers),
        content.encode() if isinstance(content, str) else content,
    )


def tamed(call: Call) -> Call:
    """The call itself, or as a dry run if it would commit edits."""
    from ultraedit_kernels.integrations.vllm.protocol import EditsBody

    try:
        body = json.loads(call.content)
        if EditsBody.model_validate(body).dry_run:
            return call
    except (ValueError, RecursionError, ValidationError):
        return call
    return replace(call, content=json.dumps(body | {"dry_run": True}).encode())


def deltas(good: bytes) -> st.SearchStrategy[Call]:
    """A delta of another model, with what else may be wrong with its header or numbers."""
    size = int.from_bytes(good[:8], "little")
    header = json.loads(good[8 : 8 + size])
    metadata = header["__metadata__"]
    foreign = {"base": json.dumps(dict.fromkeys(json.loads(metadata["base"]), "0" * 64))}

    def build(changes: dict[str, str], at: int, part: bytes) -> Call:
        text = json.dumps(header | {"__metadata__": metadata | changes | foreign}).encode()
        content = bytearray(len(text).to_bytes(8, "little") + text + good[8 + size :])
        content[at : at + len(part)] = part
        content_type = (("Content-Type", "application/octet-stream"),)
        return Call("POST", "/v1/edits/apply", content_type, bytes(content))

    values = st.text(max_size=20) | st.sampled_from(["{}", "[]", "null", "1", '{"a": 1}'])
    changes = st.dictionaries(st.sampled_from([*metadata, "more"]), values, max_size=3)
    inside = st.integers(8 + size + 200, len(good) - 8)  # of the numbers
    return st.builds(build, changes, inside, st.binary(max_size=8))


def test_no_request_is_answered_with_5xx_or_changes_the_model(
    server: Any, soak: bool, figure: Callable[..., None]
) -> None:
    server.edit(CAPITAL)
    delta = server.client.get("/v1/edits/1/delta").content
    assert safetensors.torch.load(delta)
    digest = server.rollback(0)["digest"]
    calls = described(server.client.get("/openapi.json").json())
    wanted = 10_000 if soak else 200
    statuses: Counter[int] = Counter()
    begun = time.monotonic()

    @settings(
        max_examples=wanted,
        database=None,
        deadline=None,
        derandomize=not soak,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls | broken(calls) | broken(deltas(delta)) | deltas(delta))
    def send(call: Call) -> None:
        call = tamed(call)
        sent = [(k, v.encode("latin-1", "replace")) for k, v in call.headers]
        try:
            response = client.request(call.method, call.url, headers=sent, content=call.content)
        except (httpx.LocalProtocolError, httpx.InvalidURL):
            reject()  # the client does not send it
        assert response.status_code < 500, response.text
        statuses[response.status_code] += 1

    headers = {"Authorization": server.client.headers["Authorization"]}
    with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
        while statuses.total() < wanted:
            send()
    figure(
        requests=statuses.total(),
        seconds=round(time.monotonic() - begun),
        statuses=dict(sorted(statuses.items())),
    )
    assert server.client.get("/v1/edits").json()["data"] == []
    assert server.client.get("/v1/edits/health", params={"digest": True}).json()["ranks"] == [
        {"engine": 0, "rank": 0, "version": 0, "digest": digest}
    ]
    assert server.answer(CAPITAL["prompt"]) == "Canberra"
    assert server.edit(CAPITAL)["edits"][0]["succeeded"]
