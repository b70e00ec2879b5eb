"""Prometheus metrics `ultraedit_*`, served at vLLM's own /metrics.

Made when first used: vLLM decides before whether they are shared between processes (several API
servers, PROMETHEUS_MULTIPROC_DIR), and clears away its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PAUSE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 5)
PHASES = ("queue", "capture", "solve", "commit", "total")


class _Metrics:
    def __init__(self) -> None:
        # Several API servers: the last to set it knows best; each has a queue of its own.
        self.version = Gauge(
            "ultraedit_version", "Version that is served.", multiprocess_mode="mostrecent"
        )
        self.queue = Gauge(
            "ultraedit_queue_length",
            "Changes under way or waiting.",
            multiprocess_mode="livesum",
        )
        self.gathered = Gauge(
            "ultraedit_gathered_ratio",
            "Share of the model's own texts that are written, which edits are to leave alone.",
            multiprocess_mode="mostrecent",
        )
        self.behind = Gauge(
            "ultraedit_versions_behind",
            "Versions that a server is behind the leader that it follows.",
            multiprocess_mode="mostrecent",
        )
        self.changes = Counter(
            "ultraedit_changes", "Changes asked for, by kind and outcome.", ["kind", "outcome"]
        )
        self.edits = Counter(
            "ultraedit_edits", "Edits of committed turns, by whether they hold.", ["outcome"]
        )
        self.failures = Counter(
            "ultraedit_failures", "Requests that were refused or failed, by reason.", ["reason"]
        )
        self.duration = Histogram(
            "ultraedit_duration_seconds", "Time of a change, by phase.", ["phase"], buckets=SECONDS
        )
        self.pause = Histogram(
            "ultraedit_pause_seconds",
            "Longest time that a change kept the engine from stepping.",
            buckets=PAUSE_SECONDS,
        )


@functools.cache
def _metrics() -> _Metrics:
    return _Metrics()


def serving(version: int) -> None:
    """The version that is served from now on."""
    _metrics().version.set(version)


def behind(versions: int) -> None:
    """How far the server is behind its leader."""
    _metrics().behind.set(versions)


def gathered(share: float) -> None:
    """How far what protects the model is gathered."""
    _metrics().gathered.set(share)


@contextmanager
def queued() -> Iterator[None]:
    """Counts a change as under way."""
    with _metrics().queue.track_inprogress():
        yield


def failed(reason: str) -> None:
    """A request that was refused or failed."""
    _metrics().failures.labels(reason).inc()


def changed(kind: str, outcome: str, answer: Mapping[str, Any] | None = None) -> None:
    """A change, and the answer to it if it got one."""
    metrics = _metrics()
    metrics.changes.labels(kind, outcome).inc()
    if answer is None:
        return
    timings = answer["timings"]
    for phase in PHASES:
        if f"{phase}_ms" in timings:
            metrics.duration.labels(phase).observe(timings[f"{phase}_ms"] / 1e3)
    metrics.pause.observe(timings["pause_ms"] / 1e3)
    if outcome == "committed":
        serving(answer["version"])
        for edit in answer.get("edits", ()):
            metrics.edits.labels("succeeded" if edit["succeeded"] else "failed").inc()
