"""Records of edits as people keep them: JSON, JSONL, CSV, TSV, Parquet, or a data set of the hub.

What a record means is the business of `layouts`.
"""

from __future__ import annotations

import ast
import csv
import importlib
import io
import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from ultraedit_kernels.model.request import kind_of

LINES = (".jsonl", ".ndjson")
TABLES = (".csv", ".tsv", ".tab")
PARQUET = (".parquet", ".pq")

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")
_LIST = re.compile(r"""\[\s*(["'\[{].*)?\]|\{\s*["'].*\}""", re.DOTALL)
_INDEX = re.compile(r"|Unnamed: \d+|__index_level_\d+__")
"""Columns that pandas adds for the number of a row."""


def read_records(source: str | Path) -> list[tuple[str, Any]]:
    """The records of a file or a data set, each with the words that say where it stands.

    Args:
        source: a JSON file (a list of records), a JSONL file (one record a line), a CSV or TSV
            file whose first line names the fields, a Parquet file, a directory of such that
            `datasets` loads, or the id of a data set of the Hugging Face hub: `OWNER/NAME`,
            `OWNER/NAME:SPLIT` or `OWNER/NAME:CONFIG:SPLIT`; the directory's, too.

    Returns:
        A ValueError stands for a record that cannot be read, such as a broken line.

    Raises:
        ValueError: there are no records, or the whole is not what its name says.
        OSError: the file cannot be read.
        ImportError: a library that reads it is not installed.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    known = suffix in (".json", ".txt", *LINES, *TABLES, *PARQUET)
    folder = Path(str(source).partition(":")[0]).is_dir()
    if folder or (not path.exists() and not known and _HUB_ID.fullmatch(str(source))):
        records = _data_set(str(source))
    elif suffix in PARQUET:
        records = _parquet(path)
    else:
        text = _text(path)
        records = _table(path, text) if suffix in TABLES else _json(path, text)
    if not records:
        raise ValueError(f"{source}: there are no records, expected at least one edit; add one")
    return records


def _text(path: Path) -> str:
    """The text of a file in UTF-8. A byte that is none becomes a surrogate, by which the record
    that it is in is found later."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise ValueError(
                f"{path}: byte {error.start} is not UTF-8, expected a text file in UTF-8; "
                "convert the file"
            ) from None
        text = data.decode("utf-8-sig", "surrogateescape")
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected at least one edit; add a record")
    return text


def _loads(text: str) -> Any:
    return json.loads(text, parse_float=Decimal)  # 3.10 is to stay 3.10


def _json(path: Path, text: str) -> list[tuple[str, Any]]:
    start = text.lstrip()[0]
    if path.suffix.lower() not in LINES or start == "[":
        try:
            whole = _loads(text)
        except ValueError as error:
            # Lines of objects under another suffix are JSONL too.
            if not (start == "{" and "Extra data" in str(error)):
                raise ValueError(_not_json(path, error)) from None
        else:
            if not isinstance(whole, list):
                raise ValueError(
                    f"{path}: the file holds {kind_of(whole)}, expected a list of edits; put [ ] "
                    "around the records, or name the file .jsonl and write one record a line"
                )
            return [(f"record {i}", record) for i, record in enumerate(whole)]
    records: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"record {len(records)} (line {number})"
            try:
                records.append((where, _loads(line)))
            except ValueError as error:
                remedy = "expected one JSON object a line; correct or remove the line"
                records.append((where, ValueError(f"not JSON: {error}, {remedy}")))
    if all(isinstance(record, ValueError) for _, record in records):
        where, reason = records[0]
        raise ValueError(f"{path}, {where}: {reason}")
    return records


def _not_json(path: Path, error: ValueError) -> str:
    return (
        f"{path}: not JSON: {error}, expected a JSON list or one JSON object a line; "
        "check that the file is complete"
    )


