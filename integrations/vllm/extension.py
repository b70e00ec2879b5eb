"""What vLLM mixes into its worker, so that `collective_rpc` can call it.

Start the server with `--worker-extension-cls
ultraedit_kernels.integrations.vllm.extension.UltraEditExtension`. The work is done by `EngineSide`;
`workers.Workers` makes the calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ultraedit_kernels.integrations.vllm import workers
    from ultraedit_kernels.integrations.vllm.engine_side import EngineSide


def engine_side(worker: Any) -> EngineSide:
    """The plugin's part of a worker, made when it is first asked for."""
    if worker._ultraedit_side is None:
        # vLLM reads this module before it has built the worker, and needs nothing else of ours.
        from ultraedit_kernels.integrations.vllm.engine_side import EngineSide

        worker._ultraedit_side = EngineSide(worker)
    return worker._ultraedit_side


class UltraEditExtension:
    """The RPCs, see `EngineSide`. No `__init__`, and no name without the prefix."""

    _ultraedit_side: EngineSide | None = None

    def ultraedit_start(
        self, settings: dict[str, Any], rendering: dict[str, Any], follows: bool
    ) -> workers.Started:
        """Build twin and editor."""
        return engine_side(self).start(settings, rendering, follows)

    def ultraedit_check(self, texts: list[list[int]], scores: list[list[float]]) -> workers.Checked:
        """Compare twin and engine."""
        return engine_side(self).check(texts, scores)

    def ultraedit_begin(self, turn: str, keys: list[str]) -> workers.Begun:
        """Take the worker for a turn."""
        return engine_side(self).begin(turn, keys)

    def ultraedit_edit(
        self,
        turn: str,
        edits: list[dict[str, Any]],
        heard: list[str],
        probes: list[workers.ProbeData] | None,
        note: dict[str, Any] | None,
        followed: bool,
    ) -> workers.Answer:
        """Begin to edit, on the shadow."""
        return engine_side(self).edit(turn, edits, heard, probes, note, followed)

    def ultraedit_apply_delta(
        self, turn: str, data: bytes, note: dict[str, Any] | None = None, dry_run: bool = False
    ) -> workers.Answer:
        """Begin to apply a delta file to the shadow."""
        return engine_side(self).apply_delta(turn, data, note, dry_run)

    def ultraedit_rollback(self, turn: str, version: int) -> workers.Answer:
        """Begin to take the shadow back to a version."""
        return engine_side(self).rollback(turn, version)

    def ultraedit_step(self, turn: str) -> workers.Step:
        """Do one slice of the turn."""
        return engine_side(self).step(turn)

    def ultraedit_commit(self, turn: str) -> workers.Live:
        """Make the shadow live."""
        return engine_side(self).commit(turn)

    def ultraedit_revert(self, turn: str) -> workers.Live:
        """Take back a commit that failed on another engine."""
        return engine_side(self).revert(turn)

    def ultraedit_read_back(self, turn: str) -> workers.Answer:
        """Begin to read the live weights back."""
        return engine_side(self).read_back(turn)

    def ultraedit_cancel(self, turn: str, newest: int | None = None) -> workers.Live:
        """End the turn."""
        return engine_side(self).cancel(turn, newest)

    def ultraedit_delta(self, version: int) -> workers.DeltaFile:
        """The delta file of a version."""
        return engine_side(self).delta(version)

    def ultraedit_history(self, limit: int, before: int | None) -> workers.History:
        """Journal entries, newest first."""
        return engine_side(self).history(limit, before)

    def ultraedit_status(self, digest: bool) -> workers.Status:
        """What is served."""
        return engine_side(self).status(digest)

    def ultraedit_gather(self, server: str) -> workers.Gathered:
        """Do a slice of gathering, if the engine is idle."""
        return engine_side(self).gather(server)
