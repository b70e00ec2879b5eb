"""The real server on two ranks: the same edits as on one, and all or nothing on both.

One server for the module, whose worker can be made to fail on one of the ranks. It starts on a
state directory that a process without ranks has written, and one without ranks goes on with its.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
from tests.integrations.conftest import MODEL, Server
from tests.integrations.vllm.ranks import (
    AUSTRALIA,
    FRANCE,
    HAMLET,
    JAPAN,
    at_version,
    check_divergence,
    check_fault,
    check_rollback_fault,
    editor_of,
    health,
    version_one,
    with_ranks,
)
from tests.integrations.vllm.test_latency import streaming
from ultraedit_kernels import EditDelta, Editor, EditRequest
from ultraedit_kernels.store.delta import digest_all

pytestmark = pytest.mark.vllm

OPTIONS = ("--tensor-parallel-size", "2")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A state directory of one version, made on one rank."""
    directory = tmp_path_factory.mktemp("two-ranks")
    return {"directory": directory, "digest": version_one(directory)}


@pytest.fixture(scope="module")
def divided(running: Any, written: dict[str, Any]) -> Iterator[Server]:
    for server in with_ranks(running, written["directory"], *OPTIONS, "--dtype", "float32"):
        written["first"] = server.client.get("/v1/edits/health?digest=true").json()
        written["first answer"] = server.answer(JAPAN["prompt"])
        yield server


@pytest.fixture
def server(divided: Server) -> Iterator[Server]:
    """The server at version 0, where it is left."""
    yield from at_version(divided)


def _weights(server: Server, version: int) -> dict[str, torch.Tensor]:
    """What a server serves, of the float32 checkpoint, proven by the digest that it reads back."""
    from safetensors.torch import load_file

    untouched = load_file(MODEL / "model.safetensors")
    weights: dict[str, torch.Tensor] = {}
    for number in range(1, version + 1):
        content = server.client.get(f"/v1/edits/{number}/delta").content
        for name, factor in EditDelta.from_bytes(content).factors.items():
            weights.setdefault(name, untouched[f"{name}.weight"])
            factor.apply(weights[name])
    assert {rank["digest"] for rank in health(server)[1]} == {digest_all(weights)}
    return weights


def test_a_state_directory_of_one_rank_is_served_by_two(
    divided: Server, written: dict[str, Any]
) -> None:
    assert written["first"]["status"] == "ok"
    assert [rank["version"] for rank in written["first"]["ranks"]] == [1, 1]
    assert [rank["digest"] for rank in written["first"]["ranks"]] == [written["digest"]] * 2
    assert written["first answer"] == JAPAN["target"]


def test_two_ranks_serve_what_one_serves(server: Server, live_server: Server) -> None:
    both = (server, live_server)
    assert not live_server.client.get("/v1/edits").json()["data"]
    try:
        prompts = [AUSTRALIA["prompt"], HAMLET["prompt"], FRANCE]
        assert len({tuple(map(one.answer, prompts)) for one in both}) == 1
        for edit in (AUSTRALIA, HAMLET):
            results = [one.edit(edit)["edits"] for one in both]
            assert results[0] == results[1]
            assert results[0][0]["succeeded"]
        answers = [tuple(map(one.answer, prompts)) for one in both]
        assert answers[0] == answers[1] == ("Sydney", "Jane Austen", "Paris")
        ours, theirs = (_weights(one, 2) for one in both)
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=2**-8, atol=1e-4)
            # In float32 they agree much better than that.
            assert (weight - theirs[name]).norm() < 1e-4 * theirs[name].norm()
    finally:
        live_server.rollback(0)


def test_a_state_directory_of_two_ranks_is_continued_by_one(server: Server, tmp_path: Path) -> None:
    server.edit(AUSTRALIA)
    server.edit(HAMLET)
    copy = shutil.copytree(server.state_dir, tmp_path / "state")
    editor = editor_of(copy)
    assert editor.version == 2
    assert {rank["digest"] for rank in health(server)[1]} == {editor.digest()}
    assert editor.apply([EditRequest(**JAPAN)]).version == 3
    editor.close()


