"""Whole turns on a small random model: the published formula, and what a turn leaves behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.method.small import MODULES, prompts, random_model, run, said, weights_of
from ultraedit_kernels.method.change import Change, Turn
from ultraedit_kernels.method.goals import Goals
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import Anchors, captures
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.method.shield import System
from ultraedit_kernels.method.step import MAX_STEP, Positions
from ultraedit_kernels.method.turn import turn
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.settings import MethodSettings

ASKED = prompts(4, seed=1)
TAUGHT = [Sequence(p, t) for p, t in zip(ASKED, [[7, 8], [7, 8], [9, 10], [8, 7]], strict=True)]
EDIT_OF = [0, 0, 1, 2]
"""The first edit is taught in two phrasings."""


@pytest.fixture
def model() -> Any:
    return random_model()


def one_turn(
    model: Any,
    sequences: list[Sequence],
    edit_of: list[int],
    settings: MethodSettings,
    anchors: Anchors | None = None,
    number: int = 1,
) -> tuple[list[Phase], Turn]:
    weights = weights_of(model)
    start = {name: weight.clone() for name, weight in weights.items()}
    empty = {n: Statistics.empty(w.shape[1], w.shape[0]) for n, w in weights.items()}
    anchors = Anchors.empty(weights) if anchors is None else anchors
    share = {name: name for name in weights}
    goals = Goals(sequences, edit_of, settings.margin)
    work = turn(model, weights, start, goals, empty, share, anchors, settings, number)
    phases, result = run(work)
    for name, weight in weights.items():  # a replay gives the same bits
        result.delta[name].apply(start[name])
        assert torch.equal(start[name], weight)
    return phases, result


def watching(model: Any, texts: list[Sequence], own: int) -> Anchors:
    anchors = Anchors.empty(weights_of(model))
    watch = anchors.watch
    for part, captured in captures(model, texts, MODULES):
        watch = watch.join(Watch.of(captured, dict(enumerate(part))))
    return replace(anchors, watch=replace(watch, own=own))


def test_one_round_is_the_published_formula(model):
    lr, ridge = 1e-3, 0.7
    before = {name: weight.clone() for name, weight in weights_of(model).items()}
    captured = capture(model, TAUGHT, MODULES)
    phases, result = one_turn(
        model, TAUGHT, EDIT_OF, MethodSettings(lr=lr, rounds=1, ridge=ridge, margin=0.0)
    )
    for name in MODULES:
        keys, grads = captured.keys[name], captured.grads[name]
        z = torch.cat([keys, grads], dim=1)
        z = (z - z.mean(0)) / (z.std(0) + 2.0**-23)
        h, g = z[:, : keys.shape[1]], z[:, keys.shape[1] :]
        values = -lr * h.square().sum(1, keepdim=True) * g
        eye = torch.eye(keys.shape[1], dtype=torch.float64)
        change = torch.linalg.solve(keys.T @ keys + ridge * eye, keys.T @ values).T
        got = model.get_submodule(name).weight.data - before[name]
        assert torch.allclose(got, change, rtol=1e-5, atol=1e-7 * float(change.abs().max()))
        assert result.statistics[name].count == len(keys)
    assert [edit.rounds for edit in result.edits] == [1, 1, 1]
    assert set(phases) == {"capture", "solve"}  # a phase is the text that it is written as


def test_a_turn_ends_when_every_edit_holds(model):
    settings = MethodSettings(batch_size=3, margin=4.2)
    _, result = one_turn(model, TAUGHT, EDIT_OF, settings)
    after = capture(model, TAUGHT, MODULES)
    least = [float(after.margin[after.owner == i].min()) for i in range(4)]
    assert all(edit.holds and 1 <= edit.rounds < settings.rounds for edit in result.edits)
    assert [edit.margin for edit in result.edits] == pytest.approx(
        [min(least[:2]), least[2], least[3]]
    )
    assert result.edits[0].margin > settings.margin / 2 and min(least[2:]) > settings.margin
    assert result.watch.sequences == TAUGHT and result.watch.own == 0
    for name in MODULES:
        assert torch.allclose(result.held[name], after.keys[name])
    assert (result.checked, result.broken, result.repaired, result.released) == (0, 0, 0, [])


def test_what_holds_already_takes_no_step(model):
    known = max(
        said(model, prompts(32, 3)),
        key=lambda s: float(capture(model, [s], MODULES, backward=False).margin.min()),
    )
    margin = float(capture(model, [known], MODULES, backward=False).margin.min()) / 2
    phases, result = one_turn(model, [known], [0], MethodSettings(margin=margin))
    assert result.edits[0].holds and result.edits[0].rounds == 0
    assert all(len(factor.coeff) == 0 for factor in result.delta.values())
    assert phases.count(Phase.CAPTURE) == 1
    _, result = one_turn(model, [known, TAUGHT[0]], [0, 1], MethodSettings(margin=margin))
    assert result.edits[0].rounds < result.edits[1].rounds


def test_edits_that_contradict_each_other_do_not_hold_and_are_not_kept(model):
    prompt = TAUGHT[0].prompt_ids
    sequences = [Sequence(prompt, [5]), Sequence(prompt, [6]), TAUGHT[2]]
    settings = MethodSettings(rounds=5)
    _, result = one_turn(model, sequences, [0, 1, 2], settings)
    assert not (result.edits[0].holds and result.edits[1].holds)
    assert max(edit.rounds for edit in result.edits) == settings.rounds
    kept = [s for s, edit in zip(sequences, result.edits, strict=True) if edit.holds]
    assert result.watch.sequences == kept


def test_what_a_turn_breaks_it_repairs(model):
    texts = said(model, prompts(40, 5), tokens=1)
    lead = capture(model, texts, MODULES, backward=False).margin
    texts = [texts[i] for i in lead.argsort(descending=True)[:12].tolist()]
    anchors = watching(model, texts, own=0)
    lost = {}
    for repairs in (0, 200):
        model = random_model()
        settings = MethodSettings(repairs=repairs, margin=1.5)
        _, result = one_turn(model, TAUGHT[2:], [0, 1], settings, anchors)
        assert all(edit.holds for edit in result.edits)
        after = capture(model, texts, MODULES, backward=False).margin
        lost[repairs] = int((after < 0).sum())
        if repairs:
            assert 0 < result.broken <= result.checked and result.repaired == result.broken
            # Repaired ones have the lead that they have now.
            assert torch.isclose(result.watched.lead.double(), after, atol=1e-4).sum() >= (
                result.broken
            )
            assert (result.watched.drift <= 0).all()
        else:
            assert (result.checked, result.broken) == (0, 0) and result.watched is anchors.watch
    assert lost[0] > 0 == lost[200]


def test_a_prompt_that_is_taught_anew_is_let_go(model):
    texts = said(model, prompts(3, 5))
    anew = Sequence(texts[1].prompt_ids, TAUGHT[0].target_ids)
    _, result = one_turn(model, [anew], [0], MethodSettings(), watching(model, texts, own=1))
    assert 1 in result.released and result.edits[0].holds


def test_shielded_keys_keep_their_outputs(model):
    texts = said(model, prompts(2, 7))
    weights = weights_of(model)
    before = {name: weight.clone() for name, weight in weights.items()}
    keys = capture(model, texts, MODULES, backward=False).keys
    anchors = Anchors.empty(weights).hold(keys, 1e-6, 64)
    _, result = one_turn(model, TAUGHT[2:], [0, 1], MethodSettings(margin=4.2), anchors)
    assert all(edit.holds for edit in result.edits)
    for name, rows in keys.items():
        change = weights[name] - before[name]
        random = torch.randn(8, rows.shape[1], dtype=rows.dtype)
        moved = (rows @ change.T).norm() / rows.norm()
        assert moved < 1e-4 * (random @ change.T).norm() / random.norm()


def test_steps_at_names_are_solved_together(model):
    # What two phrasings of an edit ask at its name is one value, and the change has a row for each.
    placed = [replace(sequence, places=(1,)) for sequence in TAUGHT]
    settings = MethodSettings(step=0.25, rounds=24, ridge=1e-6, margin=0.5, repairs=0)
    _, result = one_turn(model, placed, EDIT_OF, settings)
    assert all(edit.rounds > 1 for edit in result.edits)
    first = MODULES[0]  # nothing below it is changed, so neither are its keys
    for name in MODULES:
        assert len(result.delta[name].keys) == len(placed)
    keys = capture(model, placed, [first], backward=False).keys[first]
    factor = result.delta[first]
    moved = keys @ factor.keys.T @ factor.coeff
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-4, atol=1e-4 * float(moved.norm()))
    assert not torch.allclose(moved[0], moved[2], rtol=0.1)


def test_a_step_at_names_is_bounded(model):
    name, weights = MODULES[0], weights_of(model)
    weight, start = weights[name], {n: w.clone() for n, w in weights.items()}
    change = Change(weights, start, {}, {}, MethodSettings(), 1)
    torch.manual_seed(0)
    keys, none = torch.randn(3, weight.shape[1]).double(), torch.zeros(0, weight.shape[1]).double()
    system = System(keys, 1e-9, none)
    values = torch.randn(2, weight.shape[0]).double()[[0, 1, 1]]
    at = Positions(torch.tensor([0, 1, 1]), torch.ones(3), 2)
    for taken in (1, 2):  # each asks for far more than a step may take
        change.ask(name, 1e3 * values, system, at)
        moved = (weight - start[name]).norm() / start[name].norm()
        assert float(moved) == pytest.approx(taken * MAX_STEP, rel=1e-3)
    assert len(change.delta[name].keys) == 3
