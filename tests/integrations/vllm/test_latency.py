"""What requests notice of edits: nothing, in what they are answered, and little in how fast."""

from __future__ import annotations

import concurrent.futures
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.vllm

FACTS = [
    ("The capital of Australia is", ("Sydney", "Perth")),
    ("The capital of Japan is", ("Osaka", "Kyoto")),
]
TOKENS = 200
MOST_STRETCH, MOST_MORE_MS = 1.5, 10.0
MOST_PAUSE_MS = 20.0


@dataclass
class Streams:
    """Streams that follow one another on several connections until told to stop."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    """Of every chunk but a stream's first: when it came, and how long after the one before it."""
    tokens: list[int] = field(default_factory=list)
    finished: list[str | None] = field(default_factory=list)

    def between(self, start: float, end: float) -> list[float]:
        """Gaps that ended in that time, ms, in order of length."""
        return sorted(gap * 1e3 for at, gap in self.gaps if start <= at < end)


def percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


@contextmanager
def streaming(server: Any, count: int) -> Iterator[Streams]:
    seen, stop = Streams(), threading.Event()
    body = {"model": "tiny-facts", "prompt": "The capital of", "stream": True, "temperature": 0}
    body |= {"max_tokens": TOKENS, "ignore_eos": True}
    body |= {"stream_options": {"include_usage": True}}

    def read(client: httpx.Client) -> None:
        last, tokens, finished = None, 0, None
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line.removeprefix("data: "))
                if chunk.get("usage"):
                    tokens = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    finished = choice["finish_reason"] or finished
                    if last is not None:
                        seen.gaps.append((now, now - last))
                    last = now
        seen.tokens.append(tokens)
        seen.finished.append(finished)

    def keep_reading() -> None:
        headers = server.client.headers
        with httpx.Client(base_url=server.url, headers=headers, timeout=120) as client:
            while not stop.is_set():
                read(client)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        readers = [pool.submit(keep_reading) for _ in range(count)]
        try:
            while len(seen.gaps) < count:
                assert not any(reader.done() for reader in readers)
                time.sleep(0.01)
            yield seen
        finally:
            stop.set()
        for reader in readers:
            reader.result()


@pytest.mark.soak
def test_streams_go_on_while_turns_commit(
    server: Any, soak: bool, figure: Callable[..., None]
) -> None:
    count, turns, quiet_seconds = (16, 20, 10.0) if soak else (4, 3, 2.0)
    with streaming(server, count) as seen:
        time.sleep(1)
        start = time.perf_counter()
        time.sleep(quiet_seconds)
        middle = time.perf_counter()
        reports = []
        for i in range(turns):
            prompt, targets = FACTS[i % 2]
            reports.append(server.edit({"prompt": prompt, "target": targets[i // 2 % 2]}))
        end = time.perf_counter()

    assert seen.tokens == [TOKENS] * len(seen.tokens)
    assert set(seen.finished) == {"length"}
    assert [report["version"] for report in reports] == list(range(1, turns + 1))
    assert all(report["edits"][0]["succeeded"] for report in reports)

    quiet, edited = seen.between(start, middle), seen.between(middle, end)
    pauses = sorted(report["timings"]["pause_ms"] for report in reports)
    commits = sorted(report["timings"]["commit_ms"] for report in reports)
    ratio = percentile(edited, 0.99) / percentile(quiet, 0.99)
    figure(
        streams=count,
        turns=turns,
        requests=len(seen.tokens),
        quiet_p50_ms=round(percentile(quiet, 0.5), 1),
        quiet_p99_ms=round(percentile(quiet, 0.99), 1),
        p50_ms=round(percentile(edited, 0.5), 1),
        p99_ms=round(percentile(edited, 0.99), 1),
        p99_ratio=round(ratio, 2),
        pause_p50_ms=round(percentile(pauses, 0.5), 1),
        pause_ms=round(pauses[-1], 1),
        commit_ms=round(percentile(commits, 0.5), 1),
        turn_seconds=round((end - middle) / turns, 2),
    )
    if soak:  # the short form is no measurement
        most = MOST_STRETCH * percentile(quiet, 0.99) + MOST_MORE_MS
        assert percentile(edited, 0.99) <= most
        assert pauses[-1] <= MOST_PAUSE_MS
