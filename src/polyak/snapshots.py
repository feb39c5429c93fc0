"""SNAPSHOTS: a folder of averages, saved while training runs, from which others are made later.

It says when the next one is due, writes it, and keeps the folder within its budget: what goes is
what the averages that can be made of the rest would miss least. The files are those of `EMA.save`.
It may not know what is in them beyond their histories, nor how averages are made of them (`posthoc`
does).
"""

from __future__ import annotations

import itertools
import re
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch

from polyak import engine, files
from polyak.background import Writer
from polyak.checks import refuse_unwritable
from polyak.decay import PowerLaw, as_decay, to_spec
from polyak.ema import EMA
from polyak.posthoc.fit import NOISE, harm
from polyak.profile import History, gram
from polyak.selection import listed

__all__ = ["Geometric", "SnapshotFolder"]

_WIDTHS = (0.03, 0.04, 0.055, 0.075, 0.10, 0.14, 0.19, 0.25)
"""Of the power laws that have to suffer least from what is removed."""

_NAME = re.compile(r"\d{12,}-.+\.safetensors")


@dataclass(frozen=True)
class Geometric:
    """A schedule on which each snapshot comes when the clock has grown by a factor.

    >>> Geometric(1.5, first=100)
    Geometric(ratio=1.5, first=100)

    Args:
        ratio: of the clock at one snapshot and at the one before, above 1.
        first: the clock of the first one, at least 1.

    Raises:
        ValueError: the ratio is not above 1, or `first` not above 0.
    """

    ratio: float
    first: int = 1

    def __post_init__(self) -> None:
        if not self.ratio > 1 or self.first < 1:
            raise ValueError(
                f"{self!r} never comes to a next snapshot: pass a ratio above 1, such as 1.1, and "
                "a first clock of 1 or more"
            )


