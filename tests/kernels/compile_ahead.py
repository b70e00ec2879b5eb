"""Compile every kernel for GPU architectures, without a GPU; print their resources as JSON lines.

Usage: python compile_ahead.py 90:bf16 80:fp32. Run by test_compile.py in a
process of its own: Triton cannot compile where it interprets.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultraedit_kernels.kernels import gram, statistics, update, weighting
from ultraedit_kernels.statistics import EPS


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    config: dict[str, Any],
    sm: int,
) -> dict[str, Any]:
    """Specialised as the JIT does it for aligned, row-major tensors."""
    options = {name: value for name, value in config.items() if name.islower()}
    constants = constants | {name: value for name, value in config.items() if name.isupper()}
    signature: dict[str, str] = {}
    attributes = {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name.startswith("stride_") and name == last_stride(name, kernel.arg_names):
            constants[name] = 1
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = pointers.get(name) or parameter.annotation_type or "i32"
        if name in pointers or (signature[name] == "i32" and not parameter.do_not_specialize):
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(
            kernel,
            signature,
            {(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attributes,
        ),
        target=GPUTarget("cuda", sm, 32),
        options=options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "sm": sm,
        "kernel": kernel.__name__,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
    }


def last_stride(name: str, arg_names: list[str]) -> str:
    """The stride of the last dimension of the tensor that `name` is a stride of."""
    tensor = name.rpartition("_")[0]
    return [other for other in arg_names if other.rpartition("_")[0] == tensor][-1]


def main(sm: int, dtype: str) -> None:
    p, f32, f64 = f"*{dtype}", "*fp32", "*fp64"
    moments = {"mean": f64, "m2": f64}
    merged = {"merged_mean": f64, "merged_m2": f64}
    kernels: list[tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]] = [
        (statistics.merge_statistics_kernel, {"x": p} | moments | merged, {}, statistics.CONFIG),
        (
            weighting.edit_values_kernel,
            {"keys": p, "grads": p, "values": f32} | moments,
            {"EPS": EPS},
            weighting.CONFIG,
        ),
        (gram.gram_kernel, {"h": f32, "gram": f64}, {}, gram.CONFIG),
        (
            update.rank_k_update_kernel,
            {"weight": p, "coeff": f32, "keys": p},
            {"PRECISION": "tf32x3"},
            update.CONFIG,
        ),
    ]
    for kernel, pointers, constants, config in kernels:
        print(json.dumps(compile_kernel(kernel, pointers, constants, config, sm)))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        arch, _, element = argument.partition(":")
        main(int(arch), element)
