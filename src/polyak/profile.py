"""PURE NUMBERS, float64: what a sequence of ticks under a decay means.

An average is a weighted sum of the states it has seen; its *profile* is
the share of each. This file computes them from the ticks alone. It knows no models, files or
devices.
"""

from __future__ import annotations

import bisect
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.decay import Constant, Decay, DecayLike, Spec, as_decay, from_spec, to_spec

__all__ = [
    "History",
    "Moments",
    "gram",
    "inner",
    "moments",
    "weights",
]

RUNS = 1024
"""The runs of equal ticks that a history holds per decay before it merges old ones."""


@dataclass
class Moments:
    """The summary of a profile, kept up to date in a handful of operations per tick.

    For a tick of length dt that keeps k: mean <- k (mean + dt), variance <- k (variance +
    (1-k) (mean + dt)^2), sum p^2 <- k^2 sum p^2 + (1-k)^2, largest <- max(k largest, 1 - k), first
    <- k first.

    >>> moments = Moments()
    >>> moments.tick(0.5, 1)
    >>> moments.mean_age, moments.largest_share, moments.effective_samples
    (0.5, 0.5, 2.0)

    Attributes:
        mean_age: the mean age of the states, in units of the clock.
        variance: the variance of their ages, in units of the clock squared.
        concentration: the sum of the squared shares.
        largest_share: the largest share of a single state.
        first_share: the share of the state that the average began with.
        newest_share: the share of the state that it has seen last.
    """

    mean_age: float = 0.0
    variance: float = 0.0
    concentration: float = 1.0
    largest_share: float = 1.0
    first_share: float = 1.0
    newest_share: float = 1.0

    def tick(self, keep: float, dt: float) -> None:
        """Account for one update.

        Args:
            keep: the share of the old average that survived, in [0, 1].
            dt: the length of the tick, in units of the clock.
        """
        mixed = 1.0 - keep
        age = self.mean_age + dt
        self.mean_age = keep * age
        # The variance itself, not the mean of squares: no cancellation, however old the average.
        self.variance = keep * (self.variance + mixed * age * age)
        self.concentration = keep * keep * self.concentration + mixed * mixed
        largest = keep * self.largest_share
        self.largest_share = largest if largest > mixed else mixed
        self.first_share *= keep
        self.newest_share = mixed

    @property
    def deviation(self) -> float:
        """The standard deviation of the ages of the states, in units of the clock."""
        return math.sqrt(self.variance)

    @property
    def effective_samples(self) -> float:
        """How many equally weighted states would average independent noise as well."""
        return 1.0 / self.concentration


@dataclass
class _Segment:
    """The ticks made under one decay. A run is [ticks, total length, shift], evenly spaced."""

    spec: Spec
    decay: Decay | None
    runs: list[list[int]] = field(default_factory=list)

    def known(self) -> Decay:
        """Return the decay, unless it was somebody else's and is not there any more."""
        if self.decay is None:
            raise ValueError(
                "the profile of this average is unknown: its decay "
                f"{self.spec.get('repr', '?')} was an object of the program that recorded it. "
                "Ask for the profile there, before the state is saved, or use a decay of "
                "polyak.decay"
            )
        return self.decay


