"""The real server in two pipeline stages: it computes no edits, and takes deltas, on all stages or
none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
from tests.integrations.conftest import Server
from tests.integrations.vllm.ranks import (
    AUSTRALIA,
    FRANCE,
    HAMLET,
    JAPAN,
    at_version,
    call_workers,
    editor_of,
    health,
    version_one,
    with_ranks,
)
from ultraedit_kernels import EditRequest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A state directory of one version, and other changes: delta files, digests after each."""
    directory = tmp_path_factory.mktemp("two-stages")
    first = version_one(directory, anchors=0)
    found: dict[str, Any] = {"directory": directory, "first": first, "deltas": []}
    elsewhere = editor_of(directory / "elsewhere")
    found["digests"] = [elsewhere.digest()]
    for edit in (AUSTRALIA, HAMLET):
        found["deltas"].append(elsewhere.apply([EditRequest(**edit)]).delta.to_bytes())
        found["digests"].append(elsewhere.digest())
    return found


@pytest.fixture(scope="module")
def divided(running: Callable[..., Any], made: dict[str, Any]) -> Iterator[Server]:
    options = ["--pipeline-parallel-size", "2", "--dtype", "float32"]
    for server in with_ranks(running, made["directory"], *options, canaries=False):
        call_workers(server, "ultraedit_warm_up")
        made["at start"] = health(server), server.answer(JAPAN["prompt"])
        yield server


@pytest.fixture
def server(divided: Server) -> Iterator[Server]:
    """The server at version 0, where it is left."""
    yield from at_version(divided)


def apply(server: Server, delta: bytes, status: int = 200) -> dict[str, Any]:
    response = server.client.post("/v1/edits/apply", content=delta)
    assert response.status_code == status, response.text
    return response.json()


def digests(server: Server) -> set[str]:
    status, ranks = health(server)
    assert status == 200
    assert [rank["rank"] for rank in ranks] == [0, 1]
    return {rank["digest"] for rank in ranks}


def test_the_stages_start_with_the_journals_version(divided: Server, made: dict[str, Any]) -> None:
    (status, ranks), answer = made["at start"]
    assert status == 200
    assert [(rank["version"], rank["digest"]) for rank in ranks] == [(1, made["first"])] * 2
    assert answer == JAPAN["target"]


def test_no_edit_is_computed_and_the_reason_given(server: Server) -> None:
    for options in ({}, {"dry_run": True}):
        response = server.client.post("/v1/edits", json={"edits": [AUSTRALIA], **options})
        assert response.status_code == 501
        error = response.json()["error"]
        assert "pipeline stages" in error["message"]
        assert "/v1/edits/apply" in error["message"]


def test_deltas_of_another_process_are_served_and_rolled_back(
    server: Server, made: dict[str, Any]
) -> None:
    assert digests(server) == {made["digests"][0]}
    for number, delta in enumerate(made["deltas"], start=1):
        tried = server.client.post("/v1/edits/apply", params={"dry_run": True}, content=delta)
        assert tried.json()["digest"] == made["digests"][number]
        assert digests(server) == {made["digests"][number - 1]}
        answer = apply(server, delta)
        assert answer["version"] == number
        assert digests(server) == {made["digests"][number]}
    assert server.answer(AUSTRALIA["prompt"]) == "Sydney"
    assert server.answer(HAMLET["prompt"]) == "Jane Austen"
    assert server.answer(FRANCE) == "Paris"
    server.rollback(1)
    assert digests(server) == {made["digests"][1]}
    assert server.answer(AUSTRALIA["prompt"]) == "Sydney"
    assert server.answer(HAMLET["prompt"]) == "William Shakespeare"


def test_a_cached_prompt_and_running_streams_see_the_change(
    server: Server, made: dict[str, Any]
) -> None:
    prompt = f"{FRANCE} Paris. " * 12 + AUSTRALIA["prompt"]
    for _ in range(2):
        server.complete(prompt, max_tokens=4)
    apply(server, made["deltas"][0])
    fresh = server.complete(prompt, max_tokens=4, cache_salt="another")
    assert server.complete(prompt, max_tokens=4)["text"] == fresh["text"]


def test_what_the_stages_wrote_is_continued_by_one_process(
    server: Server, made: dict[str, Any], tmp_path: Path
) -> None:
    apply(server, made["deltas"][0])
    editor = editor_of(shutil.copytree(server.state_dir, tmp_path / "state"))
    assert (editor.version, editor.digest()) == (1, made["digests"][1])
    assert editor.apply([EditRequest(**HAMLET)]).version == 2
    editor.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where",
    [
        "ultraedit_kernels.store.delta:EditDelta.from_bytes",
        "ultraedit_kernels.store.delta:LowRank.apply",
        "ultraedit_kernels.method.guards:check_change",
        "ultraedit_kernels.method.versions:Versions.digest",
        "ultraedit_kernels.method.memory:TurnMemory.encode",
        "ultraedit_kernels.integrations.vllm.twin:Twin.publish",
        "ultraedit_kernels.integrations.vllm.twin:Twin.publish+",
    ],
)
def test_a_fault_on_one_stage_leaves_both_at_the_old_version(
    server: Server, made: dict[str, Any], where: str, rank: int
) -> None:
    apply(server, made["deltas"][0])
    before = health(server)
    call_workers(server, "ultraedit_fail", rank, where, 1)
    assert "injected" in apply(server, made["deltas"][1], 500)["error"]["message"]
    assert health(server) == before
    assert server.answer(HAMLET["prompt"]) == "William Shakespeare"
    apply(server, made["deltas"][1])
    assert server.answer(HAMLET["prompt"]) == "Jane Austen"
