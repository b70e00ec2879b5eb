"""A worker that can be made to fail once, on one of its ranks, wherever a test wants."""

from __future__ import annotations

import importlib
from typing import Any

from ultraedit_kernels.integrations.vllm.extension import UltraEditExtension, engine_side


class FaultyWorker(UltraEditExtension):
    @property
    def place(self) -> int:
        """Of this rank among those of all engines."""
        parallel: Any = self.vllm_config.parallel_config  # type: ignore[attr-defined]
        return parallel.data_parallel_index * parallel.world_size + self.rank  # type: ignore

    def ultraedit_fail(self, rank: int, where: str, call: int) -> None:
        """On one rank, the call-th call from now of "module:name" raises OSError, after it has
        done its work if the name ends in "+"."""
        if self.place != rank:
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

    def ultraedit_warm_up(self) -> None:
        """Make the buffers between pipeline stages. vLLM's CPU engine does so only where it
        compiles, and fails at the first request where it does not."""
        self.model_runner.profile_run()  # type: ignore[attr-defined]

    def ultraedit_scribble(self, rank: int) -> None:
        """Change what one rank serves behind the editor's back."""
        if self.place == rank:
            live = next(iter(engine_side(self).twin.live.values()))
            getattr(live, "local", live)[0, 0] += 1
