"""The side pass: losses at the answer positions, and keys and gradients where the model is changed,
from a short graph.

In a causal model an output can influence the loss only at its own and later positions. So what
precedes the first changed position runs once without autograd into a KV cache, and only the rest
runs with it, from the first edited module upward. The gradients equal those of the full backward
pass exactly (UltraEdit, arXiv 2505.14679, §3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultraedit_kernels.model.encoding import Sequence, pad_right, worth_a_pass
from ultraedit_kernels.model.parallel import shard_of

LOSS_SCALE = 2.0**12
"""Gradients of a mean loss underflow in float16; they are scaled up for the backward pass, and back
in float32."""
PLAIN_PAIRS = 2**14
"""Most pairs of a token and one that it sees, over all sequences, whose attention is computed in
plain products: a few MiB per layer."""


@dataclass(frozen=True)
class Captured:
    """One capture batch: n answer tokens, and m rows where the model is changed, which are the
    answer positions too unless a sequence names other places; both sequence after sequence."""

    keys: dict[str, Tensor]
    """Per module [m, d_in], in the model's dtype."""
    grads: dict[str, Tensor]
    """Per module [m, d_out], in the model's dtype (float16: float32): gradient of the objective
    averaged over the n answer tokens. Empty when captured without gradients."""
    row_owner: Tensor
    """[m] int64: index of the sequence in the batch."""
    owner: Tensor
    """[n] int64: index of the sequence in the batch."""
    loss: Tensor
    """[n] cross entropy of the target token, nats."""
    objective: Tensor
    """[n] the same with the target's logit lowered by the wanted margin: what `grads` belong to."""
    margin: Tensor
    """[n] logit of the target token minus the best other one; above 0 it is the greedy choice."""
    labels: Tensor
    """[n] int64: the target token."""
    rival: Tensor
    """[n] int64: the best other token; the greedy choice where the margin is below 0."""
    averaged: int
    """Answer tokens over which the objective was averaged: n, or more if sequences were left out
    since."""

    def only(self, kept: Seq[int]) -> Captured:
        """What was captured of some sequences of the batch, given by rising index, and counted
        anew."""
        number = self.owner.new_full((int(self.owner.max()) + 1,), -1)
        number[torch.as_tensor(kept, device=number.device)] = torch.arange(
            len(kept), device=number.device
        )
        row_owner, owner = number[self.row_owner], number[self.owner]
        rows, tokens = row_owner >= 0, owner >= 0
        return Captured(
            {name: keys[rows] for name, keys in self.keys.items()},
            {name: grads[rows] for name, grads in self.grads.items()},
            row_owner[rows],
            owner[tokens],
            self.loss[tokens],
            self.objective[tokens],
            self.margin[tokens],
            self.labels[tokens],
            self.rival[tokens],
            self.averaged,
        )

    @property
    def at_answers(self) -> bool:
        """Whether the rows are those of the answer tokens."""
        return torch.equal(self.row_owner, self.owner)


def capture(
    model: nn.Module,
    sequences: Seq[Sequence],
    modules: Seq[str],
    *,
    backward: bool = True,
    margin: float | Seq[float] = 0.0,
    unless_led: bool = False,
) -> Captured:
    """Run one batch of sequences, and read the named modules where each is to be changed.

    Args:
        model: a Hugging Face causal language model. Left as found: no hooks, same flags.
        sequences: prompts and targets as token ids, mixed lengths, each with at least one token.
            Rows are read at their places, or at the answer positions of those that name none.
        modules: dotted names of linear modules. If they are divided among ranks, all ranks
            call this with the same arguments, and all get the same whole keys and gradients.
        backward: also compute the gradients.
        margin: logits by which the target token must lead, one number or one per sequence. It is
            taken from the target's logit before the cross entropy, which then pulls until the lead
            is there; 0 is the paper.
        unless_led: compute no gradients if all target tokens lead by more than the margin.

    Raises:
        ValueError: empty batch, prompt or target; longer than the model's positions.
    """
    _check(model, sequences)
    with torch.inference_mode(False), evaluation_mode(model), _frozen(model):
        return _capture(model, sequences, modules, backward, margin, unless_led)


