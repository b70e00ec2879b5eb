"""What all commands have alike."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("typer")

from tests.cli.command import run
from ultraedit_kernels import __version__


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ultraedit {__version__}\n"


@pytest.mark.parametrize("module", ["transformers", "typer", "rich"])
def test_missing_dependency_says_what_to_install(module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from ultraedit_kernels.cli import main\n"
        "sys.exit(main(['edit', 'x', 'y', '-o', 'z']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {module}")
    assert line.endswith("is not installed; pip install 'ultraedit-kernels[transformers]'")


def test_importing_it_costs_nothing() -> None:
    code = (
        "import sys, ultraedit_kernels.cli\n"
        "sys.exit(bool({'torch', 'typer', 'rich', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
