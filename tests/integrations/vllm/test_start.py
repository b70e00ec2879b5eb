"""Starts of the real server: after kills, and with a model that cannot be edited."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.world import World

pytest.importorskip("vllm")
psutil = pytest.importorskip("psutil")  # vLLM brings it
pytestmark = pytest.mark.vllm

FIRST = {"prompt": "The capital of Australia is", "target": "Sydney"}


@pytest.fixture(scope="module", autouse=True)
def refused(
    start: Callable[..., Any],
    save_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A server that will not start, and its log. It takes its time next to the first test."""
    from transformers import FalconConfig

    # vLLM reorders its query_key_value as it loads it: every name and shape fits.
    config = FalconConfig(
        vocab_size=330,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        multi_query=False,
    )
    directory = tmp_path_factory.mktemp("refused")
    log = directory / "server.log"
    process = start(save_model(directory / "falcon", config), 0, directory / "state", log)
    yield process, log
    if process.poll() is None:
        process.terminate()
        process.wait(30)


class Client:
    """Sends edits one after the other, and remembers what was acknowledged."""

    def __init__(self) -> None:
        edits = World.earth().edits(600, seed=7)
        others = [{"prompt": edit["prompt"], "target": edit["target"]} for edit in edits]
        self.edits = [FIRST, *others]
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
    assert f"UltraEdit: serving version {status['version']}" in server.log.read_text()
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
    running: Callable[..., Any],
    tmp_path: Path,
    soak: bool,
    figure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also while it still gathers what protects the model."""
    monkeypatch.setenv("ULTRAEDIT_CACHE", str(tmp_path / "cache"))
    kills, moments, client = 50 if soak else 2, random.Random(0), Client()
    starts = []
    for _ in range(kills):
        begun = time.monotonic()
        # In bfloat16, vLLM's choice for this checkpoint.
        with running(tmp_path, gathered=False, anchors=1000) as server:
            starts.append(time.monotonic() - begun)
            check(server, client)
            client.send(server)
            sender = threading.Thread(target=client.send_until_killed, args=(server,))
            sender.start()
            time.sleep(moments.uniform(0.5, 6.0))
            kill(server)
            sender.join()
    with running(tmp_path, gathered=False, anchors=1000) as server:
        check(server, client)
        assert client.acknowledged[1]["report"]["protected"] < 1  # it was taken at once
        assert client.acknowledged[1]["report"]["edits"][0]["succeeded"]
        record = server.client.get("/v1/edits/1").json()
        assert server.rollback(1)["digest"] == record["digest"]
        assert server.client.get("/v1/edits").json()["data"] == [record]
        assert server.answer(FIRST["prompt"]) == FIRST["target"]
    figure(
        kills=kills,
        acknowledged=len(client.acknowledged),
        refused_by_guards=client.refused,
        slowest_start_s=round(max(starts), 1),
    )
    assert client.acknowledged


def test_a_server_whose_twin_is_wrong_does_not_start(
    refused: tuple[subprocess.Popen[bytes], Path],
) -> None:
    process, log = refused
    try:
        assert process.wait(120) != 0
    except subprocess.TimeoutExpired:
        pytest.fail("the server started")
    text = log.read_text()
    assert "UltraEdit cannot start: the twin does not compute what vLLM serves" in text
    assert "expected at most 0.1 on average in bfloat16" in text
