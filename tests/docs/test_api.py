"""docs/api.md names every public name, and each of them says what it is."""

from __future__ import annotations

import importlib
import inspect
import re
import types
from pathlib import Path

import pytest

import ultraedit_kernels

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
DOCUMENTED = types.FunctionType, property
NAMES = re.findall(r"^::: (\S+)$", PAGE.read_text(), re.MULTILINE)


def test_the_page_has_all_public_names() -> None:
    public = {f"ultraedit_kernels.{name}" for name in ultraedit_kernels.__all__}
    assert public - set(NAMES) == {"ultraedit_kernels.__version__"}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_page_exists_and_has_docstrings(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(module), attribute)
    assert thing.__doc__
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            value = getattr(value, "__func__", value)  # of a class method
            if not member.startswith("_") and isinstance(value, DOCUMENTED):
                assert value.__doc__, f"{member} has no docstring"
