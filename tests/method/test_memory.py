"""What a stream remembers: what a turn adds comes back from tensors and metadata as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ultraedit_kernels import EditDelta, Statistics
from ultraedit_kernels.method.memory import Memory, TurnMemory, decode_statistics, load_stream
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.repair import Watch
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.store.journal import Entry, Journal

WEIGHTS = {"up": torch.ones(3, 4), "gate": torch.ones(3, 4), "down": torch.ones(4, 3)}


def memory(sharing="per-module", texts=0) -> Memory:
    return Memory(WEIGHTS, sharing, texts=texts, rows=8, ridge=1.0, seed=0)


def statistics(seed: int) -> Statistics:
    random = torch.Generator().manual_seed(seed)
    mean, m2 = torch.rand(2, 7, generator=random, dtype=torch.float64)
    return Statistics(torch.tensor(5.0, dtype=torch.float64), mean, m2, 4 if seed != 2 else 3)


def turn(tokens: int = 2) -> TurnMemory:
    """One watched edit, of `tokens` tokens."""
    watch = Watch(
        [Sequence([1, 2], list(range(3, 3 + tokens)))],
        0,
        torch.zeros(tokens, dtype=torch.long),
        torch.arange(tokens),
        {name: torch.rand(tokens, w.shape[1]) for name, w in WEIGHTS.items()},
        {name: torch.rand(tokens, w.shape[0]) for name, w in WEIGHTS.items()},
        torch.rand(tokens),
        torch.rand(tokens),
    )
    keys = {name: torch.rand(2, w.shape[1]) for name, w in WEIGHTS.items()}
    stats = {name: statistics(i) for i, name in enumerate(WEIGHTS)}
    return TurnMemory(stats, keys, watch, torch.stack([watch.lead, watch.drift]), [])


def entry(kept: TurnMemory) -> Entry:
    return Entry(EditDelta({}, {}), *kept.encode(), {"version": 1, "digest": ""})


def same_statistics(a, b) -> bool:
    parts = ("count", "mean", "m2")
    return a.keys() == b.keys() and all(
        a[n].d_in == b[n].d_in and torch.equal(getattr(a[n], p), getattr(b[n], p))
        for n in a
        for p in parts
    )


def test_what_a_turn_adds_comes_back():
    kept = turn()
    again = TurnMemory.decode(entry(kept))
    assert same_statistics(kept.statistics, again.statistics)
    assert same_statistics(kept.statistics, decode_statistics(entry(kept)))
    assert again.released == kept.released and torch.equal(again.leads, kept.leads)
    assert all(torch.equal(rows, again.keys[name]) for name, rows in kept.keys.items())
    for name, tensor in kept.watch.tensors().items():
        assert torch.equal(tensor, again.watch.tensors()[name])


def test_the_names_of_tensors_are_those_of_the_files():
    tensors, metadata = turn().encode()
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"statistics", "held", "watch", "leads"}
    assert metadata.keys() == {"statistics_d_in", "released"}


def test_an_entry_that_lacks_something_is_damaged():
    kept = entry(turn())
    del kept.tensors["leads"]
    with pytest.raises(ValueError, match=r"the journal is damaged \('leads'\)"):
        TurnMemory.decode(kept)
    del kept.tensors["statistics.up.mean"]
    with pytest.raises(ValueError, match="is damaged"):
        decode_statistics(kept)


def test_statistics_per_shape_are_shared():
    assert list(memory().statistics) == ["up", "gate", "down"]
    shared = memory("per-shape")
    assert list(shared.statistics) == ["3x4", "4x3"]
    assert shared.statistics_of == {"up": "3x4", "gate": "3x4", "down": "4x3"}


def test_with_no_texts_nothing_is_held():
    one, kept = memory(), turn()
    with pytest.raises(ValueError, match="anchors are not there yet"):
        _ = one.anchors
    one.recall(Journal(), 0)
    one.take(kept, one.after(kept))
    assert len(one.anchors.watch) == 0
    assert same_statistics(one.statistics, kept.statistics)
    one.back_to(one.first_statistics)
    assert not one.recalled and one.protected == 1
    assert all(float(s.count) == 0 for s in one.statistics.values())


def test_a_stream_file_goes_on(tmp_path):
    one, kept = memory(), turn()
    one.recall(Journal(), 0)
    one.take(kept, one.anchors)
    one.save(tmp_path / "stream.safetensors")
    loaded, edits = load_stream(tmp_path / "stream.safetensors")
    assert edits == [] and same_statistics(loaded, kept.statistics)
    two = memory()
    two.go_on(tmp_path / "stream.safetensors")
    assert same_statistics(two.statistics, kept.statistics)
    with pytest.raises(ValueError, match="remove the file to begin anew"):
        memory("per-shape").go_on(tmp_path / "stream.safetensors")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"up": torch.ones(2, 4)}, "modules of the keys: missing"),
        ({name: torch.ones(2, 5) for name in WEIGHTS}, r"keys of up have shape \(2, 5\)"),
        ({n: torch.full((2, w.shape[1]), torch.nan) for n, w in WEIGHTS.items()}, "keys of up has"),
    ],
)
def test_keys_that_do_not_fit_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        memory().hold_still(keys)


@pytest.mark.parametrize(("known", "taken"), [(2, True), (9, False)])
def test_leads_of_a_turn_that_watched_other_texts_are_left_out(known: int, taken: bool):
    remembered, kept = memory(texts=4), turn()
    remembered.take(kept, Anchors.empty(WEIGHTS))
    remembered.take(kept, remembered.after(kept))
    later = replace(turn(), leads=torch.full((2, known), 7.0))
    watch = remembered.after(later).watch
    assert len(watch) == 2
    expected = torch.full((2,), 7.0) if taken else kept.watch.lead
    assert torch.equal(watch.lead, torch.cat([expected, later.watch.lead]))
