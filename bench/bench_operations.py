"""The arithmetic of one turn on one edited module: ours, what one would write instead, published.

    pytest bench/bench_operations.py --benchmark-only [--selection cpu|gpu] [--results DIR]

Every row is checked against the float64 reference before it is timed; a row whose check fails is an
error, not a time. `bench/README.md` says how to read the figures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import baselines, eager, machine
from bench.baselines import Moments
from bench.conftest import Measure
from ultraedit_kernels.model.presets import OUTPUT_PROJECTIONS, PRESETS
from ultraedit_kernels.ops import operations, reference
from ultraedit_kernels.ops.statistics import Statistics

RIDGE = 1.0

SHAPES = {
    preset.model: (preset.intermediate, preset.hidden)
    if preset.edited[0][0] in OUTPUT_PROJECTIONS
    else (preset.hidden, preset.intermediate)
    for preset in PRESETS
} | {"tiny": (96, 32)}
"""Model → d_in, d_out of the modules that the paper edits in it; "tiny" is for the suite's test."""

ROWS = (1, 30, 300, 1000, 4096)
"""Answer positions n in a turn. 100 edits of the published sets have about 300."""

BENCHMARKS = ("statistics", "values", "solve", "update", "turn")

LIMITS = {"ours": 1e-4, "unchecked": 1e-4, "eager": 1e-4, "compile": 1e-4, "published": 5e-2}
"""Largest relative error that is still called the same result, besides the rounding of W. The
published solve is given more room: it loses up to cond(HᵀH + λI) · 2⁻²⁴."""


class Case(NamedTuple):
    """A row to measure."""

    shape: str
    n: int
    benchmark: str
    method: str


def cases(selection: str) -> list[Case]:
    """What to measure, the most telling first; a shape's cases are neighbours."""
    if selection == "tiny":
        methods = [m for m in LIMITS if m != "compile"]  # the compiler alone takes half a minute
        return [Case("tiny", 16, b, m) for b in BENCHMARKS for m in methods if sensible(b, m)]
    if selection == "gpu":
        return [
            Case(shape, n, b, m)
            for n in sorted(ROWS, key=lambda n: n != 300)
            for shape in SHAPES
            for b in BENCHMARKS
            for m in (LIMITS if n == 300 else ("ours", "eager"))
            if shape != "tiny" and sensible(b, m)
        ]
    found = []
    for n in (300, 1, 30, 1000):  # the published solve takes most of a minute, so once
        for b in BENCHMARKS:
            found += [
                Case("Mistral-7B", n, b, m)
                for m in (LIMITS if n == 300 else ("ours", "eager"))
                if sensible(b, m) and (b, m) != ("solve", "published")
            ]
    found += [Case("LLaMA-3-8B", 300, b, m) for b in BENCHMARKS for m in LIMITS if sensible(b, m)]
    rest = [shape for shape in SHAPES if shape not in ("tiny", "Mistral-7B", "LLaMA-3-8B")]
    found += [Case(shape, 300, "turn", m) for shape in rest for m in ("ours", "eager")]
    found += [Case("Mistral-7B", 4096, "turn", m) for m in ("ours", "eager")]
    return [case for case in found if case.method != "unchecked"]


def sensible(benchmark: str, method: str) -> bool:
    """The turn is compiled as a whole; only on a GPU do the checks of arguments take time."""
    if method == "compile":
        return benchmark == "turn"
    return method != "unchecked" or machine.GPU


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    found = cases(metafunc.config.getoption("--selection"))
    metafunc.parametrize("case", found, ids=["-".join(map(str, case)) for case in found])


@dataclass(frozen=True)
class Problem:
    """Inputs as captured, in the model's dtype; the results of every step in float64."""

    keys: Tensor
    grads: Tensor
    weight: Tensor
    lr: float
    before: Statistics
    after: Statistics
    values: Tensor
    coeff: Tensor
    delta: Tensor


