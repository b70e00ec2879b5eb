"""Draws the plots of bench/results and writes the tables of docs/results.md from its CSV files.

    python -m bench.report [--results DIR] [--page FILE]

The table goes between `<!-- benchmarks:begin -->` and `<!-- benchmarks:end -->`, that of serving
between `<!-- serving:begin -->` and `<!-- serving:end -->`; that of the rounding study between the
like marks in bench/README.md.
"""

from __future__ import annotations

import argparse
import csv
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ultraedit_kernels.model.presets import PAPER_TURN_SIZE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
MIB = 2**20
STREAM = 20_000
"""Edits to which whole turns are projected, if at least `LEAST_TURNS` were timed."""
LEAST_TURNS = 20

METHODS = {
    "ours": "ours",
    "eager": "PyTorch, eager",
    "compile": "PyTorch, compiled",
    "published": "published form",
}
COLOURS = {"ours": "#2da44e", "eager": "#218bff", "compile": "#a475f9", "published": "#e16f24"}
INK = "#7d8590"
"""A grey that reads on white and on black; the background stays transparent."""

Row = dict[str, str]


def read(folder: Path) -> dict[str, list[Row]]:
    """File stem → rows, of every machine's file; GPUs first."""
    files = {path.stem: rows_of(path) for path in sorted(folder.glob("*.csv"))}
    machines = {stem: rows for stem, rows in files.items() if rows and "benchmark" in rows[0]}
    return dict(sorted(machines.items(), key=lambda item: item[1][0]["device"] != "cuda"))


def rows_of(path: Path) -> list[Row]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(results: dict[str, list[Row]]) -> str:
    """The arithmetic of a turn, and whole turns, as Markdown."""
    parts = [text for rows in results.values() for text in _machine(rows)]
    if not any(row["device"] == "cuda" for rows in results.values() for row in rows):
        parts.append("Not measured on a GPU yet.")
    return "\n\n".join(parts)


def _machine(rows: list[Row]) -> Iterator[str]:
    arithmetic = [row for row in rows if row["benchmark"] == "turn" and row["n"] in ("300", "16")]
    if arithmetic:
        yield (
            f"**The arithmetic of a turn** (statistics, values, solve, update of one edited "
            f"module), n = {arithmetic[0]['n']}, on {_place(rows[0])}:"
        )
        yield "\n".join(_arithmetic(arithmetic))
        yield f"{_conditions(arithmetic)}. Errors are of ΔW, against float64. {_floors(rows)}"
    turns = [row for row in rows if row["benchmark"].startswith("turn of")]
    if turns:
        yield f"**A whole turn of {PAPER_TURN_SIZE} edits**, random weights, on {_place(rows[0])}:"
        yield "\n".join(_turns(turns))
        yield f"{_conditions(turns)}."


def _arithmetic(rows: list[Row]) -> Iterator[str]:
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    heads = ["model (d_in → d_out)", *(METHODS[m] for m in methods)]
    heads += ["published / ours", "extra memory, ours / published", "error, ours / published"]
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["method"]: row for row in rows if row["shape"] == shape}
        first = next(iter(found.values()))
        cells = [f"{shape} ({first['d_in']} → {first['d_out']})"]
        cells += [_time(found[m]["median_ms"]) if m in found else "" for m in methods]
        ours, other = found.get("ours"), found.get("published")
        if ours and other:
            cells.append(f"{float(other['median_ms']) / float(ours['median_ms']):.0f}×")
        else:
            cells.append("")
        pair = [row for row in (ours, other) if row]
        cells.append(" / ".join(_memory(row["peak_extra_bytes"]) for row in pair))
        cells.append(" / ".join(f"{float(row['error']):.1e}" for row in pair))
        yield _line(cells)


def _floors(rows: list[Row]) -> str:
    """How near ours comes to the larger of the floors of memory and arithmetic."""
    steps = ("statistics", "values", "solve", "update", "turn")
    ours = [r for r in rows if r["method"] == "ours" and r["benchmark"] in steps]
    ours = [r for r in ours if (r["shape"], r["n"]) == (ours[0]["shape"], ours[0]["n"])]
    shares = []
    for row in ours:
        floors = float(row["share_of_copy_bandwidth"]), float(row["share_of_matrix_rate"])
        shares.append(f"{row['benchmark']} {max(floors):.0%}")
    return (
        "Share of the larger floor that a copy and a matrix product of PyTorch's own set in the "
        f"same run, ours at {ours[0]['shape']}, n = {ours[0]['n']}: {', '.join(shares)}."
    )