class History:
    """Which states an average has seen, and under which decays: run-length encoded ticks.

    >>> history = History("a run", origin=100)
    >>> for _ in range(1000):
    ...     history.tick(as_decay(0.999), 1)
    >>> history
    History(run='a run', origin=100, clock=1100, ticks=1000)
    >>> history.to_dict()["segments"]
    [{'decay': {'type': 'Constant', 'decay': 0.999}, 'runs': [[1000, 1000, 0]]}]

    Irregular ticks make many runs. Beyond `RUNS` of them, neighbors are merged into evenly spaced
    runs, the coarser the older they are (about a 32nd of their age), so that the state stops
    growing. Clock and number of ticks stay exact; no state's clock is off by more than `shift`.

    Args:
        run: the name of the training run. Averages share the states of a run by their clocks.
        origin: the clock of the first state.
        inherited: whether the average began from values that are no state of the run, such as a
            teacher's own. That start is shared with nothing but later histories of this average.

    Raises:
        ValueError: origin is negative.
        TypeError: run is no string, or origin no integer.
    """

    def __init__(self, run: str, origin: int = 0, inherited: bool = False) -> None:
        if type(run) is not str or type(origin) is not int:
            raise TypeError(
                f"a history is of a run (text) from a clock (integer), not of {run!r} from "
                f'{origin!r}: write History("name of the run", 0)'
            )
        if origin < 0:
            raise ValueError(f"a clock is never negative, got origin={origin}: write 0 or more")
        self.run = run
        self.origin = origin
        self._start = uuid.uuid4().hex if inherited else None
        self._branches: list[tuple[int, str]] = []
        self._clock = origin
        self._ticks = 0
        self._segments: list[_Segment] = []
        self._live()

    @property
    def inherited(self) -> bool:
        """Whether the first entry is no state of the run."""
        return self._start is not None

    @property
    def clock(self) -> int:
        """The clock of the newest state: the origin and all ticks."""
        return self._clock

    @property
    def ticks(self) -> int:
        """The number of updates after the first state."""
        return self._ticks

    @property
    def opaque(self) -> list[str]:
        """The decays that are not known any more, as text: objects of another program."""
        return [str(s.spec.get("repr", "?")) for s in self._segments if s.decay is None]

    @property
    def branches(self) -> tuple[tuple[int, str], ...]:
        """Where the run was gone on with from a checkpoint: clocks, and names of what followed."""
        return tuple(branch for branch in self._branches if branch[0] < self.clock)

    @property
    def shift(self) -> float:
        """The most that any state's clock is off, in units of the clock; 0 unless capped."""
        return float(max((run[2] for s in self._segments for run in s.runs), default=0))

    def tick(self, decay: float | DecayLike, dt: int) -> None:
        """Record one update.

        Args:
            decay: the decay of the update.
            dt: the length of the tick in units of the clock, an integer >= 1.

        Raises:
            ValueError: dt < 1.
            TypeError: dt is no integer.
        """
        if decay is self._decay and dt == self._step:
            run = self._run
            run[0] += 1
            run[1] += dt
            self._ticks += 1
            self._clock += dt
        else:
            self._turn(as_decay(decay), dt)

    def branch(self, name: str, clock: int | None = None) -> None:
        """Record that the states that follow are of a run that goes on from a checkpoint.

        From one checkpoint a run can go on more than once, and is at the same clock in another
        state each time. So states are shared up to that clock, and after it by those of one name.

        >>> first, second = History("a run"), History("a run")
        >>> for history in (first, second):
        ...     history.tick(0.5, 1)
        >>> second.branch("once more")
        >>> for history in (first, second):
        ...     history.tick(0.5, 1)
        >>> inner(first, second) < inner(first, first)
        True

        Args:
            name: of what follows.
            clock: after which it follows; by default the present one.
        """
        clock = self.clock if clock is None else clock
        self._branches = [b for b in self._branches if b[0] < clock and b[1] != name]
        self._branches.append((clock, name))

    def diverges(self, other: History) -> bool:
        """Return whether both have seen states in one stretch of the clock, of different branches.

        Args:
            other: of the same run.

        Raises:
            ValueError: as for `weights`.
        """
        forks = sorted({clock for history in (self, other) for clock, _ in history.branches})
        tracks = [_Track(history, []) for history in (self, other)]
        for low, high in pairwise([-1, *forks, max(self.clock, other.clock)]):
            mine, theirs = (track.block(low, high) for track in tracks)
            if mine.run != theirs.run and mine.has_states and theirs.has_states:
                return True
        return False

    def state(self, clock: int) -> History:
        """Return the history of nothing but the state that the run had at a clock.

        >>> History("a run").state(7)
        History(run='a run', origin=7, clock=7, ticks=0)

        Args:
            clock: an integer >= 0.
        """
        alone = History(self.run, clock)
        alone._branches = list(self._branches)
        return alone

    def under(self, decay: float | DecayLike) -> History:
        """Return what another decay would have made of the same states.

        >>> history = History("a run")
        >>> for _ in range(3):
        ...     history.tick(0.5, 1)
        >>> from polyak.decay import Uniform
        >>> weights(history.under(Uniform()))[1]
        tensor([0.0000, 0.3333, 0.3333, 0.3333], dtype=torch.float64)

        Args:
            decay: the decay of all updates.
        """
        decay = as_decay(decay)
        runs = [run for segment in self._segments for run in segment.runs]
        return self._with([_Segment(to_spec(decay), decay, runs)] if runs else [])

    def until(self, clock: int) -> History:
        """Return what the history was at an earlier clock, or at the last tick before it.

        >>> history = History("a run")
        >>> for _ in range(3):
        ...     history.tick(0.5, 10)
        >>> history.until(25)
        History(run='a run', origin=0, clock=20, ticks=2)

        Args:
            clock: an integer >= the origin; a later one than the newest changes nothing.

        Raises:
            ValueError: the average began after that clock.
        """
        if clock < self.origin:
            raise ValueError(
                f"this average began at the clock {self.origin}, so it was not there at {clock}: "
                "pass a later clock"
            )
        begin, segments = self.origin, []
        for segment in self._segments:
            runs = []
            for count, total, shift in segment.runs:
                ticks = min(_ticks(count, total, clock - begin), count)
                if ticks == count:
                    runs.append([count, total, shift])
                elif ticks > 0:
                    # Evenly spaced anew, where the ticks differ: by less than 1.
                    length = ticks * total // count
                    runs.append([ticks, length, shift + (total % count != 0)])
                begin += total
            if runs:
                segments.append(_Segment(segment.spec, segment.decay, runs))
        cut = self._with(segments)
        runs = [run for segment in segments for run in segment.runs]
        cut._ticks = sum(run[0] for run in runs)
        cut._clock = self.origin + sum(run[1] for run in runs)
        return cut

    def then(self, later: History) -> History:
        """Return the history of one average that went on where another one began.

        Where there is a gap between the two, one tick bridges it.

        >>> first, second = History("a run"), History("a run", origin=2)
        >>> first.tick(0.5, 2)
        >>> second.tick(0.9, 1)
        >>> first.then(second)
        History(run='a run', origin=0, clock=3, ticks=2)

        Args:
            later: begins where this history ends, or later.

        Raises:
            ValueError: it begins earlier, or with what is no state of the same run.
        """
        gap = later.origin - self.clock
        if gap < 0 or later.inherited or later.run != self.run:
            raise ValueError(
                f"{later!r} does not go on where {self!r} ends: pass a history of the same run "
                "that begins there, with a state of that run"
            )
        joined = self._with(self._segments)
        if gap:
            joined.tick(self._decay or Constant(0.0), gap)
        joined._segments += later._with(later._segments)._segments
        before = [name for clock, name in later._branches if clock < self.clock][-1:]
        joined._branches = list(self.branches)
        if before != [name for _, name in self.branches][-1:]:
            joined._branches += [(self.clock, name) for name in before]
        joined._branches += [branch for branch in later._branches if branch[0] >= self.clock]
        joined._ticks += later.ticks
        joined._clock += later.clock - later.origin
        joined._live()
        return joined

    def to_dict(self) -> dict[str, Any]:
        """Return the history as plain JSON values, independent of later ticks."""
        values = {
            "run": self.run,
            "origin": self.origin,
            "start": self._start,
            "segments": [
                {"decay": segment.spec, "runs": [list(run) for run in segment.runs]}
                for segment in self._segments
            ],
        }
        return values | ({"branches": list(map(list, self.branches))} if self.branches else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> History:
        """Return the history that `to_dict` wrote down.

        Decays of somebody else's (opaque) are remembered by name only: such a history goes on
        recording, but its profile cannot be computed any more.

        Raises:
            ValueError: values is not what `to_dict` writes.
        """
        try:
            history = cls(values["run"], values["origin"])
            start = values["start"]
            if start is not None and type(start) is not str:
                raise TypeError(f"start is {start!r}")
            history._start = start
            branches = [(_whole(clock, -1), name) for clock, name in values.get("branches", ())]
            if any(type(name) is not str for _, name in branches) or branches != sorted(
                dict(branches).items()
            ):
                raise ValueError(f"the branches are {branches}")
            history._branches = branches
            for segment in values["segments"]:
                spec = segment["decay"]
                opaque = isinstance(spec, dict) and spec.get("type") == "opaque"
                decay = None if opaque else from_spec(spec)
                runs = []
                for count, total, shift in segment["runs"]:
                    runs.append([_whole(count, 1), _whole(total, count), _whole(shift, 0)])
                    history._ticks += count
                    history._clock += total
                if not runs:
                    raise ValueError("a segment without runs")
                history._segments.append(_Segment(spec, decay, runs))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is no tick history ({type(error).__name__}: {error}): pass what "
                "History.to_dict returned; if a newer version wrote it, upgrade polyak"
            ) from error
        history._live()
        return history

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return (
            f"History(run={self.run!r}, origin={self.origin}, clock={self.clock}, "
            f"ticks={self.ticks})"
        )

    def _with(self, segments: list[_Segment]) -> History:
        """Return the same average with other segments, which are copied."""
        history = History(self.run, self.origin)
        history._start, history._clock, history._ticks = self._start, self._clock, self._ticks
        history._branches = list(self._branches)
        history._segments = [
            _Segment(segment.spec, segment.decay, [list(run) for run in segment.runs])
            for segment in segments
        ]
        history._live()
        return history

    def _mapped(self, change: Callable[[list[list[int]], int], list[list[int]]]) -> History:
        """Return the same average, the runs of each segment changed by `change(runs, begin)`."""
        clock, segments = self.origin, []
        for segment in self._segments:
            segments.append(_Segment(segment.spec, segment.decay, change(segment.runs, clock)))
            clock += sum(run[1] for run in segment.runs)
        return self._with(segments)

    def _knots(self) -> dict[int, int]:
        """Return the clocks where runs meet, which are always exact, and the ticks made by then."""
        ticks, knots = 0, {self.origin: 0}
        for begin, count, total in self._runs():
            ticks += count
            knots[begin + total] = ticks
        return knots

    def _runs(self) -> dict[tuple[int, int, int], int]:
        """Return the runs as (clock at the beginning, ticks, total length), and their shifts."""
        clock, runs = self.origin, {}
        for segment in self._segments:
            for count, total, shift in segment.runs:
                runs[clock, count, total] = shift
                clock += total
        return runs

    def _turn(self, decay: Decay, dt: int) -> None:
        """Record an update whose decay or length differs from the one before."""
        if type(dt) is not int:
            raise TypeError(
                f"a tick is an integer, not {dt!r} of type {type(dt).__name__}: "
                "pass its length in units of the clock"
            )
        if dt < 1:
            raise ValueError(
                f"a tick of length {dt} does not move the clock: pass a length of 1 or more"
            )
        if self._segments and decay == self._segments[-1].decay:
            self._segments[-1].decay = decay  # so that `tick` knows the very object from now on
        else:
            self._segments.append(_Segment(to_spec(decay), decay))
        runs = self._segments[-1].runs
        if runs and dt == _step(runs[-1]):
            runs[-1][0] += 1
            runs[-1][1] += dt
        else:
            runs.append([1, dt, 0])
        self._ticks += 1
        self._clock += dt
        if len(runs) > RUNS:
            begin = self._clock - sum(run[1] for run in runs)
            self._segments[-1].runs = _thin(runs, begin, self._clock)
        self._live()

    def _live(self) -> None:
        """Point `tick` at the last run."""
        last = self._segments[-1] if self._segments else None
        self._decay = last.decay if last else None
        self._run = last.runs[-1] if last else [0, 0, 0]
        self._step = _step(self._run)


