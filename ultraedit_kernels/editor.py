"""Editor: a model, its statistics and its versions."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from ultraedit_kernels.method import guards
from ultraedit_kernels.method.guards import GuardError
from ultraedit_kernels.method.memory import load_stream, save_stream
from ultraedit_kernels.method.protect import (
    HELD_WEIGHT,
    OWN_WEIGHT,
    SAMPLE_TOKENS,
    Anchors,
    captures,
    hold_edits,
    own_anchors,
    own_answers,
    own_texts,
)
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.method.turn import Settings, Turn, turn
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.model.parallel import ranks_of, together, weight_of, whole
from ultraedit_kernels.model.presets import resolve_modules
from ultraedit_kernels.model.request import EditRequest, Prompt, check_turn
from ultraedit_kernels.ops import checks
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.store.delta import EditDelta, digest, digest_all
from ultraedit_kernels.store.journal import Entry, Journal, Snapshot

WATCHED_EDITS = 4096
"""Most edits and named prompts that are watched; the oldest are let go."""

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    the turn; "total_change", the same against the untouched weights; "lost", share of the untouched
    model's own texts that it now continues otherwise."""
    delta: EditDelta = field(repr=False, compare=False)
    """The change of the turn, committed or not."""
    rejected: str | None = None
    """Of a turn that was not to be committed: why it would not have been."""


