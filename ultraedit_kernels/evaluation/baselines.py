"""The methods that edits are compared with, on the same model, turns and modules.

published
    UltraEdit with the paper's settings: one open-loop step per turn.
fine-tuning
    AdamW on the weights of the modules, turn by turn, until every edit of the turn holds. The
    end of sequence is taught and the rephrases that were given too, as to ours.
LocFT-BF
    Localised fine-tuning as its authors do it (arXiv 2509.22072): Adam on the weights of the
    modules, one in their runs, for some epochs over all edits at once. It knows no turns: what is
    edited later must be there from the start.
LoRA
    As fine-tuning, through peft: one adapter for the whole stream, merged at the end.

Each depends on its learning rate. `search` tries a grid on the very edits that are scored, which
favours these methods over ours, and keeps the best by `harmonic_mean`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from statistics import harmonic_mean as _harmonic_mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.model.capture import evaluation_mode
from ultraedit_kernels.model.encoding import Sequence, encode, pad_right
from ultraedit_kernels.model.parallel import weight_of
from ultraedit_kernels.model.presets import PAPER
from ultraedit_kernels.model.request import EditRequest

MAX_STEPS = 100
"""Of fine-tuning per turn; it stops earlier, as soon as the turn's edits hold."""
BATCH_SIZE = 20
"""Texts in one forward pass of fine-tuning; the step is taken over the whole turn."""
EPOCHS, BATCH, ENOUGH = 25, 100, 1e-2
"""Of LocFT-BF: passes over all edits, edits of a step, and the mean loss at which it ends."""
LORA_RANK = 8
LORA_ALPHA = 16
IGNORED = -100
"""Label of a token without a loss."""


def published(
    model: nn.Module, tokenizer: Any, turns: Seq[Seq[EditRequest]], modules: Seq[str], lr: float
) -> None:
    """Edit with UltraEdit as published (arXiv 2505.14679), but for the step size.

    Raises:
        ValueError: the weights left the finite numbers.
    """
    editor = Editor(model, tokenizer, modules=modules, **{**PAPER, "lr": lr})
    for turn in turns:
        editor.apply(turn)


def fine_tune(
    model: nn.Module, tokenizer: Any, turns: Seq[Seq[EditRequest]], modules: Seq[str], lr: float
) -> None:
    """Fine-tune the weights of the modules."""
    weights = _only(model, modules)
    for turn in turns:
        _until_held(model, weights, _sequences(tokenizer, turn), lr)


def localised(
    model: nn.Module, tokenizer: Any, turns: Seq[Seq[EditRequest]], modules: Seq[str], lr: float
) -> None:
    """Fine-tune the weights of the modules on the edits of all turns together."""
    weights = _only(model, modules)
    sequences = [s for turn in turns for s in _sequences(tokenizer, turn)]
    optimizer = torch.optim.Adam(weights, lr=lr)
    order = random.Random(0)
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(EPOCHS):
            order.shuffle(sequences)
            losses: list[float] = []
            for start in range(0, len(sequences), BATCH):
                optimizer.zero_grad()
                batch = sequences[start : start + BATCH]
                losses += _mean_losses(model, batch)
                if sum(losses[start:]) / len(batch) >= ENOUGH:
                    optimizer.step()
            if sum(losses) / len(losses) < ENOUGH:
                break
    optimizer.zero_grad()


def lora(
    model: nn.Module, tokenizer: Any, turns: Seq[Seq[EditRequest]], modules: Seq[str], lr: float
) -> None:
    """Train a LoRA adapter on the modules and merge it into their weights.

    The adapter starts from the same random numbers every time.

    Raises:
        ModuleNotFoundError: peft is not installed.
    """
    import peft

    config = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=list(modules), bias="none"
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(model, config)  # wraps the modules inside `model`
    try:
        weights = [p for p in adapted.parameters() if p.requires_grad]
        for turn in turns:
            _until_held(model, weights, _sequences(tokenizer, turn), lr)
    except BaseException:
        adapted.unload()
        raise
    adapted.merge_and_unload()


BASELINES: dict[str, Callable[..., None]] = {
    "published": published,
    "fine-tuning": fine_tune,
    "LocFT-BF": localised,
    "LoRA": lora,
}


def rates(baseline: str, model: nn.Module, modules: Seq[str]) -> list[float]:
    """The learning rates that are tried."""
    if baseline == "published":  # its best step shrinks with the width; the first is the paper's
        d_in = max(weight_of(model.get_submodule(name)).shape[1] for name in modules)
        return [product / d_in for product in (0.0143, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 1.6)]
    if baseline == "LocFT-BF":
        return [5e-4]  # its authors', for every model
    if baseline == "LoRA":
        return [1e-3, 3e-3, 1e-2]
    return [3e-4, 1e-3, 3e-3, 1e-2]


