"""The served model's tokenizer, for server and worker: it renders chat as the server does."""

from __future__ import annotations

import copy
import functools
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm.renderers import ChatParams
from vllm.renderers.hf import resolve_chat_template
from vllm.renderers.registry import renderer_from_config
from vllm.tokenizers import cached_tokenizer_from_config

from ultraedit_kernels.integrations.vllm.twin.refuse import check_format
from ultraedit_kernels.model.generation import Penalties


@dataclass(frozen=True)
class Rendering:
    """The server's options by which it makes a prompt of messages."""

    chat_template: str | None = None
    """In place of the tokenizer's own."""
    content_format: str = "auto"
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Default arguments of the template."""

    def as_data(self) -> dict[str, Any]:
        """For the way to the worker; `Rendering(**data)` is the way back."""
        return asdict(self)

    def resolved(self, tokenizer: Any) -> Rendering:
        """With the template that `load_tokenizer` has found, so that no worker looks for it again,
        which takes a while; the same if it has found none."""
        template = getattr(tokenizer, "chat_template", None)
        return replace(self, chat_template=template) if isinstance(template, str) else self


def load_tokenizer(config: Any, rendering: Rendering, renderer: Any = None) -> Any:
    """A tokenizer of one's own (the library's are not safe to share between threads), whose
    `apply_chat_template` is vLLM's renderer with the server's options. None if vLLM has none.

    Args:
        config: vLLM's `VllmConfig`.
        rendering: the server's options.
        renderer: vLLM's, of these options; by default one is made for the first chat prompt.

    Raises:
        UnsupportedModelError: vLLM reads a format from which no twin can be made.
    """
    found: Any = cached_tokenizer_from_config(config.model_config)
    check_format(config.model_config.hf_config, found)
    if found is None:
        return None
    tokenizer: Any = copy.deepcopy(found)

    @functools.cache
    def render() -> Any:  # it has tokenizers of its own, whose copying takes a while
        return (renderer or renderer_from_config(config)).render_messages

    def apply_chat_template(messages: list[dict[str, str]], **options: Any) -> str:
        # As a request's: its own options go over the server's defaults.
        opened = bool(options.get("add_generation_prompt", False))
        own = {"add_generation_prompt": opened, "continue_final_message": False, "tokenize": False}
        kwargs = rendering.kwargs | own
        params = ChatParams(rendering.chat_template, rendering.content_format, kwargs)
        _, prompt = render()([dict(m) for m in messages], params)
        if "prompt" in prompt:
            return str(prompt["prompt"])
        return str(tokenizer.decode(prompt["prompt_token_ids"]))

    template = resolve_chat_template(
        tokenizer, rendering.chat_template, None, model_config=config.model_config
    )
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.apply_chat_template = apply_chat_template
    return tokenizer


def stop_tokens(model_config: Any, tokenizer: Any) -> list[int]:
    """The tokens at which the engine ends an answer: the tokenizer's, and those of the generation
    settings that the server goes by."""
    ends = model_config.try_get_generation_config().get("eos_token_id")
    found = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])]
    return [end for end in dict.fromkeys(found) if end is not None]


def penalties_of(model_config: Any) -> Penalties:
    """What the server's default sampling parameters take from tokens that were seen."""
    defaults = model_config.get_diff_sampling_param()
    return Penalties(
        defaults.get("repetition_penalty", 1.0),
        defaults.get("presence_penalty", 0.0),
        defaults.get("frequency_penalty", 0.0),
    )
