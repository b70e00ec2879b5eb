"""A delta as a LoRA adapter: in peft's format, which vLLM serves too, and in GGUF, for llama.cpp.

Both hold, for each module, A [r, d_in] and B [d_out, r] with ΔW = B A, in float32. r is the rank
of the module's own change, or the wanted one if that is less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.store.delta import EditDelta, LowRank
from ultraedit_kernels.store.files import whole_file, whole_folder

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "phi3": "phi3"}
"""Types of models that GGUF knows by another name."""
PERMUTED = ("q_proj", "k_proj")
"""Modules whose rows llama.cpp has in another order, in some architectures."""


@dataclass(frozen=True)
class Factors:
    """ΔW = up down of one module: up [d_out, r], down [r, d_in], float32."""

    up: Tensor
    down: Tensor
    norm: float
    """‖ΔW‖, Frobenius."""
    lost: float
    """‖ΔW - up down‖."""

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @classmethod
    def of(cls, change: LowRank, rank: int | None = None) -> Factors:
        """The best factors of a change, by singular values in float64.

        Args:
            change: ΔW; what of it is below the rounding of float32 is left out.
            rank: most r; None for the change's own.
        """
        left, right = change.coeff.double().T, change.keys.double().T
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
        u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        # tails[r]: what r singular values leave out.
        tails = torch.cat([s.square().flip(0).cumsum(0).flip(0), s.new_zeros(1)]).sqrt()
        whole = float(tails[0])
        own = int((tails > whole * 2**-24).sum())
        kept = own if rank is None else min(rank, own)
        root = s[:kept].sqrt()
        up = (q_left @ u[:, :kept]) * root
        down = root[:, None] * (vh[:kept] @ q_right.T)
        lost = float(tails[kept]) if kept < own else 0.0
        return cls(up.float().contiguous(), down.float().contiguous(), whole, lost)


def factorise(delta: EditDelta, rank: int | None = None) -> dict[str, Factors]:
    """Module → its factors, of those that the delta changes.

    Raises:
        ValueError: it changes none.
    """
    found = {name: Factors.of(factor, rank) for name, factor in delta.factors.items()}
    found = {name: factors for name, factors in found.items() if factors.rank}
    if not found:
        raise ValueError("the delta changes nothing, expected a change; there is nothing to export")
    return found


def error_of(factors: Iterable[Factors]) -> float:
    """What factors leave out of the changes, as a share of these: √(Σ lost² / Σ norm²)."""
    made = list(factors)
    return math.hypot(*(one.lost for one in made)) / math.hypot(*(one.norm for one in made))


def vllm_rank(rank: int) -> int | None:
    """The least `--max-lora-rank` that vLLM serves a rank with; None if it serves none so high."""
    return next((most for most in VLLM_RANKS if most >= rank), None)


def write_lora(
    factors: Mapping[str, Factors], folder: Path, model: str | None, transposed: bool = False
) -> None:
    """Write a peft adapter: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        factors: module → its change.
        folder: a new one.
        model: name of the model that it is for, if known.
        transposed: whether the modules have their weights as [d_in, d_out] (GPT-2's Conv1D).

    Raises:
        ModuleNotFoundError: peft is missing.
        OSError: it cannot be written; nothing is left of it then.
    """
    need("peft", "lora")
    import peft
    from safetensors.torch import save_file

    ranks = {name: made.rank for name, made in factors.items()}
    most = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != most}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
        r=most,
        # The scale is alpha / r: 1, for every module.
        lora_alpha=most,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(factors),
        fan_in_fan_out=transposed,
        inference_mode=True,
    )
    tensors = {}
    for name, made in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = made.down
        tensors[f"base_model.model.{name}.lora_B.weight"] = made.up

    with whole_folder(folder) as there:
        config.save_pretrained(str(there))
        save_file(tensors, there / "adapter_model.safetensors", metadata={"format": "pt"})


def write_gguf(factors: Mapping[str, Factors], file: Path, config: Any) -> None:
    """Write a LoRA adapter as a GGUF file.

    Args:
        factors: module → its change.
        file: where.
        config: of the model, from transformers.

    Raises:
        ModuleNotFoundError: gguf is missing.
        ValueError: GGUF has no name for the architecture, or for a module.
        OSError: it cannot be written; nothing is left of it then.
    """
    need("gguf", "gguf")
    import gguf

    names, architecture = gguf_names(list(factors), config)
    alpha = max(made.rank for made in factors.values())
    with whole_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
        for name, made in factors.items():
            # llama.cpp scales by alpha / r with each module's own r.
            up = (made.up.double() * (made.rank / alpha)).float()
            writer.add_tensor(f"{names[name]}.weight.lora_a", made.down.numpy())
            writer.add_tensor(f"{names[name]}.weight.lora_b", up.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def gguf_names(modules: list[str], config: Any) -> tuple[dict[str, str], str]:
    """Module → its name in GGUF, and the architecture's. Raises ValueError as `write_gguf`."""
    import gguf

    text = config.get_text_config()
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = ARCHITECTURES.get(text.model_type, text.model_type)
    if architecture not in known:
        raise ValueError(
            f"the package gguf knows no architecture {text.model_type!r}; export --to lora instead"
        )
    table = gguf.get_tensor_name_map(known[architecture], text.num_hidden_layers)
    names = {}
    for module in modules:
        found = table.get_name(module)
        if found is None or (architecture == "llama" and module.endswith(PERMUTED)):
            raise ValueError(
                f"{module} of {text.model_type} has no place in GGUF where a change can be added "
                "as it is, expected an MLP's or an output projection; export --to lora instead"
            )
        names[module] = found
    return names, architecture


def need(package: str, extra: str) -> None:
    """Raise ModuleNotFoundError, with what to install, if a package is missing."""
    if find_spec(package) is None:
        raise ModuleNotFoundError(
            f"{package} is not installed; pip install {package}, or 'ultraedit-kernels[{extra}]'",
            name=package,
        )
