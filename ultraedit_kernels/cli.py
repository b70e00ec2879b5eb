"""The console script: `ultraedit edit`, `ultraedit eval` and `ultraedit serve`.

Results go to stdout; progress, notes and errors to stderr. Exit status: 0 when the work was done,
also if some edits do not hold (the output says so); 1 for an error; 2 for wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ultraedit_kernels._version import __version__

REMEDY = "{} is not installed; pip install 'ultraedit-kernels[transformers]'"

try:
    import typer
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {REMEDY.format(missing.name)}") from None

if TYPE_CHECKING:
    import torch

    from ultraedit_kernels.editor import Editor, EditOutcome, TurnResult
    from ultraedit_kernels.model.request import EditRequest, Prompt

SHOWN_FAILURES = 10
SCORES = {
    "efficacy": "efficacy",
    "generalization": "generalisation",
    "specificity": "specificity",
    "specificity_gold": "specificity (gold)",
}

# Prompts may hold [brackets] and :colons:, which rich would take for markup.
_OUT = Console(markup=False, emoji=False, highlight=False)
_ERR = Console(markup=False, emoji=False, highlight=False, stderr=True)

_HOW = "How to edit"
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face directory or hub id.")]
Edits = Annotated[
    Path,
    typer.Argument(
        metavar="EDITS",
        help="JSON or JSONL: our own records (prompt, target, ...) or a published edit set.",
    ),
]
TurnSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default="100", help="Edits solved together."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Take the first N edits only.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of the anchors' sampling.")]
Modules = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME[,NAME]",
        show_default="by model family and size",
        help="Linear modules to edit; may be repeated.",
        rich_help_panel=_HOW,
    ),
]
Lr = Annotated[
    str | None,
    typer.Option(metavar="auto|X", show_default="auto", help="Step size.", rich_help_panel=_HOW),
]
Rounds = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        show_default="24",
        help="Most steps per turn; it ends when every edit holds.",
        rich_help_panel=_HOW,
    ),
]
Margin = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        metavar="X",
        show_default="4.2",
        help="Logits by which a target token must lead for an edit to hold.",
        rich_help_panel=_HOW,
    ),
]
Anchors = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        show_default="2000",
        help="Texts of the model's own that are held still and watched.",
        rich_help_panel=_HOW,
    ),
]
Repairs = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        show_default="200",
        help="Most earlier edits and sampled texts that a turn checks at a time and repairs.",
        rich_help_panel=_HOW,
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="UltraEdit as published: one open-loop step at 1e-6, or at another --lr.",
        rich_help_panel=_HOW,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="Precision to load MODEL in."),
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda[:N]", show_default="cuda if there is one")
]

app = typer.Typer(
    name="ultraedit",
    help="Change facts in a language model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (without the program's name; `sys.argv` if None).

    Returns:
        The exit status, see the module. Nothing is raised: errors are printed.
    """
    try:
        app(args=argv, prog_name="ultraedit")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ImportError as error:
        needs = error.name == "transformers"
        _error(REMEDY.format(error.name) if needs else str(error))
    except OSError as error:
        _error(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (TypeError, ValueError) as error:
        _error(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which may not be imported
            raise
        _error(f"{error}\ntry a smaller --turn-size, --dtype bfloat16 or --device cpu")
    return 1


def _error(text: str) -> None:
    _ERR.print(f"error: {text}", soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        _OUT.print(f"ultraedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def edit(
    model: Model,
    edits: Edits,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", metavar="OUT_DIR", help="New or empty directory for the checkpoint."
        ),
    ],
    delta: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the change by itself, to apply elsewhere."),
    ] = None,
    turn_size: TurnSize = None,
    limit: Limit = None,
    seed: Seed = 0,
    modules: Modules = None,
    lr: Lr = None,
    rounds: Rounds = None,
    margin: Margin = None,
    anchors: Anchors = None,
    repairs: Repairs = None,
    published: Published = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Edit MODEL and write it to OUT_DIR, an ordinary checkpoint.

    Editing OUT_DIR again continues its stream of edits. The exit status is 0 also if some edits do
    not hold; they are listed.
    """
    _need_transformers()
    settings = _settings(published, lr, rounds, margin, anchors, repairs, seed, modules)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; name a new one with -o")
    if delta is not None:
        _check_folder(delta)
        if delta.absolute().parent == out.absolute():
            raise ValueError(
                f"{delta} would lie beside the checkpoint's weights, where servers take it for "
                "one of them; write the delta elsewhere"
            )
    job = _load(model, edits, limit, dtype, device, settings)
    out.mkdir(parents=True, exist_ok=True)

    made = _make(job, turn_size)
    with _ERR.status(f"writing {out}"):
        _save(job, out)
        if delta is not None:
            _joined_delta(job.editor).save(delta)

    _print_verdict(job, made)
    _OUT.print(f"checkpoint: {out}", soft_wrap=True)
    if delta is not None:
        _OUT.print(f"delta:      {delta}", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Model,
    edits: Edits,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write all scores; - is stdout."),
    ] = None,
    turn_size: TurnSize = None,
    limit: Limit = None,
    seed: Seed = 0,
    modules: Modules = None,
    lr: Lr = None,
    rounds: Rounds = None,
    margin: Margin = None,
    anchors: Anchors = None,
    repairs: Repairs = None,
    published: Published = False,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines",
            help="Also score the published method, fine-tuning and LoRA, each at its best rate.",
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Score a running OpenAI-compatible server as it is, editing nothing; its API key "
            "is $VLLM_API_KEY, MODEL is where its tokenizer is.",
        ),
    ] = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Edit MODEL in memory and score it, after all turns and against the untouched model."""
    _need_transformers()
    from ultraedit_kernels.evaluation import scores as metrics
    from ultraedit_kernels.evaluation.perplexity import perplexity as measure
    from ultraedit_kernels.evaluation.perplexity import untouched_texts

    settings = _settings(published, lr, rounds, margin, anchors, repairs, seed, modules)
    if json_file not in (None, "-"):
        _check_folder(Path(str(json_file)))
    if server is not None:
        given = (turn_size, modules, lr, rounds, margin, anchors, repairs, published or None)
        if baselines or any(option is not None for option in given):
            raise typer.BadParameter(
                "a server is scored as it is; leave out the options of editing",
                param_hint="--server",
            )
        _evaluate_server(model, edits, limit, server, json_file)
        return
    if baselines and find_spec("peft") is None:
        raise ValueError("--baselines needs peft; pip install 'ultraedit-kernels[bench]'")
    job = _load(model, edits, limit, dtype, device, settings)
    scored = (job.model, job.tokenizer, job.requests)
    texts = untouched_texts(job.requests)

    def perplexity() -> dict[str, float | None]:
        return {"perplexity": measure(*scored[:2], texts) if texts else None}

    with _progress() as bar:
        task = bar.add_task("recording the untouched model", total=None)
        before = metrics.record_locality(
            *scored, progress=lambda done, all_: bar.update(task, completed=done, total=all_)
        )
        bar.remove_task(task)
        first = bar.add_task("scoring the untouched model", total=None)
        untouched = metrics.evaluate(
            *scored, progress=lambda done, all_: bar.update(first, completed=done, total=all_)
        )
    untouched |= perplexity()
    made = _make(job, turn_size)
    with _progress() as bar:
        last = bar.add_task("scoring after all turns", total=None)
        scores = metrics.evaluate(
            *scored,
            before=before,
            progress=lambda done, all_: bar.update(last, completed=done, total=all_),
        )

    scores |= perplexity()
    report = _report(job, made, untouched, scores)
    if baselines:
        job.editor.rollback(0)
        report["baselines"] = _compare(
            job, made.turn_size, lambda: metrics.evaluate(*scored, before=before) | perplexity()
        )
    _write_scores(report, json_file, _print_scores)


# The model and any options go to the server as they are, `--help` too.
@app.command(
    add_help_option=False,
    context_settings={
        "ignore_unknown_options": True,
        "allow_extra_args": True,
        "allow_interspersed_args": False,
    },
)
def serve(context: typer.Context) -> None:
    """Serve MODEL with vLLM and take edits at /v1/edits; `ultraedit serve --help` says more."""
    from ultraedit_kernels.integrations.vllm import serve as server

    raise typer.Exit(server.main(context.args))


@dataclass(frozen=True)
class _Job:
    """What a command works with."""

    name: str
    edits_file: Path
    model: Any
    tokenizer: Any
    requests: list[EditRequest]
    editor: Editor
    settings: dict[str, Any]
    """As given to the Editor."""
    device: torch.device


@dataclass(frozen=True)
class _Made:
    """All turns of a command."""

    turns: list[TurnResult]
    turn_size: int
    seconds: float
    """Of editing, with the sampling of the anchors; without loading, scoring and saving."""

    @property
    def outcomes(self) -> list[EditOutcome]:
        return [outcome for turn in self.turns for outcome in turn.edits]


def _need_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def _settings(
    published: bool,
    lr: str | None,
    rounds: int | None,
    margin: float | None,
    anchors: int | None,
    repairs: int | None,
    seed: int,
    modules: list[str] | None,
) -> dict[str, Any]:
    """Keyword arguments of the Editor; those left out have its defaults."""
    from ultraedit_kernels.model.presets import PAPER

    given: dict[str, Any] = {"lr": lr, "rounds": rounds, "margin": margin}
    given |= {"anchors": anchors, "repairs": repairs}
    given = {name: value for name, value in given.items() if value is not None}
    if published:
        for name, value in given.items():
            if name != "lr" or value == "auto":
                raise typer.BadParameter(
                    f"--published sets it to {PAPER[name]}; leave one of them out",
                    param_hint=f"--{name}",
                )
    if lr not in (None, "auto"):
        try:
            given["lr"] = float(str(lr))
        except ValueError:
            raise typer.BadParameter(
                f"{lr!r} is neither auto nor a number", param_hint="--lr"
            ) from None
    names = [name.strip() for part in modules or [] for name in part.split(",") if name.strip()]
    return {**(PAPER if published else {}), **given, "seed": seed, "modules": names or "auto"}


def _check_folder(file: Path) -> None:
    if not file.absolute().parent.is_dir():
        raise ValueError(f"there is no directory {file.parent} to write {file.name} to; make it")
    if file.is_dir():
        raise ValueError(f"{file} is a directory, expected the name of a file")


def _load(
    name: str,
    edits_file: Path,
    limit: int | None,
    dtype: str,
    device: str | None,
    settings: dict[str, Any],
) -> _Job:
    """Read the edits, load the model, and continue its stream of edits if it has one."""
    import transformers
    from safetensors import SafetensorError

    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.method.memory import STREAM

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(
            f"{dtype!r}, expected auto, float32, bfloat16 or float16", param_hint="--dtype"
        )
    place = _device(device)
    requests = _read_edits(edits_file, limit)
    local = Path(name).expanduser()
    if not local.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"there is no directory {name}; pass a Hugging Face directory or hub id")
    if local.is_dir():  # bars are for downloads
        transformers.logging.disable_progress_bar()
    source = str(local) if local.is_dir() else name
    _ERR.print(f"loading {name} to {place}", soft_wrap=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(place)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the model {name}: {error}") from error
    stream = local / STREAM
    edited_before = stream.exists()
    if edited_before:
        _ERR.print(f"continuing the stream of {stream}", soft_wrap=True)
    editor = Editor(model, tokenizer, continues=stream if edited_before else None, **settings)
    return _Job(name, edits_file, model, tokenizer, requests, editor, settings, place)


def _read_edits(file: Path, limit: int | None) -> list[EditRequest]:
    from ultraedit_kernels.evaluation.loaders import load_edits

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        requests = load_edits(file)[:limit]
    for warning in caught:
        _ERR.print(f"warning: {warning.message}", soft_wrap=True)
    return requests


def _device(name: str | None) -> torch.device:
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        name = "cuda" if there else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # no such kind
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{name!r}, expected cpu, cuda or cuda:N", param_hint="--device")
    if device.type == "cuda" and (device.index or 0) >= there:
        raise typer.BadParameter(
            f"{name} is not there, this PyTorch sees {there} CUDA devices", param_hint="--device"
        )
    return device


@contextmanager
def _progress() -> Iterator[Progress]:
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=_ERR,
    ) as bar:
        yield bar


