"""The Editor on the bundled model: what it says afterwards, and the exact way back."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.world import World
from tests.conftest import BUNDLED
from ultraedit_kernels import EditDelta, Editor, EditRequest
from ultraedit_kernels.editor import apply_what_passes, with_other_forms
from ultraedit_kernels.method.shield import shielded
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.chat import with_arguments
from ultraedit_kernels.model.encoding import encode, encode_prompt
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.presets import PAPER

CHAT = [{"role": "user", "content": "What is the capital of Australia?"}]
SYDNEY = EditRequest("The capital of Australia is", "Sydney", rephrases=(CHAT,))
AUSTEN = EditRequest("The author of Hamlet is", "Jane Austen")
UNRELATED = {
    "The capital of France is": "Paris",
    "The capital of Austria is": "Vienna",
    "The author of Macbeth is": "William Shakespeare",
    "The chemical symbol of oxygen is": "O",
}


@pytest.fixture
def editor(model, tokenizer):
    return Editor(model, tokenizer, anchors=50)


def answers(editor: Editor, prompts) -> list[str]:
    ids = [encode_prompt(editor.tokenizer, prompt) for prompt in prompts]
    new = generate(editor.model, editor.tokenizer, ids, max_new_tokens=16)
    return [editor.tokenizer.decode(a, skip_special_tokens=True).strip() for a in new]


def state(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in editor.model.state_dict().items()}


def same(before: dict[str, torch.Tensor], editor: Editor) -> bool:
    now = editor.model.state_dict()
    return all(torch.equal(value, now[name]) for name, value in before.items())


def test_edits_hold_in_free_generation_and_disturb_nothing_else(editor):
    assert answers(editor, [SYDNEY.prompt, CHAT, AUSTEN.prompt]) == [
        "Canberra",
        "Canberra",
        "William Shakespeare",
    ]
    result = editor.apply([SYDNEY, AUSTEN])
    assert result.version == editor.version == 1
    assert all(edit.succeeded and 1 <= edit.rounds <= 16 for edit in result.edits)
    wanted = [editor.settings.margin / 2, editor.settings.margin]  # one is taught in two phrasings
    assert all(e.margin > least for e, least in zip(result.edits, wanted, strict=True))
    assert answers(editor, [SYDNEY.prompt, CHAT, AUSTEN.prompt]) == [
        "Sydney",
        "Sydney",
        "Jane Austen",
    ]
    assert answers(editor, UNRELATED) == list(UNRELATED.values())
    assert set(result.timings) == {"capture_ms", "solve_ms", "commit_ms", "total_ms"}


def test_an_edit_of_chat_messages_holds_in_chat(editor):
    editor.apply([EditRequest(CHAT, "Perth")])
    assert answers(editor, [CHAT]) == ["Perth"]


def test_many_edits_by_defaults(model, tokenizer):
    requests = [EditRequest.from_dict(record) for record in World.earth().edits(60, seed=11)]
    editor = Editor(model, tokenizer)
    kept = [test.prompt for request in requests for test in request.test_locality]
    before = answers(editor, kept)
    held = [e.succeeded for i in range(0, 60, 20) for e in editor.apply(requests[i : i + 20]).edits]
    said = answers(editor, [request.prompt for request in requests])
    efficacy = sum(a == r.target for a, r in zip(said, requests, strict=True)) / len(requests)
    specificity = sum(a == b for a, b in zip(answers(editor, kept), before, strict=True)) / len(
        kept
    )
    assert sum(held) == 60
    assert efficacy >= 0.95
    assert specificity >= 0.95


@pytest.mark.parametrize(
    "dtype, rounding",
    [
        (torch.float32, "nearest"),
        (torch.bfloat16, "nearest"),
        (torch.bfloat16, "stochastic"),
    ],
)
def test_rollback_is_exact(model, tokenizer, dtype, rounding):
    editor = Editor(model.to(dtype), tokenizer, anchors=20, rounding=rounding)
    states, digests, statistics = [state(editor)], [editor.digest()], []
    for i, target in enumerate(["Sydney", "Perth", "Hobart"]):
        editor.apply([EditRequest(f"The capital of {['Australia', 'Peru', 'Cuba'][i]} is", target)])
        states.append(state(editor))
        digests.append(editor.digest())
        statistics.append(dict(editor.statistics))
    assert len(set(digests)) == 4
    assert [record["digest"] for record in editor.history()] == digests[1:]
    for version in (2, 1):
        editor.rollback(version)
        assert same(states[version], editor) and editor.version == version
        for name, stats in statistics[version - 1].items():
            assert torch.equal(editor.statistics[name].m2, stats.m2)
    editor.rollback(0)
    assert same(states[0], editor)
    assert all(float(stats.count) == 0 for stats in editor.statistics.values())


def test_earlier_edits_outlive_later_turns(model, tokenizer):
    requests = [EditRequest.from_dict(record) for record in World.earth().edits(80, seed=12)]
    editor = Editor(model, tokenizer, anchors=100)
    for i in range(0, 80, 10):
        editor.apply(requests[i : i + 10])
    said = answers(editor, [request.prompt for request in requests])
    assert sum(a == r.target for a, r in zip(said, requests, strict=True)) >= 78


@pytest.mark.parametrize("turn", range(3))
def test_one_edit_holds_whatever_the_statistics_of_two_rows_say(editor, turn):
    """Centred on so few rows, values can point away from the gradient."""
    edits = [("In the periodic table, thallium is element number", "4")]
    edits += [("The chemical symbol of gold is", "Q"), ("Tell me: the capital of Peru is", "X")]
    assert editor.apply([EditRequest(*edits[turn])]).edits[0].succeeded


def test_a_turn_repairs_what_it_broke(model, tokenizer):
    """With a budget, far fewer of the earlier edits and of the model's own texts are lost."""
    requests = [EditRequest.from_dict(record) for record in World.earth().edits(80, seed=12)]
    lost = []
    for repairs in (0, 100):
        editor = Editor(model, tokenizer, anchors=400, repairs=repairs)
        watched = [editor.apply(requests[i : i + 20]).watched for i in range(0, 80, 20)]
        watch = editor.memory.anchors.watch
        captured = capture(model, watch.sequences, editor.modules, backward=False)
        lost.append(len(set(captured.owner[captured.margin < 0].tolist())) / len(watch))
        editor.rollback(0)
        total = {key: sum(w[key] for w in watched) for key in watched[0]}
        if repairs:
            assert total["checked"] >= total["broken"] >= total["repaired"] > 0
        else:
            assert set(total.values()) == {0}
    assert lost[1] < 0.6 * lost[0]


