"""Whole turns of 100 edits on a randomly initialised model, against the published method.

    pytest bench/bench_turns.py --benchmark-only [--selection cpu|gpu] [--results DIR]

Also against a bare forward pass of the same tokens. Prompts and targets are random tokens, so no
edit is expected to hold: a fixed number of rounds is timed. `bench/README.md` says how to read it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, machine
from bench.bench_operations import relative
from bench.conftest import Measure, write
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.model.presets import PAPER, PAPER_TURN_SIZE, resolve_modules

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
    "Llama-30M": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
    },
    "Mistral-7B": {
        "model_type": "mistral", "vocab_size": 32768, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "sliding_window": None,
    },
    "LLaMA-3-8B": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Configurations as published by the models' makers (Mistral v0.3); weights are random."""

SELECTION = {"tiny": ["tiny"], "cpu": ["Llama-30M"], "gpu": ["Mistral-7B", "LLaMA-3-8B"]}

TURNS = 20
"""Timed turns on a GPU: the least from which a longer stream is projected."""

ANCHORS = 30
"""Texts of the model's own, of up to 32 tokens: nearly the 1,024 rows that the default keeps."""

LIMIT = {torch.float32: 1e-2, torch.bfloat16: 0.5}
"""Largest relative difference of ΔW from the published method's that is still called the same."""


class NumberTokenizer:
    """A text is token ids separated by spaces; a word that is none is token 3."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) if word.isdigit() else 3 for word in text.split()]}


def random_model(name: str, dtype: torch.dtype) -> Any:
    """A seeded random model of that shape, made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**MODELS[name], eos_token_id=NumberTokenizer.eos_token_id)
    torch.manual_seed(0)
    with machine.DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.to(machine.DEVICE).eval().requires_grad_(False)


def random_edits(vocabulary: int, seed: int) -> list[EditRequest]:
    """100 edits of 8 to 24 prompt and 2 to 4 target tokens: about 300 answer positions."""
    rng = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(str(rng.randrange(3, vocabulary)) for _ in range(rng.randint(least, most)))

    return [EditRequest(words(8, 24), words(2, 4), space=True) for _ in range(PAPER_TURN_SIZE)]


