"""STORED: a tensor of a checkpoint, where it is stored. How it is read, who made it knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Stored"]


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, where it is stored.

    Attributes:
        dtype: of its elements.
        shape: of the whole tensor.
        identity: equal for the names of one tensor (tied weights), where the file can tell.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    identity: Hashable = field(repr=False)
    _read: Callable[[int, int, Tensor], Tensor] = field(repr=False, compare=False)

    def numel(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size of its elements, in bytes."""
        return self.numel() * self.dtype.itemsize

    def slice(self, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Read some of its elements, counted in row-major order.

        Args:
            start: the first.
            stop: the one after the last.
            buffer: bytes (uint8, contiguous, on the CPU) to read into, as many as the elements
                have or more; by default new memory.

        Returns:
            A tensor of one dimension, on the CPU; a view of the buffer.

        Raises:
            ValueError: there are no such elements, the buffer is too small, or the file is damaged.
            OSError: the file cannot be read.
        """
        size = (stop - start) * self.dtype.itemsize
        if not 0 <= start <= stop <= self.numel() or (buffer is not None and len(buffer) < size):
            raise ValueError(
                f"cannot read the elements {start} to {stop} of {self.numel()} into "
                f"{'new memory' if buffer is None else f'{len(buffer)} bytes'}: pass 0 <= start <= "
                f"stop <= numel() and a buffer of at least {size} bytes"
            )
        if buffer is None:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._read(start, stop, buffer[:size])

    def read(self) -> Tensor:
        """Read the whole tensor into new memory."""
        return self.slice(0, self.numel()).view(self.shape)
