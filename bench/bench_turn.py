"""The arithmetic of one turn on one module: ours against the published numeric form, on the CPU.

    pytest bench/bench_turn.py --benchmark-only [--shape mistral-7b] [--benchmark-json FILE]

Every row is checked against the float64 reference before it is timed; a row whose check fails is an
error, not a time. `bench/README.md` says how to read the figures.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines
from bench.baselines import Moments
from bench.conftest import CONDITIONS, ROWS, SHAPES, Row
from ultraedit_kernels import operations, reference
from ultraedit_kernels.statistics import Statistics

RIDGE = 1.0
LIMITS = {"ours": 1e-4, "published": 5e-2}
"""Largest relative error that is still called the same result; float32 rounding only. The published
solve is given more room: it loses up to cond(HᵀH + λI) · 2⁻²⁴."""

SECONDS, MOST_ROUNDS = 5.0, 20
"""Rounds of a row: as many as fit into SECONDS, at least 2."""

METHODS = pytest.mark.parametrize("method", ["ours", "published"])


@dataclass(frozen=True)
class Problem:
    """Inputs of every step in float32, as captured; results of the step before it in float64."""

    keys: Tensor
    grads: Tensor
    weight: Tensor
    lr: float
    before: Statistics
    after: Statistics
    values: Tensor
    coeff: Tensor
    delta: Tensor


def make_problem(d_in: int, d_out: int, n: int) -> Problem:
    """Seeded standard normal keys, gradients of 1e-3, W of d_in^-½, and one earlier turn.

    Such keys are the kind case for the published solve: nearly orthogonal, of norm √d_in.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    earlier, keys = normal(n, d_in), normal(n, d_in)
    earlier_grads, grads = 1e-3 * normal(n, d_out), 1e-3 * normal(n, d_out)
    empty = Statistics.empty(d_in, d_out)
    before = reference.update_statistics(empty, earlier.double(), earlier_grads.double())
    after = reference.update_statistics(before, keys.double(), grads.double())
    lr = 0.0143 / d_in
    values = reference.edit_values(keys.double(), grads.double(), after, lr)
    coeff = reference.solve(keys.double(), values, RIDGE)
    weight = normal(d_out, d_in) * d_in**-0.5
    delta = coeff.T @ keys.double()
    return Problem(keys, grads, weight, lr, before, after, values, coeff, delta)


