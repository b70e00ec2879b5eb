"""The suffix-only side pass equals the naive full backward pass."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ultraedit_kernels.model import capture as capture_module
from ultraedit_kernels.model.capture import capture, evaluation_mode, leaves_only_keys
from ultraedit_kernels.model.encoding import WORTH_A_PASS, Sequence

transformers = pytest.importorskip("transformers")

COMMON = dict(
    vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
FAMILIES = {
    "llama": ("LlamaConfig", {}, "model.layers.{}.", GATED),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 5}, "model.layers.{}.", GATED),
    "qwen2": ("Qwen2Config", {}, "model.layers.{}.", GATED),
    "qwen3": ("Qwen3Config", {}, "model.layers.{}.", GATED),
    "phi3": ("Phi3Config", {"sliding_window": None}, "model.layers.{}.",
             ("mlp.gate_up_proj", "mlp.down_proj")),
    "gemma2": ("Gemma2Config", {"sliding_window": 5, "query_pre_attn_scalar": 8},
               "model.layers.{}.", GATED),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 5, "query_pre_attn_scalar": 8},
               "model.layers.{}.", GATED),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
                            "rotary_dim": 4}, "transformer.h.{}.", ("mlp.fc_in", "mlp.fc_out")),
    "gpt2": ("GPT2Config", {"n_inner": 56}, "transformer.h.{}.",
             ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
}  # fmt: skip
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
              linear_value_head_dim=8)  # fmt: skip
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=16, mamba_expand=2,
             mamba_chunk_size=16)  # fmt: skip


def mixed(kind: str) -> dict[str, list[str]]:
    """Every other layer is of another kind than attention."""
    return {"layer_types": [kind, "full_attention", kind, "full_attention"]}


HYBRIDS = {
    "lfm2": ("Lfm2Config", mixed("conv") | {"block_auto_adjust_ff_dim": False},
             "model.layers.{}.", ("feed_forward.w1", "feed_forward.w2")),
    "qwen3-next": ("Qwen3NextConfig",
                   mixed("linear_attention") | LINEAR | {"mlp_only_layers": [0, 1, 2, 3]},
                   "model.layers.{}.", GATED),
    "qwen3.5": ("Qwen3_5TextConfig", mixed("linear_attention") | LINEAR, "model.layers.{}.", GATED),
    "granite-4-h": ("GraniteMoeHybridConfig",
                    {"num_local_experts": 0, "num_experts_per_tok": 0,
                     "shared_intermediate_size": 56,
                     "layer_types": ["mamba", "attention", "mamba", "attention"]} | MAMBA,
                    "model.layers.{}.", ("shared_mlp.input_linear", "shared_mlp.output_linear")),
    "falcon-h1": ("FalconH1Config", MAMBA | {"mamba_d_ssm": 64}, "model.layers.{}.",
                  ("feed_forward.gate_proj", "feed_forward.down_proj")),
    "recurrentgemma": ("RecurrentGemmaConfig",
                       {"lru_width": 32, "block_types": ["recurrent", "attention"]},
                       "model.layers.{}.", ("mlp_block.up_proj", "mlp_block.down_proj")),
}  # fmt: skip
"""Layers that keep a state beside those that keep keys and values."""
MAMBAS = ("granite-4-h", "falcon-h1")
"""Their scan is float32 in a float64 model, which limits a comparison to 2e-8."""
# mixed lengths: a prompt of one token (no prefix), long and short prompts, targets of 1 to 6 tokens
LENGTHS = [(1, 3), (13, 1), (7, 6), (2, 2), (20, 4)]


def make_model(family: str, dtype: torch.dtype, attention: str = "sdpa"):
    name, options, prefix, parts = (FAMILIES | HYBRIDS)[family]
    torch.manual_seed(0)
    if family == "gptj":
        attention = "eager"
        config = transformers.GPTJConfig(
            **{k: v for k, v in COMMON.items() if k in ("vocab_size", "pad_token_id")},
            **options, attn_implementation=attention,
        )  # fmt: skip
    else:
        config = getattr(transformers, name)(**COMMON, **options, attn_implementation=attention)
    config.initializer_range = 0.2
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    modules = [prefix.format(layer) + part for layer in (1, 2) for part in parts]
    return model, modules


def make_sequences(seed: int = 0) -> list[Sequence]:
    generator = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, 97, (n,), generator=generator).tolist()

    return [Sequence(tokens(p), tokens(t)) for p, t in LENGTHS]


def naive(model, sequences, modules):
    """Full forward and backward of every sequence by itself, all positions, all logits."""
    total = sum(len(s.target_ids) for s in sequences)
    keys = {m: [] for m in modules}
    grads = {m: [] for m in modules}
    losses, margins = [], []
    for s in sequences:
        seen = {}

        def read(name, seen=seen):
            def hook(_module, args, output):
                output.retain_grad()
                seen[name] = (args[0], output)

            return hook

        handles = [model.get_submodule(m).register_forward_hook(read(m)) for m in modules]
        ids = torch.tensor([s.prompt_ids + s.target_ids[:-1]])
        logits = model(input_ids=ids).logits[0, len(s.prompt_ids) - 1 :]
        labels = torch.tensor(s.target_ids)
        loss = F.cross_entropy(logits, labels, reduction="none")
        (loss.sum() / total).backward()
        for handle in handles:
            handle.remove()
        for m in modules:
            h, y = seen[m]
            keys[m].append(h[0, len(s.prompt_ids) - 1 :].detach())
            grads[m].append(y.grad[0, len(s.prompt_ids) - 1 :])
        losses.append(loss.detach())
        others = logits.detach().scatter(1, labels[:, None], float("-inf")).amax(1)
        margins.append(logits.detach().gather(1, labels[:, None])[:, 0] - others)
    cat = {m: torch.cat(v) for m, v in keys.items()}, {m: torch.cat(v) for m, v in grads.items()}
    return *cat, torch.cat(losses), torch.cat(margins)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


class DoubleTorch:
    """torch, but float32 is float64: for code that casts to float32 by itself."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("family", FAMILIES | HYBRIDS)
