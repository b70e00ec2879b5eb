"""A short edited life in bfloat16: what nearest rounding loses and stochastic rounding does not."""

from __future__ import annotations

import pytest
import torch

from bench.rounding import HALF_ULP, Turns, live, real_turns, study

D_IN, D_OUT, ROWS = 96, 64, 12


def turns(ratio: float) -> tuple[torch.Tensor, Turns]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    start = normal(D_OUT, D_IN)
    return start, Turns(normal(40, D_IN), normal(40, D_OUT), ROWS, ratio, "random")


def last(ratio, rounding, count=100):
    start, made = turns(ratio)
    *_, life = live(made, start, rounding, count)
    return life


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_large_updates_arrive(rounding):
    life = last(0.1, rounding)
    assert abs(life.lost) < 0.01 and life.drift < 0.1


def test_updates_below_half_an_ulp_are_lost_by_nearest_only():
    nearest, stochastic = (last(HALF_ULP / 8, rounding) for rounding in ("nearest", "stochastic"))
    assert nearest.lost > 0.5
    # Its noise on the projection: drift / sqrt(elements), some deviations wide.
    assert abs(stochastic.lost) < 5 * stochastic.drift / (D_IN * D_OUT) ** 0.5


def test_nearest_has_the_smaller_error_where_nothing_is_lost():
    nearest, stochastic = (last(0.1, rounding) for rounding in ("nearest", "stochastic"))
    assert nearest.error < stochastic.error
    assert nearest.shift_error < stochastic.shift_error
    probes = torch.eye(D_IN)
    assert nearest.output_error(probes) == pytest.approx(nearest.error, rel=1e-6)


def test_the_study_replays_bit_for_bit_and_ends_at_the_last_turn():
    start, made = turns(HALF_ULP)
    rows = list(study("short", made, start, count=50))
    assert {row["rounding"] for row in rows} == {"nearest", "stochastic"}
    assert [row["turn"] for row in rows[-2:]][-1] == 50
    assert all(row["replay"] == "bit-exact" for row in rows)


def test_real_turns_give_rows_and_a_size():
    start, made = real_turns(1, 2, {"anchors": 0, "rounds": 2})
    assert made.keys.shape[1] == start.shape[1] and made.coeff.shape[1] == start.shape[0]
    assert 0 < made.ratio < 10 and made.rows * 2 == len(made.keys)
