"""One of two ranks, in a process of its own: `python parallel_probe.py RANK RENDEZVOUS RESULTS`.

Both ranks build the same models whole, and their parts of them; RANK's measurements go to RESULTS.
"""

from __future__ import annotations

import copy
import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers as t
from torch import nn

from ultraedit_kernels.method.protect import Anchors, OwnKeys
from ultraedit_kernels.model.capture import Captured, capture
from ultraedit_kernels.model.encoding import Sequence
from ultraedit_kernels.model.generation import generate, sample
from ultraedit_kernels.model.parallel import (
    RankError,
    Ranks,
    local_config,
    shard_embedding,
    shard_head,
    shard_linear,
    weight_of,
)
from ultraedit_kernels.store.delta import LowRank, digest
from ultraedit_kernels.store.untouched import Untouched

SIZES: dict[str, Any] = dict(
    vocab_size=97,  # odd, so that the second rank's part is padded
    hidden_size=32,
    intermediate_size=56,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = {"sliding_window": 5, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0}
CONFIGS = {
    "llama": t.LlamaConfig(**SIZES),
    "llama-biases": t.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama-one-kv-head": t.LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "llama-tied": t.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mistral": t.MistralConfig(**SIZES, sliding_window=5),
    "qwen2": t.Qwen2Config(**SIZES),
    "qwen3": t.Qwen3Config(**SIZES),
    "gemma2": t.Gemma2Config(**SIZES, **GEMMA),
}
MODULES = [
    f"model.layers.1.{part}" for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
] + ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW = ("o_proj", "down_proj")


class Tokenizer:
    eos_token_id = 2


def whole_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and "gemma2" not in config.model_type:
                parameter.add_(1.0)
    return model.eval().requires_grad_(False)


def divided_model(model: Any, ranks: Ranks) -> Any:
    """This rank's part of a whole model."""
    config = local_config(model.config, ranks.size)
    own = t.AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    padding = -config.vocab_size % ranks.size

    def cut(x: torch.Tensor, dim: int) -> nn.Parameter:
        part = x.chunk(ranks.size, dim)[ranks.rank]
        return nn.Parameter(part.clone(memory_format=torch.contiguous_format), requires_grad=False)

    for name, module in own.named_modules():
        source, leaf = model.get_submodule(name), name.rpartition(".")[2]
        for part, value in source.named_parameters(recurse=False):
            if leaf in COLUMN:
                heads = model.config.num_key_value_heads
                shared = leaf in ("k_proj", "v_proj") and heads < ranks.size
                new = nn.Parameter(value.clone(), False) if shared else cut(value, 0)
            elif leaf in ROW and part == "weight":
                new = cut(value, 1)
            elif leaf in ("embed_tokens", "lm_head"):
                # What is in the padding must not matter.
                new = cut(nn.functional.pad(value, (0, 0, 0, padding), value=7.0), 0)
            else:
                new = nn.Parameter(value.clone(), requires_grad=False)
            setattr(module, part, new)
        if leaf in COLUMN:
            shard_linear(module, 0, ranks)
        elif leaf in ROW:
            shard_linear(module, 1, ranks)
    if config.tie_word_embeddings:
        own.lm_head.weight = own.model.embed_tokens.weight
    shard_embedding(own.model.embed_tokens, ranks)
    shard_head(own.lm_head, config.vocab_size, ranks)
    own.ranks = ranks
    return own.eval().requires_grad_(False)


def sequences() -> list[Sequence]:
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, SIZES["vocab_size"], (n,), generator=generator).tolist()

    return [Sequence(tokens(p), tokens(a)) for p, a in ((1, 3), (13, 1), (7, 6), (20, 4))]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def distances(got: Captured, wanted: Captured) -> dict[str, float]:
    found = {f: distance(getattr(got, f), getattr(wanted, f)) for f in ("loss", "margin")}
    for name in MODULES:
        found[f"keys {name}"] = distance(got.keys[name], wanted.keys[name])
        if wanted.grads:
            found[f"grads {name}"] = distance(got.grads[name], wanted.grads[name])
    return found


@torch.no_grad()
def family(config: Any, ranks: Ranks) -> dict[str, Any]:
    model = whole_model(config)
    own = divided_model(model, ranks)
    ids = torch.tensor([sequences()[3].prompt_ids])
    found: dict[str, Any] = {"logits": distance(own(ids).logits, model(ids).logits)}
    with torch.enable_grad():
        got, wanted = (capture(m, sequences(), MODULES, margin=1.0) for m in (own, model))
        late = [m for m in MODULES if "layers.2" in m]  # a graph that starts at a row-parallel one
        for m in late:
            one, other = (capture(x, sequences(), [m]).grads[m] for x in (own, model))
            found[f"alone {m}"] = distance(one, other)
    found |= distances(got, wanted)
    prompts = [s.prompt_ids for s in sequences()]
    greedy = [generate(m, Tokenizer(), prompts, max_new_tokens=6) for m in (own, model)]
    sampled = [
        list(sample(m, Tokenizer(), 5, 4, max_new_tokens=6, batch_size=4, seed=3))
        for m in (own, model)
    ]
    found |= {"greedy": greedy[0] == greedy[1], "sampled": sampled[0] == sampled[1]}
    return found


