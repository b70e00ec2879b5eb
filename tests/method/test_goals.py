"""Goals: which sequences a turn teaches or repairs, and what a pass shows of them."""

from __future__ import annotations

import pytest
import torch

from tests.method.small import MODULES, prompts, random_model, run
from ultraedit_kernels.method.goals import (
    LEAST_MARGIN,
    PATIENCE,
    Batch,
    Goals,
    Round,
    wanted_margin,
)
from ultraedit_kernels.method.repair import SURE, Watch
from ultraedit_kernels.model.capture import Captured
from ultraedit_kernels.model.encoding import Sequence

SEQUENCES = [Sequence([1, i], [i, i + 1]) for i in range(4)]
EDIT_OF = [0, 0, 1, 2]
WEIGHTS = {"a": torch.zeros(3, 2)}


def captured(margins: list[list[float]]) -> Captured:
    """A batch whose sequences have tokens with these margins; loss and objective count rows."""
    flat = torch.tensor([m for one in margins for m in one])
    owner = torch.arange(len(margins)).repeat_interleave(torch.tensor([len(m) for m in margins]))
    count = torch.arange(1.0, len(flat) + 1)
    ids = torch.zeros_like(owner)
    keys, grads = count[:, None] * torch.ones(2), count[:, None] * torch.ones(3)
    return Captured(
        {"a": keys}, {"a": grads}, owner, owner, count, 2 * count, flat, ids, ids, len(flat)
    )


def seen(goals: Goals, *margins: list[list[float]], goal_of: list[list[int]]) -> Round:
    batches = [
        Batch(captured(each), [SEQUENCES[i % 4] for i in of], of)
        for each, of in zip(margins, goal_of, strict=True)
    ]
    return Round.of(batches, ["a"], len(goals.all))


def watch(texts: int, edits: int) -> Watch:
    """So many texts of the model's own, then earlier edits, of one token each."""
    made = [Sequence([9], [i]) for i in range(texts + edits)]
    owner, lead = torch.arange(len(made)), torch.ones(len(made))
    keys, slopes = {"a": torch.zeros(len(made), 2)}, {"a": torch.zeros(len(made), 3)}
    return Watch(made, texts, owner, 0 * owner, keys, slopes, lead, 0 * lead)


def test_a_round_gathers_all_phrasings_of_a_goal_over_batches():
    goals = Goals(SEQUENCES, EDIT_OF, 4.0)
    found = seen(goals, [[3.0, 1], [2]], [[5, 4], [6.0]], goal_of=[[0, 0], [1, 2]])
    assert found.positions.goal.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.positions.tokens.tolist() == [3] * 6
    assert found.margin.tolist() == [1, 4, 6]
    assert found.loss.tolist() == [6, 3, 3] and found.objective.tolist() == [12, 6, 6]
    assert found.keys()["a"].shape == (6, 2) and found.grads()["a"].shape == (6, 3)


def test_edits_hold_by_their_own_margins_and_repairs_are_given_up():
    goals = Goals(SEQUENCES, EDIT_OF, 4.0)
    assert [edit.wanted for edit in goals.edits] == [2, 4, 4]
    goals.repair([1, 0], watch(texts=1, edits=1))
    assert [goal.wanted for goal in goals.repairs] == [4, SURE]
    assert [goal.repairs for goal in goals.all] == [None] * 3 + [1, 0]
    found = seen(goals, [[2.5], [2.1], [3.9], [-1]], [[4.5], [-2]], goal_of=[[0, 0, 1, 2], [3, 4]])
    assert goals.hold(found).tolist() == [True, False, False, True, False]
    assert goals.repaired(found) == 1
    assert [index for _, index in goals.repairs_in(found)] == [{}, {0: 1, 1: 0}]
    for _ in range(PATIENCE):
        goals.count(~torch.tensor([True, False, False, True, False]))
    assert [goal.rounds for goal in goals.all] == [0, PATIENCE, PATIENCE, 0, PATIENCE]
    assert goals.hold(found).tolist() == [True, False, False, True, True]  # edits are not


