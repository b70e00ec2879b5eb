"""What is taught is what the server itself makes of messages, and what its users get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from tests.integrations.vllm.facts_server import BUNDLED, FUZZ, config_of, facts_copy, renderer_of
from ultraedit_kernels import Editor
from ultraedit_kernels.integrations.vllm.answers import answer_of, content_of, read_body
from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.served import Served, goes_on
from ultraedit_kernels.integrations.vllm.tokenizer import (
    Rendering,
    load_tokenizer,
    penalties_of,
    stop_tokens,
)
from ultraedit_kernels.model.encoding import encode, encode_prompt, says_just
from ultraedit_kernels.model.generation import generate

pytestmark = pytest.mark.vllm

TEMPLATE = (BUNDLED / "chat_template.jinja").read_text()
QUESTION = {"role": "user", "content": "What is the capital of Japan?"}
SWITCHED = TEMPLATE.replace(
    "<|assistant|>{% endif %}",
    "<|assistant|>{% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
PARTS = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the bundled model with tokens for thoughts."""
    return config_of(facts_copy(tmp_path_factory.mktemp("facts") / "tiny-facts", thoughts=True))


@pytest.fixture
def serve(config: Any) -> Callable[..., tuple[Any, Any, Served]]:
    def of(**options: Any) -> tuple[Any, Any, Served]:
        renderer = renderer_of(config, **options)
        tokenizer = load_tokenizer(config, Served.rendering_of(renderer))
        return renderer, tokenizer, Served(renderer, tokenizer)

    return of


def server_ids(renderer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The prompt that the server's chat endpoint gives to the engine."""
    request = ChatCompletionRequest(messages=messages)  # type: ignore[arg-type]
    _, (prompt,) = asyncio.run(renderer.render_chat(request))
    return list(prompt["prompt_token_ids"])


def read(tokenizer: Any, served: Served, **edit: Any) -> Any:
    body = EditsBody(edits=[edit])  # type: ignore[list-item]
    return read_body(body, content_of(body), tokenizer, 256, 0.0, served)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"chat_template": SWITCHED},
        {"chat_template": SWITCHED, "default_chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template": PARTS},
        {"chat_template_content_format": "string"},
    ],
    ids=["its own", "thinking", "default arguments", "content in parts", "format"],
)
def test_prompts_are_the_server_s_token_for_token(serve: Any, options: Any) -> None:
    renderer, tokenizer, served = serve(**options)
    asyncio.run(served.compare())
    assert served.differs == ""
    ids = server_ids(renderer, [QUESTION])
    assert encode_prompt(tokenizer, [QUESTION]) == ids
    assert read(tokenizer, served, prompt=[QUESTION], target="Osaka").probes[0]["ids"] == ids


def test_a_prompt_that_is_not_the_server_s_is_refused(serve: Any) -> None:
    renderer, tokenizer, served = serve()
    renderer.chat_template = TEMPLATE.replace("<|user|>", "<|user|>Q: ")
    asyncio.run(served.compare())
    with pytest.raises(EditError, match="not rendered as this server does it") as seen:
        read(tokenizer, served, prompt=[QUESTION], target="Osaka")
    assert seen.value.status == 501
    assert read(tokenizer, served, prompt="The capital of Japan is", target="Osaka").requests


def test_a_target_is_taught_after_the_thought_or_refused(serve: Any) -> None:
    _, tokenizer, served = serve(chat_template=SWITCHED, reasoning_parser="deepseek_r1")
    one = encode(tokenizer, [QUESTION], "Osaka")
    assert served.text_of(one.prompt_ids, one.target_ids, chat=True).strip() == "Osaka"
    assert "</think>" in tokenizer.decode(one.target_ids)
    assert read(tokenizer, served, prompt=[QUESTION], target="Osaka").requests
    _, tokenizer, served = serve(reasoning_parser="deepseek_r1")  # whose template opens none
    with pytest.raises(EditError, match="takes the rest for thoughts") as seen:
        read(tokenizer, served, prompt=[QUESTION], target="Osaka")
    assert seen.value.status == 400


