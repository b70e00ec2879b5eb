"""The twin against real engines: same numbers, no copies, gradients, and edits that arrive."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BUNDLED
from tests.integrations.vllm.mistral_format import add_mistral_format
from ultraedit_kernels.integrations.vllm.serve import MISTRAL_AS_HF

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
FACTS_DOWN = "model.layers.3.mlp.down_proj"


def _configs(sizes: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """Configuration and edited module of every family, by name."""
    import transformers as t

    window = {"sliding_window": 8, "query_pre_attn_scalar": 32}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    no_head_dim = {k: v for k, v in sizes.items() if k != "head_dim"}
    falcon = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    gpt = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
    ids = {"vocab_size": sizes["vocab_size"], "bos_token_id": 0, "eos_token_id": 1}
    long_rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + 0.2 * i for i in range(16)],
        "original_max_position_embeddings": 48,  # longer than the text, not than the engine's limit
    }
    return {
        "llama": (t.LlamaConfig(**sizes, tie_word_embeddings=False), UP),
        "llama-attention": (
            t.LlamaConfig(**sizes, attention_bias=True, mlp_bias=True),
            "model.layers.0.self_attn.v_proj",
        ),
        "mistral": (t.MistralConfig(**sizes, sliding_window=8, tie_word_embeddings=False), DOWN),
        "qwen2": (t.Qwen2Config(**sizes, tie_word_embeddings=True), UP),
        "qwen3": (t.Qwen3Config(**sizes, tie_word_embeddings=False), UP),
        "phi3": (t.Phi3Config(**sizes, tie_word_embeddings=False), DOWN),
        "phi3-longrope": (
            t.Phi3Config(**sizes, original_max_position_embeddings=48, rope_parameters=long_rope),
            DOWN,
        ),
        "gemma2": (t.Gemma2Config(**sizes, **window, **caps), UP),
        "gemma3": (t.Gemma3TextConfig(**sizes, **window), UP),
        "gptj": (
            t.GPTJConfig(**gpt, **ids, rotary_dim=16, tie_word_embeddings=False),
            "transformer.h.1.mlp.fc_out",
        ),
        "granite": (t.GraniteConfig(**no_head_dim, tie_word_embeddings=False), UP),
        # Served through vLLM's Transformers backend.
        "olmo2": (t.Olmo2Config(**no_head_dim, tie_word_embeddings=False), UP),
        "phi": (t.PhiConfig(**no_head_dim, tie_word_embeddings=False), "model.layers.1.mlp.fc2"),
        "gpt2": (t.GPT2Config(**gpt, **ids), "transformer.h.1.mlp.c_fc"),
        "falcon": (t.FalconConfig(**falcon, **ids), "transformer.h.1.mlp.dense_4h_to_h"),
        # vLLM reorders its query_key_value as it loads it.
        "falcon-reordered": (
            t.FalconConfig(**falcon, **ids, multi_query=False),
            "transformer.h.1.mlp.dense_4h_to_h",
        ),
    }


SHARED = "model.layers.1.shared_mlp.output_linear"


def _granite_hybrid(sizes: dict[str, Any]) -> Any:
    """Granite 4 with Mamba layers, whose `A_log` vLLM keeps in another form."""
    import transformers as t

    mamba = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_expand": 2}
    mamba |= {"mamba_n_groups": 1, "mamba_chunk_size": 16}
    return t.GraniteMoeHybridConfig(
        **{k: v for k, v in sizes.items() if k != "head_dim"},
        **mamba,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        layer_types=["mamba", "attention"] * 2,
    )


FAMILIES = [
    "llama",
    "llama-attention",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "phi3-longrope",
    "gemma2",
    "gemma3",
    "gptj",
    "granite",
    "olmo2",
    "phi",
    "falcon",
    "gpt2",
]
VARIANTS = ["llama-bfloat16", "llama-lora", "mistral-both-as-hf"]


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    save_model: Callable[..., Path],
    tiny_sizes: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Measurements of every case, all made by one process."""
    root = tmp_path_factory.mktemp("twins")
    cases: dict[str, dict[str, Any]] = {}
    for name, (config, module) in _configs(tiny_sizes | {"num_hidden_layers": 2}).items():
        cases[name] = {"path": str(save_model(root / name, config)), "module": module}
    llama = cases["llama"]
    cases["llama-bfloat16"] = llama | {"options": {"dtype": "bfloat16"}, "wrong": True}
    cases["llama-lora"] = llama | {"options": {"enable_lora": True, "max_lora_rank": 8}}
    cases["llama-packed"] = llama | {"packed": True}
    cases["llama-logits"] = llama | {"options": {"logprobs_mode": "raw_logits"}}
    both = add_mistral_format(save_model(root / "mistral-both", _configs(tiny_sizes)["mistral"][0]))
    mistral = {"path": str(both), "module": DOWN}
    cases["mistral-both"] = mistral | {"refused": True}
    as_hf = {name.replace("-", "_"): value for name, value in MISTRAL_AS_HF.items()}
    cases["mistral-both-as-hf"] = mistral | {"options": as_hf}
    granite = save_model(root / "granite-4-h", _granite_hybrid(tiny_sizes))
    cases["granite-4-h"] = {"path": str(granite), "module": SHARED, "refused": True}
    options = {"kv_cache_dtype": "fp8_e5m2", "max_model_len": 64}
    cases["facts-fp8-cache"] = {"path": str(BUNDLED), "module": FACTS_DOWN, "options": options}
    for name in ("llama-logits", "falcon-reordered", "facts-fp8-cache"):
        cases[name]["check_only"] = True
    cases["llama"] = llama | {"refusals": True, "wrong": True}

    (root / "cases.json").write_text(json.dumps(cases))
    script = Path(__file__).parents[1] / "twin_probe.py"
    command = [sys.executable, str(script), str(root / "cases.json"), str(root / "results.json")]
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=root)
    return json.loads((root / "results.json").read_text())


