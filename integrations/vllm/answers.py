"""What the engine answers to an edit's prompts, before and after, and what the client is told."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.served import Served
from ultraedit_kernels.integrations.vllm.workers import OWN_REQUESTS, ProbeData
from ultraedit_kernels.model.encoding import Sequence, encode, encode_prompt, says_just
from ultraedit_kernels.model.forms import form_of, forms_of, other_forms
from ultraedit_kernels.model.generation import Penalties
from ultraedit_kernels.model.request import EditRequest, Prompt, check_turn, prompt_key

ANSWER_TOKENS = 16
"""Least number of tokens that a prompt's answer is read to."""
SPARE_TOKENS = 4
"""Tokens beyond the target's that are read, to see whether the model stops there."""
CHECK_TEXTS, CHECK_TOKENS = 2, 16
"""Number and length of the texts by which twin and engine are compared at the start, which waits
for them."""


@dataclass(frozen=True)
class Asked:
    """A request to edit, read once: what it asks for, and the prompts to ask the engine.

    Attributes:
        requests: the edits.
        probes: one per edit, then all locality prompts.
        others: the edits' questions in other forms, which are asked after the turn: the index of
            the edit, the prompt, the probe.
        ends: per edit, the token that ends its target.
        dry_run: whether nothing is to be committed.
        key: idempotency key.
        content: digest of the body, by which the same body is known again.
        begun: when it came, by `time.perf_counter`.
    """

    requests: list[EditRequest]
    probes: list[ProbeData]
    others: list[tuple[int, Prompt, ProbeData]]
    ends: list[int]
    dry_run: bool
    key: str | None
    content: str
    begun: float = field(default_factory=time.perf_counter)

    @property
    def prompts(self) -> set[str]:
        """All that are taught something."""
        return {prompt_key(p) for r in self.requests for p in (r.prompt, *r.rephrases)}

    @property
    def asked_after(self) -> list[ProbeData]:
        """What is asked after the turn."""
        return [*self.probes, *(probe for _, _, probe in self.others)]


def content_of(body: EditsBody) -> str:
    """The digest of a body, hexadecimal."""
    return hashlib.sha256(body.model_dump_json().encode()).hexdigest()


def read_body(
    body: EditsBody,
    content: str,
    tokenizer: Any,
    max_length: int,
    begun: float,
    served: Served | None = None,
) -> Asked:
    """Check a request, and find the prompts to ask. Takes as long as tokenising does.

    Args:
        body: the request.
        content: its digest.
        tokenizer: of the model.
        max_length: most tokens of a prompt and its answer.
        begun: when it came.
        served: what the server makes of answers; None to take them as they are.

    Raises:
        EditError: an edit is not one, or two do not go together; or one of chat, which is not
            rendered as the server does it, or would not be heard.
    """
    requests, asked, protected, others, ends = [], [], [], [], []
    for i, edit in enumerate(body.edits):
        try:
            request = EditRequest(**edit.model_dump())
            for j, prompt in enumerate((request.prompt, *request.rephrases)):
                what = f"rephrases[{j - 1}]" if j else "prompt"
                one = encode(tokenizer, prompt, request.target, space=request.space)
                if served is not None and not isinstance(prompt, str):
                    _check_chat(served, one, request.target)
                answer = len(one.target_ids)
                wanted = answer + SPARE_TOKENS
                probe = _probe(what, prompt, one.prompt_ids, answer, wanted, max_length)
                if not j:
                    asked.append(probe)
                    ends.append(one.target_ids[-1])
            others += _others(tokenizer, i, request, asked[-1], max_length)
            for j, prompt in enumerate(request.locality):
                ids = encode_prompt(tokenizer, prompt)
                probe = _probe(f"locality[{j}]", prompt, ids, 1, ANSWER_TOKENS, max_length)
                protected.append(probe)
        except (ValueError, TypeError) as error:
            raise EditError(400, f"edits[{i}]: {error}", f"edits[{i}]") from error
        requests.append(request)
    try:
        check_turn(requests)
    except ValueError as error:
        raise EditError(400, str(error), "edits") from error
    key = body.idempotency_key
    return Asked(requests, asked + protected, others, ends, body.dry_run, key, content, begun)


def _check_chat(served: Served, one: Sequence, target: str) -> None:
    """Raise EditError unless a user of the chat endpoint hears the target of an edit that holds."""
    if served.differs:
        raise EditError(501, f"{served.differs}; send the edit as text")
    heard = served.text_of(one.prompt_ids, one.target_ids, chat=True)
    if not says_just(heard, target):
        raise EditError(
            400,
            f"of the answer {target!r} users of the chat would hear {heard!r}: the server's "
            "template or reasoning parser takes the rest for thoughts; serve with a chat template "
            'that closes the thought (--default-chat-template-kwargs {"enable_thinking": false} '
            "where the template knows it), or send the edit as text",
        )


def _others(
    tokenizer: Any, edit: int, request: EditRequest, probe: ProbeData, max_length: int
) -> list[tuple[int, Prompt, ProbeData]]:
    """An edit's question in the forms that the model's template and length allow."""
    found: list[tuple[int, Prompt, ProbeData]] = []
    for prompt in other_forms(request.prompt, request.rephrases):
        try:
            ids = encode_prompt(tokenizer, prompt)
            other = _probe("it", prompt, ids, 1, probe["max_tokens"], max_length)
        except (ValueError, TypeError):
            continue
        found.append((edit, prompt, other))
    return found


