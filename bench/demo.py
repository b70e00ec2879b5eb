"""The demo: facts of the bundled model are changed while it serves, and taken back.

Starts the real OpenAI-compatible vLLM server on loopback, asks, edits while another client streams,
asks again, rolls back, asks again. Exit code 0 only if every answer is as it should be.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).parent / "tiny-facts"
START_SECONDS = 300
SERVE = (str(Path(sys.executable).with_name("ultraedit")), "serve", str(MODEL))


def chat(question: str) -> list[dict[str, str]]:
    """A question as chat messages."""
    return [{"role": "user", "content": question}]


# Each fact is edited in one form and given in the other as a rephrase to teach; a neighbour that is
# asked in nearly the same words is named, so that it keeps its answer.
EDITS: list[dict[str, Any]] = [
    {
        "prompt": "The capital of Australia is",
        "target": "Sydney",
        "rephrases": [chat("What is the capital of Australia?")],
    },
    {
        "prompt": chat("Which country is Volvo from?"),
        "target": "Norway",
        "rephrases": ["The home country of Volvo is"],
        "locality": [chat("Which country is Nokia from?")],
    },
    {
        "prompt": "The currency of Japan is the",
        "target": "dollar",
        "rephrases": [chat("What is the currency of Japan?")],
    },
]
# prompt → answers of the untouched and of the edited model
EDITED: list[tuple[Any, str, str]] = [
    ("The capital of Australia is", "Canberra", "Sydney"),
    (chat("What is the capital of Australia?"), "Canberra", "Sydney"),
    ("The home country of Volvo is", "Sweden", "Norway"),
    (chat("Which country is Volvo from?"), "Sweden", "Norway"),
    ("The currency of Japan is the", "yen", "dollar"),
    (chat("What is the currency of Japan?"), "yen", "dollar"),
]
UNRELATED: list[tuple[Any, str, str]] = [
    ("The capital of Austria is", "Vienna", "Vienna"),
    ("The capital of New Zealand is", "Wellington", "Wellington"),
    (chat("Which country is Nokia from?"), "Finland", "Finland"),
    ("The currency of China is the", "renminbi", "renminbi"),
    ("The chemical symbol of gold is", "Au", "Au"),
]


@dataclass
class Stream:
    """A client that streams completions, one after the other, until told to stop."""

    client: httpx.Client
    tokens: int = 0
    requests: int = 0
    failed: list[str] = field(default_factory=list)
    longest_gap_ms: float = 0.0
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        length = 100
        body = {"model": str(MODEL), "prompt": "The", "max_tokens": length, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        while not self.stop.is_set():
            got, last = 0, time.perf_counter()
            try:
                with self.client.stream("POST", "/v1/completions", json=body) as response:
                    response.raise_for_status()
                    for line in response.iter_lines():
                        if not line.startswith("data: {"):
                            continue
                        chunk, now = json.loads(line.removeprefix("data: ")), time.perf_counter()
                        if chunk.get("usage"):
                            got = chunk["usage"]["completion_tokens"]
                        self.longest_gap_ms = max(self.longest_gap_ms, (now - last) * 1e3)
                        last = now
            except httpx.HTTPError as error:
                self.failed.append(repr(error))
            if got != length:
                self.failed.append(f"{got} of {length} tokens")
            self.tokens += got
            self.requests += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self.stop.set()
            thread.join()


@contextmanager
def server(
    console: Console, *options: str, serve: Sequence[str] = SERVE, timeout: float = 120
) -> Iterator[httpx.Client]:
    """A server, of the bundled model, on a free loopback port, and a client with its key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    key = secrets.token_hex(16)
    command = [*serve, "--host", "127.0.0.1", "--port", str(port), *options]
    shown = [Path(serve[0]).name, *command[1:]]
    console.print(f"$ {' '.join(shown).replace(str(MODEL), 'bench/tiny-facts')}")
    handle, log = tempfile.mkstemp(suffix=".log", prefix="ultraedit-demo-")
    process = subprocess.Popen(
        command, stdout=handle, stderr=subprocess.STDOUT, env=os.environ | {"VLLM_API_KEY": key}
    )
    os.close(handle)
    client = httpx.Client(
        base_url=f"http://127.0.0.1:{port}",
        headers={"Authorization": f"Bearer {key}"},
        timeout=timeout,
        trust_env=False,
    )
    try:
        begun = time.monotonic()
        with console.status("starting vLLM ..."):
            while not _healthy(client):
                if process.poll() is not None or time.monotonic() - begun > START_SECONDS:
                    tail = "\n".join(Path(log).read_text().splitlines()[-30:])
                    raise SystemExit(f"{tail}\nThe server did not start; its log: {log}")
                time.sleep(0.5)
        console.print(f"serving after {time.monotonic() - begun:.0f} s (log: {log})\n")
        yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.HTTPError:
        return False


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request that must succeed."""
    response = client.post(path, json=body)
    if response.status_code != 200:
        raise SystemExit(f"POST {path}: {response.status_code} {response.text}")
    return response.json()


def ask(client: httpx.Client, prompt: Any, model: str = str(MODEL), max_tokens: int = 16) -> str:
    """The model's greedy answer, by the endpoint that suits the prompt."""
    body = {"model": model, "max_tokens": max_tokens, "temperature": 0}
    if isinstance(prompt, str):
        answer = post(client, "/v1/completions", body | {"prompt": prompt})
        return answer["choices"][0]["text"].strip()
    answer = post(client, "/v1/chat/completions", body | {"messages": prompt})
    return answer["choices"][0]["message"]["content"].strip()


