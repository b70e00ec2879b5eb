"""Anchors: where they come from."""

from __future__ import annotations

import torch

from ultraedit_kernels.method.protect import SURE, Anchors, own_anchors, own_answers, own_texts
from ultraedit_kernels.model.capture import capture

MODULES = [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]


def test_own_texts_are_the_models_own_and_repeatable(model, tokenizer):
    state = torch.random.get_rng_state()
    first, again = (own_texts(model, tokenizer, 20, seed=3) for _ in range(2))
    assert first == again != own_texts(model, tokenizer, 20, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({tuple(text.target_ids) for text in first}) > 10
    assert all(text.prompt_ids == [tokenizer.bos_token_id] for text in first)
    ended = [text.target_ids[-1] == tokenizer.eos_token_id for text in first]
    assert sum(ended) > 10


def test_own_answers_are_what_the_model_says(model, tokenizer):
    (answer,) = own_answers(model, tokenizer, ["The capital of France is"])
    assert tokenizer.decode(answer.target_ids, skip_special_tokens=True).strip() == "Paris"
    assert answer.target_ids[-1] == tokenizer.eos_token_id


def test_own_anchors_watch_what_the_model_is_sure_of(model, tokenizer):
    weights = {name: model.get_submodule(name).weight.data for name in MODULES}
    texts = own_texts(model, tokenizer, 40, seed=0)
    anchors = own_anchors(model, texts, weights, ridge=1.0, limit=64)
    assert {n: len(b) for n, b in anchors.keys.items()} == dict.fromkeys(MODULES, 64)
    assert {n: len(b) for n, b in anchors.outputs.items()} == dict.fromkeys(MODULES, 64)
    watch = anchors.watch
    assert 20 < len(watch) <= 40
    captured = capture(model, watch.sequences, MODULES, backward=False)
    assert captured.margin.min() >= SURE - 1e-3
    assert watch.lead.min() >= SURE
    whole = {(*t.prompt_ids, *t.target_ids) for t in texts}
    for sequence in watch.sequences:
        ids = (*sequence.prompt_ids, *sequence.target_ids)
        assert any(text[: len(ids)] == ids for text in whole)


def test_held_keys_are_left_alone(model):
    weights = {name: model.get_submodule(name).weight.data for name in MODULES}
    keys = {n: torch.randn(3, w.shape[1]) for n, w in weights.items()}
    anchors = Anchors.empty(weights).hold(keys, 1e-6, 64)
    for name, rows in keys.items():
        taken = rows.double() @ anchors.keys[name].T @ anchors.keys[name]
        assert torch.allclose(taken, rows.double(), atol=1e-4)
