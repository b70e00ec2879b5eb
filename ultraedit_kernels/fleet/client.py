"""A client of one server, for programs: `Client`, and `AsyncClient` with the same methods."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ultraedit_kernels.integrations.vllm import calls
from ultraedit_kernels.integrations.vllm.calls import Call, Edits, ServerError
from ultraedit_kernels.integrations.vllm.protocol import (
    EditsAnswer,
    Health,
    Page,
    VersionAnswer,
)
from ultraedit_kernels.store.delta import EditDelta

__all__ = ["AsyncClient", "Client", "ServerError"]

TIMEOUT = 600.0
"""Seconds for an answer: a model's first edit waits until it has written its own texts."""
CONNECT = 10.0
"""Seconds for a connection."""
TRIES = 3
"""Times that a request is sent which may be repeated, if no answer comes."""
POLL = 0.5
"""Seconds between two questions of `wait`, and before a request is sent again."""


class _Shared:
    """What both clients are made of."""

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = TIMEOUT, transport: Any = None
    ) -> None:
        import httpx

        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} is no URL of a server, expected http://HOST:PORT")
        self._options = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(timeout, connect=min(CONNECT, timeout)),
            "transport": transport,
        }
        self._lost = httpx.TransportError

    def _answer(self, call: Call[Any], response: Any) -> Any:
        return call.answer(self.url, response.status_code, response.headers, response.content)

    def _no_answer(self, call: Call[Any], error: Exception) -> ServerError:
        return ServerError(
            self.url,
            f"no answer to {call.method} {call.path} ({type(error).__name__}: {error}); see that a "
            "server runs there, then send it again",
        )

    def _give_up(self, timeout: float, last: ServerError | Health) -> ServerError:
        state = "a change is under way" if isinstance(last, Health) else str(last)
        return ServerError(
            self.url, f"not ready after {timeout:g} s: {state}; wait longer, or look at its log"
        )


class Client(_Shared):
    """A server that takes edits.

    Every method raises `ServerError`, with the server's message and what to do, when the server
    refuses, is not there, or is none that takes edits.

    Args:
        url: of the server, such as "http://localhost:8000".
        key: edit key, or API key where there are none.
        timeout: seconds that an answer may take.
        transport: what requests are sent through, httpx's; by default the network.
    """

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = TIMEOUT, transport: Any = None
    ) -> None:
        import httpx

        super().__init__(url, key, timeout=timeout, transport=transport)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def edit(
        self, edits: Edits | Sequence[Edits], *, idempotency_key: str | None = None
    ) -> EditsAnswer:
        """Make edits, in one turn. A lost connection makes them once: each call has a key.

        Args:
            edits: one or several, `EditRequest`s or objects {"prompt", "target", ...}.
            idempotency_key: of calls, also of other processes, that are the same one.
        """
        return self._send(calls.edit(edits, False, idempotency_key))

    def dry_run(self, edits: Edits | Sequence[Edits]) -> EditsAnswer:
        """What the edits would do; nothing is changed."""
        return self._send(calls.edit(edits, True, None))

    def apply(
        self,
        delta: EditDelta | bytes | str | Path,
        *,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        serving: str | None = None,
    ) -> VersionAnswer:
        """Apply a change that was made elsewhere.

        Args:
            delta: it, its file's bytes, or where the file is.
            dry_run: check it, guards and canaries included, and commit nothing.
            idempotency_key: with one the server applies the file once.
            serving: only if the version that is served has this digest; else status 409.
        """
        return self._send(calls.apply(delta, dry_run, idempotency_key, serving))

    def rollback(self, version: int, *, serving: str | None = None) -> VersionAnswer:
        """Serve an earlier version, and forget the later ones; `serving` as for `apply`."""
        return self._send(calls.rollback(version, serving))

    def history(self, limit: int = 20, before: int | None = None) -> Page:
        """The journal, newest version first; those below version `before`."""
        return self._send(calls.history(limit, before))

    def version(self, number: int) -> dict[str, Any]:
        """The journal's record of a version."""
        return self._send(calls.version(number))

    def delta(self, version: int) -> EditDelta:
        """The change that made a version."""
        return EditDelta.from_bytes(self._send(calls.delta(version)), source=self.url)

    def health(self, digest: bool = False) -> Health:
        """What every rank serves; with `digest` the weights are read back."""
        return self._send(calls.health(digest))

    def wait(self, timeout: float = 300.0) -> Health:
        """Wait until the server answers and no change is under way; seconds at most."""
        deadline = time.monotonic() + timeout
        last: ServerError | Health
        while True:
            try:
                last = self._send(calls.health(False), tries=1)
                if not last.turn:
                    return last
            except ServerError as error:
                if not _passes(error):
                    raise
                last = error
            if time.monotonic() >= deadline:
                raise self._give_up(timeout, last)
            time.sleep(POLL)

    def _send(self, call: Call[Any], tries: int = TRIES) -> Any:
        left = tries if call.repeat else 1
        while True:
            left -= 1
            try:
                response = self._http.request(call.method, call.path, **call.request)
                return self._answer(call, response)
            except self._lost as error:
                if not left:
                    raise self._no_answer(call, error) from error
            time.sleep(POLL)


