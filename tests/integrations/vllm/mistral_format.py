"""Mistral's own format beside Hugging Face's, as Mistral's repositories have both."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

NAMES = {
    "model.": "",
    "self_attn.": "attention.",
    "mlp.": "feed_forward.",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "tok_embeddings",
    "lm_head": "output",
}


def add_mistral_format(folder: Path) -> Path:
    """Write params.json, consolidated.safetensors and tekken.json beside a Mistral checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["max_position_embeddings"],
        "rope_theta": 10000.0,
    }
    (folder / "params.json").write_text(json.dumps(params))
    tensors = load_file(folder / "model.safetensors")
    heads = {"wq": params["n_heads"], "wk": params["n_kv_heads"]}
    save_file(dict(_renamed(tensors, heads)), folder / "consolidated.safetensors")
    (folder / "tekken.json").write_text(json.dumps(_tekken(config["vocab_size"])))
    return folder


def _renamed(tensors: dict[str, Tensor], heads: dict[str, int]) -> Any:
    for name, tensor in tensors.items():
        for theirs, own in NAMES.items():
            name = name.replace(theirs, own)
        if (count := heads.get(name.split(".")[-2])) is not None:  # pairs lie side by side
            pairs = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2)
            tensor = pairs.reshape(tensor.shape).contiguous()
        yield name, tensor


def _tekken(size: int) -> dict[str, Any]:
    """A tokenizer of bytes alone."""
    vocabulary = [
        {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
        for i in range(256)
    ]
    config = {
        "pattern": r"[^\r\n]|[\r\n]+",
        "num_vocab_tokens": 256,
        "default_vocab_size": size,
        "default_num_special_tokens": size - 256,
        "version": "v3",
    }
    return {"config": config, "vocab": vocabulary, "version": 3, "type": "Tekken"}
