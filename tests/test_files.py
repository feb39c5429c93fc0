"""files.py: what is written is what was given, any loader reads it, and no file is half there."""

import io
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch import Tensor

import polyak
from polyak import files

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def filled(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bits of a dtype: NaN, infinities and denormals come along."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(256, (count,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype).view(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return tensor.dtype, tuple(tensor.shape), dense.view(-1).view(torch.uint8).tolist()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(bits(left[k]) == bits(right[k]) for k in left)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    os.umask(before)
    yield os.umask
    os.umask(before)


# The format


def test_bits_helper_tells_tensors_apart() -> None:
    one = torch.ones(2)
    assert not same({"a": one}, {"a": torch.tensor([1.0, torch.nan])})
    assert not same({"a": one}, {"a": one.int()})
    assert not same({"a": one}, {"a": one[None]})
    assert not same({"a": one}, {"b": one})
    assert not same({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)})


def test_bytes_of_a_file_are_these(path: Path) -> None:
    # The checksums were computed with gzip.
    tensors = {
        "b": torch.tensor([True]),
        "a": torch.tensor([1, 2]),
        "c": torch.zeros((), dtype=torch.half),
    }
    files.write(path, tensors, {"clock": 7})
    sheet = (
        r"{\"crc32\":{\"header\":\"cbe25c65\",\"tensors\":{\"a\":\"00f6ddb9\",\"c\":\"41d912ff\","
        r"\"b\":\"a505df1b\"}},\"facts\":{\"clock\":7}}"
    )
    head = (
        f'{{"__metadata__":{{"polyak":"{sheet}","format":"pt"}},'
        '"a":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
        '"c":{"dtype":"F16","shape":[],"data_offsets":[16,18]},'
        '"b":{"dtype":"BOOL","shape":[1],"data_offsets":[18,19]}}'
    )
    head += " " * (-len(head) % 8)
    data = b"\1" + bytes(7) + b"\2" + bytes(7) + bytes(2) + b"\1"
    assert path.read_bytes() == len(head).to_bytes(8, "little") + head.encode() + data


def test_offsets_are_contiguous_and_aligned(path: Path) -> None:
    tensors = {f"{dtype}/{n}": filled(dtype, (n,)) for dtype in DTYPES for n in (3, 0, 1)}
    files.write(path, tensors)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + length])
    assert head.pop("__metadata__").keys() == {"format", "polyak"}
    assert length % 8 == 0
    end = 0
    for name, entry in head.items():
        start, stop = entry["data_offsets"]
        assert start == end
        assert start % tensors[name].dtype.itemsize == 0
        end = stop
    assert len(raw) == 8 + length + end