class Stream:
    """Ever new turns on one model; as published or by an `Editor`."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self.model = random_model(name, dtype)
        self.modules = resolve_modules(self.model, self.model.config, "auto")
        self.weights = {n: self.model.get_submodule(n).weight for n in self.modules}
        self.pristine = {n: w.to("cpu", copy=True) for n, w in self.weights.items()}
        self.turn = 0

    def restart(self) -> None:
        """The untouched weights and the first turn's edits again."""
        for name, weight in self.weights.items():
            weight.copy_(self.pristine[name])
        self.turn = 0

    def edits(self) -> list[EditRequest]:
        """Those of the next turn."""
        self.turn += 1
        return random_edits(MODELS[self.name]["vocab_size"], self.turn)

    def row(self, method: str) -> dict[str, Any]:
        """First columns of a row."""
        sequences = encoded(random_edits(MODELS[self.name]["vocab_size"], 1))
        d_out, d_in = next(iter(self.weights.values())).shape
        return {
            "benchmark": f"turn of {PAPER_TURN_SIZE} edits",
            "method": method,
            "shape": self.name,
            "n": sum(len(s.target_ids) for s in sequences),
            "d_in": d_in,
            "d_out": d_out,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def published(self) -> dict[str, Tensor]:
        """One turn as published, every module with statistics of its own; ΔWᵀ per module.

        From the next turn's edits, in batches as in the paper; statistics begin anew.
        """
        sequences, lr, size = encoded(self.edits()), PAPER["lr"], PAPER["batch_size"]
        parts = [
            baselines.capture(self.model, sequences[i : i + size], self.modules)
            for i in range(0, len(sequences), size)
        ]
        changes = {}
        for name, weight in self.weights.items():
            keys, grads = (torch.cat([p[name][i] for p in parts]).float() for i in (0, 1))
            none = torch.zeros(keys.shape[1] + grads.shape[1], device=keys.device)
            z = baselines.features(keys, grads)
            moments = baselines.update_moments(baselines.Moments(0.0, none, none), z)
            values = baselines.edit_values(baselines.normalise(z, moments), keys.shape[1], lr)
            changes[name] = baselines.solve(keys, values, PAPER["ridge"])
            baselines.update_(weight, changes[name])
        return changes


def encoded(edits: list[EditRequest]) -> list[Sequence]:
    """The edits as tokens, without an end of sequence, as published."""
    tokenizer = NumberTokenizer()
    return [encode(tokenizer, e.prompt, e.target, append_eos=False, space=True) for e in edits]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = SELECTION[metafunc.config.getoption("--selection")]
    metafunc.parametrize("stream", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def stream(request: pytest.FixtureRequest) -> Iterator[Stream]:
    yield Stream(request.param, torch.bfloat16 if machine.GPU else torch.float32)
    if machine.GPU:
        torch.cuda.empty_cache()


@pytest.mark.parametrize("size", [PAPER_TURN_SIZE, PAPER["batch_size"]])
def test_forward(stream: Stream, size: int, measure: Measure) -> None:
    """The edits' tokens once through the model, with logits at the answer positions only."""
    sequences = encoded(random_edits(MODELS[stream.name]["vocab_size"], 1))
    batches = [
        baselines.pad(sequences[i : i + size], machine.DEVICE)
        for i in range(0, len(sequences), size)
    ]

    @torch.no_grad()
    def forward() -> list[Tensor]:
        logits = []
        for ids, mask, answer in batches:
            hidden = stream.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            logits.append(stream.model.get_output_embeddings()(hidden[0][answer]))
        return logits

    def error(logits: list[Tensor]) -> float:
        return 0.0 if all(bool(x.isfinite().all()) for x in logits) else float("inf")

    method = "forward" if size == PAPER_TURN_SIZE else f"forward, batches of {size}"
    measure(stream.row(method), forward, error, 0.0)


def test_open_loop(stream: Stream, measure: Measure, results: Any) -> None:
    """The paper's settings, one step; ΔW is compared with the published method's."""
    stream.restart()
    expected = stream.published()
    stream.restart()
    editor = Editor(stream.model, NumberTokenizer(), **(PAPER | {"statistics": "per-module"}))
    timings: list[Mapping[str, float]] = []

    def turn() -> Any:
        result = editor.apply(stream.edits())
        timings.append(result.timings)
        return result

    def error(result: Any) -> float:
        errors = []
        for name, factor in result.delta.factors.items():
            coeff, keys = (x.to(machine.DEVICE).double() for x in (factor.coeff, factor.keys))
            errors.append(relative(coeff.T @ keys, expected[name].T.double()))
        return max(errors)

    def restart() -> None:
        editor.rollback(0)
        stream.restart()

    row = stream.row("ours")
    rounds = TURNS if machine.GPU else None
    measure(row, turn, error, LIMIT[stream.dtype], prepare=restart, rounds=rounds)
    for part in ("capture", "solve", "commit"):
        median = statistics.median(t[f"{part}_ms"] for t in timings[1:])
        shown = row | {"method": f"ours: {part}", "rounds": len(timings) - 1, "median_ms": median}
        write(results, shown | machine.conditions())


def test_closed_loop(stream: Stream, measure: Measure) -> None:
    """One round as by default, step size per edit, with anchors; the loss must fall."""
    stream.restart()
    editor = Editor(stream.model, NumberTokenizer(), rounds=1, anchors=ANCHORS, append_eos=False)
    editor.prepare()

    def restart() -> None:
        editor.rollback(0)
        editor.prepare()
        stream.restart()

    def error(result: Any) -> float:
        editor.rollback(0)
        sequences = encoded(random_edits(MODELS[stream.name]["vocab_size"], stream.turn))
        before = capture(stream.model, sequences, stream.modules, backward=False).loss.sum()
        after = sum(edit.loss for edit in result.edits)
        return after / float(before)

    measure(
        stream.row("ours, closed loop"),
        lambda: editor.apply(stream.edits()),
        error,
        1.0,
        prepare=restart,
    )


def test_published(stream: Stream, measure: Measure) -> None:
    """Full backward pass and d_in × d_in solves; `test_open_loop` compares its ΔW with ours."""
    stream.restart()

    def error(changes: dict[str, Tensor]) -> float:
        return 0.0 if all(bool(x.isfinite().all()) for x in changes.values()) else float("inf")

    measure(stream.row("published"), stream.published, error, 0.0, prepare=stream.restart)
