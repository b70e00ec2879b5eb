"""What values settings take: in words, as a check, and as they are written on the command line."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Kind:
    """What values a setting takes."""

    expected: str
    """In words, to follow "expected"."""
    holds: Callable[[Any], bool]
    """Whether it takes a value."""
    parse: Callable[[str], Any]
    """The value that a text on the command line means; ValueError for a text that means none."""
    metavar: str = "X"
    type: type = str
    """Of an option of the command line; `parse` reads those that come as text."""
    least: float | None = None


def is_whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(least: int | None = None) -> Kind:
    """Whole numbers, from `least` if given."""
    return Kind(
        "a whole number" + ("" if least is None else f" from {least}"),
        lambda value: is_whole(value) and (least is None or value >= least),
        int,
        "N",
        int,
        least,
    )


def _is_names(value: Any) -> bool:
    if isinstance(value, str):
        return value in ("auto", "published")
    return isinstance(value, Sequence) and all(isinstance(name, str) for name in value)


def _names(text: str) -> str | list[str]:
    names = [name for part in text.split(",") if (name := part.strip())]
    return "".join(names) or "auto" if names in ([], ["auto"], ["published"]) else names


def choice(*names: str) -> Kind:
    """One of some words."""
    return Kind(" or ".join(map(repr, names)), lambda x: x in names, str, "|".join(names))


ABOVE_ZERO = Kind("a number above 0", lambda x: is_number(x) and x > 0, float, type=float)
ABOVE_ONE = Kind("a number above 1", lambda x: is_number(x) and x > 1, float, type=float)
SHARE = Kind(
    "a number above 0 and below 1", lambda x: is_number(x) and 0 < x < 1, float, type=float
)
FROM_ZERO = Kind("a number from 0", lambda x: is_number(x) and x >= 0, float, type=float, least=0.0)
STEP_SIZE = Kind(
    "'auto' or a number above 0",
    lambda x: x == "auto" or ABOVE_ZERO.holds(x),
    lambda text: text if text == "auto" else float(text),
    "auto|X",
)
SWITCH = Kind("true or false", lambda x: isinstance(x, bool), bool, "", bool)
NAMES = Kind("'auto' or a list of names of modules", _is_names, _names, "NAME[,NAME]", list)
URL = Kind(
    "the URL of a server, such as http://HOST:PORT",
    lambda x: x is None or (isinstance(x, str) and x.startswith(("http://", "https://"))),
    str,
    "URL",
)
PATH = Kind("a path", lambda x: x is None or isinstance(x, (str, Path)), os.path.abspath, "PATH")
CANARIES = Kind(
    "a file, or a list", lambda x: isinstance(x, (str, Path, list, tuple)), os.path.abspath, "FILE"
)