def test_an_end_of_turn_that_does_not_stop_the_engine_is_named(
    serve: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(
        "ultraedit_kernels.integrations.vllm.served.logger.warning",
        lambda text, *args: said.append(text % args),
    )
    padded = TEMPLATE.replace("{{ eos_token }}", "<|pad|>")
    _, tokenizer, served = serve(chat_template=padded)
    stops = stop_tokens(config.model_config, tokenizer)
    assert stops == [1]
    served.warn_of_end([1, 2])
    assert said == []
    served.warn_of_end(stops)
    assert "'<|pad|>'" in said[0]
    asked = read(tokenizer, served, prompt=[QUESTION], target="Osaka")
    assert asked.ends == [2]
    why = goes_on(tokenizer, 2, stops)
    after = ["Osaka and on", *["x"] * len(asked.others)]
    outcomes = [{"succeeded": True, "rounds": 1}]
    answer = answer_of(1, asked, outcomes, ["Tokyo"], after, {}, lambda end: why)
    (edit,) = answer["edits"]
    assert not edit["succeeded"] and why in edit["reason"]


def test_ends_and_penalties_are_those_of_the_server(tmp_path: Path) -> None:
    generation = {"eos_token_id": [1, 2], "repetition_penalty": 1.5}
    folder = facts_copy(tmp_path / "tiny-facts", generation=generation)
    config = config_of(folder, override_generation_config={"temperature": 0})
    tokenizer = load_tokenizer(config, Served.rendering_of(None))
    assert stop_tokens(config.model_config, tokenizer) == [1, 2]
    assert penalties_of(config.model_config).repetition == 1.5


def template_of(trim: bool, thought: str, system: str, end: str, begins: str) -> str:
    content = "{{ message['content'] | trim }}" if trim else "{{ message['content'] }}"
    empty = "<think>\n\n</think>\n\n" if thought == "shown empty" else ""
    systems = {
        "refused": "{{ raise_exception('no system role') }}",
        "a role": "<|user|>" + content,
        "left out": "",
    }
    opened = {"opened": "<think>\n", "opened without line end": "<think>"}.get(thought, "")
    return (
        f"{begins}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{systems[system]}"
        f"{{% elif message['role'] == 'user' %}}<|user|>{content}"
        f"{{% else %}}<|assistant|>{empty}{content}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|assistant|>{opened}{{% endif %}}"
    )


templates = st.builds(
    template_of,
    trim=st.booleans(),
    thought=st.sampled_from(["none", "opened", "opened without line end", "shown empty"]),
    system=st.sampled_from(["refused", "a role", "left out"]),
    end=st.sampled_from(["{{ eos_token }}", "<|pad|>", "\n<|pad|>\n", "", "{{ eos_token }}\n"]),
    begins=st.sampled_from(["{{ bos_token }}", "", "{{ bos_token }}\n"]),
)


@pytest.fixture(scope="module")
def editor(config: Any) -> Editor:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = config.model_config.model
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Editor(model, tokenizer, anchors=0, max_change=100.0, max_lost=1.0)


SEEN = {"succeeded": 0, "refused": 0}


@settings(FUZZ, max_examples=25)
@given(
    template=templates,
    parser=st.sampled_from(["", "deepseek_r1"]),
    system=st.booleans(),
    target=st.sampled_from(["Osaka", " Osaka", "Osaka\n", "Kobe. It is"]),
    stops=st.sampled_from([[1], [1, 2]]),
)
def test_what_succeeded_is_the_server_s_own_chat_answer(
    serve: Any,
    editor: Editor,
    template: str,
    parser: str,
    system: bool,
    target: str,
    stops: list[int],
) -> None:
    """Whatever the template trims, opens, refuses and ends with."""
    renderer, tokenizer, served = serve(chat_template=template, reasoning_parser=parser or None)
    messages = [{"role": "system", "content": " Be brief."}] * system + [QUESTION]
    asyncio.run(served.compare())
    assert served.differs == ""
    try:
        asked = read(tokenizer, served, prompt=messages, target=target)
    except EditError as error:
        assert error.status == 400
        SEEN["refused"] += 1
        return
    editor.tokenizer = tokenizer
    editor.model.generation_config.eos_token_id = stops
    outcome = editor.apply(asked.requests).edits[0]
    probes = [probe["ids"] for probe in asked.asked_after]
    said = generate(editor.model, tokenizer, probes, max_new_tokens=24)
    texts = [
        served.text_of(probe["ids"], ids, probe["chat"])
        for probe, ids in zip(asked.asked_after, said, strict=True)
    ]
    outcomes = [{"succeeded": outcome.succeeded, "rounds": outcome.rounds}]
    (edit,) = answer_of(1, asked, outcomes, [""], texts, {})["edits"]
    ids = server_ids(renderer, messages)
    (heard,) = generate(editor.model, tokenizer, [ids], max_new_tokens=24)
    editor.rollback(0)
    text = tokenizer.decode(heard, skip_special_tokens=True)
    if parser:
        request = ChatCompletionRequest(messages=messages)  # type: ignore[arg-type]
        own = renderer.parser(tokenizer, None, model_config=renderer.model_config)
        _, content, _ = own.parse(text, request, model_output_token_ids=heard)
        text = content or ""
    SEEN["succeeded"] += edit["succeeded"]
    if edit["succeeded"]:
        assert says_just(text, target), (text, target)
    if outcome.succeeded and asked.ends[0] in stops:
        assert edit["succeeded"], edit


def test_the_fuzz_saw_both() -> None:
    """Or it shows nothing."""
    assert SEEN["succeeded"] > 3 and SEEN["refused"] > 0


@pytest.mark.parametrize("found", [None, {"tool_use": "{{ messages }}"}])
def test_a_template_that_was_found_is_told_to_workers_and_none_is_not(found: Any) -> None:
    rendering = Rendering(content_format="string")
    told = rendering.resolved(SimpleNamespace(chat_template="{{ messages }}"))
    assert told == Rendering("{{ messages }}", "string")
    for tokenizer in (None, object(), SimpleNamespace(chat_template=found)):
        assert rendering.resolved(tokenizer) == rendering
