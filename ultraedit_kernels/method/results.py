"""What became of a turn and of its edits, and where its time went."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field
from typing import Any

from ultraedit_kernels.method.change import Turn
from ultraedit_kernels.method.others import OtherForm
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.model.forms import forms_of
from ultraedit_kernels.model.request import EditRequest, Prompt
from ultraedit_kernels.store.delta import EditDelta


@dataclass(frozen=True)
class EditOutcome:
    """What became of one edit."""

    prompt: Prompt
    target: str
    succeeded: bool
    """Greedy decoding gives the target and then stops, by the required margin, for the prompt and
    every rephrase."""
    rounds: int
    """Steps that were taken for it."""
    loss: float
    """Remaining cross entropy, nats, summed over its target tokens and rephrases."""
    margin: float
    """Least lead of a target token over the runner-up, logits."""
    refused: str | None = None
    """Why no turn with it may be served, of an edit that was left out."""
    taught: tuple[str, ...] = ()
    """The forms of prompt and rephrases: "text", "chat", "chat with a system prompt"."""
    other_forms: tuple[OtherForm, ...] = ()
    """What the question gets in the others after the turn, of `editor.with_other_forms`."""

    def record(self) -> dict[str, Any]:
        """It as the version's record holds it, JSON-able; of an edit that was made."""
        left_out = ("refused", "taught", "other_forms")
        return {name: value for name, value in asdict(self).items() if name not in left_out}

    @classmethod
    def left_out(cls, request: EditRequest, reason: str) -> EditOutcome:
        """Of an edit that no guard lets pass."""
        taught = tuple(forms_of((request.prompt, *request.rephrases)))
        return cls(request.prompt, request.target, False, 0, math.nan, math.nan, reason, taught)


@dataclass(frozen=True)
class TurnResult:
    """What became of a turn."""

    version: int
    edits: tuple[EditOutcome, ...]
    timings: dict[str, float]
    """Milliseconds: capture_ms, solve_ms, commit_ms, total_ms."""
    watched: dict[str, int]
    """Earlier edits and other texts that the turn threatened: how many were checked, were broken,
    and were repaired."""
    guards: dict[str, float]
    """What the guards measured, the largest of all modules: "change", ‖W - W_start‖ / ‖W_start‖ of
    the turn; "total_change", the same against the untouched weights, of at most
    `guards.TOTAL_ROWS` rows of each; "lost", share of the untouched model's own texts that it now
    continues otherwise, as before the turn if this is small and the first ones are not; and, if
    not all of these were gathered yet, "protected", the share that was."""
    delta: EditDelta = field(repr=False, compare=False)
    """The change of the turn, committed or not."""
    rejected: str | None = None
    """Of a turn that was not to be committed: why it would not have been."""


class Clock:
    """Where the time of a turn goes."""

    def __init__(self) -> None:
        self._begun = self._commit_begun = time.perf_counter()
        self._spent = {"capture": 0.0, "solve": 0.0}

    def timed(self, work: Generator[Phase, None, Turn]) -> Generator[Phase, None, Turn]:
        """The same work; notes the time of each slice under the phase that it yields."""
        while True:
            begun = time.perf_counter()
            try:
                phase = next(work)
            except StopIteration as done:
                finished: Turn = done.value
                return finished
            self._spent[phase] += time.perf_counter() - begun
            yield phase

    def commits(self) -> None:
        """All that follows is the commit."""
        self._commit_begun = time.perf_counter()

    def milliseconds(self) -> dict[str, float]:
        """`TurnResult.timings` of a turn that ends now."""
        ended = time.perf_counter()
        return {
            "capture_ms": self._spent["capture"] * 1e3,
            "solve_ms": self._spent["solve"] * 1e3,
            "commit_ms": (ended - self._commit_begun) * 1e3,
            "total_ms": (ended - self._begun) * 1e3,
        }


def outcomes_of(requests: Seq[EditRequest], result: Turn) -> tuple[EditOutcome, ...]:
    """What became of each edit of a finished turn."""
    return tuple(
        EditOutcome(
            request.prompt,
            request.target,
            edit.holds,
            edit.rounds,
            edit.loss,
            edit.margin,
            taught=tuple(forms_of((request.prompt, *request.rephrases))),
        )
        for request, edit in zip(requests, result.edits, strict=True)
    )
