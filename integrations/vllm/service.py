"""Turns on one engine: queued, prepared in the worker, committed so that no request goes on with
keys and values of the old weights, and reported with the engine's answers before and after."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.logger import init_logger
from vllm.renderers.chat_utils import load_chat_template
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ultraedit_kernels.data import EditRequest, check_turn
from ultraedit_kernels.encoding import encode, encode_prompt
from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.worker import load_tokenizer

logger = init_logger("vllm.ultraedit")

ANSWER_TOKENS = 16
"""Least number of tokens that a prompt's answer is read to."""
SPARE_TOKENS = 4
"""Tokens beyond the target's that are read, to see whether the model stops there."""
CHECK_TOKENS = 32
"""Length of the text by which twin and engine are compared at the start."""
MAX_KEYS = 1000
"""Idempotency keys that are remembered."""
REFUSALS = {
    "ultraedit_begin": 400,
    "ultraedit_step": 400,
    "ultraedit_apply_delta": 400,
}
"""HTTP status of an error that an RPC answers with. Elsewhere it means a damaged journal: 500."""


@dataclass(frozen=True)
class Probe:
    """A prompt as the engine gets it, and how many tokens of the answer to read."""

    ids: list[int]
    max_tokens: int


class EditService:
    """Turns, one at a time, on one engine."""

    def __init__(self, engine: EngineClient, chat_template: str | None) -> None:
        config = engine.vllm_config
        self._engine = engine
        self._settings = dict(config.additional_config.get("ultraedit", {}))
        # Off: requests may go on with, and find, keys and values of the old weights.
        self._reset_cache = self._settings.pop("reset_prefix_cache", True)
        self._max_length: int = config.model_config.max_model_len
        self._chat_template = load_chat_template(chat_template)
        self._tokenizer = load_tokenizer(config.model_config, self._chat_template)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="ultraedit")
        self._lock = asyncio.Lock()
        self._keys: OrderedDict[str, tuple[str, asyncio.Task[dict[str, Any]]]] = OrderedDict()
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()
        self._stales_cache = True
        self._pause_ms = 0.0  # of the turn that holds the lock

    async def start(self) -> None:
        """Have the worker build twin and editor, and see that the twin is the served model.

        Raises:
            RuntimeError: the server's options or its model do not allow edits.
        """
        if self._tokenizer is None:
            raise RuntimeError(
                "UltraEdit needs a tokenizer, but vLLM was started without one; remove "
                "--skip-tokenizer-init"
            )
        parallel = self._engine.vllm_config.parallel_config
        if not parallel.worker_extension_cls:
            raise RuntimeError(
                "UltraEdit's worker extension is missing; start through `ultraedit serve`, or with "
                "--worker-extension-cls ultraedit_kernels.integrations.vllm.worker.UltraEditWorker"
            )
        for option, count in (
            ("--data-parallel-size", parallel.data_parallel_size),
            ("--api-server-count", parallel._api_process_count),
        ):
            if count > 1:  # turns queue in this process, and one engine commits them
                raise RuntimeError(f"UltraEdit needs {option} 1, got {count}; set it to 1")
        try:
            info = await self._rpc("ultraedit_start", self._settings, self._chat_template)
            difference = await self._check_twin()
        except EditError as error:
            raise RuntimeError(f"UltraEdit cannot start: {error}") from None
        self._stales_cache = not info["last_layer_only"]
        await self._engine.update_weight_version(str(info["version"]))
        modules = ", ".join(info["modules"])
        logger.info("UltraEdit: serving version %d, editing %s", info["version"], modules)
        logger.info("UltraEdit: twin and engine differ by %.2g nats a token", difference)

    async def _check_twin(self) -> float:
        """Compare the twin with the engine on a text that the engine samples from nothing."""
        ends = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        first = next((token for token in ends if token is not None), 0)
        params = SamplingParams(
            seed=0,
            max_tokens=min(CHECK_TOKENS, self._max_length - 1),
            ignore_eos=True,
            logprobs=0,  # of the sampled token alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        text = await self._generate([first], params)
        scores = [row[t].logprob for row, t in zip(text.logprobs, text.token_ids, strict=True)]
        answer = await self._rpc("ultraedit_check", [first, *text.token_ids], scores)
        return answer["difference"]

    async def run(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Do the work to its end even if the client that waits for it goes away."""
        return await asyncio.shield(self._spawn(work))

    async def edit_once(self, body: EditsBody) -> dict[str, Any]:
        """As `edit`; a body with an idempotency key that succeeded is not run again."""
        key = body.idempotency_key
        if key is None:
            return await self.run(self.edit(body))
        content = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        if key not in self._keys:
            task = self._spawn(self.edit(body))
            task.add_done_callback(lambda done: _failed(done) and self._keys.pop(key, None))
            self._keys[key] = content, task
            while len(self._keys) > MAX_KEYS:
                self._keys.popitem(last=False)
        first, task = self._keys[key]
        if first != content:
            raise EditError(
                409,
                "idempotency_key was used with another body, expected the same body as the first "
                "time; send a new key with a new request",
                "idempotency_key",
            )
        return await asyncio.shield(task)

    async def edit(self, body: EditsBody) -> dict[str, Any]:
        """One turn. `before` and `after` are greedy answers of the serving engine, read up to the
        target's length and a little more; in a dry run `after` is the shadow's answer.

        An edit succeeded if the editor finds that greedy decoding gives the target and stops, and
        the engine, once it serves the new weights, answers just the target.

        Timings in milliseconds: `queue_ms` waiting for earlier turns; `capture_ms` and `solve_ms`
        in the worker; `commit_ms` from the finished turn until the engine serves the new weights;
        `pause_ms` the longest time that this turn kept the engine from stepping, be it for one
        slice of work or for the commit; `total_ms` all of it, with reading the answers.
        """
        begun = time.perf_counter()
        loop = asyncio.get_running_loop()
        probes = await loop.run_in_executor(self._tokenizing, self._prepare, body)
        async with self._turn():
            queue_ms = _ms_since(begun)
            before = await self._answers(probes)
            edits = [edit.model_dump() for edit in body.edits]
            wanted = [vars(probe) for probe in probes] if body.dry_run else None
            await self._slice("ultraedit_begin", edits, wanted)
            commit_ms = 0.0
            async with self._undone_on_error():
                while not (step := await self._slice("ultraedit_step"))["done"]:
                    pass
                if not body.dry_run:
                    commit_ms = await self._commit()
            result = step["result"]
            if body.dry_run:
                after = result["answers"]
            else:
                try:
                    after = await self._answers(probes)
                except Exception as error:
                    raise EditError(
                        500,
                        f"version {result['version']} is committed and served, but the engine's "
                        f"answers could not be read: {error}",
                    ) from error
            pause_ms = self._pause_ms
        count = len(body.edits)
        answers = [
            {
                "prompt": edit.prompt,
                "target": edit.target,
                "before": old,
                "after": new,
                "succeeded": outcome["succeeded"] and new == edit.target.strip(),
                "rounds": outcome["rounds"],
            }
            for edit, outcome, old, new in zip(
                body.edits, result["edits"], before[:count], after[:count], strict=True
            )
        ]
        timings = {
            "queue_ms": queue_ms,
            "capture_ms": result["timings"]["capture_ms"],
            "solve_ms": result["timings"]["solve_ms"],
            "commit_ms": commit_ms,
            "pause_ms": pause_ms,
            "total_ms": _ms_since(begun),
        }
        logger.info(
            "UltraEdit: %s: %d of %d edits succeeded",
            "dry run" if body.dry_run else f"version {result['version']}",
            sum(answer["succeeded"] for answer in answers),
            count,
        )
        specificity = _specificity(body, before[count:], after[count:])
        return {
            "version": result["version"],
            "edits": answers,
            "specificity": specificity,
            "timings": timings,
        }

    async def apply(self, data: bytes) -> dict[str, Any]:
        """Commit a delta file that was computed elsewhere, as one turn."""
        begun = time.perf_counter()
        async with self._turn():
            queue_ms = _ms_since(begun)
            await self._slice("ultraedit_apply_delta", data)
            async with self._undone_on_error():
                commit_ms = await self._commit()
            return await self._version_answer(begun, queue_ms, commit_ms)

    async def rollback(self, version: int) -> dict[str, Any]:
        """Serve an earlier version, bit for bit, and forget the later ones."""
        begun = time.perf_counter()
        async with self._turn():
            queue_ms = _ms_since(begun)
            newest = (await self._rpc("ultraedit_status", False))["version"]
            if version > newest:
                raise EditError(
                    400,
                    f"version is {version}, expected 0 to {newest}; 0 is the untouched model, "
                    "GET /v1/edits lists the others",
                    "version",
                )
            commit_ms = await self._commit("ultraedit_rollback", version)
            return await self._version_answer(begun, queue_ms, commit_ms)

    async def history(self, limit: int, before: int | None) -> dict[str, Any]:
        """Journal entries, newest first."""
        return await self._rpc("ultraedit_history", limit, before)

    async def delta(self, version: int) -> bytes:
        """The delta file of a version."""
        return (await self._rpc("ultraedit_delta", version))["data"]

    def _prepare(self, body: EditsBody) -> list[Probe]:
        """Check the turn, and the prompts to ask: one per edit, then all locality prompts."""
        requests, asked, protected = [], [], []
        for i, edit in enumerate(body.edits):
            try:
                request = EditRequest(**edit.model_dump())
                for j, prompt in enumerate((request.prompt, *request.rephrases)):
                    what = f"rephrases[{j - 1}]" if j else "prompt"
                    one = encode(self._tokenizer, prompt, request.target)
                    answer = len(one.target_ids)
                    probe = self._probe(what, one.prompt_ids, answer, answer + SPARE_TOKENS)
                    if not j:
                        asked.append(probe)
                for j, prompt in enumerate(request.locality):
                    ids = encode_prompt(self._tokenizer, prompt)
                    protected.append(self._probe(f"locality[{j}]", ids, 1, ANSWER_TOKENS))
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
        return asked + protected

    def _probe(self, what: str, ids: list[int], answer: int, wanted: int) -> Probe:
        room = self._max_length - len(ids)
        if not ids:
            raise ValueError(f"{what} has no tokens, expected at least one; write a longer prompt")
        if answer > room:
            raise ValueError(
                f"{what} has {len(ids)} tokens and its answer {answer}, expected at most "
                f"{self._max_length} together, the model's length; shorten it"
            )
        return Probe(ids, min(room, max(wanted, ANSWER_TOKENS)))

    async def _answers(self, probes: list[Probe]) -> list[str]:
        return list(await asyncio.gather(*(self._answer(probe) for probe in probes)))

    async def _answer(self, probe: Probe) -> str:
        """What the engine answers, greedily, to a request like any other."""
        params = SamplingParams(
            temperature=0.0, max_tokens=probe.max_tokens, output_kind=RequestOutputKind.FINAL_ONLY
        )
        return (await self._generate(probe.ids, params)).text.strip()

    async def _generate(self, ids: list[int], params: SamplingParams) -> Any:
        request = self._engine.generate(tokens_input(ids), params, f"ultraedit-{uuid.uuid4().hex}")
        async for output in request:
            answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a prompt's answer with {answer.finish_reason!r}")
        return answer

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One change at a time, on an engine that serves."""
        async with self._lock:
            if await self._engine.is_paused():
                raise EditError(
                    503, "the engine is paused or asleep, expected it to serve; resume it first"
                )
            self._pause_ms = 0.0
            yield

    @asynccontextmanager
    async def _undone_on_error(self) -> AsyncIterator[None]:
        """Drop the worker's uncommitted turn if an error, or the server's end, comes first."""
        try:
            yield
        except BaseException:
            try:
                await self._rpc("ultraedit_cancel")
            except Exception:
                logger.exception("UltraEdit: a failed turn could not be cancelled")
            raise

    async def _commit(self, method: str = "ultraedit_commit", *args: Any) -> float:
        """Change the live weights between two engine steps; the milliseconds it took.

        Keys and values above an edited layer are stale with its new weights. Where there are such,
        the engine is held meanwhile: running requests stay, lose their blocks and are computed
        anew when it goes on, streams included; and cached prefixes are dropped. An edit of the last
        layer's feed-forward block stales nothing: the engine is not held at all.
        """
        begun = time.perf_counter()
        if not (self._stales_cache and self._reset_cache):
            await self._switch(method, *args)
            return _ms_since(begun)
        try:
            # `pause_generation` would do, and then sleep 20 ms; this is the same without.
            await self._engine.sleep(level=0, mode="keep")
            if not await self._engine.reset_prefix_cache(
                reset_running_requests=True, reset_connector=True
            ):
                raise RuntimeError("the engine did not reset its prefix cache")
            await self._switch(method, *args)
        finally:
            await self._engine.wake_up(tags=["scheduling"])
            self._pause_ms = max(self._pause_ms, _ms_since(begun))
        return _ms_since(begun)

    async def _switch(self, method: str, *args: Any) -> None:
        answer = await self._slice(method, *args)
        await self._engine.update_weight_version(str(answer["version"]))
        logger.info("UltraEdit: serving version %d", answer["version"])

    async def _version_answer(
        self, begun: float, queue_ms: float, commit_ms: float
    ) -> dict[str, Any]:
        status = await self._slice("ultraedit_status", True)
        timings = {
            "queue_ms": queue_ms,
            "commit_ms": commit_ms,
            "pause_ms": self._pause_ms,
            "total_ms": _ms_since(begun),
        }
        return {"version": status["version"], "digest": status["digest"], "timings": timings}

    async def _slice(self, method: str, *args: Any) -> dict[str, Any]:
        """An RPC that is part of the turn: the engine cannot step while it runs."""
        answer = await self._rpc(method, *args)
        self._pause_ms = max(self._pause_ms, answer["ms"])
        return answer

    async def _rpc(self, method: str, *args: Any) -> dict[str, Any]:
        answers = await self._engine.collective_rpc(method, args=args)
        for answer in answers:
            if error := answer.get("error"):
                if error["type"] == "UnknownVersion":
                    raise EditError(404, error["message"], "version")
                raise EditError(REFUSALS.get(method, 500), error["message"])
        return answers[0]

    def _spawn(self, work: Coroutine[Any, Any, dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_failed)
        return task


def _failed(task: asyncio.Task[Any]) -> bool:
    """Also marks the error as seen: the client that would have got it may be gone."""
    return task.cancelled() or task.exception() is not None


def _specificity(body: EditsBody, before: list[str], after: list[str]) -> dict[str, Any]:
    prompts: list[Any] = [prompt for edit in body.edits for prompt in edit.locality]
    answers = [
        {"prompt": prompt, "before": old, "after": new, "unchanged": old == new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    share = sum(old == new for old, new in zip(before, after, strict=True))
    return {"score": share / len(answers) if answers else None, "prompts": answers}


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1e3
