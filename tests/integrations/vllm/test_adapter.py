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
def deltas() -> list[EditDelta]:
    """Of all edits, and of the first two: its modules have ranks of their own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    editor = Editor(model, AutoTokenizer.from_pretrained(MODEL), anchors=200)
    found = []
    for edits in (EDITS, EDITS[:2]):
        editor.apply(edits)
        found.append(editor.delta(1))
        editor.rollback(0)
    return found


def test_an_adapter_is_answered_from_as_the_edited_weights_are(
    running: Callable[..., Any],
    deltas: list[EditDelta],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figure: Callable[..., None],
) -> None:
    for name, delta in zip(("all", "two"), deltas, strict=True):
        delta.save(tmp_path / f"{name}.delta")
        command = ["export", str(tmp_path / f"{name}.delta"), "--to", "lora"]
        assert cli.main([*command, "-o", str(tmp_path / name)]) == 0
    pattern = json.loads((tmp_path / "two" / "adapter_config.json").read_text())["rank_pattern"]
    assert pattern, "expected modules of different ranks"
    first = capsys.readouterr().out.splitlines()[3].split()
    options = first[first.index("--enable-lora") :]  # as the command prints them
    options.append(f"two={tmp_path / 'two'}")
    settings = json.dumps({"ultraedit": {"anchors": 0, "max_lost": 1.0}})
    options += ["--dtype", "float32", "--additional-config", settings]
    with running(tmp_path, *options) as server:
        prompts = [edit.prompt for edit in EDITS]
        rest = [prompt for edit in EDITS for prompt in edit.test_rephrases[:1]]
        rest += [test.prompt for edit in EDITS for test in edit.test_locality[:1]]

        def ask(model: str) -> list[str]:
            return [answer(server, model, str(prompt)) for prompt in (*prompts, *rest)]

        untouched, adapted, two = ask("tiny-facts"), ask("edits"), ask("two")
        edited, edited_two = [in_place(server, delta, ask) for delta in deltas]
    targets = [edit.target for edit in EDITS]
    assert sum(a == b for a, b in zip(edited, targets, strict=False)) >= 38
    assert sum(a == b for a, b in zip(untouched, targets, strict=False)) == 0
    same = [a == b for a, b in zip(adapted, edited, strict=True)]
    figure(edits=sum(same[:40]), other_prompts=f"{sum(same[40:])} of {len(rest)}")
    assert sum(same[:40]) / 40 >= 0.99
    assert sum(same) / len(same) >= 0.99
    assert two[:2] == targets[:2]
    assert sum(a == b for a, b in zip(two, edited_two, strict=True)) / len(two) >= 0.99


def in_place(server: Server, delta: EditDelta, ask: Callable[[str], list[str]]) -> list[str]:
    """What the server answers with a change in place."""
    response = server.client.post("/v1/edits/apply", content=delta.to_bytes())
    assert response.status_code == 200, response.text
    answers = ask("tiny-facts")
    server.rollback(0)
    return answers


def answer(server: Server, model: str, prompt: str) -> str:
    body = {"model": model, "prompt": prompt, "temperature": 0}
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text.strip()