def all_keys(
    model: Any, sequences: Seq[Sequence], modules: Seq[str], batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """The keys of all tokens but the last, module → [tokens, d_in], batch by batch; what stands
    above the last module is not computed.

    Args:
        model: a Hugging Face causal language model. Left as found.
        sequences: prompts and targets as token ids.
        modules: dotted names of linear modules, all of which the forward pass reaches.
        batch_size: sequences at a time.
    """
    device = model.get_input_embeddings().weight.device
    for i in range(0, len(sequences), batch_size):
        rows = [(s.prompt_ids + s.target_ids)[:-1] for s in sequences[i : i + batch_size]]
        ids, mask = pad_right(rows, device)
        reader = _Reader(mask.bool(), mask.bool(), enough=len(modules))
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            evaluation_mode(model),
            reader.attached(model, modules),
            reader.reading(),
            suppress(_Enough),
        ):
            model.base_model(input_ids=ids, use_cache=False)
        for name in modules:
            if (shard := shard_of(model.get_submodule(name))) is not None:
                reader.keys[name] = shard.whole(reader.keys[name], 1)
        yield reader.keys


def leaves_only_keys(model: Any) -> bool:
    """Whether all that a token leaves to later ones are keys and values of attention. These can be
    computed once, moved and gone on with; the states that other layers keep (Mamba, short
    convolutions, linear attention) cannot."""
    from transformers import DynamicCache

    if getattr(model, "_is_stateful", False):
        return False
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception:  # a configuration that the library has no cache for
        return False
    plain = {"DynamicLayer", "DynamicSlidingWindowLayer"}
    return {type(layer).__name__ for layer in layers} <= plain


def _capture(
    model: Any,
    sequences: Seq[Sequence],
    modules: Seq[str],
    backward: bool,
    margin: float | Seq[float],
    unless_led: bool,
) -> Captured:
    split = backward and leaves_only_keys(model)
    batch = _pad(sequences, model.get_input_embeddings().weight.device, split)
    prefix, rest = batch.prefix_ids.shape[1], batch.rest_ids.shape[1]
    columns = torch.arange(prefix + rest, device=batch.gap.device)
    reader = _Reader(batch.rows, batch.answer)
    with reader.attached(model, modules):
        past = _prefill(model, batch) if prefix else None
        with torch.set_grad_enabled(backward), reader.reading(), _attention(past, batch):
            logits = model(
                input_ids=batch.rest_ids,
                attention_mask=(columns >= batch.gap[:, None]).long(),
                position_ids=columns[prefix:] - batch.gap[:, None],
                past_key_values=past,
                use_cache=past is not None,
            ).logits[0]
            if logits.dtype in (torch.float16, torch.bfloat16):
                logits = logits.float()
            wanted = torch.as_tensor(margin, dtype=logits.dtype, device=logits.device)
            wanted = wanted.expand(len(sequences))[batch.owner]
            handicapped = logits.scatter_add(1, batch.labels[:, None], -wanted[:, None])
            objective = F.cross_entropy(handicapped, batch.labels, reduction="none")
        logits = logits.detach()
        lead, rival = _leads(logits, batch.labels)
        backward = backward and not (unless_led and bool((lead > wanted).all()))
        grads = _gradients(objective, reader.outputs, batch.rows) if backward else {}
        for name in modules:
            if (shard := shard_of(model.get_submodule(name))) is not None:
                reader.keys[name] = shard.whole(reader.keys[name], 1)
                if backward:
                    grads[name] = shard.whole(grads[name], 0)
    return Captured(
        reader.keys,
        grads,
        batch.rows.nonzero()[:, 0],
        batch.owner,
        F.cross_entropy(logits, batch.labels, reduction="none"),
        objective.detach(),
        lead,
        batch.labels,
        rival,
        len(batch.labels),
    )


