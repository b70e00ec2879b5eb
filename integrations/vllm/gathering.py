"""In the API server: has the worker of an idle engine gather what protects the model in all its
time. Of an engine with requests the worker takes its share by itself."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable

from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm.workers import Workers

logger = init_logger("vllm.ultraedit")

BESIDE = 0.1
"""Seconds between two questions how far an engine with requests is."""


async def gather(workers: Workers, told: Callable[[float], None]) -> None:
    """Ask until it is done.

    Args:
        workers: of the engine that computes edits.
        told: called with how far it is, from 0 to 1.
    """
    name, done = uuid.uuid4().hex, False
    while not done:
        try:
            answer = await workers.gather(name)
        except Exception as error:
            logger.warning("UltraEdit: the worker does not say how far it has gathered: %s", error)
            return
        told(answer["gathered"])
        done = answer["done"]
        if not done:
            await asyncio.sleep(0 if answer["again"] else BESIDE)
