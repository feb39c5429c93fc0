"""POST-HOC: any average of a run, from those that were stored.

A stored average weights the states of its run in a known way, which is its profile p_i. The sum of
stored averages with coefficients c weights them by sum_i c_i p_i, and the coefficients can be
chosen so that this is nearly the profile of an average that nobody kept. How nearly is known before
a tensor is read. This module knows profiles and fact sheets; it may not know models, and how
tensors are read and summed is the affair of others (`checkpoint`, `combine`).
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor

from polyak import combine as sums
from polyak.checkpoint import Stored, named, opened
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
    to_spec,
)
from polyak.files import StrPath
from polyak.profile import History, gram, moments

__all__ = ["Average", "Snapshot", "Solution", "reconstruct", "solve"]

Average: TypeAlias = "float | DecayLike | History"
"""An average that is wanted: its decay, or the history of one."""

_LIMIT = 0.2  # the largest predicted error, by default
_NOISE = 0.01  # the largest storage noise
_SAME = 1e-6  # a relative difference of profiles below which they are one: rounding of float32
_RANK = 1e-10  # the smallest eigenvalue that counts, as a share of the largest; see `solve`


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint of which the caller says what it is.

    >>> Snapshot("step-1000.pt", 1000, place="model")
    Snapshot(path='step-1000.pt', history=1000, place='model')

    Args:
        path: the file or folder.
        history: the clock, an integer, at which the run had the weights that are in it; or the
            history of the average that is in it.
        place: the dotted path to the tensors in it, such as `"model"`; by default all.
    """

    path: StrPath
    history: History | int
    place: str = ""


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
    limit: float = _LIMIT,
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
        return _solved(_read(files, [target], stack), target, at, limit)


@overload
def reconstruct(
    files: Sequence[StrPath | Snapshot],
    targets: Sequence[Average],
    out: None = None,
    *,
    at: int | None = None,
    limit: float = _LIMIT,
    dtype: torch.dtype | None = torch.float32,
    shard_bytes: None = None,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Tensor]]: ...
@overload
def reconstruct(
    files: Sequence[StrPath | Snapshot],
    targets: Sequence[Average],
    out: Sequence[StrPath],
    *,
    at: int | None = None,
    limit: float = _LIMIT,
    dtype: torch.dtype | None = torch.float32,
    shard_bytes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Solution]: ...
def reconstruct(
    files: Sequence[StrPath | Snapshot],
    targets: Sequence[Average],
    out: Sequence[StrPath] | None = None,
    *,
    at: int | None = None,
    limit: float = _LIMIT,
    dtype: torch.dtype | None = torch.float32,
    shard_bytes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Solution] | list[dict[str, Tensor]]:
    """Make averages of stored ones, as `solve` says: all of them in one pass over the files.

    What was averaged is summed, in float64 and in slices. What merely followed the model, integers
    and booleans are those of the newest file that takes part. A file that is written says what it
    is as `EMA.save` does, so that it can be read here again.

    >>> import tempfile
    >>> from polyak import EMA
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> ema = EMA(model, PowerLaw(0.10))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in range(1, 9):
    ...         _ = torch.nn.init.constant_(model.weight, step)
    ...         ema.update(step)
    ...         ema.save(f"{folder}/{step}.safetensors")
    ...     files = [f"{folder}/{step}.safetensors" for step in range(1, 9)]
    ...     uniform, recent = reconstruct(files, [Uniform(), PowerLaw(0.08)])
    >>> round(uniform["weight"].item(), 4)  # the mean of 1, ..., 8
    4.5

    Args:
        files: as for `solve`, but for bare histories.
        targets: decays, or histories that end at the same clock.
        out: for each the path that it is written to; by default they are returned.
        at: as for `solve`.
        limit: as for `solve`.
        dtype: of the averages; None stores them as the newest file does.
        shard_bytes: makes each `out` a folder of files of at most this size, with an index.
        progress: is told how many bytes were read since the last time.

    Returns:
        For each target the tensors by name, or its `Solution` where it was written.

    Raises:
        ValueError: as for `solve`; the files differ in what is averaged, in names or in shapes
            (all differences are listed); the targets are of different clocks; `out` is one of the
            files, or there are more or fewer than targets. Nothing is written.
        TypeError, OSError: as for `solve`.
    """
    _check(files, targets, out, shard_bytes)
    with ExitStack() as stack:
        known = _read(files, targets, stack)
        solutions = [_solved(known, target, at, limit) for target in targets]
        clocks = sorted({solution.at for solution in solutions})
        if len(clocks) != 1:
            raise ValueError(
                f"the targets are at the clocks {clocks}, and the buffers of a model are of one: "
                "reconstruct those of each clock in a call of their own"
            )
        taken = sorted(
            (i for i, file in enumerate(known) if file.history.clock <= clocks[0]),
            key=lambda i: known[i].history.clock,
        )
        rows = [[solution.coefficients[i] for i in taken] for solution in solutions]
        used = [known[i] for i in taken]
        sources, averaged = _sources(used, rows)
        outs: list[Any] = [{} for _ in targets] if out is None else list(out)
        sums.combine(
            sources,
            [
                sums.Target(row, where, _facts(used, averaged, target, row, solution))
                for row, where, target, solution in zip(rows, outs, targets, solutions, strict=True)
            ],
            dtype=dtype,
            shard_bytes=shard_bytes,
            unmatched="keep",  # what must match does; the rest is the newest file's
            progress=progress,
        )
    return outs if out is None else solutions


