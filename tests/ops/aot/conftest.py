from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CMake build folder with the library for one NVIDIA and one AMD architecture."""
    if not (shutil.which("cmake") and shutil.which("cc")):
        pytest.skip("needs cmake and a C compiler")
    folder = tmp_path_factory.mktemp("build-aot")
    for command in (
        [
            "cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}",
            "-DULTRAEDIT_ARCHS=sm_90,gfx942", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        ],
        ["cmake", "--build", folder],
    ):  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def library(build: Path) -> Path:
    return build / "libultraedit_kernels.so"


@pytest.fixture(scope="session")
def fake_drivers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with a driver library that runs nothing and writes down what it is asked to do."""
    folders = {}
    for arch, name, flags in (
        ("sm_90", "libcuda.so.1", []),
        ("gfx942", "libamdhip64.so", ["-DHIP"]),
    ):
        folders[arch] = tmp_path_factory.mktemp(arch)
        source = Path(__file__).with_name("fake_driver.c")
        command = ["cc", "-shared", "-fPIC", *flags, source, "-o", folders[arch] / name]
        subprocess.run(command, check=True)
    return folders


def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh Python outside the root, where Triton is not the interpreter."""
    kept = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "ULTRAEDIT_KERNELS")
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        cwd="/",
        capture_output=True,
        text=True,
    )
