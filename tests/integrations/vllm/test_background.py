"""Gathering while the model is served: when it goes on, when it stands still, and how it ends."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ultraedit_kernels import Editor
from ultraedit_kernels.integrations.vllm.background import MISSED, Background
from ultraedit_kernels.model import generation

MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]


@pytest.fixture
def editor(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Editor:
    monkeypatch.setenv("ULTRAEDIT_CACHE", "")
    editor = Editor(model, tokenizer, modules=MODULES, anchors=60)
    assert not editor.preparation.begin()
    return editor


@pytest.fixture
def background(editor: Editor) -> Iterator[Background]:
    yield Background(editor, copy.deepcopy(editor.model), share=0.5)


def begin(editor: Editor, background: Background, server: str = "a server") -> None:
    while not editor.memory.gathering.written:  # there is more, and nobody else to serve
        assert background.drive(server, busy=False)


def finish(background: Background) -> None:
    while not background.ended:
        background.drive("a server", busy=False)


def test_an_idle_engine_gathers_when_asked(editor: Editor, background: Background) -> None:
    begin(editor, background)
    assert 0 < editor.memory.gathering.written < 1
    finish(background)
    assert editor.memory.gathering.done and editor.memory.gathering.written == 1
    assert not background.drive("a server", busy=False)
    background.after_step(busy=False)
    editor.prepare()
    assert editor.memory.protected == 1


def test_an_engine_with_requests_gathers_after_its_steps(
    editor: Editor, background: Background
) -> None:
    worked = slept = 0.0
    while not background.ended:
        time.sleep(0.005)
        slept += 0.005
        start = time.perf_counter()
        background.after_step(busy=False)
        worked += time.perf_counter() - start
        assert not background.drive("a server", busy=False)  # that is left to the steps
    assert editor.memory.gathering.done
    assert worked < 2 * slept  # half of the time, and the machine's noise


@pytest.mark.parametrize("why", ["turn", "weights"])
def test_it_stands_still(editor: Editor, background: Background, why: str) -> None:
    begin(editor, background)
    written = editor.memory.gathering.written
    background.held = why == "weights"
    for _ in range(5):
        assert not background.drive("a server", busy=why == "turn")
        background.after_step(busy=why == "turn")
    assert editor.memory.gathering.written == written
    background.held = False
    finish(background)
    assert editor.memory.gathering.done


def test_one_server_drives_it_until_it_is_gone(editor: Editor, background: Background) -> None:
    begin(editor, background, "one")
    written = editor.memory.gathering.written
    for _ in range(MISSED):
        assert not background.drive("two", busy=False)
        assert editor.memory.gathering.written == written
        background.drive("one", busy=True)
    for _ in range(MISSED):
        assert not background.drive("two", busy=False)
    while editor.memory.gathering.written == written:
        background.drive("two", busy=False)


def test_nothing_left_is_nothing_to_do(editor: Editor) -> None:
    background = Background(editor, None, share=0.5)
    background.after_step(busy=False)
    assert background.ended and not background.drive("a server", busy=False)


@pytest.mark.parametrize("where", ["asked", "step"])
def test_a_failure_is_logged_and_edits_go_on(
    editor: Editor,
    background: Background,
    where: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for texts")

    monkeypatch.setattr(generation, "evaluation_mode", fails)
    monkeypatch.setattr(editor.memory.gathering, "written", 0.25)
    while not background.ended:
        if where == "asked":
            background.drive("a server", busy=False)
        else:
            time.sleep(0.002)
            background.after_step(busy=False)
    monkeypatch.undo()
    assert "no more is gathered" in caplog.text and "no room for texts" in caplog.text
    assert not editor.memory.gathering.done
    editor.prepare()
    assert editor.memory.protected == 0
