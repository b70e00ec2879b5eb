"""The four operations: golden vectors, invariants, and what they refuse."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from ultraedit_kernels.ops import operations, reference
from ultraedit_kernels.ops.statistics import Statistics

GOLDEN = Path(__file__).parent / "golden"


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    scale = float(expected.double().norm())
    return float((got.double() - expected.double()).norm()) / (scale or 1.0)


STREAMS = ["small", "tall"]


def check_golden(
    stream: str, implementation, dtype: torch.dtype, tolerance: float, device="cpu"
) -> None:
    """Run the four operations over a golden stream, turn by turn."""
    with safe_open(GOLDEN / f"{stream}.safetensors", "pt", device=str(device)) as file:
        names, options = set(file.keys()), file.metadata()
        weight = file.get_tensor("weight.0").to(dtype)
        stats = Statistics.empty(weight.shape[1], weight.shape[0], device)
        turns = max(int(name.split(".")[1]) for name in names)
        for turn in range(1, turns + 1):
            count = sum(name.startswith(f"keys.{turn}.") for name in names)
            keys, grads = (
                [file.get_tensor(f"{kind}.{turn}.{b}").to(dtype) for b in range(count)]
                for kind in ("keys", "grads")
            )
            for h, g in zip(keys, grads, strict=True):
                stats = implementation.update_statistics(stats, h, g)
            h, g = torch.cat(keys), torch.cat(grads)
            values = implementation.edit_values(h, g, stats, float(options["lr"]))
            coeff = implementation.solve(h, values, float(options["ridge"]))
            implementation.rank_k_update_(weight, coeff, h)
            assert float(stats.count) == float(file.get_tensor(f"count.{turn}"))
            assert relative(stats.mean, file.get_tensor(f"mean.{turn}")) <= tolerance
            assert relative(stats.m2, file.get_tensor(f"m2.{turn}")) <= tolerance
            assert relative(values, file.get_tensor(f"values.{turn}")) <= tolerance
            assert relative(weight, file.get_tensor(f"weight.{turn}")) <= tolerance
    assert turns >= 2


@pytest.mark.parametrize("stream", STREAMS)
def test_golden_vectors(stream):
    check_golden(stream, reference, torch.float64, 1e-9)
    check_golden(stream, operations, torch.float64, 1e-9)
    check_golden(stream, operations, torch.float32, 1e-4)


def make_rows(n: int, d_in: int, d_out: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(n, d_in, generator=generator, dtype=torch.float64) * 3 + 1
    grads = torch.randn(n, d_out, generator=generator, dtype=torch.float64) * 1e-3
    return keys.to(dtype), grads.to(dtype)


def turn_of(implementation, keys, grads, weight, lr=1e-3, ridge=1.0):
    stats = Statistics.empty(keys.shape[1], grads.shape[1])
    stats = implementation.update_statistics(stats, keys, grads)
    values = implementation.edit_values(keys, grads, stats, lr)
    coeff = implementation.solve(keys, values, ridge)
    implementation.rank_k_update_(weight, coeff, keys)
    return stats, values, coeff, weight


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 40), d_in=st.integers(1, 33), d_out=st.integers(1, 20), seed=st.integers(0))
def test_operations_equal_reference(n, d_in, d_out, seed):
    keys, grads = make_rows(n, d_in, d_out, seed % 2**31)
    expected = turn_of(reference, keys, grads, torch.zeros(d_out, d_in, dtype=torch.float64))
    exact = turn_of(operations, keys, grads, torch.zeros(d_out, d_in, dtype=torch.float64))
    for got, want in zip(exact[1:], expected[1:], strict=True):
        assert relative(got, want) <= 1e-9
    fast = turn_of(operations, keys.float(), grads.float(), torch.zeros(d_out, d_in))
    assert relative(fast[0].m2, expected[0].m2) <= 1e-4
    assert relative(fast[1], expected[1]) <= 1e-4


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 30), max_size=6), seed=st.integers(0, 2**31))
def test_statistics_do_not_depend_on_the_batches(cuts, seed):
    keys, grads = make_rows(30, 7, 5, seed)
    bounds = [0, *sorted(cuts), 30]
    stats = Statistics.empty(7, 5)
    for start, end in itertools.pairwise(bounds):
        stats = operations.update_statistics(stats, keys[start:end], grads[start:end])
    z = torch.cat([keys, grads], 1)
    assert float(stats.count) == 30
    assert relative(stats.mean, z.mean(0)) <= 1e-12
    assert relative(stats.std, z.std(0)) <= 1e-9


def test_one_answer_position_is_no_accident():
    """The published statistics are NaN for ever after a batch with one answer token."""
    keys, grads = make_rows(5, 6, 4)
    stats = Statistics.empty(6, 4)
    for i in range(5):
        stats = operations.update_statistics(stats, keys[i : i + 1], grads[i : i + 1])
    # nor is the deviation inflated by n / (n - 1) per batch
    assert relative(stats.std, torch.cat([keys, grads], 1).std(0)) <= 1e-9


def test_count_is_exact_beyond_float32():
    stats = Statistics.empty(1, 1)
    big = Statistics(torch.tensor(2.0**24, dtype=torch.float64), stats.mean, stats.m2, 1)
    more = operations.update_statistics(big, torch.ones(1, 1), torch.ones(1, 1))
    assert float(more.count) == 2**24 + 1


def test_statistics_are_not_changed_in_place():
    stats = Statistics.empty(6, 4)
    operations.update_statistics(stats, *make_rows(5, 6, 4))
    assert float(stats.count) == 0 and not stats.mean.any() and not stats.m2.any()


def test_solve_is_the_published_primal_form():
    keys, values = make_rows(9, 12, 5)
    delta = operations.solve(keys, values, ridge=0.5).T @ keys
    gram = keys.T @ keys + 0.5 * torch.eye(12, dtype=torch.float64)
    assert relative(delta.T, torch.linalg.solve(gram, keys.T @ values)) <= 1e-10


@pytest.mark.parametrize("n", [4, 40])
def test_anchors_are_rows_with_value_zero(n):
    keys, values = make_rows(n, 12, 5)
    anchors, _ = make_rows(6, 12, 5, seed=1)
    coeff = operations.solve(keys, values, 1.0, anchors)
    rows = torch.cat([keys, anchors])
    expected = reference.solve(rows, torch.cat([values, torch.zeros(6, 5, dtype=torch.float64)]))
    assert relative(coeff, expected) <= 1e-9
    moved = (anchors @ (coeff.T @ rows).T).norm()
    free = (anchors @ (operations.solve(keys, values).T @ keys).T).norm()
    assert moved < free


def test_solve_is_exact_under_large_keys():
    """λ = 1 under keys of norm 1000 leaves no room for float32 in the Gram matrix."""
    keys, values = make_rows(30, 200, 8, dtype=torch.float32)
    keys *= 1000 / keys.norm(dim=1, keepdim=True)
    got = operations.solve(keys, values)
    expected = reference.solve(keys.double(), values.double())
    assert relative(got.double().T @ keys.double(), expected.T @ keys.double()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_update_rounds_once(dtype):
    keys, coeff = make_rows(7, 40, 600, dtype=torch.float32)
    weight = torch.randn(600, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = weight.double() + coeff.double().T @ keys.double()
    got = operations.rank_k_update_(weight, coeff, keys)
    assert got is weight
    ulp = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
    assert ((weight.double() - exact).abs() <= 0.51 * ulp + 1e-6).all()


def test_update_of_a_slice_leaves_the_rest():
    merged = torch.zeros(20, 16)
    keys, coeff = make_rows(3, 8, 10, dtype=torch.float32)
    operations.rank_k_update_(merged[10:, 4:12], coeff, keys)
    assert relative(merged[10:, 4:12], coeff.T @ keys) <= 1e-6
    assert not merged[:10].any() and not merged[:, :4].any() and not merged[:, 12:].any()


def test_empty_turn_changes_nothing():
    keys, grads = torch.zeros(0, 8), torch.zeros(0, 5)
    stats = Statistics.empty(8, 5)
    assert operations.update_statistics(stats, keys, grads) is stats
    values = operations.edit_values(keys, grads, stats, 1e-6)
    coeff = operations.solve(keys, values)
    assert values.shape == coeff.shape == (0, 5)
    assert not operations.rank_k_update_(torch.zeros(5, 8), coeff, keys).any()


SHAPES = {"n": st.integers(1, 30), "d_in": st.integers(1, 24), "d_out": st.integers(1, 12)}


@settings(deadline=None, max_examples=25)
@given(**SHAPES, seed=st.integers(0, 2**31))
def test_order_of_rows_does_not_matter(n, d_in, d_out, seed):
    keys, grads = make_rows(n, d_in, d_out, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    zero = torch.zeros(d_out, d_in, dtype=torch.float64)
    stats, values, _, weight = turn_of(operations, keys, grads, zero.clone())
    other = turn_of(operations, keys[order], grads[order], zero.clone())
    assert relative(other[0].m2, stats.m2) <= 1e-10
    assert relative(other[1], values[order]) <= 1e-9
    assert relative(other[3], weight) <= 1e-8


@settings(deadline=None, max_examples=25)
@given(**SHAPES, seed=st.integers(0, 2**31), scale=st.sampled_from([2.0**-9, 0.5, 4.0, 2.0**9]))
def test_scaling_laws(n, d_in, d_out, seed, scale):
    keys, grads = make_rows(n, d_in, d_out, seed)
    stats = operations.update_statistics(Statistics.empty(d_in, d_out), keys, grads)
    larger = operations.update_statistics(Statistics.empty(d_in, d_out), scale * keys, grads)
    assert torch.equal(larger.std[:d_in], scale * stats.std[:d_in])
    values = operations.edit_values(keys, grads, stats, 1e-3)
    assert (
        relative(operations.edit_values(keys, grads, stats, scale * 1e-3), scale * values) < 1e-12
    )
    coeff = operations.solve(keys, values)
    assert relative(operations.solve(keys, scale * values), scale * coeff) < 1e-12
    assert relative(operations.solve(scale * keys, values, scale**2), coeff / scale**2) < 1e-12


@settings(deadline=None, max_examples=25)
@given(**SHAPES, seed=st.integers(0, 2**31), ridge=st.sampled_from([0.1, 1.0, 10.0]))
def test_primal_equals_dual(n, d_in, d_out, seed, ridge):
    """Whichever system is the smaller one, the float64 coefficients solve the dual one."""
    keys, values = make_rows(n, d_in, d_out, seed)
    coeff = operations.solve(keys, values, ridge)
    assert relative(coeff, reference.solve(keys, values, ridge)) <= 1e-9
    primal = keys.T @ keys + ridge * torch.eye(d_in, dtype=torch.float64)
    change = torch.linalg.solve(primal, keys.T @ values)
    assert relative(keys.T @ coeff, change) <= 1e-8


def exact_change(keys, values, ridge=1.0):
    """ΔWᵀ as the least squares problem min ‖HX - V‖² + λ‖X‖², without normal equations."""
    d_in, d_out = keys.shape[1], values.shape[1]
    system = torch.cat([keys, ridge**0.5 * torch.eye(d_in, dtype=torch.float64)])
    right = torch.cat([values, torch.zeros(d_in, d_out, dtype=torch.float64)])
    return torch.linalg.lstsq(system, right, driver="gelsy").solution


@settings(deadline=None, max_examples=60)
@given(
    different=st.integers(1, 12),
    repeats=st.sampled_from([1, 2, 10, 100]),
    d_in=st.sampled_from([4, 48, 300]),
    exponents=st.sampled_from([(0, 0), (3, 3), (4, 4), (-4, -4), (-4, 4)]),
    seed=st.integers(0, 2**31),
)
def test_solve_survives_repeated_and_wildly_scaled_keys(different, repeats, d_in, exponents, seed):
    """Keys of norm 1e-4 to 1e4 in one turn, each up to 100 times, every time with another value."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(different, d_in, generator=generator)
    low, high = exponents
    norms = 10 ** (low + (high - low) * torch.rand(different, 1, generator=generator))
    keys = (keys / keys.norm(dim=1, keepdim=True) * norms).repeat(repeats, 1)
    values = torch.randn(len(keys), 5, generator=generator)
    expected = exact_change(keys.double(), values.double())
    coeff = operations.solve(keys, values)
    assert coeff.dtype == torch.float32
    assert relative(keys.double().T @ coeff.double(), expected) <= 1e-4
    applied = operations.rank_k_update_(torch.zeros(5, d_in), coeff, keys)
    assert relative(applied.T, expected) <= 1e-4
    exact = operations.solve(keys.double(), values.double())
    # Y itself: its terms reach 10⁹ times their sum and more.
    assert relative(keys.double().T @ exact, expected) <= 1e-3


