"""Work in slices: it runs in a thread of its own, and only while the worker waits for it, after an
engine step for a share of the time that a step takes.

The engine cannot step during a slice, so a slice must be short whatever the work does. The thread
looks at the clock before every operation of PyTorch, and in a backward pass at every layer; when
its time is spent it hands back and stands still until the next slice. So a slice takes one
operation longer than it was given at most.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ultraedit_kernels.model.parallel import ranks_of

PRIVATE = "record"
"""What the work yields when the rest of it uses nothing that is served, see `Editor.steps`: that
goes on beside the engine."""
APART = "apart"
"""What the work yields when all up to where it yields next uses nothing that is served and no other
rank: that goes on beside the engine, and slices after it."""
IDLE_SLICE = 20.0
"""Milliseconds of a slice in an idle engine: so long may a request wait that comes meanwhile."""
SYNCHRONISE = 8
"""Operations by which an accelerator may lie behind the clock."""
STEPS = 9
"""Of so many steps the median is what a step takes: few are prompts, or waits for requests."""


class Pace:
    """How much work goes between the steps of an engine that has requests.

    Work that took longer than it was given is made up for: there is none after the next steps.

    Args:
        stretch: times as long that a step may take with the work after it.
    """

    def __init__(self, stretch: float) -> None:
        self._share = stretch - 1
        self._steps: deque[float] = deque(maxlen=STEPS)
        self._last: float | None = None
        self._worked = 0.0
        self._left = 0.0
        self._asked = self._count = 0

    def stepped(self, now: float) -> float:
        """The engine has stepped: seconds of work that may follow.

        Args:
            now: the clock, seconds.
        """
        if self._last is not None:
            self._steps.append(now - self._last - self._worked)
        self._last, self._worked = now, 0.0
        self._count += 1
        share = self._share * statistics.median(self._steps) if self._steps else 0.0
        self._left = min(self._left + share, share)
        return max(self._left, 0.0)

    def worked(self, seconds: float) -> None:
        """Work has kept the engine from its next step for that long."""
        self._worked += seconds
        self._left -= seconds

    def after_step(
        self, slices: Slices | None, together: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """To be called after each engine step: a slice of the work, if there is some. What the work
        raises the next `Slices.step` raises.

        Args:
            together: ranks fail together in it.
        """
        start = time.perf_counter()
        seconds = self.stepped(start)
        if slices is not None and not slices.ended:
            try:
                with torch.inference_mode(False), together():
                    slices.step(seconds * 1e3)
            except Exception as error:
                slices.fail(error)
            self.worked(time.perf_counter() - start)

    def when_asked(self, slices: Slices) -> tuple[bool, bool]:
        """A slice of the work, if the engine has made no step since this was last called. Ranks
        agree on that, as what they are told comes in one order.

        Returns: whether the work is done, and whether it goes on without this.
        """
        idle, self._asked = self._asked == self._count, self._count
        start = time.perf_counter()
        done = slices.step(IDLE_SLICE if idle else 0.0)
        self._worked += time.perf_counter() - start
        return done, slices.private or not idle


class Slices:
    """The work of a generator, cut by the clock.

    Ranks of one model stop together, at a collective or where the work yields, or one would wait in
    a collective for one that has stopped. Nothing of theirs runs beside the engine, which has
    collectives of its own.

    Args:
        work: the work. What it yields is ignored, but for `PRIVATE` and `APART`.
        model: the model that it runs.
        name: of its thread. On a GPU, work of one name shares a queue.
    """

    def __init__(
        self, work: Generator[str, None, Any], model: nn.Module, name: str = "ultraedit-turn"
    ) -> None:
        self._work, self._model, self._ranks = work, model, ranks_of(model)
        self._device = next(model.parameters()).device
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._deadline = 0.0
        self._operations = 0
        self._closing = False
        self.private = False
        """Whether the rest goes on beside the engine, without slices."""
        self._apart = False
        """Whether a piece of it does, or has and no slice followed yet."""
        self._between = threading.Event()
        """Set when no such piece is under way."""
        self._between.set()
        self._done = False
        self._error: BaseException | None = None
        self.result: Any = None
        """What the work returned, once it is done."""
        self.longest = 0.0
        """Milliseconds of the longest slice so far."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def step(self, ms: float) -> bool:
        """Let the work go on for that many milliseconds, which may be 0; whether it is done.

        Raises: what the work raised, every time.
        """
        if self._apart:
            over = self._between.is_set()
            self._apart = not (over if self._ranks is None else self._ranks.all(over))
        # To wake the thread for nothing would cost the engine what a busy machine lets it wait.
        due = ms > 0 or self._ranks is not None
        if due and not (self.private or self._apart or self._done):
            start = time.perf_counter()
            self._deadline = start + ms / 1e3
            self._go.release()
            self._back.acquire()
            self._deadline = math.inf  # other calls of the ranks are not to stop
            self.longest = max(self.longest, (time.perf_counter() - start) * 1e3)
        if self.ended and self._error is not None:
            raise self._error
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether the work is done or has failed; on all ranks, if it was done apart."""
        return self._done and not self._apart

    def fail(self, error: Exception) -> None:
        """The work has failed elsewhere: `step` raises that, unless it has failed here too."""
        self._error, self._done = self._error or error, True

    def close(self) -> None:
        """End the work where it stands, as `Generator.close` does. A private rest goes on to its
        end; in any case the thread has ended when this returns."""
        self._closing = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait()
            with self._stopping():
                self._stop_if_due()
                while True:
                    phase = next(self._work)
                    if phase == PRIVATE and self._ranks is None:
                        self.private = True
                        self._back.release()
                    elif phase == APART:
                        self._go_apart()
                    self._stop_if_due()
        except StopIteration as stop:
            self.result = stop.value
        except BaseException as error:
            self._error = error
        finally:
            self._work.close()
            self._done = True
            self._between.set()
            self._back.release()

    def _go_apart(self) -> None:
        """Do the next piece beside the engine."""
        self._apart, self._deadline = True, math.inf
        self._between.clear()
        self._back.release()
        next(self._work)
        self._between.set()
        self._wait()

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """All that makes this thread look at the clock."""
        with contextlib.ExitStack() as stack, torch.inference_mode(False):
            if hasattr(os, "sched_setaffinity"):
                # On a CPU the engine's thread has a core to itself, and this one inherits that.
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(0, range(os.cpu_count() or 1))
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
                stream = _stream(self._device, self._thread.name)
                stack.enter_context(torch.cuda.stream(stream))
            if self._ranks is not None:
                self._ranks.wants_pause, self._ranks.pause = self._is_over, self._stop
                stack.callback(_let_go, self._ranks)
            else:
                for layers in self._model.modules():
                    if isinstance(layers, nn.ModuleList):
                        for layer in layers:
                            stack.callback(layer.register_forward_hook(self._watch_layer).remove)
                stack.enter_context(_BeforeOperations(self._before_operation))
            yield

    def _watch_layer(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        """Stop in the backward pass too, where no operation is seen."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad and threading.current_thread() is self._thread:
            hidden.register_hook(lambda _gradient: self._stop_if_due())

    def _before_operation(self) -> None:
        self._operations += 1
        if self._device.type == "cuda" and self._operations % SYNCHRONISE == 0:
            torch.cuda.current_stream().synchronize()
        self._stop_if_due()

    def _stop_if_due(self) -> None:
        if self._ranks is not None:
            self._ranks.agree()
        else:
            while self._is_over():
                self._stop()

    def _is_over(self) -> bool:
        return not self.private and time.perf_counter() >= self._deadline

    def _stop(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self._back.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._closing:
            self.private = True  # what the work puts back it puts back at once
            raise GeneratorExit


class _BeforeOperations(TorchFunctionMode):
    """Calls a function before each operation of PyTorch in a thread, backward passes left out."""

    def __init__(self, before: Callable[[], None]) -> None:
        super().__init__()
        self._before = before

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._before()
        return func(*args, **(kwargs or {}))


def _let_go(ranks: Any) -> None:
    ranks.wants_pause, ranks.pause = lambda: False, lambda: None


@functools.cache
def _stream(device: torch.device, name: str) -> Any:
    """One stream for all work of a name: memory is kept by stream. Another than the engine's, so
    that the engine does not queue behind what goes on beside it."""
    return torch.cuda.Stream(device)