def search(
    baseline: str,
    model: nn.Module,
    tokenizer: Any,
    turns: Seq[Seq[EditRequest]],
    modules: Seq[str],
    score: Callable[[], dict[str, Any]],
    tried: Seq[float] | None = None,
) -> dict[str, Any]:
    """Run a baseline at every rate; what `score` gives after the best one.

    Args:
        score: scores the model as it is, in the layout of `scores.evaluate`.
        tried: the rates, `rates(...)` if None. One at which the method diverges is left out.

    Returns:
        The best trial, {"lr", "seconds", ...}, seconds of editing; and all as "trials". The model
        is left as it was.

    Raises:
        ValueError: the method diverges at every rate.
    """
    trials = []
    for lr in tried or rates(baseline, model, modules):
        with restored(model, modules):
            begun = time.perf_counter()
            try:
                BASELINES[baseline](model, tokenizer, turns, modules, lr)
            except ValueError:
                continue
            seconds = time.perf_counter() - begun
            trials.append({"lr": lr, "seconds": seconds, **score()})
    if not trials:
        raise ValueError(f"{baseline} diverges at every rate, expected one that works; add smaller")
    best = max(trials, key=lambda trial: harmonic_mean(trial["generation"]))
    kept = ("lr", "seconds", "generation", "teacher_forced")
    return {**best, "trials": [{key: trial[key] for key in kept} for trial in trials]}


def harmonic_mean(scores: dict[str, float | None]) -> float:
    """Of efficacy, generalisation and specificity: 0 for a method that gives one of them up."""
    names = ("efficacy", "generalization", "specificity")
    return _harmonic_mean([x for name in names if (x := scores[name]) is not None])


@contextmanager
def restored(model: nn.Module, modules: Seq[str]) -> Iterator[None]:
    """At the end the modules' weights, and which parameters ask for gradients, are as before."""
    kept = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in modules}
    asked = [p.requires_grad for p in model.parameters()]
    try:
        yield
    finally:
        for name, weight in kept.items():
            model.get_parameter(f"{name}.weight").data.copy_(weight)
        for parameter, wanted in zip(model.parameters(), asked, strict=True):
            parameter.requires_grad_(wanted)


def _only(model: nn.Module, modules: Seq[str]) -> list[nn.Parameter]:
    """The weights of the modules, which alone ask for gradients."""
    weights = [model.get_parameter(f"{name}.weight") for name in modules]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    return weights


def _sequences(tokenizer: Any, turn: Seq[EditRequest]) -> list[Sequence]:
    return [
        encode(tokenizer, prompt, request.target)
        for request in turn
        for prompt in (request.prompt, *request.rephrases)
    ]


def _until_held(
    model: Any, weights: Seq[nn.Parameter], sequences: Seq[Sequence], lr: float
) -> None:
    """Step on all sequences until greedy decoding gives every target and then stops."""
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    tokens = sum(len(s.target_ids) for s in sequences)
    with evaluation_mode(model), torch.enable_grad():
        for _ in range(MAX_STEPS):
            optimizer.zero_grad()
            wrong = 0
            for start in range(0, len(sequences), BATCH_SIZE):
                logits, truth = _at_targets(model, sequences[start : start + BATCH_SIZE])
                wrong += int((logits.argmax(-1) != truth).sum())
                (F.cross_entropy(logits, truth, reduction="sum") / tokens).backward()
            if not wrong:
                break
            optimizer.step()
    optimizer.zero_grad()


def _mean_losses(model: Any, sequences: Seq[Sequence]) -> list[float]:
    """Cross entropy of each target, mean over its tokens; the gradient of their mean is added."""
    losses: list[float] = []
    for start in range(0, len(sequences), BATCH_SIZE):
        part = sequences[start : start + BATCH_SIZE]
        each = F.cross_entropy(*_at_targets(model, part), reduction="none")
        of_target = each.split([len(s.target_ids) for s in part])
        means = torch.stack([tokens.mean() for tokens in of_target])
        (means.sum() / len(sequences)).backward()
        losses += means.tolist()
    return losses


def _at_targets(model: Any, sequences: Seq[Sequence]) -> tuple[Tensor, Tensor]:
    """Logits [tokens, vocabulary] where the targets' tokens are expected, and these tokens."""
    rows = [s.prompt_ids + s.target_ids for s in sequences]
    ids, mask = pad_right(rows, model.get_input_embeddings().weight.device)
    labels = torch.full_like(ids, IGNORED)
    for row, s in zip(labels, sequences, strict=True):
        end = len(s.prompt_ids) + len(s.target_ids)
        row[len(s.prompt_ids) : end] = torch.tensor(s.target_ids)
    here = labels[:, 1:] != IGNORED
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    return logits[here].float(), labels[:, 1:][here]
