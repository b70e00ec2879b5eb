"""What a model says: greedy answers and, of a model in this process, predictions under its answers.

The judge asks a model in this process, or with `ServedModel` one behind a server: the same
questions, the same answers, but of a served model no predictions.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ultraedit_kernels.model.capture import evaluation_mode
from ultraedit_kernels.model.encoding import Sequence, encode, encode_prompt, pad_right
from ultraedit_kernels.model.generation import generate
from ultraedit_kernels.model.request import Prompt

LIKELIEST = 20
"""Tokens whose log-probabilities a server is asked for; vLLM tells no more by default."""


class Answer(NamedTuple):
    """What the model says to a prompt."""

    text: str
    """Decoded, without the end-of-sequence token, white space as generated."""
    stopped: bool
    """The model ended the answer within the limit."""


@dataclass(frozen=True)
class ServedModel:
    """A model behind an OpenAI-compatible server, to be judged in place of one in this process.

    Text goes to /v1/completions, messages to /v1/chat/completions, at temperature 0: the answers
    are those that users get, with the server's own tokenisation and chat template.
    """

    url: str
    """Of the server, without /v1."""
    name: str
    """Of the model, as the server knows it."""
    api_key: str | None = None
    root: str | None = None
    """Where the server has the model from, if it tells."""

    @classmethod
    def connect(cls, url: str, api_key: str | None = None) -> ServedModel:
        """The first model that a server lists.

        Raises:
            ValueError: no server answers there, or it refuses.
        """
        asked = cls(url.rstrip("/").removesuffix("/v1"), "", api_key)
        first = asked._request("/v1/models")["data"][0]
        return replace(asked, name=first["id"], root=first.get("root"))

    def answers(self, prompts: Seq[Prompt], max_new_tokens: int, parallel: int) -> list[Answer]:
        """As `generate_answers`, with so many requests under way at a time."""

        def ask(prompt: Prompt) -> Answer:
            # One token more, by which a longer answer is known.
            body = {"model": self.name, "temperature": 0, "max_tokens": max_new_tokens + 1}
            if isinstance(prompt, str):
                reply = self._request("/v1/completions", {**body, "prompt": prompt})
                (choice,) = reply["choices"]
                text = choice["text"]
            else:
                reply = self._request("/v1/chat/completions", {**body, "messages": prompt})
                (choice,) = reply["choices"]
                text = choice["message"]["content"]
            return Answer(text or "", choice["finish_reason"] == "stop")

        with ThreadPoolExecutor(parallel) as pool:
            return list(pool.map(ask, prompts))

    def next_token(self, prompt: Prompt) -> dict[str, float]:
        """Log-probabilities of the `LIKELIEST` tokens that may come next, by their text.

        Raises:
            ValueError: the server does not answer, or tells none.
        """
        body: dict[str, Any] = {"model": self.name, "temperature": 0, "max_tokens": 1}
        if isinstance(prompt, str):
            body |= {"prompt": prompt, "logprobs": LIKELIEST}
            (choice,) = self._request("/v1/completions", body)["choices"]
            told = (choice.get("logprobs") or {}).get("top_logprobs") or [{}]
            found: dict[str, float] = told[0]
        else:
            body |= {"messages": prompt, "logprobs": True, "top_logprobs": LIKELIEST}
            (choice,) = self._request("/v1/chat/completions", body)["choices"]
            told = (choice.get("logprobs") or {}).get("content") or [{"top_logprobs": []}]
            found = {one["token"]: one["logprob"] for one in told[0]["top_logprobs"]}
        if not found:
            raise ValueError(
                f"{self.url} told no log-probabilities; start it without --max-logprobs, or leave "
                "out the limit of the KL"
            )
        return found

    def _request(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            raise ValueError(
                f"{self.url}{path} answered {error.code}: {error.read().decode()[:500]}"
            ) from error
        except urllib.error.URLError as error:
            raise ValueError(
                f"no server answers at {self.url} ({error.reason}); start one, or correct the URL"
            ) from error


@dataclass(frozen=True)
class Output:
    """All that a model does at one test prompt."""

    prompt: Prompt
    answer: Answer
    expected: tuple[int, ...] = ()
    """Tokens of the expected answer without the end of sequence; empty if none is known."""
    predicted: tuple[int, ...] = ()
    """Most likely token at the place of each of them."""
    tokens: tuple[int, ...] = ()
    """The answer as generated, with the end of sequence; empty of a served model."""
    first: Tensor | None = field(default=None, compare=False, repr=False)
    """Log-probabilities of the answer's first token, float32 [vocabulary] on the CPU, if asked."""


