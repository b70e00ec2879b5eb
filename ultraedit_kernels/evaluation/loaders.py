"""Loaders of the published edit sets, and of our own records.

In the published sets the rephrase, locality and portability fields are test questions. They load
as `test_rephrases`, `test_locality` and `test_portability`, which are scored and never shown to the
editor; only our own records carry `rephrases` (to teach) and `locality` (to protect).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ultraedit_kernels.model.request import (
    EditRequest,
    LocalityTest,
    PortabilityTest,
    kind_of,
    prompt_key,
)


def split_turns(requests: Iterable[EditRequest], size: int) -> Iterator[list[EditRequest]]:
    """Cut a stream of edits into turns of at most `size`, in order.

    A turn also ends before an edit that `check_turn` would reject in it: published sets edit some
    prompts more than once, and then the later turn wins.
    """
    if size < 1:
        raise ValueError(f"turn size is {size}, expected at least 1; 100 is the paper's")
    turn: list[EditRequest] = []
    taught: dict[str, str] = {}
    own: set[str] = set()
    for request in requests:
        keys = [prompt_key(p) for p in (request.prompt, *request.rephrases)]
        clash = keys[0] in own or any(taught.get(k, request.target) != request.target for k in keys)
        if turn and (clash or len(turn) == size):
            yield turn
            turn, taught, own = [], {}, set()
        turn.append(request)
        taught.update(dict.fromkeys(keys, request.target))
        own.add(keys[0])
    if turn:
        yield turn


def load_edits(path: str | Path) -> list[EditRequest]:
    """Read edits from a JSON file (a list of records) or a JSONL file (one record a line).

    The layout is recognised by the fields of the first record: our own (`prompt`, `target`, ...),
    zsRE, CounterFact as ROME and as EasyEdit write it, KnowEdit, UltraEditBench, WikiBigEdit,
    FEVER or MQuAKE. Of a published set, prompts are taken as they stand and answers without the
    white space around them; empty test questions are left out, and records with an empty new answer
    (zsRE has some) too, with a warning. MQuAKE repeats an edit in every case that needs it; it is
    loaded once.

    Raises:
        ValueError: the file is empty, is not JSON, holds no list or an unknown layout, or a record
            is wrong; the message names the file, the record and the field.
        OSError: the file cannot be read.
    """
    records = _read(Path(path))
    (_, first), *_ = records
    reader = _reader(first, path)
    requests: list[EditRequest] = []
    empty: list[str] = []
    for where, record in records:
        try:
            if not isinstance(record, dict):
                raise TypeError(
                    f"got {kind_of(record)}, expected an object; remove the entry or write it as "
                    'an object such as {"prompt": ..., "target": ...}'
                )
            requests += reader(record)
        except _NoNewAnswer:
            empty.append(where)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, {where}: {error}") from error
    if not requests:
        raise ValueError(
            f"{path}: no record has a new answer, expected at least one edit; give the targets"
        )
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"{path}: left out {len(empty)} of {len(records)} records, whose new answer is empty "
            f"({shown})",
            stacklevel=2,
        )
    return list(dict.fromkeys(requests)) if reader is _mquake else requests


# Checks of one value. Every message: what, got, expected, remedy.


# Reading of files.


def _read(path: Path) -> list[tuple[str, Any]]:
    """The records of a file, each with the words that say where it stands."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.start} is not UTF-8, expected a JSON or JSONL file in UTF-8; "
            "convert the file"
        ) from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected at least one edit; add a record")
    if path.suffix != ".jsonl":
        try:
            whole = json.loads(text)
        except ValueError as error:
            # Lines of objects under another suffix are JSONL too.
            if not (text.lstrip()[0] == "{" and "Extra data" in str(error)):
                raise ValueError(_not_json(path, error)) from None
        else:
            if not isinstance(whole, list):
                raise ValueError(
                    f"{path}: the file holds {kind_of(whole)}, expected a list of edits; put [ ] "
                    "around the records, or name the file .jsonl and write one record a line"
                )
            if not whole:
                raise ValueError(f"{path}: the list is empty, expected at least one edit; add one")
            return [(f"record {i}", record) for i, record in enumerate(whole)]
    records: list[tuple[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"record {len(records)} (line {number})"
            try:
                records.append((where, json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{_not_json(path, error)} ({where})") from None
    return records


def _not_json(path: Path, error: ValueError) -> str:
    return (
        f"{path}: not JSON: {error}, expected a JSON list or one JSON object a line; "
        "check that the file is complete"
    )


class _NoNewAnswer(Exception):
    """A published record whose target is there but empty."""


def _reader(record: object, path: str | Path) -> Callable[[dict[str, Any]], list[EditRequest]]:
    """The reader of a layout, by the fields of its first record."""
    if not isinstance(record, dict):
        return _own  # the loop reports it
    if "target" in record:
        return _own
    if "requested_rewrite" in record:
        return _mquake if isinstance(record["requested_rewrite"], list) else _counterfact
    if "src" in record:
        return _zsre
    if "update" in record:
        return _wikibigedit
    if "equiv_prompt" in record or "unrel_prompt" in record:
        return _fever
    if "target_new" in record or ("text" in record and "labels" in record):
        return _easyedit
    if "prompt" in record and "ans" in record:
        return _ultraeditbench
    if "prompt" in record:
        return _own
    raise ValueError(
        f"{path}, record 0: the fields {sorted(record)} are of no known layout, expected our own "
        "(prompt, target), zsRE (src), CounterFact or MQuAKE (requested_rewrite), EasyEdit or "
        "KnowEdit (prompt, target_new), UltraEditBench (prompt, ans), WikiBigEdit (update, ans) or "
        "FEVER (prompt, equiv_prompt, alt); rename the fields to prompt and target"
    )


# One reader per layout. None invents a value: an absent test question stays absent.


def _field(record: Mapping[str, Any], name: str, kind: type = str) -> Any:
    if not isinstance(record, Mapping) or name not in record:
        raise ValueError(f"field {name!r} is missing, expected {kind.__name__}; add it")
    if not isinstance(record[name], kind):
        raise TypeError(
            f"field {name!r} is {kind_of(record[name])}, expected {kind.__name__}; correct it"
        )
    return record[name]


def _first(value: Any, field: str) -> str | None:
    """The text in a value that may be text, a list of aliases, or a list of such lists."""
    while isinstance(value, list) and value:
        value = value[0]
    if value is None or value == []:
        return None
    if not isinstance(value, str):
        raise TypeError(f"field {field!r} is {kind_of(value)}, expected text; correct it")
    return value if value.strip() else None


def _answer(value: Any, field: str) -> str | None:
    text = _first(value, field)
    return text.strip() if text else None


def _texts(record: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The non-empty texts of some fields, each a text, a list of texts, or absent."""
    found: list[str] = []
    for name in names:
        value = record.get(name)
        for item in value if isinstance(value, list) else [value]:
            text = _first(item, name)
            if text is not None:
                found.append(text)
    return tuple(found)


def _tests(record: Mapping[str, Any], prompt: str, answer: str) -> tuple[LocalityTest, ...]:
    gold = _answer(record.get(answer), answer)
    return tuple(LocalityTest(text, gold) for text in _texts(record, prompt))


def _follows(record: Mapping[str, Any], prompt: str, answer: str) -> tuple[PortabilityTest, ...]:
    told = _answer(record.get(answer), answer)
    return tuple(PortabilityTest(text, told) for text in _texts(record, prompt) if told)


def _target(record: Mapping[str, Any], *names: str) -> str:
    """The new answer: the first of these fields that holds one."""
    present = [name for name in names if name in record]
    if not present:
        raise ValueError(f"field {' or '.join(map(repr, names))} is missing, expected the answer")
    for name in present:
        text = _answer(record[name], name)
        if text:
            return text
    raise _NoNewAnswer


def _own(record: dict[str, Any]) -> list[EditRequest]:
    return [EditRequest.from_dict(record)]


def _zsre(record: dict[str, Any]) -> list[EditRequest]:
    # MEND's files have the true answer in `answers` and the counterfactual one in `alt`; later
    # ones have only the answer to teach, as `ans`.
    return [
        EditRequest(
            _field(record, "src"),
            _target(record, "alt", "ans"),
            test_rephrases=_texts(record, "rephrase"),
            test_locality=_tests(record, "loc", "loc_ans"),
        )
    ]


def _ultraeditbench(record: dict[str, Any]) -> list[EditRequest]:
    return [
        EditRequest(
            _field(record, "prompt"),
            _target(record, "ans"),
            test_rephrases=_texts(record, "rephrase_prompt"),
            test_locality=_tests(record, "loc", "loc_ans"),
        )
    ]


def _wikibigedit(record: dict[str, Any]) -> list[EditRequest]:
    # `personas` is the same question in somebody's voice, `mhop` one about what follows.
    return [
        EditRequest(
            _field(record, "update"),
            _target(record, "ans"),
            test_rephrases=_texts(record, "rephrase", "personas"),
            test_locality=_tests(record, "loc", "loc_ans"),
            test_portability=_follows(record, "mhop", "mhop_ans"),
        )
    ]


def _fever(record: dict[str, Any]) -> list[EditRequest]:
    return [
        EditRequest(
            _field(record, "prompt"),
            _target(record, "alt"),
            test_rephrases=_texts(record, "equiv_prompt"),
            test_locality=_tests(record, "unrel_prompt", "unrel_ans"),
        )
    ]


def _easyedit(record: dict[str, Any]) -> list[EditRequest]:
    """EasyEdit's flat records (CounterFact) and its nested ones (KnowEdit)."""
    prompt = "prompt" if "prompt" in record else "text"  # WikiBio says text and labels
    target = _target(record, "target_new", "labels")
    rephrases = _texts(record, "rephrase_prompt", "rephrase")
    # A question by another name of the subject is a rephrase.
    portability: tuple[PortabilityTest, ...] = ()
    for question in _nested(record, "portability"):
        answers = json.dumps(question.get("ground_truth"))
        if question["group"] != "Subject_Aliasing":
            portability += _follows(question, "prompt", "ground_truth")
        elif json.dumps(target) in answers:
            rephrases += _texts(question, "prompt")
    locality = _tests(record, "locality_prompt", "locality_ground_truth")
    for question in _nested(record, "locality"):
        locality += _tests(question, "prompt", "ground_truth")
    return [
        EditRequest(
            _field(record, prompt),
            target,
            test_rephrases=rephrases,
            test_locality=locality,
            test_portability=portability,
        )
    ]


def _nested(record: Mapping[str, Any], name: str) -> Iterator[dict[str, Any]]:
    """KnowEdit's questions: {"Relation_Specificity": [{"prompt", "ground_truth"}], ...}."""
    groups = record.get(name) or {}
    if not isinstance(groups, dict):
        raise TypeError(
            f"field {name!r} is {kind_of(groups)}, expected an object of groups of questions; "
            'write {"Relation_Specificity": [{"prompt": ..., "ground_truth": ...}]}'
        )
    for group, questions in groups.items():
        for question in questions if isinstance(questions, list) else [questions]:
            if not isinstance(question, dict):
                raise TypeError(
                    f"field '{name}.{group}' holds {kind_of(question)}, expected objects with "
                    "prompt and ground_truth; correct it"
                )
            yield {**question, "group": group}


def _rewrite(rewrite: Mapping[str, Any]) -> tuple[str, str, str | None, str | None]:
    """Prompt, new answer, true answer and relation of a ROME-style rewrite."""
    prompt = _field(rewrite, "prompt").replace("{}", _field(rewrite, "subject"))
    true = rewrite.get("target_true") or {}
    return (
        prompt,
        _target(_field(rewrite, "target_new", dict), "str"),
        _answer(true.get("str") if isinstance(true, dict) else true, "target_true"),
        _first(rewrite.get("relation_id"), "relation_id"),
    )


def _counterfact(record: dict[str, Any]) -> list[EditRequest]:
    prompt, target, true, relation = _rewrite(_field(record, "requested_rewrite", dict))
    # Neighbours are chosen to share the true answer with the edited subject.
    neighbours = _texts(record, "neighborhood_prompts")
    return [
        EditRequest(
            prompt,
            target,
            test_rephrases=_texts(record, "paraphrase_prompts"),
            test_locality=tuple(LocalityTest(text, true) for text in neighbours),
            relation=relation,
        )
    ]


def _mquake(record: dict[str, Any]) -> list[EditRequest]:
    # A case is a chain of edits. `question` asks for the same fact as the cloze prompt; the
    # multi-hop `questions` ask for what follows from the chain, so they are no rephrases.
    requests = []
    for rewrite in _field(record, "requested_rewrite", list):
        prompt, target, _, relation = _rewrite(rewrite)
        rephrases = _texts(rewrite, "question")
        requests.append(EditRequest(prompt, target, test_rephrases=rephrases, relation=relation))
    return requests
