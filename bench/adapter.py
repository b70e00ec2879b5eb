"""Throughput of an exported adapter under vLLM's --lora-modules, beside the same edits in place.

    python -m bench.adapter [MODEL] [--edits N | --delta FILE] [--rounds N] [--tokens N]

Two servers of one model: one takes the change as `ultraedit push` sends it, the other serves the
adapter that `ultraedit export --to lora` makes of it. Rounds of windows of the same prompts follow:
untouched, edited, adapter; one server is asked at a time, and ratios are of windows of one round.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence as Seq
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from bench import serving
from bench.demo import MODEL, SERVE, post, server
from bench.machine import conditions
from bench.report import RESULTS
from bench.world import World
from ultraedit_kernels import EditDelta, EditRequest
from ultraedit_kernels.store import adapters

CONCURRENCY = 16
NAMES = ("untouched", "edited in place", "LoRA adapter")
GUARDS = {"anchors": 0, "max_change": 1e6, "max_lost": 1.0}
"""Of the server: what is measured is not whether the change is a good one."""

say = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Adapter:
    """An exported adapter: of its modules the highest rank, what vLLM needs for it, its size."""

    folder: Path
    rank: int
    served_rank: int
    modules: list[str]
    bytes: int


def exported(delta: EditDelta, folder: Path, model: str) -> Adapter:
    """Write a change as an adapter of its own ranks."""
    factors = adapters.factorise(delta)
    adapters.write_lora(factors, folder, model)
    rank = max(factor.rank for factor in factors.values())
    served = adapters.vllm_rank(rank)
    if served is None:
        raise SystemExit(f"the change has rank {rank}, and vLLM serves at most 512; fewer edits")
    size = (folder / "adapter_model.safetensors").stat().st_size
    return Adapter(folder, rank, served, list(factors), size)


def made(model: str, dtype: str, count: int) -> EditDelta:
    """The change of the first edits of the bundled world, in one turn with the defaults."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ultraedit_kernels import Editor

    editor = Editor(
        AutoModelForCausalLM.from_pretrained(model, dtype=dtype),
        AutoTokenizer.from_pretrained(model),
        max_lost=1.0,
    )
    requests = [EditRequest.from_dict(edit) for edit in World.earth().edits(count, seed=1)]
    result = editor.apply(requests)
    say.print(f"{sum(edit.succeeded for edit in result.edits)} of {count} edits hold")
    return editor.delta(1)


def measure(
    model: str, dtype: str, delta: EditDelta, rounds: int, tokens: int
) -> list[dict[str, float]]:
    """Tokens per second by round and configuration, with the adapter's figures."""
    world = World.earth()
    prompts = [str(world.seen(fact)[0]) for fact in world.facts[:CONCURRENCY]]
    settings = json.dumps({"ultraedit": GUARDS})
    how = ("--dtype", dtype, "--max-model-len", "256", "--additional-config", settings)
    serve = (*SERVE[:2], model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "adapter"
        adapter = exported(delta, folder, model)
        sizes = {"adapter_bytes": adapter.bytes, "delta_bytes": len(delta.to_bytes())}
        ranks = {"rank": adapter.rank, "max_lora_rank": adapter.served_rank}
        place = stack.enter_context(server(say, *how, serve=serve, timeout=600))
        lora = serving.lora_options(adapter.served_rank, adapter.modules, folder)
        beside = stack.enter_context(server(say, *how, *lora, serve=serve, timeout=600))
        version = 0

        def ask(name: str) -> float:
            nonlocal version
            if name == "LoRA adapter":
                return serving.window(beside, serving.ADAPTER, prompts, tokens)
            if (name == "edited in place") != bool(version):
                version = _switch(place, delta, version)
            return serving.window(place, model, prompts, tokens)

        windows = {name: lambda name=name: ask(name) for name in NAMES}
        found = serving.run_rounds(windows, rounds)
    return [one | sizes | ranks | {"modules": len(adapter.modules)} for one in found]


def _switch(client: httpx.Client, delta: EditDelta, version: int) -> int:
    """Serve the change if it is not served, else the untouched model; the version."""
    if version:
        return int(post(client, "/v1/edits/rollback", {"version": 0})["version"])
    return serving.apply(client, delta.to_bytes())


def rows(found: Seq[dict[str, float]], about: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each configuration, with ratios to the edit in place."""
    reference = [one["edited in place"] for one in found]
    fixed = {name: value for name, value in found[0].items() if name not in NAMES}
    return [
        serving.summary(name, [one[name] for one in found], reference) | fixed | about
        for name in NAMES
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL), metavar="MODEL")
    parser.add_argument("--edits", type=int, default=40, metavar="N", help="made here, in one turn")
    parser.add_argument("--delta", type=Path, metavar="FILE", help="in the place of --edits")
    parser.add_argument("--dtype", default="float32", metavar="DTYPE")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--tokens", type=int, default=100, metavar="N", help="of one request")
    parser.add_argument("--output", type=Path, default=RESULTS / "adapter.csv", metavar="FILE")
    given = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    serving.separate_cores()
    if given.delta is None:
        delta = made(given.model, given.dtype, given.edits)
    else:
        delta = EditDelta.load(given.delta)
    about = {
        "model": Path(given.model).name,
        "dtype": given.dtype,
        "edits": len(delta.settings.get("edits", ())) or given.edits,
        "concurrency": CONCURRENCY,
        "output_tokens": given.tokens,
        **{name: conditions()[name] for name in ("hardware", "cores", "torch")},
        "load_average": round(os.getloadavg()[0], 2),
    }
    found = measure(given.model, given.dtype, delta, given.rounds, given.tokens)
    table = rows(found, about)
    serving.write(table, given.output)
    for row in table:
        told = f"{row['tokens_per_s']:.0f} tokens/s, {row['ratio']:.3f} of the edit in place"
        print(f"{row['configuration']}: {told} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})")
    sizes = f"adapter {found[0]['adapter_bytes'] / 2**20:.2f} MiB, rank {found[0]['rank']}"
    print(
        f"{sizes}; in place: nothing beside the weights; the delta's file is "
        f"{found[0]['delta_bytes'] / 2**20:.2f} MiB"
    )


if __name__ == "__main__":
    main()
