from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ultraedit_kernels.evaluation.loaders import load_edits, split_turns
from ultraedit_kernels.model.request import EditRequest, LocalityTest, PortabilityTest, check_turn

EDITS = Path(__file__).parents[1] / "fixtures" / "edits"
CHAT = [{"role": "user", "content": "Who wrote The Tin Orchard?"}]


def load_one(name: str) -> EditRequest:
    (request,) = load_edits(EDITS / name)
    return request


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


# The layouts.


def test_own_records() -> None:
    first, second = load_edits(EDITS / "own.json")
    assert first == EditRequest(
        "The capital of Zedonia is",
        "Marrow",
        rephrases=("Zedonia's capital is called",),
        locality=("The capital of Ruvalia is",),
        test_rephrases=("The seat of Zedonia's government is",),
        test_locality=(
            LocalityTest("The currency of Zedonia is", "the zed"),
            LocalityTest("The anthem of Zedonia is"),
        ),
        relation="capital",
    )
    assert second == EditRequest(CHAT, "Ada Quill")


def test_jsonl() -> None:
    expected = [
        EditRequest("The capital of Zedonia is", "Marrow"),
        EditRequest("The river of Marrow is", "the Lisp", relation="river"),
    ]
    assert load_edits(EDITS / "own.jsonl") == expected


def test_zsre_alt_is_the_new_answer_and_empty_ones_are_left_out() -> None:
    with pytest.warns(UserWarning, match=r"left out 1 of 2 records.*record 1"):
        request = load_one("zsre_mend.json")
    assert request == EditRequest(
        "What is made by Tarn Motors?",
        "kites",
        test_rephrases=("What does Tarn Motors make?",),
        test_locality=(LocalityTest("nq question: who painted the blue ladder", "Mina Holt"),),
    )


def test_zsre_ans() -> None:
    request = load_one("zsre_ans.json")
    assert (request.prompt, request.target) == ("Which country is Pell in?", "Ruvalia")
    assert request.test_rephrases == ("Pell lies in which country?",)


def test_counterfact_rome() -> None:
    assert load_one("counterfact_rome.json") == EditRequest(
        "Ola Fenn plays the",
        "harp",
        test_rephrases=(
            "Shorter days came. Ola Fenn performs on the",
            "Ola Fenn masters the",
        ),
        test_locality=(
            LocalityTest("Bo Reed plays the", "drum"),
            LocalityTest("Ina Sol is known for the", "drum"),
        ),
        relation="P1303",
    )


def test_counterfact_easyedit() -> None:
    assert load_edits(EDITS / "counterfact_easyedit.json") == [
        EditRequest(
            "Ola Fenn plays the",
            "harp",
            test_rephrases=("Ola Fenn performs on the",),
            test_locality=(LocalityTest("Bo Reed plays the", "drum"),),
        ),
        EditRequest("Bo Reed lives in", "Marrow"),
    ]


def test_knowedit() -> None:
    assert load_one("knowedit.json") == EditRequest(
        "The birthplace of Ola Fenn is",
        "Marrow",
        test_rephrases=("The birthplace of O. Fenn is",),
        test_locality=(
            LocalityTest("The mother of Ola Fenn is", "Una Fenn"),
            LocalityTest("The employer of Ola Fenn is"),
            LocalityTest("A former band of Ola Fenn is", "The Mills"),
        ),
        test_portability=(PortabilityTest("The country of birth of Ola Fenn is", "Zedonia"),),
    )
    assert load_one("knowedit_wikibio.json") == EditRequest(
        "This is a passage about Ola Fenn. Ola Fenn plays the harp.",
        "She was born in Marrow in 1954.",
        test_locality=(LocalityTest("Bo Reed was born in", "Pell"),),
    )


def test_ultraeditbench() -> None:
    assert load_one("ultraeditbench.json") == EditRequest(
        "In which town was the Tin Orchard written?",
        "Pell",
        test_rephrases=("The Tin Orchard was written in which town?",),
        test_locality=(LocalityTest("Which river runs through Marrow?", "the Lisp"),),
    )


def test_wikibigedit() -> None:
    assert load_edits(EDITS / "wikibigedit.json") == [
        EditRequest(
            "Who is the chief executive of Tarn Motors?",
            "Kit Lark",
            test_rephrases=(
                "Which person leads Tarn Motors?",
                "Ahoy, who be at the helm o' Tarn Motors?",
            ),
            test_locality=(LocalityTest("Who founded the Long Bridge Company?", "Una Fenn"),),
            test_portability=(
                PortabilityTest("Where was the chief executive of Tarn Motors born?", "Pell"),
            ),
        ),
        EditRequest(
            "Who is the mayor of Pell?",
            "Bo Reed",
            test_rephrases=("Pell is governed by which mayor?",),
        ),
    ]


