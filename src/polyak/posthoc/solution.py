"""SOLUTION: how an average is made of stored ones, and what to ask for where it cannot be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeAlias

from polyak.decay import (
    After,
    Constant,
    Debiased,
    Decay,
    DecayLike,
    HalfLife,
    PowerLaw,
    Uniform,
    as_decay,
)
from polyak.files import StrPath
from polyak.posthoc.fit import LIMIT, NOISE, Fit, fits, refuse_limit
from polyak.posthoc.stored import File, Snapshot, read
from polyak.profile import History

__all__ = [
    "Average",
    "Solution",
    "fits_of",
    "histories_among",
    "history_of",
    "refusal",
    "solve",
    "solved",
    "stored_by",
]

Average: TypeAlias = "float | DecayLike | History"
"""An average that is wanted: its decay, or the history of one."""


@dataclass(frozen=True)
class Solution:
    """How an average is made of stored ones.

    Attributes:
        coefficients: one for each file, in the order of the files; they sum to 1. Those of files
            that take no part are 0.
        predicted_error: `|sum_i c_i p_i - p| / |p|`, the L2 distance of the profiles. Where the
            states differ from their mean by independent noise, the error is this share of the
            deviation of the wanted average; always it is, in each element, at most
            `|sum_i c_i p_i - p|` times the L2 norm of the deviations of all states from their mean.
            Of stored averages that were reconstructed themselves, with errors e_i of their own,
            `sum_i |c_i| e_i |p_i| / |p|` is added.
        amplification: `sum_i |c_i|`, by which what was rounded off the stored averages grows.
        storage_noise: `sum_i |c_i| u_i`, u_i the rounding unit of what is stored: the most that
            rounding adds, as a share of the largest stored value of an element.
        history: what the wanted average would have seen, under its decay.
        at: the clock of the wanted average.
    """

    coefficients: tuple[float, ...]
    predicted_error: float
    amplification: float
    storage_noise: float
    history: History
    at: int


def solve(
    files: Sequence[StrPath | Snapshot | History],
    target: Average,
    at: int | None = None,
    *,
    limit: float = LIMIT,
) -> Solution:
    """Return the coefficients that make an average of stored ones, and how good it will be.

    `min |sum_i c_i p_i - p|` subject to sum_i c_i = 1, in L2 over the states of the run, with exact
    inner products. A target that is stored is that file, alone. Files that repeat one another
    share. Differences of 1e-5 of a profile and less are not used: by them float32 could not tell
    the files apart.

    What the wanted average would have seen are the states that the stored ones tell of: those of
    the average that had come furthest by then, of several the one with the most ticks, and before
    it began those of the ones before it. Where no file is an average, they are the files.

    >>> stored = []
    >>> for std in (0.05, 0.10):
    ...     history = History("a run")
    ...     for step in range(1, 1001):
    ...         history.tick(PowerLaw(std), 1)
    ...         if step % 125 == 0:
    ...             stored.append(history.until(step))
    >>> solution = solve(stored, PowerLaw(0.15))
    >>> round(solution.predicted_error, 3), round(solution.amplification, 1), solution.at
    (0.033, 1.7, 1000)

    Args:
        files: paths of files that `EMA.save` wrote, or `reconstruct`; any checkpoints as
            `Snapshot`; or the histories alone, which are taken to be of float32 averages. In any
            order.
        target: a decay, or the history of an average of the same run.
        at: the clock of the average, in the units of the run's clock; between two ticks it is the
            one before. By default that of the newest average; of a history, its own. Only what was
            stored at or before it takes part.
        limit: the largest predicted error; `math.inf` refuses nothing, not even storage noise.

    Raises:
        ValueError: the predicted error is above the limit, or the storage noise above .01 (the
            message names the nearest target that the files can give); the files are of different
            runs, or do not tell what they are; nothing is stored at or before `at`.
        TypeError: a file or the target is of another kind.
        OSError: a file cannot be read.

    Source: EDM2 (arXiv 2312.02696), section 3.2 and appendix C; sum to 1 and exact sums are ours.
    """
    with ExitStack() as stack:
        return solved(read(files, stack, histories_among([target])), target, at, limit)


def solved(files: Sequence[File], target: Average, at: int | None, limit: float) -> Solution:
    """Return the solution, unless it is refused."""
    refuse_limit(limit)
    history = history_of([file.history for file in files], target, at)
    taken = stored_by(files, history.clock)
    used = [files[i] for i in taken]
    (fit,) = fits_of(used, [history])
    if limit < math.inf and not fit.within(limit):
        raise ValueError(refusal(used, target, history, fit, limit))
    coefficients = [0.0] * len(files)
    for i, coefficient in zip(taken, fit.coefficients, strict=True):
        coefficients[i] = coefficient
    return Solution(
        coefficients=tuple(coefficients),
        predicted_error=fit.error,
        amplification=fit.amplification,
        storage_noise=fit.noise,
        history=history,
        at=history.clock,
    )


def stored_by(files: Sequence[File], clock: int) -> list[int]:
    """Return which files take part in an average at a clock: their places."""
    taken = [i for i, file in enumerate(files) if file.history.clock <= clock]
    if not taken:
        first = min(file.history.clock for file in files)
        raise ValueError(
            f"nothing is stored at or before the clock {clock}: the oldest of the "
            f"{len(files)} files is at {first}. Ask for an average at that clock or later"
        )
    return taken


def fits_of(files: Sequence[File], wanted: Sequence[History]) -> list[Fit]:
    """Return how near files come to each of some averages."""
    return fits(
        [file.history for file in files],
        [file.rounding for file in files],
        wanted,
        [file.error for file in files],
    )


def history_of(histories: Sequence[History], target: Average, at: int | None) -> History:
    """Return the history of the average that is wanted."""
    if at is not None and type(at) is not int:
        raise TypeError(
            f"at is a clock, an integer, not {at!r} of type {type(at).__name__}: write {target!r}, "
            "at=1000"
        )
    if isinstance(target, History):
        if at not in (None, target.clock):
            raise ValueError(
                f"the wanted average is at the clock {target.clock}, and at={at}: leave out at, or "
                f"pass target.until({at})"
            )
        return target
    decay = as_decay(target)
    averages = [history for history in histories if history.ticks]
    newest = max(history.clock for history in averages or histories)
    oldest = min(history.origin for history in averages or histories)
    at = newest if at is None else at
    if not oldest <= at <= newest:
        raise ValueError(
            f"what is stored tells of the clocks {oldest} to {newest}, not of at={at}: pass one of "
            "these, or what was stored then too"
        )
    if averages:
        return _seen(sorted(averages, key=lambda history: history.clock), at).under(decay)
    first, *later = sorted({history.clock for history in histories if history.clock <= at})
    states = History(histories[0].run, first)
    for clock in later:
        states.tick(decay, clock - states.clock)
    return states


def histories_among(targets: Iterable[Average]) -> list[History]:
    """Return those of the wanted averages that are given by what they have seen."""
    return [target for target in targets if isinstance(target, History)]


def _seen(histories: Sequence[History], at: int) -> History:
    """Return a history of all the states that are told of, up to a clock."""
    begun = [history for history in histories if history.origin <= at]
    # Of equals the first, which is the one that ended first: its clock is known exactly.
    best = max(
        (history.until(at) for history in begun),
        key=lambda history: (history.clock, history.ticks, not history.inherited),
    )
    earlier = [history for history in begun if history.origin < best.origin]
    if not earlier or best.inherited:
        return best
    return _seen(earlier, best.origin).then(best)


def refusal(
    files: Sequence[File], target: Average, history: History, fit: Fit, limit: float
) -> str:
    """Return what is wrong, and what to ask for instead."""
    newest, instead = max(file.history.clock for file in files), "Else "
    if newest < history.clock:
        instead = (
            f"The newest of them is at the clock {newest}: ask for that with at={newest}; else "
        )
    elif not isinstance(target, History):
        nearest = _nearest(files, target, history, limit)
        instead = f"The nearest that can be given is {nearest!r}; else " if nearest else instead
    name = "the average of that history" if isinstance(target, History) else repr(target)
    cannot = f"these {len(files)} files cannot give {name} at the clock {history.clock}"
    if fit.error > limit:
        return (
            f"{cannot}: it would be off by {fit.error:.0%} of it, more than limit={limit:g}. "
            f"{instead}store averages more often or of more widths, or pass "
            f"limit={math.ceil(fit.error * 100) / 100:g}, and have that error"
        )
    return (
        f"{cannot}: the sizes of its coefficients sum to {fit.amplification:.1f}, so that what was "
        f"rounded off the stored averages grows to {fit.noise:.1%} of the weights, more than "
        f"{NOISE:.0%}. {instead}store them with save(path, dtype=torch.float32), or pass "
        "limit=math.inf, and have that noise"
    )


def _nearest(
    files: Sequence[File], target: float | DecayLike, history: History, limit: float
) -> Decay | None:
    """Return the decay of the target's family that is nearest to it among those that are given.

    It looks back 2^x times as far: x = 1, -1, 2, -2, ..., and in parts between the last two.
    """

    def first(powers: Sequence[float]) -> tuple[float, Decay] | None:
        decays = [(x, _scaled(as_decay(target), 2.0**x, history.clock)) for x in powers]
        known = [(x, decay) for x, decay in decays if decay is not None]
        found = fits_of(files, [history.under(decay) for _, decay in known])
        return next((a for a, fit in zip(known, found, strict=True) if fit.within(limit)), None)

    for size in range(1, 20, 3):  # a few at once, as each pass over the ticks takes its time
        found = first([sign * float(size + more) for more in range(3) for sign in (1, -1)])
        if found is not None:
            power = found[0]
            parts = [power - math.copysign(part / 16, power) for part in range(15, 0, -1)]
            return (first(parts) or found)[1]
    return None


def _scaled(decay: Decay, factor: float, clock: int) -> Decay | None:
    """Return a decay that looks back so much further; None if there is none in its family."""
    if isinstance(decay, PowerLaw):
        std = _short(decay.std * factor)
        return PowerLaw(std) if std < 1 / math.sqrt(12) else None
    if isinstance(decay, Uniform):
        return PowerLaw(_short(factor / math.sqrt(12))) if factor < 1 else None
    if isinstance(decay, HalfLife):
        return HalfLife(_short(decay.half_life * factor))
    if isinstance(decay, Constant) and 0 < decay.decay < 1:
        share = 1 - _short(-math.expm1(math.log(decay.decay) / factor))
        return Constant(share) if 0 < share < 1 else None
    if isinstance(decay, Debiased):
        inner = _scaled(decay.inner, factor, clock)
        return Debiased(inner) if isinstance(inner, (Constant, HalfLife)) else None
    if isinstance(decay, After) and isinstance(decay.inner, Uniform):
        start = clock - round(_short((clock - decay.start) * factor))
        return After(start, Uniform()) if 0 <= start < clock else None
    return None


def _short(number: float) -> float:
    return float(f"{number:.3g}")
