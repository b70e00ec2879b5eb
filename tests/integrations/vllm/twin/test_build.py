"""The twin on tensors laid out as vLLM lays them out. On real engines: test_against_engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from ultraedit_kernels.integrations.vllm.twin import (
    Twin,
    UnsupportedModelError,
    build_twin,
    build_weights,
)

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
TEXT = [0, 7, 300, 12, 5, 91, 44, 9]


def storages(model: nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def numbers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.clone() for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_it_computes_what_the_served_numbers_say(llama: Any, served: Any, vllm_config: Any) -> None:
    twin = build_twin(served, vllm_config, [UP])
    ids = torch.tensor([TEXT])
    with torch.no_grad():
        assert torch.equal(twin.model(ids).logits, llama(ids).logits)
    assert not twin.model.training
    assert not any(p.requires_grad for p in twin.model.parameters())


def test_only_the_edited_weights_are_copied(served: Any, vllm_config: Any) -> None:
    twin = build_twin(served, vllm_config, [UP, DOWN])
    shared = storages(served)
    copied = [
        name
        for name, p in twin.model.named_parameters()
        if p.untyped_storage().data_ptr() not in shared
    ]
    assert sorted(copied) == [f"{DOWN}.weight", f"{UP}.weight"]
    assert list(twin.live) == [UP, DOWN]
    merged = served.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    assert twin.live[UP].data_ptr() == merged[128:].data_ptr()


@pytest.mark.parametrize("build", [build_twin, build_weights])
def test_a_change_is_served_when_it_is_published(served: Any, vllm_config: Any, build: Any) -> None:
    twin = build(served, vllm_config, [UP])
    before, address = numbers(served), twin.live[UP].data_ptr()
    shadow = twin.model.get_submodule(UP).weight
    shadow.add_(1)
    assert_unchanged(served, before)
    with torch.inference_mode():
        twin.publish()
    assert twin.live[UP].data_ptr() == address and torch.equal(twin.live[UP], shadow)
    merged = served.get_parameter("model.layers.1.mlp.gate_up_proj.weight")
    assert torch.equal(merged[128:], shadow)
    merged[128:] -= 1  # all that is beside it is as it was
    torch.testing.assert_close(merged, before["model.layers.1.mlp.gate_up_proj.weight"])
    assert torch.equal(merged[:128], before["model.layers.1.mlp.gate_up_proj.weight"][:128])


def test_it_can_be_differentiated_though_built_in_inference_mode(
    llama: Any, served: Any, vllm_config: Any
) -> None:
    with torch.inference_mode():
        twin = build_twin(served, vllm_config, [DOWN])
    gradients = []
    for model in (twin.model, llama.requires_grad_(False)):
        seen: list[torch.Tensor] = []

        def keep(_module: Any, _inputs: Any, output: torch.Tensor, seen: Any = seen) -> None:
            output.requires_grad_()
            output.retain_grad()
            seen.append(output)

        model.get_submodule(DOWN).register_forward_hook(keep)
        ids = torch.tensor([TEXT])
        model(ids, labels=ids).loss.backward()
        gradients.append(seen[0].grad)
    assert gradients[0] is not None and gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_tied_head_is_the_embedding(llama: Any, served: Any, vllm_config: Any) -> None:
    llama.config.tie_word_embeddings = True
    del served.lm_head  # vLLM may keep none
    model = build_twin(served, vllm_config, [UP]).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_modules_are_chosen_as_for_any_model(served: Any, vllm_config: Any) -> None:
    auto = ["model.layers.0.mlp.down_proj", DOWN]
    for build in (build_twin, build_weights):
        assert list(build(served, vllm_config).live) == auto
        with pytest.raises(ValueError, match="has no module 'up_proj'"):
            build(served, vllm_config, ["up_proj"])


def test_weights_alone_are_the_edited_modules_and_nothing_else(
    llama: Any, served: Any, vllm_config: Any
) -> None:
    alone = build_weights(served, vllm_config, [UP, DOWN])
    assert [name for name, _ in alone.model.named_parameters()] == [
        f"{UP}.weight",
        f"{DOWN}.weight",
    ]
    assert alone.model.config.to_dict() == llama.config.to_dict() and alone.model.ranks is None
    for name, live in alone.live.items():
        assert torch.equal(alone.model.get_submodule(name).weight, llama.get_submodule(name).weight)
        assert live.untyped_storage().data_ptr() in storages(served)
    assert not storages(alone.model) & storages(served)


@pytest.mark.parametrize("build", [build_twin, build_weights])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("config", "ipc_cache"),
        ("experts", "mixture-of-experts"),
        ("qweight", r"mlp\.down_proj\.qweight \(torch\.float32\) belongs to a quantised layer"),
        ("float8", "float8_e4m3fn"),
    ],
)
def test_what_cannot_be_edited_is_refused_and_nothing_changed(
    served: Any, vllm_config: Any, build: Any, damage: str, reason: str
) -> None:
    mlp = served.model.layers.get_submodule("0").mlp
    if damage == "config":
        vllm_config.load_config.load_format = "ipc_cache"
    elif damage == "experts":
        mlp.experts = nn.Linear(1, 1)
    elif damage == "qweight":
        mlp.down_proj.register_parameter("qweight", nn.Parameter(torch.zeros(1)))
    else:
        mlp.down_proj.weight.data = mlp.down_proj.weight.data.to(torch.float8_e4m3fn)
    before = {name: (p.data_ptr(), p.clone()) for name, p in served.named_parameters()}
    with pytest.raises(UnsupportedModelError, match=reason):
        build(served, vllm_config, [UP])
    for name, parameter in served.named_parameters():
        address, value = before[name]
        assert parameter.data_ptr() == address
        assert torch.equal(parameter.float(), value.float())


def test_refuses_a_model_with_weights_that_are_not_served(
    llama: Any, served: Any, vllm_config: Any
) -> None:
    llama.config.num_hidden_layers = 3
    with pytest.raises(
        UnsupportedModelError,
        match=r"keeps 16 of 51 weights under .* LlamaForCausalLM .*: model\.layers\.2\..*, \.\.\.;",
    ):
        build_twin(served, vllm_config, [UP])


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (build_twin, r"keeps 1 of .*: model\.layers\.1\.mlp\.down_proj\.weight \[64, 128\]; this"),
        (build_weights, r"keeps model\.layers\.1\.mlp\.down_proj\.weight \[64, 128\] under anothe"),
    ],
)
def test_refuses_a_weight_of_another_shape(
    served: Any, vllm_config: Any, build: Any, reason: str
) -> None:
    down = served.get_submodule(DOWN)
    down.weight.data = down.weight.data[:, :-1]
    with pytest.raises(UnsupportedModelError, match=reason):
        build(served, vllm_config, [DOWN])


def test_refuses_a_weight_that_vllm_has_packed(served: Any, vllm_config: Any) -> None:
    served.get_submodule(DOWN).cpu_linear = lambda x, w, b: x
    build_twin(served, vllm_config, [UP])
    for build in (build_twin, build_weights):
        with pytest.raises(UnsupportedModelError, match=f"computes {DOWN} from a packed copy"):
            build(served, vllm_config, [DOWN])


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits"])
def test_scores_are_those_of_every_token_but_the_first(llama: Any, mode: str) -> None:
    with torch.no_grad():
        scores = llama(torch.tensor([TEXT])).logits[0, :-1]
    if mode.endswith("logprobs"):
        scores = scores.log_softmax(-1)
    expected = [float(scores[i, token]) for i, token in enumerate(TEXT[1:])]
    twin = Twin(llama, {})
    assert twin.logprobs(TEXT, mode) == pytest.approx(expected, abs=1e-6)
    assert twin.check([TEXT, TEXT[:4]], [expected, expected[:3]], mode) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "passes", "fails"), [(torch.float32, 0.009, 0.011), (torch.bfloat16, 0.09, 0.11)]
)
def test_the_check_allows_rounding_and_no_more(
    llama: Any, dtype: torch.dtype, passes: float, fails: float
) -> None:
    twin = Twin(llama.to(dtype), {})
    right = twin.logprobs(TEXT)
    near, far = ([[score + by for score in right]] for by in (passes, fails))
    assert twin.check([TEXT], near, "raw_logprobs") == pytest.approx(passes, rel=1e-3)
    with pytest.raises(UnsupportedModelError, match=f"over 7 tokens .* {fails} on average .*in "):
        twin.check([TEXT], far, "raw_logprobs")


def test_the_check_allows_a_rounded_cache_and_names_it(llama: Any) -> None:
    twin = Twin(llama, {})
    right = twin.logprobs(TEXT)
    off, far = ([[score + by for score in right]] for by in (0.2, 0.4))
    assert twin.check([TEXT], off, "raw_logprobs", "fp8_e5m2") == pytest.approx(0.2, rel=1e-3)
    with pytest.raises(UnsupportedModelError, match="--kv-cache-dtype fp8_e5m2 rounds too much"):
        twin.check([TEXT], far, "raw_logprobs", "fp8_e5m2")
    with pytest.raises(UnsupportedModelError, match="the twin does not compute"):
        twin.check([TEXT], off, "raw_logprobs", "auto")


def test_the_check_refuses_what_is_no_number(llama: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="the twin does not compute what vLLM serves"):
        Twin(llama, {}).check([TEXT], [[float("nan")] * 7], "raw_logprobs")
