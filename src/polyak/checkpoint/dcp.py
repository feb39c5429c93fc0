"""DCP: a folder of torch.distributed.checkpoint, whose tensors may be in many pieces.

It puts them together when they are read. How its description is unpickled, and how a piece is read,
others know (`metadata`, `pieces`).
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from polyak.checkpoint.boxes import Box, runs, tile
from polyak.checkpoint.broken import broken
from polyak.checkpoint.content import Checkpoint
from polyak.checkpoint.metadata import unpickle
from polyak.checkpoint.pieces import open_piece, read_value
from polyak.checkpoint.stored import Stored
from polyak.files import CODES

__all__ = ["open_dcp"]


def open_dcp(path: Path) -> Checkpoint:
    """Open a folder of torch.distributed.checkpoint.

    Raises:
        ValueError: it is not whole, or its description has an object in it that none has.
        OSError: it cannot be read.
    """
    import torch.distributed.checkpoint.metadata as kinds

    raw = (path / ".metadata").read_bytes()
    try:
        found = unpickle(raw)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path / '.metadata')!r} holds an object that no checkpoint has ({error}), which "
            "could run any code, so it is not read. It was not written by "
            "torch.distributed.checkpoint, or it was changed"
        ) from None
    except Exception as error:  # of any kind: the bytes can be anything
        raise broken(
            path, f"its .metadata cannot be read ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(found, kinds.Metadata) or not isinstance(found.storage_data, dict):
        raise broken(path, "its .metadata is of something else")
    entries: dict[str, Any] = {}
    used: set[str] = set()
    try:
        for index, info in found.storage_data.items():
            name = str(info.relative_path)
            if Path(name).name != name:
                raise broken(path, f"it leads to {name!r}, which is no file in it")
            if getattr(info, "transform_descriptors", None):
                raise broken(path, f"{index.fqn} is transformed by {info.transform_descriptors}")
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
                raise broken(path, f"{index.fqn} is said to be beyond the {size} bytes of {name!r}")
            used.add(name)
        for name, kind in found.state_dict_metadata.items():
            if isinstance(kind, kinds.TensorStorageMetadata):
                entries[name] = _tensor(path, name, kind, found.storage_data)
            else:
                entries[name] = read_value(path, found.storage_data[kinds.MetadataIndex(name)])
        tree = _nested(entries, found.planner_data)
    except (AttributeError, KeyError, TypeError) as error:
        raise broken(
            path, f"its .metadata is not whole ({type(error).__name__}: {error})"
        ) from None
    return Checkpoint(path, "dcp", tree, {}, [path / name for name in (".metadata", *sorted(used))])


def _tensor(path: Path, name: str, kind: Any, where: Mapping[Any, Any]) -> Stored:
    """Return a tensor that is in pieces, which are put together when it is read."""
    shape, dtype = tuple(kind.size), kind.properties.dtype
    if dtype not in CODES:
        raise broken(path, f"{name} is of {dtype}, which no file can hold")
    boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kind.chunks)
    if not tile(boxes, shape):
        raise broken(path, f"the pieces of {name} do not make {dtype} {shape}: {boxes[:20]}")
    infos = {tuple(index.offset or ()): info for index, info in where.items() if index.fqn == name}
    wanted = [(box, infos[box[0]]) for box in boxes if math.prod(box[1])]
    for (_, sizes), info in wanted:
        if math.prod(sizes) * dtype.itemsize > info.length:
            raise broken(path, f"{dtype} {sizes} of {name} is said to be in {info.length} bytes")
    pieces: dict[Box, Stored] = {}

    def read(start: int, stop: int, buffer: Tensor) -> Tensor:
        for box, info in wanted:
            for low, high, at in runs(box, shape, start, stop):
                piece = pieces.get(box) or open_piece(path, info, dtype, box[1])
                pieces[box] = piece
                into = buffer[(low - start) * dtype.itemsize : (high - start) * dtype.itemsize]
                piece.slice(at, at + high - low, into)
        return buffer.view(dtype)

    return Stored(dtype, shape, (str(path), name), read)


def _nested(entries: Mapping[str, Any], places: Any) -> dict[Any, Any]:
    """Return the tree that was flattened to these names."""
    tree: dict[Any, Any] = {}
    for name, value in entries.items():
        *path, last = places.get(name, (name,)) if isinstance(places, dict) else (name,)
        inside = tree
        for key in path:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return tree