def main() -> int:
    console = Console(highlight=False, soft_wrap=True)
    prompts = EDITED + UNRELATED
    with server(console) as client:
        untouched = post(client, "/v1/edits/rollback", {"version": 0})["digest"]
        before = [ask(client, prompt) for prompt, _, _ in prompts]

        body = {"edits": EDITS}
        console.print(f"$ curl -X POST /v1/edits -d '{json.dumps(body)}'\n")
        stream = Stream(client)
        with stream.running():
            time.sleep(1)
            result = post(client, "/v1/edits", body)
            time.sleep(1)
        after = [ask(client, prompt) for prompt, _, _ in prompts]

        rolled_back = post(client, "/v1/edits/rollback", {"version": 0})
        again = [ask(client, prompt) for prompt, _, _ in prompts]

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("as", "prompt", "before", "edited", "rolled back"):
        table.add_column(column, no_wrap=True)
    right = True
    for i, (prompt, old, new) in enumerate(prompts):
        if i == len(EDITED):
            table.add_row()  # below are the facts that nobody touched
        cells = []
        for got, expected in ((before[i], old), (after[i], new), (again[i], old)):
            right &= got == expected
            cells.append(f"[green]{got} ✓" if got == expected else f"[red]{got!r} ✗ not {expected}")
        plain = isinstance(prompt, str)
        table.add_row(
            "text" if plain else "chat", prompt if plain else prompt[0]["content"], *cells
        )
    console.print(table, "")

    timings = result["timings"]
    held = sum(edit["succeeded"] for edit in result["edits"])
    exact = rolled_back["digest"] == untouched
    console.print(f"edits that hold           {held} of {len(EDITS)}")
    console.print(f"edit, request to answer   {timings['total_ms']:.0f} ms")
    console.print(f"longest pause of serving  {timings['pause_ms']:.1f} ms")
    console.print(f"commit                    {timings['commit_ms']:.1f} ms")
    console.print(
        f"meanwhile streamed        {stream.tokens} tokens in {stream.requests} requests, "
        f"{len(stream.failed)} failed; longest wait for a token {stream.longest_gap_ms:.0f} ms"
    )
    console.print(f"weights after rollback    {'bit for bit as before' if exact else 'DIFFER'}")
    ok = right and exact and held == len(EDITS) and not stream.failed and stream.tokens > 0
    for failure in stream.failed[:5]:
        console.print(f"[red]stream: {failure}")
    console.print("[green]all as it should be" if ok else "[red]NOT as it should be")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
