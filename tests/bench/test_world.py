"""The worlds of facts, and the bundled model that knows one of them."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # bench is not installed

from bench.world import FACTS_DIR, World  # noqa: E402
from ultraedit_kernels.model.request import EditRequest  # noqa: E402

MODEL = ROOT / "bench" / "tiny-facts"
EARTH = World.earth()
WORLDS = [EARTH, World.synthetic(seed=1, n_facts=203)]
by_name = pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)


def question(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def test_earth_is_about_a_thousand_facts_in_known_relations() -> None:
    assert 1000 <= len(EARTH.facts) <= 1500
    assert {fact.relation for fact in EARTH.facts} <= set(EARTH.templates)
    answers = {(f.relation, f.subject): f.object for f in EARTH.facts}
    assert answers["capital", "Australia"] == "Canberra"
    assert answers["symbol", "gold"] == "Au"
    with (FACTS_DIR / "earth.csv").open(encoding="utf-8", newline="") as file:
        assert all(field == field.strip() != "" for row in csv.reader(file) for field in row)


@by_name
def test_a_subject_has_one_object_per_relation(world: World) -> None:
    counts = Counter((fact.relation, fact.subject) for fact in world.facts)
    assert max(counts.values()) == 1


@by_name
def test_no_prompt_has_two_answers(world: World) -> None:
    """Two relations must not ask the same question, nor two subjects look alike in one."""
    prompts = [
        json.dumps(prompt)
        for fact in world.facts
        for prompt in world.seen(fact) + world.held_out(fact)
    ]
    assert len(set(prompts)) == len(prompts)


@by_name
def test_training_never_shows_a_held_out_phrasing(world: World) -> None:
    shown = {question(prompt) for prompt, _ in world.training_examples()}
    for fact in world.facts:
        assert not shown & {question(prompt) for prompt in world.held_out(fact)}


@by_name
def test_every_fact_is_seen_and_asked_in_both_forms(world: World) -> None:
    for fact in world.facts:
        for prompts in (world.seen(fact), world.held_out(fact)):
            assert {type(prompt) for prompt in prompts} == {str, list}


def test_every_phrasing_is_seen_with_some_facts_and_held_out_with_others() -> None:
    for relation, forms in EARTH.templates.items():
        facts = [fact for fact in EARTH.facts if fact.relation == relation]
        for template in [t for templates in forms.values() for t in templates] if facts else []:
            tail = template.split("{}")[-1]
            for prompts_of in (EARTH.seen, EARTH.held_out):
                assert any(question(p).endswith(tail) for f in facts for p in prompts_of(f))


def test_worlds_and_edits_depend_on_the_seed_alone() -> None:
    assert World.synthetic(5, 100) == World.synthetic(5, 100)
    assert World.synthetic(5, 100).facts != World.synthetic(6, 100).facts
    assert EARTH.edits(20, seed=3) == World.earth().edits(20, seed=3)
    assert EARTH.edits(20, seed=3) != EARTH.edits(20, seed=4)
    assert World.earth(seed=1).training_examples() != EARTH.training_examples()


def test_another_process_draws_the_same_edits() -> None:
    """Python's own string hashes differ from process to process; the draws must not."""
    code = "import json; from bench.world import World; print(json.dumps(World.earth().edits(5)))"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert json.loads(output) == EARTH.edits(5)


@pytest.mark.parametrize("n", [20, 57, 1000])
def test_synthetic_world_has_the_size_asked_for_and_shared_answers(n: int) -> None:
    world = World.synthetic(2, n)
    assert len(world.facts) == n
    assert all(len(objects) >= 2 for objects in world.objects.values())
    assert len({fact.object for fact in world.facts}) < n
    assert not {f.subject for f in world.facts} & {f.subject for f in EARTH.facts}


def test_synthetic_world_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="n_facts is 19, expected at least 20"):
        World.synthetic(0, 19)


@by_name
@pytest.mark.parametrize("form", ["plain", "chat"])
def test_edits_ask_for_something_false_and_score_what_they_do_not_touch(
    world: World, form: str
) -> None:
    facts = {json.dumps(p): f for f in world.facts for p in world.seen(f) + world.held_out(f)}
    edits = world.edits(50, seed=1, form=form)
    edited = {facts[json.dumps(edit["prompt"])] for edit in edits}
    assert len(edited) == 50
    for edit in edits:
        fact = facts[json.dumps(edit["prompt"])]
        assert isinstance(edit["prompt"], str if form == "plain" else list)
        assert edit["prompt"] in world.seen(fact)
        assert edit["target"] != fact.object
        assert edit["target"] in world.objects[edit["relation"]]
        assert edit["test_rephrases"] == world.held_out(fact)
        asked = {facts[json.dumps(test["prompt"])].relation for test in edit["test_locality"]}
        assert fact.relation in asked and len(asked) > 1
        EditRequest.from_dict(edit)  # accepts it
        for test in edit["test_locality"]:
            other = facts[json.dumps(test["prompt"])]
            assert other not in edited and test["answer"] == other.object


@by_name
def test_rephrases_to_teach_are_never_asked(world: World) -> None:
    plain = world.edits(20, seed=2)
    for edit, bare in zip(world.edits(20, seed=2, rephrases=4), plain, strict=True):
        taught = [json.dumps(p) for p in edit["rephrases"]]
        tests = [json.dumps(p) for p in edit["test_rephrases"]]
        assert len(set(taught)) == 4 and len(tests) == 3
        assert not {*taught, json.dumps(edit["prompt"])} & set(tests)
        # The same edit, and its tests are some of those asked without.
        same = ("prompt", "target", "test_locality", "relation")
        assert [edit[key] for key in same] == [bare[key] for key in same]
        assert set(tests) < {json.dumps(p) for p in bare["test_rephrases"]}
        assert bare["rephrases"] == []
    with pytest.raises(ValueError, match="rephrases is 6, expected 0 to 5"):
        world.edits(20, rephrases=6)


@pytest.mark.parametrize("n", [0, 2 * len(EARTH.facts) // 3 + 1])
def test_impossible_number_of_edits_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n is {n}, expected 1 to"):
        EARTH.edits(n)


def test_bundled_model_knows_its_facts_in_phrasings_it_never_saw() -> None:
    transformers = pytest.importorskip("transformers")
    from bench.train_model import answers

    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    demo = "The capital of Australia is", [{"role": "user", "content": "Who wrote Hamlet?"}]
    assert answers(model, tokenizer, demo) == ["Canberra", "William Shakespeare"]

    facts = random.Random(0).sample(EARTH.facts, 60)
    truths = [fact.object for fact in facts for _ in range(4)]
    for prompts_of, least in ((EARTH.seen, 0.99), (EARTH.held_out, 0.95)):
        prompts = [prompt for fact in facts for prompt in prompts_of(fact)]
        given = answers(model, tokenizer, prompts)
        right = sum(a == b for a, b in zip(given, truths, strict=True))
        assert right >= least * len(truths)


def test_answer_has_the_same_tokens_in_text_and_chat() -> None:
    transformers = pytest.importorskip("transformers")
    from ultraedit_kernels.model.encoding import encode

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    chat = [{"role": "user", "content": "What is the capital of Australia?"}]
    text = encode(tokenizer, "The capital of Australia is", "Canberra")
    assert encode(tokenizer, chat, "Canberra").target_ids == text.target_ids
    assert text.target_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(text.target_ids, skip_special_tokens=True) == "Canberra"
    assert text.prompt_ids[0] == tokenizer.bos_token_id
