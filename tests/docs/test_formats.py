"""docs/formats.md is enough to write a reader: this one has safetensors, json and hashlib alone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from bench.demo import MODEL
from ultraedit_kernels import Editor, EditRequest

MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
EDITS = [
    EditRequest("The capital of Australia is", "Sydney"),
    EditRequest("The currency of Japan is the", "dollar"),
]


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safetensors.safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, file.metadata()


def weight_digest(weight: Tensor) -> str:
    text = f"{weight.dtype} {tuple(weight.shape)}".encode()
    raw = weight.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(text + raw).hexdigest()


def version_digest(weights: dict[str, Tensor]) -> str:
    texts = [f"{name} {weight_digest(weights[name])}" for name in sorted(weights)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def checksum(path: Path) -> str:
    """Of the file's bytes, with zeros where it says its own."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    own = json.loads(data[8:size])["__metadata__"]["sha256"].encode()
    assert data.count(own) == 1
    return hashlib.sha256(data.replace(own, b"0" * 64)).hexdigest()


def sequences(tensors: dict[str, Tensor], prefix: str) -> list[tuple[list[int], list[int]]]:
    found = []
    rows, prompts = tensors[f"{prefix}tokens"], tensors[f"{prefix}prompt"]
    assert rows.dtype == prompts.dtype == torch.int32
    for row, prompt in zip(rows.tolist(), prompts.tolist(), strict=True):
        ids = [token for token in row if token != -1]
        found.append((ids[:prompt], ids[prompt:]))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of every file, of two turns of the bundled model in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("formats")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    weights = {name: model.get_submodule(name).weight for name in MODULES}
    untouched = {name: weight.detach().clone() for name, weight in weights.items()}
    editor = Editor(
        model, tokenizer, modules=MODULES, anchors=20, state_dir=folder / "state", keep=2
    )
    editor.apply(EDITS[:1])
    first = {name: weight.detach().clone() for name, weight in weights.items()}
    editor.apply(EDITS[1:])  # and a snapshot, since keep is 2
    second = {name: weight.detach().clone() for name, weight in weights.items()}
    editor.delta(1).save(folder / "delta.safetensors")
    editor.save_stream(folder / "stream.safetensors")
    editor.close()
    return {
        "folder": folder,
        "model": model,
        "tokenizer": tokenizer,
        "versions": [untouched, first, second],
        "history": editor.history(),
    }


def test_a_delta_reads_as_the_page_says(written: dict[str, Any]) -> None:
    tensors, metadata = read(written["folder"] / "delta.safetensors")
    untouched, edited, _ = written["versions"]
    assert set(tensors) == {f"{name}.{part}" for name in MODULES for part in ("coeff", "keys")}
    assert set(metadata) == {"format", "format_version", "library_version", "base", "settings"}
    assert (metadata["format"], metadata["format_version"]) == ("ultraedit-delta", "1")
    base = {name: weight_digest(weight) for name, weight in untouched.items()}
    assert json.loads(metadata["base"]) == base
    settings = json.loads(metadata["settings"])
    assert (settings["rounding"], settings["seed"]) == ("nearest", 1)
    for name, weight in untouched.items():
        coeff, keys = tensors[f"{name}.coeff"], tensors[f"{name}.keys"]
        assert coeff.dtype in (torch.float32, torch.float64) and len(coeff) == len(keys) > 0
        assert (coeff.shape[1], keys.shape[1]) == tuple(weight.shape)
        change = coeff.T.double() @ keys.double()
        torch.testing.assert_close((weight + change).float(), edited[name])


