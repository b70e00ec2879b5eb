"""Starts of the real server: a kill and a restart, and a model that cannot be edited."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


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


def test_an_acknowledged_edit_survives_kill_9(running: Callable[..., Any], tmp_path: Path) -> None:
    prompt = "The capital of Australia is"
    with running(tmp_path) as server:  # in bfloat16, vLLM's choice for this checkpoint
        workers = _children(server.process.pid)
        report = server.edit({"prompt": prompt, "target": "Sydney"})
        server.process.kill()
        for pid in workers:  # vLLM's engine outlives its server
            os.kill(pid, signal.SIGKILL)
    assert report["edits"][0]["succeeded"]
    with running(tmp_path) as server:
        assert "UltraEdit: serving version 1" in server.log.read_text()
        assert server.answer(prompt) == "Sydney"
        (record,) = server.client.get("/v1/edits").json()["data"]
        assert server.rollback(1)["digest"] == record["digest"]


def _children(pid: int) -> list[int]:
    """All processes below `pid`."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_children(int(child))]
    return found


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
