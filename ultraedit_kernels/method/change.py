"""What a turn changes, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from torch import Tensor

from ultraedit_kernels.method.goals import Taught
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.method.shield import System
from ultraedit_kernels.method.step import MAX_STEP, Positions, allowed, bounded
from ultraedit_kernels.model.capture import Captured
from ultraedit_kernels.model.parallel import norm, same
from ultraedit_kernels.ops.operations import update_statistics
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.settings import MethodSettings
from ultraedit_kernels.store.delta import LowRank


class Change:
    """The weights as a turn changes them, and the running statistics.

    Args:
        weights: module → W [d_out, d_in], changed in place; `start` is a copy of them.
        start: what the turn begins with.
        statistics: running statistics; `share[module]` names the ones that a module uses.
        share: see there.
        settings: of the turn.
        number: of the turn, the seed of stochastic rounding.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        start: Mapping[str, Tensor],
        statistics: Mapping[str, Statistics],
        share: Mapping[str, str],
        settings: MethodSettings,
        number: int,
    ) -> None:
        self.weights, self.statistics = weights, dict(statistics)
        self.delta = {n: LowRank.empty(w, settings.rounding, number) for n, w in weights.items()}
        """Module → all that has been added to its weight."""
        self._asked = {n: delta.coeff[:0] for n, delta in self.delta.items()}
        """Module → the values that the steps so far have asked of each goal, [goals, d_out]."""
        self._start, self._share, self._bounded = start, share, settings.lr == "auto"
        self._norms = {name: norm(weight) for name, weight in start.items()}
        self._reach = settings.reach

    def observe(self, batches: Seq[Captured]) -> dict[str, Statistics]:
        """Merge captured rows into the statistics: module → those that it uses."""
        for name in self.weights:
            for batch in batches:
                key, keys, grads = self._share[name], batch.keys[name], batch.grads[name]
                self.statistics[key] = update_statistics(self.statistics[key], keys, grads)
        return {name: self.statistics[self._share[name]] for name in self.weights}

    def reach(self, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How far a step may move the output of each key, module → [n] for keys [n, d_in].

        It is a share of ‖W‖ ‖k‖ / √d_in, the norm that a key's output has on average.
        """
        return {
            n: self._reach * self._norms[n].to(k.device) * k.float().norm(dim=1) / k.shape[1] ** 0.5
            for n, k in keys.items()
        }

    def add(self, name: str, coeff: Tensor, keys: Tensor) -> None:
        """Add coeffᵀ keys, [n, d_out] and [n, d_in], to a module's weight.

        Steps that found their own size are bounded.
        """
        if self._bounded:
            coeff = bounded(coeff, keys, MAX_STEP * self._norms[name])
        self._write(name, self.delta[name], coeff, keys)

    def ask(self, name: str, values: Tensor, system: System, at: Positions) -> None:
        """Ask for the values of a step, [n, d_out], besides those of the steps before: what is
        added to the module's weight is then what all of them take at the keys of this system.

        Args:
            name: of the module.
            values: alike at all positions of a goal.
            system: of the keys of now.
            at: the positions.
        """
        limit = MAX_STEP * self._norms[name]
        values = values * allowed(system.solve(values), system.keys, limit).to(values)
        total = values.new_zeros(at.goals, values.shape[1])
        total[: len(self._asked[name])] += self._asked[name]
        total += values.new_zeros(total.shape).index_copy_(0, at.goal, values)
        self._asked[name], delta = total, self.delta[name]
        none = replace(delta, coeff=delta.coeff[:0], keys=delta.keys[:0])
        self._write(name, none, system.solve(total[at.goal]), system.keys)

    def _write(self, name: str, before: LowRank, coeff: Tensor, keys: Tensor) -> None:
        """The weight is written anew from its start, so that a replay rounds once, as this does."""
        weight = self.weights[name]
        self.delta[name] = before.append(same(weight, coeff), same(weight, keys))
        self.delta[name].apply(weight.copy_(self._start[name]))


@dataclass(frozen=True)
class Turn:
    """What a turn did; the weights already hold it."""

    edits: list[Taught]
    delta: dict[str, LowRank]
    statistics: dict[str, Statistics]
    held: dict[str, Tensor]
    """Module → keys [m, d_in] of the edits that hold, under the final weights; of their contexts
    that held, as they were when last looked at."""
    watch: Watch
    """The edits that hold, to be watched from now on."""
    watched: Watch
    """What the anchors watch, with the leads that the turn leaves."""
    released: list[int]
    """Of the anchors' watch, the sequences to watch no longer."""
    checked: int
    """Watched sequences that were run through the model."""
    broken: int
    """Of them, those that had lost their lead."""
    repaired: int
    """Of these, those that have it again."""
