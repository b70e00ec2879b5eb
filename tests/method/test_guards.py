"""Guards: what a turn must pass, measured on turns that hold and on turns that wreck the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.test_editor import AUSTEN, CHAT, SYDNEY, UNRELATED, answers, same, state
from ultraedit_kernels import EditDelta, Editor, EditRequest
from ultraedit_kernels.method import guards
from ultraedit_kernels.method.guards import Canary, GuardError, load_canaries, relative_change
from ultraedit_kernels.settings import MethodSettings
from ultraedit_kernels.store.delta import LowRank

NONSENSE = EditRequest("xxxxx", "qzj " * 30)
RECKLESS: dict[str, Any] = {"lr": 1.0, "rounds": 2}
"""A step size with which a turn wrecks the model."""


@pytest.fixture
def editor(model, tokenizer):
    return Editor(model, tokenizer, anchors=50)


def refused(editor: Editor, guard: str, turn) -> GuardError:
    """The error of a turn that a guard stops; nothing may have changed."""
    before, version = state(editor), editor.version
    with pytest.raises(GuardError, match="the turn was rejected, nothing is changed: ") as caught:
        turn()
    assert caught.value.guard == guard
    assert same(before, editor) and editor.version == version == len(editor.history())
    return caught.value


def test_a_turn_reports_what_the_guards_measured(editor):
    pristine = {name: weight.clone() for name, weight in editor.weights.items()}
    first = editor.apply([SYDNEY])
    between = {name: weight.clone() for name, weight in editor.weights.items()}
    second = editor.apply([AUSTEN])

    def change(start) -> float:
        return max(
            float((w - start[n]).norm() / start[n].norm()) for n, w in editor.weights.items()
        )

    assert second.guards["change"] == pytest.approx(change(between), rel=1e-5)
    assert second.guards["total_change"] == pytest.approx(change(pristine), rel=1e-5)
    assert first.guards["change"] == first.guards["total_change"] < guards.MAX_CHANGE / 4
    assert second.guards["lost"] <= 0.05
    assert [r["guards"] for r in editor.history()] == [first.guards, second.guards]


def test_a_small_turn_looks_at_more_texts_only_if_it_has_lost_one(editor, monkeypatch):
    editor.prepare()
    texts = editor.memory.own_texts(guards.OWN_TEXTS)
    seen: list[int] = []

    def capture(model, part, *args, **options):
        seen.append(len(part))
        return real(model, part, *args, **options)

    real = guards.capture
    monkeypatch.setattr(guards, "capture", capture)
    assert len(texts) > guards.FIRST_TEXTS

    def looked_at(**options) -> int:
        seen.clear()
        list(editor.guards.measure(editor.weights, texts, 0.0, 32, **options))
        return sum(seen)

    assert looked_at(taught=1) == guards.FIRST_TEXTS
    assert looked_at(taught=10**6) == looked_at() == len(texts)
    editor.guards.max_lost = 1.0
    for weight in editor.weights.values():
        weight.zero_()
    assert looked_at(taught=1) == guards.FIRST_TEXTS + len(texts)


def test_a_turn_that_wrecks_the_model_is_not_served(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=50, **RECKLESS)
    result = editor.apply([NONSENSE], commit=False)
    assert not result.edits[0].succeeded
    assert "the limit (max_change) is 2" in result.rejected
    error = refused(editor, "max_change", lambda: editor.apply([NONSENSE]))
    assert error.got > error.limit == guards.MAX_CHANGE
    assert str(error).endswith(result.rejected)
    editor.settings = MethodSettings()
    assert editor.apply([SYDNEY]).edits[0].succeeded  # and the next turn is not held up
    assert answers(editor, UNRELATED) == list(UNRELATED.values())


def test_texts_of_its_own_stop_a_turn_that_small_norms_let_pass(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=50, max_change=1e6, **RECKLESS)
    error = refused(editor, "max_lost", lambda: editor.apply([NONSENSE]))
    assert 0.1 == error.limit < error.got <= 1
    assert editor.apply([NONSENSE], commit=False).rejected == error.reason


def test_losses_of_earlier_turns_are_not_counted_again(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=50, max_change=1e6, max_lost=1.0, **RECKLESS)
    assert editor.apply([NONSENSE]).guards["lost"] > 0.1
    editor.guards.max_lost, editor.settings = 0.1, MethodSettings()
    assert editor.apply([SYDNEY]).version == 2


def test_canaries(model, tokenizer):
    canaries = [
        {"prompt": "The capital of France is", "answer": "Paris"},
        {"prompt": CHAT, "answer": "Canberra"},
        {"prompt": "The author of Hamlet is", "max_kl": 0.5},
    ]
    editor = Editor(model, tokenizer, anchors=20, canaries=canaries)
    wrong = EditRequest(CHAT, "Perth")
    error = refused(editor, "canaries[1]", lambda: editor.apply([wrong]))
    assert "is answered by 'Perth', expected 'Canberra'" in str(error) and error.got < 0
    error = refused(editor, "canaries[2]", lambda: editor.apply([AUSTEN]))
    assert error.got > error.limit == 0.5 and "nats from the untouched model's" in str(error)
    assert editor.apply([AUSTEN], commit=False).rejected == error.reason
    assert editor.apply([EditRequest("The capital of Peru is", "Sydney")]).version == 1


def test_a_kl_limit_is_against_the_untouched_model_after_a_restart_too(model, tokenizer, tmp_path):
    canary = {"prompt": AUSTEN.prompt, "max_kl": 0.5}
    editor = Editor(model, tokenizer, anchors=0, state_dir=tmp_path)
    editor.apply([AUSTEN])
    editor.rollback(1)
    editor.close()
    edited = {name: weight.clone() for name, weight in editor.weights.items()}
    editor.versions.write(editor.versions.pristine)
    again = Editor(model, tokenizer, anchors=0, state_dir=tmp_path, canaries=[canary])
    assert all(torch.equal(w, edited[n]) for n, w in again.weights.items())
    refused(again, "canaries[0]", lambda: again.apply([SYDNEY]))


def test_a_canary_that_does_not_hold_is_warned_about_at_the_start(model, tokenizer, caplog):
    canaries = [{"prompt": "The capital of France is", "answer": "Rome"}]
    editor = Editor(model, tokenizer, anchors=0, canaries=canaries)
    editor.prepare()
    assert "at version 0 already, canary 0, 'The capital of France is', is answered by 'Paris'" in (
        caplog.text
    )


@pytest.mark.parametrize(
    "given, message",
    [
        ("no list", "cannot be read"),
        ({"prompt": "A", "answer": "B"}, "canaries are a dict, expected a list"),
        (["A"], "canary 0 is 'A', expected"),
        ([{"prompt": "A"}], "canary 0 is"),
        ([{"prompt": "A", "answer": "B", "max_kl": 1}], "canary 0 is"),
        ([{"prompt": "A", "answer": " "}], "canary 0: answer is ' '"),
        ([{"prompt": "A", "answer": 5}], "canary 0: answer is 5"),
        ([{"prompt": "A", "max_kl": -1}], "canary 0: max_kl is -1"),
    ],
)
def test_bad_canaries_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        load_canaries(given)


def test_canaries_of_a_file(tmp_path):
    path = tmp_path / "canaries.json"
    path.write_text(json.dumps([{"prompt": "A", "answer": "B"}, {"prompt": "A", "max_kl": 0.1}]))
    assert load_canaries(path) == [Canary("A", answer="B"), Canary("A", max_kl=0.1)]
    path.write_text("{")
    with pytest.raises(ValueError, match=r"canaries\.json cannot be read"):
        load_canaries(str(path))


def factors(editor: Editor, scale: float, rows: int = 2) -> EditDelta:
    made = {
        name: LowRank(torch.full((rows, w.shape[0]), scale), torch.full((rows, w.shape[1]), scale))
        for name, w in editor.weights.items()
    }
    return EditDelta(made, dict(editor.versions.base))


@pytest.mark.parametrize("scale, guard", [(1e30, "finite"), (1e4, "max_change"), (0.5, "max_lost")])
def test_deltas_pass_the_same_guards(model, tokenizer, scale, guard):
    editor = Editor(model, tokenizer, anchors=50, max_change=1e3)
    refused(editor, guard, lambda: editor.apply_delta(factors(editor, scale)))


def test_a_delta_with_too_many_rows(editor, monkeypatch):
    monkeypatch.setattr(guards, "MAX_ROWS", 3)
    error = refused(editor, "rows", lambda: editor.apply_delta(factors(editor, 0.0, rows=4)))
    assert (error.got, error.limit) == (4, 3)


def test_deltas_of_other_shapes_or_modules(editor):
    before, delta = state(editor), factors(editor, 0.0)
    name = editor.modules[0]
    wide = LowRank(delta.factors[name].coeff, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"for a weight of shape \(128, 5\)"):
        editor.apply_delta(EditDelta(delta.factors | {name: wide}, delta.base))
    with pytest.raises(ValueError, match="modules of the delta: missing"):
        editor.apply_delta(EditDelta({}, delta.base))
    assert same(before, editor) and editor.version == 0


def test_deltas_heed_canaries(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=0)
    delta = editor.apply([SYDNEY]).delta
    editor.rollback(0)
    strict = Editor(
        model, tokenizer, anchors=0, canaries=[{"prompt": SYDNEY.prompt, "answer": "Canberra"}]
    )
    refused(strict, "canaries[0]", lambda: strict.apply_delta(delta))


def test_relative_change():
    start = torch.randn(300, 7)
    assert relative_change(start, start) == 0
    assert relative_change(3 * start, start) == pytest.approx(2)
    assert relative_change(torch.zeros(2, 2), torch.zeros(2, 2)) == 0
    assert relative_change(torch.ones(2, 2), torch.zeros(2, 2)) == float("inf")
    half = start.bfloat16()
    wanted = ((half * 1.5).double() - half.double()).norm() / half.double().norm()
    assert relative_change(half * 1.5, half) == pytest.approx(float(wanted), rel=1e-9)
