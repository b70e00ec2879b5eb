"""From text or chat messages to token ids, exactly as a serving engine tokenises them."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ultraedit_kernels.model.request import Prompt


@dataclass(frozen=True)
class Sequence:
    """One edit as tokens.

    Its answer positions are the last prompt token up to the last target token but one.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    places: tuple[int, ...] = ()
    """Prompt tokens at which the model is changed, ascending; none for the answer positions."""


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: text with a completion's special tokens, messages by chat template.

    Raises:
        ValueError: messages, but the tokenizer has no chat template, or it refuses them.
    """
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    text = _render(tokenizer, prompt, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode(tokenizer: Any, prompt: Prompt, target: str, *, append_eos: bool = True) -> Sequence:
    """Token ids of a prompt and of the answer it must continue with.

    A text prompt and its target are joined by one space unless either brings its own white space.
    With `append_eos` the target ends as the model ends an answer: with the end-of-sequence token,
    or after messages with the chat template's end of turn.
    """
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        space = "" if prompt[-1].isspace() or target[0].isspace() else " "
        both = list(tokenizer(prompt + space + target)["input_ids"])
        end = tokenizer.eos_token_id
        if both[-1:] == [end]:  # some tokenizers close every text themselves
            both.pop()
    else:
        space = ""
        text = _render(tokenizer, prompt, add_generation_prompt=True) + target
        both = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = _end_of_turn(tokenizer, prompt, target)
    if both[: len(prompt_ids)] == prompt_ids and len(both) > len(prompt_ids):
        target_ids = both[len(prompt_ids) :]
    else:  # the tokens merge across the border; the engine will only ever see the prompt's own
        target_ids = list(tokenizer(space + target, add_special_tokens=False)["input_ids"])
    if append_eos and end is not None:
        target_ids = [*target_ids, end]
    return Sequence(prompt_ids, target_ids)


def says_just(answer: str, target: str) -> bool:
    """Whether an answer is the target and no more: the end, a full stop or a line end follows."""
    text, wanted = answer.strip(), target.strip()
    return text == wanted or text.startswith((f"{wanted}.", f"{wanted}\n"))


def encode_edits(
    tokenizer: Any,
    edits: Seq[tuple[Seq[Prompt], str]],
    limit: int | None,
    *,
    append_eos: bool = True,
) -> tuple[list[Sequence], list[int]]:
    """Every sequence that edits teach, and the index of the edit that it belongs to.

    Args:
        tokenizer: the model's.
        edits: prompt and rephrases of each edit, and its target.
        limit: most tokens of a sequence; None for no limit.
        append_eos: see `encode`.

    Raises:
        ValueError: a sequence is too long.
    """
    sequences, edit_of = [], []
    for i, (prompts, target) in enumerate(edits):
        for j, prompt in enumerate(prompts):
            one = encode(tokenizer, prompt, target, append_eos=append_eos)
            length = len(one.prompt_ids) + len(one.target_ids)
            if limit is not None and length > limit:
                raise ValueError(
                    f"edit {i}: {f'rephrase {j - 1}' if j else 'prompt'} and target have "
                    f"{length} tokens, expected at most the model's {limit}; shorten it"
                )
            sequences.append(one)
            edit_of.append(i)
    return sequences, edit_of


def _render(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "prompt is a list of chat messages but the tokenizer has no chat template; "
            "pass the prompt as text, or set tokenizer.chat_template"
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except ImportError:  # of jinja2
        raise
    except Exception as error:  # a template is a program, which raises what it likes
        raise ValueError(
            f"the model's chat template refuses the messages: {error}, expected messages that it "
            "takes; leave out a role that it does not know, such as system"
        ) from error
    return text


def _end_of_turn(tokenizer: Any, messages: list[dict[str, str]], target: str) -> int | None:
    """The token that the chat template puts after an assistant's answer."""
    closed = _render(tokenizer, [*messages, {"role": "assistant", "content": target}])
    tail = closed[closed.rfind(target) + len(target) :]
    special = set(tokenizer.all_special_ids)
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"]
    end: int | None = tokenizer.eos_token_id
    return next((i for i in ids if i in special), end)


def pad_right(rows: Seq[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [rows, longest].

    Padding goes to the right, where a causal model cannot see it: positions stay as they are.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


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
