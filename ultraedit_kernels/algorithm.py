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

from ultraedit_kernels.anchors import solve_shielded
from ultraedit_kernels.capture import Captured, capture
from ultraedit_kernels.delta import LowRank
from ultraedit_kernels.encoding import Sequence
from ultraedit_kernels.operations import edit_values, solve, update_statistics
from ultraedit_kernels.statistics import Statistics

MAX_BOOST = 8.0
"""Most by which a step is enlarged when earlier ones had too little effect."""


@dataclass(frozen=True)
class Settings:
    """How a turn is computed. `presets.PAPER` holds the published values."""

    lr: float | Literal["auto"] = "auto"
    """Step size, or "auto": per edit, the step whose first-order effect removes the edit's loss."""
    rounds: int = 12
    """Most steps per turn; the loop ends as soon as every edit holds."""
    ridge: float = 1.0
    """λ of the ridge regression."""
    margin: float = 3.0
    """Logits by which every target token must lead its runner-up for an edit to hold. A serving
    engine rounds differently than the side pass, and a wider lead carries over to rephrases."""
    batch_size: int = 10
    """Sequences per capture batch, over whose answer tokens the loss is averaged."""


@dataclass(frozen=True)
class Turn:
    """What a turn did; the weights already hold it."""

    delta: dict[str, LowRank]
    statistics: dict[str, Statistics]
    holds: list[bool]  # per edit, as are the next three
    rounds: list[int]
    loss: list[float]
    margin: list[float]


def turn(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    sequences: Seq[Sequence],
    edit_of: Seq[int],
    statistics: Mapping[str, Statistics],
    share: Mapping[str, str],
    shields: Mapping[str, Tensor],
    settings: Settings,
) -> Generator[str, None, Turn]:
    """Step until every edit holds, changing `weights` in place; yields after each slice of work.

    Args:
        model: the model that `weights` belong to; its forward pass is what is checked.
        weights: module name → W [d_out, d_in].
        sequences: what must be said, as tokens; `edit_of[i]` is the edit that sequence i teaches.
        statistics: running statistics; `share[module]` names the ones that a module uses.
        shields: module name → `anchors.shield` of the keys whose outputs must not move.
    """
    start = {name: weight.clone() for name, weight in weights.items()}
    delta = {name: LowRank.empty(weight) for name, weight in weights.items()}
    stats = dict(statistics)
    rounds = [0] * (max(edit_of) + 1)
    before: Tensor | None = None
    boost = torch.ones(len(rounds), device=next(iter(weights.values())).device)
    for step in range(settings.rounds + 1):
        # One forward pass both judges the last step and captures the next one.
        last = step == settings.rounds
        batches: list[Captured] = []
        for i in range(0, len(sequences), settings.batch_size):
            part = sequences[i : i + settings.batch_size]
            batches.append(
                capture(model, part, list(weights), backward=not last, margin=settings.margin)
            )
            yield "capture"
        rows = _rows_per_edit(batches, edit_of, settings.batch_size)
        margin = rows.reduce(torch.cat([b.margin for b in batches]), "amin")
        loss = rows.reduce(torch.cat([b.loss for b in batches]), "sum")
        objective = rows.reduce(torch.cat([b.objective for b in batches]), "sum")
        holds = margin > settings.margin
        if last or (settings.rounds > 1 and bool(holds.all())):
            break
        rests = holds if settings.rounds > 1 else torch.zeros_like(holds)  # open loop: all step
        rounds = [r + (not h) for r, h in zip(rounds, rests.tolist(), strict=True)]

        # Statistics over all rows, then the output shift wanted at each of them.
        for name in weights:
            for batch in batches:
                key = share[name]
                stats[key] = update_statistics(stats[key], batch.keys[name], batch.grads[name])
        keys = {name: torch.cat([b.keys[name] for b in batches]) for name in weights}
        grads = {name: torch.cat([b.grads[name] for b in batches]) for name in weights}
        lr = 1.0 if settings.lr == "auto" else settings.lr
        values = {n: edit_values(keys[n], grads[n], stats[share[n]], lr) for n in weights}
        if settings.lr == "auto":
            # Where anchors or other edits swallowed most of the last step, ask for twice as much.
            if before is not None:
                boost = torch.where(objective > before / 2, 2 * boost, boost).clamp(max=MAX_BOOST)
            before = objective
            step_size = boost * _step_that_removes_the_loss(objective, values, grads, rows)
        else:
            step_size = torch.ones_like(loss)
        # Edits that hold take no step: their keys are anchors now.
        step_size = torch.where(rests, 0.0, step_size)[rows.edit, None]

        # Solve, and write W anew from its start, so that a replay rounds once, as this does.
        for name, weight in weights.items():
            wanted, h = values[name] * step_size, keys[name]
            if name in shields:
                coeff, h = solve_shielded(h, wanted, settings.ridge, shields[name])
            else:
                coeff = solve(h, wanted, settings.ridge)
            delta[name] = delta[name].append(coeff, h)
            delta[name].apply(weight.copy_(start[name]))
            yield "solve"
    return Turn(delta, stats, holds.tolist(), rounds, loss.tolist(), margin.tolist())


@dataclass(frozen=True)
class _Rows:
    edit: Tensor  # [n] int64: the edit each answer position belongs to
    tokens: (
        Tensor  # [n]: answer tokens in the row's capture batch, which its loss was averaged over
    )
    edits: int

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """[n] → [edits]."""
        out = values.new_zeros(self.edits)
        return out.scatter_reduce(0, self.edit, values, how, include_self=False)


def _rows_per_edit(batches: Seq[Captured], edit_of: Seq[int], batch_size: int) -> _Rows:
    device = batches[0].owner.device
    owner = torch.cat([b.owner + i * batch_size for i, b in enumerate(batches)])
    tokens = torch.cat([torch.full_like(b.loss, len(b.loss)) for b in batches])
    return _Rows(torch.tensor(edit_of, device=device)[owner], tokens, max(edit_of) + 1)


def _step_that_removes_the_loss(
    loss: Tensor, values: Mapping[str, Tensor], grads: Mapping[str, Tensor], rows: _Rows
) -> Tensor:
    """Per edit: loss / first-order decrease by its values at lr 1 (Polyak's step size), [edits]."""
    slope = sum(-(values[n] * grads[n].to(values[n].dtype)).sum(1) for n in values)
    gain = rows.reduce(torch.as_tensor(slope) * rows.tokens, "sum")
    return torch.where(gain > 0, loss / gain.clamp_min(torch.finfo(gain.dtype).tiny), 0.0)
