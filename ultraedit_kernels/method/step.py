"""One step, from values to coefficients: how far each edit goes, and what is asked to get there.

Pure functions of tensors. n answer positions belong to goals, see `goals.Goal`; what is said per
goal has shape [goals], what is said per module is a mapping from its name. A gain is the decrease
of a goal's loss to first order: minus the gradients times the shifts of the outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ultraedit_kernels.method.shield import System, shielded
from ultraedit_kernels.ops.operations import edit_values
from ultraedit_kernels.ops.statistics import Statistics

MIN_COSINE = 0.1
"""Least cosine of an edit's values with the steepest descent of its loss."""
MAX_STEP = 0.2
"""Most that a step changes a weight, as a share of its norm. Edits that cannot hold, or not
together, ask for ever larger steps, at the cost of all others."""
MAX_GAIN = 64.0
"""Most by which a step is enlarged against what the ridge and the shield take of it."""


@dataclass(frozen=True)
class Positions:
    """The n answer positions of all batches of a round."""

    goal: Tensor
    """[n] int64: the goal that each belongs to."""
    tokens: Tensor
    """[n]: answer tokens in its capture batch, over which the loss was averaged."""
    goals: int
    """Goals in all."""

    def reduce(self, values: Tensor, how: str) -> Tensor:
        """Values [n] → [goals], by "sum" or "amin" over each goal's positions."""
        out = values.new_zeros(self.goals)
        return out.scatter_reduce(0, self.goal, values, how, include_self=False)

    def spread(self, values: Tensor) -> Tensor:
        """Values [goals] → [n, 1]: to each position that of its goal."""
        return values[self.goal, None]

    def gain(self, shifts: Mapping[str, Tensor], grads: Mapping[str, Tensor]) -> Tensor:
        """The gain [goals] of moving the outputs by `shifts`, per module [n, d_out]."""
        slope = sum(-(v * grads[n].to(v.dtype)).sum(1) for n, v in shifts.items())
        return self.reduce(torch.as_tensor(slope) * self.tokens, "sum")


def free_values(
    keys: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    statistics: Mapping[str, Statistics],
    outputs: Mapping[str, Tensor],
    steps: Tensor,
    lr: float,
) -> dict[str, Tensor]:
    """UltraEdit's values per module [n, d_out], without the directions that anchors take.

    Args:
        keys: module → [n, d_in].
        grads: module → [n, d_out].
        statistics: module → running statistics that hold these rows already.
        outputs: module → shield of the outputs, see `protect.Anchors`.
        steps: [n, 1] bool; a position that does not step has the value zero, so that it is an
            anchor to the others.
        lr: step size.
    """
    values = {n: edit_values(keys[n], grads[n], statistics[n], lr) * steps for n in keys}
    return {n: shielded(v, outputs[n]) for n, v in values.items()}


def steepest(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Minus the gradients, per module [n, d_out], float32 (float64 if they are)."""
    return {n: -g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in grads.items()}


def natural(
    grads: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    systems: Mapping[str, System],
    at: Positions,
) -> dict[str, Tensor]:
    """The values, per module [n, d_out], that gain most for what they change elsewhere.

    A key k whose output moves by v changes what is said of general text by ½ vᵀFv / kᵀC⁻¹k, with F
    and C as in `protect.OwnKeys`. The gain for the least change is v = -(kᵀC⁻¹k) F⁻¹g, the natural
    gradient: more in modules where the key is rare, less where much depends on the output. Of keys
    that share their values, the commonest counts, see `System.tied_rarity`.

    Args:
        grads: g, module → [n, d_out].
        outputs: module → shield of F.
        systems: module → system of the keys, with the shield of C.
        at: the positions, each of the goal that it shares values with.
    """
    return {
        n: shielded(v, outputs[n]) * systems[n].tied_rarity(at.goal)[:, None].to(v)
        for n, v in steepest(grads).items()
    }


def descending(
    values: Mapping[str, Tensor], grads: Mapping[str, Tensor], at: Positions
) -> dict[str, Tensor]:
    """The values, but minus the gradient for each goal whose values do not descend.

    Statistics of few rows may turn the values away from the steepest descent.
    """
    down = steepest(grads)
    squares = [at.gain({n: -v for n, v in x.items()}, x) for x in (values, down)]
    away = at.gain(values, grads) <= MIN_COSINE * (squares[0] * squares[1]).sqrt()
    return {n: torch.where(at.spread(away), down[n], v) for n, v in values.items()}


def sized(
    values: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    objective: Tensor,
    share: float,
    at: Positions,
) -> dict[str, Tensor]:
    """The values, scaled per goal to gain a share of its objective [goals]; zero if they cannot."""
    ask = share * _ratio(objective, at.gain(values, grads))
    return {n: v * at.spread(ask) for n, v in values.items()}


def tied(values: Mapping[str, Tensor], steps: Tensor, at: Positions) -> dict[str, Tensor]:
    """The values, of which all positions of one goal get the mean of those that step.

    Keys of one name in several texts are nearly alike. To move their outputs apart, or to hold one
    and move another, would take a large change of the weight.

    Args:
        values: module → [n, d_out], zero where a position does not step.
        steps: [n, 1] bool.
        at: the positions, each of the goal that it shares values with.
    """
    count = at.reduce(steps[:, 0].float(), "sum").clamp_min(1.0)
    means = {
        n: v.new_zeros(at.goals, v.shape[1]).index_add_(0, at.goal, v) for n, v in values.items()
    }
    return {n: (mean / count[:, None].to(mean.dtype))[at.goal] for n, mean in means.items()}


def enlarged(
    values: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    systems: Mapping[str, System],
    ridge: float,
    at: Positions,
    reach: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The values, scaled per goal by 1 to `MAX_GAIN` against what ridge and shield take of them;
    by less where an output would move beyond `reach`, module → [n].

    Since (H̃Hᵀ + λI) Y = V, the outputs move by V - λY only.
    """
    moved = {n: v - ridge * systems[n].solve(v.double()) for n, v in values.items()}
    more = _ratio(at.gain(values, grads), at.gain(moved, grads)).clamp(1, MAX_GAIN)
    for n, shift in moved.items():
        most = reach[n] / shift.norm(dim=1).clamp_min(torch.finfo(shift.dtype).tiny)
        more = torch.minimum(more, at.reduce(most.to(more.dtype), "amin"))
    return {n: v * at.spread(more) for n, v in values.items()}


def bounded(coeff: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
    """The coefficients Y [n, d_out], scaled down so that ‖Yᵀ keys‖ is at most the limit.

    Args:
        coeff: Y [n, d_out].
        keys: [n, d_in].
        limit: of the Frobenius norm, a scalar.
    """
    return coeff * allowed(coeff, keys, limit).to(coeff.dtype)


def allowed(coeff: Tensor, keys: Tensor, limit: Tensor) -> Tensor:
    """The scale of `bounded`, a scalar of at most 1."""
    y, h = coeff.float(), keys.float()
    square = ((y @ y.T) * (h @ h.T)).sum().clamp_min(0.0)
    return (limit / square.sqrt()).clamp_max(1.0)


def _ratio(wanted: Tensor, got: Tensor) -> Tensor:
    """wanted / got, and zero where nothing is got."""
    return torch.where(got > 0, wanted / got.clamp_min(torch.finfo(got.dtype).tiny), 0.0)
