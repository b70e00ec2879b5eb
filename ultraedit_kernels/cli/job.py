"""What the commands do alike: load the model, make all edits turn by turn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ultraedit_kernels.cli.show import ERR, progress, show_task

if TYPE_CHECKING:
    import torch

    from ultraedit_kernels.editor import Editor, EditOutcome, TurnResult
    from ultraedit_kernels.model.request import EditRequest


@dataclass(frozen=True)
class Job:
    """What a command works with."""

    name: str
    edits_file: Path
    model: Any
    tokenizer: Any
    """With the template's arguments that were given."""
    shipped: Any
    """The tokenizer as it was loaded."""
    requests: list[EditRequest]
    places: list[str]
    """Of each request, the record of the file that it is from."""
    editor: Editor
    settings: dict[str, Any]
    """As given to the Editor."""
    device: torch.device
    dtype: torch.dtype | None
    """Of the weights, if the model computes in float32 instead."""


@dataclass(frozen=True)
class Made:
    """All turns of a command."""

    turns: list[TurnResult]
    outcomes: list[EditOutcome]
    """Of all edits, in their order."""
    turn_of: list[int]
    """Of each edit, the number of the turn that it was asked for in."""
    turn_size: int
    seconds: float
    """Of editing, with the sampling of the anchors; without loading, scoring and saving."""


def need_transformers() -> None:
    """Raise ImportError without it, and keep its notes to itself."""
    import transformers

    transformers.logging.set_verbosity_error()


def check_folder(file: Path) -> None:
    """Raise ValueError unless the file can be written where it is to be."""
    if not file.absolute().parent.is_dir():
        raise ValueError(f"there is no directory {file.parent} to write {file.name} to; make it")
    if file.is_dir():
        raise ValueError(f"{file} is a directory, expected the name of a file")


def load(
    name: str,
    edits_file: Path,
    limit: int | None,
    strict: bool,
    dtype: str,
    device: str | None,
    settings: dict[str, Any],
    template: dict[str, Any],
) -> Job:
    """Read the edits, load the model, and continue its stream of edits if it has one."""
    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.method.memory import STREAM
    from ultraedit_kernels.model.chat import with_arguments

    numbered = read_edits(edits_file, limit, strict)
    model, shipped, place = load_model(name, dtype, device)
    tokenizer = with_arguments(shipped, template)
    local = Path(name).expanduser()
    stream = local / STREAM
    edited_before = stream.exists()
    if edited_before:
        ERR.print(f"continuing the stream of {stream}", soft_wrap=True)
    editor = Editor(model, tokenizer, continues=stream if edited_before else None, **settings)
    own = (editor, settings, place, _widened(editor))
    numbered = check_edits(edits_file, numbered, tokenizer, editor, strict)
    places, requests = [list(column) for column in zip(*numbered, strict=True)]
    return Job(name, edits_file, model, tokenizer, shipped, requests, places, *own)


def load_model(name: str, dtype: str, device: str | None) -> tuple[Any, Any, torch.device]:
    """A model, its tokenizer, and where they are."""
    import transformers
    from safetensors import SafetensorError

    from ultraedit_kernels.model.gguf import is_gguf, load_gguf

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(
            f"{dtype!r}, expected auto, float32, bfloat16 or float16", param_hint="--dtype"
        )
    place = _device(device)
    local = Path(name).expanduser()
    if not (local.is_dir() or is_gguf(local)) and (
        name.startswith((".", "/", "~")) or name.count("/") > 1
    ):
        raise ValueError(
            f"there is no directory {name}; pass a Hugging Face directory, hub id or GGUF file"
        )
    if local.exists():  # bars are for downloads
        transformers.logging.disable_progress_bar()
    source = str(local) if local.is_dir() else name
    ERR.print(f"loading {name} to {place}", soft_wrap=True)
    try:
        if is_gguf(local):
            model, tokenizer = load_gguf(local, dtype)
            model.to(place)
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(place)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"cannot load the model {name}: {error}") from error
    return model, tokenizer, place


def load_tokenizer(name: str, remedy: str = "") -> Any:
    """The tokenizer of a served model, from a folder, a hub id or a GGUF file."""
    import transformers

    from ultraedit_kernels.model.gguf import is_gguf, load_gguf_tokenizer

    try:
        if is_gguf(name):
            return load_gguf_tokenizer(name)
        return transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the tokenizer of {name}: {error}{remedy}") from error


