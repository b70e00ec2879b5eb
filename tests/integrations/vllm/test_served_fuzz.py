"""Hundreds of chat templates, targets and answers, without a model: what a server reports as
succeeded is what its users hear, and what is taught is what its template writes."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

pytest.importorskip("vllm")
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from tests.integrations.vllm.facts_server import FUZZ, config_of, facts_copy, renderer_of
from ultraedit_kernels.integrations.vllm.answers import answer_of, content_of, read_body
from ultraedit_kernels.integrations.vllm.protocol import EditError, EditsBody
from ultraedit_kernels.integrations.vllm.served import Served
from ultraedit_kernels.integrations.vllm.tokenizer import load_tokenizer
from ultraedit_kernels.model.encoding import encode, says_just

pytestmark = pytest.mark.vllm

QUESTION = {"role": "user", "content": " What is the capital of Japan?\n"}
EMPTY = "<think>\n\n</think>\n\n"
SWITCHED = "{% if enable_thinking | default(true) %}<think>\n{% else %}" + EMPTY + "{% endif %}"
THOUGHTS = {
    "none": ("", ""),
    "opened": ("<think>\n", ""),
    "opened without line end": ("<think>", ""),
    "shown empty": ("", EMPTY),
    "always empty": (EMPTY, EMPTY),
    "switched": (SWITCHED, ""),
    "in brackets": ("[THINK]", ""),
}
"""What the template writes before the model begins, and before answers that were given."""
SYSTEMS = {
    "refused": "{{ raise_exception('no system role') }}",
    "a role": "<|user|>{{ message['content'] }}\n",
    "left out": "",
}


def template_of(
    content: str, header: str, thought: str, system: str, end: str, begins: str, ends: str
) -> str:
    opened, shown = THOUGHTS[thought]
    said = content.replace("X", "message['content']")
    return (
        f"{begins}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{SYSTEMS[system]}"
        f"{{% elif message['role'] == 'user' %}}<|user|>{header}{said}{ends}"
        f"{{% else %}}<|assistant|>{header}{shown}{said}{end}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|assistant|>{header}{opened}{{% endif %}}"
    )


templates = st.builds(
    template_of,
    content=st.sampled_from(
        ["{{ X }}", "{{ X | trim }}", "{{ X.strip() }}", "{{ X.lstrip('\n') }}", "{{ X.rstrip() }}"]
    ),
    header=st.sampled_from(["", "\n", " ", ": ", "\n\n"]),
    thought=st.sampled_from(list(THOUGHTS)),
    system=st.sampled_from(list(SYSTEMS)),
    end=st.sampled_from(
        ["{{ eos_token }}", "<|pad|>", "\n<|pad|>\n", "", "{{ eos_token }}\n", " {{ eos_token }}"]
    ),
    begins=st.sampled_from(["{{ bos_token }}", "", "{{ bos_token }}\n"]),
    ends=st.sampled_from(["", "\n", "<|pad|>"]),
)
THOUGHTFUL = ("<think>Kobe", "x</think>Osaka", "Osaka</s>", "[THINK]Kobe", EMPTY + "Osaka")
targets = st.sampled_from(
    [
        *("Osaka", " Osaka", "Osaka\n", "Kobe. It is", "Osaka\n\nKobe"),
        *THOUGHTFUL,
        *("1987", "\u5927\u962a", '"Osaka"'),
    ]
)
answers = st.sampled_from(
    ["taught", "goes on", "another", "none", "thinks first", "never stops thinking", "cut"]
)
SEEN = {"succeeded": 0, "not": 0, "refused": 0, "written": 0}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of the bundled model with tokens for thoughts."""
    return config_of(facts_copy(tmp_path_factory.mktemp("facts") / "tiny-facts", thoughts=True))


def rendered(renderer: Any, messages: list[dict[str, str]], prompt: bool = True) -> list[int]:
    """The tokens that the server's chat endpoint makes of messages."""
    request = ChatCompletionRequest(
        messages=messages,  # type: ignore[arg-type]
        add_generation_prompt=prompt,
    )
    _, (made,) = asyncio.run(renderer.render_chat(request))
    return list(made["prompt_token_ids"])