class SnapshotFolder:
    """A folder that averages are saved to on a schedule, within a budget.

    Whatever is due is saved by `update`, which is called after each step. Two power laws of
    different widths are what most other averages can be made of, with `polyak.posthoc`.

    >>> import tempfile
    >>> from polyak import EMA, PowerLaw
    >>> from polyak.posthoc import reconstruct
    >>> model = torch.nn.Linear(2, 1)
    >>> narrow, wide = EMA(model, PowerLaw(0.05)), EMA(model, PowerLaw(0.10))
    >>> with tempfile.TemporaryDirectory() as path:
    ...     with SnapshotFolder(path, [narrow, wide], every=100, most_files=12) as folder:
    ...         for step in range(1, 1001):
    ...             _ = torch.nn.init.normal_(model.weight)
    ...             narrow.update(step)
    ...             wide.update(step)
    ...             _ = folder.update()
    ...     len(folder.files)
    ...     averages = reconstruct(folder.files, [PowerLaw(0.07)])[0]
    12

    A run that goes on after an interruption makes it after the EMAs have loaded their state. Then,
    and whenever they load an earlier state, snapshots of steps that are made anew are set aside:
    they get the ending `.abandoned`, with a warning.

    Its methods are called in the thread that updates the averages. Where the model is sharded all
    processes make one and call its methods, as for `EMA.save`. Elsewhere one process does.

    Args:
        path: the folder; made if it is not there.
        emas: averages of one model, of different decays, that are updated together.
        every: a snapshot whenever the clock passes a multiple of this, in its units; or a
            `Geometric` schedule.
        most_files: the largest number of files; by default any. When there are more, the one goes
            without which the power laws of widths .03 to .25 at the present clock are
            reconstructed best, by predicted error. The newest of each average stays.
        most_bytes: the largest size of all files together; by default any. New files are written
            before older ones are removed, so that there has to be room for one snapshot more.
        dtype: of the files; a narrower one than float32 limits what can be made of them.
        averages_only: leave out what merely follows the model (LoRA: adapters only).
        background: copy the averages into buffers in host memory, as large as the snapshot, and
            write from there while training goes on. A write that fails is raised by the next call.

    Raises:
        ValueError: there is no EMA, two are alike, or one has a decay of your own, whose snapshots
            could not be used; the schedule or a budget is too small; the folder holds snapshots of
            another run.
        TypeError: an argument is of another kind.
        OSError: the folder cannot be made or read.

    Source: EDM2 (arXiv 2312.02696), section 3.2, keeps two widths; schedule and budget are ours.
    """

    def __init__(
        self,
        path: files.StrPath,
        emas: Sequence[EMA],
        every: int | Geometric,
        *,
        most_files: int | None = None,
        most_bytes: int | None = None,
        dtype: torch.dtype = torch.float32,
        averages_only: bool = False,
        background: bool = False,
    ) -> None:
        self._emas, self._every = _labeled(emas), every
        _check_schedule(every)
        _check_budget(len(emas), most_files, most_bytes)
        _check_dtype(dtype)
        self._path = Path(path).absolute()
        self._most_files, self._most_bytes = most_files, most_bytes
        self._dtype, self._averages_only = dtype, averages_only
        self._path.mkdir(parents=True, exist_ok=True)
        own = next(iter(self._emas.values())).history
        self._kept = _of_this_run(_found(self._path), own, self._path)
        self._tried = _newest_clock(self._kept)  # when it was due last
        self._seen = 0 if own is None else own.clock  # by the last `update`
        self._writer = Writer() if background else None
        if self._writer is not None:  # also where nobody asks again, at the end of the program
            weakref.finalize(self, self._writer.wait)

    @property
    def files(self) -> list[Path]:
        """The snapshots, the oldest first: what `polyak.posthoc` takes. Waits until all are there.

        Raises what a write in the background has failed with.
        """
        self.close()
        return _listed(self._path)

    def update(self) -> bool:
        """Save the averages if that is due.

        Asks the first of them for its clock; where only a GPU knows whether the last step was one
        (GradScaler with a fused optimizer), that waits for it.

        Returns:
            Whether it was due.

        Raises:
            ValueError, OSError: as for `save`; also what a write in the background has failed with.
        """
        if self._writer is not None:
            self._writer.check()
        clock = next(iter(self._emas.values())).clock
        if clock < self._seen:
            self._go_back()
        self._seen = clock
        due = _is_due(self._every, clock, self._tried)
        if due:
            self.save()
        return due

    def save(self) -> None:
        """Save the averages now, and remove what is beyond the budget.

        Does nothing if it was done at this clock. Whatever fails, no older file is gone.

        Raises:
            ValueError: the averages have made no update, are at different clocks, or of different
                models; the newest files alone are beyond the budget; or as for `EMA.save` and, in
                the background, `EMA.contents`.
            OSError: a file cannot be written; also one in the background, before.
        """
        self.close()
        histories = _together(self._emas)
        now = next(iter(histories.values()))
        self._kept = _of_this_run(self._kept, now, self._path)
        there = {one.label for one in self._kept if one.history.clock == now.clock}
        self._tried = now.clock  # what fails now is tried again when the next one is due
        if there >= set(self._emas):
            return
        paths = {
            label: self._path / f"{now.clock:012d}-{label}.safetensors" for label in self._emas
        }
        _refuse_others(paths.values(), self._kept)
        if self._writer is None:
            writes = _writes(self._emas)
            for label, ema in self._emas.items():
                ema.save(paths[label], dtype=self._dtype, averages_only=self._averages_only)
                self._keep(paths[label], label, histories[label])
            if writes:
                self._thin()
            return
        copies = {}
        for label, ema in self._emas.items():
            tensors, facts = ema.contents(dtype=self._dtype, averages_only=self._averages_only)
            copies[label] = self._writer.copied(label, tensors), facts

        def write() -> None:
            for label, contents in copies.items():
                files.write(paths[label], *contents)
                self._keep(paths[label], label, histories[label])
            self._thin()

        self._writer.begin(write)

    def close(self) -> None:
        """Wait until all is written. Raises what a write in the background has failed with."""
        if self._writer is not None:
            self._writer.wait()

    def __enter__(self) -> SnapshotFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Save what the averages are in the end, unless the block failed, and close."""
        if kind is not None:
            try:
                self.close()
            except Exception as failed:  # the block's own error goes first
                warnings.warn(f"a snapshot could not be written: {failed}", stacklevel=2)
            return
        try:
            self.close()
        finally:  # also where an earlier write has failed
            begun = all(ema.history is not None for ema in self._emas.values())
            # An earlier state that was loaded in the end is to be looked at, not gone on from.
            if begun and next(iter(self._emas.values())).clock >= self._seen:
                self.save()
                self.close()

    # ------------------------------------------------------------------ the budget, inside

    def _go_back(self) -> None:
        """Set aside what is of steps that are made anew, after an earlier state was loaded."""
        self.close()
        now = next(iter(self._emas.values())).history
        if now is not None:
            self._kept = _of_this_run(self._kept, now, self._path)
            self._tried = _newest_clock(self._kept)

    def _keep(self, path: Path, label: str, history: History) -> None:
        if self._most_files is None and self._most_bytes is None:
            history = history.state(history.clock)  # nothing is asked of the others
        self._kept = [one for one in self._kept if one.path != path]
        self._kept.append(_Kept(path, label, history, path.stat().st_size))

    def _thin(self) -> None:
        """Remove files until the others are within the budget."""
        if not self._excess(self._kept):
            return
        self._kept = [one for one in self._kept if one.path.exists()]
        left = list(self._kept)
        newest = {one.label: one for one in sorted(left, key=lambda one: one.history.clock)}
        bound = {newest[label] for label in self._emas if label in newest}
        longest = max(bound, key=lambda one: (one.history.clock, one.history.ticks))
        wanted = [longest.history.under(PowerLaw(width)) for width in _WIDTHS]
        products = gram([*(one.history for one in left), *wanted])
        while excess := self._excess(left):
            spare = [i for i, one in enumerate(left) if one not in bound]
            if not spare:
                raise ValueError(
                    f"the newest snapshots alone are beyond the budget: {excess}. Give more, or "
                    "pass averages_only=True, which leaves out what merely follows the model"
                )
            missed = harm(products, len(left))
            number = min(spare, key=lambda i: missed[i])
            left[number].path.unlink(missing_ok=True)
            self._kept.remove(left.pop(number))
            rest = [i for i in range(len(products)) if i != number]
            products = products[rest][:, rest]

    def _excess(self, kept: Sequence[_Kept]) -> str:
        """Return in words by what some files are beyond the budget; empty if they are not."""
        size = sum(one.bytes for one in kept)
        if self._most_files is not None and len(kept) > self._most_files:
            return f"{len(kept)} files, most_files={self._most_files}"
        if self._most_bytes is not None and size > self._most_bytes:
            return f"{size} bytes, most_bytes={self._most_bytes}"
        return ""


# --------------------------------------------------------------------------- what is in the folder


@dataclass(frozen=True, eq=False)
class _Kept:
    """A file of the folder."""

    path: Path
    label: str
    history: History
    bytes: int


def _listed(folder: Path) -> list[Path]:
    """Return the snapshots in a folder, by their clocks."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name))


