"""One turn of editing, top to bottom. This page is the method; everything else serves it.

Notation of UltraEdit (arXiv 2505.14679): keys H, gradients G, values V, coefficients Y, weight W.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import SURE, Repairs, Watch
from ultraedit_kernels.method.shield import System, shielded
from ultraedit_kernels.model.capture import Captured, capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.parallel import norm, same
from ultraedit_kernels.ops.operations import edit_values, update_statistics
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.store.delta import LowRank

MIN_COSINE = 0.1
"""Least cosine of an edit's values with the steepest descent of its loss."""
LEAST_MARGIN = 1.0
"""Logits that no number of rephrases makes up for: what an engine's rounding may take."""
PATIENCE = 8
"""Steps after which a repair that does not hold is given up: it is at odds with an edit."""
REPAIR_ROUNDS = 2
"""Steps kept for repairs, if not every edit holds before."""
MAX_STEP = 0.2
"""Most that a step changes a weight, as a share of its norm. Edits that cannot hold, or not
together, ask for ever larger steps, at the cost of all others."""
MAX_GAIN = 64.0
"""Most by which a step is enlarged against what the ridge and the shield take of it."""


@dataclass(frozen=True)
class Settings:
    """How a turn is computed. `presets.PAPER` holds the published values."""

    lr: float | Literal["auto"] = "auto"
    """Step size, or "auto": per edit, what removes a share of its loss to first order."""
    step: float = 0.4
    """That share. Small steps disturb less and take more rounds."""
    rounds: int = 24
    """Most steps per turn; the loop ends as soon as every edit holds."""
    ridge: float = 1.0
    """λ of the ridge regression."""
    margin: float = 4.2
    """Logits by which every target token must lead its runner-up for an edit to hold. A serving
    engine rounds differently than the side pass, and a wider lead carries over to other phrasings;
    an edit that brings k rephrases needs less of it, and is asked for 1 / (k + 1)."""
    repairs: int = 200
    """Most watched sequences that a turn runs through the model at a time because it threatens
    them, and as many earlier edits because it is their turn; those that broke are repaired."""
    batch_size: int = 32
    """Sequences per capture batch, over whose answer tokens the loss is averaged."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of the weights, see `operations.rank_k_update_`; the number of the turn is the seed."""


@dataclass(frozen=True)
class Turn:
    """What a turn did; the weights already hold it."""

    delta: dict[str, LowRank]
    statistics: dict[str, Statistics]
    held: dict[str, Tensor]
    """Module → keys [m, d_in] of the edits that hold, under the final weights."""
    watch: Watch
    """The edits that hold, to be watched from now on."""
    watched: Watch
    """What the anchors watch, with the leads that the turn leaves."""
    released: list[int]
    """Of the anchors' watch, the sequences to watch no longer."""
    checked: int
    """Watched sequences that were run through the model; `broken` of them had lost their lead."""
    broken: int
    repaired: int
    holds: list[bool]  # per edit, as are the next three
    rounds: list[int]
    loss: list[float]
    margin: list[float]


