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
SENTENCE_ENDS = set(".!?\n。！？")
"""Behind these the model may speak of something else."""


def contexts_of(
    model: Any,
    tokenizer: Any,
    requests: Seq[EditRequest],
    sequences: Seq[Sequence],
    texts: Seq[Sequence],
) -> Generator[Phase, None, dict[int, list[Sequence]]]:
    """Edit → further sequences that say its target, changed at the same name.

    Args:
        model: the model, untouched or edited.
        tokenizer: its tokenizer.
        requests: the edits.
        sequences: per edit, its prompt's, with places.
        texts: of the model's own, to be put before prompts.
    """
    contexts: dict[int, list[Sequence]] = {}
    chats = [i for i, request in enumerate(requests) if not isinstance(request.prompt, str)]
    prompts = [sequences[edit].prompt_ids for edit in chats]
    answers = yield from first_sentences(model, tokenizer, prompts)
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
    model: Any, tokenizer: Any, prompts: Seq[list[int]]
) -> Generator[Phase, None, list[list[int]]]:
    """What the model says to each prompt, tokens up to the end of a sentence."""
    ends = end_tokens(model, tokenizer)
    said: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, part in itertools.groupby(order, key=lambda i: len(prompts[i])):
        going = group = list(part)
        steps = likeliest(model, [prompts[i] for i in group])
        for tokens in itertools.islice(steps, ANSWER_TOKENS):
            following = dict(zip(group, tokens, strict=True))
            going = [i for i in going if following[i] not in ends]
            for i in going:
                said[i].append(following[i])
            going = [i for i in going if not _ended(text_after(tokenizer, prompts[i], said[i]))]
            yield Phase.ANCHORS
            if not going:
                break
    return said


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
