"""`ultraedit export` and `ultraedit merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ultraedit_kernels.cli.job import (
    check_folder,
    load_model,
    need_transformers,
    save_checkpoint,
)
from ultraedit_kernels.cli.options import Dtype
from ultraedit_kernels.cli.show import OUT

if TYPE_CHECKING:
    from ultraedit_kernels.store.adapters import Factors
    from ultraedit_kernels.store.delta import EditDelta
    from ultraedit_kernels.store.sources import Versions

FORMATS = ("lora", "checkpoint", "delta", "gguf-lora")

Source = Annotated[
    Path, typer.Argument(metavar="STATE|DELTA", help="A state directory, or a delta file.")
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="OUT", help="New file, or new or empty directory.")
]


def export(
    source: Source,
    out: Out,
    to: Annotated[str, typer.Option(metavar="|".join(FORMATS), help="What to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The untouched model: to check that the change is its own; needed for checkpoint "
            "and gguf-lora.",
        ),
    ] = None,
    versions: Annotated[
        str | None,
        typer.Option(
            metavar="N|FIRST:LAST", show_default="all", help="Of the state directory, which."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="R", show_default="the change's own", help="Most rank of an adapter."
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="R",
            show_default="512, vLLM's, for lora",
            help="Most rank that the adapter's target takes; one above it is not written.",
        ),
    ] = None,
    dtype: Dtype = "auto",
) -> None:
    """Write a change, or all of a server's, in a form that other software takes."""
    from ultraedit_kernels.store.files import whole_file
    from ultraedit_kernels.store.sources import Versions, read_deltas

    if to not in FORMATS:
        raise typer.BadParameter(f"{to!r}, expected {', '.join(FORMATS)}", param_hint="--to")
    adapter = to in ("lora", "gguf-lora")
    if not adapter and (rank or max_rank):
        raise typer.BadParameter(f"{to} has no rank; leave it out", param_hint="--rank")
    if to in ("checkpoint", "gguf-lora") and model is None:
        raise typer.BadParameter(f"{to} needs the untouched model", param_hint="--model")
    _check_out(out, folder=to in ("lora", "checkpoint"))
    wanted = None if versions is None else Versions.parse(versions)
    if to == "checkpoint":
        _checkpoint(source, out, str(model), wanted, dtype)
        return
    delta = _joined(read_deltas(source, wanted))
    base = None if model is None else _base(model, dtype, delta)
    if to == "delta":
        with whole_file(out) as part:
            delta.save(part)
        OUT.print(f"delta: {out}", soft_wrap=True)
        return
    _adapter(delta, to, out, base, model, rank, max_rank)


def merge(
    sources: Annotated[
        list[Path],
        typer.Argument(metavar="DELTA...", help="Delta files or state directories, in order."),
    ],
    out: Out,
    allow_conflicts: Annotated[
        bool, typer.Option("--allow-conflicts", help="Merge also what contradicts itself.")
    ] = False,
) -> None:
    """Make one delta of several of one model; applied, it does what they do one after the other.

    Prompts that are taught two targets, and changes that are there twice, are reported, and nothing
    is written.
    """
    from ultraedit_kernels.store.delta import EditDelta
    from ultraedit_kernels.store.files import whole_file
    from ultraedit_kernels.store.sources import conflicts, edits_of, read_deltas

    _check_out(out, folder=False)
    deltas, names = [], []
    for source in sources:
        read = read_deltas(source)
        deltas += read
        numbers = range(1, len(read) + 1)
        names += [f"{source}, version {i}" if source.is_dir() else str(source) for i in numbers]
    try:
        joined = EditDelta.join(deltas)
    except ValueError as error:
        raise ValueError(f"{_foreign(deltas, names)}: {error}") from error
    for number, (name, delta) in enumerate(zip(names, deltas, strict=True), start=1):
        edits = edits_of(delta)
        told = f"{len(edits)} edit{'s' * (len(edits) != 1)}" if edits else "edits not named"
        OUT.print(f"{number}. {name}: {told}", soft_wrap=True)
    found = conflicts(deltas, names)
    for conflict in found:
        OUT.print(f"conflict: {conflict}", style="yellow", soft_wrap=True)
    if found and not allow_conflicts:
        raise ValueError(
            f"{len(found)} conflict{'s' * (len(found) != 1)}, nothing is written; leave out one of "
            "each, or merge them as they are with --allow-conflicts"
        )
    with whole_file(out) as part:
        joined.save(part)
    OUT.print(f"delta: {out}", soft_wrap=True)


def _foreign(deltas: list[EditDelta], names: list[str]) -> str:
    """Which of them does not belong to the first."""
    first = deltas[0].base
    return next(name for name, d in zip(names, deltas, strict=True) if d.base != first)


