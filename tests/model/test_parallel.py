"""A model divided among two processes computes what the whole model does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FAMILIES = [
    "llama",
    "llama-biases",
    "llama-one-kv-head",
    "llama-tied",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
]
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks measured."""
    root = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("parallel_probe.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes, files = [], []
    for rank in range(2):
        files.append(root / f"{rank}.json")
        command = [sys.executable, str(script), str(rank), str(root / "rendezvous"), str(files[-1])]
        processes.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_keys_and_gradients_are_the_whole_models(ranks: Any, family: str) -> None:
    for found in ranks:
        measured = found["families"][family]
        distances = {what: x for what, x in measured.items() if isinstance(x, float)}
        assert len(distances) == 14  # logits, loss, margin, keys and gradients of 5, and one alone
        assert max(distances.values()) < 1e-9, distances


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_the_whole_models(ranks: Any, family: str) -> None:
    for found in ranks:
        assert found["families"][family]["greedy"]
        assert found["families"][family]["sampled"]


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_a_change_of_the_parts_has_the_bits_of_one_of_the_whole(ranks: Any, dtype: str) -> None:
    for found in ranks:
        assert len(found["deltas"][dtype]) == 20
        assert all(found["deltas"][dtype].values()), found["deltas"][dtype]


def test_a_ranks_part_of_a_checkpoint_is_read_from_it(ranks: Any) -> None:
    for found in ranks:
        assert len(found["untouched"]) == 11
        assert all(found["untouched"].values()), found["untouched"]


@pytest.mark.parametrize("where", ["before", "between", "in turn", "after"])
@pytest.mark.parametrize("fail", [0, 1])
def test_what_fails_on_one_rank_fails_on_both_and_both_go_on(
    ranks: Any, where: str, fail: int
) -> None:
    seen = [found["faults"][f"{where} {fail}"] for found in ranks]
    assert seen == [("OSError" if rank == fail else "RankError") for rank in range(2)]
    for found in ranks:
        assert found["faults"][f"{where} {fail} then"] == ["nothing", [2.0, 2.0, 2.0]]


def test_a_failure_of_both_is_each_ranks_own(ranks: Any) -> None:
    for found in ranks:
        assert found["faults"]["both 0"] == "OSError"
        assert found["faults"]["both 0 then"] == ["nothing", [2.0, 2.0, 2.0]]


def test_a_failure_that_is_caught_inside_is_told_once(ranks: Any) -> None:
    for found in ranks:
        assert found["faults"]["caught"] == "nothing"
        assert found["faults"]["caught then"] == ["nothing", [2.0, 2.0, 2.0]]


def test_ranks_pause_together_when_the_first_wants_to(ranks: Any) -> None:
    assert [found["faults"]["pauses"] for found in ranks] == [3, 3]


def test_each_rank_gathers_for_its_modules_and_has_all_in_the_end(ranks: Any) -> None:
    for found, own in zip(ranks, (3, 2), strict=True):
        assert found["gathered"].pop("own") == own
        assert max(found["gathered"].values()) < 1e-4, found["gathered"]


def test_what_cannot_be_divided_is_refused(ranks: Any) -> None:
    assert ranks[0]["refusals"] == {
        "heads": "3 attention heads cannot be divided among 2 ranks",
        "width": "57 features in the MLP cannot be divided among 2 ranks",
        "kv": "3 key-value heads cannot be divided among 2 ranks",
    }
