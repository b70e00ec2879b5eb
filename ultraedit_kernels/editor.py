"""Editor: a model, its statistics and its versions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from ultraedit_kernels.callbacks import TurnCallback, tell
from ultraedit_kernels.method import guards
from ultraedit_kernels.method.contexts import CONTEXT_TEXTS
from ultraedit_kernels.method.goals import Goals
from ultraedit_kernels.method.guards import GuardError, Guards
from ultraedit_kernels.method.locate import at_names
from ultraedit_kernels.method.memory import Memory, TurnMemory
from ultraedit_kernels.method.others import ask_other_forms
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.prepare import Preparation
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.results import Clock, EditOutcome, TurnResult, outcomes_of
from ultraedit_kernels.method.spaces import spaces_of
from ultraedit_kernels.method.turn import turn
from ultraedit_kernels.method.versions import Versions
from ultraedit_kernels.model.encoding import Sequence, encode_edits
from ultraedit_kernels.model.parallel import weight_of
from ultraedit_kernels.model.presets import AT_NAMES, reads_names, resolve_modules
from ultraedit_kernels.model.request import EditRequest, check_turn
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.settings import TABLE, EditorSettings, MethodSettings, check, only
from ultraedit_kernels.store.delta import EditDelta

__all__ = ["EditOutcome", "Editor", "TurnResult", "apply_what_passes", "with_other_forms"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Editor:
    """Edits a Hugging Face causal language model in place, turn by turn, with an exact way back.

    Args:
        model: the model; only the weights of the edited modules ever change.
        tokenizer: its tokenizer; `chat.with_arguments` gives it defaults of the template's.
        modules: dotted names of linear modules (`nn.Linear`, or GPT-2's Conv1D), or "auto" for the
            family's preset.
        lr, step, reach, rounds, ridge, margin, repairs, batch_size, rounding: see `MethodSettings`;
            reach, rounds and margin are by default what suits the place that is edited.
        anchors: texts of the model's own that are held still and watched, besides earlier edits; 0
            for nothing but the locality prompts.
        anchor_rows: rows that the anchors of a module are compressed to.
        statistics: "per-module", or "per-shape" as the published scores were made.
        append_eos: teach the model to stop after the target.
        state_dir: directory of the versions; continued if it holds some, with the anchors that it
            holds. In memory if None. The editor keeps other processes out until `close`.
        keep: newest versions in the state directory that can be returned to at least.
        writes: if not, another editor writes the state directory, and this one makes its changes.
        max_change: most that a turn may change a weight, as a share of its norm.
        max_lost: most of the model's own texts, as a share, whose continuation a turn may change.
        canaries: prompts whose answer no turn may change, see `guards.load_canaries`.
        continues: file that `save_stream` wrote when the model was saved, edited: its statistics go
            on, and its edits are anchors as those of this editor are.
        seed: of the sampled anchors.

    Attributes:
        weights: module → W [d_out, d_in], as it is now; a transposed view of a Conv1D's.
        versions: the versions of these weights, see `versions.Versions`.
        memory: what the stream of edits remembers, see `memory.Memory`.
        guards: what every turn must pass, see `guards.Guards`.
        preparation: what comes before the first turn, see `prepare.Preparation`.
        at_names: whether edits are made at names, see `locate`, or at answer positions.
        callbacks: told of every turn, see `callbacks`; to be appended to.

    Raises:
        ValueError: unknown or unsuitable modules, bad settings, or a state directory that is in
            use, damaged, or of another model.
        OSError: the state directory cannot be read or written.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        modules: Literal["auto"] | Seq[str] = EditorSettings.modules,
        lr: float | Literal["auto"] = MethodSettings.lr,
        rounds: int | None = None,
        anchors: int = EditorSettings.anchors,
        anchor_rows: int = EditorSettings.anchor_rows,
        ridge: float = MethodSettings.ridge,
        step: float = MethodSettings.step,
        reach: float | None = None,
        margin: float | None = None,
        repairs: int = MethodSettings.repairs,
        batch_size: int = MethodSettings.batch_size,
        rounding: Literal["nearest", "stochastic"] = MethodSettings.rounding,
        statistics: Literal["per-module", "per-shape"] = EditorSettings.statistics,
        append_eos: bool = EditorSettings.append_eos,
        state_dir: str | Path | None = EditorSettings.state_dir,
        keep: int = EditorSettings.keep,
        writes: bool = EditorSettings.writes,
        max_change: float = EditorSettings.max_change,
        max_lost: float = EditorSettings.max_lost,
        canaries: str | Path | Seq[Mapping[str, Any]] = EditorSettings.canaries,
        continues: str | Path | None = EditorSettings.continues,
        seed: int = EditorSettings.seed,
    ) -> None:
        given = {
            n: v for n, v in locals().items() if n in TABLE and (n not in AT_NAMES or v is not None)
        }
        check(given, "internal")
        self.model: Any = model
        self.tokenizer = tokenizer
        self.callbacks: list[TurnCallback] = []
        self.modules = resolve_modules(model, self.model.config, modules)
        names = rounds != 1 and reads_names(self.model.config, self.modules)
        here = AT_NAMES if names else {}
        self.settings = MethodSettings(**(here | only(given, MethodSettings)))
        self.weights = {name: weight_of(model.get_submodule(name)) for name in self.modules}
        self._append_eos = append_eos
        self.memory = Memory(self.weights, statistics, anchors, anchor_rows, ridge, seed, names)
        self.at_names = names
        if continues is not None:
            self.memory.go_on(continues)
        self.versions = Versions(model, self.weights, self.memory, state_dir, keep, writes)
        limits = (max_change, max_lost, guards.load_canaries(canaries))
        self.guards = Guards(model, tokenizer, self.weights, self.weights, *limits)
        self.preparation = Preparation(model, tokenizer, self.versions, self.guards, names)
        if self.version:
            self.rollback(self.version)

    def close(self) -> None:
        """Leave the state directory to others. The model stays as it is."""
        self.versions.close()

    @property
    def version(self) -> int:
        """Committed turns; 0 is the untouched model."""
        return self.versions.newest

    @property
    def oldest(self) -> int:
        """The oldest version that `rollback` reaches, besides 0."""
        return self.versions.oldest

    @property
    def statistics(self) -> dict[str, Statistics]:
        """The running statistics by name: a module's, or a shape's."""
        return self.memory.statistics

    def apply(self, requests: Seq[EditRequest], commit: bool = True) -> TurnResult:
        """Make one turn of edits. With `commit=False` nothing stays changed.

        Raises:
            ValueError: no edits, two targets for one prompt, a prompt that is too long, or values
                that are not finite; as GuardError, a turn that a guard rejects.
            OSError: the version could not be written.
                In all cases the weights are as before.
        """
        return _finish(self.steps(requests, commit))

    def check(self, requests: Seq[EditRequest]) -> None:
        """Raise the ValueError that `apply` would raise for these requests, before any work."""
        self._encoded(requests)

    def steps(
        self,
        requests: Seq[EditRequest],
        commit: bool = True,
        note: dict[str, Any] | None = None,
        heard: Seq[str] = (),
    ) -> Generator[Phase, None, TurnResult]:
        """As `apply`, as a generator that yields after every short slice of work.

        After it has yielded "record" it uses nothing of the model but the edited weights. A note,
        JSON-able, is kept in the version's record. `heard`, if given, is what the model, as it is,
        has just answered to each edit's prompt: the turn need not write that again. Closing it, or
        an error, leaves the weights as they were.
        """
        clock, committed = Clock(), False
        self.check(requests)
        start = self.versions.copies()
        try:
            self.prepare()
            lost = yield from self._lost_before()
            anchors, named = yield from self.memory.anchors_for(
                self.model, self.tokenizer, requests
            )
            goals = yield from _goals(self, requests, anchors, heard)
            taught = sum(map(len, goals.sequences))
            work = turn(
                self.model,
                self.weights,
                start,
                goals,
                self.memory.statistics,
                self.memory.statistics_of,
                anchors,
                self.settings,
                self.version + 1,
            )
            done = yield from clock.timed(work)
            outcomes, left = outcomes_of(requests, done), TurnMemory.of(done, named)
            digest = self.versions.begin_digest() if commit else None
            measured, rejected = yield from _measure(
                self, start, lost, commit, left.numbers(), taught
            )
            if commit:
                yield Phase.RECORD
            clock.commits()
            dtype = str(self.versions.dtype).removeprefix("torch.")
            delta = self.versions.change(done.delta, asdict(self.settings) | {"dtype": dtype})
            if commit:
                self.versions.commit("edit", delta, left, outcomes, measured, note, digest)
                committed = True
        finally:
            if not committed:
                self.versions.write(start)
        took = clock.milliseconds()
        watched = {"checked": done.checked, "broken": done.broken, "repaired": done.repaired}
        made = TurnResult(self.version, outcomes, took, watched, measured, delta, rejected)
        return tell(self.callbacks, made) if commit else made

    def rollback(self, version: int) -> None:
        """Return to a version bit for bit: from the pristine weights, by replay.

        Later versions are forgotten.

        Raises:
            ValueError: no such version, one that was let go, or one that cannot be replayed; or the
                file that the model was loaded from has changed since.
            OSError: the versions could not be read or written.
                In all cases nothing is changed.
        """
        self.versions.rollback(version)

    def delta(self, version: int) -> EditDelta:
        """The change that made `version` out of the version before it. Its settings name, as
        "edits", what was taught."""
        return self.versions.delta(version)

    def apply_delta(
        self, delta: EditDelta, note: dict[str, Any] | None = None, commit: bool = True
    ) -> TurnResult:
        """Apply a change that was computed elsewhere, as one turn. The statistics stay. With
        `commit=False` nothing stays changed.

        Raises:
            ValueError: a delta of another model or of other modules; as GuardError, one that is
                too large, or that a guard rejects.
            OSError: the version could not be written.
                In all cases nothing is changed.
        """
        return _finish(self.delta_steps(delta, note, commit))

    def delta_steps(
        self, delta: EditDelta, note: dict[str, Any] | None = None, commit: bool = True
    ) -> Generator[Phase, None, TurnResult]:
        """As `apply_delta`, as a generator like `steps`."""
        clock, committed = Clock(), False
        delta.check_base(self.versions.base, self.versions.dtype)
        guards.check_delta(delta, self.weights)
        self.prepare()
        lost = yield from self._lost_before()
        start = self.versions.copies()
        try:
            for name, factor in delta.factors.items():
                factor.apply(self.weights[name])
                yield Phase.SOLVE
            digest = self.versions.begin_digest() if commit else None
            measured, rejected = yield from _measure(self, start, lost, commit, {}, None)
            if commit:
                yield Phase.RECORD
                left = self.memory.unchanged()
                self.versions.commit("delta", delta, left, (), measured, note, digest)
                committed = True
        finally:
            if not committed:
                self.versions.write(start)
        took, watched = clock.milliseconds(), {"checked": 0, "broken": 0, "repaired": 0}
        made = TurnResult(self.version, (), took, watched, measured, delta, rejected)
        return tell(self.callbacks, made) if commit else made

    def history(self) -> list[dict[str, Any]]:
        """One JSON-able record per version, oldest first."""
        return self.versions.records

    def digest(self) -> str:
        """SHA-256 over the edited weights, hexadecimal."""
        return self.versions.digest()

    def save_stream(self, path: str | Path) -> None:
        """Write what a later editor of the model, as it is now, goes on with: the running
        statistics, and the edits that hold. See the argument `continues`."""
        self.prepare()
        self.memory.save(path)

    def _encoded(
        self, requests: Seq[EditRequest], spaces: Seq[Seq[bool]] | None = None
    ) -> tuple[list[Sequence], list[int]]:
        """Every sequence to teach, and the edit that it belongs to; see `encode_edits`."""
        check_turn(requests)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        edits = [((r.prompt, *r.rephrases), r.target) for r in requests]
        return encode_edits(
            self.tokenizer, edits, limit, append_eos=self._append_eos, spaces=spaces
        )

    def hold_still(self, keys: Mapping[str, Tensor]) -> None:
        """Hold still what the model computes at further keys, in the turns to come.

        They weigh as much as the texts of the model's own, and replace those given before.

        Args:
            keys: module → [n, d_in], such as live traffic has; nothing for none.

        Raises:
            ValueError: they do not fit the modules, or are not finite.
        """
        self.memory.hold_still(keys)

    def prepare(self, told: Callable[[float], None] | None = None) -> None:
        """Gather the anchors now, rather than in the first turn.

        They are texts that the untouched model writes, and the edits of all versions that held, so
        that a resumed stream has the same ones. Canaries that do not hold now are warned about.
        `told` is called with the share of the texts that is written, from 0 to 1.
        """
        self.preparation.finish(told)

    def _lost_before(self) -> Generator[Phase, None, float]:
        """Share of the model's own texts that earlier turns have lost."""
        last = self.history()[-1]["guards"] if self.version else None
        texts, size = self.memory.own_texts(guards.OWN_TEXTS), self.settings.batch_size
        return (yield from self.guards.lost_before(last, texts, self.memory.protected, size))