def _attention(past: Any, batch: _Batch) -> AbstractContextManager[None]:
    """Attention behind a KV cache in plain products on a CPU: the way back through torch's fused
    kernel takes a third of a capture there, in half precision. Plain ones are kept for the way
    back, so only while they are small."""
    rows, prefix, rest = *batch.prefix_ids.shape, batch.rest_ids.shape[1]
    small = rows * rest * (prefix + rest) <= PLAIN_PAIRS
    if past is None or batch.gap.device.type != "cpu" or not small:
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def _leads(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """By how much the labels [n] lead in logits [n, vocabulary], and the best others, both [n]."""
    top = logits.topk(2, dim=-1)
    other = (top.indices[:, :1] == labels[:, None]).long()  # the second, if the label is top
    lead = logits.gather(1, labels[:, None]).squeeze(1) - top.values.gather(1, other).squeeze(1)
    return lead, top.indices.gather(1, other).squeeze(1)


def _gradients(objective: Tensor, outputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Of the mean objective, per module at the rows; see `Captured.grads`."""
    half = next(iter(outputs.values())).dtype == torch.float16
    loss = objective.mean() * (LOSS_SCALE if half else 1.0)
    grads = {}
    for name, g in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
        grads[name] = g[rows].float().div_(LOSS_SCALE) if half else g[rows]
    return grads


@dataclass(frozen=True)
class _Batch:
    """Prefixes and rests of a batch; `gap` columns of padding precede each row's prefix.

    Where there is no graph to keep short, or a prefix cannot be run by itself, there are no
    prefixes, and the rests are whole sequences.
    """

    prefix_ids: Tensor  # [batch, prefix], padded on the right
    rest_ids: Tensor  # [batch, rest], padded on the right
    gap: Tensor  # [batch]: columns of prefix padding
    rows: Tensor  # [batch, rest] bool: where the model is changed
    answer: Tensor  # [batch, rest] bool: where a target token is predicted
    labels: Tensor  # [n]
    owner: Tensor  # [n]


def _pad(sequences: Seq[Sequence], device: torch.device, split: bool) -> _Batch:
    rows = [s.prompt_ids + s.target_ids[:-1] for s in sequences]
    first = torch.tensor([len(s.prompt_ids) - 1 for s in sequences], device=device)
    targets = torch.tensor([len(s.target_ids) for s in sequences], device=device)
    cuts = [s.before if split else 0 for s in sequences]
    prefixes = torch.tensor(cuts, device=device)
    rest_ids, _ = pad_right([row[cut:] for row, cut in zip(rows, cuts, strict=True)], device)
    columns = torch.arange(rest_ids.shape[1], device=device) + prefixes[:, None]
    answer = (columns >= first[:, None]) & (columns < (first + targets)[:, None])
    changed = answer.clone()
    for i, s in enumerate(sequences):
        if s.places:
            changed[i] = False
            changed[i, [place - cuts[i] for place in s.places]] = True
    return _Batch(
        prefix_ids=pad_right([row[:cut] for row, cut in zip(rows, cuts, strict=True)], device)[0],
        rest_ids=rest_ids,
        gap=prefixes.max() - prefixes,
        rows=changed,
        answer=answer,
        labels=torch.tensor([t for s in sequences for t in s.target_ids], device=device),
        owner=torch.arange(len(sequences), device=device).repeat_interleave(targets),
    )


@torch.no_grad()
def _prefill(model: Any, batch: _Batch) -> Any:
    """The prefixes' KV cache, moved right so that all prefixes end in the last column.

    Padding on the right needs no mask, since no real token can see it; masked rows would give NaN
    in some attention kernels. Moved, distances are true again for sliding windows, whose layers
    keep everything here: the mask does the sliding.
    """
    past = _past_of(model, batch.prefix_ids)
    columns = torch.arange(batch.prefix_ids.shape[1], device=batch.gap.device)
    source = (columns - batch.gap[:, None]) % len(columns)
    for layer in past.layers:
        index = source[:, None, :, None].expand_as(layer.keys)
        layer.keys = layer.keys.gather(2, index)
        index = source[:, None, :, None].expand_as(layer.values)
        layer.values = layer.values.gather(2, index)
    return past


def _past_of(model: Any, ids: Tensor) -> Any:
    """The KV cache of rows [batch, tokens]. Equal rows, such as an edit and its contexts have, are
    run once, and so is a beginning of all rows, such as a chat template's, if that is worth a pass
    of its own."""
    from transformers import DynamicCache

    past, (rows, which) = DynamicCache(), ids.unique(dim=0, return_inverse=True)
    common = int((rows == rows[:1]).all(0).int().cumprod(0).sum())
    if (len(rows) - 1) * common < worth_a_pass(ids.device):
        common = 0
    if common:
        model.base_model(input_ids=rows[:1, :common], past_key_values=past, use_cache=True)
        past.batch_repeat_interleave(len(rows))
    if common < rows.shape[1]:
        model.base_model(input_ids=rows[:, common:], past_key_values=past, use_cache=True)
    past.batch_select_indices(which)
    return past


class _Enough(Exception):
    """All modules were read; what comes after them need not be computed."""


class _Reader:
    """The one owner of hooks: reads the edited modules and trims the output head's work. With
    `enough`, the forward pass ends by _Enough once so many modules were read."""

    def __init__(self, rows: Tensor, answer: Tensor, enough: int | None = None) -> None:
        self.rows, self.answer, self.enough = rows, answer, enough
        self.keys: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._active = False

    @contextmanager
    def attached(self, model: Any, modules: Seq[str]) -> Iterator[None]:
        handles = []
        try:
            for name in modules:
                handles.append(model.get_submodule(name).register_forward_hook(self._read(name)))
            head = model.get_output_embeddings()
            handles.append(head.register_forward_pre_hook(self._only_answers))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._active = True
        yield

    def _read(self, name: str) -> Callable[..., Tensor | None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not self._active:
                return None
            self.keys[name] = args[0].detach()[self.rows]
            if len(self.keys) == self.enough:
                raise _Enough
            if torch.is_grad_enabled() and not output.requires_grad:
                output = output.detach().requires_grad_()  # the graph starts here
            self.outputs[name] = output
            return output.clone()  # some models add to it in place

        return hook

    def _only_answers(self, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][self.answer].unsqueeze(0), *args[1:])


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """No dropout inside, and no copies of the output head; all as it was at the end."""
    training = [m for m in model.modules() if m.training]
    hook = model.get_output_embeddings().register_forward_pre_hook(_copied)
    try:
        for m in training:
            m.training = False
        yield
    finally:
        hook.remove()
        for m in training:
            m.training = True


def _copied(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Before the output head: of tokens cut out of longer rows PyTorch multiplies each row by a
    copy of the whole head, on a CPU in bfloat16 in 25 to 600 times what a copy of the tokens
    takes. Of a single row only the strides tell, so that `contiguous` would leave it as it is."""
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient; flags restored at the end."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanted:
            p.requires_grad_(True)


def _check(model: Any, sequences: Seq[Sequence]) -> None:
    if not sequences:
        raise ValueError("got no sequences to capture, expected at least one")
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    for i, s in enumerate(sequences):
        if not s.prompt_ids or not s.target_ids:
            raise ValueError(
                f"sequence {i} has {len(s.prompt_ids)} prompt and {len(s.target_ids)} target "
                "tokens, expected at least one of each; a tokenizer without BOS makes no token "
                "of an empty prompt"
            )
        length = len(s.prompt_ids) + len(s.target_ids) - 1
        if limit is not None and length > limit:
            raise ValueError(
                f"sequence {i} has {length} tokens, expected at most the model's {limit}; "
                "shorten the prompt"
            )
        if not all(0 <= place < length for place in s.places):
            raise ValueError(
                f"sequence {i} is to be changed at tokens {s.places}, expected 0 to {length - 1}"
            )
