"""Collects bench_*.py; times checked code only, and writes a row for each to a CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine

COLUMNS = (
    "benchmark", "method", "shape", "n", "d_in", "d_out", "dtype",
    "rounds", "median_ms", "p20_ms", "p80_ms",
    "bytes", "share_of_copy_bandwidth", "flops", "share_of_matrix_rate",
    "peak_extra_bytes", "error", "copy_gb_per_s", "matrix_gflop_per_s",
    "hardware", "device", "cores", "threads", "python", "torch", "triton", "transformers",
    "ultraedit_kernels", "kernels", "load_average", "time",
)  # fmt: skip
"""Columns of bench/results/*.csv; bench/README.md explains them."""

SECONDS = {"tiny": 0.1, "cpu": 2.0, "gpu": 0.4}
"""Timed seconds of a row, in 2 to 20 rounds."""
MOST_ROUNDS = 20

Measure = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ultraedit benchmarks")
    group.addoption(
        "--selection",
        default="gpu" if machine.GPU else "cpu",
        choices=["tiny", "cpu", "gpu"],
        help="what to measure: for the suite's own test, 15 minutes on 2 cores, or everything",
    )
    group.addoption("--results", type=Path, help="folder for the CSV file; none is written without")
    group.addoption("--append", action="store_true", help="add to the CSV file that is there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=machine.clock))


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Path | None:
    """The CSV file with its header, if one is wanted."""
    folder = request.config.getoption("--results")
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.file_stem()}.csv"
    if not (request.config.getoption("--append") and path.exists()):
        path.write_text(",".join(COLUMNS) + "\n")
    return path


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any, results: Path | None) -> Measure:
    """Check a result, then time what made it: see `checked` below."""
    wanted = SECONDS[request.config.getoption("--selection")]

    def checked(
        row: dict[str, Any],
        run: Callable[[], Any],
        error_of: Callable[[Any], float],
        limit: float,
        *,
        prepare: Callable[[], Any] = lambda: None,
        warm_up: bool = False,
        traffic: tuple[int, float, float] | None = None,
        rounds: int | None = None,
    ) -> None:
        """Run once for memory and error, then for time; write the row.

        Args:
            row: values of the first columns: benchmark, method, shape, sizes, dtype.
            run: what is measured, any number of times in a row.
            error_of: of run's first result; above `limit`, or NaN, nothing is timed or written.
            prepare: brings back the state that the first run starts from.
            warm_up: run once more before, so that compilation is in neither memory nor time.
            traffic: least bytes moved, floating-point operations in matrix products, and the
                seconds these need at the measured matrix rates.
            rounds: timed rounds, instead of as many as fit into `SECONDS`.
        """
        if warm_up or machine.GPU:
            prepare()
            run()
        prepare()
        result, memory, seconds = machine.peak_extra_memory(run)
        error = error_of(result)
        del result
        # Written so that a NaN fails.
        assert error <= limit, (
            f"{row['benchmark']} ({row['method']}) is off by {error:.1e}, expected at most "
            f"{limit:.0e}; not timed"
        )
        rounds = time_rounds(benchmark, row, run, seconds, wanted, rounds)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = torch.tensor(benchmark.stats.stats.data, dtype=torch.float64)
        full = full_row(row, rounds, times, memory, error, traffic)
        benchmark.extra_info |= full
        write(results, full)

    return checked


def time_rounds(
    benchmark: Any,
    row: dict[str, Any],
    run: Callable[[], Any],
    seconds: float,
    wanted: float,
    rounds: int | None,
) -> int:
    """Time `run`, whose first run took `seconds`; the number of rounds."""
    benchmark.group = f"{row['benchmark']} {row['shape']} n={row['n']}"
    benchmark.name = row["method"]
    if seconds < 1:  # the first run may have paid for more than itself
        start = machine.clock()
        run()
        seconds = machine.clock() - start
    if rounds is None:
        rounds = max(2, min(MOST_ROUNDS, int(wanted / seconds)))
    iterations = max(1, min(50, int(wanted / rounds / seconds)))
    benchmark.pedantic(run, rounds=rounds, iterations=iterations)
    return rounds


def full_row(
    row: dict[str, Any],
    rounds: int,
    times: torch.Tensor,
    memory: int | None,
    error: float,
    traffic: tuple[int, float, float] | None,
) -> dict[str, Any]:
    """A row of the CSV file, from the seconds of each round."""
    low, median, high = times.quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    full = row | {
        "rounds": rounds,
        "median_ms": median * 1e3,
        "p20_ms": low * 1e3,
        "p80_ms": high * 1e3,
        "peak_extra_bytes": memory,
        "error": error,
        **machine.conditions(),
        "load_average": round(os.getloadavg()[0], 1),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if traffic is not None:
        moved, flops, ideal = traffic
        bandwidth = machine.copy_bandwidth()
        full |= {
            "bytes": moved,
            "share_of_copy_bandwidth": moved / median / bandwidth,
            "flops": flops,
            "share_of_matrix_rate": ideal / median,
            "copy_gb_per_s": bandwidth / 1e9,
            "matrix_gflop_per_s": flops / ideal / 1e9 if ideal else None,
        }
    return full


def write(path: Path | None, row: dict[str, Any]) -> None:
    """Add a row at once: what was measured outlives a later crash."""
    if path is None:
        return
    shown = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(shown)
