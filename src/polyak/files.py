"""FILES: tensors by name in safetensors, with a fact sheet and checksums in the header.

Whatever happens while a file is written, its path holds the old file or the new one, whole.
Any safetensors loader reads what is written here, as weights.

This module may not know what an average or a model is, may not unpickle, and may not hold two
tensors at once while it writes.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeAlias

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = [
    "CODES",
    "LONGEST_HEADER_BYTES",
    "Lazy",
    "Promise",
    "Put",
    "atomic",
    "atomic_folder",
    "read",
    "read_facts",
    "verify",
    "write",
    "write_sharded",
    "writing",
    "writing_order",
]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
StrPath: TypeAlias = "str | os.PathLike[str]"
Put: TypeAlias = "Callable[[Tensor], object]"


class Promise(NamedTuple):
    """What is known of a tensor before it is written.

    Args:
        dtype: of its elements.
        shape: of the whole tensor.
    """

    dtype: torch.dtype
    shape: Sequence[int]


class Lazy(NamedTuple):
    """A tensor that is made when its turn to be written comes, and let go before the next one.

    Args:
        dtype: of the tensor that `read` returns.
        shape: of the tensor that `read` returns.
        read: makes the tensor, on any device. Called once.
    """

    dtype: torch.dtype
    shape: Sequence[int]
    read: Callable[[], Tensor]


def write(
    path: StrPath, tensors: Mapping[str, Tensor | Lazy], facts: Mapping[str, JSON] | None = None
) -> None:
    """Write tensors and facts to one safetensors file, atomically and durably.

    Equal input gives equal bytes. A tensor under several names is written under each of them.
    Of a tensor on an accelerator at most 16 MiB are in host memory at any moment. After any error
    the old file is as it was.

    >>> import tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a.safetensors", {"w": torch.ones(2)}, {"clock": 7})
    ...     files.read_facts(f"{folder}/a.safetensors")
    {'clock': 7}

    Args:
        path: the file to write or to replace; see `atomic`.
        tensors: dense tensors of any shape, strides and device, of any dtype that the installed
            safetensors loads.
        facts: what `read_facts` returns. Plain JSON: dicts with str keys, lists, str, int, finite
            float, bool, None.

    Raises:
        TypeError: some names, tensors or facts cannot be stored. All of them are listed.
        ValueError: a `Lazy` made another tensor than it promised, or the header gets too long.
        OSError: the path cannot be written.
    """
    lazy = _checked(tensors)
    with writing(path, lazy, facts) as put:
        for name, tensor in lazy.items():
            _put(put, name, tensor)


def write_sharded(
    folder: StrPath,
    tensors: Mapping[str, Tensor | Lazy],
    shard_bytes: int,
    facts: Mapping[str, JSON] | None = None,
) -> None:
    """Write tensors to a new folder, as several safetensors files with an index.

    The layout is that of Hugging Face: `model-00001-of-00003.safetensors` and so on, and
    `model.safetensors.index.json`, which says in which file each tensor is. Each file is as `write`
    makes it, with all the facts. The folder appears when it is complete.

    >>> import os, tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write_sharded(f"{folder}/a", {"v": torch.ones(2), "w": torch.ones(2)}, 8)
    ...     len(os.listdir(f"{folder}/a"))  # two files of one tensor each, and the index
    3

    Args:
        folder: is made; see `atomic_folder`.
        tensors: as for `write`.
        shard_bytes: how much data a file holds at most; a tensor that is larger has its own.
        facts: as for `write`.

    Raises:
        TypeError, ValueError, OSError: as `write`, and where there is a folder of that name.
    """
    lazy = _checked(tensors)
    with writing(folder, lazy, facts, shard_bytes) as put:
        for name, tensor in lazy.items():
            _put(put, name, tensor)


@contextmanager
def writing(
    path: StrPath,
    promised: Mapping[str, Promise | Lazy],
    facts: Mapping[str, JSON] | None = None,
    shard_bytes: int | None = None,
) -> Iterator[Put]:
    """Open a file, or a folder of files, that is written slice by slice.

    Yields `put`, which takes the elements of the tensors: one tensor after the other in the order
    of `writing_order`, in slices of any length that end where a tensor ends. What is written
    appears when the block ends, complete; after an exception nothing has changed.

    >>> import tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     promised = {"w": files.Promise(torch.float32, (3,))}
    ...     with files.writing(f"{folder}/a.safetensors", promised) as put:
    ...         put(torch.ones(2))
    ...         put(torch.zeros(1))
    ...     files.read(f"{folder}/a.safetensors")
    {'w': tensor([1., 1., 0.])}

    Args:
        path: as for `write`, or with `shard_bytes` as for `write_sharded`.
        promised: dtype and shape of each tensor.
        facts: as for `write`.
        shard_bytes: as for `write_sharded`; None writes one file.

    Raises:
        TypeError, OSError: as `write`.
        ValueError: what was put is not what was promised.
    """
    ordered = {name: promised[name] for name in writing_order(promised)}
    plain = _plain(facts or {})
    if shard_bytes is None:
        with _writing(path, ordered, plain) as put:
            yield put
        return
    parts: list[dict[str, Promise | Lazy]] = []
    room = 0
    for name, promise in ordered.items():
        size = _bytes(promise)
        if not parts or size > room:
            parts.append({})
            room = shard_bytes
        parts[-1][name] = promise
        room -= size
    names = [
        f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)
    ]
    where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
    index = {
        "metadata": {"total_size": sum(map(_bytes, ordered.values()))},
        "weight_map": dict(sorted(where.items())),
    }
    with atomic_folder(path) as inside:
        shards = {inside / name: part for name, part in zip(names, parts, strict=True)}
        with _in_turn(shards, plain) as put:
            yield put
        with atomic(inside / "model.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode())


@contextmanager
def _writing(
    path: StrPath, promised: Mapping[str, Promise | Lazy], facts: Mapping[str, JSON]
) -> Iterator[Put]:
    """Open one file, as `writing`."""
    checksums = dict.fromkeys(promised, 0)
    draft = _header(promised, facts, checksums)
    left = deque((name, count) for name in promised if (count := _numel(promised[name])))
    with atomic(path) as file:
        file.write(draft)

        def put(elements: Tensor) -> None:
            if not left:
                _refuse(elements)
            name, count = left[0]
            dtype = promised[name].dtype
            if elements.dtype != dtype or elements.numel() > count:
                raise ValueError(
                    f"{elements.numel()} elements of {elements.dtype} came where {count} of "
                    f"{dtype} of the tensor {name!r} were due; put them in the order of "
                    "writing_order, in slices that end where a tensor ends"
                )
            for part in _slices(elements):
                file.write(part)
                checksums[name] = zlib.crc32(part, checksums[name])
            left[0] = (name, count - elements.numel())
            if not left[0][1]:
                left.popleft()

        yield put
        if left:
            raise ValueError(
                f"the elements of {len(left)} tensors were not all put, {left[0][0]!r} the "
                "first of them; put as many as were promised"
            )
        file.seek(0)
        file.write(_header(promised, facts, checksums))


@contextmanager
def _in_turn(
    shards: Mapping[Path, Mapping[str, Promise | Lazy]], facts: Mapping[str, JSON]
) -> Iterator[Put]:
    """Open files one after the other, each when the one before has all its elements."""
    coming = deque(shards.items())
    left = 0
    with ExitStack() as current:
        put_there: Put = _refuse

        def put(elements: Tensor) -> None:
            nonlocal left, put_there
            while not left and coming:
                current.close()
                path, part = coming.popleft()
                put_there = current.enter_context(_writing(path, part, facts))
                left = sum(map(_numel, part.values()))
            put_there(elements)
            left -= elements.numel()

        yield put
    for path, part in coming:
        with _writing(path, part, facts):
            pass


def _refuse(elements: Tensor) -> NoReturn:
    raise ValueError(
        f"{elements.numel()} elements of {elements.dtype} came after the last tensor was complete; "
        "promise them, or leave them out"
    )


def writing_order(tensors: Mapping[str, Tensor | Lazy | Promise]) -> list[str]:
    """Return the names in the order in which tensors are written, and asked for.

    Wide dtypes come first, so that each tensor is aligned.

    Raises:
        TypeError: some names or tensors cannot be stored. All of them are listed.
    """
    reasons = {name: _name_fault(name) or _fault(value) for name, value in tensors.items()}
    faults = [f"{name!r} ({reason})" for name, reason in reasons.items() if reason]
    if faults:
        raise TypeError(
            f"cannot store {len(faults)} of the {len(tensors)} tensors: {', '.join(faults)}. "
            "Pass dense tensors that hold data, under names that are text: x.to_dense() of a "
            "sparse tensor, x.full_tensor() of a sharded one, torch.view_as_real(x) of a complex "
            "one."
        )
    return sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))


def read(path: StrPath) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file, polyak's or another's, into host memory.

    The bytes of the tensors are not compared with their checksums: `verify` does that.

    >>> import tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a.safetensors", {"w": torch.ones(2)})
    ...     files.read(f"{folder}/a.safetensors")
    {'w': tensor([1., 1.])}

    Args:
        path: a safetensors file.

    Raises:
        ValueError: the file is not safetensors, is cut short, or has a damaged header.
        OSError: there is no such file, or it cannot be read.
    """
    with _opened(path) as (file, _):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_facts(path: StrPath) -> dict[str, Any]:
    """Read the facts that `write` stored, from the header alone.

    >>> import tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a.safetensors", {"w": torch.ones(2)}, {"clock": 7, "run": "x"})
    ...     files.read_facts(f"{folder}/a.safetensors")
    {'clock': 7, 'run': 'x'}

    Args:
        path: a file that `write` wrote.

    Raises:
        ValueError: the file has no fact sheet, is not safetensors, is cut short, or has a damaged
            header.
        OSError: there is no such file, or it cannot be read.
    """
    facts: dict[str, Any] = _sheet_of(path)["facts"]
    return facts


