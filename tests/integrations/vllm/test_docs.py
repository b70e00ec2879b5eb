"""The commands of docs/fleet.md, run as they are printed: all of them with `--soak`, which starts
servers five times, else those that need no server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytest.importorskip("peft")
pytest.importorskip("gguf")
pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "fleet.md").read_text()
TOOLS = ("bash", "curl", "openssl", "timeout")


def blocks(page: str) -> list[str]:
    """The page's commands: what is indented, and the Python, as a command that runs it."""
    found, block, fence = list[str](), "", ""
    for line in [*page.splitlines(keepends=True), "end"]:
        if not fence and line.startswith("    "):
            block += line[4:]
        elif block and not line.strip() and not fence:
            block += "\n"
        elif line.startswith("```"):
            if fence == "python":
                key = "import os\nkey = os.environ['ULTRAEDIT_API_KEY']\n"
                found.append(f"python - <<'END'\n{key}{block}END\n")
            fence, block = ("", "") if fence else (line[3:].strip(), "")
        elif fence:
            block += line
        elif block:
            found.append(f"{block.strip()}\n")
            block = ""
    return found


def run(script: str, folder: Path, limit: float) -> str:
    """What a shell says that runs it from the root, stopping at the first command that fails."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"no {', '.join(missing)} here")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = subprocess.Popen(
        ["timeout", f"{limit:g}", "bash", "-euo", "pipefail", "-c", script],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=(folder / "said").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,  # with all that it has started it can be ended
    )
    try:
        status = shell.wait()
    finally:
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(shell.pid, signal.SIGTERM)
    said = (folder / "said").read_text()
    assert status == 0, said[-6000:]
    return said


def test_the_commands_that_need_no_server(tmp_path: Path) -> None:
    script = "".join(block for block in blocks(PAGE) if "localhost" not in block)
    script = "".join(line for line in script.splitlines(True) if "state-" not in line)
    said = run(script.replace("/tmp/fleet", str(tmp_path)), tmp_path, 500)
    assert said.count("all 1 edits hold") == 2 and "\npassed\n" in said
    for name in ("check.xml", "check.json", "adapter", "adapter.gguf", "both.safetensors"):
        assert (tmp_path / name).exists()


@pytest.mark.soak
def test_all_commands(tmp_path: Path, soak: bool) -> None:
    if not soak:
        pytest.skip("starts servers five times: with --soak")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        prefix = free.getsockname()[1] // 10
    script = re.sub(r"\b800(?=[123{]|\d)", str(prefix), "".join(blocks(PAGE)))
    said = run(script.replace("/tmp/fleet", str(tmp_path)), tmp_path, 1200)
    assert said.count("all serve the same") == 2
    assert "in step" in said
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
