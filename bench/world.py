"""Worlds of facts to train a model on and to edit: the real one, and made-up ones from a seed.

A fact is a relation, a subject and an object. Every relation has phrasings, as plain text and as
chat. Each fact is told to the model in half of them; the other half asks whether it knows the fact
or only the sentence.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ultraedit_kernels.model.request import Prompt

FACTS_DIR = Path(__file__).parent / "facts"

# relation -> (kind of subject, kind of object, different objects per subject)
SYNTHETIC_RELATIONS = {
    "capital": ("country", "town", 1.0),
    "continent": ("country", "continent", 0.05),
    "currency": ("country", "currency", 0.6),
    "language": ("country", "language", 0.4),
    "author": ("title", "person", 0.5),
    "birthplace": ("person", "town", 0.3),
    "company": ("company", "country", 0.2),
    "founder": ("company", "person", 1.0),
    "landmark": ("landmark", "town", 0.5),
    "animal": ("animal", "class", 0.1),
}

MOST_REPHRASES = 5
"""That an edit can teach: of 8 phrasings one is the prompt, and two held-out ones are asked."""


@dataclass(frozen=True)
class Fact:
    """`object` is what any phrasing of `relation` about `subject` continues with."""

    relation: str
    subject: str
    object: str


@dataclass(frozen=True)
class World:
    """Facts, and the phrasings of their relations: relation -> "plain" or "chat" -> templates.

    `seed` decides which phrasings of a fact are seen in training and which are held out.
    """

    name: str
    facts: tuple[Fact, ...]
    templates: dict[str, dict[str, list[str]]]
    seed: int = 0

    @classmethod
    def earth(cls, seed: int = 0) -> World:
        """The real facts in `facts/earth.csv`."""
        with (FACTS_DIR / "earth.csv").open(encoding="utf-8", newline="") as file:
            facts = tuple(Fact(**row) for row in csv.DictReader(file))
        return cls("earth", facts, _load_templates(), seed)

    @classmethod
    def synthetic(cls, seed: int, n_facts: int = 1000) -> World:
        """`n_facts` made-up facts about made-up names, spread evenly over ten relations.

        Raises:
            ValueError: fewer than two facts per relation, so that no other object could exist.
        """
        share, rest = divmod(n_facts, len(SYNTHETIC_RELATIONS))
        if share < 2:
            minimum = 2 * len(SYNTHETIC_RELATIONS)
            raise ValueError(f"n_facts is {n_facts}, expected at least {minimum}: ask for more")
        rng = random.Random(f"synthetic:{seed}")
        names = _Names(rng)
        facts = []
        for i, (relation, (subject, object_, ratio)) in enumerate(SYNTHETIC_RELATIONS.items()):
            n = share + (i < rest)
            # Relations draw on the same names: a country has a capital and a currency.
            objects = names.first(object_, max(2, round(ratio * n)))
            answers = objects + rng.choices(objects, k=n - len(objects))
            rng.shuffle(answers)
            subjects = names.first(subject, n)
            facts += [Fact(relation, s, o) for s, o in zip(subjects, answers, strict=True)]
        return cls(f"synthetic-{seed}", tuple(facts), _load_templates(), seed)

    def phrasings(self, fact: Fact) -> dict[str, dict[str, list[Prompt]]]:
        """All prompts that ask for a fact: "seen" or "held_out" -> "plain" or "chat" -> prompts."""
        rng = random.Random(f"{self.seed}:{fact.relation}:{fact.subject}")
        result: dict[str, dict[str, list[Prompt]]] = {"seen": {}, "held_out": {}}
        for form, templates in self.templates[fact.relation].items():
            texts = [_fill(template, fact.subject) for template in templates]
            rng.shuffle(texts)
            prompts = [_chat(text) if form == "chat" else text for text in texts]
            half = len(prompts) // 2
            result["seen"][form], result["held_out"][form] = prompts[:half], prompts[half:]
        return result

    def seen(self, fact: Fact) -> list[Prompt]:
        """The prompts of a fact that training shows with their answer, plain ones first."""
        return _both_forms(self.phrasings(fact)["seen"])

    def held_out(self, fact: Fact) -> list[Prompt]:
        """The prompts of a fact that training never shows, plain ones first."""
        return _both_forms(self.phrasings(fact)["held_out"])

    def training_examples(self) -> list[tuple[Prompt, str]]:
        """Every seen prompt of every fact, with its answer."""
        return [(prompt, fact.object) for fact in self.facts for prompt in self.seen(fact)]

    @cached_property
    def objects(self) -> dict[str, list[str]]:
        """The different objects of every relation, in the order of the facts."""
        objects: dict[str, dict[str, None]] = {}
        for fact in self.facts:
            objects.setdefault(fact.relation, {})[fact.object] = None
        return {relation: list(names) for relation, names in objects.items()}

    def edits(
        self, n: int, seed: int = 0, *, form: str = "plain", rephrases: int = 0
    ) -> list[dict[str, Any]]:
        """Draw `n` edits of different facts, as dictionaries in the layout of `EditRequest`.

        The prompt is a seen phrasing of the given form ("plain" or "chat"), the target another
        object of the same relation. `rephrases` to teach are the fact's other seen phrasings and,
        if more are wanted, some of the held-out ones, drawn; `test_rephrases` are the held-out
        phrasings that are not taught, in both forms. `test_locality` asks for facts that none of
        the edits touches, two of the same relation and two of others, in seen phrasings. One seed
        draws the same edits with any number of rephrases.

        Raises:
            ValueError: more edits than the facts allow, since untouched ones must remain, or so
                many rephrases that none remains to test.
        """
        most = 2 * len(self.facts) // 3
        if not 0 < n <= most:
            raise ValueError(
                f"n is {n}, expected 1 to {most}, two thirds of the facts of {self.name}: draw "
                "fewer edits or make a larger world"
            )
        if not 0 <= rephrases <= MOST_REPHRASES:
            raise ValueError(
                f"rephrases is {rephrases}, expected 0 to {MOST_REPHRASES}, since held-out "
                "phrasings must remain to test: teach fewer"
            )
        rng = random.Random(f"edits:{seed}")
        chosen = rng.sample(self.facts, n)
        touched = set(chosen)
        untouched = [fact for fact in self.facts if fact not in touched]
        edits = []
        for fact in chosen:
            same = [other for other in untouched if other.relation == fact.relation]
            others = [other for other in untouched if other.relation != fact.relation]
            wrong = [object_ for object_ in self.objects[fact.relation] if object_ != fact.object]
            nearby = rng.sample(same, min(2, len(same))) + rng.sample(others, 2)
            prompt = rng.choice(self.phrasings(fact)["seen"][form])
            taught, tests = self._divide(fact, prompt, rephrases)
            edits.append(
                {
                    "prompt": prompt,
                    "target": rng.choice(wrong),
                    "rephrases": taught,
                    "test_rephrases": tests,
                    "test_locality": [
                        {"prompt": rng.choice(self.seen(other)), "answer": other.object}
                        for other in nearby
                    ],
                    "relation": fact.relation,
                }
            )
        return edits

    def _divide(self, fact: Fact, prompt: Prompt, n: int) -> tuple[list[Prompt], list[Prompt]]:
        """The phrasings besides `prompt`: `n` to teach, and the held-out ones among the others."""
        seen = [other for other in self.seen(fact) if other != prompt]
        tests = self.held_out(fact)
        rng = random.Random(f"rephrases:{self.seed}:{fact.relation}:{fact.subject}")
        order = rng.sample(seen, len(seen)) + rng.sample(tests, len(tests))
        taught = order[:n]
        return taught, [other for other in tests if other not in taught]


def _load_templates() -> dict[str, dict[str, list[str]]]:
    return json.loads((FACTS_DIR / "templates.json").read_text(encoding="utf-8"))


def _fill(template: str, subject: str) -> str:
    text = template.format(subject).replace("s's ", "s' ")
    return text[0].upper() + text[1:]


def _chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _both_forms(prompts: dict[str, list[Prompt]]) -> list[Prompt]:
    return prompts["plain"] + prompts["chat"]


# How made-up names of each kind look; a person has two words.
SHAPES = {
    "country": ("{}ia", "{}land", "{}istan", "{}or"),
    "town": ("{}ton", "{}burg", "{}ford", "{}by", "Port {}", "New {}"),
    "continent": ("{}ica", "{}asia"),
    "currency": ("{}", "{} crown", "{} dollar"),
    "language": ("{}ish", "{}ese"),
    "title": ("The {}", "{} and the Sea", "The Song of {}", "The House of {}"),
    "company": ("{}", "{} Motors", "{} Works", "{} & Sons"),
    "landmark": ("the {} Tower", "the {} Bridge", "{} Castle", "the Temple of {}"),
    "animal": ("{}",),
    "class": ("{}oid",),
}
LOWER_CASE = ("currency", "animal", "class")
ONSETS = ["b", "br", "d", "dr", "f", "g", "gr", "k", "l", "m", "n", "p", "r", "s", "st", "t", "v"]
CODAS = ["l", "m", "n", "r", "s", "t", "v"]


class _Names:
    """Made-up names of every kind; none is given twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pools: dict[str, list[str]] = {}
        self._used: set[str] = set()

    def first(self, kind: str, n: int) -> list[str]:
        """The first `n` names of a kind; a longer request continues a shorter one."""
        pool = self._pools.setdefault(kind, [])
        while len(pool) < n:
            pool.append(self._person() if kind == "person" else self._other(kind))
        return pool[:n]

    def _person(self) -> str:
        return f"{self._word()} {self._word()}"

    def _other(self, kind: str) -> str:
        name = self._rng.choice(SHAPES[kind]).format(self._word())
        return name.lower() if kind in LOWER_CASE else name

    def _word(self) -> str:
        while True:
            onsets, vowels = self._rng.choices(ONSETS, k=2), self._rng.choices("aeiou", k=2)
            letters = (onsets[0], vowels[0], onsets[1], vowels[1], self._rng.choice(CODAS))
            word = "".join(letters).capitalize()
            if word not in self._used:
                self._used.add(word)
                return word


def main() -> None:
    """Print edits of the bundled model's world, for `ultraedit edit` and `ultraedit eval`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--edits", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--rephrases", type=int, default=0, metavar="N", help="to teach per edit")
    args = parser.parse_args()
    edits = World.earth().edits(args.edits, seed=args.seed, rephrases=args.rephrases)
    print(json.dumps(edits, ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
