"""What a stream of edits remembers besides the weights, and how files hold it.

A turn of the journal, a snapshot and a stream file hold it as tensors by name:

    statistics.{name}.{count|mean|m2}    all: the running statistics
    held.{module}, leads                 turn: keys of the edits that hold, leads that it left
    watch.{part}                         turn: what is watched from then on; snapshot: all of it
    shield.{keys|outputs}.{module}       snapshot: what protects keys and outputs, the strongest and
                                         newest rows; the others are shield.weak_{keys|outputs}
    edits.{tokens|prompt}                stream file: what the edits taught that still held

and as metadata `statistics_d_in`, a JSON object name → d_in, and `released` of a turn, a JSON list
of indices. A stream file is what an editor goes on with when its model was saved, edited.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ultraedit_kernels.method.change import Turn
from ultraedit_kernels.method.gather import Gathering, anchors_of, parts_of
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import (
    HELD_WEIGHT,
    OWN_WEIGHT,
    SAMPLE_TOKENS,
    Anchors,
    captures,
    own_answers,
)
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.model import encoding
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.parallel import agree
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.ops import checks
from ultraedit_kernels.ops.statistics import Statistics, from_tensors, to_tensors
from ultraedit_kernels.store.files import damage, joined, part
from ultraedit_kernels.store.journal import Entry, Journal, Snapshot

STREAM = "ultraedit/stream.safetensors"
"""Where a checkpoint keeps its stream file. In a folder, since vLLM takes every safetensors file
beside the weights for weights."""
WATCHED_EDITS = 4096
"""Most edits and named prompts that are watched; the oldest are let go."""


@dataclass(frozen=True)
class TurnMemory:
    """What one turn leaves to be remembered."""

    statistics: dict[str, Statistics]
    """The running statistics after it."""
    keys: dict[str, Tensor]
    """Module → keys [n, d_in] of the edits that hold, which later turns protect."""
    watch: Watch
    """What is watched from this turn on: edits that hold, and prompts that the operator named."""
    leads: Tensor
    """[2, r] lead and drift of the first r tokens that are watched then, see `Watch`."""
    released: list[int]
    """What is no longer watched: indices into all that was before, named prompts included."""

    @classmethod
    def of(cls, turn: Turn, named: Watch) -> TurnMemory:
        """What a finished turn leaves, with the prompts that the operator named in it."""
        leads = torch.stack([turn.watched.lead, turn.watched.drift])
        watch = named.join(turn.watch)
        return cls(turn.statistics, turn.held, watch, leads, turn.released)

    def numbers(self) -> dict[str, Tensor]:
        """All that must be finite, by what it is."""
        return {
            **{f"mean of {name}": stats.mean for name, stats in self.statistics.items()},
            **{f"M2 of {name}": stats.m2 for name, stats in self.statistics.items()},
            **{f"keys of {name}": keys for name, keys in self.keys.items()},
            **{f"slopes of {name}": slopes for name, slopes in self.watch.slopes.items()},
        }

    def encode(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata for the journal, on the CPU: the accelerator is the model's."""
        held = {name: keys.cpu() for name, keys in self.keys.items()}
        tensors, metadata = _encode(self.statistics, {"held": held, "watch": self.watch.tensors()})
        tensors["leads"] = self.leads.cpu()
        return tensors, metadata | {"released": json.dumps(self.released)}

    @classmethod
    def decode(cls, entry: Entry) -> TurnMemory:
        """The inverse of `encode`. Raises ValueError if the entry lacks something."""
        with damage(entry.source):
            return cls(
                decode_statistics(entry),
                part(entry.tensors, "held."),
                Watch.from_tensors(part(entry.tensors, "watch.")),
                entry.tensors["leads"],
                json.loads(entry.metadata["released"]),
            )


