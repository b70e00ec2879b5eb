"""What is counted. Metrics of a server, and of several together: test_operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("prometheus_client")

from prometheus_client import REGISTRY

from ultraedit_kernels.integrations.vllm import metrics

ANSWER: dict[str, Any] = {
    "version": 7,
    "edits": [{"succeeded": True}, {"succeeded": True}, {"succeeded": False}],
    "timings": {"queue_ms": 20.0, "capture_ms": 1500.0, "total_ms": 3000.0, "pause_ms": 4.0},
}


def value(name: str, **labels: str) -> float:
    """A sample of this process, in which other tests count as well."""
    return REGISTRY.get_sample_value(f"ultraedit_{name}", labels) or 0.0


def growth(act: Callable[[], None], *samples: tuple[str, dict[str, str]]) -> list[float]:
    before = [value(name, **labels) for name, labels in samples]
    act()
    return [
        value(name, **labels) - was for (name, labels), was in zip(samples, before, strict=True)
    ]


def test_a_committed_turn_counts_its_edits_and_is_the_version() -> None:
    edited = {"kind": "edit", "outcome": "committed"}
    assert growth(
        lambda: metrics.changed("edit", "committed", ANSWER),
        ("changes_total", edited),
        ("edits_total", {"outcome": "succeeded"}),
        ("edits_total", {"outcome": "failed"}),
    ) == [1, 2, 1]
    assert value("version") == 7


def test_times_are_in_seconds_and_by_phase() -> None:
    grown = growth(
        lambda: metrics.changed("edit", "committed", ANSWER),
        ("duration_seconds_sum", {"phase": "capture"}),
        ("duration_seconds_bucket", {"phase": "queue", "le": "0.025"}),
        ("duration_seconds_bucket", {"phase": "queue", "le": "0.01"}),
        ("duration_seconds_count", {"phase": "solve"}),  # it had none
        ("pause_seconds_sum", {}),
    )
    assert grown == pytest.approx([1.5, 1, 0, 0, 0.004])


@pytest.mark.parametrize("outcome", ["dry_run", "repeated"])
def test_what_changes_nothing_is_counted_and_the_version_stays(outcome: str) -> None:
    metrics.serving(3)
    assert growth(
        lambda: metrics.changed("edit", outcome, ANSWER),
        ("changes_total", {"kind": "edit", "outcome": outcome}),
        ("edits_total", {"outcome": "succeeded"}),
        ("pause_seconds_count", {}),
    ) == [1, 0, 1]
    assert value("version") == 3


def test_a_change_without_an_answer_has_no_times() -> None:
    assert growth(
        lambda: metrics.changed("rollback", "refused"),
        ("changes_total", {"kind": "rollback", "outcome": "refused"}),
        ("pause_seconds_count", {}),
    ) == [1, 0]


def test_a_rollback_has_no_edits() -> None:
    timings = {"queue_ms": 1.0, "commit_ms": 2.0, "total_ms": 3.0, "pause_ms": 2.0}
    assert growth(
        lambda: metrics.changed("rollback", "committed", {"version": 0, "timings": timings}),
        ("edits_total", {"outcome": "succeeded"}),
        ("duration_seconds_count", {"phase": "commit"}),
    ) == [0, 1]
    assert value("version") == 0


def test_failures_are_counted_by_reason() -> None:
    failures = [("failures_total", {"reason": reason}) for reason in ("conflict", "too_large")]
    assert growth(lambda: metrics.failed("conflict"), *failures) == [1, 0]


def test_a_change_is_under_way_until_it_ends_however_it_ends() -> None:
    begin = value("queue_length")
    with pytest.raises(RuntimeError), metrics.queued():
        with metrics.queued():
            assert value("queue_length") == begin + 2
        assert value("queue_length") == begin + 1
        raise RuntimeError
    assert value("queue_length") == begin
