"""What the model must go on saying: its own texts, prompts that an operator names, and the edits
that hold. A turn checks those that it threatens most, and repairs the ones that it broke.

To run all of them through the model in every turn would cost more than the edits do. So keys and
slopes are kept at their weakest tokens: to first order, the change of a turn moves the lead of such
a token by slope · ΔW key.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.shield import shielded
from ultraedit_kernels.model import encoding
from ultraedit_kernels.model.capture import Captured, capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.store.delta import LowRank

SURE = 3.0
"""Lead, logits, from which on the model means what it says, and that a repair of a text restores;
of an edit, the whole margin."""
WEAK_TEXT = 2.0
"""Lead, logits, below which a text of the model's own is repaired, though the model would say it
still: that keeps what is near to it, and not watched, as well."""
WEAK_EDIT = 0.5
"""Lead, logits, below which an earlier edit is repaired though it still holds."""
LEAST_LEAD = 0.3
"""Lead, logits, below which a threat grows no further."""
THREAT = 0.1
"""Share of a token's lead that a turn must take, to first order, before its sequence is checked."""
SAME_KEY = 0.5
"""Cosine of shielded keys, mean over the modules, from which on two prompts ask for the same fact.
Of texts that lost their lead to what an edit says, 10 % of those that ask for its fact had less
than 0.57, 10 % of the others more than 0.51 (200 edits of a small model of made-up facts)."""
CHECKS = 3
"""Times that a turn looks at what is watched: once every edit holds, and at edits after repairs."""
ROWS = 4
"""Tokens of a sequence that are kept, the weakest ones."""
SHIFT_ROWS = 1024
"""Tokens whose leads are shifted at a time."""


