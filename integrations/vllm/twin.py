"""The zero-copy twin: a Hugging Face model whose parameters are views of vLLM's own tensors.

The side pass that computes an edit needs a model it can differentiate; vLLM's modules are built
for serving. Both hold the same numbers, so the twin is built on the meta device and its parameters
are pointed at vLLM's storage. Merged weights (`qkv_proj`, `gate_up_proj`) are split by `narrow`.
Only the edited modules own a copy, the shadow: an edit changes the shadow, and `Twin.publish` makes
it live.

Under tensor parallelism each rank has a twin of its part of the model: the same class, built for
its share of the heads and of the MLP's width, which gathers and adds up where vLLM's layers do.

An engine that only takes changes computed elsewhere needs no twin: `build_weights` gives it the
shadows of the edited weights alone.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn

from ultraedit_kernels.model.parallel import (
    Ranks,
    Shard,
    local_config,
    shard_embedding,
    shard_head,
    shard_linear,
    shard_of,
    weight_of,
)
from ultraedit_kernels.model.presets import resolve_modules

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_QUANTISED_SUFFIXES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "qzeros")
TOLERANCE = {torch.float32: 0.01}
HALF_TOLERANCE = 0.1
"""Most by which twin and engine may differ, nats a token on average over text the engine wrote.

Measured on small models of 12 architectures: at most 2e-6 in float32 and 0.024 in bfloat16 where
the twin is right, 0.47 and more where heads or weights are in another order in every layer."""


PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another that neither comes nor says that it has failed."""


class UnsupportedModelError(RuntimeError):
    """The served model cannot be edited in place; the text says why and what to do."""


@dataclass
class Twin:
    """A differentiable model on vLLM's weights.

    Attributes:
        model: Hugging Face causal language model in eval mode, no parameter requires grad. Edited
            modules own their weight (the shadow); all other parameters are views of vLLM's storage.
            Has the attribute `ranks` if it is divided among ranks. From `build_weights`: the edited
            modules only, which compute nothing.
        live: edited module name -> view of the weight that vLLM serves from, [d_out, d_in]; of a
            divided module, a `parallel.ShardedWeight`.
    """

    model: nn.Module
    live: dict[str, Any]

    @torch.no_grad()
    def publish(self) -> None:
        """Copy every shadow weight into vLLM's storage, in place.

        CUDA graphs and compiled code read the same address and stay valid. Call it between two
        engine steps; inside inference mode is fine.
        """
        for name, live in self.live.items():
            live.copy_(weight_of(self.model.get_submodule(name)))

    def check(self, token_ids: Sequence[int], served: Sequence[float], mode: str) -> float:
        """Compare with what the engine computes; the mean difference, nats a token.

        Names and shapes can match while vLLM keeps the weights in another order. The twin then
        computes something else, and its edits would be nonsense.

        Args:
            token_ids: a text.
            served: the engine's score of every token but the first.
            mode: vLLM's `logprobs_mode`, which says what its scores are.

        Raises:
            UnsupportedModelError: the difference is beyond rounding.
        """
        gaps = [abs(a - b) for a, b in zip(self.logprobs(token_ids, mode), served, strict=True)]
        difference = sum(gaps) / len(gaps)
        dtype = next(self.model.parameters()).dtype
        tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
        if not difference <= tolerance:  # or it is NaN
            raise UnsupportedModelError(
                f"the twin does not compute what vLLM serves: over {len(gaps)} tokens their log-"
                f"probabilities differ by {difference:.2g} on average and {max(gaps):.2g} at most, "
                f"expected at most {tolerance} on average in {str(dtype).removeprefix('torch.')}; "
                f"vLLM keeps the weights of {type(self.model).__name__} in another order, or "
                "computes with them differently, so that edits would go wrong; this architecture "
                "is not supported"
            )
        return difference

    def logprobs(self, token_ids: Sequence[int], mode: str = "raw_logprobs") -> list[float]:
        """Natural log-probability of every token but the first, given those before it.

        In a `mode` of logits, as vLLM's `logprobs_mode` has them, its logit instead.
        """
        device = next(self.model.parameters()).device
        with torch.inference_mode(False), torch.no_grad():
            ids = torch.tensor([list(token_ids)], device=device)
            scores = self.model(ids, use_cache=False).logits[0, :-1].float()
            if not mode.endswith("logits"):
                scores = scores.log_softmax(-1)
            return scores.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def build_twin(
    vllm_model: nn.Module, vllm_config: VllmConfig, modules: str | Sequence[str] = "auto"
) -> Twin:
    """Build the twin of a model that vLLM has loaded.

    Args:
        vllm_model: `worker.get_model()`, weights loaded, pipeline parallel size 1. With a tensor
            parallel size above 1, all ranks call this.
        vllm_config: the worker's configuration.
        modules: dotted names of the linear modules to edit, as Hugging Face names them, or "auto".

    Raises:
        UnsupportedModelError: the weights cannot be edited in place, or do not match the Hugging
            Face model; nothing has been changed.
        ValueError: `modules` names something that is not a linear module of its own.
    """
    # Under vLLM's inference mode new tensors could not be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        _check_config(vllm_config)
        core = _language_model(vllm_model, vllm_config)
        sources = dict(_served_tensors(core))
        _check_weights(sources)
        size = vllm_config.parallel_config.tensor_parallel_size
        whole = _meta_model(core is not vllm_model, vllm_config)
        model = whole if size == 1 else _meta_model(core is not vllm_model, vllm_config, size)
        _fill_buffers(model, next(iter(sources.values())).device)
        _share_parameters(model, core, sources, size)
        _check_complete(model)
        model.eval().requires_grad_(False)
        if size > 1:
            _divide(model, core)

        live = {}
        for name in resolve_modules(whole, whole.config, modules):
            module = model.get_submodule(name)
            live[name] = weight_of(module)
            dim = None if (shard := shard_of(module)) is None else shard.dim
            _check_editable(name, module.weight, dim, whole, core, size)
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        return Twin(model, live)


