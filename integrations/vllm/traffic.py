"""Keys of live traffic: what edited modules get at random tokens of random prompts. A turn holds
still what the model computes there.

Off unless asked for. Of the prompts nothing is kept but these vectors; how many is fixed, and one
is taken the more seldom the more prompts there have been. The last token of a prompt is left out:
there a fact is answered, which may be the one to edit next.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.model.capture import capture
from ultraedit_kernels.model.encoding import Sequence

logger = logging.getLogger("vllm.ultraedit")

ROWS_PER_PROMPT = 4
PROMPT_TOKENS = 64
"""Tokens of a prompt that are run once more for its keys, at most."""


class Traffic:
    """A uniform sample of the prompts seen so far (algorithm R, Vitter 1985), as keys.

    Ranks of one model see the same prompts, and draw the same.

    Args:
        limit: rows to keep of each module.
        seed: of the draws.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        self._slots = -(-limit // ROWS_PER_PROMPT)
        self._limit, self._rng = limit, random.Random(seed)
        self._seen = 0
        self._rows: list[dict[str, Tensor]] = []

    def __len__(self) -> int:
        return min(self._limit, sum(len(next(iter(rows.values()))) for rows in self._rows))

    def keys(self) -> dict[str, Tensor]:
        """Module → keys [≤ limit, d_in] on the CPU; empty as long as there are none."""
        names = self._rows[0] if self._rows else ()
        return {name: torch.cat([r[name] for r in self._rows])[: self._limit] for name in names}

    def sampled(
        self,
        editor: Editor,
        prompts: Seq[list[int]],
        together: Callable[[], AbstractContextManager[None]],
    ) -> Traffic | None:
        """Itself, after offering prompts to it. If that fails None, and no more are taken; they are
        served anyhow.

        Args:
            editor: with the weights that are served.
            prompts: as token ids.
            together: ranks fail together in it.
        """
        try:
            with torch.inference_mode(False), together():
                for prompt in prompts:
                    self.offer(editor.model, editor.modules, prompt)
        except Exception:
            logger.exception("UltraEdit: no more keys of live traffic are taken")
            return None
        return self

    def offer(self, model: Any, modules: Seq[str], prompt: Seq[int]) -> bool:
        """Take the keys of a prompt's tokens if the draw is its; whether it was."""
        if len(prompt) < 2:
            return False
        slot = self._seen if self._seen < self._slots else self._rng.randrange(self._seen + 1)
        self._seen += 1
        if slot >= self._slots:
            return False
        first = self._rng.randrange(max(1, len(prompt) - PROMPT_TOKENS + 1))
        ids = list(prompt[first : first + PROMPT_TOKENS])
        captured = capture(model, [Sequence(ids[:1], ids[1:])], modules, backward=False)
        places = range(len(ids) - 1)
        rows = sorted(self._rng.sample(places, min(ROWS_PER_PROMPT, len(places))))
        taken = {name: keys[rows].cpu() for name, keys in captured.keys.items()}
        if slot < len(self._rows):
            self._rows[slot] = taken
        else:
            self._rows.append(taken)
        return True
