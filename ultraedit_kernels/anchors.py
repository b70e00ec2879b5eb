"""Anchors: keys whose outputs must not move. Rows of H with value zero, in the same solve.

They come from prompts that the operator names, with the answers the model gives to them, and from
texts that the model itself writes when it starts from nothing, which need no data at all.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor, nn

from ultraedit_kernels.capture import capture
from ultraedit_kernels.data import Prompt
from ultraedit_kernels.encoding import Sequence, encode_prompt
from ultraedit_kernels.generation import generate
from ultraedit_kernels.torch_backend import solve_gram

ANSWER_TOKENS = 16
"""Tokens of the model's own answer that a locality prompt protects."""
SAMPLE_TOKENS = 32
SAMPLE_BATCH = 50
HELD_WEIGHT = 3.0
"""Weight of the keys of edits that hold. With 1, the later turns of a stream of 200 edits on the
bundled model broke 5 % of the earlier ones, with 3 none."""


def own_answers(model: Any, tokenizer: Any, prompts: Seq[Prompt]) -> list[Sequence]:
    """Each prompt with the answer that the model gives to it now, end of sequence included."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    answers = generate(model, tokenizer, ids, max_new_tokens=ANSWER_TOKENS)
    return [Sequence(p, a) for p, a in zip(ids, answers, strict=True) if a]


def own_texts(model: Any, tokenizer: Any, count: int, seed: int) -> list[Sequence]:
    """`count` texts sampled from the model's own distribution, from the start of a text."""
    first = tokenizer.bos_token_id
    if first is None:  # Qwen has no BOS; its documents are separated by EOS
        first = tokenizer.eos_token_id
    prompts = [[first]] * count
    texts = generate(
        model, tokenizer, prompts, max_new_tokens=SAMPLE_TOKENS, batch_size=SAMPLE_BATCH, seed=seed
    )
    return [Sequence([first], text) for text in texts if text]


def anchor_keys(
    model: nn.Module, sequences: Seq[Sequence], modules: Seq[str], limit: int
) -> dict[str, Tensor]:
    """Keys at the answer positions of the sequences, per module [≤ limit, d_in]."""
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}
    for i in range(0, len(sequences), SAMPLE_BATCH):
        part = capture(model, sequences[i : i + SAMPLE_BATCH], modules, backward=False)
        for name in modules:
            rows[name].append(part.keys[name])
    return {name: sketch(torch.cat(parts), limit) for name, parts in rows.items()}


def sketch(rows: Tensor, limit: int) -> Tensor:
    """At most `limit` rows B with BᵀB ≈ AᵀA, all that the ridge system sees of anchors A [m, d_in].

    The best approximation of that rank; exact if `limit` is at least the rank of A.
    """
    if len(rows) <= limit:
        return rows
    wide = rows.double()
    if len(rows) > rows.shape[1]:
        squares, directions = torch.linalg.eigh(wide.T @ wide)
        best = squares.clamp_min(0).sqrt()[:, None] * directions.T
    else:
        squares, directions = torch.linalg.eigh(wide @ wide.T)
        best = directions.T @ wide
    return best[-limit:].to(rows.dtype)


def extend_shield(shield: Tensor, anchors: Tensor, ridge: float, limit: int) -> Tensor:
    """Add anchors A [k, d_in] to a shield B [m, d_in], float64; an empty B is no anchors.

    With A all anchors so far, BᵀB = Aᵀ(AAᵀ + λI)⁻¹A: what they take from every key. Rows are added
    by one step of a block Cholesky; beyond `limit` the weakest directions are dropped.
    """
    a = anchors.double()
    seen = a @ shield.T
    free = a - seen @ shield
    gram = a @ free.T
    gram.diagonal().add_(ridge)
    rows = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), free, upper=False)
    return sketch(torch.cat([shield, rows]), limit)


def solve_shielded(
    keys: Tensor, values: Tensor, ridge: float, shield: Tensor
) -> tuple[Tensor, Tensor]:
    """As `operations.solve` with anchors, in an n × n system: coeff [n, d_out], keys [n, d_in].

    The anchors' values are zero, so their coefficients follow from the others. Without them,
    Y = (H̃Hᵀ + λI)⁻¹V and ΔW = YᵀH̃ with the shielded keys H̃ = H(I - BᵀB), `extend_shield`'s B.
    """
    h = keys.double()
    taken = h @ shield.T
    coeff = solve_gram((h @ h.T).addmm_(taken, taken.T, alpha=-1), values.double(), ridge)
    return coeff.to(values.dtype), (h - taken @ shield).to(values.dtype)
