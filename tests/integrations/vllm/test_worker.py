"""The worker extension inside a real engine: slices, commit, cancel, replay, faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parents[3] / "bench" / "tiny-facts"
PROBE = Path(__file__).with_name("worker_probe.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A state directory at version 1, and digests, made by the library alone; and a checkpoint with
    the stream of edits that it goes on with."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ultraedit_kernels import Editor, EditRequest
    from ultraedit_kernels.method.memory import STREAM

    folder = tmp_path_factory.mktemp("worker")
    checkpoint, state_dir = folder / "checkpoint", folder / "state"
    shutil.copytree(MODEL, checkpoint)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    request = EditRequest("The capital of Australia is", "Sydney")
    before = Editor(model, tokenizer, anchors=0)
    before.apply([request])
    (checkpoint / STREAM).parent.mkdir()
    before.save_stream(checkpoint / STREAM)
    rows = [float(stats.count) for stats in before.statistics.values()]
    before.rollback(0)
    editor = Editor(model, tokenizer, anchors=0, state_dir=state_dir, continues=checkpoint / STREAM)
    pristine = editor.digest()
    result = editor.apply([request])
    assert result.edits[0].succeeded
    digests = {"pristine": pristine, "edited": editor.digest()}
    return {"checkpoint": checkpoint, "state_dir": state_dir, "rows": rows, **digests}


@pytest.fixture(scope="module")
def seen(library: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("probe") / "results.json"
    arguments = {
        "model": str(library["checkpoint"]),
        "state_dir": str(library["state_dir"]),
        "results": str(results),
    }
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROBE), json.dumps(arguments)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(results.read_text())


@pytest.fixture(scope="module")
def at_one(library: dict[str, Any]) -> dict[str, Any]:
    """The state of the worker at the library's version."""
    return {
        "version": 1,
        "digest": library["edited"],
        "shadow_is_live": True,
        "journal": 1,
        "files": 1,
        "answers": ["Sydney", "Tokyo"],
    }


def test_no_name_can_collide_with_vllm() -> None:
    from ultraedit_kernels.integrations.vllm.extension import UltraEditExtension

    own = [name for name in vars(UltraEditExtension) if not name.startswith("__")]
    assert own and all(name.startswith(("ultraedit_", "_ultraedit_")) for name in own)
    assert UltraEditExtension.__init__ is object.__init__


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (["model.layers.3.mlp.down_proj"], True),
        (["model.layers.3.mlp.gate_proj", "model.layers.3.mlp.up_proj"], True),
        (["transformer.h.3.mlp.fc_out"], True),
        (["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"], False),
        (["model.layers.13.mlp.down_proj"], False),
        (["model.layers.3.self_attn.v_proj"], False),
    ],
)
def test_only_the_last_feed_forward_block_stales_nothing(
    modules: list[str], expected: bool
) -> None:
    from ultraedit_kernels.integrations.vllm.engine_start import last_layer_only

    config = SimpleNamespace(num_hidden_layers=4)
    config.get_text_config = lambda: config
    assert last_layer_only(modules, config) is expected


def test_a_start_with_bad_settings_is_refused_and_can_be_repeated(seen: dict[str, Any]) -> None:
    assert "ultraedit_start has not been called" in seen["before start"]["raised"]
    assert "unknown setting colour" in seen["unknown setting"]["error"]["message"]
    assert "model.layers.9.mlp.down_proj" in seen["unknown module"]["error"]["message"]
    taken = seen["directory is a file"]["error"]["message"]
    assert "worker_probe.py" in taken and "state directory" in taken
    assert "does not hold a stream of edits" in seen["damaged stream"]["error"]["message"]
    assert seen["start"]["version"] == 1