def verify(path: StrPath) -> list[str]:
    """Return the names of the tensors whose bytes are not the ones that were written.

    safetensors notices a file that was cut short, but not a flipped bit. So `write` stores the
    CRC-32 of each tensor, which this compares, and of the header, which every reader here compares.

    >>> import tempfile
    >>> import torch
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     files.write(f"{folder}/a.safetensors", {"n": torch.tensor(3), "w": torch.ones(2)})
    ...     with open(f"{folder}/a.safetensors", "r+b") as file:
    ...         _ = file.seek(-1, 2), file.write(b"!")
    ...     files.verify(f"{folder}/a.safetensors")
    ['w']

    Args:
        path: a file that `write` wrote.

    Returns:
        The names, in the order of the file; empty when every byte is as it was written.

    Raises:
        ValueError: the file has no checksums, is not safetensors, is cut short, or has a damaged
            header.
        OSError: there is no such file, or it cannot be read.
    """
    sums = _sheet_of(path).get("crc32")
    checksums = sums.get("tensors") if isinstance(sums, dict) else None
    damaged = []
    with Path(path).open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        names = head.keys() - {"__metadata__"}
        if not isinstance(checksums, dict) or checksums.keys() != names:
            raise ValueError(
                f"{os.fspath(path)!r} has no checksum for each of its {len(names)} tensors, as "
                "every file of polyak has: it was made by something else. files.read reads its "
                "tensors, unchecked."
            )
        for name, checksum in checksums.items():
            start, stop = head[name]["data_offsets"]
            if f"{_checksum(file, stop - start):08x}" != checksum:
                damaged.append(name)
    return damaged


