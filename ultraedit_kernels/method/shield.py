"""Shields: what anchors take from every key and every value, as a low-rank projection.

An anchor is a row of H with value zero in the ridge system. All that the others see of anchors
A [m, d] is Aᵀ(AAᵀ + λI)⁻¹A = BᵀB. The shield B has at most as many rows as is wanted, however many
anchors there are, and stays when the anchors are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.ops import operations
from ultraedit_kernels.ops.torch_backend import cholesky, solve_gram

WIDENED = 128
"""Rows of a shield in float32 that are widened at a time: they stay in the cache."""
STRONG = 128
"""Rows of a shield in float32 that are kept so."""
JITTER = 1e-4
"""Share of a key's square norm by which two that are alike are told apart."""


def sketch(rows: Tensor, limit: int) -> Tensor:
    """At most `limit` rows B with BᵀB ≈ AᵀA, all that a ridge system sees of anchors A [m, d].

    The best approximation of that rank; exact if `limit` is at least the rank of A.
    """
    limit = min(limit, rows.shape[1])
    if len(rows) <= limit:
        return rows
    wide = rows.double()
    if limit == rows.shape[1]:  # nothing to drop
        r: Tensor = torch.linalg.qr(wide, mode="r").R
        return r.to(rows.dtype).contiguous()
    if len(rows) > rows.shape[1]:
        squares, directions = torch.linalg.eigh(wide.T @ wide)
        best: Tensor = squares.clamp_min(0).sqrt()[:, None] * directions.T
    else:
        squares, directions = torch.linalg.eigh(wide @ wide.T)
        best = directions.T @ wide
    return best[-limit:].to(rows.dtype)


def extend_shield(shield: Tensor, anchors: Tensor, ridge: float, limit: int) -> Tensor:
    """Add anchors A [k, d] to a shield B [m, d], in its dtype; an empty B is no anchors.

    Rows are added by one step of a block Cholesky. Once they are more than `limit` by a quarter,
    the weakest directions are dropped: not with every turn, it costs m³.
    """
    a = anchors.double()
    free = a.clone()
    for part in shield.split(WIDENED):
        wide = part.double()
        free -= (a @ wide.T) @ wide
    gram = a @ free.T
    gram.diagonal().add_(ridge)
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), free, upper=False)
    extended = torch.cat([shield, rows.to(shield.dtype)])
    return extended if len(extended) <= limit + limit // 4 else sketch(extended, limit)


def shielded(rows: Tensor, shield: Tensor) -> Tensor:
    """Rows X [n, d] without what the anchors take: X(I - BᵀB), in the dtype of X."""
    b = shield.to(rows.dtype)
    return rows - (rows @ b.T) @ b


class Shields(MutableMapping[str, Tensor]):
    """Module → shield [m, d], the strongest rows last, as `sketch` and `moment_shield` have them.

    Of one in float32, the weaker rows are kept in half precision, and widened each time that it is
    asked for. The `STRONG` last ones are not: what they leave of a common key is a millionth of it
    or less, and rounding would leave more. A shield that has grown keeps its newest rows, too.

    Args:
        shields: those to begin with.
    """

    def __init__(self, shields: Mapping[str, Tensor] | None = None) -> None:
        self.weak: dict[str, Tensor] = {}
        """Module → rows [w, d] float16, none of a shield in float64."""
        self.strong: dict[str, Tensor] = {}
        """Module → the other rows [m - w, d], float32 or float64."""
        if isinstance(shields, Shields):
            self.weak, self.strong = dict(shields.weak), dict(shields.strong)
        else:
            self.update(shields or {})

    @classmethod
    def of(cls, strong: Mapping[str, Tensor], weak: Mapping[str, Tensor]) -> Shields:
        """Those of such rows; a module may have no weak ones."""
        made = cls()
        made.strong = dict(strong)
        made.weak = {n: weak.get(n, rows[:0].half()) for n, rows in strong.items()}
        return made

    def to(self, weights: Mapping[str, Any]) -> Shields:
        """The same on the devices of the weights."""
        devices = {name: weights[name].device for name in self}
        return Shields.of(
            {n: rows.to(devices[n]) for n, rows in self.strong.items()},
            {n: rows.to(devices[n]) for n, rows in self.weak.items()},
        )

    def __getitem__(self, name: str) -> Tensor:
        weak, strong = self.weak[name], self.strong[name]
        if not len(weak):
            return strong
        rows = strong.new_empty(len(weak) + len(strong), strong.shape[1])
        rows[: len(weak)], rows[len(weak) :] = weak, strong
        return rows

    def __setitem__(self, name: str, rows: Tensor) -> None:
        before = (len(self.weak[name]), len(self.strong[name])) if name in self.strong else (0, 0)
        weak = max(0, len(rows) - STRONG) if rows.dtype == torch.float32 else 0
        if before[0] and len(rows) >= sum(before):
            weak = before[0]
        self.weak[name], self.strong[name] = rows[:weak].half(), rows[weak:].clone()

    def __delitem__(self, name: str) -> None:
        del self.weak[name], self.strong[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.strong)

    def __len__(self) -> int:
        return len(self.strong)


class System:
    """The ridge system of keys H [n, d_in] beside a shield B, to be solved for several values.

    As `operations.solve` with anchors, but n × n: the anchors' values are zero, so their
    coefficients follow from the others. Without them, Y = (H̃Hᵀ + λI)⁻¹V and ΔW = YᵀH̃ with the
    shielded keys H̃ = H(I - BᵀB).
    """

    keys: Tensor
    """H̃ [n, d_in]; without a shield, the keys themselves."""

    def __init__(self, keys: Tensor, ridge: float, shield: Tensor) -> None:
        self._ridge, self._shielded = ridge, len(shield) > 0
        if not self._shielded:
            self.keys = keys
            return
        rest = shielded(keys.to(shield.dtype), shield)
        self._gram = rest.double() @ keys.double().T
        self._factor = cholesky(self._gram, ridge)
        self.keys = rest.to(torch.promote_types(keys.dtype, torch.float32))

    def tied_rarity(self, owner: Tensor) -> Tensor:
        """[n] float64: the same for keys whose outputs all move alike, those of equal `owner` [n]:
        1 / (1ᵀ(H̃Hᵀ)⁻¹1) over their rows. To move such outputs by v takes vvᵀ over it, and no more
        than the rarest key leaves, however much the others do."""
        gram = self._gram if self._shielded else self.keys.double() @ self.keys.double().T
        least = gram.diagonal().clamp_min(torch.finfo(torch.float32).tiny)
        block = (gram + gram.T) / 2 * (owner[:, None] == owner)
        block.diagonal().add_(JITTER * least)
        share = torch.linalg.solve(block, gram.new_ones(len(owner)))
        count = int(owner.max()) + 1
        cost = gram.new_zeros(count).index_add_(0, owner, share)
        most = gram.new_zeros(count).scatter_reduce_(0, owner, 1 / least, "amax")
        return (1 / torch.maximum(cost, most))[owner]

    def solve(self, values: Tensor) -> Tensor:
        """Y [n, d_out] for values [n, d_out]; float64 if they are, else float32."""
        if not self._shielded:
            return operations.solve(self.keys, values, self._ridge)
        return solve_gram(self._gram, values, self._ridge, self._factor)
