"""Which modules to edit, per model family, and the settings of the paper.

Source: UltraEdit (arXiv 2505.14679), experimental settings.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ultraedit_kernels.model.parallel import is_linear, part_of
from ultraedit_kernels.ops.checks import FEATURE_DTYPES

PAPER: dict[str, Any] = {
    "lr": 1e-6,
    "ridge": 1.0,
    "rounds": 1,
    "margin": 0.0,
    "anchors": 0,
    "repairs": 0,
    "batch_size": 10,
    "statistics": "per-shape",
    "append_eos": False,
    "max_change": 1e9,
}
"""UltraEdit as published, which has no guards, as arguments of `Editor`. The step size suits the
models of the paper; on others search for the best one (`lr · d_in` ≈ 0.0143 at the paper's
widths)."""

AT_NAMES: dict[str, Any] = {"reach": 0.3, "rounds": 40, "margin": 1.0}
"""Other defaults of edits at names, chosen on CounterFact records 2000 to 2059 of
SmolLM2-135M-Instruct, see docs/results.md: a lead of 2 logits holds no better and moves
neighbours by half more; a longer reach, with longer steps, reaches more rephrases and moves more
of all else."""

PAPER_TURN_SIZE = 100
"""Edits solved together in the paper."""


@dataclass(frozen=True)
class Preset:
    """A model size, known by its configuration, and the layers that the paper edits in it."""

    model: str
    model_type: str
    layers: int
    hidden: int
    intermediate: int
    edited: tuple[tuple[str, range], ...]
    """Projections and their layers, in the order of editing."""


PRESETS = (
    Preset("Mistral-7B", "mistral", 32, 4096, 14336, (("mlp.down_proj", range(29, 31)),)),
    Preset("Phi-4", "phi3", 40, 5120, 17920, (("mlp.down_proj", range(30, 39)),)),
    Preset("GPT-J-6B", "gptj", 28, 4096, 16384, (("mlp.fc_out", range(18, 27)),)),
    Preset(
        "LLaMA-3-8B",
        "llama",
        32,
        4096,
        14336,
        (("mlp.gate_proj", range(11, 16)), ("mlp.up_proj", range(18, 25))),
    ),
    Preset(
        "Qwen2.5-7B",
        "qwen2",
        28,
        3584,
        18944,
        (("mlp.gate_proj", range(18, 27)), ("mlp.up_proj", range(18, 27))),
    ),
    Preset(
        "Gemma-3-27B",
        "gemma3_text",
        62,
        5376,
        21504,
        (("mlp.gate_proj", range(52, 61)), ("mlp.up_proj", range(52, 61))),
    ),
)

EARLY = (0.045, 0.43)
"""From where to where in the depth, as shares of it, edits at names are made: there the key of a
name's last token is nearly the same in every sentence, and later layers read what is written. The
more layers share a change, the less each changes: layers 1 to 13 of SmolLM2-135M's 30 kept more of
prose and of rephrases than 5 to 13 or 3 to 8."""
DEEP = 12
"""Least layers of a model for edits at names: fewer leave no room between name and answer."""
LATE_SHARE = 0.25
"""The rule for a model without a preset edits the MLP output projections of this share of its
layers, the last ones and at least `LEAST_LAYERS`. Where the paper edits output projections it takes
2 to 9 of 28 to 40 layers, at 64 to 95 % of the depth; the output projection is what writes a fact
into the residual stream, and late layers leave most of the KV cache as it was."""
LEAST_LAYERS = 4
"""Fewer cannot hold many edits: spread over 4 layers rather than 2, 200 edits of small models kept
5 to 6 % more of what they should not touch."""

# Where families keep the MLP's output projection inside a decoder layer, commonest first.
OUTPUT_PROJECTIONS = (
    "mlp.down_proj",  # Llama, Mistral, Qwen, Gemma, Phi-3, OLMo, Granite, ...
    "mlp.fc_out",  # GPT-J, CodeGen
    "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM
    "mlp.c_proj",  # GPT-2, StarCoder, GPT-Neo
    "mlp.fc2",  # Phi-1, Phi-2
    "shared_mlp.output_linear",  # Granite 4
    "feed_forward.down_proj",
    "feed_forward.w2",
    "ffn.down_proj",  # MPT
    "fc2",  # OPT, XGLM
)

_NOT_TEXT = re.compile(r"vision|visual|image|audio|speech")


def default_modules(model: nn.Module, config: Any, published: bool = False) -> list[str]:
    """The modules to edit in this model: those of the rule `EARLY` if it is deep enough, else of
    the rule `LATE_SHARE`.

    Args:
        model: a Hugging Face causal language model, possibly on the meta device, possibly wrapped
            in a multimodal one.
        config: its configuration; of a multimodal model, the text part is used.
        published: those that the paper edits instead, or of the rule `LATE_SHARE`.

    Raises:
        ValueError: no decoder layers with a known MLP output projection are found.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers, hidden = int(text.num_hidden_layers), int(text.hidden_size)
    container, output = _decoder(model, layers, hidden)
    # From the projection itself: configurations differ in how they name the MLP's width.
    width = _linear_shape(model.get_submodule(f"{container}.0.{output}"))[1]
    if layers >= DEEP and not published:
        first, last = (round(share * layers) for share in EARLY)
        return [f"{container}.{i}.{output}" for i in range(first, last + 1)]
    for preset in PRESETS:
        size = (preset.model_type, preset.layers, preset.hidden, preset.intermediate)
        if size == (text.model_type, layers, hidden, width):
            return [f"{container}.{i}.{name}" for name, range_ in preset.edited for i in range_]
    count = min(layers, max(LEAST_LAYERS, math.floor(layers * LATE_SHARE)))
    return [f"{container}.{i}.{output}" for i in range(layers - count, layers)]


