"""The tables and the plot of `bench/real.py`, from its rows.

`write` makes bench/results/real.json, bench/results/real.md and docs/real.svg.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.evaluate_report import COLOURS

Row = dict[str, Any]


def _of_answers(row: Row, score: str) -> float | None:
    return row["general"].get("answers", {}).get(score)


COLUMNS: dict[str, Callable[[Row], float | None]] = {
    "hold": lambda row: row["generation"]["efficacy"],
    "edit: contains": lambda row: row["contains"]["efficacy"],
    "LocFT-BF": lambda row: row["locft"]["efficacy"],
    "rephrase: begins": lambda row: row["begins"]["generalization"],
    "contains": lambda row: row["contains"]["generalization"],
    "LocFT-BF ": lambda row: row["locft"]["generalization"],
    "portability: contains": lambda row: row["contains"]["portability"],
    "neighbour: first token": lambda row: row["neighbours"]["first_token"],
    "first five": lambda row: row["neighbours"]["first_five"],
    "leak": lambda row: row["neighbours"]["leak"],
    "gold: contains": lambda row: row["contains"]["specificity_gold"],
    "prose: top-1": lambda row: row["general"]["prose"]["top1"],
    "perplexity": lambda row: row["general"]["prose"]["perplexity"],
    "answers: same": lambda row: _of_answers(row, "same"),
    "top-1": lambda row: _of_answers(row, "top1"),
    "first 100 hold": lambda row: row.get("first", {}).get("efficacy"),
}
"""Shares, shown in %, with their titles."""
PLAIN: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "KL: neighbours": (lambda row: row["neighbours"]["kl"], ".3f"),
    "prose": (lambda row: row["general"]["prose"]["kl"], ".4f"),
    "answers": (lambda row: _of_answers(row, "kl"), ".4f"),
    "seconds": (lambda row: row.get("seconds"), ".0f"),
    "at start": (lambda row: row.get("prepare_seconds"), ".0f"),
    "memory, MiB": (lambda row: (row.get("peak_extra_bytes") or 0) / 2**20 or None, ".0f"),
    "step": (lambda row: row.get("lr"), ".0e"),
}
"""Other figures, with their format."""


PANELS = 3
"""Of a plot, next to each other."""


def write(rows: Path, tables: Path, plots: Path) -> None:
    """Write tables and plot of all rows that there are; a row of older code is shown as it is."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(rows.glob("*.json"))]
    if not found:
        return
    tables.mkdir(parents=True, exist_ok=True)
    groups = [(name, list(group)) for name, group in _groups(found)]
    kept = [
        {name: value for name, value in row.items() if name not in ("rows", "key")}
        for _, g in groups
        for row in g
    ]
    text = json.dumps(kept, ensure_ascii=False, indent=1)
    (tables / "real.json").write_text(text + "\n", encoding="utf-8")
    sections = [_section(name, group) for name, group in groups]
    head = ["# Real language models", "Written by `python -m bench.real`. Shares in %."]
    (tables / "real.md").write_text("\n\n".join([*head, *sections]) + "\n", encoding="utf-8")
    plot(groups, plots / "real.svg")


def _groups(rows: list[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of a model, a set, a form and a number of edits; the untouched model first."""

    def key(row: Row) -> tuple[str, ...]:
        return (row["model"], row["set"], row["form"], f"{row['edits']:07}")

    def place(row: Row) -> int:
        order = ("untouched", "published", "fine-tuning", "LocFT-BF", "LoRA")
        return order.index(row["row"]) if row["row"] in order else len(order)

    for (model, name, form, edits), group in itertools.groupby(sorted(rows, key=key), key):
        yield f"{model}, {int(edits)} edits of {name}, {form}", sorted(group, key=place)


def _section(name: str, rows: list[Row]) -> str:
    shown = {title: of for title, of in COLUMNS.items() if any(of(r) is not None for r in rows)}
    titles = ["", *(title.strip() for title in shown), *PLAIN]
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * (len(titles) - 1)]
    for row in rows:
        cells = [row["row"], *(_percent(of(row)) for of in shown.values())]
        for of, form in PLAIN.values():
            value = of(row)
            cells.append("–" if value is None else format(value, form))
        lines.append("| " + " | ".join(cells) + " |")
    return f"## {name}\n\n" + "\n".join(lines) + f"\n\n{conditions(rows)}"


def conditions(rows: list[Row]) -> str:
    """Of a table, in a line."""
    said = {
        f"turns of {row['turn_size']}, {row['dtype']}, {row['machine']['threads']} threads on "
        f"{row['machine']['hardware']}, torch {row['machine']['torch']}, "
        f"transformers {row['machine']['transformers']}"
        for row in rows
    }
    return "; ".join(sorted(said))


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


def plot(groups: list[tuple[str, list[Row]]], path: Path) -> None:
    """Rephrases against neighbours, a panel for each table; up and to the right is better."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "ultraedit"
    wide = min(len(groups), PANELS)
    high = -(-len(groups) // wide)
    figure, axes = pyplot.subplots(
        high, wide, figsize=(4.2 * wide, 4 * high), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for axis, (name, rows) in zip(axes.flat, groups, strict=False):
        marks = itertools.product("os^D", COLOURS)
        for row, (mark, colour) in zip(rows, marks, strict=False):
            x, y = row["neighbours"]["first_token"], row["contains"]["generalization"]
            if x is None or y is None:
                continue
            hold = f"{row['row']} ({_percent(row['generation']['efficacy'])} % hold)"
            axis.scatter(100 * x, 100 * y, color=colour, marker=mark, label=hold)
        axis.set(xlim=(-3, 103), ylim=(-3, 103), xlabel="neighbours' first token as before, %")
        axis.set_title(name, fontsize=9)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    for first in axes[:, 0]:
        first.set_ylabel("rephrases whose answer has the target, %")
    figure.text(0.01, 0.01, conditions(groups[0][1]), fontsize=6)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
