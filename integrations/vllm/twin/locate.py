"""Which of vLLM's tensors, and which part of it, is which parameter of the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.integrations.vllm.twin.refuse import UnsupportedModelError
from ultraedit_kernels.model.parallel import is_transposed

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def language_model(vllm_model: nn.Module, config: VllmConfig) -> nn.Module:
    """The text model inside a multimodal one; the model itself otherwise.

    Raises:
        UnsupportedModelError: a multimodal model has no causal language model with its own head.
    """
    if not config.model_config.is_multimodal_model:
        return vllm_model
    language_model = getattr(vllm_model, "get_language_model", lambda: None)()
    if language_model is None or not hasattr(language_model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(vllm_model).__name__} is multimodal and its language model is not a causal "
            "language model with a head of its own; serve a text-only checkpoint"
        )
    return language_model


def served_tensors(core: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """vLLM's parameters under their unwrapped names, as plain tensors on the same storage.

    `set_` makes a tensor that autograd may save, even where vLLM created its own under inference
    mode, and drops vLLM's parameter subclasses. LoRA wrappers keep the weight in `.base_layer`.
    """
    for name, parameter in core.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        data = parameter.data
        plain = torch.empty(0, dtype=data.dtype, device=data.device)
        plain.set_(data.untyped_storage(), data.storage_offset(), data.size(), data.stride())
        yield name.replace(".base_layer", ""), plain


def locator(
    model: Any, core: nn.Module, sources: Mapping[str, Tensor], size: int
) -> Callable[[str], Tensor | None]:
    """How a parameter of the Hugging Face model is found in vLLM's storage.

    The vocabulary is divided among the ranks with its padding, so that a part of it is taken whole.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mapper = getattr(core, "hf_to_vllm_mapper", None)
    rename = mapper.get_rename_mapper().map_name if mapper is not None else str
    merged = merged_modules(core)

    def locate(name: str) -> Tensor | None:
        """View of the part of vLLM's storage that holds parameter `name`, of that one's shape."""
        served, shape = rename(name) or name, shapes[name]
        owner = model.get_submodule(name.rpartition(".")[0])
        # vLLM's linear layers hold [d_out, d_in], and Conv1D the transpose of that.
        transposed = is_transposed(owner) and name.endswith(".weight")
        if transposed:
            shape = shape[::-1]
        if size > 1 and owner in (embedding, head):
            rows = sources.get(served, torch.empty(0))
            fits = len(rows) * size >= shape[0] and rows.shape[1:] == shape[1:]
            return rows if fits else None
        if served in sources:
            tensor, first = sources[served], 0
            # Padded vocabulary rows are the only ones that may be left over.
            total = tensor.shape[0] if owner in (embedding, head) else shape[0]
        else:
            *path, part, leaf = served.split(".")
            whole, parts = merged.get(part, ("", []))
            tensor = sources.get(".".join([*path, whole, leaf]), torch.empty(0))
            prefix = name.removesuffix(f"{part}.{leaf}")
            sizes = [shapes.get(f"{prefix}{p}.{leaf}", (0,))[0] for p in parts]
            if not sizes or not all(sizes) or transposed:
                return None
            first, total = sum(sizes[: parts.index(part)]), sum(sizes)
        if tensor.shape[0] != total or total < shape[0] or tensor.shape[1:] != shape[1:]:
            return None
        view = tensor.narrow(0, first, shape[0])
        return view.t() if transposed else view

    return locate


def merged_modules(core: nn.Module) -> dict[str, tuple[str, list[str]]]:
    """Part -> (merged module, all its parts in storage order): k_proj -> (qkv_proj, [q, k, v])."""
    merged: dict[str, list[str]] = {}
    for module in core.modules():
        mapper = getattr(module, "hf_to_vllm_mapper", None)
        for part, (whole, _) in getattr(mapper, "orig_to_new_stacked", {}).items():
            parts = merged.setdefault(whole.strip("."), [])
            if part.strip(".") not in parts:
                parts.append(part.strip("."))
    for module in core.modules():  # the documented attribute wins
        merged.update(getattr(module, "packed_modules_mapping", None) or {})
    return {part: (whole, parts) for whole, parts in merged.items() for part in parts}


def storage(tensor: Tensor) -> int:
    """The address of the memory that a tensor is a part of."""
    return tensor.untyped_storage().data_ptr()


def layers_by_storage(core: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """The storage of a weight -> vLLM's layers that have it, by name. Tied weights have several."""
    layers: dict[int, dict[str, nn.Module]] = {}
    for name, module in core.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            layers.setdefault(storage(weight), {})[name] = module
    return layers
