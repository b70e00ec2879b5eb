"""Calls into vLLM's workers. The one module that knows what the RPCs are called, what goes in and
comes back, and what their errors mean.

Only None, bool, int, float, str, bytes, list and dict cross an RPC. An error that the caller is to
blame for crosses as data, {"error": {"message", "type"}}; anything else is raised. Under tensor
parallelism nothing is raised, as vLLM would stop reading at the first rank's exception and take the
others' answers for those to its next call: such an error has type `FAILED`, and `RankError` on the
ranks where nothing is wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from vllm.engine.protocol import EngineClient

from ultraedit_kernels.integrations.vllm.protocol import EditError
from ultraedit_kernels.integrations.vllm.twin import UnsupportedModelError
from ultraedit_kernels.method.guards import GuardError
from ultraedit_kernels.model.parallel import RankError
from ultraedit_kernels.model.request import EditRequest

OWN_REQUESTS = "ultraedit-"
"""How the ids of the service's requests to the engine begin."""


# Errors


class UnknownVersion(LookupError):
    """The version that was asked for does not exist."""


class LostTurn(RuntimeError):
    """A turn that is not, or no longer, the one under way."""


FAILED = "Failed"
"""Type of an error that is nobody's fault, where it cannot be raised."""
REFUSALS: dict[type[Exception], tuple[int | None, str | None]] = {
    UnknownVersion: (404, "version"),
    LostTurn: (503, None),
    GuardError: (422, None),
    UnsupportedModelError: (None, None),
    ValueError: (None, None),
    TypeError: (None, None),
}
"""Errors that cross as data, subclasses included: HTTP status, if the call does not give it, and
the field that they concern."""


class ErrorData(TypedDict):
    """An error as it crosses: its text, and the name of its class or `FAILED`."""

    message: str
    type: str


def as_data(error: Exception) -> ErrorData | None:
    """An error that the caller is to blame for; None for any other."""
    if isinstance(error, tuple(REFUSALS)):
        return {"message": str(error), "type": type(error).__name__}
    return None


def failure_as_data(error: Exception) -> ErrorData:
    """Any other error, where it must not be raised."""
    kind = RankError.__name__ if isinstance(error, RankError) else FAILED
    return {"message": f"{type(error).__name__}: {error}", "type": kind}


def _as_exception(errors: list[ErrorData], refusal: int) -> Exception:
    """What the errors of some ranks mean to the server."""
    # A RankError says only that another rank has the cause.
    error = min(errors, key=lambda error: error["type"] == RankError.__name__)
    if error["type"] in (FAILED, RankError.__name__):
        return RuntimeError(error["message"])
    known = {kind.__name__: meaning for kind, meaning in REFUSALS.items()}
    status, field = known.get(error["type"], (None, None))
    return EditError(status or refusal, error["message"], field)


# Answers


class Answer(TypedDict, total=False):
    """What every RPC answers with."""

    ms: float
    """Milliseconds that it took."""
    at: float
    """The worker's clock at its end, milliseconds."""
    error: ErrorData


class Started(Answer):
    """Of `start`."""

    version: int
    modules: list[str]
    last_layer_only: bool
    """An edit leaves every KV block valid."""
    difference: float | None
    """What `check` has found, be it for another API server."""


class Checked(Answer):
    """Of `check`."""

    difference: float
    """Between twin and engine, nats a token on average."""


class Begun(Answer):
    """Of `begin`: either known, or busy and idle."""

    known: NotRequired[dict[str, dict[str, Any]]]
    """Records of the journal by idempotency key."""
    busy: NotRequired[str]
    """The turn that has the worker."""
    idle: NotRequired[float]
    """Seconds since its owner was heard of."""


class Step(Answer):
    """Of `step`."""

    done: bool
    result: Any
    """Once it is done: a `Result`, a `ReadBack`, or None of a rollback."""
    beside: bool
    """Not done, but it goes on without being told: after each step of an engine that has requests,
    or beside the engine."""
    longest: float
    """Milliseconds of the longest slice so far."""


