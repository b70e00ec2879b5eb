"""Edits of real language models: ours, the published method, LocFT-BF and LoRA, judged alike.

Usage, from the repository root:

    make evaluate-real COUNTERFACT=FILE ZSRE=FILE [MODELS=smollm2,gemma3] [N=100] [ROWS=ours,LoRA]
    python -m bench.real --models smollm2 --set counterfact=FILE -n 100        # the same
    python -m bench.real ... --variant 'layers 1-5={"modules": [...]}'         # ours, set otherwise
    python -m bench.real ... --skip 2000               # later records, on which to choose settings
    python -m bench.real --report                                  # tables and plot of what was run

A model is one that `real_models.py` fetches, a folder or a GGUF file; a set is any file that
`load_edits` reads. Every row is kept in `--dir` as soon as it is finished, and made again only if
the code, the records or their number changed. Tables go to bench/results/real.{json,md}, the plot
to docs, see `real_report.py`. Nothing of models and records goes there.

All rows of a model and a set have the same untouched model, edits, turns and questions. The other
methods have the best of their rates, by `worth`, on the very edits that are scored.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from bench import machine
from bench.evaluate import digest
from bench.real_models import PACKAGES, Unavailable, checkpoint
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.editor import EditOutcome, apply_what_passes
from ultraedit_kernels.evaluation import baselines
from ultraedit_kernels.evaluation import scores as judge
from ultraedit_kernels.evaluation.answers import Output
from ultraedit_kernels.evaluation.general import General
from ultraedit_kernels.evaluation.loaders import load_edits, split_turns
from ultraedit_kernels.model.gguf import is_gguf, load_gguf
from ultraedit_kernels.model.presets import resolve_modules
from ultraedit_kernels.model.request import LocalityTest, PortabilityTest, Prompt

ROOT = Path(__file__).parent.parent
HERE = ROOT / "bench"
ROWS = ("untouched", "ours", "published", "LocFT-BF", "LoRA")
RATES: dict[str, tuple[float, ...]] = {
    "published": (1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3),
    "fine-tuning": (3e-4, 1e-3),
    "LocFT-BF": (5e-4,),  # its authors'
    "LoRA": (1e-3, 3e-3),
}
DEPTHS = (0.2, 0.4, 0.7)
"""LocFT-BF edits one layer, in its authors' models at 0.2 to 0.7 of the depth: each is tried."""
FIRST = 100
"""Of a longer stream, the first edits, that are scored by themselves."""


@dataclass(frozen=True)
class Run:
    """What is run."""

    folder: Path
    models: tuple[str, ...]
    sets: dict[str, str]
    """Name → file of records."""
    edits: int = 100
    skip: int = 0
    """Records that come before them, and are left out."""
    turn_size: int = 20
    rows: tuple[str, ...] = ROWS
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Further rows: name → arguments of `Editor`."""
    prose: Path = HERE / "prose.txt"
    questions: Path = HERE / "questions.txt"
    dtype: str = "float32"
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(RATES))
    depths: tuple[float, ...] = DEPTHS
    ours: dict[str, Any] = field(default_factory=dict)
    """Arguments of `Editor` in all rows of ours; none, so that its defaults are measured."""


@dataclass(frozen=True)
class Subject:
    """A real model, edits to make, and what it did at all questions before them."""

    model: Any
    tokenizer: Any
    requests: list[EditRequest]
    before: list[Output]
    general: General

    def score(self) -> dict[str, Any]:
        """The model as it is now."""
        at = (self.model, self.tokenizer)
        scores = judge.evaluate(*at, self.requests, before=self.before)
        scores.pop("per_relation", None)
        if len(self.requests) > FIRST:
            holds = [row["efficacy"]["generation"] for row in scores["rows"][:FIRST]]
            scores["first"] = {"edits": FIRST, "efficacy": sum(holds) / FIRST}
        return {**scores, "general": self.general.measure(*at)}


# Records.


def requests_of(file: str, run: Run, chat: bool) -> list[EditRequest]:
    """The edits of a file that are run, as text or as a user's message."""
    records = load_edits(file)[run.skip : run.skip + run.edits]
    return [asked(request, chat) for request in records]


def asked(request: EditRequest, chat: bool) -> EditRequest:
    """An edit with the questions of Natural Questions, which zsRE has as locality, as questions;
    in chat all of its text prompts are messages."""

    def form(prompt: Prompt) -> Prompt:
        if not isinstance(prompt, str):
            return prompt
        bare = prompt.removeprefix("nq question: ")
        text = f"{bare.removesuffix('?')}?" if bare != prompt else prompt
        return [{"role": "user", "content": text}] if chat else text

    return replace(
        request,
        prompt=form(request.prompt),
        test_rephrases=tuple(map(form, request.test_rephrases)),
        test_locality=tuple(LocalityTest(form(t.prompt), t.answer) for t in request.test_locality),
        test_portability=tuple(
            PortabilityTest(form(t.prompt), t.answer) for t in request.test_portability
        ),
    )