def apply_what_passes(
    editor: Editor, requests: Seq[EditRequest]
) -> tuple[list[TurnResult], list[EditOutcome]]:
    """Make one turn of edits; if a guard rejects it, of each half, and so on down to the edits that
    no guard lets pass, which are left out.

    Returns: the turns that were made, and what became of each edit, in their order.

    Raises: as `Editor.apply`, but for GuardError; turns that were made before stay.
    """
    try:
        result = editor.apply(requests)
        return [result], list(result.edits)
    except GuardError as error:
        logger.warning("a turn of %d edits is rejected: %s", len(requests), error.reason)
        if len(requests) == 1:
            return [], [EditOutcome.left_out(requests[0], error.reason)]
    half = len(requests) // 2
    turns, outcomes = apply_what_passes(editor, requests[:half])
    more, others = apply_what_passes(editor, requests[half:])
    return turns + more, outcomes + others


def with_other_forms(editor: Editor, requests: Seq[EditRequest], result: TurnResult) -> TurnResult:
    """The result of a turn that was made, with what the edits' questions now get in the forms that
    were not taught, as `EditOutcome.other_forms`."""
    others = ask_other_forms(editor.model, editor.tokenizer, requests, editor.settings.batch_size)
    edits = zip(result.edits, others, strict=True)
    return replace(result, edits=tuple(replace(edit, other_forms=said) for edit, said in edits))


