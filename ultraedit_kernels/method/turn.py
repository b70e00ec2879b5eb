"""One turn of editing, top to bottom. This page is the method; everything else serves it.

Notation of UltraEdit (arXiv 2505.14679): keys H, gradients G, values V, coefficients Y, weight W.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import partial

from torch import Tensor, nn

from ultraedit_kernels.method.change import Change, Turn
from ultraedit_kernels.method.goals import Goals, Round
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import Repairs, Watch
from ultraedit_kernels.method.shield import System
from ultraedit_kernels.method.step import (
    Positions,
    descending,
    enlarged,
    free_values,
    natural,
    sized,
    tied,
)
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.settings import MethodSettings

REPAIR_ROUNDS = 2
"""Steps kept for repairs, if not every edit holds before."""
OTHERS = 10
"""Earlier edits that an edit has checked though nothing threatens them, so that its cost does not
grow with their number; at most `repairs` in a turn."""


def turn(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    goals: Goals,
    statistics: Mapping[str, Statistics],
    share: Mapping[str, str],
    anchors: Anchors,
    settings: MethodSettings,
    number: int,
) -> Generator[Phase, None, Turn]:
    """Step until every edit holds, changing `weights` in place; yields after each slice of work.

    Args:
        model: the model that `weights` belong to; its forward pass is what is checked.
        weights: module name → W [d_out, d_in]; `start` is a copy of them.
        goals: what the model must say.
        statistics: running statistics; `share[module]` names the ones that a module uses.
        anchors: what must be left as it is.
        number: of the turn, see `Change` and `Repairs`.
    """
    size, modules = settings.batch_size, list(weights)
    budget = settings.repairs * settings.closed_loop
    change = Change(weights, start, statistics, share, settings, number)
    others = min(budget, OTHERS * len(goals.edits))
    repairs = Repairs(anchors.watch, anchors.keys, goals.sequences, budget, others, number)
    look, taken = partial(goals.capture, model, modules, size), 0
    seen = yield from look()
    if not goals.rest:
        repairs.expect(*seen.captured)
    while True:
        holds = goals.hold(seen)
        spent = taken == settings.rounds
        over = spent or (settings.closed_loop and bool(holds.all()))
        if over and goals.unseen(seen).any():
            seen = yield from goals.review(model, modules, size, seen)
            continue
        if repairs.due and not spent and (over or taken >= settings.rounds - REPAIR_ROUNDS):
            broken = yield from repairs.check(model, modules, change.delta, size)
            if broken:
                goals.repair(broken, anchors.watch)
                seen = yield from look(seen)
                continue
        if over:
            break
        taken += 1
        # Goals that hold rest: with values of zero, they are anchors to the others.
        steps = ~holds if settings.closed_loop else holds.new_ones(len(holds))
        goals.count(steps)
        by_name = goals.rest and settings.lr == "auto"
        names = goals.named(seen.positions) if by_name else None
        yield from _step(change, seen, steps, names, anchors, settings)
        # One forward pass both judges the step and captures the next one.
        seen = yield from look(seen.aged(), steps)
    watched = yield from repairs.settle(change.delta, goals.repairs_in(seen))
    return _left(change, goals, repairs, seen, holds, watched)


def _left(
    change: Change, goals: Goals, repairs: Repairs, seen: Round, holds: Tensor, watched: Watch
) -> Turn:
    """What a turn leaves, of which `seen` is the last look."""
    return Turn(
        edits=goals.taught(seen, holds),
        delta=change.delta,
        statistics=change.statistics,
        held=goals.held_keys(seen, holds),
        watch=goals.watch(seen, holds, change.weights),
        watched=watched,
        released=repairs.released,
        checked=repairs.checked,
        broken=len(goals.repairs),
        repaired=goals.repaired(seen),
    )


def _step(
    change: Change,
    seen: Round,
    steps: Tensor,
    names: Positions | None,
    anchors: Anchors,
    settings: MethodSettings,
) -> Generator[Phase, None, None]:
    """Change the weights by one step of the goals that take it, `steps` [goals] bool; `names` are
    the positions by what they name."""
    # Statistics over all positions, then the output shift wanted at each of them.
    statistics = change.observe(seen.fresh)
    keys, grads, at = seen.keys(), seen.grads(), seen.positions
    yield Phase.SOLVE
    systems = {}
    for name in keys:
        systems[name] = System(keys[name], settings.ridge, anchors.keys[name])
        yield Phase.SOLVE
    takes = at.spread(steps)
    asked = partial(free_values, keys, grads, statistics, anchors.outputs, takes)
    if settings.lr == "auto":
        # Ask for a share of the loss; then for as much more as ridge and shield take of it.
        slopes = {name: grad * takes for name, grad in grads.items()}
        # At names, a second turn of SmolLM2 by statistics of the first changed 2.5 times as much.
        if names is None:
            values = descending(asked(1.0), slopes, at)
        else:
            values = natural(slopes, anchors.outputs, systems, names)
        values = sized(values, slopes, seen.objective, settings.step, at)
        if names is not None:
            values, at = tied(values, takes, names), names
        values = enlarged(values, slopes, systems, settings.ridge, at, change.reach(keys))
        yield Phase.SOLVE
    else:
        values = asked(settings.lr)
    for name, system in systems.items():
        if names is None:
            change.add(name, system.solve(values[name]), system.keys)
        else:
            # What earlier steps wrote at keys that have moved since only did harm.
            change.ask(name, values[name], system, names)
        yield Phase.SOLVE