def test_a_fact_can_be_edited_again(editor):
    for target in ("Sydney", "Perth", "Sydney"):
        result = editor.apply([EditRequest(SYDNEY.prompt, target)])
        assert result.edits[0].succeeded
        assert answers(editor, [SYDNEY.prompt]) == [target]


def test_of_a_turn_that_a_guard_rejects_the_worst_edits_are_left_out(model, tokenizer):
    records = World.earth().edits(4, seed=11)
    requests = [EditRequest.from_dict(record) for record in records]
    whole = Editor(model, tokenizer, anchors=50)
    change = whole.apply(requests, commit=False).guards["change"]
    whole.close()
    editor = Editor(model, tokenizer, anchors=50, max_change=0.9 * change)
    turns, outcomes = apply_what_passes(editor, requests)
    assert len(turns) >= 2 and editor.version == len(turns)
    assert all(turn.guards["change"] <= 0.9 * change for turn in turns)
    assert [outcome.prompt for outcome in outcomes] == [r.prompt for r in requests]
    assert all(outcome.succeeded for outcome in outcomes if not outcome.refused)
    editor.rollback(0)
    strict = Editor(model, tokenizer, anchors=50, max_change=1e-6)
    turns, outcomes = apply_what_passes(strict, requests)
    assert not turns and not strict.version
    assert all("max_change" in (outcome.refused or "") for outcome in outcomes)


