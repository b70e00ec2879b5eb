"""One step: values, their sizes and the bound, on plain tensors against float64 formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ultraedit_kernels.method.moments import moment_shield
from ultraedit_kernels.method.shield import System, extend_shield
from ultraedit_kernels.method.step import (
    MAX_GAIN,
    Positions,
    bounded,
    descending,
    enlarged,
    free_values,
    natural,
    sized,
    tied,
)
from ultraedit_kernels.ops.operations import update_statistics
from ultraedit_kernels.ops.statistics import Statistics

D_IN, D_OUT = 12, 7
MODULES = ("a", "b")


def rows(n: int, width: int, seed: int) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def far() -> dict[str, Tensor]:
    """No limit to how far outputs move."""
    return {name: torch.full((5,), torch.inf, dtype=torch.float64) for name in MODULES}


@pytest.fixture
def at() -> Positions:
    """Five positions of three goals, in two batches of three and two tokens."""
    return Positions(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([3.0, 3, 3, 2, 2]).double(), 3)


@pytest.fixture
def keys() -> dict[str, Tensor]:
    return {name: rows(5, D_IN, i) for i, name in enumerate(MODULES)}


@pytest.fixture
def grads() -> dict[str, Tensor]:
    return {name: rows(5, D_OUT, 10 + i) for i, name in enumerate(MODULES)}


@pytest.fixture
def statistics(keys, grads) -> dict[str, Statistics]:
    return {
        name: update_statistics(Statistics.empty(D_IN, D_OUT), keys[name], grads[name])
        for name in MODULES
    }


def none(width: int) -> dict[str, Tensor]:
    return {name: torch.zeros(0, width, dtype=torch.float64) for name in MODULES}


def test_positions_gather_per_goal_and_spread_back(at):
    values = torch.tensor([3.0, -1, 5, 2, 4])
    assert at.reduce(values, "sum").tolist() == [2, 5, 6]
    assert at.reduce(values, "amin").tolist() == [-1, 5, 2]
    assert at.spread(torch.tensor([7, 8, 9])).tolist() == [[7], [7], [8], [9], [9]]


def test_gain_is_the_first_order_decrease_of_the_summed_loss(at, grads):
    shifts = {name: rows(5, D_OUT, 20 + i) for i, name in enumerate(MODULES)}
    expected = [0.0] * 3
    for i, goal in enumerate([0, 0, 1, 2, 2]):
        tokens = 3 if i < 3 else 2  # the gradients are of the mean over a batch
        for name in MODULES:
            expected[goal] -= tokens * float(shifts[name][i] @ grads[name][i])
    assert at.gain(shifts, grads).tolist() == pytest.approx(expected)


def test_values_are_the_published_ones_where_a_goal_steps(keys, grads, statistics):
    steps = torch.tensor([True, True, False, True, True])[:, None]
    values = free_values(keys, grads, statistics, none(D_OUT), steps, 1e-3)
    for name in MODULES:
        z = torch.cat([keys[name], grads[name]], dim=1)
        z = (z - z.mean(0)) / (z.std(0, correction=1) + 2.0**-23)
        h, g = z[:, :D_IN], z[:, D_IN:]
        expected = -1e-3 * h.square().sum(1, keepdim=True) * g
        assert values[name].dtype == torch.float64
        assert torch.allclose(values[name][steps[:, 0]], expected[steps[:, 0]], rtol=1e-6)
        assert values[name][2].count_nonzero() == 0


def test_values_leave_out_the_directions_that_anchors_take(keys, grads, statistics):
    taken = rows(2, D_OUT, 30)
    shield = extend_shield(none(D_OUT)["a"], taken, 1e-9, limit=10)
    steps = torch.ones(5, 1, dtype=torch.bool)
    outputs = {**none(D_OUT), "a": shield}
    values = free_values(keys, grads, statistics, outputs, steps, 1.0)
    assert (values["a"] @ taken.T).abs().max() < 1e-6 * values["a"].abs().max()
    assert (values["b"] @ taken.T).abs().max() > 1e-2 * values["b"].abs().max()


def test_values_that_turn_away_from_the_descent_are_replaced_per_goal(at, grads):
    values = {name: -0.5 * g for name, g in grads.items()}
    for name in MODULES:
        values[name][2] = grads[name][2]  # the second goal's values ascend
    found = descending(values, grads, at)
    for name in MODULES:
        assert torch.equal(found[name][[0, 1, 3, 4]], values[name][[0, 1, 3, 4]])
        assert torch.equal(found[name][2], -grads[name][2])


def test_sizes_gain_the_wanted_share_of_the_objective(at, grads):
    objective = torch.tensor([2.0, 3.0, 5.0]).double()
    values = {name: -g for name, g in grads.items()}
    found = sized(values, grads, objective, 0.4, at)
    assert torch.allclose(at.gain(found, grads), 0.4 * objective)
    up = sized(grads, grads, objective, 0.4, at)  # nothing to gain
    assert all(v.count_nonzero() == 0 for v in up.values())


@pytest.mark.parametrize("shields", [False, True])
def test_enlarged_values_gain_after_the_ridge_what_was_asked(at, keys, grads, shields):
    ridge = 2.0
    shield = none(D_IN)
    if shields:
        shield["a"] = extend_shield(shield["a"], rows(3, D_IN, 40), ridge, limit=10)
    systems = {name: System(keys[name], ridge, shield[name]) for name in MODULES}
    values = {name: -g for name, g in grads.items()}

    def moved(values: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the outputs at the keys move by, from the weights' change itself."""
        change = {n: systems[n].solve(v.double()).T @ systems[n].keys for n, v in values.items()}
        return {n: keys[n] @ change[n].T for n in values}

    found = enlarged(values, grads, systems, ridge, at, far())
    asked, got = at.gain(values, grads), at.gain(moved(values), grads)
    assert (got < asked).all() and (got > 0).all()
    for name in MODULES:
        assert torch.allclose(found[name], values[name] * at.spread(asked / got), rtol=1e-6)


