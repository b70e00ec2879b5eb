"""What the engine said before and after each version, for those who look at it later.

The journal is written before a version is served, so that it cannot hold what the engine says with
it. A report is for people: without one, a version is all the same.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.ultraedit")

FOLDER = "answers"
IN_MEMORY = 1000
"""Newest versions whose reports are kept where there is no state directory."""


class Reports:
    """Reports by version, in a folder of the state directory, or else in memory.

    A report is of the weights with one digest: a later version of the same number has its own.

    Args:
        state_dir: several servers may share it; None for none.
    """

    def __init__(self, state_dir: str | None) -> None:
        self._folder = None if state_dir is None else Path(state_dir) / FOLDER
        self._reports: OrderedDict[int, bytes] = OrderedDict()

    def write(self, version: int, digest: str, answers: Seq[Mapping[str, Any]]) -> None:
        """Keep the answers to the requests of a turn, in their order. If they cannot be written
        that is logged, and what was done stands."""
        text = json.dumps({"digest": digest} | _report(answers)).encode()
        if self._folder is None:
            self._reports[version] = text
            self._reports.move_to_end(version)
            if len(self._reports) > IN_MEMORY:
                self._reports.popitem(last=False)
            return
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            path = self._path(version)
            new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            new.write_bytes(text)
            new.replace(path)
        except OSError as error:
            logger.error("UltraEdit: the answers of version %d were not kept: %s", version, error)

    def of(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """The report of a version that the journal has: `edits` and `specificity`. None if there
        is none: of a delta, or if the server ended before it had read the answers."""
        version = record["version"]
        try:
            kept = self._folder is None
            text = self._reports[version] if kept else self._path(version).read_bytes()
            report: dict[str, Any] = json.loads(text)
            same = report.pop("digest") == record["digest"]
            return report if same and len(report["edits"]) == len(record["edits"]) else None
        except (KeyError, OSError):
            return None  # there is none
        except (ValueError, TypeError, AttributeError) as error:
            logger.warning("UltraEdit: %s is damaged: %r", self._path(version), error)
            return None

    def beside(self, records: Seq[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The records, each with its report as `answers`."""
        return [{**record, "answers": self.of(record)} for record in records]

    def _path(self, version: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{version:06d}.json"


def _report(answers: Seq[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the answers to all requests of a turn, what a version's record does not have."""
    names = ("before", "after", "succeeded", "reason")
    prompts = [prompt for answer in answers for prompt in answer["specificity"]["prompts"]]
    same = sum(bool(prompt["unchanged"]) for prompt in prompts)
    return {
        "edits": [{name: edit[name] for name in names} for a in answers for edit in a["edits"]],
        "specificity": {"score": same / len(prompts) if prompts else None, "prompts": prompts},
    }
