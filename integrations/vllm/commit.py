"""One turn in the workers of all engines: prepared slice by slice, followed, and committed so that
no request goes on with keys and values of the old weights."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from vllm.engine.protocol import EngineClient
from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm.answers import ms_since
from ultraedit_kernels.integrations.vllm.protocol import EditError
from ultraedit_kernels.integrations.vllm.workers import (
    Answer,
    Engines,
    Live,
    ProbeData,
    ReadBack,
    Result,
    Status,
    Workers,
)
from ultraedit_kernels.model.request import EditRequest
from ultraedit_kernels.settings import ServingSettings

logger = init_logger("vllm.ultraedit")

POLL = 0.005
"""Seconds between two questions whether work that goes on without being told is done."""
LEASE = 60.0
"""Seconds after which a turn is dropped whose server is not heard of."""
BUSY = 0.05
"""Seconds between two questions whether the turn of another server is over."""

A = TypeVar("A", bound=Answer)


def why_stale(transfer: Any) -> str:
    """Why a KV connector would go on giving out keys and values of old weights after a commit;
    empty if it drops them when it is told to.

    Args:
        transfer: vLLM's `KVTransferConfig`, or None.
    """
    if transfer is None or transfer.kv_connector is None:
        return ""
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    if transfer.kv_connector == "MultiConnector":
        parts = transfer.kv_connector_extra_config.get("connectors", [])
        reasons = (why_stale(KVTransferConfig(**part)) for part in parts)
        return next((reason for reason in reasons if reason), "")
    connector: Any = KVConnectorFactory.get_connector_class(transfer)
    if connector.reset_cache is not KVConnectorBase_V1.reset_cache:
        return ""
    return (
        f"the KV connector {transfer.kv_connector} has no reset_cache: after an edit it would go "
        "on giving out keys and values of the old weights; serve without it or with one that has, "
        "such as --kv-offloading-size, edit the last layer's feed-forward block alone "
        '(--edit-modules), or take stale ones in (setting "reset_prefix_cache": false)'
    )


def check_connector(transfer: Any) -> None:
    """Raise RuntimeError for a KV connector that would keep stale keys, see `why_stale`."""
    if reason := why_stale(transfer):
        raise RuntimeError(f"UltraEdit cannot start: {reason}")


@asynccontextmanager
async def take_turn(
    client: EngineClient,
    engines: Engines,
    settings: ServingSettings,
    stales_cache: bool,
    keys: Sequence[str] = (),
) -> AsyncIterator[Turn]:
    """Have the workers for a turn. At its end what it has not committed is dropped.

    Args:
        client: what the server talks to its engines through.
        engines: the same, with the workers' calls.
        settings: how to prepare and commit.
        stales_cache: whether an edit leaves stale keys and values.
        keys: idempotency keys to look up.
    """
    turn = Turn(client, engines, settings, stales_cache)
    while "busy" in (answer := await engines.leader.begin(turn.id, keys)):
        if answer["idle"] > LEASE:
            logger.warning("UltraEdit: dropping a turn whose server is not heard of")
            await _cancel(engines, answer["busy"])
        else:
            await asyncio.sleep(BUSY)
    turn.known = answer["known"]
    try:
        if engines.followers:
            await engines.followers.begin(turn.id)
        if await client.is_paused():
            raise EditError(
                503, "the engine is paused or asleep, expected it to serve; resume it first"
            )
        yield turn
    finally:
        try:
            await _cancel(engines, turn.id)
        except Exception:
            logger.exception("UltraEdit: a turn could not be ended")


async def _cancel(engines: Engines, turn: str) -> None:
    """The first engine last: whose turn it has the others are free for."""
    try:
        if engines.followers:
            newest = (await engines.leader.status())[0]["newest"]
            await engines.followers.cancel(turn, newest)
    finally:
        await engines.leader.cancel(turn)


class Turn:
    """A turn that has the workers, see `take_turn`.

    Attributes:
        id: by which the workers know it.
        known: records of the journal by idempotency key.
        pause_ms: the longest time so far that it kept the engine from stepping, be it for one slice
            of work or for the commit, milliseconds.
    """

    def __init__(
        self, client: EngineClient, engines: Engines, settings: ServingSettings, stales_cache: bool
    ) -> None:
        self._client, self._engines, self._settings = client, engines, settings
        self._holds = stales_cache and settings.reset_prefix_cache
        self.id = uuid.uuid4().hex
        self.known: dict[str, dict[str, Any]] = {}
        self.pause_ms = 0.0

    async def edit(
        self,
        requests: Sequence[EditRequest],
        heard: Sequence[str],
        probes: list[ProbeData] | None,
        note: dict[str, Any] | None,
    ) -> Result:
        """Prepare edits on all shadows, `heard` being what the engine has answered to them; with
        probes, a dry run on the first one alone."""
        leader, followed = self._engines.leader, bool(self._engines.followers)
        await self._slice(leader.edit(self.id, requests, heard, probes, note, followed))
        result: Result = await self._work(leader, refusal=400)
        if probes is None and followed:
            await self._follow(result["delta"], result["digest"])
        return result

    async def status(self) -> Status:
        """What is served, and what the journal has."""
        return (await self._engines.leader.status())[0]

    async def apply_delta(
        self, data: bytes, note: dict[str, Any] | None = None, dry_run: bool = False
    ) -> Result:
        """Prepare a delta file on all shadows; for a dry run, on the first one alone."""
        leader = self._engines.leader
        await self._slice(leader.apply_delta(self.id, data, note, dry_run, refusal=400))
        result: Result = await self._work(leader, refusal=400)
        if self._engines.followers and not dry_run:
            await self._follow(data, result["digest"])
        return result

    async def rollback(self, version: int) -> None:
        """Prepare the way back to a version."""
        # The journal is the first engine's: it decides when the others can follow.
        for workers in (self._engines.followers, self._engines.leader):
            if workers:
                await self._slice(workers.rollback(self.id, version))
                await self._work(workers)

    async def read_back(self) -> ReadBack:
        """After the commit, what is served."""
        await self._slice(self._engines.leader.read_back(self.id))
        return await self._work(self._engines.leader)

    async def commit(self, version: int) -> float:
        """Change the live weights between two engine steps; the milliseconds it took.

        Keys and values above an edited layer are stale with its new weights. Where there are such,
        the engine is held meanwhile: running requests stay, lose their blocks and are computed
        anew when it goes on, streams included, or have been waited for; and cached prefixes are
        dropped. An edit of the last layer's feed-forward block stales nothing: the engine is not
        held at all.
        """
        begun = time.perf_counter()
        if not self._holds:
            await self._switch(version)
            return ms_since(begun)
        try:
            # `pause_generation` would do, and then sleep 20 ms; this is the same without.
            sleeping = self._client.sleep(level=0, mode=self._settings.running_requests)
            if self._settings.running_requests == "wait":
                await sleeping  # the engine has stepped until now
                held = await self._engines.all.status()
            else:
                _, held = await asyncio.gather(sleeping, self._engines.all.status())
            if not await self._client.reset_prefix_cache(
                reset_running_requests=True, reset_connector=True
            ):
                raise RuntimeError("the engine did not reset its prefix cache")
            committed = await self._switch(version, wake=True)
        except BaseException:
            await self._client.wake_up(tags=["scheduling"])
            raise
        # By the worker's clock: this process may be busy with what the engine has sent before.
        pauses = [c["at"] - h["at"] for c, h in zip(committed, held, strict=True)]
        self.pause_ms = max(self.pause_ms, *pauses)
        return ms_since(begun)

    async def _switch(self, version: int, wake: bool = False) -> list[Live]:
        """Commit in all workers, or in none. An engine does what it is told in this order, and
        nothing between; each answer would cost the time that the server takes to read it."""
        told: list[Coroutine[Any, Any, Any]] = [
            self._engines.all.commit(self.id),
            self._client.update_weight_version(str(version)),
        ]
        if wake:
            told.append(self._client.wake_up(tags=["scheduling"]))
        committed, *others = await asyncio.gather(*told, return_exceptions=True)
        if isinstance(committed, BaseException):
            if self._engines.followers:
                await self._engines.all.revert(self.id)
            live = (await self._engines.leader.status())[0]["version"]
            await self._client.update_weight_version(str(live))
            raise committed
        for error in others:
            if isinstance(error, BaseException):
                raise error
        logger.info("UltraEdit: serving version %d", version)
        self.pause_ms = max(self.pause_ms, *(rank["ms"] for rank in committed))
        return committed

    async def _follow(self, delta: bytes, digest: str) -> None:
        """Make the first engine's change on the shadows of the others."""
        followers = self._engines.followers
        await self._slice(followers.apply_delta(self.id, delta))
        result: Result = await self._work(followers)
        if result["digest"] != digest:
            raise RuntimeError(
                f"an engine's weights would have digest {result['digest']}, the first one's "
                f"{digest}; nothing was changed. The engines compute differently: start them on "
                "equal devices"
            )

    async def _work(self, workers: Workers, refusal: int = 500) -> Any:
        """Have the turn's work done, slice by slice."""
        while True:
            answer = await self._slice(workers.step(self.id, refusal))
            self.pause_ms = max(self.pause_ms, answer["longest"])
            if answer["done"]:
                return answer["result"]
            if answer["beside"]:
                await asyncio.sleep(POLL)

    async def _slice(self, call: Awaitable[A]) -> A:
        """A call that is part of the turn: the engine cannot step while it runs."""
        answer = await call
        self.pause_ms = max(self.pause_ms, answer["ms"])
        return answer
