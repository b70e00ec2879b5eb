"""Shields: the sketch, and the solve that anchors constrain."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.method.shield import STRONG, Shields, System, extend_shield, shielded, sketch
from ultraedit_kernels.ops import operations


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
    system = System(keys, 0.5, shield)
    coeff = system.solve(values)
    assert coeff.shape == (n, 6) and system.keys.shape == (n, 24)
    assert torch.allclose(coeff.T @ system.keys, expected, rtol=1e-9, atol=1e-11)
    assert torch.allclose(system.solve(2 * values), 2 * coeff)
    assert torch.equal(
        System(keys, 0.5, shield[:0]).solve(values), operations.solve(keys, values, 0.5)
    )


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


def test_shielded_rows_keep_only_what_anchors_leave():
    anchors, free = rows(4, 24, 0), rows(3, 24, 1)
    shield = extend_shield(torch.zeros(0, 24, dtype=torch.float64), anchors, 1e-9, limit=100)
    assert shielded(anchors, shield).abs().max() < 1e-6 * anchors.abs().max()
    expected = free - free @ torch.linalg.pinv(anchors) @ anchors
    assert torch.allclose(shielded(free, shield), expected, atol=1e-6)
    assert torch.equal(shielded(free, shield[:0]), free)


def common_and_rare(dtype: torch.dtype) -> torch.Tensor:
    """The shield [256, 300] of general text that says one thing at every third of its keys, and
    the others evenly, as language models do."""
    anchors = rows(4000, 300, 0).float()
    anchors[::3, 7] += 3e4
    shield = torch.zeros(0, 300, dtype=dtype)
    for part in anchors.split(1000):
        shield = extend_shield(shield, part, 1.0, limit=256)
    return sketch(shield.double(), 256).to(dtype)


def test_weak_rows_are_kept_in_half_precision_and_common_keys_stay_common():
    exact = common_and_rare(torch.float32)
    kept = Shields({"a": exact})
    assert kept.weak["a"].dtype == torch.float16 and kept.strong["a"].dtype == torch.float32
    assert [len(kept.weak["a"]), len(kept.strong["a"])] == [256 - STRONG, STRONG]
    assert kept["a"].dtype == torch.float32 and kept["a"].shape == exact.shape
    common = torch.zeros(1, 300)
    common[0, 7] = 3e4
    keys = torch.cat([common, rows(20, 300, 5).float()]).double()

    def left(shield: torch.Tensor) -> torch.Tensor:
        wide = shield.double()
        return keys.square().sum(1) - (keys @ wide.T).square().sum(1)

    assert torch.allclose(left(kept["a"]), left(exact), rtol=0.01, atol=0.0)
    # The reason for the strong rows: without them, a common key seems rare, or less than nothing.
    assert (left(exact.half())[0] - left(exact)[0]).abs() > 10 * left(exact)[0]


def test_a_shield_that_grows_keeps_its_rounded_rows_and_its_new_ones():
    kept = Shields({"a": common_and_rare(torch.float32)})
    more = extend_shield(kept["a"], rows(20, 300, 3), 1.0, limit=256)
    grown = Shields(kept)
    grown["a"] = more
    assert torch.equal(grown["a"], more)  # so that nothing is rounded twice
    assert [len(grown.weak["a"]), len(grown.strong["a"])] == [256 - STRONG, STRONG + 20]
    assert len(kept["a"]) == 256
    grown["a"] = more[:200]  # as a sketch does
    assert [len(grown.weak["a"]), len(grown.strong["a"])] == [200 - STRONG, STRONG]


def test_a_shield_in_float64_stays_as_it_is():
    exact = common_and_rare(torch.float64)
    kept = Shields({"a": exact, "b": exact[:0]})
    assert torch.equal(kept["a"], exact) and not len(kept.weak["a"])
    assert dict(kept.items()).keys() == {"a", "b"} and len(kept) == 2
    del kept["a"]
    assert list(kept) == list(kept.weak) == ["b"]


def test_shields_come_back_from_their_rows():
    kept = Shields({"a": common_and_rare(torch.float32), "b": torch.ones(2, 3).double()})
    again = Shields.of(kept.strong, {"a": kept.weak["a"]})
    assert all(torch.equal(again[name], rows_) for name, rows_ in kept.items())
