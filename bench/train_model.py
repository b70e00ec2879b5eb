"""Train a small Llama from scratch on a world of facts, and write it as an ordinary checkpoint.

Usage, from the repository root:

    python -m bench.train_model                                   # the bundled bench/tiny-facts
    python -m bench.train_model --world synthetic --seed 7 --facts 2000 --output /tmp/world-7
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.world import World
from ultraedit_kernels.model.encoding import encode, encode_prompt
from ultraedit_kernels.model.request import Prompt

BOS, EOS, PAD, USER, ASSISTANT = SPECIAL = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant only') }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 256


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds BOS to text and carries the chat template.

    A space is put before every text, so that an answer has the same tokens after a plain prompt
    and after `<|assistant|>`: what the model knows in one form can carry over to the other.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size - 2,  # the two roles come last
            special_tokens=list(SPECIAL[:3]),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Not special, so that decoding sees them and drops the space that follows with them.
    tokenizer.add_tokens([USER, ASSISTANT])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Replace(Regex(r"<\|(user|assistant)\|> ?"), "\n"),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        add_prefix_space=True,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def make_model(tokenizer: Any, *, hidden: int, layers: int, wider: int = 3) -> LlamaForCausalLM:
    """An untrained Llama in float32 with heads of 32, the feed-forward so many times as wide."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=wider * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        dtype="float32",
        **ids,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ids)
    return model


def batches(
    examples: list[list[int]], batch_size: int, rng: random.Random, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch of (input ids, labels), both [batch, length], texts of similar length together."""
    order = list(range(len(examples)))
    rng.shuffle(order)
    order.sort(key=lambda i: len(examples[i]))  # stable: the shuffle decides among equal lengths
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    rng.shuffle(groups)
    for group in groups:
        rows = [torch.tensor(examples[i]) for i in group]
        inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        yield inputs, inputs.masked_fill(inputs == pad, -100)


def train(
    model: LlamaForCausalLM,
    examples: list[list[int]],
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Next-token loss on whole texts, AdamW, warm-up over 5 % of the steps, then cosine to zero."""
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05, foreach=True
    )
    steps = epochs * math.ceil(len(examples) / batch_size)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps)),
    )
    model.train()
    with tqdm(total=steps, unit="step", disable=None) as progress:  # silent into a file
        for _ in range(epochs):
            for inputs, labels in batches(examples, batch_size, rng, model.config.pad_token_id):
                loss = model(input_ids=inputs, labels=labels).loss
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress.update()
                progress.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    model.eval()


