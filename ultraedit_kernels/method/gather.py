"""Gathering what protects an untouched model: piece by piece, and kept for the next start.

What is found is told as soon as it is of use: first what an edited checkpoint's stream taught, then
what the first texts of the model's own give, and in the end what all of them do.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import (
    BEGINNING,
    BEGINNINGS_EVERY,
    FEWER,
    KEPT_TEXTS,
    LONG_BATCH,
    LONG_TEXT,
    NAMES_OUTPUT_RIDGE,
    OWN_TOKENS,
    OWN_WEIGHT,
    SAMPLE_BATCH,
    SAMPLE_TOKENS,
    SLOPE_TEXTS,
    Anchors,
    OwnAnchors,
    OwnKeys,
    begins_bare,
    hold_edits,
    own_texts,
)
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.method.shield import STRONG, Shields
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.parallel import agree, fingerprint, ranks_of, weight_of
from ultraedit_kernels.store import cache
from ultraedit_kernels.store.files import joined, part


class Found(NamedTuple):
    """What protects the untouched model."""

    anchors: Anchors
    share: float
    """Of the texts that are wanted, those that it is of."""


class Gathering:
    """What protects an untouched model, as far as it is gathered.

    Args:
        weights: module → W [d_out, d_in].
        texts: how many texts of the model's own are wanted, see `EditorSettings.anchors`.
        rows: that the protected keys of a module are compressed to.
        ridge: λ of the ridge regression that the keys are compressed for.
        seed: of the sampled texts.
        at_names: whether edits are made at names, see `locate`.

    Attributes:
        edits_before: what the stream of an edited checkpoint taught, and is to be held too.
        found: what there is that nobody has taken yet, the best last. Another thread may add to it.
        written: share of the texts that is written; 1 once all protect.
        done: whether all that is wanted was found.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        texts: int,
        rows: int,
        ridge: float,
        seed: int,
        at_names: bool,
    ) -> None:
        self._modules, self._wanted = list(weights), texts
        self._rows, self._ridge, self._seed, self._at_names = rows, ridge, seed, at_names
        self._kept: Anchors | None = None
        self.edits_before: list[Sequence] = []
        self.found: list[Found] = []
        self.written, self.done = 0.0 if texts else 1.0, not texts

    def look_up(self, model: Any, tokenizer: Any, base: Mapping[str, str]) -> None:
        """Find what an earlier start has gathered, if it is kept.

        Args:
            model: with its untouched weights.
            tokenizer: its tokenizer.
            base: module → digest of its untouched weight.
        """
        if self.done:
            return
        weights = self._weights_of(model)
        kept = cache.load(self._depends_on(model, tokenizer), base)
        if agree(weights, kept is not None) and kept is not None:
            self._kept = anchors_of(kept[0]).like(weights)
            self.written = 1.0
            if not self.edits_before:
                self._add(Found(self._kept, 1.0))

    def steps(
        self, model: Any, tokenizer: Any, base: Mapping[str, str]
    ) -> Generator[Phase, None, None]:
        """Gather the rest; yields after each piece. See `look_up`.

        What follows `Phase.APART` uses nothing of the model, and no other rank.
        """
        if self.done:
            return
        weights = self._weights_of(model)
        if self.edits_before:
            yield from self._tell(model, Anchors.empty(weights), 0.0)
        if self._kept is not None:
            yield from self._tell(model, self._kept, 1.0)
            return
        own: OwnKeys | OwnAnchors = OwnAnchors(weights, self._ridge, self._rows)
        count, how = self._wanted, (SAMPLE_TOKENS, SAMPLE_BATCH)
        if self._at_names:
            bare = begins_bare(model, tokenizer)
            own = OwnKeys(weights, self._ridge, self._rows, ranks_of(model), bare)
            count, how = -(-count // FEWER), (LONG_TEXT, LONG_BATCH)
        depends_on, first = self._depends_on(model, tokenizer), True
        for share, texts in own_texts(model, tokenizer, count, self._seed, *how):
            if share < 1:  # the last ones are to be read, too
                self.written = share
            yield Phase.ANCHORS
            if texts and isinstance(own, OwnKeys):
                yield from own.add(model, texts)
            elif texts:
                own.add(model, texts)
            if texts and (first or share == 1):
                first = False
                yield Phase.APART
                anchors = own.anchors()
                if isinstance(own, OwnKeys) and ranks_of(model) is not None:
                    yield Phase.ANCHORS
                    anchors = own.shared(anchors)
                    yield Phase.APART
                if share == 1:
                    cache.save(depends_on, base, joined(parts_of(anchors)), {})
                yield from self._tell(model, anchors, share)

    def _tell(self, model: Any, anchors: Anchors, share: float) -> Generator[Phase, None, None]:
        """It is of use from now on, with the edits of before."""
        if self.edits_before:
            yield Phase.ANCHORS
            anchors = hold_edits(
                anchors, model, self.edits_before, self._modules, self._ridge, self._rows
            )
        self._add(Found(anchors, share))

    def _add(self, found: Found) -> None:
        self.found.append(found)
        if found.share == 1:
            self.done, self.written = True, 1.0

    def _weights_of(self, model: Any) -> dict[str, Any]:
        """Those that it runs with: of a divided model, this rank's."""
        return {name: weight_of(model.get_submodule(name)) for name in self._modules}

    def _depends_on(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        """All that the texts of the model's own depend on, besides the edited weights."""
        return {
            "format": 6,
            "texts": [self._wanted, SAMPLE_TOKENS, LONG_TEXT, KEPT_TEXTS, self._seed],
            "first": tokenizer.bos_token_id,
            "shield": [self._rows, self._ridge, OWN_WEIGHT, STRONG],
            "names": [self._at_names, OWN_TOKENS, FEWER, NAMES_OUTPUT_RIDGE, SLOPE_TEXTS],
            "beginnings": [BEGINNING, BEGINNINGS_EVERY],
            "model": fingerprint(model),
        }


def parts_of(anchors: Anchors) -> dict[str, Mapping[str, Tensor]]:
    """Anchors as tensors by part and name."""
    parts: dict[str, Mapping[str, Tensor]] = {"watch": anchors.watch.tensors()}
    for name, mapping in (("keys", anchors.keys), ("outputs", anchors.outputs)):
        shields = Shields(mapping)
        parts[f"shield.{name}"] = shields.strong
        parts[f"shield.weak_{name}"] = {n: rows for n, rows in shields.weak.items() if len(rows)}
    return parts


def anchors_of(tensors: Mapping[str, Tensor]) -> Anchors:
    """The inverse of `parts_of`, from a file's tensors."""
    keys, outputs = (
        Shields.of(*(part(tensors, f"shield.{how}{name}.") for how in ("", "weak_")))
        for name in ("keys", "outputs")
    )
    return Anchors(keys, outputs, Watch.from_tensors(part(tensors, "watch.")))