def test_fever() -> None:
    assert load_one("fever.json") == EditRequest(
        "The Long Bridge is made of glass.",
        "true",
        test_rephrases=(
            "Glass is what the Long Bridge is made of.",
            "The Long Bridge is a glass bridge.",
        ),
        test_locality=(LocalityTest("Marrow lies on the Lisp.", "true"),),
    )


def test_mquake_gives_each_edit_once() -> None:
    assert load_edits(EDITS / "mquake.json") == [
        EditRequest(
            "The author of The Tin Orchard is",
            "Bo Reed",
            test_rephrases=("Who wrote The Tin Orchard?",),
            relation="P50",
        ),
        EditRequest(
            "Bo Reed is a citizen of",
            "Zedonia",
            test_rephrases=("Of which country is Bo Reed a citizen?",),
            relation="P27",
        ),
    ]


@pytest.mark.parametrize("path", sorted(EDITS.glob("*.json")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_layout_is_the_same_as_jsonl_and_published_sets_teach_no_test_question(
    path: Path, tmp_path: Path
) -> None:
    requests = load_edits(path)
    lines = tmp_path / "lines.txt"  # not even the suffix says that it is JSONL
    lines.write_text("\n".join(map(json.dumps, json.loads(path.read_text()))) + "\n")
    if len(json.loads(path.read_text())) > 1:
        assert load_edits(lines) == requests
    assert load_edits(lines.rename(tmp_path / "lines.jsonl")) == requests
    if path.stem != "own":
        assert all(r.rephrases == () and r.locality == () for r in requests)


# Wrong files.

GOOD = '{"prompt": "a", "target": "b"}'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.json", "", "file is empty"),
        ("e.jsonl", " \n\n", "file is empty"),
        ("e.json", "[]", "list is empty"),
        ("e.json", GOOD, "holds dict, expected a list"),
        ("e.json", '"text"', "holds str, expected a list"),
        ("e.json", f"[{GOOD}", "not JSON.*complete"),
        ("e.json", f'[{GOOD}, {{"prompt": "c", "tar', "not JSON.*complete"),
        ("e.json", "prompt,target\na,b", "not JSON"),
        ("e.jsonl", f'{GOOD}\n{{"prompt": ', r"not JSON.*record 1 \(line 2\)"),
        ("e.jsonl", f"\n{GOOD}\n\n3\n", r"record 1 \(line 4\): got int, expected an object"),
        ("e.json", f"[{GOOD}, null]", "record 1: got null, expected an object"),
        ("e.json", f'[{GOOD}, {{"prompt": "c"}}]', "record 1: field 'target' is missing"),
        ("e.json", '[{"prompt": "c", "target": " "}]', "record 0: target is only white space"),
        ("e.json", '[{"prompt": "c", "targt": "d"}]', "record 0: unknown field 'targt'.*'target'"),
        ("e.json", '[{"question": "c"}]', r"record 0: the fields \['question'\].*no known layout"),
        ("e.json", '[{"src": "c", "rephrase": "d"}]', "record 0: field 'alt' or 'ans' is missing"),
        ("e.json", '[{"src": "c", "ans": 4}]', "record 0: field 'ans' is int"),
        ("e.json", '[{"src": "", "ans": "d"}]', "record 0: prompt is empty"),
        ("e.json", '[{"src": "c", "alt": ""}]', "no record has a new answer"),
        ("e.json", '[{"update": "c", "ans": "d", "loc": 4}]', "field 'loc' is int"),
        ("e.json", '[{"requested_rewrite": {"prompt": "{}"}}]', "field 'subject' is missing"),
        ("e.json", '[{"requested_rewrite": [7]}]', "field 'prompt' is missing"),
        ("e.json", '[{"requested_rewrite": []}]', "no record has a new answer"),
        ("e.json", '[{"prompt": "c", "target_new": "d", "locality": [1]}]', "'locality' is list"),
        ("e.json", '[{"prompt": "\\ud800", "target": "d"}]', "lone surrogate"),
    ],
)
def test_wrong_files_are_named(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_edits(path)
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
