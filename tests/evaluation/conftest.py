from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaForCausalLM

from tests.evaluation.facts import FACTS, new_model, new_tokenizer, teach
from ultraedit_kernels.model.encoding import encode


@pytest.fixture(scope="session")
def fact_tokenizer() -> Any:
    return new_tokenizer()


@pytest.fixture(scope="session")
def random_model(fact_tokenizer: Any) -> LlamaForCausalLM:
    return new_model(fact_tokenizer)


@pytest.fixture(scope="session")
def fact_model(fact_tokenizer: Any) -> LlamaForCausalLM:
    """A model that was taught the facts, and to stop after them."""
    return teach(new_model(fact_tokenizer), [encode(fact_tokenizer, *fact) for fact in FACTS])
