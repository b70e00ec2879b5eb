"""What editing costs beside a bare forward pass of the same tokens, at small and at large sizes.

    python -m bench.scale [--models smollm2,llama-1b] [--edits N] [--anchors N] [--rounds N]
    python -m bench.scale --models "" --stream 500

Measured on SmolLM2-135M-Instruct, and on a randomly initialised model of Llama-3.2-1B's shape in
bfloat16 where it fits: the start (gathering what edits must leave alone), one edit, a turn of 100,
its commit, and the published method's arithmetic on the same edits. By formula, which the measured
models check: the memory that is held at Llama-3-8B's and at 70B's shapes with 8 ranks. A row for
each model and version goes to bench/results/scale.csv. A stream of turns of one edit, of the
bundled model, tells whether an edit costs more the more there were before.

Seconds are of all cores on a CPU, so that a busy machine does not count, and of the clock on a GPU.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import baselines, machine
from bench.real_models import checkpoint
from bench.report import RESULTS
from bench.world import World
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.method.guards import TOTAL_ROWS
from ultraedit_kernels.method.moments import ROOM, WHOLE
from ultraedit_kernels.method.protect import FEWER, LONG_BATCH, LONG_TEXT, SHIELD
from ultraedit_kernels.method.shield import STRONG, Shields
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.model.presets import PAPER, resolve_modules
from ultraedit_kernels.settings import TABLE

LLAMA: dict[str, Any] = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 128256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA
    | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
    | dict(num_attention_heads=32, num_key_value_heads=8, head_dim=64),
    "llama-8b": LLAMA
    | dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    | dict(num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False),
    "llama-70b": LLAMA
    | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80)
    | dict(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False),
}
RANKS = {"llama-8b": 1, "llama-70b": 8}
"""Models of which the memory is told by formula, and among how many ranks they are divided."""
FEW = 5
"""Times that a forward pass is timed."""
HALF = 2
"""Bytes of a weight, and of a number of a shield's weak rows."""
BUNDLED = Path(__file__).parent / "tiny-facts"
WINDOW = 20
"""Turns of a stream of which the median is taken."""


