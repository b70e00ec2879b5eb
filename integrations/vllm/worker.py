"""The part of the plugin that runs inside vLLM's worker, next to the weights.

Start the server with `--worker-extension-cls
ultraedit_kernels.integrations.vllm.worker.UltraEditWorker`; vLLM then mixes the class into its
worker and `collective_rpc` can call its methods. Each call runs between two engine steps, so each
is short: a turn is prepared on the shadow slice by slice, and serving goes on between the slices.
One turn at a time: `begin` takes the worker for a turn, whose id the caller makes up; `edit`,
`apply_delta` or `rollback` says what to do, `step` does a slice of it, `commit` makes it live, and
`cancel` ends the turn, committed or not.

Only None, bool, int, float, str, bytes, list and dict cross an RPC. A refusal that the caller is to
blame for comes back as {"error": {"message", "type"}}; anything else is raised.

Under tensor parallelism every call runs on all ranks, and fails on all if it fails on one. Nothing
is raised then, as vLLM would stop reading at the first rank's exception and take the others'
answers for those to its next call: such an error has type "Failed", and "RankError" on the ranks
where nothing is wrong. Rank 0 alone writes the state directory; the others read it.

Under data parallelism the first engine computes and keeps the journal; the others follow it: they
have no twin, and are given each change as a delta. Nor has an engine of several pipeline stages a
twin: it takes deltas only.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ultraedit_kernels.model.parallel import RankError, together

if TYPE_CHECKING:
    from ultraedit_kernels.editor import Editor, TurnResult
    from ultraedit_kernels.integrations.vllm.slices import Slices
    from ultraedit_kernels.integrations.vllm.traffic import Traffic
    from ultraedit_kernels.integrations.vllm.twin import Twin
    from ultraedit_kernels.ops.statistics import Statistics
    from ultraedit_kernels.store.delta import EditDelta

logger = logging.getLogger("vllm.ultraedit")

SLICE = 10
"""Sequences that a turn captures in one slice, if no batch size is given."""
OWN_REQUESTS = "ultraedit-"
"""How the ids of the service's requests begin."""
PROBE_BATCH = 8
"""Prompts that a dry run answers in one slice."""


class UnknownVersion(LookupError):
    """The version that was asked for does not exist."""


class LostTurn(RuntimeError):
    """A turn that is not, or no longer, the one under way."""


@dataclass
class _Turn:
    """The turn that has the worker."""

    id: str
    before: int
    """The version that was live at its start."""
    work: Slices | None = None
    called: float = field(default_factory=time.monotonic)
    """When its owner was last heard of."""
    replayed: tuple[int, dict[str, Statistics]] | None = None
    """The version on the shadow, and its statistics, that an engine which follows returns to."""


