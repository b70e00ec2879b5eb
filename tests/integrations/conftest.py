"""The real server: one for the session, with the bundled model, and others that tests start.

With `--soak` (`make soak`) the tests that ask for `soak` run at full length.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

MODEL = Path(__file__).parents[2] / "bench" / "tiny-facts"
API_KEY = "secret"
CANARY = {"prompt": "The capital of Norway is", "answer": "Oslo"}
"""No turn may change it."""
WORKER = "ultraedit_kernels.integrations.vllm.extension.UltraEditExtension"


@pytest.fixture(scope="session")
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether a test is to run at full length."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Report what a test measured: figure(name=value, ...)."""

    def report(**values: Any) -> None:
        request.node.user_properties.append(("figures", values))

    return report


@dataclass(frozen=True)
class Server:
    """A running server; `client` sends the API key."""

    client: httpx.Client
    url: str
    state_dir: Path
    log: Path
    process: subprocess.Popen[bytes]

    def edit(self, *edits: dict[str, Any], **options: Any) -> dict[str, Any]:
        response = self.client.post("/v1/edits", json={"edits": edits, **options})
        assert response.status_code == 200, response.text
        return response.json()

    def rollback(self, version: int) -> dict[str, Any]:
        response = self.client.post("/v1/edits/rollback", json={"version": version})
        assert response.status_code == 200, response.text
        return response.json()

    def tokens(self, text: str) -> list[int]:
        body = {"model": "tiny-facts", "prompt": text}
        return self.client.post("/tokenize", json=body).json()["tokens"]

    def complete(self, prompt: str | list[int], **options: Any) -> dict[str, Any]:
        body = {"model": "tiny-facts", "prompt": prompt, "temperature": 0, **options}
        response = self.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def answer(self, prompt: str) -> str:
        return self.complete(prompt)["text"].strip()

    def chat(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        body = {"model": "tiny-facts", "messages": messages, "temperature": 0}
        response = self.client.post("/v1/chat/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"].strip()


def _start(
    model: Path,
    port: int,
    state_dir: Path,
    log: Path,
    *options: str,
    anchors: int = 32,
    program: tuple[str, ...] = ("-m", "vllm.entrypoints.openai.api_server", "--model"),
) -> subprocess.Popen[bytes]:
    settings = {"anchors": anchors, "state_dir": str(state_dir), "canaries": [CANARY]}
    command = [sys.executable, *program, str(model), "--served-model-name", model.name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", API_KEY]
    command += ["--enforce-eager", "--block-size", "32", "--enable-prompt-tokens-details"]
    command += [
        "--worker-extension-cls",
        WORKER,
        "--additional-config",
        json.dumps({"ultraedit": settings}),
        *options,
    ]
    environment = os.environ | {
        "VLLM_PLUGINS": "ultraedit",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("w") as output:
        return subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=output
        )


@contextmanager
def _running(directory: Path, *options: str, gathered: bool = True, **how: Any) -> Iterator[Server]:
    """A server of the bundled model whose log and journal are kept in the directory; when it has
    gathered what protects the model, unless that is not waited for."""
    pytest.importorskip("vllm")
    state_dir, log = directory / "state", directory / "server.log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = _start(MODEL, port, state_dir, log, *options, **how)
    headers = {"Authorization": f"Bearer {API_KEY}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
            _wait(client, process, log)
            while gathered and client.get("/v1/edits/health").json().get("gathered", 1) < 1:
                time.sleep(0.1)
            yield Server(client, url, state_dir, log, process)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def live_server(tmp_path_factory: pytest.TempPathFactory, soak: bool) -> Iterator[Server]:
    directory, anchors = tmp_path_factory.mktemp("server"), 2000 if soak else 32
    with _running(directory, "--dtype", "float32", anchors=anchors) as server:
        yield server


@pytest.fixture(scope="session")
def running() -> Callable[..., Any]:
    return _running


@pytest.fixture(scope="session")
def start() -> Callable[..., Any]:
    return _start


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture
def server(live_server: Server) -> Iterator[Server]:
    """The server at version 0, where it is left."""
    assert live_server.client.get("/v1/edits").json()["data"] == []
    yield live_server
    live_server.rollback(0)
