from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.world import World


@pytest.fixture(scope="session")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 edits, as a file."""
    path = tmp_path_factory.mktemp("edits") / "edits.json"
    path.write_text(json.dumps(World.earth().edits(20, seed=1)))
    return path
