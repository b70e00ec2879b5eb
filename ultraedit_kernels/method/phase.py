"""The phases of a turn: what the slice of work that was just done was for."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """What a turn yields after each slice of work. A phase is the text that it is written as."""

    ANCHORS = "anchors"
    """Gathering what must not move."""
    CAPTURE = "capture"
    """A pass through the model."""
    SOLVE = "solve"
    """From captured rows to weights."""
    GUARD = "guard"
    """Measuring the finished change."""
    RECORD = "record"
    """From here on the work uses nothing of the model but the edited weights."""
    APART = "apart"
    """Up to the next one the work uses nothing of the model, and no other rank of it."""
    ANSWERS = "answers"
    """Asking the model for what it says before and after."""
