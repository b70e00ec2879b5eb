"""Goals: what a turn must make the model say, and what a pass through the model shows of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.repair import SURE, Watch
from ultraedit_kernels.method.step import Positions
from ultraedit_kernels.model.capture import Captured, capture
from ultraedit_kernels.model.encoding import Sequence, alike, worth_a_pass

LEAST_MARGIN = 1.0
"""Logits that no number of rephrases makes up for: what an engine's rounding may take."""
PATIENCE = 8
"""Steps after which a repair that does not hold is given up: it is at odds with an edit."""


@dataclass
class Goal:
    """An edit, in all its phrasings, its contexts, or the repair of a watched sequence that the
    turn broke."""

    wanted: float
    """Logits by which every token must lead for the goal to hold."""
    repairs: int | None = None
    """The index of the watched sequence that is repaired; None for an edit."""
    patience: int | None = None
    """Steps after which it is left as it is; None for never."""
    rounds: int = 0
    """Steps that were taken for it."""

    @property
    def given_up(self) -> bool:
        """Whether it is left as it is."""
        return self.patience is not None and self.rounds >= self.patience


@dataclass(frozen=True)
class Taught:
    """What became of one edit."""

    holds: bool
    """Whether every target token leads by the wanted margin, in every phrasing."""
    rounds: int
    """Steps that were taken for it."""
    loss: float
    """Remaining cross entropy, nats, summed over its target tokens and phrasings."""
    margin: float
    """Least lead of a target token over the runner-up, logits."""


@dataclass(frozen=True)
class Batch:
    """Sequences that were captured together."""

    captured: Captured
    sequences: list[Sequence]
    goal_of: list[int]
    """Per sequence, the goal that it belongs to."""

    def without(self, goals: Tensor) -> list[Batch]:
        """The batch without the sequences of these goals, [goals] bool; nothing if none is left."""
        kept = [i for i, goal in enumerate(self.goal_of) if not goals[goal]]
        if len(kept) in (0, len(self.goal_of)):
            return [self] if kept else []
        captured, sequences = self.captured.only(kept), [self.sequences[i] for i in kept]
        return [Batch(captured, sequences, [self.goal_of[i] for i in kept])]


@dataclass(frozen=True)
class Round:
    """What one pass through the model shows of all goals."""

    batches: list[Batch]
    modules: list[str]
    """In the order in which they are edited."""
    positions: Positions
    """Of the rows where the model is changed."""
    margin: Tensor
    """[goals] least lead of a token, logits."""
    loss: Tensor
    """[goals] cross entropy, nats, summed over tokens and phrasings."""
    objective: Tensor
    """[goals] the same with the wanted margin taken off, see `capture.Captured`."""
    stale: Tensor
    """[goals] bool, on the CPU: not looked at since the last step."""

    @classmethod
    def of(
        cls, batches: list[Batch], modules: list[str], goals: int, stale: Tensor | None = None
    ) -> Round:
        """What these batches show of so many goals."""
        captured = [batch.captured for batch in batches]
        rows, answers = (
            Positions(
                torch.cat([_goals(b, owner) for b, owner in zip(batches, owners, strict=True)]),
                torch.cat(
                    [
                        c.loss.new_full((len(owner),), c.averaged)
                        for c, owner in zip(captured, owners, strict=True)
                    ]
                ),
                goals,
            )
            for owners in ([c.row_owner for c in captured], [c.owner for c in captured])
        )
        margin = answers.reduce(torch.cat([c.margin for c in captured]), "amin")
        loss, objective = (
            answers.reduce(torch.cat(values), "sum")
            for values in ([c.loss for c in captured], [c.objective for c in captured])
        )
        if stale is None:
            stale = torch.zeros(goals, dtype=torch.bool)
        return cls(batches, modules, rows, margin, loss, objective, stale)

    def aged(self) -> Round:
        """The same, after a step."""
        return replace(self, stale=torch.ones_like(self.stale))

    @property
    def captured(self) -> list[Captured]:
        """The batches as they were captured."""
        return [batch.captured for batch in self.batches]

    @property
    def fresh(self) -> list[Captured]:
        """The batches that were captured with gradients since the last step."""
        return [
            batch.captured
            for batch in self.batches
            if batch.captured.grads and not any(self.stale[goal] for goal in batch.goal_of)
        ]

    def keys(self) -> dict[str, Tensor]:
        """Module → keys at all positions, [n, d_in]."""
        return {n: torch.cat([c.keys[n] for c in self.captured]) for n in self.modules}

    def grads(self) -> dict[str, Tensor]:
        """Module → gradients at all positions, [n, d_out]; those that were not captured with
        gradients have none, and zeros."""
        widths = {n: g.shape[1] for c in self.captured for n, g in c.grads.items()}
        return {
            n: torch.cat(
                [
                    c.grads[n] if c.grads else c.keys[n].new_zeros(len(c.keys[n]), widths[n])
                    for c in self.captured
                ]
            )
            for n in self.modules
        }


