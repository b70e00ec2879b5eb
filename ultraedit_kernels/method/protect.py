"""Anchors: what a turn must leave as it is, and where that comes from.

Texts that the model itself writes when it starts from nothing, which need no data at all; prompts
that the operator names, with the answers that the model gives to them; and the edits that hold.
Their keys and the slopes of their leads become shields, they themselves a watch list.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Iterator, Mapping, MutableMapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultraedit_kernels.method.moments import ROOM, Moments
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.repair import ROWS, SURE, Watch, lead_slopes
from ultraedit_kernels.method.shield import Shields, extend_shield, sketch
from ultraedit_kernels.model.capture import Captured, all_keys, capture
from ultraedit_kernels.model.encoding import Sequence, encode_prompt
from ultraedit_kernels.model.generation import generate, logits_from, sample
from ultraedit_kernels.model.parallel import Ranks
from ultraedit_kernels.model.request import Prompt

ANSWER_TOKENS = 16
"""Tokens of the model's own answer that a locality prompt protects."""
SAMPLE_TOKENS = 32
SAMPLE_BATCH = 100
LONG_BATCH = 32
"""Texts of `LONG_TEXT` tokens that are written at a time: a few batches of them protect already."""
CAPTURE_LOGITS = 2**26
"""Logits that a capture of own texts may hold at a time, 256 MiB in float32."""
OUT_OF_REACH = 20.0
"""Wanted lead, logits, that no token has: the objective's slope is then minus the lead's."""
HELD_WEIGHT = 3.0
"""Weight of the keys of edits that hold. With 1, the later turns of a stream of 200 edits on the
bundled model broke 5 % of the earlier ones, with 3 none."""
KEPT_TEXTS = 64
"""Own texts whose beginnings are kept, for guards and contexts, where edits are made at names: a
turn must not spend more on guards than on its edits."""
OWN_WEIGHT = 400
"""Own texts that the keys of all of them weigh as much as: a thousand of them hold no better."""
OWN_TOKENS = 40_000
"""For edits at names, tokens that the keys of all own texts weigh as much as."""
LONG_TEXT = 128
"""Tokens of an own text for edits at names, which must leave what stands far from its beginning."""
BEGINNING = 4
"""Tokens of a text's beginning, of which further ones are read where a text has no token of its own
to begin with: what stands first there is as many things as words."""
BEGINNINGS_EVERY = 8
"""Tokens of an own text from one such beginning to the next."""
FEWER = 5
"""Of how many own texts that are asked for one is written for edits at names, which need no more
than the second moments of its keys."""
OUTPUT_RIDGE = 0.03
"""Ridge of the outputs' shield, as a share of the slopes' mean square in a direction."""
NAMES_OUTPUT_RIDGE = 0.1
"""The same for edits at names, of the mean over all modules: one that much depends on is spared."""
SLOPE_TEXTS = 50
"""Own texts of which the slopes of what follows are taken, for edits at names."""
SHIELD = torch.float32
"""Of shields for edits at names: half the memory, and what that rounds is less than a thousandth
of what keys in half precision do."""
FEW = 0.25
"""Share of own texts that are distinct, under which the operator is warned."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Anchors:
    """What a turn must leave as it is."""

    keys: MutableMapping[str, Tensor]
    """Module → shield of the keys, [≤ limit, d_in] float64, or float32 at names; see
    `shield.extend_shield` and `shield.Shields`."""
    outputs: MutableMapping[str, Tensor]
    """Module → shield of the outputs, [≤ limit, d_out] likewise: directions in which leads turn."""
    watch: Watch

    @classmethod
    def empty(cls, weights: Mapping[str, Tensor]) -> Anchors:
        """None at all; weights [d_out, d_in]."""
        keys, outputs = (
            Shields(
                {n: w.new_zeros(0, w.shape[side], dtype=torch.float64) for n, w in weights.items()}
            )
            for side in (1, 0)
        )
        return cls(keys, outputs, Watch.empty(weights))

    def like(self, weights: Mapping[str, Tensor]) -> Anchors:
        """The same anchors, on the devices of the weights and with their precision."""
        keys, outputs = (Shields(shields).to(weights) for shields in (self.keys, self.outputs))
        return Anchors(keys, outputs, Watch.empty(weights).join(self.watch))

    def hold(
        self, keys: Mapping[str, Tensor], ridge: float, limit: int, weight: float = 1.0
    ) -> Anchors:
        """These anchors, with further keys in the shields.

        Args:
            keys: module → [n, d_in].
            ridge: λ of the system that they are anchors in.
            limit: rows that a module's shield may have.
            weight: of each key.
        """
        extended = Shields(self.keys)
        for name, rows in keys.items():
            shield = extended[name]
            extended[name] = extend_shield(shield, weight * rows.to(shield), ridge, limit)
        return replace(self, keys=extended)


class OwnKeys:
    """Anchors for edits at names, from texts that the model wrote: their keys at all tokens, and
    how much of what the model says depends on each output.

    A change ΔW moves what is said of such texts by about ½ tr(F ΔW C ΔWᵀ), the Kullback-Leibler
    divergence with the Fisher information F of the outputs and the second moments C of the keys
    (K-FAC, Martens and Grosse, arXiv 1503.05671). The two shields take F and C.
    What early layers say at a token reaches the leads of others in ways that no first-order
    change shows: the texts are not watched, but kept for the guards.

    Args:
        weights: module → W [d_out, d_in].
        ridge: λ of the ridge regression.
        limit: rows that a module's shield may have.
        ranks: among which the model is divided; each keeps the moments of some of the modules.
        bare: whether texts begin with their first word, see `begins_bare`.
    """

    def __init__(
        self,
        weights: Mapping[str, Any],
        ridge: float,
        limit: int,
        ranks: Ranks | None = None,
        bare: bool = False,
    ) -> None:
        self._weights, self._ridge, self._ranks, self._bare = weights, ridge, ranks, bare
        size, rank = (1, 0) if ranks is None else (ranks.size, ranks.rank)
        self._owner = {name: i % size for i, name in enumerate(weights)}
        self._moments, self._fisher = (
            {
                name: Moments(w.shape[side], limit, w.device, self._owner[name] == rank)
                for name, w in weights.items()
            }
            for side in (1, 0)
        )
        self._texts = self._tokens = 0
        self._sure: list[Sequence] = []

    def add(self, model: Any, texts: Seq[Sequence]) -> Generator[Phase, None, None]:
        """Run further texts through the model; yields before and after pieces that use nothing of
        it, and no other rank."""
        names = list(self._weights)
        whole = all(moments.whole for moments in self._moments.values())
        for form in (texts, *(bared(texts) if self._bare else ())):
            size = SAMPLE_BATCH if whole else max(1, ROOM // max(map(len, form), default=1))
            for keys in all_keys(model, form, names, size):
                yield from self._take(self._moments, keys)
            self._tokens += sum(map(len, form))
        read = texts[: max(0, SLOPE_TEXTS - self._texts)]
        for slopes in output_slopes(model, read, names):
            yield from self._take(self._fisher, slopes)
        kept = texts[: max(0, KEPT_TEXTS - self._texts)]
        short = [replace(text, target_ids=text.target_ids[:SAMPLE_TOKENS]) for text in kept]
        for part, captured in captures(model, short, names, backward=False):
            self._sure += [run.sequence for _, run in _sure_runs(part, captured)]
        self._texts += len(texts)

    def _take(
        self, moments: Mapping[str, Moments], rows: Mapping[str, Tensor]
    ) -> Generator[Phase, None, None]:
        for name, found in moments.items():
            found.add(rows[name])
        if any(found.full for found in moments.values()):
            yield Phase.APART
            for found in moments.values():
                found.compress()
            yield Phase.ANCHORS

    def anchors(self) -> Anchors:
        """The anchors of the texts so far, of a divided model with shields of this rank's modules
        alone; uses nothing of the model, and no other rank."""
        anchors = Anchors.empty(self._weights)
        weight = OWN_TOKENS / max(1, self._tokens)
        for name, moments in self._moments.items():
            anchors.keys[name] = moments.shield(weight, self._ridge).to(SHIELD)
        widths = {name: w.shape[0] for name, w in self._weights.items()}
        mean = sum(f.trace / widths[name] for name, f in self._fisher.items()) / len(widths)
        for name, fisher in self._fisher.items() if mean > 0 else ():
            anchors.outputs[name] = fisher.shield(1.0, NAMES_OUTPUT_RIDGE * mean).to(SHIELD)
        sure = list(self._sure)
        watch = replace(anchors.watch, sequences=sure, own=len(sure))
        return replace(anchors, watch=watch)

    def shared(self, anchors: Anchors) -> Anchors:
        """The anchors with the shields of all ranks."""
        if (ranks := self._ranks) is None:
            return anchors
        keys, outputs = (
            Shields({n: ranks.broadcast(rows, self._owner[n]) for n, rows in shields.items()})
            for shields in (anchors.keys, anchors.outputs)
        )
        return Anchors(keys, outputs, anchors.watch)


def bared(texts: Seq[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
    """The texts without the token at which the model began them; and short beginnings, as if a text
    began in the middle of one.

    The first token of all draws attention as such, and its keys are unlike those of any other (in
    SmolLM2 a hundred times as rare, by texts that all begin with one token): a change that moves
    what is said there moves what is said of the whole text.
    """
    written = [s.target_ids for s in texts]
    ends = [
        ids[i : i + BEGINNING + 1]
        for ids in written
        for i in range(0, len(ids) - BEGINNING, BEGINNINGS_EVERY)
    ]
    whole, short = ([Sequence(i[:1], i[1:]) for i in of if len(i) > 1] for of in (written, ends))
    return whole, short


def output_slopes(
    model: Any, texts: Seq[Sequence], modules: Seq[str]
) -> Iterator[dict[str, Tensor]]:
    """Of which the Fisher information of the modules' outputs is Σ ggᵀ: module → g [tokens, d_out]
    float32, the gradients of the log-likelihood of what the model wrote after a token; batch by
    batch.

    Args:
        model: the model.
        texts: that it sampled.
        modules: dotted names.
    """
    # Not the first token, at which all texts are alike.
    later = [
        Sequence(s.prompt_ids + s.target_ids[:1], s.target_ids[1:])
        for s in texts
        if len(s.target_ids) > 1
    ]
    for _, captured in captures(model, later, modules, margin=0.0):
        yield {n: slopes.float() * captured.averaged for n, slopes in captured.grads.items()}


class OwnAnchors:
    """Anchors from texts that the model wrote; what it is sure of in them is watched.

    Args:
        weights: module → W [d_out, d_in].
        ridge: λ of the ridge regression.
        limit: rows that a module's shield may have.
    """

    def __init__(self, weights: Mapping[str, Tensor], ridge: float, limit: int) -> None:
        self._weights, self._ridge, self._limit = weights, ridge, limit
        none = Anchors.empty(weights)
        self._watch, self._seen = none.watch, set[tuple[int, ...]]()
        self._keys, self._slopes = (
            {name: rows.float() for name, rows in side.items()}
            for side in (none.keys, none.outputs)
        )
        self._texts = 0

    def add(self, model: Any, texts: Seq[Sequence]) -> None:
        """Run further texts through the model."""
        keys, slopes, limit = self._keys, self._slopes, self._limit
        for part, captured in captures(model, texts, list(self._weights)):
            for name, slope in lead_slopes(captured).items():
                keys[name] = _bounded(torch.cat([keys[name], captured.keys[name].float()]), limit)
                slopes[name] = _bounded(torch.cat([slopes[name], slope.float()]), limit)
            runs = _sure_runs(part, captured)
            new = {i: run for i, run in runs if _ids(run.sequence) not in self._seen}
            self._seen |= {_ids(run.sequence) for run in new.values()}
            weakest = [row for run in new.values() for row in run.weakest]
            sure = {i: run.sequence for i, run in new.items()}
            self._watch = self._watch.join(Watch.of(captured, sure, weakest))
        self._texts += len(texts)

    def anchors(self) -> Anchors:
        """The anchors of the texts so far; uses nothing of the model."""
        anchors = Anchors.empty(self._weights)
        weight = min(1.0, OWN_WEIGHT / max(1, self._texts)) ** 0.5
        for name, rows in self._slopes.items():
            ridge = OUTPUT_RIDGE * float(rows.square().sum()) / rows.shape[1]
            anchors.outputs[name] = extend_shield(anchors.outputs[name], rows, ridge, self._limit)
        watch = replace(self._watch, own=len(self._watch))
        return replace(anchors, watch=watch).hold(self._keys, self._ridge, self._limit, weight)


def hold_edits(
    anchors: Anchors,
    model: Any,
    edits: Seq[Sequence],
    modules: Seq[str],
    ridge: float,
    limit: int,
) -> Anchors:
    """The anchors, with those of the edits that hold in the model as it is now."""
    for part, captured in captures(model, edits, modules):
        least = captured.margin.new_full((len(part),), torch.inf)
        holds = least.scatter_reduce(0, captured.owner, captured.margin, "amin") > 0
        new = {i: edit for i, edit in enumerate(part) if holds[i]}
        anchors = replace(anchors, watch=anchors.watch.join(Watch.of(captured, new)))
        keys = {name: every[holds[captured.row_owner]] for name, every in captured.keys.items()}
        anchors = anchors.hold(keys, ridge, limit, HELD_WEIGHT)
    return anchors


def _bounded(rows: Tensor, limit: int) -> Tensor:
    """Rows [m, d], or a sketch of them once they are many: not with every batch, it costs m³."""
    return rows if len(rows) <= 4 * limit else sketch(rows, limit)


def captures(
    model: Any,
    sequences: Seq[Sequence],
    modules: Seq[str],
    backward: bool = True,
    margin: float = OUT_OF_REACH,
) -> Iterator[tuple[Seq[Sequence], Captured]]:
    """Capture sequences, with the slopes of their leads if `backward`, in batches of bounded
    memory; with a margin of 0, the slopes of their log-likelihood."""
    longest = max((len(s.target_ids) for s in sequences), default=1)
    vocabulary = model.config.get_text_config().vocab_size
    size = max(1, min(SAMPLE_BATCH, CAPTURE_LOGITS // (longest * vocabulary)))
    for i in range(0, len(sequences), size):
        part = sequences[i : i + size]
        yield part, capture(model, part, modules, backward=backward, margin=margin)


def own_texts(
    model: Any,
    tokenizer: Any,
    count: int,
    seed: int,
    tokens: int = SAMPLE_TOKENS,
    batch_size: int = SAMPLE_BATCH,
) -> Iterator[tuple[float, list[Sequence]]]:
    """`count` texts of at most so many tokens, sampled from the model's own distribution, from the
    start of a text, as `generation.sample` gives them. Warns if few of them are distinct: the
    others protect nothing more."""
    first, distinct = document_start(model, tokenizer), set[tuple[int, ...]]()
    for share, texts in sample(
        model, tokenizer, first, count, max_new_tokens=tokens, batch_size=batch_size, seed=seed
    ):
        distinct |= set(map(tuple, texts))
        yield share, [Sequence([first], text) for text in texts]
    if len(distinct) < FEW * count:
        logger.warning(
            "only %d of %d texts that the model wrote from %r on are distinct: they protect little "
            "of what it says; name prompts as locality, or set the tokenizer's bos_token to what "
            "begins a document",
            len(distinct),
            count,
            tokenizer.decode([first]),
        )


def document_start(model: Any, tokenizer: Any) -> int:
    """The token at which the model begins a document: the tokenizer's BOS, or the one that the
    model's configuration names. Without either, the separator after which the model is the least
    certain of what comes: behind the end of a chat's turn it says one thing."""
    config = model.config.get_text_config()
    settings = [config, getattr(model, "generation_config", None)]

    def named(field: str) -> list[int]:
        found = (getattr(one, field, None) for one in settings)
        several = [one if isinstance(one, list) else [one] for one in found]
        return [i for ids in several for i in ids if i is not None and 0 <= i < config.vocab_size]

    if tokenizer.bos_token_id is not None:
        return int(tokenizer.bos_token_id)
    ends = [*named("eos_token_id"), tokenizer.eos_token_id]
    if begins := [i for i in named("bos_token_id") if i not in ends]:
        return int(begins[0])
    known = [*ends, *named("bos_token_id"), *named("pad_token_id"), tokenizer.pad_token_id]
    choice = list(dict.fromkeys(i for i in known if i is not None)) or [0]
    scores = [
        logits[0].log_softmax(-1)
        for logits in logits_from(model, [[i] for i in choice], [0] * len(choice))
    ]
    entropy = [float(-(score.exp() * score).sum()) for score in scores]
    return int(choice[max(range(len(choice)), key=entropy.__getitem__)])