def _joined(deltas: list[EditDelta]) -> EditDelta:
    from ultraedit_kernels.store.delta import EditDelta

    return deltas[0] if len(deltas) == 1 else EditDelta.join(deltas)


def _check_out(out: Path, folder: bool) -> None:
    """Raise ValueError unless the output can be written there."""
    from ultraedit_kernels.store.files import check_new

    if folder:
        check_new(out)
        return
    check_folder(out)
    if out.exists():
        raise ValueError(f"{out} exists, expected a new file; name another with -o")


def _base(name: str, dtype: str, delta: EditDelta) -> Any:
    """The model that a delta is for, untouched."""
    from ultraedit_kernels.method.guards import check_delta
    from ultraedit_kernels.model.parallel import weight_of
    from ultraedit_kernels.model.presets import resolve_modules
    from ultraedit_kernels.store.delta import digest

    need_transformers()
    model, _, _ = load_model(name, dtype, "cpu")
    resolve_modules(model, model.config, list(delta.base))
    weights = {module: weight_of(model.get_submodule(module)) for module in delta.base}
    base = {module: digest(weight) for module, weight in weights.items()}
    delta.check_base(base, next(iter(weights.values())).dtype)
    check_delta(delta, weights)
    return model


def _adapter(
    delta: EditDelta,
    to: str,
    out: Path,
    model: Any,
    name: str | None,
    rank: int | None,
    max_rank: int | None,
) -> None:
    from ultraedit_kernels.model.parallel import is_transposed
    from ultraedit_kernels.store import adapters

    adapters.need(*(("peft", "lora") if to == "lora" else ("gguf", "gguf")))
    factors = adapters.factorise(delta, rank)
    most = max(made.rank for made in factors.values())
    limit = max_rank or (adapters.VLLM_RANKS[-1] if to == "lora" else most)
    if most > limit:
        raise ValueError(
            f"the change has rank {most}, the target takes {limit} at most"
            + (" (vLLM's --max-lora-rank)" if max_rank is None else "")
            + f"; cut it with --rank {limit}, or say with --max-rank what the target takes"
        )
    if to == "lora":
        some = next(iter(factors))
        transposed = model is not None and is_transposed(model.get_submodule(some))
        adapters.write_lora(factors, out, name, transposed)
    else:
        adapters.write_gguf(factors, out, model.config)
    _report(factors, to, out, most, name)


def _report(factors: dict[str, Factors], to: str, out: Path, most: int, name: str | None) -> None:
    from ultraedit_kernels.store import adapters

    ranks = sorted({made.rank for made in factors.values()})
    shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    size = sum(4 * (made.up.numel() + made.down.numel()) for made in factors.values()) / 2**20
    OUT.print(f"{to}: {out}", soft_wrap=True)
    OUT.print(f"rank {shown}, {len(factors)} module{'s' * (len(factors) != 1)}, {size:.1f} MiB")
    lost = adapters.error_of(factors.values())
    if lost:
        OUT.print(f"the rank leaves out {lost:.2%} of the change's norm:")
        for module, made in factors.items():
            OUT.print(f"  {module}: {made.lost / made.norm:.2%}", soft_wrap=True)
    else:
        OUT.print("nothing of the change is left out")
    if to == "lora" and (served := adapters.vllm_rank(most)) is not None:
        OUT.print(
            f"vllm serve {name or 'MODEL'} --enable-lora --max-lora-rank {served} --lora-modules "
            f"edits={out}",
            soft_wrap=True,
        )


def _checkpoint(source: Path, out: Path, name: str, versions: Versions | None, dtype: str) -> None:
    """Write the model as the versions up to one have made it."""
    from ultraedit_kernels.editor import Editor
    from ultraedit_kernels.store.files import whole_folder
    from ultraedit_kernels.store.sources import base_of, read_deltas

    if versions is not None and versions.first != 1:
        raise ValueError(
            f"a checkpoint of {versions} would lack the versions before; ask for --versions "
            f"1:{versions.last}, or export --to delta"
        )
    need_transformers()
    # What is exported has passed the guards of its server.
    settings: dict[str, Any] = {"anchors": 0, "max_change": 1e9, "max_lost": 1.0}
    if source.is_dir():
        settings |= {"modules": list(base_of(source)), "state_dir": source, "writes": False}
        model, tokenizer, _ = load_model(name, dtype, "cpu")
        editor = Editor(model, tokenizer, **settings)
        editor.rollback(versions.last if versions else editor.version)
    else:
        (delta,) = read_deltas(source, versions)
        model, tokenizer, _ = load_model(name, dtype, "cpu")
        editor = Editor(model, tokenizer, modules=list(delta.base), **settings)
        editor.apply_delta(delta)
    with whole_folder(out) as there:
        save_checkpoint(model, tokenizer, editor, there)
    OUT.print(f"checkpoint: {out}", soft_wrap=True)
