"""The tables and plots of `bench/evaluate.py`, from its results.

`write` makes bench/results/evaluate.md, evaluate-*.csv and docs/evaluate-*.svg; every table and
plot carries its conditions.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SCORES = ("efficacy", "generalization", "specificity")
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % with 1 to 9 degrees of freedom: for up to ten seeds."""
TITLES = {
    "main": "Synthetic worlds",
    "counterfact": "Real CounterFact records",
    "zsre": "Real zsRE records",
}
COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a")

Result = dict[str, Any]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (Student's t; 0 for one value)."""
    if len(values) < 2:
        return mean(values), 0.0
    return mean(values), T_95[len(values) - 2] * stdev(values) / math.sqrt(len(values))


def write(results: Path, tables: Path, plots: Path) -> None:
    """Write all tables and plots that there are results for."""
    tables.mkdir(parents=True, exist_ok=True)
    sections = []
    for part in TITLES:
        if found := _read(results, part):
            sections.append(_comparison(part, found))
            _write_rows(tables / f"evaluate-{part}.csv", _comparison_rows(found))
    if found := _read(results, "frontier"):
        sections.append(_frontier(found))
        _write_rows(tables / "evaluate-frontier.csv", _frontier_rows(found))
        plot_frontier(found, plots / "evaluate-frontier.svg")
    if found := _read(results, "lifelong"):
        sections.append(_stream("Lifelong", found, "lifelong_edits"))
        _write_rows(tables / "evaluate-lifelong.csv", _stream_rows(found))
        plot_lifelong(found, plots / "evaluate-lifelong.svg")
    if found := _read(results, "ablations"):
        sections.append(_stream("Ablations", found, "ablation_edits"))
        _write_rows(tables / "evaluate-ablations.csv", _stream_rows(found))
    text = "\n\n".join(["# Evaluation", "Written by `python -m bench.evaluate`.", *sections])
    (tables / "evaluate.md").write_text(text + "\n", encoding="utf-8")


def _read(results: Path, part: str) -> list[Result]:
    """The results of a part, by name."""
    files = sorted(results.glob(f"{part}-*.json"), key=lambda path: (len(path.name), path.name))
    return [
        {"name": path.stem.removeprefix(f"{part}-"), **json.loads(path.read_text(encoding="utf-8"))}
        for path in files
    ]


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    found = list(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in found for key in row)))
        writer.writeheader()
        writer.writerows(found)


def _scores(scored: Result) -> dict[str, Any]:
    """Both regimes in one row, in per cent."""
    return {
        name: _percent(scored[regime][score])
        for regime, prefix in (("generation", ""), ("teacher_forced", "teacher_forced_"))
        for score in (*SCORES, "specificity_gold")
        for name in [prefix + score]
    }


def _percent(score: float | None) -> float | None:
    return None if score is None else round(100 * score, 2)


# Methods side by side.


