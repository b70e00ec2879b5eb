"""What edits leave of everything else: prose, and answers to questions about other things."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from ultraedit_kernels.evaluation.perplexity import Reading, read
from ultraedit_kernels.model.encoding import Sequence, encode_prompt
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.request import Prompt

CHUNK = 256
"""Tokens of a piece of prose."""
CHUNKS = 16
"""Pieces that are read."""
ANSWER_TOKENS = 48
"""Of an answer to a question."""


@dataclass(frozen=True)
class General:
    """What the untouched model makes of prose and of questions."""

    prose: list[Sequence]
    prose_read: Reading
    answers: list[Sequence]
    """The questions with what it says to them."""
    answers_read: Reading | None
    """None without questions."""

    @classmethod
    def of(cls, model: Any, tokenizer: Any, prose: str, questions: Seq[Prompt]) -> General:
        """Ask the untouched model.

        Args:
            prose: at least some pages; as much as is needed is read from its beginning.
            questions: text or chat messages that have nothing to do with the edits.

        Raises:
            ValueError: too little prose.
        """
        pieces = chunks(tokenizer, prose)
        told = _answers(model, tokenizer, [encode_prompt(tokenizer, q) for q in questions])
        return cls(pieces, read(model, pieces), told, read(model, told) if told else None)

    def measure(self, model: Any, tokenizer: Any) -> dict[str, dict[str, float]]:
        """How far the edited model is from that, JSON-able: "prose" and, if questions were asked,
        "answers", each as `Reading.moved` has it; of answers those of the untouched model are read,
        and "same" is the share that the edited one gives token for token."""
        found = {"prose": self.prose_read.moved(read(model, self.prose))}
        if self.answers_read is not None:
            now = _answers(model, tokenizer, [answer.prompt_ids for answer in self.answers])
            same = sum(a == b for a, b in zip(self.answers, now, strict=True))
            moved = self.answers_read.moved(read(model, self.answers))
            found["answers"] = {**moved, "same": same / len(now)}
        return found


def chunks(tokenizer: Any, text: str) -> list[Sequence]:
    """At most `CHUNKS` pieces of `CHUNK` tokens from the beginning of a text, of each all tokens
    but the first to be read; each begins as the tokenizer begins a text.

    Raises:
        ValueError: not one whole piece.
    """
    # Ten characters for a token are more than any script needs here.
    ids = list(tokenizer(text[: 10 * CHUNK * CHUNKS], add_special_tokens=False)["input_ids"])
    pieces = [ids[i : i + CHUNK] for i in range(0, len(ids) - CHUNK + 1, CHUNK)][:CHUNKS]
    if not pieces:
        raise ValueError(
            f"the prose has {len(ids)} tokens, expected at least {CHUNK}; take a longer text"
        )
    whole = encode_prompt(tokenizer, "a")
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    start = whole[: len(whole) - len(bare)]
    return [Sequence([*start, *piece[:1]], piece[1:]) for piece in pieces]


def _answers(model: Any, tokenizer: Any, questions: Seq[list[int]]) -> list[Sequence]:
    told = generate(model, tokenizer, questions, max_new_tokens=ANSWER_TOKENS)
    return [Sequence(ids, new) for ids, new in zip(questions, told, strict=True)]
