"""The bundled model with one thing changed, and the renderer of a server for it; no engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

BUNDLED = Path(__file__).parents[3] / "bench" / "tiny-facts"
THOUGHTS = {"Ā": "<think>", "ā": "</think>"}
"""Bytes that no text has, whose tokens mark thoughts instead."""
FUZZ = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
"""Of inputs that each take a while, the same ones every time."""


def facts_copy(folder: Path, **changes: Any) -> Path:
    """A copy of the bundled model. Changes: `template`, a text; `generation`, fields of
    generation_config.json; `thoughts`, whether there are tokens for them."""
    shutil.copytree(BUNDLED, folder, copy_function=_link)
    if "template" in changes:
        _write(folder / "chat_template.jinja", changes["template"])
    if "generation" in changes:
        file = folder / "generation_config.json"
        _write(file, json.dumps(json.loads(file.read_text()) | changes["generation"]))
    if changes.get("thoughts"):
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        words = tokenizer["model"]["vocab"]
        for byte, mark in THOUGHTS.items():
            words[mark] = words.pop(byte)
            added = dict(tokenizer["added_tokens"][-1], id=words[mark], content=mark)
            tokenizer["added_tokens"].append(added)
        tokenizer["added_tokens"].sort(key=lambda token: token["id"])
        _write(file, json.dumps(tokenizer))
    return folder


def config_of(folder: Path, **options: Any) -> Any:
    """vLLM's configuration, as its server makes it."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(folder), enforce_eager=True, **options).create_engine_config()


def renderer_of(config: Any, **options: Any) -> Any:
    """The renderer of a server with these options."""
    from vllm.renderers.online_renderer import OnlineRenderer
    from vllm.renderers.registry import renderer_from_config

    given = {"chat_template": None, "chat_template_content_format": "auto"} | options
    return OnlineRenderer(
        config.model_config, renderer_from_config(config), request_logger=None, **given
    )


def _link(source: str, target: str) -> None:
    Path(target).symlink_to(source)


def _write(file: Path, text: str) -> None:
    file.unlink()
    file.write_text(text)