class Result(TypedDict):
    """What an edit or a delta file came to."""

    version: int
    edits: list[dict[str, Any]]
    """Of each edit, whether it succeeded and in how many rounds."""
    timings: dict[str, float]
    rejected: str | None
    protected: float
    """Share of the model's own texts that it could hold still; below 1 while they are gathered."""
    digest: NotRequired[str]
    """SHA-256 of the new weights; of a dry run there are none."""
    delta: NotRequired[bytes]
    """The change as a file, for engines that follow."""
    answers: NotRequired[list[list[int]]]
    """Of a dry run: what the shadow answers to its probes, as tokens."""


class ReadBack(TypedDict):
    """The version that is live, and the digest of what is served."""

    version: int
    digest: str


class Live(Answer):
    """Of `commit`, `revert` and `cancel`: the version that is live."""

    version: int


class History(Answer):
    """Of `history`: entries, newest first."""

    entries: list[dict[str, Any]]
    has_more: bool


class DeltaFile(Answer):
    """Of `delta`: the file of one version."""

    data: bytes


class Status(Answer):
    """Of `status`."""

    version: int
    newest: int
    """The journal's last version."""
    recorded: str
    """The digest that the journal has for the live version."""
    base: str
    """That of version 0."""
    digest: str | None
    turn: bool
    """Whether one is under way."""
    traffic_keys: int
    foreign: bool
    """Whether others than the version's weights were found; with the digest they are looked for."""
    gathered: float
    """Share of the model's own texts that are written."""


class Gathered(Answer):
    """Of `gather`."""

    gathered: float
    """Share of the model's own texts that are written."""
    done: bool
    """All is gathered, or it has failed."""
    again: bool
    """The engine is idle: ask again at once."""


class ProbeData(TypedDict):
    """A prompt that is asked; a dry run answers it itself."""

    ids: list[int]
    max_tokens: int
    chat: bool
    """Whether it was made of messages."""


# Calls


