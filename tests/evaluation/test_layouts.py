"""What records of every layout become."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from ultraedit_kernels.evaluation.layouts import read_record, repeats_edits
from ultraedit_kernels.evaluation.loaders import load_edits
from ultraedit_kernels.model.request import EditRequest, LocalityTest, PortabilityTest

EDITS = Path(__file__).parents[1] / "fixtures" / "edits"
CHAT = [{"role": "user", "content": "Who wrote The Tin Orchard?"}]


def load_one(name: str) -> EditRequest:
    (request,) = load_edits(EDITS / name)
    return request


def read_one(record: dict[str, Any]) -> EditRequest:
    (request,) = read_record(record)
    return request


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


# What users' records look like.

NAN = math.nan
KNOWEDIT = {"prompt": "Pell Tower is in", "target_new": "Marrow", "subject": "Pell Tower"}


def asked_of(**fields: Any) -> list[tuple[Any, str | None]]:
    """Locality prompts and answers of a KnowEdit record with these fields."""
    return [(t.prompt, t.answer) for t in read_one({**KNOWEDIT, **fields}).test_locality]


@pytest.mark.parametrize(
    "record",
    [
        {"src": "c", "ans": "d", "rephrase": NAN, "loc": NAN, "loc_ans": NAN},
        {"src": "c", "alt": NAN, "ans": "d"},
        {"update": "c", "ans": "d", "rephrase": NAN, "personas": NAN, "loc": NAN},
        {"prompt": "c", "ans": "d", "rephrase_prompt": NAN, "loc": NAN, "loc_ans": NAN},
        {"prompt": "c", "alt": "d", "equiv_prompt": NAN, "unrel_prompt": [NAN], "unrel_ans": NAN},
        {"prompt": "c", "target_new": "d", "portability": NAN, "locality": {"a": NAN}},
        {"prompt": "c", "target_new": {"str": "d"}, "subject": NAN, "locality": {"a": [NAN]}},
        {"requested_rewrite": {"prompt": "{}", "subject": "c", "target_new": {"str": "d"},
                               "target_true": NAN}, "paraphrase_prompts": NAN},
        {"prompt": "c", "target": "d", "rephrases": NAN, "locality": [NAN], "relation": NAN,
         "test_rephrases": None, "test_locality": math.inf},
        # Tables give every record the fields of all.
        {"prompt": "c", "target": NAN, "target_new": None, "ans": "d", "src": NAN, "text": NAN},
    ],
)  # fmt: skip
def test_not_a_number_is_null(record: dict[str, Any]) -> None:
    if "equiv_prompt" in record:  # FEVER is known by its questions, of which one must be there
        record = record | {"unrel_prompt": "e", "unrel_ans": NAN}
        assert read_one(record) == EditRequest("c", "d", test_locality=(LocalityTest("e"),))
    else:
        assert read_one(record) == EditRequest("c", "d")


def test_a_question_without_an_answer_stays_a_question() -> None:
    record = {"update": "c", "ans": "d", "personas": NAN, "loc": "e", "loc_ans": NAN}
    assert read_one(record).test_locality == (LocalityTest("e"),)
    own = {"prompt": "c", "target": "d", "test_locality": [{"prompt": "e", "answer": NAN}]}
    assert read_one(own).test_locality == (LocalityTest("e"),)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1987, "1987"),
        (1987.0, "1987"),  # a column of integers in which one is missing
        (-3.5, "-3.5"),
        (Decimal("3.10"), "3.10"),
        (10**22, "1" + 22 * "0"),
        (1e22, "1" + 22 * "0"),
    ],
)
@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "c", "target": ...},
        {"prompt": "c", "ans": ...},
        {"src": "c", "alt": ...},
        {"update": "c", "ans": [...]},
        {"prompt": "c", "target_new": ...},
        {"prompt": "c", "target_new": {"str": ...}},
        {"text": "c", "labels": [[...]]},
    ],
)
def test_a_number_as_an_answer_is_its_digits(
    record: dict[str, Any], number: Any, text: str
) -> None:
    def fill(value: Any) -> Any:
        if value is ...:
            return number
        if isinstance(value, dict):
            return {k: fill(v) for k, v in value.items()}
        return [fill(v) for v in value] if isinstance(value, list) else value

    assert read_one(fill(record)) == EditRequest("c", text)


def test_numbers_are_answers_of_test_questions_too() -> None:
    assert read_one({"src": "c", "ans": "d", "loc": "e", "loc_ans": 7}).test_locality == (
        LocalityTest("e", "7"),
    )
    own = {"prompt": "c", "target": "d", "test_locality": [{"prompt": "e", "answer": 7}]}
    assert read_one(own).test_locality == (LocalityTest("e", "7"),)


@pytest.mark.parametrize("target", [True, {"id": "Q1"}, {"str": False}, {"str": ["a", {}]}])
def test_what_is_no_answer_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match="expected text"):
        read_one({"prompt": "c", "target_new": {"str": [target]}})


def test_each_ground_truth_belongs_to_its_own_prompt() -> None:
    def asked(prompt: Any, ground_truth: Any) -> list[tuple[Any, str | None]]:
        question = {"prompt": prompt, "ground_truth": ground_truth}
        return asked_of(locality={"neighborhood": question})

    assert asked(["a", "b"], ["x", "y"]) == [("a", "x"), ("b", "y")]
    assert asked(["a", "b"], [["x", "X"], [1987]]) == [("a", "x"), ("b", "1987")]
    assert asked(["a", "b"], [None, "y"]) == [("a", None), ("b", "y")]
    assert asked(["a", " ", "b"], ["x", "?", "y"]) == [("a", "x"), ("b", "y")]
    assert asked(["a", "b"], None) == [("a", None), ("b", None)]
    assert asked(["a", "b"], "x") == [("a", "x"), ("b", "x")]
    assert asked("a", ["x", "alias of x"]) == [("a", "x")]
    assert asked(["a"], ["x", "alias of x"]) == [("a", "x")]
    assert asked(["a"], ["x"]) == asked(["a"], [["x"]]) == asked(["a"], "x") == [("a", "x")]
    assert asked([], []) == asked(None, ["x"]) == []
    with pytest.raises(ValueError, match=r"'locality\.neighborhood' has 2 prompts and 3 answers"):
        asked(["a", "b"], ["x", "y", "z"])


def test_flat_lists_are_paired_too() -> None:
    flat = {"locality_prompt": ["a", "b"], "locality_ground_truth": ["x", "y"]}
    assert asked_of(**flat) == [("a", "x"), ("b", "y")]
    record = {"src": "c", "ans": "d", "loc": ["a", "b"], "loc_ans": ["x", "y"]}
    assert read_one(record).test_locality == (LocalityTest("a", "x"), LocalityTest("b", "y"))


def test_rephrases_among_paired_portability_are_those_that_ask_for_the_target() -> None:
    aliases = {"prompt": ["It stands in", "Its twin stands in"], "ground_truth": ["Marrow", "Pell"]}
    record = {**KNOWEDIT, "portability": {"Subject_Aliasing": aliases}}
    assert read_one(record).test_rephrases == ("It stands in",)


@pytest.mark.parametrize(
    "target", ["Marrow", {"str": "Marrow"}, {"str": " Marrow", "id": "Q1"}, ["Marrow", "M."]]
)
@pytest.mark.parametrize("prompt", ["{} is located in", "Pell Tower is located in"])
def test_requests_of_rome_and_memit(prompt: str, target: Any) -> None:
    request = {"prompt": prompt, "subject": "Pell Tower", "target_new": target}
    assert read_one(request) == EditRequest("Pell Tower is located in", "Marrow")
    full = {
        **request,
        "target_true": {"str": "Pell"},
        "relation_id": "P1",
        "paraphrase_prompts": ["{} stands in"],
        "neighborhood_prompts": ["Tarn Tower is located in"],
    }
    expected = EditRequest(
        "Pell Tower is located in",
        "Marrow",
        test_rephrases=("Pell Tower stands in",),
        test_locality=(LocalityTest("Tarn Tower is located in", "Pell"),),
        relation="P1",
    )
    assert read_one(full) == expected
    assert read_one({"case_id": 3, "requested_rewrite": full}) == expected


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"src": "Where is {}?", "ans": "d", "subject": "Pell"}, "Where is Pell?"),
        ({"update": "{}, or {}?", "ans": "d", "subject": "Pell"}, "Pell, or Pell?"),
        ({"prompt": "In {}, war is", "target_new": "d", "subject": 1984}, "In 1984, war is"),
        # Ours and chat are taken as they stand.
        ({"prompt": "An empty dict is {}", "target": "d"}, "An empty dict is {}"),
    ],
)
def test_the_subject_stands_for_braces(record: dict[str, Any], prompt: str) -> None:
    assert read_one(record).prompt == prompt


def test_braces_without_a_subject_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'subject' is missing.* stands for in '\{\} is in'"):
        read_one({"prompt": "{} is in", "target_new": "d", "subject": NAN})


def test_knowedit_in_chinese() -> None:
    record = {
        "prompt": "“画蛇添足”的下一句是",
        "target_old": "多此一举",
        "target_new": "弄巧成拙",
        "rephrase": ["“画蛇添足”后面接", "请接：画蛇添足"],
        "portability": [{"prompt": "它出自哪里？", "answer": "战国策"}],
        "locality": [
            {"prompt": "“守株待兔”出自", "answer": "韩非子"},
            {"prompt": "“刻舟求剑”出自", "answer": ["吕氏春秋", "吕览"]},
        ],
    }
    assert read_one(record) == EditRequest(
        "“画蛇添足”的下一句是",
        "弄巧成拙",
        test_rephrases=("“画蛇添足”后面接", "请接：画蛇添足"),
        test_locality=(
            LocalityTest("“守株待兔”出自", "韩非子"),
            LocalityTest("“刻舟求剑”出自", "吕氏春秋"),
        ),
        test_portability=(PortabilityTest("它出自哪里？", "战国策"),),
    )
    assert asked_of(portability=None, locality=[], rephrase=None) == []


def test_one_text_is_a_list_of_one() -> None:
    record = {"prompt": "a", "target": "b", "rephrases": "c", "test_locality": {"prompt": "d"}}
    assert read_one(record) == EditRequest(
        "a", "b", rephrases=("c",), test_locality=(LocalityTest("d"),)
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (None, "got null, expected an object"),
        ({"question": "c"}, r"the fields \['question'\] are of no known layout"),
        ({"prompt": "c", "target_new": None}, "the new answer is empty"),
        ({"prompt": "c", "target_new": "d", "locality": [1]}, "'locality' holds int"),
        ({"prompt": "c", "target_new": "d", "locality": "e"}, "'locality' is str"),
        ({"requested_rewrite": [7]}, "field 'prompt' is missing"),
        ({"requested_rewrite": "c"}, "'requested_rewrite' is str"),
        ({"prompt": 3, "ans": "d"}, "'prompt' is int, expected str"),
    ],
)
def test_wrong_records_are_refused(record: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        read_record(record)


def test_only_mquake_repeats_its_edits() -> None:
    assert repeats_edits({"requested_rewrite": []})
    assert not any(map(repeats_edits, ({"requested_rewrite": {}}, {"prompt": "c"}, None)))