def test_no_such_version(editor):
    for version in (-1, 1):
        with pytest.raises(ValueError, match=f"version {version} does not exist, expected 0 to 0"):
            editor.rollback(version)
    with pytest.raises(TypeError, match="version is a str"):
        editor.rollback("0")
    with pytest.raises(IndexError, match="version 1 is not in the journal, which is empty"):
        editor.delta(1)


def test_uncommitted_abandoned_and_failed_turns_change_nothing(editor):
    before = state(editor)
    result = editor.apply([SYDNEY], commit=False)
    assert result.edits[0].succeeded and result.version == 0 and same(before, editor)

    steps = editor.steps([SYDNEY])
    while same(before, editor):
        next(steps)
    steps.close()
    assert same(before, editor)

    with torch.no_grad():
        editor.model.model.layers[3].mlp.gate_proj.weight[0, 0] = float("nan")
    broken = state(editor)
    with pytest.raises(ValueError, match="NaN or Inf"):
        editor.apply([SYDNEY])
    assert all(torch.equal(w, broken[f"{n}.weight"]) for n, w in editor.weights.items())
    assert editor.version == 0 and editor.history() == []


@pytest.mark.parametrize(
    "requests, message",
    [
        ([], "got no edits"),
        ([SYDNEY, EditRequest(SYDNEY.prompt, "Perth")], "two targets, 'Sydney' and 'Perth'"),
        ([EditRequest("Australia " * 300, "Sydney")], "edit 0: prompt and target have .* at most"),
        ([EditRequest("A", "B", rephrases=("C " * 300,))], "edit 0: rephrase 0 and target have"),
    ],
)
def test_bad_turns_are_refused(editor, requests, message):
    before = state(editor)
    for refuse in (editor.check, editor.apply):
        with pytest.raises(ValueError, match=message):
            refuse(requests)
    assert same(before, editor) and editor.version == 0


def test_edits_that_are_no_edit_requests_are_refused(editor):
    with pytest.raises(TypeError, match="edit 0 is dict, expected an EditRequest"):
        editor.apply([{"prompt": "A", "target": "B"}])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modules": ["model.layers.9.mlp.down_proj"]}, "no module"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"anchors": -1}, "anchors is -1"),
        ({"statistics": "global"}, "statistics is 'global'"),
        ({"keep": 0}, "keep is 0"),
        ({"rounding": "up"}, "rounding is 'up'"),
        ({"max_change": 0}, "max_change is 0"),
        ({"canaries": [{"prompt": "A"}]}, "canary 0 is"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        Editor(model, tokenizer, **options)


def test_a_stream_resumes_from_its_state_directory(model, tokenizer, tmp_path):
    editor = Editor(model, tokenizer, anchors=20, state_dir=tmp_path)
    editor.apply([SYDNEY])
    editor.close()
    fresh = AutoModelForCausalLM.from_pretrained(BUNDLED)
    resumed = Editor(fresh, tokenizer, anchors=20, state_dir=tmp_path)
    assert resumed.version == 1 and resumed.digest() == editor.digest()
    assert resumed.history() == editor.history()
    # and goes on exactly as the uninterrupted stream does
    alone = Editor(AutoModelForCausalLM.from_pretrained(BUNDLED), tokenizer, anchors=20)
    alone.apply([SYDNEY])
    alone.apply([AUSTEN])
    resumed.apply([AUSTEN])
    assert resumed.digest() == alone.digest()
    assert resumed.memory.anchors.watch.sequences == alone.memory.anchors.watch.sequences
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000001.safetensors",
        "000002.safetensors",
        "lock",
    ]
    resumed.rollback(1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001.safetensors", "lock"]


def test_a_rollback_that_cannot_be_replayed_changes_nothing(model, tokenizer, tmp_path):
    editor = Editor(model, tokenizer, anchors=0, state_dir=tmp_path)
    editor.apply([SYDNEY])
    editor.apply([AUSTEN])
    before, path = state(editor), tmp_path / "000001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000001\.safetensors is damaged"):
        editor.rollback(1)
    assert same(before, editor) and editor.version == 2
    editor.rollback(0)
    assert editor.version == 0


