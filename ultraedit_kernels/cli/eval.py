"""`ultraedit eval`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ultraedit_kernels._version import __version__
from ultraedit_kernels.cli.job import (
    Job,
    Made,
    check_edits,
    check_folder,
    load,
    load_tokenizer,
    make,
    need_transformers,
    read_edits,
)
from ultraedit_kernels.cli.options import (
    Device,
    Dtype,
    Edits,
    Limit,
    Model,
    Published,
    Strict,
    TemplateArguments,
    TurnSize,
    editor_settings,
    template_arguments,
)
from ultraedit_kernels.cli.show import (
    ERR,
    OUT,
    print_scores,
    print_server_scores,
    progress,
    show_task,
)


def evaluate(
    model: Model,
    edits: Edits,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Also write all scores; - is stdout."),
    ] = None,
    turn_size: TurnSize = None,
    limit: Limit = None,
    strict: Strict = False,
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
    template: TemplateArguments = None,
    dtype: Dtype = "auto",
    device: Device = None,
    *,
    given: dict[str, Any],
) -> None:
    """Edit MODEL in memory and score it, after all turns and against the untouched model."""
    need_transformers()
    settings, arguments = editor_settings(given, published), template_arguments(template)
    if json_file not in (None, "-"):
        check_folder(Path(str(json_file)))
    if server is not None:
        if baselines or published or turn_size is not None or given.keys() - {"seed"}:
            raise typer.BadParameter(
                "a server is scored as it is; leave out the options of editing",
                param_hint="--server",
            )
        _evaluate_server(model, edits, limit, strict, server, json_file, arguments)
        return
    if baselines and find_spec("peft") is None:
        raise ValueError("--baselines needs peft; pip install 'ultraedit-kernels[bench]'")
    job = load(model, edits, limit, strict, dtype, device, settings, arguments)
    _write_scores(_evaluate(job, turn_size, baselines), json_file, print_scores)


def _evaluate(job: Job, turn_size: int | None, baselines: bool) -> dict[str, Any]:
    """Make the edits of the job; its report."""
    from ultraedit_kernels.evaluation import scores as metrics
    from ultraedit_kernels.evaluation.perplexity import perplexity as measure
    from ultraedit_kernels.evaluation.perplexity import untouched_texts

    scored = (job.model, job.tokenizer, job.requests)
    texts = untouched_texts(job.requests)

    def perplexity() -> dict[str, float | None]:
        return {"perplexity": measure(*scored[:2], texts) if texts else None}

    with progress() as bar:
        shown = show_task(bar, "recording the untouched model")
        before = metrics.record_locality(*scored, progress=shown)
        bar.remove_task(bar.task_ids[0])
        shown = show_task(bar, "scoring the untouched model")
        untouched = metrics.evaluate(*scored, progress=shown)
    untouched |= perplexity()
    made = make(job, turn_size)
    with progress() as bar:
        shown = show_task(bar, "scoring after all turns")
        scores = metrics.evaluate(*scored, before=before, progress=shown)
    scores |= perplexity()
    report = _report(job, made, untouched, scores)
    if baselines:
        job.editor.rollback(0)
        report["baselines"] = _compare(
            job, made.turn_size, lambda: metrics.evaluate(*scored, before=before) | perplexity()
        )
    return report


def _report(
    job: Job, made: Made, untouched: dict[str, Any], scores: dict[str, Any]
) -> dict[str, Any]:
    """All that `--json` writes."""
    import torch

    from ultraedit_kernels.evaluation.scores import WAYS

    if job.device.type == "cuda":
        name = torch.cuda.get_device_name(job.device)
    else:
        name = f"CPU (threads: {torch.get_num_threads()})"
    judged = zip(scores.pop("rows"), made.turn_of, made.outcomes, strict=True)
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
        "dtype": str(next(iter(job.editor.weights.values())).dtype).removeprefix("torch.")
        + (", computed in float32" if job.dtype is not None else ""),
        "versions": {
            "ultraedit-kernels": __version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        "settings": {"turn_size": made.turn_size, **settings},
        "untouched": {key: untouched[key] for key in (*WAYS, "perplexity")},
        **scores,
        "rows": [
            {**row, "turn": turn, "held_when_made": outcome.succeeded, "rounds": outcome.rounds}
            for row, turn, outcome in judged
        ],
    }


def _compare(
    job: Job, turn_size: int, score: Callable[[], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The best scores of every baseline, and all that were tried."""
    from ultraedit_kernels.evaluation import baselines as comparison
    from ultraedit_kernels.evaluation.loaders import split_turns

    turns = list(split_turns(job.requests, turn_size))
    result = {}
    for baseline in comparison.BASELINES:
        with ERR.status(f"comparing with {baseline}"):
            best = comparison.search(
                baseline, job.model, job.tokenizer, turns, job.editor.modules, score
            )
        best.pop("rows")
        result[baseline] = best
    return result


def _evaluate_server(
    model: str,
    edits: Path,
    limit: int | None,
    strict: bool,
    url: str,
    json_file: str | None,
    arguments: dict[str, Any],
) -> None:

    from ultraedit_kernels.evaluation import scores as metrics
    from ultraedit_kernels.evaluation.answers import ServedModel
    from ultraedit_kernels.model.chat import with_arguments

    numbered = read_edits(edits, limit, strict)
    served = ServedModel.connect(url, os.environ.get("VLLM_API_KEY"))
    tokenizer = with_arguments(load_tokenizer(model), arguments)
    numbered = check_edits(edits, numbered, tokenizer, None, strict)
    requests = [request for _, request in numbered]
    with progress() as bar:
        shown = show_task(bar, f"asking {served.name}")
        scores = metrics.evaluate(served, tokenizer, requests, progress=shown)
    del scores["teacher_forced"]
    report = {"server": served.url, "model": served.name, "edits_file": str(edits), **scores}
    _write_scores(report, json_file, print_server_scores)


def _write_scores(
    report: dict[str, Any],
    json_file: str | None,
    show: Callable[[Console, dict[str, Any]], None],
) -> None:
    show(ERR if json_file == "-" else OUT, report)
    text = json.dumps(report, ensure_ascii=False, indent=1)
    if json_file == "-":
        print(text)
    elif json_file is not None:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
        OUT.print(f"all scores: {json_file}", soft_wrap=True)
