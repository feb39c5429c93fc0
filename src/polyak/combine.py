"""COMBINE: weighted sums of checkpoints, a slice of a tensor at a time.

    out[name] = sum over the files i of c_i file_i[name]

Accumulated in float64, whatever the files hold, and cast once, at the end. However large the files,
what is in memory are a few slices: one being mixed while a thread reads the next ones. Nothing here
knows what a file is (`checkpoint` and `files` do), nor why the coefficients are what they are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from polyak import files
from polyak.checkpoint import Stored
from polyak.files import Promise, Put, StrPath
from polyak.selection import listed

__all__ = ["Outline", "Target", "combine", "ema", "lr_decay", "outline", "uniform"]

Unmatched = Literal["refuse", "drop", "keep"]

_SLICE_BYTES = 4 << 20  # of float64, and of what is read; larger ones leave the caches
_BUFFERS = 4  # one being mixed, one being read, and what evens out the two


@dataclass(frozen=True)
class Target:
    """One of the sums that are wanted.

    Attributes:
        coefficients: one for each checkpoint.
        out: where it is written, or a dictionary that gets its tensors.
        facts: for the file's fact sheet.
    """

    coefficients: Sequence[float]
    out: StrPath | dict[str, Tensor]
    facts: Mapping[str, files.JSON] | None = None


@dataclass(frozen=True)
class Outline:
    """What becomes of the tensors of some checkpoints.

    Attributes:
        promised: dtype and shape of what is written, by name.
        mixed: names of the tensors that are weighted sums.
        copied: name -> the number of the checkpoint that it is copied from: the newest that has it.
        dropped: names that are left out.
        differences: where the checkpoints differ, a line each.
        read_bytes: how much is read of the checkpoints.
    """

    promised: Mapping[str, Promise]
    mixed: Sequence[str]
    copied: Mapping[str, int]
    dropped: Sequence[str]
    differences: Sequence[str]
    read_bytes: int


def combine(
    sources: Sequence[Mapping[str, Stored]],
    targets: Sequence[Target],
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
    unmatched: Unmatched = "refuse",
    progress: Callable[[int], object] | None = None,
) -> Outline:
    """Write weighted sums of checkpoints, all of them in one pass over the files.

    Floating tensors are summed; integers and booleans are copied from the newest. Where a file
    leaves out a name that another file ties to a tensor that it has, that tensor is taken.

    >>> import tempfile
    >>> from polyak import checkpoint, combine, files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for i in range(2):
    ...         files.write(f"{folder}/{i}.safetensors", {"w": torch.full((2,), float(i))})
    ...     with (
    ...         checkpoint.opened(f"{folder}/0.safetensors") as a,
    ...         checkpoint.opened(f"{folder}/1.safetensors") as b,
    ...     ):
    ...         out: dict[str, torch.Tensor] = {}
    ...         _ = combine.combine([a.tensors, b.tensors], [combine.Target([0.25, 0.75], out)])
    >>> out
    {'w': tensor([0.7500, 0.7500])}

    Args:
        sources: the tensors of each checkpoint, the newest last.
        targets: the sums. What each writes appears when all is done.
        dtype: of the floating tensors that are written; by default those of the newest.
        shard_bytes: makes each `out` a folder of files of at most this size, with an index.
        unmatched: what to do about tensors that not all have in one shape and kind: refuse (all
            are listed), drop them, or keep those of the newest checkpoint that has them.
        progress: is told how many bytes were read since the last time.

    Returns:
        What became of the tensors.

    Raises:
        ValueError: the checkpoints differ, a coefficient is missing or not finite, or an element
            of a sum would not be finite; nothing is written.
        OSError: a file cannot be read or written.
    """
    rows = [_checked(target.coefficients, len(sources)) for target in targets]
    plan = outline(sources, rows, dtype=dtype, unmatched=unmatched)
    if unmatched == "refuse" and plan.differences:
        raise ValueError(
            f"the checkpoints differ in {len(plan.differences)} tensors:"
            f"{listed(plan.differences)}\npass unmatched='drop' to leave these out, or 'keep' to "
            "take them from the newest checkpoint that has them"
        )
    with ExitStack() as stack:
        puts: list[Put] = [
            stack.enter_context(
                _filling(target.out, plan.promised)
                if isinstance(target.out, dict)
                else files.writing(target.out, plan.promised, target.facts, shard_bytes)
            )
            for target in targets
        ]
        parts = list(_parts(_resolved(sources), _used(rows), plan))
        reads = stack.enter_context(_ahead(read for part in parts for read in part.reads))
        wide = torch.empty(_SLICE_BYTES // 8, dtype=torch.float64, device="cpu")
        totals = torch.empty(len(rows), len(wide), dtype=torch.float64, device="cpu")
        for part in parts:
            for number, read in enumerate(part.reads):
                elements = next(reads)
                if progress is not None:
                    progress(elements.nbytes)
                if part.copied:
                    for put in puts:
                        put(elements)
                else:
                    coefficients = [row[read.source] for row in rows]
                    _add(elements, coefficients, wide, totals, afresh=not number)
            if not part.copied:
                for put, total in zip(puts, totals, strict=True):
                    put(_cast(total, part, plan.promised[part.name].dtype))
    return plan


def outline(
    sources: Sequence[Mapping[str, Stored]],
    rows: Sequence[Sequence[float]],
    *,
    dtype: torch.dtype | None = None,
    unmatched: Unmatched = "refuse",
) -> Outline:
    """Return what `combine` would do with these checkpoints and coefficients, reading nothing."""
    found = _resolved(sources)
    promised: dict[str, Promise] = {}
    mixed, copied, dropped, differences, read = [], {}, [], [], 0
    used = _used(rows)
    for name in dict.fromkeys(name for source in reversed(found) for name in source):
        kinds = [source.get(name) for source in found]
        newest, kind = [(i, kind) for i, kind in enumerate(kinds) if kind is not None][-1]
        difference = _difference(name, kinds) or _codes(name, kind)
        if difference:
            differences.append(difference)
        if difference and unmatched == "drop":
            dropped.append(name)
            continue
        floating = kind.dtype.is_floating_point or kind.dtype.is_complex
        if floating and not difference:
            mixed.append(name)
            own = dtype and (dtype.to_complex() if kind.dtype.is_complex else dtype)
            promised[name] = Promise(own or kind.dtype, kind.shape)
            read += sum(k.nbytes for i in used if (k := kinds[i]) is not None)
        else:
            copied[name] = newest
            promised[name] = Promise(kind.dtype, kind.shape)
            read += kind.nbytes
    return Outline(promised, mixed, copied, dropped, differences, read)


def uniform(count: int) -> list[float]:
    """Return the coefficients of the mean.

    >>> uniform(4)
    [0.25, 0.25, 0.25, 0.25]
    """
    return [1.0 / count] * count


def ema(count: int, decay: float) -> list[float]:
    """Return the coefficients of an exponential moving average that began with the oldest.

    c_0 = d^(n-1), c_j = (1 - d) d^(n-1-j).

    >>> ema(3, 0.5)
    [0.25, 0.25, 0.5]

    Args:
        count: the number of checkpoints, the newest last.
        decay: the share of the average that each newer checkpoint leaves, 0 to 1.

    Raises:
        ValueError: the decay is out of range.
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(
            f"a decay is the share of the average that is kept, 0 to 1, and is {decay}; pass one "
            "such as 0.9"
        )
    return [(1.0 - decay if j else 1.0) * decay ** (count - 1 - j) for j in range(count)]


