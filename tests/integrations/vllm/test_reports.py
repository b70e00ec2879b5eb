"""What is kept of the answers to a turn. As the journal's entries tell it: test_page_in_browser."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.reports import FOLDER, IN_MEMORY, Reports, logger


@pytest.fixture
def logged() -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def answer(*names: str, same: tuple[bool, ...] = ()) -> dict[str, Any]:
    """The answer to a request, of edits with these targets."""
    edits = [
        {"prompt": f"{name} is", "target": name, "before": "old", "after": name}
        | {"succeeded": True, "reason": None, "rounds": 3, "taught": ["text"], "other_forms": []}
        for name in names
    ]
    prompts = [{"prompt": "p", "before": "b", "after": "b", "unchanged": one} for one in same]
    return {"version": 1, "edits": edits, "specificity": {"score": 1.0, "prompts": prompts}}


def record(version: int, digest: str, edits: int = 1) -> dict[str, Any]:
    return {"version": version, "digest": digest, "edits": [{}] * edits}


@pytest.fixture(params=["directory", "memory"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return str(tmp_path) if request.param == "directory" else None


def test_the_requests_of_a_turn_are_one_report(where: str | None) -> None:
    reports = Reports(where)
    reports.write(1, "d1", [answer("a", "b", same=(True, False)), answer("c", same=(True,))])
    report = reports.of(record(1, "d1", edits=3))
    assert report is not None and set(report) == {"edits", "specificity"}
    assert [edit["after"] for edit in report["edits"]] == ["a", "b", "c"]
    assert set(report["edits"][0]) == {"before", "after", "succeeded", "reason"}
    assert report["specificity"]["score"] == pytest.approx(2 / 3)
    assert [one["unchanged"] for one in report["specificity"]["prompts"]] == [True, False, True]


def test_without_locality_prompts_there_is_no_score(where: str | None) -> None:
    reports = Reports(where)
    reports.write(1, "d1", [answer("a")])
    report = reports.of(record(1, "d1"))
    assert report is not None and report["specificity"] == {"score": None, "prompts": []}


def test_a_report_is_of_one_digest(where: str | None) -> None:
    """After a rollback another version has the number."""
    reports = Reports(where)
    assert reports.of(record(1, "d1")) is None
    reports.write(1, "d1", [answer("a")])
    assert reports.of(record(1, "other")) is None
    reports.write(1, "other", [answer("b")])
    assert reports.of(record(1, "d1")) is None
    report = reports.of(record(1, "other"))
    assert report is not None and report["edits"][0]["after"] == "b"


def test_a_delta_that_leads_to_the_same_weights_has_none(where: str | None) -> None:
    reports = Reports(where)
    reports.write(1, "d1", [answer("a")])
    assert reports.of(record(1, "d1", edits=0)) is None


def test_another_server_and_a_later_one_read_it_and_nobody_else(tmp_path: Path) -> None:
    second = Reports(str(tmp_path))
    Reports(str(tmp_path)).write(7, "d", [answer("<i>ü‮</i>")])
    report = second.of(record(7, "d"))
    assert report is not None and report["edits"][0]["after"] == "<i>ü‮</i>"
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["000007.json"]
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700


def test_memory_keeps_the_newest_ones() -> None:
    reports = Reports(None)
    for version in range(1, IN_MEMORY + 2):
        reports.write(version, "d", [answer("a")])
    assert reports.of(record(1, "d")) is None
    assert reports.of(record(2, "d")) and reports.of(record(IN_MEMORY + 1, "d"))


def test_what_cannot_be_written_is_logged(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    reports = Reports(str(tmp_path))
    reports.write(1, "d", [answer("a")])
    assert "answers of version 1 were not kept" in logged[0]
    assert reports.of(record(1, "d")) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff"])
def test_what_is_damaged_is_left_out_and_logged(
    tmp_path: Path, content: bytes, logged: list[str]
) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "000001.json").write_bytes(content)
    assert Reports(str(tmp_path)).of(record(1, "d")) is None
    assert "000001.json is damaged" in logged[0]
