"""Builds the twin, or the shadows of the edited weights alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ultraedit_kernels.integrations.vllm.twin.locate import (
    language_model,
    layers_by_storage,
    locator,
    served_tensors,
    storage,
)
from ultraedit_kernels.integrations.vllm.twin.meta import fill_buffers, meta_models
from ultraedit_kernels.integrations.vllm.twin.refuse import (
    UnsupportedModelError,
    check_complete,
    check_config,
    check_editable,
    check_weights,
)
from ultraedit_kernels.integrations.vllm.twin.watch import Watch
from ultraedit_kernels.model.parallel import (
    Ranks,
    Shard,
    is_transposed,
    part_of,
    shard_embedding,
    shard_head,
    shard_linear,
    shard_of,
    weight_of,
)
from ultraedit_kernels.model.presets import resolve_modules

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TOLERANCE = {torch.float32: 0.01}
HALF_TOLERANCE = 0.1
"""Most by which twin and engine may differ, nats a token on average over text the engine wrote.

Measured on small models of 12 architectures: at most 2e-6 in float32 and 0.024 in bfloat16 where
the twin is right, 0.47 and more where heads or weights are in another order in every layer."""

CACHE_TOLERANCE = 0.25
"""The same where vLLM rounds keys and values further: 0.063 measured for fp8_e5m2, in float32."""

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another that neither comes nor says that it has failed."""


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
        layers: vLLM's layers that compute from `live`.
        watch: whether that is still what was published.
    """

    model: nn.Module
    live: dict[str, Any]
    layers: Sequence[nn.Module] = ()
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = Watch(self.live, self.layers)

    @torch.no_grad()
    def publish(self) -> None:
        """Copy every shadow weight into vLLM's storage, in place.

        CUDA graphs and compiled code read the same address and stay valid. Call it between two
        engine steps; inside inference mode is fine.
        """
        for name, live in self.live.items():
            live.copy_(weight_of(self.model.get_submodule(name)))
        self.watch.note()

    def check(
        self,
        texts: Sequence[Sequence[int]],
        served: Sequence[Sequence[float]],
        mode: str,
        cache_dtype: str = "auto",
    ) -> float:
        """Compare with what the engine computes; the mean difference, nats a token.

        Names and shapes can match while vLLM keeps the weights in another order. The twin then
        computes something else, and its edits would be nonsense.

        Args:
            texts: their token ids.
            served: the engine's score of every token of each but the first.
            mode: vLLM's `logprobs_mode`, which says what its scores are.
            cache_dtype: in what vLLM keeps keys and values, which the twin does not round.

        Raises:
            UnsupportedModelError: the difference is beyond rounding.
        """
        gaps = [
            abs(ours - theirs)
            for text, scores in zip(texts, served, strict=True)
            for ours, theirs in zip(self.logprobs(text, mode), scores, strict=True)
        ]
        difference = sum(gaps) / len(gaps)
        dtype = next(iter(self.live.values()), next(self.model.parameters())).dtype
        tolerance, cause = TOLERANCE.get(dtype, HALF_TOLERANCE), ""
        if cache_dtype != "auto":
            tolerance = max(tolerance, CACHE_TOLERANCE)
            cause = f"--kv-cache-dtype {cache_dtype} rounds too much (leave it out to see), or "
        if not difference <= tolerance:  # or it is NaN
            raise UnsupportedModelError(
                f"the twin does not compute what vLLM serves: over {len(gaps)} tokens their log-"
                f"probabilities differ by {difference:.2g} on average and {max(gaps):.2g} at most, "
                f"expected at most {tolerance} on average in {str(dtype).removeprefix('torch.')}; "
                f"{cause}vLLM keeps the weights of {type(self.model).__name__} in another order, "
                "or computes with them differently, so that edits would go wrong; this "
                "architecture is not supported"
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
    vllm_model: nn.Module,
    vllm_config: VllmConfig,
    modules: str | Sequence[str] = "auto",
    use: str = "turns",
) -> Twin:
    """Build the twin of a model that vLLM has loaded.

    Args:
        vllm_model: `worker.get_model()`, weights loaded, pipeline parallel size 1. With a tensor
            parallel size above 1, all ranks call this.
        vllm_config: the worker's configuration.
        modules: dotted names of the linear modules to edit, as Hugging Face names them, or "auto".
        use: what for; twins for different uses may run alternately, also where each stops in the
            middle of a pass.

    Raises:
        UnsupportedModelError: the weights cannot be edited in place, or do not match the Hugging
            Face model; nothing has been changed.
        ValueError: `modules` names something that is not a linear module of its own.
    """
    # Under vLLM's inference mode new tensors could not be saved for backward.
    with torch.inference_mode(False), torch.no_grad():
        check_config(vllm_config)
        core = language_model(vllm_model, vllm_config)
        sources = dict(served_tensors(core))
        check_weights(sources)
        size = vllm_config.parallel_config.tensor_parallel_size
        whole, model = meta_models(core is not vllm_model, vllm_config)
        fill_buffers(model, next(iter(sources.values())).device)
        _share_parameters(model, core, sources, size)
        check_complete(model)
        model.eval().requires_grad_(False)
        if size > 1:
            _divide(model, core, use)

        layers, live = layers_by_storage(core), {}
        changed: list[nn.Module] = []
        for name in resolve_modules(whole, whole.config, modules):
            module = model.get_submodule(name)
            live[name] = weight_of(module)
            dim = None if (shard := shard_of(module)) is None else shard.dim
            served = layers[storage(module.weight)]
            check_editable(name, part_of(module), dim, whole, served, size)
            changed += served.values()
            module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        return Twin(model, live, changed)


@torch.no_grad()
def build_weights(
    vllm_model: nn.Module, vllm_config: VllmConfig, modules: str | Sequence[str] = "auto"
) -> Twin:
    """Shadows of the edited weights alone, for changes that are computed elsewhere.

    All ranks of the engine call this, those of other pipeline stages included. Arguments and errors
    are `build_twin`'s; the pipeline parallel size may be above 1.
    """
    with torch.inference_mode(False):
        check_config(vllm_config)
        core = language_model(vllm_model, vllm_config)
        sources = dict(served_tensors(core))
        size = vllm_config.parallel_config.tensor_parallel_size
        whole, model = meta_models(core is not vllm_model, vllm_config)
        names = resolve_modules(whole, whole.config, modules)
        ranks = _all_ranks(vllm_config)
        locate = locator(model, core, sources, size)
        held, refusal = _held(names, locate, whole, core, sources, size)
        told = [(held, refusal)] if ranks is None else ranks.gather_objects((held, refusal))
        if refusals := [text for _, text in told if text]:
            raise UnsupportedModelError(refusals[0])
        alone: Any = nn.Module()
        alone.config, alone.ranks = whole.config, ranks
        layers, live = layers_by_storage(core), {}
        changed: list[nn.Module] = []
        for name in names:
            original = weight_of(whole.get_submodule(name))
            owners = tuple(rank for rank, (theirs, _) in enumerate(told) if name in theirs)
            if not owners:
                raise UnsupportedModelError(
                    f"{type(core).__name__} keeps {name}.weight {list(original.shape)} under "
                    "another name or in another shape; this architecture is not supported"
                )
            view, dim = _view(whole, name, locate), told[owners[0]][0][name]
            if view is None:  # another pipeline stage has it
                shape = [0 if i == dim else n for i, n in enumerate(original.shape)]
                view = next(core.parameters()).new_empty(shape, dtype=original.dtype)
            module: Any = nn.Linear(view.shape[1], view.shape[0], bias=False, device="meta")
            module.weight = nn.Parameter(view, requires_grad=False)
            if ranks is not None:
                module.shard = Shard(dim, ranks, tuple(original.shape), owners)
            live[name] = weight_of(module)
            changed += layers.get(storage(view), {}).values()
            module.weight = nn.Parameter(view.clone(), requires_grad=False)
            _put(alone, name, module)
        return Twin(alone, live, changed)


def _all_ranks(config: VllmConfig) -> Ranks | None:
    """The ranks of all pipeline stages; None if there is only one."""
    if config.parallel_config.world_size == 1:
        return None
    from vllm.distributed import get_world_group

    return _ranks(config.device_config.device_type, get_world_group())


def _held(
    names: Sequence[str],
    locate: Callable[[str], Tensor | None],
    whole: Any,
    core: nn.Module,
    sources: Mapping[str, Tensor],
    size: int,
) -> tuple[dict[str, int], str]:
    """Which of the modules this rank has, and in which dimension each is divided; or why it cannot
    edit one."""
    from vllm.model_executor.layers.linear import RowParallelLinear

    try:
        check_weights(sources)
        served, held = layers_by_storage(core), {}
        for name in names:
            if (view := _view(whole, name, locate)) is not None:
                layers = served[storage(view)]
                dim = int(isinstance(list(layers.values())[-1], RowParallelLinear))
                check_editable(name, view, dim, whole, layers, size)
                held[name] = dim
    except UnsupportedModelError as error:
        return {}, str(error)
    return held, ""


def _view(whole: Any, name: str, locate: Callable[[str], Tensor | None]) -> Tensor | None:
    """The weight [d_out, d_in] of a module in vLLM's storage, if it is there."""
    view = locate(f"{name}.weight")
    return view.t() if view is not None and is_transposed(whole.get_submodule(name)) else view


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Have `root.get_submodule(name)` give the module."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(leaf, module)


