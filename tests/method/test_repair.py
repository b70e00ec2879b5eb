"""The watch list: what a turn threatens, checks, repairs and lets go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import WEAK_EDIT, WEAK_TEXT, Repairs, Watch, weakest
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.store.delta import LowRank

MODULES = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
SAID = {
    "The capital of France is": "Paris",
    "The capital of Austria is": "Vienna",
    "The author of Macbeth is": "William Shakespeare",
    "The chemical symbol of oxygen is": "O",
}


@pytest.fixture
def sequences(tokenizer):
    return [encode(tokenizer, prompt, answer) for prompt, answer in SAID.items()]


@pytest.fixture
def watch(model, sequences) -> Watch:
    captured = capture(model, sequences, MODULES, margin=20.0)
    rows = [row for rows in weakest(captured) for row in rows]
    return Watch.of(captured, dict(enumerate(sequences)), rows)


@pytest.fixture
def weights(model):
    return {name: model.get_submodule(name).weight.data for name in MODULES}


def against(watch: Watch, sequence: int, size: float) -> dict[str, LowRank]:
    """A change of the last module alone that lowers the leads of one sequence."""
    delta = {n: LowRank.empty(torch.zeros(128, 384)) for n in MODULES}
    rows = watch.owner == sequence
    keys = watch.keys[MODULES[-1]][rows]
    slopes = watch.slopes[MODULES[-1]][rows]
    unit = keys.square().sum(1, keepdim=True) * slopes.square().sum(1, keepdim=True)
    delta[MODULES[-1]] = LowRank(-size * slopes / unit, keys)
    return delta


def test_threat_is_the_share_of_the_lead_a_small_change_takes(model, weights, watch, sequences):
    for i in range(len(sequences)):
        delta = against(watch, i, 0.02)
        threat = watch.threat(sum(watch.shift(name, factor) for name, factor in delta.items()))
        for name, factor in delta.items():
            factor.apply(weights[name])
        after = capture(model, sequences, MODULES, backward=False).margin
        for name, factor in delta.items():
            LowRank(-factor.coeff, factor.keys).apply(weights[name])
        before = capture(model, sequences, MODULES, backward=False)
        lost = (before.margin - after) / before.margin
        rows = weakest(before)
        true = torch.stack([lost[rows[j]].max().clamp_min(0) for j in range(len(sequences))])
        assert threat.argmax() == i
        assert torch.allclose(threat[i], true[i], rtol=0.3)


def test_check_finds_what_broke_and_lets_go_what_was_asked_for(
    model, tokenizer, weights, watch, sequences
):
    delta = against(watch, 0, 30.0)
    for name, factor in delta.items():
        factor.apply(weights[name])
    broken = capture(model, sequences, MODULES, backward=False)
    first = int((broken.margin < 0).nonzero()[0])
    assert broken.owner[first] == 0

    def check(repairs: Repairs) -> list[int]:
        steps = repairs.check(model, MODULES, delta, 8)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                return done.value

    none, texts = Anchors.empty(weights).keys, replace(watch, own=len(watch))
    repairs = Repairs(watch, none, [], 10)
    found = check(repairs)
    assert 0 in found and repairs.released == [] and repairs.checked >= 1
    assert 0 not in check(repairs)  # it is being repaired already
    assert Repairs(watch, none, [], 0).due == 0
    # What is said now is what an edit of the same prompt says; one of another prompt says it
    # elsewhere. Both of this turn, and of an earlier one.
    for prompt, mine in (("The capital of France is", True), ("The author of Hamlet is", False)):
        edit = Sequence(tokenizer(prompt)["input_ids"], [int(broken.rival[first])])
        asked, edits = Repairs(texts, none, [], 10), Repairs(watch, none, [], 10)
        for name, factor in delta.items():
            LowRank(-factor.coeff, factor.keys).apply(weights[name])
        before = capture(model, [edit], MODULES, backward=False)
        asked.expect(before)
        edits.expect(before)
        for name, factor in delta.items():
            factor.apply(weights[name])
        earlier = Watch.of(capture(model, [edit], MODULES), {0: edit}, [0])
        for repairs in (asked, edits, Repairs(texts.join(earlier), none, [], 10)):
            assert (0 not in check(repairs)) == mine
            assert repairs.released == ([0] if mine else [])
        # An edit is let go for one of the turn alone.
        repairs = Repairs(watch.join(earlier), none, [], 10)
        assert 0 in check(repairs) and repairs.released == []
    # A prompt that is taught anew is let go at once.
    assert Repairs(watch, none, [sequences[2]], 10).released == [2]


def test_texts_of_its_own_are_repaired_before_they_break(model, weights, watch, sequences):
    sure = [i for i in range(len(watch)) if watch.lead[watch.owner == i].min() > 2 * WEAK_TEXT]
    assert sure
    lead = float(watch.lead[watch.owner == sure[0]].min())
    delta = against(watch, sure[0], lead - 0.7 * WEAK_TEXT)  # nearly all of its weakest lead
    for name, factor in delta.items():
        factor.apply(weights[name])
    after = capture(model, [sequences[sure[0]]], MODULES, backward=False).margin.min()
    assert WEAK_EDIT < after < WEAK_TEXT
    none = Anchors.empty(weights).keys
    for own, broke in ((len(watch), True), (0, False)):  # an edit that still holds well is left
        repairs = Repairs(replace(watch, own=own), none, [], 10)
        for _ in repairs.check(model, MODULES, delta, 8):
            pass
        assert (sure[0] in repairs.broken) == broke


def test_edits_that_nothing_threatens_are_checked_in_turn(model, weights, watch):
    none, nothing = Anchors.empty(weights).keys, {n: LowRank.empty(w) for n, w in weights.items()}
    checked = []
    for number in range(4):
        repairs = Repairs(watch, none, [], budget=1, number=number)
        steps = repairs.check(model, MODULES, nothing, 8)
        while next(steps, None) is not None:
            pass
        checked.append(repairs.checked)
    assert watch.own == 0 and checked == [1] * 4
    texts = replace(watch, own=len(watch))  # texts of the model's own have no turns
    repairs = Repairs(texts, none, [], budget=1)
    for _ in repairs.check(model, MODULES, nothing, 8):
        pass
    assert repairs.checked == 0


def test_join_without_and_the_file_form(watch):
    both = watch.join(watch)
    assert len(both) == 8 and both.owner.max() == 7
    rest = both.without([0, 1, 2, 3])
    assert rest.sequences == watch.sequences
    again = Watch.from_tensors(rest.tensors())
    for one in (rest, again):
        assert torch.equal(one.owner, watch.owner) and torch.equal(one.lead, watch.lead)
        for name in MODULES:
            assert torch.equal(one.keys[name], watch.keys[name])
            assert torch.equal(one.slopes[name], watch.slopes[name])
    assert again.sequences == watch.sequences
    some = both.without([0, 5])
    assert [some.sequences[i] for i in some.owner.unique()] == some.sequences
    none = Watch.empty({name: torch.zeros(2, 3) for name in MODULES})
    assert len(Watch.from_tensors(none.tensors())) == 0
