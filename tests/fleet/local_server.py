"""The server's routes over an editor in a process of its own, without an engine: what a client and
a fleet see of a server, in a second instead of a minute. Everything but the engine is the real
thing: keys, routes, bodies, answers, the turn of a delta, the editor and its journal.

A file `die` in its folder names the step at which the process ends as if it were killed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultraedit_kernels import EditDelta, Editor, EditRequest
from ultraedit_kernels.fleet.client import Client
from ultraedit_kernels.integrations.vllm import deltas, endpoint, keys
from ultraedit_kernels.integrations.vllm.audit import Audit
from ultraedit_kernels.integrations.vllm.follow import Follower, Leader
from ultraedit_kernels.integrations.vllm.protocol import ApplyQuery, EditError, EditsBody
from ultraedit_kernels.method.guards import GuardError
from ultraedit_kernels.settings import RouteSettings
from ultraedit_kernels.store.delta import digest_all

MODEL = Path(__file__).parents[2] / "bench" / "tiny-facts"
KEY = "edit-key"
STEPS = ("check", "apply", "journal", "served", "rollback", "back")
"""Where a server can be told to die: before it checks a delta; before it applies one, when that is
in the journal, when it is served and nobody is told; before and after a rollback."""


class Turn:
    """What a turn does, as `commit.Turn` has it, on an editor alone."""

    pause_ms = 0.0

    def __init__(self, service: Service, asked: Sequence[str]) -> None:
        self.service, self.editor = service, service.editor
        self.committed = False
        self.known = {
            request["key"]: record
            for record in self.editor.history()
            for request in record.get("note", {}).get("requests", ())
            if request["key"] in asked
        }

    async def status(self) -> Any:
        editor = self.editor
        versions = editor.versions
        recorded = versions.recorded(editor.version)
        return {"version": editor.version, "recorded": recorded, "base": versions.recorded(0)}

    async def apply_delta(self, data: bytes, note: Any, dry_run: bool) -> Any:
        self.service.step("check" if dry_run else "apply")
        try:
            delta = EditDelta.from_bytes(data)
            done = self.editor.apply_delta(delta, note, commit=not dry_run)
        except GuardError as error:
            raise EditError(422, str(error)) from error
        except ValueError as error:
            raise EditError(400, str(error)) from error
        self.service.step("" if dry_run else "journal")
        if not dry_run:
            return {"version": done.version, "digest": self.editor.digest(), "rejected": None}
        weights = {name: weight.clone() for name, weight in self.editor.weights.items()}
        for name, factor in delta.factors.items():
            factor.apply(weights[name])
        return {"digest": digest_all(weights), "rejected": done.rejected}

    async def commit(self, version: int) -> float:
        self.service.step("served")
        self.committed = True
        return 0.0

    async def rollback(self, version: int) -> None:
        self.service.step("rollback")
        self.editor.rollback(version)
        self.service.step("back")

    async def read_back(self) -> Any:
        return {"version": self.editor.version, "digest": self.editor.digest()}


class Service:
    """What the routes ask of `service.EditService`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        model = AutoModelForCausalLM.from_pretrained(MODEL)
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.folder, self.lock = folder, asyncio.Lock()
        given = {"anchors": 0, "state_dir": folder / "state"} | settings
        self.editor = Editor(model, tokenizer, **given)

    def step(self, name: str) -> None:
        """Die if it is the time."""
        with suppress(FileNotFoundError):
            if (self.folder / "die").read_text() == name:
                (self.folder / "die").unlink()
                os._exit(9)

    async def run(self, work: Any) -> Any:
        return await asyncio.shield(asyncio.create_task(work))

    async def edit_once(self, body: EditsBody) -> dict[str, Any]:
        requests = [EditRequest(**edit.model_dump()) for edit in body.edits]
        async with self.lock:
            done = self.editor.apply(requests, commit=not body.dry_run)
        edits = [
            {"prompt": e.prompt, "target": e.target, "before": "", "after": e.target}
            | {"succeeded": e.succeeded, "reason": None, "rounds": e.rounds}
            | {"taught": ["text"], "other_forms": []}
            for e in done.edits
        ]
        timings = {"queue_ms": 0.0, "pause_ms": 0.0, **done.timings}
        score = {"score": None, "prompts": []}
        answer = {"version": done.version, "edits": edits, "specificity": score}
        return answer | {"timings": timings, "rejected": done.rejected, "protected": 1.0}

    @asynccontextmanager
    async def turn(self, key: str | None = None) -> Any:
        async with self.lock:
            turn, before = Turn(self, [key] if key else []), self.editor.version
            try:
                yield turn
            finally:  # what was not committed is dropped, as `commit.take_turn` does
                if not turn.committed and self.editor.version > before:
                    self.editor.rollback(before)

    async def apply(self, data: bytes, asked: ApplyQuery) -> dict[str, Any]:
        async with self.turn(asked.idempotency_key) as turn:
            return await deltas.apply(turn, data, asked, time.perf_counter())

    async def rollback(self, version: int, serving: str | None) -> dict[str, Any]:
        async with self.turn() as turn:
            return await deltas.rollback(turn, version, serving, time.perf_counter())

    async def history(self, limit: int, before: int | None) -> dict[str, Any]:
        entries = [
            e | {"answers": None}
            for e in reversed(self.editor.history())
            if before is None or e["version"] < before
        ]
        return {"entries": entries[:limit], "has_more": len(entries) > limit}

    def changes(self) -> list[dict[str, Any]]:
        return []

    async def status(self, digest: bool) -> list[dict[str, Any]]:
        own = self.editor.digest() if digest else None
        status = await Turn(self, []).status()
        return [
            status
            | {"engine": 0, "rank": 0, "digest": own, "turn": False, "traffic_keys": 0}
            | {"gathered": 1.0}
        ]

    async def delta(self, version: int) -> bytes:
        if not self.editor.oldest < version <= self.editor.version:
            raise EditError(404, f"version {version} has no delta in the journal", "version")
        return self.editor.delta(version).to_bytes()