def test_what_holds_is_kept():
    goals = Goals(SEQUENCES, EDIT_OF, 4.0)
    goals.repair([0], watch(texts=0, edits=1))
    found = seen(goals, [[2.5, 3], [2.1]], [[3.9], [8, 9]], [[9.0]], goal_of=[[0, 0], [1, 2], [3]])
    holds = goals.hold(found)
    assert holds.tolist() == [True, False, True, True]
    kept = goals.held_keys(found, holds)["a"]
    assert kept[:, 0].tolist() == [1, 2, 3, 2, 3]
    watched = goals.watch(found, holds, WEIGHTS)
    assert watched.sequences == [SEQUENCES[0], SEQUENCES[0], SEQUENCES[2]]
    assert watched.owner.tolist() == [0, 0, 1, 2, 2]
    taught = goals.taught(found, holds)
    assert [(one.holds, one.rounds) for one in taught] == [(True, 0), (False, 0), (True, 0)]
    assert [one.margin for one in taught] == pytest.approx([2.1, 3.9, 8])
    assert [one.loss for one in taught] == [6, 1, 5]


def test_rephrases_lower_the_margin_that_is_asked_for():
    assert wanted_margin(4.2, 1) == 4.2
    assert wanted_margin(4.2, 2) == 2.1
    assert wanted_margin(4.2, 100) == LEAST_MARGIN
    assert wanted_margin(0.5, 100) == 0.5  # less is asked of all


def test_contexts_are_named_as_their_edit_and_repairs_for_themselves():
    goals = Goals(SEQUENCES[:2], [0, 1], 4.0, {1: [SEQUENCES[2], SEQUENCES[3]]})
    goals.repair([0], watch(texts=0, edits=1))
    found = seen(goals, [[1.0], [2], [3], [4], [5]], goal_of=[[0, 1, 2, 2, 3]])
    assert goals.named(found.positions).goal.tolist() == [0, 1, 1, 1, 3]


def test_goals_that_were_not_run_keep_what_was_known_of_them():
    model = random_model()
    placed = [Sequence(ids, [5, 6], places=(1,)) for ids in prompts(3, seed=1)]
    goals = Goals(placed, [0, 1, 2], 4.0)

    def last(work):
        return run(work)[1]

    first = last(goals.capture(model, MODULES, 2))
    assert not first.stale.any() and goals.rest
    which = torch.tensor([True, False, False])
    again = last(goals.capture(model, MODULES, 2, first.aged(), which))
    assert again.stale.tolist() == [False, True, True]
    assert torch.allclose(again.margin, first.margin, atol=1e-5)
    assert len(again.fresh) == 1 and len(again.keys()[MODULES[0]]) == 3
    review = last(goals.review(model, MODULES, 2, again))
    assert not review.stale.any()
    # What does not hold was captured with gradients, after the look without.
    assert all(batch.captured.grads for batch in review.batches)


def test_a_context_that_held_is_not_looked_at_again():
    goals = Goals(SEQUENCES[:2], [0, 1], 4.0, {1: [SEQUENCES[2]]})
    goals.repair([0], watch(texts=0, edits=1))
    found = seen(goals, [[1.0], [2], [3], [4]], goal_of=[[0, 1, 2, 3]])
    assert not goals.unseen(found).any()
    assert goals.unseen(found.aged()).tolist() == [True, True, False, True]


@pytest.mark.parametrize("phrasings", [1, 2])
def test_gradients_are_spared_where_all_of_the_goals_of_a_batch_are_in_it_and_lead(phrasings):
    model, batch_size = random_model(), 2 // phrasings
    wanted = Sequence(prompts(1, seed=1)[0], [5, 6], places=(1,))
    goals = Goals([wanted] * 2, [0, 0] if phrasings == 2 else [0, 1], -1e6)  # anything leads
    _, found = run(goals.capture(model, MODULES, batch_size))
    assert len(found.batches) == phrasings and bool(goals.hold(found).all())
    assert [bool(batch.captured.grads) for batch in found.batches] == [phrasings == 2] * phrasings