def turn(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    sequences: Seq[Sequence],
    edit_of: Seq[int],
    statistics: Mapping[str, Statistics],
    share: Mapping[str, str],
    anchors: Anchors,
    settings: Settings,
    number: int,
) -> Generator[str, None, Turn]:
    """Step until every edit holds, changing `weights` in place; yields after each slice of work.

    Args:
        model: the model that `weights` belong to; its forward pass is what is checked.
        weights: module name → W [d_out, d_in]; `start` is a copy of them.
        sequences: what must be said, as tokens; `edit_of[i]` is the edit that sequence i teaches.
        statistics: running statistics; `share[module]` names the ones that a module uses.
        anchors: what must be left as it is.
        number: of the turn, see `watch.Repairs`.
    """
    delta = {n: LowRank.empty(w, settings.rounding, number) for n, w in weights.items()}
    limits = {name: MAX_STEP * norm(weight) for name, weight in start.items()}
    stats = dict(statistics)
    edits = max(edit_of) + 1
    # Broken sequences that are repaired join the turn as further items, with a margin of their own.
    sequences, item_of = list(sequences), list(edit_of)
    wanted = [wanted_margin(settings.margin, item_of.count(edit)) for edit in range(edits)]
    budget = settings.repairs if settings.rounds > 1 else 0
    repairs = Repairs(anchors.watch, anchors.keys, sequences, budget, number)
    rounds = [0] * edits
    step = 0
    while True:
        # One forward pass both judges the last step and captures the next one.
        batches: list[Captured] = []
        for i in range(0, len(sequences), settings.batch_size):
            part = slice(i, i + settings.batch_size)
            margins = [wanted[item] for item in item_of[part]]
            batches.append(capture(model, sequences[part], list(weights), margin=margins))
            yield "capture"
        rows = _Rows.of(batches, item_of, settings.batch_size)
        margin = rows.reduce(torch.cat([b.margin for b in batches]), "amin")
        loss = rows.reduce(torch.cat([b.loss for b in batches]), "sum")
        objective = rows.reduce(torch.cat([b.objective for b in batches]), "sum")
        holds = margin > margin.new_tensor(wanted)
        given_up = [i >= edits and n >= PATIENCE for i, n in enumerate(rounds)]
        holds |= torch.tensor(given_up, device=holds.device)
        if step == 0:
            for batch in batches:
                repairs.expect(batch)
        spent = step == settings.rounds
        over = spent or (settings.rounds > 1 and bool(holds.all()))
        if repairs.due and not spent and (over or step >= settings.rounds - REPAIR_ROUNDS):
            broken = yield from repairs.check(model, list(weights), delta, settings.batch_size)
            if broken:
                sequences += [anchors.watch.sequences[i] for i in broken]
                item_of += range(len(wanted), len(wanted) + len(broken))
                # An edit that broke once is as likely to break again as its lead is short.
                texts = anchors.watch.own
                wanted += [SURE if i < texts else settings.margin for i in broken]
                rounds += [0] * len(broken)
                continue
        if over:
            break
        step += 1
        rests = holds if settings.rounds > 1 else torch.zeros_like(holds)  # open loop: all step
        rounds = [r + (not h) for r, h in zip(rounds, rests.tolist(), strict=True)]

        # Statistics over all rows, then the output shift wanted at each of them. Edits that hold
        # rest: their values are zero, so that they are anchors to the others.
        for name in weights:
            for batch in batches:
                key = share[name]
                stats[key] = update_statistics(stats[key], batch.keys[name], batch.grads[name])
        keys = {name: torch.cat([b.keys[name] for b in batches]) for name in weights}
        grads = {name: torch.cat([b.grads[name] for b in batches]) for name in weights}
        yield "solve"
        systems = {}
        for name in weights:
            systems[name] = System(keys[name], settings.ridge, anchors.keys[name])
            yield "solve"
        lr = 1.0 if settings.lr == "auto" else settings.lr
        steps = ~rests[rows.item, None]
        values = {n: edit_values(keys[n], grads[n], stats[share[n]], lr) * steps for n in weights}
        values = {n: shielded(v, anchors.outputs[n]) for n, v in values.items()}
        if settings.lr == "auto":
            values = _descending(values, {n: g * steps for n, g in grads.items()}, rows)
            # Ask for a share of the loss; then for as much more as ridge and shield take of it,
            # since (H̃Hᵀ + λI) Y = V moves the outputs by V - λY only.
            ask = settings.step * _ratio(objective, rows.gain(values, grads))
            values = {n: v * ask[rows.item, None] for n, v in values.items()}
            moved = {}
            for n, v in values.items():
                moved[n] = v - settings.ridge * systems[n].solve(v.double())
            more = _ratio(rows.gain(values, grads), rows.gain(moved, grads)).clamp(1, MAX_GAIN)
            values = {n: v * more[rows.item, None] for n, v in values.items()}
            yield "solve"

        # Solve, and write W anew from its start, so that a replay rounds once, as this does.
        for name, weight in weights.items():
            coeff, h = systems[name].solve(values[name]), systems[name].keys
            if settings.lr == "auto":
                coeff = coeff * _trusted(coeff, h, limits[name])
            delta[name] = delta[name].append(same(weight, coeff), same(weight, h))
            delta[name].apply(weight.copy_(start[name]))
            yield "solve"
    repaired = (
        {j: item - edits for j, item in enumerate(item_of[i : i + settings.batch_size])}
        for i in range(0, len(sequences), settings.batch_size)
    )
    watched = yield from repairs.settle(delta, list(zip(batches, repaired, strict=True)))
    held = holds[rows.item] & (rows.item < edits)
    watch = Watch.empty(weights)
    for i, batch in enumerate(batches):
        first = i * settings.batch_size
        new = {
            j: sequences[first + j]
            for j, item in enumerate(item_of[first : first + settings.batch_size])
            if item < edits and holds[item]
        }
        watch = watch.join(Watch.of(batch, new))
    return Turn(
        delta,
        stats,
        {n: torch.cat([b.keys[n] for b in batches])[held] for n in weights},
        watch,
        watched,
        repairs.released,
        repairs.checked,
        len(wanted) - edits,
        int((margin[edits:] > 0).sum()),
        holds[:edits].tolist(),
        rounds[:edits],
        loss[:edits].tolist(),
        margin[:edits].tolist(),
    )