# ------------------------------------------------------------------------------ what is stored


@dataclass(frozen=True)
class _File:
    """A file whose history is known."""

    name: str
    history: History
    rounding: float
    tensors: Mapping[str, Stored] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None

    @property
    def averaged(self) -> frozenset[str] | None:
        """The names of the averages in it, or None where all of its tensors are alike."""
        names = (self.facts or {}).get("averaged")
        return None if names is None else frozenset(names)


def _read(
    files: Sequence[StrPath | Snapshot | History], targets: Sequence[Average], stack: ExitStack
) -> list[_File]:
    """Open files, and find out what each is."""
    if isinstance(files, (str, os.PathLike, Snapshot, History)) or not files:
        raise TypeError(
            f"an average is made of stored ones, not of {files!r}: pass a list of paths"
        )
    told = [_told(file, number, stack) for number, file in enumerate(files)]
    wrong = [reason for reason in told if isinstance(reason, str)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the {len(files)} files have no profile:{_listed(wrong)}\nleave them "
            "out, or say what they are: Snapshot(path, clock) for the weights at that clock, "
            "Snapshot(path, history) for an average"
        )
    found = [file for file in told if isinstance(file, _File)]
    runs = {file.history.run: file for file in found if file.history.run != _ANY}
    names = {*runs, *(target.run for target in targets if isinstance(target, History))}
    if len(names) > 1:
        lines = [f"{file.name}: of the run {run!r}" for run, file in runs.items()]
        raise ValueError(
            f"the averages are of {len(names)} runs, which have no states in common; of each of "
            f"them one file:{_listed(lines)}\npass those of one run. A run that is resumed without "
            "its EMA's state becomes another one: then say what a file is, with "
            "Snapshot(path, history)"
        )
    run = names.pop() if names else _ANY
    return [
        replace(file, history=History(run, file.history.clock))
        if file.history.run == _ANY
        else file
        for file in found
    ]


_ANY = ""  # the run of plain weights: that of the averages beside them


def _told(file: StrPath | Snapshot | History, number: int, stack: ExitStack) -> _File | str:
    """Return a file, opened, with what it or the caller says of it; or why it has no profile."""
    if isinstance(file, History):
        return _File(f"history {number}", file, _unit([torch.float32]))
    if not isinstance(file, (str, os.PathLike, Snapshot)):
        raise TypeError(
            f"{file!r} of type {type(file).__name__} is nothing stored: pass the path of a file "
            "that EMA.save wrote, or Snapshot(path, clock)"
        )
    path, place = (file.path, file.place) if isinstance(file, Snapshot) else (file, "")
    checkpoint = stack.enter_context(opened(path))
    facts, tensors, name = checkpoint.facts or {}, named(checkpoint.at(place)), str(path)
    history: Any = file.history if isinstance(file, Snapshot) else facts.get("history")
    if history is None:
        return f"{name}: does not say what it is, or is of an average before its first update"
    if not isinstance(file, Snapshot):
        try:
            history = History.from_dict(history)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    elif isinstance(history, int):
        history = History(_ANY, history)
    elif not isinstance(history, History):
        raise TypeError(
            f"{file!r} has neither a clock nor a history: pass an integer, or a History"
        )
    if history.opaque:
        decays = ", ".join(history.opaque)
        return f"{name}: the decay {decays} was an object of the program that wrote it"
    averaged = facts.get("averaged", tensors)
    unit = _unit(stored.dtype for key, stored in tensors.items() if key in averaged)
    return _File(name, history, unit, tensors, facts)


