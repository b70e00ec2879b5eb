"""The part of the plugin that runs inside vLLM's worker, next to the weights.

Start the server with `--worker-extension-cls
ultraedit_kernels.integrations.vllm.worker.UltraEditWorker`; vLLM then mixes the class into its
worker and `collective_rpc` can call its methods. Each call runs between two engine steps, so each
is short: a turn is prepared on the shadow slice by slice, and serving goes on between the slices.

Only None, bool, int, float, str, bytes, list and dict cross an RPC. A refusal that the caller is to
blame for comes back as {"error": {"message", "type"}}; anything else is raised.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ultraedit_kernels.editor import Editor, TurnResult
    from ultraedit_kernels.integrations.vllm.twin import Twin

SLICE = 10
"""Sequences that a turn captures in one slice, if no batch size is given."""
PROBE_BATCH = 8
"""Prompts that a dry run answers in one slice."""


class UnknownVersion(LookupError):
    """The version that was asked for does not exist."""


def load_tokenizer(model_config: Any, chat_template: str | None) -> Any:
    """A tokenizer of one's own (the library's are not safe to share between threads)."""
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
    if tokenizer is not None and chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def _rpc(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Autograd as the editor needs it, a caller's mistakes as data, and the time taken in `ms`."""

    @functools.wraps(method)
    def call(self: UltraEditWorker, *args: Any) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            with torch.inference_mode(False):
                answer = method(self, *args)
        except (ValueError, TypeError, UnknownVersion) as error:
            answer = {"error": {"message": str(error), "type": type(error).__name__}}
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the engine waits for what was only launched
        answer["ms"] = (time.perf_counter() - start) * 1e3
        return answer

    return call


