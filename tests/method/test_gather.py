"""Gathering: what protects the untouched model, piece by piece."""

from __future__ import annotations

import pytest
import torch

from tests.method.small import MODULES, prompts, random_model, said, weights_of
from ultraedit_kernels.method import gather, moments, protect
from ultraedit_kernels.method.gather import Gathering, anchors_of, parts_of
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.protect import Anchors, OwnKeys, hold_edits, own_texts
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.method.shield import STRONG, Shields
from ultraedit_kernels.store.files import joined


class Tokenizer:
    """As much of one as sampling needs."""

    bos_token_id, eos_token_id, pad_token_id = 3, 1, 1
    before = (3,)
    """Tokens that it puts before a text."""

    def __call__(self, text):
        return {"input_ids": [*self.before, *map(ord, text)]}

    def decode(self, ids, **_):
        return str(ids)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A model, and 40 texts in batches of 16."""
    monkeypatch.setenv("ULTRAEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(gather, "LONG_TEXT", 6)
    monkeypatch.setattr(gather, "LONG_BATCH", 16)
    monkeypatch.setattr(gather, "FEWER", 1)
    return random_model()


def gathering(model, edits=()):
    one = Gathering(weights_of(model), 40, rows=64, ridge=1.0, seed=0, at_names=True)
    one.edits_before = list(edits)
    return one


def base(model):
    return dict.fromkeys(MODULES, "the same")


def shares(one):
    return [found.share for found in one.found]


def expected(model, batches, bare=False):
    """The anchors of the first batches of texts."""
    told = own_texts(model, Tokenizer(), 40, 0, 6, 16)
    texts = [texts for _, texts in told if texts]
    own = OwnKeys(weights_of(model), 1.0, 64, bare=bare)
    for part in texts[:batches]:
        list(own.add(model, part))
    return own.anchors()


def assert_same(one: Anchors, two: Anchors):
    assert one.watch.sequences == two.watch.sequences
    for name, rows in one.keys.items():
        torch.testing.assert_close(rows.T @ rows, two.keys[name].T @ two.keys[name])


def test_the_first_texts_are_of_use_before_the_last(small):
    one, seen = gathering(small), []
    for phase in one.steps(small, Tokenizer(), base(small)):
        seen.append((phase, one.written, shares(one)))
    assert one.done and one.written == 1
    assert shares(one) == [16 / 40, 1.0]
    assert [found for _, _, found in seen][-1] == [16 / 40]  # the last piece is the last shields
    assert [phase for phase, _, _ in seen].count(Phase.APART) == 2
    progress = [written for _, written, _ in seen]
    assert progress == sorted(progress) and progress[0] < 0.1
    assert_same(one.found[0].anchors, expected(small, 1))
    assert_same(one.found[1].anchors, expected(small, 3))


def test_texts_are_read_as_they_are_asked(small, monkeypatch):
    monkeypatch.setattr(Tokenizer, "before", ())
    one = gathering(small)
    list(one.steps(small, Tokenizer(), base(small)))
    assert_same(one.found[1].anchors, expected(small, 3, bare=True))


def test_the_next_start_finds_it(small):
    first = gathering(small)
    list(first.steps(small, Tokenizer(), base(small)))
    again = gathering(small)
    again.look_up(small, Tokenizer(), base(small))
    assert again.done and shares(again) == [1.0]
    assert_same(again.found[0].anchors, first.found[-1].anchors)
    assert list(again.steps(small, Tokenizer(), base(small))) == []
    other = gathering(small)
    other.look_up(small, Tokenizer(), dict.fromkeys(MODULES, "another"))
    assert not other.done and other.written == 0


def test_what_is_cut_short_is_not_kept(small, tmp_path):
    one = gathering(small)
    work = one.steps(small, Tokenizer(), base(small))
    while len(one.found) < 1:
        next(work)
    work.close()
    assert not one.done and list(tmp_path.iterdir()) == []


def test_edits_of_before_are_held_from_the_beginning(small):
    edits = said(small, prompts(3, seed=2), tokens=1)
    one = gathering(small, edits)
    list(one.steps(small, Tokenizer(), base(small)))
    assert shares(one) == [0.0, 16 / 40, 1.0] and one.done
    none = Anchors.empty(weights_of(small))
    assert_same(one.found[0].anchors, hold_edits(none, small, edits, MODULES, 1.0, 64))
    whole = expected(small, 3)
    assert_same(one.found[2].anchors, hold_edits(whole, small, edits, MODULES, 1.0, 64))
    again = gathering(small, edits)
    again.look_up(small, Tokenizer(), base(small))
    assert not again.done and again.written == 1
    list(again.steps(small, Tokenizer(), base(small)))
    assert shares(again) == [0.0, 1.0] and again.done
    assert_same(again.found[1].anchors, one.found[2].anchors)


def test_without_texts_there_is_nothing_to_do(small):
    one = Gathering(weights_of(small), 0, rows=64, ridge=1.0, seed=0, at_names=True)
    one.look_up(small, Tokenizer(), base(small))
    assert one.done and one.written == 1 and one.found == []
    assert list(one.steps(small, Tokenizer(), base(small))) == []


def test_sketches_are_compressed_apart_and_of_bounded_size(small, monkeypatch):
    whole = gathering(small)
    list(whole.steps(small, Tokenizer(), base(small)))
    monkeypatch.setattr(moments, "WHOLE", 0)
    monkeypatch.setattr(protect, "ROOM", 12)  # two texts
    monkeypatch.setenv("ULTRAEDIT_CACHE", "")
    one = gathering(small)
    one_by_one = list(one.steps(small, Tokenizer(), base(small)))
    assert one_by_one.count(Phase.APART) > 2
    assert whole.found[-1].anchors.watch.sequences == one.found[-1].anchors.watch.sequences
    for name, rows in one.found[-1].anchors.keys.items():
        other = whole.found[-1].anchors.keys[name]
        assert rows.shape == other.shape and rows.dtype == other.dtype
        torch.testing.assert_close(rows.T @ rows, other.T @ other, atol=0.02, rtol=0.02)


def test_shields_come_back_from_a_file_with_their_weak_rows():
    keys = Shields({"a": torch.rand(STRONG + 7, 5)})
    values = Shields({"a": torch.rand(3, 2, dtype=torch.float64)})
    anchors = Anchors(keys, values, Watch.empty({"a": torch.zeros(2, 5)}))
    tensors = joined(parts_of(anchors))
    assert tensors["shield.weak_keys.a"].shape == (7, 5)
    assert "shield.weak_outputs.a" not in tensors
    again = anchors_of(tensors)
    assert torch.equal(again.keys["a"], keys["a"]) and again.keys["a"].dtype == torch.float32
    assert torch.equal(again.outputs["a"], values["a"])