@dataclass(frozen=True)
class Watch:
    """Sequences, w in all, and the weakest tokens of each, r in all."""

    sequences: list[Sequence]
    own: int
    """Of them, how many come first that are texts of the model's own."""
    owner: Tensor
    """[r] int64: the sequence that each token belongs to."""
    place: Tensor
    """[r] int64: which of the sequence's target tokens it is."""
    keys: dict[str, Tensor]
    """Module → [r, d_in], where the token is predicted."""
    slopes: dict[str, Tensor]
    """Module → [r, d_out]: gradient of the token's lead with respect to the module's output."""
    lead: Tensor
    """[r] logits of the token over the runner-up when it was last run through the model."""
    drift: Tensor
    """[r] first-order change of the lead since then."""

    @classmethod
    def empty(cls, weights: Mapping[str, Tensor]) -> Watch:
        """Nothing is watched; weights [d_out, d_in]."""
        keys = {name: w.new_zeros(0, w.shape[1]) for name, w in weights.items()}
        slopes = {name: w.new_zeros(0, w.shape[0]) for name, w in weights.items()}
        owner = torch.zeros(0, dtype=torch.long, device=next(iter(weights.values())).device)
        return cls([], 0, owner, owner, keys, slopes, owner.float(), owner.float())

    @classmethod
    def of(
        cls, captured: Captured, sequences: Mapping[int, Sequence], rows: Seq[int] | None = None
    ) -> Watch:
        """Watch sequences of a captured batch.

        Args:
            captured: the batch, with gradients.
            sequences: those to watch, by their index in the batch.
            rows: of the batch, the tokens to keep; by default the weakest ones of each sequence.
                None of a sequence that is changed at other places than its answer positions: no
                first-order change of its leads is known.
        """
        elsewhere = any(sequence.places for sequence in sequences.values())
        if elsewhere or not captured.at_answers:
            keys, slopes = (
                {name: rows[:0] for name, rows in named.items()}
                for named in (captured.keys, captured.grads)
            )
            none = captured.owner[:0]
            lead = none.float()
            return cls(list(sequences.values()), 0, none, none, keys, slopes, lead, lead)
        if rows is None:
            kept = weakest(captured)
            rows = [row for i in sequences for row in kept[i]]
        at = torch.tensor(rows, dtype=torch.long, device=captured.margin.device)
        order = {index: i for i, index in enumerate(sequences)}
        owner = torch.tensor([order[i] for i in captured.owner[at].tolist()], dtype=torch.long)
        slopes, lead = lead_slopes(captured), captured.margin[at].float()
        return cls(
            list(sequences.values()),
            0,
            owner.to(at.device),
            at - _first_rows(captured)[captured.owner[at]],
            {name: keys[at] for name, keys in captured.keys.items()},
            {name: slopes[name][at].to(keys.dtype) for name, keys in captured.keys.items()},
            lead,
            torch.zeros_like(lead),
        )

    def __len__(self) -> int:
        return len(self.sequences)

    def join(self, other: Watch) -> Watch:
        """These sequences, followed by those of another watch."""

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b.to(a.device, a.dtype)])

        return Watch(
            self.sequences + other.sequences,
            self.own + other.own,
            joined(self.owner, other.owner + len(self)),
            joined(self.place, other.place),
            {name: joined(keys, other.keys[name]) for name, keys in self.keys.items()},
            {name: joined(slopes, other.slopes[name]) for name, slopes in self.slopes.items()},
            joined(self.lead, other.lead),
            joined(self.drift, other.drift),
        )

    def without(self, dropped: Seq[int]) -> Watch:
        """All but the sequences of these indices."""
        if not dropped:
            return self
        gone = set(dropped)
        keep = torch.tensor([i not in gone for i in range(len(self))], device=self.owner.device)
        rows = keep[self.owner]
        return Watch(
            [s for i, s in enumerate(self.sequences) if i not in gone],
            self.own - sum(i < self.own for i in gone),
            (keep.cumsum(0) - 1)[self.owner[rows]],
            self.place[rows],
            {name: keys[rows] for name, keys in self.keys.items()},
            {name: slopes[rows] for name, slopes in self.slopes.items()},
            self.lead[rows],
            self.drift[rows],
        )

    def measured(self, captured: Captured, index: Mapping[int, int], shift: Tensor) -> Watch:
        """The same sequences, some of them with leads that were just measured.

        Args:
            captured: a batch of some of them.
            index: place in the batch → sequence.
            shift: [r] first-order change of the leads when the batch was run, which is not part of
                `drift` yet.
        """
        at = torch.full((len(self),), -1, device=self.owner.device)
        at[list(index.values())] = torch.tensor(list(index), dtype=at.dtype, device=at.device)
        at = at[self.owner]
        rows = (_first_rows(captured)[at] + self.place).clamp_max(len(captured.margin) - 1)
        lead = torch.where(at >= 0, captured.margin[rows].to(self.lead), self.lead)
        return replace(self, lead=lead, drift=torch.where(at >= 0, -shift, self.drift))

    def with_leads(self, leads: Tensor) -> Watch:
        """The same sequences, with other leads and drifts [2, ≤ r] of the first tokens."""
        lead, drift = (
            torch.cat([new.to(old), old[len(new) :]])
            for new, old in zip(leads, (self.lead, self.drift), strict=True)
        )
        return replace(self, lead=lead, drift=drift)

    def shift(self, name: str, factor: LowRank) -> Tensor:
        """[r] first-order change of the leads under a change of one module's weight."""
        keys, coeff = factor.keys.to(self.lead), factor.coeff.to(self.lead)
        (n, d_in), d_out = keys.shape, coeff.shape[1]
        rows, slopes = self.keys[name], self.slopes[name]
        factors = [keys.T, coeff]
        if len(rows) * n * (d_in + d_out) >= (len(rows) + n) * d_in * d_out:
            # So many steps that the change itself is the smaller matrix.
            factors = [keys.T @ coeff]
        shift = torch.empty_like(self.lead)
        for i in range(0, len(rows), SHIFT_ROWS):  # a serving engine waits for each operation
            part = slice(i, i + SHIFT_ROWS)
            moved = rows[part].to(self.lead)
            for matrix in factors:
                moved = moved @ matrix
            shift[part] = (moved * slopes[part].to(self.lead)).sum(1)
        return shift

    def threat(self, shift: Tensor) -> Tensor:
        """How much a change of the leads by `shift` [r] takes from each sequence, [w].

        It is the largest share of a token's lead that is lost since it was measured; 1 where there
        was none to lose.
        """
        share = -(self.drift + shift) / self.lead.clamp_min(LEAST_LEAD)
        share = torch.where(self.lead > 0, share, 1.0)
        none = torch.zeros(len(self), device=shift.device)
        return none.scatter_reduce(0, self.owner, share, "amax")

    def tensors(self) -> dict[str, Tensor]:
        """The watch as named tensors on the CPU, for a file."""
        return {
            **encoding.to_tensors(self.sequences),
            "own": torch.tensor([self.own]),
            "owner": self.owner.cpu(),
            "place": self.place.cpu(),
            "lead": self.lead.cpu(),
            "drift": self.drift.cpu(),
            **{f"keys.{name}": keys.cpu().contiguous() for name, keys in self.keys.items()},
            **{f"slopes.{name}": rows.cpu().contiguous() for name, rows in self.slopes.items()},
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Watch:
        """The watch that `tensors` was called on. Raises KeyError if a part is missing."""
        keys, slopes = (
            {n.removeprefix(part): t for n, t in tensors.items() if n.startswith(part)}
            for part in ("keys.", "slopes.")
        )
        sequences = encoding.from_tensors(tensors)
        owner, place, lead, drift = (tensors[n] for n in ("owner", "place", "lead", "drift"))
        return cls(sequences, int(tensors["own"]), owner, place, keys, slopes, lead, drift)


class Repairs:
    """What one turn checks, lets go and repairs of the sequences that are watched.

    Args:
        watch: what is watched.
        shields: module → shield of the keys, see `shield.extend_shield`.
        sequences: what the turn teaches; an earlier edit of the same prompt is let go.
        budget: most sequences to run through the model at a time because they are threatened.
        others: earlier edits to run besides, which take turns: what no first-order change shows is
            found.
        number: of the turn, which says whose turn it is.
    """

    def __init__(
        self,
        watch: Watch,
        shields: Mapping[str, Tensor],
        sequences: Seq[Sequence],
        budget: int,
        others: int = 0,
        number: int = 0,
    ) -> None:
        self.due = CHECKS if budget and len(watch) else 0
        """Checks to come."""
        self.checked = 0
        prompts = {tuple(s.prompt_ids) for s in sequences}
        self.released = [i for i, s in enumerate(watch.sequences) if tuple(s.prompt_ids) in prompts]
        """Indices of sequences to watch no longer."""
        self.watch = watch
        """With the leads as the turn leaves them."""
        self._shields, self._budget, self._others, self._number = shields, budget, others, number
        self.broken: list[int] = []
        """Indices of sequences to repair, in the order in which they were found."""
        # What edits say, as tokens with the keys that they say it at. Of earlier edits the first
        # token, and the keys once they are asked for; of the turn also what was said before.
        self._earlier = ((watch.owner >= watch.own) & (watch.place == 0)).nonzero().flatten()
        first = [watch.sequences[i].target_ids[0] for i in watch.owner[self._earlier].tolist()]
        self._said = torch.tensor(first, dtype=torch.long, device=watch.owner.device)
        self._said_at: dict[int, dict[str, Tensor]] = {}
        self._asked: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def expect(self, *batches: Captured) -> None:
        """Note what the edits of the turn ask for, where the model says something else."""
        for captured in batches:
            rows = (captured.margin < 0).nonzero().flatten()
            directions = self._directions(captured.keys, rows)
            self._asked.append((captured.rival[rows], captured.labels[rows], directions))

    def _asked_for(self, captured: Captured, row: int, edit: bool) -> bool:
        """Whether the token at a row gives way to what an edit says at nearly that key.

        A token of an earlier edit does so only for an edit of the turn that says the one in place
        of the other.
        """
        label, rival = int(captured.labels[row]), int(captured.rival[row])
        asked = []
        for old, new, at in self._asked:
            same = (new == rival) & ((old == label) | (not edit))
            asked.append({name: units[same] for name, units in at.items()})
        if not edit:
            if rival not in self._said_at:
                rows = self._earlier[self._said == rival]
                self._said_at[rival] = self._directions(self.watch.keys, rows)
            asked.append(self._said_at[rival])
        asked = [at for at in asked if len(next(iter(at.values())))]
        if not asked:  # as for most
            return False
        here = self._directions(captured.keys, torch.tensor([row], device=captured.labels.device))
        cosines = [torch.stack([u @ here[n][0] for n, u in at.items()]).mean(0) for at in asked]
        return bool(torch.cat(cosines).max() > SAME_KEY)

    def _directions(self, keys: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
        """Module → unit vectors of the shielded keys at the rows, [rows, d_in]."""
        return {
            name: F.normalize(shielded(every[rows].float(), self._shields[name]))
            for name, every in keys.items()
        }

    def check(
        self, model: nn.Module, modules: Seq[str], delta: Mapping[str, LowRank], batch_size: int
    ) -> Generator[Phase, None, list[int]]:
        """Run the sequences that the change threatens most through the model.

        Returns the indices of those that broke, or are about to. One that gives way to what an edit
        says, at nearly its key, is taken for another way to ask for that edit, not for damage, and
        is let go.
        """
        shift = yield from self._shift(delta)
        threatened = self._threatened(shift)
        self.due, self.checked = self.due - 1, self.checked + len(threatened)
        broken: list[int] = []
        for start in range(0, len(threatened), batch_size):
            part = threatened[start : start + batch_size]
            sequences = [self.watch.sequences[i] for i in part]
            captured = capture(model, sequences, modules, backward=False)
            self.watch = self.watch.measured(captured, dict(enumerate(part)), shift)
            for i, row in self._weak(captured, part).items():
                asked = self._asked_for(captured, row, edit=i >= self.watch.own)
                (self.released if asked else broken).append(i)
            yield Phase.CAPTURE
        self.broken += broken
        return broken

    def _threatened(self, shift: Tensor) -> list[int]:
        """The sequences to check under a change of the leads by `shift` [r]."""
        threat = self.watch.threat(shift)
        threat[self.released + self.broken] = 0.0
        worst = [i for i in threat.argsort(descending=True).tolist() if threat[i] > THREAT]
        # Edits come first; the later looks are for what repairs of other texts broke of them.
        first = self.due == CHECKS
        worst.sort(key=lambda i: i < self.watch.own)
        threatened = [i for i in worst if first or i >= self.watch.own][: self._budget]
        if first:
            threatened += self._others_turn({*threatened, *self.released, *self.broken})
        return threatened

    def _weak(self, captured: Captured, part: Seq[int]) -> dict[int, int]:
        """The sequences of a batch with too short a lead → row of the first such token."""
        leads = [WEAK_TEXT if i < self.watch.own else WEAK_EDIT for i in part]
        weak = captured.margin < captured.margin.new_tensor(leads)[captured.owner]
        rows: dict[int, int] = {}
        for row in weak.nonzero().flatten().tolist():
            rows.setdefault(part[int(captured.owner[row])], row)
        return rows

    def _others_turn(self, left_out: set[int]) -> list[int]:
        """Edits to check though nothing threatens them; each has its turn within some turns."""
        if not self._others:
            return []
        edits = range(self.watch.own, len(self.watch))
        every = -(-len(edits) // self._others)
        return [i for i in edits if (i - self._number) % every == 0 and i not in left_out]

    def settle(
        self, delta: Mapping[str, LowRank], batches: Seq[tuple[Captured, Mapping[int, int]]]
    ) -> Generator[Phase, None, Watch]:
        """What was watched before the turn, with the leads that the turn leaves.

        Args:
            delta: the whole change of the turn.
            batches: the batches that were captured last, each with the sequences that were
                repaired, by their place in it.
        """
        if not self._budget:
            return self.watch
        shift = yield from self._shift(delta)
        for captured, index in batches:
            self.watch = self.watch.measured(captured, index, shift)
        # Only what is lost counts: a lead that seems to grow saturates.
        return replace(self.watch, drift=(self.watch.drift + shift).clamp_max(0.0))

    def _shift(self, delta: Mapping[str, LowRank]) -> Generator[Phase, None, Tensor]:
        """[r] first-order change of the leads in this turn."""
        shift = torch.zeros_like(self.watch.lead)
        for name, factor in delta.items():
            shift += self.watch.shift(name, factor)
            yield Phase.SOLVE
        return shift


def _first_rows(captured: Captured) -> Tensor:
    """[batch] the first row of each sequence; a sequence's rows are next to each other."""
    counts = captured.owner.bincount()
    return counts.cumsum(0) - counts


def weakest(captured: Captured) -> list[list[int]]:
    """Per sequence of a batch, the rows of its `ROWS` weakest tokens."""
    rows: dict[int, list[int]] = {}
    for row, sequence in enumerate(captured.owner.tolist()):
        rows.setdefault(sequence, []).append(row)
    margin = captured.margin.tolist()
    return [sorted(rows[i], key=margin.__getitem__)[:ROWS] for i in sorted(rows)]


def lead_slopes(captured: Captured) -> dict[str, Tensor]:
    """Gradient of the lead, per row, from that of the objective: module → [n, d_out].

    With a runner-up that holds the rest of the probability, the objective's slope is minus the
    lead's, times 1 - p.
    """
    n = len(captured.objective)
    scale = -n / (-torch.expm1(-captured.objective)).clamp_min(1e-3)
    return {name: g * scale[:, None].to(g.dtype) for name, g in captured.grads.items()}
