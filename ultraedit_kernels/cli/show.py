"""What the commands print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ultraedit_kernels._version import __version__

if TYPE_CHECKING:
    from ultraedit_kernels.cli.job import Job, Made
    from ultraedit_kernels.method.others import OtherForm
    from ultraedit_kernels.method.results import EditOutcome
    from ultraedit_kernels.model.request import Prompt

SHOWN_FAILURES = 10
"""Edits that do not hold, of which as many are listed."""
SHOWN_OTHERS = 3
"""Answers in other forms, of which as many are listed."""
SCORES = {
    "efficacy": "efficacy",
    "generalization": "generalisation",
    "portability": "portability",
    "specificity": "specificity",
    "specificity_gold": "specificity (gold)",
}
"""Scores and their titles."""
LOOSER = {"begins": "begins with", "contains": "contains", "locft": "LocFT-BF"}
"""Ways to judge an answer, beside the exact one, and their titles."""

# Prompts may hold [brackets] and :colons:, which rich would take for markup.
OUT = Console(markup=False, emoji=False, highlight=False)
ERR = Console(markup=False, emoji=False, highlight=False, stderr=True)


@contextmanager
def progress() -> Iterator[Progress]:
    """Bars on stderr, as long as the block lasts."""
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=ERR,
    ) as bar:
        yield bar


def show_task(bar: Progress, description: str) -> Callable[[int, int], None]:
    """A further line of the bar; called with what is done and what there is to do."""
    task = bar.add_task(description, total=None)
    return lambda done, all_: bar.update(task, completed=done, total=all_)


def print_verdict(job: Job, made: Made) -> None:
    """How many edits hold, and which do not."""
    failed = [outcome for outcome in made.outcomes if not outcome.succeeded]
    OUT.print(f"{summary(len(made.outcomes), len(made.turns), made.seconds)} on {job.device}")
    judged = "right after their turn; `ultraedit eval` scores them after the last one"
    if not failed:
        OUT.print(f"all {len(made.outcomes)} edits hold", style="green", end="")
    else:
        held = len(made.outcomes) - len(failed)
        asked = f"a lead of {job.editor.settings.margin:g} logits asked"
        OUT.print(f"{held} edits hold, {len(failed)} DO NOT, {asked}", style="yellow", end="")
    OUT.print(f" ({judged})" if len(made.turns) > 1 else "", soft_wrap=True)
    for outcome in failed[:SHOWN_FAILURES]:
        lead = (
            f"{'leads' if outcome.margin > 0 else 'is behind'} by {abs(outcome.margin):.1f} logits"
        )
        if outcome.refused is not None:
            lead = f"left out: {outcome.refused}"
        OUT.print(
            f"  {_short(outcome.prompt)} → {_short(outcome.target)}  ({lead})", soft_wrap=True
        )
    if len(failed) > SHOWN_FAILURES:
        OUT.print(f"  and {len(failed) - SHOWN_FAILURES} more")


def print_forms(outcomes: Sequence[EditOutcome], others: Sequence[Sequence[OtherForm]]) -> None:
    """In which forms edits were taught, and what the first ones' questions now get in others."""
    taught = Counter(form for outcome in outcomes for form in outcome.taught)
    OUT.print("taught as " + ", ".join(f"{form} ({count})" for form, count in taught.items()))
    asked = Counter(other.form for edit in others for other in edit)
    said = Counter(other.form for edit in others for other in edit if other.says_target)
    for form, count in asked.items():
        of = f" of the first {len(others)} edits" if len(others) < len(outcomes) else ""
        OUT.print(
            f"asked as {form}, {said[form]} of {count}{of} say the target as well", soft_wrap=True
        )
    unsaid = [
        (outcome.target, other)
        for outcome, edit in zip(outcomes, others, strict=False)
        for other in edit
        if outcome.succeeded and not other.says_target
    ]
    for target, other in unsaid[:SHOWN_OTHERS]:
        OUT.print(
            f"  {other.form}: {_short(other.prompt)} → {other.after!r}, not {_short(target)}",
            soft_wrap=True,
        )
    if unsaid:
        OUT.print("  a rephrase in that form teaches it, too")