class Editor:
    """Edits a Hugging Face causal language model in place, turn by turn, with an exact way back.

    Args:
        model: the model; only the weights of the edited modules ever change.
        tokenizer: its tokenizer.
        modules: dotted names of `nn.Linear` modules, or "auto" for the family's preset.
        lr, step, rounds, ridge, margin, repairs, batch_size, rounding: see `algorithm.Settings`.
        anchors: texts of the model's own that are held still and watched, besides earlier edits; 0
            for nothing but the locality prompts.
        anchor_rows: rows that the anchors of a module are compressed to.
        statistics: "per-module", or "per-shape" as the published scores were made.
        append_eos: teach the model to stop after the target.
        state_dir: directory of the versions; continued if it holds some, with the anchors that it
            holds. In memory if None. The editor keeps other processes out until `close`.
        keep: newest versions in the state directory that can be returned to at least.
        writes: if not, another editor of the same model writes the state directory, and this one
            makes each change after it.
        max_change: most that a turn may change a weight, as a share of its norm.
        max_lost: most of the model's own texts, as a share, that a turn may make it continue
            otherwise.
        canaries: prompts whose answer no turn may change, see `guards.load_canaries`.
        continues: file that `save_stream` wrote when the model was saved, edited: its statistics go
            on, and its edits are anchors as those of this editor are.
        seed: of the sampled anchors.

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
        modules: Literal["auto"] | Seq[str] = "auto",
        lr: float | Literal["auto"] = Settings.lr,
        rounds: int = Settings.rounds,
        anchors: int = 2000,
        anchor_rows: int = 1024,
        ridge: float = Settings.ridge,
        step: float = Settings.step,
        margin: float = Settings.margin,
        repairs: int = Settings.repairs,
        batch_size: int = Settings.batch_size,
        rounding: Literal["nearest", "stochastic"] = Settings.rounding,
        statistics: Literal["per-module", "per-shape"] = "per-module",
        append_eos: bool = True,
        state_dir: str | Path | None = None,
        keep: int = 100,
        writes: bool = True,
        max_change: float = guards.MAX_CHANGE,
        max_lost: float = guards.MAX_LOST,
        canaries: str | Path | Seq[Mapping[str, Any]] = (),
        continues: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.modules = resolve_modules(model, self.model.config, modules)
        self.settings = Settings(lr, step, rounds, ridge, margin, repairs, batch_size, rounding)
        _check_settings(self.settings, anchors, anchor_rows, statistics, keep)
        checks.positive("max_change", max_change)
        checks.positive("max_lost", max_lost)
        self._max_change, self._max_lost = max_change, max_lost
        self._canaries = guards.load_canaries(canaries)
        self.weights = {name: weight_of(model.get_submodule(name)) for name in self.modules}
        self._append_eos, self._seed = append_eos, seed
        self._anchor_texts, self._anchor_rows = anchors, anchor_rows
        self._own: Anchors | None = None
        self._anchors: Anchors | None = None
        self._still: dict[str, Tensor] = {}
        self._share = {
            name: name if statistics == "per-module" else "x".join(map(str, weight.shape))
            for name, weight in self.weights.items()
        }
        self._statistics = {
            self._share[name]: Statistics.empty(w.shape[1], w.shape[0], device=w.device)
            for name, w in self.weights.items()
        }
        self._edited_before = [] if continues is None else self._continue(continues)
        self._first_statistics = dict(self._statistics)
        self._pristine = {
            name: weight.to("cpu", copy=True) for name, weight in self.weights.items()
        }
        self._base = {name: digest(weight) for name, weight in self.weights.items()}
        with self._in_turn():  # the first rank writes, the others read
            ranks = ranks_of(model)
            first = ranks is None or ranks.rank == 0
            self._journal = Journal(state_dir, self._base, keep, writes and first)
        self.rollback(len(self._journal))

    def close(self) -> None:
        """Leave the state directory to others. The model stays as it is."""
        self._journal.close()

    @property
    def version(self) -> int:
        """Committed turns; 0 is the untouched model."""
        return len(self._journal)

    @property
    def oldest(self) -> int:
        """The oldest version that `rollback` reaches, besides 0."""
        return self._journal.oldest

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
        self._encode(requests)

    def steps(
        self,
        requests: Seq[EditRequest],
        commit: bool = True,
        note: dict[str, Any] | None = None,
    ) -> Generator[str, None, TurnResult]:
        """As `apply`, as a generator that yields after every short slice of work.

        After it has yielded "record" it uses nothing of the model but the edited weights. A note,
        JSON-able, is kept in the version's record. Closing it, or an error, leaves the weights as
        they were.
        """
        begun = time.perf_counter()
        clock = {"capture": 0.0, "solve": 0.0}
        sequences, edit_of = self._encode(requests)
        start = {name: weight.clone() for name, weight in self.weights.items()}
        committed = False
        try:
            anchors, named = yield from self._anchoring(requests)
            work = turn(
                self.model,
                self.weights,
                start,
                sequences,
                edit_of,
                self._statistics,
                self._share,
                anchors,
                self.settings,
                self.version + 1,
            )
            while True:
                slice_begun = time.perf_counter()
                try:
                    phase = next(work)
                except StopIteration as done:
                    result: Turn = done.value
                    break
                clock[phase] += time.perf_counter() - slice_begun
                yield phase
            outcomes, measured, rejected = _outcomes(requests, result), {}, None
            watch = named.join(result.watch)
            try:
                guards.check_finite(**_numbers(result.statistics, result.held, watch))
                measured = yield from self._guard(start)
            except GuardError as error:
                if commit:
                    raise
                rejected = error.reason
            if commit:
                yield "record"
            commit_begun = time.perf_counter()
            # Versions are kept on the CPU: the accelerator's memory is the model's.
            factors = {name: factor.cpu() for name, factor in result.delta.items()}
            settings = asdict(self.settings) | {"seed": self.version + 1}
            delta = EditDelta(factors, dict(self._base), settings)
            if commit:
                leads = torch.stack([result.watched.lead, result.watched.drift])
                entry = Entry(
                    delta, result.statistics, result.held, watch, leads, result.released, {}
                )
                self._commit("edit", entry, outcomes, measured, note)
                committed = True
        finally:
            if not committed:
                self._set_weights(start)
        ended = time.perf_counter()
        timings = {
            "capture_ms": clock["capture"] * 1e3,
            "solve_ms": clock["solve"] * 1e3,
            "commit_ms": (ended - commit_begun) * 1e3,
            "total_ms": (ended - begun) * 1e3,
        }
        watched = {
            "checked": result.checked,
            "broken": result.broken,
            "repaired": result.repaired,
        }
        return TurnResult(self.version, outcomes, timings, watched, measured, delta, rejected)

    def rollback(self, version: int) -> None:
        """Return to a version bit for bit: from the pristine weights, by replay.

        Later versions are forgotten.

        Raises:
            ValueError: no such version, one that was let go, or one that cannot be replayed.
            OSError: the versions could not be read or written.
            In all cases nothing is changed.
        """
        if isinstance(version, bool) or not isinstance(version, int):
            raise TypeError(f"version is a {type(version).__name__}, expected a whole number")
        if not 0 <= version <= self.version:
            raise ValueError(
                f"version {version} does not exist, expected 0 to {self.version}; 0 is the "
                "untouched model"
            )
        if 0 < version < self.oldest:
            raise ValueError(
                f"version {version} was let go, expected 0 or {self.oldest} to {self.version}; "
                "the setting keep says how many are kept at least"
            )
        start = {name: weight.clone() for name, weight in self.weights.items()}
        try:
            self.forget(version, self.replay(version))
        except BaseException:
            self._set_weights(start)
            raise

    def forget(self, version: int, statistics: Mapping[str, Statistics]) -> None:
        """The second half of `rollback`: with the weights of `replay`, forget later versions."""
        with self._in_turn():
            self._journal.truncate(version)
        self._statistics = {
            name: stats.to(self._first_statistics[name].mean.device)
            for name, stats in statistics.items()
        }
        self._anchors = None

    def replay(self, version: int) -> dict[str, Statistics]:
        """The first half of `rollback`: write the weights of a version. Returns its statistics."""
        first, statistics = self._journal.start(version), self._first_statistics
        if first:
            snapshot = self._journal.snapshot(first)
            self._set_weights(snapshot.weights)
            statistics = snapshot.statistics
        else:
            self._set_weights(self._pristine)
        for number in range(first + 1, version + 1):
            entry = self._journal.entry(number)
            self._check_base(entry.delta)
            for name, factor in entry.delta.factors.items():
                factor.apply(self.weights[name])
            statistics = entry.statistics
        records = self._journal.records
        if version and (got := self.digest()) != (was := records[version - 1]["digest"]):
            raise ValueError(
                f"replay of version {version} gives weights with digest {got}, expected {was}; "
                "the versions were made by another library version, backend or device"
            )
        return statistics

    def delta(self, version: int) -> EditDelta:
        """The change that made `version` out of the version before it."""
        return self._journal.entry(version).delta

    def apply_delta(self, delta: EditDelta, note: dict[str, Any] | None = None) -> TurnResult:
        """Apply a change that was computed elsewhere, as one turn. The statistics stay.

        Raises:
            ValueError: a delta of another model or of other modules; as GuardError, one that is
                too large, or that a guard rejects.
            OSError: the version could not be written.
            In all cases nothing is changed.
        """
        return _finish(self.delta_steps(delta, note))

    def delta_steps(
        self, delta: EditDelta, note: dict[str, Any] | None = None
    ) -> Generator[str, None, TurnResult]:
        """As `apply_delta`, as a generator like `steps`."""
        begun = time.perf_counter()
        self._check_base(delta)
        guards.check_delta(delta, self.weights)
        self.prepare()
        start = {name: weight.clone() for name, weight in self.weights.items()}
        try:
            for name, factor in delta.factors.items():
                factor.apply(self.weights[name])
                yield "solve"
            measured = yield from self._guard(start)
            yield "record"
            none = Watch.empty(self.weights)
            entry = Entry(delta, self._statistics, {}, none, torch.zeros(2, 0), [], {})
            self._commit("delta", entry, (), measured, note)
        except BaseException:
            self._set_weights(start)
            raise
        took = (time.perf_counter() - begun) * 1e3
        timings = dict.fromkeys(("capture_ms", "solve_ms"), 0.0)
        timings |= {"commit_ms": took, "total_ms": took}
        watched = {"checked": 0, "broken": 0, "repaired": 0}
        return TurnResult(self.version, (), timings, watched, measured, delta)

    def history(self) -> list[dict[str, Any]]:
        """One JSON-able record per version, oldest first."""
        return self._journal.records

    def is_pristine(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether weights, module → W [d_out, d_in], are the untouched ones."""
        return all([digest(weight) == self._base[name] for name, weight in weights.items()])

    def digest(self) -> str:
        """SHA-256 over the edited weights, hexadecimal."""
        return digest_all(self.weights)

    def save_stream(self, path: str | Path) -> None:
        """Write what a later editor of the model, as it is now, goes on with: the running
        statistics, and the edits that hold. See the argument `continues`."""
        self.prepare()
        assert self._anchors is not None
        watch = self._anchors.watch
        save_stream(self._statistics, watch.sequences[watch.own :], path)

    def _continue(self, path: str | Path) -> list[Sequence]:
        """Take over the statistics of a stream; its edits."""
        loaded, edits = load_stream(path)
        try:
            checks.tensor_names(loaded, self._statistics, f"statistics of {path}")
            for name, stats in loaded.items():
                own = self._statistics[name]
                if (stats.d_in, stats.d_out) != (own.d_in, own.d_out):
                    raise ValueError(
                        f"statistics {name} of {path} are of {stats.d_in} + {stats.d_out} "
                        f"features, expected {own.d_in} + {own.d_out}"
                    )
        except ValueError as error:
            raise ValueError(
                f"{error}; the model was edited before, and that file is to be continued: edit the "
                "same modules (by the published method, if it was), or remove the file to begin "
                "anew"
            ) from error
        device = next(iter(self.weights.values())).device
        self._statistics = {name: stats.to(device) for name, stats in loaded.items()}
        return edits

    def _encode(self, requests: Seq[EditRequest]) -> tuple[list[Sequence], list[int]]:
        """Every sequence to teach, and the edit that it belongs to."""
        check_turn(requests)
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        sequences, edit_of = [], []
        for i, request in enumerate(requests):
            for j, prompt in enumerate((request.prompt, *request.rephrases)):
                one = encode(self.tokenizer, prompt, request.target, append_eos=self._append_eos)
                length = len(one.prompt_ids) + len(one.target_ids)
                if limit is not None and length > limit:
                    raise ValueError(
                        f"edit {i}: {f'rephrase {j - 1}' if j else 'prompt'} and target have "
                        f"{length} tokens, expected at most the model's {limit}; shorten it"
                    )
                sequences.append(one)
                edit_of.append(i)
        return sequences, edit_of

    def hold_still(self, keys: Mapping[str, Tensor]) -> None:
        """Hold still what the model computes at further keys, in the turns to come.

        They weigh as much as the texts of the model's own, and replace those given before.

        Args:
            keys: module → [n, d_in], such as live traffic has; nothing for none.

        Raises:
            ValueError: they do not fit the modules, or are not finite.
        """
        if keys:
            checks.tensor_names(keys, self.weights, "modules of the keys")
        for name, rows in keys.items():
            if rows.ndim != 2 or rows.shape[1] != self.weights[name].shape[1]:
                raise ValueError(
                    f"keys of {name} have shape {tuple(rows.shape)}, expected "
                    f"(n, {self.weights[name].shape[1]})"
                )
            checks.finite(**{f"keys of {name}": rows})
        self._still = {
            name: rows.double() * min(1.0, OWN_WEIGHT * SAMPLE_TOKENS / max(1, len(rows))) ** 0.5
            for name, rows in keys.items()
        }

    def prepare(self) -> None:
        """Gather the anchors now, rather than in the first turn.

        They are texts that the untouched model writes, and the edits of all versions that held, so
        that a resumed stream has the same ones. Canaries that do not hold now are warned about.
        """
        if self._own is None:
            now = {name: weight.clone() for name, weight in self.weights.items()}
            try:
                self._set_weights(self._pristine)
                guards.note_references(self.model, self.tokenizer, self._canaries)
                self._own = self._own_anchors()
            finally:
                self._set_weights(now)
            try:
                _finish(self._check_canaries())
            except GuardError as error:
                logger.warning("at version %d already, %s", self.version, error.reason)
        if self._anchors is None:
            anchors = self._own
            first = self._journal.start(self.version)
            if first and self._anchor_texts:
                kept = self._journal.snapshot(first).anchors
                if kept.watch.own:
                    anchors = kept.like(self.weights)
            for version in range(first + 1, self.version + 1):
                anchors = self._held(anchors, self._journal.entry(version))
            self._anchors = anchors

    def _own_anchors(self) -> Anchors:
        if not self._anchor_texts:
            return Anchors.empty(self.weights)
        limit, ridge = self._anchor_rows, self.settings.ridge
        texts = own_texts(self.model, self.tokenizer, self._anchor_texts, self._seed)
        anchors = own_anchors(self.model, texts, self.weights, ridge, limit)
        return hold_edits(anchors, self.model, self._edited_before, self.modules, ridge, limit)

    def _held(self, anchors: Anchors, entry: Entry) -> Anchors:
        """With what a version added. With no anchors at all wanted, none."""
        if not self._anchor_texts:
            return anchors
        anchors = anchors.hold(entry.held, self.settings.ridge, self._anchor_rows, HELD_WEIGHT)
        watch = anchors.watch.join(entry.watch)
        watch = watch.with_leads(entry.leads).without(entry.released)
        surplus = range(watch.own, len(watch) - WATCHED_EDITS)
        return replace(anchors, watch=watch.without(surplus))

    def _guard(self, start: Mapping[str, Tensor]) -> Generator[str, None, dict[str, float]]:
        """What the guards measure of the turn that led here; raises GuardError."""
        assert self._own is not None
        change = total = 0.0
        for name, weight in self.weights.items():
            guards.check_finite(**{f"edited {name}": weight})
            change = max(change, guards.check_change(name, weight, start[name], self._max_change))
            total = max(total, guards.relative_change(weight, self._pristine[name]))
            yield "guard"
        own = self._own.watch
        texts = own.sequences[: min(own.own, guards.OWN_TEXTS)]
        size = self.settings.batch_size
        lost = yield from guards.share_lost(self.model, texts, self.modules, size)
        before = self._journal.records[-1]["guards"]["lost"] if self.version else 0.0
        guards.check_lost(lost, before, self._max_lost)
        yield from self._check_canaries()
        return {"change": change, "total_change": total, "lost": lost}

    def _check_canaries(self) -> Generator[str, None, None]:
        return guards.check_canaries(self.model, self.tokenizer, self.modules, self._canaries)

    def _anchoring(self, requests: Seq[EditRequest]) -> Generator[str, None, tuple[Anchors, Watch]]:
        """All anchors, and those of them that are new: the prompts that the operator names.

        Their keys are held for this turn; they are watched from now on.
        """
        self.prepare()
        assert self._anchors is not None
        yield "anchors"
        anchors, named = self._anchors, Watch.empty(self.weights)
        if self._still:
            anchors = anchors.hold(self._still, self.settings.ridge, self._anchor_rows)
            yield "anchors"
        locality = list({str(p): p for r in requests for p in r.locality}.values())
        if locality:
            answers = own_answers(self.model, self.tokenizer, locality)
            yield "anchors"
            for part, captured in captures(self.model, answers, self.modules):
                anchors = anchors.hold(captured.keys, self.settings.ridge, self._anchor_rows)
                named = named.join(Watch.of(captured, dict(enumerate(part))))
                yield "anchors"
            anchors = replace(anchors, watch=anchors.watch.join(named))
        return anchors, named

    def _set_weights(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)

    def _commit(
        self,
        kind: str,
        entry: Entry,
        outcomes: Seq[EditOutcome],
        measured: dict[str, float],
        note: dict[str, Any] | None,
    ) -> None:
        """Make the next version of the weights as they are. It exists once the journal has it, and
        nothing that comes after that may fail."""
        assert self._anchors is not None
        record = {
            "version": self.version + 1,
            "kind": kind,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": self.digest(),
            "edits": [asdict(outcome) for outcome in outcomes],
            "guards": measured,
        }
        if note is not None:
            record["note"] = note
        anchors = self._held(self._anchors, entry)
        kept = replace(entry.cpu(), record=record)
        with self._in_turn():
            self._journal.append(kept)
        self._statistics, self._anchors = dict(entry.statistics), anchors
        if self._journal.snapshot_due:
            try:
                with together(self.model):
                    self._snapshot(anchors)
            except Exception as error:  # the turns are still there, so nothing is lost
                logger.warning("no snapshot could be written, the next turn tries again: %s", error)

    def _snapshot(self, anchors: Anchors) -> None:
        weights = {name: whole(weight).cpu() for name, weight in self.weights.items()}
        snapshot = Snapshot(weights, self._statistics, anchors)
        with self._in_turn():
            self._journal.write_snapshot(snapshot)

    def _in_turn(self) -> AbstractContextManager[None]:
        """The first rank goes through the block before the others do."""
        ranks = ranks_of(self.model)
        return nullcontext() if ranks is None else ranks.in_turn()

    def _check_base(self, delta: EditDelta) -> None:
        checks.tensor_names(delta.factors, delta.base, "modules of the delta")
        for name, base in delta.base.items():
            if name not in self._base:
                raise ValueError(
                    f"the delta edits {name}, but this editor edits {', '.join(self.modules)}; "
                    "create it with the delta's modules"
                )
            if base != self._base[name]:
                raise ValueError(
                    f"the delta was made for a {name} with digest {base[:12]}…, this model's is "
                    f"{self._base[name][:12]}…; it belongs to another checkpoint or dtype"
                )


