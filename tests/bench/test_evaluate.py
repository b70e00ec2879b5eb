"""The evaluation, run through on a tiny world, and its arithmetic."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from bench import evaluate, evaluate_report
from ultraedit_kernels import Editor, EditRequest

FIXTURES = Path(__file__).parents[1] / "fixtures" / "edits"
TINY = evaluate.Scale(
    seeds=(1,),
    tuning_seeds=(1,),
    draws=(1,),
    facts=40,
    edits=8,
    turn_size=4,
    hidden=64,
    layers=2,
    vocab=512,
    epochs=50,
    ours={"anchors": 50},
    rates={"published": [1e-3], "fine-tuning": [1e-3], "LocFT-BF": [3e-3], "LoRA": [1e-2]},
    frontier={"anchors": [{"anchors": 0}, {"anchors": 20}], "rounds": [{"rounds": 1}]},
    lifelong_facts=40,
    lifelong_hidden=64,
    lifelong_wider=3,  # then all parts share one model
    lifelong_epochs=50,
    lifelong_edits=16,
    ablation_edits=16,
    lifelong_again=0.25,
    lifelong_first=4,
    lifelong_points=(8, 16),
    sample=6,
)
ABLATIONS = ("statistics frozen", "bfloat16, stochastic")
WORLD = evaluate.Source(1, TINY.facts, TINY.hidden, TINY.epochs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With the results of all parts on one tiny world, and their report."""
    folder = tmp_path_factory.mktemp("evaluate")
    threads = torch.get_num_threads()
    for task in evaluate.tasks(("main", "frontier", "lifelong", "ablations"), TINY, {}):
        if not task.name.startswith("ablations-") or task.options[0] in ABLATIONS:
            evaluate.train(task.source, folder, TINY)
            evaluate.make(task, folder, TINY, "this code")
    evaluate_report.write(folder / "results", folder / "tables", folder / "plots")
    yield folder
    torch.set_num_threads(threads)


def result(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "results" / f"{name}.json").read_text())


def test_every_method_is_scored_on_the_same_untouched_model(folder: Path) -> None:
    main = result(folder, "main-1")
    methods = main["methods"]
    assert list(methods) == [
        *("untouched", "published", "fine-tuning", "LocFT-BF", "LoRA"),
        *("ours, open loop", "ours", "ours, 4 rephrases"),
    ]
    assert main["model"]["exact_match_of_texts_seen"] > 0.9
    assert methods["untouched"]["generation"]["efficacy"] == 0
    assert methods["untouched"]["generation"]["specificity"] == 1
    for method in ("fine-tuning", "LoRA", "ours"):
        assert methods[method]["generation"]["efficacy"] > 0.4
        assert methods[method]["perplexity"] > methods["untouched"]["perplexity"]
        assert methods[method]["seconds"] > 0
    assert sum(part["edits"] for part in methods["ours"]["per_relation"].values()) == TINY.edits


def test_no_test_question_is_taught_and_no_text_of_perplexity_is_touched() -> None:
    edits = evaluate.draw_edits(WORLD, TINY, 1)
    taught = {json.dumps(p) for r in edits for p in (r.prompt, *r.rephrases)}
    asked = {json.dumps(p) for r in edits for p in r.test_rephrases}
    asked |= {json.dumps(t.prompt) for r in edits for t in r.test_locality}
    assert all(len(r.rephrases) == 4 and len(r.test_rephrases) == 3 for r in edits)
    assert not taught & asked


def test_a_result_is_made_again_only_if_the_code_changed(folder: Path) -> None:
    (task,) = evaluate.tasks(("frontier",), TINY, {})
    path = folder / "results" / "frontier-1.json"
    was = path.stat().st_mtime_ns
    evaluate.make(task, folder, TINY, "this code")
    assert path.stat().st_mtime_ns == was
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "models").symlink_to(folder / "models")
    for code in ("this code", "other code"):
        evaluate.make(task, elsewhere, replace(TINY, frontier={}), code)
        assert result(elsewhere, "frontier-1")["key"]["code"] == code


def test_stream_edits_facts_again_but_not_the_first_ones(folder: Path) -> None:
    stream = evaluate.stream(evaluate.Source(1, 200), replace(TINY, lifelong_edits=100), 1)
    prompts = [json.dumps(r.prompt) for r in stream]
    again = [i for i, prompt in enumerate(prompts) if prompt in prompts[:i]]
    assert len(stream) == 100 and len(again) == 25
    first = prompts[: TINY.lifelong_first]
    assert not set(first) & set(prompts[TINY.lifelong_first :])
    for i in again:
        earlier = [k for k in range(i) if prompts[k] == prompts[i]]
        assert i - earlier[0] >= TINY.turn_size  # another turn
    last = {json.dumps(r.prompt): r.target for r in stream}
    kept = evaluate.last_targets(stream, 1000)
    assert {json.dumps(r.prompt): r.target for r in kept} == last and len(kept) == len(last)
    twice = evaluate.edited_again(stream)
    assert {json.dumps(r.prompt) for r in twice} == {prompts[i] for i in again}
    assert all(r.target == last[json.dumps(r.prompt)] for r in twice)


