"""`ultraedit push` and `ultraedit status`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ultraedit_kernels.cli.show import ERR, OUT

HALF = 3
"""Exit status of a push that some servers have and others have not."""

Urls = Annotated[
    list[str], typer.Argument(metavar="URL...", help="Servers, such as http://host:8000.")
]
Wait = Annotated[
    float,
    typer.Option(min=0, metavar="SECONDS", help="How long a server may be away or busy."),
]


def key_of_environment() -> str | None:
    """The first key of $ULTRAEDIT_API_KEY, else that of vLLM."""
    keys = os.environ.get("ULTRAEDIT_API_KEY", "").split(",")
    return keys[0].strip() or os.environ.get("VLLM_API_KEY") or None


def push(
    delta: Annotated[Path, typer.Argument(metavar="DELTA", help="The change, as a delta file.")],
    urls: Urls,
    undo: Annotated[bool, typer.Option("--undo", help="Take it back from all of them.")] = False,
    wait: Wait = 60.0,
) -> None:
    """Have all servers serve DELTA, or none: all try it, then all are told.

    Run it again to go on with a push that broke off. The key is $ULTRAEDIT_API_KEY, else
    $VLLM_API_KEY. Exit status: 0 all serve it, 1 nothing is changed, 3 some serve it.
    """
    from ultraedit_kernels.fleet.push import Fleet, PushError
    from ultraedit_kernels.store.delta import EditDelta

    change = EditDelta.load(delta)
    fleet = Fleet(urls, key_of_environment(), wait=wait, say=_say)
    try:
        done = fleet.take_back(change) if undo else fleet.push(change)
    except PushError as error:
        ERR.print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(HALF if error.half else 1) from error
    finally:
        fleet.close()
    count = f"{len(done.versions)} server{'s' * (len(done.versions) != 1)}"
    told = f"{len(done.changed)} changed now" if done.changed else "as before"
    OUT.print(f"{count}: digest {done.digest}, {told}", style="green", soft_wrap=True)


def status(
    urls: Urls,
    json_file: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Say what servers serve, and whether it is the same: exit status 1 if not.

    Weights are read back and compared with the journal. The key is $ULTRAEDIT_API_KEY, else
    $VLLM_API_KEY.
    """
    from ultraedit_kernels.fleet.push import Fleet

    fleet = Fleet(urls, key_of_environment())
    try:
        found = fleet.status()
    finally:
        fleet.close()
    rows = [_row(url, one) for url, one in found.items()]
    digests = {row["digest"] for row in rows if row["digest"]}
    same = len(digests) == 1 and all(row["status"] == "ok" for row in rows)
    if json_file:
        print(json.dumps({"same": same, "servers": rows}, indent=1))
    else:
        for row in rows:
            OUT.print(f"{row['url']}  {_told(row)}", soft_wrap=True)
        if same:
            OUT.print("all serve the same", style="green")
        else:
            OUT.print(_remedy(rows, len(digests)), style="red", soft_wrap=True)
    if not same:
        raise typer.Exit(1)


def _say(url: str, text: str) -> None:
    ERR.print(f"{url}: {text}", soft_wrap=True)


def _row(url: str, found: Any) -> dict[str, Any]:
    if isinstance(found, Exception):
        error = str(found).removeprefix(f"{url}: ")
        names = ("version", "digest", "library_version", "turn", "follows")
        empty = dict.fromkeys(names)
        return {"url": url, "status": "error", **empty, "error": error}
    return {
        "url": url,
        "status": found.status,
        "version": found.version,
        "digest": found.digest,
        "library_version": found.library_version,
        "turn": found.turn,
        "follows": None if found.follows is None else found.follows.model_dump(),
        "error": None,
    }


def _told(row: dict[str, Any]) -> str:
    if row["error"] is not None:
        return f"no answer: {row['error']}"
    digest = (row["digest"] or "unknown")[:12]
    told = f"version {row['version']}, digest {digest}, ultraedit-kernels {row['library_version']}"
    if row["status"] != "ok":
        told += ", ITS RANKS DIFFER: restart it"
    told += ", a change is under way" if row["turn"] else ""
    return told + (_following(row["follows"]) if row["follows"] else "")


def _following(follows: dict[str, Any]) -> str:
    if follows["error"] is not None:
        how = f"but: {follows['error']}"
    else:
        how = f"{follows['behind']} behind" if follows["behind"] else "in step"
    return f", follows {follows['leader']}, {how}"


def _remedy(rows: list[dict[str, Any]], digests: int) -> str:
    if digests > 1:
        return (
            "NOT THE SAME: run the push that broke off again, or with --undo; else roll back to a "
            "version that all have"
        )
    away = sum(row["status"] != "ok" for row in rows)
    return f"{away} of {len(rows)} servers cannot be compared; see to them, then ask again"
