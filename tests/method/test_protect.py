"""Anchors: where they come from."""

from __future__ import annotations

import copy

import torch

from tests.method.small import MODULES as SMALL
from tests.method.small import prompts, random_model, said, weights_of
from ultraedit_kernels.method.moments import moment_shield
from ultraedit_kernels.method.protect import (
    HELD_WEIGHT,
    OWN_TOKENS,
    SURE,
    Anchors,
    OwnAnchors,
    OwnKeys,
    bared,
    document_start,
    hold_edits,
    own_answers,
    own_texts,
)
from ultraedit_kernels.method.shield import extend_shield
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence

MODULES = [f"model.layers.{i}.mlp.down_proj" for i in (2, 3)]


def written(*args, **options) -> list[Sequence]:
    return [text for _, texts in own_texts(*args, **options) for text in texts]


def test_own_texts_are_the_models_own_and_repeatable(model, tokenizer):
    state = torch.random.get_rng_state()
    first, again = (written(model, tokenizer, 20, seed=3) for _ in range(2))
    assert first == again != written(model, tokenizer, 20, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len({tuple(text.target_ids) for text in first}) > 10
    assert all(text.prompt_ids == [tokenizer.bos_token_id] for text in first)
    ended = [text.target_ids[-1] == tokenizer.eos_token_id for text in first]
    assert sum(ended) > 10


def test_a_document_starts_where_the_model_begins_one(model, tokenizer):
    """Without BOS in the tokenizer, as Qwen's: not behind the end of a turn."""
    assert document_start(model, tokenizer) == 0
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    assert tokenizer.bos_token_id is None
    assert document_start(model, tokenizer) == 0  # the configuration knows it
    texts = written(model, tokenizer, 20, seed=3)
    assert len({tuple(text.target_ids) for text in texts}) > 10

    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.lm_head.weight.data.zero_()  # it is unsure everywhere, but behind the end of a turn
    hidden = model.model(torch.tensor([[1]])).last_hidden_state[0, 0].detach()
    model.lm_head.weight.data[7] = 50 * hidden / hidden.norm()
    model.generation_config.eos_token_id = [1, 2]
    other = model.model(torch.tensor([[2]])).last_hidden_state[0, 0].detach()
    assert torch.cosine_similarity(hidden, other, dim=0) < 0.9
    assert document_start(model, tokenizer) == 2


def test_few_distinct_texts_are_warned_of(model, tokenizer, caplog):
    written(model, tokenizer, 20, seed=3)
    assert not caplog.records
    model.lm_head.weight.data.zero_()
    hidden = model.model(torch.tensor([[0]])).last_hidden_state[0, 0].detach()
    model.lm_head.weight.data[1] = 100 * hidden / hidden.norm()  # it ends at once
    written(model, tokenizer, 20, seed=3)
    assert "only 1 of 20 texts" in caplog.text


def test_own_answers_are_what_the_model_says(model, tokenizer):
    (answer,) = own_answers(model, tokenizer, ["The capital of France is"])
    assert tokenizer.decode(answer.target_ids, skip_special_tokens=True).strip() == "Paris"
    assert answer.target_ids[-1] == tokenizer.eos_token_id


def test_own_anchors_watch_what_the_model_is_sure_of(model, tokenizer):
    weights = {name: model.get_submodule(name).weight.data for name in MODULES}
    texts = written(model, tokenizer, 40, seed=0)
    own = OwnAnchors(weights, ridge=1.0, limit=64)
    own.add(model, texts)
    anchors = own.anchors()
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


def test_texts_that_begin_with_a_word_are_protected_from_there_on():
    small = random_model()
    weights, texts = (
        weights_of(small),
        [Sequence([3], list(range(5 + i, 18 + i))) for i in range(6)],
    )
    whole, short = bared(texts)
    assert [s.prompt_ids + s.target_ids for s in whole] == [t.target_ids for t in texts]
    assert [s.prompt_ids + s.target_ids for s in short[:2]] == [
        [5, 6, 7, 8, 9],
        [13, 14, 15, 16, 17],
    ]
    assert len(short) == 12
    own = OwnKeys(weights, 1.0, 4096, bare=True)
    list(own.add(small, texts))
    for name, shield in own.anchors().keys.items():
        rows = torch.cat([all_keys_of(small, s, name) for s in (*texts, *whole, *short)]).double()
        assert len(rows) == 6 * 13 + 6 * 12 + 12 * 4
        expected = moment_shield(rows.T @ rows * OWN_TOKENS / len(rows), 1.0, 4096).float()
        torch.testing.assert_close(shield.T @ shield, expected.T @ expected)


def all_keys_of(model, sequence, name):
    every = Sequence(sequence.prompt_ids[:1], sequence.prompt_ids[1:] + sequence.target_ids)
    return capture(model, [every], [name], backward=False).keys[name]


def test_held_keys_are_left_alone(model):
    weights = {name: model.get_submodule(name).weight.data for name in MODULES}
    keys = {n: torch.randn(3, w.shape[1]) for n, w in weights.items()}
    anchors = Anchors.empty(weights).hold(keys, 1e-6, 64)
    for name, rows in keys.items():
        taken = rows.double() @ anchors.keys[name].T @ anchors.keys[name]
        assert torch.allclose(taken, rows.double(), atol=1e-4)


def test_keys_weigh_as_much_as_they_are_given():
    weights = {"a": torch.zeros(5, 9), "b": torch.zeros(5, 9)}
    keys = torch.randn(3, 9, dtype=torch.float64)
    first = Anchors.empty(weights)
    held = first.hold({"a": keys}, ridge=0.5, limit=64, weight=2.0)
    assert torch.equal(held.keys["a"], extend_shield(first.keys["a"], 2 * keys, 0.5, 64))
    assert held.keys["b"].shape == (0, 9) and first.keys["a"].shape == (0, 9)
    assert held.outputs["a"].shape == (0, 5) and held.watch is first.watch
    few = held.hold({"a": torch.randn(30, 9)}, ridge=0.5, limit=4)
    assert few.keys["a"].shape == (4, 9)


def test_earlier_edits_are_anchors_if_they_hold():
    model = random_model()
    holds = said(model, prompts(3, seed=2), tokens=1)
    lost = Sequence(holds[1].prompt_ids, [(holds[1].target_ids[0] + 1) % 64])
    weights = weights_of(model)
    edits = [holds[0], lost, holds[2]]
    anchors = hold_edits(Anchors.empty(weights), model, edits, SMALL, ridge=1.0, limit=64)
    assert anchors.watch.sequences == [holds[0], holds[2]] and anchors.watch.own == 0
    kept = capture(model, [holds[0], holds[2]], SMALL, backward=False)
    assert torch.allclose(anchors.watch.lead, kept.margin.float(), atol=1e-4)
    expected = Anchors.empty(weights).hold(kept.keys, 1.0, 64, HELD_WEIGHT)
    for name, rows in anchors.keys.items():
        assert torch.allclose(rows.T @ rows, expected.keys[name].T @ expected.keys[name])


def test_anchors_of_a_file_get_the_precision_of_the_weights():
    weights = {"a": torch.zeros(5, 9, dtype=torch.bfloat16)}
    wide = Anchors.empty({"a": torch.zeros(5, 9)}).hold({"a": torch.randn(2, 9)}, 1.0, 64)
    like = wide.like(weights)
    assert torch.equal(like.keys["a"], wide.keys["a"]) and like.keys["a"].dtype == torch.float64
    assert like.watch.keys["a"].dtype == torch.bfloat16