class Memory:
    """What a stream of edits remembers: statistics, and what its turns must leave as it is.

    Args:
        weights: module → W [d_out, d_in].
        sharing: "per-module" statistics, or "per-shape" of all modules whose weights are alike.
        texts: how many texts of the model's own are protected and watched, besides the edits that
            hold; with 0, neither are.
        rows: that the protected keys of a module are compressed to.
        ridge: λ of the ridge regression that the keys are compressed for.
        seed: of the sampled texts.
        at_names: whether edits are made at names, see `locate`.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        sharing: Literal["per-module", "per-shape"],
        texts: int,
        rows: int,
        ridge: float,
        seed: int,
        at_names: bool = False,
    ) -> None:
        self._weights, self._texts, self._at_names = weights, texts, at_names
        self._rows, self._ridge = rows, ridge
        self.gathering = Gathering(weights, texts, rows, ridge, seed, at_names)
        """What protects the untouched model, as far as it is gathered."""
        self.protected = 0.0 if texts else 1.0
        """Share of the model's own texts that the anchors are of."""
        self.statistics_of = {
            name: name if sharing == "per-module" else "x".join(map(str, weight.shape))
            for name, weight in weights.items()
        }
        """Module → name of the statistics that it uses."""
        self.statistics = {
            self.statistics_of[name]: Statistics.empty(w.shape[1], w.shape[0], device=w.device)
            for name, w in weights.items()
        }
        """The running statistics by name."""
        self.first_statistics = dict(self.statistics)
        """The statistics of version 0."""
        self._traffic: dict[str, Tensor] = {}
        self._at_start = Anchors.empty(weights)
        self._anchors: Anchors | None = None

    @property
    def anchors(self) -> Anchors:
        """What the next turn must leave as it is. Raises ValueError before `recall`."""
        if self._anchors is None:
            raise ValueError("the anchors are not there yet, call Editor.prepare first")
        return self._anchors

    @property
    def recalled(self) -> bool:
        """Whether the anchors are those of the present version."""
        return self._anchors is not None

    def own_texts(self, count: int) -> list[Sequence]:
        """The first texts, at most `count`, that the untouched model wrote."""
        watch = self._at_start.watch
        return watch.sequences[: min(watch.own, count)]

    def go_on(self, path: str | Path) -> None:
        """Go on with a stream file: its statistics, and its edits as ones that hold.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, or of other modules.
        """
        loaded, self.gathering.edits_before = load_stream(path)
        try:
            checks.tensor_names(loaded, self.statistics, f"statistics of {path}")
            for name, stats in loaded.items():
                here = self.statistics[name]
                if (stats.d_in, stats.d_out) != (here.d_in, here.d_out):
                    raise ValueError(
                        f"statistics {name} of {path} are of {stats.d_in} + {stats.d_out} "
                        f"features, expected {here.d_in} + {here.d_out}"
                    )
        except ValueError as error:
            raise ValueError(
                f"{error}; the model was edited before, and that file is to be continued: edit the "
                "same modules (by the published method, if it was), or remove the file to begin "
                "anew"
            ) from error
        device = next(iter(self._weights.values())).device
        self.statistics = {name: stats.to(device) for name, stats in loaded.items()}
        self.first_statistics = dict(self.statistics)

    def take_found(self) -> None:
        """Take what protects the untouched model as far as it is gathered, on all ranks the same.
        The anchors are then to be recalled."""
        while self.protected < 1 and agree(self._weights, bool(self.gathering.found)):
            found = self.gathering.found.pop(0)
            self._at_start, self.protected = found.anchors.like(self._weights), found.share
            self._anchors = None

    def recall(self, journal: Journal, version: int) -> None:
        """Make the anchors those of a version, from the last snapshot and the turns after it."""
        anchors = self._at_start
        if self._texts:
            first = journal.start(version)
            if first:
                kept = _decode_anchors(journal.snapshot(first))
                if kept.watch.own:  # else it is of an editor that wanted no texts
                    anchors = kept.like(self._weights)
            for number in range(first + 1, version + 1):
                anchors = self._extended(anchors, TurnMemory.decode(journal.entry(number)))
        self._anchors = anchors

    def back_to(self, statistics: Mapping[str, Statistics]) -> None:
        """Go back to the statistics of a version; its anchors are to be recalled."""
        self.statistics = {
            name: stats.to(self.first_statistics[name].mean.device)
            for name, stats in statistics.items()
        }
        self._anchors = None

    def hold_still(self, keys: Mapping[str, Tensor]) -> None:
        """See `Editor.hold_still`."""
        if keys:
            checks.tensor_names(keys, self._weights, "modules of the keys")
        for name, rows in keys.items():
            if rows.ndim != 2 or rows.shape[1] != self._weights[name].shape[1]:
                raise ValueError(
                    f"keys of {name} have shape {tuple(rows.shape)}, expected "
                    f"(n, {self._weights[name].shape[1]})"
                )
            checks.finite(**{f"keys of {name}": rows})
        self._traffic = {
            name: rows.double() * min(1.0, OWN_WEIGHT * SAMPLE_TOKENS / max(1, len(rows))) ** 0.5
            for name, rows in keys.items()
        }

    def anchors_for(
        self, model: Any, tokenizer: Any, requests: Seq[EditRequest]
    ) -> Generator[Phase, None, tuple[Anchors, Watch]]:
        """All anchors of a turn, and what is new in their watch: the prompts that the operator
        names. Their keys are protected in this turn; they are watched from now on."""
        yield Phase.ANCHORS
        anchors, named = self.anchors, Watch.empty(self._weights)
        if self._traffic:
            anchors = anchors.hold(self._traffic, self._ridge, self._rows)
            yield Phase.ANCHORS
        locality = list({str(p): p for r in requests for p in r.locality}.values())
        if locality:
            answers = own_answers(model, tokenizer, locality)
            if self._at_names:  # the names in the prompts are what must not move
                answers = [
                    Sequence(s.prompt_ids[:1], s.prompt_ids[1:] + s.target_ids) for s in answers
                ]
            yield Phase.ANCHORS
            for texts, captured in captures(model, answers, list(self._weights)):
                anchors = anchors.hold(captured.keys, self._ridge, self._rows)
                named = named.join(Watch.of(captured, dict(enumerate(texts))))
                yield Phase.ANCHORS
            anchors = replace(anchors, watch=anchors.watch.join(named))
        return anchors, named

    def unchanged(self) -> TurnMemory:
        """What an applied delta leaves: the statistics as they are, and nothing new."""
        none = Watch.empty(self._weights)
        return TurnMemory(dict(self.statistics), {}, none, torch.zeros(2, 0), [])

    def after(self, turn: TurnMemory) -> Anchors:
        """The anchors that the next turn will have, once this one is committed."""
        return self._extended(self.anchors, turn)

    def take(self, turn: TurnMemory, anchors: Anchors) -> None:
        """Remember a turn that was committed, and the anchors `after` it."""
        self.statistics, self._anchors = dict(turn.statistics), anchors

    def _extended(self, anchors: Anchors, turn: TurnMemory) -> Anchors:
        """Anchors with what a turn adds; if none at all are wanted, none."""
        if not self._texts:
            return anchors
        anchors = anchors.hold(turn.keys, self._ridge, self._rows, HELD_WEIGHT)
        watch, known = anchors.watch.join(turn.watch), turn.leads.shape[1]
        # Not of a turn that watched other texts than are there now: fewer, while they were
        # gathered, or more, before a restart.
        if len(anchors.watch.lead) <= known <= len(watch.lead):
            watch = watch.with_leads(turn.leads).without(turn.released)
        surplus = range(watch.own, len(watch) - WATCHED_EDITS)
        return replace(anchors, watch=watch.without(surplus))

    def snapshot(self, weights: dict[str, Tensor]) -> Snapshot:
        """All of it with the weights, module → W [d_out, d_in]."""
        return Snapshot(weights, *_encode(self.statistics, parts_of(self.anchors)))

    def save(self, path: str | Path) -> None:
        """Write a stream file: the statistics, and the edits that hold."""
        watch = self.anchors.watch
        edits = encoding.to_tensors(watch.sequences[watch.own :])
        tensors, metadata = _encode(self.statistics, {"edits": edits})
        safetensors.torch.save_file(tensors, path, metadata=metadata)


def load_stream(path: str | Path) -> tuple[dict[str, Statistics], list[Sequence]]:
    """Read a stream file: statistics by name, and what the edits taught that held.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not such a file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            d_in = json.loads((file.metadata() or {})["statistics_d_in"])
        return from_tensors(tensors, d_in), encoding.from_tensors(part(tensors, "edits."))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a stream of edits ({error}), expected a file written by "
            "Editor.save_stream; it may be truncated"
        ) from error


def decode_statistics(kept: Entry | Snapshot) -> dict[str, Statistics]:
    """The statistics of a turn or of a snapshot. Raises ValueError if they are not all there."""
    with damage(kept.source):
        return from_tensors(kept.tensors, json.loads(kept.metadata["statistics_d_in"]))


def _decode_anchors(snapshot: Snapshot) -> Anchors:
    with damage(snapshot.source):
        return anchors_of(snapshot.tensors)


def _encode(
    statistics: Mapping[str, Statistics], parts: Mapping[str, Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of statistics and of further tensors, by part and name."""
    tensors, d_in = to_tensors(statistics)
    return tensors | joined(parts), {"statistics_d_in": json.dumps(d_in)}