def is_asked_in_chat(requests: list[EditRequest], tokenizer: Any) -> bool:
    """Whether the model chats and most edits are questions."""
    texts = [r.prompt for r in requests if isinstance(r.prompt, str)]
    questions = sum(text.rstrip().endswith("?") for text in texts)
    return bool(getattr(tokenizer, "chat_template", None)) and 2 * questions > len(requests)


# Rows. Each is JSON.


def ours(on: Subject, run: Run, settings: dict[str, Any]) -> dict[str, Any]:
    """All turns, then the scores; the model is left as it was."""
    editor = Editor(on.model, on.tokenizer, **{**run.ours, **settings})
    _, prepare_memory, prepare_seconds = machine.peak_extra_memory(editor.prepare)
    outcomes: list[EditOutcome] = []

    def edit() -> None:
        for turn in split_turns(on.requests, run.turn_size):
            outcomes.extend(apply_what_passes(editor, turn)[1])

    try:
        _, memory, seconds = machine.peak_extra_memory(edit)
        scores = on.score()
    finally:
        editor.rollback(0)
        editor.close()
    return {
        "prepare_seconds": prepare_seconds,
        "seconds": seconds,
        "peak_extra_bytes": max(prepare_memory or 0, memory or 0) or None,
        "modules": editor.modules,
        "held_when_made": sum(o.succeeded for o in outcomes) / len(on.requests),
        "rounds": sum(o.rounds for o in outcomes) / max(1, len(outcomes)),
        "refused": [outcome.refused for outcome in outcomes if outcome.refused],
        **scores,
    }


def baseline(on: Subject, run: Run, method: str) -> dict[str, Any]:
    """The best of all rates, and of all places where it has several; the model is left as it was.

    Raises:
        ValueError: the method diverges at every rate.
    """
    turns = list(split_turns(on.requests, run.turn_size))
    trials = []
    for modules in places(on.model, method, run.depths):
        for lr in run.rates[method]:
            with baselines.restored(on.model, modules):
                edit = _bound(method, on, turns, modules, lr)
                try:
                    _, memory, seconds = machine.peak_extra_memory(edit)
                except ValueError:  # it diverged
                    continue
                how = {"lr": lr, "modules": modules, "seconds": seconds}
                trials.append({**how, "peak_extra_bytes": memory, **on.score()})
                say(f"    {method}, {lr:g}, {modules[0]}: worth {worth(trials[-1]):.2f}")
    if not trials:
        raise ValueError(f"{method} diverges at every rate, expected one that works; add smaller")
    best = max(trials, key=worth)
    tried = [{key: value for key, value in t.items() if key != "rows"} for t in trials]
    return {**best, "prepare_seconds": 0.0, "trials": tried}


def _bound(
    method: str, on: Subject, turns: list[list[EditRequest]], modules: list[str], lr: float
) -> Callable[[], None]:
    return lambda: baselines.BASELINES[method](on.model, on.tokenizer, turns, modules, lr)


def places(model: Any, method: str, depths: tuple[float, ...]) -> list[list[str]]:
    """Modules that a method may edit: its own where it says them, otherwise those of ours."""
    if method != "LocFT-BF":
        own = "published" if method == "published" else "auto"
        return [resolve_modules(model, model.config, own)]
    pattern = resolve_modules(model, model.config, "auto")[0]
    layers = model.config.get_text_config().num_hidden_layers
    return [[re.sub(r"\.\d+\.", f".{int(depth * layers)}.", pattern, count=1)] for depth in depths]


def worth(trial: dict[str, Any]) -> float:
    """Harmonic mean of edits and rephrases whose answer contains the target and of neighbours whose
    first token is as before. Stricter scores are 0 at every rate of some methods."""
    found = [trial["contains"][kind] for kind in ("efficacy", "generalization")]
    return harmonic_mean([x for x in (*found, trial["neighbours"]["first_token"]) if x is not None])


# Running.


def perform(run: Run) -> None:
    """Make all rows that are missing, model by model and set by set."""
    for model in run.models:
        known = Path(model).name.removesuffix(".gguf")
        for name, file in run.sets.items():
            wanted = {row: key_of(run, row, file) for row in (*run.rows, *run.variants)}
            for form in ("text", "chat"):
                stem = f"{known}-{name}-{run.edits}-{form}"
                paths = {row: run.folder / f"{stem}-{_file_name(row)}.json" for row in wanted}
                missing = [row for row, path in paths.items() if not made(path, wanted[row])]
                try:
                    folder = str(checkpoint(model)) if model in PACKAGES and missing else model
                except Unavailable as error:
                    say(f"{model}: left out; {error}")
                    continue
                for row, result in rows_of(run, folder, file, form, missing):
                    conditions: dict[str, Any] = {
                        "model": known,
                        "set": name,
                        "form": form,
                        "row": row,
                    }
                    conditions |= {"turn_size": run.turn_size, "dtype": run.dtype}
                    conditions |= {"machine": machine.conditions()}
                    write(paths[row], {**conditions, "key": wanted[row], **result})
                    say(f"  {stem}: {row}, {result.get('seconds', 0):.0f} s of editing")
                gc.collect()


