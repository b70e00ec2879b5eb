"""What a server has acknowledged outlives it, however it ends; and what it refuses to serve."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.world import World
from ultraedit_kernels.store import files
from ultraedit_kernels.store.journal import Journal

psutil = pytest.importorskip("psutil")  # vLLM brings it
pytestmark = pytest.mark.vllm

FORBIDDEN = {"prompt": "The capital of Norway is", "target": "Bergen"}
"""Breaks the server's canary."""


class Client:
    """Sends edits one after the other, and remembers what was acknowledged."""

    def __init__(self) -> None:
        edits = World.earth().edits(600, seed=7)
        self.edits = [{"prompt": edit["prompt"], "target": edit["target"]} for edit in edits]
        self.sent = 0
        """Edits that were acknowledged, refused, or are under way."""
        self.acknowledged: dict[int, dict[str, Any]] = {}
        """By version: the edit, and the server's report of it."""
        self.refused = 0

    def send(self, server: Any) -> None:
        """One edit. Raises httpx.TransportError if the server is gone."""
        edit = self.edits[self.sent % len(self.edits)]
        body = {"edits": [edit], "idempotency_key": f"edit {self.sent}"}
        response = server.client.post("/v1/edits", json=body)
        assert response.status_code in (200, 422), response.text
        if response.status_code == 200:
            report = response.json()
            assert report["version"] not in self.acknowledged
            self.acknowledged[report["version"]] = {**edit, "report": report}
        else:
            self.refused += 1
        self.sent += 1

    def send_until_killed(self, server: Any) -> None:
        try:
            while True:
                self.send(server)
        except httpx.TransportError:
            pass


def kill(server: Any) -> None:
    """All processes of the server at once, without a word."""
    parent = psutil.Process(server.process.pid)
    processes = [parent, *parent.children(recursive=True)]
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=30)


def check(server: Any, client: Client) -> None:
    """The server serves all that was acknowledged, and at most the one edit that was under way."""
    newest = max(client.acknowledged, default=0)
    status = server.client.get("/v1/edits/health", params={"digest": True}).json()
    assert status["version"] in (newest, newest + 1)
    for version, edit in client.acknowledged.items():
        record = server.client.get(f"/v1/edits/{version}").json()
        assert [(e["prompt"], e["target"]) for e in record["edits"]] == [
            (edit["prompt"], edit["target"])
        ]
    if status["version"]:
        record = server.client.get(f"/v1/edits/{status['version']}").json()
        assert all(rank["digest"] == record["digest"] for rank in status["ranks"])
    if status["version"] == newest + 1:  # whole, though nobody was told; it is not done again
        client.send(server)
        assert max(client.acknowledged) == newest + 1
    if client.acknowledged:
        last = client.acknowledged[max(client.acknowledged)]
        if last["report"]["edits"][0]["succeeded"]:
            assert server.answer(last["prompt"]) == last["target"]


@pytest.mark.soak
def test_kill_9_at_random_moments(
    running: Callable[..., Any], tmp_path: Path, soak: bool, figure: Callable[..., None]
) -> None:
    kills, moments, client = 50 if soak else 2, random.Random(0), Client()
    starts = []
    for _ in range(kills):
        begun = time.monotonic()
        with running(tmp_path, "--dtype", "float32") as server:
            starts.append(time.monotonic() - begun)
            check(server, client)
            sender = threading.Thread(target=client.send_until_killed, args=(server,))
            sender.start()
            time.sleep(moments.uniform(0.5, 6.0))
            kill(server)
            sender.join()
    with running(tmp_path, "--dtype", "float32") as server:
        check(server, client)
    figure(
        kills=kills,
        acknowledged=len(client.acknowledged),
        refused_by_guards=client.refused,
        slowest_start_s=round(max(starts), 1),
    )
    assert client.acknowledged


def test_a_second_server_on_the_directory_is_refused(
    live_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.2)
    with pytest.raises(ValueError, match=r"is in use by process \d+ on ") as refused:
        Journal(live_server.state_dir)
    holder = int(str(refused.value).partition("process ")[2].split()[0])
    children = psutil.Process(live_server.process.pid).children(recursive=True)
    assert holder in {process.pid for process in children}


def test_a_turn_that_breaks_a_canary_is_refused(server: Any) -> None:
    digest = server.rollback(0)["digest"]
    response = server.client.post("/v1/edits", json={"edits": [FORBIDDEN]})
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["type"] == "UnprocessableEntityError" and error["code"] == 422
    assert error["message"].startswith("the turn was rejected, nothing is changed: ")

    report = server.edit(FORBIDDEN, dry_run=True)
    assert report["edits"][0]["after"] == "Bergen"
    assert report["rejected"] == error["message"].partition("changed: ")[2]
    assert server.rollback(0)["digest"] == digest
    assert server.edit({"prompt": "The capital of Peru is", "target": "Lima"})["rejected"] is None
