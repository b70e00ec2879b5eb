"""What a stream of edits goes on with when its model was saved: a safetensors file beside it.

Layout: the running statistics as `statistics.{name}.{count|mean|m2}`, and as `edits.tokens` and
`edits.prompt` what the edits taught that still held, see `encoding.to_tensors`. Metadata:
`statistics_d_in` = JSON object name → d_in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path

import safetensors
import safetensors.torch

from ultraedit_kernels.model import encoding
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.ops import statistics
from ultraedit_kernels.ops.statistics import Statistics

STREAM = "ultraedit/stream.safetensors"
"""Where a checkpoint keeps it. In a folder, since vLLM takes every safetensors file beside the
weights for weights."""


def save_stream(running: Mapping[str, Statistics], edits: Seq[Sequence], path: str | Path) -> None:
    """Write named statistics, and edits as tokens."""
    tensors, d_in = statistics.to_tensors(running)
    tensors |= {f"edits.{name}": rows for name, rows in encoding.to_tensors(edits).items()}
    safetensors.torch.save_file(tensors, path, metadata={"statistics_d_in": json.dumps(d_in)})


def load_stream(path: str | Path) -> tuple[dict[str, Statistics], list[Sequence]]:
    """Read what `save_stream` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not such a file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            d_in = json.loads((file.metadata() or {})["statistics_d_in"])
        edits = {name: tensors[f"edits.{name}"] for name in ("tokens", "prompt")}
        return statistics.from_tensors(tensors, d_in), encoding.from_tensors(edits)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold a stream of edits ({error}), expected a file written by "
            "Editor.save_stream; it may be truncated"
        ) from error
