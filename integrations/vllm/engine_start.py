"""What a worker starts with: editor and twin, of the operator's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.integrations.vllm.background import Background
from ultraedit_kernels.integrations.vllm.engine_hooks import compile_nothing
from ultraedit_kernels.integrations.vllm.tokenizer import Rendering, load_tokenizer, stop_tokens
from ultraedit_kernels.integrations.vllm.twin import Twin, build_twin, build_weights
from ultraedit_kernels.method.memory import STREAM
from ultraedit_kernels.model.parallel import together
from ultraedit_kernels.model.wide import widen, widens
from ultraedit_kernels.settings import EditorSettings, MethodSettings, ServingSettings, check, only

SLICE = 10
"""Sequences that a turn captures in one slice, if no batch size is given."""


@dataclass(frozen=True)
class Parts:
    """What a worker edits with."""

    editor: Editor
    twin: Twin
    serving: ServingSettings
    """What a turn may take."""
    background: Background
    """What gathers the rest of what protects the model."""


def build_parts(
    worker: Any, settings: dict[str, Any], rendering: dict[str, Any], follows: bool
) -> Parts:
    """Build twin and editor, at the newest version of the state directory if there is one.

    Args:
        worker: vLLM's.
        settings: the operator's.
        rendering: the server's, see `tokenizer.Rendering`.
        follows: another engine computes, and has been started.

    Raises:
        ValueError: a bad setting, or a state directory or stream that does not fit.
        UnsupportedModelError: the model cannot be edited in place.
    """
    config = worker.vllm_config
    check(settings, "operator")
    tokenizer = load_tokenizer(config, Rendering(**rendering))
    computes = not follows and config.parallel_config.pipeline_parallel_size == 1
    settings = _settings(settings, computes, follows)
    serving = ServingSettings(**only(settings, ServingSettings))
    settings = only(settings, MethodSettings, EditorSettings)
    build = build_twin if computes else build_weights
    twin = build(worker.get_model(), config, settings.get("modules", "auto"))
    if wide := computes and widens(twin.model, serving.float32_gib):
        widen(twin.model, twin.live)
    if computes:  # it stops where the engine stops
        ends = stop_tokens(config.model_config, tokenizer)
        settings_of_model: Any = twin.model.generation_config
        settings_of_model.eos_token_id = ends
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
        apart = None
        if not editor.preparation.begin():
            apart = build_twin(worker.get_model(), config, list(twin.live), "gathering").model
            if wide:
                widen(apart, twin.live, like=twin.model)
        editor.prepare()  # or it is the longest slice of the first turn
    if computes:
        compile_nothing(config, True)  # until the twin is checked
    return Parts(editor, twin, serving, Background(editor, apart, serving.gather_share))


def _settings(settings: dict[str, Any], computes: bool, follows: bool) -> dict[str, Any]:
    """Those that this engine goes by."""
    if not computes:
        if not follows and settings.get("canaries"):
            raise ValueError(
                "canaries are set, but under pipeline parallelism no engine can check "
                "them; check deltas where they are made"
            )
        settings = settings | {"anchors": 0, "canaries": (), "traffic": 0}
    return settings


def last_layer_only(modules: list[str], config: Any) -> bool:
    """Whether all modules feed no attention: keys and values of every layer are computed before the
    feed-forward block of the last one.

    Args:
        modules: names of edited modules.
        config: the Hugging Face configuration of the model.
    """
    last = f".{config.get_text_config().num_hidden_layers - 1}.mlp."
    return all(last in name for name in modules)