def reads_names(config: Any, modules: Sequence[str]) -> bool:
    """Whether these modules are where a name is read: all in the first half of a deep model.

    Args:
        config: of the model.
        modules: dotted names.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = int(text.num_hidden_layers)
    numbers = [re.search(r"\.(\d+)\.", name) for name in modules]
    return layers >= DEEP and all(n is not None and int(n[1]) < layers / 2 for n in numbers)


def resolve_modules(
    model: nn.Module, config: Any, modules: Literal["auto", "published"] | Sequence[str]
) -> list[str]:
    """The names of the modules to edit, in order, each checked to be an editable linear module.

    Args:
        model: a Hugging Face causal language model, possibly on the meta device.
        config: its configuration.
        modules: "auto" or "published" for `default_modules`, or dotted module names.

    Raises:
        ValueError: an empty list, a name twice, an unknown name, a module that is no linear
            one, or one whose weight is quantised or shared with another module.
        TypeError: `modules` is neither "auto" nor a list of names.
    """
    if isinstance(modules, str):
        if modules not in ("auto", "published"):
            raise TypeError(
                f"modules is the text {modules!r}, expected 'auto' or a list of module names; "
                f"write [{modules!r}] to edit that module"
            )
        modules = default_modules(model, config, modules == "published")
    names = list(modules)
    if not names:
        raise ValueError(
            "modules is empty, expected at least one module name; "
            "name the modules to edit or pass 'auto'"
        )
    known = dict(model.named_modules())
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(
                f"modules[{i}] is {type(name).__name__}, expected a dotted module name; "
                "take the names from model.named_modules()"
            )
        if name in names[:i]:
            raise ValueError(f"module {name!r} is given twice, expected it once; drop one")
        if name not in known:
            raise ValueError(
                f"the model has no module {name!r}, expected a name from model.named_modules(); "
                + _suggestion(name, [n for n, m in known.items() if is_linear(m)])
            )
        _check_editable(name, known[name])
        _check_unshared(model, name, known[name].weight)
    return names


def _decoder(model: nn.Module, layers: int, hidden: int) -> tuple[str, str]:
    """The name of the list of decoder layers, and of the output projection inside a layer.

    The prefix differs between text models, multimodal wrappers and families, so the layers are
    known by their pattern: numbered 0 to layers - 1, each with a projection to the hidden size.
    """
    pattern = re.compile(
        rf"(.+)\.(\d+)\.({'|'.join(re.escape(name) for name in OUTPUT_PROJECTIONS)})"
    )
    found: dict[tuple[str, str], set[int]] = {}
    for name, module in model.named_modules():
        match = pattern.fullmatch(name)
        if match and not _NOT_TEXT.search(name) and _linear_shape(module)[0] == hidden:
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    decoders = [place for place, numbers in found.items() if numbers == set(range(layers))]
    if len(decoders) != 1:
        raise ValueError(
            f"found {len(decoders)} stacks of {layers} decoder layers with an MLP output "
            f"projection to {hidden} features ({', '.join(OUTPUT_PROJECTIONS)}), expected 1; "
            "name the modules to edit, as printed by model.named_modules()"
        )
    return decoders[0]


def _linear_shape(module: nn.Module) -> tuple[int, int]:
    """(d_out, d_in) of a linear module, of a Conv1D, or of a wrapper that keeps one inside."""
    module = getattr(module, "base_layer", module)
    for out, in_ in (("out_features", "in_features"), ("nf", "nx")):  # the latter in Conv1D
        if hasattr(module, out):
            return getattr(module, out), getattr(module, in_)
    return 0, 0


def _check_editable(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if not is_linear(module):
        if hasattr(module, "base_layer"):
            remedy = f"name {name + '.base_layer'!r}, the layer inside the adapter"
        else:
            inside = [n for n, m in module.named_modules(prefix=name) if is_linear(m)]
            remedy = f"name a linear module{', such as ' + repr(inside[0]) if inside else ''}"
        raise ValueError(f"module {name!r} is a {kind}, expected an nn.Linear; {remedy}")
    weight, shape = part_of(module), _linear_shape(module)
    if weight.dtype not in FEATURE_DTYPES or weight.shape != shape:
        raise ValueError(
            f"module {name!r} ({kind}) has a weight of {weight.dtype} and shape "
            f"{tuple(weight.shape)}, expected float64, float32, bfloat16 or float16 and "
            f"{shape}; load the model without quantisation"
        )


def _check_unshared(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    for other, parameter in model.named_parameters(remove_duplicate=False):
        if parameter is weight and other != f"{name}.weight":
            raise ValueError(
                f"module {name!r} shares its weight with {other!r}, expected a weight of its own, "
                "as an edit would change both; choose another module"
            )


def _suggestion(name: str, linear: list[str]) -> str:
    close = difflib.get_close_matches(name, linear, n=3, cutoff=0.6)
    if close:
        return f"closest are {', '.join(map(repr, close))}"
    return f"the linear modules are {', '.join(map(repr, linear[:3]))} and so on"
