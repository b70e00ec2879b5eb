"""What ctest checks in the code that the library embeds, all architectures, without a GPU.

Usage: python inspect_code.py table|arguments|resources|tensor_cores LIBRARY GENERATED_DIR
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from ctypes import (
    Structure,
    byref,
    c_double,
    c_float,
    c_int32,
    c_int64,
    c_size_t,
    c_void_p,
    sizeof,
    string_at,
)
from pathlib import Path
from typing import Any

import triton

from ultraedit_kernels.ops import aot
from ultraedit_kernels.ops.kernels import library

TENSOR_CORES = re.compile(r"\b(HMMA|IMMA|DMMA|HGMMA|IGMMA|UTC\w*MMA|QMMA|OMMA)\b")
"""Instructions of NVIDIA's tensor cores, sm_80 to sm_120."""
MATRIX_CORES = re.compile(r"\bv_mfma_\w+")
FLOAT64_TENSOR_CORES = (b"sm_80", b"sm_90", b"sm_100", b"gfx942")
"""Architectures that have them for float64 too."""

SHARED_MEMORY = {
    "sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64,
}  # fmt: skip
"""KiB that one program may have."""

C_TYPES = {"i32": c_int32, "i64": c_int64, "fp32": c_float, "fp64": c_double}


def tool(name: str, code: bytes, *options: str) -> str:
    """What cuobjdump or nvdisasm, from Triton's wheel, says about a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        path = getattr(triton.knobs.nvidia, name).path
        return subprocess.run(
            [path, *options, file.name], check=True, capture_output=True, text=True
        ).stdout


def check_table(rows: list[Any], generated: Path) -> Iterator[str]:
    """Every variant of aot.py is there for every architecture, with its symbol."""
    got = {(r.arch, r.name, r.signature, r.constants) for r in rows}
    archs = dict.fromkeys(r.arch.decode() for r in rows)
    for arch in archs:
        for v in aot.variants(arch):
            words = (arch, v.name, " ".join(v.signature), library.constants(dict(v.meta)))
            if tuple(word.encode() for word in words) not in got:
                yield f"{' '.join(words)} is missing"
    for row in rows:
        if b"\0" + row.name + b"\0" not in code(row):
            yield f"{describe(row)}: no such symbol in its code"
    print(f"{len(rows)} kernels for {', '.join(archs)}")


def check_arguments(rows: list[Any], generated: Path) -> Iterator[str]:
    """The code reads every argument where a C struct of the signature has it."""
    listings = amd_listings(generated)
    for row in rows:
        kinds = [word.partition(":")[0] for word in row.signature.decode().split() if word != "1"]
        fields = [(f"_{i}", C_TYPES.get(kind, c_void_p)) for i, kind in enumerate(kinds)]
        struct = type("Arguments", (Structure,), {"_fields_": fields})
        expected = [getattr(struct, name).offset for name, _ in fields]
        if row.arch.startswith(b"sm_"):
            listed = re.findall(
                r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)", tool("cuobjdump", code(row), "-elf")
            )
            offsets = [offset for _, offset in sorted((int(a, 16), int(b, 16)) for a, b in listed)]
        else:
            offsets = [int(x) for x in re.findall(r"\.offset: +(\d+)", listings[code(row)])]
        if offsets[: len(expected)] != expected or sizeof(struct) != row.args_size:
            yield f"{describe(row)}: arguments at {offsets}, expected {expected}"
        # What follows is Triton's scratch pointers.
        if 8 * (len(offsets) - len(expected)) != row.params_size - row.args_size:
            yield f"{describe(row)}: {row.params_size} bytes of parameters, arguments at {offsets}"


def check_resources(rows: list[Any], generated: Path) -> Iterator[str]:
    """No kernel keeps registers in memory, and shared memory suffices."""
    most = 0
    for row in rows:
        if row.shared > SHARED_MEMORY[row.arch.decode()] * 1024:
            yield f"{describe(row)}: {row.shared} bytes of shared memory"
        if row.arch.startswith(b"sm_"):
            usage = tool("cuobjdump", code(row), "--dump-resource-usage")
            registers, stack, local = map(
                int, re.findall(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage)[0]
            )
            most = max(most, registers)
            if stack or local:
                yield f"{describe(row)}: {stack} bytes of stack, {local} of local memory"
        else:
            # The byte after the name is the number, if below 128 (MessagePack). Scalar registers
            # spill into lanes of vector registers, vector registers into memory.
            place = code(row).index(b".vgpr_spill_count") + len(b".vgpr_spill_count")
            if spilled := code(row)[place]:
                yield f"{describe(row)}: {spilled} vector registers spilled"
    print(f"at most {most} registers a thread on NVIDIA GPUs")


def check_tensor_cores(rows: list[Any], generated: Path) -> Iterator[str]:
    """Kernels that multiply matrices do so on tensor cores (AMD: matrix cores)."""
    sources = {v.name: v.kernel.src for v in aot.variants(rows[0].arch.decode())}
    listings = amd_listings(generated)

    def fault(row: Any) -> str | None:
        source = sources[row.name.decode()]
        if "tl.dot(" not in source:
            return None
        if re.search(r"tl\.dot\(.*float64", source) and row.arch not in FLOAT64_TENSOR_CORES:
            return None
        if row.arch.startswith(b"sm_"):
            found = TENSOR_CORES.search(tool("nvdisasm", code(row), "-c"))
        else:
            found = MATRIX_CORES.search(listings[code(row)])
        return None if found else f"{describe(row)}: no tensor-core instruction"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from filter(None, pool.map(fault, rows))


def amd_listings(generated: Path) -> dict[bytes, str]:
    """AMD code → its assembly, since Triton brings no disassembler for it."""
    paths = generated.glob("code/gfx*/*.hsaco")
    return {p.read_bytes(): p.with_suffix(".amdgcn").read_text() for p in paths}


def code(row: Any) -> bytes:
    return string_at(row.code, row.code_size)


def describe(row: Any) -> str:
    return b" ".join((row.arch, row.name, row.signature, row.constants)).decode()


def main(check: str, path: str, generated: str) -> int:
    library.PATH = Path(path)
    opened: Any = library.load()
    if isinstance(opened, str):
        sys.exit(opened)
    count = c_size_t()
    table = opened.ultraedit_kernels(byref(count))
    faults = list(globals()[f"check_{check}"](table[: count.value], Path(generated)))
    print("\n".join(faults))
    return len(faults) > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
