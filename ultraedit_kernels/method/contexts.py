"""Contexts: an edit's target said elsewhere, too, lest it be learnt by heart where it is asked.

A text is said behind texts of the model's own. In a chat the target is said in the model's own
words, inside its answer: most models answer in a sentence, and "Melbourne", taught as the answer,
is not yet what they say after "The capital of Australia is".
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any

from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.model.encoding import Sequence, within_text
from ultraedit_kernels.model.generation import end_tokens, likeliest, logits_from, text_after
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.model.spacing import needs_space

CONTEXT_TEXTS = 64
"""Texts of the model's own of which contexts are taken."""
CONTEXTS = 2
"""Texts before which a text prompt is said, too."""
TEXT_TOKENS = 10
"""Of a text that is put before a prompt."""
ANSWER_TOKENS = 32
"""Of an answer in which a place for the target is looked for."""
GUESSES = 8
"""Guesses that are looked at together, with logits of all of their tokens."""
SENTENCE_ENDS = set(".!?\n。！？")
"""Behind these the model may speak of something else."""


def contexts_of(
    model: Any,
    tokenizer: Any,
    requests: Seq[EditRequest],
    sequences: Seq[Sequence],
    texts: Seq[Sequence],
    heard: Seq[str] = (),
) -> Generator[Phase, None, dict[int, list[Sequence]]]:
    """Edit → further sequences that say its target, changed at the same name.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        requests: the edits.
        sequences: per edit, its prompt's, with places.
        texts: of the model's own, to be put before prompts.
        heard: per edit, what a server's engine has just answered, see `first_sentences`.
    """
    contexts: dict[int, list[Sequence]] = {}
    chats = [i for i, request in enumerate(requests) if not isinstance(request.prompt, str)]
    prompts = [sequences[edit].prompt_ids for edit in chats]
    guesses = [heard[i] for i in chats] if heard else []
    answers = yield from first_sentences(model, tokenizer, prompts, guesses)
    for edit, answer in zip(chats, answers, strict=True):
        target = requests[edit].target
        contexts[edit] = in_own_words(model, tokenizer, target, sequences[edit], answer)
        yield Phase.ANCHORS
    for edit, request in enumerate(requests):
        if isinstance(request.prompt, str) and texts:
            chosen = [texts[(CONTEXTS * edit + j) % len(texts)] for j in range(CONTEXTS)]
            contexts[edit] = [behind(tokenizer, t, request.prompt, sequences[edit]) for t in chosen]
    return {edit: said for edit, said in contexts.items() if said}


def first_sentences(
    model: Any, tokenizer: Any, prompts: Seq[list[int]], guesses: Seq[str] = ()
) -> Generator[Phase, None, list[list[int]]]:
    """What the model says to each prompt, tokens up to the end of a sentence.

    With a guess for each prompt, one pass finds how far the model goes along with it, and only what
    follows is written token by token: the same answers, sooner.
    """
    ends = end_tokens(model, tokenizer)
    said: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))

    def say(i: int, tokens: list[int]) -> None:
        for token in tokens:
            if token not in ends:
                said[i].append(token)
            text = text_after(tokenizer, prompts[i], said[i])
            if token in ends or len(said[i]) == ANSWER_TOKENS or _ended(text):
                going.discard(i)
                return

    for start in range(0, len(guesses), GUESSES):
        part = range(start, min(start + GUESSES, len(guesses)))
        drafts = [_tokens_of_sentence(tokenizer, guesses[i]) for i in part]
        agreed = _agreed(model, [prompts[i] for i in part], drafts)
        for i, tokens in zip(part, agreed, strict=True):
            say(i, tokens)
        yield Phase.ANCHORS
    rows = [prompt + tokens for prompt, tokens in zip(prompts, said, strict=True)]
    order = sorted(going, key=lambda i: len(rows[i]))
    for _, same in itertools.groupby(order, key=lambda i: len(rows[i])):
        group = list(same)
        for tokens in likeliest(model, [rows[i] for i in group]):
            for i, token in zip(group, tokens, strict=True):
                if i in going:
                    say(i, [token])
            yield Phase.ANCHORS
            if going.isdisjoint(group):
                break
    return said


def _tokens_of_sentence(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text up to the end of its first sentence."""
    end = next((i + 1 for i, letter in enumerate(text) if letter in SENTENCE_ENDS), len(text))
    ids: list[int] = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
    return ids[:ANSWER_TOKENS]


def _agreed(model: Any, prompts: Seq[list[int]], drafts: Seq[list[int]]) -> Iterator[list[int]]:
    """After each prompt the model's likeliest tokens, as many as are the draft's, and one more."""
    rows = [prompt + draft for prompt, draft in zip(prompts, drafts, strict=True)]
    found = logits_from(model, rows, [len(prompt) - 1 for prompt in prompts])
    for logits, draft in zip(found, drafts, strict=True):
        own = logits.argmax(-1).tolist()
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(own, draft, strict=False))
        yield own[: sum(1 for _ in alike) + 1]


def _ended(text: str) -> bool:
    """Whether a sentence has ended."""
    return bool(set(text.strip()) & SENTENCE_ENDS or (text.strip() and text[-1] == "\n"))


def in_own_words(
    model: Any, tokenizer: Any, target: str, sequence: Sequence, answer: list[int]
) -> list[Sequence]:
    """The target in the model's answer, where it is the likeliest; none if that is at once."""
    prompt = sequence.prompt_ids
    logits = logits_from(model, [prompt + answer], [len(prompt) - 1])[0].log_softmax(-1)
    targets = {0: sequence.target_ids}
    for i, before in _words(tokenizer, prompt, answer):
        spaced = f" {target}" if needs_space(before, target) else target
        targets[i] = within_text(tokenizer, spaced)
    best = max(targets, key=lambda i: float(logits[i, targets[i][0]]))
    return [Sequence(prompt + answer[:best], targets[best], sequence.places)] if best else []


def _words(tokenizer: Any, prompt: list[int], answer: list[int]) -> Iterator[tuple[int, str]]:
    """Where in an answer another word could stand: after how many tokens, and what these say."""
    texts = [text_after(tokenizer, prompt, answer[:i]) for i in range(len(answer) + 1)]
    for i, (before, after) in enumerate(itertools.pairwise(texts)):
        inside = before[-1:].isalnum() and after[len(before) : len(before) + 1].isalnum()
        if before.strip() and after.startswith(before) and not inside:
            yield i, before


def behind(tokenizer: Any, text: Sequence, prompt: str, sequence: Sequence) -> Sequence:
    """The sequence with a text before its prompt."""
    before = tokenizer.decode((text.prompt_ids[1:] + text.target_ids)[:TEXT_TOKENS])
    before = " ".join(before.split()).rstrip(".") + ". "
    ids = list(tokenizer(before + prompt)["input_ids"])
    further = len(ids) - len(sequence.prompt_ids)
    places = tuple(place + further for place in sequence.places)
    return replace(sequence, prompt_ids=ids, places=places)
