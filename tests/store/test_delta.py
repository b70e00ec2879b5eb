"""Delta files: round trip, and everything that a file can have wrong."""

from __future__ import annotations

import contextlib
import json

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraedit_kernels.ops.operations import rank_k_update_
from ultraedit_kernels.store.delta import EditDelta, LowRank, digest


def make_delta(dtype=torch.bfloat16) -> EditDelta:
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(
            torch.randn(3, d_out, generator=generator),
            torch.randn(3, d_in, generator=generator).to(dtype),
        )
        for name, d_out, d_in in (("layers.0.down_proj", 4, 6), ("layers.1.down_proj", 4, 6))
    }
    return EditDelta(factors, {name: "ab" * 32 for name in factors}, {"lr": "auto", "rounds": 3})


def test_round_trip(tmp_path):
    delta = make_delta()
    delta.save(tmp_path / "turn.safetensors")
    loaded = EditDelta.load(tmp_path / "turn.safetensors")
    assert EditDelta.from_bytes(delta.to_bytes()).metadata() == loaded.metadata()
    assert loaded.base == delta.base and loaded.settings == delta.settings
    for name, factor in delta.factors.items():
        assert loaded.factors[name].keys.dtype == torch.bfloat16
        assert torch.equal(loaded.factors[name].keys, factor.keys)
        assert torch.equal(loaded.factors[name].coeff, factor.coeff)


@pytest.mark.parametrize("d_out, d_in", [(4, 6), (6, 4)])
def test_a_change_takes_no_more_room_than_its_matrix(d_out, d_in):
    generator = torch.Generator().manual_seed(0)
    change = LowRank.empty(torch.zeros(d_out, d_in))
    expected = torch.zeros(d_out, d_in)
    for n in (1, 3, 0, 2, 9):
        coeff, keys = (torch.randn(n, d, generator=generator) for d in (d_out, d_in))
        change = change.append(coeff, keys)
        expected += coeff.T @ keys
        weight = torch.zeros(d_out, d_in)
        change.apply(weight)
        torch.testing.assert_close(weight, expected)
    assert len(change.coeff) == len(change.keys) == 4


def test_stochastic_rounding_goes_with_the_file():
    delta = make_delta()
    how = {"rounding": "stochastic", "seed": 7}
    weights = {}
    for settings_ in ({}, how, how | {"seed": 8}):
        again = EditDelta.from_bytes(EditDelta(delta.factors, delta.base, settings_).to_bytes())
        weight = torch.ones(4, 6, dtype=torch.bfloat16)
        again.factors["layers.0.down_proj"].apply(weight)
        weights[settings_.get("seed")] = weight
        assert torch.equal(weight, applied(weight, delta, **settings_))
    assert not torch.equal(weights[None], weights[7])
    assert not torch.equal(weights[7], weights[8])


def applied(weight, delta, **how):
    factor = delta.factors["layers.0.down_proj"]
    return rank_k_update_(torch.ones_like(weight), factor.coeff, factor.keys, **how)


def test_join_is_the_sum():
    first, second = make_delta(torch.float32), make_delta(torch.float32)
    joined = EditDelta.join([first, second])
    weight, expected = torch.zeros(4, 6), torch.zeros(4, 6)
    joined.factors["layers.0.down_proj"].apply(weight)
    for delta in (first, second):
        delta.factors["layers.0.down_proj"].apply(expected)
    assert torch.allclose(weight, expected)


def rewritten(tensors=None, drop=None, **metadata) -> bytes:
    delta = make_delta()
    all_tensors = delta.tensors() | (tensors or {})
    if drop:
        del all_tensors[drop]
    merged = {k: v for k, v in (delta.metadata() | metadata).items() if v is not None}
    return safetensors.torch.save(all_tensors, metadata=merged)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "not a readable safetensors file"),
        (b"\x00" * 100, "not a readable safetensors file"),
        (make_delta().to_bytes()[:-5], "not a readable safetensors file"),
        (b"\xff" * 8 + make_delta().to_bytes(), "not a readable safetensors file"),
        (safetensors.torch.save({"x": torch.zeros(2)}), "format None.*expected 'ultraedit-delta'"),
        (rewritten(format="pt"), "format 'pt'"),
        (rewritten(format_version="9"), "format version '9', expected '1'"),
        (rewritten(base=None), "damaged metadata"),
        (rewritten(base="[]"), "damaged metadata"),
        (rewritten(settings="{"), "damaged metadata"),
        (rewritten(drop="layers.0.down_proj.keys"), "missing .'layers.0.down_proj.keys'."),
        (rewritten({"more": torch.zeros(1)}), "unexpected .'more'."),
        (rewritten(base=json.dumps({"layers.0.down_proj": "x"})), "unexpected"),
        (rewritten({"layers.0.down_proj.keys": torch.zeros(2, 6)}), "different numbers of rows"),
        (rewritten({"layers.0.down_proj.keys": torch.zeros(3)}), "expected two dimensions"),
        (rewritten({"layers.0.down_proj.keys": torch.full((3, 6), torch.nan)}), "NaN or Inf"),
        (rewritten({"layers.0.down_proj.coeff": torch.zeros(3, 4).int()}), "dtype torch.int32"),
    ],
)
def test_bad_files_are_refused(data, message, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        EditDelta.load(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(caught.value)


@settings(deadline=None, max_examples=200)
@given(cut=st.integers(0, 2000), flip=st.integers(0, 255), at=st.integers(0, 2000))
def test_any_damage_gives_a_valid_delta_or_a_value_error(cut, flip, at):
    data = bytearray(make_delta().to_bytes())
    data[at % len(data)] ^= flip
    with contextlib.suppress(ValueError):  # any other error fails the test
        EditDelta.from_bytes(bytes(data[: max(0, len(data) - cut % 50)]))


def test_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        EditDelta.load(tmp_path / "none.safetensors")


def test_digest_sees_bytes_dtype_and_shape():
    weight = torch.arange(6.0).reshape(2, 3)
    others = [weight + 1e-6, weight.double(), weight.reshape(3, 2), weight.t()]
    assert digest(weight) == digest(weight.clone())
    assert len({digest(w) for w in [weight, *others]}) == 5
    assert digest(weight.t()) == digest(weight.t().contiguous())
