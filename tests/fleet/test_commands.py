"""`ultraedit push` and `ultraedit status`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.local_server import KEY, LocalServer
from ultraedit_kernels import EditDelta, cli


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAEDIT_API_KEY", f"{KEY}, another")


@pytest.fixture
def file(deltas: dict[str, EditDelta], tmp_path: Path) -> str:
    deltas["australia"].save(tmp_path / "delta")
    return str(tmp_path / "delta")


def test_a_change_is_pushed_looked_at_and_taken_back(
    serve: Callable[..., LocalServer], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    servers = [serve("a"), serve("b")]
    urls = [server.url for server in servers]
    assert cli.main(["push", file, *urls]) == 0
    seen = capsys.readouterr()
    _, digest = servers[0].state()
    assert f"2 servers: digest {digest}, 2 changed now" in seen.out
    assert f"{urls[0]}: serves it, as version 1" in seen.err
    assert cli.main(["push", file, *urls]) == 0
    assert "as before" in capsys.readouterr().out

    assert cli.main(["status", *urls]) == 0
    said = capsys.readouterr().out
    assert said.count(f"version 1, digest {str(digest)[:12]}") == 2
    assert "all serve the same" in said

    assert cli.main(["push", file, "--undo", urls[0]]) == 0
    assert cli.main(["status", "--json", *urls]) == 1
    told = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert not told["same"] and sorted(row["version"] for row in told["servers"]) == [0, 1]
    assert cli.main(["status", *urls]) == 1
    assert "NOT THE SAME: run the push that broke off again" in capsys.readouterr().out


def test_what_failed_is_said_with_its_exit_status(
    serve: Callable[..., LocalServer],
    file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    servers = sorted([serve("a"), serve("b")], key=lambda server: server.url)
    urls = [server.url for server in servers]
    servers[1].die_at("apply")
    assert cli.main(["push", file, "--wait", "0", *urls]) == 3
    assert "error: half pushed" in capsys.readouterr().err
    assert cli.main(["push", file, "--wait", "0", *urls]) == 3
    error = capsys.readouterr().err
    assert f"{urls[0]} has it already, take it back with --undo" in error
    assert cli.main(["status", *urls]) == 1
    assert "1 of 2 servers cannot be compared" in capsys.readouterr().out
    servers[1].start()
    assert cli.main(["push", file, *urls]) == 0

    monkeypatch.setenv("ULTRAEDIT_API_KEY", "wrong")
    assert cli.main(["push", file, *urls]) == 1
    assert "key is not known" in capsys.readouterr().err
    (tmp_path / "cut").write_bytes(Path(file).read_bytes()[:-1])
    assert cli.main(["push", str(tmp_path / "cut"), *urls]) == 1
    assert "truncated" in capsys.readouterr().err
    assert cli.main(["push", file, "localhost:8000"]) == 1
    assert "expected http://HOST:PORT" in capsys.readouterr().err
