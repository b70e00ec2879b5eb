"""What is told of turns, read back from the logs themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.command import MODEL, run
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.callbacks import TurnCallback, figures, open_log

CAPITAL = EditRequest("The capital of Australia is", "Sydney")
YEN = EditRequest("The currency of Japan is the", "dollar")


class Heard:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.results: list[Any] = []

    def on_turn(self, result: Any) -> None:
        self.results.append(result)


class Broken:
    """Fails whenever it is told."""

    def on_turn(self, result: Any) -> None:
        raise OSError("the disk is full")


@pytest.fixture
def editor(model: Any, tokenizer: Any) -> Editor:
    return Editor(model, tokenizer, anchors=0)


def test_a_callback_is_told_of_what_is_committed_and_of_nothing_else(editor: Editor) -> None:
    heard: TurnCallback = Heard()
    assert editor.callbacks == []
    editor.apply([CAPITAL])
    editor.callbacks.append(heard)
    assert editor.apply([YEN], commit=False).version == 1
    made = editor.apply([YEN])
    delta = editor.delta(2)
    editor.rollback(1)
    applied = editor.apply_delta(delta)
    editor.apply_delta(delta, commit=False)
    assert heard.results == [made, applied]


def test_a_callback_that_fails_is_a_warning_and_the_turn_stands(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    heard = Heard()
    editor.callbacks += [Broken(), heard]
    assert editor.apply([CAPITAL]).version == 1 == editor.version
    assert len(heard.results) == 1
    assert "version 1 is made, but Broken failed: OSError: the disk is full" in caplog.text


def test_the_figures_of_a_turn_are_its_own(editor: Editor) -> None:
    made = editor.apply([CAPITAL, YEN])
    found = figures(made)
    assert found["edits/number"] == 2 and found["edits/held"] == 1
    assert found["edits/rounds"] == sum(edit.rounds for edit in made.edits) / 2
    assert found["edits/least_margin"] == min(edit.margin for edit in made.edits)
    assert found["guards/change"] == made.guards["change"] > 0
    assert found["time/total_ms"] == made.timings["total_ms"]
    delta = editor.delta(1)
    editor.rollback(0)
    assert figures(editor.apply_delta(delta))["edits/number"] == 0


def test_tensorboard_has_a_step_for_every_version(
    edits_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "runs"
    how = ["--turn-size", 1, "--anchors", 0, "--log-to", f"tensorboard:{folder}"]
    assert run("edit", MODEL, edits_file, "-o", tmp_path / "out", *how) == 0
    events = reader.EventAccumulator(str(folder))
    events.Reload()
    assert {"edits/held", "guards/change", "time/total_ms"} <= set(events.Tags()["scalars"])
    held = events.Scalars("edits/held")
    assert [(event.step, event.value) for event in held] == [(1, 1.0), (2, 1.0)]


def test_mlflow_has_a_run_with_a_step_for_every_version(
    edits_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its files need no database
    mlflow = pytest.importorskip("mlflow")
    uri = f"file:{tmp_path / 'runs'}"
    how = ["--turn-size", 1, "--anchors", 0, "--log-to", f"mlflow:{uri}"]
    for out in ("first", "second"):  # two runs of one experiment
        assert run("edit", MODEL, edits_file, "-o", tmp_path / out, *how) == 0
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("ultraedit")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 2 and {run.info.status for run in runs} == {"FINISHED"}
    for one in runs:
        found = client.get_metric_history(one.info.run_id, "edits/held")
        assert [(metric.step, metric.value) for metric in found] == [(1, 1.0), (2, 1.0)]


@pytest.mark.parametrize("where", ["wandb:x", "tensorboard", "tensorboard:", "mlflow", ""])
def test_a_log_of_no_known_kind_is_refused(where: str) -> None:
    with pytest.raises(ValueError, match="expected tensorboard:DIR or mlflow:URI"):
        open_log(where)


def test_a_place_that_cannot_be_written_to_is_said(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot log to tensorboard:"):
        open_log(f"tensorboard:{tmp_path / 'file'}")


@pytest.mark.parametrize(
    ("name", "where", "remedy"),
    [
        ("tensorboard", "tensorboard:runs", "pip install tensorboard"),
        ("mlflow", "mlflow:", "pip install mlflow-skinny"),
    ],
)
def test_without_the_package_the_error_says_what_to_install(
    name: str, where: str, remedy: str, edits_file: Path, tmp_path: Path
) -> None:
    """In a process where it cannot be imported, whether it is installed or not."""
    command = ["edit", str(MODEL), str(edits_file), "-o", str(tmp_path / "out"), "--anchors", "0"]
    command += ["--log-to", where]
    script = (
        f"import sys; sys.modules[{name!r}] = None\n"
        f"from ultraedit_kernels import cli; sys.exit(cli.main({command!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and remedy in done.stderr
    assert list(tmp_path.glob("out")) == []


@pytest.fixture
def edits_file(tmp_path: Path) -> Path:
    """Two edits."""
    path = tmp_path / "edits.json"
    edits = [{"prompt": edit.prompt, "target": edit.target} for edit in (CAPITAL, YEN)]
    path.write_text(json.dumps(edits))
    return path
