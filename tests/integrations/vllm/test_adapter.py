"""An exported LoRA adapter and the edit in place, on one server: the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")

from bench.world import World
from tests.integrations.conftest import MODEL, Server
from ultraedit_kernels import EditDelta, Editor, EditRequest, cli

pytestmark = pytest.mark.vllm

EDITS = [EditRequest.from_dict(record) for record in World.earth().edits(40, seed=1)]


@pytest.fixture(scope="module")
def delta() -> EditDelta:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    editor = Editor(model, AutoTokenizer.from_pretrained(MODEL), anchors=200)
    editor.apply(EDITS)
    return editor.delta(1)


def test_an_adapter_is_answered_from_as_the_edited_weights_are(
    running: Callable[..., Any],
    delta: EditDelta,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figure: Callable[..., None],
) -> None:
    delta.save(tmp_path / "delta")
    command = ["export", str(tmp_path / "delta"), "--to", "lora", "-o", str(tmp_path / "adapter")]
    assert cli.main(command) == 0
    told = capsys.readouterr().out.splitlines()[-1].split()
    options = told[told.index("--enable-lora") :]  # as the command prints them
    settings = json.dumps({"ultraedit": {"anchors": 0, "max_lost": 1.0}})
    options += ["--dtype", "float32", "--additional-config", settings]
    with running(tmp_path, *options) as server:
        prompts = [edit.prompt for edit in EDITS]
        rest = [prompt for edit in EDITS for prompt in edit.test_rephrases]
        rest += [test.prompt for edit in EDITS for test in edit.test_locality]

        def ask(model: str) -> list[str]:
            return [answer(server, model, str(prompt)) for prompt in (*prompts, *rest)]

        untouched, adapted = ask("tiny-facts"), ask("edits")
        response = server.client.post("/v1/edits/apply", content=delta.to_bytes())
        assert response.status_code == 200, response.text
        edited = ask("tiny-facts")
    targets = [edit.target for edit in EDITS]
    assert sum(a == b for a, b in zip(edited, targets, strict=False)) >= 38
    assert sum(a == b for a, b in zip(untouched, targets, strict=False)) == 0
    same = [a == b for a, b in zip(adapted, edited, strict=True)]
    figure(edits=sum(same[:40]), other_prompts=f"{sum(same[40:])} of {len(rest)}")
    assert sum(same[:40]) / 40 >= 0.99
    assert sum(same) / len(same) >= 0.99


def answer(server: Server, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text.strip()
