"""RECONSTRUCTION: averages made of stored ones, in memory or as files that say what they are."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from polyak import combine as sums
from polyak.checkpoint import Stored
from polyak.decay import Constant, as_decay, to_spec
from polyak.files import StrPath
from polyak.posthoc.fit import LIMIT
from polyak.posthoc.solution import Average, Solution, histories_among, solved
from polyak.posthoc.stored import File, Snapshot, read
from polyak.profile import History, moments
from polyak.selection import listed

__all__ = ["reconstruct"]


@overload
def reconstruct(
    files: Sequence[StrPath | Snapshot],
    targets: Sequence[Average],
    out: None = None,
    *,
    at: int | None = None,
    limit: float = LIMIT,
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
    limit: float = LIMIT,
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
    limit: float = LIMIT,
    dtype: torch.dtype | None = torch.float32,
    shard_bytes: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Solution] | list[dict[str, Tensor]]:
    """Make averages of stored ones, as `solve` says: all of them in one pass over the files.

    What was averaged is summed, in float64 and in slices. What merely followed the model, integers
    and booleans are those of the newest file that takes part. A file that is written says what it
    is as `EMA.save` does, so that it can be read here again.

    >>> import tempfile
    >>> from polyak import EMA, PowerLaw, Uniform
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
        out: for each the path that it is written to, in the place of a file that is there; by
            default they are returned.
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
        known = read(files, stack, histories_among(targets))
        solutions = [solved(known, target, at, limit) for target in targets]
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
    files: Sequence[File], rows: Sequence[Sequence[float]]
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
            f"only:{listed(some)}\npass files that were saved with one policy and one part"
        )
    shared: list[Mapping[str, Stored]] = [file.tensors for file in files]
    if sheets:
        shared = [{n: s for n, s in one.items() if n in sheets[0]} for one in shared]
    outline = sums.outline(shared, rows)
    if outline.differences:
        raise ValueError(
            f"the files differ in {len(outline.differences)} tensors (checkpoint 1 is the oldest, "
            f"{files[0].name}):{listed(outline.differences)}\npass files of one model; of a "
            "checkpoint with more in it, Snapshot(path, clock, place='model')"
        )
    kept = max(file.nonfinite for file in files)
    if kept:
        warnings.warn(
            f"up to {kept} times an element of the stored averages has kept its value, since the "
            "weight was not finite: it has not seen what the others have, and the predicted error "
            "does not hold for it",
            stacklevel=3,
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
    files: Sequence[File],
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
        "nonfinite": max(file.nonfinite for file in files),
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
