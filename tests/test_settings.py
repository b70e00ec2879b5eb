"""The table of settings: what it takes, refuses and says."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from ultraedit_kernels import Editor
from ultraedit_kernels.model.presets import AT_NAMES, PAPER
from ultraedit_kernels.settings import (
    GROUPS,
    TABLE,
    EditorSettings,
    MethodSettings,
    RouteSettings,
    ServingSettings,
    check,
    only,
    page,
)

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"


def test_it_holds_every_setting_once() -> None:
    names = [of.name for group in GROUPS for of in fields(group)]
    assert list(TABLE) == names and len(set(names)) == len(names)
    flags = [flag for s in TABLE.values() for flag in (s.flag, s.serve) if flag]
    assert len(set(flags)) == len(flags)


def test_every_setting_says_what_it_is() -> None:
    for setting in TABLE.values():
        assert setting.help.endswith(".") and setting.kind.expected
        assert (setting.audience == "operator") == (not setting.reason)


def test_it_takes_its_own_defaults() -> None:
    check({name: setting.default for name, setting in TABLE.items()}, "internal")


def test_it_takes_the_published_settings_of_a_researcher() -> None:
    check(PAPER, "researcher")


def test_the_editor_has_its_settings_and_defaults() -> None:
    arguments = list(inspect.signature(Editor).parameters.values())[2:]
    table = [of.name for group in (MethodSettings, EditorSettings) for of in fields(group)]
    assert {argument.name for argument in arguments} == set(table)
    for argument in arguments:
        by_place = argument.name in AT_NAMES
        assert argument.default == (None if by_place else TABLE[argument.name].default)


@pytest.mark.parametrize("name", AT_NAMES)
def test_a_default_that_depends_on_the_place_is_told_for_both(name: str) -> None:
    setting = TABLE[name]
    assert setting.unset == f"{AT_NAMES[name]:g} at names, else {setting.default:g}"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", "fast"),
        ("lr", float("nan")),
        ("step", True),
        ("rounds", 0),
        ("rounds", 1.5),
        ("rounds", True),
        ("ridge", float("inf")),
        ("margin", -0.1),
        ("batch_size", 0),
        ("rounding", "up"),
        ("modules", "model.layers.0.mlp.down_proj"),
        ("modules", [1]),
        ("anchors", -1),
        ("statistics", "global"),
        ("append_eos", 1),
        ("state_dir", 7),
        ("max_lost", "0.1"),
        ("canaries", {"prompt": "A", "answer": "B"}),
        ("traffic", -1),
        ("stretch", 1),
        ("stretch", "5"),
        ("stretch", True),
        ("reset_prefix_cache", 1),
        ("running_requests", "abort"),
        ("max_queue", 0),
        ("max_queue", 1.5),
        ("max_edits", 0),
        ("max_edits", True),
        ("max_body_mib", "8"),
        ("without_key", 1),
    ],
)
def test_it_refuses_a_bad_value(name: str, value: Any) -> None:
    expected = TABLE[name].kind.expected
    with pytest.raises(ValueError) as refused:
        check({name: value}, "internal")
    start = f"setting {name} is {value!r}, expected {expected}; correct it, or leave it out"
    assert str(refused.value).startswith(start)
    assert str(refused.value).endswith(f"(default: {TABLE[name].unset})")


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 1e-6), ("lr", 1), ("margin", 0), ("modules", ["a.b"]), ("canaries", []), ("seed", -1)],
)
def test_it_takes_a_good_value(name: str, value: Any) -> None:
    check({name: value}, "internal")


def test_an_unknown_setting_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown setting ronds, .*nearest is rounds"):
        check({"ronds": 3}, "operator")


def test_an_unknown_setting_that_is_like_no_other_gets_all_that_may_be_set() -> None:
    with pytest.raises(ValueError, match="unknown setting qqq, expected lr, step, ") as refused:
        check({"qqq": 3}, "operator")
    assert "max_prompts" in str(refused.value) and "batch_size" not in str(refused.value)


@pytest.mark.parametrize(
    ("audience", "refused"),
    [
        ("operator", ["batch_size", "statistics", "append_eos", "seed", "writes", "continues"]),
        ("researcher", ["writes", "continues"]),
        ("internal", []),
    ],
)
def test_what_an_audience_may_not_set_is_refused_with_a_reason(
    audience: Any, refused: list[str]
) -> None:
    for name, setting in TABLE.items():
        if name in refused:
            with pytest.raises(ValueError) as error:
                check({name: setting.default}, audience)
            message = f"setting {name} is not the {audience}'s: {setting.reason}; leave it out"
            assert str(error.value) == message
        else:
            check({name: setting.default}, audience)


def test_groups_are_told_apart() -> None:
    given = {"anchors": 3, "stretch": 2.5, "running_requests": "wait", "max_edits": 9}
    serving = ServingSettings(**only(given, ServingSettings))
    assert serving == ServingSettings(stretch=2.5, running_requests="wait")
    assert only(given, EditorSettings, MethodSettings) == {"anchors": 3}
    assert RouteSettings(**only(given, RouteSettings)) == RouteSettings(max_edits=9)


def test_the_page_is_current() -> None:
    """If not: python -m ultraedit_kernels.settings > docs/settings.md"""
    assert PAGE.read_text() == page()
    assert all(f"| `{name}` |" in page() for name in TABLE)


def test_importing_it_needs_no_torch() -> None:
    code = "import sys, ultraedit_kernels.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
