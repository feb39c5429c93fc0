"""EXAMINE: what a checkpoint is, whether it is whole, and how far it is from another.

Tensors are read in slices, so that little is in memory at any moment, whatever their size. This
module only reads, and it judges nothing: what a finding means is up to whoever asked.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak import checkpoint, files, formats
from polyak.checkpoint import Checkpoint, Stored
from polyak.formats import Content
from polyak.state import Facts

__all__ = ["Distance", "Verdict", "describe", "distance", "found_in", "verify"]

Progress = Callable[[int], None]
"""Is told the bytes read since the last call."""


def describe(opened: Checkpoint, at: str = "") -> dict[str, Any]:
    """Say what a checkpoint is, as far as headers tell.

    >>> import tempfile
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a", {"w": torch.ones(2, 3)})
    ...     with checkpoint.opened(f"{folder}/a") as a:
    ...         describe(a)["sets"]
    {'weights': {'tensors': 1, 'elements': 6, 'bytes': 24, 'dtypes': ['float32'], 'decay': None}}

    Args:
        opened: the checkpoint.
        at: the dotted path of the part of it to look at; by default all of it.

    Returns:
        Plain JSON values: `producer`, `container`, `clock`, `sets` (of averages and of weights, by
        name), `averaged` (how many tensors really are, in a file of `EMA.save`), `horizon` (what
        ages the averaged states have, in units of the clock, and how many of them would have as
        little noise), `combined` (what it was made from), `details` (in the producer's own words),
        `tensors`, `bytes`, `files`, and `note`: why what is in it is not known. What is not told
        is None.
    """
    facts: dict[str, Any] = {}
    content, horizon, note = Content("unknown", {}), None, None
    try:
        facts = opened.facts or {}
        content = formats.recognized(opened, at)
        horizon = _horizon(facts) if "moments" in facts else None
    except ValueError as error:
        if at:
            raise
        note = str(error)
    averaged, combined = facts.get("averaged"), facts.get("combined")
    return {
        "path": str(opened.path),
        "container": opened.container,
        "producer": str(facts.get("producer", content.producer)),
        "clock": content.clock,
        "sets": {name: _set(content, name) for name in content.sets},
        "averaged": len(averaged) if isinstance(averaged, list) else None,
        "horizon": horizon,
        "combined": combined if _is_recipe(combined) else None,
        "details": dict(content.details),
        "tensors": len(opened.tensors),
        "bytes": _bytes(opened.tensors.values()),
        "files": [path.name for path in opened.files],
        "note": note,
    }


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Attributes:
        damaged: what is not as it was written, by name, and how that shows.
        nonfinite: how many elements of a tensor are NaN or infinite, by name, where any are.
        checked: what was compared.
        unchecked: what there is nothing to compare with.
    """

    damaged: Mapping[str, str]
    nonfinite: Mapping[str, int]
    checked: Sequence[str]
    unchecked: Sequence[str]


def verify(opened: Checkpoint, progress: Progress | None = None) -> Verdict:
    """Read all of a checkpoint, and compare it with whatever was written down about it.

    polyak's own files have a checksum for each tensor, files of torch.save one for each of their
    entries. Other files have none: that their parts fit together is all that can be known.

    >>> import tempfile
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a", {"v": torch.ones(2), "w": torch.tensor([1.0, torch.nan])})
    ...     with checkpoint.opened(f"{folder}/a") as a:
    ...         verdict = verify(a)
    >>> verdict.damaged, verdict.nonfinite
    ({}, {'w': 1})

    Args:
        opened: the checkpoint.
        progress: is told the bytes read: those of all tensors, then, where there are checksums,
            those of the files.
    """
    progress = progress or _ignore
    damaged: dict[str, str] = {}
    counted: dict[Hashable, int] = {}
    nonfinite: dict[str, int] = {}
    for name, stored in opened.tensors.items():
        try:
            if stored.identity not in counted:
                counted[stored.identity] = sum(map(_nonfinite, _slices(stored, progress)))
        except (ValueError, OSError) as error:
            damaged[name] = str(error)
            continue
        if counted[stored.identity]:
            nonfinite[name] = counted[stored.identity]
    checked = ["every tensor is as long as its shape takes, and can be read"]
    unchecked = []
    if opened.container.startswith("sharded"):
        checked.append("the index leads to every tensor and leaves out none")
    for path in opened.files:
        faults = None
        if opened.container.endswith("safetensors"):
            faults, compared = _own_faults(path, progress), "checksum of every tensor"
        elif opened.container.endswith("torch"):
            faults, compared = _zip_faults(path, progress), "CRC of every entry"
        if faults is None:
            unchecked.append(f"{path.name}: the bytes of its tensors, of which it has no checksums")
        else:
            checked.append(f"{path.name}: the {compared}")
            damaged |= faults
    return Verdict(damaged, nonfinite, checked, unchecked)


@dataclass(frozen=True)
class Distance:
    """How far tensors are from others of the same names.

    Attributes:
        total: `|a - b| / |b|` over all floating elements that both have; NaN if there are none.
        tensors: the same of each tensor that both have, integers included.
        missing: names that only the others have.
        unexpected: names that the others do not have.
        reshaped: names with two shapes, the others' last.
    """

    total: float
    tensors: Mapping[str, float]
    missing: Sequence[str]
    unexpected: Sequence[str]
    reshaped: Mapping[str, tuple[Sequence[int], Sequence[int]]]


def distance(
    tensors: Mapping[str, Stored],
    others: Mapping[str, Stored],
    progress: Progress | None = None,
) -> Distance:
    """Measure how far tensors are from others, in float64.

    >>> import tempfile
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a", {"w": torch.tensor([1.0, 2.0]), "x": torch.ones(1)})
    ...     files.write(f"{folder}/b", {"w": torch.tensor([1.0, 0.0])})
    ...     with checkpoint.opened(f"{folder}/a") as a, checkpoint.opened(f"{folder}/b") as b:
    ...         distance(a.tensors, b.tensors)
    Distance(total=2.0, tensors={'w': 2.0}, missing=[], unexpected=['x'], reshaped={})

    Args:
        tensors: by name.
        others: what they are measured against.
        progress: is told the bytes read, of both.
    """
    progress = progress or _ignore
    common = [name for name in tensors if name in others]
    shapes = {name: (tensors[name].shape, others[name].shape) for name in common}
    reshaped = {name: both for name, both in shapes.items() if both[0] != both[1]}
    found: dict[str, float] = {}
    squares: list[tuple[float, float]] = []
    for name in common:
        if name in reshaped:
            continue
        between = own = 0.0
        pairs = zip(_slices(tensors[name], progress), _slices(others[name], progress), strict=True)
        for left, right in pairs:
            x, y = _wide(left), _wide(right)
            between += float((x - y).square().sum())
            own += float(y.square().sum())
        found[name] = _ratio(between, own)
        if others[name].dtype.is_floating_point or others[name].dtype.is_complex:
            squares.append((between, own))
    return Distance(
        _ratio(*map(math.fsum, zip(*squares, strict=True))) if squares else math.nan,
        found,
        [name for name in others if name not in tensors],
        [name for name in tensors if name not in others],
        reshaped,
    )


def found_in(path: Path) -> list[Path]:
    """Return the checkpoints that a path stands for: itself, or those that lie in the folder.

    >>> import tempfile
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for step in (200, 1000):
    ...         files.write(f"{folder}/step-{step}.safetensors", {"w": torch.ones(1)})
    ...     [path.name for path in found_in(Path(folder))]
    ['step-200.safetensors', 'step-1000.safetensors']

    Args:
        path: a file or a folder.

    Returns:
        In the order of their names, numbers in them by value.
    """
    if not path.is_dir() or _is_one(path):
        return [path]
    inside = [
        entry
        for entry in path.iterdir()
        if (_is_one(entry) if entry.is_dir() else entry.suffix in _ENDINGS)
    ]
    return sorted(inside, key=lambda entry: _natural(entry.name)) or [path]


_ENDINGS = {".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".tar"}


def _is_one(folder: Path) -> bool:
    """Whether a folder is a checkpoint, and not one that has several in it."""
    entries = list(folder.iterdir())
    names = [entry.name for entry in entries if entry.name not in checkpoint.NO_WEIGHTS]
    if ".metadata" in names:
        return True
    if any(entry.is_dir() and _is_one(entry) for entry in entries):
        return False
    found = [name for name in names if Path(name).suffix in _ENDINGS]
    return len(found) == 1 or any(
        len([name for name in names if name.endswith(index)]) == 1
        and all(name.endswith(shard) for name in found)
        for index, shard in (
            (".safetensors.index.json", ".safetensors"),
            (".bin.index.json", ".bin"),
        )
    )


def _natural(name: str) -> list[tuple[float, str]]:
    """Return what puts `step-200` before `step-1000`, and `powerlaw-0.05` before `-0.1`."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(part), "") if part[:1].isdecimal() else (-1.0, part) for part in parts]


def _set(content: Content, name: str) -> dict[str, Any]:
    held = content.sets[name]
    tensors = list(held.values() if isinstance(held, Mapping) else held)
    decay = content.decays.get(name)
    return {
        "tensors": len(tensors),
        "elements": sum(stored.numel() for stored in tensors),
        "bytes": _bytes(tensors),
        "dtypes": sorted({str(stored.dtype).removeprefix("torch.") for stored in tensors}),
        "decay": None if decay is None else repr(decay),
    }


def _bytes(tensors: Iterable[Stored]) -> int:
    """Return what tensors take, those that are one only once."""
    return sum({stored.identity: stored.nbytes for stored in tensors}.values())


def _is_recipe(value: Any) -> bool:
    """Whether a fact says what a file was made from, and how much of each."""
    keys = {"rule", "sources", "coefficients"}
    if not isinstance(value, dict) or not keys <= value.keys():
        return False
    sources, coefficients = value["sources"], value["coefficients"]
    return (
        isinstance(value["rule"], str)
        and isinstance(sources, list)
        and isinstance(coefficients, list)
        and len(sources) == len(coefficients)
        and all(isinstance(source, str) for source in sources)
        and all(type(coefficient) in (int, float) for coefficient in coefficients)
    )


def _horizon(facts: Mapping[str, Any]) -> dict[str, float]:
    moments = Facts.from_state({"averages": {}, "facts": json.dumps(facts)}).moments
    return {
        "mean_age": moments.mean_age,
        "deviation": moments.deviation,
        "effective_samples": moments.effective_samples,
        "largest_share": moments.largest_share,
    }


_ELEMENTS = 1 << 20  # of a slice: 8 MiB in float64


def _slices(stored: Stored, progress: Progress) -> Iterator[Tensor]:
    """Yield a tensor's elements in order. A slice is valid until the next is asked for."""
    count = stored.numel()
    buffer = torch.empty(min(count, _ELEMENTS) * stored.dtype.itemsize, dtype=torch.uint8)
    for start in range(0, count, _ELEMENTS):
        part = stored.slice(start, min(start + _ELEMENTS, count), buffer)
        yield part
        progress(part.numel() * stored.dtype.itemsize)


def _ignore(count: int) -> None:
    pass


def _nonfinite(part: Tensor) -> int:
    if not (part.is_floating_point() or part.is_complex()):
        return 0
    wide = part.float() if part.dtype.itemsize == 1 else part  # torch cannot tell of float8
    return int((~torch.isfinite(wide)).sum())


def _wide(part: Tensor) -> Tensor:
    return torch.view_as_real(part).double() if part.is_complex() else part.double()


def _ratio(squared: float, own: float) -> float:
    if own:
        return math.sqrt(squared / own)
    return math.inf if squared else 0.0


def _own_faults(path: Path, progress: Progress) -> dict[str, str] | None:
    """Return what is damaged in a safetensors file, or None if it has no checksums."""
    with checkpoint.opened(path) as opened:
        if "polyak" not in opened.metadata:
            return None
    try:
        how = f"its bytes in {path.name} do not fit their checksum"
        damaged = dict.fromkeys(files.verify(path), how)
    except ValueError as error:
        damaged = {path.name: str(error)}
    progress(path.stat().st_size)
    return damaged


def _zip_faults(path: Path, progress: Progress) -> dict[str, str] | None:
    """Return the damaged entries of a file of torch.save, or None if it has no checksums."""
    damaged = {}
    with zipfile.ZipFile(path) as archive:
        entries = [entry for entry in archive.infolist() if entry.file_size]
        for entry in entries:
            try:
                with archive.open(entry) as file:
                    while part := file.read(1 << 20):
                        progress(len(part))
            except zipfile.BadZipFile as error:
                damaged[f"{path.name}: {entry.filename}"] = str(error)
    # So it is where torch.serialization.set_crc32_options(False) held: the CRC does not even fit
    # the few bytes that say which version wrote the file.
    return None if len(damaged) == len(entries) else damaged
