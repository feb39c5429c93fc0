"""TENSOR LISTS: the two verbs of averaging, `lerp` and `copy`, over lists of tensors.

Every averaging scheme is a choice of `weight` in one primitive,

    target <- target + weight * (source - target),

and a `Plan` is what makes it cheap: tensors are localized, grouped and cut into pieces once, then
the verbs run blind. This package is the only place that knows dtypes, devices, DTensor, foreach and
scratch memory; it knows no names, no clock and no decay. Tensors that are spread over processes
take part with the shard that is here (`shards`), so that no verb ever communicates.

Paths, all within rounding of `reference`: `cpu` (C), `cuda` (Triton), `host` (averages in host
memory, which go on while an accelerator works), `foreach` (wherever torch runs).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polyak.engine import cpu, cuda, foreach, host
from polyak.engine.flag import Flag, is_near, weight_unless
from polyak.engine.foreach import unrecorded
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
    reshard,
    same_layout,
    spread_like,
    unsharded,
    whole,
)
from polyak.engine.watch import Watch

__all__ = [
    "Flag",
    "Plan",
    "average_dtype",
    "break_off",
    "copy",
    "distance",
    "empty_like",
    "equal",
    "exchange",
    "groups",
    "in_forward",
    "is_dense",
    "is_floating",
    "is_freed",
    "is_near",
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
    "unrecorded",
    "unsharded",
    "weight_unless",
    "whole",
    "widened",
    "write",
]


class Path(Protocol):
    """One way to run `lerp` over a group of local tensors: same device, same pair of dtypes.

    `targets[i]` and `sources[i]` have the same shape; all are real, none is empty.
    """

    name: str

    @property
    def skipped(self) -> Tensor:
        """How many elements kept their value: 0-dim int64 on the targets' device."""

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether it can run this pair of tensors."""

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None: ...

    def lerp(self, weight: float | Tensor) -> None:
        """Move every element whose result is finite; add the others to `skipped`."""


_PATHS: tuple[type[Path], ...] = (cpu.Cpu, cuda.Cuda, host.Host, foreach.Foreach)


class Plan:
    """Which tensors are written from which, made ready once.

    Args:
        targets: the tensors that are written. DTensors take part with their local shard.
        sources: as many, of the same shapes; any floating dtype, also on another device.
        path: the way to run `lerp`, for the pairs that it takes; by default the fastest.

    Raises:
        ValueError: a shape, a shard or a kind (real, complex) differs, or a tensor has no data.
    """

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], path: type[Path] | None = None
    ) -> None:
        for target, source in zip(targets, sources, strict=True):
            _refuse_mixture(target, source)
        self._paths = _PATHS if path is None else (path, foreach.Foreach)
        self._watch = Watch([*targets, *sources])
        held = self._watch.held
        pairs = zip(held[: len(targets)], held[len(targets) :], strict=True)
        self._pairs = [_real(target, source) for target, source in pairs]
        self._stepped = [isinstance(source, nn.Parameter) for source in sources]
        self._groups: list[Path] | None = None
        self._behind: list[host.Host] = []  # those of them that go on beside the caller

    def current(self) -> bool:
        """Whether every tensor still has the memory and the layout it had in the beginning."""
        return self._watch.same()

    def read(self) -> None:
        """Wait until the sources may change. Raises what went wrong since the last call."""
        for group in self._behind:
            group.read()

    def wait(self) -> None:
        """Wait until all targets have moved. Raises what went wrong, each time."""
        for group in self._behind:
            group.wait()

    @property
    def paths(self) -> list[str]:
        """The paths that `lerp` takes, by name, and why not the fastest."""
        names = {group.name for group in self._lerp_groups()}
        if "foreach" in names:
            why = {obstacle for pair in self._pairs if (obstacle := _obstacle(*pair))}
            names = names - {"foreach"} | {
                f"foreach ({'; '.join(sorted(why))})" if why else "foreach"
            }
        return sorted(names)

    def skipped(self) -> int:
        """How many elements kept their value because the new one was not finite. Syncs."""
        return sum(int(group.skipped.item()) for group in self._groups or ())

    def _lerp_groups(self) -> list[Path]:
        if self._groups is None:
            self._groups = [
                path(targets, sources) if still else host.Host(targets, sources, still=False)
                for path, still, targets, sources in self._grouped()
            ]
            self._behind = [group for group in self._groups if isinstance(group, host.Host)]
        return self._groups

    def _grouped(self) -> Iterator[tuple[type[Path], bool, list[Tensor], list[Tensor]]]:
        """Yield path, whether the sources stand still while it goes on, targets and sources."""
        groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
        for (target, source), stepped in zip(self._pairs, self._stepped, strict=True):
            if target.numel():
                path = next(path for path in self._paths if path.takes(target, source))
                # Only a step changes a parameter, but any forward changes buffers.
                still = stepped or path is not host.Host
                key = (path, still, target.device, target.dtype, source.device, source.dtype)
                targets, sources = groups.setdefault(key, ([], []))
                targets.append(target)
                sources.append(source)
        for (path, still, *_), (targets, sources) in groups.items():
            yield path, still, targets, sources


def lerp(plan: Plan, weight: float | Tensor) -> None:
    """Move each target towards its source: `target += weight * (source - target)`.

    An element whose new value would not be finite keeps the old one and is counted. The lerp form
    is torch's, whose fixed point is exact: where source and target are equal nothing changes. A
    complex element is two real ones. With a weight of 0 nothing is written and nothing counted.
    Where targets are in host memory and sources are not it only begins: see `Plan.read` and `wait`.

    Args:
        plan: what to write from what.
        weight: the share of the source, 0 to 1; a float or a 0-dim tensor on the targets' device.
    """
    if isinstance(weight, float) and weight == 0.0:
        return
    for group in plan._lerp_groups():
        group.lerp(weight)


def copy(plan: Plan) -> None:
    """Write each source into its target, cast to the target's dtype, finite or not."""
    with unrecorded():
        for *_, targets, sources in plan._grouped():
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


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in the dtype in which it is averaged; itself if it has that."""
    return tensor.to(average_dtype(tensor.dtype)) if is_floating(tensor) else tensor


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same values, whatever they hold them in."""
    return a.shape == b.shape and bool((a.to(b.device) == b).all())


def empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return an uninitialized tensor of that dtype; layout and sharding are kept.

    On `device`, by default the tensor's own. In host memory for an accelerator's tensor it is
    pinned, so that copies between the two need not wait.
    """
    with torch.inference_mode(False):
        tensor, where = tensor.detach(), device or tensor.device
        pinned = where.type == "cpu" and tensor.device.type == "cuda"
        if overlaps_itself(tensor):
            return torch.empty(tensor.shape, dtype=dtype, device=where, pin_memory=pinned)
        return torch.empty_like(tensor, dtype=dtype, device=where, pin_memory=pinned)


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


def _obstacle(target: Tensor, source: Tensor) -> str:
    """Return why a device's own kernel is not there, if it might be."""
    if target.device.type == source.device.type == "cpu":
        return cpu.obstacle()
    if target.device.type == source.device.type == "cuda":
        return cuda.obstacle(target.device, target.dtype, source.dtype)
    return ""


def _refuse_mixture(target: Tensor, source: Tensor) -> None:
    fits = target.shape == source.shape and same_layout(target, source)
    if not fits and (is_sharded(target) or is_sharded(source)):
        raise ValueError(
            f"cannot write {tuple(source.shape)} ({layout(source)}) into {tuple(target.shape)} "
            f"({layout(target)}): this process does not hold the same part of both; shard both in "
            "the same way"
        )


def is_freed(tensor: Tensor) -> bool:
    """Whether the part that is here has lost memory (`resize_` of its storage)."""
    here = local(tensor)
    if here.is_meta or not here.numel():
        return False
    steps = zip(here.shape, here.stride(), strict=True)
    elements = here.storage_offset() + 1 + sum((n - 1) * step for n, step in steps)
    return here.untyped_storage().nbytes() < elements * here.itemsize


def _real(target: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    for tensor in (target, source):
        if tensor.is_meta:
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} is on the meta device and has no data; "
                "materialize it (module.to_empty(device=...), then load its values) first"
            )
        if is_freed(tensor):
            raise ValueError(
                f"the memory of a tensor of shape {tuple(tensor.shape)} was freed or shrunk "
                "(resize_ of its storage); give it its memory back"
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
