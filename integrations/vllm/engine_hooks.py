"""Where the plugin steps in when vLLM's worker sleeps, loads weights or runs prompts: the worker's
methods are wrapped, on the object alone. And what vLLM may compile meanwhile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import CompilationMode, VllmConfig

from ultraedit_kernels.integrations.vllm.twin.watch import Watch
from ultraedit_kernels.integrations.vllm.workers import OWN_REQUESTS

LOADS = ("reload_weights", "finish_weight_update", "reset_weights")
"""Methods of vLLM's worker after which its weights may be others. What writes to them by another
way is noticed by `twin.watch`, when a turn begins and before it is committed."""


def follow_weights(
    worker: Any, watch: Watch, sleeping: Callable[[], None], loaded: Callable[[], None]
) -> None:
    """Stay with vLLM when it puts weights to sleep, and when it loads some: the checkpoint's again,
    as it does after a level-2 sleep, or a trainer's.

    Args:
        worker: vLLM's.
        watch: told whether they can be read.
        sleeping: called before the weights go.
        loaded: called when there are weights again.
    """

    def before(sleep: Any) -> Any:
        @functools.wraps(sleep)
        def call(*args: Any, **options: Any) -> Any:
            sleeping()
            watch.asleep = True
            return sleep(*args, **options)

        return call

    def after(load: Any) -> Any:
        @functools.wraps(load)
        def call(*args: Any, **options: Any) -> Any:
            result = load(*args, **options)
            tags = options.get("tags") or ["weights"]  # of a wake-up: what is to wake
            if "weights" in tags:
                watch.asleep = False
                with torch.inference_mode(False):
                    loaded()
            return result

        return call

    worker.sleep = before(worker.sleep)
    for name in ("wake_up", *LOADS):
        if hasattr(worker, name):
            setattr(worker, name, after(getattr(worker, name)))


def follow_steps(worker: Any, stepped: Callable[[list[list[int]]], None]) -> None:
    """Come in after every engine step.

    Args:
        worker: vLLM's.
        stepped: called with the token ids of the prompts that the step has begun with, without the
            service's own and those that use an adapter.
    """
    execute = worker.execute_model

    @functools.wraps(execute)
    def call(scheduled: Any, *args: Any, **options: Any) -> Any:
        result = execute(scheduled, *args, **options)
        if scheduled.total_num_scheduled_tokens:  # or it only clears away finished requests
            stepped(
                [
                    request.prompt_token_ids
                    for request in scheduled.scheduled_new_reqs
                    if request.prompt_token_ids
                    and request.lora_request is None
                    and not request.req_id.startswith(OWN_REQUESTS)
                ]
            )
        return result

    worker.execute_model = call


def compile_nothing(config: VllmConfig, nothing: bool) -> None:
    """Have an engine whose model is not compiled compile no function either, or do so again.

    vLLM compiles one for its first log-probabilities: a request may wait for that, but the check of
    the twin would hold up the server's start, for two to ten seconds.

    Args:
        config: of the engine.
        nothing: until this is called again.
    """
    if config.compilation_config.mode == CompilationMode.NONE:
        torch.compiler.set_stance("force_eager" if nothing else "default")