@pytest.mark.parametrize("n", [6, 40])
def test_coefficients_of_dependent_keys_keep_the_change(n):
    """Below and above d_in: float32 coefficients of one key under n values that conflict."""
    key = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    keys = (1e3 * key / key.norm()).expand(n, 12)
    values = torch.randn(n, 3, generator=torch.Generator().manual_seed(1))
    expected = exact_change(keys.double(), values.double())
    naive = reference.solve(keys.double(), values.double()).float()
    assert relative(keys.double().T @ naive.double(), expected) > 1e-2, "rounding is no problem"
    coeff = operations.solve(keys, values)
    assert relative(keys.double().T @ coeff.double(), expected) <= 1e-5
    wide = operations.solve(keys.double(), values.double())
    outputs = keys.double() @ expected
    assert relative(values.double() - wide, outputs) <= 1e-6, "outputs move by V - λY"


HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])


@HALVES
def test_stochastic_rounding_of_an_update(half):
    """A function of seed, row, column and sum alone; small changes are not lost on average."""
    keys, coeff = torch.ones(1, 40), torch.full((1, 600), 2.0**-12)
    weight = torch.ones(600, 40, dtype=half)
    update = partial(operations.rank_k_update_, rounding="stochastic")
    first, again, other = (update(weight.clone(), coeff, keys, seed=s) for s in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    columns = weight.T.contiguous().T
    assert torch.equal(update(columns, coeff, keys, seed=7), first)
    part = update(weight[:, :20].clone(), coeff, keys[:, :20], seed=7)
    assert torch.equal(part, first[:, :20])
    assert operations.rank_k_update_(weight.clone(), coeff, keys).eq(1).all()
    share = 2.0**-12 / torch.finfo(half).eps
    sigma = (share * (1 - share) / weight.numel()) ** 0.5
    assert abs(float(first.gt(1).double().mean()) - share) < 5 * sigma


def bad_calls():
    keys, grads = make_rows(4, 6, 3, dtype=torch.float32)
    stats, weight = Statistics.empty(6, 3), torch.zeros(3, 6)
    nan = keys.clone()
    nan[1, 2] = float("nan")
    inf = grads.clone()
    inf[0, 0] = float("inf")
    update, values, solve, apply = (
        operations.update_statistics,
        operations.edit_values,
        operations.solve,
        operations.rank_k_update_,
    )
    return [
        (update, (stats, nan, grads), ValueError, "keys has 1 NaN or Inf of 24"),
        (update, (stats, keys, inf), ValueError, "grads has 1 NaN or Inf of 12"),
        (update, (stats, keys[:3], grads), ValueError, r"keys \(3, 6\), grads \(4, 3\)"),
        (update, (stats, keys[:, :5], grads), ValueError, "expected 6 columns"),
        (update, (stats, keys[0], grads), ValueError, "expected two dimensions"),
        (update, (stats, keys.int(), grads), TypeError, "dtype torch.int32, expected one of"),
        (update, (stats, keys.tolist(), grads), TypeError, "keys is a list"),
        (update, ({}, keys, grads), TypeError, "stats is a dict"),
        (update, (stats, keys.to("meta"), grads), ValueError, "keys on meta, grads on cpu"),
        (values, (keys, grads, stats, 0.0), ValueError, "lr is 0.0"),
        (values, (keys, grads, stats, "auto"), TypeError, "lr is a str"),
        (solve, (keys, grads, -1.0), ValueError, "ridge is -1.0"),
        (solve, (keys, grads[:2]), ValueError, "different numbers of rows"),
        (solve, (keys, grads, 1.0, keys[:, :2]), ValueError, "anchors has shape"),
        (solve, (nan, grads), ValueError, "keys has 1 NaN"),
        (apply, (weight, inf, keys), ValueError, "coeff has 1 NaN or Inf"),
        (apply, (weight, grads, keys[:, :4]), ValueError, "expected 6 columns"),
        (apply, (weight.to(torch.int8), grads, keys), TypeError, "torch.int8"),
        (partial(apply, rounding="up"), (weight, grads, keys), ValueError, "rounding is 'up'"),
        (partial(apply, seed=2**32), (weight, grads, keys), ValueError, "seed is 4294967296"),
        (partial(apply, seed=0.5), (weight, grads, keys), ValueError, "seed is 0.5"),
    ]


@pytest.mark.parametrize("call", bad_calls(), ids=lambda call: call[3])
def test_bad_tensors_are_refused_and_change_nothing(call):
    function, arguments, error, message = call
    with pytest.raises(error, match=message):
        function(*arguments)
    for argument in arguments:
        if isinstance(argument, Statistics):
            assert float(argument.count) == 0
    if isinstance(arguments[0], torch.Tensor) and arguments[0].shape == (3, 6):
        assert not arguments[0].any()  # the weight


def test_forced_backend_that_cannot_run_raises(monkeypatch):
    keys, grads = make_rows(4, 6, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="expected a GPU"):
        operations.solve(keys, grads)
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "aot")
    with pytest.raises(RuntimeError, match="ULTRAEDIT_KERNELS=aot but"):
        operations.solve(keys, grads)
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "cuda")
    with pytest.raises(ValueError, match="expected one of aot, triton, torch"):
        operations.solve(keys, grads)
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "torch")
    assert operations.solve(keys, grads).shape == (4, 3)
