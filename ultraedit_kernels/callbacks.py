"""What an editor tells of every turn, to whoever wants to know: nobody, unless asked.

    editor.callbacks.append(TensorBoard("runs/first"))

Anything with a method `on_turn` will do. TensorBoard and MLflow are imported when they are asked
for, by name: `open_log("tensorboard:DIR")`, `open_log("mlflow:URI")`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ultraedit_kernels.method.results import TurnResult

logger = logging.getLogger(__name__)

EXPERIMENT = "ultraedit"
"""Of the runs in MLflow."""
KINDS = "tensorboard:DIR or mlflow:URI"


class TurnCallback(Protocol):
    """Is told of turns; an entry of `Editor.callbacks`."""

    def on_turn(self, result: TurnResult) -> None:
        """After a turn, or a delta, that is committed. An error of its own is logged, and the turn
        stands."""


class Log(TurnCallback, Protocol):
    """A callback that writes figures somewhere."""

    def close(self) -> None:
        """End it."""


def tell(callbacks: Sequence[TurnCallback], result: TurnResult) -> TurnResult:
    """Tell all of a turn; the same result."""
    for callback in callbacks:
        try:
            callback.on_turn(result)
        except Exception as error:
            logger.warning(
                "version %d is made, but %s failed: %s: %s",
                result.version,
                type(callback).__name__,
                type(error).__name__,
                error,
            )
    return result


def figures(result: TurnResult) -> dict[str, float]:
    """A turn in numbers, by name: its edits, what it threatened, what the guards measured, its
    time in milliseconds. Of a delta, which has no edits, only what there is."""
    found: dict[str, float] = {"edits/number": len(result.edits)}
    if count := len(result.edits):
        found["edits/held"] = sum(edit.succeeded for edit in result.edits) / count
        found["edits/rounds"] = sum(edit.rounds for edit in result.edits) / count
        found["edits/loss"] = sum(edit.loss for edit in result.edits) / count
        found["edits/least_margin"] = min(edit.margin for edit in result.edits)
    found |= {f"watched/{name}": value for name, value in result.watched.items()}
    found |= {f"guards/{name}": value for name, value in result.guards.items()}
    return found | {f"time/{name}": value for name, value in result.timings.items()}


class TensorBoard:
    """Scalars for TensorBoard, a step for each version.

    Args:
        folder: of the event files; made if it is not there.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                f"TensorBoard cannot be imported ({error}); pip install tensorboard",
                name="tensorboard",
            ) from error
        self._writer: Any = SummaryWriter(folder)

    def on_turn(self, result: TurnResult) -> None:
        """See `TurnCallback`."""
        for name, value in figures(result).items():
            self._writer.add_scalar(name, value, result.version)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow:
    """Metrics of a new run in MLflow's experiment "ultraedit", a step for each version.

    Args:
        uri: of the tracking server or store; "" for MLflow's own default.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, uri: str) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric
        except ImportError as error:
            raise ImportError(
                f"MLflow cannot be imported ({error}); pip install mlflow-skinny", name="mlflow"
            ) from error
        self._metric: Any = Metric
        self._client: Any = MlflowClient(tracking_uri=uri or None)
        found = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
        self._run: str = self._client.create_run(experiment).info.run_id

    def on_turn(self, result: TurnResult) -> None:
        """See `TurnCallback`."""
        now = int(time.time() * 1e3)
        metrics = [self._metric(n, v, now, result.version) for n, v in figures(result).items()]
        self._client.log_batch(self._run, metrics)

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._run)


def open_log(where: str) -> Log:
    """A log, by name.

    Args:
        where: "tensorboard:DIR" or "mlflow:URI".

    Raises:
        ImportError: what it needs is not installed.
        ValueError: there is no such kind, or it cannot be opened.
    """
    kind, separator, place = where.partition(":")
    kinds: dict[str, type[TensorBoard] | type[MLflow]]
    kinds = {"tensorboard": TensorBoard, "mlflow": MLflow}
    if kind not in kinds or not separator or (kind == "tensorboard" and not place):
        raise ValueError(f"the log is {where!r}, expected {KINDS}")
    try:
        return kinds[kind](place)
    except ImportError:
        raise
    except Exception as error:  # of the network, the disk, or MLflow's own
        raise ValueError(f"cannot log to {where}: {error}") from error


@contextmanager
def log_to(where: str | None) -> Iterator[list[TurnCallback]]:
    """The callbacks that log there while the block runs; none for None. Raises as `open_log`."""
    if where is None:
        yield []
        return
    log = open_log(where)
    try:
        yield [log]
    finally:
        log.close()