def test_equals_full_backward(family, dtype, tolerance, monkeypatch):
    if family == "gptj" and dtype == torch.float64:
        # Its attention and head are float32 in a float64 model, which would limit this to 2e-8.
        modeling = importlib.import_module("transformers.models.gptj.modeling_gptj")
        monkeypatch.setattr(modeling, "torch", DoubleTorch())
    if family in MAMBAS:
        tolerance = max(tolerance, 1e-7)
    model, modules = make_model(family, dtype)
    assert leaves_only_keys(model) == (family in FAMILIES)
    sequences = make_sequences()
    got = capture(model, sequences, modules)
    model.eval()
    keys, grads, loss, margin = naive(model, sequences, modules)
    for m in modules:
        assert got.keys[m].dtype == got.grads[m].dtype == dtype
        assert relative(got.keys[m], keys[m]) <= tolerance, m
        assert relative(got.grads[m], grads[m]) <= tolerance, m
    assert relative(got.loss, loss) <= tolerance
    assert relative(got.margin, margin) <= tolerance
    assert got.owner.tolist() == [i for i, (_, t) in enumerate(LENGTHS) for _ in range(t)]
    without = capture(model, sequences, modules, backward=False)  # in one pass
    for m in modules:
        assert relative(without.keys[m], keys[m]) <= tolerance, m
    assert relative(without.margin, margin) <= tolerance
    assert torch.equal(without.owner, got.owner) and torch.equal(without.rival, got.rival)


