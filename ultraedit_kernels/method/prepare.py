"""What comes before the first turn: all that needs the untouched weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from typing import Any

from torch import nn

from ultraedit_kernels.method.guards import GuardError, Guards
from ultraedit_kernels.method.locate import Shown, show
from ultraedit_kernels.method.phase import Phase
from ultraedit_kernels.method.versions import Versions

logger = logging.getLogger(__name__)


class Preparation:
    """Of an editor.

    Args:
        model: which turns change.
        tokenizer: its tokenizer.
        versions: of its weights, with what the stream of edits remembers.
        guards: what turns must pass.
        at_names: whether edits are made at names, see `locate`.
    """

    def __init__(
        self, model: Any, tokenizer: Any, versions: Versions, guards: Guards, at_names: bool
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._versions, self._guards, self._at_names = versions, guards, at_names
        self._begun = False
        self.shown: Shown | None = None
        """What the untouched model has read before it is asked for names."""

    def finish(self, told: Callable[[float], None] | None = None) -> None:
        """See `Editor.prepare`. After `begin` it waits for nothing: turns protect what there is."""
        memory = self._versions.memory
        if not self._begun:
            self._on_untouched_weights(gather=True, told=told)
        memory.take_found()
        if not memory.recalled:
            self._versions.recall()

    def begin(self) -> bool:
        """All but what takes long, which is left to `gather`.

        Returns: whether nothing is left, since an earlier start has kept it.
        """
        if not self._begun:
            self._on_untouched_weights(gather=False)
        return self._versions.memory.gathering.done

    def gather(self, model: nn.Module) -> Generator[Phase, None, None]:
        """What is left after `begin`, as a generator that yields after each piece. Turns may be
        made meanwhile, in another thread too.

        Args:
            model: another model with the same untouched weights.
        """
        return self._versions.memory.gathering.steps(model, self._tokenizer, self._versions.base)

    def _on_untouched_weights(
        self, gather: bool, told: Callable[[float], None] | None = None
    ) -> None:
        versions, gathering = self._versions, self._versions.memory.gathering
        with versions.untouched():
            self._guards.note_references()
            if self._at_names:
                self.shown = show(self._model, self._tokenizer)
            gathering.look_up(self._model, self._tokenizer, versions.base)
            for _ in self.gather(self._model) if gather else ():
                if told is not None:
                    told(gathering.written)
            if told is not None:
                told(1.0)
        self._begun = True
        try:
            for _ in self._guards.check_canaries():
                pass
        except GuardError as error:
            logger.warning("at version %d already, %s", versions.newest, error.reason)
