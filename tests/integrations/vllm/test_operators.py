"""What an operator relies on: keys, limits, audit lines, metrics, health."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.integrations.vllm.test_endpoint import CAPITAL, QUESTION, error_of
from ultraedit_kernels import __version__

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

EDIT_KEYS = ["first-edit-key", "second-edit-key"]
ROUTES = [
    ("POST", "/v1/edits"),
    ("GET", "/v1/edits"),
    ("GET", "/v1/edits/1"),
    ("GET", "/v1/edits/1/delta"),
    ("GET", "/v1/edits/health"),
    ("POST", "/v1/edits/apply"),
    ("POST", "/v1/edits/rollback"),
]


@pytest.fixture(scope="module")
def guarded(running: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with edit keys and tight limits. Its client sends the API key, no edit key."""
    directory = tmp_path_factory.mktemp("guarded")
    settings = {"anchors": 0, "state_dir": str(directory / "state"), "audit_prompts": False}
    settings |= {
        "max_body_mib": 1,
        "max_delta_mib": 1,
        "max_edits": 2,
        "max_prompts": 3,
        "max_queue": 1,
    }
    options = ["--dtype", "float32", "--additional-config", json.dumps({"ultraedit": settings})]
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ULTRAEDIT_API_KEY", ", ".join(EDIT_KEYS))
            server = stack.enter_context(running(directory, *options))
        yield server


@pytest.fixture
def admin(guarded: Any) -> Iterator[httpx.Client]:
    """A client with an edit key; the server is left at version 0."""
    headers = {"Authorization": f"Bearer {EDIT_KEYS[0]}"}
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=60) as client:
        yield client
        assert client.post("/v1/edits/rollback", json={"version": 0}).status_code == 200


def samples(client: httpx.Client) -> dict[str, float]:
    """The metrics of ours, by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    ours = (line.rpartition(" ") for line in lines if line.startswith("ultraedit_"))
    return {name: float(value) for name, _, value in ours}


def audit(server: Any) -> list[dict[str, Any]]:
    lines = (server.state_dir / "audit.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


# Keys


@pytest.mark.parametrize("key", EDIT_KEYS)
def test_an_edit_key_edits(guarded: Any, admin: httpx.Client, key: str) -> None:
    headers = {"Authorization": f"bearer {key}"}
    report = admin.post("/v1/edits", json={"edits": [CAPITAL]}, headers=headers)
    assert report.status_code == 200
    assert guarded.answer(CAPITAL["prompt"]) == "Sydney"


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Bearer schlüssel", 401),
        (f"Basic {EDIT_KEYS[0]}", 401),
        (EDIT_KEYS[0], 401),
        (f"Bearer {', '.join(EDIT_KEYS)}", 401),
        ("Bearer secret", 403),  # the server's API key
    ],
)
def test_only_an_edit_key_edits(
    guarded: Any, method: str, path: str, authorization: str | None, status: int
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    response = httpx.request(method, guarded.url + path, json={"edits": [CAPITAL]}, headers=headers)
    error = error_of(response, status)
    assert "edit key" in error["message"]
    assert ("WWW-Authenticate" in response.headers) == (status == 401)
    assert guarded.answer(CAPITAL["prompt"]) == "Canberra"


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/models", "/v1/editsx", "//v1/edits", "/v1/edits/../models"]
)
def test_an_edit_key_does_nothing_else(guarded: Any, path: str) -> None:
    host, port = guarded.url.removeprefix("http://").split(":")
    request = f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {EDIT_KEYS[0]}\r\n"
    with socket.create_connection((host, int(port)), 30) as raw:  # httpx would clean the path
        raw.sendall(f"{request}Connection: close\r\n\r\n".encode())
        status = raw.recv(100).split()[1]
    assert status in (b"401", b"404")


def test_without_edit_keys_the_api_key_edits_and_nothing_else(server: Any) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        response = httpx.get(f"{server.url}/v1/edits", headers=headers)
        assert "the server's API key" in error_of(response, 401)["message"]
    assert server.client.get("/v1/edits").status_code == 200


def test_the_plugin_itself_refuses_to_start_without_a_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However vLLM was started; the engine is not asked for anything by then."""
    from starlette.datastructures import State

    from ultraedit_kernels.integrations.vllm.endpoint import UltraEditEndpoint

    for name in ("VLLM_API_KEY", "ULTRAEDIT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    engine: Any = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={}))
    start = UltraEditEndpoint().init_state(engine, State(), Namespace(api_key=None))
    with pytest.raises(ValueError, match="has no key"):
        asyncio.run(start)


# Limits


def test_a_turn_beyond_the_limits_is_refused(guarded: Any, admin: httpx.Client) -> None:
    three = [{"prompt": f"{n} is", "target": "A"} for n in range(3)]
    error = error_of(admin.post("/v1/edits", json={"edits": three}), 400)
    assert error["param"] == "edits" and "at most 2" in error["message"]
    asked = {"rephrases": ["a"], "locality": ["b", "c"]}
    error = error_of(admin.post("/v1/edits", json={"edits": [CAPITAL, CAPITAL | asked]}), 400)
    assert error["param"] == "edits[1]" and "4 prompts" in error["message"]


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("path", ["/v1/edits", "/v1/edits/apply", "/v1/edits/rollback"])
def test_a_body_beyond_the_limit_is_refused(
    guarded: Any, admin: httpx.Client, path: str, chunked: bool
) -> None:
    body = b" " * (2**20 + 1)
    content = iter([body[:1000], body[1000:]]) if chunked else body
    response = admin.post(path, content=content, headers={"Content-Type": "application/json"})
    assert "1 MiB" in error_of(response, 413)["message"]
    exact = admin.post(path, content=body[:-1], headers={"Content-Type": "application/json"})
    assert exact.status_code == 400


def test_a_full_queue_says_when_to_come_back(guarded: Any, admin: httpx.Client) -> None:
    def send(target: str) -> httpx.Response:
        return admin.post("/v1/edits", json={"edits": [CAPITAL | {"target": target}]})

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(send, ["Sydney", "Perth", "Darwin", "Hobart"]))
    full = [response for response in responses if response.status_code != 200]
    assert 0 < len(full) < 4
    for response in full:
        assert error_of(response, 429)["type"] == "RateLimitError"
        assert int(response.headers["Retry-After"]) > 0


