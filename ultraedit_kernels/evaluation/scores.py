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

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ultraedit_kernels.model.capture import evaluation_mode
from ultraedit_kernels.model.encoding import Sequence, encode, encode_prompt
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.request import EditRequest, Prompt

IGNORED = -100
"""Label of a position without a loss, as cross entropy has it."""

SPARE_TOKENS = 4
"""Room after the longest expected answer, so that a model that goes on is seen to go on."""


class Answer(NamedTuple):
    """What the model says to a prompt."""

    text: str
    """Decoded, without the end-of-sequence token, white space as generated."""
    stopped: bool
    """The model ended the answer within the limit."""


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible server, to be judged in place of one in this process.

    Text goes to /v1/completions, messages to /v1/chat/completions, at temperature 0: the answers
    are those that users get, with the server's own tokenisation and chat template.
    """

    url: str
    """Of the server, without /v1."""
    name: str
    """Of the model, as the server knows it."""
    api_key: str | None = None

    @classmethod
    def connect(cls, url: str, api_key: str | None = None) -> ServedModel:
        """The first model that a server lists.

        Raises:
            ValueError: no server answers there, or it refuses.
        """
        asked = cls(url.rstrip("/").removesuffix("/v1"), "", api_key)
        return replace(asked, name=asked._request("/v1/models")["data"][0]["id"])

    def answers(self, prompts: Seq[Prompt], max_new_tokens: int, parallel: int) -> list[Answer]:
        """As `generate_answers`, with so many requests under way at a time."""

        def ask(prompt: Prompt) -> Answer:
            # One token more, by which a longer answer is known.
            body = {"model": self.name, "temperature": 0, "max_tokens": max_new_tokens + 1}
            if isinstance(prompt, str):
                reply = self._request("/v1/completions", {**body, "prompt": prompt})
                (choice,) = reply["choices"]
                text = choice["text"]
            else:
                reply = self._request("/v1/chat/completions", {**body, "messages": prompt})
                (choice,) = reply["choices"]
                text = choice["message"]["content"]
            return Answer(text or "", choice["finish_reason"] == "stop")

        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(ask, prompts))

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} answered {error.code}: {error.read().decode()[:500]}"
            ) from error
        except urllib.error.URLError as error:
            raise ValueError(
                f"no server answers at {self.url} ({error.reason}); start one, or correct the URL"
            ) from error


@dataclass(frozen=True)
class Output:
    """All that a model does at one test prompt."""

    prompt: Prompt
    answer: Answer
    expected: tuple[int, ...] = ()
    """Tokens of the expected answer without the end of sequence; empty if none is known."""
    predicted: tuple[int, ...] = ()
    """Most likely token at the place of each of them."""


@dataclass(frozen=True)
class _Test:
    prompt: Prompt
    expected: str | None


def generate_answers(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    prompts: Seq[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[Answer]:
    """Greedy answers to text prompts or chat messages, in the order of the prompts.

    Raises:
        ValueError: messages, but the tokenizer has no chat template.
    """
    if isinstance(model, ServedModel):
        return model.answers(prompts, max_new_tokens, batch_size)
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Room for the end of sequence, and for one token by which a longer answer is known.
    limit = max_new_tokens + 2
    tokens = generate(model, tokenizer, ids, max_new_tokens=limit, batch_size=batch_size)
    answers = []
    for new in tokens:
        stopped = len(new) < limit
        text = tokenizer.decode(
            new[:-1] if stopped else new[:max_new_tokens], clean_up_tokenization_spaces=False
        )
        answers.append(Answer(text, stopped))
    return answers


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, texts: Seq[tuple[Prompt, str]], *, batch_size: int = 32
) -> float:
    """Per-token perplexity of prompts with their answers and the end of sequence.

    Every token but the first of a text counts, given those before it.

    Raises:
        ValueError: no texts.
    """
    if not texts:
        raise ValueError("got no texts, expected at least one; pass prompts with their answers")
    encoded = [encode(tokenizer, prompt, answer) for prompt, answer in texts]
    rows = sorted((s.prompt_ids + s.target_ids for s in encoded), key=len)
    device = model.get_input_embeddings().weight.device
    loss, tokens = 0.0, 0
    with evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            ids, mask = pad_right(rows[start : start + batch_size], device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            labels = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
            nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            loss += nats.item()
            tokens += int((labels != IGNORED).sum())
    return math.exp(loss / tokens)


def untouched_texts(requests: Seq[EditRequest]) -> list[tuple[Prompt, str]]:
    """The locality tests that have a gold answer, each once: texts for `perplexity`."""
    tests = {
        json.dumps([test.prompt, test.answer]): (test.prompt, test.answer)
        for request in requests
        for test in request.test_locality
        if test.answer is not None
    }
    return list(tests.values())


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
    tests = [test for request in requests for test in _locality_tests(request)]
    return _run(model, tokenizer, tests, _limit(tokenizer, requests), batch_size, progress)


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
    edits = [
        _Test(prompt, request.target)
        for request in requests
        for prompt in (request.prompt, *request.test_rephrases)
    ]
    locality = [test for request in requests for test in _locality_tests(request)]
    if before is not None and [output.prompt for output in before] != [t.prompt for t in locality]:
        raise ValueError(
            f"before holds {len(before)} outputs that are not those of the {len(locality)} "
            "locality tests, expected one for each, in order; call record_locality with the same "
            "requests"
        )
    limit = _limit(tokenizer, requests)
    total = len(edits) + len(locality)

    def run(tests: Seq[_Test], done: int) -> Iterator[Output]:
        report = progress and (lambda more, _: progress(done + more, total))
        return iter(_run(model, tokenizer, tests, limit, batch_size, report))

    # Locality runs by itself, in the batches in which it was recorded: in 16 bits, another padding
    # can turn an answer.
    told, kept = run(edits, 0), run(locality, len(edits))
    untouched = iter(before) if before is not None else None
    rows = [_row(request, told, kept, untouched) for request in requests]
    result = _summary(rows)
    relations = sorted({r.relation for r in requests if r.relation is not None})
    if relations:
        result["per_relation"] = {
            relation: _summary([row for row in rows if row["relation"] == relation])
            for relation in relations
        }
    return {**result, "rows": rows}


def _locality_tests(request: EditRequest) -> list[_Test]:
    return [_Test(test.prompt, test.answer) for test in request.test_locality]


def _limit(tokenizer: Any, requests: Seq[EditRequest]) -> int:
    """Most tokens an answer may take: those of the longest expected one, and some spare."""
    expected = [_Test(r.prompt, r.target) for r in requests]
    expected += [test for r in requests for test in _locality_tests(r)]
    return SPARE_TOKENS + max(
        len(encode(tokenizer, test.prompt, test.expected).target_ids)
        for test in expected
        if test.expected is not None
    )


def _run(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    tests: Seq[_Test],
    limit: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> list[Output]:
    """Generation and teacher forcing at every test, in order; batched by length."""
    served = isinstance(model, ServedModel)
    settings = getattr(model, "generation_config", None)
    ends = (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None))
    if not served and ends == (None, None):
        raise ValueError(
            "neither tokenizer nor model has an end-of-sequence token, expected one, as an answer "
            "counts only if the model stops after it; set tokenizer.eos_token"
        )
    lengths = [len(encode_prompt(tokenizer, test.prompt)) for test in tests]
    order = sorted(range(len(tests)), key=lambda i: lengths[i])
    outputs: dict[int, Output] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        answers = generate_answers(
            model,
            tokenizer,
            [tests[i].prompt for i in part],
            max_new_tokens=limit,
            batch_size=batch_size,
        )
        forced = {
            i: encode(tokenizer, tests[i].prompt, expected, append_eos=False)
            for i in part
            if not served and (expected := tests[i].expected) is not None
        }
        for i, answer in zip(part, answers, strict=True):
            outputs[i] = Output(tests[i].prompt, answer)
        for (i, sequence), predicted in zip(
            forced.items(), _predict(model, list(forced.values())), strict=True
        ):
            outputs[i] = replace(
                outputs[i], expected=tuple(sequence.target_ids), predicted=predicted
            )
        if progress is not None:
            progress(len(outputs), len(tests))
    return [outputs[i] for i in range(len(tests))]


def pad_right(rows: Seq[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both [rows, longest].

    Padding goes to the right, where a causal model cannot see it: positions stay as they are.
    """
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask


@torch.no_grad()
def _predict(model: Any, sequences: Seq[Sequence]) -> list[tuple[int, ...]]:
    """The most likely token at each target token, given the prompt and the target up to it."""
    if not sequences:
        return []
    texts = [s.prompt_ids + s.target_ids[:-1] for s in sequences]
    ids, mask = pad_right(texts, model.get_input_embeddings().weight.device)
    first = min(len(s.prompt_ids) for s in sequences) - 1
    keep = ids.shape[1] - first
    with evaluation_mode(model):
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits
    best = logits.argmax(-1).tolist()
    return [
        tuple(row[len(s.prompt_ids) - 1 - first : len(text) - first])
        for row, s, text in zip(best, sequences, texts, strict=True)
    ]


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
    return float(answer.stopped and answer.text.strip() == expected.strip())


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


def _mean_over_edits(rows: Seq[dict[str, Any]], kind: str, score: str) -> float | None:
    return _mean([_mean([test[score] for test in row[kind]]) for row in rows])


def _mean(scores: Seq[float | None]) -> float | None:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known) if known else None
