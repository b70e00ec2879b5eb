"""`ultraedit serve` as a command: the rest is in tests/integrations/vllm/test_serve.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("typer")

from tests.cli.command import run


def test_serve_hands_its_arguments_on_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultraedit_kernels.integrations.vllm import serve

    received: list[list[str]] = []

    def record(arguments: list[str]) -> int:
        received.append(arguments)
        return 7

    monkeypatch.setattr(serve, "main", record)
    arguments = ["model", "-tp", "2", "--state-dir=x", "-O3", "--", "--version", "--help"]
    assert run("serve", *arguments) == 7
    assert run("serve", "--help") == 7
    assert received == [arguments, ["--help"]]


def test_serve_has_its_own_help_and_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("serve", "--help") == 0
    assert "any vLLM server option" in capsys.readouterr().out
    assert run("serve") == 2
