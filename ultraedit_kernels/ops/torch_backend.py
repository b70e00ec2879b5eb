"""The four operations from PyTorch operations with bounded extra memory; the backend without a GPU.

No full-size copy of W or of the features is made, [keys ; grads] is never concatenated, and the
ridge system is the smaller of n × n and d_in × d_in. Pieces are sized so that what is computed
from them stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ultraedit_kernels.ops.statistics import EPS, Statistics

COLUMNS = 2048
"""Columns of the features that are widened at a time."""
ROWS = 32
"""Rows of the features that are normalised at a time."""
GRAM_ROWS = 100
"""Rows of HHᵀ that are computed at a time; smaller steps save little more of its upper half."""
UPDATE_ROWS = 256
"""Rows of a half-precision W that are widened to float32 at a time."""
CANCELLATION = 1e3
"""Largest ratio of the squared terms of YᵀH to ‖YᵀH‖² that float32 coefficients may have: the
terms' rounding, 2⁻²⁵ of each, and that of adding them then come to less than 10⁻⁵ of the sum."""


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def update_statistics(stats: Statistics, keys: Tensor, grads: Tensor) -> Statistics:
    """See `ultraedit_kernels.ops.operations.update_statistics`."""
    if len(keys) == 0:
        return stats
    parts = [_moments(part) for x in (keys, grads) for part in x.split(COLUMNS, dim=1)]
    mean, m2 = (torch.cat(moments) for moments in zip(*parts, strict=True))
    return stats.merge(len(keys), mean, m2)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 of the columns of x [n, d], float64.

    Two passes over deviations from the first row, so that a constant column has M2 zero. Sums are
    products with a row of ones, which run at the speed of memory where column sums do not.
    """
    x = x.to(_compute_dtype(x))
    ones = x.new_ones(1, len(x))
    deviation = x - x[0]
    shift = (ones @ deviation).squeeze(0) / len(x)
    m2 = ones @ deviation.sub_(shift).square_()
    return x[0].double() + shift.double(), m2.squeeze(0).double()


def edit_values(keys: Tensor, grads: Tensor, stats: Statistics, lr: float) -> Tensor:
    """See `ultraedit_kernels.ops.operations.edit_values`."""
    dtype, d_in = _compute_dtype(keys), stats.d_in
    mean, scale = stats.mean.to(dtype), (1 / (stats.std + EPS)).to(dtype)
    weights = scale[:d_in].square()
    values = torch.empty(grads.shape, dtype=dtype, device=grads.device)
    for h, g, v in zip(keys.split(ROWS), grads.split(ROWS), values.split(ROWS), strict=True):
        step = -lr * ((h.to(dtype) - mean[:d_in]).square_() @ weights)
        torch.sub(g.to(dtype), mean[d_in:], out=v).mul_(scale[d_in:]).mul_(step[:, None])
    return values


def solve(keys: Tensor, values: Tensor, ridge: float, anchors: Tensor | None) -> Tensor:
    """See `ultraedit_kernels.ops.operations.solve`."""
    rows = keys if anchors is None else torch.cat([keys, anchors])
    if len(rows) <= rows.shape[1]:
        return solve_gram(gram_matrix(rows), values, ridge)
    # Primal: X = ΔWᵀ = HᵀY from the smaller system, then Y from (HHᵀ + λI) Y = V.
    h, right = rows.double(), _padded(values, len(rows))
    x = torch.cholesky_solve(h.T @ right, cholesky(h.T @ h, ridge))
    coeff = (right - h @ x) / ridge
    if values.dtype == torch.float64:
        return coeff.contiguous()
    norms = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    if _cancel(norms, coeff, x.square().sum()):
        coeff = _of_smallest_terms(h, norms, x)
    return coeff.float().contiguous()


def _of_smallest_terms(h: Tensor, norms: Tensor, x: Tensor) -> Tensor:
    """The Y with HᵀY = X [d, d_out] whose terms in it are smallest: Ĥ (ĤᵀĤ)⁻¹ X by row norms."""
    norms = norms.clamp_min(torch.finfo(h.dtype).tiny)
    unit = h / norms
    gram = unit.T @ unit
    # Rounding has left X and ĤᵀĤ, if singular, on either side of zero.
    noise = sum(h.shape) * torch.finfo(h.dtype).eps * float(gram.diagonal().sum())
    factor = cholesky(gram, noise)
    y = torch.cholesky_solve(x, factor)
    y += torch.cholesky_solve(x - gram @ y, factor)  # what the noise term took
    return unit @ y / norms


def gram_matrix(rows: Tensor) -> Tensor:
    """The lower half of HHᵀ [n, n] in float64, for rows H [n, d] of any floating-point dtype."""
    n = len(rows)
    gram = torch.zeros((n, n), dtype=torch.float64, device=rows.device)
    for part in rows.split(COLUMNS, dim=1):
        part = part.double()
        for i in range(0, n, GRAM_ROWS):
            end = i + GRAM_ROWS
            gram[i:end, :end].addmm_(part[i:end], part[:end].T)
    return gram


def solve_gram(gram: Tensor, values: Tensor, ridge: float, factor: Tensor | None = None) -> Tensor:
    """Coefficients Y = (gram + λI)⁻¹ V for a gram matrix HHᵀ.

    Keys that are nearly dependent under values that conflict have large coefficients that cancel in
    YᵀH. In float64 that does no harm. Float32 coefficients lose what H annihilates where it would
    cost ΔW = YᵀH its digits; V - λY is then no longer what the outputs move by.

    Args:
        gram: [m, m] float64, of which the lower half is read.
        values: [n, d_out], n ≤ m: those of the first rows; the others' are zero.
        ridge: λ above 0.
        factor: `cholesky(gram, ridge)`, if it is known.

    Returns:
        [m, d_out], contiguous; float64 if values are, else float32.
    """
    right = _padded(values, len(gram))
    coeff = torch.cholesky_solve(right, cholesky(gram, ridge) if factor is None else factor)
    if values.dtype == torch.float64:
        return coeff.contiguous()
    norms = gram.diagonal().clamp_min(0).sqrt()[:, None]
    rounded = coeff.to(torch.float32, memory_format=torch.contiguous_format)
    # HHᵀY = V - λY, so ‖YᵀH‖² = tr(Yᵀ(V - λY)).
    change = torch.sum(rounded[: len(values)] * values) - ridge * rounded.square().sum()
    if _cancel(norms, rounded, change):
        rounded = _without_null_space(gram, norms, coeff).float()
    return rounded


def _padded(values: Tensor, rows: int) -> Tensor:
    right = torch.zeros((rows, values.shape[1]), dtype=torch.float64, device=values.device)
    right[: len(values)] = values
    return right


def cholesky(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of matrix + λI; of the matrix, left as it is, the lower half is read."""
    diagonal = matrix.diagonal().clone()
    matrix.diagonal().add_(ridge)
    factor: Tensor = torch.linalg.cholesky(matrix)
    matrix.diagonal().copy_(diagonal)
    return factor


