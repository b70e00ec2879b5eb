"""Whether a change may go out: its own tests, guards and canaries, neighbours and other texts,
before and after, judged by limits; as JSON, and as JUnit XML for a CI."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.evaluation.answers import ServedModel
from ultraedit_kernels.evaluation.general import General
from ultraedit_kernels.evaluation.harness import Tasks
from ultraedit_kernels.evaluation.scores import evaluate, record_locality
from ultraedit_kernels.model.request import EditRequest, Prompt
from ultraedit_kernels.store.delta import EditDelta

Outcome = Literal["passed", "failed", "tolerated"]


@dataclass(frozen=True)
class Limits:
    """What a change must keep."""

    min_hold: float = 1.0
    """Least share of the tests' edits that hold: the answer is the target, and then ends."""
    max_kl: float | None = None
    """Most that the distribution of the next token may move from the untouched model's, nats: mean
    over the neighbours' first tokens, and mean over other texts."""


@dataclass(frozen=True)
class Case:
    """One line of the verdict."""

    group: str
    name: str
    outcome: Outcome
    message: str = ""


def check_model(
    model: Any,
    tokenizer: Any,
    delta: EditDelta,
    requests: Seq[EditRequest],
    *,
    limits: Limits,
    settings: Mapping[str, Any] | None = None,
    texts: str | None = None,
    tasks: Tasks | None = None,
) -> dict[str, Any]:
    """Check a change of a model in this process, and leave the model as it was.

    Args:
        model, tokenizer: the untouched model.
        delta: the change.
        requests: its tests: the edits with what was held out, see `scores`.
        limits: what it must keep.
        settings: further ones of the Editor, whose guards it must pass.
        texts: prose to read before and after.
        tasks: of lm-evaluation-harness, to score before and after.

    Returns:
        JSON-able: "guards", what they measured, "before" and "after", the scores and "texts",
        "kl", "cases" and "passed"; with tasks "lm_eval", their scores "before" and "after".

    Raises:
        ValueError: the change is of another model, or the tests or texts cannot be used.
    """
    editor = Editor(model, tokenizer, modules=list(delta.base), **(settings or {}))
    scored = (model, tokenizer, requests)
    neighbours = record_locality(*scored)
    before = evaluate(*scored, before=neighbours)
    read = None if texts is None else General.of(model, tokenizer, texts, ())
    tasked = {} if tasks is None else {"before": tasks.scores(model, tokenizer)}
    tried = editor.apply_delta(delta, commit=False)
    with editor.versions.changed(delta):
        after = evaluate(*scored, before=neighbours)
        moved = None if read is None else read.measure(model, tokenizer)["prose"]
        if tasks is not None:
            tasked["after"] = tasks.scores(model, tokenizer)
    kl = {"neighbours": after["neighbours"]["kl"], "texts": moved and moved["kl"]}
    report = {"guards": tried.guards, "before": before, "after": after, "texts": moved, "kl": kl}
    report |= {"lm_eval": tasked} if tasked else {}
    return judged(report, tried.rejected, limits)


def check_served(
    served: ServedModel,
    tokenizer: Any,
    requests: Seq[EditRequest],
    change: Callable[[], str | None] | None,
    *,
    limits: Limits,
) -> dict[str, Any]:
    """Check a served model, as it is or with a change.

    Its distributions are known at the likeliest tokens only: their KL, with all others as one, is
    at most the true one.

    Args:
        served: the server.
        tokenizer: the model's, which says how long answers may get.
        requests: the tests.
        change: has the server serve the change; returns why a guard rejects it, None if it is
            served. None to check what is served now.
        limits: what it must keep.

    Returns:
        as `check_model`; without a change "before" is None.
    """
    prompts = [test.prompt for request in requests for test in request.test_locality]
    scored = (served, tokenizer, requests)
    if change is None:
        report = {"guards": {}, "before": None, "after": evaluate(*scored), "texts": None, "kl": {}}
        return judged(report, None, limits)
    neighbours = record_locality(*scored)
    before, old = evaluate(*scored, before=neighbours), _distributions(served, prompts)
    rejected, kl = change(), None
    after: dict[str, Any] | None = None
    if rejected is None:
        after = evaluate(*scored, before=neighbours)
        new = _distributions(served, prompts)
        each = [known_kl(a, b) for a, b in zip(old, new, strict=True)]
        kl = sum(each) / len(each) if each else None
    kls = {"neighbours": kl, "texts": None}
    report = {"guards": {}, "before": before, "after": after, "texts": None, "kl": kls}
    return judged(report, rejected, limits)


