"""What cannot be edited in place, and why: every check of the served model that needs no twin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch._inductor.config
from torch import Tensor, nn

from ultraedit_kernels.integrations.vllm.serve import MISTRAL_AS_HF
from ultraedit_kernels.model.parallel import weight_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_QUANTISED_SUFFIXES = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "qzeros")


class UnsupportedModelError(RuntimeError):
    """The served model cannot be edited in place; the text says why and what to do."""


def check_config(config: VllmConfig) -> None:
    """Check that the engine computes from weights of its own, and from nothing made of them.

    Raises:
        UnsupportedModelError: it is quantised, shares or offloads its weights, or compiles them in.
    """
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


def check_format(hf_config: Any, tokenizer: Any) -> None:
    """Check that vLLM reads a model by Hugging Face's configuration and tokenizer.

    Raises:
        UnsupportedModelError: it reads params.json or tekken.json, as it does of itself where a
            Mistral repository has both formats.
    """
    kinds = {kind.__name__ for kind in type(tokenizer).__mro__}
    if type(hf_config).__name__ == "PreTrainedConfig" or "MistralTokenizer" in kinds:
        options = " ".join(f"--{name} {value}" for name, value in MISTRAL_AS_HF.items())
        raise UnsupportedModelError(
            "vLLM reads this model in Mistral's own format (params.json, consolidated*.safetensors,"
            " tekken.json), from which no twin can be made; if the repository has config.json and "
            f"tokenizer.json as well, serve it with {options}"
        )


def check_weights(sources: Mapping[str, Tensor]) -> None:
    """Check that vLLM's tensors, as `locate.served_tensors` names them, are plain dense weights.

    Raises:
        UnsupportedModelError: there are none, or one is quantised, packed or an expert's.
    """
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


def check_editable(
    name: str,
    view: Tensor,
    dim: int | None,
    whole: Any,
    layers: Mapping[str, nn.Module],
    size: int,
) -> None:
    """Check that a published change reaches what the engine computes from; and of a weight that is
    divided among ranks, that each holds the part that `parallel.Shard` says.

    Args:
        name: the Hugging Face model's linear module.
        view: its weight in vLLM's storage, or this rank's part of it.
        dim: the dimension in which it is divided among ranks, if it is.
        whole: the undivided Hugging Face model.
        layers: vLLM's layers that compute from the view's storage, by name.
        size: number of ranks.

    Raises:
        UnsupportedModelError: a change would have no effect, or not the one that was computed.
    """
    for served_name, served in layers.items():
        linear = getattr(served, "cpu_linear", nn.functional.linear)
        if linear is not nn.functional.linear:
            raise UnsupportedModelError(
                f"vLLM computes {served_name} from a packed copy of its weight on the CPU, so that "
                "an edit would have no effect; start the server through `ultraedit serve` and do "
                "not edit the output head"
            )
    if size == 1:
        return
    original = whole.get_submodule(name)
    layer: Any = list(layers.values())[-1]
    shape = [n * size if i == dim else n for i, n in enumerate(view.shape)]
    if original is whole.get_output_embeddings():
        reason = "the output head is divided by the vocabulary"
    elif shape != list(weight_of(original).shape):
        reason = f"the ranks' parts make {shape} of its {list(weight_of(original).shape)}"
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


def check_complete(model: nn.Module) -> None:
    """Check that no meta tensor is left, be it a parameter, a buffer or a plain attribute.

    Raises:
        UnsupportedModelError: one is left.
    """
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