def weights(history: History) -> tuple[Tensor, Tensor]:
    """Return the share that each state has in the average.

    p_i = (1 - k_i) k_(i+1) ... k_n, with k_0 = 0 for the first state. Non-negative, sums to 1.

    >>> history = History("a run")
    >>> for _ in range(2):
    ...     history.tick(0.5, 1)
    >>> weights(history)
    (tensor([0, 1, 2]), tensor([0.2500, 0.2500, 0.5000], dtype=torch.float64))

    Args:
        history: the ticks of the average.

    Returns:
        The clocks of the states, int64, ascending, and their shares, float64. What was inherited
        is the first entry, at the origin.

    Raises:
        ValueError: a decay was opaque, and the history was read from a file since.
    """
    clocks, kept = [torch.tensor([history.origin])], [torch.zeros(1, dtype=torch.float64)]
    clock = history.origin
    for segment in history._segments:
        decay, times = segment.known(), [torch.tensor([clock])]
        for count, total, _ in segment.runs:
            times.append(clock + _spread(count, total)[1:])
            clock += total
        both = torch.cat(times)
        clocks.append(both[1:])
        kept.append(decay.keep(both[1:], torch.diff(both)))
    return torch.cat(clocks), _shares(torch.cat(kept))[0]


def moments(history: History) -> Moments:
    """Return the moments of a history's profile, from all its ticks.

    >>> history = History("a run")
    >>> for _ in range(3):
    ...     history.tick(as_decay(0.5), 1)
    >>> result = moments(history)
    >>> result.mean_age, result.largest_share, result.first_share
    (0.875, 0.5, 0.125)

    Args:
        history: the ticks of the average.

    Raises:
        ValueError: as for `weights`.
    """
    clocks, shares = weights(history)
    ages = (history.clock - clocks).double()
    mean = torch.dot(shares, ages)
    return Moments(
        mean_age=mean.item(),
        variance=torch.dot(shares, (ages - mean).square_()).item(),
        concentration=torch.dot(shares, shares).item(),
        largest_share=shares.max().item(),
        first_share=shares[0].item(),
        newest_share=shares[-1].item(),
    )