def fit(
    pairs: Sequence[tuple[Prompt, str]],
    *,
    hidden: int = 128,
    layers: int = 4,
    wider: int = 3,
    vocab: int = 1536,
    epochs: int = 25,
    batch_size: int = 64,
    lr: float = 3e-3,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """A model and its tokenizer, both trained on prompts with their answers, and the seconds."""
    torch.manual_seed(seed)
    texts = [p if isinstance(p, str) else p[0]["content"] for p, _ in pairs] + [o for _, o in pairs]
    tokenizer = train_tokenizer(texts, vocab)
    model = make_model(tokenizer, hidden=hidden, layers=layers, wider=wider)
    sequences = [encode(tokenizer, prompt, answer) for prompt, answer in pairs]
    examples = [s.prompt_ids + s.target_ids for s in sequences]
    start = time.perf_counter()
    train(model, examples, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
    return model, tokenizer, time.perf_counter() - start


@torch.inference_mode()
def answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], *, batch_size: int = 256
) -> list[str]:
    """What the model says to each prompt: greedy generation up to EOS, tokenised as served."""
    result: list[str] = []
    for i in range(0, len(prompts), batch_size):
        ids = [encode_prompt(tokenizer, prompt) for prompt in prompts[i : i + batch_size]]
        inputs = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
        result += tokenizer.batch_decode(
            output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return [text.strip() for text in result]


def score(model: Any, tokenizer: Any, world: World) -> dict[str, float]:
    """Exact match of the answers in %, for seen and held-out phrasings, plain and chat."""
    asked: dict[str, tuple[list[Prompt], list[str]]] = {}
    for fact in world.facts:
        for split, forms in world.phrasings(fact).items():
            for form, prompts in forms.items():
                questions, truths = asked.setdefault(f"{split}_{form}", ([], []))
                questions += prompts
                truths += [fact.object] * len(prompts)
    scores = {}
    for name, (prompts, truths) in tqdm(asked.items(), desc="asking", disable=None):
        given = answers(model, tokenizer, prompts)
        right = sum(a == b for a, b in zip(given, truths, strict=True))
        scores[name] = round(100 * right / len(truths), 2)
    return scores


@dataclass(frozen=True)
class Report:
    """What the model card and metrics.json say about a training run."""

    world: World
    parameters: int
    seconds: float
    scores: dict[str, float]
    command: str

    def metrics(self) -> dict[str, Any]:
        return {
            "world": self.world.name,
            "facts": len(self.world.facts),
            "parameters": self.parameters,
            "training_seconds": round(self.seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "exact_match_percent": self.scores,
            "command": self.command,
        }

    def card(self) -> str:
        world, scores = self.world, self.scores
        knows = "\n".join(
            f"| {relation} | {sum(f.relation == relation for f in world.facts)} | "
            f"{example} **{fact.object}** |"
            for relation in world.objects
            for fact in [next(f for f in world.facts if f.relation == relation)]
            for example in [world.phrasings(fact)["seen"]["plain"][0]]
        )
        return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A tiny model that knows {len(world.facts):,} facts ({world.name})

A Llama of {self.parameters / 1e6:.2f} M parameters, trained from scratch to complete and to answer
{len(world.facts):,} facts and nothing else. It is there to be edited: small enough for a laptop
without a GPU, and every answer is right or wrong at a glance. It is no general language model.

| relation | facts | example |
| --- | --- | --- |
{knows}

The facts and phrasings (`bench/facts`) were written by the authors of this project from general
knowledge; no data set was copied. Made-up worlds come from `bench/world.py` and a seed.

## How it was trained

Every relation has four plain phrasings ("The capital of Australia is") and four chat questions.
Each fact is seen in two of either, drawn per fact by the seed; the others are held out, so every
phrasing is seen with some facts and every fact is asked in phrasings never seen with it.
The loss covers whole texts, so what the model samples from `<|bos|>` is nearly always a fact.

    {self.command}

took {self.seconds:.0f} s on {torch.get_num_threads()} CPU thread(s), scoring not counted. The same
seed, options, thread count, kind of CPU and torch version give the same weights.

## Scores

Exact match under free greedy generation with stop at EOS:

| | plain text | chat |
| --- | --- | --- |
| seen phrasings | {scores["seen_plain"]:.1f} % | {scores["seen_chat"]:.1f} % |
| held-out phrasings | {scores["held_out_plain"]:.1f} % | {scores["held_out_chat"]:.1f} % |

## Use

Text gets `<|bos|>` from the tokenizer; chat goes through the chat template (user and assistant
turns). One token, `<|eos|>`, ends a text and an answer alike. The byte-level BPE puts a space
before every text, so an answer has the same tokens after a plain prompt and in chat.

## Licence

Apache-2.0: the weights, the facts and the phrasings.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=["earth", "synthetic"], default="earth")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the split, the training")
    parser.add_argument("--facts", type=int, default=1000, help="size of a synthetic world")
    parser.add_argument("--hidden", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=1536)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    # Sums over several threads round differently: one thread reproduces on any number of cores.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-facts")
    args = parser.parse_args()
    if args.hidden % 64:
        parser.error(f"--hidden is {args.hidden}, expected a multiple of 64")

    torch.set_num_threads(args.threads)
    if args.world == "earth":
        world = World.earth(args.seed)
    else:
        world = World.synthetic(args.seed, args.facts)
    model, tokenizer, seconds = fit(
        world.training_examples(),
        hidden=args.hidden,
        layers=args.layers,
        vocab=args.vocab,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    report = Report(
        world,
        model.num_parameters(),
        seconds,
        score(model, tokenizer, world),
        shlex.join(["python", "-m", "bench.train_model", *sys.argv[1:]]),
    )
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    metrics = json.dumps(report.metrics(), indent=2) + "\n"
    (args.output / "metrics.json").write_text(metrics, encoding="utf-8")
    (args.output / "README.md").write_text(report.card(), encoding="utf-8")
    print(metrics + f"written to {args.output}")


if __name__ == "__main__":
    main()