# Audit lines


def test_every_change_has_an_audit_line(server: Any) -> None:
    begin = len(audit(server))
    key = hashlib.sha256(b"secret").hexdigest()[:8]
    body = {"edits": [CAPITAL], "idempotency_key": "once"}
    for name in ("abc-1", "abc-2"):  # the second changes nothing: no line
        server.client.post("/v1/edits", json=body, headers={"X-Request-Id": name})
    record = server.client.get("/v1/edits/1").json()
    delta = server.client.get("/v1/edits/1/delta").content
    back = server.rollback(0)
    applied = server.client.post("/v1/edits/apply", content=delta).json()
    too_far = server.client.post("/v1/edits/rollback", json={"version": 7})
    server.edit(CAPITAL, dry_run=True)  # changes nothing: no line
    server.client.post("/v1/edits", json={"edits": []})  # not well-formed: no line

    edit, rollback, apply, refused = audit(server)[begin:]
    for line in (edit, rollback, apply, refused):
        assert line["key"] == key
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    assert edit | {"time": "", "key": ""} == {
        "time": "",
        "key": "",
        "event": "committed",
        "kind": "edit",
        "request_id": "abc-1",
        "version": 1,
        "digest": record["digest"],
        "dry_run": False,
        "edits": 1,
        "succeeded": 1,
        "asked": [CAPITAL],
    }
    assert (rollback["kind"], rollback["to"], rollback["digest"]) == ("rollback", 0, back["digest"])
    assert (apply["kind"], apply["version"]) == ("apply", 1)
    assert apply["digest"] == applied["digest"] == record["digest"]
    assert apply["delta_sha256"] == hashlib.sha256(delta).hexdigest()
    assert (refused["event"], refused["status"], refused["to"]) == ("refused", 400, 7)
    assert refused["error"] == too_far.json()["error"]["message"]
    assert refused["request_id"] == too_far.headers["X-Request-Id"]
    assert json.dumps(edit) in server.log.read_text()