class Workers:
    """The workers of some engines of a server; no engines answer nothing.

    Every method is one RPC, made between two engine steps. Of several ranks it returns one's
    answer, or all where it says so, when all have answered.

    Args:
        client: what the server talks to its engines through.
        core: under data parallelism, what its calls to single engines go through.
        names: of the engines.

    Raises:
        EditError: a worker refuses. The status is that of `REFUSALS`; if that has none it is the
            argument `refusal`, by default 500, as a damaged journal's.
        RuntimeError: a worker has failed.
    """

    def __init__(self, client: EngineClient, core: Any, names: list[Any]) -> None:
        self._client, self._core, self._names = client, core, names

    def __len__(self) -> int:
        """Number of engines."""
        return len(self._names)

    async def start(
        self, settings: dict[str, Any], rendering: dict[str, Any], follows: bool
    ) -> list[Started]:
        """Build twin and editor; the answers of all ranks.

        Args:
            settings: the editor's.
            rendering: see `tokenizer.Rendering.as_data`.
            follows: another engine computes, and has been started.
        """
        return await self._ask_all("start", settings, rendering, follows)

    async def check(self, texts: list[list[int]], scores: list[list[float]]) -> Checked:
        """Compare the twin's scores of texts with the engine's, of every token but the first."""
        return await self._ask("check", texts, scores)

    async def begin(self, turn: str, keys: Sequence[str] = ()) -> Begun:
        """Take the workers for a turn, and look up idempotency keys."""
        return await self._ask("begin", turn, list(keys))

    async def edit(
        self,
        turn: str,
        requests: Sequence[EditRequest],
        heard: Sequence[str],
        probes: list[ProbeData] | None,
        note: dict[str, Any] | None,
        followed: bool,
    ) -> Answer:
        """Edits are the turn's work, `heard` what the engine has answered to them; with probes, as
        a dry run. The note goes into the journal. If engines follow, the result holds the delta for
        them."""
        edits = [
            {
                "prompt": request.prompt,
                "target": request.target,
                "rephrases": list(request.rephrases),
                "locality": list(request.locality),
                "space": request.space,
            }
            for request in requests
        ]
        given = edits, list(heard), probes, note, followed
        return await self._ask("edit", turn, *given, refusal=400)

    async def apply_delta(
        self,
        turn: str,
        data: bytes,
        note: dict[str, Any] | None = None,
        dry_run: bool = False,
        refusal: int = 500,
    ) -> Answer:
        """A delta file is the turn's work. The note goes into the journal."""
        return await self._ask("apply_delta", turn, data, note, dry_run, refusal=refusal)

    async def rollback(self, turn: str, version: int) -> Answer:
        """The way back to a version is the turn's work."""
        return await self._ask("rollback", turn, version)

    async def step(self, turn: str, refusal: int = 500) -> Step:
        """A slice of the turn's work, where the engine is idle: the answer of a rank that waits for
        the next one, or else of one that is not done, if there are such."""
        answers: list[Step] = await self._ask_all("step", turn, refusal=refusal)
        answer = min(answers, key=lambda answer: (answer["done"], answer["beside"]))
        return answer | {"longest": max(answer["longest"] for answer in answers)}

    async def commit(self, turn: str) -> list[Live]:
        """Make the turn's work live; the answers of all ranks."""
        return await self._ask_all("commit", turn)

    async def revert(self, turn: str) -> list[Live]:
        """Undo a commit, which has failed elsewhere; the answers of all ranks."""
        return await self._ask_all("revert", turn)

    async def read_back(self, turn: str) -> Answer:
        """After the commit: a `ReadBack` is the turn's work."""
        return await self._ask("read_back", turn)

    async def cancel(self, turn: str, newest: int | None = None) -> list[Live]:
        """End a turn, and drop what it has not committed; the answers of all ranks.

        Args:
            newest: the journal's last version, for engines that follow.
        """
        return await self._ask_all("cancel", turn, newest)

    async def delta(self, version: int) -> bytes:
        """The delta file of a version."""
        answer: DeltaFile = await self._ask("delta", version)
        return answer["data"]

    async def history(self, limit: int, before: int | None) -> History:
        """Journal entries below version `before`, newest first."""
        return await self._ask("history", limit, before)

    async def status(self, digest: bool = False) -> list[Status]:
        """What all ranks serve, with the digest of the weights if asked for."""
        return await self._ask_all("status", digest)

    async def gather(self, server: str) -> Gathered:
        """A slice of gathering, if the engine is idle; servers that ask name themselves."""
        return await self._ask("gather", server)

    async def _ask(self, method: str, *args: Any, refusal: int = 500) -> Any:
        return (await self._ask_all(method, *args, refusal=refusal))[0]

    async def _ask_all(self, method: str, *args: Any, refusal: int = 500) -> list[Any]:
        engines = await self._call(f"ultraedit_{method}", args)
        answers = [answer for ranks in engines for answer in ranks]
        if errors := [answer["error"] for answer in answers if "error" in answer]:
            raise _as_exception(errors, refusal)
        return answers

    async def _call(self, method: str, args: tuple[Any, ...]) -> list[list[Any]]:
        """The answers of each engine's ranks. Raises the first error that an engine has raised,
        when all have answered."""
        if self._core is None:
            return [await self._client.collective_rpc(method, args=args) for _ in self._names]
        calls = [
            self._core._call_utility_async("collective_rpc", method, None, args, None, engine=name)
            for name in self._names
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]


class Engines:
    """The engines of one server: one, or under data parallelism several that serve the same model.

    Attributes:
        leader: workers of the engine that computes edits and keeps the journal.
        followers: of those that are given its changes; there may be none.
        all: of all engines.
    """

    def __init__(self, client: EngineClient) -> None:
        several = client.vllm_config.parallel_config.data_parallel_size > 1
        # vLLM's `collective_rpc` goes to all engines, but gives the answers of the first alone.
        core: Any = getattr(client, "engine_core", None) if several else None
        names = [None] if core is None else list(core.core_engines)
        self.leader = Workers(client, core, names[:1])
        self.followers = Workers(client, core, names[1:])
        self.all = Workers(client, core, names)
