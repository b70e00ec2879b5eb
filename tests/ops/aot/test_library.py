"""The built library: ctest, and the choice of a backend with and without it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.ops.aot.conftest import run
from ultraedit_kernels.ops import operations
from ultraedit_kernels.ops.kernels import library as library_module

Backend = Callable[[Path, str | None], str]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """The backend for a CPU tensor, with this library and ULTRAEDIT_KERNELS."""

    def choose(path: Path, forced: str | None) -> str:
        monkeypatch.setattr(library_module, "PATH", path)
        if forced is not None:
            monkeypatch.setenv("ULTRAEDIT_KERNELS", forced)
        return operations.backend(torch.empty(0)).__name__

    library_module.forget()
    yield choose
    library_module.forget()


def test_ctest(build: Path) -> None:
    done = subprocess.run(
        ["ctest", "--test-dir", build, "--output-on-failure"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "100% tests passed, 0 tests failed out of 5" in done.stdout


def test_cpu_tensors_go_to_torch_unless_forced(library: Path, backend: Backend) -> None:
    assert backend(library, None) == "ultraedit_kernels.ops.torch_backend"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_forced_without_a_driver(library: Path, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=r"=aot but no GPU driver: neither libcuda\.so\.1"):
        backend(library, "aot")


def test_forced_without_the_library(tmp_path: Path, backend: Backend) -> None:
    with pytest.raises(RuntimeError, match=r"not built: there is no .*; build it with: cmake -S"):
        backend(tmp_path / "none.so", "aot")


def test_forced_with_a_broken_library(tmp_path: Path, backend: Backend) -> None:
    broken = tmp_path / "broken.so"
    broken.write_text("not a library")
    with pytest.raises(RuntimeError, match=r"=aot but .*broken.so cannot be opened"):
        backend(broken, "aot")


def test_forced_with_a_library_of_other_sources(
    library: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library_module, "sources", lambda: "other")
    with pytest.raises(RuntimeError, match="was built from other kernel sources"):
        backend(library, "aot")


def test_without_triton(library: Path) -> None:
    """The kernels can be imported, and either forced backend says what it lacks."""
    code = f"""
import os, sys
sys.modules["triton"] = None
import pathlib, torch
from ultraedit_kernels.ops import kernels, operations
from ultraedit_kernels.ops.kernels import library
library.PATH = pathlib.Path({str(library)!r})
os.environ["TRITON_INTERPRET"] = "1"
for forced in ("aot", "triton"):
    os.environ["ULTRAEDIT_KERNELS"] = forced
    try:
        operations.backend(torch.empty(0))
    except RuntimeError as error:
        print(error)
"""
    aot, triton = run(code).stdout.splitlines()
    assert "ULTRAEDIT_KERNELS=aot but" in aot
    assert "ULTRAEDIT_KERNELS=triton but triton cannot be imported" in triton