def _measured(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    assert "failed" not in results[name], results[name]["failed"]
    return results[name]


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_only_the_edited_weight_is_copied(results: Any, family: str) -> None:
    result = _measured(results, family)
    assert len(result["copied"]) == 1
    assert result["copied"][0].endswith(".weight")
    assert result["live_is_vllms"]


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_twin_computes_what_the_engine_serves(results: Any, family: str) -> None:
    result = _measured(results, family)
    if family == "llama-bfloat16":  # the two round differently after every operation
        assert result["distance"] < 0.15
    else:
        assert result["distance"] < 2e-5
        assert result["twin_tokens"] == result["engine_tokens"]


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS, "llama-logits"])
def test_the_self_check_passes_a_right_twin(results: Any, family: str) -> None:
    difference = _measured(results, family)["check"]
    assert difference < (0.03 if family == "llama-bfloat16" else 1e-5)


def test_the_self_check_knows_of_keys_and_values_that_vllm_rounds(results: Any) -> None:
    difference = _measured(results, "facts-fp8-cache")["check"]
    assert 0.01 < difference < 0.2  # more than float32 weights in another order could excuse


@pytest.mark.parametrize("family", ["llama", "llama-bfloat16"])
def test_the_self_check_refuses_a_wrong_twin(results: Any, family: str) -> None:
    wrong = _measured(results, family)["wrong"]
    assert len(wrong) == 4
    for name, reason in wrong.items():
        assert "the twin does not compute what vLLM serves" in str(reason), name


def test_the_self_check_refuses_a_model_that_vllm_reorders(results: Any) -> None:
    assert re.search(
        "32 tokens their log-probabilities differ by .* on average .* FalconForCausalLM in another",
        _measured(results, "falcon-reordered")["check"],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_to_the_edited_module(results: Any, family: str) -> None:
    assert _measured(results, family)["gradient_error"] < 0.02


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_publish_reaches_the_engine_at_once(results: Any, family: str) -> None:
    result = _measured(results, family)
    assert result["unpublished"] == 0.0  # the shadow alone changes nothing that is served
    assert result["moved"] > 0.05
    assert result["published_distance"] < (0.15 if family == "llama-bfloat16" else 2e-5)
    assert result["same_address"] and result["equal"]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("llama-packed", "packed the weight for the CPU .* `ultraedit serve`"),
        ("granite-4-h", r"keeps 2 of .* model\.layers\.0\.mamba\.A_log .*is not supported"),
        (
            "mistral-both",
            "Mistral's own format.*--tokenizer-mode hf --config-format hf --load-format hf$",
        ),
    ],
)
def test_refuses_a_model_it_cannot_edit(results: Any, case: str, reason: str) -> None:
    assert re.search(reason, _measured(results, case)["refusal"])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("quantised", "the model is quantised (fp8)"),
        ("head", "packed copy of its weight"),
    ],
)
def test_refuses_weights_it_cannot_edit(results: Any, case: str, reason: str) -> None:
    assert reason in _measured(results, "llama")["refusals"][case]
