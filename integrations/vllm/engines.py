"""The engines of one server: one, or under data parallelism several that serve the same model."""

from __future__ import annotations

import asyncio
from typing import Any

from vllm.engine.protocol import EngineClient

LEADER = slice(0, 1)
"""The engine that computes edits and keeps the journal."""
FOLLOWERS = slice(1, None)
"""Those that are given its changes."""
ALL = slice(None)


class Engines:
    """Calls the workers' methods.

    Args:
        client: what the server talks to its engines through.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        parallel = client.vllm_config.parallel_config
        core = getattr(client, "engine_core", None)
        # vLLM's `collective_rpc` goes to all engines, but gives the answers of the first alone.
        self._core: Any = core if parallel.data_parallel_size > 1 else None
        self._names = list(self._core.core_engines) if self._core is not None else [None]

    def __len__(self) -> int:
        return len(self._names)

    async def call(self, engines: slice, method: str, *args: Any) -> list[list[dict[str, Any]]]:
        """The answers of some engines, each a list of its ranks' answers, when all have answered.

        Raises: the first error that an engine has raised.
        """
        if self._core is None:
            return [await self._client.collective_rpc(method, args=args)][engines]
        calls = [
            self._core._call_utility_async("collective_rpc", method, None, args, None, engine=name)
            for name in self._names[engines]
        ]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers  # type: ignore[return-value]
