"""Deltas that were made elsewhere: a file, or versions of a state directory, without its model."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from ultraedit_kernels.store import files
from ultraedit_kernels.store.delta import EditDelta
from ultraedit_kernels.store.journal import Journal


@dataclass(frozen=True)
class Versions:
    """A range of versions, first to last."""

    first: int
    last: int

    def __str__(self) -> str:
        if self.first == self.last:
            return f"version {self.first}"
        return f"versions {self.first} to {self.last}"

    @classmethod
    def parse(cls, text: str) -> Versions:
        """Of "7" or "2:5". Raises ValueError."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 0 < first <= last:
            raise ValueError(f"versions are {text!r}, expected a number or FIRST:LAST, from 1")
        return cls(first, last)


def read_deltas(source: Path, versions: Versions | None = None) -> list[EditDelta]:
    """The delta of a file, or those of versions of a state directory, in order.

    Args:
        source: a delta file or a state directory, which a server may be writing to.
        versions: of a state directory; None for all.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, none of these, or has no such versions.
    """
    if not source.is_dir():
        if versions is not None:
            raise ValueError(
                f"{source} is a file, versions were asked for; leave --versions out, or name a "
                "state directory"
            )
        return [EditDelta.load(source)]
    journal = Journal(source, base_of(source), writes=False)
    # A rollback that is not finished has decided that later ones are gone.
    gone = [int(marker.name[12:]) for marker in source.glob("rollback-to-[0-9]*")]
    there = Versions(journal.oldest + 1, min([len(journal), *gone]))
    wanted = versions or Versions(1, there.last)
    if not there.first <= wanted.first <= wanted.last <= there.last:
        raise ValueError(
            f"{source} has no deltas of {wanted}, expected {there}"
            + (": earlier ones were let go" if there.first > 1 else "")
            + "; name them with --versions FIRST:LAST, or export --to checkpoint, which needs none"
        )
    numbers = range(wanted.first, wanted.last + 1)
    entries = [journal.entry(number) for number in numbers]
    return [entry.delta.teaching(entry.record["edits"]) for entry in entries]


def base_of(directory: Path) -> dict[str, str]:
    """Module → digest of its untouched weight, of the model that a state directory is of.

    Raises:
        ValueError: it holds no versions, or is damaged.
    """
    found = sorted(directory.glob("*[0-9].safetensors"))
    if not found:
        raise ValueError(
            f"{directory} holds no versions, expected those of a state directory; name the one "
            "that --state-dir gave to the server"
        )
    with files.damage(found[0]), safetensors.safe_open(found[0], framework="pt") as file:
        base: dict[str, str] = json.loads((file.metadata() or {})["model"])
    return base


def conflicts(deltas: Seq[EditDelta], names: Seq[str]) -> list[str]:
    """Prompts that deltas, of these names, teach different targets, in words; and deltas that are
    there twice. Of deltas that do not say what they teach nothing is known."""
    taught: dict[str, dict[str, str]] = defaultdict(dict)
    seen: dict[str, str] = {}
    found = []
    for delta, name in zip(deltas, names, strict=True):
        if (content := delta.digest()) in seen:
            found.append(f"{name} is the same change as {seen[content]}")
            continue
        seen[content] = name
        for edit in edits_of(delta):
            targets = taught[json.dumps(edit["prompt"])]
            targets.setdefault(edit["target"], name)
    for prompt, targets in taught.items():
        if len(targets) > 1:
            said = ", ".join(f"{target!r} ({name})" for target, name in targets.items())
            found.append(f"{prompt} gets {said}")
    return found


def edits_of(delta: EditDelta) -> list[dict[str, Any]]:
    """What a delta says that it teaches: of each edit "prompt" and "target"."""
    edits: list[dict[str, Any]] = delta.settings.get("edits", [])
    return edits
