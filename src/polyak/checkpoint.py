"""CHECKPOINTS: the tensors of any checkpoint by name, each read when it is asked for, in slices.

safetensors, several of them with an index, files of `torch.save`, folders of
torch.distributed.checkpoint. Whatever a file says is checked before it is believed: nothing is
unpickled that could run code, no declared size is allocated before the bytes are known to be there,
and no name leads out of the checkpoint's own folder. This module knows no producers (`formats`
does) and writes nothing (`files` does).
"""

from __future__ import annotations

import argparse
import bisect
import ctypes
import dataclasses
import io
import json
import math
import mmap
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from polyak.files import CODES, LONGEST_HEADER_BYTES, StrPath

__all__ = ["NO_WEIGHTS", "Checkpoint", "Stored", "named", "opened"]


# What trainers keep beside weights, in files that look alike.
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"}


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


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file or folder.
        container: "safetensors", "sharded safetensors", "torch" or "dcp".
        tree: what is in it: nested dicts and lists, `Stored` tensors, plain values.
        metadata: what a safetensors header says besides tensors.
        files: the files that the tensors are in.
    """

    path: Path
    container: str
    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()

    @property
    def tensors(self) -> dict[str, Stored]:
        """All tensors, by the dotted path to each."""
        return named(self.tree)

    @property
    def facts(self) -> dict[str, Any] | None:
        """The fact sheet, if polyak wrote it."""
        sheet = self.metadata.get("polyak")
        if sheet is None:
            return None
        try:
            facts = json.loads(sheet)["facts"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _broken(self.path, f"its fact sheet cannot be read ({error})") from None
        return facts if isinstance(facts, dict) else None

    def at(self, place: str) -> Any:
        """Return what is at a dotted path, such as `"ema.module"`; the whole tree for `""`.

        Raises:
            ValueError: there is no such place; the message names what there is.
        """
        found, rest = self.tree, place
        while rest:
            key = next((key for key in _prefixes(rest) if _has(found, key)), None)
            if key is None:
                there = sorted(map(str, found))[:20] if isinstance(found, dict) else []
                raise ValueError(
                    f"{str(self.path)!r} has nothing at {place!r}: where {rest!r} should be, there "
                    f"is {', '.join(map(repr, there)) or f'a {type(found).__name__}'}. Pass one of "
                    "the paths that are there, such as 'state_dict'"
                )
            found, rest = _get(found, key), rest[len(key) + 1 :]
        return found


def named(tree: Any, prefix: str = "") -> dict[str, Stored]:
    """Return the tensors in a tree by the dotted path to each, in its order.

    Raises:
        ValueError: one path leads to two tensors.
    """
    if isinstance(tree, Stored):
        return {prefix: tree}
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    found: dict[str, Stored] = {}
    for key, value in items:
        inside = named(value, f"{prefix}.{key}" if prefix else str(key))
        twice = found.keys() & inside.keys()
        if twice:
            raise ValueError(
                f"there are two tensors at {min(twice)!r}, by different keys: pass the place of "
                "one of the parts that they are in"
            )
        found |= inside
    return found


@contextmanager
def opened(path: StrPath) -> Iterator[Checkpoint]:
    """Open a checkpoint: a file, a folder, or the index of several files.

    What it is, its content says, not its name.

    >>> import tempfile
    >>> from polyak import checkpoint, files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": {"w": torch.ones(2, 3)}}, f"{folder}/a.pt")
    ...     with checkpoint.opened(f"{folder}/a.pt") as a:
    ...         a.container, a.tensors["model.w"].shape, a.tensors["model.w"].slice(0, 2)
    ('torch', (2, 3), tensor([1., 1.]))

    Args:
        path: is only read.

    Raises:
        ValueError: it is no checkpoint, cut short or damaged, or could only be unpickled.
        OSError: there is no such file, or it cannot be read.
    """
    with ExitStack() as stack:
        try:
            found = _open(Path(path), stack)
        except RecursionError:
            raise _broken(Path(path), "its contents are nested too deep") from None
        except MemoryError:
            raise _broken(Path(path), "it asks for more memory than there is") from None
        yield found


def _open(path: Path, stack: ExitStack) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, stack)
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{str(path)!r} is neither a file nor a folder, and reading it may never end. Pass the "
            "path of a checkpoint"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if path.name.endswith(".index.json"):
        return _open_index(path, stack)
    if start.startswith(b"PK\x03\x04"):
        return _open_torch(path)
    if start[8:9] == b"{":
        return _open_safetensors(path, stack)
    if start[:1] == b"\x80":
        raise ValueError(
            f"{str(path)!r} is a pickle, which could run any code when it is read, so it is not. "
            "If torch before 1.6 wrote it, torch.save(torch.load(path, weights_only=True), "
            "'new.pt') makes a file that is read; else load it where its program is installed, and "
            "save its tensors: safetensors.torch.save_file(model.state_dict(), 'new.safetensors')"
        )
    raise ValueError(
        f"{str(path)!r} is no checkpoint that can be read: it begins with {start!r}. Pass a "
        "safetensors file, an index of several, a file of torch.save, or a folder of "
        "torch.distributed.checkpoint"
    )


def _open_folder(path: Path, stack: ExitStack) -> Checkpoint:
    if (path / ".metadata").is_file():
        return _open_dcp(path)
    names = sorted(e.name for e in path.iterdir() if e.is_file() and e.name not in NO_WEIGHTS)
    for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
        found = [name for name in names if name.endswith(ending)]
        if len(found) == 1:
            return _open(path / found[0], stack)
        if found:
            raise ValueError(
                f"{str(path)!r} has {len(found)} checkpoints: {', '.join(found[:20])}. Pass the "
                "path of the one that is meant"
            )
    raise ValueError(
        f"{str(path)!r} is a folder without a checkpoint: it has {', '.join(names[:20]) or 'no'} "
        "files. Pass the path of a file, or a folder with safetensors or a .metadata file in it"
    )


# ------------------------------------------------------------------------------------ safetensors


def _open_safetensors(path: Path, stack: ExitStack) -> Checkpoint:
    file = stack.enter_context(path.open("rb", buffering=0))
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER_BYTES, size - 8):
        raise _broken(path, f"its header is said to have {length} of its {size} bytes")
    text = file.read(length)
    try:
        head = json.loads(text.decode(), object_pairs_hook=_once)
        metadata = head.pop("__metadata__", {})
        if not all(isinstance(part, str) for item in metadata.items() for part in item):
            raise ValueError("metadata that are no text")  # the file's, not a caller's
        tensors = {name: _entry(name, entry) for name, entry in head.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _broken(path, f"its header says {error}") from None
    end = 0
    for name, (_, _, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != end:
            raise _broken(
                path, f"{name!r} begins at byte {start}, and what is before ends at {end}"
            )
        end = stop
    if 8 + length + end != size:
        raise _broken(path, f"it has {size} bytes, and its header tells of {8 + length + end}")
    tree = {
        name: Stored(
            dtype, shape, (str(path), name), partial(_pread, file, path, 8 + length + start, dtype)
        )
        for name, (dtype, shape, start, _) in tensors.items()
    }
    return Checkpoint(path, "safetensors", tree, metadata, [path])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} twice")
    return found


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


def _pread(
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
                raise _broken(path, f"it ends at byte {at}, and was longer when it was opened")
            view, at = view[count:], at + count
    return buffer.view(dtype)


def _open_index(path: Path, stack: ExitStack) -> Checkpoint:
    try:
        index = json.loads(path.read_text(), object_pairs_hook=_once)
        where = index["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _broken(
            path, f"it is no index of tensors ({type(error).__name__}: {error})"
        ) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise _broken(path, f"it leads to {name!r}, which is no file beside it")
        if name.endswith(".index.json"):
            raise _broken(path, f"it leads to {name!r}, which is another index")
    shards = {}
    for name in names:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(
                f"{str(path)!r} tells of {name!r}, which is not beside it: the checkpoint is not "
                "complete. Copy all of its files into one folder"
            )
        shards[name] = _open(path.parent / name, stack)
    tree, missing = {}, []
    for name, file in where.items():
        stored = shards[file].tree.get(name) if isinstance(shards[file].tree, dict) else None
        if isinstance(stored, Stored):
            tree[name] = stored
        else:
            missing.append(f"{name!r} in {file!r}")
    extra = [
        f"{name!r} in {file!r}"
        for file, shard in shards.items()
        for name in named(shard.tree)
        if where.get(name) != file
    ]
    if missing or extra:
        lines = [f"there is no {line}" for line in missing] + [f"it leaves out {x}" for x in extra]
        raise _broken(path, f"it does not fit its files: {'; '.join(lines[:20])}")
    first = next(iter(shards.values()), None)
    kind = first.container if first else "safetensors"
    metadata = first.metadata if first else {}
    return Checkpoint(
        path, f"sharded {kind}", tree, metadata, [path.parent / name for name in names]
    )


# ---------------------------------------------------------------------------------- torch.save


def _open_torch(path: Path) -> Checkpoint:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, size)
        loaded = _loaded(path, mapped=True)
    except Exception as error:  # of any kind: the bytes can be anything
        if program := _program(error):
            raise ValueError(
                f"{str(path)!r} holds objects of a program ({program}), which could run any code "
                "when they are read, so they are not. Where that program is installed, load it "
                "there and save its tensors: torch.save(model.state_dict(), 'weights.pt')"
            ) from None
        why = str(error).partition("\n")[0][:300]
        raise _broken(path, f"it cannot be read ({type(error).__name__}: {why})") from None
    return Checkpoint(path, "torch", _planted(loaded, path, size), {}, [path])


def _check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of this size in which something could be larger than it is."""
    entries = archive.infolist()
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise zipfile.BadZipFile("it is compressed, which torch.save never does")
    if archive.comment:  # in which there could be another directory
        raise zipfile.BadZipFile("it has a comment, which torch.save never writes")
    if len({entry.filename for entry in entries}) != len(entries):
        raise zipfile.BadZipFile("it has two entries of one name")
    if sum(entry.file_size for entry in entries) > size:
        raise zipfile.BadZipFile("its entries are said to be larger than it is")