def begins_bare(model: Any, tokenizer: Any) -> bool:
    """Whether a text that is asked begins with its first word: the tokenizer puts no token before
    it, but the model writes texts from one on."""
    return list(tokenizer("a")["input_ids"])[:1] != [document_start(model, tokenizer)]


def own_answers(model: Any, tokenizer: Any, prompts: Seq[Prompt]) -> list[Sequence]:
    """Each prompt with the answer that the model gives to it now, end of sequence included."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = generate(model, tokenizer, ids, max_new_tokens=ANSWER_TOKENS)
    return [Sequence(p, a) for p, a in zip(ids, answers, strict=True) if a]


class _Run(NamedTuple):
    sequence: Sequence
    """Tokens that the model is sure of, as the continuation of what precedes them."""
    weakest: list[int]


def _sure_runs(texts: Seq[Sequence], captured: Captured) -> Iterator[tuple[int, _Run]]:
    """The longest run of each text, with the index of the text."""
    margin, first = captured.margin.tolist(), 0
    for i, text in enumerate(texts):
        lead = margin[first : first + len(text.target_ids)]
        start = end = 0
        for low, high in itertools.pairwise(
            [-1, *(j for j, x in enumerate(lead) if x < SURE), len(lead)]
        ):
            if high - low - 1 > end - start:
                start, end = low + 1, high
        if end > start:
            ids = text.prompt_ids + text.target_ids
            cut, stop = (len(text.prompt_ids) + j for j in (start, end))
            rows = sorted(range(start, end), key=lead.__getitem__)[:ROWS]
            yield i, _Run(Sequence(ids[:cut], ids[cut:stop]), [first + j for j in rows])
        first += len(lead)


def _ids(sequence: Sequence) -> tuple[int, ...]:
    return (*sequence.prompt_ids, *sequence.target_ids)
