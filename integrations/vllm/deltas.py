"""What a turn does that computes no edits: a delta file, or the way back to a version."""

from __future__ import annotations

import asyncio
from typing import Any

from ultraedit_kernels.integrations.vllm.answers import ms_since, other_body
from ultraedit_kernels.integrations.vllm.commit import Turn
from ultraedit_kernels.integrations.vllm.protocol import ApplyQuery, EditError
from ultraedit_kernels.integrations.vllm.workers import Status
from ultraedit_kernels.store.delta import EditDelta


async def apply(turn: Turn, data: bytes, asked: ApplyQuery, begun: float) -> dict[str, Any]:
    """Commit a delta file, or say what it would do. One whose idempotency key is that of a version
    is not applied again.

    Raises:
        EditError: 409, the key was used for something else, or other weights are served than asked,
            or would be.
    """
    queue_ms = ms_since(begun)
    # Of what it changes: safetensors writes the same delta in other bytes each time.
    content = await asyncio.to_thread(_content, data) if asked.idempotency_key else ""
    if (record := turn.known.get(asked.idempotency_key or "")) is not None:
        return _again(turn, record, content, asked, begun)
    live = await turn.status()
    _check_served(live, asked.serving)
    note = None
    if asked.idempotency_key is not None:
        request = {"key": asked.idempotency_key, "body": content, "first": 0, "before": []}
        note = {"requests": [request]}
    result = await turn.apply_delta(data, note, asked.dry_run)
    if asked.dry_run:
        timings = _timings(turn, begun, queue_ms, 0.0)
        answer = {"version": live["version"], "digest": result["digest"], "timings": timings}
        return answer | {"before": live["recorded"], "rejected": result["rejected"]}
    if asked.expected not in (None, result["digest"]):
        raise EditError(
            409,
            f"the weights would have digest {result['digest']}, expected {asked.expected}, and "
            "nothing was changed; apply it to the version that it was made after, on equal devices "
            "and with equal versions of the library",
            "expected",
        )
    commit_ms = await turn.commit(result["version"])
    answer = await _version_answer(turn, begun, queue_ms, commit_ms)
    return answer | {"before": live["recorded"]}


async def rollback(turn: Turn, version: int, serving: str | None, begun: float) -> dict[str, Any]:
    """Serve an earlier version, and forget the later ones.

    Raises:
        EditError: 400, there is no such version; 409, other weights are served than asked.
    """
    queue_ms = ms_since(begun)
    live = await turn.status()
    if version > live["version"]:
        raise EditError(
            400,
            f"version is {version}, expected 0 to {live['version']}; 0 is the untouched model, "
            "GET /v1/edits lists the others",
            "version",
        )
    _check_served(live, serving)
    await turn.rollback(version)
    commit_ms = await turn.commit(version)
    return await _version_answer(turn, begun, queue_ms, commit_ms)


def _content(data: bytes) -> str:
    try:
        return EditDelta.from_bytes(data).digest()
    except ValueError as error:
        raise EditError(400, str(error)) from error


def _check_served(live: Status, expected: str | None) -> None:
    if expected is not None and expected != live["recorded"]:
        raise EditError(
            409,
            f"version {live['version']} with digest {live['recorded']} is served, expected digest "
            f"{expected}; another change came between, look at it in GET /v1/edits",
            "serving",
        )


def _again(
    turn: Turn, record: dict[str, Any], content: str, asked: ApplyQuery, begun: float
) -> dict[str, Any]:
    """The answer of the version that an idempotency key has made."""
    requests = record["note"]["requests"]
    (request,) = (r for r in requests if r["key"] == asked.idempotency_key)
    if request["body"] != content:
        raise other_body()
    timings = _timings(turn, begun, 0.0, 0.0)
    answer = {"version": record["version"], "digest": record["digest"], "timings": timings}
    return answer | {"again": True}


async def _version_answer(
    turn: Turn, begun: float, queue_ms: float, commit_ms: float
) -> dict[str, Any]:
    result = await turn.read_back()
    return {**result, "timings": _timings(turn, begun, queue_ms, commit_ms)}


def _timings(turn: Turn, begun: float, queue_ms: float, commit_ms: float) -> dict[str, float]:
    return {
        "queue_ms": queue_ms,
        "commit_ms": commit_ms,
        "pause_ms": turn.pause_ms,
        "total_ms": ms_since(begun),
    }
