"""The console script, on the bundled model."""

from __future__ import annotations

import inspect
import json
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from bench.world import World  # noqa: E402
from ultraedit_kernels import (  # noqa: E402
    EditDelta,
    Editor,
    __version__,
    cli,
)
from ultraedit_kernels.evaluation import baselines  # noqa: E402
from ultraedit_kernels.evaluation.loaders import load_edits  # noqa: E402
from ultraedit_kernels.method.memory import STREAM, load_stream  # noqa: E402
from ultraedit_kernels.model import presets  # noqa: E402

MODEL = Path(__file__).parents[1] / "bench" / "tiny-facts"
TURN_SIZE = 8
"""Of the 20 edits, so that there are three turns."""


def load(path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    return model, transformers.AutoTokenizer.from_pretrained(path)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def same_weights(editor: Editor, model: torch.nn.Module, within: float = 0) -> bool:
    return all(
        torch.allclose(weight, model.get_parameter(f"{name}.weight"), rtol=0, atol=within)
        for name, weight in editor.weights.items()
    )


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 edits, as a file."""
    path = tmp_path_factory.mktemp("edits") / "edits.json"
    path.write_text(json.dumps(World.earth().edits(20, seed=1)))
    return path


@pytest.fixture(scope="module")
def edited(edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the edited checkpoint, `out`, and its change, `delta`."""
    folder = tmp_path_factory.mktemp("edited")
    files = ["-o", folder / "out", "--delta", folder / "delta"]
    assert run("edit", MODEL, edits, *files, "--turn-size", TURN_SIZE) == 0
    return folder


@pytest.fixture(scope="module")
def evaluation(edits: Path) -> subprocess.CompletedProcess[str]:
    """An evaluation of the 20 edits by the program as a user starts it."""
    command = [sys.executable, "-m", "ultraedit_kernels.cli", "eval", MODEL, edits, "--json", "-"]
    return subprocess.run(
        [*map(str, command), "--turn-size", str(TURN_SIZE)], capture_output=True, text=True
    )


def test_checkpoint_says_the_targets(edited: Path, edits: Path) -> None:
    model, tokenizer = load(edited / "out")
    for request in load_edits(edits):
        ids = tokenizer(request.prompt, return_tensors="pt").input_ids
        new = model.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
        assert new[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == request.target


def test_checkpoint_differs_from_the_model_in_the_edited_weights_only(edited: Path) -> None:
    before, after = load(MODEL)[0].state_dict(), load(edited / "out")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = presets.default_modules(*(m := load(MODEL)[0], m.config))
    assert before.keys() == after.keys()
    assert changed == {f"{name}.weight" for name in modules}


def test_servers_find_only_weights_beside_the_weights(edited: Path) -> None:
    """vLLM loads every safetensors file of the folder itself."""
    assert [p.name for p in (edited / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert (edited / "out" / STREAM).is_file()


def test_delta_makes_the_same_weights(edited: Path) -> None:
    editor = Editor(*load(MODEL))
    model, _ = load(edited / "out")
    assert not same_weights(editor, model, within=1e-3)
    editor.apply_delta(EditDelta.load(edited / "delta"))
    assert same_weights(editor, model, within=1e-6)  # it rounds once, the turns each


def test_output_says_what_was_done(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, delta = tmp_path / "out", tmp_path / "delta"
    assert run("edit", MODEL, edits, "-o", out, "--limit", 3, "--delta", delta) == 0
    stdout = capsys.readouterr().out
    assert stdout.startswith("3 edits in 1 turn, ")
    assert "all 3 edits hold\n" in stdout
    assert f"checkpoint: {out}\ndelta:      {delta}\n" in stdout


def test_output_lists_edits_that_do_not_hold(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hopeless = ["--rounds", 1, "--margin", 1000, "--limit", 12, "--anchors", 0]
    assert run("edit", MODEL, edits, "-o", tmp_path / "out", *hopeless) == 0
    stdout = capsys.readouterr().out
    assert "0 edits hold, 12 DO NOT, a lead of 1000 logits asked" in stdout
    requests = load_edits(edits)[:12]
    assert [f"{r.prompt} → {r.target}" in stdout for r in requests] == [True] * 10 + [False] * 2
    assert "and 2 more" in stdout


def test_editing_a_checkpoint_again_continues_its_stream(
    edited: Path, edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, out = tmp_path / "more.json", tmp_path / "out"
    more.write_text(json.dumps(World.earth().edits(5, seed=2)))
    assert run("edit", edited / "out", more, "-o", out) == 0
    assert "continuing the stream of" in capsys.readouterr().err
    continued = Editor(*load(edited / "out"), continues=edited / "out" / STREAM)
    anew = Editor(*load(edited / "out"))
    for editor in (continued, anew):
        editor.apply(load_edits(more))
    model, _ = load(out)
    assert same_weights(continued, model)
    assert not same_weights(anew, model, within=1e-4)
    _, taught = load_stream(out / STREAM)
    assert len(taught) == len(load_edits(edits)) + 5  # for the next time


def test_stream_of_other_modules_is_refused(
    edited: Path, edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--modules", "model.layers.1.mlp.up_proj, model.layers.0.mlp.up_proj"]
    assert run("edit", edited / "out", edits, "-o", tmp_path / "out", *other) == 1
    assert "edit the same modules" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generation_settings_go_along_as_shipped(edits: Path, tmp_path: Path) -> None:
    """Also those that transformers itself would not write."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, model)
    shipped = json.loads((model / "generation_config.json").read_text())
    shipped |= {"temperature": 0.6, "top_p": 0.9, "do_sample": False}
    (model / "generation_config.json").write_text(json.dumps(shipped))
    assert run("edit", model, edits, "-o", out, "--limit", 1, "--anchors", 0) == 0
    assert json.loads((out / "generation_config.json").read_text()) == shipped


def test_json_has_every_score(evaluation: subprocess.CompletedProcess[str], edits: Path) -> None:
    assert evaluation.returncode == 0, evaluation.stderr
    report = json.loads(evaluation.stdout)
    for source in (report, report["untouched"]):
        for regime in ("generation", "teacher_forced"):
            assert set(source[regime]) == set(cli.SCORES)
    scores, untouched = report["generation"], report["untouched"]["generation"]
    assert scores["efficacy"] >= 0.9
    assert scores["generalization"] > 0.5 > untouched["generalization"]
    assert scores["specificity"] > 0.9 and untouched["specificity"] is None
    assert untouched["efficacy"] == 0 and untouched["specificity_gold"] > 0.9
    assert report["perplexity"] > report["untouched"]["perplexity"] > 1
    assert (report["model"], report["edits_file"]) == (str(MODEL), str(edits))
    assert (report["edits"], report["turns"], report["dtype"]) == (20, 3, "float32")
    assert 0 < report["seconds"] < 60
    assert report["versions"]["ultraedit-kernels"] == __version__
    assert report["settings"]["turn_size"] == TURN_SIZE
    assert report["settings"]["lr"] == "auto" and len(report["settings"]["modules"]) == 4
    assert sum(part["edits"] for part in report["per_relation"].values()) == 20


def test_json_rows_join_scores_and_verdicts(evaluation: subprocess.CompletedProcess[str]) -> None:
    report = json.loads(evaluation.stdout)
    rows = report["rows"]
    assert [row["prompt"] for row in rows] == [e["prompt"] for e in World.earth().edits(20, seed=1)]
    assert [row["turn"] for row in rows] == [1] * 8 + [2] * 8 + [3] * 4
    right = sum(row["efficacy"]["generation"] for row in rows)
    assert right / 20 == pytest.approx(report["generation"]["efficacy"])
    assert sum(row["held_when_made"] for row in rows) == report["held_when_made"]


def test_table_shows_the_scores_of_the_report(
    evaluation: subprocess.CompletedProcess[str],
) -> None:
    report = json.loads(evaluation.stdout)
    lines = [line.split() for line in evaluation.stderr.splitlines()]
    (efficacy,) = (line for line in lines if line[:1] == ["efficacy"])
    assert [float(cell) for cell in efficacy[1:]] == [
        pytest.approx(100 * source[regime]["efficacy"], abs=0.06)
        for regime in ("generation", "teacher_forced")
        for source in (report, report["untouched"])
    ]
    assert {relation for line in lines for relation in line[:1]} >= set(report["per_relation"])
    assert f"ultraedit-kernels {__version__}" in evaluation.stderr


def test_published_settings(edits: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    options = ["--limit", 4, "--published", "--lr", 1e-3, "--json", file]
    assert run("eval", MODEL, edits, *options) == 0
    report = json.loads(file.read_text())
    assert report["settings"].items() >= (presets.PAPER | {"lr": 1e-3, "turn_size": 100}).items()
    assert {row["rounds"] for row in report["rows"]} == {1}


def test_baselines_run_on_the_same_edits(
    edits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("peft")
    best = {"published": 1.5e-3, "fine-tuning": 3e-3, "LoRA": 1e-2}
    monkeypatch.setattr(baselines, "rates", lambda baseline, *_: [best[baseline]])
    file = tmp_path / "scores.json"
    options = ["--limit", 4, "--turn-size", 4, "--anchors", 0, "--json", file, "--baselines"]
    assert run("eval", MODEL, edits, *options) == 0
    report = json.loads(file.read_text())
    assert list(report["baselines"]) == list(best)
    for baseline, scored in report["baselines"].items():
        assert scored["lr"] == best[baseline] and scored["edits"] == 4
        assert scored["generation"] != report["untouched"]["generation"]
    for baseline in ("fine-tuning", "LoRA"):  # one turn, so that nothing is forgotten
        assert report["baselines"][baseline]["generation"]["efficacy"] == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    (shown,) = (line for line in lines if line[:1] == ["LoRA"])
    assert shown[1] == "0.01" and shown[3] == "100.0"


def test_a_server_is_not_edited(edits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "http://127.0.0.1:9"
    for option in (["--rounds", 2], ["--published"], ["--baselines"], ["--turn-size", 3]):
        assert run("eval", MODEL, edits, "--server", url, *option) == 2
        assert "a server is scored as it is" in capsys.readouterr().err
    assert run("eval", MODEL, edits, "--server", url) == 1
    assert f"no server answers at {url}" in capsys.readouterr().err


def test_help_tells_the_editors_defaults() -> None:
    defaults = inspect.signature(Editor).parameters
    hints = typing.get_type_hints(cli.edit, include_extras=True)
    for name in ("lr", "rounds", "margin", "anchors", "repairs"):
        assert hints[name].__metadata__[0].show_default == str(defaults[name].default)
    told = hints["turn_size"].__metadata__[0].show_default
    assert told == str(presets.PAPER_TURN_SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit"),
        (["--turn-size", "0"], "--turn-size"),
        (["--published", "--rounds", "3"], "--published sets it to 1"),
        (["--published", "--lr", "auto"], "--published sets it to 1e-06"),
        (["--lr", "fast"], "neither auto nor a number"),
        (["--dtype", "int8"], "expected auto, float32"),
        (["--device", "abacus"], "expected cpu, cuda"),
        (["--device", "cuda:99"], "cuda:99 is not there"),
        (["--colour", "red"], "No such option"),
    ],
)
def test_wrong_usage(
    options: list[str],
    message: str,
    edits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("edit", MODEL, edits, "-o", tmp_path / "out", *options) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_errors_are_one_message(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (full := tmp_path / "full").mkdir()
    (full / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    out, nowhere = tmp_path / "out", tmp_path / "nowhere" / "file"
    cases: list[tuple[list[object], str]] = [
        ([MODEL, tmp_path / "none.json", "-o", out], f"{tmp_path / 'none.json'}: No such file"),
        ([MODEL, MODEL / "config.json", "-o", out], "expected a list of edits"),
        ([MODEL, edits, "-o", full], "is not an empty directory"),
        ([MODEL, edits, "-o", full / "file"], "is not an empty directory"),
        ([MODEL, edits, "-o", out, "--delta", nowhere], "there is no directory"),
        ([MODEL, edits, "-o", out, "--delta", tmp_path], "is a directory"),
        ([MODEL, edits, "-o", tmp_path / "empty", "--delta", tmp_path / "empty" / "d"], "beside"),
        ([tmp_path / "no-model", edits, "-o", out], "there is no directory"),
        ([tmp_path / "empty", edits, "-o", out], "cannot load the model"),
        ([MODEL, edits, "-o", out, "--lr", "-1"], "lr is -1.0"),
        ([MODEL, edits, "-o", out, "--modules", "model.layers.77"], "model.layers.77"),
    ]
    for arguments, message in cases:
        assert run("edit", *arguments) == 1, message
        captured = capsys.readouterr()
        assert message in captured.err.partition("error: ")[2]
        assert "Traceback" not in captured.err
        assert not captured.out and not out.exists()
    assert run("eval", MODEL, edits, "--json", nowhere) == 1
    assert "there is no directory" in capsys.readouterr().err


def test_error_inside_a_turn_says_which(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edits.json"
    records = World.earth().edits(3, seed=1)
    records[2]["prompt"] = "word " * 500
    file.write_text(json.dumps(records))
    options = ["--turn-size", 2, "--anchors", 0, "--rounds", 1]
    assert run("edit", MODEL, file, "-o", tmp_path / "out", *options) == 1
    assert f"error: turn 2, records 2 to 2 of {file}: edit 0: prompt" in capsys.readouterr().err


def test_records_left_out_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zsre.json"
    file.write_text(json.dumps([{"src": "Who?", "alt": "me"}, {"src": "Who else?", "alt": ""}]))
    assert run("edit", tmp_path / "no-model", file, "-o", tmp_path / "out") == 1
    assert f"warning: {file}: left out 1 of 2 records" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"ultraedit {__version__}\n"


@pytest.mark.parametrize("module", ["transformers", "typer", "rich"])
def test_missing_dependency_says_what_to_install(module: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "from ultraedit_kernels.cli import main\n"
        "sys.exit(main(['edit', 'x', 'y', '-o', 'z']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {module}")
    assert line.endswith("is not installed; pip install 'ultraedit-kernels[transformers]'")


def test_serve_hands_its_arguments_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultraedit_kernels.integrations.vllm import serve

    received: list[list[str]] = []

    def record(arguments: list[str]) -> int:
        received.append(arguments)
        return 7

    monkeypatch.setattr(serve, "main", record)
    arguments = ["model", "-tp", "2", "--state-dir=x", "-O3", "--", "--version", "--help"]
    assert run("serve", *arguments) == 7
    assert run("serve", "--help") == 7
    assert received == [arguments, ["--help"]]


def test_serve_has_its_own_help_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--help") == 0
    assert "any vLLM server option" in capsys.readouterr().out
    assert run("serve") == 2
