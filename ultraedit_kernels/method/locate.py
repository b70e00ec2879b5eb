"""Where a model is changed: at the token that ends the name of what an edit is about.

At its answer positions an edit's keys look more like those of a neighbour, which asks the same of
something else, than like those of its own rephrase; at the name it is the other way round. The
model itself is asked for the name: shown a few texts with their names, it goes on with a copy of
part of the prompt. Where it does not, the rarest key of what is asked is taken, its first token
left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ultraedit_kernels.method.contexts import contexts_of
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.model.capture import all_keys, evaluation_mode, leaves_only_keys
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
ASK = "".join(f"Text: {text}\nAbout: {name}\n" for text, name in EXAMPLES)
"""Texts in several forms and scripts, each followed by the name of what it is about. ("Name:" was
followed by "architect" where a text asks for the name of one.)"""
SURE = 0.1
"""Least probability that the model goes on with a word of the prompt, for it to be believed."""
RARE = 0.25
"""Share of the rarest key's rarity that the key of a place has at least."""
BATCH = 32
"""Prompts per forward pass."""


def at_names(
    model: Any,
    tokenizer: Any,
    requests: Seq[EditRequest],
    sequences: Seq[Sequence],
    edit_of: Seq[int],
    anchors: Anchors,
    texts: Seq[Sequence],
    shown: Shown | None = None,
    heard: Seq[str] = (),
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
        heard: per edit, what a server's engine has just answered, see `contexts.first_sentences`.

    Returns: the sequences; edit → further sequences that say its target, see `contexts`.
    """
    prompts = [prompt for request in requests for prompt in (request.prompt, *request.rephrases)]
    names: list[tuple[int, int] | None] = []
    contents = [content_of(prompt) for prompt in prompts]
    for i in range(0, len(contents), BATCH):
        names += names_in(model, tokenizer, contents[i : i + BATCH], shown)
        yield Phase.ANCHORS
    placed = yield from place(model, tokenizer, contents, sequences, names, anchors.keys)
    placed = natural_ends(model, tokenizer, prompts, placed)
    yield Phase.ANCHORS
    firsts = [list(edit_of).index(edit) for edit in range(len(requests))]
    contexts = yield from contexts_of(
        model, tokenizer, requests, [placed[i] for i in firsts], texts, heard
    )
    return placed, contexts


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


def place(
    model: Any,
    tokenizer: Any,
    contents: Seq[str],
    sequences: Seq[Sequence],
    names: Seq[tuple[int, int] | None],
    shields: Mapping[str, Tensor],
) -> Generator[Phase, None, list[Sequence]]:
    """The sequences, each with the place where the model is to be changed for it.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        contents: what the prompt of each sequence asks.
        sequences: what must be said, as tokens.
        names: where in the contents the names are, see `names_in`.
        shields: module → shield of the keys of general text, see `shield.extend_shield`; by them a
            key is rare.
    """
    placed: list[Sequence] = []
    for start in range(0, len(sequences), BATCH):
        part = sequences[start : start + BATCH]
        for sequence, rarity in zip(part, _rarities(model, part, shields), strict=True):
            content, name = contents[len(placed)], names[len(placed)]
            inside = _tokens_of(tokenizer, sequence.prompt_ids, content)
            at = place_among(inside, name, rarity.tolist())
            placed.append(replace(sequence, places=(at,)))
        yield Phase.ANCHORS
    return placed


def place_among(
    inside: Mapping[int, int], name: tuple[int, int] | None, rarity: list[float]
) -> int:
    """The token at which a prompt's name ends, of the tokens `inside` that `_tokens_of` found.

    A key that is common there, as that of " of" in a name that was found too long, takes a large
    change, which reaches far: then one before it in the name. The first token of all draws
    attention as such, so that its key is that of any text: then one behind it. The first of what
    is asked may stand behind it and be rare, but it mostly says how is asked, and not of what:
    without a name it is not taken.
    """
    choice = [i for i in inside if i] or [0]
    rarest = max(choice, key=lambda i: rarity[i])
    if name is None:
        return max([i for i in choice if i > min(inside)] or choice, key=lambda i: rarity[i])
    last = next(i for i in inside if inside[i] >= name[1])
    named = [i for i in reversed(choice) if i <= last and inside[i] > name[0]]
    order = named or [i for i in choice if i > last] or choice
    return next((i for i in order if rarity[i] >= RARE * rarity[rarest]), order[0])


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
def names_in(
    model: Any, tokenizer: Any, contents: Seq[str], shown: Shown | None = None
) -> list[tuple[int, int] | None]:
    """For each text, from which to which character the name in it goes; None if the model does not
    go on with part of the text.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        contents: the texts.
        shown: see `show`; by default the model reads that anew.
    """
    whole = [list(tokenizer(f"{ASK}Text: {text}\nAbout:")["input_ids"]) for text in contents]
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
    copies: list[list[tuple[int, list[int]]]] = []
    for text, logits in zip(contents, first, strict=True):
        words = [(i, _continuation(tokenizer, text[i:])) for i in _word_starts(text)]
        ids = sorted({copy[0] for _, copy in words})
        sure = ids and float(logits[0].softmax(-1)[ids].sum()) >= SURE
        best = ids[int(logits[0][ids].argmax())] if sure else None
        copies.append([word for word in words if word[1][0] == best])
    rows = [ids + copy for ids, words in zip(asked, copies, strict=True) for _, copy in words]
    starts = [len(ids) for ids, words in zip(asked, copies, strict=True) for _ in words]
    found = iter(logits_from(model, rows, starts, past))
    line_end = tokenizer("a\n", add_special_tokens=False)["input_ids"][-1]
    names: list[tuple[int, int] | None] = []
    for words in copies:
        said = [(start, _said(copy, next(found), line_end)) for start, copy in words]
        # Of two words alike, as in "The language of The Times", the one said with more behind it.
        start, name = max(said, key=lambda found: len(found[1]), default=(0, []))
        text = tokenizer.decode(name, clean_up_tokenization_spaces=False).strip()
        names.append((start, start + len(text)) if name else None)
    return names


def _said(copy: list[int], logits: Tensor, line_end: int) -> list[int]:
    """The first tokens of a text, [n], up to where the model would rather end the line, by the
    logits [n, vocabulary] after each."""
    stops = logits[:-1, line_end] > logits[torch.arange(len(copy) - 1), copy[1:]]
    return copy[: int(stops.nonzero()[0]) + 1 if stops.any() else len(copy)]


def _word_starts(text: str) -> list[int]:
    """Where a name could begin; in scripts without spaces, anywhere."""
    return [
        i
        for i, letter in enumerate(text)
        if letter.isalnum() and (i == 0 or not text[i - 1].isalnum() or not letter.isascii())
    ]


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


def _rarities(model: Any, sequences: Seq[Sequence], shields: Mapping[str, Tensor]) -> list[Tensor]:
    """For each sequence, how rare the key of each prompt token is, [tokens]: what the keys of
    general text leave of it, kᵀ(C + λI)⁻¹k up to the factor λ; the geometric mean over modules."""
    lengths = [len(s.prompt_ids) for s in sequences]
    asked = [Sequence(s.prompt_ids, s.target_ids[:1]) for s in sequences]
    (captured,) = all_keys(model, asked, list(shields), len(asked))
    total = torch.zeros(sum(lengths), dtype=torch.float64)
    for name, shield in shields.items():
        keys = captured[name].double()
        left = keys.square().sum(1) - (keys @ shield.double().T).square().sum(1)
        total += left.clamp_min(1e-30).log().cpu() / len(shields)
    return list(total.exp().split(lengths))