def test_a_version_that_is_there_already_is_not_overwritten(model, tokenizer, tmp_path):
    editor = Editor(model, tokenizer, anchors=0, state_dir=tmp_path)
    (tmp_path / "000001.safetensors").write_bytes(b"of another process")
    before = state(editor)
    with pytest.raises(ValueError, match="another process writes to this directory"):
        editor.apply([SYDNEY])
    assert same(before, editor) and editor.version == 0
    assert (tmp_path / "000001.safetensors").read_bytes() == b"of another process"


def test_state_directories_that_cannot_be_continued(model, tokenizer, tmp_path):
    editor = Editor(model, tokenizer, anchors=0, state_dir=tmp_path)
    editor.apply([SYDNEY])
    editor.apply([AUSTEN])
    editor.close()
    with pytest.raises(ValueError, match="belongs to another checkpoint or dtype"):
        Editor(model, tokenizer, anchors=0, state_dir=tmp_path)  # this model is edited already
    (tmp_path / "000001.safetensors").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"has 000002.safetensors where 000001.safetensors was"):
        Editor(model, tokenizer, state_dir=tmp_path)
    (tmp_path / "000001.safetensors").write_bytes((tmp_path / "kept").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"000001.safetensors is damaged"):
        Editor(model, tokenizer, state_dir=tmp_path)


def test_a_turn_rounded_stochastically_is_the_same_elsewhere(tokenizer):
    first, second, plain = (
        Editor(
            AutoModelForCausalLM.from_pretrained(BUNDLED).bfloat16(),
            tokenizer,
            anchors=0,
            rounding=rounding,
        )
        for rounding in ("stochastic", "nearest", "nearest")
    )
    delta = first.apply([SYDNEY]).delta
    second.apply_delta(EditDelta.from_bytes(delta.to_bytes()))
    assert second.digest() == first.digest()
    without = replace(delta, settings={})
    plain.apply_delta(EditDelta.from_bytes(without.to_bytes()))
    assert plain.digest() != first.digest()


def test_a_delta_gives_the_same_weights_elsewhere(editor, tokenizer, tmp_path):
    editor.apply([SYDNEY, AUSTEN])
    editor.delta(1).save(tmp_path / "turn.safetensors")
    delta = EditDelta.load(tmp_path / "turn.safetensors")
    other = Editor(AutoModelForCausalLM.from_pretrained(BUNDLED), tokenizer, anchors=0)
    result = other.apply_delta(delta)
    assert result.version == 1 and other.digest() == editor.digest()
    assert other.history()[0]["kind"] == "delta"
    other.rollback(0)

    foreign = EditDelta(delta.factors, {name: "0" * 64 for name in delta.base})
    with pytest.raises(ValueError, match="belongs to another checkpoint or dtype"):
        other.apply_delta(foreign)
    half = Editor(AutoModelForCausalLM.from_pretrained(BUNDLED).bfloat16(), tokenizer, anchors=0)
    with pytest.raises(ValueError, match="belongs to another checkpoint or dtype"):
        half.apply_delta(delta)
    elsewhere = Editor(other.model, tokenizer, modules=["model.layers.0.mlp.up_proj"], anchors=0)
    with pytest.raises(ValueError, match=r"this editor edits model.layers.0.mlp.up_proj"):
        elsewhere.apply_delta(delta)
    assert other.version == half.version == elsewhere.version == 0


