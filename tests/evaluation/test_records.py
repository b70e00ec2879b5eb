"""Files and data sets, down to records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ultraedit_kernels.evaluation.loaders import load_edits
from ultraedit_kernels.evaluation.records import read_records
from ultraedit_kernels.model.request import EditRequest, LocalityTest

CHAT = [{"role": "user", "content": 'Who wrote "The Tin Orchard"?'}]


def read(path: Path, content: str) -> list[Any]:
    """The records of a file of this content."""
    path.write_text(content, newline="")
    return [record for _, record in read_records(path)]


def edits_of(path: Path, content: str) -> list[EditRequest]:
    path.write_text(content, newline="")
    return load_edits(path, strict=True)


# Tables.


@pytest.mark.parametrize("suffix", ["csv", "tsv", "CSV", "tab"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_has_the_fields_of_its_first_line(
    tmp_path: Path, suffix: str, delimiter: str, end: str
) -> None:
    rows = [["prompt", "target"], ["Pell is in", "Marrow"], ["", ""], ['"a ""b"""', "1987"]]
    content = "\ufeff" + end.join(map(delimiter.join, rows))
    assert edits_of(tmp_path / f"e.{suffix}", content) == [
        EditRequest("Pell is in", "Marrow"),
        EditRequest('a "b"', "1987"),
    ]


def test_cells_hold_lists_as_json_and_as_pandas_writes_them(tmp_path: Path) -> None:
    def cell(value: object) -> str:
        return '"' + str(value).replace('"', '""') + '"'

    tests = [{"prompt": 'It\'s "d"?', "answer": None}]
    for write in (json.dumps, repr):
        row = [write(CHAT), "[]", write(["c", "d, e"]), write(tests), "[INST] {} [/INST]"]
        header = "prompt,target,rephrases,test_locality,locality"
        (request,) = edits_of(tmp_path / "e.csv", f"{header}\n{','.join(map(cell, row))}\n")
        assert request == EditRequest(
            CHAT,
            "[]",  # a target is text in any case
            rephrases=("c", "d, e"),
            test_locality=(LocalityTest('It\'s "d"?'),),
            locality=("[INST] {} [/INST]",),
        )


def test_published_fields_in_a_table(tmp_path: Path) -> None:
    content = (
        ",src,subject,alt,rephrase,loc,loc_ans\n"  # the number of the row, as pandas writes it
        '0,Where is {}?,Pell,Marrow,,"[""a"", ""b""]","[""x"", ""y""]"\n'
    )
    assert edits_of(tmp_path / "e.csv", content) == [
        EditRequest(
            "Where is Pell?",
            "Marrow",
            test_locality=(LocalityTest("a", "x"), LocalityTest("b", "y")),
        )
    ]
    rome = "prompt\tsubject\ttarget_new\n{} is in\tPell\t{'str': 'Marrow'}\n"
    assert edits_of(tmp_path / "e.tsv", rome) == [EditRequest("Pell is in", "Marrow")]


@pytest.mark.parametrize(
    "content",
    [
        "\tprompt\ttarget\n0\ta\tb\n",
        "\n\nUnnamed: 0,prompt,target\n0,a,b\n",
        " prompt , target \na,b\n",
    ],
)
def test_the_first_line_may_have_an_index_and_spaces(tmp_path: Path, content: str) -> None:
    assert read(tmp_path / "e.csv", content) == [{"prompt": "a", "target": "b"}]


def test_lists_that_numpy_writes_are_refused(tmp_path: Path) -> None:
    (record,) = read(tmp_path / "e.csv", "prompt,target,rephrases\na,b,['c' 'd']\n")
    assert isinstance(record, ValueError)
    assert "field 'rephrases' begins as a list" in str(record)


def test_lines_are_counted_through_cells_of_several_lines_and_broken_ones(tmp_path: Path) -> None:
    path = tmp_path / "e.csv"
    path.write_text('\nprompt,target\n"a\nb",c\n"d,e\nf,"g"\n"h"i,j\nk,l\n"m,n\n')
    found = [
        (where, "bad" if isinstance(record, ValueError) else record["prompt"])
        for where, record in read_records(path)
    ]
    assert found == [
        ("record 0 (line 3)", "a\nb"),
        ("record 1 (line 5)", "bad"),
        ("record 2 (line 6)", "f"),
        ("record 3 (line 7)", "bad"),
        ("record 4 (line 8)", "k"),
        ("record 5 (line 9)", "bad"),
    ]


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no records, expected"):
        read(tmp_path / "e.csv", "prompt,target\n")


# JSON.


def test_lines_and_lists_under_each_others_names(tmp_path: Path) -> None:
    lines = '{"prompt": "a"}\r\n\r\n{"prompt": "b"}\r\n'
    for name in ("e.jsonl", "e.ndjson", "e.json", "e.txt"):
        assert read(tmp_path / name, lines) == [{"prompt": "a"}, {"prompt": "b"}]
    for name in ("e.jsonl", "e.json"):
        assert read(tmp_path / name, '[{"prompt": "a"},\n{"prompt": "b"}]') == [
            {"prompt": "a"},
            {"prompt": "b"},
        ]
    one = '{"prompt": "a"}'
    assert read(tmp_path / "e.NDJSON", one) == [{"prompt": "a"}]


def test_numbers_keep_their_digits(tmp_path: Path) -> None:
    content = '[{"prompt": "The price is", "target": 3.10}, {"prompt": "In", "ans": 1987}]'
    assert [edit.target for edit in edits_of(tmp_path / "e.json", content)] == ["3.10", "1987"]


# Parquet, and data sets.


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Records of two layouts, as a table holds them: with the fields of each other."""
    return [
        {"prompt": "Pell is in", "target_new": None, "target": "Marrow", "rephrases": ["c", "d"],
         "locality": None},
        {"prompt": "Tarn is in", "target_new": "Pell", "target": None, "rephrases": None,
         "locality": {"near": {"prompt": ["a", "b"], "ground_truth": ["x", None]}}},
    ]  # fmt: skip


EXPECTED = [
    EditRequest("Pell is in", "Marrow", rephrases=("c", "d")),
    EditRequest("Tarn is in", "Pell", test_locality=(LocalityTest("a", "x"), LocalityTest("b"))),
]


def test_parquet(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows[0]["__index_level_0__"] = 5
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "e.parquet")
    assert load_edits(tmp_path / "e.parquet", strict=True) == EXPECTED
    (tmp_path / "f.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"f\.parquet: not Parquet"):
        load_edits(tmp_path / "f.parquet")


def test_a_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        lines = json.dumps({"prompt": split, "target": "b"}) + "\n"
        (tmp_path / f"{split}.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="has the splits train, test, expected one"):
        load_edits(tmp_path)
    assert load_edits(f"{tmp_path}:test") == [EditRequest("test", "b")]
    (tmp_path / "test.jsonl").unlink()
    assert load_edits(tmp_path) == [EditRequest("train", "b")]


@pytest.mark.parametrize(
    ("source", "module"),
    [("zedonia/capitals", "datasets"), ("zedonia/capitals:test", "datasets"), ("e.pq", "pyarrow")],
)
def test_a_missing_library_is_named_with_the_command(
    source: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("e.pq").write_text("")
    for name in (module, f"{module}.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ImportError, match=rf"^{source}: {module} .* pip install .*\[data\]"):
        load_edits(source)


@pytest.mark.parametrize("name", ["none.json", "none/none.csv", "a/b.parquet", "none"])
def test_a_missing_file_is_not_looked_for_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_records(name)