def test_audit_lines_can_leave_the_prompts_out(guarded: Any, admin: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {EDIT_KEYS[1]}"}
    admin.post("/v1/edits", json={"edits": [CAPITAL]}, headers=headers)
    line = audit(guarded)[-1]
    assert (line["edits"], line["key"]) == (
        1,
        hashlib.sha256(EDIT_KEYS[1].encode()).hexdigest()[:8],
    )
    assert "asked" not in line and "Australia" not in json.dumps(line)


def test_an_audit_file_can_be_renamed_and_be_lost(guarded: Any, admin: httpx.Client) -> None:
    file = guarded.state_dir / "audit.jsonl"
    admin.post("/v1/edits/rollback", json={"version": 0})
    file.rename(file.with_name("audit.1"))
    admin.post("/v1/edits/rollback", json={"version": 0})
    assert len(audit(guarded)) == 1
    file.unlink()
    file.mkdir()  # cannot be written: the change itself stands, and the log says so
    assert admin.post("/v1/edits/rollback", json={"version": 0}).status_code == 200
    file.rmdir()
    assert "audit.jsonl was not written" in guarded.log.read_text()


# Metrics


def test_a_guard_s_rejection_is_422(server: Any) -> None:
    forbidden = {"prompt": "The capital of Norway is", "target": "Bergen"}  # breaks a canary
    before = samples(server.client).get('ultraedit_failures_total{reason="rejected"}', 0)
    error = error_of(server.client.post("/v1/edits", json={"edits": [forbidden]}), 422)
    assert "rejected" in error["message"]
    assert samples(server.client)['ultraedit_failures_total{reason="rejected"}'] == before + 1
    assert server.client.get("/v1/edits").json()["data"] == []


def test_metrics_count_what_happens(server: Any) -> None:
    before = samples(server.client)
    for _ in range(2):
        server.edit(CAPITAL, idempotency_key="counted")
    version = samples(server.client)["ultraedit_version"]
    server.edit({**CAPITAL, "target": "Perth"}, dry_run=True)
    server.client.post("/v1/edits/rollback", json={"version": 7})
    server.client.post("/v1/edits", content=b"{")
    httpx.get(f"{server.url}/v1/edits")
    server.rollback(0)
    after = samples(server.client)
    assert (version, after["ultraedit_version"], after["ultraedit_queue_length"]) == (1, 0, 0)
    grown = {
        'ultraedit_changes_total{kind="edit",outcome="committed"}': 1,
        'ultraedit_changes_total{kind="edit",outcome="dry_run"}': 1,
        'ultraedit_changes_total{kind="edit",outcome="repeated"}': 1,
        'ultraedit_changes_total{kind="rollback",outcome="refused"}': 1,
        'ultraedit_changes_total{kind="rollback",outcome="committed"}': 1,
        'ultraedit_edits_total{outcome="succeeded"}': 1,
        'ultraedit_failures_total{reason="invalid"}': 2,
        'ultraedit_failures_total{reason="unauthorized"}': 1,
        'ultraedit_duration_seconds_count{phase="total"}': 3,
        'ultraedit_duration_seconds_count{phase="capture"}': 2,
        "ultraedit_pause_seconds_count": 3,
    }
    assert {name: after[name] - before.get(name, 0) for name in grown} == grown
    assert after["ultraedit_pause_seconds_sum"] > before.get("ultraedit_pause_seconds_sum", 0)


def test_metrics_of_several_api_servers_are_one(tmp_path: Path) -> None:
    def run(code: str) -> str:
        head = "from ultraedit_kernels.integrations.vllm import metrics\n"
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        command = [sys.executable, "-c", head + code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout

    for version in (1, 2):
        timings = {"queue_ms": 1.0, "commit_ms": 1.0, "pause_ms": 4.0, "total_ms": 2.0}
        answer = {"version": version, "timings": timings}
        run(f"metrics.changed('apply', 'committed', {answer})\nmetrics.failed('internal')")
    text = run(
        "from prometheus_client import CollectorRegistry, generate_latest, multiprocess\n"
        "registry = CollectorRegistry()\n"
        "multiprocess.MultiProcessCollector(registry)\n"
        "print(generate_latest(registry).decode())"
    )
    lines = text.splitlines()
    assert "ultraedit_version 2.0" in lines  # the last that was set
    assert 'ultraedit_changes_total{kind="apply",outcome="committed"} 2.0' in lines
    assert 'ultraedit_failures_total{reason="internal"} 2.0' in lines
    assert 'ultraedit_pause_seconds_bucket{le="0.005"} 2.0' in lines


def test_the_dashboard_shows_metrics_that_exist(server: Any) -> None:
    server.edit({**CAPITAL, "locality": ["The capital of France is"]})
    server.client.post("/v1/edits", content=b"{")
    existing = {name.partition("{")[0] for name in samples(server.client)}
    dashboard = json.loads((Path(__file__).parents[3] / "docs" / "grafana.json").read_text())
    shown = set()
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            shown |= set(re.findall(r"\bultraedit_\w+", target["expr"]))
    assert shown <= existing
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in existing}
    seen = {re.sub(r"_(bucket|sum|count)$", "", name) for name in shown}
    assert seen == {name for name in families if f"{name}_total" not in families}


# Health and methods


def test_health_shows_every_rank(server: Any) -> None:
    untouched = server.client.get("/v1/edits/health").json()["digest"]
    server.edit(CAPITAL)
    quick = server.client.get("/v1/edits/health").json()
    assert quick == {
        "status": "ok",
        "version": 1,
        "digest": server.client.get("/v1/edits/1").json()["digest"],
        "base": untouched,
        "follows": None,
        "library_version": __version__,
        "turn": False,
        "queue": [],
        "traffic_keys": 0,
        "gathered": 1.0,
        "ranks": [{"engine": 0, "rank": 0, "version": 1, "digest": None}],
    }
    whole = server.client.get("/v1/edits/health", params={"digest": True}).json()
    (rank,) = whole["ranks"]
    assert whole["status"] == "ok"
    assert rank["digest"] == server.client.get("/v1/edits/1").json()["digest"]
    assert "digest" in error_of(server.client.get("/v1/edits/health?digest=x"), 400)["message"]


def test_health_lists_what_is_under_way_and_what_waits(server: Any) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(server.edit, CAPITAL, QUESTION, dry_run=True) for _ in range(8)]
        seen = []
        while not all(run.done() for run in runs):
            seen.append(server.client.get("/v1/edits/health").json())
    full = max(seen, key=lambda health: len(health["queue"]))
    assert full["turn"] and len(full["queue"]) > 1
    for change in full["queue"]:
        assert change.pop("seconds") > 0
        assert change == {"kind": "edit", "edits": 2, "dry_run": True}
    assert server.client.get("/v1/edits/health").json()["queue"] == []


