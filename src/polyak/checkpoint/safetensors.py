"""SAFETENSORS: one file, whose header says where each tensor is.

No tensor is read to open it, and no byte of the header is believed before all of them fit.
"""

from __future__ import annotations

import math
import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from polyak.checkpoint.broken import broken
from polyak.checkpoint.content import Checkpoint
from polyak.checkpoint.elements import read_elements
from polyak.checkpoint.stored import Stored
from polyak.checkpoint.strict_json import parse
from polyak.files import CODES, LONGEST_HEADER_BYTES

__all__ = ["open_safetensors"]


def open_safetensors(path: Path, stack: ExitStack) -> Checkpoint:
    """Open a safetensors file.

    Args:
        path: of the file.
        stack: closes it.

    Raises:
        ValueError: it is not whole.
        OSError: it cannot be read.
    """
    file = stack.enter_context(path.open("rb", buffering=0))
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER_BYTES, size - 8):
        raise broken(path, f"its header is said to have {length} of its {size} bytes")
    text = file.read(length)
    try:
        head = parse(text.decode())
        metadata = head.pop("__metadata__", {})
        if not all(isinstance(part, str) for item in metadata.items() for part in item):
            raise ValueError("metadata that are no text")  # the file's, not a caller's
        tensors = {name: _entry(name, entry) for name, entry in head.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path, f"its header says {error}") from None
    end = 0
    for name, (_, _, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise broken(path, f"{name!r} begins at byte {start}, and what is before ends at {end}")
        end = stop
    if 8 + length + end != size:
        raise broken(path, f"it has {size} bytes, and its header tells of {8 + length + end}")
    tree = {
        name: Stored(
            dtype,
            shape,
            (str(path), name),
            partial(read_elements, file, path, 8 + length + start, dtype),
        )
        for name, (dtype, shape, start, _) in tensors.items()
    }
    return Checkpoint(path, "safetensors", tree, metadata, [path])


_DTYPES = {code: dtype for dtype, code in CODES.items()}


def _entry(name: str, entry: dict[str, Any]) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"{name!r} is of the dtype {dtype!r}, which torch cannot hold")
    numbers = [*shape, start, stop]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{name!r} has the shape {shape} from byte {start} to {stop}")
    if math.prod(max(1, number) for number in shape) >= 1 << 60:
        raise ValueError(f"{name!r} has the shape {shape}, which takes more than torch can count")
    expected = math.prod(shape) * _DTYPES[dtype].itemsize
    if stop - start != expected:
        raise ValueError(f"{name!r} has {stop - start} bytes, and {dtype} {shape} takes {expected}")
    return _DTYPES[dtype], tuple(shape), start, stop
