"""Each check passes what is right; `test_operations.py` has what the operations refuse."""

from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.ops import checks


@pytest.mark.parametrize("dtype", checks.FEATURE_DTYPES)
def test_floating_point_matrices_pass(dtype):
    checks.matrix("keys", torch.zeros(0, 3, dtype=dtype), columns=3)
    checks.update(torch.zeros(2, 3, dtype=dtype), torch.zeros(4, 2), torch.zeros(4, 3))


@pytest.mark.parametrize(
    ("tensor", "kind", "words"),
    [
        ([[1.0]], TypeError, "keys is a list, expected a torch.Tensor; convert"),
        (torch.zeros(2, 3, dtype=torch.int8), TypeError, "dtype torch.int8, expected one of float"),
        (torch.zeros(3), ValueError, r"shape \(3,\), expected two dimensions"),
        (torch.zeros(2, 4), ValueError, r"shape \(2, 4\), expected 3 columns"),
    ],
)
def test_what_is_no_matrix_is_named(tensor, kind, words):
    with pytest.raises(kind, match=words):
        checks.matrix("keys", tensor, columns=3)


def test_numbers_that_are_not_finite_are_counted():
    checks.finite(empty=torch.zeros(0, 3), good=torch.ones(2, 2))
    bad = torch.tensor([[1.0, float("nan")], [float("-inf"), 2.0]])
    with pytest.raises(ValueError, match="grads has 2 NaN or Inf of 4 values"):
        checks.finite(keys=torch.ones(2, 2), grads=bad)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_step_is_finite_and_above_zero(value):
    checks.positive("lr", 1)
    with pytest.raises(ValueError, match=r"lr is .*, expected a finite number above 0"):
        checks.positive("lr", value)
    with pytest.raises(TypeError, match="lr is a bool"):
        checks.positive("lr", True)


def test_a_seed_fits_32_bits():
    checks.rounding("nearest", 0)
    checks.rounding("stochastic", 2**32 - 1)
    for seed in (-1, 2**32, 1.0, None):
        with pytest.raises(ValueError, match="expected an integer from 0 to"):
            checks.rounding("stochastic", seed)


def test_a_weight_under_autograd_is_refused():
    weight = torch.zeros(2, 3, requires_grad=True)
    with pytest.raises(ValueError, match="weight requires grad and autograd is on"):
        checks.update(weight, torch.zeros(1, 2), torch.zeros(1, 3))
    with torch.no_grad():
        checks.update(weight, torch.zeros(1, 2), torch.zeros(1, 3))


def test_names_that_are_missing_or_too_many_are_told():
    checks.tensor_names({"a": 1}, {"a": None}, "tensors")
    with pytest.raises(ValueError, match=r"tensors: missing \['b'\], unexpected \['c'\]"):
        checks.tensor_names({"a": 1, "c": 1}, {"a": None, "b": None}, "tensors")
