"""A change to several servers: all or none, whoever dies, and two pushes at once."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.conftest import AUSTRALIA
from tests.fleet.local_server import KEY, PROCESSES, LocalServer
from ultraedit_kernels import Client, EditDelta, ServerError
from ultraedit_kernels.fleet.push import Fleet, PushError

PUSH_STEPS = ("check", "apply", "journal", "served")
"""Where a server can die in a push."""
REQUESTS = 9
"""That a push to three untouched servers makes: of each its health, a try, and the change."""


@pytest.fixture
def three(serve: Callable[..., LocalServer]) -> list[LocalServer]:
    servers = [serve(name) for name in "abc"]
    return sorted(servers, key=lambda server: server.url)


@pytest.fixture
def fleet(three: list[LocalServer]) -> Iterator[Fleet]:
    fleet = fleet_of(three)
    yield fleet
    fleet.close()


def fleet_of(servers: list[LocalServer], wait: float = 0.0, **how: Any) -> Fleet:
    return Fleet([server.url for server in servers], KEY, wait=wait, **how)


def states(servers: list[LocalServer]) -> set[tuple[int, str | None]]:
    return {server.state() for server in servers}


def test_all_servers_serve_the_change_and_a_second_push_changes_nothing(
    three: list[LocalServer], deltas: dict[str, EditDelta]
) -> None:
    said: list[tuple[str, str]] = []
    fleet = fleet_of(three, say=lambda url, text: said.append((url, text)))
    done = fleet.push(deltas["australia"])
    urls = [server.url for server in three]
    assert done.changed == urls and done.versions == dict.fromkeys(urls, 1)
    assert states(three) == {(1, done.digest)}
    for url in urls:
        told = [text for at, text in said if at == url]
        assert told == ["checked, at version 0", "serves it, as version 1"]

    again = fleet.push(deltas["australia"])
    assert (again.digest, again.changed, again.versions) == (done.digest, [], done.versions)
    later = fleet.push(deltas["later"])
    assert states(three) == {(2, later.digest)}
    # All have the first one below it.
    assert fleet.push(deltas["australia"]).changed == []
    assert states(three) == {(2, later.digest)}


def test_a_change_is_taken_back_from_all(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta]
) -> None:
    (start,) = states(three)
    fleet.push(deltas["australia"])
    back = fleet.take_back(deltas["australia"])
    assert states(three) == {start} and back.changed == [server.url for server in three]
    assert fleet.take_back(deltas["australia"]).changed == []
    fleet.push(deltas["australia"])
    fleet.push(deltas["later"])
    before = states(three)
    with pytest.raises(PushError, match="later changes would be lost"):
        fleet.take_back(deltas["australia"])
    assert states(three) == before


def test_the_server_where_the_change_was_made_has_it_already(
    three: list[LocalServer], fleet: Fleet
) -> None:
    with three[1].client as client:
        client.edit(AUSTRALIA)
        delta = client.delta(1)
    done = fleet.push(delta)
    assert done.changed == [three[0].url, three[2].url]
    assert states(three) == {(1, done.digest)}


# Who refuses


def test_a_change_that_one_server_cannot_take_changes_nothing(
    serve: Callable[..., LocalServer], deltas: dict[str, EditDelta]
) -> None:
    canary = {"prompt": AUSTRALIA.prompt, "answer": "Canberra"}
    servers = [serve("a"), serve("b", settings={"canaries": [canary]})]
    before = states(servers)
    with pytest.raises(PushError, match="nothing is changed: not all") as caught:
        fleet_of(servers).push(deltas["australia"])
    assert f"{servers[1].url}: a guard rejects it: canary 0" in str(caught.value)
    assert states(servers) == before and not caught.value.half
    fleet_of(servers).push(deltas["japan"])
    assert len(states(servers)) == 1


def test_a_change_of_another_model_changes_nothing(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta]
) -> None:
    delta, before = deltas["japan"], states(three)
    foreign = EditDelta(delta.factors, dict.fromkeys(delta.base, "0" * 64))
    with pytest.raises(PushError, match="belongs to another checkpoint or dtype"):
        fleet.push(foreign)
    assert states(three) == before


def test_a_server_with_another_key_or_none_there_changes_nothing(
    serve: Callable[..., LocalServer], deltas: dict[str, EditDelta]
) -> None:
    servers = [serve("a"), serve("b", key="another"), serve("c")]
    servers[2].kill()
    with pytest.raises(PushError, match="key is not known") as caught:
        fleet_of(servers).push(deltas["japan"])
    assert f"{servers[2].url}: not ready after 0 s: " in str(caught.value)
    assert servers[0].state()[0] == servers[1].state()[0] == 0


def test_servers_at_different_versions_are_refused(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta]
) -> None:
    with three[0].client as client:
        client.apply(deltas["japan"])
    before = [server.state() for server in three]
    with pytest.raises(PushError, match="do not serve the same") as caught:
        fleet.push(deltas["australia"])
    assert f"{three[0].url}: version 1, digest {str(before[0][1])[:12]}" in str(caught.value)
    assert [server.state() for server in three] == before
    # The other way round: one has the change over something else.
    with three[0].client as client:
        client.apply(deltas["australia"])
    before = [server.state() for server in three]
    with pytest.raises(PushError, match="some had other changes before this one"):
        fleet.push(deltas["australia"])
    assert [server.state() for server in three] == before


def test_a_half_pushed_fleet_takes_no_other_change_until_it_is_mended(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta]
) -> None:
    three[2].die_at("apply")
    with pytest.raises(PushError, match="half pushed") as caught:
        fleet.push(deltas["australia"])
    assert caught.value.half and three[2].url in str(caught.value)
    three[2].start()
    with pytest.raises(PushError, match="do not serve the same"):
        fleet.push(deltas["japan"])
    assert [server.state()[0] for server in three] == [1, 1, 0]
    back = fleet.take_back(deltas["australia"])
    assert back.changed == [three[0].url, three[1].url]
    assert {version for version, _ in states(three)} == {0}
    fleet.push(deltas["japan"])
    assert len(states(three)) == 1


def test_a_server_that_changes_meanwhile_has_the_change_taken_back(
    three: list[LocalServer], deltas: dict[str, EditDelta]
) -> None:
    """Between the phases another change reaches the last server."""
    (start,) = states(three)

    def meddle(url: str, text: str) -> None:
        if url == three[0].url and text.startswith("serves it"):
            with three[2].client as client:
                client.apply(deltas["japan"])

    with pytest.raises(PushError, match="taken back from all that had it") as caught:
        fleet_of(three, say=meddle).push(deltas["australia"])
    assert "another change came between" in str(caught.value) and not caught.value.half
    assert [server.state() for server in three[:2]] == [start, start]
    assert three[2].state()[0] == 1  # the other change is left alone


def test_of_two_pushes_at_once_one_is_refused_with_nothing_changed(
    three: list[LocalServer], deltas: dict[str, EditDelta]
) -> None:
    ready, outcomes = threading.Barrier(2, timeout=60), {}

    def push(name: str) -> None:
        checked = 0

        def say(url: str, text: str) -> None:
            nonlocal checked
            checked += text.startswith("checked")
            if checked == 3 and text.startswith("checked"):
                ready.wait()  # both have asked all servers

        try:
            outcomes[name] = fleet_of(three, say=say).push(deltas[name])
        except PushError as error:
            outcomes[name] = error

    pushers = [threading.Thread(target=push, args=(name,)) for name in ("australia", "japan")]
    for pusher in pushers:
        pusher.start()
    for pusher in pushers:
        pusher.join()
    (refused,) = [one for one in outcomes.values() if isinstance(one, PushError)]
    (done,) = [one for one in outcomes.values() if not isinstance(one, PushError)]
    assert "another change came between" in str(refused) and not refused.half
    assert states(three) == {(1, done.digest)}


# Who dies


def test_servers_that_are_killed_are_told_when_the_push_is_run_again(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta]
) -> None:
    """Each of them at each step."""
    (start,) = states(three)
    for which, step in itertools.product(range(3), PUSH_STEPS):
        three[which].die_at(step)
        with pytest.raises(PushError) as caught:
            fleet.push(deltas["australia"])
        three[which].wait_for_death()
        assert three[which].url in str(caught.value)
        alive = [server.state()[0] for server in three if server.alive]
        # None if it died while all were asked, or as the first that was told.
        assert alive == ([0, 0] if step == "check" or which == 0 else [1, 1]), (which, step)
        assert caught.value.half == (step != "check")
        three[which].start()
        done = fleet.push(deltas["australia"])
        assert states(three) == {(1, done.digest)}
        assert fleet.push(deltas["australia"]).changed == []
        fleet.take_back(deltas["australia"])
        assert states(three) == {start}


def test_a_server_that_comes_back_in_time_is_told_in_the_same_push(
    three: list[LocalServer], deltas: dict[str, EditDelta]
) -> None:
    """Something restarts it."""
    for which, step in ((1, "apply"), (2, "served")):
        three[which].die_at(step)

    def restart() -> None:
        for which in (1, 2):
            three[which].wait_for_death()
            three[which].start()

    supervisor = threading.Thread(target=restart)
    supervisor.start()
    done = fleet_of(three, wait=60).push(deltas["australia"])
    supervisor.join()
    assert states(three) == {(1, done.digest)}


@pytest.mark.parametrize("step", ["rollback", "back"])
def test_taking_back_survives_a_kill(
    three: list[LocalServer], fleet: Fleet, deltas: dict[str, EditDelta], step: str
) -> None:
    (start,) = states(three)
    fleet.push(deltas["australia"])
    three[1].die_at(step)
    with pytest.raises(PushError, match="run it again when these servers serve") as caught:
        fleet.take_back(deltas["australia"])
    assert caught.value.half
    three[1].start()
    fleet.take_back(deltas["australia"])
    assert states(three) == {start}


def push_and_die(urls: list[str], file: Path, dies_at: int, after: bool) -> None:
    """Push, and be killed at a request: before it goes out, or when its answer is there."""
    count, lock, send = 0, threading.Lock(), httpx.HTTPTransport.handle_request

    def handle(transport: Any, request: httpx.Request) -> httpx.Response:
        nonlocal count
        with lock:
            count += 1
            mine = count
        if mine == dies_at and not after:
            os._exit(9)
        response = send(transport, request)
        if mine == dies_at:
            os._exit(9)
        return response

    httpx.HTTPTransport.handle_request = handle  # type: ignore[method-assign]
    Fleet(urls, KEY, wait=0).push(EditDelta.load(file))


def test_a_pusher_that_is_killed_at_any_request_is_run_again(
    three: list[LocalServer],
    fleet: Fleet,
    deltas: dict[str, EditDelta],
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    """Before each or after it; with --soak, both."""
    (start,) = states(three)
    deltas["australia"].save(tmp_path / "delta")
    urls = [server.url for server in three]
    served = set()
    for dies_at in range(1, REQUESTS + 1):
        for after in (False, True) if pytestconfig.getoption("--soak") else (dies_at % 2 == 1,):
            arguments = (urls, tmp_path / "delta", dies_at, after)
            pusher = PROCESSES.Process(target=push_and_die, args=arguments)
            pusher.start()
            pusher.join(60)
            assert pusher.exitcode == 9, "the push made fewer requests than thought"
            served.add(tuple(server.state()[0] for server in three))
            done = fleet.push(deltas["australia"])
            assert states(three) == {(1, done.digest)}
            fleet.take_back(deltas["australia"])
            assert states(three) == {start}
    assert {(0, 0, 0), (1, 0, 0)} <= served  # it was killed in both phases


def test_no_servers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one URL"):
        Fleet([], None)


def test_an_older_server_is_refused_before_it_is_sent_anything(
    serve: Callable[..., LocalServer],
    deltas: dict[str, EditDelta],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would not know a dry run, and apply the delta."""
    server, health = serve(), Client.health

    def older(client: Client, digest: bool = False) -> Any:
        return health(client, digest).model_copy(update={"digest": None})

    monkeypatch.setattr(Client, "wait", lambda client, timeout: older(client))
    with pytest.raises(PushError, match=r"older ultraedit-kernels.*update it"):
        fleet_of([server]).push(deltas["japan"])
    assert server.state()[0] == 0


def test_status_tells_what_each_serves_or_why_not(three: list[LocalServer], fleet: Fleet) -> None:
    three[1].kill()
    found = fleet.status()
    assert list(found) == [server.url for server in three]
    gone = found[three[1].url]
    assert isinstance(gone, ServerError) and "no answer" in str(gone)
    here = found[three[0].url]
    assert not isinstance(here, ServerError)
    assert here.ranks[0].digest == here.digest and here.library_version