def _distributions(served: ServedModel, prompts: Seq[Prompt]) -> list[dict[str, float]]:
    return [served.next_token(prompt) for prompt in prompts]


def known_kl(old: Mapping[str, float], new: Mapping[str, float]) -> float:
    """KL(old ‖ new), nats, of log-probabilities of the likeliest tokens: those that are in both,
    and all others as one. At most the KL of the whole distributions."""
    shared = old.keys() & new.keys()
    pairs = [(math.exp(old[token]), math.exp(new[token])) for token in shared]
    rest = [max(1.0 - sum(side), 1e-12) for side in zip(*pairs, strict=True)] or [1.0, 1.0]
    return sum(p * math.log(p / q) for p, q in [*pairs, (rest[0], rest[1])] if p > 0)


def judged(report: dict[str, Any], rejected: str | None, limits: Limits) -> dict[str, Any]:
    """The report with its limits, cases and verdict."""
    cases = [
        Case("guards", "guards and canaries", "failed" if rejected else "passed", rejected or "")
    ]
    if report["after"] is not None:
        cases += _holds(report["after"], limits)
    for what, kl in report["kl"].items():
        if kl is not None and limits.max_kl is not None:
            told = f"KL {kl:.3g} nats, at most {limits.max_kl:g} asked"
            good = kl <= limits.max_kl
            cases.append(Case("kl", what, "passed" if good else "failed", told))
    report |= {"limits": asdict(limits), "cases": [asdict(case) for case in cases]}
    return report | {"passed": all(case.outcome != "failed" for case in cases)}


def _holds(after: dict[str, Any], limits: Limits) -> list[Case]:
    """Of every edit, and of their share."""
    held = after["generation"]["efficacy"]
    enough = held >= limits.min_hold
    cases = []
    for row in after["rows"]:
        prompt = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        told = f"answers {row['efficacy']['answer'].strip()!r}, expected {row['target']!r}"
        good = row["efficacy"]["generation"] == 1
        outcome: Outcome = "passed" if good else "tolerated" if enough else "failed"
        cases.append(Case("edits", prompt, outcome, "" if good else told))
    told = f"{held:.1%} hold, at least {limits.min_hold:.1%} asked"
    return [
        *cases,
        Case("hold", "share of edits that hold", "passed" if enough else "failed", told),
    ]


def write_junit(report: Mapping[str, Any], path: Path) -> None:
    """Write the cases as JUnit XML; what is tolerated counts as skipped. Scores of tasks are
    properties: "lm_eval/before/TASK/METRIC" and "lm_eval/after/..."."""
    cases = report["cases"]
    counts = {
        "tests": len(cases),
        "failures": sum(case["outcome"] == "failed" for case in cases),
        "skipped": sum(case["outcome"] == "tolerated" for case in cases),
        "errors": 0,
    }
    attributes = {name: str(count) for name, count in counts.items()}
    suite = ElementTree.Element("testsuite", {"name": "ultraedit", **attributes})
    for when, scores in report.get("lm_eval", {}).items():
        properties = suite.find("properties")
        if properties is None:
            properties = ElementTree.SubElement(suite, "properties")
        for name, score in scores.items():
            attributes = {"name": f"lm_eval/{when}/{name}", "value": f"{score:g}"}
            ElementTree.SubElement(properties, "property", attributes)
    for case in cases:
        named = {"classname": f"ultraedit.{case['group']}", "name": _plain(case["name"])}
        element = ElementTree.SubElement(suite, "testcase", named)
        tag = {"failed": "failure", "tolerated": "skipped", "passed": None}[case["outcome"]]
        if tag is not None:
            ElementTree.SubElement(element, tag, {"message": _plain(case["message"])})
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.ElementTree(suites).write(path, encoding="utf-8", xml_declaration=True)


def _plain(text: str) -> str:
    """Without what XML cannot hold."""
    return "".join(
        c if c.isprintable() or c in "\t\n" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