def _found(folder: Path) -> list[_Kept]:
    """Return what is in a folder, as far as it is snapshots."""
    found = []
    for path in _listed(folder):
        with suppress(FileNotFoundError):  # set aside by another process
            try:
                history = History.from_dict(files.read_facts(path)["history"])
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{str(path)!r} has the name of a snapshot, and is none ({error}): remove it "
                    "from the folder"
                ) from error
            label = path.stem.partition("-")[2]
            found.append(_Kept(path, label, history, path.stat().st_size))
    return found


def _of_this_run(kept: list[_Kept], now: History | None, folder: Path) -> list[_Kept]:
    """Return which snapshots are of a run that is where it is now; others are set aside."""
    if not kept:
        return kept
    others = [one for one in kept if now is None or one.history.run != now.run]
    if now is None or others:
        raise ValueError(
            f"{str(folder)!r} holds {len(others)} snapshots of another run, with which nothing "
            f"can be made of those of this one:{listed([one.path.name for one in others])}\npass "
            "another folder; or if this run goes on with that one, load the states of its EMAs "
            "first: ema.load_state_dict(state)"
        )
    away = [one for one in kept if one.history.clock > now.clock or one.history.diverges(now)]
    moved = [_set_aside(one.path) for one in away]
    if moved:
        warnings.warn(
            f"the run goes on from an earlier state, at the clock {now.clock} now, and "
            f"{len(moved)} snapshots are of steps that it makes anew, perhaps otherwise. They were "
            f"renamed:{listed(moved)}\nremove them, unless that run is to go on instead",
            stacklevel=4,
        )
    return [one for one in kept if one not in away]


def _set_aside(path: Path) -> str:
    """Give a file another name, one that nothing has; return it."""
    for number in itertools.count(1):
        name = f"{path.name}.abandoned" + (f"-{number}" if number > 1 else "")
        if not path.with_name(name).exists():
            with suppress(FileNotFoundError):  # by another process
                path.rename(path.with_name(name))
            return name
    raise AssertionError("there is always another number")


def _refuse_others(paths: Iterable[Path], kept: Sequence[_Kept]) -> None:
    """Refuse to write over what this run has not written."""
    own = {one.path for one in kept}
    foreign = [path.name for path in paths if path.exists() and path not in own]
    if foreign:
        raise FileExistsError(
            f"there are files that this run has not written:{listed(foreign)}\nanother run writes "
            "to this folder: give each run a folder of its own"
        )


def _newest_clock(kept: Sequence[_Kept]) -> int:
    return max((one.history.clock for one in kept), default=0)


# ------------------------------------------------------------------------------ what is asked for


def _is_due(every: int | Geometric, clock: int, saved: int) -> bool:
    if isinstance(every, Geometric):
        return clock >= max(every.first, saved * every.ratio)
    return clock // every > saved // every


