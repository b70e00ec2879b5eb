"""The options of `edit` and `eval`, which come from the table of settings."""

from __future__ import annotations

import inspect
import typing
from typing import Any

import pytest

typer = pytest.importorskip("typer")

from ultraedit_kernels import Editor  # noqa: E402
from ultraedit_kernels.cli.edit import edit  # noqa: E402
from ultraedit_kernels.cli.eval import evaluate  # noqa: E402
from ultraedit_kernels.cli.options import editor_settings, with_settings  # noqa: E402
from ultraedit_kernels.model import presets  # noqa: E402
from ultraedit_kernels.settings import TABLE  # noqa: E402


@pytest.mark.parametrize("command", [edit, evaluate])
def test_every_setting_with_a_flag_is_an_option(command: Any) -> None:
    parameters = inspect.signature(with_settings(command)).parameters
    flags = {name: setting for name, setting in TABLE.items() if setting.flag}
    assert flags.keys() <= parameters.keys() and "given" not in parameters
    for name, setting in flags.items():
        told = typing.get_args(parameters[name].annotation)[1]
        assert told.default == setting.flag and told.help.startswith(setting.help)


@pytest.mark.parametrize("command", [edit, evaluate])
def test_help_tells_the_editors_defaults(command: Any) -> None:
    defaults = inspect.signature(Editor).parameters
    hints = typing.get_type_hints(with_settings(command), include_extras=True)
    for name in ("lr", "rounds", "margin", "anchors", "repairs", "seed"):
        by_place = name in presets.AT_NAMES
        told = TABLE[name].unset if by_place else str(defaults[name].default)
        assert hints[name].__metadata__[0].show_default == told
    told = hints["turn_size"].__metadata__[0].show_default
    assert told == str(presets.PAPER_TURN_SIZE)


def given_to(command_line: list[str]) -> dict[str, Any]:
    """The settings that a command gets."""
    seen: dict[str, Any] = {}

    def command(given: dict[str, Any]) -> None:
        seen.update(given)

    app = typer.Typer(add_completion=False)
    app.command()(with_settings(command))
    app(command_line, standalone_mode=False)
    return seen


def test_only_what_was_given_reaches_the_command() -> None:
    assert given_to([]) == {}
    options = ["--lr", "1e-3", "--rounds", "3", "--modules", "a.b, c", "--modules", "d"]
    assert given_to(options) == {"lr": 1e-3, "rounds": 3, "modules": ["a.b", "c", "d"]}
    assert given_to(["--lr", "auto", "--modules", "auto"]) == {"lr": "auto", "modules": "auto"}


def test_published_settings_stand_for_those_that_were_not_given() -> None:
    assert editor_settings({}, False) == {"seed": 0, "modules": "auto"}
    published = editor_settings({"lr": 1e-3, "seed": 5}, True)
    assert published == presets.PAPER | {"lr": 1e-3, "seed": 5, "modules": "published"}