def wanted_margin(margin: float, phrasings: int) -> float:
    """The lead asked of an edit that is taught in that many phrasings."""
    return max(margin / phrasings, min(margin, LEAST_MARGIN))


def _trusted(coeff: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
    """The factor, at most 1, that keeps the Frobenius norm of Yᵀ keys within the limit."""
    y, h = coeff.float(), keys.float()
    square = ((y @ y.T) * (h @ h.T)).sum().clamp_min(0.0)
    return (limit / square.sqrt()).clamp_max(1.0).to(coeff.dtype)


def _descending(
    values: Mapping[str, Tensor], grads: Mapping[str, Tensor], rows: _Rows
) -> dict[str, Tensor]:
    """The values, or the plain gradient's where statistics of few rows turned them away from it."""
    down = {n: -grads[n].to(v.dtype) for n, v in values.items()}
    norms = [rows.gain({n: -v for n, v in x.items()}, x) for x in (values, down)]
    away = rows.gain(values, grads) <= MIN_COSINE * (norms[0] * norms[1]).sqrt()
    return {n: torch.where(away[rows.item, None], down[n], v) for n, v in values.items()}


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    """wanted / got, and zero where nothing is got."""
    return torch.where(got > 0, wanted / got.clamp_min(torch.finfo(got.dtype).tiny), 0.0)


@dataclass(frozen=True)
class _Rows:
    """The answer positions of all batches of a round, n in all."""

    item: Tensor
    """[n] int64: the edit, or the repair, that each belongs to."""
    tokens: Tensor
    """[n]: answer tokens in its capture batch, over which the loss was averaged."""
    items: int

    @classmethod
    def of(cls, batches: Seq[Captured], item_of: Seq[int], batch_size: int) -> _Rows:
        device = batches[0].owner.device
        owner = torch.cat([b.owner + i * batch_size for i, b in enumerate(batches)])
        tokens = torch.cat([torch.full_like(b.loss, len(b.loss)) for b in batches])
        return cls(torch.tensor(item_of, device=device)[owner], tokens, max(item_of) + 1)

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """[n] → [items]."""
        out = values.new_zeros(self.items)
        return out.scatter_reduce(0, self.item, values, how, include_self=False)

    def gain(self, shifts: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor:
        """First-order decrease of each item's loss, if the outputs move by `shifts`, [items]."""
        slope = sum(-(v * grads[n].to(v.dtype)).sum(1) for n, v in shifts.items())
        return self.reduce(torch.as_tensor(slope) * self.tokens, "sum")