def _together(emas: Mapping[str, EMA]) -> dict[str, History]:
    """Return the histories of averages that are snapshots of one moment."""
    histories = {label: ema.history for label, ema in emas.items()}
    begun = {label: history for label, history in histories.items() if history is not None}
    if len(begun) < len(histories):
        names = ", ".join(repr(emas[label].decay) for label in histories if label not in begun)
        raise ValueError(
            f"{names}: no update has been made, and there is nothing to save. Call update() of the "
            "folder after those of the averages"
        )
    clocks = {repr(emas[label].decay): history.clock for label, history in begun.items()}
    if len(set(clocks.values())) > 1:
        each = ", ".join(f"{decay} at {clock}" for decay, clock in clocks.items())
        raise ValueError(
            f"the averages are at different clocks: {each}. Update all of them before the folder"
        )
    if len({history.run for history in begun.values()}) > 1:
        raise ValueError(
            "the averages are of different models or runs, and nothing can be made of snapshots of "
            "both: pass EMAs of one model, and after an interruption the states of all of them"
        )
    opaque = [name for history in begun.values() for name in history.opaque]
    if opaque:
        raise ValueError(
            f"the averages were made with {', '.join(opaque)} for a while, an object of another "
            "program: nothing can be made of their snapshots. Begin anew with a decay of "
            "polyak.decay"
        )
    first, *others = begun.values()
    if any(first.diverges(other) for other in others):
        raise ValueError(
            "the averages have gone on from states of different moments, and nothing can be made "
            "of snapshots of both: load the states of all of them before the next step, or of none"
        )
    return begun


def _writes(emas: Mapping[str, EMA]) -> bool:
    """Whether this process is the one that writes, of those that share a model."""
    groups = engine.groups([t for ema in emas.values() for t in ema.averages.values()])
    return not groups or torch.distributed.get_rank() == min(engine.exchange(None, groups))


def _labeled(emas: Sequence[EMA]) -> dict[str, EMA]:
    """Return averages by what their files are named after."""
    if not isinstance(emas, Sequence) or not all(isinstance(ema, EMA) for ema in emas):
        raise TypeError(f"the averages are a list of EMAs, not {emas!r}: pass [narrow, wide]")
    own = [ema.decay for ema in emas if to_spec(as_decay(ema.decay))["type"] == "opaque"]
    if own:
        raise ValueError(
            f"{', '.join(map(repr, own))} is an object of this program: nothing can be made of its "
            "snapshots where it is not known. Use a decay of polyak.decay"
        )
    labeled = {_label(ema.decay): ema for ema in emas}
    if len(labeled) < len(emas) or not emas:
        raise ValueError(
            f"nothing is made of {[ema.decay for ema in emas]}, which are none or alike: pass "
            "averages of different widths, such as PowerLaw(0.05) and PowerLaw(0.10)"
        )
    return labeled


def _label(decay: object) -> str:
    """Return what names a decay in a file name.

    >>> from polyak.decay import Debiased
    >>> _label(Debiased(0.9))
    'debiased-constant-0.9'
    """
    values = re.sub(r"\w+=", "", repr(decay))
    return re.sub(r"[^a-z0-9.+]+", "-", values.lower()).strip("-")


def _check_schedule(every: int | Geometric) -> None:
    if isinstance(every, Geometric):
        return
    if type(every) is not int:
        raise TypeError(
            f"every={every!r} is neither an integer nor a schedule: write every=1000, in units of "
            "the clock, or every=Geometric(1.1)"
        )
    if every < 1:
        raise ValueError(f"every={every}: pass a number of 1 or more, in units of the clock")


def _check_budget(averages: int, most_files: int | None, most_bytes: int | None) -> None:
    for name, most, least in (("most_files", most_files, averages), ("most_bytes", most_bytes, 1)):
        if most is not None and type(most) is not int:
            raise TypeError(f"{name}={most!r} is no integer: write it out, as in 5_000_000_000")
        if most is not None and most < least:
            raise ValueError(
                f"{name}={most} is too little for one snapshot of each average: pass {least} or "
                "more"
            )


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype is None:
        raise TypeError("dtype=None is none: pass torch.float32, the default, or a narrower one")
    refuse_unwritable(dtype)
    unit = torch.finfo(dtype).eps / 2
    if dtype.itemsize < torch.float32.itemsize:
        warnings.warn(
            f"{dtype} rounds by up to {unit:.2%}, which a reconstruction multiplies by the sizes "
            f"of its coefficients: where these sum to more than {NOISE / unit:.1f}, it is refused. "
            "torch.float32, the default, takes twice the bytes",
            stacklevel=3,
        )