def _outcomes(requests: Seq[EditRequest], result: Turn) -> tuple[EditOutcome, ...]:
    return tuple(
        EditOutcome(
            request.prompt,
            request.target,
            result.holds[i],
            result.rounds[i],
            result.loss[i],
            result.margin[i],
        )
        for i, request in enumerate(requests)
    )


def _numbers(
    statistics: Mapping[str, Statistics], held: Mapping[str, Tensor], watch: Watch
) -> dict[str, Tensor]:
    """All that a turn leaves behind besides the weights, by what it is."""
    return {
        **{f"mean of {name}": stats.mean for name, stats in statistics.items()},
        **{f"M2 of {name}": stats.m2 for name, stats in statistics.items()},
        **{f"keys of {name}": keys for name, keys in held.items()},
        **{f"slopes of {name}": slopes for name, slopes in watch.slopes.items()},
    }


def _finish(work: Generator[Any, None, T]) -> T:
    """What a generator returns in the end."""
    while True:
        try:
            next(work)
        except StopIteration as done:
            return done.value


def _check_settings(
    settings: Settings, anchors: int, rows: int, statistics: str, keep: int
) -> None:
    if settings.lr != "auto":
        checks.positive("lr", settings.lr)
    checks.positive("step", settings.step)
    checks.positive("ridge", settings.ridge)
    checks.rounding(settings.rounding, 0)
    for name, value, least in (
        ("rounds", settings.rounds, 1),
        ("batch_size", settings.batch_size, 1),
        ("repairs", settings.repairs, 0),
        ("anchors", anchors, 0),
        ("anchor_rows", rows, 1),
        ("keep", keep, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
    if statistics not in ("per-module", "per-shape"):
        raise ValueError(f"statistics is {statistics!r}, expected 'per-module' or 'per-shape'")
