"""Measures twins of real engines, in a process of its own: `python twin_probe.py CASES RESULTS`.

vLLM patches library classes and binds threads and memory, so it stays out of pytest's process. One
engine after the other runs in this one, which is several times faster than a process for each.
CASES is JSON, {name: {"path", "module", "options"}}; RESULTS gets {name: measurements}.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives here, so its tensors can be compared
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "ultraedit",
    "HF_HUB_OFFLINE": "1",
}

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from ultraedit_kernels.integrations.vllm.tokenizer import Rendering, load_tokenizer
from ultraedit_kernels.integrations.vllm.twin import Twin, UnsupportedModelError, build_twin
from ultraedit_kernels.model.parallel import weight_of

# 41 tokens: longer than the sliding windows of the tiny models.
TOKENS = [0, *torch.randint(5, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()]


def engine_logprobs(llm: LLM, tokens: list[int]) -> list[float]:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    prompt_logprobs = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[
        0
    ].prompt_logprobs
    return [entry[t].logprob for entry, t in zip(prompt_logprobs[1:], tokens[1:], strict=True)]


def engine_greedy(llm: LLM, tokens: list[int], n: int) -> list[int]:
    params = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
    output = llm.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0]
    return list(output.outputs[0].token_ids)


def own_texts(llm: LLM) -> tuple[list[list[int]], list[list[float]]]:
    """Of one text that the engine samples, and its score of every token but the first."""
    params = SamplingParams(seed=0, max_tokens=32, ignore_eos=True, logprobs=0, detokenize=False)
    output = llm.generate([{"prompt_token_ids": [0]}], params, use_tqdm=False)[0].outputs[0]
    scores = [row[t].logprob for row, t in zip(output.logprobs, output.token_ids, strict=True)]
    return [[0, *output.token_ids]], [scores]


def check(llm: LLM, twin: Twin) -> float | str:
    """The self-check's difference, or why it refuses."""
    try:
        config = llm.llm_engine.vllm_config
        how = config.model_config.logprobs_mode, config.cache_config.cache_dtype
        return twin.check(*own_texts(llm), *how)
    except UnsupportedModelError as error:
        return str(error)


