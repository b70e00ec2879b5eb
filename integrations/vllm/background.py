"""What protects the model is gathered while it is served: on a twin of its own, between the
engine's steps, and between turns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from torch import nn

from ultraedit_kernels.editor import Editor
from ultraedit_kernels.integrations.vllm.slices import Pace, Slices
from ultraedit_kernels.model.parallel import together

logger = logging.getLogger("vllm.ultraedit")

MISSED = 20
"""Questions of other servers after which the one that drove an idle engine is taken to be gone:
slices for several would add up to what a request waits."""


class Background:
    """Gathering, slice by slice. Ranks do the same, as they step and are asked alike.

    Args:
        editor: whose preparation has begun.
        model: a twin with the untouched weights, for this alone; None if nothing is left to do.
        share: of the time of an engine with requests.

    Attributes:
        held: whether the weights that the twin shares with the engine are not there, or not those
            of the checkpoint.
        ended: whether it is done, or has failed.
    """

    def __init__(self, editor: Editor, model: nn.Module | None, share: float) -> None:
        self._pace = Pace(1 / (1 - share))
        self._work: Slices | None = None
        self._ranks: Callable[[], AbstractContextManager[None]] = nullcontext
        if model is not None:
            work = editor.preparation.gather(model)
            self._work = Slices(work, model, "ultraedit-gathering")
            self._ranks = partial(together, model)
        self._driver, self._missed = "", 0
        self.held, self.ended = False, model is None

    def after_step(self, busy: bool) -> None:
        """The engine has stepped.

        Args:
            busy: the worker has a turn, or starts.
        """
        if self._work is not None:
            self._pace.after_step(None if busy or self.held else self._work, self._ranks)
            self._end_if_done(self._work)

    def drive(self, server: str, busy: bool) -> bool:
        """A slice, if the engine is idle.

        Args:
            server: that asks; while another one does there is none.
            busy: the worker has a turn.

        Returns: whether to ask again at once.
        """
        if self._work is None or not self._drives(server) or busy or self.held:
            return False
        beside = False
        try:
            with self._ranks():
                _, beside = self._pace.when_asked(self._work)
        except Exception as error:
            self._work.fail(error)
        self._end_if_done(self._work)
        return not (beside or self.ended)

    def _drives(self, server: str) -> bool:
        self._missed = 0 if server == self._driver else self._missed + 1
        if not self._driver or self._missed > MISSED:
            self._driver, self._missed = server, 0
        return server == self._driver

    def _end_if_done(self, work: Slices) -> None:
        """Let go of the twin, once the work is done."""
        if not work.ended:
            return
        self.ended, self._work, self._ranks = True, None, nullcontext
        try:
            work.step(0)
        except Exception:
            logger.exception(
                "UltraEdit: no more is gathered of what protects the model; edits go on with what "
                "there is, which the health route tells"
            )
