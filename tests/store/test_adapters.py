"""Adapters say what the delta says, as far as their rank allows; peft's and gguf's own readers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ultraedit_kernels.store import adapters, files
from ultraedit_kernels.store.delta import EditDelta, LowRank

DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.0.mlp.gate_proj"


def low_rank(n: int, d_out: int = 12, d_in: int = 20, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(n, d_out, generator=generator), torch.randn(n, d_in, generator=generator)
    )


def change(factor: LowRank) -> torch.Tensor:
    return factor.coeff.T.double() @ factor.keys.double()


def config(model_type: str = "llama", layers: int = 2) -> Any:
    text = SimpleNamespace(model_type=model_type, num_hidden_layers=layers)
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.fixture
def delta() -> EditDelta:
    """Of ranks 3 and 5."""
    factors = {DOWN: low_rank(3), GATE: low_rank(5, 20, 12)}
    return EditDelta(factors, dict.fromkeys(factors, "ab" * 32))


@pytest.mark.parametrize("n", [1, 3, 12, 40])
def test_the_rank_is_the_changes_own(n: int) -> None:
    factor = low_rank(n)
    made = adapters.Factors.of(factor)
    assert made.rank == min(n, 12) and made.lost == 0
    torch.testing.assert_close(
        made.up.double() @ made.down.double(), change(factor), atol=1e-5, rtol=1e-5
    )
    assert made.norm == pytest.approx(float(change(factor).norm()))


def test_rows_that_repeat_add_no_rank() -> None:
    """A closed loop steps again at the same keys."""
    one = low_rank(3)
    again = LowRank(torch.cat([one.coeff, low_rank(3, seed=1).coeff]), torch.cat([one.keys] * 2))
    made = adapters.Factors.of(again)
    assert made.rank == 3
    torch.testing.assert_close(made.up @ made.down, change(again).float(), atol=1e-5, rtol=1e-5)


def test_a_wanted_rank_leaves_out_what_it_says_and_no_other_is_better() -> None:
    factor = low_rank(8)
    exact = change(factor)
    for rank in (1, 4, 7):
        made = adapters.Factors.of(factor, rank)
        assert made.rank == rank
        lost = float((exact - made.up.double() @ made.down.double()).norm())
        assert made.lost == pytest.approx(lost, rel=1e-5)
        best = torch.linalg.svdvals(exact)[rank:].norm()
        assert lost == pytest.approx(float(best), rel=1e-5)
    assert adapters.Factors.of(factor, 100).rank == 8


def test_the_error_of_all_modules_is_that_of_the_whole_change(delta: EditDelta) -> None:
    factors = adapters.factorise(delta, rank=2)
    lost = [
        float((change(delta.factors[n]) - f.up.double() @ f.down.double()).norm())
        for n, f in factors.items()
    ]
    whole = [float(change(factor).norm()) for factor in delta.factors.values()]
    expected = math.hypot(*lost) / math.hypot(*whole)
    assert adapters.error_of(factors.values()) == pytest.approx(expected, rel=1e-5)
    assert adapters.error_of(adapters.factorise(delta).values()) == 0


def test_a_module_without_a_change_is_left_out_and_a_delta_of_none_is_refused() -> None:
    empty = LowRank.empty(torch.zeros(12, 20))
    base = {DOWN: "", GATE: ""}
    found = adapters.factorise(EditDelta({DOWN: low_rank(2), GATE: empty}, base))
    assert list(found) == [DOWN]
    with pytest.raises(ValueError, match="changes nothing"):
        adapters.factorise(EditDelta({DOWN: empty}, {DOWN: ""}))


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (65, 128), (512, 512), (513, None)])
def test_the_rank_that_vllm_is_started_with(rank: int, served: int | None) -> None:
    assert adapters.vllm_rank(rank) == served


def test_vllm_takes_these_ranks() -> None:
    pytest.importorskip("vllm")
    from typing import get_args

    from vllm.config import lora

    assert get_args(lora.MaxLoRARanks) == adapters.VLLM_RANKS


def test_a_lora_adapter_reads_as_peft_reads_it(tmp_path: Path, delta: EditDelta) -> None:
    peft = pytest.importorskip("peft")
    adapters.write_lora(adapters.factorise(delta), tmp_path / "lora", "some/model")
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "lora"))
    assert (read.r, read.lora_alpha) == (5, 5)
    assert read.rank_pattern == read.alpha_pattern == {DOWN: 3}
    assert read.target_modules == {DOWN, GATE}
    assert read.base_model_name_or_path == "some/model" and read.task_type == "CAUSAL_LM"
    tensors = peft.utils.load_peft_weights(str(tmp_path / "lora"), device="cpu")
    for name, factor in delta.factors.items():
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        torch.testing.assert_close(b @ a, change(factor).float(), atol=1e-5, rtol=1e-5)


def test_a_gguf_adapter_reads_as_gguf_reads_it(tmp_path: Path, delta: EditDelta) -> None:
    gguf = pytest.importorskip("gguf")
    adapters.write_gguf(adapters.factorise(delta), tmp_path / "a.gguf", config())
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    told = {name: reader.get_field(name).contents() for name in reader.fields if "." in name}
    assert told["general.type"] == "adapter" and told["adapter.type"] == "lora"
    assert told["general.architecture"] == "llama"
    alpha = told["adapter.lora.alpha"]
    tensors = {t.name: torch.tensor(t.data.copy()) for t in reader.tensors}
    places = {DOWN: "blk.1.ffn_down", GATE: "blk.0.ffn_gate"}
    assert set(tensors) == {f"{p}.weight.lora_{x}" for p in places.values() for x in "ab"}
    for name, place in places.items():
        a, b = (tensors[f"{place}.weight.lora_{x}"] for x in "ab")
        scale = alpha / len(a)  # as llama.cpp scales
        expected = change(delta.factors[name]).float()
        torch.testing.assert_close(scale * (b @ a), expected, atol=1e-5, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


@pytest.mark.parametrize(
    ("model_type", "module", "message"),
    [
        ("unheard", DOWN, "knows no architecture 'unheard'"),
        ("llama", "model.layers.0.self_attn.q_proj", "no place in GGUF"),
        ("llama", "model.layers.9.mlp.down_proj", "no place in GGUF"),
        ("qwen2", "model.layers.0.mlp.experts.3.up", "no place in GGUF"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(model_type: str, module: str, message: str) -> None:
    pytest.importorskip("gguf")
    with pytest.raises(ValueError, match=message):
        adapters.gguf_names([module], config(model_type))


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2"]
)
def test_families_have_a_name_in_gguf(model_type: str) -> None:
    pytest.importorskip("gguf")
    module = "transformer.h.1.mlp.c_proj" if model_type == "gpt2" else DOWN
    assert adapters.gguf_names([module], config(model_type))[0] == {module: "blk.1.ffn_down"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no room"), files.whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("half")
        raise OSError("no room")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with files.whole_folder(tmp_path / "out") as folder:
        (folder / "one").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["one"]
    with (
        pytest.raises(ValueError, match="not an empty directory"),
        files.whole_folder(tmp_path / "out"),
    ):
        pass


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft, or 'ultraedit-kernels"):
        adapters.need("peft", "lora")


def test_the_configuration_is_json(tmp_path: Path, delta: EditDelta) -> None:
    pytest.importorskip("peft")
    adapters.write_lora(adapters.factorise(delta), tmp_path / "lora", None)
    told = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert sorted(told["target_modules"]) == sorted([DOWN, GATE]) and told["inference_mode"]
