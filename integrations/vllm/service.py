"""Turns on one engine: queued, prepared in the worker, committed so that no request goes on with
keys and values of the old weights, and reported with the engine's answers before and after.

Several API servers may share the engine. What is under way and what was done is known to the worker
and to its journal; a service knows its own requests only.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from jinja2 import TemplateError
from vllm.engine.protocol import EngineClient
from vllm.inputs import tokens_input
from vllm.logger import init_logger
from vllm.renderers.chat_utils import load_chat_template
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ultraedit_kernels.integrations.vllm.engines import ALL, FOLLOWERS, LEADER, Engines
from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.worker import OWN_REQUESTS, load_tokenizer
from ultraedit_kernels.model.encoding import encode, encode_prompt
from ultraedit_kernels.model.request import EditRequest, check_turn

logger = init_logger("vllm.ultraedit")

ANSWER_TOKENS = 16
"""Least number of tokens that a prompt's answer is read to."""
SPARE_TOKENS = 4
"""Tokens beyond the target's that are read, to see whether the model stops there."""
CHECK_TOKENS = 32
"""Length of the text by which twin and engine are compared at the start."""
SLICE_MS = 4.0
"""Milliseconds of a turn's work between two engine steps."""
STEPS = 3
"""Steps that an engine with requests makes between two slices, besides the one that it is at. Only
so many of them are held up, and a commit, which holds up two, comes as seldom."""
IDLE_MS = 2.5
"""An engine that keeps a slice waiting for less has no steps to make."""
POLL = 0.002
"""Seconds between two questions whether work that goes on beside the engine is done."""
MERGED_EDITS = 32
"""Most edits of different requests that share a turn."""
LEASE = 60.0
"""Seconds after which a turn is dropped whose server is not heard of."""
BUSY = 0.05
"""Seconds between two questions whether the turn of another server is over."""


@dataclass(frozen=True)
class Probe:
    """A prompt as the engine gets it, and how many tokens of the answer to read."""

    ids: list[int]
    max_tokens: int


@dataclass(frozen=True)
class Settings:
    """Of the service; those of the editor are the worker's."""

    slice_ms: float = SLICE_MS
    """How long the engine may be kept from stepping at a time while a turn is prepared."""
    reset_prefix_cache: bool = True
    """Off: requests may go on with, and find, keys and values of the old weights."""
    running_requests: Literal["keep", "wait"] = "keep"
    """What a commit does where it stales keys and values: requests under way are computed anew up
    to where they are and go on, or are waited for, and new ones wait as well."""
    max_queue: int = 64
    """Most changes under way or waiting."""

    @classmethod
    def take(cls, settings: dict[str, Any]) -> Settings:
        """Those out of all settings, which lose them. Raises ValueError for a bad one."""
        names = [name for name in cls.__dataclass_fields__ if name in settings]
        taken = cls(**{name: settings.pop(name) for name in names})
        number = isinstance(taken.slice_ms, (int, float)) and not isinstance(taken.slice_ms, bool)
        whole = isinstance(taken.max_queue, int) and not isinstance(taken.max_queue, bool)
        for name, good, expected in (
            ("slice_ms", number and taken.slice_ms > 0, "a number of milliseconds above 0"),
            ("reset_prefix_cache", isinstance(taken.reset_prefix_cache, bool), "true or false"),
            ("running_requests", taken.running_requests in ("keep", "wait"), '"keep" or "wait"'),
            ("max_queue", whole and taken.max_queue > 0, "a whole number above 0"),
        ):
            if not good:
                raise ValueError(f"{name} is {getattr(taken, name)!r}, expected {expected}")
        return taken


@dataclass(eq=False)
class Waiting:
    """A change that waits for its turn; a request to edit may share one with others."""

    body: EditsBody | None = None
    content: str = ""
    """Digest of the body."""
    probes: list[Probe] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)
    answer: dict[str, Any] | EditError | None = None

    @property
    def prompts(self) -> set[str]:
        edits = self.body.edits if self.body else []
        return {str(prompt) for edit in edits for prompt in (edit.prompt, *edit.rephrases)}


