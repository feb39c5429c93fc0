"""WATCH: whether tensors have the memory and the layout that they had.

Asked before every update, of every tensor, so that this is most of what an update costs beside its
pass over memory. torch's own answers (`data_ptr`, `nbytes`, ...) take a third of a microsecond a
tensor, and more where other work has driven its objects from the cache. So first the bytes of these
objects are compared, in C, with what they were (`polyak_same` in `lerp.c`): where none has changed,
nothing has. Where one has, torch is asked. Which bytes matter is not documented, so before it is
relied on for the first time it has to notice every way in which a tensor gets other memory.
"""

from __future__ import annotations

import array
import functools
import itertools
import operator
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyak.engine import cpu
from polyak.engine.shards import is_sharded, parts

__all__ = ["Watch"]

# What is compared of each tensor, in words: of its Python object, which leads to torch's, the first
# after what every object has; of torch's object and its storage those after the counts of
# references. None of them has less.
_WORD = 8
_HEADS = (object.__basicsize__, 2 * _WORD, 2 * _WORD)
_WORDS = array.array("q", (2, 20, 6))
_MOST_DIMS = 5  # of more the sizes are elsewhere


class Watch:
    """What some tensors are like, to be compared with what they are later.

    Attributes:
        held: what each of them, or its part on this process, was: kept with its memory, so that no
            other tensor gets the memory that pointers lead to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = list(tensors)
        self._spread = any(map(is_sharded, tensors))
        self.held = [t.detach() if t.requires_grad else t for t in parts(tensors)]
        # Of one dimension only the memory is watched: its shape shows when the model is walked.
        self._several = [i for i, tensor in enumerate(self.held) if tensor.ndim > 1]
        self._tensors_several = [self._tensors[i] for i in self._several]
        self._storages = [tensor.untyped_storage() for tensor in self.held]
        self._layouts = self._look(self.held, [self.held[i] for i in self._several])
        usual = not self._spread and all(tensor.ndim <= _MOST_DIMS for tensor in self.held)
        self._loops = _that_tell() if usual and self._tensors else None
        self._bytes: _Bytes | None = None  # not before somebody asks: many plans run once

    def same(self) -> bool:
        """Whether every tensor still has the memory and the layout it had in the beginning."""
        if self._bytes is not None and self._bytes.same():
            return True
        here, several = self._tensors, self._tensors_several
        try:
            if self._spread:
                here = parts(self._tensors)
                several = [here[i] for i in self._several]
            same = self._look(here, several) == self._layouts
        except RuntimeError:  # moved to a device that does not tell
            return False
        if same:
            self._take()
        return same

    def _take(self) -> None:
        # A tensor may have come by another storage over the same memory, which nobody here holds.
        if self._loops is not None and all(
            tensor.untyped_storage()._cdata == storage._cdata
            for tensor, storage in zip(self._tensors, self._storages, strict=True)
        ):
            self._bytes = _Bytes(self._tensors, self._storages, self._loops)

    def _look(self, tensors: Sequence[Tensor], several: Sequence[Tensor]) -> tuple[object, ...]:
        """Return what tells whether tensors are where they were, `several` also as they were.

        Memory that is freed is at 0; what is given instead may be as before, but for its size.
        """
        even = all(map(Tensor.is_contiguous, several))
        strides = None if even else list(map(Tensor.stride, several))
        sizes = list(map(torch.UntypedStorage.nbytes, self._storages))
        return list(map(Tensor.data_ptr, tensors)), sizes, list(map(Tensor.numel, several)), strides


class _Bytes:
    """The bytes of torch's objects, as they were."""

    def __init__(
        self, tensors: Sequence[Tensor], storages: Sequence[torch.UntypedStorage], loops: cpu.Loops
    ) -> None:
        self._held = tensors, storages  # an address is only good as long as what is there
        places = [(id(t), t._cdata, s._cdata) for t, s in zip(tensors, storages, strict=True)]
        heads = itertools.cycle(_HEADS)
        self._places = array.array("Q", map(operator.add, itertools.chain(*places), heads))
        self._noted = array.array("Q", bytes(_WORD * sum(_WORDS) * len(places)))
        arrays = (self._places, _WORDS, self._noted)
        counts = len(places), len(_WORDS)
        self._run: Any = functools.partial(
            loops.held.polyak_same, *counts, *(each.buffer_info()[0] for each in arrays)
        )
        self._run(True)

    def same(self) -> bool:
        """Whether none of them has changed."""
        return bool(self._run(False))

    def leads_on(self) -> bool:
        """Whether the address of torch's object is among the words of Python's."""
        return self._held[0][0]._cdata in self._noted[: _WORDS[0]]


def _that_tell() -> cpu.Loops | None:
    """Return the compiled library, if there is one and the bytes can be relied on."""
    loops = cpu.loops()
    return None if isinstance(loops, str) or not _tells(loops) else loops


@functools.cache
def _tells(loops: cpu.Loops) -> bool:
    """Whether the bytes that are compared tell everything that matters, on this torch."""
    if sys.implementation.name != "cpython" or struct.calcsize("P") != _WORD:
        return False

    swap: Any = torch.utils.swap_tensors  # which has no types
    others: list[Tensor] = []

    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.zeros(3, 4, device="cpu"), requires_grad=False)

    def other_data(tensor: Any) -> None:
        tensor.data = fresh()

    def swapped(tensor: Tensor) -> None:
        others.append(fresh())  # kept, so that what is noticed is not that memory was freed
        swap(tensor, others[-1])

    def other_dtype(tensor: Any) -> None:
        tensor.data = fresh().double()

    def notices(change: Callable[[Any], object]) -> bool:
        tensor = fresh()
        noted = _Bytes([tensor], [tensor.detach().untyped_storage()], loops)
        before = noted.same() and noted.leads_on()
        change(tensor)
        return before and not noted.same()

    with torch.inference_mode(False), torch.no_grad():
        changes: tuple[Callable[[Any], object], ...] = (
            other_data,
            other_dtype,
            swapped,
            lambda tensor: tensor.set_(fresh()),
            lambda tensor: tensor.t_(),
            lambda tensor: tensor.resize_(12),
            lambda tensor: tensor.as_strided_((3, 4), (4, 1), 0).as_strided_((3, 3), (4, 1), 1),
            lambda tensor: tensor.untyped_storage().resize_(0),
            lambda tensor: tensor.untyped_storage().resize_(1 << 12),
        )
        try:
            return all(map(notices, changes))
        except Exception:  # of a torch in which one of them cannot be made
            return False