def _goals(batch: Batch, owner: Tensor) -> Tensor:
    """The goal of each row, of which `owner` [rows] says the sequence in the batch."""
    return torch.tensor(batch.goal_of, device=owner.device)[owner]


class Goals:
    """The goals of a turn, edits first, and the sequences that they consist of.

    Args:
        sequences: what must be said, as tokens.
        edit_of: per sequence, the edit that it teaches.
        margin: the lead asked of an edit in one phrasing, logits.
        contexts: sequences that say an edit's target after further text, by the edit: goals of
            their own, which the edit holds without.
    """

    def __init__(
        self,
        sequences: Seq[Sequence],
        edit_of: Seq[int],
        margin: float,
        contexts: Mapping[int, Seq[Sequence]] | None = None,
    ) -> None:
        self._goal_of, self._margin = list(edit_of), margin
        self.sequences = list(sequences)
        """All of them; those of repairs come last."""
        counts = [self._goal_of.count(edit) for edit in range(max(edit_of) + 1)]
        self.edits = [Goal(wanted_margin(margin, phrasings)) for phrasings in counts]
        self.contexts: list[Goal] = []
        self.repairs: list[Goal] = []
        self._context_of = list(contexts or {})
        for texts in (contexts or {}).values():
            self.sequences += texts
            self._goal_of += [len(self.all)] * len(texts)
            self.contexts.append(Goal(min(margin, LEAST_MARGIN), patience=PATIENCE))

    @property
    def all(self) -> list[Goal]:
        """Edits, contexts and repairs, in the order of `Round.margin`."""
        return self.edits + self.contexts + self.repairs

    def repair(self, broken: Seq[int], watch: Watch) -> None:
        """Take on the watched sequences of these indices as further goals."""
        for i in broken:
            self.sequences.append(watch.sequences[i])
            self._goal_of.append(len(self.all))
            # An edit that broke once is as likely to break again as its lead is short.
            wanted = SURE if i < watch.own else self._margin
            self.repairs.append(Goal(wanted, repairs=i, patience=PATIENCE))

    def named(self, at: Positions) -> Positions:
        """The positions, each of the edit whose name it is: a context's of its edit, a repair's of
        itself."""
        owner = [*range(len(self.edits)), *self._context_of]
        owner += range(len(owner), len(self.all))
        return replace(at, goal=torch.tensor(owner, device=at.goal.device)[at.goal])

    @property
    def rest(self) -> bool:
        """Whether goals that hold are looked at only in the end. What watches the leads of edits at
        answer positions needs their gradients there."""
        return any(sequence.places for sequence in self.sequences)

    def capture(
        self,
        model: nn.Module,
        modules: Seq[str],
        batch_size: int,
        last: Round | None = None,
        which: Tensor | None = None,
        backward: bool = True,
    ) -> Generator[Phase, None, Round]:
        """Run sequences through the model, and read the modules.

        Args:
            model: the model, as it is now.
            modules: dotted names.
            batch_size: sequences at a time.
            last: what is known of the goals that are not run; of none if these do not rest.
            which: [goals] bool, those that are run; by default those of which nothing is known.
            backward: also compute the gradients.
        """
        goals, batches = self.all, []
        stale = torch.zeros(len(goals), dtype=torch.bool)
        if last is None or not self.rest:
            which = torch.ones_like(stale)
        else:
            known = len(last.stale)
            which = torch.arange(len(goals)) >= known if which is None else which.cpu()
            batches = [left for batch in last.batches for left in batch.without(which)]
            stale[:known] = last.stale & ~which[:known]
        chosen = [i for i, goal in enumerate(self._goal_of) if which[goal]]
        for picked in self._batches(model, chosen, batch_size, backward):
            part = [self.sequences[i] for i in picked]
            goal_of = [self._goal_of[i] for i in picked]
            margins = [goals[goal].wanted for goal in goal_of]
            # After the last step of a turn, or the first look at one that need not step.
            own = set(goal_of)
            whole = sum(goal in own for goal in self._goal_of) == len(picked)
            captured = capture(
                model,
                part,
                modules,
                margin=margins,
                backward=backward,
                unless_led=self.rest and whole,
            )
            batches.append(Batch(captured, part, goal_of))
            yield Phase.CAPTURE
        return Round.of(batches, list(modules), len(goals), stale)

    def _batches(
        self, model: nn.Module, chosen: Seq[int], size: int, backward: bool
    ) -> list[list[int]]:
        """The chosen sequences in batches of at most `size`."""
        if not self.rest:
            return [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        sequences = [self.sequences[i] for i in chosen]
        # What is changed, and what follows, is run there and back; what stands before it, there.
        costs = [(s.before, 2 * (len(s) - s.before)) if backward else (len(s),) for s in sequences]
        worth = worth_a_pass(next(model.parameters()).device) * (1 + backward)
        return [[chosen[i] for i in part] for part in alike(costs, size, worth)]

    def review(
        self, model: nn.Module, modules: Seq[str], batch_size: int, seen: Round
    ) -> Generator[Phase, None, Round]:
        """Look at the goals that rested, and capture those that do not hold any more."""
        which = self.unseen(seen)
        run = yield from self.capture(model, modules, batch_size, seen, which, backward=False)
        lost = which & ~self.hold(run).cpu()
        if not lost.any():
            return run
        return (yield from self.capture(model, modules, batch_size, run, lost))

    def unseen(self, seen: Round) -> Tensor:
        """[goals] bool, on the CPU: which are to be looked at before a turn may end. A context is
        not: an edit holds without it."""
        stale = seen.stale.clone()
        stale[len(self.edits) : len(self.edits) + len(self.contexts)] = False
        return stale

    def hold(self, seen: Round) -> Tensor:
        """[goals] bool: which of them hold, or are given up."""
        goals, margin = self.all, seen.margin
        holds = margin > margin.new_tensor([goal.wanted for goal in goals])
        return holds | torch.tensor([goal.given_up for goal in goals], device=holds.device)

    def count(self, steps: Tensor) -> None:
        """Count a step for each goal that takes it, [goals] bool."""
        for goal, takes in zip(self.all, steps.tolist(), strict=True):
            goal.rounds += takes

    def repairs_in(self, seen: Round) -> list[tuple[Captured, dict[int, int]]]:
        """Each batch, and for its repairs: place in the batch → watched sequence."""
        goals, found = self.all, []
        for batch in seen.batches:
            repairs = [goals[goal].repairs for goal in batch.goal_of]
            found.append((batch.captured, {j: i for j, i in enumerate(repairs) if i is not None}))
        return found

    def repaired(self, seen: Round) -> int:
        """How many repairs lead again."""
        return int((seen.margin[len(self.edits) + len(self.contexts) :] > 0).sum())

    def taught(self, seen: Round, holds: Tensor) -> list[Taught]:
        """What became of each edit."""
        of_all = zip(holds.tolist(), seen.loss.tolist(), seen.margin.tolist(), strict=True)
        edits = zip(self.edits, of_all, strict=False)
        return [Taught(held, edit.rounds, loss, margin) for edit, (held, loss, margin) in edits]

    def held_keys(self, seen: Round, holds: Tensor) -> dict[str, Tensor]:
        """Module → keys [m, d_in] of the edits that hold."""
        goal = seen.positions.goal
        held = holds[goal] & (goal < len(self.edits) + len(self.contexts))
        return {name: keys[held] for name, keys in seen.keys().items()}

    def watch(self, seen: Round, holds: Tensor, weights: Mapping[str, Tensor]) -> Watch:
        """The edits that hold, to be watched from now on; weights [d_out, d_in]."""
        watch = Watch.empty(weights)
        for batch in seen.batches:
            new = {
                j: batch.sequences[j]
                for j, goal in enumerate(batch.goal_of)
                if goal < len(self.edits) and holds[goal]
            }
            if self.rest:  # no first-order change of their leads is known
                watch = replace(watch, sequences=[*watch.sequences, *new.values()])
            else:
                watch = watch.join(Watch.of(batch.captured, new))
        return watch


def wanted_margin(margin: float, phrasings: int) -> float:
    """The lead asked of an edit that is taught in that many phrasings."""
    return max(margin / phrasings, min(margin, LEAST_MARGIN))
