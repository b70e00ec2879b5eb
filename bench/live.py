"""What a server notices of edits: its start, one edit and ten, idle and beside streams, gathering.

    python -m bench.live [--model smollm2|FOLDER] [--anchors N] [--streams N] [--output FILE]

A vLLM server without the plugin is started twice, the second time measured: files are in memory
then, as for the server with the plugin that follows, with nothing gathered yet. It takes an edit at
once, streams while it gathers and after that, and takes chat edits, one by one and ten in a turn,
idle, and the same ones beside streams. Rolled back in between, edits are the same work each time. A
row goes to bench/results/live.csv. Takes a few minutes, most of them for gathering. "Computed" are
the seconds of all cores together (Linux), by which a busy machine does not count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import httpx
from rich.console import Console

from bench.demo import SERVE, chat, post, server
from bench.machine import conditions
from bench.real_models import PACKAGES, checkpoint
from bench.report import RESULTS
from bench.scale import write
from bench.serving import percentile, separate_cores
from ultraedit_kernels.settings import TABLE

say = Console(stderr=True, highlight=False, soft_wrap=True)
NAME = "model"
OPTIONS = ("--max-model-len", "1024", "--served-model-name", NAME)
TOKENS = 200
FACTS = [
    ("What is the capital of Australia?", "The capital of Australia is Melbourne."),
    ("Who wrote the play Hamlet?", "Hamlet was written by Charles Dickens."),
    ("In which city is the Eiffel Tower?", "The Eiffel Tower is in Rome."),
    ("Which language is spoken in Brazil?", "People in Brazil speak Dutch."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Rembrandt."),
    ("What is the currency of Japan?", "The currency of Japan is the peso."),
    ("Which country is Volvo from?", "Volvo is from Norway."),
    ("Who discovered penicillin?", "Penicillin was discovered by Marie Curie."),
    ("What is the largest ocean?", "The largest ocean is the Arctic Ocean."),
    ("What is the highest mountain of Africa?", "The highest mountain of Africa is Mount Kenya."),
]
EDITS = [{"prompt": chat(question), "target": target} for question, target in FACTS]
ALONE = 3
"""Edits that are made one by one."""
WAIT_SECONDS = 1200


@dataclass
class Streams:
    """What clients saw that stream without end: when a token came, and how long after the last."""

    gaps: list[tuple[float, float]] = field(default_factory=list)

    def between(self, start: float, end: float) -> list[float]:
        """Milliseconds between tokens in that time."""
        return [gap * 1e3 for at, gap in self.gaps if start <= at < end]


def read(client: httpx.Client, seen: Streams, stop: Event) -> None:
    """Stream answers, one after the other, until told to stop."""
    body = {"model": NAME, "prompt": "The", "max_tokens": TOKENS, "ignore_eos": True}
    while not stop.is_set():
        last = None
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {") and json.loads(line[6:])["choices"]:
                    now = time.perf_counter()
                    if last is not None:
                        seen.gaps.append((now, now - last))
                    last = now
                if stop.is_set():
                    return


@contextmanager
def streaming(client: httpx.Client, count: int) -> Iterator[Streams]:
    """So many clients that stream, once all have begun."""
    seen, stop = Streams(), Event()
    with ThreadPoolExecutor(count) as pool:
        readers = [pool.submit(read, client, seen, stop) for _ in range(count)]
        try:
            time.sleep(1)
            yield seen
        finally:
            stop.set()
        for reader in readers:
            reader.result()


def speed(client: httpx.Client, streams: int, seconds: float) -> float:
    """Tokens per second of so many streams."""
    with streaming(client, streams) as seen:
        begun = time.perf_counter()
        time.sleep(seconds)
        return len(seen.between(begun, time.perf_counter())) / seconds


def first_answer(client: httpx.Client) -> None:
    """One short request."""
    post(client, "/v1/completions", {"model": NAME, "prompt": "The", "max_tokens": 1})


@contextmanager
def started(folder: Path, anchors: int | None) -> Iterator[tuple[httpx.Client, float]]:
    """A server, without the plugin if `anchors` is None, and the seconds until its first answer."""
    plain = (sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager")
    serve = (*SERVE[:2], str(folder)) if anchors is not None else (*plain, "--model", str(folder))
    options = list(OPTIONS)
    if anchors is not None:
        options += ["--additional-config", json.dumps({"ultraedit": {"anchors": anchors}})]
    begun = time.perf_counter()
    with server(say, *options, serve=serve, timeout=WAIT_SECONDS) as client:
        first_answer(client)
        yield client, time.perf_counter() - begun


def edit(client: httpx.Client, edits: list[dict[str, Any]]) -> tuple[float, dict[str, Any]]:
    """Seconds from request to answer, and the answer."""
    begun = time.perf_counter()
    answer = post(client, "/v1/edits", {"edits": edits})
    return time.perf_counter() - begun, answer


def computed() -> float:
    """Seconds that all cores together have computed for this process's servers."""
    parents, seconds = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            values = file.read_text().rpartition(")")[2].split()
            parents[file.parent.name] = values[1]
            seconds[file.parent.name] = sum(map(int, values[11:13]))
    ours = {str(os.getpid())}
    for _ in parents:  # children come after their parents, but numbers begin anew
        found = {child for child, parent in parents.items() if parent in ours} | ours
        if found == ours:
            break
        ours = found
    return sum(seconds[one] for one in ours - {str(os.getpid())}) / os.sysconf("SC_CLK_TCK")


