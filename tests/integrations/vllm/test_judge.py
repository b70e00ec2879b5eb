"""The judge gives a served model the scores that it gives the same model in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.world import World
from tests.integrations.conftest import CANARY
from ultraedit_kernels import Editor, EditRequest, cli
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


def test_command_checks_a_change_of_a_server_which_serves_afterwards_what_it_did(
    served: ServedModel,
    server: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tests, delta = tmp_path / "edits.json", tmp_path / "delta"
    tests.write_text(json.dumps(World.earth().edits(6, seed=5)))
    server.edit(*[{"prompt": r.prompt, "target": r.target} for r in EDITS])
    delta.write_bytes(server.client.get("/v1/edits/1/delta").content)
    monkeypatch.setenv("VLLM_API_KEY", str(served.api_key))
    as_it_is = ["check", served.url, "--tests", str(tests)]
    assert cli.main(as_it_is) == 0
    start = server.rollback(0)["digest"]
    assert cli.main(as_it_is) == 3
    capsys.readouterr()

    command = [*as_it_is, "--delta", str(delta), "--json", str(tmp_path / "report.json")]
    assert cli.main([*command, "--max-kl", "10"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["before"]["generation"]["efficacy"] == 0
    assert report["after"]["generation"]["efficacy"] == 1
    assert 0 < report["kl"]["neighbours"] < 10
    assert cli.main([*command, "--max-kl", "1e-9"]) == 3
    health = server.client.get("/v1/edits/health", params={"digest": True}).json()
    assert (health["version"], health["ranks"][0]["digest"]) == (0, start)

    # One that a canary of the server's stops is never served.
    far = {"prompt": CANARY["prompt"], "target": "Bergen"}
    monkeypatch.setenv("ULTRAEDIT_API_KEY", str(served.api_key))
    editor = Editor(*load(), anchors=0)
    editor.apply([EditRequest(**far)])
    editor.delta(1).save(delta)
    assert cli.main(command) == 3
    assert "canary 0" in capsys.readouterr().out
    assert server.client.get("/v1/edits").json()["data"] == []


def load() -> tuple[Any, Any]:
    """As the server has it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(__file__).parents[3] / "bench" / "tiny-facts"
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
    return model, AutoTokenizer.from_pretrained(path)
