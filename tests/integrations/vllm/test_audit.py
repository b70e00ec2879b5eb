"""Audit lines: what they say, and where they go. Those of a server: test_operators."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.audit import FILE, Audit, logger
from ultraedit_kernels.integrations.vllm.protocol import EditsBody

ASKED: list[dict[str, Any]] = [
    {"prompt": "The capital of Australia is", "target": "Sydney"},
    {"prompt": [{"role": "user", "content": "And of Japan?"}], "target": "Osaka"},
]


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What vLLM's logger gets, which hands nothing on to the root."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def write(audit: Audit, event: str, **line: Any) -> None:
    asyncio.run(audit.write(event, line))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_its_time_and_event_and_goes_to_file_and_log(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    write(Audit(str(tmp_path), True), "committed", version=1, kind="edit")
    (line,) = lines(tmp_path / FILE)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line.pop("time"))
    assert line == {"event": "committed", "version": 1, "kind": "edit"}
    assert [r.getMessage() for r in logged] == (tmp_path / FILE).read_text().splitlines()


def test_lines_are_appended_and_nobody_else_may_read_them(tmp_path: Path) -> None:
    for version in (1, 2):  # two servers on one directory
        write(Audit(str(tmp_path), True), "committed", version=version)
    assert [line["version"] for line in lines(tmp_path / FILE)] == [1, 2]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_after_the_file_is_renamed_the_next_line_begins_a_new_one(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path), True)
    write(audit, "committed", version=1)
    (tmp_path / FILE).rename(tmp_path / "audit.1")
    write(audit, "committed", version=2)
    assert [line["version"] for line in lines(tmp_path / FILE)] == [2]
    assert [line["version"] for line in lines(tmp_path / "audit.1")] == [1]


def test_a_file_that_cannot_be_written_is_logged_and_nothing_raised(
    tmp_path: Path, logged: list[logging.LogRecord]
) -> None:
    (tmp_path / FILE).mkdir()
    write(Audit(str(tmp_path), True), "committed", version=1)
    first, second = logged
    assert json.loads(first.getMessage())["version"] == 1
    assert second.levelno == logging.ERROR and "audit.jsonl was not written" in second.getMessage()


def test_without_a_directory_there_is_only_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[logging.LogRecord]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Audit(None, True), "refused", status=400)
    assert [json.loads(r.getMessage())["status"] for r in logged] == [400]
    assert not list(tmp_path.iterdir())


def test_a_turn_is_told_with_its_prompts_and_targets_or_without() -> None:
    edits = [{**edit, "rephrases": ["Its capital is"], "locality": ["Paris is"]} for edit in ASKED]
    body = EditsBody.model_validate({"edits": edits})
    assert Audit(None, True).edits(body) == {"edits": 2, "asked": ASKED}
    assert Audit(None, False).edits(body) == {"edits": 2}