def test_rollback_restores_the_digest(server: Server) -> None:
    before = health(server)
    server.edit(AUSTRALIA)
    first = health(server)
    server.edit(HAMLET)
    server.rollback(1)
    assert health(server) == first != before
    assert server.answer(AUSTRALIA["prompt"]) == "Sydney"
    assert server.answer(HAMLET["prompt"]) == "William Shakespeare"
    server.rollback(0)
    assert health(server) == before


def test_a_delta_is_applied_and_a_dry_run_changes_nothing(server: Server) -> None:
    before = health(server)
    dry = server.edit(AUSTRALIA, dry_run=True)
    assert dry["edits"][0]["after"] == " Sydney"
    assert health(server) == before
    server.edit(AUSTRALIA)
    edited, delta = health(server), server.client.get("/v1/edits/1/delta").content
    server.rollback(0)
    tried = server.client.post("/v1/edits/apply", params={"dry_run": True}, content=delta).json()
    assert health(server) == before
    response = server.client.post("/v1/edits/apply", content=delta)
    assert response.status_code == 200, response.text
    assert health(server) == edited
    assert [rank["digest"] for rank in edited[1]] == [tried["digest"]] * 2


WORKER = "ultraedit_kernels.integrations.vllm.engine_side"
PARALLEL = "ultraedit_kernels.model.parallel:Ranks"
VERSIONS = "ultraedit_kernels.method.versions:Versions"
STEPS = {
    "begin": (f"{WORKER}:Turn", 1),
    "edit": ("ultraedit_kernels.model.request:EditRequest.from_dict", 1),
    "embedding": (f"{PARALLEL}.all_reduce", 1),
    "forward": (f"{PARALLEL}.all_reduce", 5),
    "logits": (f"{PARALLEL}.all_gather", 1),
    "later": (f"{PARALLEL}.all_reduce", 40),
    "gathered": (f"{PARALLEL}.all_gather+", 2),
    "solve": ("ultraedit_kernels.method.shield:System.solve", 1),
    "update": ("ultraedit_kernels.store.delta:LowRank.apply", 1),
    "guard": ("ultraedit_kernels.method.guards:check_change", 1),
    "record": (f"{VERSIONS}.digest", 1),
    "entry": ("ultraedit_kernels.method.memory:TurnMemory.encode", 1),
    "publish": ("ultraedit_kernels.integrations.vllm.twin:Twin.publish", 1),
    "published": ("ultraedit_kernels.integrations.vllm.twin:Twin.publish+", 1),
}
WRITING = {  # the first rank's alone
    "lock": ("ultraedit_kernels.store.journal:Journal.append", 1),
    "write": ("ultraedit_kernels.store.files:write", 1),
    "sync": ("ultraedit_kernels.store.files:sync", 1),
}
FAULTS = [(step, rank) for step in STEPS for rank in (0, 1)] + [(step, 0) for step in WRITING]


@pytest.fixture(scope="module")
def at_one(divided: Server) -> Iterator[Server]:
    """The server at version 1, to which faults must leave it."""
    yield from at_version(divided, AUSTRALIA)


@pytest.mark.parametrize(("step", "rank"), FAULTS)
def test_a_fault_on_one_rank_leaves_both_at_the_old_version(
    at_one: Server, step: str, rank: int
) -> None:
    check_fault(at_one, rank, *(STEPS | WRITING)[step])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("step", ["forward", "gathered", "solve", "entry"])
def test_a_fault_in_a_turn_beside_requests_leaves_both_there_too(
    at_one: Server, step: str, rank: int
) -> None:
    with streaming(at_one, 2):
        check_fault(at_one, rank, *STEPS[step])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("where", [f"{VERSIONS}.replay", "torch:Tensor.copy_"])
def test_a_fault_in_a_rollback_changes_nothing(at_one: Server, where: str, rank: int) -> None:
    before = health(at_one)
    check_rollback_fault(at_one, rank, where)
    assert health(at_one) == before