@pytest.mark.parametrize(
    ("versions", "digests", "recorded", "status"),
    [
        ([2, 2], ["a", "a"], "a", "ok"),
        ([2, 2], ["a", "a"], None, "ok"),
        ([2, 2], [None, None], None, "ok"),
        ([2, 1], [None, None], None, "diverged"),
        ([2, 2], ["a", "b"], "a", "diverged"),
        ([2, 2], ["a", "a"], "b", "diverged"),
    ],
)
def test_health_shows_a_rank_that_has_diverged(
    versions: list[int], digests: list[str | None], recorded: str | None, status: str
) -> None:
    from ultraedit_kernels.integrations.vllm.protocol import Health

    rest = {"turn": False, "traffic_keys": 0, "gathered": 0.5}
    ranks = [
        {"engine": 0, "rank": i, "version": v, "digest": d, **rest}
        for i, (v, d) in enumerate(zip(versions, digests, strict=True))
    ]
    health = Health.of(ranks, recorded)
    assert health.status == status and health.gathered == 0.5


@pytest.mark.parametrize("balancer", ["external", "hybrid"])
def test_a_server_behind_a_balancer_computes_no_edits(balancer: str) -> None:
    from types import SimpleNamespace

    from ultraedit_kernels.integrations.vllm.service import why_no_edits

    def parallel(**given: Any) -> Any:
        alone = {f"data_parallel_{name}_lb": False for name in ("external", "hybrid")}
        return SimpleNamespace(**{"pipeline_parallel_size": 1} | alone | given)

    assert why_no_edits(parallel()) == ""
    reason = why_no_edits(parallel(**{f"data_parallel_{balancer}_lb": True}))
    assert "an external load balancer" in reason


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/edits/apply", "POST"),
        ("GET", "/v1/edits/rollback", "POST"),
        ("DELETE", "/v1/edits/apply", "POST"),
        ("PUT", "/v1/edits", "GET, POST"),
        ("HEAD", "/v1/edits", "GET, POST"),
        ("TRACE", "/v1/edits", "GET, POST"),
        ("POST", "/v1/edits/1", "GET"),
        ("DELETE", "/v1/edits/1", "GET"),
        ("POST", "/v1/edits/1/delta", "GET"),
        ("POST", "/v1/edits/health", "GET"),
        ("OPTIONS", "/v1/edits", "GET, POST"),
    ],
)
def test_wrong_methods_name_the_right_ones(
    server: Any, method: str, path: str, allowed: str
) -> None:
    response = server.client.request(method, path)
    assert response.status_code == 405 and response.headers["Allow"] == allowed
    if method != "HEAD":
        assert method in error_of(response, 405)["message"]
