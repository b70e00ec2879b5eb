"""The machine that is measured: its name, versions, clock, memory, copy bandwidth, matrix rates."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ultraedit_kernels import __version__

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


def clock() -> float:
    """Seconds, after all work given to the GPU is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def hardware() -> str:
    """What the processor that is measured calls itself."""
    if GPU:
        return torch.cuda.get_device_name()
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def file_stem() -> str:
    """Name of the machine's file of results, such as "cpu-amd-epyc-2-threads" or "nvidia-h200"."""
    name = hardware() if GPU else f"cpu {hardware()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def conditions() -> dict[str, Any]:
    """Hardware, threads and versions, for every row."""

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return ""

    return {
        "hardware": hardware(),
        "device": DEVICE.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "ultraedit_kernels": __version__,
        "kernels": os.environ.get("ULTRAEDIT_KERNELS", "by device"),
    }


@cache
def copy_bandwidth(megabytes: int = 512) -> float:
    """Bytes read and written per second by a copy of a tensor far larger than the caches."""
    source = torch.ones(megabytes * 2**20 // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _median_seconds(lambda: target.copy_(source))


@cache
def matrix_rate(dtype: torch.dtype, size: int = 8192 if GPU else 1024) -> float:
    """Floating-point operations per second of PyTorch's product of two square matrices."""
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * size**3 / _median_seconds(lambda: a @ b)


def _median_seconds(run: Callable[[], Any], rounds: int = 5) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = clock()
        run()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def peak_extra_memory(run: Callable[[], Any]) -> tuple[Any, int | None, float]:
    """What `run` returns, the bytes by which memory grew at its highest, and its seconds.

    On a GPU, PyTorch's allocations. On a CPU, growth of the resident set as the Linux kernel saw
    it, so BLAS and LAPACK work space counts too; free heap is handed back first, lest it be reused
    unseen. None without Linux and glibc.
    """
    gc.collect()
    before: int | None
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # peak := current
            before = _status_bytes("VmRSS")
        except OSError:
            before = None
    start = clock()
    result = run()
    seconds = clock() - start
    if before is None:
        return result, None, seconds
    peak = torch.cuda.max_memory_allocated() if GPU else _status_bytes("VmHWM")
    return result, max(peak - before, 0), seconds


def anonymous_memory() -> int | None:
    """Bytes that this process has for itself, without what is mapped from files; free heap is
    handed back first. None without Linux and glibc."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _status_bytes("RssAnon")
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.M)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024