def inner(a: History, b: History) -> float:
    """Return the inner product of two profiles: the sum of p_a p_b over the states both have seen.

    States are shared if their run and clock are the same, and their branch, where the run has been
    gone on with from a checkpoint. An inherited start is a state of its own, shared by the
    histories of that one average only, so that `inner(a, a)` is the sum of p^2.

    >>> a, b = History("a run"), History("a run")
    >>> for _ in range(2):
    ...     a.tick(0.5, 1)
    >>> b.tick(0.5, 2)
    >>> inner(a, b)  # clocks 0 and 2: .25 * .25 + .5 * .75
    0.4375

    Args:
        a: the ticks of one average.
        b: the ticks of the other.

    Raises:
        ValueError: as for `gram`.
    """
    return gram([a, b])[0, 1].item()


def gram(histories: Sequence[History]) -> Tensor:
    """Return the inner products of all pairs of profiles, each as `inner` does.

    Exact where no history is capped. Where one is, all of its run must have seen the same ticks;
    they are taken as evenly spaced between the same clocks, so that the matrix stays consistent.

    >>> histories = [History("a run"), History("a run")]
    >>> histories[1].tick(0.25, 1)
    >>> gram(histories)
    tensor([[1.0000, 0.2500],
            [0.2500, 0.6250]], dtype=torch.float64)

    Args:
        histories: the ticks of n averages.

    Returns:
        An n x n matrix, float64, symmetric.

    Raises:
        ValueError: as for `weights`, or histories were capped that saw different ticks.
    """
    # A block of the clock at a time. Averages that saw the same ticks in it under the same decay,
    # such as the snapshots of one, differ there by a factor: each block is computed once for them.
    count = len(histories)
    products = torch.zeros(count, count, dtype=torch.float64)
    starts = torch.ones(count, dtype=torch.float64)
    decays: list[Decay] = []
    tracks = [_Track(history, decays) for history in _aligned(histories)]
    for low, high in _blocks(histories):
        blocks = [track.block(low, high) for track in tracks]
        distinct = list(dict.fromkeys(blocks))
        profiles = [_profile(block, decays) for block in distinct]
        local = torch.zeros(len(distinct), len(distinct), dtype=torch.float64)
        for i, a in enumerate(distinct):
            for j, b in enumerate(distinct[: i + 1]):
                if a.run == b.run:
                    local[i, j] = local[j, i] = _product(*profiles[i][:2], *profiles[j][:2])
        number = {block: i for i, block in enumerate(distinct)}
        which = torch.tensor([number[block] for block in blocks])
        survives = torch.tensor([profile[2] for profile in profiles], dtype=torch.float64)[which]
        products = torch.outer(survives, survives) * products + local[which][:, which]
        starts *= survives
    for i, first in enumerate(histories):
        for j, second in enumerate(histories):
            if first.inherited and first._start == second._start:
                products[i, j] += starts[i] * starts[j]
    return products


