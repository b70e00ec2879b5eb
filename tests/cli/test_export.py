"""`ultraedit export` and `ultraedit merge`, on the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.world import World
from tests.cli.command import MODEL, load, run, same_weights
from ultraedit_kernels import EditDelta, Editor
from ultraedit_kernels.evaluation.answers import generate_answers
from ultraedit_kernels.evaluation.loaders import load_edits
from ultraedit_kernels.model.request import EditRequest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A state directory of 40 edits in two turns, its deltas, and what its model answers."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "edits.json").write_text(json.dumps(World.earth().edits(40, seed=1)))
    requests = load_edits(folder / "edits.json")
    model, tokenizer = load(MODEL)
    editor = Editor(model, tokenizer, anchors=200, state_dir=folder / "state")
    editor.apply(requests[:20])
    editor.apply(requests[20:])
    prompts = [r.prompt for r in requests] + [p for r in requests for p in r.test_rephrases]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens=12)
    for version in (1, 2):
        editor.delta(version).save(folder / f"{version}.safetensors")
    editor.close()
    return {"folder": folder, "editor": editor, "prompts": prompts, "answers": answers}


def agreement(model: Any, made: dict[str, Any]) -> float:
    """Share of prompts that get the edited model's answer."""
    _, tokenizer = load(MODEL)
    told = generate_answers(model, tokenizer, made["prompts"], max_new_tokens=12)
    return sum(a == b for a, b in zip(told, made["answers"], strict=True)) / len(told)


@pytest.mark.parametrize("checked", [False, True])
def test_a_lora_adapter_says_what_the_edited_model_says(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], checked: bool
) -> None:
    peft = pytest.importorskip("peft")
    model, _ = load(MODEL)
    assert agreement(model, made) < 0.5
    how = ["--model", MODEL] if checked else []
    assert run("export", made["folder"] / "state", "--to", "lora", "-o", tmp_path / "a", *how) == 0
    said = capsys.readouterr().out
    assert "nothing of the change is left out" in said
    assert f"--max-lora-rank 128 --lora-modules edits={tmp_path / 'a'}" in said
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"))
    assert agreement(adapted, made) >= 0.99
    assert same_weights(made["editor"], adapted.merge_and_unload(), within=1e-5)


