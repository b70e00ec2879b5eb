"""The judge gives a served model the scores that it gives the same model in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.world import World
from ultraedit_kernels import EditRequest, cli
from ultraedit_kernels.evaluation.answers import ServedModel
from ultraedit_kernels.evaluation.scores import evaluate, record_locality

pytestmark = pytest.mark.vllm

EDITS = [EditRequest.from_dict(record) for record in World.earth().edits(6, seed=5)]
KEY = "Authorization"


@pytest.fixture
def served(server: Any) -> ServedModel:
    return ServedModel.connect(server.url, server.client.headers[KEY].removeprefix("Bearer "))


def test_both_hear_the_same_answers(served: ServedModel, model: Any, tokenizer: Any) -> None:
    """Text and chat, right and wrong."""
    truths = [EditRequest(test.prompt, str(test.answer)) for r in EDITS for test in r.test_locality]
    requests = [*EDITS, *truths]
    here, there = evaluate(model, tokenizer, requests), evaluate(served, tokenizer, requests)
    assert here["generation"] == there["generation"]
    assert here["per_relation"].keys() == there["per_relation"].keys()
    for mine, its in zip(here["rows"], there["rows"], strict=True):
        for kind in ("generalization", "specificity"):
            asked = [(t["answer"].strip(), t["stopped"]) for t in mine[kind]]
            assert asked == [(t["answer"].strip(), t["stopped"]) for t in its[kind]]
        assert mine["efficacy"]["generation"] == its["efficacy"]["generation"]
    assert 0.7 < here["generation"]["efficacy"] < 1  # the truths, but not the edits
    assert there["teacher_forced"]["efficacy"] is None


def test_a_server_is_scored_before_and_after_its_edits(
    served: ServedModel, server: Any, tokenizer: Any
) -> None:
    before = record_locality(served, tokenizer, EDITS)
    server.edit(*[{"prompt": r.prompt, "target": r.target} for r in EDITS])
    after = evaluate(served, tokenizer, EDITS, before=before)["generation"]
    assert after["efficacy"] == 1
    assert after["specificity"] > 0.6


def test_command_scores_a_server(
    served: ServedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(World.earth().edits(6, seed=5)))
    model = Path(__file__).parents[3] / "bench" / "tiny-facts"
    command = ["eval", str(model), str(file), "--server", served.url, "--json", "-"]
    monkeypatch.setenv("VLLM_API_KEY", str(served.api_key))
    assert cli.main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["edits"]) == ("tiny-facts", 6)
    assert report["generation"]["efficacy"] == 0
    assert report["generation"]["specificity_gold"] > 0.9
    monkeypatch.setenv("VLLM_API_KEY", "wrong")
    assert cli.main(command) == 1
    assert "answered 401" in capsys.readouterr().err
