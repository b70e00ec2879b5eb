"""The bundled model as a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.demo import MODEL

gguf = pytest.importorskip("gguf")

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write(path: Path, begins: bool = True) -> None:
    """The bundled model as llama.cpp's converter writes a Llama, in float32."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)

    told = json.loads((MODEL / "tokenizer.json").read_text())
    vocabulary = told["model"]["vocab"] | {t["content"]: t["id"] for t in told["added_tokens"]}
    special = {t["content"] for t in told["added_tokens"]}
    tokens = sorted(vocabulary, key=lambda token: vocabulary[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = told["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(vocabulary["<|eos|>"])
    writer.add_add_bos_token(begins)

    def add(name: str, weight: torch.Tensor) -> None:
        writer.add_tensor(f"{name}.weight", weight.float().numpy())

    add("token_embd", weights["model.embed_tokens.weight"])
    add("output_norm", weights["model.norm.weight"])
    add("output", weights["lm_head.weight"])
    for layer in range(config.num_hidden_layers):
        for there, here in NAMES.items():
            weight = weights[f"model.layers.{layer}.{there}.weight"]
            if here in ("attn_q", "attn_k"):  # rotary pairs lie side by side in GGUF
                heads = config.num_attention_heads
                heads = heads if here == "attn_q" else config.num_key_value_heads
                pairs = weight.reshape(heads, 2, -1, weight.shape[1])
                weight = pairs.transpose(1, 2).reshape(weight.shape).contiguous()
            add(f"blk.{layer}.{here}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
