"""The scale bench: its formulas, and the file of rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bench import scale
from ultraedit_kernels import Editor, EditRequest

MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]


def test_the_formula_is_what_an_editor_holds(tokenizer, monkeypatch, tmp_path) -> None:
    """Of a model deep enough for edits at names, from a checkpoint and from none."""
    monkeypatch.setenv("ULTRAEDIT_CACHE", "")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=12,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    editor = Editor(model, tokenizer, anchors=120)
    editor.prepare()
    shapes = {name: tuple(weight.shape) for name, weight in editor.weights.items()}
    assert set(shapes.values()) == {(64, 256)}
    keys = editor.memory.anchors.keys
    assert {len(rows) for rows in keys.weak.values()} == {256 - scale.STRONG}
    watched = sum(
        t.numel() * t.element_size() for t in editor.memory.anchors.watch.tensors().values()
    )
    got = scale.held(editor) - watched
    assert got == pytest.approx(scale.held_by_formula(shapes), rel=0.01)
    model.config.name_or_path = ""
    copies = Editor(model, tokenizer, anchors=0)
    weights = sum(d_out * d_in * 2 for d_out, d_in in shapes.values())
    rows = weights  # all of them, as there are few
    statistics = sum(16 * (d_out + d_in) for d_out, d_in in shapes.values())
    copies.prepare()
    assert scale.held(copies) == pytest.approx(weights + rows + statistics, rel=0.01)


def test_memory_at_the_shapes_of_llama_3_8b() -> None:
    shapes = scale.shapes_of("llama-8b")
    assert set(shapes.values()) == {(4096, 14336)}
    row = scale.by_formula("llama-8b")
    weak, strong, newest = 896 * (4096 + 14336) * 2, 128 * (4096 + 14336) * 4, 256 * 14336 * 4
    each = 256 * 14336 * 2 + weak + strong + newest + 16 * (4096 + 14336)
    assert row["held_bytes_formula"] == len(shapes) * each < 1e9
    assert row["copied_bytes_formula"] == len(shapes) * (each + 4096 * 14336 * 2)
    assert row["turn_bytes_formula"] == len(shapes) * 4096 * 14336 * 2
    assert scale.by_formula("llama-70b")["ranks"] == 8


def test_a_row_replaces_that_of_the_same_version_and_machine(tmp_path: Path) -> None:
    file = tmp_path / "scale.csv"
    where = {"ultraedit_kernels": "1", "hardware": "a"}
    scale.write(file, [{"model": "x", "edit_x": "3", **where}, {"model": "y", **where}])
    scale.write(file, [{"model": "x", "edit_x": "2", "turn_x": "5", **where}])
    scale.write(file, [{"model": "x", "edit_x": "1", **where, "ultraedit_kernels": "2"}])
    rows = list(csv.DictReader(file.open()))
    assert [(r["model"], r["edit_x"], r["ultraedit_kernels"]) for r in rows] == [
        ("y", "", "1"),
        ("x", "2", "1"),
        ("x", "1", "2"),
    ]


def test_the_published_arithmetic_leaves_the_model_as_it_is(model, tokenizer) -> None:
    before = {name: p.clone() for name, p in model.named_parameters()}
    sequences = scale.sequences_of(tokenizer, [EditRequest("The capital of France is", "Rome")])
    assert scale.published(model, MODULES, sequences) > 0
    assert scale.forward(model, sequences, 1) > 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
