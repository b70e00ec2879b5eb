"""What the project is measured against: UltraEdit in the numeric form in which it was published.

Written from the formulas of UltraEdit (arXiv 2505.14679) §3, one function per step: float32
throughout, z = [h ; g] materialised, and a linear system of size d_in × d_in. Where the formulas
leave a choice the baseline gets the cheaper and the correct one: λ is added to the diagonal in
place, z is built once per turn, and the merge of the statistics is exact. So a difference in error
between the baseline and `ultraedit_kernels` is rounding alone, not one of the mistakes that a
script may contain.

Of the paper's run from model to weights, `capture` has the full backward pass; the script's hooks,
weight gradients and files on disk between the steps are left out in its favour.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ultraedit_kernels.model.encoding import Sequence

EPS = 2.0**-23
"""Added to the standard deviation before dividing."""


class Moments(NamedTuple):
    """Running statistics of z: rows seen, mean and M2 (squared deviations), [d_in + d_out] each."""

    rows: float
    mean: Tensor
    m2: Tensor

    @property
    def std(self) -> Tensor:
        """sqrt(M2 / max(rows - 1, 1)), [d_in + d_out]."""
        return (self.m2 / max(self.rows - 1, 1)).sqrt()


def features(keys: Tensor, grads: Tensor) -> Tensor:
    """z_i = [h_i ; g_i]: keys [n, d_in] and gradients [n, d_out] as one [n, d_in + d_out]."""
    return torch.cat([keys, grads], dim=1)


def update_moments(moments: Moments, z: Tensor) -> Moments:
    """Merge the rows of z [n, d_in + d_out], n ≥ 1, into the running number, mean and M2.

    mean ← mean + δ·n/N and M2 ← M2 + M2_z + δ²·rows·n/N, with N = rows + n and δ the difference
    of the means (Chan, Golub and LeVeque 1979).
    """
    n, total = len(z), moments.rows + len(z)
    mean = z.mean(0)
    delta = mean - moments.mean
    m2 = moments.m2 + (z - mean).square().sum(0) + delta.square() * (moments.rows * n / total)
    return Moments(total, moments.mean + delta * (n / total), m2)


def normalise(z: Tensor, moments: Moments) -> Tensor:
    """ẑ_i = (z_i - mean) / (std + 2⁻²³), [n, d_in + d_out]."""
    return (z - moments.mean) / (moments.std + EPS)


def edit_values(z_hat: Tensor, d_in: int, lr: float) -> Tensor:
    """v_i = -lr · ‖ĥ_i‖² · ĝ_i from ẑ = [ĥ ; ĝ], [n, d_out]."""
    h_hat, g_hat = z_hat[:, :d_in], z_hat[:, d_in:]
    return -lr * h_hat.square().sum(1, keepdim=True) * g_hat


def solve(keys: Tensor, values: Tensor, ridge: float = 1.0) -> Tensor:
    """X with (HᵀH + λI) X = HᵀV, the primal normal equations; X = ΔWᵀ is [d_in, d_out]."""
    system = keys.T @ keys
    system.diagonal().add_(ridge)
    return torch.linalg.solve(system, keys.T @ values)


def update_(weight: Tensor, x: Tensor) -> Tensor:
    """W ← W + Xᵀ in place, W [d_out, d_in]."""
    return weight.add_(x.T)


def turn_(
    weight: Tensor, keys: Tensor, grads: Tensor, moments: Moments, lr: float, ridge: float = 1.0
) -> Moments:
    """All steps of one turn on one module: W [d_out, d_in] in place; returns the new moments."""
    z = features(keys, grads)
    moments = update_moments(moments, z)
    values = edit_values(normalise(z, moments), keys.shape[1], lr)
    update_(weight, solve(keys, values, ridge))
    return moments


def capture(
    model: Any, sequences: Seq[Sequence], modules: Seq[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys [n, d_in] and gradients [n, d_out] of each module at the answer positions of a batch.

    Whole sequences, padded on the right, through the whole model, and back from the mean cross
    entropy of the answer tokens to the first of the modules.
    """
    ids, mask, answer = pad(sequences, model.get_input_embeddings().weight.device)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def read(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            inputs[name], outputs[name] = args[0].detach(), output
            return output

        return read

    handles = [model.get_submodule(m).register_forward_hook(hook(m)) for m in modules]
    try:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    labels = torch.tensor([t for s in sequences for t in s.target_ids], device=ids.device)
    loss = F.cross_entropy(logits[answer].float(), labels)
    grads = torch.autograd.grad(loss, list(outputs.values()))
    return {
        name: (inputs[name][answer], grad[answer])
        for name, grad in zip(outputs, grads, strict=True)
    }


def pad(sequences: Seq[Sequence], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask of real tokens and mask of answer positions, [batch, length] each."""
    rows = [[*s.prompt_ids, *s.target_ids[:-1]] for s in sequences]
    ends = torch.tensor([len(row) for row in rows])
    first = ends - torch.tensor([len(s.target_ids) for s in sequences])
    width = int(ends.max())
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    columns = torch.arange(width)
    real = columns < ends[:, None]
    answer = real & (columns >= first[:, None])
    return ids.to(device), real.long().to(device), answer.to(device)
