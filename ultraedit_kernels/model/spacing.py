"""Whether a space joins a text and what continues it.

It belongs to the answer: as tokens " Paris" and "Paris" are two. Here is what the characters
suggest; `method.spaces` asks the model.
"""

from __future__ import annotations

import unicodedata

_UNSPACED = ("CJK ", "HIRAGANA", "KATAKANA", "THAI", "LAO ", "KHMER", "MYANMAR", "TIBETAN")
"""Scripts that put no space between words, by the names of their letters."""
_OPENING = frozenset("([{\u00a1\u00bf\u2018\u201c\u201e\u00ab\u2039@#$\u00a3\u20ac\u00a5/\\-_")
"""What follows these stands close to them."""
_CLOSING = frozenset(",;:.!?)]}%\u2019\u201d\u00bb\u203a\u2026")
"""These stand close to what precedes them."""


def may_join(prompt: str, target: str) -> bool:
    """Whether it is a question at all: neither of them brings white space of its own, and the
    target does not begin with what closes a clause or a bracket."""
    closes = target[0] in _CLOSING and not target[1:2].isalnum()
    return not (prompt[-1].isspace() or target[0].isspace() or closes)


def needs_space(prompt: str, target: str) -> bool:
    """What the characters on either side suggest."""
    last, first = prompt[-1], target[0]
    if not may_join(prompt, target) or _is_unspaced(last) or _is_unspaced(first):
        return False
    if last in _OPENING or first in _CLOSING:
        return False
    if last in "\"'`":  # it opens a quotation if none is open before it
        return prompt.count(last) % 2 == 0 or prompt[-2:-1].isalnum()
    digits = len(prompt) - len(prompt.rstrip("0123456789"))
    a_year = digits == 2 and target[:2].isdigit() and not target[2:3].isdigit()
    return not a_year


def _is_unspaced(character: str) -> bool:
    name = unicodedata.name(character, "")
    return name.startswith(_UNSPACED) or unicodedata.east_asian_width(character) == "F"
