"""`ultraedit edit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraedit_kernels.cli.job import (
    check_folder,
    load,
    make,
    need_transformers,
    save_checkpoint,
)
from ultraedit_kernels.cli.options import (
    Device,
    Dtype,
    Edits,
    Limit,
    LogTo,
    Model,
    Published,
    Strict,
    TemplateArguments,
    TurnSize,
    editor_settings,
    template_arguments,
)
from ultraedit_kernels.cli.show import ERR, OUT, print_forms, print_verdict

if TYPE_CHECKING:
    from ultraedit_kernels.cli.job import Job
    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.method.others import OtherForm

ASKED_ELSEWHERE = 100
"""Edits whose questions are asked in other forms in the end."""


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
    strict: Strict = False,
    published: Published = False,
    template: TemplateArguments = None,
    log: LogTo = None,
    dtype: Dtype = "auto",
    device: Device = None,
    *,
    given: dict[str, Any],
) -> None:
    """Edit MODEL and write it to OUT_DIR, an ordinary checkpoint.

    Editing OUT_DIR again continues its stream of edits. The exit status is 0 also if some edits do
    not hold; they are listed.
    """
    from ultraedit_kernels.callbacks import log_to
    from ultraedit_kernels.model.wide import narrow
    from ultraedit_kernels.store.files import check_new, whole_folder

    need_transformers()
    settings, arguments = editor_settings(given, published), template_arguments(template)
    check_new(out)
    if delta is not None:
        check_folder(delta)
        if delta.absolute().parent == out.absolute():
            raise ValueError(
                f"{delta} would lie beside the checkpoint's weights, where servers take it for "
                "one of them; write the delta elsewhere"
            )
    with log_to(log) as callbacks:
        job = load(model, edits, limit, strict, dtype, device, settings, arguments)
        job.editor.callbacks += callbacks
        with whole_folder(out) as there:
            made = make(job, turn_size)
            others = _asked_elsewhere(job)
            with ERR.status(f"writing {out}"):
                if job.dtype is not None:
                    narrow(job.model, job.editor.modules, job.dtype)
                save_checkpoint(job.model, job.shipped, job.editor, there)
                if delta is not None:
                    _save_delta(job.editor, delta)
    print_verdict(job, made)
    print_forms(made.outcomes, others)
    OUT.print(f"checkpoint: {out}", soft_wrap=True)
    if delta is not None:
        OUT.print(f"delta:      {delta}", soft_wrap=True)


def _asked_elsewhere(job: Job) -> list[tuple[OtherForm, ...]]:
    """What the first edits' questions now get in other forms than they were taught in."""
    from ultraedit_kernels.method.others import ask_other_forms

    with ERR.status("asking in other forms"):
        return ask_other_forms(job.model, job.tokenizer, job.requests[:ASKED_ELSEWHERE])


def _save_delta(editor: Editor, file: Path) -> None:
    """Write the change of all turns."""
    from ultraedit_kernels.store.delta import EditDelta
    from ultraedit_kernels.store.files import whole_file

    joined = EditDelta.join([editor.delta(v) for v in range(1, editor.version + 1)])
    with whole_file(file) as part:
        joined.save(part)