def application(
    folder: Path, key: str, settings: dict[str, Any], leader: tuple[str, str] | None
) -> Any:
    """The routes under a key; with a leader's URL and key, of a server that follows it."""

    @asynccontextmanager
    async def following(app: FastAPI) -> Any:
        follower = app.state.ultraedit_follower
        if follower is not None:
            await follower.catch_up()
            app.state.following = asyncio.create_task(follower.run())
        yield

    app = FastAPI(lifespan=following)
    app.include_router(endpoint.router)
    app.state.ultraedit_settings = RouteSettings()
    app.state.ultraedit_audit = Audit(str(folder), True)
    app.state.ultraedit = Service(folder, settings)
    app.state.ultraedit_follower = None
    if leader is not None:
        app.state.ultraedit_follower = Follower(
            app.state.ultraedit, Leader(*leader), app.state.ultraedit_audit
        )
    return keys.EditKeys(app, [key], [])


def serve(folder: Path, port: int, *how: Any) -> None:
    """Serve until the process ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    uvicorn.run(application(folder, *how), port=port, log_level="error")


# Forks of a process that has imported everything; never of a test's, which has threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])


@dataclass
class LocalServer:
    """A server in a process of its own, which can be killed and started again."""

    folder: Path
    key: str = KEY
    settings: dict[str, Any] = field(default_factory=dict)
    leader: tuple[str, str] | None = None
    port: int = 0
    process: BaseProcess | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> Client:
        return Client(self.url, self.key, timeout=60)

    def start(self) -> LocalServer:
        if not self.port:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.folder.mkdir(exist_ok=True)
        arguments = (self.folder, self.port, self.key, self.settings, self.leader)
        self.process = PROCESSES.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        with self.client as client:
            client.wait(60)
        return self

    def kill(self) -> None:
        assert self.process is not None and self.process.pid is not None
        if self.process.is_alive():
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def die_at(self, step: str) -> None:
        """Be killed when that step comes."""
        assert step in STEPS
        (self.folder / "die").write_text(step)

    def wait_for_death(self) -> None:
        assert self.process is not None
        self.process.join(60)
        assert not self.alive

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.is_alive()

    def state(self) -> tuple[int, str | None]:
        """Version and digest of what is served."""
        with self.client as client:
            health = client.health(digest=True)
        assert health.ranks[0].digest == health.digest
        return health.version, health.digest
