"""Where a model is changed: at the token that ends the name of what an edit is about.

At its answer positions an edit's keys look more like those of a neighbour, which asks the same of
something else, than like those of its own rephrase; at the name it is the other way round. The
model itself is asked for the name: shown a few texts with their names, it goes on with a copy of
part of the prompt. Where it does not, the rarest key of the prompt is taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.model.capture import capture, evaluation_mode, leaves_only_keys
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.generation import logits_from
from ultraedit_kernels.model.request import EditRequest, Prompt

EXAMPLES = (
    ("The Nile flows through", "Nile"),
    ("Who wrote the play Hamlet?", "Hamlet"),
    ("Marie Curie's field of work is", "Marie Curie"),
    ("what is the capital of australia", "australia"),
    ("In what year was the Eiffel Tower built?", "Eiffel Tower"),
    ("The mother tongue of Ingmar Bergman is", "Ingmar Bergman"),
    ("Toyota Corolla, produced by", "Toyota Corolla"),
    ("法国的首都是", "法国"),
    ("Which sport does lionel messi play?", "lionel messi"),
)
ASK = "".join(f"Text: {text}\nName: {name}\n" for text, name in EXAMPLES)
"""Texts in several forms and scripts, each followed by its name."""
SURE = 0.1
"""Least probability that the model goes on with a word of the prompt, for it to be believed."""
BATCH = 32
"""Prompts per forward pass."""


CONTEXT_TEXTS = 64
"""Texts of the model's own of which contexts are taken."""
CONTEXTS = 2
"""Texts before which each prompt is said, too."""
CONTEXT_TOKENS = 10


def at_names(
    model: Any,
    tokenizer: Any,
    requests: Seq[EditRequest],
    sequences: Seq[Sequence],
    edit_of: Seq[int],
    anchors: Anchors,
    texts: Seq[Sequence],
    shown: Shown | None = None,
) -> Generator[Phase, None, tuple[list[Sequence], dict[int, list[Sequence]]]]:
    """The sequences of a turn as edits at names: with places, natural ends, and contexts.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        requests: the edits.
        sequences: what they teach, in the order of prompt and rephrases.
        edit_of: per sequence, the edit that it belongs to.
        anchors: of the turn; by their keys a key is rare.
        texts: of the model's own, to be put before prompts.
        shown: what the untouched model has read, see `show`.

    Returns: the sequences; edit → its prompt's sequence behind further texts.
    """
    prompts = [prompt for request in requests for prompt in (request.prompt, *request.rephrases)]
    placed = yield from place(model, tokenizer, prompts, sequences, anchors.keys, shown)
    placed = natural_ends(model, tokenizer, prompts, placed)
    yield Phase.ANCHORS
    contexts: dict[int, list[Sequence]] = {}
    count = CONTEXTS if texts else 0
    for edit in range(len(requests)):
        i = list(edit_of).index(edit)
        if isinstance(prompts[i], str):
            chosen = [texts[(CONTEXTS * edit + j) % len(texts)] for j in range(count)]
            contexts[edit] = [_behind(tokenizer, text, prompts[i], placed[i]) for text in chosen]
    return placed, {edit: behind for edit, behind in contexts.items() if behind}


def natural_ends(
    model: Any, tokenizer: Any, prompts: Seq[Prompt], sequences: Seq[Sequence]
) -> list[Sequence]:
    """The sequences, texts with the end that the model finds the most natural after the target: the
    end of the sequence, a full stop or a line end. Answers in a chat end their turn."""
    end = tokenizer.eos_token_id
    marks = [tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in (".", "\n")]
    choice = [end, *(ids[-1] for ids in marks)]
    texts = [
        i
        for i, (prompt, s) in enumerate(zip(prompts, sequences, strict=True))
        if isinstance(prompt, str) and s.target_ids[-1] == end and len(s.target_ids) > 1
    ]
    ended = list(sequences)
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        rows = [sequences[i].prompt_ids + sequences[i].target_ids[:-1] for i in part]
        for i, logits in zip(
            part, logits_from(model, rows, [len(r) - 1 for r in rows]), strict=True
        ):
            best = choice[int(logits[0][choice].argmax())]
            ended[i] = replace(sequences[i], target_ids=[*sequences[i].target_ids[:-1], best])
    return ended


def _behind(tokenizer: Any, text: Sequence, prompt: Any, sequence: Sequence) -> Sequence:
    """The sequence with a text before its prompt."""
    before = tokenizer.decode((text.prompt_ids[1:] + text.target_ids)[:CONTEXT_TOKENS])
    before = " ".join(before.split()).rstrip(".") + ". "
    ids = list(tokenizer(before + prompt)["input_ids"])
    further = len(ids) - len(sequence.prompt_ids)
    places = tuple(place + further for place in sequence.places)
    return Sequence(ids, sequence.target_ids, places)


def place(
    model: Any,
    tokenizer: Any,
    prompts: Seq[Prompt],
    sequences: Seq[Sequence],
    shields: Mapping[str, Tensor],
    shown: Shown | None = None,
) -> Generator[Phase, None, list[Sequence]]:
    """The sequences, each with the place where the model is to be changed for it.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        prompts: the prompt of each sequence.
        sequences: what must be said, as tokens.
        shields: module → shield of the keys of general text, see `shield.extend_shield`; by them a
            key is rare.
        shown: what the untouched model has read, see `show`.
    """
    contents = [content_of(prompt) for prompt in prompts]
    ends: list[int | None] = []
    for i in range(0, len(contents), BATCH):
        ends += name_ends(model, tokenizer, contents[i : i + BATCH], shown)
        yield Phase.ANCHORS
    placed = []
    for sequence, content, end in zip(sequences, contents, ends, strict=True):
        inside = _tokens_of(tokenizer, sequence.prompt_ids, content)
        if end is None:
            at = _rarest(model, sequence, inside, shields)
            yield Phase.ANCHORS
        else:
            at = next(i for i in inside if inside[i] >= end)
        placed.append(replace(sequence, places=(at,)))
    return placed