class AsyncClient(_Shared):
    """As `Client`, for asyncio: the same methods, to be awaited."""

    def __init__(
        self, url: str, key: str | None = None, *, timeout: float = TIMEOUT, transport: Any = None
    ) -> None:
        import httpx

        super().__init__(url, key, timeout=timeout, transport=transport)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Let go of the connections."""
        await self._http.aclose()

    async def edit(
        self, edits: Edits | Sequence[Edits], *, idempotency_key: str | None = None
    ) -> EditsAnswer:
        """See `Client.edit`."""
        return await self._send(calls.edit(edits, False, idempotency_key))

    async def dry_run(self, edits: Edits | Sequence[Edits]) -> EditsAnswer:
        """See `Client.dry_run`."""
        return await self._send(calls.edit(edits, True, None))

    async def apply(
        self,
        delta: EditDelta | bytes | str | Path,
        *,
        dry_run: bool = False,
        idempotency_key: str | None = None,
        serving: str | None = None,
    ) -> VersionAnswer:
        """See `Client.apply`."""
        return await self._send(calls.apply(delta, dry_run, idempotency_key, serving))

    async def rollback(self, version: int, *, serving: str | None = None) -> VersionAnswer:
        """See `Client.rollback`."""
        return await self._send(calls.rollback(version, serving))

    async def history(self, limit: int = 20, before: int | None = None) -> Page:
        """See `Client.history`."""
        return await self._send(calls.history(limit, before))

    async def version(self, number: int) -> dict[str, Any]:
        """See `Client.version`."""
        return await self._send(calls.version(number))

    async def delta(self, version: int) -> EditDelta:
        """See `Client.delta`."""
        return EditDelta.from_bytes(await self._send(calls.delta(version)), source=self.url)

    async def health(self, digest: bool = False) -> Health:
        """See `Client.health`."""
        return await self._send(calls.health(digest))

    async def wait(self, timeout: float = 300.0) -> Health:
        """See `Client.wait`."""
        deadline = time.monotonic() + timeout
        last: ServerError | Health
        while True:
            try:
                found: Health = await self._send(calls.health(False), tries=1)
                if not found.turn:
                    return found
                last = found
            except ServerError as error:
                if not _passes(error):
                    raise
                last = error
            if time.monotonic() >= deadline:
                raise self._give_up(timeout, last)
            await asyncio.sleep(POLL)

    async def _send(self, call: Call[Any], tries: int = TRIES) -> Any:
        left = tries if call.repeat else 1
        while True:
            left -= 1
            try:
                response = await self._http.request(call.method, call.path, **call.request)
                return self._answer(call, response)
            except self._lost as error:
                if not left:
                    raise self._no_answer(call, error) from error
            await asyncio.sleep(POLL)


def _passes(error: ServerError) -> bool:
    """Whether a starting server may answer so; one that is up and refuses stays so."""
    return error.status is None or error.status >= 500