@dataclass(frozen=True)
class Question:
    """A prompt that is asked, and the text that would be right."""

    prompt: Prompt
    expected: str | None
    """None if it is not known."""


def generate_answers(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    prompts: Seq[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[Answer]:
    """Greedy answers to text prompts or chat messages, in the order of the prompts.

    Raises:
        ValueError: messages, but the tokenizer has no chat template.
    """
    if isinstance(model, ServedModel):
        return model.answers(prompts, max_new_tokens, batch_size)
    told = _generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return [answer for answer, _ in told]


def _generate(
    model: nn.Module, tokenizer: Any, prompts: Seq[Prompt], max_new_tokens: int, batch_size: int
) -> list[tuple[Answer, tuple[int, ...]]]:
    """Answers, each with all of its tokens."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    # Room for the end of sequence, and for one token by which a longer answer is known.
    limit = max_new_tokens + 2
    told = []
    for new in generate(model, tokenizer, ids, max_new_tokens=limit, batch_size=batch_size):
        stopped = len(new) < limit
        text = tokenizer.decode(
            new[:-1] if stopped else new[:max_new_tokens], clean_up_tokenization_spaces=False
        )
        told.append((Answer(text, stopped), tuple(new)))
    return told


def answer_all(
    model: nn.Module | ServedModel,
    tokenizer: Any,
    questions: Seq[Question],
    limit: int,
    batch_size: int,
    progress: Callable[[int, int], None] | None,
    distributions: bool = False,
) -> list[Output]:
    """Generation and teacher forcing at every question, in order; batched by length.

    Args:
        limit: most tokens of an answer, without the end of sequence.
        progress: called with (questions done, questions in all) after each batch.
        distributions: keep `Output.first`, of a model in this process.

    Raises:
        ValueError: neither tokenizer nor model has an end-of-sequence token, of a model in this
            process; or a served model does not answer.
    """
    settings = getattr(model, "generation_config", None)
    ends = (tokenizer.eos_token_id, getattr(settings, "eos_token_id", None))
    if not isinstance(model, ServedModel) and ends == (None, None):
        raise ValueError(
            "neither tokenizer nor model has an end-of-sequence token, expected one, as an answer "
            "counts only if the model stops after it; set tokenizer.eos_token"
        )
    lengths = [len(encode_prompt(tokenizer, question.prompt)) for question in questions]
    order = sorted(range(len(questions)), key=lambda i: lengths[i])
    outputs: dict[int, Output] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        prompts = [questions[i].prompt for i in part]
        if isinstance(model, ServedModel):
            answers = model.answers(prompts, limit, batch_size)
            outputs |= {
                i: Output(questions[i].prompt, a) for i, a in zip(part, answers, strict=True)
            }
        else:
            told = _generate(model, tokenizer, prompts, limit, batch_size)
            sequences = [_expected(tokenizer, questions[i]) for i in part]
            forced = _predict(model, sequences, distributions)
            for i, (answer, tokens), s, (predicted, first) in zip(
                part, told, sequences, forced, strict=True
            ):
                outputs[i] = Output(
                    questions[i].prompt, answer, tuple(s.target_ids), predicted, tokens, first
                )
        if progress is not None:
            progress(len(outputs), len(questions))
    return [outputs[i] for i in range(len(questions))]


def _expected(tokenizer: Any, question: Question) -> Sequence:
    if question.expected is None:
        return Sequence(encode_prompt(tokenizer, question.prompt), [])
    return encode(tokenizer, question.prompt, question.expected, append_eos=False)


@torch.no_grad()
def _predict(
    model: Any, sequences: Seq[Sequence], distributions: bool
) -> list[tuple[tuple[int, ...], Tensor | None]]:
    """The most likely token at each target token, given the prompt and the target up to it, and if
    asked all log-probabilities at the first."""
    texts = [s.prompt_ids + s.target_ids[:-1] for s in sequences]
    ids, mask = pad_right(texts, model.get_input_embeddings().weight.device)
    first = min(len(s.prompt_ids) for s in sequences) - 1
    keep = ids.shape[1] - first
    with evaluation_mode(model):
        logits = model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits
    told = []
    for row, best, s in zip(logits, logits.argmax(-1).tolist(), sequences, strict=True):
        place = len(s.prompt_ids) - 1 - first
        at_first = row[place].float().log_softmax(-1).cpu() if distributions else None
        told.append((tuple(best[place : place + len(s.target_ids)]), at_first))
    return told
