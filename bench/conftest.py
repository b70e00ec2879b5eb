"""Collects bench_*.py, adds --shape, and prints ours against the published form after the table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

SHAPES = {
    "tiny": (96, 32, 16),  # for the suite's own test
    "small": (3584, 1024, 300),
    "mistral-7b": (14336, 4096, 300),  # down_proj
}
"""Name → d_in, d_out, answer positions in the turn."""

MIB = 2**20


class Row(NamedTuple):
    """One timed and checked row of the suite."""

    group: str
    method: str
    seconds: float  # median of the timed rounds
    least: float  # seconds of the fastest round
    rounds: int
    memory: int | None  # peak bytes beyond the inputs
    error: float  # relative, against float64


ROWS = pytest.StashKey[list[Row]]()
CONDITIONS = pytest.StashKey[dict[str, object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shape", default="small", choices=list(SHAPES), help="shape to measure")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[ROWS] = []


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = {(row.group, row.method): row for row in config.stash[ROWS]}
    if not rows:
        return
    terminalreporter.section("ours against the published form")
    for line in _table(rows):
        terminalreporter.write_line(line)
    conditions = config.stash[CONDITIONS]
    terminalreporter.write_line(", ".join(f"{name} {value}" for name, value in conditions.items()))


def _table(rows: dict[tuple[str, str], Row]) -> Iterator[str]:
    """One line a row; beside ours, the published row's time and memory divided by ours."""
    header = ("group", "method", "median ms", "min ms", "rounds", "extra MiB", "error")
    yield "{:<11}{:<10}{:>10}{:>10}{:>7}{:>10}{:>9}{:>10}{:>9}".format(
        *header, "speed-up", "memory"
    )
    for row in rows.values():
        other = rows.get((row.group, "published")) if row.method == "ours" else None
        faster = f"{other.seconds / row.seconds:.2f}×" if other else ""
        smaller = ""
        if other and min(other.memory or 0, row.memory or 0) >= MIB:
            smaller = f"{(other.memory or 0) / (row.memory or 1):.2f}×"
        yield (
            f"{row.group:<11}{row.method:<10}{row.seconds * 1e3:>10.2f}{row.least * 1e3:>10.2f}"
            f"{row.rounds:>7}{_mib(row.memory):>10}{row.error:>9.1e}{faster:>10}{smaller:>9}"
        )


def _mib(memory: int | None) -> str:
    """Below 1 MiB the resident set says nothing."""
    return "-" if memory is None else "<1" if memory < MIB else f"{memory / MIB:.1f}"