@contextmanager
def atomic(path: StrPath) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of `path` when the block ends without an exception.

    Until then the bytes are in a temporary file in the same folder. It is synced to the disk before
    it is renamed, and removed on any exception. What a killed process leaves is removed by the next
    `atomic` in that folder on that host.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with files.atomic(f"{folder}/note") as file:
    ...         _ = file.write(b"all or nothing")
    ...     Path(folder, "note").read_bytes()
    b'all or nothing'

    Args:
        path: the file to write or to replace, with the permissions of a new file. A symbolic link
            stays one: the file that it leads to is replaced.

    Raises:
        OSError: there is no such folder, `path` is something else than a file, the disk is full, or
            whatever the system reports.
    """
    target = Path(os.path.realpath(path))
    folder = target.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {str(folder)!r}. "
            f"Make it first: os.makedirs({str(folder)!r})."
        )
    if target.exists() and not target.is_file():
        raise IsADirectoryError(
            f"cannot write {os.fspath(path)!r}: it exists and is not a file. "
            "Pass the path of a file, such as one in that folder."
        )
    _remove_leftovers(folder)
    temporary = folder / _temporary_name()
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)


@contextmanager
def atomic_folder(path: StrPath) -> Iterator[Path]:
    """Make a folder that appears as `path` when the block ends without an exception.

    Until then it has another name beside it; on any exception it is removed, and what a killed
    process leaves is removed as for `atomic`. A folder cannot be replaced in one step: `path` may
    not be there yet, or be an empty folder.

    >>> import os, tempfile
    >>> from polyak import files
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with files.atomic_folder(f"{folder}/new") as inside:
    ...         _ = (inside / "note").write_text("all or nothing")
    ...     os.listdir(f"{folder}/new")
    ['note']

    Args:
        path: the folder to make.

    Raises:
        FileExistsError: it is there, and is no empty folder.
        OSError: its parent is not there, or whatever the system reports.
    """
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"cannot write {os.fspath(path)!r}: there is no folder {str(target.parent)!r}. "
            f"Make it first: os.makedirs({str(target.parent)!r})."
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"cannot write {os.fspath(path)!r}: it exists already, and a folder cannot be replaced "
            "without a moment in which neither is there. Write to a new name, or remove it first."
        )
    _remove_leftovers(target.parent)
    temporary = target.parent / _temporary_name()
    try:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(target.parent)


# The header. Its own checksum comes first, so that it lies at the same place in every file.

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_BLANK = b"00000000"
_SEAL_START = 8 + len(r'{"__metadata__":{"polyak":"{\"crc32\":{\"header\":\"')
_SEAL = slice(_SEAL_START, _SEAL_START + len(_BLANK))
LONGEST_HEADER_BYTES = 100_000_000  # safetensors refuses longer ones


def _header(
    promised: Mapping[str, Promise | Lazy], facts: Mapping[str, JSON], checksums: Mapping[str, int]
) -> bytes:
    """Return all that precedes the data. Its length does not depend on the checksums."""
    sums = {name: f"{checksum:08x}" for name, checksum in checksums.items()}
    sheet = {"crc32": {"header": _BLANK.decode(), "tensors": sums}, "facts": facts}
    head: dict[str, Any] = {"__metadata__": {"polyak": _compact(sheet), "format": "pt"}}
    stop = 0
    for name, lazy in promised.items():
        start, stop = stop, stop + _bytes(lazy)
        head[name] = {
            "dtype": CODES[lazy.dtype],
            "shape": list(lazy.shape),
            "data_offsets": [start, stop],
        }
    text = _compact(head).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > LONGEST_HEADER_BYTES:
        raise ValueError(
            f"names and facts take {len(text)} bytes, and safetensors reads headers of at most "
            f"{LONGEST_HEADER_BYTES}. Shorten the facts."
        )
    header = bytearray(len(text).to_bytes(8, "little") + text)
    header[_SEAL] = _seal(header)
    return bytes(header)


def _seal(header: bytearray) -> bytes:
    """Return the checksum of a header, taken while the checksum's own place is blank."""
    blank = header.copy()
    blank[_SEAL] = _BLANK
    return b"%08x" % zlib.crc32(blank)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


