"""A worker that can be made to fail once, on one of its ranks, wherever a test wants."""

from __future__ import annotations

import importlib
from typing import Any

from ultraedit_kernels.integrations.vllm.worker import UltraEditWorker


class FaultyWorker(UltraEditWorker):
    def ultraedit_fail(self, rank: int, where: str, call: int) -> None:
        """On one rank, the call-th call from now of "module:name" raises OSError, after it has
        done its work if the name ends in "+"."""
        if self.rank != rank:  # type: ignore[attr-defined]
            return
        module, _, path = where.rstrip("+").partition(":")
        owner: Any = importlib.import_module(module)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        original = getattr(owner, name)
        calls = 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls < call:
                return original(*args, **kwargs)
            setattr(owner, name, original)
            if where.endswith("+"):
                original(*args, **kwargs)
            raise OSError("injected")

        setattr(owner, name, failing)

    def ultraedit_scribble(self, rank: int) -> None:
        """Change what one rank serves behind the editor's back."""
        if self.rank == rank:  # type: ignore[attr-defined]
            next(iter(self._ultraedit_twin.live.values())).local[0, 0] += 1
