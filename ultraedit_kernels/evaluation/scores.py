"""Honest scores of edits: efficacy, generalisation, portability and specificity.

Five ways to judge an answer, side by side:

generation
    Free greedy decoding of the prompt. An answer counts if it equals the expected text, both
    without the white space around them, and the model then stops by itself, or goes on after a
    full stop or a line end. Nothing else is taken off the answer: one word more is wrong.
begins, contains
    The expected text is at the beginning of that answer; is somewhere in it, in any case.
locft
    What LocFT-BF (arXiv 2509.22072) counts: the answer up to its first full stop or line end is the
    expected text, both in lower case, without punctuation and articles.
teacher_forced
    The literature's token accuracy: the share of the answer's tokens (without the end of sequence)
    that are the most likely one when all tokens before them are given. It flatters: an answer that
    is half right scores one half, and whether the model stops is not asked.

Five scores each way, in [0, 1], or None where there is nothing to score:

efficacy
    The edit's own prompt gives the target.
generalization
    The held-out rephrases (`test_rephrases`) give the target. Rephrases that were taught never
    count.
portability
    Questions about what follows from the edit (`test_portability`) give their answers.
specificity
    The held-out locality prompts (`test_locality`) give what the untouched model gave: the same
    text, or under teacher forcing the same predictions at the gold answer's tokens. In these two
    ways only.
specificity_gold
    They give the gold answer, as far as it is known.

And what became of the locality prompts, the edit's neighbours, as "neighbours":

first_token, first_five
    Share whose answer has the first token, the first five tokens, that it had before.
kl
    Of the distribution of the first token, from the untouched model's to the present one, nats.
leak
    Share in whose first eight tokens the edit's target turns up, in any case, and did not before.

Every score is the mean over edits of the mean over that edit's prompts.

The judge asks a model in this process, or with `ServedModel` one behind a server: the same
questions, the same scores, but no teacher forcing and no neighbours, which need tokens.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from torch import nn

from ultraedit_kernels.evaluation.answers import Output, Question, ServedModel, answer_all
from ultraedit_kernels.model.encoding import encode, says_just
from ultraedit_kernels.model.request import EditRequest

SPARE_TOKENS = 4
"""Room after the longest expected answer, so that a model that goes on is seen to go on."""
LEAST_TOKENS = 16
"""Room for an answer that has the expected text somewhere in a sentence."""
LEAK_TOKENS = 8
"""Of a neighbour's answer, in which the edit's target is looked for."""
WAYS = ("generation", "begins", "contains", "locft", "teacher_forced")
"""To judge an answer; see above."""


def record_locality(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    requests: Seq[EditRequest],
    *,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> list[Output]:
    """What the untouched model does at every locality test, for `evaluate(before=...)`.

    Args:
        model: the model before the first edit.
        requests: the edits that will be evaluated, all of them and in the same order.
        progress: called with (prompts done, prompts in all) after each batch.
    """
    tests = [test for request in requests for test in _locality(request)]
    limit = _limit(tokenizer, requests)
    return answer_all(model, tokenizer, tests, limit, batch_size, progress, distributions=True)


def evaluate(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    requests: Seq[EditRequest],
    *,
    before: Seq[Output] | None = None,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Score edits on a model as it is now: call it after the last turn.

    Args:
        model: a Hugging Face causal language model, or a served one.
        tokenizer: the model's, also if it is served: it says how long answers may get.
        requests: the edits; none of their test questions may have been shown to the editor.
        before: `record_locality` of the untouched model for the same requests; without it there is
            no score of unchanged outputs.
        progress: called with (prompts done, prompts in all) after each batch.

    Returns:
        JSON-able: for each of `WAYS` {"efficacy", "generalization", "portability", "specificity",
        "specificity_gold"}; "neighbours", {"first_token", "first_five", "kl", "leak"}; "edits",
        their number; "per_relation", the same by `EditRequest.relation` (absent where no edit has
        one); "rows", one per edit in order, with its prompt, rephrases, portability and locality
        tests joined, each with answer and scores.

    Raises:
        ValueError: no requests, a tokenizer without an end of sequence, or a `before` of other
            requests.
    """
    if not requests:
        raise ValueError("got no edits to score, expected at least one; pass the edits made")
    edits = [question for request in requests for question in _edit(request)]
    locality = [test for request in requests for test in _locality(request)]
    if before is not None and [output.prompt for output in before] != [t.prompt for t in locality]:
        raise ValueError(
            f"before holds {len(before)} outputs that are not those of the {len(locality)} "
            "locality tests, expected one for each, in order; call record_locality with the same "
            "requests"
        )
    limit = _limit(tokenizer, requests)
    total = len(edits) + len(locality)

    def run(questions: Seq[Question], done: int, kept: bool = False) -> Iterator[Output]:
        report = progress and (lambda more, _: progress(done + more, total))
        return iter(answer_all(model, tokenizer, questions, limit, batch_size, report, kept))

    # Locality runs by itself, in the batches in which it was recorded: in 16 bits, another padding
    # can turn an answer.
    told, kept = run(edits, 0), run(locality, len(edits), before is not None)
    untouched = iter(before) if before is not None else None
    rows = [_row(tokenizer, request, told, kept, untouched) for request in requests]
    return {**_summary(rows), **_per_relation(rows), "rows": rows}


