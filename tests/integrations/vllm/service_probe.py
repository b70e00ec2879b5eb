"""Drives two services on one real engine, as two API servers have them: `python service_probe.py
ARGUMENTS`.

ARGUMENTS is JSON: {"model", "state_dir", "results"}. Requests can be sent at exactly the same time
here, and faults put into a service.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "ultraedit",
    "HF_HUB_OFFLINE": "1",
}

from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from ultraedit_kernels.integrations.vllm import commit
from ultraedit_kernels.integrations.vllm.extension import UltraEditExtension
from ultraedit_kernels.integrations.vllm.gathering import gather
from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.service import EditService
from ultraedit_kernels.integrations.vllm.workers import Engines, Workers

FACTS = [
    ("The capital of Australia is", "Sydney"),
    ("The capital of Japan is", "Osaka"),
    ("Hamlet was written by", "Bill Gates"),
    ("The chemical symbol of hydrogen is", "Xy"),
    ("The capital of France is", "Lyon"),
    ("The capital of Italy is", "Milan"),
]


def body(*facts: int, target: str | None = None, **options: Any) -> EditsBody:
    edits = [{"prompt": FACTS[i][0], "target": target or FACTS[i][1]} for i in facts]
    return EditsBody(edits=edits, **options)  # type: ignore[arg-type]


async def outcome(work: Any) -> dict[str, Any]:
    try:
        return await work
    except EditError as error:
        return {"status": error.status, "error": str(error)}


async def in_order(service: EditService, *works: Any) -> list[dict[str, Any]]:
    """Outcomes of works of which each is sent once the one before it is in the queue."""
    tasks: list[asyncio.Task[dict[str, Any]]] = []
    for work in works:
        waiting = service.waiting
        tasks.append(asyncio.create_task(outcome(work)))
        while service.waiting == waiting and not tasks[-1].done():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks)


async def generate(engine: AsyncLLM, ids: list[int], tokens: int) -> dict[str, Any]:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        ignore_eos=True,
        logprobs=0,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in engine.generate(tokens_input(ids), params, f"probe-{time.monotonic()}"):
        last = output
    text = last.outputs[0]
    rows = zip(text.logprobs, text.token_ids, strict=True)
    return {
        "tokens": list(text.token_ids),
        "logprobs": [row[token].logprob for row, token in rows],
        "reason": text.finish_reason,
        "cached": last.num_cached_tokens,
        "ended": time.perf_counter(),
    }


async def probe(model: str, state_dir: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {"anchors": 16, "state_dir": str(state_dir)}
    arguments = AsyncEngineArgs(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        worker_extension_cls=f"{UltraEditExtension.__module__}.{UltraEditExtension.__qualname__}",
        additional_config={"ultraedit": settings},
    )
    engine = AsyncLLM.from_engine_args(arguments)
    config: dict[str, Any] = engine.vllm_config.additional_config

    gathered: list[float] = []

    async def service(**own: Any) -> EditService:
        config["ultraedit"] = settings | own
        new = EditService(engine)
        await new.start()
        await gather(new.engines.leader, gathered.append)
        return new

    out: dict[str, Any] = {}
    one, two = await service(), await service(running_requests="wait", max_queue=2)

    # One after the other, although each service knows its own requests only.
    out["two servers"] = await asyncio.gather(
        outcome(one.edit_once(body(0))), outcome(two.edit_once(body(1)))
    )
    out["one after the other"] = await asyncio.gather(
        outcome(one.rollback(0)), outcome(two.edit_once(body(1)))
    )
    await one.rollback(0)

    # The same key at the same time, then again, then with another body.
    key = {"idempotency_key": "key"}
    out["same key"] = await asyncio.gather(
        *(outcome(s.edit_once(body(0, **key))) for s in (one, two, one))
    )
    out["same key later"] = await outcome(two.edit_once(body(0, **key)))
    out["same key, other body"] = await outcome(two.edit_once(body(1, **key)))
    out["versions"] = [e["version"] for e in (await one.history(9, None))["entries"]]
    await one.rollback(0)
    out["same key after a rollback"] = await outcome(two.edit_once(body(0, **key)))
    await one.rollback(0)

    # What waits while a turn runs shares the next one, but for what must not.
    requests = [
        body(0),
        body(1, idempotency_key="merged"),
        body(2, 3),
        body(1, target="Kyoto"),
        body(4),
        body(5, dry_run=True),
        body(5),
    ]
    out["merged"] = await in_order(one, *(one.edit_once(r) for r in requests))
    out["merged key"] = await outcome(two.edit_once(requests[1]))
    await one.rollback(0)
    out["around a rollback"] = await in_order(
        one,
        *(one.edit_once(body(i)) for i in (0, 1)),
        one.rollback(0),
        one.edit_once(body(2)),
    )
    await one.rollback(0)

    # One that is refused does not take the others along.
    edit = Workers.edit

    async def refuse(workers: Workers, turn: str, requests: Any, *args: Any) -> Any:
        if any(request.target == "refused" for request in requests):
            raise EditError(400, "refused")
        return await edit(workers, turn, requests, *args)

    Workers.edit = refuse  # type: ignore[method-assign]
    requests = [body(0), body(1), body(2, target="refused"), body(3)]
    out["one refused"] = await in_order(one, *(one.edit_once(r) for r in requests))
    Workers.edit = edit  # type: ignore[method-assign]
    await one.rollback(0)

    works = [*(two.edit_once(body(i)) for i in range(4)), two.rollback(0)]
    out["queue of two"] = await in_order(two, *works)
    await one.rollback(0)

    # A turn whose server is not heard of.
    commit.LEASE = 1.0
    await Engines(engine).leader.begin("lost")
    begun = time.perf_counter()
    out["after a lost turn"] = await outcome(one.edit_once(body(0)))
    out["waited"] = time.perf_counter() - begun
    (out["lost turn"],) = await engine.collective_rpc("ultraedit_step", args=("lost",))
    await one.rollback(0)

    # Waiting for requests that run: theirs is the old version to the end, and no block of it stays.
    ids = AutoTokenizer.from_pretrained(model)("The capital of France is Paris " * 10)["input_ids"]
    old = await generate(engine, ids, 120)
    running = asyncio.create_task(generate(engine, ids, 120))
    await asyncio.sleep(0.05)
    edited = asyncio.create_task(two.edit_once(body(0)))
    out["waited for"] = {"old": old, "seen": await running, "done": edited.done()}
    out["after waiting"] = await edited
    out["new"] = [await generate(engine, ids, 120) for _ in range(2)]
    await two.rollback(0)
    out["old again"] = await generate(engine, ids, 120)
    engine.shutdown()
    return out


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    seen = asyncio.run(probe(given["model"], Path(given["state_dir"])))
    Path(given["results"]).write_text(json.dumps(seen))
