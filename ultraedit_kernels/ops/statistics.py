"""Running statistics of the features z = [keys ; grads] over a model's edited life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 2.0**-23
"""Added to the standard deviation before dividing (machine epsilon of float32)."""


@dataclass(frozen=True)
class Statistics:
    """Count, mean and M2 (sum of squared deviations) of every feature, in float64.

    The first `d_in` features are the keys, the other `d_out` the gradients; they are never
    concatenated per row. UltraEdit (arXiv 2505.14679) §3, lifelong normalisation; merged with the
    pairwise formula of Chan, Golub and LeVeque (1979), so batches of one row are exact.
    """

    count: Tensor
    """Rows seen, 0-dim float64 on the CPU: reading it never waits for a GPU."""
    mean: Tensor
    """[d_in + d_out] float64."""
    m2: Tensor
    """[d_in + d_out] float64."""
    d_in: int

    @classmethod
    def empty(cls, d_in: int, d_out: int, device: torch.device | str | None = None) -> Statistics:
        """Statistics of no rows for a module with weight [d_out, d_in]."""
        if d_in < 1 or d_out < 1:
            raise ValueError(f"got d_in={d_in}, d_out={d_out}, expected both at least 1")
        zeros = torch.zeros(d_in + d_out, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.float64), zeros, zeros.clone(), d_in)

    def to(self, device: torch.device | str) -> Statistics:
        """These statistics on a device; the count stays on the CPU."""
        return Statistics(self.count, self.mean.to(device), self.m2.to(device), self.d_in)

    @property
    def d_out(self) -> int:
        """Width of the gradients."""
        return self.mean.numel() - self.d_in

    @property
    def std(self) -> Tensor:
        """sqrt(M2 / max(count - 1, 1)), [d_in + d_out] float64."""
        return (self.m2 / max(float(self.count) - 1, 1)).sqrt()

    def merge(self, count: int, mean: Tensor, m2: Tensor) -> Statistics:
        """These statistics joined with those of another `count` rows ([d_in + d_out] each)."""
        if count == 0:
            return self
        total = self.count + count
        shift = mean.double() - self.mean
        return Statistics(
            total,
            self.mean + shift * (count / total),
            self.m2 + m2.double() + shift.square() * (self.count * count / total),
            self.d_in,
        )


def to_tensors(statistics: Mapping[str, Statistics]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Tensors `statistics.{name}.{count|mean|m2}` for a file, and d_in by name."""
    tensors = {
        f"statistics.{name}.{part}": getattr(stats, part).cpu()
        for name, stats in statistics.items()
        for part in ("count", "mean", "m2")
    }
    return tensors, {name: stats.d_in for name, stats in statistics.items()}


def from_tensors(tensors: Mapping[str, Tensor], d_in: Mapping[str, int]) -> dict[str, Statistics]:
    """The inverse of `to_tensors`. Raises KeyError for a missing tensor."""
    return {
        name: Statistics(
            tensors[f"statistics.{name}.count"],
            tensors[f"statistics.{name}.mean"],
            tensors[f"statistics.{name}.m2"],
            width,
        )
        for name, width in d_in.items()
    }