def lr_decay(count: int, kind: Literal["linear", "1-sqrt", "cosine"]) -> list[float]:
    """Return the coefficients whose sum is what decaying the learning rate would have given.

    Of k + 1 checkpoints: the updates between them, times multipliers 1 >= w_1 >= ... >= w_k, added
    to the first one. c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k, with w_j = f(j / (k + 1)): f(x)
    = 1 - x (which is the mean), 1 - sqrt(x), or (1 + cos(pi x)) / 2.

    >>> [round(c, 4) for c in lr_decay(4, "1-sqrt")]
    [0.5, 0.2071, 0.1589, 0.134]

    Args:
        count: the number of checkpoints, the newest last.
        kind: the form of the decay.

    Source: Tian et al. 2025 (WSM), arXiv 2507.17634.
    """
    form: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1.0 - x,
        "1-sqrt": lambda x: 1.0 - math.sqrt(x),
        "cosine": lambda x: (1.0 + math.cos(math.pi * x)) / 2.0,
    }
    if kind not in form:
        raise ValueError(f"there is no decay {kind!r}; pass one of {', '.join(form)}")
    multipliers = [form[kind](j / count) for j in range(count)] + [0.0]
    return [multipliers[j] - multipliers[j + 1] for j in range(count)]


# ------------------------------------------------------------------------------- what is in common


