"""Tasks of lm-evaluation-harness, asked of a model in this process; only if it is installed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any


class Tasks:
    """A list of tasks.

    Args:
        names: of them, as `lm_eval ls tasks` lists them, or of the folder's.
        folder: of YAML files with further tasks, as lm_eval's --include_path.
        limit: documents of each task that are asked, the first ones; all if None.

    Raises:
        ImportError: lm-eval is not installed.
        ValueError: no tasks, or there is no task of a name.
    """

    def __init__(
        self, names: Seq[str], folder: Path | None = None, limit: int | None = None
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(
                f"lm-evaluation-harness cannot be imported ({error}); pip install lm-eval",
                name="lm_eval",
            ) from error
        if folder is not None and not folder.is_dir():
            raise ValueError(f"there is no folder {folder}, expected one with YAML files of tasks")
        self._manager: Any = TaskManager(include_path=None if folder is None else str(folder))
        known = set(self._manager.all_tasks)
        if unknown := [name for name in names if name not in known]:
            raise ValueError(
                f"lm-eval has no task {', '.join(unknown)}; `lm_eval ls tasks` lists them, and a "
                "folder may bring further ones"
            )
        if not names:
            raise ValueError("got no tasks, expected at least one name")
        self._names, self._limit = list(names), limit

    def scores(self, model: Any, tokenizer: Any) -> dict[str, float]:
        """The scores of a model as it is now: "task/metric" → score, with the filter behind the
        metric if it is not the plain one; standard errors as "task/metric_stderr".

        Raises:
            ValueError: a task cannot be run, as when its data set cannot be had.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            asked = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=16)
            found: Any = simple_evaluate(
                asked,
                tasks=list(self._names),
                limit=self._limit,
                task_manager=self._manager,
                bootstrap_iters=0,
                log_samples=False,
            )
        except Exception as error:  # of the network, the data set, or the task
            raise ValueError(f"lm-eval cannot run {', '.join(self._names)}: {error}") from error
        return flat(found["results"])


def flat(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """lm-eval's results with one name for each number."""
    scores = {}
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, (int, float)) and "," in name:
                behind = "" if filtered == "none" else f",{filtered}"
                scores[f"{task}/{metric}{behind}"] = float(value)
    return scores
