"""`ultraedit edit`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraedit_kernels.cli.job import Job, check_folder, load, make, need_transformers
from ultraedit_kernels.cli.options import (
    Device,
    Dtype,
    Edits,
    Limit,
    Model,
    Published,
    Strict,
    TurnSize,
    editor_settings,
)
from ultraedit_kernels.cli.show import ERR, OUT, print_verdict

if TYPE_CHECKING:
    from ultraedit_kernels.editor import Editor


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
    dtype: Dtype = "auto",
    device: Device = None,
    *,
    given: dict[str, Any],
) -> None:
    """Edit MODEL and write it to OUT_DIR, an ordinary checkpoint.

    Editing OUT_DIR again continues its stream of edits. The exit status is 0 also if some edits do
    not hold; they are listed.
    """
    need_transformers()
    settings = editor_settings(given, published)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; name a new one with -o")
    if delta is not None:
        check_folder(delta)
        if delta.absolute().parent == out.absolute():
            raise ValueError(
                f"{delta} would lie beside the checkpoint's weights, where servers take it for "
                "one of them; write the delta elsewhere"
            )
    job = load(model, edits, limit, strict, dtype, device, settings)
    with _whole_or_nothing(out):
        made = make(job, turn_size)
        with ERR.status(f"writing {out}"):
            _save(job, out)
            if delta is not None:
                _save_delta(job.editor, delta)

    print_verdict(job, made)
    OUT.print(f"checkpoint: {out}", soft_wrap=True)
    if delta is not None:
        OUT.print(f"delta:      {delta}", soft_wrap=True)


@contextmanager
def _whole_or_nothing(out: Path) -> Iterator[None]:
    """A directory for the block to write to. Nothing of it is left if that fails or is
    interrupted."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        if not new:
            out.mkdir()
        raise


def _save(job: Job, out: Path) -> None:
    from transformers import GenerationConfig

    from ultraedit_kernels.method.memory import STREAM
    from ultraedit_kernels.model.wide import narrow

    if job.dtype is not None:
        narrow(job.model, job.editor.modules, job.dtype)
    # transformers refuses to write some generation settings that models ship with; they go along
    # as they are.
    shipped, job.model.generation_config = job.model.generation_config, GenerationConfig()
    job.model.save_pretrained(out)
    job.model.generation_config = shipped
    shipped.to_json_file(out / "generation_config.json")
    job.tokenizer.save_pretrained(out)
    (out / STREAM).parent.mkdir()
    job.editor.save_stream(out / STREAM)


def _save_delta(editor: Editor, file: Path) -> None:
    """Write the change of all turns."""
    from ultraedit_kernels.store.delta import EditDelta

    joined = EditDelta.join([editor.delta(v) for v in range(1, editor.version + 1)])
    try:
        joined.save(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
