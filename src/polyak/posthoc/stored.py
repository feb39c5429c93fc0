"""STORED: what takes part, and what each file says of itself or the caller of it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from polyak.checkpoint import Stored, named, opened
from polyak.files import StrPath
from polyak.profile import History
from polyak.selection import listed

__all__ = ["File", "Snapshot", "read"]


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
class File:
    """A file whose history is known, or that history alone."""

    name: str
    history: History
    rounding: float
    tensors: Mapping[str, Stored] = field(default_factory=dict)
    facts: Mapping[str, Any] | None = None

    @property
    def error(self) -> float:
        """By what share of its length its profile may differ: of what was reconstructed itself."""
        return float((self.facts or {}).get("predicted_error", 0.0))

    @property
    def nonfinite(self) -> int:
        """How often one of its elements has kept its average, since a weight was not finite."""
        return int((self.facts or {}).get("nonfinite", 0))

    @property
    def averaged(self) -> frozenset[str] | None:
        """The names of the averages in it, or None where all of its tensors are alike."""
        names = (self.facts or {}).get("averaged")
        return None if names is None else frozenset(names)


def read(
    files: Sequence[StrPath | Snapshot | History],
    stack: ExitStack,
    wanted: Sequence[History] = (),
) -> list[File]:
    """Open files, and find out what each is.

    Args:
        files: as for `solve`.
        stack: closes them.
        wanted: what some averages that are wanted have seen.

    Raises:
        ValueError: some do not tell what they are, or they are of different runs, or of steps
            that one run has made twice.
        TypeError: something is no file.
        OSError: a file cannot be read.
    """
    if isinstance(files, str) or not isinstance(files, Sequence) or not files:
        raise TypeError(
            f"an average is made of stored ones, not of {files!r}: pass a list of paths, such as "
            "the files of a SnapshotFolder, or sorted(Path('run').glob('*.safetensors'))"
        )
    try:
        told = [_told(file, number, stack) for number, file in enumerate(files)]
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        raise OSError(
            error.errno,
            f"{len(files)} files are more than this process may have open at once: pass fewer, or "
            f"allow more, with `ulimit -n {2 * len(files) + 100}` in the shell",
        ) from None
    wrong = [reason for reason in told if isinstance(reason, str)]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of the {len(files)} files have no profile:{listed(wrong)}\nleave them "
            "out, or say what they are: Snapshot(path, clock) for the weights at that clock, "
            "Snapshot(path, history) for an average"
        )
    found = [file for file in told if isinstance(file, File)]
    of = {file.history.run: file for file in found if file.history.run != _ANY}
    names = {*of, *(history.run for history in wanted)}
    if len(names) > 1:
        lines = [f"{file.name}: of the run {run!r}" for run, file in of.items()]
        raise ValueError(
            f"the averages are of {len(names)} runs, which have no states in common; of each of "
            f"them one file:{listed(lines)}\npass those of one run. A run that is resumed without "
            "its EMA's state becomes another one: then say what a file is, with "
            "Snapshot(path, history)"
        )
    if not names:
        return found
    run = names.pop()
    told_of = [file for file in found if file.history.run == run]
    _refuse_branches(told_of)
    histories = [*(file.history for file in told_of), *wanted]
    longest = max(histories, key=lambda history: history.clock, default=History(run))
    return [
        replace(file, history=longest.state(file.history.clock))
        if file.history.run == _ANY
        else file
        for file in found
    ]


def _refuse_branches(files: Sequence[File]) -> None:
    """Refuse states of one clock that are not the same: of steps that were made twice."""
    longest = max(files, key=lambda file: file.history.clock, default=None)
    if longest is None:
        return
    away = [file.name for file in files if file.history.diverges(longest.history)]
    if away:
        raise ValueError(
            f"the run was gone on with from a checkpoint, and {len(away)} of the {len(files)} "
            f"averages are of other steps than {longest.name}, at the same clocks:{listed(away)}\n"
            "pass those of one way only: leave these out, or that one and those that go with it"
        )


_ANY = ""  # the run of plain weights: that of the averages beside them


def _told(file: StrPath | Snapshot | History, number: int, stack: ExitStack) -> File | str:
    """Return a file, opened, with what it or the caller says of it; or why it has no profile."""
    if isinstance(file, History):
        return File(f"history {number}", file, _unit([torch.float32]))
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
        if (facts.get("history") or {}).get("segments"):
            raise ValueError(
                f"{name} says that it is an average, and {file!r} that it has the weights of one "
                "clock: pass the path alone, or a Snapshot with another history"
            )
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
    return File(name, history, unit, tensors, facts)


def _unit(dtypes: Iterable[torch.dtype]) -> float:
    """Return the most by which a value is rounded, as a share of it, in the narrowest dtype."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max((torch.finfo(dtype).eps / 2 for dtype in floating), default=0.0)
