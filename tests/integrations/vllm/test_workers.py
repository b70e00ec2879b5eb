"""The seam between server and worker: every RPC, and what comes back of it."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm


class Client:
    """Answers every call of the workers with the same ranks' answers."""

    def __init__(self, *ranks: dict[str, Any], engines: int = 1) -> None:
        self.calls: list[tuple[Any, str, tuple[Any, ...]]] = []
        self.ranks = list(ranks)
        parallel = SimpleNamespace(data_parallel_size=engines)
        self.vllm_config = SimpleNamespace(parallel_config=parallel)
        self.engine_core = self
        self.core_engines = list(range(engines))

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[dict[str, Any]]:
        self.calls.append((None, method, args))
        return self.ranks

    async def _call_utility_async(
        self,
        utility: str,
        method: str,
        timeout: None,
        args: tuple[Any, ...],
        kwargs: None,
        **to: Any,
    ) -> list[dict[str, Any]]:
        assert utility == "collective_rpc" and timeout is None and kwargs is None
        self.calls.append((to["engine"], method, args))
        return self.ranks


def engines_of(client: Client) -> Any:
    from ultraedit_kernels.integrations.vllm.workers import Engines

    return Engines(client)  # type: ignore[arg-type]


def calls_of(workers: Any) -> list[Any]:
    """One call of every method."""
    from ultraedit_kernels import EditRequest

    request = EditRequest([{"role": "user", "content": "Who?"}], "Jane", rephrases=("It is",))
    return [
        workers.start({}, {}, False),
        workers.check([[1, 2]], [[-0.5]]),
        workers.begin("turn", ["key"]),
        workers.edit("turn", [request], [], None, None, False),
        workers.apply_delta("turn", b"delta"),
        workers.rollback("turn", 1),
        workers.step("turn"),
        workers.commit("turn"),
        workers.revert("turn"),
        workers.read_back("turn"),
        workers.cancel("turn"),
        workers.delta(1),
        workers.history(20, None),
        workers.status(),
        workers.gather("server"),
    ]


def test_every_rpc_is_called_as_the_worker_expects() -> None:
    from ultraedit_kernels import EditRequest
    from ultraedit_kernels.integrations.vllm.extension import UltraEditExtension

    client = Client({"done": True, "beside": False, "longest": 0.0, "data": b""})

    async def call() -> None:
        for one in calls_of(engines_of(client).leader):
            await one

    asyncio.run(call())
    known = {name for name in vars(UltraEditExtension) if name.startswith("ultraedit_")}
    assert {method for _, method, _ in client.calls} == known
    for _, method, args in client.calls:
        inspect.signature(getattr(UltraEditExtension, method)).bind(None, *args)
    (edits,) = (args[1] for _, method, args in client.calls if method == "ultraedit_edit")
    assert EditRequest.from_dict(edits[0]).rephrases == ("It is",)


@pytest.mark.parametrize(
    ("kind", "status", "field"),
    [
        ("UnknownVersion", 404, "version"),
        ("LostTurn", 503, None),
        ("GuardError", 422, None),
        ("ValueError", 418, None),
        ("TypeError", 418, None),
        ("UnsupportedModelError", 418, None),
        ("JSONDecodeError", 418, None),
    ],
)
def test_a_refusal_has_the_table_s_status_or_the_call_s(
    kind: str, status: int, field: str | None
) -> None:
    from ultraedit_kernels.integrations.vllm.protocol import EditError

    engines = engines_of(Client({"error": {"message": "what is wrong", "type": kind}}))
    with pytest.raises(EditError, match="what is wrong") as seen:
        asyncio.run(engines.leader.step("turn", refusal=418))
    assert (seen.value.status, seen.value.param) == (status, field)


@pytest.mark.parametrize("kind", ["Failed", "RankError"])
def test_a_failure_is_no_refusal(kind: str) -> None:
    client = Client({}, {"error": {"message": "what failed", "type": kind}})
    with pytest.raises(RuntimeError, match="what failed"):
        asyncio.run(engines_of(client).leader.status())


def test_the_rank_that_has_the_cause_is_named() -> None:
    other = {"error": {"message": "another rank has failed", "type": "RankError"}}
    cause = {"error": {"message": "the cause", "type": "Failed"}}
    with pytest.raises(RuntimeError, match="the cause"):
        asyncio.run(engines_of(Client(other, cause)).leader.commit("turn"))


def test_what_crosses_as_data_comes_back_as_what_it_was() -> None:
    from ultraedit_kernels.integrations.vllm import workers
    from ultraedit_kernels.integrations.vllm.twin import UnsupportedModelError
    from ultraedit_kernels.method.guards import GuardError
    from ultraedit_kernels.model.parallel import RankError

    refused = [
        ValueError("x"),
        TypeError("x"),
        UnsupportedModelError("x"),
        workers.UnknownVersion("x"),
        workers.LostTurn("x"),
        GuardError("finite", 1.0, 0.0, "x"),
    ]
    for error in refused:
        data = workers.as_data(error)
        assert data == {"message": str(error), "type": type(error).__name__}
    for failed in (OSError("disk full"), RuntimeError("x"), KeyError("x"), RankError("x")):
        assert workers.as_data(failed) is None
        data = workers.failure_as_data(failed)
        assert str(failed) in data["message"]
        kind = "RankError" if isinstance(failed, RankError) else "Failed"
        assert data["type"] == kind


def test_a_step_is_done_when_all_ranks_are_and_asked_for_while_one_waits_for_it() -> None:
    def told(*ranks: tuple[bool, bool, float]) -> tuple[Any, ...]:
        answers = [{"done": done, "beside": b, "longest": ms} for done, b, ms in ranks]
        step = asyncio.run(engines_of(Client(*answers)).leader.step("turn"))
        return step["done"], step["beside"], step["longest"]

    assert told((True, False, 3.0), (True, True, 4.0)) == (True, False, 4.0)
    assert told((True, False, 4.0), (False, True, 3.0)) == (False, True, 4.0)
    assert told((True, False, 0.0), (False, True, 3.0), (False, False, 1.0)) == (False, False, 3.0)


def test_leader_and_followers_are_all_engines() -> None:
    alone, several = Client({}), Client({}, engines=3)
    engines = engines_of(alone)
    assert (len(engines.leader), len(engines.followers), len(engines.all)) == (1, 0, 1)
    assert asyncio.run(engines.followers.status()) == [] and alone.calls == []
    engines = engines_of(several)

    async def call() -> None:
        assert len(await engines.leader.status()) == 1
        assert len(await engines.followers.status()) == 2
        assert len(await engines.all.status()) == 3

    asyncio.run(call())
    assert [engine for engine, _, _ in several.calls] == [0, 1, 2, 0, 1, 2]
