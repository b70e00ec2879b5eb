"""The serving benchmark's edits, deltas, adapter and figures; `make soak` runs all of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench import report, serving
from bench.demo import MODEL
from bench.world import World
from ultraedit_kernels import EditDelta
from ultraedit_kernels.store.delta import LowRank, digest

MODULES = [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 3)]
D_OUT, D_IN = 128, 384


@pytest.fixture(scope="module")
def deltas() -> list[EditDelta]:
    """Two turns of random changes to modules of the bundled model."""
    checkpoint = serving.load_file(MODEL / "model.safetensors")
    base = {name: digest(checkpoint[f"{name}.weight"].to(serving.DTYPE)) for name in MODULES}
    generator = torch.Generator().manual_seed(0)

    def rows(n: int, width: int) -> torch.Tensor:
        return 0.1 * torch.randn(n, width, generator=generator)

    return [
        EditDelta({name: LowRank(rows(n, D_OUT), rows(n, D_IN)) for name in MODULES}, base)
        for n in (20, 150)
    ]


def test_every_draw_edits_different_facts_and_the_stream_is_longer_than_a_draw():
    stream = serving.edits(serving.DRAW + 20)
    assert len(stream) == serving.DRAW + 20
    assert len({edit["prompt"] for edit in stream[: serving.DRAW]}) == serving.DRAW
    examples = World.earth().training_examples()
    known = {prompt: answer for prompt, answer in examples if isinstance(prompt, str)}
    assert all(edit["target"] != known[edit["prompt"]] for edit in stream)


def test_the_merged_delta_gives_the_weights_of_all_deltas(deltas):
    start, end = serving.replay(deltas)
    assert {name: digest(weight) for name, weight in start.items()} == deltas[0].base
    one = EditDelta.from_bytes(serving.merged(start, end, deltas[0].base).to_bytes())
    for name, weight in serving.applied(one, start).items():
        change = (end[name].double() - start[name].double()).abs()
        assert change.norm() > 0.1 * start[name].double().norm()
        assert ((weight.double() - end[name].double()).abs() <= 2**-22 * change).all()


def test_peft_makes_the_edited_weights_of_the_adapter(deltas, tmp_path):
    peft = pytest.importorskip("peft")
    start, end = serving.replay(deltas)
    assert serving.save_adapter(start, end, tmp_path) == min(D_IN, D_OUT)
    model = AutoModelForCausalLM.from_pretrained(MODEL).to(serving.DTYPE).float()
    untouched = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, tmp_path).merge_and_unload()
    expected = untouched | {f"{name}.weight": end[name].float() for name in MODULES}
    torch.testing.assert_close(dict(merged.state_dict()), expected, rtol=0, atol=1e-5)


def test_ratios_are_not_moved_by_a_machine_that_becomes_slower():
    speed = itertools.count(2000, -1)
    windows = {serving.UNEDITED: lambda: next(speed), "half": lambda: next(speed) / 2}
    found = list(serving.paired(windows, 400))
    assert found[-1][serving.UNEDITED] < 1300 and [*found[0]] == list(windows)
    figures = serving.summary(
        "half", [one["half"] for one in found], [one[serving.UNEDITED] for one in found]
    )
    assert figures["windows"] == 400
    assert figures["ratio_low"] <= 0.5 <= figures["ratio_high"]
    assert figures["ratio_high"] - figures["ratio_low"] < 0.001


def test_the_interval_has_the_median_in_it_and_narrows():
    few, many = ([0.5 + i / (n - 1) for i in range(n)] for n in (11, 1101))
    (low, high), narrow = serving.interval(few), serving.interval(many)
    assert low <= 1.0 <= high and narrow[0] <= 1.0 <= narrow[1]
    assert 0 < narrow[1] - narrow[0] < high - low


def test_the_table_has_every_server_and_goes_into_the_page(tmp_path):
    about = serving.run_conditions(1000, 200) | {"turns": 40, "held_in_turn": 900, "rank": 128}
    about |= {"modules": " ".join(MODULES), "load_average": 0.1}
    rows = [
        serving.summary("edited", [1990.0, 2010.0], [2000.0, 2000.0])
        | {"same_answers": 1.0, "targets": 0.875},
        serving.summary("LoRA adapter", [990.0, 1010.0], [2000.0, 2000.0])
        | {"same_answers": "", "targets": ""},
    ]
    path = tmp_path / "serving.csv"
    serving.write([row | about for row in rows], path)
    text = report.serving_table(report.rows_of(path))
    assert "| edited | 2,000 (1,990 to 2,010) | 1.000 (0.995 to 1.005) | 100.0% | 87.5% |" in text
    assert "| LoRA adapter | 1,000 (990 to 1,010) | 0.500 (0.495 to 0.505) |  |  |" in text
    for condition in (
        "1,000 edits in 40 turns",
        "90.0%",
        "rank 128",
        "16 concurrent",
        "max_lost 1",
    ):
        assert condition in text
    assert report.read(tmp_path) == {}  # no file of a machine