def _turns(rows: list[Row]) -> Iterator[str]:
    columns = {
        "ours": "ours, one step",
        "ours: capture": "of it capture",
        "ours: solve": "solve",
        "ours: commit": "commit",
        "ours, closed loop": "ours, a round with anchors",
        "forward": "bare forward",
        "published": "published",
    }
    heads = ["model", *columns.values(), "extra memory, ours / published", f"{STREAM:,} edits"]
    yield _line(heads)
    yield _line(["---"] * len(heads))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["method"]: row for row in rows if row["shape"] == shape}
        cells = [shape, *(_time(found[m]["median_ms"]) if m in found else "" for m in columns)]
        pair = [found[m] for m in ("ours", "published") if m in found]
        cells.append(" / ".join(_memory(row["peak_extra_bytes"]) for row in pair))
        ours = found.get("ours")
        if ours and int(ours["rounds"]) >= LEAST_TURNS:
            seconds = STREAM / PAPER_TURN_SIZE * float(ours["median_ms"]) / 1e3
            cells.append(f"{seconds:.0f} s, projected from {ours['rounds']} turns")
        else:
            cells.append("")
        yield _line(cells)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _place(row: Row) -> str:
    threads = "" if row["device"] == "cuda" else f", threads: {row['threads']}"
    return f"{row['hardware']}{threads}"


def _conditions(rows: list[Row]) -> str:
    """Everything that the figures depend on, in one line."""
    rounds = [int(row["rounds"]) for row in rows]
    loads = [float(row["load_average"]) for row in rows if row["load_average"]]
    first = rows[0]
    parts = [
        _place(first),
        first["dtype"],
        *(f"{name} {first[name]}" for name in ("torch", "triton", "transformers") if first[name]),
        f"medians of {_range(rounds)} rounds",
        f"load average {_range(loads)}" if loads else "",
        first["time"][:10],
    ]
    return "Measured: " + ", ".join(part for part in parts if part)