def _share_parameters(
    model: Any, core: nn.Module, sources: Mapping[str, Tensor], size: int
) -> None:
    """Point every parameter of the meta model at the storage of its vLLM counterpart."""
    locate = locator(model, core, sources, size)
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


def _divide(model: Any, core: nn.Module, use: str) -> None:
    """Have the twin of one rank's part add up and gather where vLLM's layers do."""
    from vllm.distributed import get_tp_group
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ranks = _ranks(embedding.weight.device.type, get_tp_group(), use)
    served = layers_by_storage(core)
    for module in model.modules():
        if not isinstance(module, nn.Linear) or module is head:
            continue
        layer = [None, *served.get(storage(module.weight), {}).values()][-1]
        if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)) and layer.tp_size > 1:
            shard_linear(module, int(isinstance(layer, RowParallelLinear)), ranks)
    shard_embedding(embedding, ranks)
    shard_head(head, model.config.get_text_config().vocab_size, ranks)
    model.ranks = ranks


@functools.cache
def _ranks(device: str, group: Any, use: str = "turns") -> Ranks:
    """The ranks of one of vLLM's groups, for each use with process groups of their own: what fails
    in these leaves the others as they are."""

    def own() -> Any:
        return dist.new_group(
            group.ranks, backend="gloo", timeout=PATIENCE, use_local_synchronization=True
        )

    return Ranks(own() if device == "cpu" else group.device_group, own())
