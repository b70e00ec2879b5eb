"""A change to three real servers, of which one is killed between the phases. Every other place to
die: tests/fleet."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")

from tests.integrations.conftest import API_KEY, MODEL
from tests.integrations.vllm.test_start import kill
from ultraedit_kernels import Client, cli
from ultraedit_kernels.fleet.push import Fleet, PushError

pytestmark = pytest.mark.vllm

CAPITAL = {"prompt": "The capital of Australia is", "target": "Sydney"}


@dataclass
class Real:
    """A server on a port of its own, which can be started again."""

    start_process: Callable[..., subprocess.Popen[bytes]]
    folder: Path
    port: int
    settings: dict[str, Any] = field(default_factory=dict)
    process: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        return Client(self.url, API_KEY)

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        state, log = self.folder / "state", self.folder / "server.log"
        given = {"--dtype": "float32"}
        if self.settings:
            own = {"anchors": 0, "state_dir": str(state)} | self.settings
            given["--additional-config"] = json.dumps({"ultraedit": own})
        how = [word for option in given.items() for word in option]
        self.process = self.start_process(MODEL, self.port, state, log, *how, anchors=0)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        return httpx.get(f"{self.url}{path}", headers=headers, timeout=60).text

    def answer(self, prompt: str) -> str:
        body = {"model": MODEL.name, "prompt": prompt, "temperature": 0}
        headers = {"Authorization": f"Bearer {API_KEY}"}
        response = httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=60)
        text: str = response.json()["choices"][0]["text"]
        return text.strip()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, ascending."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = sorted(one.getsockname()[1] for one in sockets)
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def three(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """By their URLs, as a push goes through them."""
    folder = tmp_path_factory.mktemp("fleet")
    servers = [Real(start, folder / str(port), port) for port in free_ports(3)]
    servers.sort(key=lambda server: server.url)
    try:
        for server in servers:
            server.start()
        for server in servers:
            with server.client as client:
                client.wait(600)
        yield servers
    finally:
        for server in servers:
            server.stop()


def test_three_servers_serve_a_change_or_none_of_them_and_one_that_was_killed_is_told(
    three: list[Real], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    urls = [server.url for server in three]
    monkeypatch.setenv("ULTRAEDIT_API_KEY", API_KEY)
    with three[0].client as client:
        untouched = client.health(digest=True).ranks[0].digest
        assert client.edit(CAPITAL).edits[0].succeeded
        delta = client.delta(1)
        edited = client.version(1)["digest"]
    delta.save(tmp_path / "delta")
    assert cli.main(["status", *urls]) == 1  # the first is ahead

    fleet = Fleet(urls, API_KEY, wait=0, say=kill_between(three[2]))
    with pytest.raises(PushError, match="half pushed") as caught:
        fleet.push(delta)
    assert caught.value.half and urls[2] in str(caught.value)
    assert [server.answer(CAPITAL["prompt"]) for server in three[:2]] == ["Sydney", "Sydney"]
    assert cli.main(["push", str(tmp_path / "delta"), "--wait", "0", *urls]) == 3

    three[2].start()
    with three[2].client as client:
        assert client.wait(600).version == 0
    assert three[2].answer(CAPITAL["prompt"]) == "Canberra"
    assert cli.main(["push", str(tmp_path / "delta"), *urls]) == 0
    assert cli.main(["status", *urls]) == 0
    for server in three:
        with server.client as client:
            health = client.health(digest=True)
        assert (health.version, health.ranks[0].digest) == (1, edited)
        assert server.answer(CAPITAL["prompt"]) == "Sydney"

    assert cli.main(["push", str(tmp_path / "delta"), "--undo", *urls]) == 0
    for server in three:
        with server.client as client:
            assert client.health(digest=True).ranks[0].digest == untouched
        assert server.answer(CAPITAL["prompt"]) == "Canberra"
    fleet.close()


def kill_between(server: Real) -> Callable[[str, str], None]:
    """Kill a server once it has been asked, before it is told."""

    def say(url: str, text: str) -> None:
        if url == server.url and text.startswith("checked"):
            kill(server)

    return say
