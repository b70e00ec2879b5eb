"""The benchmark suite runs, measures memory, and never times a result that is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.bench_turn import peak_extra_memory

ROOT = Path(__file__).parents[2]
GROUPS = {"statistics", "values", "solve", "update", "turn"}
BREAK_OURS = """
import sys, pytest
from ultraedit_kernels import operations
solve = operations.solve
operations.solve = lambda *args, **kwargs: 1.01 * solve(*args, **kwargs)
sys.exit(pytest.main(sys.argv[1:]))
"""


def suite(tmp_path: Path, *start: str) -> tuple[int, str, dict[tuple[str, str], dict]]:
    """Exit status, output, and (group, method) → benchmark of a run at the tiny shape."""
    report = tmp_path / "report.json"
    options = ["--benchmark-only", "--shape", "tiny", f"--benchmark-json={report}"]
    # Our own process knows nothing of the outer pytest's options.
    done = subprocess.run(
        [sys.executable, *start, "bench/bench_turn.py", *options, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    rows = json.loads(report.read_text())["benchmarks"]
    found = {(row["group"], row["extra_info"]["method"]): row for row in rows}
    return done.returncode, done.stdout, found


def test_every_row_is_timed_and_carries_its_conditions(tmp_path):
    status, output, rows = suite(tmp_path, "-m", "pytest")
    assert status == 0, output
    assert set(rows) == {(group, method) for group in GROUPS for method in ("ours", "published")}
    for row in rows.values():
        info = row["extra_info"]
        assert (info["d_in"], info["d_out"], info["n"]) == (96, 32, 16)
        assert info["torch"] == torch.__version__ and info["threads"] == 1
        assert 0 <= info["error_vs_float64"] < 1e-3
        assert row["stats"]["median"] > 0 and row["stats"]["rounds"] >= 2
    assert "ours against the published form" in output and "speed-up" in output


def test_a_wrong_result_is_an_error_and_not_a_row(tmp_path):
    status, output, rows = suite(tmp_path, "-c", BREAK_OURS)
    assert status == 1
    assert ("solve", "ours") not in rows and ("turn", "ours") not in rows
    assert ("solve", "published") in rows and ("values", "ours") in rows
    assert "solve (ours) is off by" in output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_freed_again():
    def run() -> float:
        return float(torch.ones(64, 2**20 // 4).mul(2).sum())  # two tensors of 64 MiB at once

    result, peak, seconds = peak_extra_memory(run)
    assert result == 2 * 64 * 2**20 / 4 and seconds > 0
    assert peak is not None and 127 * 2**20 <= peak <= 140 * 2**20