_BLOCK = 1 << 20  # ticks


class _Piece(NamedTuple):
    """Ticks of a run, those numbered first + 1 to last, under a decay, which is numbered too."""

    decay: int
    begin: int
    ticks: int
    total: int
    first: int
    last: int


class _Block(NamedTuple):
    """What an average saw in a stretch of the clock; equal for all that saw it alike."""

    run: tuple[str, str]  # and the branch of it
    origin: int | None  # the state of the run that it began with, if in this block
    pieces: tuple[_Piece, ...]

    @property
    def has_states(self) -> bool:
        """Whether anything was seen."""
        return self.origin is not None or bool(self.pieces)


class _Track:
    """The runs of a history, found by their clocks.

    Args:
        history: as it is now.
        decays: gets the decays that are not in it yet.
    """

    def __init__(self, history: History, decays: list[Decay]) -> None:
        self._run, self._branches = history.run, history.branches
        self._origin = None if history.inherited else history.origin
        self._runs: list[tuple[int, int, int, int]] = []
        clock = history.origin
        for segment in history._segments:
            decay = segment.known()
            if decay not in decays:
                decays.append(decay)
            for count, total, _ in segment.runs:
                self._runs.append((decays.index(decay), clock, count, total))
                clock += total
        self._ends = [begin + total for _, begin, _, total in self._runs]

    def block(self, low: int, high: int) -> _Block:
        """Return what was seen after low, up to high."""
        pieces = []
        for decay, begin, count, total in self._runs[bisect.bisect_right(self._ends, low) :]:
            if begin >= high:
                break
            first = max(_ticks(count, total, low - begin), 0)
            last = min(_ticks(count, total, high - begin), count)
            step, rest = divmod(total, count)
            if last > first and rest:
                pieces.append(_Piece(decay, begin, count, total, first, last))
            elif last > first:
                # Wherever the run goes on to, and however it began.
                begin, count = begin + first * step, last - first
                pieces.append(_Piece(decay, begin, count, count * step, 0, count))
        began = self._origin is not None and low < self._origin <= high
        branch = next((name for clock, name in reversed(self._branches) if clock <= low), "")
        run = self._run, branch
        return _Block(run, self._origin if began else None, tuple(pieces))


