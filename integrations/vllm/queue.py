"""Changes that wait for their turn: one at a time, first come, first served."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ultraedit_kernels.integrations.vllm.answers import Asked, other_body
from ultraedit_kernels.integrations.vllm.protocol import EditError

MERGED_EDITS = 32
"""Most edits of different requests that share a turn."""


@dataclass(eq=False)
class Waiting:
    """A change that waits for its turn; a request to edit may share one with others."""

    asked: Asked | None = None
    """What a request to edit asks for; of another change, nothing."""
    kind: Literal["edit", "apply", "rollback"] = "edit"
    begun: float = field(default_factory=time.perf_counter)
    answer: dict[str, Any] | EditError | None = None


class Queue:
    """The changes of this server that are under way or wait.

    Args:
        most: so many may be, and no more.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = asyncio.Lock()
        self._waiting: list[Waiting] = []  # in the order of the lock, its holder included

    def __len__(self) -> int:
        return len(self._waiting)

    def changes(self) -> list[dict[str, Any]]:
        """What is under way and what waits, in their order, as `protocol.Change` has it."""
        now = time.perf_counter()
        return [
            {
                "kind": waiting.kind,
                "edits": len(waiting.asked.requests) if waiting.asked else 0,
                "dry_run": waiting.asked is not None and waiting.asked.dry_run,
                "seconds": now - waiting.begun,
            }
            for waiting in self._waiting
        ]

    @asynccontextmanager
    async def turn_of(self, waiting: Waiting) -> AsyncIterator[None]:
        """Wait until it is a change's turn. Raises EditError 429 if too many wait."""
        if len(self) >= self._most:
            raise EditError(
                429,
                f"{len(self)} changes are under way or waiting, expected fewer than "
                f"{self._most}; try again later",
            )
        self._waiting.append(waiting)
        try:
            async with self._lock:
                yield
        finally:
            self._waiting.remove(waiting)

    def sharing(self, first: Waiting) -> list[Waiting]:
        """The requests that can share a turn with the first: those next to it in the queue."""
        together: list[Waiting] = []
        count, prompts = 0, set[str]()
        for waiting in self._waiting[self._waiting.index(first) :]:
            asked = waiting.asked
            if asked is None or (together and asked.dry_run):
                break  # nothing that waits is overtaken
            count += len(asked.requests)
            if together and (count > MERGED_EDITS or prompts & asked.prompts):
                break
            together.append(waiting)
            prompts |= asked.prompts
            if asked.dry_run:
                break
        return together


class Tasks:
    """Work that is done to its end even if the client that waits for it goes away."""

    def __init__(self) -> None:
        self._keys: dict[str, tuple[str, asyncio.Task[dict[str, Any]]]] = {}
        self._tasks: set[asyncio.Task[dict[str, Any]]] = set()

    async def run(self, work: Coroutine[Any, Any, dict[str, Any]]) -> dict[str, Any]:
        """Its result."""
        return await asyncio.shield(self._spawn(work))

    async def run_once(
        self, key: str, content: str, work: Callable[[], Coroutine[Any, Any, dict[str, Any]]]
    ) -> dict[str, Any]:
        """The result of work, which is not begun while other work of the same key is under way:
        that one's result is given then, with "again".

        Raises:
            EditError: 409, the key is that of work with other content.
        """
        if not (again := key in self._keys):
            task = self._spawn(work())
            task.add_done_callback(lambda _: self._keys.pop(key, None))
            self._keys[key] = content, task
        first, task = self._keys[key]
        if first != content:
            raise other_body()
        answer = await asyncio.shield(task)
        return answer | {"again": True} if again else answer

    def _spawn(self, work: Coroutine[Any, Any, dict[str, Any]]) -> asyncio.Task[dict[str, Any]]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_failed)
        return task


def _failed(task: asyncio.Task[Any]) -> bool:
    """Also marks the error as seen: the client that would have got it may be gone."""
    return task.cancelled() or task.exception() is not None
