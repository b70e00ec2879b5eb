"""Changes of the model that one engine serves, or several: asked for, made one at a time, and
reported with the engine's answers before and after.

Several API servers may share the engine. What is under way and what was done is known to the worker
and to its journal; a service knows its own requests only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger
from vllm.renderers.online_renderer import OnlineRenderer

from ultraedit_kernels.integrations.vllm import deltas
from ultraedit_kernels.integrations.vllm.answers import (
    Asked,
    Reader,
    answer_of,
    content_of,
    ms_since,
    note_of,
    read_body,
    recorded_request,
)
from ultraedit_kernels.integrations.vllm.commit import Turn, check_connector, take_turn
from ultraedit_kernels.integrations.vllm.protocol import ApplyQuery, EditError, EditsBody
from ultraedit_kernels.integrations.vllm.queue import Queue, Tasks, Waiting
from ultraedit_kernels.integrations.vllm.reports import Reports
from ultraedit_kernels.integrations.vllm.served import Served, goes_on
from ultraedit_kernels.integrations.vllm.tokenizer import (
    load_tokenizer,
    penalties_of,
    stop_tokens,
)
from ultraedit_kernels.integrations.vllm.workers import Engines, History, Result
from ultraedit_kernels.settings import ServingSettings, check, only

logger = init_logger("vllm.ultraedit")


class EditService:
    """Turns, one at a time.

    Args:
        engine: what the server talks to its engines through.
        renderer: the server's; None outside a server.

    Attributes:
        engines: the workers' calls.
    """

    def __init__(self, engine: EngineClient, renderer: OnlineRenderer | None = None) -> None:
        config = engine.vllm_config
        self._engine, self.engines = engine, Engines(engine)
        self._settings = dict(config.additional_config.get("ultraedit", {}))
        check(self._settings, "operator")
        self._own = ServingSettings(**only(self._settings, ServingSettings))
        self._max_length: int = config.model_config.max_model_len
        self._rendering = Served.rendering_of(renderer)
        makes_prompts = None if renderer is None else renderer.renderer
        self._tokenizer = load_tokenizer(config, self._rendering, makes_prompts)
        self._rendering = self._rendering.resolved(self._tokenizer)
        self._served = Served(renderer, self._tokenizer)
        self._penalties = penalties_of(config.model_config)
        self._reader = Reader(engine, self._served, self._penalties)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="ultraedit")
        self._queue, self._tasks = Queue(self._own.max_queue), Tasks()
        self._reports = Reports(self._settings.get("state_dir"))
        self._refusal = why_no_edits(config.parallel_config)
        self._stales_cache = True
        self._stops: list[int] = []

    @property
    def waiting(self) -> int:
        """Changes that are under way or wait."""
        return len(self._queue)

    def changes(self) -> list[dict[str, Any]]:
        """These, in their order, as `protocol.Change` has them."""
        return self._queue.changes()

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
                "--worker-extension-cls "
                "ultraedit_kernels.integrations.vllm.extension.UltraEditExtension"
            )
        has_twin = parallel.pipeline_parallel_size == 1
        rendering = self._rendering.as_data()
        try:
            info = (await self.engines.leader.start(self._settings, rendering, False))[0]
            followers = self.engines.followers
            for rank in await followers.start(self._settings, rendering, True):
                if rank["version"] != info["version"]:
                    raise EditError(
                        500,
                        f"an engine found version {rank['version']} in the state directory and the "
                        f"first one {info['version']}; all need the same directory",
                    )
            difference = info["difference"]
            if has_twin and difference is None:  # or another server has done it
                difference = await self._check_twin()
        except EditError as error:
            raise RuntimeError(f"UltraEdit cannot start: {error}") from None
        await self._check_rendering()
        self._stales_cache = not info["last_layer_only"]
        if self._stales_cache and self._own.reset_prefix_cache:
            check_connector(self._engine.vllm_config.kv_transfer_config)
        await self._engine.update_weight_version(str(info["version"]))
        modules = ", ".join(info["modules"])
        logger.info("UltraEdit: serving version %d, editing %s", info["version"], modules)
        if has_twin:
            logger.info("UltraEdit: twin and engine differ by %.2g nats a token", difference)
        if self._refusal:
            logger.info("UltraEdit: only delta files are taken, %s", self._refusal)

    async def _check_rendering(self) -> None:
        """See that what is taught is what users get, and say where it is not."""
        await self._served.compare()
        self._stops = stop_tokens(self._engine.vllm_config.model_config, self._tokenizer)
        self._served.warn_of_end(self._stops)
        if self._penalties.any:
            logger.warning(
                "UltraEdit: by default this server samples with %s: edits are made without, and "
                "answers are reported with it",
                self._penalties,
            )

    def _why_other(self, end: int) -> str:
        """Why the engine may answer otherwise than the editor found."""
        if end not in self._stops:
            return goes_on(self._tokenizer, end, self._stops)
        return f"by default it samples with {self._penalties}" if self._penalties.any else ""

    async def _check_twin(self) -> float:
        """Compare the twin with the engine on texts that the engine samples from nothing."""
        ends = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        first = next((token for token in ends if token is not None), 0)
        texts = await self._reader.own_texts(first, self._max_length)
        return (await self.engines.leader.check(*texts))["difference"]

    async def run(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Do the work to its end even if the client that waits for it goes away."""
        return await self._tasks.run(work)

    async def edit_once(self, body: EditsBody) -> dict[str, Any]:
        """As `edit`. A body whose idempotency key is that of a version is not run again: it gets
        that version's answer, with what the engine answers now, and timings of its own."""
        if self._refusal:
            raise EditError(
                501,
                f"this server computes no edits: {self._refusal}; compute them on another server "
                "or with `ultraedit edit`, and send the delta file to POST /v1/edits/apply",
            )
        content = content_of(body)
        if (key := body.idempotency_key) is None:
            return await self.run(self.edit(body, content))
        return await self._tasks.run_once(key, content, lambda: self.edit(body, content))

    async def edit(self, body: EditsBody, content: str) -> dict[str, Any]:
        """One turn, which other requests that wait may share. `before` and `after` are greedy
        answers of the serving engine, read up to the target's length and a little more; in a dry
        run `after` is the shadow's answer.

        An edit succeeded if the editor finds that greedy decoding gives the target and stops, and
        the engine, once it serves the new weights, answers just the target.

        Timings in milliseconds: `queue_ms` waiting for earlier turns; `capture_ms` and `solve_ms`
        in the worker, engine steps between slices included; `commit_ms` from the finished turn
        until the engine serves the new weights; `pause_ms` the longest time that this turn kept the
        engine from stepping, be it for one slice of work or for the commit; `total_ms` all of it,
        with reading the answers.

        Args:
            body: the request.
            content: its digest, see `answers.content_of`.
        """
        begun, loop = time.perf_counter(), asyncio.get_running_loop()
        asked = await loop.run_in_executor(
            self._tokenizing,
            read_body,
            body,
            content,
            self._tokenizer,
            self._max_length,
            begun,
            self._served,
        )
        waiting = Waiting(asked, begun=begun)
        async with self._queue.turn_of(waiting):
            if waiting.answer is None:
                await self._edit(self._queue.sharing(waiting))
        assert waiting.answer is not None
        if isinstance(waiting.answer, EditError):
            raise waiting.answer
        return waiting.answer

    async def apply(self, data: bytes, asked: ApplyQuery | None = None) -> dict[str, Any]:
        """Commit a delta file that was computed elsewhere, as one turn; or what is asked."""
        asked, waiting = asked or ApplyQuery(), Waiting(kind="apply")
        keys = [asked.idempotency_key] if asked.idempotency_key is not None else []
        async with self._queue.turn_of(waiting), self._turn(keys) as turn:
            return await deltas.apply(turn, data, asked, waiting.begun)

    async def rollback(self, version: int, serving: str | None = None) -> dict[str, Any]:
        """Serve an earlier version, bit for bit, and forget the later ones; with `serving`, only
        if that is the digest of what is served."""
        waiting = Waiting(kind="rollback")
        async with self._queue.turn_of(waiting), self._turn() as turn:
            return await deltas.rollback(turn, version, serving, waiting.begun)

    async def history(self, limit: int, before: int | None) -> History:
        """Journal entries below version `before`, newest first, each with what the engine said
        before and after, see `Reports.of`."""
        history = await self.engines.leader.history(limit, before)
        entries = await asyncio.to_thread(self._reports.beside, history["entries"])
        return {**history, "entries": entries}

    async def status(self, digest: bool) -> list[dict[str, Any]]:
        """What every rank of every engine serves."""
        ranks = await self.engines.all.status(digest)
        each = len(ranks) // len(self.engines.all)
        return [{**one, "engine": i // each, "rank": i % each} for i, one in enumerate(ranks)]

    async def delta(self, version: int) -> bytes:
        """The delta file of a version."""
        return await self.engines.leader.delta(version)

    def _turn(self, keys: list[str] | None = None) -> AbstractAsyncContextManager[Turn]:
        return take_turn(self._engine, self.engines, self._own, self._stales_cache, keys or [])

    async def _edit(self, together: list[Waiting]) -> None:
        """Give each an answer; one by one if they are refused together."""
        try:
            await self._edit_together(together)
        except EditError as error:
            if len(together) == 1 or error.status >= 500:
                _answer_all(together, error)
                return
            for waiting in together:
                if waiting.answer is None:
                    await self._edit([waiting])
        except BaseException as error:
            _answer_all(together, EditError(500, f"the turn failed: {error}"))
            raise

    async def _edit_together(self, together: list[Waiting]) -> None:
        """Give each an answer, of one turn, or of an earlier one that the journal has."""
        pairs = [(waiting, waiting.asked) for waiting in together if waiting.asked is not None]
        keys = [asked.key for _, asked in pairs if asked.key and not asked.dry_run]
        async with self._turn(keys) as turn:
            for waiting, asked in pairs:
                if asked.key and (record := turn.known.get(asked.key)) is not None:
                    waiting.answer = await self._recorded(asked, record)
            rest = [(waiting, asked) for waiting, asked in pairs if waiting.answer is None]
            if not rest:
                return
            queue_ms = [ms_since(waiting.begun) for waiting, _ in rest]
            requests = [asked for _, asked in rest]
            before = [await self._reader.answers(asked.probes) for asked in requests]
            result, after, timings = await self._change(turn, requests, before)
        version, answers, first = result["version"], [], 0
        for i, (waiting, asked) in enumerate(rest):
            outcomes = result["edits"][first : first + len(asked.requests)]
            first += len(asked.requests)
            own = {"queue_ms": queue_ms[i], **timings}
            answer = answer_of(version, asked, outcomes, before[i], after[i], own, self._why_other)
            waiting.answer = answer | {x: result[x] for x in ("rejected", "protected")}
            answers.append(waiting.answer)
        if not (dry_run := requests[0].dry_run):
            await asyncio.to_thread(self._reports.write, version, result["digest"], answers)
        _log("dry run" if dry_run else f"version {version}", answers)

    async def _change(
        self, turn: Turn, together: list[Asked], before: list[list[str]]
    ) -> tuple[Result, list[list[str]], dict[str, float]]:
        """Make the edits; what they came to, the answers after them, and the timings."""
        requests = [request for asked in together for request in asked.requests]
        dry_run = together[0].dry_run
        probes = together[0].asked_after if dry_run else None
        heard = [
            text
            for asked, texts in zip(together, before, strict=True)
            for text in texts[: len(asked.requests)]
        ]
        result = await turn.edit(requests, heard, probes, note_of(together, before))
        if dry_run:
            assert probes is not None
            said = zip(probes, result["answers"], strict=True)
            texts = [self._served.text_of(p["ids"], ids, p["chat"]) for p, ids in said]
            commit_ms, after = 0.0, [texts]
        else:
            commit_ms = await turn.commit(result["version"])
            try:
                after = [await self._reader.answers(asked.asked_after) for asked in together]
            except Exception as error:
                raise EditError(
                    500,
                    f"version {result['version']} is committed and served, but the engine's "
                    f"answers could not be read: {error}",
                ) from error
        timings = {
            "capture_ms": result["timings"]["capture_ms"],
            "solve_ms": result["timings"]["solve_ms"],
            "commit_ms": commit_ms,
            "pause_ms": turn.pause_ms,
        }
        return result, after, timings

    async def _recorded(self, asked: Asked, record: dict[str, Any]) -> dict[str, Any] | EditError:
        """The answer to a request whose idempotency key is in the journal."""
        try:
            request = recorded_request(asked, record)
        except EditError as error:
            return error
        outcomes = record["edits"][request["first"] :][: len(asked.requests)]
        after = await self._reader.answers(asked.asked_after)
        timings = dict.fromkeys(
            ("queue_ms", "capture_ms", "solve_ms", "commit_ms", "pause_ms"), 0.0
        )
        version, before, why = record["version"], request["before"], self._why_other
        answer = answer_of(version, asked, outcomes, before, after, timings, why)
        return answer | {"again": True, "protected": record["guards"].get("protected", 1.0)}


def why_no_edits(parallel: Any) -> str:
    """Why a server with vLLM's `ParallelConfig` computes no edits; empty if it does."""
    if (stages := parallel.pipeline_parallel_size) > 1:
        return (
            f"each of its {stages} pipeline stages holds only some of the layers, and the "
            "gradients of an edit pass through all that follow it"
        )
    if parallel.data_parallel_external_lb or parallel.data_parallel_hybrid_lb:
        return (
            "an external load balancer spreads requests over several servers, which an edit on "
            "one of them would not reach"
        )
    return ""


def _log(what: str, answers: list[dict[str, Any]]) -> None:
    edits = [edit for answer in answers for edit in answer["edits"]]
    logger.info(
        "UltraEdit: %s: %d of %d edits succeeded, of %d requests",
        what,
        sum(edit["succeeded"] for edit in edits),
        len(edits),
        len(answers),
    )


def _answer_all(together: list[Waiting], error: EditError) -> None:
    for waiting in together:
        if waiting.answer is None:
            waiting.answer = error