def _blocks(histories: Sequence[History]) -> list[tuple[int, int]]:
    """Return the stretches of the clock from one newest state to the next, long ones in parts.

    None goes beyond where a run has branched.
    """
    forks = {clock for history in histories for clock, _ in history.branches}
    clocks = sorted({history.clock for history in histories} | forks)
    most = max((history.ticks for history in histories), default=0)
    blocks, low = [], -1
    for high in clocks:
        parts = -(-min(most, high - low) // _BLOCK) or 1
        cuts = [low + (high - low) * part // parts for part in range(parts + 1)]
        blocks += list(pairwise(cuts))
        low = high
    return blocks


def _profile(block: _Block, decays: Sequence[Decay]) -> tuple[Tensor, Tensor, float]:
    """Return the clocks of a block's states, their shares at its end, and what survives it."""
    clocks, kept = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.float64)]
    if block.origin is not None:
        clocks.append(torch.tensor([block.origin]))
        kept.append(torch.zeros(1, dtype=torch.float64))
    for decay, begin, count, total, first, last in block.pieces:
        times = begin + _spread(count, total, first, last)
        clocks.append(times[1:])
        kept.append(decays[decay].keep(times[1:], torch.diff(times)))
    shares, survives = _shares(torch.cat(kept))
    return torch.cat(clocks), shares, survives


def _shares(keep: Tensor) -> tuple[Tensor, float]:
    """Return the share of each state from what the ticks keep, and what all of them keep."""
    after = torch.ones(len(keep) + 1, dtype=torch.float64)
    torch.cumprod(keep.flip(0), 0, out=after[1:])
    return (1 - keep) * after[:-1].flip(0), after[-1].item()


def _product(clocks_a: Tensor, shares_a: Tensor, clocks_b: Tensor, shares_b: Tensor) -> float:
    """Return the sum of p_a p_b over the clocks that are in both, which ascend."""
    n = min(len(clocks_a), len(clocks_b))
    if torch.equal(clocks_a[:n], clocks_b[:n]):  # the same ticks so far: no search
        return torch.dot(shares_a[:n], shares_b[:n]).item()
    at = torch.searchsorted(clocks_b, clocks_a).clamp_(max=len(clocks_b) - 1)
    same = clocks_b[at] == clocks_a
    return torch.dot(shares_a[same], shares_b[at[same]]).item()


def _aligned(histories: Sequence[History]) -> Sequence[History]:
    """Return the histories, so coarse that those of one run agree on which states they saw.

    Only of runs where one is capped. Merging depends on the ticks and on their age alone, so all
    that saw the same ticks are made equal by merging as of the newest clock; what remains are the
    ends of the shorter ones, which lie inside runs of the longer ones and are cut there.
    """
    aligned = list(histories)
    for run in {history.run for history in histories if history.shift}:
        mates = [i for i, history in enumerate(histories) if history.run == run]
        thin = partial(_thin, now=max(histories[i].clock for i in mates))
        for i in mates:
            aligned[i] = histories[i]._mapped(thin)
        for _ in range(2):  # twice: a cut may be known only from where another one was made
            cutters = [_cutter(aligned[i]._knots()) for i in mates]
            for i in mates:
                for cut in cutters:
                    aligned[i] = aligned[i]._mapped(cut)
        _refuse_different_ticks([aligned[i] for i in mates])
    return aligned


