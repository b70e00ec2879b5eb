"""What a server refuses: to share its state directory, and turns that break a canary."""

from __future__ import annotations

from typing import Any

import pytest

from ultraedit_kernels.store import files
from ultraedit_kernels.store.journal import Journal

psutil = pytest.importorskip("psutil")  # vLLM brings it
pytestmark = pytest.mark.vllm

FORBIDDEN = {"prompt": "The capital of Norway is", "target": "Bergen"}
"""Breaks the server's canary."""


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
    assert report["edits"][0]["after"] == " Bergen"
    assert report["rejected"] == error["message"].partition("changed: ")[2]
    assert server.rollback(0)["digest"] == digest
    assert server.edit({"prompt": "The capital of Peru is", "target": "Lima"})["rejected"] is None
