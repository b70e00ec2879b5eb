from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedConfig,
)

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.model.presets import (
    PAPER,
    PAPER_TURN_SIZE,
    default_modules,
    reads_names,
    resolve_modules,
)


def build(model_type: str, **sizes: object) -> nn.Module:
    """The real architecture, without storage."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes))


def sized(layers: int, hidden: int, intermediate: int) -> dict[str, object]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 256,
        "pad_token_id": 0,
    }


def names(template: str, layers: range) -> list[str]:
    return [template.format(i) for i in layers]


GATE, UP, DOWN = (f"model.layers.{{}}.mlp.{p}_proj" for p in ("gate", "up", "down"))
PAPER_MODULES = [
    ("mistral", sized(32, 4096, 14336), names(DOWN, range(29, 31))),
    ("phi3", sized(40, 5120, 17920), names(DOWN, range(30, 39))),
    (
        "gptj",
        {"n_layer": 28, "n_embd": 4096, "n_head": 16, "vocab_size": 256},
        names("transformer.h.{}.mlp.fc_out", range(18, 27)),
    ),
    (
        "llama",
        sized(32, 4096, 14336),
        names(GATE, range(11, 16)) + names(UP, range(18, 25)),
    ),
    (
        "qwen2",
        sized(28, 3584, 18944) | {"num_attention_heads": 28, "num_key_value_heads": 4},
        names(GATE, range(18, 27)) + names(UP, range(18, 27)),
    ),
    (
        "gemma3_text",
        sized(62, 5376, 21504),
        names(GATE, range(52, 61)) + names(UP, range(52, 61)),
    ),
]


@pytest.mark.parametrize(
    ("model_type", "sizes", "expected"), PAPER_MODULES, ids=[row[0] for row in PAPER_MODULES]
)
def test_the_papers_modules(model_type: str, sizes: dict[str, object], expected: list[str]) -> None:
    model = build(model_type, **sizes)
    assert resolve_modules(model, model.config, "published") == expected
    assert not reads_names(model.config, expected) or model_type == "llama"  # 11-24 of 32 layers


def test_the_papers_settings_are_keyword_arguments_of_the_editor() -> None:
    assert (PAPER["lr"], PAPER["ridge"], PAPER["batch_size"]) == (1e-6, 1.0, 10)
    assert (PAPER["rounds"], PAPER["anchors"], PAPER_TURN_SIZE) == (1, 0, 100)
    assert set(PAPER) <= set(inspect.signature(Editor).parameters)


def gemma3(layers: int, hidden: int, intermediate: int, vision: int) -> nn.Module:
    config = Gemma3Config(
        text_config=sized(layers, hidden, intermediate),
        vision_config={
            "num_hidden_layers": vision,
            "hidden_size": hidden,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    )
    with torch.device("meta"):
        return Gemma3ForConditionalGeneration(config)


def test_a_multimodal_wrapper_gets_its_text_models_preset() -> None:
    model = gemma3(62, 5376, 21504, vision=1)
    prefix = "model.language_model.layers"
    expected = [f"{prefix}.{i}.mlp.{p}_proj" for p in ("gate", "up") for i in range(52, 61)]
    assert resolve_modules(model, model.config, "published") == expected


def test_a_vision_tower_of_the_same_depth_and_width_is_left_alone() -> None:
    model = gemma3(4, 32, 64, vision=4)
    assert resolve_modules(model, model.config, "auto") == [
        f"model.language_model.layers.{i}.mlp.down_proj" for i in range(4)
    ]


@pytest.mark.parametrize(
    ("model_type", "sizes", "expected"),
    [
        ("llama", sized(4, 128, 384), names(DOWN, range(4))),
        ("llama", sized(8, 128, 384), names(DOWN, range(4, 8))),
        ("llama", sized(1, 128, 384), names(DOWN, range(1))),
        # Deep enough for edits at names: early layers, whatever the paper edits in this size.
        ("llama", sized(30, 128, 384), names(DOWN, range(1, 14))),
        ("mistral", sized(32, 4096, 14336), names(DOWN, range(1, 15))),
        ("qwen3", sized(12, 128, 384), names(DOWN, range(1, 6))),
        (
            "gptj",
            {"n_layer": 4, "n_embd": 128, "n_head": 4, "rotary_dim": 8, "vocab_size": 256},
            names("transformer.h.{}.mlp.fc_out", range(4)),
        ),
        (
            "gpt_neox",
            sized(8, 128, 384),
            names("gpt_neox.layers.{}.mlp.dense_4h_to_h", range(4, 8)),
        ),
        (
            "opt",
            {"num_hidden_layers": 4, "hidden_size": 96, "ffn_dim": 384, "vocab_size": 256},
            names("model.decoder.layers.{}.fc2", range(4)),
        ),
    ],
)
def test_the_rule(model_type: str, sizes: dict[str, object], expected: list[str]) -> None:
    model = build(model_type, **sizes)
    assert default_modules(model, model.config) == expected
    assert resolve_modules(model, model.config, "auto") == expected


def test_the_published_rule_takes_late_layers() -> None:
    # Llama-2-7B: depth and width of LLaMA-3-8B, another MLP.
    model = build("llama", **sized(32, 4096, 11008))
    assert resolve_modules(model, model.config, "published") == names(DOWN, range(24, 32))


def test_names_are_read_in_the_first_half_of_a_deep_model() -> None:
    deep, flat = (build("llama", **sized(layers, 128, 384)).config for layers in (12, 8))
    assert reads_names(deep, names(DOWN, range(1, 4)))
    assert not reads_names(deep, names(DOWN, range(1, 7)))
    assert not reads_names(flat, names(DOWN, range(1, 4)))


def test_the_rule_does_not_guess() -> None:
    model = build("mixtral", **sized(4, 128, 384))
    with pytest.raises(ValueError, match=r"found 0 stacks of 4 .* name the modules"):
        default_modules(model, model.config)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama", **sized(4, 128, 384), tie_word_embeddings=True)


def test_names_are_kept_in_order(llama: nn.Module) -> None:
    wanted = ["model.layers.3.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    assert resolve_modules(llama, llama.config, wanted) == wanted
    assert resolve_modules(llama, llama.config, tuple(wanted)) == wanted


@pytest.mark.parametrize(
    ("modules", "kind", "words"),
    [
        ([], ValueError, "modules is empty"),
        ("model.layers.3.mlp.down_proj", TypeError, "expected 'auto' or a list"),
        ([3], TypeError, r"modules\[0\] is int"),
        (["model.layers.3.mlp.down_proj"] * 2, ValueError, "given twice"),
        (
            ["model.layers.3.mlp.dwn_proj"],
            ValueError,
            r"no module .*closest are 'model\.layers\.3\.mlp\.down_proj'",
        ),
        (["zzz"], ValueError, r"no module 'zzz'.*the linear modules are 'model\.layers\.0\."),
        (["model.layers.3.mlp"], ValueError, r"is a LlamaMLP.*'model\.layers\.3\.mlp\.gate_proj'"),
        (["model.norm"], ValueError, "is a LlamaRMSNorm, expected an nn.Linear; name a linear"),
        (["lm_head"], ValueError, r"shares its weight with 'model\.embed_tokens\.weight'"),
    ],
)
def test_bad_names(llama: nn.Module, modules: list[str], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words):
        resolve_modules(llama, llama.config, modules)


def test_a_conv1d_is_a_linear_module() -> None:
    def gpt2(layers: int) -> nn.Module:
        return build("gpt2", n_layer=layers, n_embd=96, vocab_size=256)

    c_proj = "transformer.h.{}.mlp.c_proj"
    model = gpt2(4)
    assert resolve_modules(model, model.config, "auto") == names(c_proj, range(4))
    deep = gpt2(48)  # as GPT2-XL
    assert resolve_modules(deep, deep.config, "auto") == names(c_proj, range(2, 22))
    assert resolve_modules(deep, deep.config, "published") == names(c_proj, range(36, 48))
    others = ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]
    assert resolve_modules(model, model.config, others) == others
    with pytest.raises(ValueError, match=r"is a GPT2MLP.*'transformer\.h\.0\.mlp\.c_fc'"):
        resolve_modules(model, model.config, ["transformer.h.0.mlp"])
    with pytest.raises(ValueError, match=r"closest are 'transformer\.h\.0\.mlp\.c_proj'"):
        resolve_modules(model, model.config, ["transformer.h.0.mlp.cproj"])


class Wrapped(nn.Module):
    """What an adapter library makes of a linear module."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.base_layer = inner


class Model(nn.Module):
    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear


def test_an_adapter_points_to_the_layer_inside() -> None:
    model = Model(Wrapped(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=re.escape("'linear.base_layer'")):
        resolve_modules(model, PreTrainedConfig(), ["linear"])
    assert resolve_modules(model, PreTrainedConfig(), ["linear.base_layer"])


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(4, 4, dtype=torch.int8),
        torch.zeros(4, 4, dtype=torch.float8_e4m3fn),
        torch.zeros(8, 1, dtype=torch.float32),
    ],
    ids=["int8", "fp8", "packed"],
)
def test_quantised_weights_are_refused(weight: torch.Tensor) -> None:
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ValueError, match="without quantisation"):
        resolve_modules(Model(linear), PreTrainedConfig(), ["linear"])
