"""TENSOR LISTS: the two verbs of averaging, `lerp` and `copy`, over lists of tensors.

Every averaging scheme is a choice of `weight` in one primitive,

    target <- target + weight * (source - target),

and a `Plan` is what makes it cheap: tensors are localized, grouped and cut into pieces once, then
the verbs run blind. This package is the only place that knows dtypes, devices, DTensor, foreach and
scratch memory; it knows no names, no clock and no decay. Tensors that are spread over processes
take part with the shard that is here (`shards`), so that no verb ever communicates.

Paths, all within rounding of `reference`: `foreach`, for every device of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from polyak.engine import foreach
from polyak.engine.shards import (
    break_off,
    copies,
    exchange,
    groups,
    in_forward,
    is_sharded,
    layout,
    loaded,
    local,
    movable,
    parts,
    reshard,
    same_layout,
    spread_like,
    unsharded,
    whole,
)

__all__ = [
    "Plan",
    "average_dtype",
    "break_off",
    "copies",
    "copy",
    "distance",
    "empty_like",
    "exchange",
    "groups",
    "in_forward",
    "is_dense",
    "is_floating",
    "is_sharded",
    "layout",
    "lerp",
    "loaded",
    "local",
    "movable",
    "nonfinite",
    "overlaps_itself",
    "reshard",
    "same",
    "same_layout",
    "spread_like",
    "unsharded",
    "whole",
    "write",
]


class Path(Protocol):
    """One way to run `lerp` over a group of local tensors: same device, same pair of dtypes.

    `targets[i]` and `sources[i]` have the same shape; all are real, none is empty.
    """

    name: str
    skipped: Tensor  # 0-dim int64 on the targets' device: elements that kept their value

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None: ...

    def lerp(self, weight: float | Tensor) -> None:
        """Move every element whose result is finite; add the others to `skipped`."""


class Plan:
    """Which tensors are written from which, made ready once.

    Args:
        targets: the tensors that are written. DTensors take part with their local shard.
        sources: as many, of the same shapes; any floating dtype, also on another device.
        path: the way to run `lerp`; by default the fastest that runs on the targets.

    Raises:
        ValueError: a shape, a shard or a kind (real, complex) differs, or a tensor has no data.
    """

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], path: type[Path] | None = None
    ) -> None:
        self._path = path or foreach.Foreach
        for target, source in zip(targets, sources, strict=True):
            _refuse_mixture(target, source)
        self._watched = [*targets, *sources]
        self._seen = [part.detach() for part in parts(self._watched)]
        pairs = zip(self._seen[: len(targets)], self._seen[len(targets) :], strict=True)
        self._pairs = [_real(target, source) for target, source in pairs]
        self._groups: list[Path] | None = None

    def current(self) -> bool:
        """Whether every tensor still has the storage, shape and strides it had in the beginning."""
        try:
            return all(map(Tensor.is_set_to, parts(self._watched), self._seen))
        except RuntimeError:  # moved to another device
            return False

    @property
    def paths(self) -> list[str]:
        """The paths that `lerp` takes, by name."""
        return sorted({group.name for group in self._lerp_groups()})

    def skipped(self) -> int:
        """How many elements kept their value because the new one was not finite. Syncs."""
        return sum(int(group.skipped.item()) for group in self._groups or ())

    def _lerp_groups(self) -> list[Path]:
        if self._groups is None:
            self._groups = [self._path(*group) for group in self._grouped()]
        return self._groups

    def _grouped(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        groups: dict[object, tuple[list[Tensor], list[Tensor]]] = {}
        for target, source in self._pairs:
            if target.numel():
                key = (target.device, target.dtype, source.device, source.dtype)
                targets, sources = groups.setdefault(key, ([], []))
                targets.append(target)
                sources.append(source)
        yield from groups.values()


def lerp(plan: Plan, weight: float | Tensor) -> None:
    """Move each target towards its source: `target += weight * (source - target)`.

    An element whose new value would not be finite keeps the old one and is counted. The lerp form
    is torch's, whose fixed point is exact: where source and target are equal nothing changes. A
    complex element is two real ones.

    Args:
        plan: what to write from what.
        weight: the share of the source, 0 to 1; a float or a 0-dim tensor on the targets' device.
    """
    for group in plan._lerp_groups():
        group.lerp(weight)


def copy(plan: Plan) -> None:
    """Write each source into its target, cast to the target's dtype, finite or not."""
    for targets, sources in plan._grouped():
        torch._foreach_copy_(targets, sources)


