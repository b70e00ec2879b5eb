"""From text or chat messages to token ids, exactly as a serving engine tokenises them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ultraedit_kernels.model.chat import render_prompt, render_turn, spoken
from ultraedit_kernels.model.spacing import needs_space

if TYPE_CHECKING:
    from ultraedit_kernels.model.request import Prompt


WORTH_A_PASS = {"cpu": 64, "cuda": 2048}
"""Tokens that take about as long as the weights of a model are read."""


@dataclass(frozen=True)
class Sequence:
    """One edit as tokens.

    Its answer positions are the last prompt token up to the last target token but one.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    places: tuple[int, ...] = ()
    """Prompt tokens at which the model is changed, ascending; none for the answer positions."""

    def __len__(self) -> int:
        """How many tokens are run through the model: all but the last."""
        return len(self.prompt_ids) + len(self.target_ids) - 1

    @property
    def before(self) -> int:
        """How many tokens stand before the first at which the model is changed."""
        return min(self.places, default=len(self.prompt_ids) - 1)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text with a completion's special tokens, messages by chat template.

    Raises:
        ValueError: messages, but the tokenizer has no chat template, or it refuses them.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = render_prompt(tokenizer, prompt)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(
    tokenizer: Any,
    prompt: Prompt,
    target: str,
    *,
    append_eos: bool = True,
    space: bool | None = None,
) -> Sequence:
    """Token ids of a prompt and of the answer it must continue with.

    Args:
        tokenizer: the model's.
        prompt: text, or messages; of those the chat template makes prompt and answer, see
            `chat.render_turn`.
        target: the answer.
        append_eos: whether the target ends as the model ends an answer: with the end-of-sequence
            token, or after messages with the chat template's end of turn.
        space: whether a space joins a text prompt and the target; None for what their characters
            suggest, see `spacing`.
    """
    end: int | None = tokenizer.eos_token_id
    if isinstance(prompt, str):
        text, special = prompt, True
        if needs_space(prompt, target) if space is None else space:
            target = f" {target}"
    else:
        turn = render_turn(tokenizer, prompt, target)
        text, target, end, special = turn.prompt, turn.answer, turn.end, False
    prompt_ids = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    both = list(tokenizer(text + target, add_special_tokens=special)["input_ids"])
    if special and both[-1:] == [tokenizer.eos_token_id]:  # some close every text themselves
        both.pop()
    if both[: len(prompt_ids)] == prompt_ids and len(both) > len(prompt_ids):
        target_ids = both[len(prompt_ids) :]
    else:  # the tokens merge across the border; the engine will only ever see the prompt's own
        target_ids = within_text(tokenizer, target)
    if append_eos and end is not None:
        target_ids = [*target_ids, end]
    return Sequence(prompt_ids, target_ids)


def within_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text that goes on after another: without the space that some tokenizers put
    before a text that begins."""
    before, both = (
        list(tokenizer(one, add_special_tokens=False)["input_ids"]) for one in ("a\n", f"a\n{text}")
    )
    if both[: len(before)] == before and len(both) > len(before):
        return both[len(before) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def says_just(answer: str, target: str) -> bool:
    """Whether an answer is the target and no more: the end, a full stop or a line end follows. A
    closed thought before it is none of it."""
    text, wanted = spoken(answer).strip(), target.strip()
    return text == wanted or text.startswith((f"{wanted}.", f"{wanted}\n"))


def encode_edits(
    tokenizer: Any,
    edits: Seq[tuple[Seq[Prompt], str]],
    limit: int | None,
    *,
    append_eos: bool = True,
    spaces: Seq[Seq[bool | None]] | None = None,
) -> tuple[list[Sequence], list[int]]:
    """Every sequence that edits teach, and the index of the edit that it belongs to.

    Args:
        tokenizer: the model's.
        edits: prompt and rephrases of each edit, and its target.
        limit: most tokens of a sequence; None for no limit.
        append_eos: see `encode`.
        spaces: per edit and prompt, `space` of `encode`.

    Raises:
        ValueError: a sequence is too long.
    """
    sequences, edit_of = [], []
    for i, (prompts, target) in enumerate(edits):
        for j, prompt in enumerate(prompts):
            space = spaces[i][j] if spaces is not None else None
            one = encode(tokenizer, prompt, target, append_eos=append_eos, space=space)
            length = len(one.prompt_ids) + len(one.target_ids)
            if limit is not None and length > limit:
                raise ValueError(
                    f"edit {i}: {f'rephrase {j - 1}' if j else 'prompt'} and target have "
                    f"{length} tokens, expected at most the model's {limit}; shorten it"
                )
            sequences.append(one)
            edit_of.append(i)
    return sequences, edit_of


def pad_right(rows: Seq[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [rows, longest].

    Padding goes to the right, where a causal model cannot see it: positions stay as they are.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


def worth_a_pass(device: torch.device) -> int:
    """See `WORTH_A_PASS`."""
    return WORTH_A_PASS.get(device.type, WORTH_A_PASS["cuda"])


def alike(lengths: Seq[tuple[int, ...]], size: int, worth: int) -> list[list[int]]:
    """Which sequences to run together: batches of at most `size`, as indices, such that the tokens
    that are run, padding among them, and the passes cost the least.

    Args:
        lengths: per sequence, what its parts cost; in a batch each part costs as much as the
            longest. Sequences with last parts of like length come together.
        size: most sequences of a batch.
        worth: tokens that a pass costs besides.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i][::-1])
    costs, starts = [0], [0]
    for end in range(1, len(order) + 1):
        longest, choices = lengths[order[end - 1]], []
        for start in range(end - 1, max(-1, end - 1 - size), -1):
            longest = tuple(map(max, longest, lengths[order[start]]))
            choices.append((costs[start] + (end - start) * sum(longest) + worth, start))
        cost, start = min(choices)
        costs.append(cost)
        starts.append(start)
    batches, end = list[list[int]](), len(order)
    while end:
        batches.append(order[starts[end] : end])
        end = starts[end]
    return batches[::-1]


def to_tensors(sequences: Seq[Sequence]) -> dict[str, Tensor]:
    """Sequences for a file: "tokens" [n, longest] int32, prompt and target padded with -1,
    "prompt" [n] int32, how many of them are the prompt, and where any sequence names places
    "places" [n, most] int32, padded with -1."""
    rows = [s.prompt_ids + s.target_ids for s in sequences]
    tokens = torch.full((len(rows), max(map(len, rows), default=0)), -1, dtype=torch.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    prompt = torch.tensor([len(s.prompt_ids) for s in sequences], dtype=torch.int32)
    tensors = {"tokens": tokens, "prompt": prompt}
    if most := max((len(s.places) for s in sequences), default=0):
        padded = [[*s.places, *[-1] * (most - len(s.places))] for s in sequences]
        tensors["places"] = torch.tensor(padded, dtype=torch.int32)
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> list[Sequence]:
    """The inverse of `to_tensors`. Raises KeyError for a missing tensor, ValueError if they do not
    belong together."""
    rows = [[t for t in row if t >= 0] for row in tensors["tokens"].tolist()]
    prompts = tensors["prompt"].tolist()
    places = tensors["places"].tolist() if "places" in tensors else [[]] * len(rows)
    return [
        Sequence(ids[:n], ids[n:], tuple(place for place in at if place >= 0))
        for ids, n, at in zip(rows, prompts, places, strict=True)
    ]