def seconds() -> float:
    """A clock: of all this process has computed on a CPU, of the wall on a GPU."""
    return machine.clock() if machine.GPU else time.process_time()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that it took, and its result."""
    begun = seconds()
    result = run()
    return seconds() - begun, result


def load(name: str, scratch: str) -> tuple[Any, Any]:
    """Model and tokenizer; a random model has SmolLM2's tokenizer, and its checkpoint is written to
    the scratch folder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = checkpoint("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if name != "smollm2":
        ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
        config = AutoConfig.for_model(**SHAPES[name], **ends)
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(scratch)
        folder = Path(scratch)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.to(machine.DEVICE).eval().requires_grad_(False), tokenizer


def sequences_of(tokenizer: Any, edits: Iterable[EditRequest]) -> list[Sequence]:
    """The edits as tokens."""
    return [encode(tokenizer, edit.prompt, edit.target) for edit in edits]


@torch.no_grad()
def forward(model: Any, sequences: list[Sequence], size: int) -> float:
    """Seconds of the sequences' tokens once through the model, in batches of that size, with logits
    at the answer positions only."""
    parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    batches = [baselines.pad(part, machine.DEVICE) for part in parts]

    def run() -> None:
        for ids, mask, answer in batches:
            hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            model.get_output_embeddings()(hidden[answer])

    run()
    return statistics.median(timed(run)[0] for _ in range(FEW))


def published(model: Any, modules: list[str], sequences: list[Sequence]) -> float:
    """Seconds of the published method's arithmetic: full backward passes, and a d_in × d_in solve
    for each module."""
    size = PAPER["batch_size"]

    def run() -> None:
        parts = [
            baselines.capture(model, sequences[i : i + size], modules)
            for i in range(0, len(sequences), size)
        ]
        for name in modules:
            weight = model.get_submodule(name).weight.detach().to(torch.float32, copy=True)
            keys, grads = (torch.cat([p[name][i] for p in parts]).float() for i in (0, 1))
            none = torch.zeros(keys.shape[1] + grads.shape[1], device=keys.device)
            moments = baselines.Moments(0.0, none, none)
            baselines.turn_(weight, keys, grads, moments, PAPER["lr"], PAPER["ridge"])

    return timed(run)[0]


def held(editor: Editor) -> int:
    """Bytes that an editor holds between turns, besides the model."""
    anchors = editor.memory.anchors
    kept: list[Tensor] = [*editor.versions.pristine.copies.values(), *editor.guards.rows.values()]
    for shields in (Shields(anchors.keys), Shields(anchors.outputs)):
        kept += [*shields.strong.values(), *shields.weak.values()]
    kept += anchors.watch.tensors().values()
    for stats in editor.statistics.values():
        kept += [stats.count, stats.mean, stats.m2]
    return sum(one.numel() * one.element_size() for one in kept)


def held_by_formula(
    shapes: Mapping[str, tuple[int, int]], ranks: int = 1, edited: bool = False
) -> int:
    """The same from shapes, module → (d_out, d_in), of one of so many ranks, if a checkpoint holds
    the weights: rows of each weight, the shields of its keys and outputs with as many rows as there
    may be, and statistics. Not the little that is kept of the texts, and of what the model has
    read. Once it is edited, the shield of the keys may have a quarter more, the newest ones."""
    rows, wide = TABLE["anchor_rows"].default, SHIELD.itemsize

    def shield(d: int, newest: int) -> int:
        strong = min(rows, d, STRONG)
        return ((min(rows, d) - strong) * HALF + (strong + newest) * wide) * d

    return sum(
        -(-d_out // -(-d_out // TOTAL_ROWS)) * d_in * HALF // ranks
        + shield(d_in, rows // 4 if edited else 0)
        + shield(d_out, 0)
        + 2 * 8 * (d_in + d_out)
        for d_out, d_in in shapes.values()
    )


def most_by_formula(shapes: Mapping[str, tuple[int, int]], ranks: int = 1) -> dict[str, int]:
    """Bytes that a turn holds besides, a copy of the edited weights, in a server another one; and
    gathering, once: the moments of this rank's modules, what compressing or decomposing the largest
    takes, and all modules' keys of a batch."""
    rows = TABLE["anchor_rows"].default
    weights = sum(d_out * d_in * HALF // ranks for d_out, d_in in shapes.values())

    def moments(d: int) -> int:
        return d * d * 8 if d <= WHOLE else (min(rows, d) + ROOM) * d * 4

    ours = list(shapes.values())[::ranks]  # the first rank has the most
    largest = max(moments(d) for pair in ours for d in pair)
    wide = any(d > WHOLE for pair in shapes.values() for d in pair)
    tokens = ROOM if wide else LONG_BATCH * LONG_TEXT
    batch = sum(tokens * d_in * HALF for _, d_in in shapes.values())
    gathering = sum(moments(d) for pair in ours for d in pair) + 2 * largest + batch
    return {"turn": weights, "shadow": weights, "gathering": gathering}


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """Module → (d_out, d_in) of those that are edited by default."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[name]))
    names = resolve_modules(model, model.config, "auto")
    return {n: tuple(model.get_submodule(n).weight.shape) for n in names}


def measured(
    name: str, count: int, anchors: int, rounds: int | None, scratch: str
) -> dict[str, Any]:
    """The row of a model that runs here."""
    os.environ["ULTRAEDIT_CACHE"] = ""
    model, tokenizer = load(name, scratch)
    facts = World.earth().edits(count + 2, seed=1)
    edits = [EditRequest(fact["prompt"], fact["target"]) for fact in facts]
    before = machine.anonymous_memory()
    editor = Editor(model, tokenizer, anchors=anchors, rounds=rounds, max_lost=1.0, max_change=1e6)
    shapes = {n: (w.shape[0], w.shape[1]) for n, w in editor.weights.items()}
    texts = [Sequence([5], [7] * LONG_TEXT)] * -(-anchors // FEWER)

    start, _ = timed(editor.prepare)
    after_start, resident = held(editor), machine.anonymous_memory()
    editor.apply(edits[:1])  # what is made once is made
    one, _ = timed(lambda: editor.apply(edits[1:2]))
    turn, (result, peak, _) = timed(
        lambda: machine.peak_extra_memory(lambda: editor.apply(edits[2:]))
    )
    whole, single = sequences_of(tokenizer, edits[2:]), sequences_of(tokenizer, edits[1:2])
    base = forward(model, whole, editor.settings.batch_size)
    took = result.timings
    row = {
        "edits": count,
        "anchors": anchors,
        "held": sum(edit.succeeded for edit in result.edits),
        "forward_ms": base * 1e3,
        "start_s": start,
        "start_x": start / forward(model, texts, LONG_BATCH),
        "edit_s": one,
        "edit_x": one / forward(model, single, 1),
        "turn_s": turn,
        "turn_x": turn / base,
        "turn_rounds": max(edit.rounds for edit in result.edits),
        # Of the clock: guards, copies, digest, journal.
        "fixed_share": 1 - (took["capture_ms"] + took["solve_ms"]) / took["total_ms"],
        "commit_share": took["commit_ms"] / took["total_ms"],
        "held_bytes": after_start,
        "held_bytes_formula": held_by_formula(shapes),
        "resident_bytes": resident - before if resident and before else None,
        "peak_bytes": peak,
    }
    editor.rollback(0)
    there = published(model, list(shapes), whole)
    return row | {"published_s": there, "published_x": there / base}


def by_formula(name: str) -> dict[str, Any]:
    """The row of a model that does not."""
    shapes, ranks = shapes_of(name), RANKS[name]
    most = most_by_formula(shapes, ranks)
    kept = held_by_formula(shapes, ranks, edited=True)
    return {
        "ranks": ranks,
        "held_bytes_formula": kept,
        "copied_bytes_formula": kept + most["turn"],
        "server_bytes_formula": kept + most["shadow"],
        "turn_bytes_formula": most["turn"],
        "gathering_bytes_formula": most["gathering"],
    }


def stream(turns: int) -> list[tuple[int, float, float]]:
    """Of each window of turns of one edit of the bundled model: its last turn, and the medians of
    the thread's seconds for a turn, and for each time that it looks at its edit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    facts = World.earth().edits(turns, seed=21)
    editor = Editor(model, tokenizer, max_lost=1.0, max_change=1e6)
    editor.prepare()
    took, looks = [], []
    for fact in facts:
        begun = time.thread_time()
        result = editor.apply([EditRequest(fact["prompt"], fact["target"])])
        took.append(time.thread_time() - begun)
        looks.append(took[-1] / (result.edits[0].rounds + 1))
    return [
        (i, statistics.median(took[i - WINDOW : i]), statistics.median(looks[i - WINDOW : i]))
        for i in range(WINDOW, turns + 1, WINDOW)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the file; a model's earlier one of the same version and machine goes."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    key = ("model", "ultraedit_kernels", "hardware")
    new = {tuple(str(row[k]) for k in key) for row in rows}
    every = [row for row in old if tuple(row[k] for k in key) not in new] + rows
    columns = list(dict.fromkeys(name for row in every for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(every)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="smollm2", help="those to measure, by commas")
    parser.add_argument("--edits", type=int, default=100, help="in the large turn")
    parser.add_argument("--anchors", type=int, default=TABLE["anchors"].default)
    parser.add_argument("--rounds", type=int, help="steps of an edit at most")
    parser.add_argument("--stream", type=int, default=0, metavar="TURNS", help="only print them")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.csv")
    options = parser.parse_args()
    if options.stream:
        for turn, seconds_, look in stream(options.stream):
            print(f"turns to {turn}: {seconds_ * 1e3:.0f} ms each, {look * 1e3:.1f} ms a look")
        return
    rows = []
    for name in filter(None, options.models.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            row = measured(name, options.edits, options.anchors, options.rounds, scratch)
        rows.append({"model": name} | row)
    rows += [{"model": name} | by_formula(name) for name in RANKS]
    made = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **machine.conditions()}
    rows = [
        {n: f"{v:.4g}" if isinstance(v, float) else v for n, v in row.items()} | made
        for row in rows
    ]
    write(options.output, rows)
    for row in rows:
        print(*(f"{n} {v}" for n, v in row.items() if n not in made), sep=", ")


if __name__ == "__main__":
    main()