class EditService:
    """Turns, one at a time, on one engine."""

    def __init__(self, engine: EngineClient, chat_template: str | None) -> None:
        config = engine.vllm_config
        self._engine = engine
        self._engines = Engines(engine)
        self._settings = dict(config.additional_config.get("ultraedit", {}))
        self._own = Settings.take(self._settings)
        self._max_length: int = config.model_config.max_model_len
        self._chat_template = load_chat_template(chat_template)
        self._tokenizer = load_tokenizer(config.model_config, self._chat_template)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="ultraedit")
        self._lock = asyncio.Lock()
        self._queue: list[Waiting] = []  # in the order of the lock, the one that holds it included
        self._keys: dict[str, tuple[str, asyncio.Task[dict[str, Any]]]] = {}
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()
        self._refusal = _refusal(config.parallel_config)
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
        given = self._settings, self._chat_template
        has_twin = parallel.pipeline_parallel_size == 1
        try:
            info = await self._rpc("ultraedit_start", *given, False)
            followers = await self._rpc_all("ultraedit_start", *given, True, engines=FOLLOWERS)
            for rank in followers:
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
        self._stales_cache = not info["last_layer_only"]
        await self._engine.update_weight_version(str(info["version"]))
        modules = ", ".join(info["modules"])
        logger.info("UltraEdit: serving version %d, editing %s", info["version"], modules)
        if has_twin:
            logger.info("UltraEdit: twin and engine differ by %.2g nats a token", difference)
        if self._refusal:
            logger.info("UltraEdit: only delta files are taken, %s", self._refusal)

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
        """As `edit`. A body whose idempotency key is that of a version is not run again: it gets
        that version's answer, with what the engine answers now, and timings of its own."""
        if self._refusal:
            raise EditError(
                501,
                f"this server computes no edits: {self._refusal}; compute them on another server "
                "or with `ultraedit edit`, and send the delta file to POST /v1/edits/apply",
            )
        key = body.idempotency_key
        content = hashlib.sha256(body.model_dump_json().encode()).hexdigest()
        if key is None:
            return await self.run(self.edit(body, content))
        if not (again := key in self._keys):
            task = self._spawn(self.edit(body, content))
            task.add_done_callback(lambda _: self._keys.pop(key, None))
            self._keys[key] = content, task
        first, task = self._keys[key]
        if first != content:
            raise _other_body()
        answer = await asyncio.shield(task)
        return answer | {"again": True} if again else answer

    async def edit(self, body: EditsBody, content: str) -> dict[str, Any]:
        """One turn, which other requests that wait may share. `before` and `after` are greedy
        answers of the serving engine, read up to the target's length and a little more; in a dry
        run `after` is the shadow's answer.

        An edit succeeded if the editor finds that greedy decoding gives the target and stops, and
        the engine, once it serves the new weights, answers just the target.

        Timings in milliseconds: `queue_ms` waiting for earlier turns; `capture_ms` and `solve_ms`
        in the worker, engine steps between slices included; `commit_ms` from the finished turn
        until the engine serves the new weights;
        `pause_ms` the longest time that this turn kept the engine from stepping, be it for one
        slice of work or for the commit; `total_ms` all of it, with reading the answers.
        """
        waiting = Waiting(body, content)
        loop = asyncio.get_running_loop()
        waiting.probes = await loop.run_in_executor(self._tokenizing, self._prepare, body)
        async with self._queued(waiting):
            if waiting.answer is None:
                await self._edit(self._sharing(waiting))
        assert waiting.answer is not None
        if isinstance(waiting.answer, EditError):
            raise waiting.answer
        return waiting.answer

    async def apply(self, data: bytes) -> dict[str, Any]:
        """Commit a delta file that was computed elsewhere, as one turn."""
        waiting = Waiting()
        async with self._queued(waiting), self._turn() as (turn, _):
            queue_ms = _ms_since(waiting.begun)
            await self._slice("ultraedit_apply_delta", turn, data, refusal=400)
            result = await self._work(turn, refusal=400)
            await self._follow(turn, data, result["digest"])
            commit_ms = await self._commit(turn, result["version"])
            return await self._version_answer(turn, waiting.begun, queue_ms, commit_ms)

    async def rollback(self, version: int) -> dict[str, Any]:
        """Serve an earlier version, bit for bit, and forget the later ones."""
        waiting = Waiting()
        async with self._queued(waiting), self._turn() as (turn, _):
            queue_ms = _ms_since(waiting.begun)
            newest = (await self._rpc("ultraedit_status", False))["version"]
            if version > newest:
                raise EditError(
                    400,
                    f"version is {version}, expected 0 to {newest}; 0 is the untouched model, "
                    "GET /v1/edits lists the others",
                    "version",
                )
            # The journal is the first engine's: it decides when the others can follow.
            for engines in [FOLLOWERS, LEADER] if len(self._engines) > 1 else [LEADER]:
                await self._slice("ultraedit_rollback", turn, version, engines=engines)
                await self._work(turn, engines=engines)
            commit_ms = await self._commit(turn, version)
            return await self._version_answer(turn, waiting.begun, queue_ms, commit_ms)

    async def history(self, limit: int, before: int | None) -> dict[str, Any]:
        """Journal entries, newest first."""
        return await self._rpc("ultraedit_history", limit, before)

    async def status(self, digest: bool) -> list[dict[str, Any]]:
        """What every rank of every engine serves."""
        ranks = await self._rpc_all("ultraedit_status", digest, engines=ALL)
        each = len(ranks) // len(self._engines)
        return [{**one, "engine": i // each, "rank": i % each} for i, one in enumerate(ranks)]

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
        name = f"{OWN_REQUESTS}{uuid.uuid4().hex}"
        request = self._engine.generate(tokens_input(ids), params, name)
        async for output in request:
            answer = output.outputs[0]
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine ended a prompt's answer with {answer.finish_reason!r}")
        return answer

    @asynccontextmanager
    async def _queued(self, waiting: Waiting) -> AsyncIterator[None]:
        """One change of this server at a time, first come, first served."""
        if len(self._queue) >= self._own.max_queue:
            raise EditError(
                429,
                f"{len(self._queue)} changes are under way or waiting, expected fewer than "
                f"{self._own.max_queue}; try again later",
            )
        self._queue.append(waiting)
        try:
            async with self._lock:
                yield
        finally:
            self._queue.remove(waiting)

    def _sharing(self, first: Waiting) -> list[Waiting]:
        """The requests that can share a turn with the first: those next to it in the queue."""
        together: list[Waiting] = []
        count, prompts = 0, set[str]()
        for waiting in self._queue[self._queue.index(first) :]:
            body = waiting.body
            if body is None or (together and body.dry_run):
                break  # nothing that waits is overtaken
            count += len(body.edits)
            if together and (count > MERGED_EDITS or prompts & waiting.prompts):
                break
            together.append(waiting)
            prompts |= waiting.prompts
            if body.dry_run:
                break
        return together

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
        bodies = [w.body for w in together if w.body is not None]
        dry_run = bodies[0].dry_run
        keys = [] if dry_run else [b.idempotency_key for b in bodies if b.idempotency_key]
        async with self._turn(keys) as (turn, known):
            for waiting, body in zip(together, bodies, strict=True):
                if (record := known.get(body.idempotency_key)) is not None:
                    waiting.answer = await self._recorded(waiting, body, record)
            rest = [(w, b) for w, b in zip(together, bodies, strict=True) if w.answer is None]
            if not rest:
                return
            queue_ms = [_ms_since(waiting.begun) for waiting, _ in rest]
            before = [await self._answers(waiting.probes) for waiting, _ in rest]
            edits = [edit.model_dump() for _, body in rest for edit in body.edits]
            wanted = [vars(probe) for probe in rest[0][0].probes] if dry_run else None
            note = _note(rest, before)
            followed = len(self._engines) > 1
            await self._slice("ultraedit_edit", turn, edits, wanted, note, followed, refusal=400)
            result = await self._work(turn, refusal=400)
            if dry_run:
                commit_ms, after = 0.0, [result["answers"]]
            else:
                if followed:
                    await self._follow(turn, result["delta"], result["digest"])
                commit_ms = await self._commit(turn, result["version"])
                try:
                    after = [await self._answers(waiting.probes) for waiting, _ in rest]
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
                "pause_ms": self._pause_ms,
            }
        first = 0
        for i, (waiting, body) in enumerate(rest):
            outcomes = result["edits"][first : first + len(body.edits)]
            first += len(body.edits)
            own = {"queue_ms": queue_ms[i], **timings, "total_ms": _ms_since(waiting.begun)}
            answer = _answer(result["version"], body, outcomes, before[i], after[i], own)
            waiting.answer = answer | {"rejected": result["rejected"]}
        logger.info(
            "UltraEdit: %s: %d of %d edits succeeded, of %d requests",
            "dry run" if dry_run else f"version {result['version']}",
            sum(edit["succeeded"] for w, _ in rest for edit in w.answer["edits"]),  # type: ignore
            first,
            len(rest),
        )

    async def _recorded(
        self, waiting: Waiting, body: EditsBody, record: dict[str, Any]
    ) -> dict[str, Any] | EditError:
        """The answer to a request whose idempotency key is in the journal."""
        requests = record["note"]["requests"]
        (request,) = (r for r in requests if r["key"] == body.idempotency_key)
        if request["body"] != waiting.content:
            return _other_body()
        first = request["first"]
        outcomes = record["edits"][first : first + len(body.edits)]
        after = await self._answers(waiting.probes)
        timings = dict.fromkeys(("capture_ms", "solve_ms", "commit_ms", "pause_ms"), 0.0)
        timings |= {"queue_ms": 0.0, "total_ms": _ms_since(waiting.begun)}
        answer = _answer(record["version"], body, outcomes, request["before"], after, timings)
        return answer | {"again": True}

    @asynccontextmanager
    async def _turn(self, keys: Seq[str] = ()) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Have the worker for a turn: its id, and the records of idempotency keys. At its end what
        it has not committed is dropped."""
        turn = uuid.uuid4().hex
        while "busy" in (answer := await self._rpc("ultraedit_begin", turn, list(keys))):
            if answer["idle"] > LEASE:
                logger.warning("UltraEdit: dropping a turn whose server is not heard of")
                await self._cancel(answer["busy"])
            else:
                await asyncio.sleep(BUSY)
        try:
            await self._rpc_all("ultraedit_begin", turn, [], engines=FOLLOWERS)
            if await self._engine.is_paused():
                raise EditError(
                    503, "the engine is paused or asleep, expected it to serve; resume it first"
                )
            self._pause_ms = 0.0
            yield turn, answer["known"]
        finally:
            try:
                await self._cancel(turn)
            except Exception:
                logger.exception("UltraEdit: a turn could not be ended")

    async def _cancel(self, turn: str) -> None:
        """The first engine last: whose turn it has the others are free for."""
        try:
            if len(self._engines) > 1:
                newest = (await self._rpc("ultraedit_status", False))["newest"]
                await self._rpc_all("ultraedit_cancel", turn, newest, engines=FOLLOWERS)
        finally:
            await self._rpc("ultraedit_cancel", turn)

    async def _follow(self, turn: str, delta: bytes, digest: str) -> None:
        """Make the first engine's change on the shadows of the others."""
        if len(self._engines) == 1:
            return
        await self._slice("ultraedit_apply_delta", turn, delta, engines=FOLLOWERS)
        result = await self._work(turn, engines=FOLLOWERS)
        if result["digest"] != digest:
            raise RuntimeError(
                f"an engine's weights would have digest {result['digest']}, the first one's "
                f"{digest}; nothing was changed. The engines compute differently: start them on "
                "equal devices"
            )

    async def _work(self, turn: str, refusal: int = 500, engines: slice = LEADER) -> dict[str, Any]:
        """Do the turn's work, slice by slice."""
        while True:
            asked = time.perf_counter()
            answer = await self._slice(
                "ultraedit_step", turn, self._own.slice_ms, refusal=refusal, engines=engines
            )
            if answer["done"]:
                return answer["result"]
            if answer["beside"]:
                await asyncio.sleep(POLL)
            elif _ms_since(asked) - answer["ms"] > IDLE_MS:
                for _ in range(STEPS):
                    await self._engine.is_paused()  # is answered between two steps

    async def _commit(self, turn: str, version: int) -> float:
        """Change the live weights between two engine steps; the milliseconds it took.

        Keys and values above an edited layer are stale with its new weights. Where there are such,
        the engine is held meanwhile: running requests stay, lose their blocks and are computed
        anew when it goes on, streams included, or have been waited for; and cached prefixes are
        dropped. An edit of the last layer's feed-forward block stales nothing: the engine is not
        held at all.
        """
        begun = time.perf_counter()
        if not (self._stales_cache and self._own.reset_prefix_cache):
            await self._switch(turn, version)
            return _ms_since(begun)
        try:
            # `pause_generation` would do, and then sleep 20 ms; this is the same without.
            sleeping = self._engine.sleep(level=0, mode=self._own.running_requests)
            if self._own.running_requests == "wait":
                await sleeping  # the engine has stepped until now
                held = await self.status(False)
            else:
                _, held = await asyncio.gather(sleeping, self.status(False))
            if not await self._engine.reset_prefix_cache(
                reset_running_requests=True, reset_connector=True
            ):
                raise RuntimeError("the engine did not reset its prefix cache")
            committed = await self._switch(turn, version, wake=True)
        except BaseException:
            await self._engine.wake_up(tags=["scheduling"])
            raise
        # By the worker's clock: this process may be busy with what the engine has sent before.
        pauses = [c["at"] - h["at"] for c, h in zip(committed, held, strict=True)]
        self._pause_ms = max(self._pause_ms, *pauses)
        return _ms_since(begun)

    async def _switch(self, turn: str, version: int, wake: bool = False) -> list[dict[str, Any]]:
        """Commit in all workers, or in none. An engine does what it is told in this order, and
        nothing between; each answer would cost the time that the server takes to read it."""
        told: list[Coroutine[Any, Any, Any]] = [
            self._rpc_all("ultraedit_commit", turn, engines=ALL),
            self._engine.update_weight_version(str(version)),
        ]
        if wake:
            told.append(self._engine.wake_up(tags=["scheduling"]))
        committed, *others = await asyncio.gather(*told, return_exceptions=True)
        if isinstance(committed, BaseException):
            if len(self._engines) > 1:
                await self._rpc_all("ultraedit_revert", turn, engines=ALL)
            live = (await self._rpc("ultraedit_status", False))["version"]
            await self._engine.update_weight_version(str(live))
            raise committed
        for error in others:
            if isinstance(error, BaseException):
                raise error
        logger.info("UltraEdit: serving version %d", version)
        self._pause_ms = max(self._pause_ms, *(rank["ms"] for rank in committed))
        return committed

    async def _version_answer(
        self, turn: str, begun: float, queue_ms: float, commit_ms: float
    ) -> dict[str, Any]:
        await self._slice("ultraedit_read_back", turn)
        result = await self._work(turn)
        timings = {
            "queue_ms": queue_ms,
            "commit_ms": commit_ms,
            "pause_ms": self._pause_ms,
            "total_ms": _ms_since(begun),
        }
        return {**result, "timings": timings}

    async def _slice(
        self, method: str, *args: Any, refusal: int = 500, engines: slice = LEADER
    ) -> dict[str, Any]:
        """An RPC that is part of the turn: the engine cannot step while it runs."""
        answer = await self._rpc(method, *args, refusal=refusal, engines=engines)
        self._pause_ms = max(self._pause_ms, answer["ms"])
        return answer

    async def _rpc(
        self, method: str, *args: Any, refusal: int = 500, engines: slice = LEADER
    ) -> dict[str, Any]:
        """The worker's answer, that of the slowest rank. See `_rpc_all`."""
        answers = await self._rpc_all(method, *args, refusal=refusal, engines=engines)
        return next((a for a in answers if not a.get("done", True)), answers[0])

    async def _rpc_all(
        self, method: str, *args: Any, refusal: int = 500, engines: slice = LEADER
    ) -> list[dict[str, Any]]:
        """The answers of all ranks.

        Args:
            refusal: HTTP status of an error that the worker answers with. By default a damaged
                journal's.
            engines: which are asked.
        """
        ranks = await self._engines.call(engines, method, *args)
        answers = [answer for engine in ranks for answer in engine]
        errors = [answer["error"] for answer in answers if "error" in answer]
        errors.sort(key=lambda error: error["type"] == "RankError")  # last: another has the cause
        if errors:
            error = errors[0]
            if error["type"] in ("Failed", "RankError"):
                raise RuntimeError(error["message"])
            if error["type"] == "UnknownVersion":
                raise EditError(404, error["message"], "version")
            if error["type"] == "LostTurn":
                raise EditError(503, error["message"])
            if error["type"] == "GuardError":
                raise EditError(422, error["message"])
            raise EditError(refusal, error["message"])
        return answers

    def _spawn(self, work: Coroutine[Any, Any, dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_failed)
        return task


def _refusal(parallel: Any) -> str:
    """Why this server computes no edits; empty if it does."""
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


def _failed(task: asyncio.Task[Any]) -> bool:
    """Also marks the error as seen: the client that would have got it may be gone."""
    return task.cancelled() or task.exception() is not None


def _other_body() -> EditError:
    return EditError(
        409,
        "idempotency_key was used with another body, expected the same body as the first time; "
        "send a new key with a new request",
        "idempotency_key",
    )


def _answer_all(together: list[Waiting], error: EditError) -> None:
    for waiting in together:
        if waiting.answer is None:
            waiting.answer = error


def _note(rest: list[tuple[Waiting, EditsBody]], before: list[list[str]]) -> dict[str, Any] | None:
    """What the journal keeps of the requests of a turn that have an idempotency key."""
    requests, first = [], 0
    for (waiting, body), old in zip(rest, before, strict=True):
        if body.idempotency_key is not None:
            request = {"key": body.idempotency_key, "body": waiting.content}
            requests.append(request | {"first": first, "before": old})
        first += len(body.edits)
    return {"requests": requests} if requests else None


def _answer(
    version: int,
    body: EditsBody,
    outcomes: Seq[dict[str, Any]],
    before: Seq[str],
    after: Seq[str],
    timings: dict[str, float],
) -> dict[str, Any]:
    count = len(body.edits)
    edits = [
        {
            "prompt": edit.prompt,
            "target": edit.target,
            "before": old,
            "after": new,
            "succeeded": outcome["succeeded"] and new == edit.target.strip(),
            "rounds": outcome["rounds"],
        }
        for edit, outcome, old, new in zip(
            body.edits, outcomes, before[:count], after[:count], strict=True
        )
    ]
    specificity = _specificity(body, before[count:], after[count:])
    return {"version": version, "edits": edits, "specificity": specificity, "timings": timings}


def _specificity(body: EditsBody, before: Seq[str], after: Seq[str]) -> dict[str, Any]:
    prompts: list[Any] = [prompt for edit in body.edits for prompt in edit.locality]
    answers = [
        {"prompt": prompt, "before": old, "after": new, "unchanged": old == new}
        for prompt, old, new in zip(prompts, before, after, strict=True)
    ]
    share = sum(old == new for old, new in zip(before, after, strict=True))
    return {"score": share / len(answers) if answers else None, "prompts": answers}


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1e3
