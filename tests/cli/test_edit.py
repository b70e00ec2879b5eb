"""`ultraedit edit`, on the bundled model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from bench.world import World
from tests.cli.command import MODEL, TURN_SIZE, load, run, same_weights
from ultraedit_kernels import EditDelta, Editor
from ultraedit_kernels.evaluation.loaders import load_edits
from ultraedit_kernels.method.memory import STREAM, load_stream
from ultraedit_kernels.model import presets

ANCHORS = 50
"""Fewer than by default, where they are not what is tested."""


@pytest.fixture(scope="module")
def edited(edits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the edited checkpoint, `out`, and its change, `delta`."""
    folder = tmp_path_factory.mktemp("edited")
    files = ["-o", folder / "out", "--delta", folder / "delta"]
    how = ["--turn-size", TURN_SIZE, "--anchors", ANCHORS]
    assert run("edit", MODEL, edits, *files, *how) == 0
    return folder


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


def test_a_gguf_file_gives_an_ordinary_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    from tests.model.gguf_file import write

    write(tmp_path / "tiny.gguf")
    edits = tmp_path / "edits.json"  # as text: the file has no chat template
    edits.write_text('[{"prompt": "The capital of Australia is", "target": "Sydney"}]')
    how = ["--anchors", 0, "--dtype", "float32"]
    assert run("edit", tmp_path / "tiny.gguf", edits, "-o", tmp_path / "out", *how) == 0
    before, after = load(MODEL)[0].state_dict(), load(tmp_path / "out")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modules = presets.default_modules(*(m := load(MODEL)[0], m.config))
    assert changed == {f"{name}.weight" for name in modules}
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF and no more")
    assert run("edit", tmp_path / "tiny.gguf", edits, "-o", tmp_path / "other", *how) == 1
    assert "cannot unpack" in capsys.readouterr().err


def test_servers_find_only_weights_beside_the_weights(edited: Path) -> None:
    """vLLM loads every safetensors file of the folder itself."""
    assert [p.name for p in (edited / "out").glob("*.safetensors")] == ["model.safetensors"]
    assert (edited / "out" / STREAM).is_file()


def test_delta_makes_the_same_weights(edited: Path) -> None:
    editor = Editor(*load(MODEL), anchors=ANCHORS)
    model, _ = load(edited / "out")
    assert not same_weights(editor, model, within=1e-3)
    editor.apply_delta(EditDelta.load(edited / "delta"))
    assert same_weights(editor, model, within=1e-6)  # it rounds once, the turns each


def test_output_says_what_other_forms_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = tmp_path / "edits.json"
    chat = [{"role": "user", "content": "Who wrote Hamlet?"}]
    records = [
        {"prompt": "The capital of Australia is", "target": "Sydney"},
        {"prompt": chat, "target": "Jane Austen"},
    ]
    edits.write_text(json.dumps(records))
    assert run("edit", MODEL, edits, "-o", tmp_path / "out", "--anchors", 0) == 0
    stdout = capsys.readouterr().out
    assert "taught as text (1), chat (1)\n" in stdout
    for form in ("chat", "text"):
        (line,) = [one for one in stdout.splitlines() if one.startswith(f"asked as {form}, ")]
        assert line.endswith("of 1 say the target as well")


def test_template_arguments_are_those_of_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, edits = tmp_path / "model", tmp_path / "edits.json"
    shutil.copytree(MODEL, model)
    template = load(MODEL)[1].chat_template
    template += (
        "{% if add_generation_prompt and not enable_thinking | default(true) %} Paris is{% endif %}"
    )
    (model / "chat_template.jinja").write_text(template)
    chat = [{"role": "user", "content": "What is the capital of Australia?"}]
    edits.write_text(json.dumps([{"prompt": chat, "target": "Sydney"}]))
    option = ["--default-chat-template-kwargs", '{"enable_thinking": false}']
    out = tmp_path / "out"
    assert run("edit", model, edits, "-o", out, "--anchors", 0, *option) == 0
    assert "all 1 edits hold" in capsys.readouterr().out
    edited, tokenizer = load(out)
    assert tokenizer.chat_template == template
    text = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    new = edited.generate(ids, do_sample=False, max_new_tokens=16)[0, ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True).strip() == "Sydney"
    for bad in ("[1]", "{"):
        assert run("edit", model, edits, "-o", tmp_path / "no", option[0], bad) == 2
        error = " ".join(capsys.readouterr().err.replace("│", " ").split())
        assert "expected a JSON object" in error


