"""The queue: turns of several servers, shared turns, limits, lost turns, and running requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ultraedit_kernels.settings import EditorSettings, MethodSettings, ServingSettings, check, only

pytest.importorskip("vllm")
pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parents[3] / "bench" / "tiny-facts"
PROBE = Path(__file__).with_name("service_probe.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("service")
    results = folder / "results.json"
    arguments = {
        "model": str(MODEL),
        "state_dir": str(folder / "state"),
        "results": str(results),
    }
    command = [sys.executable, str(PROBE), json.dumps(arguments)]
    run = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return json.loads(results.read_text())


def edited(answer: dict[str, Any], version: int) -> bool:
    return answer.get("version") == version and all(e["succeeded"] for e in answer["edits"])


def test_turns_of_two_servers_follow_each_other(seen: dict[str, Any]) -> None:
    answers = sorted(seen["two servers"], key=lambda answer: answer["version"])
    assert edited(answers[0], 1) and edited(answers[1], 2)
    back, after = seen["one after the other"]
    assert (back["version"], after["version"]) in [(0, 1), (0, 3)]


def test_an_idempotency_key_holds_for_all_servers(seen: dict[str, Any]) -> None:
    first, *others = [*seen["same key"], seen["same key later"]]
    assert edited(first, 1)
    for answer in others:
        for part in ("version", "edits", "specificity"):
            assert answer[part] == first[part]
    assert seen["same key, other body"]["status"] == 409
    assert seen["versions"] == [1]
    # The version is gone, and the key with it.
    assert edited(seen["same key after a rollback"], 1)


def test_requests_that_wait_share_a_turn(seen: dict[str, Any]) -> None:
    answers = seen["merged"]
    versions = [answer["version"] for answer in answers]
    # Nothing waits yet when the first begins. The fourth has the second's prompt; a dry run is
    # alone, and nothing that waits behind it overtakes it.
    assert versions == [1, 2, 2, 3, 3, 3, 4]
    counts = [len(answer["edits"]) for answer in answers]
    assert counts == [1, 1, 2, 1, 1, 1, 1]
    targets = [edit["target"] for answer in answers for edit in answer["edits"]]
    assert targets == ["Sydney", "Osaka", "Bill Gates", "Xy", "Kyoto", "Lyon", "Milan", "Milan"]
    assert all(edit["succeeded"] for answer in answers for edit in answer["edits"])
    assert all(edit["after"].strip() == edit["target"] for a in answers for edit in a["edits"])
    assert answers[3]["edits"][0]["before"].strip() == "Osaka"
    again = seen["merged key"]
    assert again["version"] == 2 and again["edits"][0]["before"].strip() == "Tokyo"
    assert again["edits"][0]["after"].strip() == "Kyoto"  # what is served now


def test_a_rollback_is_not_overtaken(seen: dict[str, Any]) -> None:
    first, second, back, after = seen["around a rollback"]
    assert edited(first, 1) and edited(second, 2)
    assert back["version"] == 0
    assert edited(after, 1)


def test_a_request_that_is_refused_fails_alone(seen: dict[str, Any]) -> None:
    first, second, refused, fourth = seen["one refused"]
    assert edited(first, 1) and edited(second, 2) and edited(fourth, 3)
    assert refused == {"status": 400, "error": "refused"}


def test_a_full_queue_is_a_429(seen: dict[str, Any]) -> None:
    first, second, *others = seen["queue of two"]
    assert edited(first, 1) and edited(second, 2)
    for answer in others:
        assert answer["status"] == 429
        assert "expected fewer than 2" in answer["error"]


def test_a_turn_whose_server_is_gone_is_dropped(seen: dict[str, Any]) -> None:
    assert edited(seen["after a lost turn"], 1)
    assert seen["waited"] > 1.0
    assert seen["lost turn"]["error"]["type"] == "LostTurn"


def test_running_requests_are_waited_for_if_so_set(seen: dict[str, Any]) -> None:
    """Theirs is the old version to the end; what comes after finds none of its blocks."""
    waited, old = seen["waited for"], seen["waited for"]["old"]
    assert waited["seen"]["reason"] == "length"
    assert waited["seen"]["cached"] >= 32  # a cached prompt, which the edit must not leave behind
    assert waited["seen"]["logprobs"] == pytest.approx(old["logprobs"], abs=1e-3)
    assert waited["done"] is False
    assert edited(seen["after waiting"], 1)
    first, second = seen["new"]
    assert first["cached"] == 0 and second["cached"] >= 32
    assert first["logprobs"] == pytest.approx(second["logprobs"], abs=1e-3)
    assert first["logprobs"] != pytest.approx(old["logprobs"], abs=1e-2)
    back = seen["old again"]
    assert back["cached"] == 0 and back["logprobs"] == pytest.approx(old["logprobs"], abs=1e-3)


@pytest.mark.parametrize(
    "setting",
    [
        {"stretch": 1},
        {"stretch": "5"},
        {"stretch": True},
        {"reset_prefix_cache": 1},
        {"running_requests": "abort"},
        {"max_queue": 0},
        {"max_queue": 1.5},
    ],
)
def test_bad_settings_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*, expected"):
        check(setting, "operator")


def test_settings_are_taken_out_of_the_editor_s() -> None:
    given = {"anchors": 3, "stretch": 2.5, "running_requests": "wait"}
    own = ServingSettings(**only(given, ServingSettings))
    assert own == ServingSettings(stretch=2.5, running_requests="wait")
    assert only(given, MethodSettings, EditorSettings) == {"anchors": 3}