def write(plan: Plan) -> None:
    """Copy into tensors of a module, and drop what torch has computed from the old values.

    Autocast keeps copies of weights in a narrower dtype, ``parametrize.cached()`` whole weights.
    """
    copy(plan)
    torch.clear_autocast_cache()
    torch.nn.utils.parametrize._cache.clear()


def average_dtype(dtype: torch.dtype, floor: torch.dtype = torch.float32) -> torch.dtype:
    """Return the dtype in which a tensor of `dtype` is averaged: at least `floor`.

    >>> average_dtype(torch.bfloat16), average_dtype(torch.float64), average_dtype(torch.complex64)
    (torch.float32, torch.float64, torch.complex64)
    """
    if dtype.is_complex:
        floor = floor.to_complex()
        return floor if dtype == torch.complex32 else torch.promote_types(dtype, floor)
    return floor if dtype.itemsize < floor.itemsize else torch.promote_types(dtype, floor)


def empty_like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized tensor of that dtype; device, layout and sharding are kept."""
    with torch.inference_mode(False):
        tensor = tensor.detach()
        if overlaps_itself(tensor):
            return torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        return torch.empty_like(tensor, dtype=dtype)


def is_floating(tensor: Tensor) -> bool:
    """Whether the elements are real or complex numbers, so that a mean of them makes sense."""
    return tensor.is_floating_point() or tensor.is_complex()


def is_dense(tensor: Tensor) -> bool:
    """Whether it is plain memory, perhaps sharded: not sparse, nor packed, nor a lazy negative."""
    packed = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    lazy = tensor.is_conj() or tensor.is_neg()
    return tensor.layout == torch.strided and not lazy and (is_sharded(tensor) or not packed)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory (an expanded tensor), so that it cannot be written in place."""
    return 0 in (s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def same(tensor: Tensor, seen: Tensor) -> bool:
    """Whether `tensor` still has the storage, shape and strides that the view `seen` has."""
    try:
        return local(tensor).is_set_to(local(seen))
    except RuntimeError:  # moved to another device
        return False


def nonfinite(tensors: Sequence[Tensor]) -> list[int]:
    """Return the indices of the tensors whose local part has a NaN or an infinity. Syncs."""

    def finite(tensor: Tensor) -> bool:
        slices = (piece for piece, _ in foreach.pieces(tensor, tensor))
        wide = (s.float() if s.dtype.itemsize == 1 else s for s in slices)
        return all(bool(torch.isfinite(s).all()) for s in wide)

    return [i for i, tensor in enumerate(tensors) if not finite(local(tensor))]


def distance(
    targets: Sequence[Tensor], sources: Sequence[Tensor], processes: int = 1
) -> tuple[float, float]:
    """Return the sums of |target - source|^2 and |source|^2 over the local parts. Syncs.

    Accumulated in float64, in slices, so that the memory it takes is bounded. Of what several
    processes hold alike each gets its share, so that the sums of so many add up.
    """
    squares = [0.0, 0.0]
    for target, source in zip(targets, sources, strict=True):
        share = 1 / copies(target, processes)
        for t, s in foreach.pieces(*_real(local(target), local(source))):
            wide = s.to(t.device, torch.float64)
            squares[0] += share * float((t.double() - wide).square().sum())
            squares[1] += share * float(wide.square().sum())
    return squares[0], squares[1]


def _refuse_mixture(target: Tensor, source: Tensor) -> None:
    fits = target.shape == source.shape and same_layout(target, source)
    if not fits and (is_sharded(target) or is_sharded(source)):
        raise ValueError(
            f"cannot write {tuple(source.shape)} ({layout(source)}) into {tuple(target.shape)} "
            f"({layout(target)}): this process does not hold the same part of both; shard both in "
            "the same way"
        )


def _real(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    for tensor in (target, source):
        if tensor.is_meta:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} is on the meta device and has no data; "
                "materialize it (module.to_empty(device=...), then load its values) first"
            )
    if target.shape != source.shape or target.is_complex() != source.is_complex():
        raise ValueError(
            f"cannot write {tuple(source.shape)} {source.dtype} into "
            f"{tuple(target.shape)} {target.dtype}; both must have one shape, and be both "
            "real or both complex"
        )
    if target.is_complex():
        wide = source if source.dtype != torch.complex32 else source.to(torch.complex64)
        return torch.view_as_real(target), torch.view_as_real(wide)
    return target, source