def load_tokenizer(model_config: Any, chat_template: str | None) -> Any:
    """A tokenizer of one's own (the library's are not safe to share between threads)."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
    if tokenizer is not None and chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _rpc(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Autograd as the editor needs it, a caller's mistakes as data, the time taken in `ms`, and the
    clock at the end, `at`, in milliseconds too."""

    @functools.wraps(method)
    def call(self: UltraEditWorker, *args: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            with torch.inference_mode(False), self._ultraedit_together():
                answer = method(self, *args)
        except (ValueError, TypeError, UnknownVersion, LostTurn) as error:
            answer = {"error": {"message": str(error), "type": type(error).__name__}}
        except Exception as error:
            if self.vllm_config.parallel_config.world_size == 1:  # type: ignore[attr-defined]
                raise
            logger.exception("%s failed", method.__name__)
            kind = "RankError" if isinstance(error, RankError) else "Failed"
            answer = {"error": {"message": f"{type(error).__name__}: {error}", "type": kind}}
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()  # or the engine waits for what was launched
        end = time.perf_counter()
        answer["ms"], answer["at"] = (end - start) * 1e3, end * 1e3
        return answer

    return call


class UltraEditWorker:
    """Methods that vLLM mixes into its worker. No `__init__`, and no name without the prefix."""

    _ultraedit_editor: Editor | None = None
    _ultraedit_twin: Twin
    _ultraedit_live: int
    """Version of the weights that vLLM serves; the editor is ahead of it until the commit."""
    _ultraedit_turn: _Turn | None = None
    _ultraedit_difference: float | None = None
    _ultraedit_traffic: Traffic | None = None
    _ultraedit_follows: bool
    """Whether another engine computes, and keeps the journal."""
    _ultraedit_foreign = False
    """Whether vLLM has loaded weights that are not the live version's."""

    @_rpc
    def ultraedit_start(
        self, settings: dict[str, Any], chat_template: str | None, follows: bool
    ) -> dict[str, Any]:
        """Build twin and editor and publish the version of the state directory, if there is one.

        Args:
            settings: the editor's.
            chat_template: of the tokenizer, if not its own.
            follows: another engine computes, and has been started.

        Returns: version, modules, last_layer_only (an edit leaves every KV block valid), difference
        (what `ultraedit_check` found for another API server).
        A refusal has type "UnsupportedModelError" or "ValueError".
        """
        if self._ultraedit_editor is None:
            from ultraedit_kernels.editor import Editor
            from ultraedit_kernels.integrations.vllm.twin import (
                UnsupportedModelError,
                build_twin,
                build_weights,
            )
            from ultraedit_kernels.method.memory import STREAM

            known = [*inspect.signature(Editor).parameters][2:]  # after model and tokenizer
            known = [*known, "traffic"]
            known.remove("writes")
            if unknown := sorted(settings.keys() - set(known)):
                raise ValueError(
                    f"unknown setting {', '.join(unknown)}, expected only {', '.join(known)}; "
                    "correct the ultraedit section of --additional-config"
                )
            config = self.vllm_config  # type: ignore[attr-defined]
            tokenizer = load_tokenizer(config.model_config, chat_template)
            computes = not follows and config.parallel_config.pipeline_parallel_size == 1
            if not computes:
                if not follows and settings.get("canaries"):
                    raise ValueError(
                        "canaries are set, but under pipeline parallelism no engine can check "
                        "them; check deltas where they are made"
                    )
                settings = settings | {"anchors": 0, "canaries": (), "traffic": 0}
            traffic = settings.get("traffic", 0)
            settings = {name: value for name, value in settings.items() if name != "traffic"}
            if isinstance(traffic, bool) or not isinstance(traffic, int) or traffic < 0:
                raise ValueError(f"traffic is {traffic!r}, expected a whole number of keys, or 0")
            build = build_twin if computes else build_weights
            try:
                model = self.get_model()  # type: ignore[attr-defined]
                twin = build(model, config, settings.get("modules", "auto"))
            except UnsupportedModelError as error:
                return {"error": {"message": str(error), "type": "UnsupportedModelError"}}
            with together(twin.model):
                try:
                    given = {"batch_size": SLICE} | settings | {"modules": list(twin.live)}
                    stream = Path(config.model_config.model) / STREAM
                    if stream.is_file():  # the checkpoint was edited before
                        given.setdefault("continues", stream)
                    editor = Editor(twin.model, tokenizer, writes=not follows, **given)
                except (ValueError, OSError) as error:
                    if (where := settings.get("state_dir")) is None:
                        raise
                    raise ValueError(f"{error} (state directory: {where})") from error
                editor.prepare()  # or it is the longest slice of the first turn
            self._ultraedit_twin, self._ultraedit_editor = twin, editor
            self._ultraedit_follows = follows
            self._ultraedit_publish()
            self._ultraedit_follow()
            if traffic:
                self._ultraedit_watch_traffic(traffic)
        editor = self._ultraedit_editor
        return {
            "version": editor.version,
            "modules": list(editor.modules),
            "last_layer_only": _last_layer_only(editor.modules, self._ultraedit_twin.model.config),
            "difference": self._ultraedit_difference,
        }

    @_rpc
    def ultraedit_check(self, token_ids: list[int], served: list[float]) -> dict[str, Any]:
        """Compare the twin's scores of a text with the engine's, for every token but the first.

        Returns: difference, nats a token on average. A refusal has type "UnsupportedModelError".
        """
        from ultraedit_kernels.integrations.vllm.twin import UnsupportedModelError

        self._ultraedit_require_editor()
        mode = self.vllm_config.model_config.logprobs_mode  # type: ignore[attr-defined]
        try:
            self._ultraedit_difference = self._ultraedit_twin.check(token_ids, served, mode)
        except UnsupportedModelError as error:
            return {"error": {"message": str(error), "type": "UnsupportedModelError"}}
        return {"difference": self._ultraedit_difference}

    @_rpc
    def ultraedit_begin(self, turn: str, keys: list[str]) -> dict[str, Any]:
        """Take the worker for a turn, and look up idempotency keys in the journal.

        Returns: known, records by key; or, if another turn has the worker, busy, its id, and idle,
        seconds since its owner was heard of.
        """
        editor = self._ultraedit_require_editor()
        if self._ultraedit_foreign:
            raise RuntimeError(
                f"the engine's weights are not those of version {self._ultraedit_live}: they were "
                "loaded from elsewhere, or not yet since a level-2 sleep; reload the checkpoint's "
                "(reload_weights), or restart the server"
            )
        if (other := self._ultraedit_turn) is not None and self._ultraedit_follows:
            self.ultraedit_cancel(other.id)  # the first engine knows whose turn it is
        elif other is not None:
            return {"busy": other.id, "idle": time.monotonic() - other.called}
        known = {}
        with self._ultraedit_together():
            taken = _Turn(turn, self._ultraedit_live)
            for record in editor.history() if keys else ():
                for request in record.get("note", {}).get("requests", ()):
                    if request["key"] in keys:
                        known[request["key"]] = record
        self._ultraedit_turn = taken
        return {"known": known}

    @_rpc
    def ultraedit_edit(
        self,
        turn: str,
        edits: list[dict[str, Any]],
        probes: list[dict[str, Any]] | None,
        note: dict[str, Any],
        followed: bool,
    ) -> dict[str, Any]:
        """Edit, on the shadow; the note goes into the version's record. If engines follow, the
        result holds the delta for them. With probes ({"ids", "max_tokens"} each) it is a dry run:
        the result holds the shadow's answers to them, and nothing is left to commit."""
        from ultraedit_kernels.model.request import EditRequest

        requests = [EditRequest.from_dict(edit) for edit in edits]
        return self._ultraedit_work(turn, self._ultraedit_run(requests, probes, note, followed))

    @_rpc
    def ultraedit_apply_delta(self, turn: str, data: bytes) -> dict[str, Any]:
        """Apply a delta file to the shadow."""
        from ultraedit_kernels.store.delta import EditDelta

        self._ultraedit_require_turn(turn)
        delta = EditDelta.from_bytes(data)
        return self._ultraedit_work(turn, self._ultraedit_run_delta(delta))

    @_rpc
    def ultraedit_rollback(self, turn: str, version: int) -> dict[str, Any]:
        """Take the shadow back to a version, and forget the later ones; an engine that follows does
        so with the commit, when the first engine has."""
        editor = self._ultraedit_require_editor()
        if 0 < version < editor.oldest:
            raise UnknownVersion(
                f"version {version} was let go, expected 0 or {editor.oldest} and later"
            )
        if self._ultraedit_follows:
            ours = self._ultraedit_require_turn(turn)

            def replay() -> None:
                try:
                    ours.replayed = version, editor.replay(version)
                except BaseException:
                    self._ultraedit_restore_shadow()
                    raise

            return self._ultraedit_work(turn, _private(replay))
        return self._ultraedit_work(turn, _private(lambda: editor.rollback(version)))

    @_rpc
    def ultraedit_step(self, turn: str, ms: float) -> dict[str, Any]:
        """One slice, of about `ms` milliseconds.

        Returns: done; with it result, without it beside, whether the work goes on by itself and
        needs no more slices. What is done stays done.
        """
        work = self._ultraedit_require_turn(turn).work
        if work is None:
            raise LostTurn(f"turn {turn} has nothing to do")
        if work.step(ms):
            return {"done": True, "result": work.result}
        return {"done": False, "beside": work.private}

    @_rpc
    def ultraedit_commit(self, turn: str) -> dict[str, Any]:
        """Make the shadow live. If that fails, on any rank, shadow and live weights are as before
        the turn on all; after a rollback, which the journal holds, they are tried again."""
        ours = self._ultraedit_require_turn(turn)
        try:
            with self._ultraedit_together():
                self._ultraedit_publish()
        except BaseException:
            self._ultraedit_revert(ours)
            raise
        return {"version": self._ultraedit_live}

    @_rpc
    def ultraedit_revert(self, turn: str) -> dict[str, Any]:
        """As a commit that has failed: it did on another engine."""
        self._ultraedit_revert(self._ultraedit_require_turn(turn))
        return {"version": self._ultraedit_live}

    @_rpc
    def ultraedit_read_back(self, turn: str) -> dict[str, Any]:
        """After the commit: work whose result is the live version and digest, see
        `ultraedit_status`."""
        from ultraedit_kernels.store.delta import digest_all

        self._ultraedit_require_turn(turn).work = None
        live, version = self._ultraedit_twin.live, self._ultraedit_live
        work = _private(lambda: {"version": version, "digest": digest_all(live)})
        return self._ultraedit_work(turn, work)

    @_rpc
    def ultraedit_cancel(self, turn: str, newest: int | None = None) -> dict[str, Any]:
        """End a turn. What it has not committed is dropped, and live weights are untouched by it,
        but for a rollback that the journal holds: it has `newest` as its last version. An engine
        that follows has to be told."""
        if (ours := self._ultraedit_turn) is not None and ours.id == turn:
            with self._ultraedit_together():
                if ours.work is not None:
                    ours.work.close()
                if ours.replayed is not None and ours.replayed[0] == newest:
                    self._ultraedit_publish()
                elif ours.replayed is not None:
                    self._ultraedit_restore_shadow()
                self._ultraedit_drop()
            self._ultraedit_turn = None
        return {"version": self._ultraedit_live}

    @_rpc
    def ultraedit_delta(self, version: int) -> dict[str, Any]:
        """The delta file of one version."""
        editor = self._ultraedit_require_editor()
        if not editor.oldest < version <= self._ultraedit_live:
            raise UnknownVersion(
                f"version {version} has no delta in the journal, expected {editor.oldest + 1} to "
                f"{self._ultraedit_live}; GET /v1/edits lists all versions"
            )
        return {"data": editor.delta(version).to_bytes()}

    @_rpc
    def ultraedit_history(self, limit: int, before: int | None) -> dict[str, Any]:
        """Journal entries below version `before`, newest first, and whether there are more."""
        entries = self._ultraedit_require_editor().history()[: self._ultraedit_live]
        older = [e for e in reversed(entries) if before is None or e["version"] < before]
        return {"entries": older[:limit], "has_more": len(older) > limit}

    @_rpc
    def ultraedit_status(self, digest: bool) -> dict[str, Any]:
        """The live version, the journal's newest, whether a turn is under way, how many keys of
        live traffic there are and, if asked for, `Editor.digest` of the weights that are served."""
        from ultraedit_kernels.store.delta import digest_all

        newest = self._ultraedit_require_editor().version
        found = digest_all(self._ultraedit_twin.live) if digest else None
        under_way = self._ultraedit_turn is not None
        return {
            "version": self._ultraedit_live,
            "newest": newest,
            "digest": found,
            "turn": under_way,
            "traffic_keys": len(self._ultraedit_traffic or ()),
        }

    def _ultraedit_require_editor(self) -> Editor:
        if self._ultraedit_editor is None:
            raise RuntimeError("ultraedit_start has not been called")
        return self._ultraedit_editor

    def _ultraedit_require_turn(self, turn: str) -> _Turn:
        ours = self._ultraedit_turn
        if ours is None or ours.id != turn:
            raise LostTurn(
                f"turn {turn} is not under way: it was ended, or its server was not heard of for "
                "too long; nothing was changed, send the request again"
            )
        ours.called = time.monotonic()
        return ours

    def _ultraedit_work(
        self, turn: str, work: Generator[str, None, dict[str, Any] | None]
    ) -> dict[str, Any]:
        from ultraedit_kernels.integrations.vllm.slices import Slices

        ours = self._ultraedit_require_turn(turn)
        if ours.work is not None:
            raise LostTurn(f"turn {turn} has its work already")
        ours.work = Slices(work, self._ultraedit_twin.model)
        return {}

    def _ultraedit_together(self) -> AbstractContextManager[None]:
        """What is done inside fails on all ranks if it fails on one."""
        editor = self._ultraedit_editor
        return nullcontext() if editor is None else together(editor.model)

    def _ultraedit_publish(self) -> None:
        editor, turn = self._ultraedit_require_editor(), self._ultraedit_turn
        self._ultraedit_twin.publish()
        if turn is not None and turn.replayed is not None:
            editor.forget(*turn.replayed)
            turn.replayed = None
        self._ultraedit_live = editor.version

    def _ultraedit_revert(self, turn: _Turn) -> None:
        with self._ultraedit_together():
            self._ultraedit_live = turn.before
            self._ultraedit_drop()
            self._ultraedit_publish()

    def _ultraedit_follow(self) -> None:
        """Stay with vLLM when it puts weights to sleep, and when it loads the checkpoint's again,
        as it does after a level-2 sleep."""

        worker: Any = self

        def sleeping(sleep: Any) -> Any:
            @functools.wraps(sleep)
            def call(*args: Any, **options: Any) -> Any:
                if self._ultraedit_turn is not None:  # it would read weights that are gone
                    self.ultraedit_cancel(self._ultraedit_turn.id)
                return sleep(*args, **options)

            return call

        def loading(load: Any) -> Any:
            @functools.wraps(load)
            def call(*args: Any, **options: Any) -> Any:
                result = load(*args, **options)
                with torch.inference_mode(False):
                    self._ultraedit_republish()
                return result

            return call

        worker.sleep = sleeping(worker.sleep)
        worker.wake_up = loading(worker.wake_up)
        worker.reload_weights = loading(worker.reload_weights)

    def _ultraedit_watch_traffic(self, limit: int) -> None:
        """Sample keys of the prompts that are served, after the step that begins with them."""
        from ultraedit_kernels.integrations.vllm.traffic import Traffic

        worker: Any = self
        execute, self._ultraedit_traffic = worker.execute_model, Traffic(limit)

        @functools.wraps(execute)
        def call(scheduled: Any, *args: Any, **options: Any) -> Any:
            result = execute(scheduled, *args, **options)
            # In a turn the twin has the turn's weights, not those that are served.
            if self._ultraedit_traffic is not None and self._ultraedit_turn is None:
                prompts = [
                    request.prompt_token_ids
                    for request in scheduled.scheduled_new_reqs
                    if request.prompt_token_ids
                    and request.lora_request is None
                    and not request.req_id.startswith(OWN_REQUESTS)
                ]
                self._ultraedit_sample(prompts)
            return result

        worker.execute_model = call

    def _ultraedit_sample(self, prompts: list[list[int]]) -> None:
        """Offer prompts to the sample. If that fails no more are taken; they are served anyhow."""
        editor, traffic = self._ultraedit_require_editor(), self._ultraedit_traffic
        assert traffic is not None
        try:
            with torch.inference_mode(False), self._ultraedit_together():
                for prompt in prompts:
                    traffic.offer(editor.model, editor.modules, prompt)
        except Exception:
            logger.exception("UltraEdit: no more keys of live traffic are taken")
            self._ultraedit_traffic = None

    def _ultraedit_republish(self) -> None:
        """After a load: serve the live version again. Other weights than the checkpoint's, or none
        yet, are left alone, and no turn begins on them."""
        from ultraedit_kernels.store.delta import digest_all

        editor, live = self._ultraedit_require_editor(), self._ultraedit_twin.live
        version = self._ultraedit_live
        if editor.is_pristine(live):
            if self._ultraedit_turn is not None:
                self.ultraedit_cancel(self._ultraedit_turn.id)
            self._ultraedit_publish()
            self._ultraedit_foreign = False
        else:
            served = editor.history()[version - 1]["digest"] if version else None
            self._ultraedit_foreign = digest_all(live) != served

    def _ultraedit_drop(self) -> None:
        editor = self._ultraedit_require_editor()
        if editor.version > self._ultraedit_live:
            editor.rollback(self._ultraedit_live)
        elif editor.version < self._ultraedit_live:
            self._ultraedit_publish()  # a rollback that the journal holds cannot be dropped

    def _ultraedit_run(
        self,
        requests: list[Any],
        probes: list[dict[str, Any]] | None,
        note: dict[str, Any],
        followed: bool,
    ) -> Generator[str, None, dict[str, Any]]:
        editor = self._ultraedit_require_editor()
        if self._ultraedit_traffic is not None:
            editor.hold_still(self._ultraedit_traffic.keys())
        if probes is None:
            done = yield from editor.steps(requests, note=note)
            result = _result(done) | {"digest": editor.history()[-1]["digest"]}
            return result | ({"delta": done.delta.to_bytes()} if followed else {})
        done = yield from editor.steps(requests, commit=False)
        try:
            for name, factor in done.delta.factors.items():
                factor.apply(editor.weights[name])
            answers = yield from self._ultraedit_answers(probes)
        finally:
            self._ultraedit_restore_shadow()
        return _result(done) | {"answers": answers}

    def _ultraedit_run_delta(self, delta: EditDelta) -> Generator[str, None, dict[str, Any]]:
        editor = self._ultraedit_require_editor()
        done = yield from editor.delta_steps(delta)
        return _result(done) | {"digest": editor.history()[-1]["digest"]}

    def _ultraedit_answers(self, probes: list[dict[str, Any]]) -> Generator[str, None, list[str]]:
        from ultraedit_kernels.model.generation import generate

        editor = self._ultraedit_require_editor()
        answers = []
        for i in range(0, len(probes), PROBE_BATCH):
            part = probes[i : i + PROBE_BATCH]
            longest = max(probe["max_tokens"] for probe in part)
            prompts = [probe["ids"] for probe in part]
            tokens = generate(editor.model, editor.tokenizer, prompts, max_new_tokens=longest)
            for probe, ids in zip(part, tokens, strict=True):
                ids = ids[: probe["max_tokens"]]
                answers.append(editor.tokenizer.decode(ids, skip_special_tokens=True).strip())
            yield "answers"
        return answers

    @torch.no_grad()
    def _ultraedit_restore_shadow(self) -> None:
        weights = self._ultraedit_require_editor().weights
        for name, live in self._ultraedit_twin.live.items():
            weights[name].copy_(live)


def _private(work: Callable[[], dict[str, Any] | None]) -> Generator[str, None, Any]:
    """Work on the shadow alone, which goes on beside the engine."""
    yield "record"
    return work()


def _result(result: TurnResult) -> dict[str, Any]:
    edits = [{"succeeded": e.succeeded, "rounds": e.rounds} for e in result.edits]
    return {
        "version": result.version,
        "edits": edits,
        "timings": dict(result.timings),
        "rejected": result.rejected,
    }


def _last_layer_only(modules: list[str], config: Any) -> bool:
    """Whether all modules feed no attention: keys and values of every layer are computed before the
    feed-forward block of the last one."""
    last = f".{config.get_text_config().num_hidden_layers - 1}.mlp."
    return all(last in name for name in modules)
