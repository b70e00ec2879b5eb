"""What reaches the driver when launchers launch from the library, seen by a fake driver.

The fake (fake_driver.c) takes the place of libcuda.so.1 or libamdhip64.so. It cannot show that a
kernel computes the right thing, but it shows every byte of a launch. Triton is not importable here.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tests.ops.aot.conftest import run

CASES = {
    "aligned": "kernels.update_statistics(stats, keys, grads)",
    "any layout": "kernels.update_statistics(stats, columns, torch.ones(37, 33)[:, 1:])",
    "three sizes": "for n in (40, 50, 600): gram.gram_matrix(torch.ones(n, 48))",
    "update": "kernels.rank_k_update_(torch.ones(64, 48), torch.ones(5, 64), torch.ones(5, 48))",
    "other GPU": "device = 1; gram.gram_matrix(torch.ones(4, 48))",
    "no such GPU": "device = 2; gram.gram_matrix(torch.ones(4, 48))",
    "dtypes": "kernels.update_statistics(stats, keys.bfloat16(), grads.half())",
}

SCRIPT = """
import json, pathlib, sys
sys.modules["triton"] = None
import torch
from ultraedit_kernels.ops import kernels
from ultraedit_kernels.ops.kernels import gram, launch, library
from ultraedit_kernels.ops.statistics import Statistics

path, log, arch, cases = sys.argv[1:]
library.PATH, library.HIP = pathlib.Path(path), arch.startswith("gfx")
_update = sys.modules["ultraedit_kernels.ops.kernels.update"]
_update.arch = lambda tensor: arch

def launch_on_fake(name, grid, args, meta):
    launched.append([name, grid, [x.data_ptr() if torch.is_tensor(x) else x for x in args]])
    return library.launch_on(device, 4660, name, grid, args, meta)

library.launch = launch_on_fake
keys, grads, stats = torch.ones(37, 64), torch.ones(37, 32), Statistics.empty(64, 32)
columns = torch.ones(64, 37).T
results = {}
for name, code in json.loads(cases).items():
    device, launched, error = 0, [], ""
    open(log, "w").close()
    try:
        exec(code)
    except RuntimeError as raised:
        error = str(raised)
    results[name] = [launched, [line.split() for line in open(log)], error]
print(json.dumps(results))
"""

Result = tuple[list[Any], list[list[str]], str]
"""What launchers launched, what the driver was asked to do, and the error."""


@pytest.fixture(scope="session", params=["sm_90", "gfx942"])
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def results(
    arch: str,
    library: Path,
    fake_drivers: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Result]:
    log = tmp_path_factory.mktemp("log") / "calls"
    done = run(
        SCRIPT, library, log, arch, json.dumps(CASES),
        LD_LIBRARY_PATH=str(fake_drivers[arch]),
        FAKE_DRIVER_LOG=str(log),
        FAKE_ARCH=arch.removeprefix("sm_"),
        ULTRAEDIT_KERNELS="aot",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_aligned(results: dict[str, Result], arch: str) -> None:
    [[name, grid, args]], [load, launch], error = results["aligned"]
    assert error == ""
    assert name == "merge_statistics_kernel"
    assert load == ["load", "1", "elf", "1"]
    warp = {"sm_90": 32, "gfx942": 64}[arch]
    assert launch[:6] == ["launch", name, str(grid[0]), "1", "1", str(4 * warp)]
    stream, extra = launch[7:9]
    assert (stream, extra) == ("4660", "3")  # and `extra` is marked as this driver wants it
    # keys, grads, mean, m2, merged mean, merged m2, n, d_in, d_out, strides but the ones; count is
    # a double, so 4 bytes lie before it. Then two pointers to scratch memory that nobody uses.
    *pointers, n, d_in, d_out, keys_n, one, grads_n, same, count = args
    assert one == same == 1
    packed = struct.pack("<6Q5i4xd2Q", *pointers, n, d_in, d_out, keys_n, grads_n, count, 0, 0)
    assert bytes.fromhex(launch[-1]) == packed


def test_any_layout(results: dict[str, Result]) -> None:
    [[_, _, args]], calls, error = results["any layout"]
    assert error == ""
    *pointers, n, d_in, d_out, a, b, c, d, count = args
    assert (a, b, c, d) == (1, 37, 33, 1)
    packed = struct.pack("<6Q7i4xd2Q", *pointers, n, d_in, d_out, a, b, c, d, count, 0, 0)
    assert bytes.fromhex(calls[-1][-1]) == packed


def test_code_is_loaded_once(results: dict[str, Result]) -> None:
    launched, calls, error = results["three sizes"]
    assert error == ""
    assert [call[0] for call in calls] == ["load", *3 * ["launch"]]
    assert [call[2:5] for call in calls[1:]] == [list(map(str, grid)) for _, grid, _ in launched]


def test_runs_in_the_primary_context_of_the_device(results: dict[str, Result], arch: str) -> None:
    """Which the fake calls 100 + device, while none is current; HIP has the device instead."""
    calls = results["three sizes"][1]
    assert calls[-1][9] == {"sm_90": "0x64", "gfx942": "(nil)"}[arch]


def test_shared_memory_beyond_48_kib_is_reserved_first(
    results: dict[str, Result], arch: str
) -> None:
    _, calls, error = results["update"]
    assert error == ""
    shared = calls[-1][6]
    large = arch == "sm_90" and int(shared) > 48 * 1024
    assert calls[1:-1] == ([["attribute", "8", shared]] if large else [])


def test_gpu_without_code(results: dict[str, Result], arch: str) -> None:
    _, calls, error = results["other GPU"]
    other = {"sm_90": "sm_87", "gfx942": "gfx90a"}[arch]
    assert f"no code for {other}, only for sm_90, gfx942; build it with" in error
    assert not calls


def test_no_such_gpu(results: dict[str, Result]) -> None:
    _, calls, error = results["no such GPU"]
    assert error == "device is 2, expected one of the 2 that the driver sees"
    assert not calls


def test_dtypes_without_code(results: dict[str, Result]) -> None:
    _, calls, error = results["dtypes"]
    assert "the ahead-of-time library has no merge_statistics_kernel" in error
    assert "arguments *bf16 *fp16 *fp64" in error
    assert not calls