def make_problem(d_in: int, d_out: int, n: int, dtype: torch.dtype) -> Problem:
    """Seeded standard normal keys, gradients of 1e-3, one earlier turn, and W as large as ΔW.

    Such keys are the kind case for the published solve: nearly orthogonal, of norm √d_in. Such a W
    lets its rounding hide as little as possible of the error of ΔW.
    """
    generator = torch.Generator(machine.DEVICE).manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        x = torch.randn(rows, columns, generator=generator, device=machine.DEVICE)
        return (x * scale).to(dtype)

    earlier, keys = normal(n, d_in, 1), normal(n, d_in, 1)
    earlier_grads, grads = normal(n, d_out, 1e-3), normal(n, d_out, 1e-3)
    empty = Statistics.empty(d_in, d_out, machine.DEVICE)
    before = reference.update_statistics(empty, earlier.double(), earlier_grads.double())
    after = reference.update_statistics(before, keys.double(), grads.double())
    lr = 0.0143 / d_in
    values = reference.edit_values(keys.double(), grads.double(), after, lr)
    coeff = reference.solve(keys.double(), values, RIDGE)
    delta = coeff.T @ keys.double()
    weight = normal(d_out, d_in, float(delta.square().mean().sqrt()))
    return Problem(keys, grads, weight, lr, before, after, values, coeff, delta)


@pytest.fixture(scope="module")
def problems() -> dict[tuple[str, int], Problem]:
    """The problem of the shape that is being measured."""
    return {}