def _table(path: Path, text: str) -> list[tuple[str, Any]]:
    """Rows of cells under a line of names. The names tell what stands between the cells."""
    body = text.lstrip("\r\n")
    lines = list(io.StringIO(body, newline=""))
    skipped = text.count("\n") - body.count("\n")
    delimiter = max(",;\t", key=lines[0].count)
    records: list[tuple[str, Any]] = []
    names: list[str] | None = None
    for number, row in _rows(lines, delimiter):
        if names is None:
            if isinstance(row, ValueError):
                raise ValueError(f"{path}, line {number + skipped}: {row}")
            names = [name.strip() for name in row]
        elif isinstance(row, ValueError) or any(cell.strip() for cell in row):
            where = f"record {len(records)} (line {number + skipped})"
            records.append((where, _record(names, row, delimiter)))
    return records


def _rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | ValueError]]:
    """The cells of each row, with the number of its first line. After a row with a quote that is
    not closed, it goes on with the next line."""
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    read = 0  # lines that earlier readers have done
    while True:
        begun = read + reader.line_num
        try:
            yield begun + 1, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            remedy = "expected cells with quotes around them closed; correct the line"
            yield begun + 1, ValueError(f"no row of a table: {error}, {remedy}")
            read = begun + 1
            reader = csv.reader(lines[read:], delimiter=delimiter, strict=True)


def _record(names: list[str], row: list[str] | ValueError, delimiter: str) -> Any:
    if isinstance(row, ValueError):
        return row
    if len(row) > len(names):
        return ValueError(
            f"{len(row)} cells, expected at most the {len(names)} of the first line; put quotes "
            f"around a cell that has a {delimiter!r} in it"
        )
    try:
        return {n: _cell(n, c) for n, c in zip(names, row, strict=False) if not _INDEX.fullmatch(n)}
    except ValueError as error:
        return error


def _cell(name: str, cell: str) -> Any:
    """What a cell holds: nothing, text, or a list or an object as JSON or pandas write it."""
    text = cell.strip()
    if not text:
        return None
    if name == "target" or not _LIST.fullmatch(text):
        return cell
    try:
        return _loads(text)
    except ValueError:
        pass
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if repr(value) != text:  # numpy writes ['a' 'b'], which Python reads as ['ab']
        raise ValueError(
            f"field {name!r} begins as a list or an object and is none, got {text[:60]!r}, "
            'expected JSON such as ["a", "b"]; correct it'
        )
    return value


def _need(module: str, source: str | Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(
            f"{source}: {name} is needed to read it and cannot be imported ({error}); "
            "pip install 'ultraedit-kernels[data]'"
        ) from error


def _parquet(path: Path) -> list[tuple[str, Any]]:
    path.stat()  # that it is missing is the first thing to say
    reader = _need("pyarrow.parquet", path)
    try:
        rows = reader.read_table(path).to_pylist()
    except ValueError as error:  # pyarrow's ArrowInvalid
        raise ValueError(
            f"{path}: not Parquet: {error}, expected a Parquet file; check that it is complete"
        ) from error
    return _numbered(rows)


def _data_set(name: str) -> list[tuple[str, Any]]:
    """A data set of the hub, or a directory of one."""
    datasets = _need("datasets", name)
    repository, *rest = name.split(":")
    split, config = (rest[-1] if rest else None), rest[:-1]
    try:
        loaded = datasets.load_dataset(repository, *config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name} is no file, and as a data set it cannot be loaded: {error}; "
            "give a file, OWNER/NAME:SPLIT or OWNER/NAME:CONFIG:SPLIT"
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise ValueError(
                f"{name} has the splits {', '.join(loaded)}, expected one; "
                f"name it, such as {repository}:{next(iter(loaded), 'train')}"
            )
        (loaded,) = loaded.values()
    return _numbered(loaded)


def _numbered(rows: Any) -> list[tuple[str, Any]]:
    return [
        (f"record {i}", {name: value for name, value in row.items() if not _INDEX.fullmatch(name)})
        for i, row in enumerate(rows)
    ]