def _unit(dtypes: Iterable[torch.dtype]) -> float:
    """Return the most by which a value is rounded, as a share of it, in the narrowest dtype."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max((torch.finfo(dtype).eps / 2 for dtype in floating), default=0.0)


# ---------------------------------------------------------------------------- what is wanted


def _solved(files: Sequence[_File], target: Average, at: int | None, limit: float) -> Solution:
    """Return the solution, unless it is refused."""
    history = _wanted([file.history for file in files], target, at)
    taken = [i for i, file in enumerate(files) if file.history.clock <= history.clock]
    if not taken:
        first = min(file.history.clock for file in files)
        raise ValueError(
            f"nothing is stored at or before the clock {history.clock}: the oldest of the "
            f"{len(files)} files is at {first}. Ask for an average at that clock or later"
        )
    (fit,) = _fits([files[i] for i in taken], [history])
    if limit < math.inf and not fit.within(limit):
        raise ValueError(_refusal([files[i] for i in taken], target, history, fit, limit))
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


def _wanted(histories: Sequence[History], target: Average, at: int | None) -> History:
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


# -------------------------------------------------------------------------------- least squares


@dataclass(frozen=True)
class _Fit:
    """How near some files come to an average."""

    coefficients: list[float]
    error: float
    amplification: float
    noise: float

    def within(self, limit: float) -> bool:
        return self.error <= limit and self.noise <= _NOISE


def _fits(files: Sequence[_File], wanted: Sequence[History]) -> list[_Fit]:
    """Return how near the files come to each of some averages."""
    count = len(files)
    products = gram([*(file.history for file in files), *wanted])
    stored, fits = products[:count, :count], []
    for number in range(count, len(products)):
        with_target, square = products[:count, number], products[number, number].item()
        distances = stored.diagonal() - 2 * with_target + square
        if distances.min() <= _SAME**2 * square:
            row = torch.zeros(count, dtype=torch.float64)
            row[distances.argmin()] = 1.0
        else:
            row = _least_squares(stored, with_target)
        # What is left of the squares may be less than nothing, by rounding.
        left = (row @ stored @ row - 2 * (row @ with_target)).item() + square
        coefficients = row.tolist()
        sizes = [abs(coefficient) for coefficient in coefficients]
        fits.append(
            _Fit(
                coefficients=coefficients,
                error=math.sqrt(max(left, 0.0) / square),
                amplification=math.fsum(sizes),
                noise=math.fsum(a * b.rounding for a, b in zip(sizes, files, strict=True)),
            )
        )
    return fits


def _least_squares(stored: Tensor, target: Tensor) -> Tensor:
    """Return the c that minimizes c G c - 2 c g, G = stored, g = target, subject to sum c = 1.

    With the profiles scaled to length 1, in the basis of the eigenvectors of G whose eigenvalues
    are above the rounding: there G is diagonal, and the condition is one Lagrange multiplier. What
    is equal gets equal coefficients, as it is equal in every one of these vectors.
    """
    lengths = stored.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(stored / torch.outer(lengths, lengths))
    kept = values > _RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    ones = vectors.T @ (1 / lengths)
    free = (vectors.T @ (target / lengths)) / values
    missing = (1 - ones @ free) / (ones @ (ones / values))
    row: Tensor = (vectors @ (free + missing * ones / values)) / lengths
    row[row.abs().argmax()] += 1 - math.fsum(row.tolist())
    return row


# ------------------------------------------------------------------------------------- refusals


def _refusal(
    files: Sequence[_File], target: Average, history: History, fit: _Fit, limit: float
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
    wanted = "the average of that history" if isinstance(target, History) else repr(target)
    cannot = f"these {len(files)} files cannot give {wanted} at the clock {history.clock}"
    if fit.error > limit:
        return (
            f"{cannot}: it would be off by {fit.error:.0%} of it, more than limit={limit:g}. "
            f"{instead}store averages more often or of more widths, or pass "
            f"limit={math.ceil(fit.error * 100) / 100:g}, and have that error"
        )
    return (
        f"{cannot}: the sizes of its coefficients sum to {fit.amplification:.1f}, so that what was "
        f"rounded off the stored averages grows to {fit.noise:.1%} of the weights, more than "
        f"{_NOISE:.0%}. {instead}store them with save(path, dtype=torch.float32), or pass "
        "limit=math.inf, and have that noise"
    )


def _nearest(
    files: Sequence[_File], target: float | DecayLike, history: History, limit: float
) -> Decay | None:
    """Return the decay of the target's family that is nearest to it among those that are given.

    It looks back 2^x times as far: x = 1, -1, 2, -2, ..., and in parts between the last two.
    """

    def first(powers: Sequence[float]) -> tuple[float, Decay] | None:
        decays = [(x, _scaled(as_decay(target), 2.0**x, history.clock)) for x in powers]
        known = [(x, decay) for x, decay in decays if decay is not None]
        fits = _fits(files, [history.under(decay) for _, decay in known])
        return next((a for a, fit in zip(known, fits, strict=True) if fit.within(limit)), None)

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


def _listed(lines: Sequence[str], most: int = 20) -> str:
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in [*lines[:most], *more])


# ----------------------------------------------------------------------------- what is written


def _check(
    files: Sequence[StrPath | Snapshot],
    targets: Sequence[Average],
    out: Sequence[StrPath] | None,
    shard_bytes: int | None,
) -> None:
    if not isinstance(targets, Sequence) or not targets:
        raise TypeError(f"targets are several averages, not {targets!r}: pass [PowerLaw(0.15)]")
    if isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out is a path for each of the targets, not {out!r}: pass [{out!r}]")
    if any(isinstance(file, History) for file in files):
        raise TypeError(
            "a history has no tensors: pass the path of the file that it is of, or ask solve()"
        )
    if out is None:
        if shard_bytes is not None:
            raise ValueError(
                f"shard_bytes={shard_bytes} is about files that are written, and there is no out: "
                "pass out, or leave out shard_bytes"
            )
        return
    if len(out) != len(targets):
        raise ValueError(
            f"{len(out)} paths for {len(targets)} targets: {list(map(str, out))}; pass one for each"
        )
    read = {Path(f.path if isinstance(f, Snapshot) else f).resolve() for f in files}
    taken = [str(path) for path in out if Path(path).resolve() in read]
    if taken:
        raise ValueError(
            f"out is one of the files that are read: {', '.join(taken)}; other averages can be "
            "made of it as long as it is there. Write to another path"
        )


def _sources(
    files: Sequence[_File], rows: Sequence[Sequence[float]]
) -> tuple[list[Mapping[str, Stored]], list[str]]:
    """Return the tensors of each file that take part, and the names of those that are summed.

    All files have what was averaged; only the newest that says so has the rest.
    """
    sheets = [file.averaged for file in files if file.averaged is not None]
    if len(set(sheets)) > 1:
        everywhere = frozenset.intersection(*sheets)
        some = sorted(frozenset.union(*sheets) - everywhere)
        raise ValueError(
            f"the files do not average the same tensors; {len(some)} are averaged in some of them "
            f"only:{_listed(some)}\npass files that were saved with one policy and one part"
        )
    shared: list[Mapping[str, Stored]] = [file.tensors for file in files]
    if sheets:
        shared = [{n: s for n, s in one.items() if n in sheets[0]} for one in shared]
    outline = sums.outline(shared, rows)
    if outline.differences:
        raise ValueError(
            f"the files differ in {len(outline.differences)} tensors (checkpoint 1 is the oldest, "
            f"{files[0].name}):{_listed(outline.differences)}\npass files of one model; of a "
            "checkpoint with more in it, Snapshot(path, clock, place='model')"
        )
    newest = max(i for i, file in enumerate(files) if not sheets or file.averaged is not None)
    reestimated = {n for file in files for n in (file.facts or {}).get("reestimated", ())}
    if reestimated & set(outline.mixed):
        warnings.warn(
            f"{len(reestimated)} statistics were re-estimated for the stored averages, so that "
            "their sums are not what this average would have found; re-estimate them with "
            "reestimate_statistics, or torch.optim.swa_utils.update_bn",
            stacklevel=3,
        )
    sources = [
        {**file.tensors, **one} if i == newest else one
        for i, (file, one) in enumerate(zip(files, shared, strict=True))
    ]
    return sources, list(outline.mixed)


def _facts(
    files: Sequence[_File],
    averaged: Sequence[str],
    target: Average,
    row: Sequence[float],
    solution: Solution,
) -> dict[str, Any]:
    """Return the fact sheet of an average that was made of others, as `EMA.save` writes it."""
    newest: Mapping[str, Any] = next((f.facts for f in reversed(files) if f.facts), {})
    history = solution.history.to_dict()
    segments = history["segments"]
    if isinstance(target, History):
        decay = segments[-1]["decay"] if segments else to_spec(Constant(0.0))
    else:
        decay = to_spec(as_decay(target))
    return {
        "producer": f"polyak {importlib.metadata.version('polyak')}",
        "format": 1,
        "part": newest.get("part", ""),
        "policy": newest.get("policy", ""),
        "averaged": list(averaged),
        "reestimated": [],
        "left_out": list(newest.get("left_out", ())),
        "clock": solution.at,
        "pending": 0,
        "updates": solution.history.ticks + 1,
        "repeats": 0,
        "nonfinite": 0,
        "decay": decay,
        "history": history,
        "moments": asdict(moments(solution.history)),
        "predicted_error": solution.predicted_error,
        "storage_noise": solution.storage_noise,
        "combined": {
            "rule": "posthoc",
            "sources": [Path(file.name).name for file in files],
            "coefficients": list(row),
        },
    }
