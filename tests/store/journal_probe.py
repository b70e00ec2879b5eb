"""Kills an editor at every step of what it writes: `python journal_probe.py ARGUMENTS`.

ARGUMENTS is JSON: {"directory", "what"}, what is "append", "snapshot" or "rollback". Each run is a
forked process that is killed by SIGKILL before its n-th step on the disk, n = 1, 2, ... until one
run comes to its end. Prints a JSON list of what an editor then finds in the directory.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.store import files

MODEL = Path(__file__).parents[2] / "bench" / "tiny-facts"
COUNTRIES = ["Australia", "Peru", "Cuba", "France", "Spain"]
BEFORE = {"append": 2, "snapshot": 3, "rollback": 5}
"""Versions that are there when the run begins; every second one leaves a snapshot."""
UNDER_WAY = {"append": 3, "snapshot": 4, "rollback": 2}


def editor(directory: Path) -> Editor:
    """Of one module, and with little work a turn: it is the writing that matters."""
    return Editor(
        copy.deepcopy(PRISTINE),
        TOKENIZER,
        modules=["model.layers.3.mlp.down_proj"],
        anchors=0,
        rounds=2,
        keep=2,
        state_dir=directory,
    )


def steps(one: Editor) -> Any:
    return one.steps([EditRequest(f"The capital of {COUNTRIES[one.version]} is", "Sydney")])


def kill_before(step: int) -> None:
    """Let everything that touches the disk count, and end the process before one of them."""
    count = 0

    def counted(call: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    for owner, name in (
        (os, "fsync"),
        (os, "replace"),
        (Path, "unlink"),
        (Path, "touch"),
        (files, "chunks"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def run(directory: Path, what: str) -> list[dict[str, Any]]:
    made = directory / "made"
    one = editor(made)
    digests = [one.digest()]
    for _ in range(BEFORE[what]):
        list(steps(one))
        digests.append(one.digest())
    work = iter(())
    if what != "rollback":
        work = steps(one)
        while next(work) != "record":
            pass
        digests.append(one.digest())

    for thread in threading.enumerate():  # a forked process has none of them
        if thread.name.startswith("ultraedit-digest"):
            thread.join()
    kept = shutil.copytree(made, directory / "kept")
    runs: list[dict[str, Any]] = []
    while not runs or runs[-1]["killed at"] is not None:
        step, state = len(runs) + 1, directory / f"run-{len(runs)}"
        child = os.fork()
        if child == 0:
            kill_before(step)
            if what == "rollback":
                one.rollback(UNDER_WAY[what])
            else:
                list(work)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        shutil.copytree(made, state)  # whose lock nobody holds
        shutil.rmtree(made)
        shutil.copytree(kept, made)
        found = editor(state)
        runs.append(
            {
                "killed at": None if os.WIFEXITED(status) else step,
                "exit": os.waitstatus_to_exitcode(status),
                "acknowledged": BEFORE[what],
                "under way": UNDER_WAY[what],
                "found": found.version,
                "digest": found.digest(),
                "digests": digests,
                "leftovers": [p.name for p in state.iterdir() if p.suffix in ("", ".tmp")],
            }
        )
        found.close()
    return runs


if __name__ == "__main__":
    torch.set_num_threads(1)
    PRISTINE = AutoModelForCausalLM.from_pretrained(MODEL)
    TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
    arguments = json.loads(sys.argv[1])
    print(json.dumps(run(Path(arguments["directory"]), arguments["what"])))
