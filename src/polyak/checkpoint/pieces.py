"""PIECES: what torch.distributed.checkpoint stored: archives of `torch.save`, one after another.

Of a piece of a tensor whose elements are in order, those that are asked for are read from where
they are; a pickle is searched for that place, and nothing that it would call is called.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from polyak.checkpoint.archive import check_archive, load, program_of
from polyak.checkpoint.broken import broken
from polyak.checkpoint.elements import read_elements
from polyak.checkpoint.stored import Stored

__all__ = ["open_piece", "read_value"]


def open_piece(path: Path, info: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> Stored:
    """Return a piece of a tensor, which is a file of torch.save at some place in a larger one."""
    place = path / info.relative_path
    try:
        origin = _origin(place, info, dtype, sizes)
    except Exception as error:  # of any kind: the bytes can be anything
        raise broken(place, f"at {info.offset}: {type(error).__name__}: {error}") from None

    def read(start: int, stop: int, buffer: Tensor) -> Tensor:
        if origin is not None:
            with place.open("rb", buffering=0) as file:
                return read_elements(file, place, origin, dtype, start, stop, buffer)
        value = read_value(path, info)
        if not (isinstance(value, Tensor) and (value.dtype, tuple(value.shape)) == (dtype, sizes)):
            raise broken(place, f"at {info.offset} there is no {dtype} {sizes}")
        return buffer.view(dtype).copy_(value.reshape(-1)[start:stop])

    return Stored(dtype, sizes, (str(place), info.offset), read)


def read_value(path: Path, info: Any) -> Any:
    """Return a value that is a file of torch.save at some place in a larger one."""
    place = path / info.relative_path
    with place.open("rb") as file:
        file.seek(info.offset)
        blob = file.read(info.length)
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            check_archive(archive, len(blob))
        return load(io.BytesIO(blob), mapped=False)
    except Exception as error:  # of any kind: the bytes can be anything
        if program := program_of(error):
            return f"an object of a program ({program}), which is not read"
        raise broken(place, f"at {info.offset}: {type(error).__name__}: {error}") from None


_STORAGES = {
    torch.float64: "torch.DoubleStorage",
    torch.float32: "torch.FloatStorage",
    torch.float16: "torch.HalfStorage",
    torch.bfloat16: "torch.BFloat16Storage",
}


def _origin(place: Path, info: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> int | None:
    """Return at which byte of a file a piece begins; None if its elements are not just in order."""
    with (
        place.open("rb") as file,
        mmap.mmap(file.fileno(), info.offset + info.length, access=mmap.ACCESS_READ) as mapped,
        zipfile.ZipFile(cast(Any, mapped)) as archive,  # the last one, which ends where this does
    ):
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        begins: dict[str, int] = {}
        ends: dict[str, int] = {}
        for name in ("data.pkl", "data/0"):
            at = entries[name].header_offset
            begins[name] = at + 30 + sum(struct.unpack_from("<HH", mapped, at + 26))
            ends[name] = begins[name] + entries[name].file_size
            if at < info.offset or ends[name] > len(mapped):
                raise ValueError(f"{name} is said to be from byte {at} to {ends[name]}")
        blob = mapped[begins["data.pkl"] : ends["data.pkl"]]
    call = _Calls(io.BytesIO(blob)).load()
    if call.name != "torch._utils._rebuild_tensor_v2" or dtype not in _STORAGES:
        return None
    (_, kind, *_), offset, shape, strides, *_ = call.arguments
    in_order = torch.empty(sizes, device="meta").stride()
    size = ends["data/0"] - begins["data/0"]
    if (kind.name, shape, strides) != (_STORAGES[dtype], sizes, in_order):
        return None
    if not 0 <= offset * dtype.itemsize <= size - math.prod(sizes) * dtype.itemsize:
        raise ValueError(f"{size} bytes are fewer than {dtype} {sizes} takes")
    return begins["data/0"] + int(offset) * dtype.itemsize


class _Call(NamedTuple):
    """What a pickle would call."""

    name: str
    arguments: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> _Call:
        return _Call(self.name, arguments)


class _Calls(pickle._Unpickler):
    """Reads what a pickle would call, and calls nothing."""

    def find_class(self, module: str, name: str) -> Any:
        return _Call(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        return pid
