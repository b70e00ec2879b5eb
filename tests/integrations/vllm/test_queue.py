"""Which changes wait for which, and which share a turn."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


def waiting(*prompts: str, dry_run: bool = False) -> Any:
    from ultraedit_kernels import EditRequest
    from ultraedit_kernels.integrations.vllm.answers import Asked
    from ultraedit_kernels.integrations.vllm.queue import Waiting

    requests = [EditRequest(prompt, "x") for prompt in prompts]
    return Waiting(Asked(requests, [], [], [], dry_run, None, ""))


def sharing(*changes: Any) -> int:
    """How many changes share the first one's turn, of these in the queue."""
    from ultraedit_kernels.integrations.vllm.queue import Queue

    async def look() -> int:
        queue = Queue(most=100)
        async with AsyncExitStack() as stack:
            entered = [
                asyncio.create_task(stack.enter_async_context(queue.turn_of(change)))
                for change in changes
            ]
            await asyncio.wait(entered, return_when=asyncio.FIRST_COMPLETED)
            together = queue.sharing(changes[0])
            assert together == list(changes[: len(together)])
            for task in entered[1:]:
                task.cancel()
            await asyncio.gather(*entered[1:], return_exceptions=True)
        assert len(queue) == 0
        return len(together)

    return asyncio.run(look())


def test_neighbours_share_a_turn() -> None:
    assert sharing(waiting("a"), waiting("b", "c"), waiting("d")) == 3


def test_one_prompt_is_taught_one_thing_in_a_turn() -> None:
    assert sharing(waiting("a"), waiting("b"), waiting("c", "a"), waiting("d")) == 2


def test_a_dry_run_is_alone_and_is_not_overtaken() -> None:
    assert sharing(waiting("a"), waiting("b", dry_run=True), waiting("c")) == 1
    assert sharing(waiting("a", dry_run=True), waiting("b")) == 1


def test_a_rollback_is_not_overtaken() -> None:
    from ultraedit_kernels.integrations.vllm.queue import Waiting

    assert sharing(waiting("a"), Waiting(), waiting("b")) == 1


def test_a_shared_turn_is_not_larger_than_the_limit() -> None:
    from ultraedit_kernels.integrations.vllm.queue import MERGED_EDITS

    full = [str(i) for i in range(MERGED_EDITS - 1)]
    assert sharing(waiting(*full), waiting("a"), waiting("b")) == 2
    assert sharing(waiting(*full, "more", "and more"), waiting("a")) == 1


def test_too_many_are_refused() -> None:
    from ultraedit_kernels.integrations.vllm.protocol import EditError
    from ultraedit_kernels.integrations.vllm.queue import Queue

    async def fill() -> None:
        queue = Queue(most=1)
        async with queue.turn_of(waiting("a")):
            with pytest.raises(EditError, match="expected fewer than 1") as seen:
                async with queue.turn_of(waiting("b")):
                    pass
        assert seen.value.status == 429
        async with queue.turn_of(waiting("c")):
            assert len(queue) == 1

    asyncio.run(fill())


def test_what_is_under_way_comes_first_and_what_waits_after_it() -> None:
    from ultraedit_kernels.integrations.vllm.protocol import Change
    from ultraedit_kernels.integrations.vllm.queue import Queue, Waiting

    async def look() -> list[Change]:
        queue = Queue(most=9)
        changes = [waiting("a", "b"), waiting("c", dry_run=True), Waiting(kind="rollback")]

        async def enter(change: Waiting) -> None:
            async with queue.turn_of(change):
                await asyncio.sleep(60)

        tasks = [asyncio.create_task(enter(change)) for change in changes]
        await asyncio.sleep(0.05)
        found = [Change(**change) for change in queue.changes()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert queue.changes() == []
        return found

    found = asyncio.run(look())
    assert [(one.kind, one.edits, one.dry_run) for one in found] == [
        ("edit", 2, False),
        ("edit", 1, True),
        ("rollback", 0, False),
    ]
    assert all(0.04 < one.seconds < 30 for one in found)


def test_a_key_runs_once_at_a_time() -> None:
    from ultraedit_kernels.integrations.vllm.protocol import EditError
    from ultraedit_kernels.integrations.vllm.queue import Tasks

    async def check() -> None:
        tasks, runs = Tasks(), 0

        async def work() -> dict[str, Any]:
            nonlocal runs
            runs += 1
            await asyncio.sleep(0)
            return {"run": runs}

        both = await asyncio.gather(*(tasks.run_once("key", "body", work) for _ in range(2)))
        assert both == [{"run": 1}, {"run": 1, "again": True}]
        first = asyncio.create_task(tasks.run_once("key", "body", work))
        await asyncio.sleep(0)
        with pytest.raises(EditError, match="another body") as seen:
            await tasks.run_once("key", "other body", work)
        assert seen.value.status == 409
        assert await first == {"run": 2}

    asyncio.run(check())


def test_work_goes_on_without_its_client() -> None:
    from ultraedit_kernels.integrations.vllm.queue import Tasks

    async def check() -> None:
        done = asyncio.Event()

        async def work() -> dict[str, Any]:
            await asyncio.sleep(0.01)
            done.set()
            return {}

        tasks = Tasks()
        client = asyncio.create_task(tasks.run(work()))
        await asyncio.sleep(0)
        client.cancel()
        await asyncio.wait_for(done.wait(), 5)
        assert client.cancelled()

    asyncio.run(check())
