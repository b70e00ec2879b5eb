"""Files that the code before the rooms wrote are read as it read them, and gone on with as it did.

Loading and replaying them gives its digests everywhere. A further turn gives them where the same
kernels round: with the versions and the processor that `expected.json` names, on one thread.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import BUNDLED
from ultraedit_kernels import EditDelta, Editor, EditRequest, Statistics
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.model.presets import PAPER
from ultraedit_kernels.store.delta import digest_all

BEFORE = Path(__file__).parents[1] / "fixtures" / "before-rooms"
EXPECTED: dict[str, Any] = json.loads((BEFORE / "expected.json").read_text())
TURNS = [EditRequest(prompt, target) for prompt, target in EXPECTED["turns"]]


def machine() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"cpu": capability, "torch": torch.__version__, "machine": (names or ["unknown"])[0]}


SAME_MACHINE = machine().items() <= EXPECTED.items()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(statistics: dict[str, Statistics]) -> str:
    """Digest of statistics."""
    parts = ("count", "mean", "m2")
    return digest_all({f"{n}.{p}": getattr(s, p) for n, s in statistics.items() for p in parts})


def anchored(anchors: Anchors) -> str:
    """Digest of all that a turn must leave as it is."""
    named: dict[str, dict[str, Tensor]] = {
        "keys": anchors.keys,
        "outputs": anchors.outputs,
        "watch": anchors.watch.tensors(),
    }
    return digest_all({f"{part}.{n}": t for part, of in named.items() for n, t in of.items()})


def test_a_state_directory_is_continued(model, tokenizer, tmp_path):
    expected, state = EXPECTED["state"], tmp_path / "state"
    shutil.copytree(BEFORE / "state", state)
    editor = Editor(model, tokenizer, **EXPECTED["settings"], keep=2, state_dir=state)
    assert (editor.version, editor.digest()) == (3, expected["digests"][3])
    assert numbers(editor.statistics) == expected["statistics"][2]
    editor.prepare()
    assert len(editor.memory.anchors.watch) == expected["watched"]
    assert [edit["prompt"] for r in editor.history() for edit in r["edits"]] == [
        request.prompt for request in TURNS[:3]
    ]
    # What follows is not bit for bit as before: shields are compressed more rarely since.
    assert editor.apply([TURNS[3]]).edits[0].succeeded and editor.version == 4


def test_every_version_of_a_state_directory_is_returned_to(model, tokenizer, tmp_path):
    expected, state = EXPECTED["state"], tmp_path / "state"
    shutil.copytree(BEFORE / "state", state)
    editor = Editor(model, tokenizer, **EXPECTED["settings"], keep=2, state_dir=state)
    for version in (3, 2, 1):
        editor.rollback(version)
        assert editor.digest() == expected["digests"][version]
        assert numbers(editor.statistics) == expected["statistics"][version - 1]
    editor.rollback(0)
    assert editor.digest() == expected["digests"][0]


def test_a_delta_is_applied(model, tokenizer):
    delta = EditDelta.load(BEFORE / "delta.safetensors")
    editor = Editor(model, tokenizer, **EXPECTED["settings"])
    editor.apply_delta(delta)
    assert editor.digest() == EXPECTED["delta"]["digest"]
    again = EditDelta.from_bytes(delta.to_bytes())
    assert digest_all(again.tensors()) == digest_all(delta.tensors())


def test_a_stream_file_goes_on(model, tokenizer, tmp_path):
    expected, state = EXPECTED["stream"], tmp_path / "state"
    shutil.copytree(BEFORE / "state", state)
    settings = EXPECTED["settings"]
    Editor(model, tokenizer, **settings, keep=2, state_dir=state).close()  # edits the model
    editor = Editor(model, tokenizer, **settings, continues=BEFORE / "stream.safetensors")
    assert numbers(editor.statistics) == expected["statistics"]
    editor.prepare()
    watch = editor.memory.anchors.watch
    assert len(watch) == expected["watched"] and len(watch) - watch.own == expected["edits"]
    if SAME_MACHINE:
        assert anchored(editor.memory.anchors) == expected["anchors"]
        editor.apply([TURNS[3]])
        assert editor.digest() == expected["next"]


def test_the_published_method_gives_the_same_weights(model, tokenizer):
    """Bit for bit where the same kernels round, and elsewhere to their rounding."""
    expected = EXPECTED["published"]
    editor = Editor(model, tokenizer, **{**PAPER, "seed": 0, "modules": "auto"})
    assert editor.modules == expected["modules"]
    for turn in (TURNS[:2], TURNS[2:]):
        editor.apply(turn)
    for name, weight in editor.weights.items():
        change = (weight - editor.versions.pristine[name]).double().norm()
        assert float(change) == pytest.approx(expected["change"][name], rel=1e-3)
    if SAME_MACHINE:
        assert editor.digest() == expected["digest"]
        assert numbers(editor.statistics) == expected["statistics"]


def test_the_fixtures_are_of_the_bundled_model(model):
    name = EXPECTED["settings"]["modules"][0]
    weight = model.get_submodule(name).weight.data
    assert digest_all({name: weight}) == EXPECTED["state"]["digests"][0], BUNDLED
