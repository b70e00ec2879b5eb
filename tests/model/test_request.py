from __future__ import annotations

import pytest

from ultraedit_kernels.model.request import EditRequest, LocalityTest, PortabilityTest, check_turn

CHAT = [{"role": "user", "content": "Who wrote The Tin Orchard?"}]


def test_lists_become_tuples_and_questions_become_locality_tests() -> None:
    request = EditRequest(
        "a",
        "b",
        rephrases=["c", CHAT],  # type: ignore[arg-type]
        test_locality=["d", {"prompt": CHAT, "answer": "e"}],  # type: ignore[arg-type]
        test_portability=[{"prompt": "f", "answer": "g"}],  # type: ignore[arg-type]
    )
    assert request.test_portability == (PortabilityTest("f", "g"),)
    assert request.rephrases == ("c", CHAT)
    assert request.test_locality == (LocalityTest("d"), LocalityTest(CHAT, "e"))


def test_messages_are_copied() -> None:
    messages = [dict(CHAT[0])]
    request = EditRequest(messages, "Ada Quill")
    messages[0]["content"] = "changed"
    assert request.prompt == CHAT


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"prompt": ""}, ValueError, "prompt is empty"),
        ({"prompt": " \n"}, ValueError, "prompt is only white space"),
        ({"prompt": 3}, TypeError, "prompt is int"),
        ({"prompt": None}, TypeError, "prompt is null"),
        ({"prompt": []}, ValueError, "prompt has no messages"),
        ({"prompt": ["x"]}, ValueError, r"prompt\[0\] is str"),
        ({"prompt": [{"role": "user"}]}, ValueError, r"prompt\[0\] is \['role'\]"),
        ({"prompt": [{"role": "user", "content": ""}]}, ValueError, "content is empty"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, TypeError, "content is list"),
        ({"prompt": [{"role": "assistant", "content": "x"}]}, ValueError, "assistant message"),
        ({"prompt": "\ud800"}, ValueError, "lone surrogate"),
        ({"target": ""}, ValueError, "target is empty"),
        ({"target": "\t "}, ValueError, "target is only white space"),
        ({"target": ["x"]}, TypeError, "target is list"),
        ({"rephrases": "one"}, TypeError, "rephrases is str, expected a list"),
        ({"rephrases": CHAT}, TypeError, r"rephrases\[0\] is dict"),
        ({"locality": ["ok", ""]}, ValueError, r"locality\[1\] is empty"),
        ({"test_rephrases": [1]}, TypeError, r"test_rephrases\[0\] is int"),
        ({"test_locality": [{"answer": "x"}]}, ValueError, r"test_locality\[0\].*prompt"),
        ({"test_locality": [{"prompt": "x", "answer": ""}]}, ValueError, "answer is empty"),
        ({"test_locality": [7]}, TypeError, r"test_locality\[0\].*int"),
        ({"test_portability": ["x"]}, ValueError, r"test_portability\[0\] is str"),
        ({"test_portability": [{"prompt": "x", "answer": " "}]}, ValueError, "answer is only"),
        ({"relation": 7}, TypeError, "relation is int"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, object], kind: type, words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        EditRequest.from_dict({"prompt": "a", "target": "b", **fields})
    assert "expected" in str(caught.value) and ";" in str(caught.value)


def test_from_dict_names_unknown_and_missing_fields() -> None:
    with pytest.raises(ValueError, match=r"unknown field 'rephrase'.*did you mean 'rephrases'"):
        EditRequest.from_dict({"prompt": "a", "target": "b", "rephrase": "c"})
    with pytest.raises(ValueError, match=r"unknown field 'zzz'.*remove it"):
        EditRequest.from_dict({"prompt": "a", "target": "b", "zzz": 1})
    with pytest.raises(ValueError, match="'target' is missing"):
        EditRequest.from_dict({"prompt": "a"})
    with pytest.raises(TypeError, match="edit is list"):
        EditRequest.from_dict(["a", "b"])  # type: ignore[arg-type]


def test_check_turn() -> None:
    check_turn([EditRequest("a", "x"), EditRequest("b", "x"), EditRequest(CHAT, "x")])
    # The same rephrase may be taught twice, to the same end.
    check_turn([EditRequest("a", "x", rephrases=("c",)), EditRequest("b", "x", rephrases=("c",))])
    with pytest.raises(ValueError, match="no edits"):
        check_turn([])
    with pytest.raises(ValueError, match=r"edits 0 and 2 .*'x' and 'y'"):
        check_turn([EditRequest("a", "x"), EditRequest("b", "x"), EditRequest("a", "y")])
    with pytest.raises(ValueError, match=r"edits 0 and 1 .*'x' and 'y'"):
        check_turn([EditRequest("a", "x", rephrases=("b",)), EditRequest("b", "y")])
    with pytest.raises(ValueError, match="edit 1 repeats edit 0"):
        check_turn([EditRequest(CHAT, "x"), EditRequest(CHAT, "x")])