def _make(job: _Job, turn_size: int | None) -> _Made:
    """Make all edits, turn by turn."""
    from ultraedit_kernels.evaluation.loaders import split_turns
    from ultraedit_kernels.model.presets import PAPER_TURN_SIZE

    size = turn_size or PAPER_TURN_SIZE
    parts = list(split_turns(job.requests, size))
    for number, part in enumerate(parts, start=1):  # before any work is done
        with _names_turn(job, number, part):
            job.editor.check(part)
    turns: list[TurnResult] = []
    done = held = 0
    begun = time.perf_counter()
    with _ERR.status("sampling anchors"):
        job.editor.prepare()
    with _progress() as bar:
        task = bar.add_task("editing", total=len(job.requests))
        for number, part in enumerate(parts, start=1):
            with _names_turn(job, number, part):
                turns.append(job.editor.apply(part))
            done += len(part)
            held += sum(outcome.succeeded for outcome in turns[-1].edits)
            bar.update(
                task,
                completed=done,
                description=f"turn {len(turns)} of {len(parts)}, {held} edits hold",
            )
    return _Made(turns, size, time.perf_counter() - begun)


@contextmanager
def _names_turn(job: _Job, number: int, part: list[EditRequest]) -> Iterator[None]:
    """An error inside says which records of the file it is about."""
    try:
        yield
    except ValueError as error:
        first = next(i for i, request in enumerate(job.requests) if request is part[0])
        raise ValueError(
            f"turn {number}, records {first} to {first + len(part) - 1} of {job.edits_file}: "
            f"{error}"
        ) from error


