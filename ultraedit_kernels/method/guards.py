"""Guards: what a turn must pass before its weights may be served.

They look at the finished turn, on weights that nobody is served yet. A turn that does not pass
raises GuardError, and leaves everything as it was.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence, alike, encode, encode_prompt, worth_a_pass
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.parallel import ShardedWeight
from ultraedit_kernels.model.request import Prompt
from ultraedit_kernels.ops import checks
from ultraedit_kernels.settings import EditorSettings
from ultraedit_kernels.store.delta import EditDelta

MAX_CHANGE = EditorSettings.max_change
"""Most that a turn may change a weight: ‖W - W_start‖ / ‖W_start‖, Frobenius norms. On the bundled
model, whose weights are small for what they hold, turns of one edit changed at most 0.26, of 20
edits 0.72, of 100 edits 1.44; a step size out of place, 6.8 and 22."""
MAX_LOST = EditorSettings.max_lost
"""Most of the model's own texts that a turn may make it continue otherwise, as a share. There, the
same turns of edits that hold lost at most 0.015, the others 0.71 and 1."""
OWN_TEXTS = 128
"""Of the model's own texts, how many are looked at."""
FIRST_TEXTS = 16
"""Of these, how many a small turn looks at first; at the others only if it has lost one."""
SMALL_TURN = 8
"""Times as many tokens as a small turn that the texts have: a turn runs its tokens through the
model a few times, and back."""
TOTAL_ROWS = 256
"""Rows of a weight by which it is told how far all turns have moved it: neither a copy of all of it
is needed, nor is it read from a file in every turn."""
MAX_ROWS = 2**16
"""Rows of a delta's factors, per module. A turn has one per answer token and round."""
SHOWN_TOKENS = 16

logger = logging.getLogger(__name__)


class GuardError(ValueError):
    """A turn that must not be served: which guard stopped it, what it measured, and its limit."""

    def __init__(self, guard: str, got: float, limit: float, message: str) -> None:
        super().__init__(f"the turn was rejected, nothing is changed: {message}")
        self.guard, self.got, self.limit, self.reason = guard, got, limit, message


@dataclass
class Canary:
    """A prompt whose answer no turn may change, as an operator gives it."""

    prompt: Prompt
    answer: str | None = None
    """What greedy decoding must begin with."""
    max_kl: float | None = None
    """Most that the distribution of the next token may move, KL(untouched ‖ edited) in nats."""
    reference: Tensor | None = field(default=None, repr=False, compare=False)
    """Log-probabilities [vocabulary] that the untouched model gives to the next token."""


