"""GGUF files: the bundled model written as one, and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo import MODEL
from ultraedit_kernels.model import gguf as ours
from ultraedit_kernels.model.gguf import is_gguf, load_gguf, unpacked

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


def write(path: Path, begins: bool) -> None:
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


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, begins=True)
    return path


def test_the_model_in_the_file_is_the_model(file: Path, model: Any) -> None:
    assert is_gguf(file) and not is_gguf(MODEL) and not is_gguf(file.with_name("none.gguf"))
    loaded, tokenizer = load_gguf(file, "float32")
    was, now = model.state_dict(), loaded.state_dict()
    assert was.keys() == now.keys()
    for name, weight in was.items():
        torch.testing.assert_close(now[name], weight.float(), rtol=0, atol=0)
    assert not hasattr(loaded.config, "quantization_config")
    assert tokenizer.eos_token == "<|eos|>"


def test_texts_begin_as_the_file_says(file: Path, tmp_path: Path) -> None:
    _, tokenizer = load_gguf(file)
    write(tmp_path / "bare.gguf", begins=False)
    bare = ours.load_gguf_tokenizer(tmp_path / "bare.gguf")
    ids = bare("The capital")["input_ids"]
    assert tokenizer("The capital")["input_ids"] == [tokenizer.bos_token_id, *ids]
    assert tokenizer.bos_token_id not in ids


def test_it_is_unpacked_once_until_it_changes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = unpacked(file)
    assert folder.parent == tmp_path / "cache" / "ultraedit" == ours.cache_folder()
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(folder)("The capital")["input_ids"]
    assert ids == ours.load_gguf_tokenizer(file)("The capital")["input_ids"]
    made = (folder / "config.json").stat().st_mtime_ns
    assert unpacked(file) == folder and (folder / "config.json").stat().st_mtime_ns == made
    copy = tmp_path / "tiny.gguf"
    copy.write_bytes(file.read_bytes())
    assert unpacked(copy) != folder
    assert len(list(ours.cache_folder().iterdir())) == 2  # no scratch is left


def test_what_cannot_be_unpacked_is_said(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:5000])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"cannot unpack .*broken.gguf: .*; expected one whole"):
        unpacked(broken)
    assert not ours.cache_folder().exists() or not list(ours.cache_folder().iterdir())
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package gguf.*pip install 'ultraedit-kernels\[gguf\]'"):
        load_gguf(file)