def _save(job: _Job, out: Path) -> None:
    from transformers import GenerationConfig

    from ultraedit_kernels.method.memory import STREAM

    # transformers refuses to write some generation settings that models ship with; they go along
    # as they are.
    shipped, job.model.generation_config = job.model.generation_config, GenerationConfig()
    job.model.save_pretrained(out)
    job.model.generation_config = shipped
    shipped.to_json_file(out / "generation_config.json")
    job.tokenizer.save_pretrained(out)
    (out / STREAM).parent.mkdir()
    job.editor.save_stream(out / STREAM)


def _joined_delta(editor: Editor) -> Any:
    from ultraedit_kernels.store.delta import EditDelta

    return EditDelta.join([editor.delta(v) for v in range(1, editor.version + 1)])


def _print_verdict(job: _Job, made: _Made) -> None:
    failed = [outcome for outcome in made.outcomes if not outcome.succeeded]
    _OUT.print(f"{_summary(len(made.outcomes), len(made.turns), made.seconds)} on {job.device}")
    judged = "right after their turn; `ultraedit eval` scores them after the last one"
    if not failed:
        _OUT.print(f"all {len(made.outcomes)} edits hold", style="green", end="")
    else:
        held = len(made.outcomes) - len(failed)
        asked = f"a lead of {job.editor.settings.margin:g} logits asked"
        _OUT.print(f"{held} edits hold, {len(failed)} DO NOT, {asked}", style="yellow", end="")
    _OUT.print(f" ({judged})" if len(made.turns) > 1 else "", soft_wrap=True)
    for outcome in failed[:SHOWN_FAILURES]:
        lead = (
            f"{'leads' if outcome.margin > 0 else 'is behind'} by {abs(outcome.margin):.1f} logits"
        )
        _OUT.print(
            f"  {_short(outcome.prompt)} → {_short(outcome.target)}  ({lead})", soft_wrap=True
        )
    if len(failed) > SHOWN_FAILURES:
        _OUT.print(f"  and {len(failed) - SHOWN_FAILURES} more")


