"""Tasks of lm-evaluation-harness before and after a change, on a task of our own that needs no
network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.cli.command import MODEL, run
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.evaluation.harness import flat

FACTS = {
    "The capital of Australia is": ["Canberra", "Sydney"],
    "The capital of France is": ["Paris", "Lyon"],
    "The currency of Japan is the": ["yen", "dollar"],
    "The capital of Norway is": ["Oslo", "Bergen"],
}
"""Of each the right answer and another one."""
TASK = """
task: own_facts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1}
"""


@pytest.fixture
def change(model: Any, tokenizer: Any, tmp_path: Path) -> list[Any]:
    """Arguments of a check: a change with one of the facts, its tests, and the task."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    edit = {"prompt": "The capital of Australia is", "target": "Sydney"}
    editor = Editor(model, tokenizer, anchors=0)
    editor.apply([EditRequest(**edit)])
    editor.delta(1).save(tmp_path / "delta")
    (tmp_path / "edits.json").write_text(json.dumps([edit]))
    (tmp_path / "tasks").mkdir()
    data = tmp_path / "facts.jsonl"
    rows = [{"prompt": prompt, "choices": both} for prompt, both in FACTS.items()]
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "tasks" / "own.yaml").write_text(TASK % data)
    how: list[Any] = ["check", MODEL, "--delta", tmp_path / "delta", "--anchors", 0]
    return [*how, "--tests", tmp_path / "edits.json", "--lm-eval-path", tmp_path / "tasks"]


def test_a_task_is_scored_before_and_after_the_change(
    change: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", tmp_path / "r.json", "--junit", tmp_path / "r.xml"]
    assert run(*change, "--lm-eval", "own_facts", *files) == 0
    assert "own_facts/acc: 1 before, 0.75 after" in capsys.readouterr().out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["lm_eval"]["before"]["own_facts/acc"] == 1
    assert report["lm_eval"]["after"]["own_facts/acc"] == 0.75
    suite = ElementTree.parse(tmp_path / "r.xml").getroot()[0]
    told = {e.get("name"): e.get("value") for e in suite.iter("property")}
    assert told["lm_eval/before/own_facts/acc"] == "1"
    assert told["lm_eval/after/own_facts/acc"] == "0.75"
    assert len(list(suite.iter("properties"))) == 1
    assert suite.get("tests") == str(len(list(suite.iter("testcase"))))

    assert run(*change, "--lm-eval", "own_facts", "--lm-eval-limit", 1, *files) == 0
    assert json.loads((tmp_path / "r.json").read_text())["lm_eval"]["after"]["own_facts/acc"] == 0


def test_a_task_that_cannot_be_run_is_an_error(
    change: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*change, "--lm-eval", "own_facts,other") == 1
    assert "lm-eval has no task other" in capsys.readouterr().err
    assert run(*change, "--lm-eval", " , ") == 1
    assert "got no tasks" in capsys.readouterr().err
    (tmp_path / "facts.jsonl").unlink()
    assert run(*change, "--lm-eval", "own_facts") == 1
    assert "lm-eval cannot run own_facts: " in capsys.readouterr().err
    change[-1] = tmp_path / "nowhere"
    assert run(*change, "--lm-eval", "own_facts") == 1
    assert "there is no folder" in capsys.readouterr().err


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "edits.json").write_text('[{"prompt": "a", "target": "b"}]')
    command = ["check", str(MODEL), "--delta", "none", "--tests", str(tmp_path / "edits.json")]
    script = (
        "import sys; sys.modules['lm_eval'] = None\n"
        f"from ultraedit_kernels import cli; sys.exit(cli.main({[*command, '--lm-eval', 'x']!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "pip install lm-eval" in done.stderr


def test_tasks_are_not_asked_of_a_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["check", "http://127.0.0.1:9", "--tests", tmp_path / "edits.json"]
    assert run(*how, "--lm-eval", "x") == 2
    assert "tasks are asked of a model in this process" in capsys.readouterr().err


def test_every_number_of_the_results_has_a_name() -> None:
    results = {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,none": 0.5,
            "sample_len": 20,
        }
    }
    assert flat(results) == {
        "gsm8k/exact_match,strict-match": 0.25,
        "gsm8k/exact_match_stderr,strict-match": 0.01,
        "gsm8k/exact_match": 0.5,
    }
