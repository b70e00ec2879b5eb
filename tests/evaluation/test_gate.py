"""The gate: what it measures, when it lets a change through, and what a CI reads of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from bench.world import World
from ultraedit_kernels import EditDelta, Editor, EditRequest
from ultraedit_kernels.evaluation import gate
from ultraedit_kernels.evaluation.gate import Limits
from ultraedit_kernels.store.delta import LowRank

EDITS = [EditRequest.from_dict(record) for record in World.earth().edits(6, seed=5)]
PROSE = (Path(__file__).parents[2] / "bench" / "prose.txt").read_text()
QUIET: dict[str, Any] = {"anchors": 0}


@pytest.fixture
def delta(model: Any, tokenizer: Any) -> EditDelta:
    """Of the six edits; the model is left untouched."""
    editor = Editor(model, tokenizer, anchors=200)
    editor.apply(EDITS)
    made = editor.delta(1)
    editor.rollback(0)
    return made


def scaled(delta: EditDelta, by: float) -> EditDelta:
    factors = {n: LowRank(by * f.coeff, f.keys) for n, f in delta.factors.items()}
    return EditDelta(factors, delta.base, delta.settings)


def outcomes(report: dict[str, Any]) -> dict[str, str]:
    return {case["name"]: case["outcome"] for case in report["cases"]}


def test_a_change_that_keeps_its_limits_passes_and_the_model_is_as_before(
    model: Any, tokenizer: Any, delta: EditDelta
) -> None:
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    limits = Limits(min_hold=1.0, max_kl=5.0)
    report = gate.check_model(
        model, tokenizer, delta, EDITS, limits=limits, settings=QUIET, texts=PROSE
    )
    assert report["passed"] and set(outcomes(report).values()) == {"passed"}
    assert report["before"]["generation"]["efficacy"] == 0
    assert report["after"]["generation"]["efficacy"] == 1
    assert 0 < report["kl"]["texts"] < 5 and 0 < report["kl"]["neighbours"] < 5
    assert report["kl"]["texts"] == report["texts"]["kl"] and report["guards"]["change"] > 0
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_each_limit_stops_what_is_beyond_it(model: Any, tokenizer: Any, delta: EditDelta) -> None:
    def check(change: EditDelta, **how: Any) -> dict[str, Any]:
        settings = QUIET | how.pop("settings", {})
        return gate.check_model(
            model, tokenizer, change, EDITS, limits=Limits(**how), settings=settings, texts=PROSE
        )

    nothing = check(scaled(delta, 0.0))
    assert not nothing["passed"] and outcomes(nothing)["share of edits that hold"] == "failed"
    assert nothing["kl"] == {"neighbours": 0, "texts": 0}
    assert outcomes(nothing)[EDITS[0].prompt] == "failed"
    lenient = check(scaled(delta, 0.0), min_hold=0.0)
    assert lenient["passed"] and outcomes(lenient)[EDITS[0].prompt] == "tolerated"

    moved = check(delta, max_kl=1e-6)
    assert not moved["passed"]
    assert (outcomes(moved)["neighbours"], outcomes(moved)["texts"]) == ("failed", "failed")

    canary = {"prompt": EDITS[0].prompt, "answer": EDITS[0].test_locality[0].answer}
    guarded = check(delta, settings={"canaries": [canary]})
    assert not guarded["passed"] and outcomes(guarded)["guards and canaries"] == "failed"
    assert outcomes(guarded)["share of edits that hold"] == "passed"


def test_a_change_of_another_model_is_no_verdict(
    model: Any, tokenizer: Any, delta: EditDelta
) -> None:
    foreign = EditDelta(delta.factors, dict.fromkeys(delta.base, "0" * 64))
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        gate.check_model(model, tokenizer, foreign, EDITS, limits=Limits(), settings=QUIET)


@pytest.mark.parametrize("seed", range(5))
def test_the_kl_of_the_likeliest_tokens_is_at_most_the_true_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(50, generator=generator) * 3
    moved = logits + torch.randn(50, generator=generator)
    old, new = logits.log_softmax(0), moved.log_softmax(0)
    true = float((old.exp() * (old - new)).sum())

    def likeliest(told: torch.Tensor, count: int) -> dict[str, float]:
        return {str(i): float(told[i]) for i in told.argsort(descending=True)[:count].tolist()}

    known = [gate.known_kl(likeliest(old, n), likeliest(new, n)) for n in (5, 20, 50)]
    assert all(-1e-6 <= kl <= true + 1e-6 for kl in known)
    assert known[-1] == pytest.approx(true, rel=1e-4)
    assert gate.known_kl(likeliest(old, 20), likeliest(old, 20)) == pytest.approx(0, abs=1e-6)


def test_distributions_without_a_common_token_have_a_known_kl_of_zero() -> None:
    assert gate.known_kl({"a": math.log(0.5)}, {"b": math.log(0.5)}) == 0


def test_a_ci_reads_the_verdict(tmp_path: Path) -> None:
    cases = [
        {"group": "guards", "name": "guards", "outcome": "passed", "message": ""},
        {"group": "edits", "name": "<a> & \x00b", "outcome": "failed", "message": 'says "\x1b"'},
        {"group": "edits", "name": "c", "outcome": "tolerated", "message": "within the limit"},
    ]
    gate.write_junit({"cases": cases}, tmp_path / "junit.xml")
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    assert suite.attrib == {
        "name": "ultraedit",
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "errors": "0",
    }
    told = [(e.get("classname"), e.get("name"), [c.tag for c in e]) for e in suite]
    assert told == [
        ("ultraedit.guards", "guards", []),
        ("ultraedit.edits", "<a> & \N{REPLACEMENT CHARACTER}b", ["failure"]),
        ("ultraedit.edits", "c", ["skipped"]),
    ]
    assert suite[1][0].get("message") == 'says "\N{REPLACEMENT CHARACTER}"'
