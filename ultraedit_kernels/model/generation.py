"""Batched generation from token ids: greedy, or sampled with a seed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.model.capture import evaluation_mode, leaves_only_keys
from ultraedit_kernels.model.encoding import pad_right


@dataclass(frozen=True)
class Penalties:
    """What a server's sampling settings take from the logits of tokens that were seen."""

    repetition: float = 1.0
    """Logits of tokens in prompt or answer are divided by it if positive, else multiplied."""
    presence: float = 0.0
    """Taken from the logits of tokens in the answer."""
    frequency: float = 0.0
    """The same, for every time that they are."""

    @property
    def any(self) -> bool:
        """Whether they change anything."""
        return self != Penalties()

    def apply(self, logits: Tensor, prompt: Tensor, answer: Tensor) -> Tensor:
        """Logits [batch, vocabulary], less what the tokens [batch, any] cost; -1 is no token."""
        counts = [logits.new_zeros(len(logits), logits.shape[1] + 1) for _ in range(2)]
        for count, ids in zip(counts, (prompt, answer), strict=True):
            count.scatter_add_(1, ids % (logits.shape[1] + 1), logits.new_ones(ids.shape))
        seen, said = (count[:, :-1] for count in counts)
        changed = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        logits = torch.where(seen + said > 0, changed, logits)
        return logits - self.frequency * said - self.presence * (said > 0)


@torch.inference_mode(False)
@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Seq[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    penalties: Penalties | None = None,
) -> list[list[int]]:
    """Greedy new tokens per prompt, up to and including the first end of sequence.

    Of the generation settings a model ships with, only its end tokens count: penalties would bend
    the choice, unless `penalties` asks for those.
    Batches go by length, so that padding is rare, and there is none where a layer keeps a state
    that it would change; answers come back in the order of the prompts.
    """
    ends = end_tokens(model, tokenizer)
    device = model.get_input_embeddings().weight.device
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with _plain_settings(model, ends, max_new_tokens):
        for part in _batches(order, [len(p) for p in prompts], batch_size, leaves_only_keys(model)):
            width = max(len(prompts[i]) for i in part)
            ids = torch.zeros(len(part), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(part):
                ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                mask[row, width - len(prompts[i]) :] = 1
            out = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                logits_processor=_processors(penalties, mask.to(device)),
            )
            for row, i in enumerate(part):
                answers[i] = _until_end(out[row, width:].tolist(), ends)
    return answers


def sample(
    model: Any,
    tokenizer: Any,
    first: int,
    count: int,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[tuple[float, list[list[int]]]]:
    """Texts after one token, sampled from the model's full distribution: after each token, how
    much of the work is done, from 0 to 1, and the texts of a batch that is finished, if it is: its
    tokens up to and including the first end of sequence.

    The random numbers are its own: whoever else draws some meanwhile, as an engine does, neither
    changes these nor sees its own changed.
    """
    ends = end_tokens(model, tokenizer)
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        texts: list[list[int]] = [[] for _ in range(size)]
        for i, ids in enumerate(_sampled(model, [first] * size, seed + start)):
            for text, token in zip(texts, ids, strict=True):
                if not text or text[-1] not in ends:
                    text.append(token)
            if i + 1 == max_new_tokens or all(text[-1] in ends for text in texts):
                break
            yield (start + size * (i + 1) / max_new_tokens) / count, []
        yield (start + size) / count, texts


def likeliest(model: Any, rows: Seq[list[int]]) -> Iterator[list[int]]:
    """Token by token the likeliest continuation of rows of one length, without end; the next
    tokens of all rows at a time."""
    return _continued(model, rows, lambda logits: logits.argmax(-1, keepdim=True))


def _sampled(model: Any, ids: list[int], seed: int) -> Iterator[list[int]]:
    """Token by token what follows one token each, without end."""
    numbers = torch.Generator(model.get_input_embeddings().weight.device).manual_seed(seed)

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.float().softmax(-1), 1, generator=numbers)

    return _continued(model, [[one] for one in ids], choose)


@torch.inference_mode(False)
@torch.no_grad()
def _continued(
    model: Any, rows: Seq[list[int]], choose: Callable[[Tensor], Tensor]
) -> Iterator[list[int]]:
    """Token by token what follows rows of one length, without end; `choose` takes the next tokens,
    [rows, 1], by their logits [rows, vocabulary]."""
    last, past = torch.tensor(rows, device=model.get_input_embeddings().weight.device), None
    while True:
        with evaluation_mode(model):
            out = model(input_ids=last, past_key_values=past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values
        last = choose(out.logits[:, -1])
        yield last[:, 0].tolist()


def _batches(order: Seq[int], lengths: Seq[int], size: int, padded: bool) -> Iterator[list[int]]:
    """Parts of the order of at most that size; unless padded, of one length each."""
    parts = [list(order)]
    if not padded:
        parts = [list(part) for _, part in itertools.groupby(order, key=lambda i: lengths[i])]
    for part in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size]


@torch.inference_mode(False)
@torch.no_grad()
def logits_from(
    model: Any, rows: Seq[list[int]], first: Seq[int], past: Any = None
) -> list[Tensor]:
    """The logits of each row of tokens from a position on, [row - first, vocabulary] float32.

    The rows go on after the keys and values `past` of one row of tokens, which stay as they are.
    """
    if not rows:
        return []
    device = model.get_input_embeddings().weight.device
    if past is not None:
        past = copy.deepcopy(past)
        past.batch_repeat_interleave(len(rows))
    width = max(len(row) for row in rows)
    keep = width - min(first)
    ids, _ = pad_right(rows, device)
    with evaluation_mode(model):
        logits = model(
            input_ids=ids, past_key_values=past, use_cache=past is not None, logits_to_keep=keep
        ).logits.float()
    cut = width - logits.shape[1]
    return [
        logits[i, start - cut : len(row) - cut]
        for i, (row, start) in enumerate(zip(rows, first, strict=True))
    ]


def _processors(penalties: Penalties | None, mask: Tensor) -> Any:
    """What transformers is to do with logits; the mask [batch, prompt] says what is padding."""
    from transformers import LogitsProcessorList

    if penalties is None or not penalties.any:
        return None
    width = mask.shape[1]

    def penalise(ids: Tensor, logits: Tensor) -> Tensor:
        prompt = ids[:, :width].masked_fill(mask == 0, -1)
        return penalties.apply(logits.float(), prompt, ids[:, width:])

    return LogitsProcessorList([penalise])


@contextmanager
def _plain_settings(model: Any, ends: list[int], max_new_tokens: int) -> Iterator[None]:
    """Plain greedy decoding in evaluation mode; all restored at the end.

    The model's own settings are put away, as transformers fills every unset field from them.
    """
    from transformers import GenerationConfig

    shipped = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        with evaluation_mode(model):
            yield
    finally:
        model.generation_config = shipped


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens at which the model's own generation settings stop, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    found = ends if isinstance(ends, list) else [ends]
    return [end for end in dict.fromkeys([*found, tokenizer.eos_token_id]) if end is not None]


def text_after(
    tokenizer: Any, prompt: Seq[int], answer: Seq[int], *, skip_special_tokens: bool = True
) -> str:
    """An answer as text, with the white space that it has after its prompt."""
    before, whole = (
        str(
            tokenizer.decode(
                list(ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        )
        for ids in (prompt, [*prompt, *answer])
    )
    return whole[len(before) :]


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]