def _cancel(norms: Tensor, coeff: Tensor, change: Tensor) -> bool:
    """Whether the terms of YᵀH are large beside change = ‖YᵀH‖²; `norms` [n, 1] are H's rows'.

    Waits for a GPU, as the Cholesky factorisation has done just before, to check its success.
    """
    terms = torch.linalg.vector_norm(coeff, dim=1, keepdim=True) * norms
    return bool(terms.square().sum() > CANCELLATION * change)


def _without_null_space(gram: Tensor, norms: Tensor, coeff: Tensor) -> Tensor:
    """The coefficients without what H annihilates, found with its rows scaled to norm 1.

    Scaled, since that finds small keys beside large ones too.
    """
    norms = norms.clamp_min(torch.finfo(norms.dtype).tiny ** 0.5)
    eigenvalues: Tensor
    vectors: Tensor
    eigenvalues, vectors = torch.linalg.eigh(gram / norms / norms.T)
    noise = len(gram) * torch.finfo(gram.dtype).eps * eigenvalues[-1]
    basis = vectors[:, eigenvalues > noise]
    return basis @ (basis.T @ (coeff * norms)) / norms


def rank_k_update_(
    weight: Tensor, coeff: Tensor, keys: Tensor, *, rounding: str = "nearest", seed: int = 0
) -> Tensor:
    """See `ultraedit_kernels.ops.operations.rank_k_update_`."""
    dtype = _compute_dtype(weight)
    coeff, keys = coeff.to(dtype), keys.to(dtype)
    if weight.dtype == dtype:
        return weight.addmm_(coeff.T, keys)
    for start in range(0, len(weight), UPDATE_ROWS):
        rows = weight[start : start + UPDATE_ROWS]
        total = rows.to(dtype).addmm_(coeff[:, start : start + UPDATE_ROWS].T, keys)
        if rounding == "stochastic":
            noise = random_bits(seed, start, len(rows), keys.shape[1], weight.device)
            total = round_stochastically(total, noise, rows.dtype)
        rows.copy_(total)
    return weight


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every bit of x moves every bit of the result.

    In place on int32, whose products wrap as those of uint32. Two rounds of multiply and xor-shift,
    with the constants of the `lowbias32` search (Wellons 2018).
    """
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x.bitwise_xor_((x >> shift).bitwise_and_(0xFFFFFFFF >> shift)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def mix_seed(seed: int) -> int:
    """`mix` of a seed in [0, 2³²), as a signed 32-bit integer."""
    return int(mix(torch.tensor([seed]).to(torch.int32)))


def random_bits(
    seed: int, first_row: int, rows: int, columns: int, device: torch.device | str | None = None
) -> Tensor:
    """Uniform 32-bit integers [rows, columns], a function of (seed, row, column) alone:

    mix(mix(row ^ mix(seed)) ^ column). Counter-based, so that the result of a rounding does not
    depend on who computes which tile.
    """
    row = torch.arange(first_row, first_row + rows, dtype=torch.int32, device=device)
    column = torch.arange(columns, dtype=torch.int32, device=device)
    return mix(mix(row ^ mix_seed(seed))[:, None] ^ column)


def round_stochastically(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 x → bfloat16 or float16, to either neighbour, so that the mean of many is x.

    The bits that the dtype does not hold, plus `noise` (int32) uniform below one unit in the last
    place, are cut off: numbers that the dtype holds stay, and the others go up with a probability
    equal to the share of the step that they have gone. NaN, Inf and what is beyond the largest
    finite number are rounded to nearest.
    """
    cut = 0xFFFF if dtype == torch.bfloat16 else 0x1FFF
    lifted = x
    if dtype == torch.float16:
        # Below 2⁻¹⁴ float16 has steps of 2⁻²⁴, as the numbers from there to 2⁻¹³ have.
        lift = torch.where(x < 0, -(2.0**-14), 2.0**-14).where(x.abs() < 2.0**-14, 0.0)
        lifted = x + lift
    bits = noise.bitwise_and(cut).add_(lifted.view(torch.int32)).bitwise_and_(~cut)
    rounded = bits.view(torch.float32)
    if dtype == torch.float16:
        rounded = rounded - lift
    return torch.where(x.abs() <= torch.finfo(dtype).max, rounded, x).to(dtype)
