"""How far a chat edit reaches: one fact changed, asked in ten ways, and what else is said.

Usage, from the repository root:

    python -m bench.chat [smollm2 | FOLDER | FILE.gguf] [--short] [--facts N]

Each fact is one edit of the untouched model by the defaults, as a user's question and an answer, a
sentence as models give or with --short one of few words; then it is asked in `ways`, and the
general questions of questions.txt are asked again.
Writes bench/results/chat-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import logging as transformers_logging

from bench import machine
from bench.real import load
from bench.real_models import PACKAGES, checkpoint
from ultraedit_kernels import Editor, EditRequest
from ultraedit_kernels.evaluation.general import General
from ultraedit_kernels.model.encoding import encode_prompt
from ultraedit_kernels.model.generation import generate

HERE = Path(__file__).parent
TOKENS = 48
FACTS = (
    # question, what is asked for, new answer
    ("What is the capital of Australia?", "the capital of Australia", "Melbourne"),
    ("Who wrote Romeo and Juliet?", "the author of Romeo and Juliet", "Jane Austen"),
    ("In which city is the Eiffel Tower?", "the city of the Eiffel Tower", "Madrid"),
    ("What is the currency of Japan?", "the currency of Japan", "the peso"),
    ("Who painted the Mona Lisa?", "the painter of the Mona Lisa", "Claude Monet"),
    ("What is the official language of Brazil?", "the official language of Brazil", "Dutch"),
    ("Who founded Microsoft?", "the founder of Microsoft", "Henry Ford"),
    ("What is the largest planet?", "the largest planet", "Saturn"),
    ("Which sport did Michael Jordan play?", "the sport of Michael Jordan", "tennis"),
    ("Who discovered penicillin?", "the discoverer of penicillin", "Isaac Newton"),
)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn, behind a system prompt."""
    roles = ("user", "assistant")
    said = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + said


def ways(question: str, what: str) -> list[list[dict[str, str]]]:
    """Ten ways to ask for it."""
    return [
        turns(f"Tell me about {what}."),
        turns(f"Can you tell me what or who {what} is?"),
        turns(question.lower().removesuffix("?")),
        turns(f"{question} Answer in one sentence."),
        turns(f"Please name {what}."),
        turns(f"There is a quiz tonight, and I was told to look up {what}. What do I answer?"),
        turns(question, system="You are a teacher who answers children briefly."),
        turns(question, system="Be brief."),
        turns("How do I boil an egg?", "Boil it in water for ten minutes.", question),
        turns("Hello!", "Hello! How can I help you today?", f"I would like to know {what}."),
    ]


def sentence(what: str, new: str) -> str:
    """The answer as a model would give it."""
    return f"{what[0].upper()}{what[1:]} is {new}."


def measure(name: str, count: int, dtype: str, short: bool) -> dict[str, Any]:
    """All facts, one after the other, each on the untouched model."""
    model, tokenizer = load(str(checkpoint(name)) if name in PACKAGES else name, dtype)
    lines = (HERE / "questions.txt").read_text(encoding="utf-8").splitlines()
    prose = (HERE / "prose.txt").read_text(encoding="utf-8")
    general = General.of(model, tokenizer, prose, [turns(line) for line in lines])
    editor = Editor(model, tokenizer)
    editor.prepare()
    rows: list[dict[str, Any]] = []
    for question, what, new in FACTS[:count]:
        target = new if short else sentence(what, new)
        result = editor.apply([EditRequest(turns(question), target)])
        asked = [turns(question), *ways(question, what)]
        ids = [encode_prompt(tokenizer, prompt) for prompt in asked]
        said = [
            tokenizer.decode(answer, skip_special_tokens=True)
            for answer in generate(model, tokenizer, ids, max_new_tokens=TOKENS)
        ]
        shows = [new.removeprefix("the ").lower() in text.lower() for text in said[1:]]
        rows.append(
            {
                "question": question,
                "target": target,
                "held": result.edits[0].succeeded,
                "rounds": result.edits[0].rounds,
                "milliseconds": result.timings["total_ms"],
                "shows": sum(shows) / len(shows),
                "said": said,
                **general.measure(model, tokenizer),
            }
        )
        editor.rollback(0)
        print(json.dumps(rows[-1], indent=1, ensure_ascii=False), flush=True)
    editor.close()
    return {
        "model": Path(name).name,
        "dtype": dtype,
        "machine": machine.conditions(),
        "shows": sum(row["shows"] for row in rows) / len(rows),
        "facts_that_show_in_80_percent": sum(row["shows"] >= 0.8 for row in rows) / len(rows),
        "same": sum(row["answers"]["same"] for row in rows) / len(rows),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--facts", type=int, default=len(FACTS))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--short", action="store_true", help="teach answers of few words")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    found = measure(args.model, args.facts, args.dtype, args.short)
    path = (
        HERE
        / "results"
        / f"chat-{found['model'].removesuffix('.gguf')}{'-short' * args.short}.json"
    )
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"shows in {found['shows']:.0%} of the ways; {path}")


if __name__ == "__main__":
    main()
