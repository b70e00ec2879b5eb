"""What the engine answers to an edit's prompts, before and after, and what the client is told."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError
from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.workers import OWN_REQUESTS, ProbeData
from ultraedit_kernels.model.encoding import encode, encode_prompt, says_just
from ultraedit_kernels.model.request import EditRequest, check_turn, prompt_key

ANSWER_TOKENS = 16
"""Least number of tokens that a prompt's answer is read to."""
SPARE_TOKENS = 4
"""Tokens beyond the target's that are read, to see whether the model stops there."""
CHECK_TOKENS = 32
"""Length of the text by which twin and engine are compared at the start."""


@dataclass(frozen=True)
class Asked:
    """A request to edit, read once: what it asks for, and the prompts to ask the engine.

    Attributes:
        requests: the edits.
        probes: one per edit, then all locality prompts.
        dry_run: whether nothing is to be committed.
        key: idempotency key.
        content: digest of the body, by which the same body is known again.
        begun: when it came, by `time.perf_counter`.
    """

    requests: list[EditRequest]
    probes: list[ProbeData]
    dry_run: bool
    key: str | None
    content: str
    begun: float = field(default_factory=time.perf_counter)

    @property
    def prompts(self) -> set[str]:
        """All that are taught something."""
        return {prompt_key(p) for r in self.requests for p in (r.prompt, *r.rephrases)}


def content_of(body: EditsBody) -> str:
    """The digest of a body, hexadecimal."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def read_body(
    body: EditsBody, content: str, tokenizer: Any, max_length: int, begun: float
) -> Asked:
    """Check a request, and find the prompts to ask. Takes as long as tokenising does.

    Args:
        body: the request.
        content: its digest.
        tokenizer: of the model.
        max_length: most tokens of a prompt and its answer.
        begun: when it came.

    Raises:
        EditError: an edit is not one, or two do not go together.
    """
    requests, asked, protected = [], [], []
    for i, edit in enumerate(body.edits):
        try:
            request = EditRequest(**edit.model_dump())
            for j, prompt in enumerate((request.prompt, *request.rephrases)):
                what = f"rephrases[{j - 1}]" if j else "prompt"
                one = encode(tokenizer, prompt, request.target)
                answer = len(one.target_ids)
                wanted = answer + SPARE_TOKENS
                probe = _probe(what, one.prompt_ids, answer, wanted, max_length)
                if not j:
                    asked.append(probe)
            for j, prompt in enumerate(request.locality):
                ids = encode_prompt(tokenizer, prompt)
                protected.append(_probe(f"locality[{j}]", ids, 1, ANSWER_TOKENS, max_length))
        except TemplateError as error:
            raise EditError(
                400,
                f"edits[{i}]: the model's chat template refuses the messages: {error}",
                f"edits[{i}]",
            ) from error
        except (ValueError, TypeError) as error:
            raise EditError(400, f"edits[{i}]: {error}", f"edits[{i}]") from error
        requests.append(request)
    try:
        check_turn(requests)
    except ValueError as error:
        raise EditError(400, str(error), "edits") from error
    key = body.idempotency_key
    return Asked(requests, asked + protected, body.dry_run, key, content, begun)


def _probe(what: str, ids: list[int], answer: int, wanted: int, max_length: int) -> ProbeData:
    room = max_length - len(ids)
    if not ids:
        raise ValueError(f"{what} has no tokens, expected at least one; write a longer prompt")
    if answer > room:
        raise ValueError(
            f"{what} has {len(ids)} tokens and its answer {answer}, expected at most "
            f"{max_length} together, the model's length; shorten it"
        )
    return {"ids": ids, "max_tokens": min(room, max(wanted, ANSWER_TOKENS))}


class Reader:
    """Asks the engine, by requests like any other.

    Args:
        engine: which serves.
    """

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def answers(self, probes: Seq[ProbeData]) -> list[str]:
        """What the engine answers, greedily, to each."""
        return list(await asyncio.gather(*(self._answer(probe) for probe in probes)))

    async def own_text(self, first: int, max_length: int) -> tuple[list[int], list[float]]:
        """A text that the engine samples from one token: its token ids, and the engine's scores of
        every token but the first."""
        params = SamplingParams(
            seed=0,
            max_tokens=min(CHECK_TOKENS, max_length - 1),
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = await self._generate([first], params)
        scores = [row[t].logprob for row, t in zip(text.logprobs, text.token_ids, strict=True)]
        return [first, *text.token_ids], scores

    async def _answer(self, probe: ProbeData) -> str:
        params = SamplingParams(
            temperature=0.0,
            max_tokens=probe["max_tokens"],
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return (await self._generate(probe["ids"], params)).text.strip()

    async def _generate(self, ids: list[int], params: SamplingParams) -> Any:
        name = f"{OWN_REQUESTS}{uuid.uuid4().hex}"
        request = self._engine.generate(tokens_input(ids), params, name)
        async for output in request:
            answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a prompt's answer with {answer.finish_reason!r}")
        return answer


def other_body() -> EditError:
    """The error of an idempotency key that comes with another body."""
    return EditError(
        409,
        "idempotency_key was used with another body, expected the same body as the first time; "
        "send a new key with a new request",
        "idempotency_key",
    )


def note_of(together: Seq[Asked], before: Seq[list[str]]) -> dict[str, Any] | None:
    """What the journal keeps of the requests of a turn that have an idempotency key."""
    requests, first = [], 0
    for asked, old in zip(together, before, strict=True):
        if asked.key is not None:
            request = {"key": asked.key, "body": asked.content}
            requests.append(request | {"first": first, "before": old})
        first += len(asked.requests)
    return {"requests": requests} if requests else None


def recorded_request(asked: Asked, record: dict[str, Any]) -> dict[str, Any]:
    """What the note in a version's record says about a request whose key it has.

    Raises:
        EditError: it had another body.
    """
    (request,) = (r for r in record["note"]["requests"] if r["key"] == asked.key)
    if request["body"] != asked.content:
        raise other_body()
    return request


def answer_of(
    version: int,
    asked: Asked,
    outcomes: Seq[dict[str, Any]],
    before: Seq[str],
    after: Seq[str],
    timings: dict[str, float],
) -> dict[str, Any]:
    """The answer to a request, of its edits' outcomes and the answers to its probes. An edit has
    succeeded if the editor says so, and the engine answers just the target."""
    count = len(asked.requests)
    edits = [
        {
            "prompt": request.prompt,
            "target": request.target,
            "before": old,
            "after": new,
            "succeeded": outcome["succeeded"] and says_just(new, request.target),
            "rounds": outcome["rounds"],
        }
        for request, outcome, old, new in zip(
            asked.requests, outcomes, before[:count], after[:count], strict=True
        )
    ]
    specificity = _specificity(asked, before[count:], after[count:])
    timings = timings | {"total_ms": ms_since(asked.begun)}
    return {"version": version, "edits": edits, "specificity": specificity, "timings": timings}


def _specificity(asked: Asked, before: Seq[str], after: Seq[str]) -> dict[str, Any]:
    prompts = [prompt for request in asked.requests for prompt in request.locality]
    answers = [
        {"prompt": prompt, "before": old, "after": new, "unchanged": old == new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    share = sum(old == new for old, new in zip(before, after, strict=True))
    return {"score": share / len(answers) if answers else None, "prompts": answers}


def ms_since(begun: float) -> float:
    """Milliseconds since a time of `time.perf_counter`."""
    return (time.perf_counter() - begun) * 1e3
