"""The house rules: sizes, imports that go down, private names, a test file for every module.

The lists of exceptions are to be empty or to say why.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("ultraedit_kernels", "integrations")

FILE, CLASS, FUNCTION = 450, 300, 60
"""Most lines of each."""

TOO_LONG: set[str] = set()
"""Files with something too long in them that is not split yet."""

ROOMS = (
    "cli",
    "fleet",
    "integrations",
    "evaluation",
    "editor",
    "callbacks",
    "method",
    "store",
    "model",
    "reference",
    "ops",
    "settings",
    "kinds",
    "_version",
)
"""Top to bottom: a module imports from its own room and from those below. The store is above the
model, as the weights that it changes and digests may be divided among ranks (`model.parallel`)."""

GOES_UP: set[tuple[str, str]] = set()
"""Imports that still go up, as file and room."""

PRIVATE: set[str] = set()
"""Files of tests that still reach into our private names."""

FOREIGN = {
    "_cpu_skip_gemm_dispatch",  # vLLM's, which decides how a weight is packed
    "_exit",  # os._exit: a process that ends as if it were killed
    "_fields_",  # ctypes
    "_forward_hooks",  # torch: no hook may be left behind, and there is no public list of them
    "_forward_pre_hooks",
    "_inductor",  # torch._inductor.config
    "_pack_args",  # Triton's JIT: what it gives to its compiler
}
"""Names of other libraries that have no public one."""

ELSEWHERE = {
    "ultraedit_kernels/_version.py": "tests/test_package.py",
    "integrations/vllm/calls.py": "tests/fleet/test_client.py",
    "integrations/vllm/deltas.py": "tests/integrations/vllm/test_endpoint.py",
    "integrations/vllm/commit.py": "tests/integrations/vllm/test_service.py",
    "integrations/vllm/engine_hooks.py": "tests/integrations/vllm/test_worker.py",
    "integrations/vllm/engine_side.py": "tests/integrations/vllm/test_worker.py",
    "integrations/vllm/engine_start.py": "tests/integrations/vllm/test_worker.py",
    "integrations/vllm/engine_work.py": "tests/integrations/vllm/test_worker.py",
    "integrations/vllm/extension.py": "tests/integrations/vllm/test_worker.py",
    "integrations/vllm/follow.py": "tests/fleet/test_follow.py",
    "integrations/vllm/tokenizer.py": "tests/integrations/vllm/test_service.py",
    "ultraedit_kernels/cli/__main__.py": "tests/cli/test_main.py",
    "ultraedit_kernels/cli/app.py": "tests/cli/test_main.py",
    "ultraedit_kernels/cli/fleet.py": "tests/fleet/test_commands.py",
    "ultraedit_kernels/cli/job.py": "tests/cli/test_edit.py",
    "ultraedit_kernels/cli/show.py": "tests/cli/test_eval.py",
    "ultraedit_kernels/kinds.py": "tests/test_settings.py",
    "ultraedit_kernels/method/change.py": "tests/method/test_turn.py",
    "ultraedit_kernels/method/phase.py": "tests/method/test_turn.py",
    "ultraedit_kernels/ops/aot.py": "tests/ops/aot/test_specialisation.py",
    "ultraedit_kernels/ops/kernels/library.py": "tests/ops/aot/test_library.py",
}
"""Modules whose tests are in a file of another name: some need a running engine or command, others
have nothing of their own to test."""

UNTESTED: set[str] = set()
"""Modules without a test file of their name yet."""


def sources(*folders: str) -> list[str]:
    """Python files below the folders, relative to the root."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    # A development install links ultraedit_kernels/integrations to integrations.
    names = [path.relative_to(ROOT).as_posix() for path in found]
    return [name for name in names if not name.startswith("ultraedit_kernels/integrations/vllm")]


