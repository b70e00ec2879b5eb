"""The part of the plugin that works inside vLLM's worker, next to the weights.

Each call runs between two engine steps, so each is short: a turn is prepared on the shadow slice by
slice, and serving goes on between the slices. One turn at a time: `begin` takes the worker for a
turn, whose id the caller makes up; `edit`, `apply_delta` or `rollback` says what to do, `step` does
a slice of it, `commit` makes it live, and `cancel` ends the turn, committed or not.

Under tensor parallelism every call runs on all ranks, and fails on all if it fails on one. Rank 0
alone writes the state directory; the others read it.

Under data parallelism the first engine computes and keeps the journal; the others follow it: they
have no twin, and are given each change as a delta. Nor has an engine of several pipeline stages a
twin: it takes deltas only.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.integrations.vllm import engine_work as work
from ultraedit_kernels.integrations.vllm.background import Background
from ultraedit_kernels.integrations.vllm.engine_hooks import (
    compile_nothing,
    follow_steps,
    follow_weights,
)
from ultraedit_kernels.integrations.vllm.engine_start import build_parts, last_layer_only
from ultraedit_kernels.integrations.vllm.slices import Pace, Slices
from ultraedit_kernels.integrations.vllm.tokenizer import penalties_of
from ultraedit_kernels.integrations.vllm.traffic import Traffic
from ultraedit_kernels.integrations.vllm.twin import Twin
from ultraedit_kernels.integrations.vllm.workers import (
    Answer,
    Begun,
    Checked,
    DeltaFile,
    Gathered,
    History,
    Live,
    LostTurn,
    ProbeData,
    ReadBack,
    Started,
    Status,
    Step,
    UnknownVersion,
    as_data,
    failure_as_data,
)
from ultraedit_kernels.model.generation import Penalties
from ultraedit_kernels.model.parallel import together
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.store.delta import digest_all

logger = logging.getLogger("vllm.ultraedit")

Rpc = TypeVar("Rpc", bound=Callable[..., Any])


@dataclass
class Turn:
    """The turn that has the worker."""

    id: str
    before: int
    """The version that was live at its start."""
    work: Slices | None = None
    called: float = field(default_factory=time.monotonic)
    """When its owner was last heard of."""
    replayed: tuple[int, dict[str, Statistics]] | None = None
    """The version on the shadow, and its statistics, that an engine which follows returns to."""
    start: dict[str, Any] | None = None
    """The shadow before that."""


def rpc(method: Rpc) -> Rpc:
    """Autograd as the editor needs it, errors as data where they must not be raised, the time taken
    in `ms`, and the clock at the end, `at`, in milliseconds too."""

    @functools.wraps(method)
    def call(self: EngineSide, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            with torch.inference_mode(False), self.together():
                answer = method(self, *args)
        except Exception as error:
            data = as_data(error)
            if data is None:
                if self.worker.vllm_config.parallel_config.world_size == 1:
                    raise
                logger.exception("%s failed", method.__name__)
                data = failure_as_data(error)
            answer = {"error": data}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # or the engine waits for what was launched
        end = time.perf_counter()
        answer["ms"], answer["at"] = (end - start) * 1e3, end * 1e3
        return answer

    return call  # type: ignore[return-value]


class EngineSide:
    """Editor, twin and turn of one worker.

    Args:
        worker: vLLM's.

    Attributes:
        live, recorded: version and digest that vLLM serves; the editor is elsewhere in a turn.
        follows: whether another engine computes, and keeps the journal.
    """

    twin: Twin
    background: Background
    live: int
    recorded: str
    follows: bool

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.turn: Turn | None = None
        self.traffic: Traffic | None = None
        self._editor: Editor | None = None
        self._difference: float | None = None
        self._penalties = Penalties()

    @property
    def editor(self) -> Editor:
        """Raises RuntimeError before the start."""
        if self._editor is None:
            raise RuntimeError("ultraedit_start has not been called")
        return self._editor

    @rpc
    def start(self, settings: dict[str, Any], rendering: dict[str, Any], follows: bool) -> Started:
        """Build twin and editor and publish the version of the state directory, if there is one.
        A second start changes nothing."""
        if self._editor is None:
            parts = build_parts(self.worker, settings, rendering, follows)
            self.twin, self._editor, self.follows = parts.twin, parts.editor, follows
            self._penalties = penalties_of(self.worker.vllm_config.model_config)
            self._publish()
            follow_weights(self.worker, self.twin.watch, self._drop_turn, self._republish)
            self.traffic = Traffic(size) if (size := parts.serving.traffic) else None
            self.pace, self.background = Pace(parts.serving.stretch), parts.background
            follow_steps(self.worker, self._stepped)
        editor = self.editor
        return {
            "version": editor.version,
            "modules": list(editor.modules),
            "last_layer_only": last_layer_only(editor.modules, self.twin.model.config),
            "difference": self._difference,
        }

    @rpc
    def check(self, texts: list[list[int]], scores: list[list[float]]) -> Checked:
        """Compare the twin's scores of texts with the engine's, of every token but the first."""
        _, config = self.editor, self.worker.vllm_config
        compile_nothing(config, False)
        how = config.model_config.logprobs_mode, config.cache_config.cache_dtype
        self._difference = self.twin.check(texts, scores, *how)
        return {"difference": self._difference}

    @rpc
    def begin(self, turn: str, keys: list[str]) -> Begun:
        """Take the worker for a turn, and look up idempotency keys in the journal."""
        editor = self.editor
        if (other := self.turn) is not None and self.follows:
            self.cancel(other.id)  # the first engine knows whose turn it is
        elif other is not None:
            return {"busy": other.id, "idle": time.monotonic() - other.called}
        with self.together():
            self.twin.watch.check(self.live)
            taken, known = Turn(turn, self.live), work.known(editor, keys)
        self.turn = taken
        return {"known": known}

    @rpc
    def edit(
        self,
        turn: str,
        edits: list[dict[str, Any]],
        heard: list[str],
        probes: list[ProbeData] | None,
        note: dict[str, Any] | None,
        followed: bool,
    ) -> Answer:
        """Edit, on the shadow; the note goes into the version's record, `heard` to `Editor.steps`.
        If engines follow, the result holds the delta for them. With probes it is a dry run: the
        result holds the shadow's answers to them, and nothing is left to commit."""
        requests = [EditRequest.from_dict(edit) for edit in edits]

        def run() -> Generator[str, None, Any]:
            if self.traffic is not None:
                self.editor.hold_still(self.traffic.keys())
            if probes is None:
                return (yield from work.edit(self.editor, requests, heard, note, followed))
            return (yield from work.try_edit(self.editor, requests, heard, probes, self._penalties))

        return self._work(turn, run())

    @rpc
    def apply_delta(
        self, turn: str, data: bytes, note: dict[str, Any] | None, dry_run: bool
    ) -> Answer:
        """Apply a delta file to the shadow; after a dry run nothing is left to commit."""
        self._ours(turn)
        return self._work(turn, work.apply_delta(self.editor, data, note, dry_run))

    @rpc
    def rollback(self, turn: str, version: int) -> Answer:
        """Take the shadow back to a version, and forget the later ones; an engine that follows does
        so with the commit, when the first engine has."""
        editor = self.editor
        if 0 < version < editor.oldest:
            raise UnknownVersion(
                f"version {version} was let go, expected 0 or {editor.oldest} and later"
            )
        if not self.follows:
            return self._work(turn, work.private(lambda: editor.rollback(version)))
        ours = self._ours(turn)

        def replay() -> None:
            ours.start = editor.versions.copies()
            ours.replayed = version, work.replay(editor, ours.start, version)

        return self._work(turn, work.private(replay))

    @rpc
    def step(self, turn: str) -> Step:
        """A slice of work, unless the engine has requests: slices then follow its steps. What is
        done stays done."""
        slices = self._ours(turn).work
        if slices is None:
            raise LostTurn(f"turn {turn} has nothing to do")
        done, beside = self.pace.when_asked(slices)
        result = slices.result if done else None
        return {"done": done, "beside": beside, "longest": slices.longest, "result": result}

    @rpc
    def commit(self, turn: str) -> Live:
        """Make the shadow live. If that fails, on any rank, shadow and live weights are as before
        the turn on all; after a rollback, which the journal holds, they are tried again."""
        ours = self._ours(turn)
        try:
            with self.together():
                self.twin.watch.check(self.live)
                self._publish()
        except BaseException:
            self._revert(ours)
            raise
        return {"version": self.live}

    @rpc
    def revert(self, turn: str) -> Live:
        """As a commit that has failed: it did on another engine."""
        self._revert(self._ours(turn))
        return {"version": self.live}

    @rpc
    def read_back(self, turn: str) -> Answer:
        """After the commit: work whose result is the live version and digest."""
        self._ours(turn).work = None
        live, version = self.twin.live, self.live

        def read() -> ReadBack:
            return {"version": version, "digest": digest_all(live)}

        return self._work(turn, work.private(read))

    @rpc
    def cancel(self, turn: str, newest: int | None = None) -> Live:
        """End a turn. What it has not committed is dropped, and live weights are untouched by it,
        but for a rollback that the journal holds: it has `newest` as its last version. An engine
        that follows has to be told."""
        if (ours := self.turn) is not None and ours.id == turn:
            with self.together():
                if ours.work is not None:
                    ours.work.close()
                if ours.replayed is not None or self.editor.version < self.live:
                    self.twin.watch.look()  # what the journal holds is published below
                if ours.replayed is not None and ours.replayed[0] == newest:
                    self._publish()
                elif ours.replayed is not None and ours.start is not None:
                    self.editor.versions.write(ours.start)
                self._drop()
            self.turn = None
        return {"version": self.live}

    @rpc
    def delta(self, version: int) -> DeltaFile:
        """The delta file of one version."""
        editor = self.editor
        if not editor.oldest < version <= self.live:
            raise UnknownVersion(
                f"version {version} has no delta in the journal, expected {editor.oldest + 1} to "
                f"{self.live}; GET /v1/edits lists all versions"
            )
        return {"data": editor.delta(version).to_bytes()}

    @rpc
    def history(self, limit: int, before: int | None) -> History:
        """Journal entries below version `before`, newest first, and whether there are more."""
        entries = self.editor.history()[: self.live]
        older = [e for e in reversed(entries) if before is None or e["version"] < before]
        return {"entries": older[:limit], "has_more": len(older) > limit}

    @rpc
    def status(self, digest: bool) -> Status:
        """What is served; the digest is that of the weights which are live."""
        newest = self.editor.version
        if digest:
            self.twin.watch.look()
        return {
            "version": self.live,
            "foreign": self.twin.watch.foreign,
            "newest": newest,
            "recorded": self.recorded,
            "base": self.editor.versions.recorded(0),
            "digest": digest_all(self.twin.live) if digest else None,
            "turn": self.turn is not None,
            "traffic_keys": len(self.traffic or ()),
            "gathered": self.editor.memory.gathering.written,
        }

    @rpc
    def gather(self, server: str) -> Gathered:
        """If the engine is idle, a slice of gathering what protects the model."""
        again = self.background.drive(server, self.turn is not None)
        gathered = self.editor.memory.gathering.written
        return {"gathered": gathered, "done": self.background.ended, "again": again}

    def together(self) -> AbstractContextManager[None]:
        """What is done inside fails on all ranks if it fails on one."""
        return nullcontext() if self._editor is None else together(self._editor.model)

    def _ours(self, turn: str) -> Turn:
        """The turn under way, which must be that one."""
        ours = self.turn
        if ours is None or ours.id != turn:
            raise LostTurn(
                f"turn {turn} is not under way: it was ended, or its server was not heard of for "
                "too long; nothing was changed, send the request again"
            )
        ours.called = time.monotonic()
        return ours

    def _work(self, turn: str, run: Generator[str, None, Any]) -> Answer:
        ours = self._ours(turn)
        if ours.work is not None:
            raise LostTurn(f"turn {turn} has its work already")
        ours.work = Slices(run, self.twin.model)
        return {}

    def _publish(self) -> None:
        if not self.twin.watch.foreign:
            self.twin.publish()
        if self.turn is not None and self.turn.replayed is not None:
            self.editor.versions.forget(*self.turn.replayed)
            self.turn.replayed = None
        self.live = self.editor.version
        self.recorded = self.editor.versions.recorded(self.live)

    def _revert(self, turn: Turn) -> None:
        with self.together():
            self.live = turn.before
            self._drop()
            self._publish()

    def _drop(self) -> None:
        """Leave what was not committed."""
        if self.editor.version > self.live:
            self.editor.rollback(self.live)
        elif self.editor.version < self.live:
            self._publish()  # a rollback that the journal holds cannot be dropped

    def _drop_turn(self) -> None:
        """Before the weights go, which it would read."""
        self.background.held = True
        if self.turn is not None:
            self.cancel(self.turn.id)

    def _republish(self) -> None:
        """After a load: serve the live version again. Other weights than the checkpoint's, or none
        yet, are left alone, and no turn begins on them."""
        if self.editor.versions.are_pristine(self.twin.live):
            self._drop_turn()
            self.twin.watch.note()
            self._publish()
        if self.twin.watch.look():
            logger.warning("UltraEdit: the engine's weights are no longer version %d's", self.live)
        self.background.held = self.twin.watch.foreign

    def _stepped(self, prompts: list[list[int]]) -> None:
        """After an engine step: a slice of the turn's work or of gathering, or keys of prompts."""
        self.pace.after_step(None if self.turn is None else self.turn.work, self.together)
        starting = self._difference is None  # which gathering would hold up
        self.background.after_step(starting or self.turn is not None)
        # In a turn the twin has the turn's weights, not those that are served.
        if self.turn is None and self.traffic is not None:
            self.traffic = self.traffic.sampled(self.editor, prompts, self.together)
