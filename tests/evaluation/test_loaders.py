"""Turns, and files of which some records cannot be used."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraedit_kernels.evaluation.loaders import load_edits, load_numbered, sift, split_turns
from ultraedit_kernels.model.request import EditRequest, check_turn


@given(
    st.lists(
        st.builds(
            EditRequest,
            st.sampled_from("abcd"),
            st.sampled_from("xy"),
            rephrases=st.lists(st.sampled_from("cdef"), max_size=2),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
)
def test_split_turns_gives_valid_turns_in_order(requests: list[EditRequest], size: int) -> None:
    def valid(turn: list[EditRequest]) -> bool:
        try:
            check_turn(turn)
        except ValueError:
            return False
        return True

    turns = list(split_turns(requests, size))
    assert [r for turn in turns for r in turn] == requests
    assert all(len(turn) <= size and valid(turn) for turn in turns)
    for turn, after in pairwise(turns):  # no turn ends without a reason
        assert len(turn) == size or not valid([*turn, after[0]])


def test_split_turns_rejects_an_empty_size() -> None:
    with pytest.raises(ValueError, match="turn size is 0"):
        list(split_turns([EditRequest("a", "b")], 0))


# Wrong files.

GOOD = '{"prompt": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.json", "", "file is empty"),
        ("e.jsonl", " \n\n", "file is empty"),
        ("e.json", "[]", "there are no records"),
        ("e.json", GOOD, "holds dict, expected a list"),
        ("e.json", '"text"', "holds str, expected a list"),
        ("e.json", f"[{GOOD}", "not JSON.*complete"),
        ("e.json", f'[{GOOD}, {{"prompt": "c", "tar', "not JSON.*complete"),
        ("e.json", "prompt,target\na,b", "not JSON"),
        ("e.jsonl", f'{GOOD}\n{{"prompt": ', r"record 1 \(line 2\): not JSON"),
        ("e.jsonl", f"\n{GOOD}\n\n3\n", r"record 1 \(line 4\): got int, expected an object"),
        ("e.json", f"[{GOOD}, null]", "record 1: got null, expected an object"),
        ("e.json", f'[{GOOD}, {{"prompt": "c"}}]', "record 1: field 'target' is missing"),
        ("e.json", '[{"prompt": "c", "target": " "}]', "record 0: target is only white space"),
        ("e.json", '[{"prompt": "c", "targt": "d"}]', "record 0: unknown field 'targt'.*'target'"),
        ("e.json", '[{"question": "c"}]', r"record 0: the fields \['question'\].*no known layout"),
        ("e.json", '[{"src": "c", "rephrase": "d"}]', "record 0: field 'alt' or 'ans' is missing"),
        ("e.json", '[{"src": "c", "ans": true}]', "record 0: field 'ans' is bool"),
        ("e.json", '[{"src": "", "ans": "d"}]', "record 0: prompt is empty"),
        ("e.json", '[{"src": "c", "alt": ""}]', "the new answer is empty"),
        ("e.json", '[{"update": "c", "ans": "d", "loc": 4}]', "field 'loc' is int"),
        ("e.json", '[{"requested_rewrite": {"prompt": "{}"}}]', "field 'subject' is missing"),
        ("e.json", '[{"requested_rewrite": [7]}]', "field 'prompt' is missing"),
        ("e.json", '[{"requested_rewrite": []}]', "the new answer is empty"),
        ("e.json", '[{"prompt": "c", "target_new": "d", "locality": [1]}]', "'locality' holds int"),
        ("e.json", '[{"prompt": "\\ud800", "target": "d"}]', "lone surrogate"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_edits(path, strict=True)
    assert str(path) in str(caught.value)
    assert "expected" in str(caught.value)


def test_wrong_encoding_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_bytes(f"[{GOOD}]".encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_edits(path)
    path.write_bytes(f"[{GOOD}]".encode("utf-8-sig"))
    assert load_edits(path) == [EditRequest("a", "b")]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_edits(tmp_path / "none.json")


# Bad records among good ones.

BAD = [
    ("e.json", f'[{GOOD}, null, {GOOD}]', "(record 1): got null"),
    ("e.json", f'[{{"prompt": "a"}}, {GOOD}, {GOOD}]', "(record 0): field 'target' is missing"),
    ("e.json", f'[{{"q": "a"}}, {GOOD}, {GOOD}]', "(record 0): the fields ['q'] are of no known"),
    ("e.jsonl", f'{GOOD}\n{{"prompt": \n{GOOD}\n', "(record 1 (line 2)): not JSON"),
    ("e.ndjson", f'{GOOD}\n[]\n\n{GOOD}\n', "(record 1 (line 2)): got list, expected an object"),
    ("e.csv", "prompt,target\na,b\nc,\na,b\n", "(record 1 (line 3)): target is null"),
    ("e.csv", "prompt,target\na,b\na,b,c\na,b\n", "(record 1 (line 3)): 3 cells, expected"),
    ("e.tsv", 'prompt\ttarget\n"a\tb\na\tb\na\tb', "(record 0 (line 2)): no row of a table"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_a_bad_record_is_named_and_left_out(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    (path := tmp_path / name).write_text(content)
    with pytest.warns(UserWarning) as caught:
        assert load_edits(path) == [EditRequest("a", "b")] * 2
    (warning,) = caught
    assert str(warning.message).startswith(f"{path}: left out 1 of 3 records {words}")
    with pytest.raises(ValueError, match="expected") as stopped:
        load_edits(path, strict=True)
    where, reason = words[1:].split("): ", 1)
    assert str(stopped.value).startswith(f"{path}, {where}: {reason}")


def test_bytes_that_are_no_text_cost_their_record_only(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_bytes("prompt,target\na,b\nZürich,b\na,b\n".encode("cp1252"))
    with pytest.warns(UserWarning, match=r"record 1 \(line 3\)\): prompt has .*not UTF-8"):
        assert load_edits(path) == [EditRequest("a", "b")] * 2


def test_records_are_numbered_as_in_the_file(tmp_path: Path) -> None:
    (path := tmp_path / "e.json").write_text(f'[{GOOD}, null, {{"prompt": "c", "target": "d"}}]')
    with pytest.warns(UserWarning, match="left out 1 of 3"):
        numbered = load_numbered(path)
    assert numbered == [("record 0", EditRequest("a", "b")), ("record 2", EditRequest("c", "d"))]


def test_one_warning_for_a_reason() -> None:
    def use(number: int) -> list[int]:
        if number % 2:
            raise ValueError("odd" if number < 5 else "odd and large")
        return [number]

    records = [(f"record {i}", i) for i in range(8)]
    with pytest.warns(UserWarning) as caught:
        assert [n for _, n in sift("f", records, use)] == [0, 2, 4, 6]
    assert [str(warning.message) for warning in caught] == [
        "f: left out 2 of 8 records (record 1, record 3): odd",
        "f: left out 2 of 8 records (record 5, record 7): odd and large",
    ]
    with pytest.raises(ValueError, match=r"^f, record 1: odd$"):
        sift("f", records, use, strict=True)
    with pytest.raises(ValueError, match=r"^f, record 1: odd \(nor can the other 2 records"):
        sift("f", records[1::2][:3], use)
