from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.evaluation.facts import FACTS, new_model, requests, teach
from ultraedit_kernels.evaluation.scores import evaluate, normalised, record_locality
from ultraedit_kernels.model.encoding import Sequence, encode
from ultraedit_kernels.model.request import EditRequest, LocalityTest, PortabilityTest


@pytest.fixture
def tokenizer(fact_tokenizer: Any) -> Any:
    return fact_tokenizer


@pytest.fixture
def model(fact_model: LlamaForCausalLM) -> LlamaForCausalLM:
    return fact_model


def test_the_models_own_answers_score_one(model: LlamaForCausalLM, tokenizer: Any) -> None:
    edits = requests()
    before = record_locality(model, tokenizer, edits, batch_size=3)
    result = evaluate(model, tokenizer, edits, before=before, batch_size=3)
    scores = {"efficacy": 1.0, "generalization": None, "portability": None}
    scores |= {"specificity": 1.0, "specificity_gold": 1.0}
    assert result["generation"] == result["teacher_forced"] == scores
    for way in ("begins", "contains", "locft"):
        assert result[way] == scores | {"specificity": None}
    unmoved = {"first_token": 1.0, "first_five": 1.0, "kl": 0.0, "leak": 0.0}
    assert result["neighbours"] == unmoved
    assert result["edits"] == len(FACTS)
    assert "per_relation" not in result
    json.dumps(result)


def test_wrong_targets_score_zero(model: LlamaForCausalLM, tokenizer: Any) -> None:
    edits = [replace(r, target="zzz", test_rephrases=(r.prompt,)) for r in requests()]
    result = evaluate(model, tokenizer, edits)
    for regime, most in (("generation", 0.0), ("teacher_forced", 0.2)):  # z after z is a lucky hit
        assert result[regime]["efficacy"] == result[regime]["generalization"] <= most
        assert result[regime]["specificity"] is None  # nothing was recorded
        assert result[regime]["specificity_gold"] == 1.0


def test_half_right_is_wrong_under_generation_only(model: LlamaForCausalLM, tokenizer: Any) -> None:
    prompt, target = FACTS[2]
    longer = EditRequest(prompt, target + " and Bo")
    right = len(encode(tokenizer, prompt, target, append_eos=False).target_ids)
    tokens = len(encode(tokenizer, prompt, longer.target, append_eos=False).target_ids)
    result = evaluate(model, tokenizer, [longer])
    assert result["generation"]["efficacy"] == 0.0
    assert right / tokens <= result["teacher_forced"]["efficacy"] < 1.0


def test_an_answer_that_goes_on_is_wrong(tokenizer: Any) -> None:
    prompt, target = FACTS[3]
    right = encode(tokenizer, prompt, target, append_eos=False)
    endless = right.target_ids + tokenizer(" ", add_special_tokens=False)["input_ids"] * 20
    model = teach(new_model(tokenizer), [Sequence(right.prompt_ids, endless)])
    result = evaluate(model, tokenizer, [EditRequest(prompt, target)])
    (row,) = result["rows"]
    # Every token of the target, then nothing but white space, but no end.
    assert row["efficacy"]["answer"].strip() == target and not row["efficacy"]["stopped"]
    assert result["generation"]["efficacy"] == 0.0
    assert result["teacher_forced"]["efficacy"] == 1.0