def rows_of(
    run: Run, model: str, file: str, form: str, rows: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a model and a set, each as soon as it is finished; none where the form has none."""
    if not rows:
        return
    plain = requests_of(file, run, False)
    loaded, tokenizer = load(model, run.dtype)
    chats = bool(getattr(tokenizer, "chat_template", None))
    if form == "chat" and not is_asked_in_chat(plain, tokenizer):
        return
    say(f"{model}, {len(plain)} edits of {Path(file).name} as {form}: the untouched model")
    requests = requests_of(file, run, form == "chat")
    questions: list[Prompt] = [
        [{"role": "user", "content": line}] if chats else line
        for line in run.questions.read_text(encoding="utf-8").splitlines()
    ]
    prose = run.prose.read_text(encoding="utf-8")
    before = judge.record_locality(loaded, tokenizer, requests)
    general = General.of(loaded, tokenizer, prose, questions)
    on = Subject(loaded, tokenizer, requests, before, general)
    for row in rows:
        if row == "untouched":
            yield row, on.score()
        elif row == "ours" or row in run.variants:
            yield row, ours(on, run, run.variants.get(row, {}))
        else:
            yield row, baseline(on, run, row)


def load(name: str, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer, from a folder or a GGUF file."""
    device = machine.DEVICE
    if is_gguf(name):
        model, tokenizer = load_gguf(name, getattr(torch, dtype))
        return model.to(device).eval(), tokenizer
    model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def key_of(run: Run, row: str, file: str) -> dict[str, Any]:
    """What a row depends on, besides the model."""
    package = ROOT / "ultraedit_kernels"
    ours = row not in ("untouched", *run.rates)
    rooms = [package / "evaluation", package / "model"]
    rooms = [package] if ours or row == "published" else rooms
    sources = sorted(
        f for room in rooms for f in room.rglob("*.py") if not {"cli", "integrations"} & {*f.parts}
    )
    texts: list[str | Path] = [*sources, run.prose, run.questions, file]
    settings: Any = {**run.ours, **run.variants.get(row, {})} if ours else run.rates.get(row)
    return json.loads(
        json.dumps(
            {
                "files": [digest(text)[:12] for text in texts],
                "settings": [settings, run.depths if row == "LocFT-BF" else None],
                "edits": [run.edits, run.turn_size, run.skip],
                "dtype": run.dtype,
            }
        )
    )


def made(path: Path, key: dict[str, Any]) -> bool:
    """Whether the row is there."""
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["key"] == key


def write(path: Path, row: dict[str, Any]) -> None:
    """Keep a row, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(row, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    scratch.rename(path)


def _file_name(row: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in row)


def say(text: str) -> None:
    """To whoever waits."""
    print(text, file=sys.stderr, flush=True)


def _named(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not (name and mark and value):
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME=VALUE")
    return name, value


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=_names, default=tuple(PACKAGES), metavar="NAME,...")
    parser.add_argument(
        "--set", type=_named, action="append", default=[], metavar="NAME=FILE", dest="sets"
    )
    parser.add_argument("-n", "--edits", type=int, default=100)
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="leave out the first N")
    parser.add_argument("--turn-size", type=int, default=20)
    parser.add_argument("--rows", type=_names, default=ROWS, help=f"of {', '.join(ROWS)}, ...")
    parser.add_argument(
        "--variant", type=_named, action="append", default=[], metavar="NAME=JSON", dest="variants"
    )
    parser.add_argument("--prose", type=Path, default=Run.prose, metavar="FILE")
    parser.add_argument("--questions", type=Path, default=Run.questions, metavar="FILE")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dir", type=Path, default=ROOT / "build-evaluate" / "real")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    unknown = set(args.rows) - {"untouched", "ours", *baselines.BASELINES}
    if unknown:
        parser.error(f"unknown row {', '.join(sorted(unknown))}, expected {', '.join(ROWS)}")
    if not args.sets and not args.report:
        parser.error("no records; name a file of them, e.g. --set counterfact=FILE")
    from bench import real_report

    if not args.report:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        perform(
            Run(
                args.dir,
                args.models,
                dict(args.sets),
                args.edits,
                args.skip,
                args.turn_size,
                args.rows,
                {name: json.loads(value) for name, value in args.variants},
                args.prose,
                args.questions,
                args.dtype,
            )
        )
    real_report.write(args.dir, ROOT / "bench" / "results", ROOT / "docs")


if __name__ == "__main__":
    main()