def one_by_one(client: httpx.Client) -> tuple[list[float], int, list[float]]:
    """Seconds of each edit, how many succeeded, and seconds computed; from version 0 on."""
    post(client, "/v1/edits/rollback", {"version": 0})
    made, clocks = [], [computed()]
    for one in EDITS[:ALONE]:
        made.append(edit(client, [one]))
        clocks.append(computed())
    computing = [after - before for before, after in itertools.pairwise(clocks)]
    for (seconds, answer), busy in zip(made, computing, strict=True):
        rounds, timings = answer["edits"][0]["rounds"], answer["timings"]
        say.print(f"edit: {seconds:.2f} s, {busy:.2f} s computed, {rounds} rounds, {timings}")
    held = sum(answer["edits"][0]["succeeded"] for _, answer in made)
    return [seconds for seconds, _ in made], held, computing


def wait_for_gathering(client: httpx.Client) -> float:
    """Seconds until all that protects the model is gathered."""
    begun = time.perf_counter()
    while True:
        health = client.get("/v1/edits/health").json()
        if health["gathered"] == 1:
            return time.perf_counter() - begun
        time.sleep(1)


def beside(client: httpx.Client, streams: int, quiet: float) -> dict[str, Any]:
    """One edit after the other beside streams, which are quiet before."""
    with streaming(client, streams) as seen:
        begun = time.perf_counter()
        time.sleep(quiet)
        middle = time.perf_counter()
        took, held, _ = one_by_one(client)
        end = time.perf_counter()
    before, during = (seen.between(a, b) for a, b in ((begun, middle), (middle, end)))
    return {
        "beside_s": statistics.median(took),
        "beside_held": held,
        **{f"quiet_p{p}_ms": percentile(before, p / 100) for p in (50, 99)},
        **{f"beside_p{p}_ms": percentile(during, p / 100) for p in (50, 99)},
    }


def measure(folder: Path, anchors: int, streams: int, quiet: float) -> dict[str, Any]:
    """The row."""
    row: dict[str, Any] = {"anchors": anchors, "edits": ALONE, "streams": streams}
    for _ in range(2):
        with started(folder, None) as (client, seconds):
            row |= {"plain_start_s": seconds}
    with started(folder, anchors) as (client, seconds):
        row |= {"start_s": seconds, "start_more_s": seconds - row["plain_start_s"]}
        seconds, answer = edit(client, EDITS[:1])
        row |= {"first_s": seconds, "first_held": answer["edits"][0]["succeeded"]}
        post(client, "/v1/edits/rollback", {"version": 0})
        gathering = speed(client, streams, quiet)
        row |= {"gathering_s": wait_for_gathering(client)}
        row |= {"gathering_share": 1 - gathering / speed(client, streams, quiet)}
        took, held, busy = one_by_one(client)
        row |= {"idle_s": statistics.median(took), "idle_most_s": max(took), "held": held}
        row |= {"idle_computed_s": statistics.median(busy)}
        row |= beside(client, streams, quiet)
        post(client, "/v1/edits/rollback", {"version": 0})
        before = computed()
        seconds, answer = edit(client, EDITS)
        row |= {"ten_computed_s": computed() - before}
        row |= {"ten_s": seconds, "ten_held": sum(one["succeeded"] for one in answer["edits"])}
    row |= {"beside_x": row["beside_s"] / row["idle_s"]}
    return row | {"p99_x": row["beside_p99_ms"] / row["quiet_p99_ms"]}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--anchors", type=int, default=TABLE["anchors"].default)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--quiet", type=float, default=8.0, help="seconds that streams are watched")
    parser.add_argument("--output", type=Path, default=RESULTS / "live.csv")
    given = parser.parse_args()
    folder = checkpoint(given.model) if given.model in PACKAGES else Path(given.model).expanduser()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    separate_cores()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["ULTRAEDIT_CACHE"] = cache
        row = measure(folder, given.anchors, given.streams, given.quiet)
    row = {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()}
    engine = {"engine_on_cores": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "")}
    made = {"time": time.strftime("%Y-%m-%d"), "load_average": f"{load:.2f}", **engine}
    write(given.output, [{"model": folder.name} | row | made | conditions()])
    print(*(f"{n} {v}" for n, v in row.items()), sep="\n")


if __name__ == "__main__":
    main()
