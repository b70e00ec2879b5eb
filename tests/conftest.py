"""Without a GPU the kernels run in Triton's interpreter, which Triton decides when it is imported.

That must be here, before any test module imports Triton through transformers or vLLM. The variable
is taken back at once: vLLM's processes would inherit it. `tests/ops/kernels` sets it again for its
own calls.
"""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import ultraedit_kernels.ops.kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

BUNDLED = Path(__file__).parent.parent / "bench" / "tiny-facts"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long tests of the server at full length")


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def model():
    """The bundled model, fresh for every test."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED)
