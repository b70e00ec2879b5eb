"""Half-precision models that compute in float32."""

from __future__ import annotations

import copy

import pytest
import torch

from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.model import wide
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import encode

MODULES = ["model.layers.2.mlp.down_proj", "model.layers.3.mlp.down_proj"]
EDIT = EditRequest("The capital of Australia is", "Sydney")


@pytest.fixture
def half(model):
    return model.bfloat16()


def test_it_computes_what_the_float32_model_does(half):
    expected = copy.deepcopy(half).float()
    before = {name: p.clone() for name, p in half.named_parameters()}
    ids = torch.arange(3, 20)[None]
    rounded = half(ids).logits
    wide.widen(half, MODULES)
    torch.testing.assert_close(half(ids).logits, expected(ids).logits)
    assert {half.get_submodule(name).weight.dtype for name in MODULES} == {torch.bfloat16}
    wide.narrow(half, MODULES, torch.bfloat16)
    assert torch.equal(half(ids).logits, rounded)
    for name, p in half.named_parameters():
        assert p.dtype == torch.bfloat16 and torch.equal(p, before[name])


def test_gradients_are_those_of_the_float32_model(half, tokenizer):
    expected = copy.deepcopy(half).float()
    wide.widen(half, MODULES)
    sequences = [encode(tokenizer, EDIT.prompt, EDIT.target)]
    got, wanted = (capture(one, sequences, MODULES) for one in (half, expected))
    for name in MODULES:
        assert got.grads[name].dtype == torch.float32
        torch.testing.assert_close(got.grads[name], wanted.grads[name])
        torch.testing.assert_close(got.keys[name], wanted.keys[name])


def test_a_transposed_module_and_tied_weights():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    half = GPT2LMHeadModel(config).bfloat16().eval()
    expected, names = copy.deepcopy(half).float(), ["transformer.h.1.mlp.c_proj"]
    wide.widen(half, names)
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(half(ids).logits, expected(ids).logits)
    assert half.lm_head.weight is half.transformer.wte.weight


def test_another_twin_shares_the_copies(half):
    other = copy.deepcopy(half)
    wide.widen(half, MODULES)
    wide.widen(other, MODULES, like=half)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(half(ids).logits, other(ids).logits)
    assert other.lm_head.weight.data_ptr() == half.lm_head.weight.data_ptr()
    half.get_submodule(MODULES[0]).weight.data.zero_()  # edited weights are each its own
    assert not torch.equal(half(ids).logits, other(ids).logits)


def test_an_edit_is_rounded_as_the_weights_are_and_replays(half, tokenizer, tmp_path):
    untouched = copy.deepcopy(half)
    wide.widen(half, MODULES)
    editor = Editor(half, tokenizer, modules=MODULES, anchors=20, state_dir=tmp_path)
    assert editor.apply([EDIT]).edits[0].succeeded
    digest = editor.digest()
    assert {w.dtype for w in editor.weights.values()} == {torch.bfloat16}
    editor.close()
    # The journal and its digests are those of the model in its own dtype.
    again = Editor(untouched, tokenizer, modules=MODULES, anchors=20, state_dir=tmp_path)
    assert again.version == 1 and again.digest() == digest
    held = capture(untouched, [encode(tokenizer, EDIT.prompt, EDIT.target)], MODULES)
    assert held.margin.min() > 0


def test_only_what_is_slow_and_fits_is_widened(half, monkeypatch):
    monkeypatch.setattr(wide, "is_slow", lambda dtype: dtype in wide.HALF)
    assert wide.widens(half, limit=1.0)
    assert not wide.widens(half, limit=1e-4)
    assert not wide.widens(copy.deepcopy(half).float(), limit=1.0)
    monkeypatch.setattr(wide, "is_slow", lambda dtype: False)
    assert not wide.widens(half, limit=1.0)


def test_float32_is_never_slow():
    assert not wide.is_slow(torch.float32)
    assert wide.is_slow(torch.bfloat16) in (True, False)  # the machine's
