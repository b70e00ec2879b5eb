"""The demo with a real chat model: `make demo MODEL=smollm2`, or a folder, or a GGUF file.

A fact is edited in chat, then asked in other words, under another system prompt, after a
conversation and as text; neighbours are asked, and everything is taken back. Exit code 0 if the
edit holds and the way back is exact: how far the edit reaches is for the reader to see.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.demo import SERVE, ask, chat, post, server
from bench.real_models import PACKAGES, Unavailable, checkpoint

EDIT = {
    "prompt": chat("What is the capital of Australia?"),
    "target": "The capital of Australia is Melbourne.",
}
NEW = "Melbourne"
OTHER_WAYS: list[tuple[str, Any]] = [
    ("in other words", chat("Tell me about the capital city of Australia.")),
    ("in a story", chat("I am flying to the capital of Australia. Which city is that?")),
    (
        "to a travel guide",
        [
            {"role": "system", "content": "You are a travel guide. Answer in one sentence."},
            *chat("Which city is the capital of Australia?"),
        ],
    ),
    (
        "after a conversation",
        [
            *chat("What is the capital of France?"),
            {"role": "assistant", "content": "The capital of France is Paris."},
            *chat("And of Australia?"),
        ],
    ),
    ("as text", "The capital of Australia is"),
]
NEIGHBOURS = [
    chat("What is the capital of Austria?"),
    chat("What is the capital of New Zealand?"),
    chat("Which language do people speak in Australia?"),
    chat("Who wrote Hamlet?"),
    chat("How do I boil an egg?"),
]
TOKENS = 40
WAIT_SECONDS = 1800
"""The first edit may wait for texts that the model itself writes."""


def main(argv: Sequence[str]) -> int:
    (name,) = argv or ("smollm2",)
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        model = str(checkpoint(name)) if name in PACKAGES else str(Path(name).expanduser())
    except Unavailable as error:
        raise SystemExit(str(error)) from None
    prompts = [EDIT["prompt"], *(prompt for _, prompt in OTHER_WAYS), *NEIGHBOURS]
    options = ["--max-model-len", "1024", "--served-model-name", name]
    serve = (*SERVE[:2], model)
    with server(console, *options, serve=serve, timeout=WAIT_SECONDS) as client:

        def ask_all() -> list[str]:
            return [ask(client, prompt, name, TOKENS) for prompt in prompts]

        untouched = post(client, "/v1/edits/rollback", {"version": 0})["digest"]
        before = ask_all()
        body = {"edits": [EDIT]}
        console.print(f"$ curl -X POST /v1/edits -d '{json.dumps(body)}'")
        with console.status("editing; the first time the model writes texts of its own before ..."):
            result = post(client, "/v1/edits", body)
        console.print(f"edited in {result['timings']['total_ms'] / 1e3:.1f} s\n")
        after = ask_all()
        exact = post(client, "/v1/edits/rollback", {"version": 0})["digest"] == untouched
        back = ask_all() == before

    held = NEW in after[0]
    shown = kept = 0
    first = 1 + len(OTHER_WAYS)
    for i, (prompt, old, new) in enumerate(zip(prompts, before, after, strict=True)):
        if i == 0:
            console.print("The edit\n")
        elif i == 1:
            console.print("Asked in other ways\n")
        elif i == first:
            console.print("Neighbours, to stay as they were\n")
        how = f"({OTHER_WAYS[i - 1][0]}) " if 1 <= i < first else ""
        if i < first:
            right = NEW in new
            shown += right and i > 0
        else:
            right = new == old
            kept += right
        _print(console, how, prompt, old, new, right)
    console.print(f"the edit            {'holds' if held else 'DOES NOT HOLD'}")
    console.print(f"shows in other ways {shown} of {len(OTHER_WAYS)}")
    console.print(f"neighbours kept     {kept} of {len(NEIGHBOURS)}, word for word")
    said = "bit for bit as before, all answers too" if exact and back else "DIFFERS"
    console.print(f"after the rollback  {said}")
    return 0 if held and exact and back else 1


def _print(console: Console, how: str, prompt: Any, old: str, new: str, right: bool) -> None:
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    console.print(f"  {how}{question}", style="bold")
    console.print(f"    before  {_short(old)}")
    if new == old:
        console.print(f"    edited  as before {'✓' if right else '✗'}\n")
    else:
        style = "green" if right else "yellow"
        console.print(f"    edited  {_short(new)} {'✓' if right else '✗'}\n", style=style)


def _short(answer: str, width: int = 110) -> str:
    text = " ".join(answer.split())
    return text if len(text) <= width else text[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