def test_plain_loaders_read_it(path: Path) -> None:
    tensors = {"layer.weight": filled(torch.float32, (3, 4)), "layer.bias": torch.zeros(3)}
    files.write(path, tensors, {"clock": 7})
    assert same(safetensors.torch.load_file(path), tensors)
    assert same(safetensors.torch.load(path.read_bytes()), tensors)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["polyak"])["facts"] == {"clock": 7}


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    tensors = {name: filled(torch.bfloat16, (5, 2), seed) for seed, name in enumerate("xyz")}
    files.write(tmp_path / "a", tensors, {"clock": 7, "decay": [1.5, None]})
    files.write(
        str(tmp_path / "b"), dict(reversed(tensors.items())), {"clock": 7, "decay": [1.5, None]}
    )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_and_shape(path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"x": filled(dtype, shape), "y": torch.ones(3)}
    files.write(path, tensors)
    assert same(files.read(path), tensors)
    assert same(safetensors.torch.load_file(path), tensors)
    assert files.verify(path) == []


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: filled(torch.float32, (3, 4)).t(),
    "strided": lambda: filled(torch.int16, (9,))[1::2],
    "offset": lambda: filled(torch.bfloat16, (9,))[5:],
    "expanded": lambda: filled(torch.float32, (3, 1)).expand(3, 4),
    "channels last": lambda: filled(torch.half, (2, 3, 4, 5)).to(memory_format=torch.channels_last),
    "conjugate": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    "negative": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj().imag,
    "negative, contiguous": lambda: torch._neg_view(torch.arange(3.0)),
    "parameter": lambda: torch.nn.Parameter(filled(torch.float32, (3,))),
    "with a graph": lambda: torch.nn.Parameter(torch.ones(3)) * 2,
    "transposed scalar": lambda: torch.tensor(2.5).t(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(path: Path, layout: str) -> None:
    tensor = LAYOUTS[layout]()
    files.write(path, {"x": tensor})
    assert same(files.read(path), {"x": tensor})


def test_inference_tensors(path: Path) -> None:
    with torch.inference_mode():
        tensor = torch.arange(3.0)
    files.write(path, {"x": tensor})
    assert files.read(path)["x"].tolist() == [0, 1, 2]


def test_a_tied_tensor_is_written_under_each_name(path: Path) -> None:
    tied = filled(torch.float32, (3, 4))
    tensors = {"embed": tied, "head": tied, "view": tied[1:]}
    files.write(path, tensors)
    assert same(safetensors.torch.load_file(path), tensors)


@pytest.mark.parametrize("slice_bytes", [1, 3, 8, 39, 40, 41])
def test_slices_are_seamless(path: Path, monkeypatch: pytest.MonkeyPatch, slice_bytes: int) -> None:
    tensors = {"x": filled(torch.float32, (10,)), "y": filled(torch.uint8, (7,)).t()}
    monkeypatch.setattr(files, "_SLICE_BYTES", slice_bytes)
    files.write(path, tensors)
    assert files.verify(path) == []
    monkeypatch.undo()
    assert files.verify(path) == []
    assert same(files.read(path), tensors)


def test_a_tensor_of_several_slices(path: Path) -> None:
    tensor = torch.arange(files._SLICE_BYTES // 4 + 5, dtype=torch.int32)
    files.write(path, {"x": tensor})
    assert torch.equal(files.read(path)["x"], tensor)
    assert files.verify(path) == []


def test_no_tensors_and_no_facts(path: Path) -> None:
    files.write(path, {})
    assert (files.read(path), files.read_facts(path), files.verify(path)) == ({}, {}, [])


finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
some_tensors = st.builds(
    filled,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.integers(0, 2**31),
)


@given(
    st.dictionaries(
        st.text().filter(lambda name: name != "__metadata__"), some_tensors, max_size=5
    ),
    st.dictionaries(st.text(), json_values, max_size=4),
)
def test_round_trip(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x")
        files.write(path, tensors, facts)
        assert same(files.read(path), tensors)
        assert same(safetensors.torch.load_file(path), tensors)
        assert files.read_facts(path) == facts
        assert files.verify(path) == []


# Lazy tensors


def test_one_lazy_tensor_lives_at_a_time(path: Path) -> None:
    made: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert all(tensor() is None for tensor in made)
        tensor = torch.full((100,), float(len(made)))
        made.append(weakref.ref(tensor))
        return tensor

    files.write(path, {f"{i:02}": files.Lazy(torch.float32, (100,), make) for i in range(20)})
    assert len(made) == 20
    assert [tensor[0].item() for _, tensor in sorted(files.read(path).items())] == [*range(20)]


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (torch.zeros(2, 3), r"torch.float32 of shape \(2, 3\)"),
        (torch.zeros(6, dtype=torch.int32), r"torch.int32 of shape \(6,\)"),
        (torch.zeros(6, device="meta"), "on the meta device, without data"),
        (torch.zeros(6).to_sparse(), "its layout is torch.sparse_coo"),
        (None, "a NoneType, not a tensor"),
    ],
    ids=["shape", "dtype", "meta", "sparse", "none"],
)
def test_a_lazy_tensor_that_is_not_what_it_promised(path: Path, tensor: Tensor, what: str) -> None:
    files.write(path, {"x": torch.zeros(6)})
    old = path.read_bytes()
    promise = r"^the Lazy tensor 'x' promised torch.float32 of shape \(6,\), and read\(\) returned "
    with pytest.raises(ValueError, match=promise + f"something else: {what}. Give Lazy the dtype"):
        files.write(path, {"x": files.Lazy(torch.float32, (6,), lambda: tensor)})
    assert path.read_bytes() == old


# What cannot be stored


class Wrapper(torch.Tensor):
    def __tensor_flatten__(self) -> None: ...
    def __tensor_unflatten__(self) -> None: ...
    @classmethod
    def __torch_dispatch__(cls, *_: object) -> None: ...


def test_all_that_cannot_be_stored_is_listed(path: Path) -> None:
    tensors: dict[Any, Any] = {
        "good": torch.ones(1),
        "lazy": files.Lazy(torch.complex128, (1,), lambda: pytest.fail("was read")),
        "list": [1.0],
        "meta": torch.ones(1, device="meta"),
        "sparse": torch.eye(2).to_sparse(),
        "wrapper": torch.ones(1).as_subclass(Wrapper),
        "__metadata__": torch.ones(1),
        "\ud800": torch.ones(1),
        3: torch.ones(1),
    }
    with pytest.raises(TypeError) as caught:
        files.write(path, tensors)
    assert str(caught.value) == (
        "cannot store 8 of the 9 tensors: "
        f"'lazy' (safetensors {safetensors.__version__} does not load torch.complex128), "
        "'list' (a list, not a tensor), 'meta' (on the meta device, without data), "
        "'sparse' (its layout is torch.sparse_coo), "
        "'wrapper' (a Wrapper, which wraps other tensors), "
        "'__metadata__' (a name that safetensors keeps for itself), "
        r"'\ud800' (a name that is not valid Unicode), 3 (a name of type int). "
        "Pass dense tensors that hold data, under names that are text: x.to_dense() of a sparse "
        "tensor, x.full_tensor() of a sharded one, torch.view_as_real(x) of a complex one."
    )
    assert not path.exists()


@pytest.mark.parametrize("error", [KeyError("C64"), SafetensorError("unknown variant")])
def test_a_dtype_that_an_older_safetensors_does_not_load(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def older(data: bytes) -> None:
        raise error

    monkeypatch.setattr(safetensors.torch, "load", older)
    files._loads.cache_clear()
    with pytest.raises(TypeError, match=r"'x' .*does not load torch.complex64"):
        files.write(path, {"x": torch.ones(1, dtype=torch.complex64)})
    files._loads.cache_clear()


def test_all_facts_that_json_would_change_are_listed(path: Path) -> None:
    facts: dict[Any, Any] = {
        "good": [1, {"a": None}],
        "tuple": (1, 2),
        "nan": float("nan"),
        "keys": {1: 2},
        "object": object(),
        5: "five",
    }
    with pytest.raises(TypeError) as caught:
        files.write(path, {}, facts)
    assert str(caught.value) == (
        "cannot store the facts ['tuple', 'nan', 'keys', 'object', 5]: JSON would not give them "
        "back as they are. Use dicts with str keys, lists (not tuples), str, int, finite float, "
        "bool and None."
    )
    assert not path.exists()


def test_a_header_that_safetensors_would_refuse(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "LONGEST_HEADER_BYTES", 200)
    with pytest.raises(ValueError, match=r"take 1128 bytes, .* at most 200\. Shorten the facts"):
        files.write(path, {}, {"long": "x" * 1000})
    assert not path.exists()


# Damage


@pytest.fixture
def written(path: Path) -> dict[str, Tensor]:
    tensors = {
        "bias": filled(torch.float64, (3,)),
        "weight": filled(torch.float32, (5, 2)),
        "empty": torch.ones(0),
        "mask": filled(torch.bool, (7,)),
    }
    files.write(path, tensors, {"clock": 7})
    return tensors


def test_a_flipped_bit_in_the_data_is_found_and_named(
    path: Path, written: dict[str, Tensor]
) -> None:
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    owners = [
        name for name, size in (("bias", 24), ("weight", 40), ("mask", 7)) for _ in range(size)
    ]
    assert len(whole) == start + len(owners)
    for index, owner in enumerate(owners):
        broken = bytearray(whole)
        broken[start + index] ^= 1 << index % 8
        path.write_bytes(broken)
        assert files.verify(path) == [owner]


def test_all_damaged_tensors_are_named(path: Path, written: dict[str, Tensor]) -> None:
    with path.open("r+b") as file:
        file.seek(-7 - 40 - 24, io.SEEK_END)
        file.write(bytes(71))
    assert files.verify(path) == ["bias", "weight", "mask"]


def test_a_flipped_bit_in_the_header_is_an_error(path: Path, written: dict[str, Tensor]) -> None:
    whole = path.read_bytes()
    for index in range(8 + int.from_bytes(whole[:8], "little")):
        broken = bytearray(whole)
        broken[index] ^= 1 << index % 8
        path.write_bytes(broken)
        for check in (files.verify, files.read_facts):
            with pytest.raises(ValueError, match=str(path)):
                check(path)
        try:  # without its key the sheet is no sheet: then the file is a plain one, and all right
            assert same(files.read(path), written)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assert b'"polyak"' not in broken


def test_a_header_checksum_error_says_what_to_do(path: Path, written: dict[str, Tensor]) -> None:
    path.write_bytes(path.read_bytes().replace(rb"\"clock\":7", rb"\"clock\":8"))
    with pytest.raises(
        ValueError, match=r"is not as polyak wrote it: its checksum reads b'.{8}' and sho"
    ):
        files.read(path)


def test_a_file_that_another_program_wrote_anew(path: Path, written: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file({"other": torch.ones(3)}, path, metadata)
    with pytest.raises(ValueError, match="or written anew by another program"):
        files.read_facts(path)


def test_truncation_anywhere_is_an_error(path: Path, written: dict[str, Tensor]) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        for check in (files.read, files.verify, files.read_facts):
            with pytest.raises(
                ValueError, match=rf"'{path}' \({size} bytes\) is not a whole safet"
            ):
                check(path)


@pytest.mark.parametrize(
    "content", [b"PK\3\4" + bytes(100), b"\x80\2}q\0.", b"some text, not tensors", bytes(64)]
)
def test_another_kind_of_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match="or is of another kind: copy it again, or use an earlier"):
        files.read(path)


def test_more_than_a_whole_file(path: Path, written: dict[str, Tensor]) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        files.verify(path)


def test_a_plain_file_is_read_and_has_no_facts(path: Path) -> None:
    tensors = {"x": torch.arange(3)}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert same(files.read(path), tensors)
    for check in (files.verify, files.read_facts):
        with pytest.raises(ValueError, match=r"metadata is {'format': 'pt'}, so polyak did not wr"):
            check(path)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(
        ValueError, match="has no fact sheet and no checksums: its metadata is None"
    ):
        files.read_facts(path)


@pytest.mark.parametrize("check", [files.read, files.verify, files.read_facts])
def test_what_is_no_file_cannot_be_read(tmp_path: Path, check: Callable[[Path], object]) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        check(tmp_path / "nothing.safetensors")
    with pytest.raises(IsADirectoryError, match=r"it is a folder\. Pass the path of a file in it"):
        check(tmp_path)


# All or nothing


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [True, False])
def test_an_exception_leaves_the_old_file(
    path: Path, error: type[BaseException], exists: bool
) -> None:
    if exists:
        files.write(path, {"x": torch.zeros(3)})
    before = {name: (path.parent / name).read_bytes() for name in names_in(path.parent)}

    def fail() -> Tensor:
        raise error

    lazy = {"b": files.Lazy(torch.float32, (3,), fail)}
    with pytest.raises(error):
        files.write(path, {"a": torch.ones(1 << 20), **lazy})
    assert {name: (path.parent / name).read_bytes() for name in names_in(path.parent)} == before


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    files.write(path, {"x": torch.zeros(3)})
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))  # the kernel refuses byte 2^20 + 1
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write(path, {"x": torch.zeros(1 << 20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert names_in(path.parent) == ["x.safetensors"]


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    fsync, replace = os.fsync, Path.replace

    def spy_fsync(descriptor: int) -> None:
        fsync(descriptor)
        status = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_size)

    def spy_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(Path, "replace", spy_replace)
    files.write(path, {"x": torch.zeros(3)})
    assert events == [path.stat().st_size, "rename", "folder"]


def test_permissions_are_those_of_a_new_file(path: Path, umask: Callable[[int], int]) -> None:
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o002, 0o664)):
        umask(mask)
        files.write(path, {})
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_symbolic_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    link, real = tmp_path / "near" / "link", tmp_path / "far" / "real"
    link.symlink_to("../far/real")
    for value in (1.0, 2.0):  # first the file that it leads to is not there yet
        with files.atomic(link) as file:
            assert len(list((tmp_path / "far").glob(".polyak-*"))) == 1
            file.write(bytes([int(value)]))
        assert link.is_symlink()
        assert real.read_bytes() == bytes([int(value)])
    assert (names_in(tmp_path / "near"), names_in(tmp_path / "far")) == (["link"], ["real"])