@contextmanager
def _opened(path: StrPath) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    """Yield a whole safetensors file, and its fact sheet if polyak wrote it."""
    if Path(path).is_dir():
        raise IsADirectoryError(
            f"cannot read {os.fspath(path)!r}: it is a folder. Pass the path of a file in it."
        )
    try:
        with safe_open(path, framework="pt") as file:
            sheet = (file.metadata() or {}).get("polyak")
            if sheet is not None:
                _check_seal(path)
            yield file, sheet and json.loads(sheet)
    except SafetensorError as error:
        raise ValueError(
            f"{os.fspath(path)!r} ({Path(path).stat().st_size} bytes) is not a whole safetensors "
            f"file: {error}. It was cut short or damaged, or is of another kind: copy it again, or "
            "use an earlier one."
        ) from error


def _check_seal(path: StrPath) -> None:
    with Path(path).open("rb") as file:
        length = file.read(8)
        header = bytearray(length + file.read(int.from_bytes(length, "little")))
    found, computed = bytes(header[_SEAL]), _seal(header)
    if found != computed:
        raise ValueError(
            f"the header of {os.fspath(path)!r} is not as polyak wrote it: its checksum reads "
            f"{found!r} and should be {computed!r}. It was damaged (copy it again, or use an "
            "earlier one), or written anew by another program (safetensors.torch.load_file reads "
            "it, unchecked)."
        )


def _sheet_of(path: StrPath) -> dict[str, Any]:
    with _opened(path) as (file, sheet):
        if sheet is None:
            raise ValueError(
                f"{os.fspath(path)!r} has no fact sheet and no checksums: its metadata is "
                f"{file.metadata()}, so polyak did not write it. files.read reads its tensors."
            )
        return sheet


# What can be stored.


def _checked(tensors: Mapping[str, Tensor | Lazy]) -> dict[str, Lazy]:
    """Return the tensors in the file's order."""
    return {name: _lazy(tensors[name]) for name in writing_order(tensors)}


def _name_fault(name: str) -> str | None:
    if not isinstance(name, str):
        return f"a name of type {type(name).__name__}"
    if name == "__metadata__":
        return "a name that safetensors keeps for itself"
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "a name that is not valid Unicode"
    return None


