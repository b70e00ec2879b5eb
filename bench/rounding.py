"""Rounding over a model's edited life: 2,000 turns into a bfloat16 weight against float64.

    python -m bench.rounding [--results DIR]

Takes the sizes and the rows of updates from real turns on the bundled model, lives the same 2,000
turns with each rounding and in float64, and writes rounding.csv. Every life is lived twice and must
end in the same bits. `bench/README.md` says what follows from it.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.model.presets import PAPER
from ultraedit_kernels.ops.operations import rank_k_update_

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "bench" / "tiny-facts"
TURNS = 2000
HALF_ULP = 2.0**-9
"""Half a unit in the last place of bfloat16, relative to 1."""

Rounding = Literal["nearest", "stochastic"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic")

COLUMNS = (
    "update", "ratio", "rounding", "turn", "error", "drift", "lost", "shift_error", "output_error",
    "replay", "shape", "n", "torch", "source",
)  # fmt: skip


@dataclass(frozen=True)
class Turns:
    """Rows of real turns of one module, and how large the turns were."""

    keys: Tensor  # [m, d_in]
    coeff: Tensor  # [m, d_out]
    rows: int  # of one turn
    ratio: float  # ‖ΔW‖ / ‖W₀‖ of one turn
    source: str
    one_direction: bool = False  # the same change every turn


@dataclass(frozen=True)
class Life:
    """The same turns under one rounding and in float64."""

    start: Tensor  # bfloat16, as are the next two
    before: Tensor  # the last turn
    weight: Tensor
    exact: Tensor  # float64
    coeff: Tensor
    keys: Tensor  # of the last turn

    @property
    def error(self) -> float:
        """‖W - W₆₄‖ / ‖W₆₄‖"""
        return float((self.weight.double() - self.exact).norm() / self.exact.norm())

    @property
    def drift(self) -> float:
        """‖W - W₆₄‖ / ‖W₆₄ - W₀‖: 1 is as far from the wanted change as no change at all."""
        change = self.exact - self.start.double()
        return float((self.weight.double() - self.exact).norm() / change.norm())

    @property
    def lost(self) -> float:
        """The bias: 1 - ⟨W - W₀, W₆₄ - W₀⟩ / ‖W₆₄ - W₀‖²; 0 if the change arrives on average."""
        start = self.start.double()
        change, got = self.exact - start, self.weight.double() - start
        return float(1 - (got * change).sum() / change.square().sum())

    @property
    def shift_error(self) -> float:
        """‖(W - W_before - ΔW) Hᵀ‖ / ‖ΔW Hᵀ‖ of the last turn at its own keys."""
        keys = self.keys.double()
        wanted = (keys @ keys.T) @ self.coeff.double()
        got = keys @ (self.weight.double() - self.before.double()).T
        return float((got - wanted).norm() / wanted.norm())

    def output_error(self, x: Tensor) -> float:
        """‖(W - W₆₄) x‖ / ‖W₆₄ x‖ over the columns of xᵀ [m, d_in]."""
        difference = x.double() @ (self.weight.double() - self.exact).T
        return float(difference.norm() / (x.double() @ self.exact.T).norm())


def real_turns(edits_a_turn: int, turns: int, settings: dict[str, Any]) -> tuple[Tensor, Turns]:
    """W₀ [d_out, d_in] of the last edited module of the bundled model, and its turns."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bench.world import World

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    editor = Editor(model, AutoTokenizer.from_pretrained(MODEL), **settings)
    name = editor.modules[-1]
    start = editor.weights[name].clone()
    records = World.earth().edits(edits_a_turn * turns, seed=1)
    requests = [EditRequest(r["prompt"], r["target"]) for r in records]
    factors = []
    for i in range(0, len(requests), edits_a_turn):
        factors.append(editor.apply(requests[i : i + edits_a_turn]).delta.factors[name])
    changes = torch.stack([(f.coeff.double().T @ f.keys.double()).norm() for f in factors])
    return start, Turns(
        torch.cat([f.keys for f in factors]),
        torch.cat([f.coeff for f in factors]),
        round(sum(len(f.keys) for f in factors) / turns),
        float(changes.median() / start.double().norm()),
        f"{turns} turns of {edits_a_turn} on {MODEL.name}, {name}",
    )