@torch.no_grad()
def build_weights(
    vllm_model: nn.Module, vllm_config: VllmConfig, modules: str | Sequence[str] = "auto"
) -> Twin:
    """Shadows of the edited weights alone, for changes that are computed elsewhere.

    All ranks of the engine call this, those of other pipeline stages included. Arguments and errors
    are `build_twin`'s; the pipeline parallel size may be above 1.
    """
    with torch.inference_mode(False):
        _check_config(vllm_config)
        core = _language_model(vllm_model, vllm_config)
        sources = dict(_served_tensors(core))
        size = vllm_config.parallel_config.tensor_parallel_size
        whole = _meta_model(core is not vllm_model, vllm_config)
        model = whole if size == 1 else _meta_model(core is not vllm_model, vllm_config, size)
        names = resolve_modules(whole, whole.config, modules)
        ranks = None
        if vllm_config.parallel_config.world_size > 1:
            from vllm.distributed import get_world_group

            ranks = _ranks(vllm_config.device_config.device_type, get_world_group())
        locate = _locator(model, core, sources, size)
        held, refusal = _held(names, locate, whole, core, sources, size)
        told = [(held, refusal)] if ranks is None else ranks.gather_objects((held, refusal))
        if refusals := [text for _, text in told if text]:
            raise UnsupportedModelError(refusals[0])
        alone: Any = nn.Module()
        alone.config, alone.ranks = whole.config, ranks
        live = {}
        for name in names:
            original = whole.get_submodule(name).weight
            owners = tuple(rank for rank, (theirs, _) in enumerate(told) if name in theirs)
            if not owners:
                raise UnsupportedModelError(
                    f"{type(core).__name__} keeps {name}.weight {list(original.shape)} under "
                    "another name or in another shape; this architecture is not supported"
                )
            view, dim = locate(f"{name}.weight"), told[owners[0]][0][name]
            if view is None:
                shape = [0 if i == dim else n for i, n in enumerate(original.shape)]
                view = next(core.parameters()).new_empty(shape, dtype=original.dtype)
            d_out, d_in = view.shape
            module: Any = nn.Linear(d_in, d_out, bias=False, device="meta")
            module.weight = nn.Parameter(view, requires_grad=False)
            if ranks is not None:
                module.shard = Shard(dim, ranks, tuple(original.shape), owners)
            live[name] = weight_of(module)
            module.weight = nn.Parameter(view.clone(), requires_grad=False)
            _put(alone, name, module)
        return Twin(alone, live)


