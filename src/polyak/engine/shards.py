"""SHARDS: tensors that are spread over processes, and the part of each that is here.

The only place that knows DTensor, FSDP2 and process groups. Only `exchange` and `whole`
communicate, and say so; everything else is about what this process holds.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = [
    "break_off",
    "copies",
    "exchange",
    "groups",
    "in_forward",
    "is_sharded",
    "layout",
    "loaded",
    "local",
    "movable",
    "parts",
    "reshard",
    "same_layout",
    "spread_like",
    "unsharded",
    "whole",
]

_Value = TypeVar("_Value")


def loaded(module: str, name: str) -> type | None:
    """Return a class of a module that is slow to import, if somebody has imported it."""
    return getattr(sys.modules.get(module), name, None)


# ------------------------------------------------------------------------------------- tensors


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether the tensor belongs to several processes (a DTensor)."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    dtensor = loaded("torch.distributed.tensor", "DTensor")
    return dtensor is not None and isinstance(tensor, dtensor)


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the parts that this process holds: views of shards, and what is whole itself."""
    with torch.no_grad():
        return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def local(tensor: Tensor) -> Tensor:
    """Return a view of the part of `tensor` that this process holds, outside of autograd."""
    return (parts([tensor])[0] if is_sharded(tensor) else tensor).detach()


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether every process holds the same part of both, given that their shapes are the same."""
    if is_sharded(a) and is_sharded(b):
        if a.device_mesh == b.device_mesh and a.placements == b.placements:
            return True  # which is quickly said, and nearly always so
    elif not (is_sharded(a) or is_sharded(b)):
        return True
    return _split(a) == _split(b)


def layout(tensor: Tensor) -> str:
    """Say how a tensor is spread over processes."""
    if not _split(tensor) or not is_sharded(tensor):
        return "whole"
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    shape = " x ".join(map(str, tensor.device_mesh.shape))
    return f"{list(tensor.placements)} on {shape} ranks from {ranks[0]} to {ranks[-1]}"


def _split(tensor: Tensor) -> tuple[object, ...]:
    """What decides which part of a tensor each process holds; empty if each holds all of it."""
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements
    if all(p.is_replicate() or size == 1 for p, size in zip(placements, mesh.shape, strict=True)):
        return ()
    return (*placements, *mesh.shape, *mesh.mesh.flatten().tolist())


def movable(tensor: Tensor, like: Tensor) -> bool:
    """Whether `spread_like` can do it: what is whole can be cut, what is split stays so."""
    return same_layout(tensor, like) or not _split(tensor)


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` in the layout of `like`; itself, if it has it already.

    A whole tensor is cut, without communication. One that is split otherwise than `like` has to be
    gathered first, which this does not.
    """
    if is_sharded(tensor) and not (is_sharded(like) and same_layout(tensor, like)):
        tensor = local(tensor)  # which is all of it
    if is_sharded(like) and not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = like.device_mesh, like.placements
        with torch.no_grad():
            return distribute_tensor(tensor, mesh, placements, src_data_rank=None).clone()
    return tensor


def copies(tensor: Tensor, size: int) -> int:
    """Return how many of `size` processes hold the same elements, if all hold as many."""
    if not is_sharded(tensor):
        return size
    sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
    parts = 1
    for placement, length in sizes:
        parts *= 1 if placement.is_replicate() else length
    return max(size // parts, 1)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor. Communicates: all processes that hold it call this in step."""
    with torch.no_grad():
        return tensor.full_tensor().detach() if is_sharded(tensor) else tensor.detach()


# ------------------------------------------------------------------------------------ processes


def groups(tensors: Iterable[Tensor]) -> list[ProcessGroup]:
    """Return the process groups that tensors are spread over, one for each dimension of a mesh."""
    found: dict[str, ProcessGroup] = {}
    for tensor in tensors:
        if is_sharded(tensor):
            for dimension in range(tensor.device_mesh.ndim):
                group = tensor.device_mesh.get_group(dimension)
                found.setdefault(group.group_name, group)
    return list(found.values())


def exchange(value: _Value, groups: Iterable[ProcessGroup]) -> dict[int, _Value]:
    """Return rank -> what that process passed. Communicates: all call this in step.

    Groups that cross, as the dimensions of a mesh do, tell each other what the others have told.
    """
    everyone = {torch.distributed.get_rank(): value}
    for group in groups:
        told: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(told, everyone, group=group)
        everyone = {rank: value for part in told for rank, value in part.items()}
    return dict(sorted(everyone.items()))


# ---------------------------------------------------------------------------------------- FSDP2


def unsharded(now: object, known: Tensor) -> bool:
    """Whether `now` is what FSDP2 registers in place of the shard `known` around a forward."""
    return (
        isinstance(now, Tensor)
        and is_sharded(known)
        and not is_sharded(now)
        and now.shape == known.shape
    )


def reshard(modules: Sequence[nn.Module]) -> None:
    """Make every FSDP2 module among these hold its shards again, and register them.

    After a forward without a backward the root stays unsharded: its registered parameters are full
    copies, and what is written to them is lost. A gather that was begun ahead of its forward
    (prefetching) would bring the old values later: it is waited for, and its result dropped.
    """
    for module in _fsdp_modules(modules):
        if any(getattr(group, "_all_gather_result", None) for group in _fsdp_groups(module)):
            module.unshard()  # begins nothing, but waits for what is under way
        module.reshard()


def in_forward(modules: Sequence[nn.Module]) -> bool:
    """Whether a forward of an FSDP2 module runs, or was broken off by an exception.

    Until it is over the module may keep its full copies, whatever is written to its shards.
    """
    states = {
        str(getattr(part, "_training_state", ""))
        for module in _fsdp_modules(modules)
        for part in [module._get_fsdp_state(), *_fsdp_groups(module)]
    }
    return any(state.endswith("FORWARD") for state in states)


def break_off(modules: Sequence[nn.Module]) -> bool:
    """Let FSDP2 forget a forward that an exception has broken off; return whether it can.

    torch older than 2.13 cannot, nor can it where the outermost FSDP2 module is not among these.
    """
    sharded = list(_fsdp_modules(modules))
    inside = {m for module in sharded for m in itertools.islice(module.modules(), 1, None)}
    try:
        for root in sharded:
            if root not in inside:
                root.reset_iter_state()
    except (AttributeError, RuntimeError):
        return False
    return True


def _fsdp_modules(modules: Sequence[nn.Module]) -> Iterator[Any]:
    fsdp = loaded("torch.distributed.fsdp", "FSDPModule")
    return (m for m in modules if fsdp is not None and isinstance(m, fsdp))


def _fsdp_groups(module: Any) -> Sequence[object]:
    """Return what gathers the parameters of a module; torch tells of its state in no other way."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    return [getattr(state, "_fsdp_param_group", None)] if several is None else several