def test_targets_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as missing:
        files.write(tmp_path / "no" / "x", {})
    assert str(missing.value) == (
        f"cannot write '{tmp_path}/no/x': there is no folder '{tmp_path}/no'. "
        f"Make it first: os.makedirs('{tmp_path}/no')."
    )
    for target in (str(tmp_path), "/dev/null"):
        with pytest.raises(
            IsADirectoryError, match=f"^cannot write '{target}': it exists and is not"
        ):
            files.write(target, {})


def test_threads_that_write_the_same_file(path: Path) -> None:
    def write(value: int) -> None:
        for _ in range(5):
            files.write(path, {"x": torch.full((10_000,), value)}, {"value": value})

    threads = [threading.Thread(target=write, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert files.verify(path) == []
    assert files.read(path)["x"].unique().tolist() == [files.read_facts(path)["value"]]
    assert names_in(path.parent) == ["x.safetensors"]


# Leftovers


def leftover(folder: Path, pid: int, started: int, home: str | None = None) -> Path:
    file = folder / f".polyak-{home or files._home()}-{pid}-{started}-0.tmp"
    file.write_bytes(b"half")
    return file


def test_only_leftovers_of_dead_writers_are_removed(path: Path) -> None:
    folder = path.parent
    with subprocess.Popen(["sleep", "60"]) as living, subprocess.Popen(["sleep", "60"]) as zombie:
        started = files._started(living.pid)
        assert started > 0
        zombie_started = files._started(zombie.pid)
        zombie.kill()
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet reaped
        stay = [
            leftover(folder, living.pid, started),
            leftover(folder, os.getpid(), files._started(os.getpid())),
            leftover(folder, living.pid, started + 1, home="elsewhere-1"),
            leftover(folder, 2**22 + 1, 5, home="elsewhere-1"),
        ]
        for name in (".polyak-notes.tmp", f".polyak-{files._home()}-1-2.tmp", "x.tmp"):
            stay.append(folder / name)
            stay[-1].touch()
        leave = [
            leftover(folder, living.pid, started + 1),  # its number has gone to another process
            leftover(folder, zombie.pid, zombie_started),
            leftover(folder, 2**22 + 1, 5),  # above the highest number that Linux gives
        ]
        files.write(path, {})
        assert names_in(folder) == sorted(file.name for file in [*stay, path])
        assert not any(file.exists() for file in leave)
        living.kill()
    files.write(path, {})
    assert not stay[0].exists()


def test_a_hidden_process_of_another_user_is_alive(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    monkeypatch.setattr(files, "_started", lambda pid: 0)  # /proc with hidepid
    other = leftover(path.parent, 1, 5)
    files.write(path, {})
    assert other.exists()


def test_without_proc_a_living_number_is_a_living_writer(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_started", lambda pid: 0)
    living, dead = leftover(path.parent, os.getpid(), 0), leftover(path.parent, 2**22 + 1, 0)
    files.write(path, {})
    assert (living.exists(), dead.exists()) == (True, False)


def test_a_writer_does_not_remove_the_file_of_another(tmp_path: Path) -> None:
    with files.atomic(tmp_path / "a") as first, files.atomic(tmp_path / "b") as second:
        first.write(b"first")
        second.write(b"second")
        assert len(names_in(tmp_path)) == 2
    assert names_in(tmp_path) == ["a", "b"]


MOMENTS = """
import os, random, sys
sys.modules["numpy"] = None  # torch does not depend on it, and nor do files
from pathlib import Path
import torch
from polyak import files

left = 0  # moments until the end; 0 is never

def moment():
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)

def with_moments(function):
    def call(*args, **kwargs):
        moment()
        try:
            return function(*args, **kwargs)
        finally:
            moment()
    return call

os.fsync = with_moments(os.fsync)
Path.replace = with_moments(Path.replace)
"""

KILLS = """
path = Path(sys.argv[1])
random.seed(0)

def write(number):
    # Another length each time, so that a file that is partly the old one cannot pass.
    def lazy():
        moment()
        return torch.full((500_000 - number,), float(number))

    length = (500_000 - number,)
    tensors = {f"t{i}": files.Lazy(torch.float32, length, lazy) for i in range(8)}
    files.write(path, tensors, {"number": number})

# A write has 8 tensors, and a moment before and after each of: sync, rename, sync of the folder.
A_WRITE = 8 + 6

write(0)
number = cut = 0
for end in random.sample(range(1, 3 * A_WRITE), 16):
    pid = os.fork()
    if not pid:
        left = end
        while True:
            number += 1
            write(number)
    assert os.waitpid(pid, 0)[1] == 9
    before, number = number, files.read_facts(path)["number"]
    assert number >= before
    assert files.verify(path) == []
    tensors = files.read(path)
    assert len(tensors) == 8
    for tensor in tensors.values():
        assert tensor.unique().tolist() == [number]
        assert len(tensor) == 500_000 - number
    cut += len(list(path.parent.glob(".polyak-*.tmp")))
    assert len(os.listdir(path.parent)) <= 2
write(number + 1)
assert os.listdir(path.parent) == [path.name]
assert files.read_facts(path)["number"] == number + 1
print(number, cut)
"""


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(path: Path) -> None:
    (package,) = polyak.__path__
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(package).parent)}
    run = subprocess.run(
        [sys.executable, "-c", MOMENTS + KILLS, str(path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    written, cut = map(int, run.stdout.split())
    assert written > 8
    assert cut > 8


def test_an_interrupt_of_a_real_process_leaves_nothing(path: Path) -> None:
    script = (
        "import sys, torch; from polyak import files\n"
        "def wait(): print('inside', flush=True); sys.stdin.read()\n"
        "files.write(sys.argv[1], {'x': files.Lazy(torch.float32, (1,), wait)})"
    )
    (package,) = polyak.__path__
    environment = {**os.environ, "PYTHONPATH": str(Path(package).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as child:  # fmt: skip
        assert child.stdout
        assert child.stdout.readline() == b"inside\n"
        assert len(names_in(path.parent)) == 1
        child.send_signal(signal.SIGINT)
        assert child.wait(30) != 0
    assert names_in(path.parent) == []


# Folders of several files


def loaded(folder: Path) -> dict[str, Tensor]:
    """Load a folder as Hugging Face does: each tensor from the file that the index names."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = {file: safetensors.torch.load_file(folder / file) for file in set(index.values())}
    assert sum(map(len, found.values())) == len(index)
    return {name: found[file][name] for name, file in index.items()}


@pytest.mark.parametrize("shard_bytes", [1, 39, 40, 41, 100, 10**6])
def test_a_folder_of_several_files(tmp_path: Path, shard_bytes: int) -> None:
    """Every tensor is in one file, no file is fuller than asked, and the index says where."""
    tensors = {
        **{f"layer.{i}": filled(torch.float32, (10,), seed=i) for i in range(5)},
        "wide": filled(torch.float64, (3,)),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "narrow": filled(torch.bfloat16, (7,)),
    }
    folder = tmp_path / "model"
    files.write_sharded(folder, tensors, shard_bytes, {"clock": 3})
    assert same(loaded(folder), tensors)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    names = sorted(set(index["weight_map"].values()))
    last = len(names)
    assert names == [f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(1, last + 1)]
    assert names_in(folder) == [*names, "model.safetensors.index.json"]
    for name in names:
        held = files.read(folder / name)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= shard_bytes
        assert files.verify(folder / name) == []
        assert files.read_facts(folder / name) == {"clock": 3}
    assert names_in(tmp_path) == ["model"]


def test_the_writing_order_is_the_order_of_reading(tmp_path: Path) -> None:
    """Processes that read in step rely on it, for one file and for several."""
    read: list[str] = []

    def lazy(name: str, dtype: torch.dtype) -> files.Lazy:
        def make() -> Tensor:
            read.append(name)
            return torch.zeros(2, dtype=dtype)

        return files.Lazy(dtype, (2,), make)

    dtypes = [torch.bfloat16, torch.float32, torch.int64, torch.float32]
    tensors = {name: lazy(name, dtype) for name, dtype in zip("dacb", dtypes, strict=True)}
    order = files.writing_order(tensors)
    assert sorted(order) == ["a", "b", "c", "d"]
    assert read == []
    files.write(tmp_path / "one.safetensors", tensors)
    files.write_sharded(tmp_path / "several", tensors, 8)
    assert read == order * 2


def test_a_folder_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    files.write_sharded(folder, {"x": torch.zeros(3)}, 100)
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    with pytest.raises(FileExistsError, match=r"exists already, .* Write to a new name, or remove"):
        files.write_sharded(folder, {"x": torch.ones(3)}, 100)
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == before
    file = tmp_path / "file"
    file.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists already"):
        files.write_sharded(file, {}, 100)
    assert file.read_bytes() == b"mine"
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*/no'\. Make it first"):
        files.write_sharded(tmp_path / "no" / "x", {}, 100)
    (tmp_path / "empty").mkdir()
    files.write_sharded(tmp_path / "empty", {"x": torch.ones(3)}, 100)
    assert same(loaded(tmp_path / "empty"), {"x": torch.ones(3)})


# What is put slice by slice

PROMISED = {"a": files.Promise(torch.float32, (4,)), "b": files.Promise(torch.float32, (2, 3))}
PROMISED |= {"c": files.Promise(torch.int16, (3,)), "none": files.Promise(torch.bool, (0, 2))}


def write_slices(
    path: Path,
    shard_bytes: int | None,
    slices: list[Tensor],
    *,
    ignore: tuple[type[Exception], ...] = (),
    then: BaseException | None = None,
) -> None:
    with files.writing(path, PROMISED, None, shard_bytes) as put:
        for elements in slices:
            with suppress(*ignore):
                put(elements)
        if then is not None:
            raise then


@pytest.mark.parametrize("shard_bytes", [None, 1, 20, 10**6])
def test_slices_of_any_length_make_the_same_file(tmp_path: Path, shard_bytes: int | None) -> None:
    """As if each tensor had been written whole, tensors of no elements included."""
    whole = {
        name: filled(promise.dtype, tuple(promise.shape)) for name, promise in PROMISED.items()
    }
    for length in (1, 2, 3, 100):
        with files.writing(tmp_path / f"{length}", PROMISED, {"clock": 3}, shard_bytes) as put:
            for name in files.writing_order(PROMISED):
                for part in whole[name].view(-1).split(length):
                    if len(part):
                        put(part)
        if shard_bytes is None:
            files.write(tmp_path / "whole", whole, {"clock": 3})
            assert (tmp_path / f"{length}").read_bytes() == (tmp_path / "whole").read_bytes()
            assert files.verify(tmp_path / f"{length}") == []
        else:
            assert same(loaded(tmp_path / f"{length}"), whole)


@pytest.mark.parametrize("shard_bytes", [None, 1, 20, 10**6])
@pytest.mark.parametrize(
    ("puts", "what"),
    [
        ([torch.ones(4).double()], r"^4 elements of torch.float64 came where 4 of .*float32 .*'a'"),
        ([torch.ones(5)], r"^5 elements of torch.float32 came where 4 of torch.float32 .*'a' were"),
        ([torch.ones(3), torch.ones(2)], r"^2 elements of torch.float32 came where 1 of .*'a' wer"),
        ([torch.ones(4), torch.ones(3).short()], r"^3 elements of torch.int16 .* 6 of .*'b' were"),
        ([torch.ones(4), torch.ones(6)], r"of 1 tensors were not all put, 'c' the first of them"),
        ([torch.ones(4), torch.ones(5)], r"tensors were not all put, 'b' the first of them; put"),
        ([], r"tensors were not all put, 'a' the first of them; put as many as were promised"),
        (
            [torch.ones(4), torch.ones(6), torch.ones(3).short(), torch.ones(1)],
            r"^1 elements of torch.float32 came after the last tensor was complete; promise them",
        ),
    ],
)
def test_what_is_not_as_promised_is_refused(
    tmp_path: Path, puts: list[Tensor], what: str, shard_bytes: int | None
) -> None:
    """The wrong dtype, too many elements, too few of them, also where the error is ignored."""
    with pytest.raises(ValueError, match=what):
        write_slices(tmp_path / "x", shard_bytes, puts)
    assert names_in(tmp_path) == []
    if "came where" in what:
        with pytest.raises(ValueError, match="were not all put"):
            write_slices(tmp_path / "x", shard_bytes, puts, ignore=(ValueError,))
        assert names_in(tmp_path) == []


@pytest.mark.parametrize("shard_bytes", [None, 1, 20, 10**6])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_while_slices_are_put_leaves_nothing(
    tmp_path: Path, error: type[BaseException], shard_bytes: int | None
) -> None:
    for count in range(3):
        slices = [torch.ones(4), torch.ones(6)][:count]
        with pytest.raises(error):
            write_slices(tmp_path / "x", shard_bytes, slices, then=error())
        assert names_in(tmp_path) == []


def test_facts_that_cannot_be_stored_are_refused_before_a_tensor_is_made(tmp_path: Path) -> None:
    tensors = {"x": files.Lazy(torch.float32, (1,), lambda: pytest.fail("was read"))}
    with pytest.raises(TypeError, match="cannot store the facts"):
        files.write_sharded(tmp_path / "x", tensors, 1, {"clock": (1, 2)})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_folder(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> Tensor:
        raise error

    tensors = {"a": torch.ones(10), "b": files.Lazy(torch.float32, (3,), fail)}
    with pytest.raises(error):
        files.write_sharded(tmp_path / "model", tensors, 1)
    assert names_in(tmp_path) == []


KILLED_FOLDER = """
target, end = Path(sys.argv[1]), int(sys.argv[2])
left = end
files.write_sharded(target, {f"t{i}": torch.full((100,), float(i)) for i in range(3)}, 400)
print("moments", end - left)
"""


def test_a_killed_writer_leaves_no_folder_or_the_whole_one(tmp_path: Path) -> None:
    """At chosen moments, the last ones among them; the next writer removes what is left."""
    (package,) = polyak.__path__
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(package).parent)}

    def attempt(name: str, end: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", MOMENTS + KILLED_FOLDER, str(tmp_path / name), str(end)],
            env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    whole = attempt("whole", -1)
    assert whole.returncode == 0, whole.stderr
    moments = int(whole.stdout.split()[1])
    complete = []
    for end in (1, moments // 2, moments - 4, moments - 2, moments - 1):
        folder = tmp_path / f"killed-{end}"
        assert attempt(folder.name, end).returncode == -signal.SIGKILL
        complete.append(folder.exists())
        if folder.exists():
            assert len(loaded(folder)) == 3
        else:
            assert list(tmp_path.glob(".polyak-*.tmp"))
    assert complete == [False, False, False, True, True]
    files.write_sharded(tmp_path / "next", {"x": torch.ones(3)}, 100)
    assert not list(tmp_path.glob(".polyak-*"))