def _loaded(source: Path | BinaryIO, *, mapped: bool) -> Any:
    """Return what torch.save wrote, if it is tensors and plain values."""
    # Of programs only the arguments of a script, which many keep: plain values. What is trusted
    # here torch forgets at the end, also where the user had said so before.
    trusted = torch.serialization.get_safe_globals()
    plain: list[Any] = [kind for kind in (argparse.Namespace,) if kind not in trusted]
    with (
        torch.inference_mode(False),
        torch.serialization.safe_globals(plain),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of older files, and of bytes that were changed
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def _program(error: Exception) -> str | None:
    """Return what of a program a file would have called, if that is why it was not read."""
    found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
    return found[1] if found and isinstance(error, pickle.UnpicklingError) else None


def _planted(loaded: Any, path: Path, size: int) -> Any:
    """Return a tree with each tensor replaced by where it is."""
    left = size  # a value takes a byte at least, unless it is in the tree again and again

    def plant(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise _broken(path, f"it is said to hold more than {size} values")
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
        raise _broken(path, f"a tensor in it is said to be {tensor.dtype} {shape}")
    identity = (
        *(tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype),
        *(shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()),
    )
    return Stored(tensor.dtype, shape, identity, partial(_view, tensor, path, size))


def _view(tensor: Tensor, path: Path, size: int, start: int, stop: int, buffer: Tensor) -> Tensor:
    """Copy elements of a tensor that is mapped into memory, from a file of some size."""
    now = path.stat().st_size
    if now < size:  # of which the system would end this process
        raise _broken(path, f"it ends at byte {now}, and was longer when it was opened")
    into = buffer.view(tensor.dtype)
    if tensor.is_contiguous():
        return into.copy_(tensor.view(-1)[start:stop])
    each = tensor.numel() // tensor.shape[0]
    first = start // each
    rows = tensor[first : -(-stop // each)].reshape(-1)
    return into.copy_(rows[start - first * each : stop - first * each])


# ------------------------------------------------------------------- torch.distributed.checkpoint


class _Metadata(pickle._Unpickler):  # the one in C makes room for as many objects as it is told
    """Reads the description of a checkpoint, and makes no other objects than such have."""

    _PLAIN: ClassVar[Mapping[str, set[str] | None]] = {
        "torch.distributed.checkpoint.metadata": None,  # all classes of it
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in CODES)},
        "collections": {"OrderedDict", "defaultdict"},
        "builtins": {"set"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "Path"},
    }
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        names = self._PLAIN.get(module, set())
        if names is None or name in names:
            found = super().find_class(module, name)
            if names is not None or (isinstance(found, type) and found.__module__ == module):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")

    def _build(self) -> None:
        """Set attributes, of values only: those of a class would be set for the whole process."""
        if not dataclasses.is_dataclass(type(self.stack[-2])):
            raise pickle.UnpicklingError(f"the attributes of {self.stack[-2]!r}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}


def _open_dcp(path: Path) -> Checkpoint:
    import torch.distributed.checkpoint.metadata as kinds

    raw = (path / ".metadata").read_bytes()
    try:
        found = _Metadata(io.BytesIO(raw)).load()
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path / '.metadata')!r} holds an object that no checkpoint has ({error}), which "
            "could run any code, so it is not read. It was not written by "
            "torch.distributed.checkpoint, or it was changed"
        ) from None
    except Exception as error:  # of any kind: the bytes can be anything
        raise _broken(
            path, f"its .metadata cannot be read ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(found, kinds.Metadata) or not isinstance(found.storage_data, dict):
        raise _broken(path, "its .metadata is of something else")
    entries: dict[str, Any] = {}
    used: set[str] = set()
    try:
        for index, info in found.storage_data.items():
            name = str(info.relative_path)
            if Path(name).name != name:
                raise _broken(path, f"it leads to {name!r}, which is no file in it")
            if getattr(info, "transform_descriptors", None):
                raise _broken(path, f"{index.fqn} is transformed by {info.transform_descriptors}")
            size = (path / name).stat().st_size if (path / name).is_file() else -1
            if info.offset < 0 or info.length < 0 or info.offset + info.length > size:
                raise _broken(
                    path, f"{index.fqn} is said to be beyond the {size} bytes of {name!r}"
                )
            used.add(name)
        for name, kind in found.state_dict_metadata.items():
            if isinstance(kind, kinds.TensorStorageMetadata):
                entries[name] = _dcp_tensor(path, name, kind, found.storage_data)
            else:
                entries[name] = _dcp_value(path, found.storage_data[kinds.MetadataIndex(name)])
        tree = _nested(entries, found.planner_data)
    except (AttributeError, KeyError, TypeError) as error:
        raise _broken(
            path, f"its .metadata is not whole ({type(error).__name__}: {error})"
        ) from None
    return Checkpoint(path, "dcp", tree, {}, [path / name for name in (".metadata", *sorted(used))])


def _dcp_tensor(path: Path, name: str, kind: Any, where: Mapping[Any, Any]) -> Stored:
    """Return a tensor that is in pieces, which are put together when it is read."""
    shape, dtype = tuple(kind.size), kind.properties.dtype
    if dtype not in CODES:
        raise _broken(path, f"{name} is of {dtype}, which no file can hold")
    boxes = sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in kind.chunks)
    if not _tile(boxes, shape):
        raise _broken(path, f"the pieces of {name} do not make {dtype} {shape}: {boxes[:20]}")
    infos = {tuple(index.offset or ()): info for index, info in where.items() if index.fqn == name}
    wanted = [(box, infos[box[0]]) for box in boxes if math.prod(box[1])]
    for (_, sizes), info in wanted:
        if math.prod(sizes) * dtype.itemsize > info.length:
            raise _broken(path, f"{dtype} {sizes} of {name} is said to be in {info.length} bytes")
    pieces: dict[_Box, Stored] = {}

    def read(start: int, stop: int, buffer: Tensor) -> Tensor:
        for box, info in wanted:
            for low, high, at in _runs(box, shape, start, stop):
                piece = pieces.get(box) or _dcp_piece(path, info, dtype, box[1])
                pieces[box] = piece
                into = buffer[(low - start) * dtype.itemsize : (high - start) * dtype.itemsize]
                piece.slice(at, at + high - low, into)
        return buffer.view(dtype)

    return Stored(dtype, shape, (str(path), name), read)


