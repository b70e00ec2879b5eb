"""Anchors: the sketch, the shield, and where they come from."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels import operations
from ultraedit_kernels.anchors import extend_shield, own_answers, own_texts, sketch, solve_shielded


def rows(n: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("n, m", [(1, 1), (5, 20), (30, 8)])
def test_shielded_solve_is_the_solve_with_anchor_rows(n, m):
    keys, anchors, values = rows(n, 24, 0), rows(m, 24, 1), rows(n, 6, 2)
    expected = operations.solve(keys, values, 0.5, anchors).T @ torch.cat([keys, anchors])
    shield = torch.zeros(0, 24, dtype=torch.float64)
    for part in anchors.split(3):  # anchors may come bit by bit
        shield = extend_shield(shield, part, 0.5, limit=100)
    coeff, shielded = solve_shielded(keys, values, 0.5, shield)
    assert coeff.shape == (n, 6) and shielded.shape == (n, 24)
    assert torch.allclose(coeff.T @ shielded, expected, rtol=1e-9, atol=1e-11)


def test_sketch_is_exact_at_full_rank_and_the_best_below():
    wide, tall = rows(9, 20, 0), rows(60, 20, 1)
    assert sketch(wide, 9) is wide
    full = sketch(tall, 20)
    assert full.shape == (20, 20)
    assert torch.allclose(full.T @ full, tall.T @ tall)
    for matrix in (wide, tall):
        part = sketch(matrix, 5)
        singular = torch.linalg.svdvals(matrix)
        rest = torch.linalg.matrix_norm(matrix.T @ matrix - part.T @ part, 2)
        assert part.shape == (5, 20)
        assert torch.isclose(rest, singular[5] ** 2)


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