def test_attention_is_in_plain_products_only_while_they_are_small(monkeypatch):
    model, modules = make_model("llama", torch.float64)
    sequences, asked = make_sequences(), []

    def plain(backend):
        asked.append(backend)
        return sdpa_kernel(backend)

    monkeypatch.setattr(capture_module, "sdpa_kernel", plain)
    small = capture(model, sequences, modules)
    assert asked == [SDPBackend.MATH]
    monkeypatch.setattr(capture_module, "PLAIN_PAIRS", 1)
    large = capture(model, sequences, modules)
    capture(model, sequences, modules, backward=False)  # in one pass, without a cache
    assert len(asked) == 1
    for m in modules:
        assert relative(large.grads[m], small.grads[m]) <= 1e-9, m


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3", "gptj"])
@pytest.mark.parametrize("worth", [1, 10**6])
def test_what_prefixes_have_in_common_is_run_once(family, worth, monkeypatch):
    monkeypatch.setitem(WORTH_A_PASS, "cpu", worth)
    dtype = torch.float32 if family == "gptj" else torch.float64
    tolerance = 1e-4 if family == "gptj" else 1e-9
    model, modules = make_model(family, dtype)
    start, name, other = [5, 9, 4, 33, 7, 8, 2, 60], [11, 12, 13], [14, 15]
    sequences = [
        Sequence(start + name, [20, 21]),
        Sequence(start + name, [30]),
        Sequence(start + other + [40, 41, 42, 43], [22, 23, 24]),
        Sequence(start + other, [50, 51]),
    ]
    run: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: run.append(tuple(args[0].shape))
    )
    got = capture(model, sequences, modules)
    # A prefix lacks the prompt's last token. The first two are the same.
    common, longest = len(start), len(start) + 5
    parts = [(1, common), (3, longest - common)] if worth == 1 else [(3, longest)]
    assert run[:-1] == parts
    keys, grads, loss, margin = naive(model.eval(), sequences, modules)
    for m in modules:
        assert relative(got.keys[m], keys[m]) <= tolerance, m
        assert relative(got.grads[m], grads[m]) <= tolerance, m
    assert relative(got.loss, loss) <= tolerance
    assert relative(got.margin, margin) <= tolerance


@pytest.mark.parametrize(
    "family", ["llama", "mistral-sliding", "qwen3", "gemma3", "lfm2", "qwen3.5"]
)
def test_rows_at_other_places_equal_the_full_backward(family):
    model, modules = make_model(family, torch.float64)
    plain = make_sequences()
    places = [(max(0, len(s.prompt_ids) - 2),) if i % 2 else (0,) for i, s in enumerate(plain)]
    placed = [replace(s, places=at) for s, at in zip(plain, places, strict=True)]
    got = capture(model, placed, modules)
    total = sum(len(s.target_ids) for s in plain)
    assert got.row_owner.tolist() == list(range(len(plain))) and not got.at_answers
    assert got.owner.tolist() == [i for i, s in enumerate(plain) for _ in s.target_ids]
    for i, (s, (at,)) in enumerate(zip(plain, places, strict=True)):
        keys, grads, loss = whole_pass(model.eval(), s, modules)
        for m in modules:
            assert relative(got.keys[m][i], keys[m][at]) <= 1e-9, m
            # Beyond a sliding window they are zero.
            expected = grads[m][at] / total
            torch.testing.assert_close(got.grads[m][i], expected, rtol=1e-9, atol=1e-12)
        assert relative(got.loss[got.owner == i], loss) <= 1e-9
    with pytest.raises(ValueError, match="sequence 0 is to be changed at tokens"):
        capture(model, [replace(plain[0], places=(99,))], modules)


def whole_pass(model, sequence, modules):
    """Keys and gradients of the summed loss at all positions, and the loss of each target token."""
    seen = {}

    def read(name):
        def hook(_module, args, output):
            output.retain_grad()
            seen[name] = (args[0], output)

        return hook

    handles = [model.get_submodule(m).register_forward_hook(read(m)) for m in modules]
    ids = torch.tensor([sequence.prompt_ids + sequence.target_ids[:-1]])
    logits = model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 :]
    loss = F.cross_entropy(logits, torch.tensor(sequence.target_ids), reduction="none")
    loss.sum().backward()
    for handle in handles:
        handle.remove()
    keys = {m: seen[m][0][0].detach() for m in modules}
    return keys, {m: seen[m][1].grad[0] for m in modules}, loss.detach()


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma2"])
def test_equals_full_backward_with_eager_attention(family):
    """Eager attention makes NaN of a fully masked row in float64; Gemma-2 needs it."""
    model, modules = make_model(family, torch.float64, "eager")
    got = capture(model, make_sequences(1), modules)
    _, grads, loss, _ = naive(model.eval(), make_sequences(1), modules)
    assert relative(got.loss, loss) <= 1e-6  # its softmax is in float32
    for m in modules:
        assert relative(got.grads[m], grads[m]) <= 1e-5


