"""A server that follows a leader, and all that can stand in its way. With engines:
tests/integrations/vllm/test_follow.py."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.fleet.conftest import AUSTRALIA, JAPAN
from tests.fleet.local_server import KEY, LocalServer
from ultraedit_kernels import EditDelta, EditRequest, ServerError
from ultraedit_kernels.fleet.push import Fleet, PushError

Serve = Callable[..., LocalServer]


def follow(serve: Serve, leader: LocalServer, name: str = "follower", **how: Any) -> LocalServer:
    return serve(name, leader=(leader.url, how.pop("leader_key", KEY)), **how)


def state_when(server: LocalServer, ready: Callable[[Any], bool]) -> Any:
    """Health of a follower, as soon as it is as wanted."""
    deadline = time.monotonic() + 30
    with server.client as client:
        while not ready(health := client.health()):
            assert time.monotonic() < deadline, health
            time.sleep(0.05)
    return health


def restarted_behind(server: LocalServer, leader: LocalServer) -> Any:
    """Health of a server that was killed, and started again to follow a leader."""
    server.kill()
    server.leader = (leader.url, KEY)
    server.start()
    return state_when(server, lambda health: True)


def in_step(follower: LocalServer, leader: LocalServer) -> None:
    """Both serve the same, by the weights themselves."""
    wanted = leader.state()

    def ready(health: Any) -> bool:
        told = health.follows  # which is told after the version is served
        return (health.version, health.digest, told.behind, told.error) == (*wanted, 0, None)

    state_when(follower, ready)
    assert follower.state() == wanted


def test_a_follower_takes_versions_at_the_start_and_later_and_goes_back_with_its_leader(
    serve: Serve,
) -> None:
    leader = serve("leader")
    with leader.client as client:
        client.edit(AUSTRALIA)
        client.edit(JAPAN)
    follower = follow(serve, leader)
    assert follower.state() == leader.state()  # before it answers anybody
    with leader.client as client:
        client.edit(EditRequest("The capital of Norway is", "Bergen"))
        in_step(follower, leader)
        client.rollback(1)
        in_step(follower, leader)
        client.rollback(0)
        client.edit(JAPAN)  # another version 1
        in_step(follower, leader)
        client.rollback(0)
    in_step(follower, leader)
    follows = state_when(follower, lambda health: health.follows.behind == 0).follows
    assert (follows.leader, follows.version) == (leader.url, 0) and follows.seconds < 30

    lines = [
        json.loads(line) for line in (follower.folder / "audit.jsonl").read_text().splitlines()
    ]
    kinds = [(line["kind"], line["version"]) for line in lines]
    taken = [("apply", 1), ("apply", 2), ("apply", 3), ("rollback", 1), ("rollback", 0)]
    assert kinds == [*taken, ("apply", 1), ("rollback", 0)]
    assert {line["key"] for line in lines} == {leader.url}


def test_a_follower_takes_no_changes_and_names_its_leader(
    serve: Serve, deltas: dict[str, EditDelta]
) -> None:
    leader = serve("leader")
    follower = follow(serve, leader)
    told = f"follows {leader.url} and takes no other changes; send it there"
    with follower.client as client:
        asked: list[Callable[[], Any]] = [
            lambda: client.edit(AUSTRALIA),
            lambda: client.dry_run(AUSTRALIA),
            lambda: client.apply(deltas["japan"]),
            lambda: client.rollback(0),
        ]
        for ask in asked:
            with pytest.raises(ServerError, match=told) as caught:
                ask()
            assert caught.value.status == 409
        with leader.client as own:
            assert own.health().follows is None
    fleet = Fleet([leader.url, follower.url], KEY, wait=0)
    with pytest.raises(PushError, match=f"nothing is changed(.|\n)*{told}"):
        fleet.push(deltas["japan"])
    fleet.close()
    assert leader.state() == follower.state() and leader.state()[0] == 0


def test_a_follower_goes_on_when_its_leader_is_killed_and_takes_up_again(serve: Serve) -> None:
    leader = serve("leader")
    with leader.client as client:
        client.edit(AUSTRALIA)
    follower = follow(serve, leader)
    leader.kill()
    health = state_when(follower, lambda health: health.follows.error is not None)
    assert "no answer" in health.follows.error and leader.url in health.follows.error
    assert (health.version, health.follows.version) == (1, 1)
    follower.kill()
    follower.start()  # without its leader
    health = state_when(follower, lambda health: health.follows.error is not None)
    assert (health.version, health.follows.version, health.follows.behind) == (1, None, None)
    leader.start()
    with leader.client as client:
        client.edit(JAPAN)
    in_step(follower, leader)
    follower.kill()
    with leader.client as client:
        client.rollback(1)
    follower.start()
    with follower.client as client:
        health = client.health()
    assert (health.version, health.follows.behind, health.follows.error) == (1, 0, None)
    assert follower.state() == leader.state()


@pytest.mark.parametrize("step", ["apply", "journal", "served"])
def test_a_follower_that_is_killed_while_it_takes_a_version_takes_it_once(
    serve: Serve, step: str
) -> None:
    leader = serve("leader")
    follower = follow(serve, leader)
    follower.die_at(step)
    with leader.client as client:
        client.edit(AUSTRALIA)
        follower.wait_for_death()
        follower.start()
        in_step(follower, leader)
        client.edit(JAPAN)
    in_step(follower, leader)


def test_a_wrong_key_is_said_and_nothing_is_taken(serve: Serve) -> None:
    leader = serve("leader")
    with leader.client as client:
        client.edit(AUSTRALIA)
    follower = follow(serve, leader, leader_key="another")
    health = state_when(follower, lambda health: True)
    assert health.version == 0 and "the key is not known" in health.follows.error


def test_a_leader_of_another_model_is_said_and_nothing_is_forgotten(serve: Serve) -> None:
    leader, name = serve("leader"), "model.layers.1.mlp.down_proj"
    other = serve("other", settings={"modules": [name]})
    with leader.client as client:
        client.edit(AUSTRALIA)
    follower = follow(serve, leader)
    before = follower.state()
    health = restarted_behind(follower, other)
    assert "serves another model" in health.follows.error
    assert follower.state() == before and before[0] == 1


def test_versions_that_were_made_here_are_not_forgotten(serve: Serve) -> None:
    leader, own = serve("leader"), serve("own")
    with own.client as client:
        client.edit(JAPAN)
    before = own.state()
    health = restarted_behind(own, leader)
    assert "version 1 was made here" in health.follows.error
    assert "empty --state-dir" in health.follows.error
    assert own.state() == before


def test_a_version_that_a_guard_rejects_here_is_not_served(serve: Serve) -> None:
    leader = serve("leader")
    canary = {"prompt": AUSTRALIA.prompt, "answer": "Canberra"}
    follower = follow(serve, leader, settings={"canaries": [canary]})
    with leader.client as client:
        client.edit(AUSTRALIA)
        health = state_when(follower, lambda health: health.follows.error is not None)
        assert f"version 1 of {leader.url}: " in health.follows.error
        assert "canary 0" in health.follows.error and health.follows.behind == 1
        assert follower.state()[0] == 0
        client.rollback(0)
    state_when(follower, lambda health: health.follows.error is None)


def test_weights_that_are_not_the_leaders_are_not_served(
    serve: Serve, deltas: dict[str, EditDelta]
) -> None:
    server = serve()
    before = server.state()
    body, headers = deltas["japan"].to_bytes(), {"Authorization": f"Bearer {KEY}"}
    url = f"{server.url}/v1/edits/apply?expected={'a' * 64}"
    answer = httpx.post(url, content=body, headers=headers, timeout=60)
    assert answer.status_code == 409 and answer.json()["error"]["param"] == "expected"
    assert "nothing was changed" in answer.json()["error"]["message"]
    assert server.state() == before


def test_what_the_leader_has_let_go_of_comes_with_a_copy_of_its_directory(serve: Serve) -> None:
    leader = serve("leader", settings={"keep": 1})
    with leader.client as client:
        for edit in (AUSTRALIA, JAPAN, EditRequest("The capital of Norway is", "Bergen")):
            client.edit(edit)
    follower = follow(serve, leader)
    health = state_when(follower, lambda health: True)
    assert health.version == 0 and "a copy of the leader's state directory" in health.follows.error
    follower.kill()
    shutil.rmtree(follower.folder / "state")
    shutil.copytree(leader.folder / "state", follower.folder / "state")
    follower.start()
    assert follower.state() == leader.state()
    with leader.client as client:
        client.edit(EditRequest("The capital of France is", "Lyon"))
    in_step(follower, leader)