def _held(
    names: Sequence[str],
    locate: Callable[[str], Tensor | None],
    whole: Any,
    core: nn.Module,
    sources: dict[str, Tensor],
    size: int,
) -> tuple[dict[str, int], str]:
    """Which of the modules this rank has, and in which dimension each is divided; or why it cannot
    edit one."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    try:
        _check_weights(sources)
        layers, held = _layers_by_storage(core), {}
        for name in names:
            if (view := locate(f"{name}.weight")) is not None:
                dim = int(isinstance(layers[_storage(view)], RowParallelLinear))
                _check_editable(name, view, dim, whole, core, size)
                held[name] = dim
    except UnsupportedModelError as error:
        return {}, str(error)
    return held, ""


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Have `root.get_submodule(name)` give the module."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def _check_config(config: VllmConfig) -> None:
    if config.quant_config is not None:
        raise UnsupportedModelError(
            f"the model is quantised ({config.quant_config.get_name()}): its weights cannot take a "
            "small change in place; serve the bfloat16, float16 or float32 checkpoint"
        )
    if config.load_config.load_format == "ipc_cache":
        raise UnsupportedModelError(
            "--load-format ipc_cache shares the weights with other servers, which an edit would "
            "change as well; use another load format"
        )
    from vllm.config import CompilationMode

    if config.compilation_config.mode != CompilationMode.NONE and torch._inductor.config.freezing:
        raise UnsupportedModelError(
            "TorchInductor's freezing builds the weights into the compiled code, so that an edit "
            "would have no effect; unset TORCHINDUCTOR_FREEZING, or serve with --enforce-eager"
        )
    offload = getattr(config, "offload_config", None)
    if offload is not None and (offload.uva.cpu_offload_gb or offload.prefetch.offload_group_size):
        raise UnsupportedModelError(
            "weights are offloaded to the CPU and copied back for every step; serve without "
            "--cpu-offload-gb and without an offload group"
        )


def _language_model(vllm_model: nn.Module, config: VllmConfig) -> nn.Module:
    """The text model inside a multimodal one; the model itself otherwise."""
    if not config.model_config.is_multimodal_model:
        return vllm_model
    language_model = getattr(vllm_model, "get_language_model", lambda: None)()
    if language_model is None or not hasattr(language_model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(vllm_model).__name__} is multimodal and its language model is not a causal "
            "language model with a head of its own; serve a text-only checkpoint"
        )
    return language_model


def _served_tensors(core: nn.Module) -> Iterator[tuple[str, Tensor]]:
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


def _check_weights(sources: dict[str, Tensor]) -> None:
    if not sources:
        raise UnsupportedModelError("vLLM's model has no parameters; the weights are not loaded")
    for name, tensor in sources.items():
        if name.endswith(_QUANTISED_SUFFIXES) or (
            not tensor.is_floating_point() or tensor.element_size() < 2
        ):
            raise UnsupportedModelError(
                f"{name} ({tensor.dtype}) belongs to a quantised layer, which cannot take a small "
                "change in place; serve the bfloat16, float16 or float32 checkpoint"
            )
        if ".experts." in name:
            raise UnsupportedModelError(
                f"{name}: mixture-of-experts layers keep their weights in a layout of their own "
                "and are not supported; serve a dense model"
            )
        if tensor.numel() == 0:
            raise UnsupportedModelError(
                f"{name} is empty: vLLM has packed the weight for the CPU and freed the original; "
                "start the server through `ultraedit serve`, or set VLLM_PLUGINS=ultraedit"
            )


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
    _match_long_rope(hf_config, model_config.max_model_len)
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


def _match_long_rope(hf_config: Any, max_model_len: int) -> None:
    """Use the LongRoPE factors that vLLM uses for every text: by the longest it may serve."""
    rope = getattr(hf_config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return
    original = rope.get("original_max_position_embeddings") or getattr(
        hf_config, "original_max_position_embeddings", hf_config.max_position_embeddings
    )
    used = "long_factor" if max_model_len > original else "short_factor"
    rope["long_factor"] = rope["short_factor"] = rope[used]


def _locator(
    model: Any, core: nn.Module, sources: dict[str, Tensor], size: int
) -> Callable[[str], Tensor | None]:
    """How a parameter of the Hugging Face model is found in vLLM's storage.

    The vocabulary is divided among the ranks with its padding, so that a part of it is taken whole.
    """
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    mapper = getattr(core, "hf_to_vllm_mapper", None)
    rename = mapper.get_rename_mapper().map_name if mapper is not None else str
    merged = _merged_modules(core)

    def locate(name: str) -> Tensor | None:
        """View of the rows of vLLM's storage that hold parameter `name`."""
        served, shape = rename(name) or name, shapes[name]
        owner = model.get_submodule(name.rpartition(".")[0])
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
            if not sizes or not all(sizes):
                return None
            first, total = sum(sizes[: parts.index(part)]), sum(sizes)
        fits = tensor.shape[0] == total and total >= shape[0] and tensor.shape[1:] == shape[1:]
        # Conv1D holds the transpose of what vLLM holds, which a square matrix would not show.
        if not fits or type(owner).__name__ == "Conv1D":
            return None
        return tensor.narrow(0, first, shape[0])

    return locate