def _widened(editor: Editor) -> torch.dtype | None:
    """Have the model compute in float32 if that is faster, and say so; the dtype of before then."""
    from ultraedit_kernels.model.wide import widen, widens
    from ultraedit_kernels.settings import TABLE

    if not widens(editor.model, TABLE["float32_gib"].default):
        return None
    dtype: torch.dtype = next(editor.model.parameters()).dtype
    widen(editor.model, editor.modules)
    name = str(dtype).removeprefix("torch.")
    ERR.print(
        f"computing in float32, as this CPU has no units for {name}; edited weights are rounded to "
        f"{name}",
        soft_wrap=True,
    )
    return dtype


def read_edits(file: Path, limit: int | None, strict: bool) -> list[tuple[str, EditRequest]]:
    """The first `limit` edits of the file, each with its record; what it leaves out is a warning,
    or an error if strict."""
    from ultraedit_kernels.evaluation.loaders import load_numbered

    with _shown_warnings():
        return load_numbered(file, strict)[:limit]


def check_edits(
    file: Path,
    numbered: list[tuple[str, EditRequest]],
    tokenizer: Any,
    editor: Editor | None,
    strict: bool,
) -> list[tuple[str, EditRequest]]:
    """The edits that the model can read: the chat template takes their messages, and the editor,
    if there is one, their length. What is left out is a warning, or an error if strict."""
    from ultraedit_kernels.evaluation.loaders import sift
    from ultraedit_kernels.model.encoding import encode_prompt

    def check(request: EditRequest) -> list[EditRequest]:
        asked = [test.prompt for test in request.test_locality]
        for prompt in (
            *(request.prompt, *request.rephrases),
            *(*request.locality, *request.test_rephrases, *asked),
        ):
            encode_prompt(tokenizer, prompt)
        if editor is not None:
            editor.check([request])
        return [request]

    with _shown_warnings():
        return sift(file, numbered, check, strict)


@contextmanager
def _shown_warnings() -> Iterator[None]:
    """Print the warnings that come inside, as the commands print theirs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in caught:
                ERR.print(f"warning: {warning.message}", soft_wrap=True)


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


def make(job: Job, turn_size: int | None) -> Made:
    """Make all edits, turn by turn. Of a turn that a guard rejects, those are left out that it
    rejects by themselves."""
    from ultraedit_kernels.editor import apply_what_passes
    from ultraedit_kernels.evaluation.loaders import split_turns
    from ultraedit_kernels.model.presets import PAPER_TURN_SIZE

    size = turn_size or PAPER_TURN_SIZE
    parts = list(split_turns(job.requests, size))
    turns: list[TurnResult] = []
    outcomes: list[EditOutcome] = []
    turn_of: list[int] = []
    begun = time.perf_counter()
    with progress() as bar:
        shown = show_task(bar, "gathering what edits must leave alone, %")
        job.editor.prepare(lambda share: shown(int(100 * share), 100))
    with progress() as bar:
        task = bar.add_task("editing", total=len(job.requests))
        for number, part in enumerate(parts, start=1):
            with _names_turn(job, number, part):
                more, became = apply_what_passes(job.editor, part)
            turns += more
            outcomes += became
            turn_of += [number] * len(part)
            held = sum(outcome.succeeded for outcome in outcomes)
            bar.update(
                task,
                completed=len(outcomes),
                description=f"turn {number} of {len(parts)}, {held} edits hold",
            )
    if not turns:
        raise ValueError(
            f"{job.places[0]} of {job.edits_file}: no edit passes the guards: {outcomes[0].refused}"
        )
    return Made(turns, outcomes, turn_of, size, time.perf_counter() - begun)


@contextmanager
def _names_turn(job: Job, number: int, part: list[EditRequest]) -> Iterator[None]:
    """An error inside says which records of the file it is about."""
    try:
        yield
    except ValueError as error:
        first = next(i for i, request in enumerate(job.requests) if request is part[0])
        raise ValueError(
            f"turn {number}, {job.places[first]} to {job.places[first + len(part) - 1]} of "
            f"{job.edits_file}: {error}"
        ) from error


def save_checkpoint(model: Any, tokenizer: Any, editor: Editor, out: Path) -> None:
    """Write an edited model to an existing folder, with its stream of edits."""
    from transformers import GenerationConfig

    from ultraedit_kernels.method.memory import STREAM

    # transformers refuses to write some generation settings that models ship with; they go along
    # as they are.
    shipped, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(out)
    model.generation_config = shipped
    shipped.to_json_file(out / "generation_config.json")
    tokenizer.save_pretrained(out)
    (out / STREAM).parent.mkdir()
    editor.save_stream(out / STREAM)
