"""Do edits hold when the model really speaks? Reproduces tables and plots of docs/results.md.

Usage, from the repository root; on nothing but the CPU:

    python -m bench.evaluate                                     # all parts
    python -m bench.evaluate main frontier                       # some of them
    python -m bench.evaluate --counterfact FILE --zsre FILE      # with the real edit sets
    python -m bench.evaluate --report                            # tables and plots of what was run

Parts:

main        every method on fresh synthetic worlds, turn by turn, scored after all turns
counterfact the same on a model that was trained on the true side of CounterFact records
zsre        the same with zsRE
frontier    scores of ours against one setting at a time, on worlds that defaults were chosen on
lifelong    one long stream, scored on the way, on a model with the room for it
ablations   of ours, on a shorter stream of the first synthetic world

Trained models and results are kept in `--dir`; a result is made anew if the code that made it has
changed. Tables go to bench/results, plots to docs, see `evaluate_report.py`.

All scores are exact match of free greedy generation with stop at the end of sequence, next to
teacher-forced token accuracy (`ultraedit_kernels/evaluation/scores.py`). Test questions are
never shown to a method. Seeds of worlds that defaults were chosen on (`tuning_seeds`) are not those
reported.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import logging as transformers_logging

from bench.train_model import answers, fit
from bench.world import World
from ultraedit_kernels import Editor, EditRequest, Statistics
from ultraedit_kernels.editor import EditOutcome
from ultraedit_kernels.evaluation import baselines as comparison
from ultraedit_kernels.evaluation import scores as metrics
from ultraedit_kernels.evaluation.answers import Output
from ultraedit_kernels.evaluation.loaders import load_edits, split_turns
from ultraedit_kernels.evaluation.perplexity import perplexity
from ultraedit_kernels.method.guards import GuardError
from ultraedit_kernels.model.parallel import weight_of
from ultraedit_kernels.model.presets import PAPER, resolve_modules
from ultraedit_kernels.model.request import Prompt

ROOT = Path(__file__).parent.parent
PARTS = ("main", "counterfact", "zsre", "frontier", "lifelong", "ablations")
SOURCES = {
    "counterfact": "CounterFact (10,000 records as JSON, in EasyEdit's or ROME's layout; "
    "https://rome.baulab.info/data/dsets/counterfact.json)",
    "zsre": "zsRE (JSON with src, alt, answers, rephrase, loc and loc_ans, as MEND made it)",
}
"""Where the real sets come from; none is part of this project."""

DOWN = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
FRONTIER: dict[str, list[dict[str, Any]]] = {
    "anchors": [{"anchors": n} for n in (0, 500, 4000)],
    "rounds": [{"rounds": n} for n in (6, 12)],
    "step": [{"step": x} for x in (0.2, 1.0)],
    "margin": [{"margin": x} for x in (2.0, 6.0)],
    "repairs": [{"repairs": n} for n in (0,)],
    "layers": [{"modules": DOWN[-n:]} for n in (1, 2, 3)],
}
"""Setting → values of `Editor` arguments to try; everything else stays at its default, whose row
belongs to each of them."""

LIFELONG_RATES = (0.2, 0.4, 0.8, 1.6)
"""Of the published method in a long stream, times d_in."""
FREEZE_AFTER = 10
"""Turns after which the statistics of the ablation stay as they are."""
METHODS = ("ours", "published")
"""In a long stream."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "statistics per shape": {"statistics": "per-shape"},
    "statistics frozen": {},
    "bfloat16, nearest": {},
    "bfloat16, stochastic": {"rounding": "stochastic"},
}
"""Of ours: arguments of `Editor`; what they do not say, `stream_scores` does."""


