"""CHECKS: bad input, and what to type instead. They read, raise, and know no EMA."""

from __future__ import annotations

import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak import engine
from polyak.selection import Policy, Slot, View, describe, listed, trainable


def checked_clock(t: object) -> int:
    """Return a clock as an integer."""
    if isinstance(t, nn.Module):
        raise TypeError(
            f"update takes the clock, got a model ({type(t).__name__}): the EMA knows its model. "
            "Call update() after each optimizer step, or update(step)"
        )
    return _integer("t", t)


def positive(name: str, value: object) -> int:
    """Return a count of 1 or more."""
    number = _integer(name, value)
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}; leave it out for 1")
    return number


def nonnegative(name: str, value: object) -> int:
    """Return a count of 0 or more."""
    number = _integer(name, value)
    if number < 0:
        raise ValueError(f"{name} must be 0 or more, got {number}; pass how many there were so far")
    return number


def _integer(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return int(operator.index(value))
    except TypeError:
        pass
    raise TypeError(
        f"{name} counts optimizer steps (or images, or tokens) and must be an integer, got "
        f"{value!r} ({type(value).__name__}); pass the count, or leave {name} out"
    )


def checked_floor(dtype: torch.dtype | None) -> torch.dtype:
    """Return the least dtype of averages."""
    if dtype in (None, torch.float32):
        return torch.float32
    if dtype == torch.float64:
        return torch.float64
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype!r}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    zone = torch.finfo(dtype).eps / 2 / 1e-3
    raise ValueError(
        f"averages in {dtype} would stand still: at decay 0.999 they ignore any relative change of "
        f"the weights below {zone:.2g}, in float32 below 6e-05. Leave dtype out for float32"
    )


def refuse_unwritable(dtype: torch.dtype | None) -> None:
    """Refuse a dtype that weights are not written in."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"weights cannot be written as {dtype!r}; pass a floating dtype such as "
            "torch.bfloat16, or leave dtype out for the model's own"
        )


def checked_device(device: torch.device | str | None, view: View) -> torch.device | None:
    """Return where the averages are to be, if not beside their parameters."""
    if device is None:
        return None
    wanted = torch.device(device)
    there = {slot.tensor.device for slot in view.tree.slots}
    if there == {wanted} or (wanted.index is None and {d.type for d in there} == {wanted.type}):
        return wanted if wanted.type == "cpu" else None  # it may yet move to an accelerator
    sharded = any(engine.is_sharded(slot.tensor) for slot in view.tree.slots)
    if wanted.type == "cpu" and {d.type for d in there} == {"cuda"} and not sharded:
        if view.teacher is None:
            return wanted
        raise ValueError(
            "device= says where averages are kept, and those of into= are kept in the teacher; "
            "leave device out, and put the teacher where they are to be"
        )
    kinds = ", ".join(sorted(map(str, there))) + (", sharded" if sharded else "")
    raise ValueError(
        f"averages on {wanted} for a model on {kinds} are not to be had, only on 'cpu' for a model "
        "that is whole and on CUDA devices; leave device out, and each average is beside its "
        "parameter"
    )


def refuse_nothing(view: View, policy: Policy) -> None:
    """Refuse a policy that averages nothing."""
    if view.average:
        return
    slots = view.tree.slots
    why, remedy = "", "let it return 'average' for some of them"
    if not slots:
        remedy = "pass a model that has parameters"
    elif not any(slot.tensor.requires_grad for slot in slots) and policy is trainable:
        why = " (all parameters are frozen, no running statistics)"
        remedy = "unfreeze before building the EMA, or pass policy=everything"
    raise ValueError(
        f"nothing to average: the policy {describe(policy)!r} averages none of the {len(slots)} "
        f"tensors{why}; {remedy}"
    )


def refuse_no_data(slots: Mapping[str, Slot]) -> None:
    """Refuse tensors that have no values yet."""
    meta = [name for name, slot in slots.items() if slot.tensor.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} tensors are on the meta device and have no values to average:"
            f"{listed(meta)}\nmaterialize the model and load its weights before the first update"
        )
    freed = [name for name, slot in slots.items() if engine.is_freed(slot.tensor)]
    if freed:
        raise ValueError(
            f"the memory of {len(freed)} tensors was freed or shrunk:{listed(freed)}\n"
            "give it back (resize_ of the storage) before the update"
        )


def refuse_trained_teacher(view: View) -> None:
    """Refuse averages that take gradients."""
    homes = map(view.home, view.average)
    trained = [home.name for home in homes if home is not None and home.tensor.requires_grad]
    if trained:
        raise RuntimeError(
            f"{len(trained)} tensors of the teacher take gradients:{listed(trained)}\n"
            "it is an average and must not be trained: call teacher.requires_grad_(False), and "
            "keep its parameters out of the optimizer"
        )


def refuse_nonfinite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse to start an average from a NaN or an infinity."""
    names = list(tensors)
    wrong = [names[i] for i in engine.nonfinite(list(tensors.values()))]
    if wrong:
        raise ValueError(
            f"{len(wrong)} tensors to start an average from are not finite:{listed(wrong)}\n"
            "start before the weights diverge; if a mask of infinities is among them, let the "
            "policy say 'follow' for it"
        )


def refuse_forward(modules: Sequence[nn.Module], verb: str) -> None:
    """Refuse to write into a module that may not look at its shards again."""
    if engine.in_forward(modules):
        raise RuntimeError(
            f"cannot {verb} now: a forward of this FSDP2 model is running, or was broken off by an "
            "exception, and it may keep the full copies that it has gathered. Leave the forward, "
            "or call reset_iter_state() on its outermost FSDP2 module (torch 2.13 or newer)"
        )


def refuse_merged(modules: Sequence[nn.Module]) -> None:
    """Refuse adapters that are merged: the frozen weights hold them, and would go on doing so."""
    merged = merged_adapters(modules)
    if merged:
        raise RuntimeError(
            f"{len(merged)} modules ({type(merged[0]).__name__} the first) have merged their "
            "adapters into frozen weights, where averages would not be seen: call "
            "model.unmerge_adapter() first (loralib: model.train(), or merge_weights=False)"
        )


def merged_adapters(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules of peft or loralib that have added their adapters to frozen weights."""
    return [module for module in modules if getattr(module, "merged", False) is True]


def refuse_out_of_step(clocks: Mapping[int, int]) -> None:
    """Refuse processes whose averages have not seen the same states."""
    if len(set(clocks.values())) > 1:
        lines = (f"rank {rank}: clock {clock}" for rank, clock in clocks.items())
        raise RuntimeError(
            f"the processes are not in step:{listed(lines)}\n"
            "call update() on every one of them at the same steps, with the same t"
        )


def refuse_capture() -> None:
    """Refuse to be recorded into a CUDA graph."""
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if started and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "update() would be captured with the decay of this one step; call it after "
            "graph.replay() instead"
        )


def refuse_freezing() -> None:
    """Refuse compiled code that holds copies of the weights."""
    config = sys.modules.get("torch._inductor.config")
    if getattr(config, "freezing", False):
        raise RuntimeError(
            "torch._inductor.config.freezing is on: compiled code holds copies of the weights and "
            "would not see the averages. Switch it off, or export with model_state_dict()"
        )