def test_a_lower_rank_says_what_it_leaves_out(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peft = pytest.importorskip("peft")
    state, out = made["folder"] / "state", tmp_path / "a"
    assert run("export", state, "--to", "lora", "-o", out, "--max-rank", 16) == 1
    error = capsys.readouterr().err
    assert "the target takes 16 at most; cut it with --rank 16" in " ".join(error.split())
    assert list(tmp_path.iterdir()) == []
    assert run("export", state, "--to", "lora", "-o", out, "--max-rank", 16, "--rank", 16) == 0
    said = capsys.readouterr().out
    assert "rank 16, " in said and "--max-lora-rank 16" in said
    told = float(said.split("leaves out ")[1].split("%")[0]) / 100
    model, _ = load(MODEL)
    before = {name: weight.clone() for name, weight in weights_of(model, made).items()}
    merged = peft.PeftModel.from_pretrained(model, str(out)).merge_and_unload()
    now, lost, whole = weights_of(merged, made), 0.0, 0.0
    for name, weight in made["editor"].weights.items():
        lost += float((now[name] - weight).square().sum())
        whole += float((weight - before[name]).square().sum())
    assert 0 < told < 1 and (lost / whole) ** 0.5 == pytest.approx(told, abs=1e-3)


def weights_of(model: Any, made: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {n: model.get_submodule(n).weight.detach().float() for n in made["editor"].weights}


def test_a_checkpoint_is_the_version_bit_for_bit(made: dict[str, Any], tmp_path: Path) -> None:
    state = made["folder"] / "state"
    how = ["--to", "checkpoint", "--model", MODEL]
    assert run("export", state, "-o", tmp_path / "all", *how) == 0
    assert same_weights(made["editor"], load(tmp_path / "all")[0])
    assert (tmp_path / "all" / "ultraedit" / "stream.safetensors").exists()
    assert run("export", state, "-o", tmp_path / "one", *how, "--versions", "1:1") == 0
    assert run("export", made["folder"] / "1.safetensors", "-o", tmp_path / "file", *how) == 0
    one, file = load(tmp_path / "one")[0], load(tmp_path / "file")[0]
    for left, right in zip(one.parameters(), file.parameters(), strict=True):
        assert torch.equal(left, right)
    assert not same_weights(made["editor"], one, within=1e-3)


def test_a_checkpoint_of_later_versions_alone_is_refused(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ["--to", "checkpoint", "--model", MODEL, "--versions", "2"]
    assert run("export", made["folder"] / "state", "-o", tmp_path / "out", *how) == 1
    assert "--versions 1:2" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_delta_of_versions_applies_to_the_model(made: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "both"
    assert run("export", made["folder"] / "state", "--to", "delta", "-o", out) == 0
    delta = EditDelta.load(out)
    assert len(delta.settings["edits"]) == 40
    editor = Editor(*load(MODEL), anchors=0)
    editor.apply_delta(delta)
    assert same_weights(made["editor"], editor.model, within=1e-6)


def test_a_gguf_adapter_is_written(made: dict[str, Any], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    how = ["--to", "gguf-lora", "--model", MODEL]
    assert run("export", made["folder"] / "state", "-o", tmp_path / "a.gguf", *how) == 0
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    alpha = reader.get_field("adapter.lora.alpha").contents()
    tensors = {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}
    model, _ = load(MODEL)
    before = weights_of(model, made)
    assert len(tensors) == 2 * len(before)
    for name, weight in made["editor"].weights.items():
        layer = name.split(".")[2]
        a, b = (tensors[f"blk.{layer}.ffn_down.weight.lora_{x}"] for x in "ab")
        change = alpha / len(a) * (b @ a)
        torch.testing.assert_close(before[name] + change, weight.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "expected lora, checkpoint, delta, gguf-lora"),
        (["--to", "checkpoint"], "needs the untouched model"),
        (["--to", "delta", "--rank", 4], "delta has no rank"),
        (["--to", "lora", "--versions", "9"], "has no deltas of version 9, expected versions 1"),
    ],
)
def test_what_cannot_be_exported_is_said(
    made: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[Any],
    message: str,
) -> None:
    assert run("export", made["folder"] / "state", "-o", tmp_path / "out", *options) != 0
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def foreign(tmp_path: Path, made: dict[str, Any]) -> Path:
    """A delta that is of another checkpoint."""
    delta = EditDelta.load(made["folder"] / "1.safetensors")
    EditDelta(delta.factors, dict.fromkeys(delta.base, "0" * 64)).save(tmp_path / "foreign")
    return tmp_path / "foreign"


@pytest.mark.parametrize("to", ["lora", "checkpoint", "delta", "gguf-lora"])
def test_a_change_of_another_model_is_refused(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    source = foreign(tmp_path, made)
    assert run("export", source, "--to", to, "-o", tmp_path / "out", "--model", MODEL) == 1
    assert "belongs to another checkpoint or dtype" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["foreign"]


def test_nothing_that_exists_is_overwritten(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    for to, out in (("lora", "there"), ("delta", "there/file"), ("delta", "no/folder")):
        assert (
            run("export", made["folder"] / "1.safetensors", "--to", to, "-o", tmp_path / out) == 1
        )
    assert (tmp_path / "there" / "file").read_text() == "mine"
    error = capsys.readouterr().err
    assert "not an empty directory" in error and "expected a new file" in error


def test_merged_deltas_do_what_they_do_one_after_the_other(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [made["folder"] / f"{version}.safetensors" for version in (1, 2)]
    assert run("merge", *parts, "-o", tmp_path / "merged") == 0
    said = capsys.readouterr().out
    assert f"1. {parts[0]}: 20 edits" in said and f"2. {parts[1]}: 20 edits" in said
    editor = Editor(*load(MODEL), anchors=0)
    editor.apply_delta(EditDelta.load(tmp_path / "merged"))
    assert same_weights(made["editor"], editor.model, within=1e-6)
    assert run("merge", made["folder"] / "state", "-o", tmp_path / "state") == 0
    assert (
        EditDelta.load(tmp_path / "state").digest() == EditDelta.load(tmp_path / "merged").digest()
    )


def test_conflicts_are_reported_and_nothing_is_written(
    made: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    editor = Editor(*load(MODEL), anchors=0)
    for name, target in (("sydney", "Sydney"), ("perth", "Perth")):
        editor.apply([EditRequest("The capital of Australia is", target)])
        editor.delta(1).save(tmp_path / name)
        editor.rollback(0)
    both = [tmp_path / "sydney", tmp_path / "perth"]
    assert run("merge", *both, "-o", tmp_path / "out") == 1
    seen = capsys.readouterr()
    assert "conflict: \"The capital of Australia is\" gets 'Sydney'" in seen.out
    assert "1 conflict, nothing is written" in seen.err and not (tmp_path / "out").exists()
    assert run("merge", both[0], both[0], "-o", tmp_path / "out") == 1
    assert "is the same change as" in capsys.readouterr().out
    assert run("merge", both[0], foreign(tmp_path, made), "-o", tmp_path / "out") == 1
    assert "foreign: the deltas edit different models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run("merge", *both, "-o", tmp_path / "out", "--allow-conflicts") == 0
    assert (tmp_path / "out").exists()


def test_without_peft_the_package_to_install_is_named(
    made: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ultraedit_kernels.store import adapters

    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    assert run("export", made["folder"] / "state", "--to", "lora", "-o", tmp_path / "a") == 1
    assert "pip install peft" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
