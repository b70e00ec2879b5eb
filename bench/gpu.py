"""One command for a GPU machine: kernel tests, whole turns and operations, in under 10 minutes.

    python -m bench.gpu --output DIR [--seconds 570]

Needs torch, Triton, transformers, pytest and pytest-benchmark; no network, no weights, not even an
installed package: run it from the root of the repository. Every part is a process of its own with
its own time, so a crash or a slow part takes nothing from the others. DIR gets a CSV file, a log of
every part, a table, and plots where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench import report
from bench.report import ROOT

PARTS = {
    "tests": (200, ["tests/ops/kernels", "--ignore=tests/ops/kernels/test_compile.py"]),
    "turns": (220, ["bench/bench_turns.py"]),
    "operations": (250, ["bench/bench_operations.py"]),
}
"""Name → most seconds, what pytest runs; the most important first."""

TINY = {"tests": (200, ["tests/ops/kernels/test_weighting.py"])}
"""Of the kernel tests, those that `--tiny` runs."""


def run_part(name: str, seconds: float, arguments: list[str], folder: Path) -> str:
    """Run pytest until it ends or its time is up, with a log in the folder; how it went."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    log = folder / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            ended = f"exit status {process.wait(max(seconds, 0))}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = "stopped: its time is up"
    lines = [line for line in log.read_text().splitlines() if line.strip()] or ["no output"]
    return f"{name}: {ended} after {time.monotonic() - start:.0f} s: {lines[-1].strip('= ')}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=570, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="everything in small, on any machine")
    options = parser.parse_args()
    folder = options.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + options.seconds
    selection = ["--selection=tiny"] if options.tiny else []
    summary = []
    for old in folder.glob("*.csv"):
        old.unlink()
    for name, (seconds, arguments) in (PARTS | (TINY if options.tiny else {})).items():
        if name != "tests":
            columns = "--benchmark-columns=median,iqr,rounds"
            arguments = [*arguments, "--benchmark-only", columns, *selection]
            arguments += [f"--results={folder}", "--append"]
        left = deadline - time.monotonic()
        summary.append(run_part(name, min(seconds, left), arguments, folder))
        print(summary[-1], flush=True)
    results = report.read(folder)
    text = report.table(results)
    (folder / "table.md").write_text("\n\n".join([*summary, text]) + "\n")
    print(text)
    try:
        report.draw(results, folder)
    except ImportError as error:
        print(f"no plots: {error}")


if __name__ == "__main__":
    main()