_Box: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"  # where it begins, and how large it is


def _tile(boxes: Sequence[_Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, in order, fill a shape, each element once."""
    open_boxes: list[_Box] = []
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)):
            return False
        if not math.prod(sizes) or not shape:
            continue
        open_boxes = [(o, n) for o, n in open_boxes if o[0] + n[0] > offsets[0]]
        for others, lengths in open_boxes:
            sides = zip(offsets, sizes, others, lengths, strict=True)
            if all(o < other + length and other < o + n for o, n, other, length in sides):
                return False
        open_boxes.append((offsets, sizes))
    return sum(math.prod(sizes) for _, sizes in boxes) == math.prod(shape)


def _runs(
    box: _Box, shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[int, int, int]]:
    """Yield which elements from `start` to `stop` are in a box, and where in it, run by run."""
    offsets, sizes = box
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # from this dimension on, elements of the box follow each other
    length, count = math.prod(sizes[inner:]), math.prod(sizes[:inner])

    def begin(number: int) -> int:
        at, stride = 0, 1
        for dim in reversed(range(len(shape))):
            number, index = divmod(number, sizes[dim]) if dim < inner else (number, 0)
            at += (offsets[dim] + index) * stride
            stride *= shape[dim]
        return at

    for number in range(bisect.bisect_right(range(count), start - length, key=begin), count):
        first = begin(number)
        low, high = max(start, first), min(stop, first + length)
        if low >= high:
            return
        yield low, high, number * length + low - first


def _dcp_piece(path: Path, info: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> Stored:
    """Return a piece of a tensor, which is a file of torch.save at some place in a larger one."""
    place = path / info.relative_path
    try:
        origin = _origin(place, info, dtype, sizes)
    except Exception as error:  # of any kind: the bytes can be anything
        raise _broken(place, f"at {info.offset}: {type(error).__name__}: {error}") from None

    def read(start: int, stop: int, buffer: Tensor) -> Tensor:
        if origin is not None:
            with place.open("rb", buffering=0) as file:
                return _pread(file, place, origin, dtype, start, stop, buffer)
        value = _dcp_value(path, info)
        if not (isinstance(value, Tensor) and (value.dtype, tuple(value.shape)) == (dtype, sizes)):
            raise _broken(place, f"at {info.offset} there is no {dtype} {sizes}")
        return buffer.view(dtype).copy_(value.reshape(-1)[start:stop])

    return Stored(dtype, sizes, (str(place), info.offset), read)


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


def _dcp_value(path: Path, info: Any) -> Any:
    """Return a value that is a file of torch.save at some place in a larger one."""
    place = path / info.relative_path
    with place.open("rb") as file:
        file.seek(info.offset)
        blob = file.read(info.length)
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            _check_archive(archive, len(blob))
        return _loaded(io.BytesIO(blob), mapped=False)
    except Exception as error:  # of any kind: the bytes can be anything
        if program := _program(error):
            return f"an object of a program ({program}), which is not read"
        raise _broken(place, f"at {info.offset}: {type(error).__name__}: {error}") from None


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


# ---------------------------------------------------------------------------------------- places


def _prefixes(place: str) -> Iterator[str]:
    """Yield the ways to read the first key of a dotted path, the longest first."""
    parts = place.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _has(tree: Any, key: str) -> bool:
    if isinstance(tree, dict):
        return key in tree or (key.isdigit() and int(key) in tree)
    return isinstance(tree, list) and key.isdigit() and int(key) < len(tree)


def _get(tree: Any, key: str) -> Any:
    return tree[key] if isinstance(tree, dict) and key in tree else tree[int(key)]


def _broken(path: Path, what: str) -> ValueError:
    size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
    return ValueError(
        f"{str(path)!r}{size} is not a whole checkpoint: {what}. It was cut short, damaged or made "
        "to mislead: copy it again, or use an earlier one"
    )
