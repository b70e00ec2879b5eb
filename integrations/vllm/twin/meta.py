"""The Hugging Face model of what vLLM serves, on the meta device: modules without numbers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from ultraedit_kernels.integrations.vllm.twin.refuse import UnsupportedModelError
from ultraedit_kernels.model.parallel import local_config

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def meta_models(is_text_part: bool, config: VllmConfig) -> tuple[Any, Any]:
    """The whole model, and what one rank has of it: the same unless the tensor parallel size is
    above 1.

    Args:
        is_text_part: whether vLLM serves a multimodal model, of which this is the text model.
        config: the worker's configuration.

    Raises:
        UnsupportedModelError: transformers has no such model, or it cannot be divided so.
    """
    size = config.parallel_config.tensor_parallel_size
    whole = _meta_model(is_text_part, config)
    return whole, whole if size == 1 else _meta_model(is_text_part, config, size)


def _meta_model(is_text_part: bool, config: VllmConfig, size: int = 1) -> Any:
    """The Hugging Face causal language model of the served configuration, on the meta device; or
    what one of `size` ranks has of it."""
    from transformers import AutoModelForCausalLM

    model_config = config.model_config
    # vLLM's Transformers backend writes its own attention into the configuration, and from_config
    # writes to it as well.
    hf_config = copy.deepcopy(
        model_config.hf_text_config if is_text_part else model_config.hf_config
    )
    # Only the eager attention of the library applies a soft cap to the scores.
    capped = getattr(hf_config, "attn_logit_softcapping", None) is not None
    hf_config._attn_implementation = "eager" if capped else None
    match_long_rope(hf_config, model_config.max_model_len)
    try:
        if size > 1:
            hf_config = local_config(hf_config, size)
        with _uncompiled(config), torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                hf_config,
                dtype=model_config.dtype,
                trust_remote_code=model_config.trust_remote_code,
            )
    except (ValueError, ImportError, KeyError) as error:
        raise UnsupportedModelError(
            f"transformers has no causal language model for {type(hf_config).__name__}"
            f"{f' in {size} parts' if size > 1 else ''}: {error}"
        ) from error


@contextlib.contextmanager
def _uncompiled(config: VllmConfig) -> Iterator[None]:
    """Build library classes that vLLM's Transformers backend has patched for torch.compile.

    The patch asks for vLLM's current configuration, and stands aside where compilation is off.
    """
    from vllm.config import CompilationMode, set_current_vllm_config

    plain = copy.copy(config)
    plain.compilation_config = copy.copy(config.compilation_config)
    plain.compilation_config.mode = CompilationMode.NONE
    with set_current_vllm_config(plain):
        yield


def match_long_rope(hf_config: Any, max_model_len: int) -> None:
    """Have the configuration use the LongRoPE factors that vLLM uses for every text: those for the
    longest that it may serve, `max_model_len` tokens. Other configurations stay as they are."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    original = rope.get("original_max_position_embeddings") or getattr(
        hf_config, "original_max_position_embeddings", hf_config.max_position_embeddings
    )
    used = "long_factor" if max_model_len > original else "short_factor"
    rope["long_factor"] = rope["short_factor"] = rope[used]


def fill_buffers(model: Any, device: torch.device) -> None:
    """Give buffers (rotary frequencies, position tables) their values: no checkpoint carries them.

    `_init_weights` is how the library itself restores them after loading on the meta device. It
    runs on two different fills, and what it does not write shows as a difference.

    Raises:
        UnsupportedModelError: a buffer has no value that follows from the configuration.
    """
    for name, module in model.named_modules():
        names = [n for n, _ in module.named_buffers(recurse=False)]
        if not names:
            continue
        results = []
        for fill in (0, 1):
            for n in names:
                module._buffers[n] = torch.full_like(module._buffers[n], fill, device=device)
            model._init_weights(module)  # the parameters are still on the meta device
            results.append([module._buffers[n] for n in names])
        for n, first, second in zip(names, *results, strict=True):
            if not torch.equal(first, second):
                raise UnsupportedModelError(
                    f"buffer {name}.{n} of {type(model).__name__} cannot be rebuilt without a "
                    "checkpoint; this architecture is not supported"
                )