def _share_parameters(model: Any, core: nn.Module, sources: dict[str, Tensor], size: int) -> None:
    """Point every parameter of the meta model at the storage of its vLLM counterpart."""
    locate = _locator(model, core, sources, size)
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embedding.weight
    unmatched = []
    for name, shape in shapes.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if owner is head and tied and leaf == "weight":
            head.weight = embedding.weight  # vLLM may keep no head of its own
            continue
        view = locate(name)
        if view is None:
            unmatched.append(f"{name} {list(shape)}")
        else:
            setattr(owner, leaf, nn.Parameter(view, requires_grad=False))
    if unmatched:
        raise UnsupportedModelError(
            f"{type(core).__name__} keeps {len(unmatched)} of {len(shapes)} weights under names or "
            f"in shapes that {type(model).__name__} does not have: {', '.join(unmatched[:4])}"
            f"{', ...' if len(unmatched) > 4 else ''}; this architecture is not supported"
        )


def _divide(model: Any, core: nn.Module) -> None:
    """Have the twin of one rank's part add up and gather where vLLM's layers do."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ranks = _ranks(embedding.weight.device.type, get_tp_group())
    served = _layers_by_storage(core)
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        layer = served.get(_storage(module.weight))
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer.tp_size > 1:
            shard_linear(module, int(isinstance(layer, RowParallelLinear)), ranks)
    shard_embedding(embedding, ranks)
    shard_head(head, model.config.get_text_config().vocab_size, ranks)
    model.ranks = ranks


@functools.cache
def _ranks(device: str, group: Any) -> Ranks:
    """The ranks of one of vLLM's groups, with process groups of their own: what fails in these
    leaves vLLM's as they are."""

    def own() -> Any:
        return dist.new_group(
            group.ranks, backend="gloo", timeout=PATIENCE, use_local_synchronization=True
        )

    return Ranks(own() if device == "cpu" else group.device_group, own())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _layers_by_storage(core: nn.Module) -> Mapping[int, nn.Module]:
    """The storage of a weight -> vLLM's layer that has it."""
    layers = [m for m in core.modules() if m._parameters.get("weight") is not None]
    return {_storage(layer.get_parameter("weight")): layer for layer in layers}


def _check_editable(
    name: str, view: Tensor, dim: int | None, whole: Any, core: nn.Module, size: int
) -> None:
    """A published change must reach what the engine computes from; and of a weight that is divided
    among ranks, in dimension `dim`, each must hold the part that `parallel.Shard` says."""
    original = whole.get_submodule(name)
    layer: Any = _layers_by_storage(core)[_storage(view)]
    for served_name, served in core.named_modules():
        own = served._parameters.get("weight")
        if own is None or _storage(own) != _storage(view):
            continue
        linear = getattr(served, "cpu_linear", nn.functional.linear)
        if linear is not nn.functional.linear:
            raise UnsupportedModelError(
                f"vLLM computes {served_name} from a packed copy of its weight on the CPU, so that "
                "an edit would have no effect; start the server through `ultraedit serve` and do "
                "not edit the output head"
            )
    if size == 1:
        return
    shape = [n * size if i == dim else n for i, n in enumerate(view.shape)]
    if original is whole.get_output_embeddings():
        reason = "the output head is divided by the vocabulary"
    elif shape != list(original.weight.shape):
        reason = f"the ranks' parts make {shape} of its {list(original.weight.shape)}"
    elif (
        dim == 0 and len(layer.output_partition_sizes) > 1 and layer.weight.numel() == view.numel()
    ):
        reason = "it is several layers in one, of each of which a rank has a part"
    else:
        return
    raise UnsupportedModelError(
        f"{name} cannot be edited under tensor parallelism: {reason}; edit another module, such as "
        "a layer's mlp.down_proj"
    )


def _merged_modules(core: nn.Module) -> dict[str, tuple[str, list[str]]]:
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


def _fill_buffers(model: Any, device: torch.device) -> None:
    """Give buffers (rotary frequencies, position tables) their values: no checkpoint carries them.

    `_init_weights` is how the library itself restores them after loading on the meta device. It
    runs on two different fills, and what it does not write shows as a difference.
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


def _check_complete(model: nn.Module) -> None:
    """No meta tensor may be left, be it a parameter, a buffer or a plain attribute."""
    for name, module in model.named_modules():
        for leaf, value in (
            *vars(module).items(),
            *module._parameters.items(),
            *module._buffers.items(),
        ):
            if isinstance(value, Tensor) and value.is_meta:
                raise UnsupportedModelError(
                    f"{name}.{leaf} of {type(model).__name__} has no value in vLLM's model; this "
                    "architecture is not supported"
                )
