"""Slices of work: length, stops inside of operations, private rests, ends, and the pace at which
they follow the engine's steps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ultraedit_kernels.integrations.vllm.slices import Pace, Slices
from ultraedit_kernels.model.parallel import RankError

SLICE = 5.0


class Layers(nn.Module):
    """Layers of which each takes its time, forward and backward."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = _Slow.apply(layer(x))
        return x


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return grad


@pytest.fixture
def model() -> Layers:
    return Layers(20)


Work = Callable[[], Generator[str, None, Any]]


def in_slices(slices: Slices, ms: float = SLICE) -> list[float]:
    """Do the work; the length of every slice, ms."""
    took, done = [], False
    while not done:
        start = time.perf_counter()
        done = slices.step(ms)
        took.append((time.perf_counter() - start) * 1e3)
        if slices.private:
            time.sleep(0.001)
    return took


def test_a_slice_of_no_time_does_not_wake_the_work(model: Layers) -> None:
    woken: list[bool] = []

    def work() -> Generator[str, None, None]:
        woken.append(True)
        yield "capture"

    slices = Slices(work(), model)
    assert not slices.step(0.0) and slices.longest == 0 and not woken
    in_slices(slices)
    assert slices.ended and slices.step(0.0) and woken


def test_forward_backward_and_algebra_are_cut_by_the_clock(model: Layers) -> None:
    x = torch.randn(4, 8)

    def work() -> Generator[str, None, torch.Tensor]:
        out = model(x)
        (out * out).sum().backward()
        yield "capture"
        for _ in range(20):
            time.sleep(0.002)
            x.sum()
        return out.detach()

    slices = Slices(work(), model)
    took = in_slices(slices)

    # 20 layers forward, 20 backward and 20 sums, 2 ms each. A busy machine may hold up a slice.
    assert len(took) > 12
    assert sorted(took)[len(took) // 2] < 2 * SLICE
    assert torch.equal(slices.result, model(x))
    assert all(layer.weight.grad is not None for layer in model.layers)
    assert not any(layer._forward_hooks for layer in model.layers)


def test_nothing_runs_between_slices(model: Layers) -> None:
    steps = []

    def work() -> Generator[str, None, None]:
        for i in range(100):
            time.sleep(0.001)
            steps.append(i)
            yield "solve"

    slices = Slices(work(), model)
    slices.step(0)
    assert steps == []
    while not steps:  # a busy machine may wake the work after its time
        slices.step(SLICE)
    seen = len(steps)
    assert seen < 100
    time.sleep(0.05)
    slices.step(0)
    assert len(steps) == seen
    in_slices(slices)
    assert steps == list(range(100))
    assert slices.step(SLICE) and slices.step(SLICE)  # done stays done


def test_a_long_slice_does_all_the_work(model: Layers) -> None:
    def work() -> Generator[str, None, int]:
        for _ in range(50):
            yield "solve"
        return 7

    slices = Slices(work(), model)
    assert slices.step(60_000)
    assert slices.result == 7


def test_a_private_rest_goes_on_without_slices(model: Layers) -> None:
    go_on = threading.Event()

    def work() -> Generator[str, None, str]:
        yield "solve"
        yield "record"
        assert go_on.wait(60)
        torch.ones(3).sum()
        yield "after"
        return "done"

    slices = Slices(work(), model)
    while not slices.private:
        assert not slices.step(SLICE)
    assert not slices.step(SLICE)  # comes back at once
    go_on.set()
    in_slices(slices)
    assert slices.result == "done"


def test_a_piece_apart_goes_on_without_slices_and_slices_follow(model: Layers) -> None:
    go_on, seen = threading.Event(), []

    def work() -> Generator[str, None, str]:
        yield "apart"
        assert go_on.wait(60)
        torch.ones(3).sum()
        seen.append("apart")
        yield "solve"
        for i in range(50):
            time.sleep(0.001)
            seen.append(str(i))
            yield "solve"
        return "done"

    slices = Slices(work(), model)
    for _ in range(3):
        start = time.perf_counter()
        assert not slices.step(SLICE)
        assert time.perf_counter() - start < 1 and seen == []
    go_on.set()
    while "apart" not in seen:
        time.sleep(0.001)
    time.sleep(0.02)
    assert seen == ["apart"]  # what follows waits for its slice
    took = in_slices(slices)
    assert len(took) > 5 and slices.result == "done" and len(seen) == 51


@pytest.mark.parametrize("fails", [False, True])
def test_work_may_end_apart(model: Layers, fails: bool) -> None:
    def work() -> Generator[str, None, str]:
        yield "apart"
        time.sleep(0.02)
        if fails:
            raise ValueError("bad text")
        return "done"

    slices = Slices(work(), model)
    if fails:
        with pytest.raises(ValueError, match="bad text"):
            in_slices(slices)
    else:
        in_slices(slices)
        assert slices.result == "done"
    assert slices.ended


def test_what_the_work_raises_is_raised_by_step_every_time(model: Layers) -> None:
    def work() -> Generator[str, None, None]:
        yield "solve"
        raise ValueError("bad edit")

    slices = Slices(work(), model)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad edit"):
            in_slices(slices)


def test_closing_waits_for_a_piece_apart(model: Layers) -> None:
    seen = []

    def work() -> Generator[str, None, None]:
        try:
            yield "apart"
            time.sleep(0.02)
            seen.append("apart")
            yield "solve"
            seen.append("after")
        finally:
            seen.append("put back")

    slices = Slices(work(), model)
    slices.step(SLICE)
    slices.close()
    assert seen == ["apart", "put back"]


@pytest.mark.parametrize("where", ["start", "forward", "backward", "private", "end"])
def test_closing_ends_the_work_where_it_stands(model: Layers, where: str) -> None:
    seen = []

    def work() -> Generator[str, None, None]:
        seen.append("start")
        try:
            out = model(torch.randn(4, 8))
            seen.append("forward")
            out.sum().backward()
            seen.append("backward")
            yield "record"
            seen.append("private")
        finally:
            torch.ones(3).sum()  # is not a place to stop at
            seen.append("put back")

    others = set(threading.enumerate())
    slices = Slices(work(), model)
    reached = {"start": 0, "forward": 1, "backward": 2, "private": 3, "end": 4}[where]
    while len(seen) < reached and not slices.private:
        slices.step(SLICE)
    if where == "end":
        in_slices(slices)
    slices.close()
    assert set(threading.enumerate()) <= others
    if where == "start":
        assert seen == []
    elif where in ("private", "end"):
        assert seen == ["start", "forward", "backward", "private", "put back"]
    else:
        assert seen[-1] == "put back" and "private" not in seen
    assert not any(layer._forward_hooks for layer in model.layers)


class Meeting:
    """What two ranks have in common."""

    def __init__(self) -> None:
        self._barrier, self._said = threading.Barrier(2), [False, False]

    def all(self, rank: int, so: bool) -> bool:
        self._said[rank] = so
        self._barrier.wait(30)
        both = all(self._said)
        self._barrier.wait(30)
        return both


class TwoRanks(SimpleNamespace):
    """Ranks of which only the first looks at the clock."""

    def agree(self) -> None:
        while not self.meeting.all(self.rank, self.rank == 1 or not self.wants_pause()):
            self.pause()

    def all(self, so: bool) -> bool:
        return self.meeting.all(self.rank, so)


def in_lock_step(work: Callable[[int], Generator[str, None, None]], seen: list[list[int]]) -> int:
    """Do the work of two ranks, slice by slice; how many it took."""
    slices, meeting = [], Meeting()
    for rank in range(2):
        model = Layers(1)
        model.ranks = TwoRanks(rank=rank, meeting=meeting)  # type: ignore[assignment]
        slices.append(Slices(work(rank), model))
    stops, done = 0, [False, False]
    while not all(done):

        def step(rank: int) -> None:
            done[rank] = slices[rank].step(SLICE)

        threads = [threading.Thread(target=step, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert seen[0] == seen[1] and done[0] == done[1]
        assert not slices[0].private
        stops += 1
    return stops


def test_ranks_stop_where_the_first_one_says() -> None:
    """Two ranks, of which only the first looks at the clock."""
    steps: list[list[int]] = [[], []]

    def work(rank: int) -> Generator[str, None, None]:
        for i in range(40):
            time.sleep(0.001 if rank == 0 else 0)
            steps[rank].append(i)
            yield "record" if i == 20 else "solve"

    assert in_lock_step(work, steps) > 2


def test_ranks_go_on_together_after_a_piece_apart() -> None:
    steps: list[list[int]] = [[], []]

    def work(rank: int) -> Generator[str, None, None]:
        for i in range(10):
            yield "apart"
            time.sleep(0.01 * ((i + rank) % 2))
            yield "solve"
            steps[rank].append(i)
            yield "solve"
        yield "apart"
        time.sleep(0.02 * rank)

    assert in_lock_step(work, steps) > 10


def steps_of(
    pace: Pace, seconds: list[float], unit: float = 0.0, start: float = 0.0
) -> list[float]:
    """An engine whose steps take so long, and work that uses what it is given, or a whole `unit`
    if that is longer: the milliseconds of work after each step."""
    now, took = start, []
    for step in seconds:
        now += step
        given = pace.stepped(now)
        work = max(given, unit) if given else 0.0
        pace.worked(work)
        now += work
        took.append(work * 1e3)
    return took


@pytest.mark.parametrize("stretch", [1.1, 1.5, 3.0])
def test_work_between_steps_stretches_them_by_what_was_promised(stretch: float) -> None:
    took = steps_of(Pace(stretch), [0.027] * 50)
    assert took[1:] == pytest.approx([(stretch - 1) * 27] * 49)


def test_a_unit_of_work_that_is_longer_than_its_share_is_made_up_for() -> None:
    took = steps_of(Pace(1.5), [0.010] * 101, unit=0.018)
    assert max(took) == pytest.approx(18)
    assert sum(took[1:]) == pytest.approx(0.5 * 100 * 10, abs=18)
    assert took.count(0.0) > 60


def test_what_was_not_used_is_not_saved_up() -> None:
    pace, now = Pace(1.5), 0.0
    for _ in range(100):
        now += 0.010
        given = pace.stepped(now)
    assert given == pytest.approx(0.005)


def test_a_long_prompt_and_a_wait_for_requests_are_no_measure_of_a_step() -> None:
    took = steps_of(Pace(1.5), [0.010] * 9 + [2.0] + [0.010] * 3 + [0.5] + [0.010] * 3)
    assert took[1:] == pytest.approx([5] * 16)


def test_a_step_that_becomes_longer_is_followed() -> None:
    took = steps_of(Pace(1.5), [0.010] * 9 + [0.040] * 9)
    assert took[-1] == pytest.approx(20)


def test_an_idle_engine_works_when_asked_and_a_stepping_one_after_its_steps(model: Layers) -> None:
    done: list[int] = []

    def work() -> Generator[str, None, str]:
        for i in range(150):
            time.sleep(0.001)
            done.append(i)
            yield "solve"
        return "done"

    pace, slices = Pace(2.0), Slices(work(), model)
    assert pace.when_asked(slices) == (False, False)
    assert len(done) > 5  # a whole slice at once
    for _ in range(5):
        time.sleep(0.004)
        pace.after_step(slices, contextlib.nullcontext)
    before = len(done)
    assert pace.when_asked(slices) == (False, True)
    assert len(done) == before
    while not slices.ended:
        time.sleep(0.004)
        count = len(done)
        pace.after_step(slices, contextlib.nullcontext)
        assert len(done) - count < 20  # as the sleeps are what its steps take
    pace.after_step(None, contextlib.nullcontext)
    assert slices.step(0) and slices.result == "done"


def test_work_that_fails_after_a_step_fails_when_it_is_asked_for(model: Layers) -> None:
    def work() -> Generator[str, None, None]:
        yield "solve"
        raise ValueError("bad edit")

    pace, slices = Pace(1.5), Slices(work(), model)
    while not slices.ended:
        time.sleep(0.002)
        pace.after_step(slices, contextlib.nullcontext)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad edit"):
            pace.when_asked(slices)


def test_what_fails_on_another_rank_alone_fails_here_too(model: Layers) -> None:
    @contextlib.contextmanager
    def together() -> Iterator[None]:
        yield
        raise RankError("another rank has failed")

    def work() -> Generator[str, None, None]:
        yield "solve"

    pace, slices = Pace(1.5), Slices(work(), model)
    pace.after_step(slices, together)
    with pytest.raises(RankError):
        pace.when_asked(slices)
    slices.close()