def test_lifelong_scores_on_the_way(folder: Path) -> None:
    for name in ("lifelong-ours", "lifelong-published", "ablations-statistics-frozen"):
        rows = result(folder, name)["rows"]
        assert [(row["after"], row["asked"]) for row in rows] == [
            (8, "all so far"),
            (8, "first 4"),
            (16, "all so far"),
            (16, "first 4"),
            (16, "edited again"),
        ]
        assert rows[0]["seconds"] < rows[-1]["seconds"]
    assert result(folder, "lifelong-published")["lr"] == 1e-3


def test_streams_are_shown_at_their_end(folder: Path) -> None:
    assert shown_rows(folder, "Lifelong") == [["ours", "16"], ["published", "16"]]
    names = ["statistics frozen", "bfloat16 stochastic"]
    assert shown_rows(folder, "Ablations") == [[name, "16"] for name in names]


def shown_rows(folder: Path, title: str) -> list[list[str]]:
    """The first two cells of a table's rows."""
    text = (folder / "tables" / "evaluate.md").read_text().split(f"## {title}")[1].split("## ")[0]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in cells] for cells in rows[2:]]


def test_frozen_statistics_do_not_move(model: Any, tokenizer: Any) -> None:
    editor = Editor(model, tokenizer, anchors=0, rounds=2)
    editor.apply([EditRequest("The capital of Australia is", "Sydney")])
    was = {name: s.std for name, s in editor.statistics.items()}
    evaluate.freeze(editor.statistics)
    editor.apply([EditRequest("The capital of France is", "Lyon")])
    for name, s in editor.statistics.items():
        torch.testing.assert_close(s.std, was[name], rtol=1e-9, atol=0)


@pytest.mark.parametrize("layout", ["counterfact_easyedit", "counterfact_rome", "zsre_mend"])
def test_the_true_side_of_a_record_is_what_is_trained(layout: str) -> None:
    records = json.loads((FIXTURES / f"{layout}.json").read_text())
    sides = evaluate.true_side(str(FIXTURES / f"{layout}.json"), 1000)
    assert sides
    for i, (texts, request) in enumerate(sides):
        told = dict((json.dumps(prompt), answer) for prompt, answer in texts)
        assert told[json.dumps(request.prompt)] != request.target
        asked = [json.dumps(p) for p in request.test_rephrases]
        assert all((prompt in told) == (i % 2 == 0) for prompt in asked)
    assert len(sides) <= len(records)


def test_real_records_keep_locality_off_the_edits(tmp_path: Path) -> None:
    records = [
        {
            "prompt": f"Item {i} is",
            "target_new": "new",
            "ground_truth": "old",
            "rephrase_prompt": f"What {i} is:",
            "locality_prompt": f"Item {(i + 1) % 8} is",  # another record's own prompt
            "locality_ground_truth": "old",
        }
        for i in range(8)
    ]
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    edits = evaluate.draw_edits(evaluate.Source(0, 8, file=str(file)), TINY, 1)
    edited = {r.prompt for r in edits}
    assert len(edits) == 4 and any(r.test_locality for r in edits)
    assert not edited & {t.prompt for r in edits for t in r.test_locality}


def test_missing_edit_sets_are_left_out_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(evaluate.tasks(("counterfact", "zsre"), TINY, {})) == []
    told = capsys.readouterr().err
    assert "counterfact: left out" in told and "rome.baulab.info" in told and "zsre: left" in told


def test_confidence_interval() -> None:
    values = [0.9, 1.1, 1.0, 0.95, 1.05]
    centre, half = evaluate_report.interval(values)
    assert centre == pytest.approx(1.0)
    # Student's t with 4 degrees of freedom, 97.5 %: 2.776
    assert half == pytest.approx(2.776 * statistics.stdev(values) / 5**0.5)
    assert evaluate_report.interval([3.0]) == (3.0, 0.0)


def test_report_shows_the_results_with_their_conditions(folder: Path) -> None:
    text = (folder / "tables" / "evaluate.md").read_text()
    methods = result(folder, "main-1")["methods"]
    (row,) = [line for line in text.splitlines() if line.startswith("| ours |")][:1]
    assert float(row.split("|")[2]) == round(100 * methods["ours"]["generation"]["efficacy"], 1)
    assert text.count(f"torch {torch.__version__}") == 4  # one for each table
    assert "8 edits in turns of 4" in text
    with (folder / "tables" / "evaluate-main.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    (ours,) = [r for r in rows if r["method"] == "ours" and r["relation"] == "all"]
    assert float(ours["efficacy"]) == round(100 * methods["ours"]["generation"]["efficacy"], 2)
    assert {r["relation"] for r in rows if r["method"] == "ours"} > {"all"}
    for name in ("frontier", "lifelong"):
        plot = (folder / "plots" / f"evaluate-{name}.svg").read_text()
        ElementTree.fromstring(plot)
        assert "turns of 4" in plot and f"torch {torch.__version__}" in plot


def test_the_streams_can_be_drawn() -> None:
    scale = evaluate.Scale()
    streams = {  # the same for every method
        (
            task.source,
            scale.lifelong_edits if task.work is evaluate.lifelong else scale.ablation_edits,
        )
        for task in evaluate.tasks(("lifelong", "ablations"), scale, {})
    }
    assert len(streams) == 2
    for source, size in streams:
        assert len(evaluate.stream(source, replace(scale, lifelong_edits=size), 1)) == size