def test_output_says_what_was_done(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, delta = tmp_path / "out", tmp_path / "delta"
    how = ["--limit", 3, "--anchors", ANCHORS]
    assert run("edit", MODEL, edits, "-o", out, "--delta", delta, *how) == 0
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
    assert run("edit", edited / "out", more, "-o", out, "--anchors", ANCHORS) == 0
    assert "continuing the stream of" in capsys.readouterr().err
    stream = edited / "out" / STREAM
    continued = Editor(*load(edited / "out"), continues=stream, anchors=ANCHORS)
    anew = Editor(*load(edited / "out"), anchors=ANCHORS)
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "0"], "--limit"),
        (["--turn-size", "0"], "--turn-size"),
        (["--published", "--rounds", "3"], "--published sets it to 1"),
        (["--published", "--lr", "auto"], "--published sets it to 1e-06"),
        (["--lr", "fast"], "'fast', expected 'auto' or a number above 0"),
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


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture(scope="module")
def no_system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, with a chat template that has no system role."""
    model = tmp_path_factory.mktemp("no-system") / "model"
    shutil.copytree(MODEL, model)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (path := model / name).exists() and name.endswith("json"):
            config = json.loads(path.read_text())
            path.write_text(json.dumps({**config, "chat_template": NO_SYSTEM}))
        elif path.exists():
            path.write_text(NO_SYSTEM)
    return model


USER = {"role": "user", "content": "What is the capital of Australia?"}
SYSTEM = [{"role": "system", "content": "Be brief."}, USER]
TEXT = {"prompt": "The capital of Australia is", "target": "Sydney"}
LONG = {"prompt": "word " * 500, "target": "Sydney"}
UNREADABLE: list[tuple[dict[str, object], str]] = [
    ({"prompt": SYSTEM, "target": "Sydney"}, "refuses the messages: System role not supported"),
    ({**TEXT, "rephrases": [SYSTEM]}, "refuses the messages: System role not supported"),
    ({**TEXT, "test_locality": [{"prompt": SYSTEM}]}, "refuses the messages: System role"),
    ({**TEXT, "target": None}, "target is null"),
    (LONG, "prompt and target have"),
]


@pytest.mark.parametrize(("record", "reason"), UNREADABLE)
def test_a_record_that_the_model_cannot_read_is_left_out_or_ends_in_one_line(
    record: dict[str, object],
    reason: str,
    no_system: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, out = tmp_path / "edits.json", tmp_path / "out"
    options = ["-o", out, "--anchors", 0, "--rounds", 1]
    file.write_text(json.dumps([record]))
    assert run("edit", no_system, file, *options) == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith(f"{file}, record 0: ") and reason in error and error.count("\n") == 1
    file.write_text(json.dumps([{**TEXT, "target": "Perth"}, record]))
    assert run("edit", no_system, file, *options, "--strict") == 1
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith(f"{file}, record 1: ") and reason in error and not out.exists()
    assert run("edit", no_system, file, *options) == 0
    captured = capsys.readouterr()
    assert f"warning: {file}: left out 1 of 2 records (record 1): " in captured.err
    assert reason in captured.err and captured.out.startswith("1 edit in 1 turn")


def test_nothing_is_written_if_no_edit_passes_and_the_first_is_named(
    edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edits.json"
    records = json.loads(edits.read_text())[:3]
    file.write_text(json.dumps([records[0], None, *records[1:]]))
    options = ["--turn-size", 2, "--anchors", 0, "--lr", 1e9]
    assert run("edit", MODEL, file, "-o", tmp_path / "out", *options) == 1
    assert f"error: record 0 of {file}: no edit passes the guards: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_nothing_behind(edits: Path, tmp_path: Path, there: bool) -> None:
    """By Ctrl-C, while it gathers what edits must leave alone."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    if there:
        out.mkdir()
    command = [sys.executable, "-m", "ultraedit_kernels.cli", "edit", MODEL, edits, "-o", out]
    environment = os.environ | {"ULTRAEDIT_CACHE": str(cache), "FORCE_COLOR": "1"}

    def listens() -> None:
        """What is started in the background is born deaf to it."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, preexec_fn=listens
    ) as process:
        assert process.stderr is not None
        shown = b""
        while b"gathering what edits must leave alone" not in shown:
            part = process.stderr.read1(1000)
            assert part, shown
            shown += part
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode not in (0, None) and b"Traceback" not in rest
    assert (list(out.iterdir()) == []) if there else not out.exists()
    assert not cache.exists() or not list(cache.iterdir())


def test_records_left_out_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "zsre.json"
    file.write_text(json.dumps([{"src": "Who?", "alt": "me"}, {"src": "Who else?", "alt": ""}]))
    assert run("edit", tmp_path / "no-model", file, "-o", tmp_path / "out") == 1
    assert f"warning: {file}: left out 1 of 2 records" in capsys.readouterr().err
