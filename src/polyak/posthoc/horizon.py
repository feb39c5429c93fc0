"""HORIZON: how far back an average should look, found after the run by trying averages of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise

from torch import Tensor

from polyak.decay import Constant, Decay, PowerLaw, Uniform, as_decay
from polyak.files import StrPath
from polyak.posthoc.curve import Curve, Point, best_of, is_real
from polyak.posthoc.fit import LIMIT, refuse_limit
from polyak.posthoc.reach import Family, reach, spaced
from polyak.posthoc.reconstruction import reconstruct
from polyak.posthoc.solution import fits_of, history_of, stored_by
from polyak.posthoc.stored import Snapshot, read
from polyak.profile import History
from polyak.selection import listed

__all__ = ["search"]

_NEAR = math.log(1.01)  # horizons nearer than this are one
_NARROW = math.log(1.05)  # a best horizon that is known to this is found
_LOPSIDED = 3.0  # of gaps that differ more, parabolas creep along one side


def search(
    files: Sequence[StrPath | Snapshot],
    evaluate: Callable[[dict[str, Tensor]], float],
    family: Family = PowerLaw,
    *,
    between: tuple[float, float] | None = None,
    evaluations: int = 12,
    at: int | None = None,
    limit: float = LIMIT,
    start: Curve | None = None,
    progress: Callable[[Curve], object] | None = None,
) -> Curve:
    """Find the horizon whose average is best, by evaluating averages made of stored ones.

    First a few horizons over the whole range, evenly spaced in their logarithms; then, one at a
    time, the lowest point of the parabola through the best and its neighbors, or the middle of the
    wider of the two gaps where that is no news or the gaps are very unlike. It ends early where the
    neighbors of the best are within 5% of one another. One average is in memory at a time, and no
    file is open while it is evaluated.

    >>> import tempfile, torch
    >>> from polyak import EMA, PowerLaw
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> emas = [EMA(model, PowerLaw(std)) for std in (0.05, 0.10)]
    >>> files = []
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(1, 401):
    ...         _ = torch.nn.init.constant_(model.weight, step)
    ...         for number, ema in enumerate(emas):
    ...             ema.update(step)
    ...             if step % 50 == 0:
    ...                 files.append(f"{folder}/{number}-{step}.safetensors")
    ...                 ema.save(files[-1])
    ...     curve = search(files, lambda average: (average["weight"].item() - 340) ** 2)
    >>> round(curve.best.horizon, 2), curve.at, curve.at_edge, len(curve.points) <= 12
    (0.13, 400, False, True)

    Args:
        files: as for `reconstruct`.
        evaluate: gets an average by name, in float32, as `model.load_state_dict` takes it, and
            returns a score: a number, of which lower is better. An accuracy is returned negated. A
            score that is not finite is worse than all others.
        family: makes a decay of a horizon, a float, or raises ValueError where there is none.
        between: the shortest and the longest horizon to try; by default what the files give within
            the limit.
        evaluations: how many points the curve has at the end at most, an integer >= 3.
        at: as for `solve`.
        limit: as for `solve`, of each average.
        start: what is known already, such as a curve that `progress` was told: its points are not
            evaluated again, and count.
        progress: is told the curve after each evaluation.

    Returns:
        All that was evaluated. A best that is the first or the last of its range is warned of.

    Raises:
        ValueError: as for `reconstruct`; the files give no horizon of the family, or not all of
            `between`; no score is finite; `start` is of another clock or family; `evaluations` is
            below 3.
        TypeError: as for `reconstruct`; a score is no number.
        OSError: as for `reconstruct`. What `evaluate` raises is passed on.
    """
    _check(files, evaluate, family, between, evaluations, start)
    refuse_limit(limit)
    with ExitStack() as stack:
        known = read(files, stack)
    states = history_of([file.history for file in known], Uniform(), at)
    used = [known[i] for i in stored_by(known, states.clock)]
    supported = reach(used, states, family, limit)
    low, high = _range(between, supported, limit)
    curve = Curve(states.clock, supported, _known(start, states.clock, family))

    def evaluated(horizon: float) -> Curve:
        decay = as_decay(family(horizon))
        (fit,) = fits_of(used, [states.under(decay)])
        score = _scored(files, evaluate, decay, at, limit)
        found = Curve(
            states.clock, supported, (*curve.points, Point(horizon, decay, score, fit.error))
        )
        if progress is not None:
            progress(found)
        return found

    coarse = max(3, (evaluations - 1) // 2)
    for horizon in _missing(curve, low, high, coarse)[: max(evaluations - len(curve.points), 0)]:
        curve = evaluated(horizon)
    if not any(math.isfinite(point.score) for point in curve.points):
        lines = [f"{point.decay!r}: {point.score}" for point in curve.points]
        raise ValueError(
            f"no score of {len(lines)} horizons is finite:{listed(lines)}\nlook whether evaluate "
            "loads all of an average, and into a model whose precision holds its values"
        )
    while len(curve.points) < evaluations:
        finer = _finer(curve, low, high)
        if finer is None:
            break
        curve = evaluated(finer)
    if curve.at_edge:
        warnings.warn(_edge(curve, low, high, limit), stacklevel=2)
    return curve


# ------------------------------------------------------------------------------ where to look


def _missing(curve: Curve, low: float, high: float, count: int) -> list[float]:
    """Return the horizons of the first pass, but for those that have a known one beside them."""
    gap = math.log(high / low) / (count - 1)
    inner = [_short(horizon) for horizon in spaced(low, high, count - 2)]
    near = {low: min(_NEAR, gap / 2), high: min(_NEAR, gap / 2)}
    known = [point.horizon for point in curve.points]
    return [
        horizon
        for horizon in (low, *inner, high)
        if all(abs(math.log(horizon / one)) >= near.get(horizon, gap / 2) for one in known)
    ]


def _finer(curve: Curve, low: float, high: float) -> float | None:
    """Return the horizon to evaluate next, or None where the best is known well enough."""
    # Of what was known already, a point beside an end stands for it.
    near = math.exp(_NEAR)
    points = [point for point in curve.points if low / near <= point.horizon <= high * near]
    best = best_of(points)
    place = points.index(best)
    around = points[max(place - 1, 0) : place + 2]
    x = [math.log(point.horizon) for point in around]
    if not math.isfinite(best.score) or x[-1] - x[0] < _NARROW:
        return None
    gaps = sorted(pairwise(x), key=lambda gap: gap[1] - gap[0])
    (start, end), narrow = gaps[-1], gaps[0]
    lowest = _vertex(x, [point.score for point in around])
    if (
        lowest is None
        or end - start > _LOPSIDED * (narrow[1] - narrow[0])
        or min(abs(lowest - known) for known in x) < _NEAR
    ):
        lowest = (start + end) / 2
    return _short(math.exp(lowest))


def _vertex(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the lowest point of the parabola through three points of which the middle is lowest.

    None where there are not three, or no such parabola.
    """
    if len(x) < 3 or not all(map(math.isfinite, y)):
        return None
    left, right = x[1] - x[0], x[2] - x[1]
    fall, rise = (y[0] - y[1]) / left, (y[2] - y[1]) / right
    if not 0 < fall + rise < math.inf:
        return None
    # The slope of the parabola is -fall and rise in the middles of the two gaps.
    return (x[0] + x[1]) / 2 + (left + right) / 2 * fall / (fall + rise)