@dataclass(frozen=True)
class Scale:
    """How much is run."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    tuning_seeds: tuple[int, ...] = (101, 102)
    draws: tuple[int, ...] = (1, 2, 3)
    """Of edits from the records of a real set."""
    facts: int = 1000
    edits: int = 200
    turn_size: int = 20
    rephrases: int = 4
    """Given per edit in the row that says so."""
    hidden: int = 128
    layers: int = 4
    vocab: int = 1024
    epochs: int = 25
    records: int = 1000
    record_epochs: int = 30
    ours: dict[str, Any] = field(default_factory=dict)
    """Arguments of `Editor`; none, so that its defaults are measured."""
    baselines: tuple[str, ...] = tuple(comparison.BASELINES)
    """What ours is compared with."""
    rates: dict[str, list[float]] | None = None
    """Baseline → learning rates, in place of `comparison.rates`."""
    frontier: dict[str, list[dict[str, Any]]] | None = None
    """In place of `FRONTIER`."""
    lifelong_facts: int = 3000
    lifelong_hidden: int = 256
    lifelong_wider: int = 6
    """The feed-forward, in hidden sizes: its width is how many keys a module can tell apart."""
    lifelong_epochs: int = 16
    lifelong_edits: int = 2000
    ablation_edits: int = 500
    lifelong_again: float = 0.1
    """Share of the stream that edits a fact again."""
    lifelong_first: int = 100
    """First edits of the stream that are scored by themselves; none is edited again."""
    lifelong_points: tuple[int, ...] = (100, 200, 500, 1000, 1500, 2000)
    sample: int = 200
    """Most edits that are scored at a point, and most texts of perplexity, in fives."""


@dataclass(frozen=True)
class Source:
    """What a model is trained on: a synthetic world, or the true side of an edit set."""

    seed: int = 0
    facts: int = 0
    hidden: int = 128
    epochs: int = 25
    wider: int = 3
    """The feed-forward, in hidden sizes."""
    file: str | None = None
    """Of an edit set; then `facts` is the number of records."""

    @property
    def name(self) -> str:
        kind = f"synthetic-{self.seed}" if self.file is None else f"records-{digest(self.file)[:8]}"
        return f"{kind}-{self.facts}-{self.hidden}x{self.wider}-{self.epochs}"

    def world(self) -> World:
        return World.synthetic(self.seed, self.facts)

    def pairs(self) -> list[tuple[Prompt, str]]:
        """The texts of the training, prompts with their answers."""
        if self.file is None:
            return self.world().training_examples()
        return [pair for texts, _ in true_side(self.file, self.facts) for pair in texts]


@dataclass(frozen=True)
class Subject:
    """A trained model, with edits to make and questions about them."""

    model: Any
    tokenizer: Any
    requests: list[EditRequest]
    before: list[Output]
    texts: list[tuple[Prompt, str]]
    """That the edits do not touch, for perplexity."""

    def score(self) -> dict[str, Any]:
        """The model as it is now."""
        scores = metrics.evaluate(self.model, self.tokenizer, self.requests, before=self.before)
        del scores["rows"]
        if self.texts:
            scores["perplexity"] = perplexity(self.model, self.tokenizer, self.texts)
        return scores


# Models.


def train(source: Source, folder: Path, scale: Scale) -> None:
    """Train the model of a source, unless the folder holds it."""
    path = folder / "models" / source.name
    if (path / "training.json").exists():
        return
    pairs = source.pairs()
    model, tokenizer, seconds = fit(
        pairs,
        hidden=source.hidden,
        layers=scale.layers,
        wider=source.wider,
        vocab=scale.vocab,
        epochs=source.epochs,
        seed=source.seed,
    )
    asked = random.Random(0).sample(pairs, min(1000, len(pairs)))
    given = answers(model, tokenizer, [prompt for prompt, _ in asked])
    right = sum(a == b for a, (_, b) in zip(given, asked, strict=True))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    report = {
        "parameters": model.num_parameters(),
        "texts": len(pairs),
        "seconds": round(seconds, 1),
        "exact_match_of_texts_seen": right / len(asked),
    }
    (path / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def load(source: Source, folder: Path) -> tuple[Any, Any]:
    path = folder / "models" / source.name
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def subject(source: Source, folder: Path, requests: Sequence[EditRequest], scale: Scale) -> Subject:
    """The untouched model and what it does at the edits' locality tests."""
    model, tokenizer = load(source, folder)
    touched = {json.dumps(p) for r in requests for p in (*_taught(r), *r.test_rephrases)}
    texts = [pair for pair in source.pairs() if json.dumps(pair[0]) not in touched]
    texts = texts[:: max(1, len(texts) // (5 * scale.sample))]
    plain = [replace(request, rephrases=()) for request in requests]
    return Subject(model, tokenizer, plain, metrics.record_locality(model, tokenizer, plain), texts)


def true_side(file: str, limit: int) -> list[tuple[list[tuple[Prompt, str]], EditRequest]]:
    """Texts that say what is true in a record of an edit set, and its edit.

    The texts are the prompt, the locality prompts and, in every other record, the rephrases, each
    with its true answer. Records are taken in order, with one prompt only the first.
    """
    truths: dict[str, str] = {}
    for record in json.loads(Path(file).read_text(encoding="utf-8")):
        rewrite = record.get("requested_rewrite", {})
        prompt = rewrite.get("prompt", "").replace("{}", rewrite.get("subject", ""))
        prompt = prompt or record.get("prompt") or record.get("src")
        truth = rewrite.get("target_true") or record.get("ground_truth") or record.get("answers")
        if not prompt or not truth:
            raise ValueError(
                f"{file}: a record has no prompt or no true answer (target_true, ground_truth or "
                "answers), expected both, to train a model on; take another set"
            )
        truth = truth["str"] if isinstance(truth, dict) else truth
        truths.setdefault(prompt, (truth if isinstance(truth, str) else truth[0]).strip())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # records without a new answer are left out
        requests = {json.dumps(r.prompt): r for r in reversed(load_edits(file))}
    result = []
    for i, request in enumerate(list(reversed(requests.values()))[:limit]):
        asked = [request.prompt, *(request.test_rephrases if i % 2 == 0 else ())]
        texts = [(prompt, truths[str(request.prompt)]) for prompt in asked]
        texts += [(t.prompt, t.answer) for t in request.test_locality if t.answer is not None]
        result.append((texts, request))
    return result


# Parts. Each result is JSON.


def compare(source: Source, folder: Path, scale: Scale, draw: int) -> dict[str, Any]:
    """Every method on the same edits, each from the untouched model."""
    taught = draw_edits(source, scale, draw)
    on = subject(source, folder, taught, scale)
    modules = resolve_modules(on.model, on.model.config, "auto")
    turns = list(split_turns(on.requests, scale.turn_size))
    rows: dict[str, Any] = {"untouched": on.score()}
    for baseline in scale.baselines:
        tried = (scale.rates or {}).get(baseline)
        rows[baseline] = comparison.search(
            baseline, on.model, on.tokenizer, turns, modules, on.score, tried
        )
    rows["ours, open loop"] = edit(on, on.requests, scale, rounds=1)
    rows["ours"] = edit(on, on.requests, scale)
    if any(request.rephrases for request in taught):
        rows[f"ours, {scale.rephrases} rephrases"] = edit(on, taught, scale)
    return {"methods": rows, **described(source, folder), "edits": len(taught)}


def draw_edits(source: Source, scale: Scale, draw: int) -> list[EditRequest]:
    """Edits to make; in a synthetic world with rephrases to teach, that are never scored."""
    if source.file is None:
        records = source.world().edits(scale.edits, seed=draw, rephrases=scale.rephrases)
        return [EditRequest.from_dict(record) for record in records]
    requests = [request for _, request in true_side(source.file, source.facts)]
    chosen = random.Random(f"draw:{draw}").sample(requests, min(scale.edits, len(requests) // 2))
    edited = {json.dumps(request.prompt) for request in chosen}
    return [
        replace(
            request,
            test_locality=tuple(
                t for t in request.test_locality if json.dumps(t.prompt) not in edited
            ),
        )
        for request in chosen
    ]


def edit(
    on: Subject, requests: Sequence[EditRequest], scale: Scale, **settings: Any
) -> dict[str, Any]:
    """Ours: all turns, then the scores; the model is left as it was."""
    begun = time.perf_counter()
    editor = Editor(on.model, on.tokenizer, **{**scale.ours, **settings})
    editor.prepare()
    outcomes: list[EditOutcome] = []
    for turn in split_turns(requests, scale.turn_size):
        with contextlib.suppress(GuardError):  # then none of its edits is made
            outcomes += editor.apply(turn).edits
    seconds = time.perf_counter() - begun
    scores = on.score()
    editor.rollback(0)
    return {
        "seconds": seconds,
        "held_when_made": sum(o.succeeded for o in outcomes) / len(requests),
        "rounds": sum(o.rounds for o in outcomes) / max(1, len(outcomes)),
        **scores,
    }


def frontier(source: Source, folder: Path, scale: Scale, draw: int) -> dict[str, Any]:
    """Ours with one setting changed at a time."""
    on = subject(source, folder, draw_edits(source, scale, draw), scale)
    rows = [{"setting": "defaults", "value": "", **edit(on, on.requests, scale)}]
    for setting, values in (FRONTIER if scale.frontier is None else scale.frontier).items():
        for given in values:
            (value,) = given.values()
            shown = len(value) if isinstance(value, list) else value
            scores = edit(on, on.requests, scale, **given)
            rows.append({"setting": setting, "value": shown, **scores})
    return {"rows": rows, "untouched": on.score(), **described(source, folder)}


def stream(source: Source, scale: Scale, draw: int) -> list[EditRequest]:
    """Edits in order, some of them of a fact that was edited before, with another target."""
    world, rng = source.world(), random.Random(f"stream:{draw}")
    again = round(scale.lifelong_again * scale.lifelong_edits)
    records = world.edits(scale.lifelong_edits - again, seed=draw, rephrases=scale.rephrases)
    facts = {json.dumps(p): fact for fact in world.facts for p in world.seen(fact)}
    first, size = scale.lifelong_first, scale.turn_size
    places = set(rng.sample(range(first + 2 * size, scale.lifelong_edits), again))
    fresh = iter(records)
    edits: list[dict[str, Any]] = []
    for place in range(scale.lifelong_edits):
        if place not in places:
            edits.append(next(fresh))
            continue
        old = rng.choice(edits[first : place - size])  # of an earlier turn
        fact = facts[json.dumps(old["prompt"])]
        others = [o for o in world.objects[fact.relation] if o not in (old["target"], fact.object)]
        edits.append({**old, "target": rng.choice(others or [fact.object])})
    return [EditRequest.from_dict(record) for record in edits]


def lifelong(source: Source, folder: Path, scale: Scale, draw: int, method: str) -> dict[str, Any]:
    """A long stream, scored on the way: all edits so far, and the first ones."""
    return stream_scores(source, folder, scale, stream(source, scale, draw), method)


def ablation(source: Source, folder: Path, scale: Scale, draw: int, what: str) -> dict[str, Any]:
    """Ours in a shorter stream, with one thing changed."""
    edits = stream(source, replace(scale, lifelong_edits=scale.ablation_edits), draw)
    return stream_scores(source, folder, scale, edits, what)


def stream_scores(
    source: Source, folder: Path, scale: Scale, edits: Sequence[EditRequest], variant: str
) -> dict[str, Any]:
    """A stream under one of `METHODS` or `ABLATIONS`."""
    whole = subject(source, folder, edits, scale)
    if variant.startswith("bfloat16"):
        whole.model.to(torch.bfloat16)
    points = [point for point in scale.lifelong_points if point <= len(whole.requests)]
    asked = _asked(whole, points, scale)
    base = perplexity(whole.model, whole.tokenizer, whole.texts)

    def run(points: Sequence[int], **settings: Any) -> dict[str, Any]:
        editor = Editor(whole.model, whole.tokenizer, **settings)
        rows: list[dict[str, Any]] = []
        seconds: list[float] = []
        done = held = 0
        try:
            for turn in split_turns(whole.requests, scale.turn_size):
                begun = time.perf_counter()
                with contextlib.suppress(GuardError):
                    held += sum(outcome.succeeded for outcome in editor.apply(turn).edits)
                seconds.append(time.perf_counter() - begun)
                done += len(turn)
                if variant == "statistics frozen" and len(seconds) == FREEZE_AFTER:
                    freeze(editor.statistics)
                for point in [p for p in points if done - len(turn) < p <= done]:
                    rows += [
                        {
                            "after": point,
                            "asked": name,
                            "seconds": sum(seconds),
                            "scored": len(on.requests),
                            **on.score(),
                        }
                        for name, on in asked[point].items()
                    ]
        finally:
            editor.rollback(0)
        return {"rows": rows, "turn_seconds": seconds, "held_when_made": held / done}

    if variant == "published":
        best = _best_rate(lambda lr: run(points[-1:], **{**PAPER, "lr": lr}), whole.model, scale)
        result = run(points, **{**PAPER, "lr": best}) | {"lr": best}
    else:
        result = run(points, **{**scale.ours, **ABLATIONS[variant]})
    return {**result, "perplexity_before": base, **described(source, folder)}


def _asked(whole: Subject, points: Sequence[int], scale: Scale) -> dict[int, dict[str, Subject]]:
    """What is asked after so many edits."""
    first = scale.lifelong_first
    asked: dict[int, dict[str, Subject]] = {}
    for point in points:
        done = whole.requests[:point]
        parts = {"all so far": last_targets(done, scale.sample), f"first {first}": done[:first]}
        if point == points[-1]:
            parts["edited again"] = edited_again(done)
        for name, part in parts.items():
            if not part:
                continue
            before = metrics.record_locality(whole.model, whole.tokenizer, part)
            texts = whole.texts if name == "all so far" else []
            on = replace(whole, requests=part, before=before, texts=texts)
            asked.setdefault(point, {})[name] = on
    return asked


def _best_rate(run: Callable[[float], dict[str, Any]], model: Any, scale: Scale) -> float:
    """The step size of the published method that scores best on all edits, after the last one."""
    modules = resolve_modules(model, model.config, "auto")
    width = max(weight_of(model.get_submodule(name)).shape[1] for name in modules)
    found: dict[float, float] = {}
    for lr in (scale.rates or {}).get("published", [p / width for p in LIFELONG_RATES]):
        try:
            end = next(row for row in run(lr)["rows"] if row["asked"] == "all so far")
        except ValueError:  # it diverged
            continue
        found[lr] = comparison.harmonic_mean(end["generation"])
    return max(found, key=lambda lr: found[lr])


def _taught(request: EditRequest) -> tuple[Prompt, ...]:
    return (request.prompt, *request.rephrases)


def last_targets(requests: Sequence[EditRequest], most: int) -> list[EditRequest]:
    """The edits that are to hold, of a fact edited twice the last one; at most so many, drawn."""
    last = list({json.dumps(request.prompt): request for request in requests}.values())
    return random.Random(len(requests)).sample(last, min(most, len(last)))


def edited_again(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Of every fact that was edited more than once, the last edit."""
    last: dict[str, EditRequest] = {}
    again: dict[str, EditRequest] = {}
    for request in requests:
        key = json.dumps(request.prompt)
        if key in last:
            again[key] = request
        last[key] = request
    return list(again.values())


def freeze(statistics: Mapping[str, Statistics]) -> None:
    """Give statistics, in place, such a weight that no further rows move them."""
    for stats in statistics.values():
        count, variance = stats.count * 1e18, stats.std**2
        stats.m2.copy_(variance * (count - 1))
        stats.count.copy_(count)


def described(source: Source, folder: Path) -> dict[str, Any]:
    """The conditions of a result."""
    return {
        "model": json.loads((folder / "models" / source.name / "training.json").read_text())
        | {
            "hidden": source.hidden,
            "wider": source.wider,
            "facts": source.facts,
            "seed": source.seed,
        },
        "hardware": _processor(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"1 thread on {name}"


def digest(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# Running.


@dataclass(frozen=True)
class Task:
    """One result: `work(source, folder, scale, draw, ...)`, kept as `name`.json."""

    name: str
    work: Callable[..., dict[str, Any]]
    source: Source
    draw: int
    options: tuple[str, ...] = ()


def tasks(parts: Sequence[str], scale: Scale, files: dict[str, str]) -> Iterator[Task]:
    """The longest first, so that two workers end together."""
    if "lifelong" in parts:
        source = Source(
            scale.seeds[0],
            scale.lifelong_facts,
            scale.lifelong_hidden,
            scale.lifelong_epochs,
            scale.lifelong_wider,
        )
        for method in METHODS:
            yield Task(f"lifelong-{method}", lifelong, source, scale.seeds[0], (method,))
    for part in ("counterfact", "zsre"):
        if part in parts and part not in files:
            _say(f"{part}: left out, as it needs --{part} FILE; from {SOURCES[part]}")
        elif part in parts:
            source = Source(
                0,
                scale.records,
                scale.hidden,
                scale.record_epochs,
                file=str(Path(files[part]).resolve()),
            )
            for draw in scale.draws:
                yield Task(f"{part}-{draw}", compare, source, draw)
    for part, work, seeds in (
        ("main", compare, scale.seeds),
        ("frontier", frontier, scale.tuning_seeds),
    ):
        if part in parts:
            for seed in seeds:
                source = Source(seed, scale.facts, scale.hidden, scale.epochs)
                yield Task(f"{part}-{seed}", work, source, seed)
    if "ablations" in parts:
        source = Source(scale.seeds[0], scale.facts, scale.hidden, scale.epochs)
        for what in ABLATIONS:
            name = f"ablations-{what.replace(', ', '-').replace(' ', '-')}"
            yield Task(name, ablation, source, scale.seeds[0], (what,))


def run(
    parts: Sequence[str],
    scale: Scale,
    folder: Path,
    files: dict[str, str],
    workers: int,
) -> None:
    """Train what is missing, then make what is missing or was made by other code."""
    wanted = list(tasks(parts, scale, files))
    code = code_digest()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    context = multiprocessing.get_context("spawn")
    trained: set[Source] = set()
    untrained = list(dict.fromkeys(task.source for task in wanted))
    running: dict[Future[None], tuple[str, Source | None]] = {}
    begun = time.perf_counter()
    with ProcessPoolExecutor(workers, context, initializer=quiet) as pool:
        while wanted or running:
            while len(running) < workers:
                task = next((task for task in wanted if task.source in trained), None)
                if untrained:
                    source = untrained.pop(0)
                    started = pool.submit(train, source, folder, scale)
                    running[started] = (f"model {source.name}", source)
                elif task:
                    wanted.remove(task)
                    running[pool.submit(make, task, folder, scale, code)] = (task.name, None)
                else:
                    break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                name, model = running.pop(done)
                done.result()
                if model:
                    trained.add(model)
                _say(f"{time.perf_counter() - begun:6.0f} s  {name}")


def make(task: Task, folder: Path, scale: Scale, code: str) -> None:
    """The result of a task, unless the same code made it before on the same."""
    path = folder / "results" / f"{task.name}.json"
    key = {"code": code, "scale": json.loads(json.dumps(asdict(scale))), "source": task.source.name}
    if path.exists() and json.loads(path.read_text())["key"] == key:
        return
    begun = time.perf_counter()
    result = task.work(task.source, folder, scale, task.draw, *task.options)
    result |= {"key": key, "wall_seconds": time.perf_counter() - begun}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def code_digest() -> str:
    """Of everything that a result depends on."""
    files = sorted((ROOT / "ultraedit_kernels").rglob("*.py"))
    files += [ROOT / "bench" / name for name in ("evaluate.py", "world.py", "train_model.py")]
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()


def quiet() -> None:
    """One thread, no bars: for a worker."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--counterfact", metavar="FILE")
    parser.add_argument("--zsre", metavar="FILE")
    parser.add_argument(
        "--baselines", nargs="*", default=list(comparison.BASELINES), choices=comparison.BASELINES
    )
    parser.add_argument("--dir", type=Path, default=ROOT / "build-evaluate")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}, expected {', '.join(PARTS)}")
    from bench import evaluate_report

    if not args.report:
        given = {"counterfact": args.counterfact, "zsre": args.zsre}
        files = {part: file for part, file in given.items() if file}
        scale = Scale(baselines=tuple(args.baselines))
        run(args.parts or PARTS, scale, args.dir, files, args.workers)
    evaluate_report.write(args.dir / "results", ROOT / "bench" / "results", ROOT / "docs")


if __name__ == "__main__":
    main()