@torch.no_grad()
def wrong_twins(llm: LLM, twin: Twin) -> dict[str, float | str]:
    """The self-check of Llama twins whose weights have the right names and shapes only."""
    layers = twin.model.model.layers
    found: dict[str, float | str] = {}

    def swap(first: str, second: str) -> None:
        for layer in layers:
            one, other = layer.get_submodule(first), layer.get_submodule(second)
            one.weight, other.weight = other.weight, one.weight

    for pair in (
        ("self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        swap(*pair)
        found[" and ".join(pair)] = check(llm, twin)
        swap(*pair)

    right = [layer.self_attn.q_proj.weight for layer in layers]
    size = layers[0].self_attn.head_dim
    orders = {
        "heads": lambda w: w.view(-1, size, w.shape[1]).flip(0),
        "halves": lambda w: w.view(-1, 2, size // 2, w.shape[1]).transpose(1, 2),
    }
    for name, order in orders.items():
        for layer, weight in zip(layers, right, strict=True):
            reordered = order(weight).reshape(weight.shape).contiguous()
            layer.self_attn.q_proj.weight = torch.nn.Parameter(reordered, requires_grad=False)
        found[name] = check(llm, twin)
    for layer, weight in zip(layers, right, strict=True):
        layer.self_attn.q_proj.weight = weight
    return found


@torch.no_grad()
def twin_greedy(twin: Twin, tokens: list[int], n: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(n):
        logits = twin.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    return tokens[-n:]


def distance(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def storages(model: torch.nn.Module) -> set[int]:
    return {p.untyped_storage().data_ptr() for p in model.parameters()}


def gradient_error(twin: Twin, module: str) -> float:
    """Relative error of the gradient at a module's output against a central difference."""
    ids = torch.tensor([TOKENS])
    shift: torch.Tensor | None = None

    def add(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal shift
        if shift is None:
            shift = torch.zeros_like(output, requires_grad=True)
        return output + shift

    def loss() -> torch.Tensor:
        logits = twin.model(ids, use_cache=False).logits[0, :-1].double()
        return torch.nn.functional.cross_entropy(logits, ids[0, 1:])

    handle = twin.model.get_submodule(module).register_forward_hook(add)
    try:
        loss().backward()
        assert shift is not None and shift.grad is not None
        gradient, norm = shift.grad, shift.grad.norm()
        step = 0.03 * gradient / norm
        with torch.no_grad():
            shift = step
            above = loss()
            shift = -step
            below = loss()
    finally:
        handle.remove()
    return abs(float((above - below) / 0.06 / norm) - 1)


def refusal(model: Any, config: Any, modules: Any = "auto") -> str:
    try:
        load_tokenizer(config, Rendering())
        build_twin(model, config, modules)
    except UnsupportedModelError as error:
        return str(error)
    return ""


def refusals(model: Any, config: Any) -> dict[str, str]:
    """Why what only vLLM can show is refused; the rest is in `twin/test_refuse.py`."""
    quantised = copy.copy(config)
    quantised.quant_config = Fp8Config()
    return {"quantised": refusal(model, quantised), "head": refusal(model, config, ["lm_head"])}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2}
    packed = case.get("packed", False)
    if packed:
        LinearBase._cpu_skip_gemm_dispatch = False
    llm = LLM(case["path"], **options | case.get("options", {}))
    try:
        worker = llm.llm_engine.model_executor.driver_worker.worker
        served, config, module = worker.get_model(), worker.vllm_config, case["module"]
        if packed or "refused" in case:
            return {"refusal": refusal(served, config, [module])}
        result: dict[str, Any] = {}
        with torch.inference_mode():  # as vLLM may call us
            twin = build_twin(served, config, [module])
        result["check"] = check(llm, twin)
        if case.get("wrong"):
            result["wrong"] = wrong_twins(llm, twin)
        if case.get("check_only"):
            return result
        shared = storages(served)
        result["copied"] = [
            name
            for name, p in twin.model.named_parameters(remove_duplicate=False)
            if p.untyped_storage().data_ptr() not in shared
        ]
        result["live_is_vllms"] = twin.live[module].untyped_storage().data_ptr() in shared
        result["address"] = twin.live[module].data_ptr()
        before = engine_logprobs(llm, TOKENS)
        result["distance"] = distance(before, twin.logprobs(TOKENS))
        result["engine_tokens"] = engine_greedy(llm, TOKENS[:12], 12)
        result["twin_tokens"] = twin_greedy(twin, TOKENS[:12], 12)
        if options["dtype"] == "float32":
            result["gradient_error"] = gradient_error(twin, module)
        shadow = weight_of(twin.model.get_submodule(module))
        with torch.no_grad():
            shadow.add_(torch.randn(shadow.shape, generator=torch.Generator().manual_seed(1)))
        result["unpublished"] = distance(before, engine_logprobs(llm, TOKENS))
        with torch.inference_mode():
            twin.publish()
        llm.reset_prefix_cache()
        after = engine_logprobs(llm, TOKENS)
        result["moved"] = distance(before, after)
        result["published_distance"] = distance(after, twin.logprobs(TOKENS))
        result["same_address"] = twin.live[module].data_ptr() == result.pop("address")
        result["equal"] = torch.equal(twin.live[module], shadow)
        if case.get("refusals"):
            result["refusals"] = refusals(served, config)
        return result
    finally:
        LinearBase._cpu_skip_gemm_dispatch = True
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = {}
    for name, case in cases.items():
        try:
            results[name] = measure(case)
        except Exception:
            results[name] = {"failed": traceback.format_exc()}
    Path(sys.argv[2]).write_text(json.dumps(results))
