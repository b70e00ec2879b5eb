"""Two real servers, one of which follows the other; each is killed and started again. All that can
stand in the way: tests/fleet/test_follow.py."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm")

from tests.integrations.conftest import API_KEY
from tests.integrations.vllm.browsing import Screen, chromium
from tests.integrations.vllm.test_fleet import CAPITAL, Real, free_ports
from tests.integrations.vllm.test_start import kill
from ultraedit_kernels import ServerError, cli

pytestmark = pytest.mark.vllm

YEN = {"prompt": "The currency of Japan is the", "target": "dollar"}


@pytest.fixture(scope="module")
def pair(
    start: Callable[..., subprocess.Popen[bytes]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Real, Real]]:
    """A leader, and a server that follows it."""
    folder = tmp_path_factory.mktemp("follow")
    ports = free_ports(2)
    leader = Real(start, folder / "leader", ports[0])
    follower = Real(start, folder / "follower", ports[1], {"follow": leader.url})
    try:
        for server in (leader, follower):
            server.start()
        for server in (leader, follower):
            with server.client as client:
                client.wait(600)
        yield leader, follower
    finally:
        for server in (leader, follower):
            server.stop()


def in_step(leader: Real, follower: Real) -> None:
    """Wait until the follower serves what the leader does, by its weights."""
    with leader.client as client:
        wanted = client.health(digest=True).ranks[0]
    deadline = time.monotonic() + 60
    with follower.client as client:
        while (here := client.health(digest=True)).ranks[0] != wanted or here.follows.behind:
            assert time.monotonic() < deadline, here
            time.sleep(0.2)


def test_the_page_of_a_follower_names_the_leader(pair: tuple[Real, Real]) -> None:
    leader, follower = pair
    in_step(leader, follower)
    with chromium() as driver:
        screen = Screen(driver, follower.url).open(API_KEY)
        told = f"The server follows {leader.url}, in step. Changes are made there."
        screen.wait_for("#health-text", told)
        for name, text in CAPITAL.items():
            screen.type(name, text)
        screen.click('#form button[value="edit"]')
        screen.wait_for("#form-problem", f"this server follows {leader.url}")


def test_a_follower_serves_what_its_leader_does_through_restarts_of_both(
    pair: tuple[Real, Real], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leader, follower = pair
    monkeypatch.setenv("ULTRAEDIT_API_KEY", API_KEY)
    with leader.client as client:
        assert client.edit(CAPITAL).edits[0].succeeded
        assert client.edit(YEN).edits[0].succeeded
    in_step(leader, follower)
    assert follower.answer(CAPITAL["prompt"]) == "Sydney"
    assert follower.answer(YEN["prompt"]) == "dollar"
    assert cli.main(["status", leader.url, follower.url]) == 0
    assert f"follows {leader.url}, in step" in capsys.readouterr().out
    with follower.client as client, pytest.raises(ServerError, match=f"follows {leader.url}"):
        client.edit(CAPITAL)

    kill(leader)
    time.sleep(2)
    assert follower.answer(CAPITAL["prompt"]) == "Sydney"
    assert cli.main(["status", follower.url]) == 0
    assert "no answer" in capsys.readouterr().out
    leader.start()
    kill(follower)
    with leader.client as client:
        client.wait(600)
        client.rollback(1)  # while nobody follows
    follower.start()
    with follower.client as client:
        client.wait(600)
        health = client.health(digest=True)  # no answer before it had caught up
        assert (health.version, health.follows.behind, health.follows.error) == (1, 0, None)
    assert (follower.answer(CAPITAL["prompt"]), follower.answer(YEN["prompt"])) == ("Sydney", "yen")
    in_step(leader, follower)
    with leader.client as client:
        client.rollback(0)
    in_step(leader, follower)
    assert follower.answer(CAPITAL["prompt"]) == "Canberra"
    metrics = follower.get("/metrics")
    assert "ultraedit_versions_behind 0.0" in metrics and "ultraedit_version 0.0" in metrics