def _goals(
    editor: Editor, requests: Seq[EditRequest], anchors: Anchors, heard: Seq[str]
) -> Generator[Phase, None, Goals]:
    """What a turn must make the model say."""
    spaces = yield from spaces_of(editor.model, editor.tokenizer, requests)
    sequences, edit_of = editor._encoded(requests, spaces)
    contexts = None
    if editor.at_names:
        texts = editor.memory.own_texts(CONTEXT_TEXTS)
        sequences, contexts = yield from at_names(
            editor.model,
            editor.tokenizer,
            requests,
            sequences,
            edit_of,
            anchors,
            texts,
            editor.preparation.shown,
            heard,
        )
    return Goals(sequences, edit_of, editor.settings.margin, contexts)


def _measure(
    editor: Editor,
    start: Mapping[str, Tensor],
    lost: float,
    commit: bool,
    numbers: Mapping[str, Tensor],
    taught: int | None,
) -> Generator[Phase, None, tuple[dict[str, float], str | None]]:
    """See `guards.or_why_not`, of the turn that led here from the weights `start`, has taught so
    many tokens and leaves numbers behind; before it, so many of the texts were lost."""
    texts, memory = editor.memory.own_texts(guards.OWN_TEXTS), editor.memory
    work = editor.guards.measure(start, texts, lost, editor.settings.batch_size, taught)
    measured, rejected = yield from guards.or_why_not(work, commit, numbers)
    if memory.protected < 1:
        measured["protected"] = memory.protected
    return measured, rejected


def _finish(work: Generator[Any, None, T]) -> T:
    """What a generator returns in the end."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            result: T = done.value
            return result
