"""A server that follows a leader: one server is edited, many take its versions.

What the leader serves is asked for again and again. A version that is missing here is fetched as a
delta and goes through the ordinary turn of one, guards included, on the condition that it gives the
leader's digest; where the leader has gone back, so does this server. Whatever stands in the way,
the version that is served here goes on being served, and the leader is asked again.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm import calls, metrics
from ultraedit_kernels.integrations.vllm.audit import Audit
from ultraedit_kernels.integrations.vllm.calls import Call, ServerError
from ultraedit_kernels.integrations.vllm.protocol import ApplyQuery, EditError, Follows, Health

logger = init_logger("vllm.ultraedit")

POLL = 1.0
"""Seconds between two questions."""
AGAIN = 30.0
"""Most seconds before the leader is asked again after something went wrong."""
CONNECT, ANSWER = 10.0, 60.0
"""Seconds for a connection, and without a byte of an answer."""
MARK = "follow-"
"""How the idempotency key of a version begins that was taken from a leader."""

T = TypeVar("T")


class Versions(Protocol):
    """What is asked of this server's `EditService`."""

    async def status(self, digest: bool) -> list[dict[str, Any]]: ...  # noqa: D102
    async def history(self, limit: int, before: int | None) -> Any: ...  # noqa: D102
    async def run(self, work: Any) -> dict[str, Any]: ...  # noqa: D102
    async def apply(self, data: bytes, asked: ApplyQuery) -> dict[str, Any]: ...  # noqa: D102
    async def rollback(self, version: int, serving: str | None) -> dict[str, Any]: ...  # noqa: D102


class FollowError(Exception):
    """Why the leader's versions cannot be taken; the text says what to do."""


class Leader:
    """The routes of the leader.

    Args:
        url: of it.
        key: edit key, or API key where there are none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER, connect=CONNECT),
        )
        self._lost = httpx.TransportError

    async def ask(self, call: Call[T]) -> T:
        """The answer to a call. Raises ServerError."""
        try:
            answer = await self._http.request(call.method, call.path, **call.request)
        except self._lost as error:
            raise ServerError(
                self.url, f"no answer ({type(error).__name__}: {error}); see that it serves"
            ) from error
        return call.answer(self.url, answer.status_code, answer.headers, answer.content)


class Follower:
    """Takes the versions of a leader.

    Args:
        service: of this server.
        leader: whose versions they are.
        audit: gets a line for each version that is taken.
    """

    def __init__(self, service: Versions, leader: Leader, audit: Audit) -> None:
        self._service, self._leader, self._audit = service, leader, audit
        self._heard: float | None = None
        self._version: int | None = None
        self._behind: int | None = None
        self._error: str | None = None

    def state(self) -> Follows:
        """How it is doing."""
        seconds = None if self._heard is None else time.monotonic() - self._heard
        return Follows(
            leader=self._leader.url,
            version=self._version,
            behind=self._behind,
            seconds=seconds,
            error=self._error,
        )

    def refusal(self) -> EditError:
        """What a change that is sent here is answered."""
        return EditError(
            409,
            f"this server follows {self._leader.url} and takes no other changes; send it there",
        )

    async def run(self) -> None:
        """Follow until the server ends."""
        pause = POLL
        while True:
            await asyncio.sleep(pause)
            pause = POLL if await self.catch_up() else min(2 * pause, AGAIN)

    async def catch_up(self) -> bool:
        """Serve what the leader serves. Returns whether it is so; if not, `state` says why."""
        try:
            await self._catch_up()
            error = None
        except (ServerError, EditError, FollowError) as failure:
            error = str(failure)
        except Exception as failure:  # whatever it is, this server goes on serving
            logger.exception("UltraEdit: following %s failed", self._leader.url)
            error = f"{type(failure).__name__}: {failure}; the server's log has more"
        if error is not None and error != self._error:
            logger.warning("UltraEdit: not following %s: %s", self._leader.url, error)
        self._error = error
        return error is None

    async def _catch_up(self) -> None:
        there: Health = await self._leader.ask(calls.health(False))
        self._heard, self._version = time.monotonic(), there.version
        here = (await self._service.status(False))[0]
        self._check(there, here["base"])
        version, serving = here["version"], here["recorded"]
        if (version, serving) == (there.version, there.digest):
            self._set_behind(0)
            return
        common, digest = await self._common(version, there.version, here["base"])
        self._set_behind(there.version - common + version - common)
        if version > common:
            answer = await self._service.run(self._service.rollback(common, serving))
            await self._made("rollback", answer)
            self._set_behind(there.version - common)
        for number in range(common + 1, there.version + 1):
            digest = await self._take(number, digest)
            self._set_behind(there.version - number)

    def _check(self, there: Health, base: str) -> None:
        url = self._leader.url
        if there.base is None:
            raise FollowError(f"{url} runs an older ultraedit-kernels; update it")
        if there.base != base:
            raise FollowError(
                f"{url} serves another model: its untouched weights have digest "
                f"{there.base[:12]}…, this server's {base[:12]}…; start both with the same "
                "checkpoint, --dtype and --edit-modules"
            )
        if there.status != "ok":
            raise FollowError(f"{url} says that its ranks differ; restart it")

    async def _common(self, here: int, there: int, base: str) -> tuple[int, str]:
        """The newest version that is the same here and there, and its digest."""
        for number in range(here, 0, -1):
            own = (await self._service.history(1, number + 1))["entries"][0]
            if number <= there:
                record: dict[str, Any] = await self._leader.ask(calls.version(number))
                if record["digest"] == own["digest"]:
                    return number, own["digest"]
            if not _taken(own):
                raise FollowError(
                    f"version {number} was made here and {self._leader.url} has not got it; to "
                    "follow, start this server with an empty --state-dir; to keep the version, "
                    "without --follow"
                )
        return 0, base

    async def _take(self, number: int, serving: str) -> str:
        """Make the leader's next version; its digest."""
        record: dict[str, Any] = await self._leader.ask(calls.version(number))
        digest = record["digest"]
        try:
            data: bytes = await self._leader.ask(calls.delta(number))
        except ServerError as error:
            if error.status != 404:
                raise
            raise FollowError(
                f"{error}; {self._leader.url} has let go of what this server needs: start it with "
                "a copy of the leader's state directory"
            ) from error
        key = f"{MARK}{number}-{digest}"
        asked = ApplyQuery(idempotency_key=key, serving=serving, expected=digest)
        try:
            answer = await self._service.run(self._service.apply(data, asked))
        except EditError as error:
            raise EditError(
                error.status, f"version {number} of {self._leader.url}: {error}"
            ) from None
        if not answer.get("again"):
            await self._made("apply", answer)
        return digest

    async def _made(self, kind: str, answer: Mapping[str, Any]) -> None:
        metrics.changed(kind, "committed", answer)
        line = {"kind": kind, "key": self._leader.url, "request_id": uuid.uuid4().hex}
        made = {"version": answer["version"], "digest": answer["digest"]}
        await self._audit.write("committed", line | made)

    def _set_behind(self, versions: int) -> None:
        self._behind = versions
        metrics.behind(versions)


def _taken(record: Mapping[str, Any]) -> bool:
    """Whether a version was taken from a leader."""
    requests = (record.get("note") or {}).get("requests", ())
    return any(str(request["key"]).startswith(MARK) for request in requests)