def _comparison(part: str, results: list[Result]) -> str:
    methods = list(results[0]["methods"])
    lines = [
        "| method | efficacy | generalisation | specificity | teacher-forced efficacy | perplexity "
        "of untouched text | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in methods:
        scored = [r["methods"][method] for r in results]
        untouched = [r["methods"]["untouched"]["perplexity"] for r in results]
        columns = [[100 * one["generation"][score] for one in scored] for score in SCORES]
        columns += [
            [100 * one["teacher_forced"]["efficacy"] for one in scored],
            [
                100 * (one["perplexity"] / base - 1)
                for one, base in zip(scored, untouched, strict=True)
            ],
            [one["seconds"] for one in scored if "seconds" in one],
        ]
        cells = [_with_interval(values) if values else "–" for values in columns]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    ratios = {
        other: [r["methods"]["ours"]["seconds"] / r["methods"][other]["seconds"] for r in results]
        for other in ("ours, open loop", "published")
        if other in methods
    }
    rates = {
        method: ", ".join(f"{r['methods'][method]['lr']:.2g}" for r in results)
        for method in methods
        if "lr" in results[0]["methods"][method]
    }
    what = "worlds, seeds" if part == "main" else "draws of edits from one model's records, seeds"
    edits, size = results[0]["edits"], results[0]["key"]["scale"]["turn_size"]
    notes = [
        f"{edits} edits in turns of {size}; {len(results)} {what} "
        f"{', '.join(r['name'] for r in results)}; mean and 95 % confidence interval. Scores in %, "
        "exact match of free greedy generation with stop at the end of sequence, after all turns. "
        "Perplexity: change in % against the untouched model, per token, on texts that no edit "
        "touches. Seconds: of editing, the sampling of anchors included, learning rates given.",
        "Learning rates: the best of a grid on the very edits that are scored, by the harmonic "
        "mean of efficacy, generalisation and specificity: "
        + "; ".join(f"{method} {values}" for method, values in rates.items())
        + ".",
        "Time of ours "
        + "; ".join(f"÷ {other}: {_with_interval(ratio)}" for other, ratio in ratios.items())
        + ".",
        _conditions(results),
    ]
    return "\n".join([f"## {TITLES[part]}", "", *lines, "", *"\n\n".join(notes).split("\n")])


def _with_interval(values: Sequence[float]) -> str:
    centre, half = interval(values)
    return f"{centre:.1f}" + (f" ± {half:.1f}" if len(values) > 1 else "")


def _conditions(results: list[Result]) -> str:
    model = results[0]["model"]
    seen = mean(r["model"]["exact_match_of_texts_seen"] for r in results)
    versions = ", ".join(f"{name} {v}" for name, v in results[0]["versions"].items())
    return (
        f"Model: Llama of {model['parameters'] / 1e6:.2f} M parameters, float32, trained on "
        f"{model['facts']:,} facts, which it answers at {100 * seen:.1f} % in the words it saw. "
        f"{results[0]['hardware']}; {versions}."
    )


def _comparison_rows(results: list[Result]) -> Iterator[dict[str, Any]]:
    for result in results:
        untouched = result["methods"]["untouched"]["perplexity"]
        for method, scored in result["methods"].items():
            row = {"seed": result["name"], "method": method}
            extra = {"perplexity_ratio": round(scored["perplexity"] / untouched, 4)}
            for key in ("lr", "seconds", "held_when_made", "rounds"):
                extra[key] = scored.get(key)
            yield {**row, "relation": "all", "edits": scored["edits"], **_scores(scored), **extra}
            for relation, part in scored.get("per_relation", {}).items():
                yield {**row, "relation": relation, "edits": part["edits"], **_scores(part)}
            for trial in scored.get("trials", ()):
                kind = {"method": f"{method}, tried", "relation": "all", "edits": scored["edits"]}
                rate = {"lr": trial["lr"], "seconds": trial["seconds"]}
                yield {**row, **kind, **_scores(trial), **rate}


# The frontier.


def _frontier_rows(results: list[Result]) -> Iterator[dict[str, Any]]:
    for result in results:
        for row in result["rows"]:
            kept = {"seed": result["name"], "setting": row["setting"], "value": row["value"]}
            change = row["perplexity"] / result["untouched"]["perplexity"]
            measured = {"perplexity_ratio": round(change, 4), "seconds": row["seconds"]}
            yield {**kept, **_scores(row), **measured, "rounds": row["rounds"]}


def _frontier_means(results: list[Result]) -> list[dict[str, Any]]:
    """One row per setting and value: the means over worlds, in %; seconds and perplexity too."""
    rows = []
    for same in zip(*(result["rows"] for result in results), strict=True):
        scores = {s: 100 * mean(row["generation"][s] for row in same) for s in SCORES}
        change = [
            row["perplexity"] / result["untouched"]["perplexity"] - 1
            for row, result in zip(same, results, strict=True)
        ]
        rows.append(
            {
                "setting": same[0]["setting"],
                "value": same[0]["value"],
                **scores,
                "perplexity": 100 * mean(change),
                "seconds": mean(row["seconds"] for row in same),
            }
        )
    return rows


def _frontier(results: list[Result]) -> str:
    lines = [
        "| setting | value | efficacy | generalisation | specificity | perplexity | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in _frontier_means(results):
        cells = [f"{row[key]:.1f}" for key in (*SCORES, "perplexity", "seconds")]
        lines.append(f"| {row['setting']} | {row['value']} | {' | '.join(cells)} |")
    scale = results[0]["key"]["scale"]
    note = (
        f"One setting at a time, everything else at its default; {scale['edits']} edits in turns "
        f"of {scale['turn_size']}, mean of {len(results)} worlds, seeds "
        f"{', '.join(r['name'] for r in results)}, which are not reported elsewhere. Scores in %, "
        "free generation; perplexity: change in % on untouched text."
    )
    return "\n".join(["## The frontier", "", *lines, "", note, "", _conditions(results)])


def plot_frontier(results: list[Result], path: Path) -> None:
    """Scores against the values of each setting; dashed: with defaults."""
    default, *rows = _frontier_means(results)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axes = _figure(len(settings), 2.5)
    for axis, setting in zip(axes, settings, strict=True):
        line = [row for row in rows if row["setting"] == setting]
        for score, colour in zip(SCORES, COLOURS, strict=False):
            label = "generalisation" if score == "generalization" else score
            axis.axhline(default[score], color=colour, linewidth=0.8, linestyle="--")
            axis.plot(
                range(len(line)),
                [row[score] for row in line],
                color=colour,
                marker="o",
                markersize=4,
                label=label,
            )
        axis.set_xticks(range(len(line)), [f"{row['value']:g}" for row in line])
        axis.set_xlabel(setting)
        axis.set_ylim(-3, 103)
    axes[0].set_ylabel("%")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    scale = results[0]["key"]["scale"]
    _save(
        figure,
        path,
        f"{scale['edits']} edits in turns of {scale['turn_size']}, free generation after all "
        f"turns, mean of {len(results)} synthetic worlds; one setting at a time, dashed: defaults",
        results,
    )


# Long streams.


def _stream_rows(results: list[Result]) -> Iterator[dict[str, Any]]:
    for result in results:
        for row in result["rows"]:
            ratio = (
                round(row["perplexity"] / result["perplexity_before"], 4)
                if "perplexity" in row
                else None
            )
            yield {
                "variant": _variant(result),
                "after": row["after"],
                "asked": row["asked"],
                "scored": row["scored"],
                **_scores(row),
                "perplexity_ratio": ratio,
                "seconds": row["seconds"],
                "lr": result.get("lr"),
            }


def _variant(result: Result) -> str:
    name: str = result["name"].replace("-", " ")
    return name


def _stream(title: str, results: list[Result], edits: str) -> str:
    scale = results[0]["key"]["scale"]
    first = f"first {scale['lifelong_first']}"
    ends = {max(row["after"] for row in result["rows"]) for result in results}
    lines = [
        f"| | after edits | efficacy | generalisation | specificity | {first}: efficacy | "
        "edited again: efficacy | perplexity | seconds | first and last 10 turns, s each |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    ordered = sorted(results, key=lambda r: (r["name"] != "ours", r["name"] != "published"))
    for end, result in itertools.product(sorted(ends, reverse=True), ordered):
        rows = {row["asked"]: row for row in result["rows"] if row["after"] == end}
        if not rows:
            continue
        so_far = rows["all so far"]
        cells = [f"{100 * so_far['generation'][s]:.1f}" for s in SCORES]
        cells += [
            f"{100 * rows[name]['generation']['efficacy']:.1f}" if name in rows else "–"
            for name in (first, "edited again")
        ]
        cells.append(f"{100 * (so_far['perplexity'] / result['perplexity_before'] - 1):+.1f}")
        cells.append(f"{so_far['seconds']:.0f}")
        turns = result["turn_seconds"][: math.ceil(end / scale["turn_size"])]
        cells.append(f"{mean(turns[:10]):.2f}, {mean(turns[-10:]):.2f}")
        lines.append(f"| {_variant(result)} | {end:,} | {' | '.join(cells)} |")
    rates = [r["lr"] for r in results if "lr" in r]
    searched = f" Published: best step size for the stream, {rates[0]:.2g}." if rates else ""
    note = (
        f"{scale[edits]:,} edits in turns of {scale['turn_size']}, one stream; "
        f"{100 * scale['lifelong_again']:.0f} % of them edit a fact again, whose last target "
        f"counts. Scores in %, free generation, of at most {scale['sample']} edits drawn from all "
        f"so far, and of the {first}, which are not edited again. Perplexity: change in % on "
        f"untouched text.{searched}"
    )
    return "\n".join([f"## {title}", "", *lines, "", note, "", _conditions(results)])


def plot_lifelong(results: list[Result], path: Path) -> None:
    """Scores against the number of edits so far."""
    scale = results[0]["key"]["scale"]
    first = f"first {scale['lifelong_first']}"
    panels = [
        ("all so far", "efficacy", "efficacy, all edits so far"),
        (first, "efficacy", f"efficacy, the {first}"),
        ("all so far", "generalization", "generalisation"),
        ("all so far", "specificity", "specificity"),
    ]
    figure, axes = _figure(len(panels), 3.0)
    ordered = sorted(results, key=lambda r: (r["name"] != "ours", r["name"] != "published"))
    for axis, (asked, score, title) in zip(axes, panels, strict=True):
        for number, result in enumerate(ordered):
            rows = [row for row in result["rows"] if row["asked"] == asked]
            axis.plot(
                [row["after"] for row in rows],
                [100 * row["generation"][score] for row in rows],
                color=COLOURS[number % len(COLOURS)],
                linewidth=2 if number < 2 else 1,
                linestyle="-" if number < 2 else "--",
                marker="o",
                markersize=3,
                label=_variant(result),
            )
        axis.set_title(f"{title}, %", fontsize=9)
        axis.set_xlabel("edits")
        axis.set_ylim(-3, 103)
    axes[0].legend(fontsize=7, frameon=False)
    _save(
        figure,
        path,
        f"turns of {scale['turn_size']}, free generation; "
        f"{100 * scale['lifelong_again']:.0f} % edit a fact again",
        results,
    )


def _figure(panels: int, width: float) -> tuple[Any, Sequence[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ultraedit"  # the same ids in every run
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(width * panels, 3.7), squeeze=False, facecolor="white"
    )
    axes = axes[0]
    for axis in axes:
        axis.grid(color="#d0d7de", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path, conditions: str, results: list[Result]) -> None:
    from matplotlib import pyplot

    model = results[0]["model"]
    text = (
        f"{conditions}\nLlama of {model['parameters'] / 1e6:.2f} M parameters, "
        f"{model['facts']:,} facts, float32; {results[0]['hardware']}; "
        f"torch {results[0]['versions']['torch']}"
    )
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.text(0.01, 0.01, text, fontsize=7.5, color="#57606a")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)