def _resolved(sources: Sequence[Mapping[str, Stored]]) -> list[dict[str, Stored]]:
    """Return the tensors of each checkpoint, with the names that others tie to them."""
    tied: dict[tuple[str, ...], None] = {}
    for source in sources:
        ties: dict[Hashable, list[str]] = {}
        for name, stored in source.items():
            ties.setdefault(stored.identity, []).append(name)
        tied |= dict.fromkeys(tuple(names) for names in ties.values() if len(names) > 1)
    found = [dict(source) for source in sources]
    for source, resolved in zip(sources, found, strict=True):
        for names in tied:
            here = next((source[name] for name in names if name in source), None)
            if here is not None:
                for name in names:
                    resolved.setdefault(name, here)
    return found


def _used(rows: Sequence[Sequence[float]]) -> list[int]:
    """Return the numbers of the checkpoints that any sum takes something of."""
    return [number for number, column in enumerate(zip(*rows, strict=True)) if any(column)]


# The last part of the names that quantizers give to codes, which mean nothing without their scales.
_QUANTIZED = {"qweight", "qzeros", "g_idx", "absmax", "SCB", "quant_map", "weight_packed"}


def _codes(name: str, kind: Stored) -> str:
    """Return why a tensor that holds codes cannot be averaged; empty if it holds none."""
    if name.rpartition(".")[2] in _QUANTIZED and not kind.dtype.is_floating_point:
        return f"{name}: codes of a quantized weight ({kind.dtype}), which have no mean"
    return ""


def _difference(name: str, kinds: Sequence[Stored | None]) -> str:
    """Return in what the checkpoints differ about a tensor; empty if in nothing that matters."""
    missing = [i + 1 for i, kind in enumerate(kinds) if kind is None]
    if missing:
        return f"{name}: not in {_numbered(missing)}"
    there = [kind for kind in kinds if kind is not None]
    shapes = {kind.shape for kind in there}
    if len(shapes) > 1:
        return f"{name}: {', '.join(str(kind.shape) for kind in there)}"
    if len({(kind.dtype.is_floating_point, kind.dtype.is_complex) for kind in there}) > 1:
        return f"{name}: {', '.join(str(kind.dtype) for kind in there)}"
    return ""


