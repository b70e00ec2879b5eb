"""Edits from files: every record that can be used, and by name those that cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ultraedit_kernels.evaluation.layouts import read_record, repeats_edits
from ultraedit_kernels.evaluation.records import read_records
from ultraedit_kernels.model.request import EditRequest, prompt_key

T = TypeVar("T")


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


def load_edits(source: str | Path, strict: bool = False) -> list[EditRequest]:
    """Read edits from a file or a data set; docs/inputs.md says from which, in which layouts.

    Each record is read by the layout that its fields tell: our own (`prompt`, `target`, ...), zsRE,
    CounterFact as ROME, MEMIT and EasyEdit write it, KnowEdit, UltraEditBench, WikiBigEdit, FEVER
    or MQuAKE. MQuAKE repeats an edit in every case that needs it; it is loaded once. A record that
    cannot be used is left out with a warning that names it and says why.

    Args:
        source: see `records.read_records`.
        strict: stop at such a record instead.

    Raises:
        ValueError: the source as a whole cannot be read, or no record can be used, or with `strict`
            one cannot; the message names the file, the record and the field.
        OSError: the file cannot be read.
        ImportError: a library that reads it is not installed.
    """
    return [request for _, request in load_numbered(source, strict)]


def load_numbered(source: str | Path, strict: bool = False) -> list[tuple[str, EditRequest]]:
    """As `load_edits`, each edit with the words that say which record it is from."""
    seen: set[EditRequest] = set()

    def edits_of(record: Any) -> list[EditRequest]:
        if isinstance(record, ValueError):
            raise record
        edits = read_record(record)
        if repeats_edits(record):
            edits = [edit for edit in dict.fromkeys(edits) if edit not in seen]
            seen.update(edits)
        return edits

    return sift(source, read_records(source), edits_of, strict)


def sift(
    source: str | Path,
    records: list[tuple[str, Any]],
    use: Callable[[Any], Iterable[T]],
    strict: bool = False,
) -> list[tuple[str, T]]:
    """What is made of the records, each with its record's name. Those of which nothing can be made
    are left out, with a warning for every reason.

    Args:
        source: of the records, for messages.
        records: with the words that say where each stands.
        use: makes something of a record, or raises TypeError or ValueError.
        strict: stop at such a record instead.

    Raises:
        ValueError: no record can be used, or with `strict` one cannot.
    """
    used: list[tuple[str, T]] = []
    refused: dict[str, list[str]] = {}
    for where, record in records:
        try:
            used += [(where, made) for made in use(record)]
        except (TypeError, ValueError) as error:
            if strict:
                raise ValueError(f"{source}, {where}: {error}") from error
            refused.setdefault(str(error), []).append(where)
    if refused and not used:
        reason, first = next(iter(refused.items()))
        more = len(records) - 1
        raise ValueError(
            f"{source}, {first[0]}: {reason}"
            + (f" (nor can the other {more} records be used)" if more else "")
        )
    for reason, names in refused.items():
        warnings.warn(
            f"{source}: left out {len(names)} of {len(records)} records ({', '.join(names)}): "
            f"{reason}",
            stacklevel=3,
        )
    return used
