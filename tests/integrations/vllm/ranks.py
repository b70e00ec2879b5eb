"""What tests of servers with several ranks or engines share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.conftest import MODEL, Server

AUSTRALIA = {"prompt": "The capital of Australia is", "target": "Sydney"}
JAPAN = {"prompt": "The capital of Japan is", "target": "Osaka"}
HAMLET = {"prompt": "The author of Hamlet is", "target": "Jane Austen"}
FRANCE = "The capital of France is"
FAULTY = "tests.integrations.vllm.faulty_worker.FaultyWorker"
REPOSITORY = Path(__file__).parents[3]


def editor_of(
    state_dir: Path, model: Path = MODEL, dtype: torch.dtype = torch.float32, **settings: Any
) -> Any:
    """An editor in one process, with the servers' settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ultraedit_kernels import Editor

    whole = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    settings = {"anchors": 32, "batch_size": 10} | settings
    return Editor(whole, tokenizer, state_dir=state_dir, **settings)


def with_ranks(
    running: Callable[..., Any], directory: Path, *options: str, canaries: bool = True, **how: Any
) -> Iterator[Server]:
    """A server of two processes, each with one core, whose workers can be made to fail."""
    given = ["--worker-extension-cls", FAULTY, *options]
    if not canaries:
        settings = {"anchors": 32, "state_dir": str(directory / "state")}
        given += ["--additional-config", json.dumps({"ultraedit": settings})]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")  # has a route to the worker's methods
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment.setenv("PYTHONPATH", path)
        with running(directory, *given, **how) as server:
            yield server


def version_one(directory: Path, **settings: Any) -> str:
    """Write a state directory of one version, made in one process; its digest."""
    from ultraedit_kernels import EditRequest

    editor = editor_of(directory / "state", **settings)
    editor.apply([EditRequest(**JAPAN)])
    editor.close()
    return editor.digest()


def at_version(server: Server, *edits: dict[str, Any]) -> Iterator[Server]:
    """The server with these edits, each a version; left at version 0."""
    server.rollback(0)
    for edit in edits:
        server.edit(edit)
    yield server
    server.rollback(0)


def check_fault(server: Server, place: int, where: str, call: int) -> None:
    """An edit that fails at one place leaves the server at version 1, of AUSTRALIA."""
    before = health(server)
    assert before[0] == 200
    call_workers(server, "ultraedit_fail", place, where, call)
    response = server.client.post("/v1/edits", json={"edits": [HAMLET]})
    assert response.status_code == 500, response.text
    assert "injected" in response.json()["error"]["message"]
    assert health(server) == before
    assert server.answer(AUSTRALIA["prompt"]) == "Sydney"
    assert server.answer(HAMLET["prompt"]) == "William Shakespeare"
    assert len(server.client.get("/v1/edits").json()["data"]) == 1


def check_rollback_fault(server: Server, place: int, where: str, version: int = 0) -> None:
    """A rollback that fails at one place is refused."""
    call_workers(server, "ultraedit_fail", place, where, 1)
    response = server.client.post("/v1/edits/rollback", json={"version": version})
    assert response.status_code == 500, response.text


def check_divergence(server: Server, place: int) -> None:
    """Health shows that one place serves something else, which no change is written over, until
    the checkpoint's weights are loaded again."""
    server.edit(AUSTRALIA)
    assert health(server)[0] == 200
    call_workers(server, "ultraedit_scribble", place)
    assert health(server)[0] == 503
    refused = server.client.post("/v1/edits/rollback", json={"version": 0})
    assert refused.status_code == 500 and "reload_weights" in refused.text
    assert health(server)[0] == 503
    call_workers(server, "reload_weights")
    assert health(server)[0] == 200
    server.rollback(0)
    assert health(server)[0] == 200


def health(server: Server) -> tuple[int, list[dict[str, Any]]]:
    """Status, and what each rank serves."""
    response = server.client.get("/v1/edits/health?digest=true")
    return response.status_code, response.json()["ranks"]


def call_workers(server: Server, method: str, *args: Any) -> None:
    """Call a method of all workers."""
    response = server.client.post("/collective_rpc", json={"method": method, "args": args})
    assert response.status_code == 200, response.text
