from __future__ import annotations

import pytest
import torch

from ultraedit_kernels.ops import aot
from ultraedit_kernels.ops.kernels import gram, launch, library


def test_a_recorder_gets_the_launch_and_nothing_runs():
    found: list[aot.Launch] = []
    with aot.recorded("gfx942", found):
        assert launch.arch(torch.empty(1)) == "gfx942"
        gram.gram_matrix(torch.empty(20, 40, device="meta"))
    ((kernel, args, meta),) = found
    assert kernel is gram.gram_kernel and args[2:4] == (20, 40)
    assert meta == {**gram.CONFIG, "num_stages": gram.STAGES[torch.float32]}
    assert launch.recorder is None and launch.arch(torch.empty(1)) == "cpu"


def test_a_forced_library_without_the_code_says_so(monkeypatch):
    """Even where Triton could compile it."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "aot")
    monkeypatch.setattr(library, "launch", lambda *_: "there is no code")
    with pytest.raises(RuntimeError, match="there is no code"):
        gram.gram_matrix(torch.ones(2, 4))


def test_the_library_goes_first_unless_triton_is_forced(monkeypatch):
    taken = []
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(library, "launch", lambda name, *_: taken.append(name))
    launch.launch(gram.gram_kernel, (1,), torch.ones(1))
    assert taken == ["gram_kernel"]
    monkeypatch.setenv("ULTRAEDIT_KERNELS", "triton")
    compiled = []
    launch.launch(Kernel(compiled), (3, 2), 7, BLOCK=16)
    assert taken == ["gram_kernel"] and compiled == [((3, 2), (7,), {"BLOCK": 16})]


class Kernel:
    """A stand-in for a kernel of Triton's: writes down how it is started."""

    def __init__(self, started):
        self.started = started

    def __getitem__(self, grid):
        return lambda *args, **meta: self.started.append((grid, args, meta))
