"""The versions of the edited weights, and the exact way back to each of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.method.memory import Memory, TurnMemory, decode_statistics
from ultraedit_kernels.method.results import EditOutcome
from ultraedit_kernels.model.parallel import ranks_of, together, whole
from ultraedit_kernels.ops.statistics import Statistics
from ultraedit_kernels.store.delta import EditDelta, LowRank, digest, digest_all, digest_of
from ultraedit_kernels.store.journal import Entry, Journal
from ultraedit_kernels.store.untouched import Untouched

logger = logging.getLogger(__name__)


class Versions:
    """The weights of a model as the turns so far have left them, with what is remembered of these.

    Args:
        model: whose weights they are; if it is divided among ranks, the first of them writes.
        weights: module → W [d_out, d_in], untouched.
        memory: what the stream of edits remembers.
        directory: of the versions; in memory if None.
        keep: newest versions in the directory that can be returned to at least.
        writes: if not, another process writes the directory.

    Raises:
        ValueError: the directory is in use, damaged, or of another model.
        OSError: it cannot be read or written.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        memory: Memory,
        directory: str | Path | None,
        keep: int,
        writes: bool,
    ) -> None:
        self._model, self._weights, self.memory = model, weights, memory
        self.base = {name: digest(weight) for name, weight in weights.items()}
        """Module → digest of the untouched weight."""
        self.pristine = Untouched(model, weights, self.base)
        """Module → the untouched W [d_out, d_in], on the CPU."""
        self.dtype = next(iter(weights.values())).dtype
        """Of the weights."""
        with self._in_turn():  # the first rank writes, the others read
            ranks = ranks_of(model)
            first = ranks is None or ranks.rank == 0
            self._journal = Journal(directory, self.base, keep, writes and first)

    def close(self) -> None:
        """Leave the directory to others."""
        self._journal.close()

    @property
    def newest(self) -> int:
        """Committed turns; 0 is the untouched model."""
        return len(self._journal)

    @property
    def oldest(self) -> int:
        """The oldest version that `rollback` reaches, besides 0."""
        return self._journal.oldest

    @property
    def records(self) -> list[dict[str, Any]]:
        """One JSON-able record per version, oldest first."""
        return self._journal.records

    def delta(self, version: int) -> EditDelta:
        """The change that made a version out of the one before it, with what it taught."""
        entry = self._journal.entry(version)
        return entry.delta.teaching(entry.record["edits"])

    def recorded(self, version: int) -> str:
        """The digest of a version, as the journal has it."""
        if version:
            found: str = self.records[version - 1]["digest"]
            return found
        return digest_of(self.base)

    def digest(self) -> str:
        """SHA-256 over the edited weights as they are now, hexadecimal."""
        return digest_all(self._weights)

    def begin_digest(self) -> Callable[[], str]:
        """Begin to compute `digest` of the weights as they are, in a thread of its own: guards look
        at them meanwhile, but nobody may change them. Of a divided model it is computed when asked
        for, as all ranks have a part in it.

        Returns: what waits for it.
        """
        if ranks_of(self._model) is not None:
            return self.digest
        device = next(iter(self._weights.values())).device
        stream: AbstractContextManager[Any] = nullcontext()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
            stream = torch.cuda.stream(torch.cuda.Stream(device))

        def compute() -> str:
            with stream:
                return self.digest()

        thread = ThreadPoolExecutor(1, thread_name_prefix="ultraedit-digest")
        found = thread.submit(compute)
        thread.shutdown(wait=False)
        return found.result

    def are_pristine(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether weights, module → W [d_out, d_in], are the untouched ones."""
        return all([digest(weight) == self.base[name] for name, weight in weights.items()])

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Make the weights those values, module → W [d_out, d_in]. No version changes."""
        for name, value in values.items():
            self._weights[name].copy_(value)

    def copies(self) -> dict[str, Tensor]:
        """The weights as they are now, in memory of their own."""
        return {name: weight.clone() for name, weight in self._weights.items()}

    @contextmanager
    def changed(self, delta: EditDelta) -> Iterator[None]:
        """Weights with a change, while the block runs."""
        before = self.copies()
        try:
            for name, factor in delta.factors.items():
                factor.apply(self._weights[name])
            yield
        finally:
            self.write(before)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """The weights of version 0, while the block runs."""
        if not self.newest:  # they are
            yield
            return
        before = self.copies()
        try:
            self.write(self.pristine)
            yield
        finally:
            self.write(before)

    def recall(self) -> None:
        """Let the memory recall what the turns of the newest version must leave as it is."""
        self.memory.recall(self._journal, self.newest)

    def rollback(self, version: int) -> None:
        """See `Editor.rollback`."""
        if isinstance(version, bool) or not isinstance(version, int):
            raise TypeError(f"version is a {type(version).__name__}, expected a whole number")
        if not 0 <= version <= self.newest:
            raise ValueError(
                f"version {version} does not exist, expected 0 to {self.newest}; 0 is the "
                "untouched model"
            )
        if 0 < version < self.oldest:
            raise ValueError(
                f"version {version} was let go, expected 0 or {self.oldest} to {self.newest}; "
                "the setting keep says how many are kept at least"
            )
        start = self.copies()
        try:
            self.forget(version, self.replay(version))
        except BaseException:
            self.write(start)
            raise

    def forget(self, version: int, statistics: Mapping[str, Statistics]) -> None:
        """The second half of `rollback`: with the weights of `replay`, forget later versions."""
        with self._in_turn():
            self._journal.truncate(version)
        self.memory.back_to(statistics)

    def replay(self, version: int) -> dict[str, Statistics]:
        """The first half of `rollback`: write the weights of a version. Returns its statistics."""
        first, statistics = self._journal.start(version), self.memory.first_statistics
        if first:
            snapshot = self._journal.snapshot(first)
            self.write(snapshot.weights)
            statistics = decode_statistics(snapshot)
        else:
            self.write(self.pristine)
        for number in range(first + 1, version + 1):
            entry = self._journal.entry(number)
            entry.delta.check_base(self.base, self.dtype)
            for name, factor in entry.delta.factors.items():
                factor.apply(self._weights[name])
            statistics = decode_statistics(entry)
        records = self._journal.records
        if version and (got := self.digest()) != (was := records[version - 1]["digest"]):
            raise ValueError(
                f"replay of version {version} gives weights with digest {got}, expected {was}; "
                "the versions were made by another library version, backend or device"
            )
        return statistics

    def change(self, factors: Mapping[str, LowRank], settings: dict[str, Any]) -> EditDelta:
        """The change that would make the next version, on the CPU: the accelerator's memory is the
        model's. `settings` say how it was computed."""
        settings = settings | {"seed": self.newest + 1}
        on_cpu = {name: factor.cpu() for name, factor in factors.items()}
        return EditDelta(on_cpu, dict(self.base), settings)

    def commit(
        self,
        kind: str,
        delta: EditDelta,
        left: TurnMemory,
        outcomes: Seq[EditOutcome],
        measured: dict[str, float],
        note: dict[str, Any] | None,
        digest: Callable[[], str] | None = None,
    ) -> None:
        """Make the next version of the weights as they are.

        Args:
            kind: "edit", or "delta" of a change that was computed elsewhere.
            delta: the change from the version before.
            left: what the turn leaves to be remembered.
            outcomes: what became of its edits.
            measured: what the guards measured of it.
            note: JSON-able, kept in the version's record.
            digest: what `begin_digest` returned, if it was called.

        Raises:
            OSError: it could not be written; there is no such version then.
        """
        record = {
            "version": self.newest + 1,
            "kind": kind,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": (digest or self.digest)(),
            "edits": [outcome.record() for outcome in outcomes],
            "guards": measured,
        }
        if note is not None:
            record["note"] = note
        anchors = self.memory.after(left)
        entry = Entry(delta, *left.encode(), record)
        with self._in_turn():
            self._journal.append(entry)
        # The version exists now: nothing that follows may fail.
        self.memory.take(left, anchors)
        # A snapshot's anchors replace what is gathered: it waits for all of that.
        if self._journal.snapshot_due and self.memory.protected == 1:
            try:
                with together(self._model):
                    self._snapshot()
            except Exception as error:  # the turns are still there, so nothing is lost
                logger.warning("no snapshot could be written, the next turn tries again: %s", error)

    def _snapshot(self) -> None:
        weights = {name: whole(weight).cpu() for name, weight in self._weights.items()}
        snapshot = self.memory.snapshot(weights)
        with self._in_turn():
            self._journal.write_snapshot(snapshot)

    def _in_turn(self) -> AbstractContextManager[None]:
        """The first rank goes through the block before the others do."""
        ranks = ranks_of(self._model)
        return nullcontext() if ranks is None else ranks.in_turn()