def _short(number: float) -> float:
    return float(f"{number:.4g}")


# -------------------------------------------------------------------------- what is evaluated


def _scored(
    files: Sequence[StrPath | Snapshot],
    evaluate: Callable[[dict[str, Tensor]], float],
    decay: Decay,
    at: int | None,
    limit: float,
) -> float:
    (average,) = reconstruct(files, [decay], at=at, limit=limit)
    score: object = evaluate(average)
    if isinstance(score, Tensor) and not score.dim() and not score.is_complex():
        score = score.item()
    if is_real(score):
        return float(score)
    raise TypeError(
        f"evaluate returned {score!r} of type {type(score).__name__} for {decay!r}: return one "
        "number, of which lower is better, such as loss.item(), or -accuracy"
    )


def _known(start: Curve | None, clock: int, family: Family) -> tuple[Point, ...]:
    """Return the points that are known already, unless they are of something else."""
    if start is None:
        return ()
    if start.at != clock:
        raise ValueError(
            f"start is of averages at the clock {start.at}, and these are at {clock}: pass "
            f"at={start.at}, or leave out start"
        )
    for point in start.points:
        try:
            same = as_decay(family(point.horizon)) == point.decay
        except ValueError:
            same = False
        if not same:
            raise ValueError(
                f"start has {point.decay!r} for the horizon {point.horizon:g}, which {family!r} "
                "does not make of it: pass the family that it was made with, or leave out start"
            )
    return start.points


