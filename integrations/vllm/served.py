"""What the server itself makes of prompts and of answers: the measure of what users get."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.renderers.online_renderer import OnlineRenderer

from ultraedit_kernels.integrations.vllm.tokenizer import Rendering
from ultraedit_kernels.model.chat import render_turn
from ultraedit_kernels.model.encoding import encode_prompt
from ultraedit_kernels.model.generation import text_after
from ultraedit_kernels.model.request import Prompt

logger = init_logger("vllm.ultraedit")

WORD = "Sydney"
USER = {"role": "user", "content": f"  What is it?\n{WORD} or <b>Canberra</b>? "}
SAMPLES: tuple[Prompt, ...] = (
    "The capital of Australia is",
    [USER],
    [USER, {"role": "assistant", "content": f" {WORD}\n"}, {"role": "user", "content": "Why?"}],
    [{"role": "system", "content": "Be brief. "}, USER],
)
"""By these our prompts are compared with the server's."""


class Served:
    """The server's renderer, and its parser of answers.

    Args:
        renderer: the server's; None outside a server, where answers are taken as they are.
        tokenizer: ours, see `load_tokenizer`.

    Attributes:
        differs: why chat prompts are not rendered as the server does it, once `compare` has found
            that they are not; empty if they are.
        keep_special: whether special tokens stay in what is read of a chat's answer.
    """

    def __init__(self, renderer: OnlineRenderer | None, tokenizer: Any) -> None:
        self._renderer, self._tokenizer = renderer, tokenizer
        self.differs = ""
        self.keep_special = False
        if self._parses:
            request = self._parser().adjust_request(request=_request([USER]))
            self.keep_special = not request.skip_special_tokens

    @staticmethod
    def rendering_of(renderer: OnlineRenderer | None) -> Rendering:
        """The server's options."""
        if renderer is None:
            return Rendering()
        kwargs = dict(renderer.default_chat_template_kwargs)
        return Rendering(renderer.chat_template, renderer.chat_template_content_format, kwargs)

    async def compare(self) -> None:
        """See that our prompts are the server's, token for token.

        Raises:
            RuntimeError: those of text are not.
        """
        if self._renderer is None:
            return
        for prompt in SAMPLES:
            try:
                ours = encode_prompt(self._tokenizer, prompt)
            except Exception:  # as the template refuses system prompts, which the server does, too
                ours = None
            theirs = await self._server_ids(prompt)
            if ours == theirs:
                continue
            what = f"got {ours}, expected the server's {theirs}, for {prompt!r}"
            if isinstance(prompt, str):
                raise RuntimeError(f"text is not tokenised as the server does it: {what}")
            self.differs = f"chat is not rendered as this server does it: {what}"
            logger.warning("UltraEdit: chat edits are refused: %s", self.differs)
            return

    def warn_of_end(self, stops: Seq[int]) -> None:
        """Warn if the engine does not stop where the chat template ends a turn."""
        try:
            end = render_turn(self._tokenizer, [USER], WORD).end
        except Exception:  # no template, or one that refuses everything: no chat either
            return
        if end is not None and end not in stops:
            logger.warning("UltraEdit: %s", goes_on(self._tokenizer, end, stops))

    def heard(self, text: str, ids: Seq[int], prompt: Seq[int]) -> str:
        """What a user of the chat endpoint gets as content.

        Args:
            text: the answer, as the engine gives it.
            ids: its tokens.
            prompt: those of the prompt.
        """
        if not self._parses:
            return text
        parser = self._parser()
        parser.set_prompt_token_ids(list(prompt))
        request = _request([USER])
        _, content, _ = parser.parse(text, request, model_output_token_ids=list(ids))
        return content or ""

    def text_of(self, prompt: Seq[int], ids: Seq[int], chat: bool) -> str:
        """What a user gets of an answer in tokens."""
        special = chat and self.keep_special
        text = text_after(self._tokenizer, prompt, ids, skip_special_tokens=not special)
        return self.heard(text, ids, prompt) if chat else text

    @property
    def _parses(self) -> bool:
        return self._renderer is not None and self._renderer.parser is not None

    def _parser(self) -> Any:
        renderer = self._renderer
        assert renderer is not None and renderer.parser is not None
        return renderer.parser(
            renderer.renderer.get_tokenizer(),
            None,
            model_config=renderer.model_config,
            chat_template_kwargs=dict(renderer.default_chat_template_kwargs),
        )

    async def _server_ids(self, prompt: Prompt) -> list[int] | None:
        """The server's tokens of a prompt; None if it refuses."""
        assert self._renderer is not None
        try:
            if isinstance(prompt, str):
                request = CompletionRequest(prompt=prompt, max_tokens=1)
                inputs: Any = await self._renderer.render_completion(request)
            else:
                _, inputs = await self._renderer.render_chat(_request(prompt))
            return list(inputs[0]["prompt_token_ids"])
        except (VLLMValidationError, ValueError, TypeError):  # also an answer that is an error
            return None


def goes_on(tokenizer: Any, end: int, stops: Seq[int]) -> str:
    """What to say of a template's end of turn that is no stop token."""
    token, others = (tokenizer.convert_ids_to_tokens(ids) for ids in (end, list(stops)))
    return (
        f"the chat template ends an answer with {token!r}, at which this server does not stop (it "
        f"stops at {', '.join(map(repr, others))}): answers go on after it, and no chat edit "
        'succeeds; add it to "eos_token_id" in generation_config.json'
    )


def _request(messages: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(messages=messages, max_tokens=1)
