"""vLLM general plugin: keeps linear weights editable. Does nothing unless asked for by name."""

from __future__ import annotations

import os


def register() -> None:
    """Run by vLLM in every process before the model is built (group `vllm.general_plugins`).

    vLLM's CPU path packs the weight of every linear layer for oneDNN and frees the original, which
    leaves nothing to edit. Where `ultraedit` is named in `VLLM_PLUGINS` the plain layout is kept:
    vLLM has its own per-layer switch for this. An installed plugin that is not named, and every
    platform but the CPU, change nothing.
    """
    if "ultraedit" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.layers.linear import LinearBase

    LinearBase._cpu_skip_gemm_dispatch = True
