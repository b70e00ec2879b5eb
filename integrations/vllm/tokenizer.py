"""The served model's tokenizer, for server and worker."""

from __future__ import annotations

import copy
from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config


def load_tokenizer(model_config: Any, chat_template: str | None) -> Any:
    """A tokenizer of one's own (the library's are not safe to share between threads); None if
    vLLM has none."""
    tokenizer = copy.deepcopy(cached_tokenizer_from_config(model_config))
    if tokenizer is not None and chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
