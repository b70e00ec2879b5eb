"""Honest scores of edits: efficacy, generalisation and specificity.

Two regimes, side by side:

generation
    Free greedy decoding of the prompt. An answer counts if it equals the expected text, both
    without the white space around them, and the model then stops by itself. Nothing is taken off
    the answer: one word more is wrong.
teacher_forced
    The literature's token accuracy: the share of the answer's tokens (without the end of sequence)
    that are the most likely one when all tokens before them are given. It flatters: an answer that
    is half right scores one half, and whether the model stops is not asked.

Four scores in each regime, in [0, 1], or None where there is nothing to score:

efficacy
    The edit's own prompt gives the target.
generalization
    The held-out rephrases (`test_rephrases`) give the target. Rephrases that were taught never
    count.
specificity
    The held-out locality prompts (`test_locality`) give what the untouched model gave: the same
    text, or under teacher forcing the same predictions at the gold answer's tokens.
specificity_gold
    They give the gold answer, as far as it is known.

Every score is the mean over edits of the mean over that edit's prompts.

The judge asks a model in this process, or with `ServedModel` one behind a server: the same
questions, the same scores, but no teacher forcing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from typing import Any

from torch import nn

from ultraedit_kernels.evaluation.answers import Answer, Output, Question, ServedModel, answer_all
from ultraedit_kernels.model.encoding import encode, says_just
from ultraedit_kernels.model.request import EditRequest

SPARE_TOKENS = 4
"""Room after the longest expected answer, so that a model that goes on is seen to go on."""


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
    return answer_all(model, tokenizer, tests, _limit(tokenizer, requests), batch_size, progress)


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
        JSON-able: "generation" and "teacher_forced", each {"efficacy", "generalization",
        "specificity", "specificity_gold"}; "edits", their number; "per_relation", the same scores
        by `EditRequest.relation` (absent where no edit has one); "rows", one per edit in order,
        with its prompt, rephrases and locality tests joined, each with answer and scores.

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

    def run(questions: Seq[Question], done: int) -> Iterator[Output]:
        report = progress and (lambda more, _: progress(done + more, total))
        return iter(answer_all(model, tokenizer, questions, limit, batch_size, report))

    # Locality runs by itself, in the batches in which it was recorded: in 16 bits, another padding
    # can turn an answer.
    told, kept = run(edits, 0), run(locality, len(edits))
    untouched = iter(before) if before is not None else None
    rows = [_row(request, told, kept, untouched) for request in requests]
    return {**_summary(rows), **_per_relation(rows), "rows": rows}


def _edit(request: EditRequest) -> list[Question]:
    prompts = (request.prompt, *request.test_rephrases)
    return [Question(prompt, request.target) for prompt in prompts]


def _locality(request: EditRequest) -> list[Question]:
    return [Question(test.prompt, test.answer) for test in request.test_locality]


def _limit(tokenizer: Any, requests: Seq[EditRequest]) -> int:
    """Most tokens an answer may take: those of the longest expected one, and some spare."""
    expected = [Question(r.prompt, r.target) for r in requests]
    expected += [test for r in requests for test in _locality(r)]
    return SPARE_TOKENS + max(
        len(encode(tokenizer, test.prompt, test.expected).target_ids)
        for test in expected
        if test.expected is not None
    )


def _row(
    request: EditRequest,
    told: Iterator[Output],
    kept: Iterator[Output],
    before: Iterator[Output] | None,
) -> dict[str, Any]:
    """One edit with all of its prompts; takes their outputs from the front."""

    def judge(output: Output, target: str) -> dict[str, Any]:
        return {
            "prompt": output.prompt,
            "answer": output.answer.text,
            "stopped": output.answer.stopped,
            "generation": _equals(output.answer, target),
            "teacher_forced": _share(output.predicted, output.expected),
        }

    def judge_locality(output: Output, old: Output | None, gold: str | None) -> dict[str, Any]:
        return {
            "prompt": output.prompt,
            "gold": gold,
            "before": None if old is None else old.answer.text,
            "answer": output.answer.text,
            "stopped": output.answer.stopped,
            "generation": None if old is None else float(output.answer == old.answer),
            "teacher_forced": None if old is None else _share(output.predicted, old.predicted),
            "generation_gold": None if gold is None else _equals(output.answer, gold),
            "teacher_forced_gold": _share(output.predicted, output.expected),
        }

    return {
        "prompt": request.prompt,
        "target": request.target,
        "relation": request.relation,
        "efficacy": judge(next(told), request.target),
        "generalization": [judge(next(told), request.target) for _ in request.test_rephrases],
        "specificity": [
            judge_locality(next(kept), None if before is None else next(before), test.answer)
            for test in request.test_locality
        ],
    }


def _equals(answer: Answer, expected: str) -> float:
    same = answer.text.strip() == expected.strip()
    return float(answer.stopped if same else says_just(answer.text, expected))


def _share(left: Seq[int], right: Seq[int]) -> float | None:
    if not right:
        return None
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(right)


def _summary(rows: Seq[dict[str, Any]]) -> dict[str, Any]:
    return {
        regime: {
            "efficacy": _mean([row["efficacy"][regime] for row in rows]),
            "generalization": _mean_over_edits(rows, "generalization", regime),
            "specificity": _mean_over_edits(rows, "specificity", regime),
            "specificity_gold": _mean_over_edits(rows, "specificity", f"{regime}_gold"),
        }
        for regime in ("generation", "teacher_forced")
    } | {"edits": len(rows)}


def _per_relation(rows: Seq[dict[str, Any]]) -> dict[str, Any]:
    relations = sorted({row["relation"] for row in rows if row["relation"] is not None})
    scores = {
        relation: _summary([row for row in rows if row["relation"] == relation])
        for relation in relations
    }
    return {"per_relation": scores} if scores else {}


def _mean_over_edits(rows: Seq[dict[str, Any]], kind: str, score: str) -> float | None:
    return _mean([_mean([test[score] for test in row[kind]]) for row in rows])


def _mean(scores: Seq[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None