def _fault(value: Tensor | Lazy | Promise) -> str | None:
    if not isinstance(value, (Tensor, Lazy, Promise)):
        return f"a {type(value).__name__}, not a tensor"
    if not _loads(value.dtype):
        return f"safetensors {safetensors.__version__} does not load {value.dtype}"
    if not isinstance(value, Tensor):
        return None
    if is_traceable_wrapper_subclass(value):
        return f"a {type(value).__name__}, which wraps other tensors"
    if value.layout != torch.strided:
        return f"its layout is {value.layout}"
    if value.is_meta:
        return "on the meta device, without data"
    return None


@functools.cache
def _loads(dtype: torch.dtype) -> bool:
    """Whether the installed safetensors loads a dtype, found out by loading one element of it."""
    if dtype not in CODES:
        return False
    size = dtype.itemsize
    entry = {"dtype": CODES[dtype], "shape": [1], "data_offsets": [0, size]}
    head = _compact({"x": entry}).encode()
    try:
        safetensors.torch.load(len(head).to_bytes(8, "little") + head + bytes(size))
    except (SafetensorError, KeyError):
        return False
    return True


def _lazy(value: Tensor | Lazy) -> Lazy:
    return value if isinstance(value, Lazy) else Lazy(value.dtype, value.shape, lambda: value)


def _numel(promise: Promise | Lazy) -> int:
    return math.prod(promise.shape)


def _bytes(promise: Promise | Lazy) -> int:
    return _numel(promise) * promise.dtype.itemsize


def _plain(facts: Mapping[str, JSON]) -> dict[str, JSON]:
    faults = [key for key, fact in facts.items() if not (isinstance(key, str) and _survives(fact))]
    if faults:
        raise TypeError(
            f"cannot store the facts {faults}: JSON would not give them back as they are. Use "
            "dicts with str keys, lists (not tuples), str, int, finite float, bool and None."
        )
    return dict(facts)


def _survives(fact: JSON) -> bool:
    try:
        return bool(json.loads(_compact(fact)) == fact)
    except (TypeError, ValueError):
        return False


# The data.

_SLICE_BYTES = 16 << 20


def _put(put: Put, name: str, lazy: Lazy) -> None:
    """Put all elements of a tensor, which on return is let go."""
    tensor = lazy.read()
    fault = _fault(tensor)
    if not fault and (tensor.dtype, tuple(tensor.shape)) != (lazy.dtype, tuple(lazy.shape)):
        fault = f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    if fault:
        raise ValueError(
            f"the Lazy tensor {name!r} promised {lazy.dtype} of shape {tuple(lazy.shape)}, and "
            f"read() returned something else: {fault}. Give Lazy the dtype and shape of what "
            "read() returns."
        )
    if tensor.numel():
        put(tensor)


def _slices(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in row-major order. A view is valid until the next is asked for."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    for part in torch.split(dense.view(-1).view(torch.uint8), _SLICE_BYTES):
        near = part.cpu()
        # By address, because Tensor.numpy() needs numpy, which torch does not depend on.
        yield memoryview((ctypes.c_char * near.numel()).from_address(near.data_ptr())).cast("B")


def _checksum(file: BinaryIO, size: int) -> int:
    checksum = 0
    for start in range(0, size, _SLICE_BYTES):
        checksum = zlib.crc32(file.read(min(_SLICE_BYTES, size - start)), checksum)
    return checksum


# Temporary files. Their names say who writes them, so that those of the dead can be removed.

_serial = itertools.count()


def _temporary_name() -> str:
    pid = os.getpid()
    return f".polyak-{_home()}-{pid}-{_started(pid)}-{next(_serial)}.tmp"


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left. What may not be seen or removed does not stop a writer."""
    mine = re.compile(rf"\.polyak-{re.escape(_home())}-(\d+)-(\d+)-\d+\.tmp")
    with suppress(OSError):
        for path in folder.iterdir():
            match = mine.fullmatch(path.name)
            if match and _is_dead(int(match[1]), int(match[2])):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def _home() -> str:
    """Name the processes that can be seen from here: the host and, on Linux, the pid namespace."""
    try:
        return f"{platform.node()}-{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return platform.node()


def _is_dead(pid: int, started: int) -> bool:
    if os.name != "posix":
        return False  # there signal 0 does not merely ask
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, as another user's
    return _started(pid) not in (started, 0)


def _started(pid: int) -> int:
    """Return when a process began, in ticks since boot; -1 for a zombie, 0 if it is not told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return -1 if fields[0] in "ZX" else int(fields[19])


def _sync(folder: Path) -> None:
    """Make a rename in a folder durable."""
    if os.name != "posix":
        return  # there a folder cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of file systems that do not sync folders
            raise
    finally:
        os.close(descriptor)