@pytest.mark.parametrize("version", [1, 2])
def test_a_turn_of_the_journal_reads_as_the_page_says(
    written: dict[str, Any], version: int
) -> None:
    path = written["folder"] / "state" / f"{version:06d}.safetensors"
    tensors, metadata = read(path)
    untouched, edited = written["versions"][0], written["versions"][version]
    assert set(metadata) == {
        *("sha256", "journal_version", "model", "statistics_d_in", "released", "record"),
        *("format", "format_version", "library_version", "base", "settings"),
    }
    assert path.read_bytes()[8:].startswith(b'{"__metadata__": {"sha256": "')
    assert metadata["sha256"] == checksum(path)
    assert metadata["journal_version"] == "1"
    base = {name: weight_digest(weight) for name, weight in untouched.items()}
    assert json.loads(metadata["model"]) == json.loads(metadata["base"]) == base
    d_in = {name: weight.shape[1] for name, weight in untouched.items()}
    assert json.loads(metadata["statistics_d_in"]) == d_in
    expected = {"leads", *(f"watch.{n}" for n in ("tokens", "prompt", "own", "owner", "place"))}
    expected |= {"watch.lead", "watch.drift"}
    for name in MODULES:
        expected |= {f"{name}.coeff", f"{name}.keys", f"held.{name}"}
        expected |= {f"watch.keys.{name}", f"watch.slopes.{name}"}
        expected |= {f"statistics.{name}.{part}" for part in ("count", "mean", "m2")}
    assert set(tensors) == expected
    (taught,) = sequences(tensors, "watch.")
    r = len(taught[1]) if len(taught[1]) < 4 else 4
    assert tensors["watch.own"].tolist() == [0]
    for part in ("owner", "place"):
        assert tensors[f"watch.{part}"].dtype == torch.int64
        assert tensors[f"watch.{part}"].shape == (r,)
    for part in ("lead", "drift"):
        assert tensors[f"watch.{part}"].dtype == torch.float32
        assert tensors[f"watch.{part}"].shape == (r,)
    assert tensors["leads"].dtype == torch.float32 and len(tensors["leads"]) == 2
    for name, weight in untouched.items():
        d_out, width = weight.shape
        assert tensors[f"held.{name}"].shape == (len(taught[1]), width)
        assert tensors[f"watch.keys.{name}"].shape == (r, width)
        assert tensors[f"watch.slopes.{name}"].shape == (r, d_out)
        for part, shape in (("count", ()), ("mean", (width + d_out,)), ("m2", (width + d_out,))):
            found = tensors[f"statistics.{name}.{part}"]
            assert (found.dtype, tuple(found.shape)) == (torch.float64, shape)
    record, edit = json.loads(metadata["record"]), EDITS[version - 1]
    assert set(record) == {"version", "kind", "time", "digest", "edits", "guards"}
    assert (record["version"], record["kind"]) == (version, "edit")
    assert record["digest"] == version_digest(edited)
    assert set(record["guards"]) == {"change", "total_change", "lost"}
    (outcome,) = record["edits"]
    assert set(outcome) == {"prompt", "target", "succeeded", "rounds", "loss", "margin"}
    assert (outcome["prompt"], outcome["target"]) == (edit.prompt, edit.target)
    assert outcome["succeeded"] is True
    tokenizer = written["tokenizer"]
    assert tokenizer.decode(taught[0], skip_special_tokens=True) == edit.prompt
    assert tokenizer.decode(taught[1], skip_special_tokens=True).strip() == edit.target


def test_a_snapshot_reads_as_the_page_says(written: dict[str, Any]) -> None:
    path = written["folder"] / "state" / "snapshot-000002.safetensors"
    tensors, metadata = read(path)
    assert set(metadata) == {"sha256", "journal_version", "model", "statistics_d_in"}
    assert metadata["sha256"] == checksum(path)
    weights = {name: tensors[f"weight.{name}"] for name in MODULES}
    records = json.loads(tensors["records"].numpy().tobytes())
    assert records == written["history"]
    assert version_digest(weights) == records[-1]["digest"]
    for name, weight in weights.items():
        for part, width in (("outputs", weight.shape[0]), ("keys", weight.shape[1])):
            shield = tensors[f"shield.{part}.{name}"]
            assert shield.dtype == torch.float64 and shield.shape[1] == width
    watched = sequences(tensors, "watch.")
    assert 0 < int(tensors["watch.own"]) <= len(watched) - 2
    (first,), (second,) = (
        sequences(read(written["folder"] / "state" / f"00000{v}.safetensors")[0], "watch.")
        for v in (1, 2)
    )
    assert watched[-2:] == [first, second]


def test_what_is_watched_follows_from_the_turns(written: dict[str, Any]) -> None:
    state = written["folder"] / "state"
    snapshot, _ = read(state / "snapshot-000002.safetensors")
    turn, metadata = read(state / "000002.safetensors")
    assert json.loads(metadata["released"]) == []
    leads = turn["leads"]
    for row, part in zip(leads, ("lead", "drift"), strict=True):
        joined = torch.cat([row, turn[f"watch.{part}"]])
        torch.testing.assert_close(snapshot[f"watch.{part}"], joined, rtol=0, atol=0)


def test_a_stream_file_reads_as_the_page_says(written: dict[str, Any]) -> None:
    tensors, metadata = read(written["folder"] / "stream.safetensors")
    assert set(metadata) == {"statistics_d_in"}
    tokenizer = written["tokenizer"]
    prompts = [
        tokenizer.decode(prompt, skip_special_tokens=True)
        for prompt, _ in sequences(tensors, "edits.")
    ]
    assert prompts == [edit.prompt for edit in EDITS]
    turn, _ = read(written["folder"] / "state" / "000002.safetensors")
    names = {name for name in turn if name.startswith("statistics.")}
    assert set(tensors) == names | {"edits.tokens", "edits.prompt"}
    for name in names:
        assert torch.equal(tensors[name], turn[name])


def test_a_rollback_marker_forgets_what_comes_after_it(written: dict[str, Any]) -> None:
    state = written["folder"] / "state"
    (state / "rollback-to-000001").touch()
    with torch.no_grad():  # as a start finds the model
        for name, weight in written["versions"][0].items():
            written["model"].get_submodule(name).weight.copy_(weight)
    editor = Editor(
        written["model"], written["tokenizer"], modules=MODULES, anchors=20, state_dir=state
    )
    assert editor.version == 1
    editor.close()
    files = sorted(path.name for path in state.iterdir() if path.name != "lock")
    assert files == ["000001.safetensors"]
