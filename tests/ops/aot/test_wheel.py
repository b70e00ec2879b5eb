"""A wheel holds the library if it was built before, and works from anywhere."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.ops.aot.conftest import ROOT, run


def wheel(source: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run([*command, "-w", "dist"], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [path] = (source / "dist").iterdir()
    return path


def test_wheel(library: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("ultraedit_kernels", "integrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)

    plain = wheel(source)
    assert plain.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(plain).namelist() if name.endswith(".so")]
    plain.unlink()

    shutil.copy(library, source / "ultraedit_kernels")
    built = wheel(source)
    assert "-py3-none-linux_" in built.name
    zipfile.ZipFile(built).extractall(tmp_path / "installed")
    code = "from ultraedit_kernels.ops.kernels import library as l; print(l.PATH, l.load())"
    done = run(code, PYTHONPATH=str(tmp_path / "installed"))
    expected = tmp_path / "installed" / "ultraedit_kernels" / "libultraedit_kernels.so"
    assert done.stdout.startswith(f"{expected} <CDLL"), done.stdout + done.stderr
