"""TIME: calls that are timed in turn, and what their times say about each other.

A machine is never as fast twice: its clock, its neighbors and its memory change from second to
second. So what is compared is timed in rounds, each call once a round and in an order that is drawn
anew, and the ratios are those within a round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SHORTEST = 200e-6  # seconds: a call that is shorter is repeated, and the mean is taken
PATIENCE = 5.0
TASKS = Path("/proc/self/task")  # the threads of this process, on Linux


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Args:
        seconds: for a group of calls that are compared.
        least: rounds, unless they take `PATIENCE` times as long; three in any case, if not less.
        most: rounds, however short they are.
    """

    seconds: float
    least: int
    most: int

    def enough(self, rounds: int, spent: float) -> bool:
        """Whether so many rounds in so many seconds will do.

        >>> effort = Effort(seconds=1.0, least=5, most=9)
        >>> effort.enough(4, 3.0), effort.enough(5, 3.0)
        (False, True)
        >>> effort.enough(3, 30.0), effort.enough(9, 0.1)
        (True, True)
        """
        if rounds >= self.least:
            return rounds >= self.most or spent >= self.seconds
        return rounds >= 3 and spent >= PATIENCE * self.seconds


class Spread(NamedTuple):
    """The middle of some values, and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles.

    >>> spread([3.0, 1.0, 2.0, 5.0, 4.0])
    Spread(median=3.0, low=2.0, high=4.0)
    """
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def ratios(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Return how many times longer one takes than another, round by round.

    >>> ratios([2.0, 4.0, 60.0], [1.0, 2.0, 20.0])  # the machine stumbled in the third
    Spread(median=2.0, low=2.0, high=2.5)
    """
    return spread([a / b for a, b in zip(slower, faster, strict=True)])


def alternate(
    calls: Mapping[str, Callable[[], object]],
    effort: Effort,
    before: Callable[[str], object] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each call, round by round. No garbage is collected in between.

    Args:
        calls: by name.
        effort: how long to go on.
        before: is told the name of each call before it is timed.
    """
    order, generator = list(calls), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in order}
    gc.disable()
    try:
        repeats = {name: _repeats(call) for name, call in calls.items()}
        started, rounds = time.perf_counter(), 0
        while not effort.enough(rounds, time.perf_counter() - started):
            generator.shuffle(order)
            for name in order:
                if before is not None:
                    before(name)
                times[name].append(measure(calls[name], repeats[name]) / repeats[name])
            rounds += 1
    finally:
        gc.enable()
    return times


def settle(most_seconds: float = 0.05) -> None:
    """Wait until the other threads of this process sleep.

    After a parallel operation those of OpenMP look for work for some milliseconds, and a thread of
    anybody else has to wait for their core.
    """
    if not TASKS.exists():
        time.sleep(most_seconds)
        return
    others = [task for task in TASKS.iterdir() if task.name != str(threading.get_native_id())]
    until = time.perf_counter() + most_seconds
    while time.perf_counter() < until and any(map(_runs, others)):
        time.sleep(0.0005)


def _runs(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:  # it has ended
        return False


def measure(call: Callable[[], object], repeats: int = 1) -> float:
    """Return how many seconds so many calls take."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return time.perf_counter() - started


def _repeats(call: Callable[[], object]) -> int:
    """Warm up, and return how many calls make a time that the clock can tell."""
    taken = measure(call)
    if taken < 10 * SHORTEST:  # the first may be slower than those that follow
        taken = measure(call)
    return max(1, math.ceil(SHORTEST / max(taken, 1e-9)))
