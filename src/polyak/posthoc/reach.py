"""REACH: which horizons stored averages can give. Of profiles only: no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from itertools import groupby, pairwise

from polyak.decay import Decay, as_decay
from polyak.posthoc.fit import Fit
from polyak.posthoc.solution import fits_of, refusal
from polyak.posthoc.stored import File
from polyak.profile import History

__all__ = ["Family", "reach", "spaced"]

Family = Callable[[float], Decay]
"""What makes a decay of a horizon, such as `PowerLaw` or `HalfLife`."""

_PER_DECADE = 2  # horizons that are tried first
_FILL = 2  # horizons that are tried in each gap of what can be given: now 6 in a decade
_CLOSE = 8  # horizons that are tried on either side of the nearest, where none can be given
_AT_ENDS = 5  # horizons that are tried in the gap at an end, twice: 10^(1/6) becomes 1 %


def reach(
    files: Sequence[File], states: History, family: Family, limit: float
) -> tuple[float, float]:
    """Return the shortest and the longest horizon that files give, and all between them.

    Horizons from a tick to the whole history are tried, in units of the clock, or as shares of it
    where the family takes no number as large. Of several stretches it is the widest. Each end is
    found to 1% and rounded to three digits, inward.

    Args:
        files: what takes part.
        states: what an average would have seen, under any decay.
        family: makes a decay of a horizon, or raises ValueError where there is none.
        limit: as for `solve`.

    Raises:
        ValueError: none can be given, or just one.
    """
    whole = states.clock - states.origin
    if not whole:
        raise ValueError(
            f"the files tell of one state, at the clock {states.clock}, which all averages are "
            "equal to: pass what was stored later too"
        )
    units = 1 if _made(family, whole) else states.clock
    probes = _Probes(files, states, family, limit)
    low, high = whole / states.ticks / units, whole / units
    count = math.ceil(_PER_DECADE * math.log10(high / low))
    probes.ask([low, *spaced(low, high, count), high])
    for _ in range(2):
        if not any(map(probes.good, probes.tried)):
            best = probes.nearest()[0]
            probes.ask(x for end in probes.beside(best) for x in spaced(best, end, _CLOSE))
    if not any(map(probes.good, probes.tried)):
        raise ValueError(probes.refused())
    edges = {edge for x in probes.tried if probes.good(x) for edge in (x, *probes.beside(x))}
    pairs = [(a, b) for a, b in pairwise(sorted(edges)) if probes.good(a) or probes.good(b)]
    probes.ask(x for a, b in pairs for x in spaced(a, b, _FILL))
    runs = [list(run) for good, run in groupby(sorted(probes.tried), probes.good) if good]
    widest = max(runs, key=lambda run: run[-1] / run[0])
    ends = [(widest[0], probes.beside(widest[0])[0]), (widest[-1], probes.beside(widest[-1])[1])]
    for _ in range(2):
        gaps = [spaced(good, bad, _AT_ENDS) for good, bad in ends]
        probes.ask(x for gap in gaps for x in gap)
        ends = [probes.narrowed(end, gap) for end, gap in zip(ends, gaps, strict=True)]
    shortest, longest = _rounded(ends[0][0], ROUND_CEILING), _rounded(ends[1][0], ROUND_FLOOR)
    if shortest >= longest:
        raise ValueError(
            f"within limit={limit:g} these {len(files)} files give nothing but "
            f"{family(widest[0])!r}, so that there is nothing to search: store averages more often "
            "or of more widths, or pass a larger limit, and have that error"
        )
    return shortest, longest


def spaced(start: float, end: float, count: int) -> list[float]:
    """Return so many numbers between two others, evenly spaced in their logarithms.

    >>> spaced(1.0, 16.0, 3)
    [2.0, 4.0, 8.0]
    """
    if start == end:
        return []
    return [start * (end / start) ** (part / (count + 1)) for part in range(1, count + 1)]


class _Probes:
    """What is known of how near files come to the averages of a family.

    Attributes:
        tried: how near, by horizon; None where the family has none.
    """

    def __init__(
        self, files: Sequence[File], states: History, family: Family, limit: float
    ) -> None:
        self._files, self._states, self._family, self._limit = files, states, family, limit
        self.tried: dict[float, Fit | None] = {}

    def ask(self, horizons: Iterable[float]) -> None:
        """Find out, of all of them together."""
        decays = {horizon: _made(self._family, horizon) for horizon in horizons}
        known = {horizon: decay for horizon, decay in decays.items() if decay is not None}
        found = fits_of(self._files, [self._states.under(decay) for decay in known.values()])
        self.tried |= dict.fromkeys(decays)
        self.tried |= dict(zip(known, found, strict=True))

    def good(self, horizon: float) -> bool:
        """Whether the files can give it."""
        fit = self.tried[horizon]
        return fit is not None and (self._limit == math.inf or fit.within(self._limit))

    def nearest(self) -> tuple[float, Fit]:
        """Return the horizon that the files come nearest to, and how near."""
        found = [(horizon, fit) for horizon, fit in self.tried.items() if fit is not None]
        if not found:
            raise ValueError(
                f"{self._family!r} makes no decay of any horizon from {min(self.tried):g} to "
                f"{max(self.tried):g}, from a tick to all that the files tell of: pass a family "
                "that does, such as HalfLife, or files of more clocks"
            )
        return min(found, key=lambda one: one[1].error)

    def beside(self, horizon: float) -> tuple[float, float]:
        """Return the next horizons below and above that were tried; itself where there is none."""
        below = [other for other in self.tried if other < horizon]
        above = [other for other in self.tried if other > horizon]
        return max(below, default=horizon), min(above, default=horizon)

    def narrowed(self, end: tuple[float, float], gap: Sequence[float]) -> tuple[float, float]:
        """Return what can be given, and next to it what cannot, from those within a gap."""
        good, bad = end
        for horizon in gap:
            if not self.good(horizon):
                return good, horizon
            good = horizon
        return good, bad

    def refused(self) -> str:
        """Return why nothing can be given."""
        horizon, fit = self.nearest()
        decay = as_decay(self._family(horizon))
        return refusal(self._files, decay, self._states.under(decay), fit, self._limit)


def _made(family: Family, horizon: float) -> Decay | None:
    try:
        return as_decay(family(float(horizon)))
    except ValueError:
        return None


def _rounded(number: float, way: str) -> float:
    """Return it with three digits, upward or downward."""
    return float(Context(prec=3, rounding=way).create_decimal(f"{number:.12g}"))
