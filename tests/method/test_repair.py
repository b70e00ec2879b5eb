"""The watch list: what a turn threatens, checks, repairs and lets go."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import WEAK_EDIT, WEAK_TEXT, Repairs, Watch, weakest
from ultraedit_kernels.model.capture import Captured, capture
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
        repairs = Repairs(watch, none, [], budget=1, others=1, number=number)
        steps = repairs.check(model, MODULES, nothing, 8)
        while next(steps, None) is not None:
            pass
        checked.append(repairs.checked)
    assert watch.own == 0 and checked == [1] * 4
    texts = replace(watch, own=len(watch))  # texts of the model's own have no turns
    for repairs in (Repairs(texts, none, [], budget=1, others=1), Repairs(watch, none, [], 1)):
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


def plain(leads: list[float], own: int = 0) -> Watch:
    """Sequences of one token each; the change of one row moves the lead of one token alone."""
    n = len(leads)
    sequences = [Sequence([40 + i], [i]) for i in range(n)]
    order, unit = torch.arange(n), torch.eye(n)
    lead = torch.tensor(leads)
    return Watch(
        sequences, own, order, 0 * order, {"a": unit}, {"a": torch.ones(n, 2)}, lead, 0 * lead
    )


@pytest.mark.parametrize("rank", [1, 50])  # the change itself is the smaller matrix, or is not
def test_shift_is_the_slope_times_the_change_times_the_key(rank):
    generator = torch.Generator().manual_seed(rank)
    keys, slopes = (torch.randn(6, d, generator=generator) for d in (9, 5))
    coeff, rows = (torch.randn(rank, d, generator=generator) for d in (5, 9))
    watch = replace(plain([1.0] * 6), keys={"a": keys}, slopes={"a": slopes})
    change = coeff.double().T @ rows.double()
    expected = (slopes.double() * (keys.double() @ change.T)).sum(1)
    got = watch.shift("a", LowRank(coeff, rows))
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_threat_counts_what_is_lost_since_the_lead_was_measured():
    watch = replace(plain([2.0, 2.0, 0.1, -1.0]), drift=torch.tensor([0.0, -0.5, 0.0, 0.0]))
    shift = torch.tensor([-1.0, -0.5, -0.15, 5.0])
    assert watch.threat(shift).tolist() == pytest.approx([0.5, 0.5, 0.5, 1.0])
    two = replace(watch, sequences=watch.sequences[:2], owner=torch.tensor([0, 0, 1, 1]))
    assert two.threat(shift).tolist() == pytest.approx([0.5, 1.0])


def checked_of(repairs: Repairs, lost: list[float], monkeypatch) -> list[int]:
    """What a look at the watch runs through the model, which lets nothing break."""
    asked: list[int] = []

    def nothing_breaks(_model, sequences, _modules, backward):
        asked.extend(s.target_ids[0] for s in sequences)
        n = len(sequences)
        order, none = torch.arange(n), {"a": torch.zeros(n, 0)}
        lead = torch.full((n,), 9.0)
        return Captured(none, {}, order, order, lead, lead, lead, order, order, len(order))

    monkeypatch.setattr("ultraedit_kernels.method.repair.capture", nothing_breaks)
    rows = -torch.diag(torch.tensor(lost)) / 2
    for _ in repairs.check(None, ["a"], {"a": LowRank(torch.ones(len(lost), 2), rows)}, 2):
        pass
    return asked


def test_the_most_threatened_are_checked_and_edits_first(monkeypatch):
    leads, lost = [4.0] * 6, [3.0, 0.1, 2.0, 1.0, 2.5, 0.2]
    shields = {"a": torch.zeros(0, 6, dtype=torch.float64)}
    repairs = Repairs(plain(leads, own=3), shields, [], budget=2, others=2, number=1)
    # The two most threatened edits, then those whose turn it is: of three, every second.
    assert checked_of(repairs, lost, monkeypatch) == [4, 3, 5]
    assert repairs.checked == 3 and repairs.due == 2
    # Their leads were measured, so that the same change threatens them no more; texts have no
    # second look.
    assert checked_of(repairs, lost, monkeypatch) == []
    assert repairs.watch.lead.tolist() == [4, 4, 4, 9, 9, 9]
    assert torch.allclose(repairs.watch.drift, torch.tensor([0, 0, 0, 1.0, 2.5, 0.2]))
    texts = Repairs(plain(leads, own=6), shields, [Sequence([40], [1])], budget=3, number=1)
    assert checked_of(texts, lost, monkeypatch) == [4, 2, 3]  # the first is taught anew
    assert texts.released == [0]


def test_settled_leads_lose_but_never_gain():
    watch = plain([4.0, 4.0, 4.0])
    repairs = Repairs(watch, {"a": torch.zeros(0, 3, dtype=torch.float64)}, [], budget=1)
    change = {"a": LowRank(torch.ones(3, 2), torch.diag(torch.tensor([-0.5, 0.5, 1.0])))}
    order, lead = torch.arange(1), torch.tensor([7.0])
    again = Captured({}, {}, order, order, lead, lead, lead, order, order, len(order))
    settle = repairs.settle(change, [(again, {0: 2})])
    with pytest.raises(StopIteration) as done:
        while True:
            next(settle)
    settled = done.value.value
    assert settled.lead.tolist() == [4, 4, 7]
    assert settled.drift.tolist() == [-1, 0, 0]
    assert watch.lead.tolist() == [4, 4, 4]
    given = watch.with_leads(torch.tensor([[1.0, 2.0], [-0.1, -0.2]]))
    assert given.lead.tolist() == [1, 2, 4]
    assert given.drift.tolist() == pytest.approx([-0.1, -0.2, 0])