def summary(edits: int, turns: int, seconds: float) -> str:
    """How many edits and turns, and how long they took."""
    return f"{edits} edit{'s' * (edits != 1)} in {turns} turn{'s' * (turns != 1)}, {seconds:.1f} s"


def _short(prompt: Prompt, width: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def print_server_scores(console: Console, report: dict[str, Any]) -> None:
    """The tables of a server's report."""
    count = report["edits"]
    console.print(
        f"{report['model']} at {report['server']}, {report['edits_file']}: {count} "
        f"edit{'s' * (count != 1)}",
        soft_wrap=True,
    )
    table = _table("As it answers now, %", ("generation",))
    for score, title in SCORES.items():
        if score != "specificity":  # what it said before is not known
            table.add_row(title, _percent(report["generation"][score]))
    console.print(table)
    _print_looser(console, report)
    _print_relations(console, report)


def print_scores(console: Console, report: dict[str, Any]) -> None:
    """The tables of a report."""
    seconds = summary(report["edits"], report["turns"], report["seconds"])
    console.print(f"{report['model']}, {report['edits_file']}: {seconds}", soft_wrap=True)
    console.print(
        f"turn size {report['settings']['turn_size']}; {report['device']}, {report['dtype']}; "
        f"ultraedit-kernels {__version__}; {report['held_when_made']} edits held when made"
    )
    columns = ("generation", "untouched", "teacher-forced", "untouched")
    table = _table("After all turns, %", columns)
    for score, title in SCORES.items():
        cells = [
            _percent(source[regime][score])
            for regime in ("generation", "teacher_forced")
            for source in (report, report["untouched"])
        ]
        table.add_row(title, *cells)
    console.print(table)
    _print_looser(console, report)
    near = report["neighbours"]
    if near["kl"] is not None:
        console.print(
            f"neighbours: first token as before {_percent(near['first_token'])} %, first five "
            f"{_percent(near['first_five'])} %, the edit's target leaks into "
            f"{_percent(near['leak'])} %, KL {near['kl']:.3f}",
            soft_wrap=True,
        )
    if report["perplexity"] is not None:
        console.print(
            f"perplexity of the locality tests with their gold answers: {report['perplexity']:.3f},"
            f" untouched {report['untouched']['perplexity']:.3f}"
        )
    _print_relations(console, report)
    if "baselines" in report:
        _print_baselines(console, report)
    console.print(
        "generation: free greedy decoding, the whole answer and then a stop. teacher-forced: share "
        "of answer tokens, given those before. specificity: answers that stayed as they were. "
        "LocFT-BF: the answer up to the first full stop or line end, without case and articles.",
        style="dim",
    )


def _print_looser(console: Console, report: dict[str, Any]) -> None:
    table = _table("The answer ... the expected text, %", tuple(LOOSER.values()))
    for score, title in SCORES.items():
        cells = [report[way][score] for way in LOOSER]
        if any(cell is not None for cell in cells):
            table.add_row(title, *map(_percent, cells))
    console.print(table)


def _print_relations(console: Console, report: dict[str, Any]) -> None:
    if "per_relation" not in report:
        return
    table = _table("Generation by relation, %", ("edits", *SCORES.values()))
    for relation, part in report["per_relation"].items():
        cells = [_percent(part["generation"][score]) for score in SCORES]
        table.add_row(relation, str(part["edits"]), *cells)
    console.print(table)


def _print_baselines(console: Console, report: dict[str, Any]) -> None:
    scores = [score for score in SCORES if score != "specificity_gold"]
    columns = ("rate", "seconds", *(SCORES[score] for score in scores))
    table = _table("Generation by method, %", columns)
    methods = {"this run": report, **report["baselines"]}
    for method, scored in methods.items():
        rate = "–" if scored is report else f"{scored['lr']:.2g}"
        cells = [_percent(scored["generation"][score]) for score in scores]
        table.add_row(method, rate, f"{scored['seconds']:.1f}", *cells)
    console.print(table)


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("")
    for column in columns:
        style = "dim" if column == "untouched" else ""
        table.add_column(column, justify="right", style=style, header_style=style)
    return table


def _percent(score: float | None) -> str:
    return "–" if score is None else f"{100 * score:.1f}"
