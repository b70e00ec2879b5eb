"""What a turn does in the worker: generators that yield after every short piece of work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

from ultraedit_kernels.editor import Editor, TurnResult
from ultraedit_kernels.integrations.vllm.slices import PRIVATE
from ultraedit_kernels.integrations.vllm.workers import ProbeData, Result
from ultraedit_kernels.model.generation import Penalties, generate
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.store.delta import EditDelta

PROBE_BATCH = 8
"""Prompts that a dry run answers in one slice."""

T = TypeVar("T")


def known(editor: Editor, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The records of the journal by those idempotency keys that it has."""
    return {
        request["key"]: record
        for record in (editor.history() if keys else ())
        for request in record.get("note", {}).get("requests", ())
        if request["key"] in keys
    }


def edit(
    editor: Editor,
    requests: Sequence[EditRequest],
    heard: Sequence[str],
    note: dict[str, Any] | None,
    followed: bool,
) -> Generator[str, None, Result]:
    """Edits on the shadow, as a new version of the journal; with its delta if engines follow.
    `heard` is what the engine has answered to them, see `Editor.steps`."""
    done = yield from editor.steps(requests, note=note, heard=heard)
    result = _result(done) | {"digest": editor.history()[-1]["digest"]}
    return result | ({"delta": done.delta.to_bytes()} if followed else {})


def try_edit(
    editor: Editor,
    requests: Sequence[EditRequest],
    heard: Sequence[str],
    probes: list[ProbeData],
    penalties: Penalties,
) -> Generator[str, None, Result]:
    """Edits on the shadow, what it then answers, and the shadow as it was."""
    done = yield from editor.steps(requests, commit=False, heard=heard)
    with editor.versions.changed(done.delta):
        answers = yield from _answers(editor, probes, penalties)
    return _result(done) | {"answers": answers}


def apply_delta(
    editor: Editor, data: bytes, note: dict[str, Any] | None, dry_run: bool
) -> Generator[str, None, Result]:
    """A delta file, which is read at once, on the shadow: as a new version of the journal, or to
    see what it would be."""
    delta = EditDelta.from_bytes(data)
    return _try_delta(editor, delta) if dry_run else _apply_delta(editor, delta, note)


def _apply_delta(
    editor: Editor, delta: EditDelta, note: dict[str, Any] | None
) -> Generator[str, None, Result]:
    done = yield from editor.delta_steps(delta, note)
    return _result(done) | {"digest": editor.history()[-1]["digest"]}


def _try_delta(editor: Editor, delta: EditDelta) -> Generator[str, None, Result]:
    done = yield from editor.delta_steps(delta, commit=False)
    with editor.versions.changed(delta):
        yield PRIVATE
        digest = editor.digest()
    return _result(done) | {"digest": digest}


def replay(editor: Editor, start: Mapping[str, Tensor], version: int) -> dict[str, Statistics]:
    """The shadow as a version has it, or else as at the `start`, without a change of the journal;
    the version's statistics."""
    try:
        return editor.versions.replay(version)
    except BaseException:
        editor.versions.write(start)
        raise


def private(work: Callable[[], T]) -> Generator[str, None, T]:
    """Work on the shadow alone, which goes on beside the engine."""
    yield PRIVATE
    return work()


def _answers(
    editor: Editor, probes: list[ProbeData], penalties: Penalties
) -> Generator[str, None, list[list[int]]]:
    answers = []
    for i in range(0, len(probes), PROBE_BATCH):
        part = probes[i : i + PROBE_BATCH]
        longest = max(probe["max_tokens"] for probe in part)
        prompts = [probe["ids"] for probe in part]
        tokens = generate(
            editor.model,
            editor.tokenizer,
            prompts,
            max_new_tokens=longest,
            penalties=penalties,
        )
        for probe, ids in zip(part, tokens, strict=True):
            answers.append(ids[: probe["max_tokens"]])
        yield "answers"
    return answers


def _result(result: TurnResult) -> Result:
    edits = [{"succeeded": e.succeeded, "rounds": e.rounds} for e in result.edits]
    return {
        "version": result.version,
        "edits": edits,
        "timings": dict(result.timings),
        "rejected": result.rejected,
        "protected": result.guards.get("protected", 1.0),
    }
