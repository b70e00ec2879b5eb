"""The benchmark suite runs, says under what conditions, and never times a result that is wrong."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import machine, report
from bench.bench_operations import BENCHMARKS, SHAPES, traffic
from bench.conftest import COLUMNS

ROOT = Path(__file__).parents[2]
PAPER_FORMS = {"ours", "eager", "published"}
BREAK_OURS = """
import sys, pytest
from ultraedit_kernels.ops import operations
solve = operations.solve
operations.solve = lambda *args, **kwargs: 1.01 * solve(*args, **kwargs)
sys.exit(pytest.main(sys.argv[1:]))
"""


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    # Our own process knows nothing of the outer pytest.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> tuple[str, Path]:
    """Output and folder of the GPU machine's command in its small form."""
    folder = tmp_path_factory.mktemp("gpu")
    done = run("-m", "bench.gpu", "--tiny", "--output", folder)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


@pytest.fixture(scope="module")
def rows(everything) -> list[dict[str, str]]:
    (path,) = everything[1].glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_part_of_the_gpu_command_succeeds(everything):
    output, folder = everything
    for part in ("tests", "turns", "operations"):
        assert f"{part}: exit status 0" in output, (folder / f"{part}.log").read_text()
    assert "published / ours" in output and "bare forward" in output
    assert (folder / "table.md").read_text().endswith(f"{report.table(report.read(folder))}\n")


def test_operations_have_rows_with_times_errors_and_conditions(rows, monkeypatch):
    monkeypatch.setattr(machine, "matrix_rate", lambda dtype: 1.0)
    found = {(r["benchmark"], r["method"]): r for r in rows if r["benchmark"] in BENCHMARKS}
    assert {(b, m) for b in BENCHMARKS for m in PAPER_FORMS} <= set(found)
    for row in found.values():
        assert list(row) == list(COLUMNS)
        assert (row["n"], row["d_in"], row["d_out"]) == ("16", "96", "32")
        assert row["torch"] == torch.__version__
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert 0 <= float(row["error"]) < 1e-2
        assert float(row["share_of_copy_bandwidth"]) > 0 and float(row["copy_gb_per_s"]) > 0
        moved = traffic(row["benchmark"], 16, 96, 32, getattr(torch, row["dtype"]))[0]
        assert int(row["bytes"]) == moved


def test_whole_turns_have_rows_for_the_published_method_and_a_bare_forward_pass(rows):
    found = {row["method"]: row for row in rows if row["benchmark"] == "turn of 100 edits"}
    assert {"forward", "published", "ours", "ours, closed loop", "ours: solve"} <= set(found)
    assert float(found["ours"]["error"]) < 1e-2  # of ΔW, from the published method's
    parts = sum(float(found[f"ours: {part}"]["median_ms"]) for part in ("capture", "solve"))
    assert parts < 2 * float(found["ours"]["p80_ms"])


def test_a_wrong_result_is_an_error_and_not_a_row(tmp_path):
    done = run(
        "-c", BREAK_OURS, "bench/bench_operations.py", "--benchmark-only", "--selection=tiny",
        f"--results={tmp_path}", "-p", "no:cacheprovider",
        "-k", "(solve or turn or values) and (ours or published)",
    )  # fmt: skip
    assert done.returncode == 1
    assert "solve (ours) is off by" in done.stdout
    ((_, kept),) = report.read(tmp_path).items()
    found = {(row["benchmark"], row["method"]) for row in kept}
    assert not {("solve", "ours"), ("turn", "ours")} & found
    assert {("solve", "published"), ("values", "ours")} <= found


@pytest.mark.skipif(sys.platform != "linux" or machine.GPU, reason="reads /proc")
def test_peak_memory_sees_what_is_freed_again():
    result, peak, seconds = machine.peak_extra_memory(
        lambda: float(torch.ones(64, 2**20 // 4).mul(2).sum())  # two tensors of 64 MiB at once
    )
    assert result == 2 * 64 * 2**20 / 4 and seconds > 0
    assert peak is not None and 127 * 2**20 <= peak <= 140 * 2**20


def test_shapes_are_those_of_the_edited_modules():
    assert SHAPES["Mistral-7B"] == (14336, 4096)  # down_proj
    assert SHAPES["LLaMA-3-8B"] == (4096, 14336)  # gate_proj and up_proj
    assert len(SHAPES) == 7


def test_operations_of_the_solve_are_those_of_the_smaller_system(monkeypatch):
    monkeypatch.setattr(machine, "matrix_rate", lambda dtype: 1.0)
    dual, primal = (traffic("solve", n, 100, 50, torch.float32)[1] for n in (10, 10_000))
    assert dual == 10 * 10 * 100 + 10**3 / 3 + 2 * 10 * 10 * 50
    assert primal < 10_000**3 / 3


def test_the_table_goes_between_the_markers_of_a_page(tmp_path):
    page = tmp_path / "results.md"
    begin, end = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.insert(page, "benchmarks", "new")
    report.insert(page, "benchmarks", "new")
    assert page.read_text() == f"before\n{begin}\nnew\n{end}\nafter\n"
    with pytest.raises(ValueError, match="no place for the table"):
        report.insert(page, "rounding", "new")


def test_the_table_says_that_no_gpu_was_measured(rows):
    text = report.table({"cpu": [row | {"device": "cpu"} for row in rows]})
    assert "Not measured on a GPU yet." in text
    assert "Not measured" not in report.table({"gpu": [row | {"device": "cuda"} for row in rows]})


def test_a_stream_is_projected_from_enough_turns_only(rows):
    turn = next(
        row for row in rows if row["method"] == "ours" and row["benchmark"][:7] == "turn of"
    )
    text = report.table({"gpu": [turn | {"rounds": "20", "median_ms": "150"}]})
    assert "30 s, projected from 20 turns" in text
    assert "projected" not in report.table({"gpu": [turn | {"rounds": "19", "median_ms": "150"}]})


def test_plots_carry_their_conditions(everything, rows, tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = report.draw({"machine": rows}, tmp_path)
    drawn = path.read_text()
    assert rows[0]["hardware"] in drawn and torch.__version__ in drawn
