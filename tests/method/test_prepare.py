"""What comes before the first turn, and turns that come before it is done."""

from __future__ import annotations

import copy
from itertools import islice

import pytest
import torch

from ultraedit_kernels import Editor, EditRequest

MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
EDITS = [
    EditRequest("The capital of Australia is", "Sydney"),
    EditRequest("The capital of Japan is", "Osaka"),
]


def editor_of(model, tokenizer, **settings):
    return Editor(model, tokenizer, **{"modules": MODULES, "anchors": 150} | settings)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    monkeypatch.setenv("ULTRAEDIT_CACHE", "")


def begun(model, tokenizer, **settings):
    """An editor that has begun, and its gathering on a model of its own."""
    editor = editor_of(model, tokenizer, **settings)
    assert not editor.preparation.begin()
    return editor, editor.preparation.gather(copy.deepcopy(model))


def same_anchors(one, two):
    assert one.watch.sequences == two.watch.sequences and one.watch.own == two.watch.own
    for mine, theirs in ((one.keys, two.keys), (one.outputs, two.outputs)):
        for name, rows in mine.items():
            torch.testing.assert_close(rows.T @ rows, theirs[name].T @ theirs[name])


def test_turns_protect_what_there_is_and_in_the_end_all(model, tokenizer):
    untouched = copy.deepcopy(model)
    editor, work = begun(model, tokenizer)
    first = editor.apply(EDITS[:1])
    assert first.guards["protected"] == 0 and first.edits[0].succeeded
    assert editor.history()[0]["guards"]["protected"] == 0

    gathering = editor.memory.gathering
    while not gathering.found:
        next(work)
    second = editor.apply(EDITS[1:])
    assert second.guards["protected"] == pytest.approx(2 / 3) and second.edits[0].succeeded
    for _ in work:
        pass
    assert gathering.done and gathering.written == 1
    third = editor.apply([EditRequest("The capital of Peru is", "Cusco")])
    assert "protected" not in third.guards

    # The anchors are those that an editor has which gathered them first.
    other = editor_of(untouched, tokenizer)
    for version in (1, 2, 3):
        other.apply_delta(editor.delta(version))
    kept = [editor.memory.anchors.watch.own, other.memory.anchors.watch.own]
    assert kept[0] == kept[1] > 50
    own = [e.memory.own_texts(64) for e in (editor, other)]
    assert own[0] == own[1]
    editor.rollback(0)
    editor.prepare()
    other.rollback(0)
    other.prepare()
    same_anchors(editor.memory.anchors, other.memory.anchors)


def test_a_guard_counts_what_a_turn_has_lost_not_turns_before_the_texts(model, tokenizer):
    editor, work = begun(model, tokenizer)
    editor.guards.max_lost = 0.05
    loud = EditRequest("The capital of Australia is", "Sydney")
    editor.apply([loud])
    # The texts of the untouched model, of which the edit has changed a part that nobody measured.
    with torch.no_grad():
        for name in MODULES:
            editor.weights[name].mul_(-1.0)
    for _ in work:
        pass
    done = editor.apply([EditRequest("The capital of Japan is", "Osaka")])
    assert done.guards["lost"] > 0.05  # but not by this turn


def test_a_snapshot_waits_for_what_is_gathered(model, tokenizer, tmp_path):
    editor, work = begun(model, tokenizer, state_dir=tmp_path, keep=1)
    for edit in EDITS:
        editor.apply([edit])
    assert not list(tmp_path.glob("snapshot-*"))
    for _ in work:
        pass
    editor.apply([EditRequest("The capital of Peru is", "Cusco")])
    assert list(tmp_path.glob("snapshot-*"))


def test_how_far_it_is_is_told(model, tokenizer):
    editor, told = editor_of(model, tokenizer), []
    before = {name: weight.clone() for name, weight in editor.weights.items()}
    editor.prepare(told.append)
    assert told == sorted(told) and 0 < told[0] < 0.1 and told[-1] == 1
    assert all(torch.equal(before[name], weight) for name, weight in editor.weights.items())


def test_an_interruption_leaves_the_model_as_it_was(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("ULTRAEDIT_CACHE", str(tmp_path / "cache"))
    editor = editor_of(model, tokenizer, state_dir=tmp_path / "state")
    editor.preparation.begin()  # its texts are left to others
    editor.apply(EDITS[:1])
    editor.close()
    again = editor_of(model_of(editor, tokenizer), tokenizer, state_dir=tmp_path / "state")
    before = again.digest()

    def interrupt(share):
        if share > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.prepare(interrupt)
    assert again.digest() == before
    assert not again.model.training and not any(m._forward_hooks for m in again.model.modules())
    assert not list((tmp_path / "cache").glob("*")) if (tmp_path / "cache").exists() else True
    again.prepare()
    assert again.memory.protected == 1 and again.digest() == before


def model_of(editor, tokenizer):
    """A fresh copy of the untouched model."""
    model = copy.deepcopy(editor.model)
    for name, weight in editor.versions.pristine.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return model


def test_gathering_stands_still_while_a_turn_is_made(model, tokenizer):
    """In the middle of a text, and of nothing that turns use."""
    editor, work = begun(model, tokenizer)
    list(islice(work, 20))
    assert 0 < editor.memory.gathering.written < 2 / 3
    result = editor.apply(EDITS)
    assert all(edit.succeeded for edit in result.edits)
    for _ in work:
        pass
    editor.rollback(0)
    editor.prepare()
    whole = editor_of(model_of(editor, tokenizer), tokenizer)
    whole.prepare()
    same_anchors(editor.memory.anchors, whole.memory.anchors)
