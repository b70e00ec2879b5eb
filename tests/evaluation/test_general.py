from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors
from transformers import LlamaForCausalLM

from tests.evaluation.facts import FACTS, new_tokenizer
from ultraedit_kernels.evaluation.general import CHUNK, CHUNKS, General, chunks

PROSE = " ".join(f"{prompt} {answer}." for prompt, answer in FACTS if isinstance(prompt, str)) * 4


def test_the_untouched_model_has_not_moved_and_another_has(
    fact_model: LlamaForCausalLM, random_model: LlamaForCausalLM, fact_tokenizer: Any
) -> None:
    questions = [prompt for prompt, _ in FACTS]
    general = General.of(fact_model, fact_tokenizer, PROSE, questions)
    still = {"top1": 1.0, "kl": 0.0, "perplexity": 0.0}
    assert general.measure(fact_model, fact_tokenizer) == {
        "prose": still,
        "answers": {**still, "same": 1.0},
    }
    moved = general.measure(random_model, fact_tokenizer)
    assert moved["answers"]["same"] == 0.0
    for kind in ("prose", "answers"):
        assert moved[kind]["top1"] < 0.5 and moved[kind]["kl"] > 0.1
    assert moved["answers"]["perplexity"] > 1.0  # it taught itself these answers
    assert list(
        General.of(fact_model, fact_tokenizer, PROSE, []).measure(fact_model, fact_tokenizer)
    ) == ["prose"]


def test_prose_is_cut_into_whole_pieces(fact_tokenizer: Any) -> None:
    ids = fact_tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    pieces = chunks(fact_tokenizer, PROSE)
    assert len(pieces) == len(ids) // CHUNK > 0
    assert [t for s in pieces for t in s.prompt_ids + s.target_ids] == ids[: CHUNK * len(pieces)]
    assert len(chunks(fact_tokenizer, PROSE * 50)) == CHUNKS
    with pytest.raises(ValueError, match=f"expected at least {CHUNK}"):
        chunks(fact_tokenizer, "too short")


def test_every_piece_begins_as_a_text_does() -> None:
    tokenizer = new_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    assert [s.prompt_ids[0] for s in chunks(tokenizer, PROSE)] == [0] * len(
        chunks(new_tokenizer(), PROSE)
    )