def moments(stats: Statistics) -> Moments:
    """The same statistics in the baselines' form."""
    return Moments(float(stats.count), stats.mean.float(), stats.m2.float())


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in float64."""
    return float((got.double() - expected).norm() / expected.norm())


def test_operation(case: Case, problems: dict[tuple[str, int], Problem], measure: Measure) -> None:
    d_in, d_out = SHAPES[case.shape]
    dtype = torch.bfloat16 if machine.GPU else torch.float32
    if (case.shape, case.n) not in problems:
        problems.clear()  # one at a time: they are large
        problems[case.shape, case.n] = make_problem(d_in, d_out, case.n, dtype)
    p = problems[case.shape, case.n]
    weight = p.weight.clone()
    steps = {"eager": eager_steps, "compile": compiled_steps, "published": published_steps}
    run = steps.get(case.method, our_steps)(p, weight, case)

    def statistics_error(got: Statistics | Moments) -> float:
        # Keys and gradients apart: the keys' scale would hide an error in the gradients.
        return max(
            relative(part(mine), part(truth))
            for part in (lambda x: x[:d_in], lambda x: x[d_in:])
            for mine, truth in ((got.mean, p.after.mean), (got.std, p.after.std))
        )

    def solve_error(got: Tensor) -> float:
        # The published one is X = ΔWᵀ, the others Y with ΔW = YᵀH: compare the ΔW of each.
        published = case.method == "published"
        return relative(got.T if published else got.double().T @ p.keys.double(), p.delta)

    error_of: Callable[[Any], float] = {
        "statistics": statistics_error,
        "values": lambda got: relative(got, p.values),
        "solve": solve_error,
    }.get(case.benchmark, lambda _: relative(weight.double() - p.weight.double(), p.delta))
    rounding = torch.finfo(dtype).eps if case.benchmark in ("update", "turn") else 0.0
    row = {
        "benchmark": case.benchmark,
        "method": case.method,
        "shape": case.shape,
        "n": case.n,
        "d_in": d_in,
        "d_out": d_out,
        "dtype": str(dtype).removeprefix("torch."),
    }
    measure(
        row,
        run,
        error_of,
        LIMITS[case.method] + rounding,
        prepare=lambda: weight.copy_(p.weight),
        warm_up=case.method == "compile",
        traffic=traffic(case.benchmark, case.n, d_in, d_out, dtype),
    )


def our_steps(p: Problem, weight: Tensor, case: Case) -> Callable[[], Any]:
    """The public operations; "unchecked" are those of their backend, without checks of arguments.

    Their checks for NaN wait for the GPU.
    """
    ops: Any = operations
    if case.method == "unchecked":
        ops = operations.backend(p.keys)

    def turn() -> Statistics:
        stats = ops.update_statistics(p.before, p.keys, p.grads)
        values = ops.edit_values(p.keys, p.grads, stats, p.lr)
        ops.rank_k_update_(weight, ops.solve(p.keys, values, RIDGE, None), p.keys)
        return stats

    values, coeff = p.values.float(), p.coeff.float()
    return {
        "statistics": lambda: ops.update_statistics(p.before, p.keys, p.grads),
        "values": lambda: ops.edit_values(p.keys, p.grads, p.after, p.lr),
        "solve": lambda: ops.solve(p.keys, values, RIDGE, None),
        "update": lambda: ops.rank_k_update_(weight, coeff, p.keys),
        "turn": turn,
    }[case.benchmark]


def eager_steps(p: Problem, weight: Tensor, case: Case) -> Callable[[], Any]:
    before, after = moments(p.before), moments(p.after)
    values, coeff = p.values.float(), p.coeff.float()
    return {
        "statistics": lambda: eager.update_moments(before, p.keys, p.grads),
        "values": lambda: eager.edit_values(p.keys, p.grads, after, p.lr),
        "solve": lambda: eager.solve(p.keys, values, RIDGE),
        "update": lambda: eager.update_(weight, coeff, p.keys),
        "turn": lambda: eager.turn_(weight, p.keys, p.grads, before, p.lr, RIDGE),
    }[case.benchmark]


def compiled_steps(p: Problem, weight: Tensor, _: Case) -> Callable[[], Any]:
    before = moments(p.before)
    torch.compiler.reset()
    turn = torch.compile(eager.turn_, dynamic=False)
    try:
        turn(weight, p.keys, p.grads, before, p.lr, RIDGE)
    except Exception as error:  # no compiler, no Python headers, an unsupported version, ...
        pytest.skip(f"torch.compile is not available here: {type(error).__name__}: {error}")
    return lambda: turn(weight, p.keys, p.grads, before, p.lr, RIDGE)


def published_steps(p: Problem, weight: Tensor, case: Case) -> Callable[[], Any]:
    before, after = moments(p.before), moments(p.after)
    keys, grads = p.keys.float(), p.grads.float()
    values, x = p.values.float(), p.delta.T.float().contiguous()

    def edit_values() -> Tensor:
        z_hat = baselines.normalise(baselines.features(keys, grads), after)
        return baselines.edit_values(z_hat, keys.shape[1], p.lr)

    return {
        "statistics": lambda: baselines.update_moments(before, baselines.features(keys, grads)),
        "values": edit_values,
        "solve": lambda: baselines.solve(keys, values, RIDGE),
        "update": lambda: baselines.update_(weight, x),
        "turn": lambda: baselines.turn_(weight, keys, grads, before, p.lr, RIDGE),
    }[case.benchmark]


def traffic(
    benchmark: str, n: int, d_in: int, d_out: int, dtype: torch.dtype
) -> tuple[int, float, float]:
    """Least bytes, operations in matrix products and the seconds these need, whatever the method.

    Bytes: every operand read once and every result written once, in the dtypes of ours; those of a
    turn are the sum over its steps. Operations: the dual or the primal form, whichever is smaller,
    in float64, and the rank-n update in the model's dtype.
    """
    if benchmark == "turn":
        steps = [traffic(b, n, d_in, d_out, dtype) for b in BENCHMARKS[:-1]]
        moved, flops, seconds = (sum(column) for column in zip(*steps, strict=True))
        return int(moved), flops, seconds
    item, d = dtype.itemsize, d_in + d_out
    moved = {
        "statistics": n * d * item + 4 * d * 8,
        "values": n * d * item + 2 * d * 8 + n * d_out * 4,
        "solve": n * d_in * item + 2 * n * d_out * 4,
        "update": 2 * d_in * d_out * item + n * d_out * 4 + n * d_in * item,
    }[benchmark]
    if benchmark == "solve":
        m = min(n, d_in)
        flops = n * d_in * m + m**3 / 3 + 2.0 * m * m * d_out
        flops += 4.0 * n * d_in * d_out if m < n else 0.0
        return moved, flops, flops / machine.matrix_rate(torch.float64)
    if benchmark == "update":
        flops = 2.0 * n * d_in * d_out
        return moved, flops, flops / machine.matrix_rate(dtype)
    return moved, 0.0, 0.0
