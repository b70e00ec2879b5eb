"""What the library chooses is what Triton's JIT would compile, and nothing is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ops.aot.conftest import run

CHECK = """
import sys
from pathlib import Path
import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from ultraedit_kernels.ops import aot, kernels
from ultraedit_kernels.ops.kernels import library

arch = sys.argv[2]
library.PATH, library.HIP = Path(sys.argv[1]), arch.startswith("gfx")
backend = make_backend(aot.target(arch))


def empty(rows, columns, dtype):
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def chosen(call):
    kernel, args, meta = call
    signature = library.signature(arch, kernel.__name__, args, meta)
    assert not isinstance(signature, str), signature
    return signature


def launches(layout, shape, dtypes):
    n, d_in, d_out = shape
    found = []
    with aot.recorded(arch, found):
        aot.turn(
            layout(n, d_in, dtypes[0]), layout(n, d_out, dtypes[1]), layout(d_out, d_in, dtypes[0])
        )
    assert len(found) >= 4
    return found
"""


SWEEP = """
aligned = [
    empty,
    lambda n, d, dtype: empty(n + 1, d, dtype)[1:],
    lambda n, d, dtype: empty(n, 3 * d, dtype)[:, d : 2 * d],  # a shard's columns
]
others = [
    lambda n, d, dtype: empty(n, d + 1, dtype)[:, 1:],
    lambda n, d, dtype: empty(d, n, dtype).T,
    lambda n, d, dtype: empty(n, d + 3, dtype)[:, :-3],
    lambda n, d, dtype: empty(2 * n, 2 * d, dtype)[::2, ::2],
]
widths = [(14336, 4096), (5120, 17920), (1792, 512)]
odd = [(1, 1), (48, 33), (4095, 64)]
count = 0
for dtypes in aot.FEATURES:
    for n in (1, 16, 300, 4096):
        for layout in aligned:
            for d_in, d_out in widths:
                for call in launches(layout, (n, d_in, d_out), dtypes):
                    jit = aot.specialise(backend, *call).signature
                    assert chosen(call) == jit, (call, chosen(call), jit)
                    count += 1
        for layout in (*aligned, *others):
            for d_in, d_out in odd:
                for call in launches(layout, (n, d_in, d_out), dtypes):
                    chosen(call)
        for layout in others:
            for d_in, d_out in widths:
                for call in launches(layout, (n, d_in, d_out), dtypes):
                    chosen(call)
print(count)
"""

SOURCE = """
for call in launches(empty, (300, 14336, 4096), aot.FEATURES[0]):
    kernel, args, meta = call
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(*args, **meta)
    _, signature, constants, attributes = kernel._pack_args(
        backend, dict(meta), bound, specialization, options
    )
    source = aot.specialise(backend, *call).source(backend)
    assert source.signature == signature, (source.signature, signature)
    assert source.constants == constants, (source.constants, constants)
    assert source.attrs == {k: v for k, v in attributes.items() if v}, (source.attrs, attributes)
"""


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_as_the_jit(library: Path, arch: str) -> None:
    """Aligned launches get the JIT's signature, and the code is compiled from the JIT's input."""
    done = run(CHECK + SWEEP + SOURCE, library, arch)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000