def test_model_is_left_as_found():
    model, modules = make_model("llama", torch.float32)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, make_sequences(), modules)
    broken = [Sequence([5], [96, 200])]  # a token beyond the vocabulary
    with pytest.raises((IndexError, RuntimeError)):
        capture(model, broken, modules)
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_works_inside_inference_mode_and_without_gradients():
    model, modules = make_model("llama", torch.float32)
    expected = capture(model, make_sequences(), modules)
    with torch.inference_mode():
        inside = capture(model, make_sequences(), modules)
    without = capture(model, make_sequences(), modules, backward=False)
    for m in modules:
        assert torch.equal(inside.grads[m], expected.grads[m])
    assert without.grads == {}


def test_gradients_are_left_out_where_all_targets_lead():
    model, modules = make_model("llama", torch.float32)
    asked = Sequence([5, 8, 11], [int(model(torch.tensor([[5, 8, 11]])).logits[0, -1].argmax())])
    led = capture(model, [asked], modules, unless_led=True)
    assert not led.grads and float(led.margin) > 0
    assert capture(model, [asked], modules, margin=float(led.margin) + 1, unless_led=True).grads
    other = Sequence([5, 8, 11], [(asked.target_ids[0] + 1) % 97])
    assert capture(model, [asked, other], modules, unless_led=True).grads
    torch.testing.assert_close(led.margin, capture(model, [asked], modules).margin)


def test_only_answer_positions_reach_the_output_head():
    model, modules = make_model("qwen2", torch.float32)
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape))
    capture(model, make_sequences(), modules)
    handle.remove()
    assert rows == [(1, sum(t for _, t in LENGTHS), 97)]


@pytest.mark.parametrize("rows", [1, 2])
def test_the_output_head_is_given_tokens_in_memory_of_their_own(rows):
    model, _ = make_model("qwen2", torch.bfloat16)
    head, given = model.get_output_embeddings(), []
    with evaluation_mode(model), torch.no_grad():
        hook = head.register_forward_pre_hook(lambda _head, args: given.append(args[0]))
        model(torch.tensor([[5, 7, 11, 13]] * rows), logits_to_keep=2)
        hook.remove()
    assert given[0].stride(0) == 2 * given[0].stride(1) == 2 * given[0].shape[2]
    assert not head._forward_pre_hooks


@pytest.mark.parametrize(
    "dtype, grad_dtype", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
)
def test_half_precision_gradients_do_not_underflow(dtype, grad_dtype):
    model, modules = make_model("llama", torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)  # gradients of about 1e-7
    expected = capture(model, make_sequences(), modules)
    half = capture(model.to(dtype), make_sequences(), modules)
    for m in modules:
        assert half.grads[m].dtype == grad_dtype
        assert relative(half.grads[m], expected.grads[m]) < 0.1


@pytest.mark.parametrize(
    "sequences, message",
    [
        ([], "no sequences"),
        ([Sequence([], [3])], "0 prompt and 1 target"),
        ([Sequence([3], [])], "1 prompt and 0 target"),
        ([Sequence([3] * 64, [4, 5])], "65 tokens, expected at most the model's 64"),
    ],
)
def test_bad_sequences_are_refused(sequences, message):
    model, modules = make_model("llama", torch.float32)
    with pytest.raises(ValueError, match=message):
        capture(model, sequences, modules)
