"""Local servers of the bundled model, and changes for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.fleet.local_server import MODEL, LocalServer
from ultraedit_kernels import EditDelta, Editor, EditRequest

AUSTRALIA = EditRequest("The capital of Australia is", "Sydney")
JAPAN = EditRequest("The currency of Japan is the", "dollar")


@pytest.fixture(scope="session")
def deltas() -> dict[str, EditDelta]:
    """Changes of the untouched model: "australia", "japan", and "later", which comes after the
    first."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL)
    editor = Editor(model, AutoTokenizer.from_pretrained(MODEL), anchors=0)
    editor.apply([AUSTRALIA])
    editor.apply([JAPAN])
    found = {"australia": editor.delta(1), "later": editor.delta(2)}
    editor.rollback(0)
    editor.apply([JAPAN])
    return found | {"japan": editor.delta(1)}


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., LocalServer]]:
    """Start a local server, in a folder of a name."""
    servers: list[LocalServer] = []

    def start(name: str = "server", **how: Any) -> LocalServer:
        servers.append(LocalServer(tmp_path / name, **how))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()