def _edit(request: EditRequest) -> list[Question]:
    prompts = (request.prompt, *request.test_rephrases)
    told = [Question(prompt, request.target) for prompt in prompts]
    return told + [Question(test.prompt, test.answer) for test in request.test_portability]


def _locality(request: EditRequest) -> list[Question]:
    return [Question(test.prompt, test.answer) for test in request.test_locality]


def _limit(tokenizer: Any, requests: Seq[EditRequest]) -> int:
    """Most tokens an answer may take: those of the longest expected one, and some spare."""
    expected = [test for r in requests for test in (*_edit(r), *_locality(r))]
    longest = max(
        len(encode(tokenizer, test.prompt, test.expected).target_ids)
        for test in expected
        if test.expected is not None
    )
    return max(LEAST_TOKENS, longest + SPARE_TOKENS)


def _row(
    tokenizer: Any,
    request: EditRequest,
    told: Iterator[Output],
    kept: Iterator[Output],
    before: Iterator[Output] | None,
) -> dict[str, Any]:
    """One edit with all of its prompts; takes their outputs from the front."""

    def judge(output: Output, expected: str) -> dict[str, Any]:
        return {
            "prompt": output.prompt,
            "answer": output.answer.text,
            "stopped": output.answer.stopped,
            **_ways(output, expected),
        }

    def judge_locality(output: Output, old: Output | None, gold: str | None) -> dict[str, Any]:
        ways = dict.fromkeys(WAYS) if gold is None else _ways(output, gold)
        return {
            "prompt": output.prompt,
            "gold": gold,
            "before": None if old is None else old.answer.text,
            "answer": output.answer.text,
            "stopped": output.answer.stopped,
            "generation": None if old is None else float(output.answer == old.answer),
            "teacher_forced": None if old is None else _share(output.predicted, old.predicted),
            **{f"{way}_gold": score for way, score in ways.items()},
            **(_neighbour(tokenizer, old, output, request.target) if old is not None else {}),
        }

    return {
        "prompt": request.prompt,
        "target": request.target,
        "relation": request.relation,
        "efficacy": judge(next(told), request.target),
        "generalization": [judge(next(told), request.target) for _ in request.test_rephrases],
        "portability": [judge(next(told), test.answer) for test in request.test_portability],
        "specificity": [
            judge_locality(next(kept), None if before is None else next(before), test.answer)
            for test in request.test_locality
        ],
    }


def _ways(output: Output, expected: str) -> dict[str, float | None]:
    """`WAYS` of judging an answer."""
    text, wanted = output.answer.text.strip(), expected.strip()
    just = output.answer.stopped if text == wanted else says_just(text, wanted)
    return {
        "generation": float(just),
        "begins": float(text.startswith(wanted)),
        "contains": float(wanted.lower() in text.lower()),
        "locft": float(normalised(output.answer.text) == normalised(wanted)),
        "teacher_forced": _share(output.predicted, output.expected),
    }


def normalised(answer: str) -> str:
    """An answer as LocFT-BF compares it: up to the first full stop or line end, in lower case,
    without ASCII punctuation, articles and spare white space."""
    head = re.split(r"[.\n]", answer)[0].lower().translate(_NO_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", head).split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _neighbour(tokenizer: Any, old: Output, new: Output, target: str) -> dict[str, float]:
    """What became of a locality prompt; nothing of a served model, whose tokens are not known."""
    if not old.tokens or not new.tokens or old.first is None or new.first is None:
        return {}

    def says(output: Output) -> bool:
        start: str = tokenizer.decode(list(output.tokens[:LEAK_TOKENS]))
        return target.lower() in start.lower()

    return {
        "first_token": float(old.tokens[0] == new.tokens[0]),
        "first_five": float(old.tokens[:5] == new.tokens[:5]),
        "kl": float((old.first.exp() * (old.first - new.first)).sum()),
        "leak": float(says(new) and not says(old)),
    }


def _share(left: Seq[int], right: Seq[int]) -> float | None:
    if not right:
        return None
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(right)


def _summary(rows: Seq[dict[str, Any]]) -> dict[str, Any]:
    scores: dict[str, Any] = {
        way: {
            "efficacy": _mean([row["efficacy"][way] for row in rows]),
            "generalization": _mean_over_edits(rows, "generalization", way),
            "portability": _mean_over_edits(rows, "portability", way),
            "specificity": _mean_over_edits(rows, "specificity", way),
            "specificity_gold": _mean_over_edits(rows, "specificity", f"{way}_gold"),
        }
        for way in WAYS
    }
    scores["neighbours"] = {
        name: _mean_over_edits(rows, "specificity", name)
        for name in ("first_token", "first_five", "kl", "leak")
    }
    return scores | {"edits": len(rows)}


def _per_relation(rows: Seq[dict[str, Any]]) -> dict[str, Any]:
    relations = sorted({row["relation"] for row in rows if row["relation"] is not None})
    scores = {
        relation: _summary([row for row in rows if row["relation"] == relation])
        for relation in relations
    }
    return {"per_relation": scores} if scores else {}


def _mean_over_edits(rows: Seq[dict[str, Any]], kind: str, score: str) -> float | None:
    return _mean([_mean([test.get(score) for test in row[kind]]) for row in rows])


def _mean(scores: Seq[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None