def parse(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def too_long(name: str) -> Iterator[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    if (lines := text.count("\n")) > FILE:
        yield f"{name} has {lines} lines, expected at most {FILE}"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        most = CLASS if isinstance(node, ast.ClassDef) else FUNCTION
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if (lines := (node.end_lineno or first) - first + 1) > most:
            yield f"{name}:{first} {node.name} has {lines} lines, expected at most {most}"


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_nothing_is_too_long(name: str) -> None:
    found = list(too_long(name))
    if name in TOO_LONG:
        assert found, f"{name} is no longer too long, take it off the list"
    else:
        assert not found, "\n".join(found)


def room_of(name: str) -> str:
    """The room of a file, or of a dotted module of the package."""
    parts = name.removesuffix(".py").replace("/", ".").split(".")
    return parts[0] if parts[0] == "integrations" else (parts[1:] or [""])[0]


def imported(name: str) -> Iterator[tuple[int, str]]:
    """Modules and names of ours that a file imports, with the line, wherever it does."""
    for node in ast.walk(parse(name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: expected an absolute import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_imports_never_go_up() -> None:
    wrong, still = [], set()
    for name in sources(*PACKAGES):
        here = room_of(name)
        if here == "__init__":  # the public names, wherever they live
            continue
        for line, module in imported(name):
            if not module.startswith("ultraedit_kernels."):
                continue
            there = room_of(module)
            assert {here, there} <= set(ROOMS), f"{name}:{line}: {module} is in no known room"
            if ROOMS.index(there) < ROOMS.index(here):
                still.add((name, there))
                if (name, there) not in GOES_UP:
                    wrong.append(f"{name}:{line} imports {module}, but {there} is above {here}")
    assert not wrong, "\n".join(wrong)
    assert still == GOES_UP, f"no longer there, take off the list: {GOES_UP - still}"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in FOREIGN


def private_names(name: str) -> Iterator[str]:
    """Uses of another's private names: as an attribute, by import, or as a string to patch."""
    yield from private_names_in(name, parse(name))


def may_be_script(text: str) -> bool:
    """Of a null byte, which is in no script, Python before 3.11.4 does not say SyntaxError."""
    return "\n" in text and "\0" not in text


def private_names_in(name: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield f"{name}:{node.lineno} {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and may_be_script(str(node.value)):
            with suppress(SyntaxError):  # a script for another process
                yield from private_names_in(f"{name}:{node.lineno}", ast.parse(str(node.value)))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if is_private(alias.name):
                    yield f"{name}:{node.lineno} from {node.module} import {alias.name}"
        elif isinstance(node, ast.Call):
            # setattr(x, "_name", ...), also monkeypatch's with a dotted path; getattr likewise.
            called = ast.unparse(node.func).rpartition(".")[2]
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    last = argument.value.rpartition(".")[2]
                    if called in ("setattr", "getattr", "delattr", "patch") and is_private(last):
                        yield f"{name}:{node.lineno} {ast.unparse(node)}"


@pytest.mark.parametrize("name", sources("tests", "bench"))
def test_tests_and_bench_use_public_names(name: str) -> None:
    found = list(private_names(name))
    if name in PRIVATE:
        assert found, f"{name} uses public names only now, take it off the list"
    else:
        assert not found, "\n".join(found)


def test_every_module_has_its_test_file() -> None:
    """Of its name, in the folder that mirrors its own or below."""
    missing = set()
    for name in sources(*PACKAGES):
        path = Path(name)
        if path.stem == "__init__" or name in ELSEWHERE:
            continue
        folder = path.parent
        if folder.parts[0] == "ultraedit_kernels":
            folder = Path(*folder.parts[1:])
        mirrored = ROOT / "tests" / folder
        if not list(mirrored.rglob(f"test_{path.stem}.py")):
            missing.add(name)
    for name, tests in ELSEWHERE.items():
        assert (ROOT / name).exists() and (ROOT / tests).exists()
    assert not missing - UNTESTED, f"no test file: {', '.join(sorted(missing - UNTESTED))}"
    assert not UNTESTED - missing, f"take off the list: {', '.join(sorted(UNTESTED - missing))}"
