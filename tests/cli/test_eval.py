"""`ultraedit eval`, on the bundled model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from bench.world import World
from tests.cli.command import MODEL, TURN_SIZE, run
from ultraedit_kernels import __version__
from ultraedit_kernels.cli.show import LOOSER, SCORES
from ultraedit_kernels.evaluation import baselines
from ultraedit_kernels.evaluation.scores import WAYS
from ultraedit_kernels.model import presets


@pytest.fixture(scope="module")
def evaluation(edits: Path) -> subprocess.CompletedProcess[str]:
    """An evaluation of the 20 edits by the program as a user starts it."""
    command = [sys.executable, "-m", "ultraedit_kernels.cli", "eval", MODEL, edits, "--json", "-"]
    how = ["--turn-size", str(TURN_SIZE), "--anchors", "200"]
    return subprocess.run([*map(str, command), *how], capture_output=True, text=True)


def test_json_has_every_score(evaluation: subprocess.CompletedProcess[str], edits: Path) -> None:
    assert evaluation.returncode == 0, evaluation.stderr
    report = json.loads(evaluation.stdout)
    for source in (report, report["untouched"]):
        for regime in WAYS:
            assert set(source[regime]) == set(SCORES)
    scores, untouched = report["generation"], report["untouched"]["generation"]
    assert scores["efficacy"] >= 0.9
    assert scores["generalization"] > 0.5 > untouched["generalization"]
    assert scores["specificity"] > 0.9 and untouched["specificity"] is None
    assert untouched["efficacy"] == 0 and untouched["specificity_gold"] > 0.9
    assert report["contains"]["efficacy"] >= scores["efficacy"]
    near = report["neighbours"]
    assert near["first_token"] > 0.9 and near["kl"] < 0.2 and near["leak"] < 0.1
    assert report["perplexity"] > report["untouched"]["perplexity"] > 1
    assert (report["model"], report["edits_file"]) == (str(MODEL), str(edits))
    assert (report["edits"], report["turns"], report["dtype"]) == (20, 3, "float32")
    assert 0 < report["seconds"] < 60
    assert report["versions"]["ultraedit-kernels"] == __version__
    assert report["settings"]["turn_size"] == TURN_SIZE
    assert report["settings"]["lr"] == "auto" and len(report["settings"]["modules"]) == 4
    assert sum(part["edits"] for part in report["per_relation"].values()) == 20


def test_json_rows_join_scores_and_verdicts(evaluation: subprocess.CompletedProcess[str]) -> None:
    report = json.loads(evaluation.stdout)
    rows = report["rows"]
    assert [row["prompt"] for row in rows] == [e["prompt"] for e in World.earth().edits(20, seed=1)]
    assert [row["turn"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 4
    right = sum(row["efficacy"]["generation"] for row in rows)
    assert right / 20 == pytest.approx(report["generation"]["efficacy"])
    assert sum(row["held_when_made"] for row in rows) == report["held_when_made"]


def test_table_shows_the_scores_of_the_report(
    evaluation: subprocess.CompletedProcess[str],
) -> None:
    report = json.loads(evaluation.stdout)
    lines = [line.split() for line in evaluation.stderr.splitlines()]
    efficacy, looser = (line for line in lines if line[:1] == ["efficacy"])
    assert [float(cell) for cell in looser[1:]] == [
        pytest.approx(100 * report[way]["efficacy"], abs=0.06) for way in LOOSER
    ]
    assert [float(cell) for cell in efficacy[1:]] == [
        pytest.approx(100 * source[regime]["efficacy"], abs=0.06)
        for regime in ("generation", "teacher_forced")
        for source in (report, report["untouched"])
    ]
    assert {relation for line in lines for relation in line[:1]} >= set(report["per_relation"])
    assert f"ultraedit-kernels {__version__}" in evaluation.stderr


def test_published_settings(edits: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    options = ["--limit", 4, "--published", "--lr", 1e-3, "--json", file]
    assert run("eval", MODEL, edits, *options) == 0
    report = json.loads(file.read_text())
    assert report["settings"].items() >= (presets.PAPER | {"lr": 1e-3, "turn_size": 100}).items()
    assert {row["rounds"] for row in report["rows"]} == {1}


def test_baselines_run_on_the_same_edits(
    edits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    best = {"published": 1.5e-3, "fine-tuning": 3e-3, "LocFT-BF": 3e-3, "LoRA": 1e-2}
    monkeypatch.setattr(baselines, "rates", lambda baseline, *_: [best[baseline]])
    file = tmp_path / "scores.json"
    options = ["--limit", 4, "--turn-size", 4, "--anchors", 0, "--json", file, "--baselines"]
    assert run("eval", MODEL, edits, *options) == 0
    report = json.loads(file.read_text())
    assert list(report["baselines"]) == list(best)
    for baseline, scored in report["baselines"].items():
        assert scored["lr"] == best[baseline] and scored["edits"] == 4
        assert scored["generation"] != report["untouched"]["generation"]
    for baseline in ("fine-tuning", "LocFT-BF", "LoRA"):  # one turn, so that nothing is forgotten
        assert report["baselines"][baseline]["generation"]["efficacy"] == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (shown,) = (line for line in lines if line[:1] == ["LoRA"])
    assert shown[1] == "0.01" and shown[3] == "100.0"


def test_a_server_is_not_edited(edits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9"
    for option in (["--rounds", 2], ["--published"], ["--baselines"], ["--turn-size", 3]):
        assert run("eval", MODEL, edits, "--server", url, *option) == 2
        assert "a server is scored as it is" in capsys.readouterr().err
    assert run("eval", MODEL, edits, "--server", url) == 1
    assert f"no server answers at {url}" in capsys.readouterr().err