def _range(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _time(milliseconds: str) -> str:
    ms = float(milliseconds)
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def _memory(size: str) -> str:
    """Below 1 MiB the resident set says nothing."""
    if not size:
        return "–"
    return "< 1 MiB" if int(size) < MIB else f"{int(size) / MIB:,.0f} MiB"


def rounding_table(rows: list[Row]) -> str:
    """The rounding study at its last turn as Markdown."""
    columns = {
        "error": "‖W − W₆₄‖ / ‖W₆₄‖",
        "drift": "‖W − W₆₄‖ / ‖W₆₄ − W₀‖",
        "lost": "lost",
        "shift_error": "error of a turn's shift",
        "output_error": "error of outputs",
    }
    heads = ["updates", "‖ΔW‖ / ‖W₀‖", "rounding", *columns.values()]
    lines = [_line(heads), _line(["---"] * len(heads))]
    last = max(int(row["turn"]) for row in rows)
    for row in rows:
        if int(row["turn"]) == last:
            figures = [f"{float(row[name]):.1%}" for name in columns]
            ratio = f"{float(row['ratio']):.1e}"
            lines.append(_line([row["update"], ratio, row["rounding"], *figures]))
    return "\n".join(lines)


def serving_table(rows: list[Row]) -> str:
    """Throughput of edited and other servers as Markdown."""
    heads = ["server", "tokens/s, median (p20 to p80)", "ratio to unedited (95 % interval)"]
    heads += ["answers as the edited one", "edits that hold"]
    lines = [_line(heads), _line(["---"] * len(heads))]
    for row in rows:
        shares = [f"{float(row[n]):.1%}" if row[n] else "" for n in ("same_answers", "targets")]
        speed, low, high = (f"{float(row[name]):,.0f}" for name in ("tokens_per_s", "p20", "p80"))
        ratio, *interval = (f"{float(row[f'ratio{end}']):.3f}" for end in ("", "_low", "_high"))
        cells = [row["configuration"], f"{speed} ({low} to {high})"]
        lines.append(_line([*cells, f"{ratio} ({' to '.join(interval)})", *shares]))
    first, last = rows[0], rows[-1]
    (alone,) = (row["windows"] for row in rows if row["configuration"] == "edited")
    edits = int(first["edits"])
    parts = [
        f"{first['hardware']}, {first['cores']} cores",
        f"vLLM {first['vllm']}, torch {first['torch']}, {first['dtype']}",
        f"{first['model']}, {first['concurrency']} concurrent requests of {first['output_tokens']} "
        "output tokens, greedy",
        f"{edits:,} edits in {first['turns']} turns through `/v1/edits`, "
        f"{int(first['held_in_turn']) / edits:.1%} of which held after their turn "
        f"({first['settings']})",
        f"LoRA of rank {first['rank']}, the whole change of {first['modules'].replace(' ', ', ')}",
        f"{alone} rounds of one window each of the edited server, running alone, then "
        f"{last['windows']} beside the others; ratios within a round; {first['windows']} windows "
        "before the first edit, after the last and rolled back",
        f"engines on core {first['engine_on_cores'] or 'any'}, servers and clients on the first",
        f"load average before {first['load_average']}",
        first["time"][:10],
    ]
    return "\n".join(lines) + f"\n\nMeasured: {'; '.join(parts)}."


def insert(path: Path, name: str, text: str) -> None:
    """Put text between the markers `<!-- {name}:begin -->` and `<!-- {name}:end -->` of a file.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = path.read_text()
    if begin not in whole or end not in whole:
        raise ValueError(
            f"{path} has no place for the table, expected the lines {begin} and {end}; add them"
        )
    before, after = whole.split(begin)[0], whole.split(end)[1]
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def draw(results: dict[str, list[Row]], folder: Path) -> list[Path]:
    """One SVG per machine, and one of the rounding study if its table is there."""
    paths = []
    for stem, rows in results.items():
        path = folder / f"{stem}.svg"
        if _draw_machine(rows, path):
            paths.append(path)
    lives = folder / "rounding.csv"
    if lives.exists():
        paths.append(_draw_rounding(rows_of(lives), folder / "rounding.svg"))
    return paths


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {
        "svg.hashsalt": "ultraedit", "svg.fonttype": "none", "font.size": 10,
        "font.family": "sans-serif", "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": INK,
        "grid.alpha": 0.25, "axes.grid": True, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "axes.titlesize": 10,
    }  # fmt: skip
    return plt


def _draw_machine(rows: list[Row], path: Path) -> bool:
    """Time of a turn's arithmetic over n, and its extra memory, at the shape with the most rows."""
    turns = [row for row in rows if row["benchmark"] == "turn"]
    if not turns:
        return False
    plt = _pyplot()
    shapes = [row["shape"] for row in turns]
    shape = max(dict.fromkeys(shapes), key=shapes.count)
    here = [row for row in turns if row["shape"] == shape]
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for panel, column, scale, label in (
        (panels[0], "median_ms", 1, "milliseconds"),
        (panels[1], "peak_extra_bytes", MIB, "MiB beyond the inputs"),
    ):
        for method, name in METHODS.items():
            found = sorted((int(r["n"]), r) for r in here if r["method"] == method and r[column])
            if not found:
                continue
            x = [n for n, _ in found]
            y = [float(r[column]) / scale for _, r in found]
            panel.plot(x, y, "o-", color=COLOURS[method], label=name)
            if column == "median_ms":
                low, high = ([float(r[p]) for _, r in found] for p in ("p20_ms", "p80_ms"))
                panel.fill_between(x, low, high, color=COLOURS[method], alpha=0.25, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel="answer positions n", ylabel=label)
    panels[0].set_title("Time: median, 20th to 80th percentile")
    panels[1].set_title("Peak extra memory")
    panels[0].legend()
    figure.suptitle(f"The arithmetic of a turn on one edited module of {shape}", fontsize=11)
    _finish(figure, path, _conditions(here))
    return True


def _draw_rounding(rows: list[Row], path: Path) -> Path:
    """Drift from the float64 master over turns, a panel for each size of update."""
    plt = _pyplot()
    sizes = list(dict.fromkeys(row["update"] for row in rows))
    figure, panels = plt.subplots(
        2, len(sizes), figsize=(3 * len(sizes), 5), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    colours = {"nearest": COLOURS["published"], "stochastic": COLOURS["ours"]}
    for above, below, size in zip(*panels, sizes, strict=True):
        here = [row for row in rows if row["update"] == size]
        for rounding, colour in colours.items():
            found = [row for row in here if row["rounding"] == rounding]
            turns = [int(row["turn"]) for row in found]
            for panel, name in ((above, "error"), (below, "lost")):
                panel.plot(turns, [float(r[name]) for r in found], color=colour, label=rounding)
        first = here[0]
        above.set_title(f"{size}\n‖ΔW‖ = {float(first['ratio']):.1e} ‖W‖, n = {first['n']}")
        above.set(yscale="log", xscale="log")
        below.set(xlabel="turns")
    panels[0][0].set_ylabel("‖W − W₆₄‖ / ‖W₆₄‖")
    panels[1][0].set_ylabel("share of the change that is lost")
    panels[0][0].legend()
    sources = "; ".join(dict.fromkeys(row["source"] for row in rows))
    conditions = f"bfloat16 W of {rows[0]['shape']} against the same life in float64, W₆₄"
    _finish(figure, path, f"{conditions}; torch {rows[0]['torch']}; updates from {sources}")
    return path


def _finish(figure: Any, path: Path, conditions: str) -> None:
    width = int(figure.get_figwidth() * 17)  # characters of this size in a line
    figure.supxlabel(textwrap.fill(conditions, width), fontsize=8)
    figure.savefig(path, transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    results = read(options.results)
    text = table(results)
    print(text)
    insert(options.page, "benchmarks", text)
    served = options.results / "serving.csv"
    if served.exists():
        insert(options.page, "serving", serving_table(rows_of(served)))
    lives = options.results / "rounding.csv"
    if lives.exists() and options.results == RESULTS:
        insert(ROOT / "bench" / "README.md", "rounding", rounding_table(rows_of(lives)))
    try:
        for path in draw(results, options.results):
            print(f"drawn: {path}")
    except ImportError as error:
        print(f"no plots: {error}; install matplotlib")


if __name__ == "__main__":
    main()