def deltas(ranks: Ranks, dtype: torch.dtype) -> dict[str, bool]:
    """A low-rank change of parts and of the whole give the same bits."""
    model = whole_model(CONFIGS["llama"]).to(dtype)
    own = divided_model(model, ranks)
    found = {}
    for name in MODULES:
        weight, part = model.get_submodule(name).weight.data, weight_of(own.get_submodule(name))
        start = part.clone()
        generator = torch.Generator().manual_seed(1)
        change = LowRank(*(torch.randn(37, d, generator=generator) for d in weight.shape))
        before = digest(weight)
        found[f"{name} before"] = digest(part) == before and part.shape == tuple(weight.shape)
        change.apply(weight)
        change.apply(part)
        found[f"{name} after"] = digest(part) == digest(weight) != before
        found[f"{name} back"] = digest(part.copy_(start)) == before
        found[f"{name} set"] = digest(part.copy_(weight)) == digest(weight)
    return found


def untouched(ranks: Ranks, folder: Path) -> dict[str, bool]:
    """A rank's part of what a checkpoint holds is read from there."""
    whole_model(CONFIGS["llama"]).save_pretrained(folder)  # which the first rank does
    assert ranks.all(True)
    own = divided_model(t.AutoModelForCausalLM.from_pretrained(folder), ranks)
    own.config.name_or_path = str(folder)
    weights = {name: weight_of(own.get_submodule(name)) for name in MODULES}
    base = {name: digest(weight) for name, weight in weights.items()}
    kept = Untouched(own, weights, base)
    parts = {name: weight.local.clone() for name, weight in weights.items()}
    found = {"read": not kept.copies}
    for name, weight in weights.items():
        weight.local.zero_()
        found[f"{name} part"] = torch.equal(kept[name].local, parts[name])
        found[f"{name} back"] = digest(weight.copy_(kept[name])) == base[name]
    return found


def faults(ranks: Ranks) -> dict[str, Any]:
    """What each rank sees when one of them fails, at several places; and that both go on."""
    found: dict[str, Any] = {}
    one = torch.ones(3)

    def seen(where: str, fail: int) -> str:
        try:
            with ranks.together():
                if where == "before" and ranks.rank == fail:
                    raise OSError("injected")
                ranks.all_reduce(one)
                if where == "between" and ranks.rank == fail:
                    raise OSError("injected")
                with ranks.in_turn():
                    if where == "in turn" and ranks.rank == fail:
                        raise OSError("injected")
                if where == "after" and ranks.rank == fail:
                    raise OSError("injected")
                if where == "both":
                    raise OSError("injected")
        except (OSError, RankError) as error:
            return type(error).__name__
        return "nothing"

    for where in ("before", "between", "in turn", "after", "both"):
        for fail in (0, 1):
            found[f"{where} {fail}"] = seen(where, fail)
            found[f"{where} {fail} then"] = (seen("never", 0), ranks.all_reduce(one).tolist())

    def caught() -> str:
        with ranks.together():
            try:
                with ranks.in_turn():
                    if ranks.rank == 0:
                        raise OSError("injected")
            except (OSError, RankError):
                pass
            ranks.all_reduce(one)
        return "nothing"

    found["caught"] = caught()
    found["caught then"] = (seen("never", 0), ranks.all_reduce(one).tolist())

    pauses: list[int] = []
    wishes = iter([True, False, True, True, False, False])  # asked again after each pause
    ranks.wants_pause = lambda: next(wishes)
    ranks.pause = lambda: pauses.append(1)
    for _ in range(3):
        ranks.agree()
    ranks.wants_pause, ranks.pause = (lambda: False), (lambda: None)
    found["pauses"] = len(pauses)
    return found


def gathered(ranks: Ranks) -> dict[str, float]:
    """Distance of what protects the divided model from what protects the whole one, edited at
    names, and how many modules' shields are this rank's own."""
    whole = whole_model(CONFIGS["llama"])
    own = divided_model(whole, ranks)

    def anchors(model: Any, ranks: Ranks | None) -> tuple[Anchors, Anchors]:
        weights = {name: weight_of(model.get_submodule(name)) for name in MODULES}
        keys = OwnKeys(weights, 1.0, 20, ranks)
        list(keys.add(model, sequences()))
        found = keys.anchors()
        return found, keys.shared(found)

    (_, expected), (ours, shared) = anchors(whole, None), anchors(own, ranks)
    found = {}
    for side in ("keys", "outputs"):
        pairs = [(getattr(shared, side)[n], getattr(expected, side)[n]) for n in MODULES]
        found[side] = max(float((a.T @ a - b.T @ b).abs().max()) for a, b in pairs)
    return found | {"own": sum(bool(rows.any()) for rows in ours.keys.values())}


def refusals() -> dict[str, str]:
    found = {}
    for name, wrong in (
        ("heads", {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}),
        ("width", {"intermediate_size": 57}),
        ("kv", {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}),
    ):
        try:
            local_config(t.LlamaConfig(**SIZES | wrong), 2)
        except ValueError as error:
            found[name] = str(error)
    return found


def main(rank: int, rendezvous: str, results: Path) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=limit
    )
    ranks = Ranks(*(dist.new_group([0, 1], backend="gloo", timeout=limit) for _ in range(2)))
    found: dict[str, Any] = {"families": {}}
    for name, config in CONFIGS.items():
        found["families"][name] = family(copy.deepcopy(config), ranks)
    found["deltas"] = {
        str(dtype): deltas(ranks, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    found["untouched"] = untouched(ranks, results.with_name("whole"))
    found["faults"] = faults(ranks)
    found["gathered"] = gathered(ranks)
    found["refusals"] = refusals()
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
