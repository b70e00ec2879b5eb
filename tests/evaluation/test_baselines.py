"""The methods that edits are compared with, on the bundled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from bench.world import World
from ultraedit_kernels import EditRequest
from ultraedit_kernels.evaluation import baselines as comparison
from ultraedit_kernels.evaluation import scores as metrics
from ultraedit_kernels.model.presets import default_modules

EDITS = [EditRequest.from_dict(record) for record in World.earth().edits(6, seed=4, rephrases=1)]
TURNS = [EDITS[:3], EDITS[3:]]


def scores(model: nn.Module, tokenizer: Any, edits: list[EditRequest] = EDITS) -> dict[str, Any]:
    return metrics.evaluate(model, tokenizer, edits)


@pytest.mark.parametrize(
    ("baseline", "lr"), [("fine-tuning", 1e-3), ("LocFT-BF", 3e-3), ("LoRA", 1e-2)]
)
def test_fine_tuning_reaches_its_edits(
    model: nn.Module, tokenizer: Any, baseline: str, lr: float
) -> None:
    modules = default_modules(model, model.config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for turn in TURNS:
        comparison.BASELINES[baseline](model, tokenizer, [turn], modules, lr)
        taught = [EditRequest(p, r.target) for r in turn for p in (r.prompt, *r.rephrases)]
        assert scores(model, tokenizer, taught)["generation"]["efficacy"] == 1.0
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()  # no adapter is left
    assert changed == {f"{name}.weight" for name in modules}


@pytest.mark.parametrize("baseline", list(comparison.BASELINES))
def test_what_is_done_again_gives_the_same(
    model: nn.Module, tokenizer: Any, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_STEPS", 3)
    monkeypatch.setattr(comparison, "EPOCHS", 3)
    modules = default_modules(model, model.config)
    made = []
    for _ in range(2):
        with comparison.restored(model, modules):
            random = torch.get_rng_state()
            comparison.BASELINES[baseline](model, tokenizer, TURNS, modules, 1e-3)
            assert torch.equal(torch.get_rng_state(), random)
            made.append([model.get_parameter(f"{name}.weight").clone() for name in modules])
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_it_stops_as_soon_as_the_edits_hold(model: nn.Module, tokenizer: Any) -> None:
    known = EditRequest("The capital of Australia is", "Canberra")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modules = default_modules(model, model.config)
    comparison.fine_tune(model, tokenizer, [[known]], modules, 1e-3)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("baseline", list(comparison.BASELINES))
def test_search_keeps_the_best_and_restores_the_model(
    model: nn.Module, tokenizer: Any, baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "MAX_STEPS", 15)
    modules = default_modules(model, model.config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    recorded = metrics.record_locality(model, tokenizer, EDITS)
    best = comparison.search(
        baseline,
        model,
        tokenizer,
        TURNS,
        modules,
        lambda: metrics.evaluate(model, tokenizer, EDITS, before=recorded),
        [1e-8, 2e-3],  # the first moves nothing
    )
    still, moved = best["trials"]
    assert (best["lr"], moved["lr"]) == (2e-3, 2e-3)
    assert still["generation"]["efficacy"] == 0 < moved["generation"]["efficacy"]
    assert still["generation"]["specificity"] == 1
    assert best["generation"] == moved["generation"] and best["seconds"] > 0
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_rate_that_diverges_is_left_out(model: nn.Module, tokenizer: Any) -> None:
    modules = default_modules(model, model.config)
    given = (model, tokenizer, TURNS, modules, lambda: scores(model, tokenizer))
    best = comparison.search("published", *given, [1e39, 1e-3])
    assert [trial["lr"] for trial in best["trials"]] == [1e-3]
    with pytest.raises(ValueError, match="published diverges at every rate"):
        comparison.search("published", *given, [1e39])


def test_the_published_steps_shrink_with_the_width(model: nn.Module) -> None:
    modules = default_modules(model, model.config)
    (d_in,) = {model.get_submodule(name).in_features for name in modules}
    assert comparison.rates("published", model, modules)[0] == pytest.approx(0.0143 / d_in)


def test_a_method_that_gives_one_score_up_is_worth_nothing() -> None:
    even = {"efficacy": 0.5, "generalization": 0.5, "specificity": 0.5}
    assert comparison.harmonic_mean(even) == 0.5
    assert comparison.harmonic_mean(even | {"efficacy": 0.0, "specificity": 1.0}) == 0
    assert comparison.harmonic_mean(even | {"generalization": None, "specificity": 1.0}) == (
        pytest.approx(2 / 3)
    )