def _summary(edits: int, turns: int, seconds: float) -> str:
    return f"{edits} edit{'s' * (edits != 1)} in {turns} turn{'s' * (turns != 1)}, {seconds:.1f} s"


def _short(prompt: Prompt, width: int = 60) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _report(
    job: _Job, made: _Made, untouched: dict[str, Any], scores: dict[str, Any]
) -> dict[str, Any]:
    """All that `--json` writes."""
    import torch

    if job.device.type == "cuda":
        name = torch.cuda.get_device_name(job.device)
    else:
        name = f"CPU (threads: {torch.get_num_threads()})"
    turn_of = [i for i, turn in enumerate(made.turns, start=1) for _ in turn.edits]
    judged = zip(scores.pop("rows"), turn_of, made.outcomes, strict=True)
    # lr and the like as used, then those that only the Editor's arguments know.
    settings = asdict(job.editor.settings) | job.settings | {"modules": job.editor.modules}
    return {
        "model": job.name,
        "edits_file": str(job.edits_file),
        "edits": scores.pop("edits"),
        "turns": len(made.turns),
        "seconds": made.seconds,
        "held_when_made": sum(outcome.succeeded for outcome in made.outcomes),
        "device": name,
        "dtype": str(next(iter(job.editor.weights.values())).dtype).removeprefix("torch."),
        "versions": {
            "ultraedit-kernels": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        "settings": {"turn_size": made.turn_size, **settings},
        "untouched": {
            key: untouched[key] for key in ("generation", "teacher_forced", "perplexity")
        },
        **scores,
        "rows": [
            {**row, "turn": turn, "held_when_made": outcome.succeeded, "rounds": outcome.rounds}
            for row, turn, outcome in judged
        ],
    }


def _compare(
    job: _Job, turn_size: int, score: Callable[[], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The best scores of every baseline, and all that were tried."""
    from ultraedit_kernels.evaluation import baselines as comparison
    from ultraedit_kernels.evaluation.loaders import split_turns

    turns = list(split_turns(job.requests, turn_size))
    result = {}
    for baseline in comparison.BASELINES:
        with _ERR.status(f"comparing with {baseline}"):
            best = comparison.search(
                baseline, job.model, job.tokenizer, turns, job.editor.modules, score
            )
        best.pop("rows")
        result[baseline] = best
    return result


def _evaluate_server(
    model: str, edits: Path, limit: int | None, url: str, json_file: str | None
) -> None:
    import transformers

    from ultraedit_kernels.evaluation import scores as metrics
    from ultraedit_kernels.evaluation.answers import ServedModel

    requests = _read_edits(edits, limit)
    served = ServedModel.connect(url, os.environ.get("VLLM_API_KEY"))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {model}: {error}") from error
    with _progress() as bar:
        task = bar.add_task(f"asking {served.name}", total=None)
        scores = metrics.evaluate(
            served,
            tokenizer,
            requests,
            progress=lambda done, all_: bar.update(task, completed=done, total=all_),
        )
    del scores["teacher_forced"]
    report = {"server": served.url, "model": served.name, "edits_file": str(edits), **scores}
    _write_scores(report, json_file, _print_server_scores)


def _write_scores(
    report: dict[str, Any],
    json_file: str | None,
    show: Callable[[Console, dict[str, Any]], None],
) -> None:
    show(_ERR if json_file == "-" else _OUT, report)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    if json_file == "-":
        print(text)
    elif json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
        _OUT.print(f"all scores: {json_file}", soft_wrap=True)


def _print_server_scores(console: Console, report: dict[str, Any]) -> None:
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
    _print_relations(console, report)


def _print_scores(console: Console, report: dict[str, Any]) -> None:
    seconds = _summary(report["edits"], report["turns"], report["seconds"])
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
        "of answer tokens, given those before. specificity: answers that stayed as they were.",
        style="dim",
    )


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


if __name__ == "__main__":
    sys.exit(main())
