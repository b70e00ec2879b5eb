"""Where the time of a turn goes."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import pytest

from ultraedit_kernels.method.results import Clock


def test_a_clock_notes_what_each_phase_takes():
    def work() -> Generator[str, None, Any]:
        time.sleep(0.05)
        yield "capture"
        yield "solve"
        time.sleep(0.02)
        yield "capture"
        return "done"

    def timed() -> Generator[str, None, str]:
        return (yield from clock.timed(work()))

    clock, phases = Clock(), []
    running = timed()
    with pytest.raises(StopIteration) as stopped:
        while True:
            phases.append(next(running))
            time.sleep(0.01)  # is nobody's
    clock.commits()
    took = clock.milliseconds()
    assert stopped.value.value == "done" and phases == ["capture", "solve", "capture"]
    assert took["capture_ms"] >= 70 and took["total_ms"] >= took["capture_ms"] + 30
    assert took["solve_ms"] < took["capture_ms"]
    assert took["commit_ms"] < took["total_ms"]