def _numbered(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    return f"checkpoint{'s' if len(numbers) > 1 else ''} {shown}"


def _checked(coefficients: Sequence[float], count: int) -> list[float]:
    row = [float(c) for c in coefficients]
    if len(row) != count or not all(map(math.isfinite, row)) or not any(row):
        raise ValueError(
            f"{len(row)} coefficients for {count} checkpoints: {row}; pass a finite number for "
            "each, not all of them 0"
        )
    return row


# ------------------------------------------------------------------------------- slice by slice


class _Read(NamedTuple):
    source: int  # the number of the checkpoint
    stored: Stored
    start: int
    stop: int


class _Part(NamedTuple):
    """A slice of a tensor, in the order in which it is written."""

    name: str
    size: int  # in elements
    reads: Sequence[_Read]
    copied: bool


def _parts(
    found: Sequence[Mapping[str, Stored]], used: Sequence[int], plan: Outline
) -> Iterator[_Part]:
    for name in files.writing_order(plan.promised):
        copied = name in plan.copied
        sources = {i: found[i][name] for i in ([plan.copied[name]] if copied else used)}
        # Of a slice there has to be room for what is read, and for its numbers in float64.
        numbers = 2 if plan.promised[name].dtype.is_complex else 1
        widest = max([8 * numbers, *(stored.dtype.itemsize for stored in sources.values())])
        numel, step = math.prod(plan.promised[name].shape), _SLICE_BYTES // widest
        for start in range(0, numel, step):
            stop = min(numel, start + step)
            reads = [_Read(i, stored, start, stop) for i, stored in sources.items()]
            yield _Part(name, stop - start, reads, copied)


@contextmanager
def _ahead(reads: Iterable[_Read]) -> Iterator[Iterator[Tensor]]:
    """Yield what yields what is read, of which a thread has always read some more."""
    with ThreadPoolExecutor(1, thread_name_prefix="polyak-read") as pool:
        waiting: deque[tuple[Future[Tensor], Tensor]] = deque()

        def results() -> Iterator[Tensor]:
            coming = iter(reads)
            free = [
                torch.empty(_SLICE_BYTES, dtype=torch.uint8, device="cpu") for _ in range(_BUFFERS)
            ]
            while True:
                while free and (read := next(coming, None)) is not None:
                    buffer = free.pop()
                    job = pool.submit(read.stored.slice, read.start, read.stop, buffer)
                    waiting.append((job, buffer))
                if not waiting:
                    return
                job, buffer = waiting.popleft()
                yield job.result()
                free.append(buffer)

        try:
            yield results()
        finally:
            for job, _ in waiting:
                job.cancel()


@contextmanager
def _filling(out: dict[str, Tensor], promised: Mapping[str, Promise]) -> Iterator[Put]:
    """Open a dictionary that gets its tensors when the block ends."""
    names = files.writing_order(promised)
    made = {
        name: torch.empty(tuple(promised[name].shape), dtype=promised[name].dtype, device="cpu")
        for name in names
    }
    left = [tensor.view(-1) for tensor in made.values() if tensor.numel()]
    left.reverse()

    def put(elements: Tensor) -> None:
        tensor = left.pop()
        tensor[: len(elements)].copy_(elements)
        if len(elements) < len(tensor):
            left.append(tensor[len(elements) :])

    yield put
    out.update({name: made[name] for name in promised})


def _add(
    elements: Tensor, coefficients: Sequence[float], wide: Tensor, totals: Tensor, *, afresh: bool
) -> None:
    """Add elements, times a coefficient for each sum, to the sums, or begin these."""
    numbers = torch.view_as_real(elements) if elements.is_complex() else elements
    wide = wide[: numbers.numel()].copy_(numbers.view(-1))
    for coefficient, total in zip(coefficients, totals[:, : len(wide)], strict=True):
        if not coefficient:  # of what may not be finite
            if afresh:
                total.zero_()
        elif afresh:
            torch.mul(wide, coefficient, out=total)
        else:
            total.add_(wide, alpha=coefficient)


def _cast(total: Tensor, part: _Part, dtype: torch.dtype) -> Tensor:
    """Return a slice of a sum in the dtype in which it is written, if that can hold it."""
    if dtype.is_complex:
        total = total[: 2 * part.size]
        cast = torch.view_as_complex(total.view(-1, 2)).to(dtype)
    else:
        total = total[: part.size]
        cast = total.to(dtype)
    if not _is_finite(cast):
        narrow = _is_finite(total)
        why = f"{dtype} is too narrow" if narrow else "one of the checkpoints is not finite there"
        raise ValueError(
            f"{part.name!r} of the sum would not be finite: {why}. Find the checkpoint (polyak "
            "inspect --verify), or write a wider dtype such as torch.float32"
        )
    return cast


def _is_finite(elements: Tensor) -> bool:
    numbers = torch.view_as_real(elements) if elements.is_complex() else elements
    # Not a number is both least and greatest. Of one byte there is no order; see float8.
    least, greatest = torch.aminmax(numbers.float() if numbers.element_size() == 1 else numbers)
    return math.isfinite(least) and math.isfinite(greatest)
