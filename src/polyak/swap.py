"""ASIDE: the trained tensors of a model while it holds others, and how they come back.

Values are written in place, so that whatever refers to the tensors (optimizers, DDP, FSDP2,
`torch.compile`, CUDA graphs, tied names) keeps working. This file knows no averages: it keeps
what it is told to keep, and puts it back bit for bit, whatever happened in between.
"""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

from torch import Tensor

from polyak import engine
from polyak.checks import merged_adapters
from polyak.selection import Slot, Tree

__all__ = ["Aside", "uninterrupted"]


class Aside:
    """Copies of some tensors of a model and of all its buffers, to be put back later.

    Args:
        tree: the model.
        slots: the tensors that are going to be overwritten. Buffers are kept without being named,
            since a forward pass may change them.
    """

    def __init__(self, tree: Tree, slots: Sequence[Slot]) -> None:
        self._tree = tree
        self._names = {id(t): slot.name for slot in tree.slots for _, _, t in slot.places}
        self._owners = {id(owner): (owner, list(owner)) for owner, _, _ in tree.links}
        chosen = {slot.name for slot in slots}
        with engine.unrecorded():
            self._seen = [slot.tensor.detach() for slot in tree.slots]
            self._kept = {
                slot.name: seen.clone()
                for slot, seen in zip(tree.slots, self._seen, strict=True)
                if slot.is_buffer or slot.name in chosen
            }

    def trained(self, tensor: Tensor) -> Tensor | None:
        """Return what the model's tensor held before, if it was kept."""
        return self._kept.get(self._names.get(id(tensor), ""))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors of the trained model's state dict, kept aside or as they stand."""
        return {
            key: self._kept.get(slot.name, slot.tensor.detach())
            for key, slot in self._tree.entries.items()
        }

    def restore(self) -> list[str]:
        """Put everything back; return what else than values had changed, a line each."""
        changed = []
        engine.reshard(self._tree.modules)
        if engine.in_forward(self._tree.modules) and not engine.break_off(self._tree.modules):
            changed.append(
                "a forward pass was broken off, and FSDP2 may keep the full copies that it had "
                "gathered: build the model anew from a checkpoint, or call reset_iter_state() on "
                "its outermost FSDP2 module (torch 2.13 or newer)"
            )
        merged = merged_adapters(self._tree.modules)
        if merged:
            changed.append(
                f"{len(merged)} modules ({type(merged[0]).__name__}) have merged averaged adapters "
                "into their frozen weights, which are not kept aside: load these anew, and merge a "
                "copy instead (averaged = copy.deepcopy(model); ema.copy_to(averaged))"
            )
        changed += self._relink()
        targets, sources = [], []
        for slot, seen in zip(self._tree.slots, self._seen, strict=True):
            if not engine.same(slot.tensor, seen):
                slot.tensor.data = seen
                if not slot.is_buffer:
                    changed.append(f"{slot.name}: its storage was replaced")
            kept = self._kept.get(slot.name)
            if kept is not None and not engine.overlaps_itself(seen):
                targets.append(seen)
                sources.append(kept)
        engine.write(engine.Plan(targets, sources))
        return changed

    def _relink(self) -> list[str]:
        changed = []
        slots = {id(t): slot for slot in self._tree.slots for _, _, t in slot.places}
        for owner, key, value in self._tree.links:
            slot = slots.get(id(value))
            if slot is not None and engine.unsharded(owner.get(key), slot.tensor):
                changed.append(
                    f"{slot.name}: an FSDP2 module outside of this model gathered the averages and "
                    "uses them until you call its reshard(), or its reset_iter_state() if a "
                    "forward was broken off; build the EMA from that module, with policy=Only(...)"
                )
            elif owner.get(key) is not value and not _grown(slot, owner.get(key)):
                owner[key] = value
                if slot is None or not slot.is_buffer:  # buffers may be assigned by a forward
                    where = f"{key} ({type(value).__name__})" if slot is None else slot.name
                    changed.append(f"{where}: another object was registered in its place")
        for owner, keys in self._owners.values():  # what was deleted came back at the end
            if [key for key in owner if key in keys] != keys:
                items = {key: owner[key] for key in keys if key in owner} | dict(owner)
                owner.clear()
                owner.update(items)
        return changed


def _grown(slot: Slot | None, now: object) -> bool:
    """Whether a module has made itself another cache, whose size it may remember elsewhere."""
    if slot is None or not slot.is_buffer or slot.persistent or not isinstance(now, Tensor):
        return False
    return now.shape != slot.tensor.shape and now.dtype == slot.tensor.dtype


_signal: Any = importlib.import_module("_signal")  # `signal` makes enums, ten times as slow
_SIGNALS = [
    int(getattr(signal, name))
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]


def uninterrupted() -> AbstractContextManager[None]:
    """Hold back Ctrl-C, and other signals that the program handles, until the block is done."""
    return _Held()


class _Held(AbstractContextManager[None]):
    """A class and not a generator, since every update enters one."""

    def __enter__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._pending: list[tuple[int, FrameType | None]] = []
        try:
            if threading.current_thread() is threading.main_thread():
                for number in _SIGNALS:
                    handler = _signal.getsignal(number)
                    if callable(handler):
                        self._handlers[number] = handler
                        _signal.signal(number, self._note)
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            _put_back(list(self._handlers.items()))
        finally:
            _deliver(self._handlers, self._pending)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending.append((number, frame))


def _put_back(handlers: list[tuple[int, Any]]) -> None:
    """Install these handlers, all of them, also if one that is back is called and raises."""
    if handlers:
        try:
            _signal.signal(*handlers[-1])
        finally:
            _put_back(handlers[:-1])


def _deliver(handlers: dict[int, Any], pending: list[tuple[int, FrameType | None]]) -> None:
    """Call the handler of each signal that came, also if the one before raises."""
    if pending:
        number, frame = pending[0]
        try:
            handlers[number](number, frame)
        finally:
            _deliver(handlers, pending[1:])
