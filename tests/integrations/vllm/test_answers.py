"""What a request is read as, and what its client is told."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")
from tests.integrations.vllm.conftest import tiny_tokenizer

pytestmark = pytest.mark.vllm

EDIT = {"prompt": "The capital of Australia is", "target": "Sydney"}
CHAT = [{"role": "user", "content": "what is the capital?"}]


def read(*edits: dict[str, Any], max_length: int = 256, **options: Any) -> Any:
    from ultraedit_kernels.integrations.vllm.answers import content_of, read_body
    from ultraedit_kernels.integrations.vllm.protocol import EditsBody

    body = EditsBody(edits=list(edits), **options)  # type: ignore[arg-type]
    return read_body(body, content_of(body), tiny_tokenizer(), max_length, 0.0)


def test_a_body_is_read_as_requests_and_probes() -> None:
    from ultraedit_kernels import EditRequest

    edit = {**EDIT, "rephrases": [CHAT], "locality": ["Paris is", CHAT]}
    asked = read(edit, {"prompt": "Rome is", "target": "Perth"}, idempotency_key="key")
    assert asked.requests == [EditRequest.from_dict(edit), EditRequest("Rome is", "Perth")]
    assert asked.key == "key" and not asked.dry_run
    tokenizer = tiny_tokenizer()
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert [probe["ids"] for probe in asked.probes] == [
        tokenizer(EDIT["prompt"])["input_ids"],
        tokenizer("Rome is")["input_ids"],
        tokenizer("Paris is")["input_ids"],
        tokenizer(chat, add_special_tokens=False)["input_ids"],
    ]
    assert asked.prompts == read(edit, {"prompt": "Rome is", "target": "x"}).prompts
    assert len(asked.prompts) == 3  # locality prompts are taught nothing


@pytest.mark.parametrize(
    ("edit", "field", "message"),
    [
        ({**EDIT, "target": " "}, "edits[1]", "target is only white space"),
        ({**EDIT, "prompt": [*CHAT, {"role": "assistant", "content": "x"}]}, "edits[1]", "ends"),
        ({**EDIT, "rephrases": ["a " * 300]}, "edits[1]", "rephrases[0] has"),
        ({**EDIT, "locality": ["a " * 300]}, "edits[1]", "locality[0] has"),
        ({**EDIT, "target": "Perth"}, "edits", "two targets"),
    ],
)
def test_what_cannot_be_asked_is_refused(edit: Any, field: str, message: str) -> None:
    from ultraedit_kernels.integrations.vllm.protocol import EditError

    with pytest.raises(EditError) as seen:
        read(EDIT, edit)
    assert (seen.value.status, seen.value.param) == (400, field)
    assert message in str(seen.value)


def test_an_answer_is_read_to_the_target_s_length_and_a_little_more() -> None:
    short, long = read(EDIT), read({**EDIT, "target": "a b c d e f g h i j k l m n o p q r s t"})
    assert short.probes[0]["max_tokens"] == 16
    assert long.probes[0]["max_tokens"] > 24
    length = len(short.probes[0]["ids"])
    assert read(EDIT, max_length=length + 8).probes[0]["max_tokens"] == 8


def test_an_edit_holds_only_if_the_engine_answers_just_the_target() -> None:
    from ultraedit_kernels.integrations.vllm.answers import answer_of

    asked = read(EDIT, {"prompt": "Rome is", "target": "x", "locality": ["a", "b"]})
    outcomes = [{"succeeded": True, "rounds": 2}, {"succeeded": True, "rounds": 3}]
    before = ["Canberra", "y", "one", "two"]
    after = [" Sydney", "x and more", "one", "three", "chat 1", "chat 2"]
    answer = answer_of(4, asked, outcomes, before, after, {"queue_ms": 1.0})
    assert answer["version"] == 4
    assert [edit["succeeded"] for edit in answer["edits"]] == [True, False]
    assert [edit["reason"] for edit in answer["edits"]] == [None, "the server answers otherwise"]
    assert [edit["before"] for edit in answer["edits"]] == ["Canberra", "y"]
    assert answer["edits"][0]["after"] == " Sydney"  # white space as it is
    assert [edit["taught"] for edit in answer["edits"]] == [["text"], ["text"]]
    asked_as = [{"role": "user", "content": "Rome is"}]
    (other,) = answer["edits"][1]["other_forms"]
    assert other == {"form": "chat", "prompt": asked_as, "after": "chat 2"}
    assert answer["specificity"]["score"] == 0.5
    assert [one["unchanged"] for one in answer["specificity"]["prompts"]] == [True, False]
    assert answer["timings"].keys() == {"queue_ms", "total_ms"}
    alone = answer_of(1, read(EDIT), outcomes[:1], ["a"], ["b", "c"], {})
    assert alone["specificity"]["score"] is None


def test_the_journal_s_note_finds_a_request_again() -> None:
    from ultraedit_kernels.integrations.vllm.answers import note_of, recorded_request
    from ultraedit_kernels.integrations.vllm.protocol import EditError

    without = read(EDIT, {"prompt": "Rome is", "target": "x"})
    keyed = read({"prompt": "Oslo is", "target": "x"}, idempotency_key="key")
    assert note_of([without], [["a", "b"]]) is None
    record = {"note": note_of([without, keyed], [["a", "b"], ["c"]])}
    request = recorded_request(keyed, record)
    assert request == {"key": "key", "body": keyed.content, "first": 2, "before": ["c"]}
    other = read({"prompt": "Oslo is", "target": "y"}, idempotency_key="key")
    with pytest.raises(EditError, match="another body") as seen:
        recorded_request(other, record)
    assert seen.value.status == 409