def test_the_state_directory_is_replayed_and_served(
    seen: dict[str, Any], at_one: dict[str, Any]
) -> None:
    assert seen["replayed"] == at_one
    again, first = seen["started twice"], seen["start"]
    clock = {"ms": 0, "at": 0}
    assert again | clock == first | clock
    assert first["modules"] == [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    assert first["last_layer_only"] is False


def test_the_twin_is_compared_with_the_engine(seen: dict[str, Any]) -> None:
    assert 0 < seen["right check"]["difference"] < 1e-5
    assert seen["wrong check"]["error"]["type"] == "UnsupportedModelError"
    assert "the twin does not compute" in seen["wrong check"]["error"]["message"]


def test_one_turn_at_a_time(seen: dict[str, Any]) -> None:
    lost = [seen["step without turn"], seen["step without work"], seen["second work"]]
    for answer in [*lost, *seen["work of another"]]:
        assert answer["error"]["type"] == "LostTurn"
    assert seen["begin"]["known"] == {}
    assert "error" not in seen["edit"] and "raised" not in seen["edit"]
    # The engine has stepped before the first slice, so that it may be doing so now.
    assert [step["beside"] for step in seen["slices"]] == [True, False, False]
    for step in [*seen["slices"], seen["after that"]]:
        assert step["done"] is False and step["ms"] > 0
    for answer in seen["busy"]:
        assert answer["busy"] == "one" and 0 <= answer["idle"] < 10


def test_a_turn_is_done_by_slices_that_follow_the_steps_of_requests(seen: dict[str, Any]) -> None:
    *before, last = seen["beside requests"]
    assert len(before) > 1
    assert all(step["beside"] and not step["done"] for step in before)
    assert last["done"] and last["result"]["edits"][0]["succeeded"]
    assert last["longest"] > 0


def test_a_turn_cancelled_between_slices_leaves_nothing(
    seen: dict[str, Any], at_one: dict[str, Any]
) -> None:
    assert seen["cancel during turn"]["version"] == 1
    assert seen["cancelled during turn"] == at_one


def test_a_finished_turn_is_not_live_before_its_commit(
    seen: dict[str, Any], at_one: dict[str, Any]
) -> None:
    assert seen["finished"]["version"] == 2
    assert seen["finished again"] == seen["finished"]
    assert seen["finished"]["edits"][0]["succeeded"] is True
    assert seen["uncommitted status"]["version"] == 1
    assert seen["uncommitted status"]["digest"] == at_one["digest"]
    assert [e["version"] for e in seen["uncommitted history"]["entries"]] == [1]
    assert seen["cancel before commit"]["version"] == 1
    assert seen["cancelled before commit"] == at_one


def test_a_commit_that_fails_half_way_is_undone(
    seen: dict[str, Any], at_one: dict[str, Any]
) -> None:
    assert "injected" in seen["failing commit"]["raised"]
    assert seen["failed commit"] == at_one


def test_a_commit_is_served(seen: dict[str, Any], at_one: dict[str, Any]) -> None:
    assert seen["commit"]["version"] == 2
    after = seen["committed"]
    assert seen["read back"] == {"version": 2, "digest": after["digest"]}
    assert after["digest"] != at_one["digest"]
    assert after | {"digest": ""} == {
        "version": 2,
        "digest": "",
        "shadow_is_live": True,
        "journal": 2,
        "files": 2,
        "answers": ["Sydney", "Osaka"],
    }


def test_a_dry_run_answers_from_the_shadow_and_leaves_nothing(seen: dict[str, Any]) -> None:
    report = seen["dry run"]
    assert report["version"] == 2 and report["edits"][0]["succeeded"] is True
    assert len(report["answers"]) == 1
    assert seen["after dry run"] == seen["committed"]


def test_bad_input_comes_back_as_data_and_changes_nothing(seen: dict[str, Any]) -> None:
    refused = [*seen["bad edits"], seen["two targets"], seen["bad delta"], *seen["bad version"]]
    for answer in refused:
        assert answer["error"]["type"] in ("ValueError", "TypeError", "UnknownVersion")
        assert len(answer["error"]["message"]) > 20
    assert "colour" in seen["bad edits"][1]["error"]["message"]
    assert seen["after bad input"] == seen["committed"]


def test_a_rollback_that_cannot_be_replayed_changes_nothing(seen: dict[str, Any]) -> None:
    assert "damaged" in seen["rollback over damage"]["error"]["message"]
    assert seen["after damage"] == seen["committed"]


def test_after_a_level_2_sleep_the_version_is_served_again(seen: dict[str, Any]) -> None:
    assert seen["step after sleep"]["error"]["type"] == "LostTurn"
    assert "not those of version 2" in seen["begin without weights"]["raised"]
    assert seen["reloaded"] == seen["committed"]


@pytest.mark.parametrize("way", ["transfer", "load_weights", "written", "reset_weights"])
def test_weights_that_something_else_has_written_are_not_edited(
    seen: dict[str, Any], way: str
) -> None:
    found = seen["written behind our back"][way]
    assert "weights are not those of version 2" in found["begin"]["raised"]
    assert "reload_weights" in found["begin"]["raised"]
    assert found["status"]["foreign"] is True and found["left alone"] is True
    assert found["reloaded"] == seen["committed"]  # as the remedy says


def test_a_turn_is_not_published_over_weights_that_came_meanwhile(seen: dict[str, Any]) -> None:
    found = seen["written behind our back"]
    for name, version in (("before a commit", 2), ("before the commit of a rollback", 1)):
        assert "weights are not those of version 2" in found[name]["commit"]["raised"]
        assert found[name]["left alone"] is True
        assert f"weights are not those of version {version}" in found[name]["begin"]["raised"]
    assert found["before a commit"]["reloaded"] == seen["committed"]
    after = found["before the commit of a rollback"]["reloaded"]
    assert after == seen["replayed"]  # the journal holds the rollback


def test_the_checkpoint_s_own_weights_are_served_with_the_edits(seen: dict[str, Any]) -> None:
    found = seen["written behind our back"]
    assert "weights are not those of version 2" in found["begin in a transfer"]["raised"]
    assert found["the checkpoint's"]["digest"] == seen["committed"]["digest"]
    assert found["the checkpoint's"]["answers"] == ["Sydney", "Osaka"]


def test_weights_that_have_moved_are_not_edited(seen: dict[str, Any]) -> None:
    found = seen["written behind our back"]
    assert "weights are not those of version 2" in found["other memory"]["raised"]
    assert found["in the end"] == found["the checkpoint's"]


def test_an_idempotency_key_is_found_in_the_journal(seen: dict[str, Any]) -> None:
    (key,) = seen["known"]["known"]
    record = seen["known"]["known"][key]
    assert key == "a key" and record["version"] == 2
    assert record["edits"][0]["target"] == "Osaka"


def test_rollback_to_zero_gives_the_library_s_weights(
    seen: dict[str, Any], library: dict[str, Any]
) -> None:
    assert seen["rollback"]["version"] == 0
    assert seen["rolled back"] == {
        "version": 0,
        "digest": library["pristine"],
        "shadow_is_live": True,
        "journal": 0,
        "files": 0,
        "answers": ["Canberra", "Tokyo"],
    }
    assert seen["rows"] == library["rows"]  # the checkpoint's stream goes on
    assert seen["rolled back by its end"] == seen["rolled back"]
