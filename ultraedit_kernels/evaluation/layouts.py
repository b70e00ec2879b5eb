"""Layouts of records: what a record of a published edit set, or of our own, asks for.

In the published sets the rephrase, locality and portability fields are test questions. They load
as `test_rephrases` and `test_locality`, which are scored and never shown to the editor; only our
own records carry `rephrases` (to teach) and `locality` (to protect).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from ultraedit_kernels.model.request import EditRequest, LocalityTest, PortabilityTest, kind_of

_NO_ANSWER = "the new answer is empty, expected text; give the target"
"""Why a published record whose target is there but empty (zsRE has some) cannot be used."""


def read_record(record: object) -> list[EditRequest]:
    """The edits of one record; its layout is recognised by its fields.

    Not-a-number counts as null, and null as a field that is not there. Where an answer is asked a
    number is taken as its digits. Of a published set, prompts are taken as they stand, with the
    subject for `{}`, and answers without the white space around them; empty test questions are left
    out.

    Raises:
        TypeError, ValueError: the record is of no known layout, or wrong; the message names the
            field.
    """
    if not isinstance(record, Mapping):
        raise TypeError(
            f"got {kind_of(record)}, expected an object; remove the entry or write it as "
            'an object such as {"prompt": ..., "target": ...}'
        )
    fields = _without_nan(dict(record))
    return _reader(fields)(fields)


def repeats_edits(record: object) -> bool:
    """Whether the record is of a set that repeats an edit in every case that needs it: MQuAKE."""
    return isinstance(record, Mapping) and isinstance(record.get("requested_rewrite"), list)


def _without_nan(value: Any) -> Any:
    """The value with null for every number in it that is none, or not finite: so pandas writes a
    missing value."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _reader(record: dict[str, Any]) -> Callable[[dict[str, Any]], list[EditRequest]]:
    """The reader of a record's layout. Tables give a record the fields of all others, so those
    that are not null decide first."""
    for fields in ({name for name in record if record[name] is not None}, set(record)):
        for wanted, reader in LAYOUTS:
            if wanted <= fields:
                return reader
    if "prompt" in record:
        return _own  # which says that the target is missing
    raise ValueError(
        f"the fields {sorted(map(str, record))} are of no known layout, expected our own "
        "(prompt, target), zsRE (src), CounterFact or MQuAKE (requested_rewrite), EasyEdit or "
        "KnowEdit (prompt, target_new), UltraEditBench (prompt, ans), WikiBigEdit (update, ans) or "
        "FEVER (prompt, equiv_prompt, alt); rename the fields to prompt and target"
    )


# Values. Every message: what, got, expected, remedy.


def _field(record: Mapping[str, Any], name: str, kind: type = str) -> Any:
    if not isinstance(record, Mapping) or name not in record:
        raise ValueError(f"field {name!r} is missing, expected {kind.__name__}; add it")
    if not isinstance(record[name], kind):
        raise TypeError(
            f"field {name!r} is {kind_of(record[name])}, expected {kind.__name__}; correct it"
        )
    return record[name]


def _number(value: Any) -> Any:
    """The digits of a number; any other value as it is. An integer that stood in a column with
    missing values has become a fraction: 1987.0 is 1987."""
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return format(Decimal(str(value)), "f").removesuffix(".0")
    return value


def _all_texts(value: Any, field: str) -> Iterator[str]:
    """The texts in a value that may be text, ROME's {"str"}, a list of aliases, or of such."""
    if isinstance(value, list):
        for item in value:
            yield from _all_texts(item, field)
    elif isinstance(value, dict) and "str" in value:
        yield from _all_texts(value["str"], field)
    elif isinstance(value, str):
        if value.strip():
            yield value
    elif value is not None:
        raise TypeError(f"field {field!r} is {kind_of(value)}, expected text; correct it")


def _digits(value: Any) -> Any:
    """The value with the digits of the numbers in it."""
    if isinstance(value, dict):
        return {key: _digits(item) for key, item in value.items()}
    return [_digits(item) for item in value] if isinstance(value, list) else _number(value)


def _answers(value: Any, field: str) -> list[str]:
    return [text.strip() for text in _all_texts(_digits(value), field)]


def _answer(value: Any, field: str) -> str | None:
    return next(iter(_answers(value, field)), None)


def _target(record: Mapping[str, Any], *names: str) -> str:
    """The new answer: the first of these fields that holds one."""
    present = [name for name in names if name in record]
    if not present:
        raise ValueError(f"field {' or '.join(map(repr, names))} is missing, expected the answer")
    for name in present:
        if text := _answer(record[name], name):
            return text
    raise ValueError(_NO_ANSWER)