def test_enlarging_ends(at, keys, grads):
    values = {name: -g for name, g in grads.items()}
    systems = {name: System(keys[name], 1e6, none(D_IN)[name]) for name in MODULES}
    found = enlarged(values, grads, systems, 1e6, at, far())
    for name in MODULES:
        assert torch.allclose(found[name], MAX_GAIN * values[name])


def test_no_output_moves_beyond_reach_and_one_goal_holds_back_no_other(at, keys, grads):
    values = {name: -g for name, g in grads.items()}
    systems = {name: System(keys[name], 1e-9, none(D_IN)[name]) for name in MODULES}
    reach = far()
    reach["a"][3] = 0.1 * values["a"][3].norm()
    found = enlarged(values, grads, systems, 1e-9, at, reach)
    for name in MODULES:
        assert torch.allclose(found[name][:3], values[name][:3], rtol=1e-4)
        assert torch.allclose(found[name][3:], 0.1 * values[name][3:], rtol=1e-4)


def test_of_keys_that_move_alike_the_commonest_counts(keys):
    """Against the least norm that moves them so, for keys [4, d_in] of two names."""
    owner = torch.tensor([0, 0, 1, 0])
    h = keys["a"][:4].double()
    h[1] = h[0] + 1e-3 * h[1]  # a name in two texts
    h[3] *= 0.05  # and where its key is common
    for shield in (none(D_IN)["a"], extend_shield(none(D_IN)["a"], rows(30, D_IN, 50), 2.0, D_IN)):
        found = System(h, 1.0, shield).tied_rarity(owner)
        left = h - (h @ shield.T.double()) @ shield.double()
        for name in (0, 1):
            group = owner == name
            ones = torch.ones(int(group.sum()), 1, dtype=torch.float64)
            change = torch.linalg.lstsq(left[group] @ h[group].T, ones).solution
            expected = (1 / change.sum()).expand(len(ones))
            torch.testing.assert_close(found[group], expected, rtol=0.05, atol=0)
        assert (found <= (left * h).sum(1) * 1.001).all()


def test_natural_values_gain_the_most_for_what_they_change_elsewhere(keys, grads):
    ridge, tokens = 2.0, rows(30, D_IN, 50)
    fisher = {name: (x := rows(9, D_OUT, 51 + i)).T @ x for i, name in enumerate(MODULES)}
    fisher["b"] *= 5.0
    shield = {n: extend_shield(none(D_IN)[n], tokens, ridge, limit=D_IN) for n in MODULES}
    outputs = {n: moment_shield(fisher[n], ridge, limit=D_OUT) for n in MODULES}
    one = {n: keys[n][:1] for n in MODULES}
    slopes = {n: grads[n][:1] for n in MODULES}
    systems = {n: System(one[n], ridge, shield[n]) for n in MODULES}
    found = natural(slopes, outputs, systems, Positions(torch.tensor([0]), torch.ones(1), 1))

    def cost(values: dict[str, Tensor]) -> Tensor:
        """½ Σ tr(F ΔW C ΔWᵀ), both damped, of the least change that moves each output so."""
        total = torch.zeros((), dtype=torch.float64)
        for n, v in values.items():
            f = fisher[n] + ridge * torch.eye(D_OUT)
            c = tokens.T @ tokens + ridge * torch.eye(D_IN)
            spread = torch.linalg.solve(c, one[n].T).T
            change = v.T @ spread / (spread @ one[n].T)
            total = total + 0.5 * torch.trace(f @ change @ c @ change.T)
        return total

    def gain(values: dict[str, Tensor]) -> Tensor:
        return torch.stack([-(slopes[n] * v).sum() for n, v in values.items()]).sum()

    best = gain(found) ** 2 / cost(found)
    # The bound of Cauchy and Schwarz: 2 Σ gᵀF⁻¹g kᵀC⁻¹k.
    expected = torch.zeros((), dtype=torch.float64)
    for n in MODULES:
        f = fisher[n] + ridge * torch.eye(D_OUT)
        c = tokens.T @ tokens + ridge * torch.eye(D_IN)
        spread = slopes[n] @ torch.linalg.solve(f, slopes[n].T)
        expected += 2 * (spread * (one[n] @ torch.linalg.solve(c, one[n].T))).sum()
    torch.testing.assert_close(best, expected)

    for seed in range(5):
        other = {n: v + 0.1 * rows(1, D_OUT, 60 + seed) for n, v in found.items()}
        assert gain(other) ** 2 / cost(other) < best


def test_positions_of_one_name_share_the_mean_of_those_that_step(at):
    values = {"a": torch.tensor([[1.0, 2], [3, 4], [0, 0], [5, 6], [7, 8]])}
    steps = torch.tensor([True, True, False, True, True])[:, None]
    names = replace(at, goal=torch.tensor([0, 0, 0, 1, 2]))
    assert tied(values, steps, names)["a"].tolist() == [[2, 3], [2, 3], [2, 3], [5, 6], [7, 8]]


@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_the_bound_is_of_the_frobenius_norm_of_the_change(share):
    coeff, keys = rows(5, D_OUT, 50).float(), rows(5, D_IN, 51).float()
    norm = (coeff.double().T @ keys.double()).norm()
    found = bounded(coeff, keys, (share * norm).float())
    assert torch.allclose(found, coeff * min(1.0, share), rtol=1e-5)
    assert bounded(0 * coeff, keys, norm.float()).count_nonzero() == 0