def _probe(
    what: str, prompt: Prompt, ids: list[int], answer: int, wanted: int, max_length: int
) -> ProbeData:
    room = max_length - len(ids)
    if not ids:
        raise ValueError(f"{what} has no tokens, expected at least one; write a longer prompt")
    if answer > room:
        raise ValueError(
            f"{what} has {len(ids)} tokens and its answer {answer}, expected at most "
            f"{max_length} together, the model's length; shorten it"
        )
    most = min(room, max(wanted, ANSWER_TOKENS))
    return {"ids": ids, "max_tokens": most, "chat": not isinstance(prompt, str)}


class Reader:
    """Asks the engine, by requests like any other.

    Args:
        engine: which serves.
        served: what the server makes of answers.
        penalties: of the server's default sampling parameters.
    """

    def __init__(self, engine: EngineClient, served: Served, penalties: Penalties) -> None:
        self._engine, self._served, self._penalties = engine, served, penalties

    async def answers(self, probes: Seq[ProbeData]) -> list[str]:
        """What the engine answers, greedily and else by the server's defaults, to each."""
        return list(await asyncio.gather(*(self._answer(probe) for probe in probes)))

    async def own_texts(
        self, first: int, max_length: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Texts that the engine samples from one token: their token ids, and the engine's scores of
        every token but the first."""
        params = SamplingParams(
            n=CHECK_TEXTS,
            seed=0,
            max_tokens=min(CHECK_TOKENS, max_length - 1),
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        texts = await self._generate([first], params)
        return [[first, *text.token_ids] for text in texts], [
            [row[t].logprob for row, t in zip(text.logprobs, text.token_ids, strict=True)]
            for text in texts
        ]

    async def _answer(self, probe: ProbeData) -> str:
        params = SamplingParams(
            temperature=0.0,
            repetition_penalty=self._penalties.repetition,
            presence_penalty=self._penalties.presence,
            frequency_penalty=self._penalties.frequency,
            max_tokens=probe["max_tokens"],
            skip_special_tokens=not (probe["chat"] and self._served.keep_special),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        (answer,) = await self._generate(probe["ids"], params)
        if not probe["chat"]:
            return str(answer.text)
        return self._served.heard(answer.text, answer.token_ids, probe["ids"])

    async def _generate(self, ids: list[int], params: SamplingParams) -> list[Any]:
        name = f"{OWN_REQUESTS}{uuid.uuid4().hex}"
        request = self._engine.generate(tokens_input(ids), params, name)
        async for output in request:
            answers = output.outputs
        for answer in answers:
            if answer.finish_reason not in ("stop", "length"):
                reason = answer.finish_reason
                raise RuntimeError(f"the engine ended a prompt's answer with {reason!r}")
        return list(answers)


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
    why_other: Callable[[int], str] = lambda end: "",
) -> dict[str, Any]:
    """The answer to a request, of its edits' outcomes and the answers to its probes. An edit has
    succeeded if the editor says so, and the engine answers just the target.

    Args:
        why_other: why the engine may answer otherwise than the editor found, by the token that ends
            the target.
    """
    count, probes = len(asked.requests), len(asked.probes)
    others: list[list[dict[str, Any]]] = [[] for _ in asked.requests]
    for (i, prompt, _), text in zip(asked.others, after[probes:], strict=True):
        others[i].append({"form": form_of(prompt), "prompt": prompt, "after": text})
    edits = []
    for i, (request, outcome) in enumerate(zip(asked.requests, outcomes, strict=True)):
        reason = None
        if not outcome["succeeded"]:
            reason = f"it does not hold after {outcome['rounds']} steps"
        elif not says_just(after[i], request.target):
            why = why_other(asked.ends[i])
            reason = "the server answers otherwise" + (f": {why}" if why else "")
        edits.append(
            {
                "prompt": request.prompt,
                "target": request.target,
                "before": before[i],
                "after": after[i],
                "succeeded": reason is None,
                "reason": reason,
                "rounds": outcome["rounds"],
                "taught": forms_of((request.prompt, *request.rephrases)),
                "other_forms": others[i],
            }
        )
    specificity = _specificity(asked, before[count:probes], after[count:probes])
    timings = timings | {"total_ms": ms_since(asked.begun)}
    return {"version": version, "edits": edits, "specificity": specificity, "timings": timings}


def _specificity(asked: Asked, before: Seq[str], after: Seq[str]) -> dict[str, Any]:
    prompts = [prompt for request in asked.requests for prompt in request.locality]
    answers = [
        {"prompt": prompt, "before": old, "after": new, "unchanged": old.strip() == new.strip()}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    share = sum(bool(answer["unchanged"]) for answer in answers)
    return {"score": share / len(answers) if answers else None, "prompts": answers}


def ms_since(begun: float) -> float:
    """Milliseconds since a time of `time.perf_counter`."""
    return (time.perf_counter() - begun) * 1e3