def test_an_untouched_model_is_unchanged_and_an_edited_one_is_not(
    random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    edits = requests()
    before = record_locality(random_model, tokenizer, edits)
    same = evaluate(random_model, tokenizer, edits, before=before)
    assert same["generation"]["specificity"] == same["teacher_forced"]["specificity"] == 1.0
    assert same["generation"]["specificity_gold"] == 0.0
    weight = random_model.lm_head.weight.data
    kept = weight.clone()
    try:
        weight.neg_()
        other = evaluate(random_model, tokenizer, edits, before=before)
    finally:
        weight.copy_(kept)
    assert other["generation"]["specificity"] == other["teacher_forced"]["specificity"] == 0.0


def test_edits_weigh_the_same_and_rows_stay_joined(model: LlamaForCausalLM, tokenizer: Any) -> None:
    (a, x), (b, y), (c, _), (d, _) = FACTS[:4]
    edits = [
        # of its rephrases, d alone gives Marrow
        EditRequest(a, x, test_rephrases=(b, c, d), relation="capital"),
        EditRequest(b, y, test_rephrases=(b,), test_locality=(LocalityTest(a, x),)),
        EditRequest(c, "nobody", relation="author"),
    ]
    result = evaluate(model, tokenizer, edits, before=record_locality(model, tokenizer, edits))
    assert result["generation"] == {
        "efficacy": pytest.approx(2 / 3),
        "generalization": pytest.approx((1 / 3 + 1) / 2),
        "portability": None,
        "specificity": 1.0,
        "specificity_gold": 1.0,
    }
    assert result["per_relation"]["capital"]["generation"]["generalization"] == pytest.approx(1 / 3)
    assert result["per_relation"]["author"]["generation"]["efficacy"] == 0.0
    assert result["per_relation"]["author"]["edits"] == 1
    rows = result["rows"]
    assert [row["prompt"] for row in rows] == [a, b, c]
    assert [t["prompt"] for t in rows[0]["generalization"]] == [b, c, d]
    assert [t["generation"] for t in rows[0]["generalization"]] == [0.0, 0.0, 1.0]
    (locality,) = rows[1]["specificity"]
    assert (locality["prompt"], locality["gold"]) == (a, x)
    assert locality["answer"] == locality["before"] and locality["answer"].strip() == x


@pytest.mark.parametrize(
    ("target", "begins", "contains", "locft"),
    [
        ("Ada Quill", 1, 1, 1),
        ("Ada", 1, 1, 0),
        ("Quill", 0, 1, 0),
        ("quill", 0, 1, 0),
        ("the ada quill!", 0, 0, 1),
        ("Bo", 0, 0, 0),
    ],
)
def test_looser_ways_to_judge_an_answer(
    model: LlamaForCausalLM, tokenizer: Any, target: str, begins: int, contains: int, locft: int
) -> None:
    result = evaluate(model, tokenizer, [EditRequest(FACTS[2][0], target)])
    found = [result[way]["efficacy"] for way in ("begins", "contains", "locft")]
    assert found == [begins, contains, locft]


def test_locft_bf_compares_up_to_a_full_stop_or_line_end() -> None:
    assert normalised(" The  U-Boat, a\tship. It sank.\n") == "uboat ship"
    assert normalised("An answer\nand another") == "answer"
    assert normalised("\nlate") == normalised(". late") == ""
    assert normalised("theatre") == "theatre"  # no article in it


def test_what_follows_from_an_edit_is_scored_by_its_own_answer(
    model: LlamaForCausalLM, tokenizer: Any
) -> None:
    (a, x), (b, y), (c, z) = FACTS[:3]
    follows = (PortabilityTest(b, y), PortabilityTest(c, z), PortabilityTest(c, y))
    result = evaluate(model, tokenizer, [EditRequest(a, x, test_portability=follows)])
    assert result["generation"]["portability"] == pytest.approx(2 / 3)
    (row,) = result["rows"]
    assert [test["prompt"] for test in row["portability"]] == [b, c, c]


def test_neighbours_are_compared_token_by_token(
    model: LlamaForCausalLM, random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    (a, _), (b, y) = FACTS[:2]
    edits = [EditRequest(a, y.upper(), test_locality=(LocalityTest(b),))]
    before = record_locality(random_model, tokenizer, edits)
    after = evaluate(model, tokenizer, edits, before=before)["neighbours"]
    ids = torch.tensor([encode(tokenizer, b, y).prompt_ids])
    old, new = (m(input_ids=ids).logits[0, -1].log_softmax(-1) for m in (random_model, model))
    kl = float((old.exp() * (old - new)).sum().detach())
    same = float(old.argmax() == new.argmax())
    expected = {"first_token": same, "first_five": 0.0, "kl": pytest.approx(kl, rel=1e-4)}
    assert after == expected | {"leak": 1.0} and kl > 0.1
    # It was there before: nothing leaked.
    before = record_locality(model, tokenizer, edits)
    assert evaluate(model, tokenizer, edits, before=before)["neighbours"]["leak"] == 0.0


def test_taught_prompts_are_not_scored(model: LlamaForCausalLM, tokenizer: Any) -> None:
    prompt, target = FACTS[0]
    edit = EditRequest(prompt, target, rephrases=(FACTS[1][0],), locality=(FACTS[2][0],))
    result = evaluate(model, tokenizer, [edit], before=[])
    assert result["generation"]["generalization"] is None
    assert result["generation"]["specificity"] is None


def test_teacher_forcing_is_one_forward_pass_each(
    random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    edits = [EditRequest("a", "b", test_locality=tuple(LocalityTest(*f) for f in FACTS))]
    outputs = record_locality(random_model, tokenizer, edits, batch_size=4)
    for output, (prompt, target) in zip(outputs, FACTS, strict=True):
        s = encode(tokenizer, prompt, target, append_eos=False)
        logits = random_model(input_ids=torch.tensor([s.prompt_ids + s.target_ids])).logits[0]
        best = logits.argmax(-1)[len(s.prompt_ids) - 1 : -1]
        assert output.expected == tuple(s.target_ids)
        assert output.predicted == tuple(best.tolist())


def test_progress_reaches_the_end_and_the_mode_is_restored(
    random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    seen: list[tuple[int, int]] = []
    random_model.train()
    try:
        evaluate(
            random_model,
            tokenizer,
            requests(),
            batch_size=4,
            progress=lambda done, total: seen.append((done, total)),
        )
        assert random_model.training
    finally:
        random_model.eval()
    total = 3 * len(FACTS)
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_errors(random_model: LlamaForCausalLM, tokenizer: Any) -> None:
    edits = requests()
    with pytest.raises(ValueError, match="no edits to score"):
        evaluate(random_model, tokenizer, [])
    before = record_locality(random_model, tokenizer, edits)
    with pytest.raises(ValueError, match=r"before holds 13 outputs .* 14 locality tests"):
        evaluate(random_model, tokenizer, edits, before=before[1:])
    with pytest.raises(ValueError, match="call record_locality with the same requests"):
        evaluate(random_model, tokenizer, edits, before=before[::-1])
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="end-of-sequence token"):
        evaluate(random_model, endless, [EditRequest("a", "b")])
