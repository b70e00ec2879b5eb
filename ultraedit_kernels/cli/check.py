"""`ultraedit check`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraedit_kernels.cli.job import (
    check_edits,
    check_folder,
    load_model,
    load_tokenizer,
    need_transformers,
    read_edits,
)
from ultraedit_kernels.cli.options import Device, Dtype, Limit, Strict
from ultraedit_kernels.cli.show import ERR, OUT
from ultraedit_kernels.settings import EditorSettings

if TYPE_CHECKING:
    from ultraedit_kernels.evaluation.gate import Limits
    from ultraedit_kernels.evaluation.harness import Tasks

FAILED = 3
"""Exit status of a change that was checked and does not pass."""
SHOWN = 10
"""Cases that did not pass, of which as many are listed."""
MARKS = {"passed": "ok", "failed": "FAILED"}


Checked = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|URL", help="The untouched model, or a server that may serve the change."
    ),
]
Tests = Annotated[
    Path,
    typer.Option(metavar="EDITS", help="The edits with their tests, as `ultraedit eval` takes."),
]
Delta = Annotated[
    Path | None,
    typer.Option(metavar="DELTA", help="The change; of a server, none for what it serves."),
]
MinHold = Annotated[
    float, typer.Option(min=0, max=1, metavar="X", help="Least share of edits that hold.")
]
MaxKl = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="X",
        show_default="not asked",
        help="Most nats that neighbours, and other texts, may move on average.",
    ),
]
Canaries = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Canaries, as a server takes them.")
]
Texts = Annotated[Path | None, typer.Option(metavar="FILE", help="Prose to read before and after.")]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write all that was found.")
]
Junit = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the verdict as JUnit XML.")]
Anchors = Annotated[
    int, typer.Option(min=0, metavar="N", help="Texts of the model's own for the guards.")
]
LmEval = Annotated[
    str | None,
    typer.Option(
        "--lm-eval",
        metavar="TASK[,TASK]",
        help="Of a model: tasks of lm-evaluation-harness to score before and after.",
    ),
]
LmEvalPath = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of further tasks, as YAML files.")
]
LmEvalLimit = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Ask the first N documents of each task.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        show_default="where the server has its model from",
        help="Of a server: where its tokenizer is.",
    ),
]


def check(
    model: Checked,
    tests: Tests,
    delta: Delta = None,
    min_hold: MinHold = 1.0,
    max_kl: MaxKl = None,
    canaries: Canaries = None,
    texts: Texts = None,
    json_file: Json = None,
    junit: Junit = None,
    anchors: Anchors = EditorSettings.anchors,
    lm_eval: LmEval = None,
    lm_eval_path: LmEvalPath = None,
    lm_eval_limit: LmEvalLimit = None,
    tokenizer: Tokenizer = None,
    limit: Limit = None,
    strict: Strict = False,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Say whether a change may go out: exit status 0 if so, 3 if not, 1 if it cannot be checked.

    A server serves the change while it is checked, and what it served before afterwards; the key is
    $ULTRAEDIT_API_KEY, else $VLLM_API_KEY.
    """
    from ultraedit_kernels.evaluation.gate import Limits, write_junit

    need_transformers()
    for file in (json_file, junit):
        if file is not None:
            check_folder(file)
    limits = Limits(min_hold, max_kl)
    if model.startswith(("http://", "https://")):
        _check_alone(texts, canaries, lm_eval)
        report = _check_server(model, tests, delta, limits, tokenizer, limit, strict)
    elif delta is None:
        raise typer.BadParameter("a model is checked with a change; name it", param_hint="--delta")
    else:
        tasks = None if lm_eval is None else _tasks(lm_eval, lm_eval_path, lm_eval_limit)
        how = (canaries, texts, tasks, anchors, limit, strict, dtype, device)
        report = _check_model(model, tests, delta, limits, *how)
    named = {"checked": model, "delta": None if delta is None else str(delta), "tests": str(tests)}
    report = named | report
    _print(report)
    if json_file is not None:
        text = json.dumps(report, ensure_ascii=False, indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
    if junit is not None:
        write_junit(report, junit)
    if not report["passed"]:
        raise typer.Exit(FAILED)


def _check_alone(texts: Path | None, canaries: Path | None, lm_eval: str | None) -> None:
    """Raise typer.BadParameter for what is asked of a model in this process only."""
    if texts is not None or canaries is not None:
        raise typer.BadParameter(
            "a server has its own canaries and reads no texts; leave them out",
            param_hint="--texts, --canaries",
        )
    if lm_eval is not None:
        raise typer.BadParameter(
            "tasks are asked of a model in this process; name the model, or run lm_eval by itself "
            "on the server",
            param_hint="--lm-eval",
        )


def _tasks(names: str, folder: Path | None, limit: int | None) -> Tasks:
    from ultraedit_kernels.evaluation.harness import Tasks

    with ERR.status("reading the tasks"):
        return Tasks([part for name in names.split(",") if (part := name.strip())], folder, limit)


def _check_model(
    name: str,
    tests: Path,
    delta_file: Path,
    limits: Limits,
    canaries: Path | None,
    texts: Path | None,
    tasks: Tasks | None,
    anchors: int,
    limit: int | None,
    strict: bool,
    dtype: str,
    device: str | None,
) -> dict[str, Any]:
    from ultraedit_kernels.evaluation.gate import check_model
    from ultraedit_kernels.store.delta import EditDelta

    delta = EditDelta.load(delta_file)
    prose = None if texts is None else texts.read_text(encoding="utf-8")
    numbered = read_edits(tests, limit, strict)
    model, tokenizer, _ = load_model(name, dtype, device)
    numbered = check_edits(tests, numbered, tokenizer, None, strict)
    settings: dict[str, Any] = {"anchors": anchors}
    if canaries is not None:
        settings["canaries"] = str(canaries)
    requests = [request for _, request in numbered]
    own: dict[str, Any] = {"limits": limits, "settings": settings, "texts": prose}
    with ERR.status("checking"):
        return check_model(model, tokenizer, delta, requests, **own, tasks=tasks)


def _check_server(
    url: str,
    tests: Path,
    delta_file: Path | None,
    limits: Limits,
    tokenizer_name: str | None,
    limit: int | None,
    strict: bool,
) -> dict[str, Any]:
    from ultraedit_kernels.evaluation.answers import ServedModel
    from ultraedit_kernels.evaluation.gate import check_served

    numbered = read_edits(tests, limit, strict)
    served = ServedModel.connect(url, os.environ.get("VLLM_API_KEY"))
    source = tokenizer_name or served.root or served.name
    tokenizer = load_tokenizer(source, "; name where it is with --tokenizer")
    requests = [r for _, r in check_edits(tests, numbered, tokenizer, None, strict)]
    if delta_file is None:
        return check_served(served, tokenizer, requests, None, limits=limits)
    with ERR.status(f"checking {url}"):
        return _with_change(
            url,
            delta_file,
            lambda change: check_served(served, tokenizer, requests, change, limits=limits),
        )


def _with_change(
    url: str,
    delta_file: Path,
    check: Callable[[Callable[[], str | None]], dict[str, Any]],
) -> dict[str, Any]:
    """What a check finds that may have the server serve a change; it serves afterwards what it
    served before."""
    from ultraedit_kernels.cli.fleet import key_of_environment
    from ultraedit_kernels.fleet.client import Client
    from ultraedit_kernels.store.delta import EditDelta

    delta = EditDelta.load(delta_file)
    with Client(url, key_of_environment()) as client:
        start = client.health()
        served: list[str] = []

        def change() -> str | None:
            tried = client.apply(delta, dry_run=True, serving=start.digest)
            if tried.rejected is None:
                served.append(tried.digest)  # first: the answer may get lost
                client.apply(delta, serving=start.digest)
            return tried.rejected

        try:
            return check(change)
        finally:
            if served and client.health().digest == served[0]:
                client.rollback(start.version, serving=served[0])


def _print(report: dict[str, Any]) -> None:
    cases = report["cases"]
    for case in cases:
        if case["group"] != "edits":
            told = f": {case['message']}" if case["message"] else ""
            OUT.print(f"{MARKS[case['outcome']]:<6} {case['name']}{told}", soft_wrap=True)
    missed = [case for case in cases if case["group"] == "edits" and case["message"]]
    for case in missed[:SHOWN]:
        OUT.print(f"  {case['name']}: {case['message']}", soft_wrap=True)
    if len(missed) > SHOWN:
        OUT.print(f"  and {len(missed) - SHOWN} more")
    tasks = report.get("lm_eval", {})
    for name, score in tasks.get("before", {}).items():
        if "_stderr" not in name:
            OUT.print(f"{name}: {score:.4g} before, {tasks['after'][name]:.4g} after")
    good = report["passed"]
    OUT.print("passed" if good else "NOT PASSED", style="green" if good else "red")
