"""Compile every kernel ahead of time, without a GPU; run by CMakeLists.txt.

Usage: python -m ultraedit_kernels.ops.aot OUT_DIR [--archs sm_80,gfx942] [--jobs 2]

Writes OUT_DIR/table.h, one row per kernel, specialisation and architecture (see
csrc/ultraedit_kernels.h), and OUT_DIR/code/ with the code that it embeds.

What is compiled is what the launchers launch: they run here on tensors without data, and each of
their launches is recorded with its block sizes. Those on aligned, row-major tensors are
specialised as Triton's JIT would specialise them; those on others assume nothing, so that they
serve any tensor.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ultraedit_kernels._version import __version__
from ultraedit_kernels.ops import kernels
from ultraedit_kernels.ops.kernels import launch, library
from ultraedit_kernels.ops.kernels.gram import gram_matrix
from ultraedit_kernels.ops.statistics import Statistics

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
"""A cubin runs on exactly the architecture that it was compiled for."""

FEATURES = (
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
)
"""dtypes of (keys, gradients), as the side pass captures them, and float64 for reference runs."""

N, D_IN, D_OUT = 300, 14336, 4096
"""Rows and widths of the recorded launches. Widths are multiples of 16, as in every model that the
kernels are tuned for; n is not, since nothing may depend on it."""

SIZES = {"i32": 4, "fp32": 4, "i64": 8, "fp64": 8}
"""Bytes of a kernel's scalar arguments; pointers have 8."""


@dataclass(frozen=True)
class Variant:
    """One kernel, specialised: what `triton.compile` needs beside the architecture."""

    module: str
    name: str
    signature: tuple[str, ...]
    """Per run-time argument: "*bf16", "i32", "fp64", ...; with ":D" if divisible by 16 and "S" if
    within 2 GB, as Triton's JIT abbreviates them; "1" for an integer that is always 1."""
    meta: tuple[tuple[str, Any], ...]
    """Constexprs and compile options."""

    @property
    def kernel(self) -> Any:
        """The Triton function."""
        return getattr(importlib.import_module(self.module), self.name)

    @property
    def generic(self) -> Variant:
        """The same without assumptions: any pointers, sizes and strides of 32 bits."""
        words = ("i32" if word == "1" else word.partition(":")[0] for word in self.signature)
        return Variant(self.module, self.name, tuple(words), self.meta)

    def source(self, backend: Any) -> ASTSource:
        """What `triton.compile` takes."""
        constants, meta = {}, dict(self.meta)
        signature, attributes = {}, {}
        tokens = iter(self.signature)
        for i, parameter in enumerate(self.kernel.params):
            if parameter.is_constexpr:
                kind, constants[(i,)] = "constexpr", meta[parameter.name]
            else:
                kind, _, known = next(tokens).partition(":")
                if kind == "1":
                    kind, constants[(i,)] = "constexpr", 1
                if known:
                    attributes[(i,)] = backend.parse_attr(known)
            signature[parameter.name] = kind
        return ASTSource(self.kernel, signature, constants, attributes)