def test_after_all_faults_the_next_edit_succeeds_beside_requests_too(at_one: Server) -> None:
    assert at_one.edit(HAMLET)["edits"][0]["succeeded"]
    alone = health(at_one)
    assert alone[0] == 200
    at_one.rollback(1)
    with streaming(at_one, 2) as seen:
        before = len(seen.gaps)
        assert at_one.edit(HAMLET)["edits"][0]["succeeded"]
        assert len(seen.gaps) > before + 20
        assert health(at_one) == alone
    assert set(seen.finished) == {"length"}
    at_one.rollback(1)


@pytest.mark.parametrize("rank", [0, 1])
def test_health_shows_that_a_rank_serves_something_else(server: Server, rank: int) -> None:
    check_divergence(server, rank)


def test_one_head_on_two_ranks_and_modules_divided_by_columns(
    running: Any, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Random weights: what counts is that both find the same change. Some steps show it; more of
    them amplify how each rounds."""
    modules = [f"model.layers.{i}.mlp.{part}_proj" for i in (1, 2) for part in ("gate", "up")]
    how = {"modules": modules, "anchors": 8, "rounds": 4}
    settings = {**how, "state_dir": str(tmp_path / "state"), "traffic": 10}
    options = ["--model", str(tiny_llama_dir), "--served-model-name", "tiny-facts"]
    options += ["--additional-config", json.dumps({"ultraedit": settings}), "--dtype", "float32"]
    for server in with_ranks(running, tmp_path, *OPTIONS, *options):
        server.edit(AUSTRALIA)
        status, ranks = health(server)
        content = server.client.get("/v1/edits/1/delta").content
        for prompt in (FRANCE, JAPAN["prompt"], HAMLET["prompt"]):
            server.complete(prompt, max_tokens=2)
        assert server.client.get("/v1/edits/health").json()["traffic_keys"] == 10
    assert status == 200
    editor = editor_of(tmp_path / "one", tiny_llama_dir, **how)
    pristine = {name: weight.clone() for name, weight in editor.weights.items()}
    editor.apply([EditRequest(**AUSTRALIA)])
    changes = {name: weight - pristine[name] for name, weight in editor.weights.items()}
    editor.rollback(0)
    editor.apply_delta(EditDelta.from_bytes(content))
    assert [rank["digest"] for rank in ranks] == [editor.digest()] * 2
    for name, weight in editor.weights.items():
        change = weight - pristine[name]
        assert (change - changes[name]).norm() < 1e-3 * changes[name].norm() > 0
    editor.close()


def test_in_bfloat16_two_ranks_differ_from_one_as_another_rounding_does(
    running: Any, soak: bool, figure: Any, tmp_path: Path
) -> None:
    """Each of the loop's steps, and which texts are the anchors, hang on what bfloat16 rounds. One
    rank with another attention kernel shows by how much."""
    if not soak:
        pytest.skip("one more engine, and what counts is shown in float32")
    edits = [AUSTRALIA, HAMLET]
    for server in with_ranks(running, tmp_path, *OPTIONS, "--dtype", "bfloat16"):
        for edit in edits:
            assert server.edit(edit)["edits"][0]["succeeded"]
        assert [server.answer(edit["prompt"]) for edit in edits] == ["Sydney", "Jane Austen"]
        status, ranks = health(server)
        copy = shutil.copytree(server.state_dir, tmp_path / "copy")
    assert status == 200
    two = editor_of(copy, dtype=torch.bfloat16)  # replays what was served
    assert [rank["digest"] for rank in ranks] == [two.digest()] * 2
    one = editor_of(tmp_path / "one", dtype=torch.bfloat16)
    other = editor_of(tmp_path / "other", dtype=torch.bfloat16)
    other.model.set_attn_implementation("eager")
    for edit in edits:
        for editor in (one, other):
            assert editor.apply([EditRequest(**edit)]).edits[0].succeeded
    ranks_apart, kernels_apart = _distance(two, one), _distance(other, one)
    figure(two_ranks_and_one=ranks_apart, two_attention_kernels=kernels_apart)
    assert 0 < ranks_apart < 2 * kernels_apart


def _distance(a: Editor, b: Editor) -> float:
    """Largest relative difference of a module's weights, Frobenius norms."""
    pairs = [(weight.float(), b.weights[name].float()) for name, weight in a.weights.items()]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)
