"""ELEMENTS: some elements of a tensor, read from where they are in a file. Bytes, no formats."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from polyak.checkpoint.broken import broken

__all__ = ["read_elements"]


def read_elements(
    file: BinaryIO,
    path: Path,
    origin: int,
    dtype: torch.dtype,
    start: int,
    stop: int,
    buffer: Tensor,
) -> Tensor:
    """Read elements `start` to `stop` of what begins at a byte of a file."""
    if buffer.numel():
        # By address, because Tensor.numpy() needs numpy, which torch does not depend on.
        view = memoryview((ctypes.c_char * buffer.numel()).from_address(buffer.data_ptr()))
        view, at = view.cast("B"), origin + start * dtype.itemsize
        while view:
            count = os.preadv(file.fileno(), [view], at)
            if not count:
                raise broken(path, f"it ends at byte {at}, and was longer when it was opened")
            view, at = view[count:], at + count
    return buffer.view(dtype)
