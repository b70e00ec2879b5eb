"""The one place that rejects bad tensors. Every message says what, got, expected, remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def matrix(name: str, tensor: Any, *, columns: int | None = None) -> None:
    """Raise unless `tensor` is a 2-D floating-point tensor (with `columns` columns, if given)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, expected a torch.Tensor; "
            "convert it with torch.as_tensor"
        )
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(
            f"{name} has dtype {tensor.dtype}, expected one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in FEATURE_DTYPES)}; "
            "quantised and integer tensors are not supported, pass the dequantised values"
        )
    if tensor.ndim != 2:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected two dimensions [rows, features]; "
            "flatten batch and sequence into rows first"
        )
    if columns is not None and tensor.shape[1] != columns:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {columns} columns; "
            "check that all tensors belong to the same module"
        )


def same_rows(**tensors: Tensor) -> None:
    """Raise unless all tensors have equally many rows."""
    if len({t.shape[0] for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(
            f"{' and '.join(tensors)} have different numbers of rows: {got}; "
            "expected one row per answer position in each"
        )


def same_device(**tensors: Tensor) -> None:
    """Raise unless all tensors are on one device."""
    if len({t.device for t in tensors.values()}) > 1:
        got = ", ".join(f"{name} on {t.device}" for name, t in tensors.items())
        raise ValueError(f"tensors are on different devices: {got}; move them to one with .to()")


def finite(**tensors: Tensor) -> None:
    """Raise if any tensor holds NaN or Inf. Reads each once; on a GPU this waits for it."""
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        tensor = tensor.detach()
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) & torch.isfinite(high)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(
                f"{name} has {bad} NaN or Inf of {tensor.numel()} values, expected finite values; "
                "look for an overflow in the forward or backward pass (fp16 models: try bfloat16)"
            )


def positive(name: str, value: float) -> None:
    """Raise unless `value` is a finite number above zero."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a number above 0")
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} is {value}, expected a finite number above 0")


def rounding(name: Any, seed: Any) -> None:
    """Raise unless `name` is a rounding and `seed` fits 32 bits."""
    if name not in ("nearest", "stochastic"):
        raise ValueError(f"rounding is {name!r}, expected 'nearest' or 'stochastic'")
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(
            f"seed is {seed!r}, expected an integer from 0 to 2**32 - 1; "
            "take a longer one modulo 2**32"
        )


def features(keys: Any, grads: Any, d_in: int, d_out: int, device: torch.device) -> None:
    """Raise unless keys [n, d_in] and grads [n, d_out] are finite and fit the statistics."""
    matrix("keys", keys, columns=d_in)
    matrix("grads", grads, columns=d_out)
    same_rows(keys=keys, grads=grads)
    same_device(keys=keys, grads=grads)
    if keys.device != device:
        raise ValueError(
            f"keys are on {keys.device} but the statistics are on {device}; "
            "create them with Statistics.empty(d_in, d_out, device=keys.device)"
        )
    finite(keys=keys, grads=grads)


def update(weight: Any, coeff: Any, keys: Any) -> None:
    """Raise unless weight [d_out, d_in] can take coeff [n, d_out]ᵀ keys [n, d_in], both finite."""
    matrix("weight", weight)
    if weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        raise ValueError(
            "weight requires grad and autograd is on, expected a tensor that can change in place; "
            "call under torch.no_grad() or pass weight.data"
        )
    matrix("coeff", coeff, columns=weight.shape[0])
    matrix("keys", keys, columns=weight.shape[1])
    same_rows(coeff=coeff, keys=keys)
    same_device(weight=weight, coeff=coeff, keys=keys)
    finite(coeff=coeff, keys=keys)


def tensor_names(got: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raise unless both mappings have the same names."""
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    if missing or extra:
        raise ValueError(
            f"{what}: missing {missing or 'none'}, unexpected {extra or 'none'}; "
            f"expected exactly {sorted(expected)}"
        )
