"""The adapter benchmark's export and rows; its servers are started by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import adapter
from ultraedit_kernels import EditDelta
from ultraedit_kernels.store.delta import LowRank


def delta(rows: dict[str, int]) -> EditDelta:
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: LowRank(
            torch.randn(n, 128, generator=generator), torch.randn(n, 384, generator=generator)
        )
        for name, n in rows.items()
    }
    return EditDelta(factors, dict.fromkeys(rows, "0" * 64))


def test_the_adapter_is_of_the_changes_own_ranks_and_its_size_is_the_files(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    made = adapter.exported(delta(dict(zip(names, (3, 20), strict=True))), tmp_path / "a", "m")
    assert (made.rank, made.served_rank, made.modules) == (20, 32, names)
    numbers = 23 * (128 + 384)
    assert 4 * numbers < made.bytes < 4 * numbers + 2000


def test_ratios_are_to_the_edit_in_place_of_the_same_round() -> None:
    rounds = [
        {"untouched": 100.0, "edited in place": 100.0, "LoRA adapter": 50.0},
        {"untouched": 20.0, "edited in place": 10.0, "LoRA adapter": 5.0},
    ]
    sizes: dict[str, Any] = {"rank": 20, "adapter_bytes": 7}
    found = adapter.rows([one | sizes for one in rounds], {"model": "m"})
    ratios = {row["configuration"]: row["ratio"] for row in found}
    assert ratios == {"untouched": 1.5, "edited in place": 1.0, "LoRA adapter": 0.5}
    assert all((row["rank"], row["adapter_bytes"], row["model"]) == (20, 7, "m") for row in found)