def _refuse_different_ticks(histories: Sequence[History]) -> None:
    """Refuse merged runs that another history, which was there, does not have."""
    runs = [history._runs() for history in histories]
    for a, runs_a in zip(histories, runs, strict=True):
        for b, runs_b in zip(histories, runs, strict=True):
            begin, end = max(a.origin, b.origin), min(a.clock, b.clock)
            for run, shift in runs_a.items():
                if shift and run[0] < end and run[0] + run[2] > begin and run not in runs_b:
                    raise ValueError(
                        f"two averages of the run {a.run!r} were updated at different clocks, by "
                        f"ticks of more than {RUNS} different lengths: which states they share is "
                        "not known any more. Update averages that are to be combined at the same "
                        "clocks, or let the clock count steps"
                    )


def _thin(runs: list[list[int]], begin: int, now: int) -> list[list[int]]:
    """Merge neighboring runs, keeping a 32nd to a 64th of the age as the distance of knots.

    A knot (where runs meet) of age [32, 64) 2^level is kept if it is the first in its cell of
    length 2^level of the clock. That is a property of the ticks around it: which knots are left
    does not depend on when, or how often, older calls have thinned.
    """
    thinned, group, clock = [], [], begin
    for run in runs:
        before, clock = clock, clock + run[1]
        group.append(run)
        level = max(((now - clock) >> 5).bit_length() - 1, 0)
        if before >> level != clock >> level:
            thinned.append(_merge(group))
            group = []
    return [*thinned, _merge(group)] if group else thinned


def _merge(runs: list[list[int]]) -> list[int]:
    """Return one evenly spaced run instead of several.

    Between knots both the old and the new clocks are linear in the tick, so they differ most at a
    knot: by |clock - ticks total / count|. That much, rounded up, adds to the shift.
    """
    count, total = sum(run[0] for run in runs), sum(run[1] for run in runs)
    ticks = clock = worst = 0
    for run in runs:
        ticks, clock = ticks + run[0], clock + run[1]
        worst = max(worst, abs(clock * count - ticks * total))
    return [count, total, max(run[2] for run in runs) - (-worst // count)]


def _cutter(knots: dict[int, int]) -> Callable[[list[list[int]], int], list[list[int]]]:
    """Return what cuts runs where another history, with these knots, knows which state it saw."""
    clocks = sorted(knots)

    def cut(runs: list[list[int]], begin: int) -> list[list[int]]:
        pieces = []
        for count, total, shift in runs:
            end = begin + total
            inside = clocks[bisect.bisect_right(clocks, begin) : bisect.bisect_left(clocks, end)]
            for clock in inside:
                # Ticks are counted from whichever end of the run the other one knows too.
                if begin in knots:
                    ticks = knots[clock] - knots[begin]
                elif end in knots:
                    ticks = count - (knots[end] - knots[clock])
                else:
                    continue
                length = clock - begin
                possible = 0 < ticks <= length and 0 < count - ticks <= total - length
                if possible and abs(length * count - ticks * total) <= shift * count:
                    pieces.append([ticks, length, shift])
                    begin, count, total = clock, count - ticks, total - length
            pieces.append([count, total, shift])
            begin = end
        return pieces

    return cut


def _step(run: list[int]) -> int:
    """Return the length of the ticks of a run, 0 if they differ or there are none."""
    count, total, shift = run
    return total // count if count and not shift else 0


def _spread(count: int, total: int, first: int = 0, last: int | None = None) -> Tensor:
    """Return clocks of a run that begins at 0: total i / count, rounded down, i = first..last."""
    index = torch.arange(first, (count if last is None else last) + 1)
    whole, rest = divmod(total, count)
    return index * whole + rest * index // count if rest else index * whole


def _ticks(count: int, total: int, length: int) -> int:
    """Return the largest i for which total i / count, rounded down, is at most a length."""
    return ((length + 1) * count - 1) // total


def _whole(value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} where a whole number of {least} or more belongs")
    return value
