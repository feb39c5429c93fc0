"""SAVED: a file of `torch.save`, mapped into memory and copied from when a tensor is read.

How it is read without running what is in it is the affair of `archive`.
"""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polyak.checkpoint.archive import check_archive, load, program_of
from polyak.checkpoint.broken import broken
from polyak.checkpoint.content import Checkpoint
from polyak.checkpoint.stored import Stored

__all__ = ["open_saved"]


def open_saved(path: Path) -> Checkpoint:
    """Open a file of `torch.save`.

    Raises:
        ValueError: it is not whole, or holds objects of a program.
        OSError: it is not there.
    """
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, size)
        loaded = load(path, mapped=True)
    except Exception as error:  # of any kind: the bytes can be anything
        if program := program_of(error):
            raise ValueError(
                f"{str(path)!r} holds objects of a program ({program}), which could run any code "
                "when they are read, so they are not. Where that program is installed, load it "
                "there and save its tensors: torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        why = str(error).partition("\n")[0][:300]
        raise broken(path, f"it cannot be read ({type(error).__name__}: {why})") from None
    return Checkpoint(path, "torch", _planted(loaded, path, size), {}, [path])


def _planted(loaded: Any, path: Path, size: int) -> Any:
    """Return a tree with each tensor replaced by where it is."""
    left = size  # a value takes a byte at least, unless it is in the tree again and again

    def plant(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise broken(path, f"it is said to hold more than {size} values")
        if isinstance(value, Tensor):
            return _mapped(value.detach(), path, size)
        if isinstance(value, argparse.Namespace):
            return plant(vars(value))
        if isinstance(value, Mapping):
            return {key: plant(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plant(item) for item in value]
        return value

    return plant(loaded)


def _mapped(tensor: Tensor, path: Path, size: int) -> Stored | str:
    """Return where a tensor is that is mapped into memory; of other kinds only what it is."""
    plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_quantized
    if not plain or tensor.device.type != "cpu":
        return f"a {type(tensor).__name__} of {tensor.dtype} in the layout {tensor.layout}"
    shape = tuple(tensor.shape)
    if tensor.numel() * tensor.dtype.itemsize > size:  # one element, repeated
        raise broken(path, f"a tensor in it is said to be {tensor.dtype} {shape}")
    identity = (
        *(tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype),
        *(shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()),
    )
    return Stored(tensor.dtype, shape, identity, partial(_view, tensor, path, size))


def _view(tensor: Tensor, path: Path, size: int, start: int, stop: int, buffer: Tensor) -> Tensor:
    """Copy elements of a tensor that is mapped into memory, from a file of some size."""
    now = path.stat().st_size
    if now < size:  # of which the system would end this process
        raise broken(path, f"it ends at byte {now}, and was longer when it was opened")
    into = buffer.view(tensor.dtype)
    if tensor.is_contiguous():
        return into.copy_(tensor.view(-1)[start:stop])
    each = tensor.numel() // tensor.shape[0]
    first = start // each
    rows = tensor[first : -(-stop // each)].reshape(-1)
    return into.copy_(rows[start - first * each : stop - first * each])