def load_canaries(given: str | Path | Seq[Mapping[str, Any]]) -> list[Canary]:
    """Canaries from a list of {"prompt", "answer"} or {"prompt", "max_kl"}, or a JSON file of one.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    if isinstance(given, (str, Path)):
        try:
            given = json.loads(Path(given).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"canaries: {given} cannot be read ({error}), expected a JSON list"
            ) from error
    if not isinstance(given, (list, tuple)):
        raise ValueError(f"canaries are a {type(given).__name__}, expected a list")
    canaries = []
    for i, one in enumerate(given):
        fields = set(one) if isinstance(one, Mapping) else set()
        if fields not in ({"prompt", "answer"}, {"prompt", "max_kl"}):
            raise ValueError(
                f'canary {i} is {one!r}, expected {{"prompt", "answer"}} or {{"prompt", "max_kl"}}'
            )
        canary = Canary(**one)
        if canary.max_kl is not None:
            checks.positive(f"canary {i}: max_kl", canary.max_kl)
        elif not isinstance(canary.answer, str) or not canary.answer.strip():
            raise ValueError(f"canary {i}: answer is {canary.answer!r}, expected a text")
        canaries.append(canary)
    return canaries


def check_delta(delta: EditDelta, weights: Mapping[str, Tensor]) -> None:
    """Raise GuardError for a delta that is too large, ValueError for one of other shapes."""
    for name, factor in delta.factors.items():
        if len(factor.keys) > MAX_ROWS:
            message = f"the delta of {name} has {len(factor.keys)} rows, the limit is {MAX_ROWS}"
            raise GuardError("rows", len(factor.keys), MAX_ROWS, message)
        got = (factor.coeff.shape[1], factor.keys.shape[1])
        if got != tuple(weights[name].shape):
            raise ValueError(
                f"the delta of {name} is for a weight of shape {got}, expected "
                f"{tuple(weights[name].shape)}; it belongs to another model"
            )


def check_finite(**tensors: Tensor) -> None:
    """Raise GuardError unless all numbers are finite."""
    try:
        checks.finite(**tensors)
    except ValueError as error:
        raise GuardError("finite", float("nan"), float("inf"), str(error)) from error


def or_why_not(
    measure: Generator[Phase, None, dict[str, float]], commit: bool, numbers: Mapping[str, Tensor]
) -> Generator[Phase, None, tuple[dict[str, float], str | None]]:
    """What guards measure of a turn, and why it must not be served, if so.

    Args:
        measure: see `Guards.measure`.
        commit: whether it is to be served; GuardError is raised then.
        numbers: what it leaves to be remembered.
    """
    try:
        check_finite(**numbers)
        return (yield from measure), None
    except GuardError as error:
        if commit:
            raise
        return {}, error.reason


def check_change(name: str, weight: Tensor, start: Tensor, limit: float) -> float:
    """How far a weight [d_out, d_in] has moved in the turn; GuardError beyond the limit."""
    change = relative_change(weight, start)
    if not change <= limit:
        raise GuardError(
            "max_change",
            change,
            limit,
            f"it changes {name} by {change:.3g} of its norm, the limit (max_change) is {limit:.3g};"
            " make fewer edits at once, or other ones: these contradict each other or the model",
        )
    return change


def relative_change(weight: Tensor, start: Tensor) -> float:
    """‖W - W_start‖ / ‖W_start‖, Frobenius norms; 0 of no change, infinite from a zero weight."""
    if isinstance(weight, ShardedWeight):
        ranks, weight, start = weight.shard.ranks, weight.local, getattr(start, "local", start)
    else:
        ranks = None
    squares = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for now, before in zip(weight.split(256), start.split(256), strict=True):
        wide = before.to(weight.device).double()
        squares += torch.stack([(now.double() - wide).square().sum(), wide.square().sum()])
    moved, norm = (squares if ranks is None else ranks.all_reduce(squares)).sqrt().tolist()
    return moved / norm if norm else float("inf") if moved else 0.0


def some_rows(weight: Any) -> Any:
    """At most `TOTAL_ROWS` rows of a weight [d_out, d_in], at equal distances; of a divided one,
    those of this rank's part."""
    step = max(1, -(-weight.shape[0] // TOTAL_ROWS))
    if isinstance(weight, ShardedWeight):
        return ShardedWeight(weight.local[::step], weight.shard)
    return weight[::step]


def share_lost(
    model: nn.Module, texts: Seq[Sequence], modules: Seq[str], batch_size: int
) -> Generator[Phase, None, float]:
    """Share of texts, of which the model was sure, whose greedy choice is another at some token."""
    lost, worth = 0, worth_a_pass(next(model.parameters()).device)
    for part in alike([(len(text),) for text in texts], batch_size, worth):
        captured = capture(model, [texts[i] for i in part], modules, backward=False)
        lost += len(captured.owner[~(captured.margin > 0)].unique())
        yield Phase.CAPTURE
    return lost / len(texts) if texts else 0.0


def check_lost(lost: float, before: float, limit: float) -> None:
    """Raise GuardError if a turn has lost too many of the model's own texts."""
    if not lost - before <= limit:
        raise GuardError(
            "max_lost",
            lost - before,
            limit,
            f"the model goes on otherwise in {lost - before:.0%} more of the texts of its "
            f"own, the limit (max_lost) is {limit:.0%}; make fewer edits at once, or with other "
            "prompts",
        )


class Guards:
    """What every turn must pass before it is committed.

    Args:
        model: the model that the turn has changed; `weights` are its own, module → W [d_out, d_in].
        tokenizer: its tokenizer.
        pristine: module → its untouched weight; some of its rows are kept.
        max_change: most that a turn may change a weight, as a share of its norm.
        max_lost: most of the model's own texts, as a share, that a turn may make it continue
            otherwise.
        canaries: prompts whose answer no turn may change, see `load_canaries`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        weights: Mapping[str, Tensor],
        pristine: Mapping[str, Tensor],
        max_change: float,
        max_lost: float,
        canaries: Seq[Canary],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._weights = weights
        self.rows = {name: some_rows(w).to("cpu", copy=True) for name, w in pristine.items()}
        """Module → rows of its untouched weight, by which the total change is told."""
        self.max_change, self.max_lost, self.canaries = max_change, max_lost, canaries

    def note_references(self) -> None:
        """Keep what the model says, for canaries with a KL limit. It must be untouched."""
        for canary in self.canaries:
            if canary.max_kl is not None:
                canary.reference = _next_token(self._model, self._tokenizer, canary.prompt)

    def lost_before(
        self, last: Mapping[str, float] | None, texts: Seq[Sequence], protected: float, size: int
    ) -> Generator[Phase, None, float]:
        """Share of texts that the model, as it is before a turn, goes on with otherwise.

        Args:
            last: what `measure` returned of the turn before, with the share "protected" of the
                texts that were gathered if it was not all; None of no turn.
            texts: see `measure`.
            protected: share of the texts that is gathered now: others were measured if it changed.
            size: texts that are run through the model at a time.
        """
        if last is None:
            return 0.0
        if last.get("protected", 1.0) == protected:
            return last["lost"]
        return (yield from share_lost(self._model, texts, list(self._weights), size))

    def measure(
        self,
        start: Mapping[str, Tensor],
        texts: Seq[Sequence],
        lost_before: float,
        batch_size: int,
        taught: int | None = None,
    ) -> Generator[Phase, None, dict[str, float]]:
        """Measure the turn that led from the weights `start` to those of now.

        Args:
            start: module → W [d_out, d_in] before the turn.
            texts: of the model's own, of which it was sure when untouched.
            lost_before: share of them that it continued otherwise before the turn already.
            batch_size: texts that are run through the model at a time.
            taught: tokens of what the turn taught; None of a change that was computed elsewhere.

        Returns:
            "change", "total_change" and "lost", see `TurnResult.guards`.

        Raises:
            GuardError: a guard rejects the turn.
        """
        change = total = 0.0
        for name, weight in self._weights.items():
            check_finite(**{f"edited {name}": weight})
            change = max(change, check_change(name, weight, start[name], self.max_change))
            total = max(total, relative_change(some_rows(weight), self.rows[name]))
            yield Phase.GUARD
        lost = yield from self._lost(texts, lost_before, batch_size, taught)
        check_lost(lost, lost_before, self.max_lost)
        yield from self.check_canaries()
        return {"change": change, "total_change": total, "lost": lost}

    def _lost(
        self, texts: Seq[Sequence], before: float, size: int, taught: int | None
    ) -> Generator[Phase, None, float]:
        """Share of texts that are lost; as before the turn, if it is small and has none of the
        first ones lost. See `measure`."""
        modules = list(self._weights)
        if taught is not None and sum(map(len, texts)) > SMALL_TURN * taught:
            first = yield from share_lost(self._model, texts[:FIRST_TEXTS], modules, size)
            if not first:
                return before
        return (yield from share_lost(self._model, texts, modules, size))

    def check_canaries(self) -> Generator[Phase, None, None]:
        """Raise GuardError for the first canary that does not hold."""
        for i, canary in enumerate(self.canaries):
            if canary.answer is None:
                self._check_distribution(i, canary)
            else:
                self._check_answer(i, canary, canary.answer)
            yield Phase.CAPTURE

    def _check_distribution(self, i: int, canary: Canary) -> None:
        assert canary.reference is not None and canary.max_kl is not None
        now = _next_token(self._model, self._tokenizer, canary.prompt)
        kl = float((canary.reference.exp() * (canary.reference - now)).nansum())
        if not kl <= canary.max_kl:
            raise GuardError(
                f"canaries[{i}]",
                kl,
                canary.max_kl,
                f"what follows canary {i}, {canary.prompt!r}, has a KL divergence of {kl:.3g} "
                f"nats from the untouched model's, the limit is {canary.max_kl:.3g}",
            )

    def _check_answer(self, i: int, canary: Canary, answer: str) -> None:
        asked = encode(self._tokenizer, canary.prompt, answer, append_eos=False)
        captured = capture(self._model, [asked], list(self._weights), backward=False)
        lead = float(captured.margin.min())
        if not lead > 0:
            ids = [asked.prompt_ids]
            (said,) = generate(self._model, self._tokenizer, ids, max_new_tokens=SHOWN_TOKENS)
            text = self._tokenizer.decode(said, skip_special_tokens=True).strip()
            raise GuardError(
                f"canaries[{i}]",
                lead,
                0.0,
                f"canary {i}, {canary.prompt!r}, is answered by {text!r}, expected {answer!r}",
            )


@torch.inference_mode(False)
@torch.no_grad()
def _next_token(model: nn.Module, tokenizer: Any, prompt: Prompt) -> Tensor:
    """Log-probabilities of the next token, [vocabulary] float32 on the CPU."""
    device = next(model.parameters()).device
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1).cpu()
