"""Names that end as an edit's does, on the bundled model."""

from __future__ import annotations

import pytest
import torch

from tests.method.small import run
from ultraedit_kernels.method import namesakes
from ultraedit_kernels.method.protect import Anchors
from ultraedit_kernels.method.shield import shielded
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.presets import default_modules

PROMPT = "The county of Glenbervie House is"


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    from tests.conftest import BUNDLED

    return AutoModelForCausalLM.from_pretrained(BUNDLED)


def named(tokenizer, prompt: str, name: str, target: str = " Fife") -> tuple[Sequence, int]:
    """The prompt, changed at the end of the name; and where the name begins."""
    ids = list(tokenizer(prompt)["input_ids"])
    text = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids))]
    start = prompt.index(name)
    inside = [i for i, end in enumerate(text) if start < end <= start + len(name)]
    target_ids = tokenizer(target, add_special_tokens=False)["input_ids"]
    return Sequence(ids, target_ids, (inside[-1],)), inside[0]


def test_namesakes_end_alike_and_begin_otherwise(model, tokenizer) -> None:
    sequence, first = named(tokenizer, PROMPT, "Glenbervie House")
    (place,) = sequence.places
    name = sequence.prompt_ids[first : place + 1]
    assert len(name) >= 4
    (rows,) = namesakes._namesakes(model, [(sequence, first)], 0)
    kept = []
    for row in rows:
        assert row[:first] == sequence.prompt_ids[:first] and len(row) == place + 1
        alike = [a == b for a, b in zip(row[first:], name, strict=True)]
        kept.append(sum(alike))
        assert alike == [False] * (len(name) - kept[-1]) + [True] * kept[-1]
    assert len(rows) == namesakes.COUNT and len(set(map(tuple, rows))) == len(rows)
    assert set(kept) == set(range(1, len(name) // 2 + 1))
    likeliest = model(input_ids=torch.tensor([sequence.prompt_ids[:first]])).logits[0, -1]
    best = [i for i in likeliest.argsort(descending=True).tolist() if i != name[0]]
    assert [row[first] for row in rows] == best[: len(rows)]


def test_a_name_that_begins_a_text_gives_way_to_what_begins_texts(model, tokenizer) -> None:
    sequence, first = named(tokenizer, "Glenbervie House is in", "Glenbervie House")
    sequence = Sequence(sequence.prompt_ids[first:], [0], (sequence.places[0] - first,))
    start = tokenizer.bos_token_id or tokenizer.eos_token_id
    (rows,) = namesakes._namesakes(model, [(sequence, 0)], start)
    begins = model(input_ids=torch.tensor([[start]])).logits[0, -1].argsort(descending=True)
    best = [i for i in begins.tolist() if i != sequence.prompt_ids[0]]
    assert [row[0] for row in rows] == best[: len(rows)]
    assert all(len(row) == sequence.places[0] + 1 for row in rows)


def test_keys_are_those_at_the_names_end(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(namesakes, "BATCH", namesakes.COUNT)  # one edit at a time
    prompts = [(PROMPT, "Glenbervie House"), ("Who owns Lorraine Gardens now?", "Lorraine Gardens")]
    edits = [named(tokenizer, *prompt) for prompt in prompts]
    alone = (edits[0][0], edits[0][0].places[0])  # a name of one token
    modules = default_modules(model, model.config)[:2]
    sequences, firsts = zip(*edits, alone, strict=True)
    work = namesakes.namesake_keys(model, tokenizer, sequences, firsts, modules)
    phases, keys = run(work)
    assert len(phases) == 2 * len(edits)
    start = namesakes.document_start(model, tokenizer)
    rows = [row for edit in namesakes._namesakes(model, edits, start) for row in edit]
    for name in modules:
        expected = torch.cat(
            [
                capture(model, [Sequence(row, [0])], [name], backward=False).keys[name]
                for row in rows
            ]
        )
        torch.testing.assert_close(keys[name], expected)


def test_nothing_is_held_for_names_of_one_token(model, tokenizer) -> None:
    sequence, _ = named(tokenizer, PROMPT, "Glenbervie House")
    modules = default_modules(model, model.config)[:1]
    work = namesakes.namesake_keys(model, tokenizer, [sequence], [sequence.places[0]], modules)
    assert run(work)[1] == {}


def test_what_is_held_leaves_a_namesake_alone(model, tokenizer) -> None:
    """A change at the edit's key, in the directions that the anchors leave it, moves one of them
    less, and the edit by what it is told apart."""
    edit = named(tokenizer, PROMPT, "Glenbervie House")
    modules = default_modules(model, model.config)[-1:]
    (held,) = run(namesakes.namesake_keys(model, tokenizer, [edit[0]], [edit[1]], modules))[
        1
    ].values()
    none = Anchors.empty({n: model.get_submodule(n).weight.data for n in modules})
    anchors = none.hold(dict.fromkeys(modules, held), ridge=1e-3)
    key = capture(model, [edit[0]], modules, backward=False).keys[modules[0]].double()
    assert len(anchors.keys[modules[0]]) == len(held)
    left = shielded(key, anchors.keys[modules[0]])
    before, after = (held.double() @ k.T / (key @ k.T) for k in (key, left))
    assert float(after.abs().max()) < 0.2 * float(before.abs().max())
