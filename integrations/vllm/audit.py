"""One line for every change, made or refused: who, what, when, which version and digest."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

from ultraedit_kernels.integrations.vllm.protocol import EditsBody

logger = init_logger("vllm.ultraedit.audit")

FILE = "audit.jsonl"


class Audit:
    """Writes lines of JSON to the logger `vllm.ultraedit.audit` and to `audit.jsonl`.

    The file is opened for every line, and a line is one write at its end: several servers can share
    it, and it can be renamed at any time, whereupon the next line begins a new one.
    """

    def __init__(self, directory: str | None, prompts: bool) -> None:
        """
        Args:
            directory: where `audit.jsonl` is; without it there is only the logger.
            prompts: whether lines hold what was edited, prompts and targets.
        """
        self._path = None if directory is None else Path(directory) / FILE
        self._prompts = prompts

    def edits(self, body: EditsBody) -> dict[str, Any]:
        """What a line says about a turn that was asked for."""
        asked: dict[str, Any] = {"edits": len(body.edits)}
        if self._prompts:
            texts = [edit.model_dump(include={"prompt", "target"}) for edit in body.edits]
            asked["asked"] = texts
        return asked

    async def write(self, event: str, line: dict[str, Any]) -> None:
        """Write a line. If the file cannot be written that is logged, and what was done stands."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps({"time": now, "event": event} | line)
        logger.info("%s", text)
        if self._path is not None:
            try:
                await asyncio.to_thread(_append, self._path, text.encode() + b"\n")
            except OSError as error:
                logger.error("UltraEdit: %s was not written: %s", self._path, error)


def _append(path: Path, line: bytes) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)
