"""Versions of weights: committed, returned to, and refused, without a model that computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ultraedit_kernels import EditDelta
from ultraedit_kernels.method.memory import Memory
from ultraedit_kernels.method.versions import Versions
from ultraedit_kernels.store.delta import LowRank

MEASURED = {"change": 0.0, "total_change": 0.0, "lost": 0.0}


def versions(directory=None, keep=100) -> tuple[dict[str, torch.Tensor], Versions]:
    weights = {"up": torch.ones(3, 4), "down": torch.ones(4, 3)}
    memory = Memory(weights, "per-module", texts=0, rows=8, ridge=1.0, seed=0)
    made = Versions(nn.Module(), weights, memory, directory, keep, writes=True)
    made.rollback(made.newest)
    made.recall()
    return weights, made


def advance(weights: dict[str, torch.Tensor], made: Versions, note=None) -> EditDelta:
    """One more turn, whose change is its number everywhere."""
    one = float(made.newest + 1)
    factors = {
        name: LowRank(torch.full((1, len(w)), one), torch.ones(1, w.shape[1]))
        for name, w in weights.items()
    }
    delta = made.change(factors, {"step": 0.4})
    for name, factor in delta.factors.items():
        factor.apply(weights[name])
    made.commit("delta", delta, made.memory.unchanged(), (), MEASURED, note)
    return delta


@pytest.mark.parametrize("on_disk", [False, True])
def test_every_version_is_returned_to(tmp_path, on_disk):
    weights, made = versions(tmp_path if on_disk else None)
    digests = [made.digest()]
    for _ in range(3):
        delta = advance(weights, made)
        digests.append(made.digest())
    assert delta.settings == {"step": 0.4, "seed": 3} and delta.base == made.base
    assert [record["digest"] for record in made.records] == digests[1:]
    assert torch.equal(made.delta(2).factors["up"].coeff, torch.full((1, 3), 2.0))
    assert not made.are_pristine(weights)
    for version in (2, 0):
        made.rollback(version)
        assert (made.newest, made.digest()) == (version, digests[version])
    assert made.are_pristine(weights)


def test_versions_of_a_directory_are_continued_from_a_snapshot(tmp_path):
    weights, made = versions(tmp_path, keep=2)
    for number in range(1, 6):
        advance(weights, made, note={"number": number})
    made.close()
    again, continued = versions(tmp_path, keep=2)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert [record["note"]["number"] for record in continued.records] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="version 1 was let go, expected 0 or 2 to 5"):
        continued.rollback(1)


def test_a_version_that_comes_out_otherwise_is_refused():
    weights, made = versions()
    advance(weights, made)
    advance(weights, made)
    made.records[0]["digest"] = "of other weights"
    before = made.digest()
    with pytest.raises(ValueError, match="replay of version 1 gives weights with digest"):
        made.rollback(1)
    assert (made.newest, made.digest()) == (2, before)


def test_a_digest_is_computed_beside():
    weights, made = versions()
    wait = made.begin_digest()
    assert wait() == made.digest() == wait()
    weights["up"].mul_(2)
    assert made.begin_digest()() == made.digest() != wait()


def test_a_version_has_the_digest_that_was_begun(tmp_path):
    weights, made = versions(tmp_path)
    advance(weights, made)
    delta = made.change({n: LowRank.empty(w) for n, w in weights.items()}, {"step": 0.4})
    begun = made.begin_digest()
    made.commit("delta", delta, made.memory.unchanged(), (), MEASURED, None, begun)
    assert made.records[-1]["digest"] == made.digest()
    made.rollback(2)  # which checks it
    made.recall()
    made.commit("delta", delta, made.memory.unchanged(), (), MEASURED, None, lambda: "another")
    with pytest.raises(ValueError, match="expected another"):
        made.rollback(3)