class UltraEditWorker:
    """Methods that vLLM mixes into its worker. No `__init__`, and no name without the prefix."""

    _ultraedit_editor: Editor | None = None
    _ultraedit_twin: Twin
    _ultraedit_live: int
    """Version of the weights that vLLM serves; the editor is ahead of it until the commit."""
    _ultraedit_turn: Generator[Any, None, dict[str, Any]] | None = None

    @_rpc
    def ultraedit_start(
        self, settings: dict[str, Any], chat_template: str | None
    ) -> dict[str, Any]:
        """Build twin and editor and publish the version of the state directory, if there is one.

        Returns: version, modules, last_layer_only (an edit leaves every KV block valid).
        A refusal has type "UnsupportedModelError" or "ValueError".
        """
        if self._ultraedit_editor is None:
            from ultraedit_kernels.editor import Editor
            from ultraedit_kernels.integrations.vllm.twin import UnsupportedModelError, build_twin

            known = [*inspect.signature(Editor).parameters][2:]  # after model and tokenizer
            if unknown := sorted(settings.keys() - set(known)):
                raise ValueError(
                    f"unknown setting {', '.join(unknown)}, expected only {', '.join(known)}; "
                    "correct the ultraedit section of --additional-config"
                )
            config = self.vllm_config  # type: ignore[attr-defined]
            tokenizer = load_tokenizer(config.model_config, chat_template)
            try:
                model = self.get_model()  # type: ignore[attr-defined]
                twin = build_twin(model, config, settings.get("modules", "auto"))
            except UnsupportedModelError as error:
                return {"error": {"message": str(error), "type": "UnsupportedModelError"}}
            try:
                given = {"batch_size": SLICE} | settings | {"modules": list(twin.live)}
                editor = Editor(twin.model, tokenizer, **given)
            except (ValueError, OSError) as error:
                if (where := settings.get("state_dir")) is None:
                    raise
                raise ValueError(f"{error} (state directory: {where})") from error
            editor.prepare()  # or it is the longest slice of the first turn
            self._ultraedit_twin, self._ultraedit_editor = twin, editor
            self._ultraedit_publish()
        editor = self._ultraedit_editor
        return {
            "version": editor.version,
            "modules": list(editor.modules),
            "last_layer_only": _last_layer_only(editor.modules, self._ultraedit_twin.model.config),
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
            return {"difference": self._ultraedit_twin.check(token_ids, served, mode)}
        except UnsupportedModelError as error:
            return {"error": {"message": str(error), "type": "UnsupportedModelError"}}

    @_rpc
    def ultraedit_begin(
        self, edits: list[dict[str, Any]], probes: list[dict[str, Any]] | None
    ) -> dict[str, Any]:
        """Start a turn. With probes ({"ids", "max_tokens"} each) it is a dry run: the last step's
        result holds the shadow's answers to them, and nothing is left to commit."""
        from ultraedit_kernels.data import EditRequest

        self._ultraedit_require_idle()
        requests = [EditRequest.from_dict(edit) for edit in edits]
        self._ultraedit_turn = self._ultraedit_run(requests, probes)
        return {}

    @_rpc
    def ultraedit_step(self) -> dict[str, Any]:
        """One slice of the turn under way: {"done": False}, or {"done": True, "result": {...}}."""
        if self._ultraedit_turn is None:
            raise RuntimeError("no turn is under way")
        try:
            next(self._ultraedit_turn)
        except StopIteration as stop:
            self._ultraedit_turn = None
            return {"done": True, "result": stop.value}
        except BaseException:
            self._ultraedit_turn = None  # the editor has put its weights back
            raise
        return {"done": False}

    @_rpc
    def ultraedit_apply_delta(self, data: bytes) -> dict[str, Any]:
        """Apply a delta file to the shadow, ready to commit."""
        from ultraedit_kernels.delta import EditDelta

        editor = self._ultraedit_require_idle()
        return {"result": _result(editor.apply_delta(EditDelta.from_bytes(data)))}

    @_rpc
    def ultraedit_commit(self) -> dict[str, Any]:
        """Make the shadow live. If that fails, shadow and live weights are as before the turn."""
        editor = self._ultraedit_require_editor()
        try:
            self._ultraedit_publish()
        except BaseException:
            self._ultraedit_drop()
            self._ultraedit_publish()
            raise
        return {"version": editor.version}

    @_rpc
    def ultraedit_cancel(self) -> dict[str, Any]:
        """Drop the turn under way or not yet committed; live weights are untouched by it."""
        if self._ultraedit_turn is not None:
            self._ultraedit_turn.close()
            self._ultraedit_turn = None
        self._ultraedit_drop()
        return {"version": self._ultraedit_live}

    @_rpc
    def ultraedit_rollback(self, version: int) -> dict[str, Any]:
        """Take shadow and live weights back to a version, and forget the later ones."""
        editor = self._ultraedit_require_idle()
        editor.rollback(version)
        self._ultraedit_publish()
        return {"version": editor.version}

    @_rpc
    def ultraedit_delta(self, version: int) -> dict[str, Any]:
        """The delta file of one version."""
        editor = self._ultraedit_require_editor()
        if not 1 <= version <= self._ultraedit_live:
            raise UnknownVersion(f"version {version} is not in the journal; GET /v1/edits lists it")
        return {"data": editor.delta(version).to_bytes()}

    @_rpc
    def ultraedit_history(self, limit: int, before: int | None) -> dict[str, Any]:
        """Journal entries below version `before`, newest first, and whether there are more."""
        entries = self._ultraedit_require_editor().history()[: self._ultraedit_live]
        older = [e for e in reversed(entries) if before is None or e["version"] < before]
        return {"entries": older[:limit], "has_more": len(older) > limit}

    @_rpc
    def ultraedit_status(self, digest: bool) -> dict[str, Any]:
        """The live version and, if asked for, `Editor.digest` of the weights vLLM serves from."""
        from ultraedit_kernels.delta import digest_all

        self._ultraedit_require_editor()
        found = digest_all(self._ultraedit_twin.live) if digest else None
        return {"version": self._ultraedit_live, "digest": found}

    def _ultraedit_require_editor(self) -> Editor:
        if self._ultraedit_editor is None:
            raise RuntimeError("ultraedit_start has not been called")
        return self._ultraedit_editor

    def _ultraedit_require_idle(self) -> Editor:
        editor = self._ultraedit_require_editor()
        if self._ultraedit_turn is not None or editor.version != self._ultraedit_live:
            raise RuntimeError("another turn is under way")
        return editor

    def _ultraedit_publish(self) -> None:
        self._ultraedit_twin.publish()
        self._ultraedit_live = self._ultraedit_require_editor().version

    def _ultraedit_drop(self) -> None:
        editor = self._ultraedit_require_editor()
        if editor.version != self._ultraedit_live:
            editor.rollback(self._ultraedit_live)

    def _ultraedit_run(
        self, requests: list[Any], probes: list[dict[str, Any]] | None
    ) -> Generator[Any, None, dict[str, Any]]:
        editor = self._ultraedit_require_editor()
        if probes is None:
            return _result((yield from editor.steps(requests)))
        result = yield from editor.steps(requests, commit=False)
        try:
            for name, factor in result.delta.factors.items():
                factor.apply(editor.weights[name])
            answers = yield from self._ultraedit_answers(probes)
        finally:
            self._ultraedit_restore_shadow()
        return _result(result) | {"answers": answers}

    def _ultraedit_answers(self, probes: list[dict[str, Any]]) -> Generator[None, None, list[str]]:
        from ultraedit_kernels.generation import generate

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
            yield
        return answers

    @torch.no_grad()
    def _ultraedit_restore_shadow(self) -> None:
        weights = self._ultraedit_require_editor().weights
        for name, live in self._ultraedit_twin.live.items():
            weights[name].copy_(live)


def _result(result: TurnResult) -> dict[str, Any]:
    edits = [{"succeeded": e.succeeded, "rounds": e.rounds} for e in result.edits]
    return {"version": result.version, "edits": edits, "timings": dict(result.timings)}


def _last_layer_only(modules: list[str], config: Any) -> bool:
    """Whether all modules feed no attention: keys and values of every layer are computed before the
    feed-forward block of the last one."""
    last = f".{config.get_text_config().num_hidden_layers - 1}.mlp."
    return all(last in name for name in modules)
