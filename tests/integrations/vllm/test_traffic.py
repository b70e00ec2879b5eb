"""The sample of live traffic. Servers that keep one: test_api_servers, test_tensor_parallel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.integrations.vllm import traffic as module
from ultraedit_kernels.integrations.vllm.traffic import PROMPT_TOKENS, ROWS_PER_PROMPT, Traffic
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence

NAME = "model.layers.2.mlp.down_proj"
QUESTIONS = [f"The capital of {land} is" for land in ("France", "Italy", "Spain", "Japan", "Peru")]


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture whose keys are the tokens that they are at."""

    def capture(_model: Any, sequences: list[Sequence], modules: list[str], **_: Any) -> Any:
        (one,) = sequences
        ids = torch.tensor((one.prompt_ids + one.target_ids)[:-1])
        return SimpleNamespace(keys={name: ids[:, None].float() for name in modules})

    monkeypatch.setattr(module, "capture", capture)


@pytest.mark.usefixtures("echo")
def test_it_is_bounded_and_every_prompt_is_as_likely():
    kept = torch.zeros(50)
    for seed in range(400):
        traffic = Traffic(20, seed)
        for number in range(50):
            traffic.offer(None, [NAME], [number] * 9)
        rows = traffic.keys()[NAME]
        assert len(traffic) == len(rows) == 20
        kept += rows[:, 0].long().bincount(minlength=50)
    assert (kept % ROWS_PER_PROMPT == 0).all()
    share = kept / ROWS_PER_PROMPT / 400  # of 5 of 50 prompts
    assert share.min() > 0.04 and share.max() < 0.17
    assert abs(float(share[:25].mean()) - 0.1) < 0.01


@pytest.mark.usefixtures("echo")
def test_ranks_draw_the_same_and_long_prompts_are_cut():
    samples = []
    for _ in range(2):
        traffic = Traffic(12)
        taken = [traffic.offer(None, [NAME], list(range(n, n + 200))) for n in range(30)]
        assert taken[:3] == [True] * 3 and not all(taken)
        samples.append(traffic.keys()[NAME])
        assert samples[-1][:4].max() - samples[-1][:4].min() < PROMPT_TOKENS
    assert torch.equal(*samples)


@pytest.mark.usefixtures("echo")
def test_the_last_token_is_left_out_and_so_is_what_has_no_other():
    traffic = Traffic(8)
    assert not traffic.offer(None, [NAME], [7])
    assert len(traffic) == 0 and traffic.keys() == {}
    assert traffic.offer(None, [NAME], [7, 8, 9])
    assert traffic.keys()[NAME][:, 0].tolist() == [7, 8]


def test_keys_are_what_the_module_gets(model, tokenizer):
    ids = tokenizer(QUESTIONS[0])["input_ids"]
    traffic = Traffic(ROWS_PER_PROMPT)
    traffic.offer(model, [NAME], ids)
    every = capture(model, [Sequence(ids[:1], ids[1:])], [NAME], backward=False).keys[NAME]
    for row in traffic.keys()[NAME]:
        assert (every - row).abs().amax(1).min() == 0


def test_what_is_held_still_moves_less(model, tokenizer):
    edits = [EditRequest("The capital of Australia is", "Sydney")]
    ids = [tokenizer(question)["input_ids"] for question in QUESTIONS]
    probes = [Sequence(one[:1], one[1:]) for one in ids]
    editor = Editor(model, tokenizer, modules=[NAME], anchors=0)
    start = editor.weights[NAME].clone()
    keys = capture(model, probes, [NAME], backward=False).keys[NAME]
    moved = []
    for still in ({}, {NAME: keys}):
        editor.hold_still(still)
        assert editor.apply(edits).edits[0].succeeded
        moved.append(float((keys @ (editor.weights[NAME] - start).T).norm()))
        editor.rollback(0)
    assert moved[1] < 0.2 * moved[0]


def test_keys_that_do_not_fit_are_refused(model, tokenizer):
    editor = Editor(model, tokenizer, modules=[NAME], anchors=0)
    d_in = editor.weights[NAME].shape[1]
    with pytest.raises(ValueError, match="modules of the keys"):
        editor.hold_still({"other": torch.zeros(1, d_in)})
    with pytest.raises(ValueError, match="expected \\(n, "):
        editor.hold_still({NAME: torch.zeros(1, d_in + 1)})
    with pytest.raises(ValueError, match="finite"):
        editor.hold_still({NAME: torch.full((1, d_in), torch.nan)})