def moments(stats: Statistics) -> Moments:
    """The same statistics in the baseline's form."""
    return Moments(float(stats.count), stats.mean.float(), stats.m2.float())


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖ in float64."""
    return float((got.double() - expected).norm() / expected.norm())


def peak_extra_memory(run: Callable[[], Any]) -> tuple[Any, int | None, float]:
    """What `run` returns, the bytes by which the process grew at its highest, and its seconds.

    Growth of the resident set as the Linux kernel saw it, so BLAS and LAPACK work space counts too.
    Free heap is handed back first, lest it be reused unseen. None without Linux and glibc.
    """
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # peak := current
        before = _status_bytes("VmRSS")
    except OSError:
        before = None
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    return result, None if before is None else max(_status_bytes("VmHWM") - before, 0), seconds


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


Report = Callable[[str, str, Callable[[], Any], Callable[[Any], float]], None]


@pytest.fixture(scope="module")
def shape(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--shape")


@pytest.fixture(scope="module")
def problem(shape: str) -> Problem:
    return make_problem(*SHAPES[shape])


@pytest.fixture
def report(request: pytest.FixtureRequest, benchmark: Any, shape: str) -> Report:
    """Check a step's result, then time it: report(group, method, run, error of run's result)."""
    d_in, d_out, n = SHAPES[shape]
    conditions = {
        "shape": shape,
        "d_in": d_in,
        "d_out": d_out,
        "n": n,
        "dtype": "float32",
        "device": "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }

    def checked(
        group: str, method: str, run: Callable[[], Any], error_of: Callable[[Any], float]
    ) -> None:
        result, memory, seconds = peak_extra_memory(run)
        error = error_of(result)
        del result
        # Written so that a NaN fails.
        assert error <= LIMITS[method], (
            f"{group} ({method}) is off by {error:.1e} relative to float64, expected at most "
            f"{LIMITS[method]:.0e}; not timed"
        )
        benchmark.group = group
        benchmark.name = f"{group}[{method}]"
        benchmark.extra_info |= conditions | {
            "method": method,
            "peak_extra_bytes": memory,
            "error_vs_float64": error,
        }
        rounds = max(2, min(MOST_ROUNDS, int(SECONDS / seconds)))
        benchmark.pedantic(run, rounds=rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = benchmark.stats.stats
        request.config.stash[ROWS].append(
            Row(group, method, times.median, times.min, rounds, memory, error)
        )
        request.config.stash[CONDITIONS] = conditions

    return checked


@METHODS
def test_statistics(method: str, problem: Problem, report: Report) -> None:
    p, start = problem, moments(problem.before)
    run = {
        "ours": lambda: operations.update_statistics(p.before, p.keys, p.grads),
        "published": lambda: baselines.update_moments(start, baselines.features(p.keys, p.grads)),
    }[method]
    d_in = p.keys.shape[1]

    def error(got: Statistics | Moments) -> float:
        # Keys and gradients apart: the keys' scale would hide an error in the gradients.
        return max(
            relative(part(mine), part(truth))
            for part in (lambda x: x[:d_in], lambda x: x[d_in:])
            for mine, truth in ((got.mean, p.after.mean), (got.std, p.after.std))
        )

    report("statistics", method, run, error)


@METHODS
def test_values(method: str, problem: Problem, report: Report) -> None:
    p, after = problem, moments(problem.after)

    def published() -> Tensor:
        z_hat = baselines.normalise(baselines.features(p.keys, p.grads), after)
        return baselines.edit_values(z_hat, p.keys.shape[1], p.lr)

    run = {
        "ours": lambda: operations.edit_values(p.keys, p.grads, p.after, p.lr),
        "published": published,
    }[method]
    report("values", method, run, lambda got: relative(got, p.values))


@METHODS
def test_solve(method: str, problem: Problem, report: Report) -> None:
    p, values = problem, problem.values.float()
    run = {
        "ours": lambda: operations.solve(p.keys, values, RIDGE),
        "published": lambda: baselines.solve(p.keys, values, RIDGE),
    }[method]

    def error(got: Tensor) -> float:
        # Ours is Y with ΔW = YᵀH, the published one X = ΔWᵀ: compare the ΔW of each.
        change = got.double().T @ p.keys.double() if method == "ours" else got.T
        return relative(change, p.delta)

    report("solve", method, run, error)


@METHODS
def test_update(method: str, problem: Problem, report: Report) -> None:
    p, weight = problem, problem.weight.clone()
    coeff, x = p.coeff.float(), p.delta.T.float().contiguous()
    run = {
        "ours": lambda: operations.rank_k_update_(weight, coeff, p.keys),
        "published": lambda: baselines.update_(weight, x),
    }[method]
    report("update", method, run, lambda got: relative(got.double() - p.weight.double(), p.delta))


@METHODS
def test_turn(method: str, problem: Problem, report: Report) -> None:
    p, weight, start = problem, problem.weight.clone(), moments(problem.before)

    def ours() -> Statistics:
        stats = operations.update_statistics(p.before, p.keys, p.grads)
        values = operations.edit_values(p.keys, p.grads, stats, p.lr)
        operations.rank_k_update_(weight, operations.solve(p.keys, values, RIDGE), p.keys)
        return stats

    run = {
        "ours": ours,
        "published": lambda: baselines.turn_(weight, p.keys, p.grads, start, p.lr, RIDGE),
    }[method]
    report("turn", method, run, lambda _: relative(weight.double() - p.weight.double(), p.delta))