def content_of(prompt: Prompt) -> str:
    """What is asked: the text, or the last message of the user."""
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else prompt[-1]["content"]


class Shown(NamedTuple):
    """Examples of texts with their names, as a model has read them."""

    ids: list[int]
    past: Any
    """Keys and values of these tokens."""


@torch.inference_mode(False)
@torch.no_grad()
def show(model: Any, tokenizer: Any) -> Shown | None:
    """What a model reads before each question for a name; nothing where that cannot be kept. It is
    kept of the untouched model: what an edit asks is then all that a turn has to read."""
    if not leaves_only_keys(model):
        return None
    with_text, alone = (tokenizer(text)["input_ids"] for text in (f"{ASK}Text:", ASK))
    pairs = zip(with_text, alone, strict=False)
    ids = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return Shown(ids, _past(model, ids))


@torch.inference_mode(False)
@torch.no_grad()
def name_ends(
    model: Any, tokenizer: Any, contents: Seq[str], shown: Shown | None = None
) -> list[int | None]:
    """For each text, the index of the character at which the name in it ends; None if the model
    does not go on with part of the text.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        contents: the texts.
        shown: see `show`; by default the model reads that anew.
    """
    whole = [list(tokenizer(f"{ASK}Text: {text}\nName:")["input_ids"]) for text in contents]
    # What all have in common is run once; at the seam a tokenizer may join what stands beside it.
    columns = zip(*whole, tokenizer(ASK)["input_ids"], strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    if not leaves_only_keys(model):
        common = 0
    if shown is not None and whole[0][:common] == shown.ids:
        past = shown.past
    else:
        past = _past(model, whole[0][:common]) if common else None
    asked = [ids[common:] for ids in whole]
    first = logits_from(model, asked, [len(ids) - 1 for ids in asked], past)
    starts: list[int | None] = []
    for text, logits in zip(contents, first, strict=True):
        words = [i for i in range(len(text)) if _begins_word(text, i)]
        ids = [_continuation(tokenizer, text[i:])[0] for i in words]
        if not ids or float(logits[0].softmax(-1)[sorted(set(ids))].sum()) < SURE:
            starts.append(None)
        else:
            starts.append(words[int(logits[0][ids].argmax())])
    copies = [
        [] if start is None else _continuation(tokenizer, text[start:])
        for text, start in zip(contents, starts, strict=True)
    ]
    known = [i for i, copy in enumerate(copies) if copy]
    line_end = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
    rows = [asked[i] + copies[i] for i in known]
    ends: list[int | None] = [None] * len(contents)
    found = logits_from(model, rows, [len(asked[i]) for i in known], past)
    for i, logits in zip(known, found, strict=True):
        name = copies[i]
        stops = logits[:-1, line_end] > logits[torch.arange(len(name) - 1), name[1:]]
        taken = int(stops.nonzero()[0]) + 1 if stops.any() else len(name)
        said = tokenizer.decode(name[:taken], clean_up_tokenization_spaces=False).strip()
        start = starts[i]
        assert start is not None
        ends[i] = start + len(said)
    return ends


def _begins_word(text: str, i: int) -> bool:
    """Whether a name could begin here; in scripts without spaces, anywhere."""
    return text[i].isalnum() and (i == 0 or not text[i - 1].isalnum() or not text[i].isascii())


def _continuation(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    return ids


def _past(model: Any, ids: list[int]) -> Any:
    """Keys and values of tokens with which several rows begin."""
    from transformers import DynamicCache

    past = DynamicCache()
    device = model.get_input_embeddings().weight.device
    with evaluation_mode(model):
        model.base_model(torch.tensor([ids], device=device), past_key_values=past, use_cache=True)
    return past


def _tokens_of(tokenizer: Any, ids: list[int], content: str) -> dict[int, int]:
    """The tokens of a prompt that are the content's: index → where in the content each ends."""
    texts = [
        tokenizer.decode(ids[: i + 1], clean_up_tokenization_spaces=False) for i in range(len(ids))
    ]
    start = texts[-1].rfind(content)
    if start < 0:  # a template that changes the text, or tokens that do not decode to themselves
        start = max(0, len(texts[-1]) - len(content))
    ends = {i: len(text) - start for i, text in enumerate(texts)}
    inside = {i: end for i, end in ends.items() if end > 0 and ends.get(i - 1, 0) < len(content)}
    return inside or {len(ids) - 1: len(content)}


def _rarest(
    model: Any, sequence: Sequence, inside: Mapping[int, int], shields: Mapping[str, Tensor]
) -> int:
    """The prompt token whose key is the rarest: the largest share of general text's system that it
    leaves, kᵀ(C + λI)⁻¹k up to the factor λ, mean over the modules."""
    ids = sequence.prompt_ids
    if len(ids) < 2:
        return len(ids) - 1
    whole = Sequence(ids[:1], [*ids[1:], sequence.target_ids[0]])
    captured = capture(model, [whole], list(shields), backward=False)
    rarity = torch.zeros(len(ids), dtype=torch.float64)
    for name, shield in shields.items():
        keys = captured.keys[name].double()
        left = (keys.square().sum(1) - (keys @ shield.double().T).square().sum(1)).clamp_min(0.0)
        rarity += (left / left.sum().clamp_min(1e-30)).cpu()
    choice = [i for i in inside if i] or [0]  # the first token of all draws attention as such
    return max(choice, key=lambda i: float(rarity[i]))
