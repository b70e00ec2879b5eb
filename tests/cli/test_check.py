"""`ultraedit check` of a model; of a server: tests/integrations/vllm/test_judge.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.cli.command import MODEL, load, run
from ultraedit_kernels import EditDelta, Editor
from ultraedit_kernels.evaluation.loaders import load_edits

PROSE = MODEL.parent / "prose.txt"


@pytest.fixture(scope="module")
def delta(edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first six of the edits."""
    path = tmp_path_factory.mktemp("delta") / "delta"
    editor = Editor(*load(MODEL), anchors=200)
    editor.apply(load_edits(edits)[:6])
    editor.delta(1).save(path)
    return path


def check(*options: object) -> int:
    return run("check", MODEL, "--anchors", 0, *options)


def test_a_good_change_passes_and_all_of_it_is_written(
    edits: Path, delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canaries = tmp_path / "canaries.json"
    canaries.write_text('[{"prompt": "The capital of Norway is", "answer": "Oslo"}]')
    how: list[Any] = ["--delta", delta, "--tests", edits, "--limit", 6, "--max-kl", 5]
    how += ["--canaries", canaries, "--texts", PROSE]
    assert check(*how, "--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml") == 0
    said = capsys.readouterr().out
    assert "ok     guards and canaries\n" in said and said.endswith("passed\n")
    assert "ok     share of edits that hold: 100.0% hold, at least 100.0% asked" in said
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["passed"] and report["limits"] == {"min_hold": 1.0, "max_kl": 5.0}
    assert report["before"]["generation"]["efficacy"] == 0
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("tests")) == ("0", str(len(report["cases"])))


def test_the_exit_status_says_that_a_change_does_not_pass(
    edits: Path, delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--delta", delta, "--tests", edits, "--junit", tmp_path / "r.xml"]
    assert check(*how) == 3  # of the twenty only six were made
    said = capsys.readouterr().out
    assert "FAILED share of edits that hold: 30.0% hold" in said and "NOT PASSED" in said
    assert "and 4 more" in said
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    assert suite.get("failures") == "15"  # fourteen, and their share
    assert check(*how, "--min-hold", 0.3) == 0
    assert ElementTree.parse(tmp_path / "r.xml").getroot()[0].get("skipped") == "14"


def test_what_cannot_be_checked_is_an_error(
    edits: Path, delta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = EditDelta.load(delta)
    EditDelta(made.factors, dict.fromkeys(made.base, "0" * 64)).save(tmp_path / "foreign")
    (tmp_path / "cut").write_bytes(delta.read_bytes()[:-1])
    for name, message in (("foreign", "belongs to another checkpoint"), ("cut", "truncated")):
        assert check("--delta", tmp_path / name, "--tests", edits) == 1
        assert message in capsys.readouterr().err
    assert check("--delta", delta, "--tests", tmp_path / "none.json") == 1
    assert check("--delta", delta, "--tests", edits, "--json", tmp_path / "no" / "r.json") == 1
    assert check("--tests", edits) == 2
    assert "a model is checked with a change" in capsys.readouterr().err
    assert run("check", "http://127.0.0.1:9", "--tests", edits) == 1
    assert "no server answers" in capsys.readouterr().err
