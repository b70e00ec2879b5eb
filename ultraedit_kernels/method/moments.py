"""Second moments Σ kkᵀ of rows k [d], of which shields of few rows are made."""

from __future__ import annotations

import torch
from torch import Tensor

WHOLE = 2048
"""Largest d of which all d² numbers are kept, 32 MiB. Of a wider one there is a sketch."""
BLOCK = 384
"""Columns of them that are summed at a time, from the diagonal on: what is above it is alike."""
ROOM = 512
"""Rows that a sketch takes up before it is compressed."""


class Moments:
    """Σ kkᵀ of rows k [d]: whole if d is small, else the directions of most weight, as rows B with
    BᵀB ≈ Σ kkᵀ, and the weight of all others together (incremental principal components).

    Args:
        d: width of the rows.
        limit: rows that a shield may have.
        device: where they are kept.
        mine: if not, another rank keeps them, and this one only their weight.
    """

    def __init__(self, d: int, limit: int, device: torch.device, mine: bool = True) -> None:
        self._d, self._limit, self._mine, self.whole = d, min(limit, d), mine, d <= WHOLE
        kept = (d, d) if self.whole and mine else (0, d)
        dtype = torch.float64 if self.whole else torch.float32
        self._kept = torch.zeros(kept, dtype=dtype, device=device)
        self._rows = 0
        self.trace = 0.0
        """Σ ‖k‖²."""

    def add(self, rows: Tensor) -> None:
        """Take further rows [n, d]; at most `ROOM` of them while `full` tells of no more."""
        rows = rows.float()
        self._rows += len(rows)
        self.trace += float(rows.double().square().sum())
        if not self._mine:
            return
        if self.whole:
            # In float32 what the commonest keys are rounded by is as much as rare ones have.
            wide = rows.double()
            for start in range(0, self._d, BLOCK):
                self._kept[start:, start : start + BLOCK] += (
                    wide[:, start:].T @ wide[:, start : start + BLOCK]
                )
        else:
            self._kept = torch.cat([self._kept, rows.to(self._kept.device)])

    @property
    def full(self) -> bool:
        """Whether it is to be compressed before more rows come; of all ranks alike."""
        return not self.whole and self._rows > self._limit

    def compress(self) -> None:
        """Make room for more rows."""
        if self._mine and not self.whole:
            self._kept = self._strongest()[1]
        self._rows = min(self._rows, self._limit)

    def shield(self, weight: float, ridge: float) -> Tensor:
        """The shield [min(limit, d), d] of anchors of which `weight` Σ kkᵀ is known, see
        `moment_shield`: float64, or float32 of a sketch; zero where another rank keeps them."""
        if not self._mine:
            return torch.zeros(self._limit, self._d, device=self._kept.device)
        if self.whole:
            return moment_shield(self._kept * weight, ridge, self._limit)
        squares, rows = self._strongest()
        rest = max(0.0, self.trace - float(squares.sum())) / max(1, self._d - self._limit)
        floor = ridge + weight * rest
        share = (weight / (weight * squares + floor)).sqrt().to(rows.dtype)
        shield = rows.new_zeros(self._limit, self._d)
        shield[self._limit - len(rows) :] = share[:, None] * rows
        return shield

    def _strongest(self) -> tuple[Tensor, Tensor]:
        """The weights [m] and directions times their roots [m, d] of the strongest, m ≤ limit."""
        squares, mix = torch.linalg.eigh((self._kept @ self._kept.T).double())
        squares, mix = squares[-self._limit :].clamp_min(0.0), mix[:, -self._limit :]
        return squares, mix.T.to(self._kept.dtype) @ self._kept


def moment_shield(moment: Tensor, ridge: float, limit: int) -> Tensor:
    """The shield [≤ limit, d] of anchors of which Σ kkᵀ [d, d] float64 is known, at and below the
    diagonal, see `shield`.

    The weakest directions, which find no place in it, are taken to be alike, and their mean is a
    part of the ridge: else a change would hide in them, where it does most harm.
    """
    squares, directions = torch.linalg.eigh(moment)
    squares = squares.clamp_min(0.0)
    kept, dropped = squares[-limit:], squares[:-limit]
    floor = ridge + (float(dropped.mean()) if len(dropped) else 0.0)
    shield: Tensor = (kept / (kept + floor)).sqrt()[:, None] * directions.T[-limit:]
    return shield