def updates(turns: Turns, start: Tensor, count: int, seed: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """(coeff [n, d_out], keys [n, d_in]) of `count` turns, each of size `ratio` · ‖W₀‖.

    Keys and coefficients are drawn apart from those of the real turns, with a random sign, so that
    the change grows as a random walk does; or the first draw is made again and again.
    """
    generator = torch.Generator().manual_seed(seed)
    size = turns.ratio * start.double().norm()
    for _ in range(count):
        if turns.one_direction:
            generator.manual_seed(seed)
        rows = torch.randint(len(turns.keys), (2, turns.rows), generator=generator)
        signs = torch.randint(2, (turns.rows, 1), generator=generator) * 2 - 1
        coeff, keys = turns.coeff[rows[0]] * signs, turns.keys[rows[1]]
        yield coeff * (size / (coeff.double().T @ keys.double()).norm()).float(), keys


def live(turns: Turns, start: Tensor, rounding: Rounding, count: int) -> Iterator[Life]:
    """The life after every turn; its tensors go on changing."""
    first = start.bfloat16()
    weight, exact = first.clone(), first.double()
    for turn, (coeff, keys) in enumerate(updates(turns, start, count)):
        before = weight.clone()
        rank_k_update_(weight, coeff, keys, rounding=rounding, seed=turn)
        exact.addmm_(coeff.double().T, keys.double())
        yield Life(first, before, weight, exact, coeff, keys)


def study(update: str, turns: Turns, start: Tensor, count: int = TURNS) -> Iterator[dict[str, Any]]:
    """Rows of the table: both roundings at about 40 turns of a life.

    Raises:
        RuntimeError: a replay does not end in the same bits.
    """
    probes = turns.keys[:256]
    wanted = {round(count ** (i / 40)) for i in range(1, 41)} | {count}
    for rounding in ROUNDINGS:
        rows = []
        for turn, life in enumerate(live(turns, start, rounding, count), 1):
            if turn in wanted:
                rows.append(
                    {
                        "update": update,
                        "ratio": turns.ratio,
                        "rounding": rounding,
                        "turn": turn,
                        "error": life.error,
                        "drift": life.drift,
                        "lost": life.lost,
                        "shift_error": life.shift_error,
                        "output_error": life.output_error(probes),
                    }
                )
        *_, again = live(turns, start, rounding, count)
        if not torch.equal(again.weight, life.weight):
            raise RuntimeError(
                f"a replay of {count} turns with {rounding} rounding ended in other bits, "
                "expected the same: the update is not deterministic"
            )
        shape = "×".join(map(str, start.shape))
        conditions = {"replay": "bit-exact", "shape": shape, "n": turns.rows}
        conditions |= {"torch": torch.__version__, "source": turns.source}
        yield from (row | conditions for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    options = parser.parse_args()
    start, ours = real_turns(1, 20, {})
    _, paper = real_turns(20, 10, PAPER)
    sizes = {
        "closed loop": ours,
        "half an ulp": replace(paper, ratio=HALF_ULP),
        "paper's step size": paper,
        "paper's, one direction": replace(paper, one_direction=True),
    }
    rows = [row for name, turns in sizes.items() for row in study(name, turns, start)]
    options.results.mkdir(parents=True, exist_ok=True)
    with (options.results / "rounding.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"after {TURNS} turns:")
    for row in rows:
        if row["turn"] == TURNS:
            figures = ", ".join(f"{name} {row[name]:.2g}" for name in COLUMNS[4:9])
            print(f"{row['update']}, ratio {row['ratio']:.1e}, {row['rounding']}: {figures}")


if __name__ == "__main__":
    main()
