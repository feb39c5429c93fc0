"""ASIDE: the trained tensors of a model while it holds others, and how they come back.

Values are written in place, so that whatever refers to the tensors (optimizers, DDP, FSDP2,
``torch.compile``, CUDA graphs, tied names) keeps working. This file knows no averages: it keeps
what it is told to keep, and puts it back bit for bit, whatever happened in between.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor

from polyak import engine
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
        chosen = {slot.name for slot in slots}
        with torch.inference_mode(False), torch.no_grad():
            self._seen = [slot.tensor.detach() for slot in tree.slots]
            self._kept = {
                id(slot.tensor): seen.clone()
                for slot, seen in zip(tree.slots, self._seen, strict=True)
                if slot.is_buffer or slot.name in chosen
            }

    def trained(self, tensor: Tensor) -> Tensor | None:
        """Return what the model's tensor held before, if it was kept."""
        return self._kept.get(id(tensor))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state dict of the trained model: what was kept, and the rest as it stands."""
        slots = {key: self._tree.by_name.get(key) for key in self._tree.keys}
        return {
            key: self._kept.get(id(slot.tensor), slot.tensor.detach())
            for key, slot in slots.items()
            if slot is not None
        }

    def restore(self) -> list[str]:
        """Put everything back; return what else than values had changed, a line each."""
        engine.reshard(self._tree.modules)
        changed = self._relink()
        targets, sources = [], []
        for slot, seen in zip(self._tree.slots, self._seen, strict=True):
            if not engine.same(slot.tensor, seen):
                slot.tensor.data = seen
                if not slot.is_buffer:
                    changed.append(f"{slot.name}: its storage was replaced")
            kept = self._kept.get(id(slot.tensor))
            if kept is not None and not engine.overlaps_itself(seen):
                targets.append(seen)
                sources.append(kept)
        engine.copy(engine.Plan(targets, sources))
        return changed

    def _relink(self) -> list[str]:
        changed = []
        names = {id(t): slot for slot in self._tree.slots for _, _, t in slot.places}
        for owner, key, value in self._tree.links:
            if owner.get(key) is not value:
                owner[key] = value
                slot = names.get(id(value))
                if slot is None or not slot.is_buffer:  # buffers may be assigned by a forward
                    where = f"{key} ({type(value).__name__})" if slot is None else slot.name
                    changed.append(f"{where}: another object was registered in its place")
        return changed


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done, then let it through."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    pending: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if pending:
            handler(*pending[0])
