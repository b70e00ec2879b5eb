"""The low-rank change of one turn, as a safetensors file.

Layout: per edited module the tensors `{module}.coeff` [n, d_out] and `{module}.keys` [n, d_in], so
that ΔW = coeffᵀ keys. Metadata (all strings): `format` = "ultraedit-delta", `format_version`,
`library_version`, `base` = JSON object module → SHA-256 of the untouched weight, `settings` = JSON
object of how it was computed, of which `rounding` and `seed` say how it is applied. Loading checks
all of it and never unpickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ultraedit_kernels._version import __version__
from ultraedit_kernels.ops import checks
from ultraedit_kernels.ops.operations import rank_k_update_

FORMAT = "ultraedit-delta"
FORMAT_VERSION = "1"


class DividedWeight(Protocol):
    """A weight [d_out, d_in] that is divided among processes."""

    local: Tensor
    """This process's part."""
    shard: Any
    """Cuts rows: `shard.part(rows, dim)` are the columns of rows [n, d] that belong to the part, d
    being dimension `dim` of the weight."""

    def whole(self) -> Tensor:
        """All of it; to be called by all processes."""


@dataclass(frozen=True)
class LowRank:
    """ΔW = coeffᵀ keys of one module: coeff [n, d_out] float32, keys [n, d_in] as captured."""

    coeff: Tensor
    keys: Tensor
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How `apply` rounds, see `operations.rank_k_update_`; `seed` is of the stochastic one."""
    seed: int = 0

    @classmethod
    def empty(
        cls, weight: Tensor, rounding: Literal["nearest", "stochastic"] = "nearest", seed: int = 0
    ) -> LowRank:
        """The change of rank 0 of a weight [d_out, d_in]."""
        d_out, d_in = weight.shape
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        coeff = weight.new_zeros(0, d_out, dtype=dtype)
        return cls(coeff, weight.new_zeros(0, d_in, dtype=weight.dtype), rounding, seed)

    def append(self, coeff: Tensor, keys: Tensor) -> LowRank:
        """With further rows, coeff [n, d_out] and keys [n, d_in].

        If these are more than a side of ΔW has, one of the factors becomes ΔW itself.
        """
        coeff, keys = torch.cat([self.coeff, coeff]), torch.cat([self.keys, keys])
        (n, d_out), d_in = coeff.shape, keys.shape[1]
        if n > min(d_out, d_in):
            change, one = coeff.T @ keys.to(coeff.dtype), torch.eye(min(d_out, d_in)).to(coeff)
            coeff, keys = (one, change) if d_out <= d_in else (change.T, one)
        return replace(self, coeff=coeff, keys=keys)

    def cpu(self) -> LowRank:
        """The same on the CPU."""
        return replace(self, coeff=self.coeff.cpu(), keys=self.keys.cpu())

    def apply(self, weight: Tensor | DividedWeight) -> None:
        """W ← W + ΔW in place; of a divided weight, this rank's part.

        Raises:
            ValueError: stochastic rounding of a divided weight.
        """
        if not isinstance(weight, Tensor):
            if self.rounding != "nearest":
                raise ValueError(
                    f"the change is to be rounded {self.rounding!r}, but the weight is divided "
                    "among ranks, expected 'nearest'; edit on one rank, or make the delta with it"
                )
            shard = weight.shard
            if weight.local.numel():
                LowRank(shard.part(self.coeff, 0), shard.part(self.keys, 1)).apply(weight.local)
            return
        coeff, keys = self.coeff.to(weight.device), self.keys.to(weight.device)
        rank_k_update_(weight, coeff, keys, rounding=self.rounding, seed=self.seed)


@dataclass(frozen=True)
class EditDelta:
    """The change of one turn to every edited module, and what it may be applied to."""

    factors: dict[str, LowRank]
    base: dict[str, str]
    """Module → `digest` of its untouched weight: the only model this delta fits."""
    settings: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__

    @classmethod
    def join(cls, deltas: Seq[EditDelta]) -> EditDelta:
        """The deltas of consecutive turns as one, which rounds once where they rounded each time.

        Raises:
            ValueError: no deltas, or deltas of different models or modules.
        """
        if not deltas:
            raise ValueError("got no deltas to join, expected at least one")
        first = deltas[0]
        for delta in deltas[1:]:
            if delta.base != first.base:
                raise ValueError(
                    "the deltas edit different models or modules "
                    f"({sorted(first.base)} and {sorted(delta.base)}); join those of one stream"
                )
        factors = {
            name: replace(
                first.factors[name],
                coeff=torch.cat([d.factors[name].coeff for d in deltas]),
                keys=torch.cat([d.factors[name].keys for d in deltas]),
            )
            for name in first.factors
        }
        edits = [edit for delta in deltas for edit in delta.settings.get("edits", ())]
        return cls(factors, first.base, first.settings).teaching(edits)

    def teaching(self, edits: Seq[Mapping[str, Any]]) -> EditDelta:
        """The same, with the edits that it makes in its settings, as "edits": of each "prompt" and
        "target". Without edits, what it says already."""
        if not edits:
            return self
        taught = [{"prompt": edit["prompt"], "target": edit["target"]} for edit in edits]
        return replace(self, settings=self.settings | {"edits": taught})

    def digest(self) -> str:
        """SHA-256 of what it changes, and of which model, hexadecimal: the same however the file
        was written."""
        state = hashlib.sha256(json.dumps(self.base, sort_keys=True).encode())
        for name, factor in sorted(self.factors.items()):
            how = f"{name} {factor.rounding} {factor.seed}"
            state.update(f"{how} {digest(factor.coeff)} {digest(factor.keys)}".encode())
        return state.hexdigest()

    @property
    def dtype(self) -> str:
        """The dtype of the weights that it was made for, such as "bfloat16"."""
        keys = next(iter(self.factors.values())).keys.dtype  # says it where the settings do not
        return str(self.settings.get("dtype", keys)).removeprefix("torch.")

    def check_base(self, base: Mapping[str, str], dtype: torch.dtype) -> None:
        """Raise ValueError unless it may be applied to a model.

        Args:
            base: edited module → `digest` of the model's untouched weight.
            dtype: of these weights.
        """
        here = str(dtype).removeprefix("torch.")
        checks.tensor_names(self.factors, self.base, "modules of the delta")
        for name, made_for in self.base.items():
            if name not in base:
                raise ValueError(
                    f"the delta edits {name}, but this editor edits {', '.join(base)}; "
                    "create it with the delta's modules"
                )
            if made_for != base[name]:
                raise ValueError(
                    f"the delta was made for a {name} with digest {made_for[:12]}…, this model's "
                    f"is {base[name][:12]}…; it belongs to another checkpoint or dtype"
                    + self._remedy(here)
                )

    def _remedy(self, here: str) -> str:
        """What to do with a model whose weights are in another dtype; nothing if they are not."""
        if self.dtype == here:
            return ""
        return (
            f": it was made in {self.dtype} and this model is in {here}; make it with `ultraedit "
            f"edit --dtype {here}`, or load and serve the model with --dtype {self.dtype}"
        )

    @staticmethod
    def tensor_names(modules: Iterable[str]) -> list[str]:
        """The names of a file's tensors, if the delta edits these modules."""
        return [f"{name}.{part}" for name in modules for part in ("coeff", "keys")]

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors by name, on the CPU."""
        return {
            f"{name}.{part}": getattr(factor.cpu(), part).contiguous()
            for name, factor in self.factors.items()
            for part in ("coeff", "keys")
        }

    def metadata(self) -> dict[str, str]:
        """The file's metadata."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "library_version": self.library_version,
            "base": json.dumps(self.base, sort_keys=True),
            "settings": json.dumps(self.settings, sort_keys=True),
        }

    def save(self, path: str | Path) -> None:
        """Write the delta as a safetensors file."""
        safetensors.torch.save_file(self.tensors(), path, metadata=self.metadata())

    def to_bytes(self) -> bytes:
        """The file's bytes."""
        return safetensors.torch.save(self.tensors(), metadata=self.metadata())

    @classmethod
    def load(cls, path: str | Path) -> EditDelta:
        """Read and check a delta file.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a delta, truncated, inconsistent, or of an unknown format version.
        """
        return cls.from_bytes(Path(path).read_bytes(), source=str(path))

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "delta") -> EditDelta:
        """As `load`, from the file's bytes; `source` names them in errors."""
        try:
            tensors = safetensors.torch.load(data)
            size = int.from_bytes(data[:8], "little")
            metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise ValueError(
                f"{source} is not a readable safetensors file ({error}; {len(data)} bytes); "
                "it may be truncated, fetch or save it again"
            ) from error
        return cls.from_tensors(tensors, metadata, source)

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: str
    ) -> EditDelta:
        """Check what a file holds and make the delta of it. Raises ValueError as `load`."""
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{source} has format {metadata.get('format')!r} in its metadata, expected "
                f"{FORMAT!r}; it is a safetensors file but not a delta"
            )
        if metadata.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{source} has format version {metadata.get('format_version')!r}, expected "
                f"{FORMAT_VERSION!r}; use the library version that wrote it "
                f"({metadata.get('library_version')})"
            )
        try:
            base, settings = json.loads(metadata["base"]), json.loads(metadata["settings"])
            if not isinstance(base, dict) or not isinstance(settings, dict):
                raise ValueError("base and settings are not JSON objects")
            how = settings.get("rounding", "nearest"), settings.get("seed", 0)
            checks.rounding(*how)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{source} has damaged metadata: {error}; save it again") from error
        checks.tensor_names(tensors, dict.fromkeys(cls.tensor_names(base)), f"tensors of {source}")
        factors = {n: LowRank(tensors[f"{n}.coeff"], tensors[f"{n}.keys"], *how) for n in base}
        for name, factor in factors.items():
            try:
                checks.matrix("coeff", factor.coeff)
                checks.matrix("keys", factor.keys)
                checks.same_rows(coeff=factor.coeff, keys=factor.keys)
                checks.finite(coeff=factor.coeff, keys=factor.keys)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{source}, module {name}: {error}") from error
        return cls(factors, base, settings, metadata.get("library_version", "unknown"))


def digest(weight: Tensor | DividedWeight) -> str:
    """SHA-256 of a weight's dtype, shape and bytes, hexadecimal; of a divided weight, the whole's,
    to be called on all ranks."""
    whole = weight if isinstance(weight, Tensor) else weight.whole()
    plain = whole.detach().cpu().contiguous()
    state = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    state.update(plain.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest_all(weights: Mapping[str, Tensor | DividedWeight]) -> str:
    """SHA-256 of named weights, whatever their order, hexadecimal."""
    return digest_of({name: digest(weight) for name, weight in sorted(weights.items())})


def digest_of(digests: Mapping[str, str]) -> str:
    """`digest_all` of weights whose own digests are known, by name."""
    text = "".join(f"{name} {own}" for name, own in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()
