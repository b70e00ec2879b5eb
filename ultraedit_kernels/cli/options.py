"""What `ultraedit edit` and `ultraedit eval` ask for alike. How to edit is an option for every
setting of the table that has a flag."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ultraedit_kernels.settings import TABLE, Setting, check

HOW = "How to edit"

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face directory, hub id or GGUF file.")
]
Edits = Annotated[
    Path,
    typer.Argument(
        metavar="EDITS",
        help="JSON, JSONL, CSV, TSV, Parquet or a data set of the hub: our own records (prompt, "
        "target, ...) or a published edit set.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict", help="Stop at a record that cannot be used, rather than leave it out."
    ),
]
TurnSize = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", show_default="100", help="Edits solved together."),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", help="Take the first N edits only.")]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="UltraEdit as published: one open-loop step at 1e-6, or at another --lr.",
        rich_help_panel=HOW,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="Precision to load MODEL in."),
]
TemplateArguments = Annotated[
    str | None,
    typer.Option(
        "--default-chat-template-kwargs",
        metavar="JSON",
        help="Default arguments of the chat template, as the server's option has them, such as "
        "'{\"enable_thinking\": false}'.",
    ),
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--log-to", metavar="KIND:WHERE", help="Log every turn: tensorboard:DIR or mlflow:URI."
    ),
]
Device = Annotated[
    str | None, typer.Option(metavar="cpu|cuda[:N]", show_default="cuda if there is one")
]


def template_arguments(text: str | None) -> dict[str, Any]:
    """Arguments of the chat template, of JSON. Raises typer.BadParameter if it is no object."""
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise typer.BadParameter(
            f'{text!r}, expected a JSON object, such as {{"enable_thinking": false}}',
            param_hint="--default-chat-template-kwargs",
        )
    return arguments


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for every setting of the table that has a flag.

    Args:
        command: takes those that were given as `given`, name → value, beside what it asks for
            itself.
    """
    settings = [setting for setting in TABLE.values() if setting.flag is not None]

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        texts = {setting: arguments.pop(setting.name) for setting in settings}
        given = {s.name: _value(s, text) for s, text in texts.items() if text not in (None, [])}
        command(**arguments, given=given)

    own = inspect.signature(command, eval_str=True).parameters.values()
    parameters = [parameter for parameter in own if parameter.name != "given"]
    parameters += [
        inspect.Parameter(
            setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(setting)
        )
        for setting in settings
    ]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(setting: Setting) -> Any:
    kind = setting.kind
    return Annotated[
        (list[str] if kind.type is list else kind.type) | None,
        typer.Option(
            setting.flag,
            min=kind.least,
            metavar=setting.metavar,
            show_default=setting.unset,
            help=setting.help + (" May be repeated." if kind.type is list else ""),
            rich_help_panel=HOW,
        ),
    ]


def _value(setting: Setting, given: Any) -> Any:
    """What was given, of the type that the setting has."""
    text = ",".join(given) if isinstance(given, list) else given
    try:
        return setting.kind.parse(text) if isinstance(text, str) else text
    except ValueError:
        raise typer.BadParameter(
            f"{text!r}, expected {setting.kind.expected}", param_hint=setting.flag
        ) from None


def editor_settings(given: dict[str, Any], published: bool) -> dict[str, Any]:
    """Arguments of the Editor; those left out have its defaults.

    Args:
        given: those of the command line.
        published: those of the paper stand for the others.

    Raises:
        ValueError: one has a bad value.
        typer.BadParameter: one contradicts the paper's.
    """
    from ultraedit_kernels.model.presets import PAPER

    if published:
        for name, value in given.items():
            if name in PAPER and (name != "lr" or value == "auto"):
                raise typer.BadParameter(
                    f"--published sets it to {PAPER[name]}; leave one of them out",
                    param_hint=TABLE[name].flag,
                )
    settings = {**(PAPER if published else {}), **given}
    modules = "published" if published else TABLE["modules"].default
    settings = {"seed": TABLE["seed"].default, "modules": modules} | settings
    check(settings, "researcher")
    return settings