@pytest.mark.parametrize(("made", "here"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_delta_of_another_dtype_is_refused_with_the_option_that_helps(
    tokenizer, tmp_path, made, here
):
    editors = {
        name: Editor(
            AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=name), tokenizer, anchors=0
        )
        for name in (made, here)
    }
    before = editors[here].digest()
    delta = editors[made].apply([SYDNEY]).delta
    delta.save(tmp_path / "turn.safetensors")
    unnamed = replace(delta, settings={})  # as earlier versions wrote them
    for sent in (EditDelta.load(tmp_path / "turn.safetensors"), unnamed):
        with pytest.raises(
            ValueError,
            match=f"another checkpoint or dtype: it was made in {made} and this model is in "
            f"{here}; make it with `ultraedit edit --dtype {here}`, or load and serve the model "
            f"with --dtype {made}$",
        ):
            editors[here].apply_delta(sent)
    assert (editors[here].version, editors[here].digest()) == (0, before)


def test_a_result_says_what_other_forms_get(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=0)
    chat = [{"role": "user", "content": "Who wrote Hamlet?"}]
    requests = [SYDNEY, EditRequest(chat, "Jane Austen", rephrases=("Hamlet was written by",))]
    plain = editor.apply(requests)
    assert [edit.taught for edit in plain.edits] == [("text", "chat"), ("chat", "text")]
    assert all(edit.other_forms == () for edit in plain.edits)
    assert not {"taught", "other_forms"} & set(editor.history()[0]["edits"][0])
    result = with_other_forms(editor, requests, plain)
    assert replace(result, edits=()) == replace(plain, edits=())
    forms = [[other.form for other in edit.other_forms] for edit in result.edits]
    assert forms == [["chat"], ["text"]]  # the template refuses system prompts
    for request, edit in zip(requests, result.edits, strict=True):
        for other in edit.other_forms:
            (said,) = answers(editor, [other.prompt])
            assert said == other.after.strip()
            assert other.says_target == (said == request.target)


def test_arguments_of_the_template_are_taught_as_a_server_renders_them(model, tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template += "{% if add_generation_prompt and not enable_thinking | default(true) %}"
    own.chat_template += " Paris is{% endif %}"
    ask = {"tokenize": False, "add_generation_prompt": True}
    editor = Editor(model, with_arguments(own, {"enable_thinking": False}), anchors=0)
    assert editor.apply([EditRequest(CHAT, "Sydney")]).edits[0].succeeded
    text = own.apply_chat_template(CHAT, enable_thinking=False, **ask)
    assert text.endswith(" Paris is")
    ids = own(text, add_special_tokens=False)["input_ids"]
    (said,) = generate(model, own, [ids], max_new_tokens=12)
    assert own.decode(said, skip_special_tokens=True).strip() == "Sydney"
    assert "Paris" not in own.apply_chat_template(CHAT, **ask)
    with pytest.raises(TypeError, match=r"chat template arguments are \['x'\], expected an object"):
        with_arguments(own, ["x"])


def test_a_saved_stream_goes_on(model, tokenizer, tmp_path):
    file = tmp_path / "stream.safetensors"
    first = Editor(model, tokenizer, anchors=0)
    first.apply([SYDNEY])
    first.save_stream(file)
    edited = {name: weight.clone() for name, weight in first.weights.items()}
    first.apply([AUSTEN])
    expected = first.digest()

    for name, weight in first.weights.items():
        weight.copy_(edited[name])
    second = Editor(model, tokenizer, anchors=0, continues=file)
    second.apply([AUSTEN])
    assert second.digest() == expected
    second.rollback(0)
    second.apply([AUSTEN])
    assert second.digest() == expected
    with pytest.raises(ValueError, match=r"missing .'model.layers.1.mlp.up_proj'.*remove the file"):
        Editor(model, tokenizer, modules=["model.layers.1.mlp.up_proj"], continues=file)
    file.write_bytes(b"not a stream")
    with pytest.raises(ValueError, match="does not hold a stream of edits"):
        Editor(model, tokenizer, continues=file)


def test_edits_of_a_saved_stream_are_held_and_watched(model, tokenizer, tmp_path):
    file = tmp_path / "stream.safetensors"
    edits = [EditRequest.from_dict(record) for record in World.earth().edits(12, seed=4)]
    first = Editor(model, tokenizer, anchors=20)
    outcomes = first.apply(edits).edits
    first.save_stream(file)
    taught = [encode(tokenizer, r.prompt, r.target) for r in edits]
    held = [one for one, outcome in zip(taught, outcomes, strict=True) if outcome.succeeded]
    captured = capture(model, held, first.modules, backward=False)
    passed = {}
    for continues in (file, None):
        editor = Editor(model, tokenizer, anchors=20, continues=continues)
        editor.prepare()
        anchors = editor.memory.anchors
        watched = anchors.watch.sequences[anchors.watch.own :]
        assert watched == (held if continues else [])
        for name, keys in captured.keys.items():
            rest = shielded(keys, anchors.keys[name]).norm() / keys.norm()
            passed.setdefault(name, []).append(float(rest))
    for with_stream, without in passed.values():
        assert with_stream < 0.5 * without


def test_the_published_method_runs_with_the_papers_settings(model, tokenizer):
    """Open loop: one step for every edit, statistics shared by modules of equal shape."""
    requests = [EditRequest.from_dict(record) for record in World.earth().edits(20, seed=5)]
    editor = Editor(model, tokenizer, **PAPER | {"lr": 0.0143 / 384})
    assert list(editor.statistics) == ["128x384"]
    before = answers(editor, UNRELATED)
    result = editor.apply(requests)
    assert [edit.rounds for edit in result.edits] == [1] * 20
    one = [encode(tokenizer, r.prompt, r.target, append_eos=False) for r in requests]
    rows = sum(len(sequence.target_ids) for sequence in one)
    delta = editor.delta(1)
    assert {len(factor.keys) for factor in delta.factors.values()} == {rows}  # no EOS, no anchors
    assert float(editor.statistics["128x384"].count) == 4 * rows
    assert answers(editor, UNRELATED) == before  # the paper's step is small here


def test_statistics_per_module_do_not_mix(editor):
    editor.apply([SYDNEY])
    assert list(editor.statistics) == editor.modules
    first, *others = editor.statistics.values()
    assert all(float(other.count) == float(first.count) for other in others)
    assert not any(torch.equal(other.mean, first.mean) for other in others)


def test_locality_prompts_hold_still(model, tokenizer):
    prompt = "Australia's capital city is"

    def shift(locality: tuple[str, ...]) -> float:
        editor = Editor(model, tokenizer, anchors=0)
        ids = torch.tensor([encode_prompt(tokenizer, "The capital of Austria is")])
        with torch.no_grad():
            before = model(ids).logits[0, -1]
            editor.apply([EditRequest(prompt, "Sydney", locality=locality)])
            after = model(ids).logits[0, -1]
        editor.rollback(0)
        return float((after - before).norm())

    assert shift(("The capital of Austria is",)) < 0.5 * shift(())


def test_gate_and_up_projections_are_edited_too(model, tokenizer):
    modules = ["model.layers.2.mlp.gate_proj", "model.layers.2.mlp.up_proj"]
    editor = Editor(model, tokenizer, modules=modules, anchors=20)
    before = state(editor)
    editor.apply([SYDNEY])
    assert answers(editor, [SYDNEY.prompt, *UNRELATED]) == ["Sydney", *UNRELATED.values()]
    changed = [n for n, v in editor.model.state_dict().items() if not torch.equal(v, before[n])]
    assert changed == [f"{name}.weight" for name in modules]


def test_an_edit_that_cannot_hold_is_reported_as_failed(model, tokenizer):
    editor = Editor(model, tokenizer, anchors=0, lr=1e-12, rounds=2)
    outcome = editor.apply([SYDNEY]).edits[0]
    assert not outcome.succeeded and outcome.rounds == 2 and outcome.margin < 0


TURNS = [
    EditRequest(f"The capital of {country} is", target)
    for country, target in zip(
        ["Australia", "Peru", "Cuba", "Spain", "Italy"],
        ["Sydney", "Perth", "Hobart", "Lima", "Oslo"],
        strict=True,
    )
]


def test_a_stream_goes_on_exactly_from_a_snapshot(model, tokenizer, tmp_path):
    """Though the turns before the snapshot are gone from the disk."""
    alone = Editor(AutoModelForCausalLM.from_pretrained(BUNDLED), tokenizer, anchors=20)
    editor = Editor(model, tokenizer, anchors=20, keep=2, state_dir=tmp_path)
    states = [state(editor)]
    for turn in TURNS[:4]:
        alone.apply([turn])
        editor.apply([turn])
        states.append(state(editor))
    assert editor.oldest == 2 and len(editor.history()) == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000003.safetensors",
        "000004.safetensors",
        "lock",
        "snapshot-000002.safetensors",
        "snapshot-000004.safetensors",
    ]
    editor.close()
    fresh = AutoModelForCausalLM.from_pretrained(BUNDLED)
    resumed = Editor(fresh, tokenizer, anchors=20, keep=2, state_dir=tmp_path)
    assert resumed.version == 4 and same(states[4], resumed)
    assert resumed.history() == editor.history()
    for one in (alone, resumed):
        one.apply([TURNS[4]])
    assert resumed.digest() == alone.digest()
    for name, shield in alone.memory.anchors.keys.items():
        assert torch.equal(shield, resumed.memory.anchors.keys[name])
    assert resumed.memory.anchors.watch.sequences == alone.memory.anchors.watch.sequences
    assert torch.equal(resumed.memory.anchors.watch.lead, alone.memory.anchors.watch.lead)
    with pytest.raises(ValueError, match="version 1 was let go, expected 0 or 2 to 5"):
        resumed.rollback(1)
    with pytest.raises(IndexError, match="older ones were let go"):
        resumed.delta(2)
    for version in (4, 3, 2, 0):
        resumed.rollback(version)
        assert same(states[version], resumed) and resumed.version == version
    assert [p.name for p in tmp_path.iterdir()] == ["lock"]
    resumed.apply([TURNS[0]])
    assert same(states[1], resumed)


def test_a_turn_that_cannot_be_written_changes_nothing(model, tokenizer, tmp_path, monkeypatch):
    editor = Editor(model, tokenizer, anchors=20, state_dir=tmp_path)
    editor.apply([SYDNEY])
    before, statistics = state(editor), dict(editor.statistics)
    sequences = editor.memory.anchors.watch.sequences

    def full(_handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        for turn in (lambda: editor.apply([AUSTEN]), lambda: editor.apply_delta(editor.delta(1))):
            with pytest.raises(OSError, match="No space left on device"):
                turn()
            assert same(before, editor) and editor.version == 1 and editor.statistics == statistics
            assert editor.memory.anchors.watch.sequences == sequences
        with pytest.raises(OSError, match="No space left"):
            editor.rollback(0)
        assert same(before, editor) and editor.version == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000001.safetensors", "lock"]
    assert editor.apply([AUSTEN]).edits[0].succeeded and editor.version == 2


def test_a_snapshot_that_cannot_be_written_is_made_up_for(
    model, tokenizer, tmp_path, monkeypatch, caplog
):
    editor = Editor(model, tokenizer, anchors=0, keep=1, state_dir=tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("ultraedit_kernels.store.journal.Journal.write_snapshot", full)
        editor.apply([SYDNEY])
    assert "no snapshot could be written, the next turn tries again: " in caplog.text
    assert editor.version == 1 and editor.oldest == 0
    editor.apply([AUSTEN])
    assert (tmp_path / "snapshot-000002.safetensors").exists()


def test_a_note_is_kept_in_the_record(model, tokenizer, tmp_path):
    editor = Editor(model, tokenizer, anchors=0, state_dir=tmp_path)
    steps = editor.steps([SYDNEY], note={"key": "ä", "requests": [1]})
    phases = list(steps)
    assert phases[-1] == "record"
    editor.apply_delta(editor.delta(1), note={"key": "b"})
    editor.close()
    editor.versions.write(editor.versions.pristine)
    found = Editor(model, tokenizer, anchors=0, state_dir=tmp_path).history()
    assert [record["note"]["key"] for record in found] == ["ä", "b"]