def _filled(text: str, record: Mapping[str, Any]) -> str:
    """A prompt, with the subject where ROME and MEMIT write {}."""
    if "{}" not in text:
        return text
    subject = _answer(record.get("subject"), "subject")
    if subject is None:
        raise ValueError(
            f"field 'subject' is missing, expected what {{}} stands for in {text!r}; add it"
        )
    return text.replace("{}", subject)


def _prompt(record: Mapping[str, Any], name: str) -> str:
    return _filled(_field(record, name), record)


def _rephrases(record: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    """The non-empty texts of some fields, each a text, a list of texts, or absent."""
    values = [record.get(name) for name in names]
    return tuple(
        _filled(text, record)
        for name, value in zip(names, values, strict=True)
        for item in (value if isinstance(value, list) else [value])
        for text in [next(_all_texts(item, name), None)]
        if text is not None
    )


def _pairs(prompts: Any, answers: Any, field: str) -> list[tuple[str, Any]]:
    """Prompts, each with the answer that is its own: one of a list of as many, or the one answer,
    with its aliases, of a single prompt; an answer that is no list belongs to all."""
    if not prompts:
        return []
    if not isinstance(prompts, list):
        prompts, answers = [prompts], [answers]
    elif len(prompts) == 1 and (not isinstance(answers, list) or len(answers) != 1):
        answers = [answers]
    elif not isinstance(answers, list) or not answers:
        answers = [answers] * len(prompts)
    if len(prompts) != len(answers):
        raise ValueError(
            f"field {field!r} has {len(prompts)} prompts and {len(answers)} answers, expected an "
            "answer for each; complete it, with null for one that is not known"
        )
    texts = [next(_all_texts(prompt, field), None) for prompt in prompts]
    return [(t, answer) for t, answer in zip(texts, answers, strict=True) if t is not None]


def _tests(record: Mapping[str, Any], prompt: str, answer: str) -> tuple[LocalityTest, ...]:
    pairs = _pairs(record.get(prompt), record.get(answer), prompt)
    return tuple(LocalityTest(text, _answer(gold, answer)) for text, gold in pairs)


def _follows(record: Mapping[str, Any], prompt: str, answer: str) -> tuple[PortabilityTest, ...]:
    pairs = _pairs(record.get(prompt), record.get(answer), prompt)
    told = [(text, _answer(gold, answer)) for text, gold in pairs]
    return tuple(PortabilityTest(text, gold) for text, gold in told if gold)


# One reader per layout. None invents a value: an absent test question stays absent.


def _own(record: dict[str, Any]) -> list[EditRequest]:
    given = {k: v for k, v in record.items() if v is not None or k in ("prompt", "target")}
    for name in ("target", "relation"):
        if name in given:
            given[name] = _number(given[name])
    tests = ("test_locality", "test_portability")
    for name in ("rephrases", "locality", "test_rephrases", *tests):
        if name in given:
            value = given[name] if isinstance(given[name], list) else [given[name]]
            given[name] = [item for item in value if item is not None]
    for test in [test for name in tests for test in given.get(name, [])]:
        if isinstance(test, dict) and "answer" in test:
            test["answer"] = _number(test["answer"])
    return [EditRequest.from_dict(given)]


def _zsre(record: dict[str, Any]) -> list[EditRequest]:
    # MEND's files have the true answer in `answers` and the counterfactual one in `alt`; later
    # ones have only the answer to teach, as `ans`.
    return [
        EditRequest(
            _prompt(record, "src"),
            _target(record, "alt", "ans"),
            test_rephrases=_rephrases(record, "rephrase"),
            test_locality=_tests(record, "loc", "loc_ans"),
        )
    ]


def _ultraeditbench(record: dict[str, Any]) -> list[EditRequest]:
    return [
        EditRequest(
            _prompt(record, "prompt"),
            _target(record, "ans"),
            test_rephrases=_rephrases(record, "rephrase_prompt"),
            test_locality=_tests(record, "loc", "loc_ans"),
        )
    ]


def _wikibigedit(record: dict[str, Any]) -> list[EditRequest]:
    # `personas` is the same question in somebody's voice, `mhop` one about what follows.
    return [
        EditRequest(
            _prompt(record, "update"),
            _target(record, "ans"),
            test_rephrases=_rephrases(record, "rephrase", "personas"),
            test_locality=_tests(record, "loc", "loc_ans"),
            test_portability=_follows(record, "mhop", "mhop_ans"),
        )
    ]


def _fever(record: dict[str, Any]) -> list[EditRequest]:
    return [
        EditRequest(
            _prompt(record, "prompt"),
            _target(record, "alt"),
            test_rephrases=_rephrases(record, "equiv_prompt"),
            test_locality=_tests(record, "unrel_prompt", "unrel_ans"),
        )
    ]


def _easyedit(record: dict[str, Any]) -> list[EditRequest]:
    """Requests of ROME, MEMIT and EasyEdit, flat (CounterFact) or nested (KnowEdit)."""
    flat = record.get("text") is None or record.get("prompt") is not None
    prompt = _prompt(record, "prompt" if flat else "text")  # WikiBio says text and labels
    target = _target(record, "target_new", "labels")
    rephrases = _rephrases(record, "rephrase_prompt", "rephrase", "paraphrase_prompts")
    # A question by another name of the subject is a rephrase.
    portability: tuple[PortabilityTest, ...] = ()
    for group, text, answers in _questions(record, "portability"):
        told = _answers(answers, "portability")
        if group != "Subject_Aliasing":
            portability += tuple(PortabilityTest(text, gold) for gold in told[:1])
        elif target in told:
            rephrases += (text,)
    locality = _tests(record, "locality_prompt", "locality_ground_truth")
    for _, text, answers in _questions(record, "locality"):
        locality += (LocalityTest(text, _answer(answers, "locality")),)
    # Neighbours are chosen to share the true answer with the edited subject.
    true = _answer(record.get("target_true"), "target_true")
    for text in _rephrases({"of": record.get("neighborhood_prompts")}, "of"):
        locality += (LocalityTest(text, true),)
    relation = _answer(record.get("relation_id"), "relation_id")
    return [
        EditRequest(
            prompt,
            target,
            test_rephrases=rephrases,
            test_locality=locality,
            test_portability=portability,
            relation=relation,
        )
    ]


def _questions(record: Mapping[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """KnowEdit's questions with their group and answers: {"Relation_Specificity": [{"prompt",
    "ground_truth"}], ...}, prompts and answers perhaps lists, or in Chinese a list without groups
    of {"prompt", "answer"}."""
    groups = record.get(name) or {}
    if isinstance(groups, list):
        groups = {"": groups}
    if not isinstance(groups, dict):
        raise TypeError(
            f"field {name!r} is {kind_of(groups)}, expected an object of groups of questions; "
            'write {"Relation_Specificity": [{"prompt": ..., "ground_truth": ...}]}'
        )
    for group, questions in groups.items():
        field = f"{name}.{group}" if group else name
        for question in questions if isinstance(questions, list) else [questions]:
            if question is None:
                continue
            if not isinstance(question, dict):
                raise TypeError(
                    f"field {field!r} holds {kind_of(question)}, expected objects with "
                    "prompt and ground_truth; correct it"
                )
            answers = question.get("ground_truth")
            answers = question.get("answer") if answers is None else answers
            for text, answer in _pairs(question.get("prompt"), answers, field):
                yield group, text, answer


def _counterfact(record: dict[str, Any]) -> list[EditRequest]:
    if isinstance(record["requested_rewrite"], list):
        return _mquake(record)
    return _easyedit({**record, **_field(record, "requested_rewrite", dict)})


def _mquake(record: dict[str, Any]) -> list[EditRequest]:
    # A case is a chain of edits. `question` asks for the same fact as the cloze prompt; the
    # multi-hop `questions` ask for what follows from the chain, so they are no rephrases.
    requests = [
        EditRequest(
            _prompt(rewrite, "prompt"),
            _target(rewrite, "target_new"),
            test_rephrases=_rephrases(rewrite, "question"),
            relation=_answer(rewrite.get("relation_id"), "relation_id"),
        )
        for rewrite in record["requested_rewrite"]
    ]
    if not requests:
        raise ValueError(_NO_ANSWER)
    return requests


LAYOUTS: tuple[tuple[set[str], Callable[[dict[str, Any]], list[EditRequest]]], ...] = (
    ({"target"}, _own),
    ({"requested_rewrite"}, _counterfact),
    ({"src"}, _zsre),
    ({"update"}, _wikibigedit),
    ({"equiv_prompt"}, _fever),
    ({"unrel_prompt"}, _fever),
    ({"target_new"}, _easyedit),
    ({"text", "labels"}, _easyedit),
    ({"prompt", "ans"}, _ultraeditbench),
)
"""The fields by which a layout is known, and its reader; the first that fits is taken."""
