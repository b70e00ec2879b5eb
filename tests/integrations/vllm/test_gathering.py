"""The API server's part in gathering: it asks as often as there is a use in it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from ultraedit_kernels.integrations.vllm import gathering
from ultraedit_kernels.integrations.vllm.workers import Workers


def workers_that_answer(answers: list[dict[str, Any]], asked: list[Any]) -> Workers:
    async def collective_rpc(method: str, args: tuple[Any, ...]) -> list[Any]:
        asked.append((method, *args))
        if not answers:
            raise RuntimeError("the engine is gone")
        return [answers.pop(0)]

    return Workers(SimpleNamespace(collective_rpc=collective_rpc), None, [None])  # type: ignore


def answer(gathered: float, done: bool = False, again: bool = True) -> dict[str, Any]:
    return {"gathered": gathered, "done": done, "again": again}


def test_it_asks_until_it_is_done_and_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    asked: list[Any] = []
    told: list[float] = []
    answers = [answer(0.1), answer(0.2, again=False), answer(1.0, done=True, again=False)]
    asyncio.run(gathering.gather(workers_that_answer(answers, asked), told.append))
    assert told == [0.1, 0.2, 1.0]
    assert waits == [0, gathering.BESIDE]
    assert len(asked) == 3 and len(set(asked)) == 1 and asked[0][0] == "ultraedit_gather"


def test_it_ends_with_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    told: list[float] = []
    asyncio.run(gathering.gather(workers_that_answer([answer(0.5)], []), told.append))
    assert told == [0.5]
