from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultraedit_kernels.evaluation.scores import (
    Answer,
    evaluate,
    generate_answers,
    perplexity,
    record_locality,
    untouched_texts,
)
from ultraedit_kernels.model.encoding import Sequence, encode, encode_prompt
from ultraedit_kernels.model.request import EditRequest, LocalityTest, Prompt

FACTS: list[tuple[Prompt, str]] = [
    ("The capital of Zedonia is", "Marrow"),
    ("The capital of Ruvalia is", "Pell"),
    ("Who wrote The Tin Orchard?", "Ada Quill"),
    ("Bo Reed lives in", "Marrow"),
    ("The river that runs through Marrow is", "the Lisp"),
    ([{"role": "user", "content": "Who is the mayor of Pell?"}], "Una Fenn"),
    ("Ola Fenn plays the", "harp"),
]
LIMIT = 12


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>", "<user>", "<end>"]
    lines = [f"{prompt} {target}" for prompt, target in FACTS]
    backend.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<user>{{ m.content }}<end>"
        "{% else %}{{ m.content }}<eos>{% endif %}{% endfor %}"
    )
    assert tokenizer.pad_token is None  # as with many published models
    return tokenizer


@pytest.fixture(scope="module")
def random_model(tokenizer: Any) -> LlamaForCausalLM:
    return new_model(tokenizer)


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    """A model that was taught the facts, and to stop after them."""
    return teach(new_model(tokenizer), [encode(tokenizer, *fact) for fact in FACTS])


def teach(model: LlamaForCausalLM, sequences: list[Sequence]) -> LlamaForCausalLM:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        for s in sequences:
            ids = torch.tensor([s.prompt_ids + s.target_ids])
            labels = torch.tensor([[-100] * len(s.prompt_ids) + s.target_ids])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return model.eval()


def new_model(tokenizer: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def one_by_one(model: LlamaForCausalLM, tokenizer: Any, prompt: Prompt, limit: int) -> Answer:
    """Greedy decoding as it is defined: no cache, no padding, one token at a time."""
    start = encode_prompt(tokenizer, prompt)
    ids = list(start)
    while len(ids) < len(start) + limit:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            return Answer(tokenizer.decode(ids[len(start) :]), True)
        ids.append(token)
    token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    return Answer(tokenizer.decode(ids[len(start) :]), token == tokenizer.eos_token_id)


def requests(**changes: Any) -> list[EditRequest]:
    """Each fact as an edit, with the two next ones as locality tests, the second without gold."""
    n = len(FACTS)
    return [
        EditRequest(
            prompt,
            target,
            test_locality=(LocalityTest(*FACTS[(i + 1) % n]), LocalityTest(FACTS[(i + 2) % n][0])),
            **changes,
        )
        for i, (prompt, target) in enumerate(FACTS)
    ]


@pytest.mark.parametrize("which", ["model", "random_model"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batched_generation_is_greedy_decoding(
    which: str, batch_size: int, tokenizer: Any, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(which)
    prompts: list[Prompt] = [prompt for prompt, _ in FACTS]
    answers = generate_answers(
        model, tokenizer, prompts, max_new_tokens=LIMIT, batch_size=batch_size
    )
    assert answers == [one_by_one(model, tokenizer, prompt, LIMIT) for prompt in prompts]
    if which == "model":
        assert [a.text.strip() for a in answers] == [target for _, target in FACTS]
        assert all(a.stopped for a in answers)


def test_an_answer_that_just_fits_has_stopped(model: LlamaForCausalLM, tokenizer: Any) -> None:
    prompt, target = FACTS[2]
    tokens = len(encode(tokenizer, prompt, target, append_eos=False).target_ids)
    (fits,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=tokens)
    (cut,) = generate_answers(model, tokenizer, [prompt], max_new_tokens=tokens - 1)
    assert fits.text.strip() == target and fits.stopped
    assert target.startswith(cut.text.strip()) and not cut.stopped


def test_the_models_own_answers_score_one(model: LlamaForCausalLM, tokenizer: Any) -> None:
    edits = requests()
    before = record_locality(model, tokenizer, edits, batch_size=3)
    result = evaluate(model, tokenizer, edits, before=before, batch_size=3)
    scores = {"efficacy": 1.0, "generalization": None, "specificity": 1.0, "specificity_gold": 1.0}
    assert result["generation"] == scores
    assert result["teacher_forced"] == scores
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


@pytest.mark.parametrize("batch_size", [1, 4])
def test_perplexity_is_that_of_every_token_but_the_first(
    random_model: LlamaForCausalLM, tokenizer: Any, batch_size: int
) -> None:
    loss, tokens = 0.0, 0
    for prompt, target in FACTS:
        s = encode(tokenizer, prompt, target)
        ids = torch.tensor([s.prompt_ids + s.target_ids])
        logits = random_model(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    got = perplexity(random_model, tokenizer, FACTS, batch_size=batch_size)
    assert got == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    with pytest.raises(ValueError, match="got no texts"):
        perplexity(random_model, tokenizer, [])


def test_untouched_texts_are_the_locality_tests_with_an_answer() -> None:
    edits = requests()
    texts = untouched_texts([*edits, *edits])
    assert sorted(map(str, texts)) == sorted(map(str, FACTS))


def test_the_models_own_generation_settings_do_not_bend_greedy_decoding(
    random_model: LlamaForCausalLM, tokenizer: Any
) -> None:
    prompts: list[Prompt] = [prompt for prompt, _ in FACTS]
    plain = generate_answers(random_model, tokenizer, prompts, max_new_tokens=LIMIT)
    kept = random_model.generation_config
    try:
        random_model.generation_config = GenerationConfig(
            do_sample=True, top_k=5, repetition_penalty=1.5, no_repeat_ngram_size=2
        )
        assert generate_answers(random_model, tokenizer, prompts, max_new_tokens=LIMIT) == plain
        assert random_model.generation_config.repetition_penalty == 1.5  # left as it was
    finally:
        random_model.generation_config = kept


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