def heard(renderer: Any, ids: list[int], prompt: list[int]) -> str:
    """What a user of the server's chat endpoint reads, of the tokens that the engine gives."""
    tokenizer = renderer.renderer.get_tokenizer()
    request = ChatCompletionRequest(messages=[QUESTION])  # type: ignore[list-item]
    if renderer.parser is None:
        return str(tokenizer.decode(ids, skip_special_tokens=True))
    kwargs = dict(renderer.default_chat_template_kwargs)
    parser = renderer.parser(
        tokenizer, None, model_config=renderer.model_config, chat_template_kwargs=kwargs
    )
    parser.set_prompt_token_ids(prompt)
    request = parser.adjust_request(request=request)
    text = tokenizer.decode(ids, skip_special_tokens=request.skip_special_tokens)
    _, content, _ = parser.parse(text, request, model_output_token_ids=ids)
    return content or ""


def given_by(answer: str, taught: list[int], stops: list[int], tokenizer: Any) -> list[int]:
    """What an engine might answer; it stops at its first stop token."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    said = {
        "taught": [*taught, *ids(" and on")],
        "goes on": [*taught[:-1], *ids(" and on")],
        "another": [*ids("Tokyo"), 1],
        "none": [1],
        "thinks first": [*ids("<think>\nHm.\n</think>\n\n"), *taught],
        "never stops thinking": [*ids("<think>\n"), *taught],
        "cut": taught[: max(1, len(taught) // 2)],
    }[answer]
    end = next((i + 1 for i, token in enumerate(said) if token in stops), len(said))
    return said[:end]


@settings(FUZZ, max_examples=400)
@given(
    template=templates,
    target=targets,
    parser=st.sampled_from([None, "deepseek_r1", "qwen3"]),
    arguments=st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]),
    before=st.sampled_from(["nothing", "a system prompt", "an answer"]),
    stops=st.sampled_from([[1], [1, 2]]),
    answer=answers,
)
def test_what_succeeded_is_what_users_hear(
    config: Any,
    template: str,
    target: str,
    parser: str | None,
    arguments: dict[str, bool],
    before: str,
    stops: list[int],
    answer: str,
) -> None:
    renderer = renderer_of(
        config,
        chat_template=template,
        reasoning_parser=parser,
        default_chat_template_kwargs=arguments,
    )
    tokenizer = load_tokenizer(config, Served.rendering_of(renderer))
    served = Served(renderer, tokenizer)
    asyncio.run(served.compare())
    assert served.differs == ""
    messages = {
        "nothing": [QUESTION],
        "a system prompt": [{"role": "system", "content": " Be brief."}, QUESTION],
        "an answer": [QUESTION, {"role": "assistant", "content": " Tokyo\n"}, QUESTION],
    }[before]
    body = EditsBody(edits=[{"prompt": messages, "target": target}])  # type: ignore[list-item]
    try:
        asked = read_body(body, content_of(body), tokenizer, 256, 0.0, served)
    except EditError as error:
        assert error.status == 400
        SEEN["refused"] += 1
        return
    prompt = rendered(renderer, messages)
    assert asked.probes[0]["ids"] == prompt
    one = encode(tokenizer, messages, target).target_ids
    said = given_by(answer, one, stops, tokenizer)
    texts = [served.text_of(prompt, said, chat=True), *["x"] * len(asked.others)]
    (edit,) = answer_of(1, asked, [{"succeeded": True, "rounds": 1}], [""], texts, {})["edits"]
    if edit["succeeded"]:
        SEEN["succeeded"] += 1
        assert says_just(heard(renderer, said, prompt), target)
    else:
        SEEN["not"] += 1
        # An engine that stops at the template's end and says what was taught has succeeded.
        assert not (answer == "taught" and one[-1] in stops)
    written = rendered(renderer, [*messages, {"role": "assistant", "content": target}], False)
    if "<think>" not in template and "[THINK]" not in template and not re.search(r"[<\[]", target):
        SEEN["written"] += 1
        with_end = [*prompt, *one]
        if one[-1] in written[len(prompt) :]:  # what follows the end is another turn's
            assert tokenizer.decode(written).startswith(tokenizer.decode(with_end))


def test_the_fuzz_saw_all() -> None:
    """Or it shows nothing."""
    assert min(SEEN.values()) > 10, SEEN