def target(arch: str) -> GPUTarget:
    """What Triton calls an architecture, "sm_90" or "gfx942"."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    return GPUTarget("hip", arch, 64)


def variants(arch: str) -> list[Variant]:
    """What the library holds for an architecture, each once; the generic ones last."""
    backend = make_backend(target(arch))
    special = [specialise(backend, *call) for call in launches(arch, aligned=True)]
    generic = [specialise(backend, *call).generic for call in launches(arch, aligned=False)]
    return list(dict.fromkeys(special + generic))


def specialise(backend: Any, kernel: Any, args: tuple[Any, ...], meta: dict[str, Any]) -> Variant:
    """The variant that Triton's JIT would compile for this launch."""
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, _ = bind(*args, **meta)
    signature = []
    for (kind, known), parameter in zip(specialization, kernel.params, strict=True):
        if parameter.is_constexpr:
            continue
        if kind == "constexpr":
            signature.append(str(known))
        else:
            signature.append(f"{kind}:{known}" if known else kind)
    return Variant(
        kernel.__module__, kernel.__name__, tuple(signature), tuple(sorted(meta.items()))
    )


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""kernel, args, meta"""


def launches(arch: str, aligned: bool) -> list[Launch]:
    """Every launch of a turn, for tensors that are aligned row by row, or for others."""
    found: list[Launch] = []
    for keys_dtype, grads_dtype in FEATURES:
        keys, grads = _empty(N, D_IN, keys_dtype, aligned), _empty(N, D_OUT, grads_dtype, aligned)
        with recorded(arch, found):
            turn(keys, grads, _empty(D_OUT, D_IN, keys_dtype, aligned))
    return found


@contextmanager
def recorded(arch: str, found: list[Launch]) -> Iterator[None]:
    """Within, launchers add their launches to `found`, as they would launch on `arch`."""
    launch.recorder, launch.recorded_arch = lambda *call: found.append(call), arch
    try:
        yield
    finally:
        launch.recorder, launch.recorded_arch = None, ""


def _empty(rows: int, columns: int, dtype: torch.dtype, aligned: bool) -> Tensor:
    """A tensor without data; unless aligned, its address and stride are odd."""
    if aligned:
        return torch.empty(rows, columns, dtype=dtype, device="meta")
    return torch.empty(rows, columns + 1, dtype=dtype, device="meta")[:, 1:]


def turn(keys: Tensor, grads: Tensor, weight: Tensor) -> None:
    """The operations of a turn, with the dtypes that the editor passes."""
    stats = Statistics.empty(keys.shape[1], grads.shape[1], "meta")
    stats = kernels.update_statistics(stats, keys, grads)
    values = kernels.edit_values(keys, grads, stats, 1e-6)
    gram_matrix(keys)
    # Beside anchors, the keys come in the dtype of the values.
    for rows in (keys, keys.to(values.dtype)):
        for rounding in ("nearest", "stochastic"):
            kernels.rank_k_update_(weight, values, rows, rounding=rounding)


def compile_variant(variant: Variant, arch: str, path: Path) -> dict[str, Any]:
    """Compile, write the code to `path`, and return the row of the table."""
    goal = target(arch)
    backend = make_backend(goal)
    options = {k: v for k, v in variant.meta if k not in variant.kernel.arg_names}
    try:
        compiled = triton.compile(variant.source(backend), target=goal, options=options)
    except Exception as error:  # its causes would not travel between processes
        lines = traceback.format_exception(error)
        raise RuntimeError(f"{variant} does not compile for {arch}:\n{''.join(lines)}") from None
    metadata = compiled.metadata
    expected = [
        8 if token.startswith("*") else SIZES[token.partition(":")[0]]
        for token in variant.signature
        if token != "1"
    ]
    if goal.backend == "cuda":
        code, sizes = compiled.asm["cubin"], ptx_parameters(compiled.asm["ptx"])
    else:
        code, sizes = compiled.asm["hsaco"], amdgcn_parameters(compiled.asm["amdgcn"])
        path.with_suffix(".amdgcn").write_text(compiled.asm["amdgcn"])
    # Triton appends pointers to scratch memory, which these kernels do not use: they stay null.
    scratch = sizes[len(expected) :]
    if sizes[: len(expected)] != expected or set(scratch) - {8}:
        raise RuntimeError(f"{variant.name} takes {sizes} bytes, expected {expected} and pointers")
    for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"):
        if getattr(metadata, name, 0):
            raise RuntimeError(f"{variant.name} needs {name}, which the library does not provide")
    path.write_bytes(code)
    return {
        "name": metadata.name,
        "signature": " ".join(variant.signature),
        "constants": library.constants(dict(variant.meta)),
        "arch": arch,
        "threads": metadata.num_warps * goal.warp_size,
        "shared": metadata.shared,
        "args_size": struct_size(expected),
        "params_size": struct_size(sizes),
        "code": path,
    }


def ptx_parameters(ptx: str) -> list[int]:
    """Bytes of every parameter of the kernel in a PTX module."""
    entry = re.search(r"\.entry\s+\w+\s*\(([^)]*)\)", ptx)
    assert entry, "PTX without a kernel"
    return [int(bits) // 8 for bits in re.findall(r"\.param\s+\.[a-z](\d+)", entry[1])]


def amdgcn_parameters(assembly: str) -> list[int]:
    """Bytes of every parameter of the kernel in AMD assembly with its metadata."""
    listed = re.search(r"^ +\.args:\n(.*?)^    \.\w", assembly, re.M | re.S)
    assert listed, "AMD assembly without a kernel's arguments"
    return [int(size) for size in re.findall(r"\.size: +(\d+)", listed[1])]


def struct_size(sizes: list[int]) -> int:
    """Bytes of a C struct with members of these sizes."""
    end = 0
    for size in sizes:
        end = -(-end // size) * size + size
    return -(-end // 8) * 8


def build(out: Path, archs: list[str], jobs: int) -> None:
    """Compile everything into `out`; see the top of this file."""
    work = []
    for arch in archs:
        (out / "code" / arch).mkdir(parents=True, exist_ok=True)
        suffix = ".cubin" if arch.startswith("sm_") else ".hsaco"
        for i, variant in enumerate(variants(arch)):
            path = out / "code" / arch / f"{variant.name}-{i}{suffix}"
            work.append((variant, arch, path.absolute()))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(compile_variant, *zip(*work, strict=True)))
    (out / "table.h").write_text(table(rows))
    print(f"{len(rows)} kernels for {', '.join(archs)}")


def table(rows: list[dict[str, Any]]) -> str:
    """The C header that csrc/ultraedit_kernels.c includes: the table and the code."""
    embed, lines = [], []
    built_from = _quote(f"{__version__} {library.sources()} {triton.__version__}")
    for i, row in enumerate(rows):
        embed.append(f"EMBED(code_{i}, {_quote(row['code'])});")
        words = [_quote(row[key]) for key in ("name", "signature", "constants", "arch")]
        words += [str(row[key]) for key in ("threads", "shared", "args_size", "params_size")]
        words += [f"code_{i}", str(row["code"].stat().st_size)]
        lines.append(f"    {{{', '.join(words)}}},")
    return "\n".join(
        [
            "#define EMBED(label, file) \\",
            '  __asm__(".pushsection .rodata\\n.balign 64\\n" #label ":\\n" \\',
            '          ".incbin \\"" file "\\"\\n.popsection"); \\',
            '  extern const char label[] __attribute__((visibility("hidden")))',
            *embed,
            f"#define ULTRAEDIT_ROWS {len(rows)}",
            f"#define ULTRAEDIT_BUILD {built_from}",
            "static const ultraedit_kernel ultraedit_table[ULTRAEDIT_ROWS] = {",
            *lines,
            "};",
            "",
        ]
    )


def _quote(text: str | Path) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    """The command of this module; see the top of this file."""
    parser = argparse.ArgumentParser(prog="python -m ultraedit_kernels.ops.aot")
    parser.add_argument("out", type=Path)
    parser.add_argument("--archs", default=",".join(ARCHS), help="separated by commas")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args()
    if launch.INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and Triton cannot compile then; unset it")
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # line tables would double the library
    build(arguments.out, arguments.archs.split(","), arguments.jobs)


if __name__ == "__main__":
    main()
