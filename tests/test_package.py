"""What importing the package costs, and that it installs as the documentation says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ultraedit_kernels

ROOT = Path(__file__).parent.parent


def run(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, cwd="/"
    )


def test_import_is_light():
    code = (
        "import sys, ultraedit_kernels\n"
        "heavy = {'torch', 'triton', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from ultraedit_kernels import *\n"
        "heavy = {'triton', 'transformers', 'vllm'} & set(sys.modules)\n"
        "assert not heavy - {'triton'}, heavy\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_public_names_exist():
    for name in ultraedit_kernels.__all__:
        assert getattr(ultraedit_kernels, name) is not None


def test_integrations_install_as_a_subpackage():
    done = run(
        "import importlib.util as u, ultraedit_kernels.integrations.vllm.plugin\n"
        "assert u.find_spec('integrations') is None\n"
        "import sys; assert 'vllm' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_editor_without_transformers_says_what_to_install():
    done = run(
        "import sys; sys.modules['transformers'] = None\n"
        "from ultraedit_kernels.cli import main\n"
        "sys.exit(main(['edit', 'x', 'y', '-o', 'z']))"
    )
    assert done.returncode != 0
    assert "pip install 'ultraedit-kernels[transformers]'" in done.stdout + done.stderr


def test_the_files_of_the_page_are_installed_with_the_package(tmp_path: Path) -> None:
    options = ["egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path)]
    command = [sys.executable, "setup.py", "-q", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "ultraedit_kernels" / "integrations" / "vllm" / "ui"
    files = {file.name: file.read_bytes() for file in built.iterdir()}
    source = ROOT / "integrations" / "vllm" / "ui"
    assert files == {file.name: file.read_bytes() for file in source.iterdir()}
    assert {"index.html", "page.js", "page.css"} < set(files)