# ------------------------------------------------------------------------------------ messages


def _check(
    files: Sequence[StrPath | Snapshot],
    evaluate: object,
    family: object,
    between: object,
    evaluations: object,
    start: object,
) -> None:
    if isinstance(files, Sequence) and any(isinstance(file, History) for file in files):
        raise TypeError(
            "a history has no tensors to evaluate: pass the path of the file that it is of"
        )
    if not callable(evaluate):
        raise TypeError(
            f"evaluate is what scores an average, not {evaluate!r}: pass a function that gets a "
            "dict of tensors and returns a number, of which lower is better"
        )
    if not callable(family):
        raise TypeError(
            f"family makes a decay of a horizon, and is not {family!r}: pass PowerLaw or HalfLife; "
            "the horizons to try are between=(shortest, longest)"
        )
    if family is Constant:
        raise ValueError(
            "the number of Constant is the share that is kept, which is no horizon: pass HalfLife, "
            "which makes the same averages"
        )
    if type(evaluations) is not int:
        raise TypeError(f"evaluations is a count, not {evaluations!r}: write evaluations=12")
    if evaluations < 3:
        raise ValueError(
            f"evaluations={evaluations} cannot tell where the best is: both ends of the range and "
            "one horizon between them are the least, so write 3 or more"
        )
    if not isinstance(start, (Curve, type(None))):
        raise TypeError(
            f"start is a curve, not {start!r} of type {type(start).__name__}: pass what search "
            "returned, or Curve.from_dict(...) of what was stored"
        )
    if between is None:
        return
    if not isinstance(between, Sequence) or len(between) != 2 or not all(map(is_real, between)):
        raise TypeError(f"between is two horizons, not {between!r}: write between=(0.05, 0.20)")
    if not 0 < between[0] < between[1] < math.inf:
        raise ValueError(
            f"between={between!r} is no range: write the shorter horizon first, above 0, and then "
            "the longer one"
        )


def _range(
    between: tuple[float, float] | None, supported: tuple[float, float], limit: float
) -> tuple[float, float]:
    """Return the range that is searched."""
    if between is None:
        return supported
    low, high = map(float, between)
    if low < supported[0] or high > supported[1]:
        raise ValueError(
            f"between={between} is not all within limit={limit:g} of what the files give, which "
            f"are horizons from {supported[0]:g} to {supported[1]:g}: pass a range within these, "
            "or a larger limit, and have that error"
        )
    return low, high


def _edge(curve: Curve, low: float, high: float, limit: float) -> str:
    """Return what to do about a best that is at an end of what was evaluated."""
    best, (shortest, longest) = curve.best, curve.supported
    short = curve.points[0].score == best.score
    end = curve.points[0] if short else curve.points[-1]
    found = (
        f"of {len(curve.points)} horizons none is better than the "
        f"{'shortest' if short else 'longest'}, {end.decay!r}, with a score of {end.score:g}, so "
        "that a better one may lie beyond. "
    )
    edge = low if short else high
    if (shortest < edge) if short else (edge < longest):
        wider = (shortest, high) if short else (low, longest)
        return (
            f"{found}The files give {shortest:g} to {longest:g}: pass between={wider}, and go on "
            f"from here with start=curve and evaluations={2 * len(curve.points)}"
        )
    width = "smaller" if short else "larger"
    return (
        f"{found}But {shortest:g} to {longest:g} is all that the files give within "
        f"limit={limit:g}: store averages of a {width} width too, and more often; or pass a larger "
        "limit, and have that error"
    )
