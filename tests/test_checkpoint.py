"""Any checkpoint, tensor by tensor; and what is made to mislead is found before it is believed."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from polyak import checkpoint, files
from polyak.checkpoint import opened, pieces

GOLDEN = Path(__file__).parent / "golden"


def tensors() -> dict[str, Tensor]:
    """Several dtypes and shapes, an empty tensor, a scalar, a name with dots."""
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 5),
        "a.bias": torch.randn(5).bfloat16(),
        "half": torch.randn(2, 2, 2).half(),
        "wide": torch.randn(4).double(),
        "count": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.empty(0, 3),
    }


class Trap:
    """What an unpickler would run."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("trapped",)


def as_safetensors(folder: Path) -> Path:
    safetensors.torch.save_file(tensors(), folder / "a.safetensors", {"format": "pt"})
    return folder / "a.safetensors"


def as_shards(folder: Path) -> Path:
    files.write_sharded(folder / "sharded", tensors(), 64)
    return folder / "sharded"


def as_torch(folder: Path) -> Path:
    torch.save(OrderedDict(tensors()), folder / "a.pt")
    return folder / "a.pt"


def dcp_save(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
        dcp.save(state, checkpoint_id=folder, no_dist=True)


def as_dcp(folder: Path) -> Path:
    dcp_save(tensors(), folder / "dcp")
    return folder / "dcp"


def read_all(found: checkpoint.Checkpoint) -> None:
    for stored in found.tensors.values():
        assert stored.read().dtype == stored.dtype


KINDS: dict[str, Callable[[Path], Path]] = {
    "safetensors": as_safetensors,
    "sharded safetensors": as_shards,
    "torch": as_torch,
    "dcp": as_dcp,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_names_shapes_and_values(kind: str, tmp_path: Path) -> None:
    """Bit for bit, whole and in slices that begin and end anywhere."""
    with opened(KINDS[kind](tmp_path)) as found:
        assert found.container == kind
        assert set(found.tensors) == set(tensors())
        for name, expected in tensors().items():
            stored = found.tensors[name]
            assert (stored.dtype, stored.shape) == (expected.dtype, tuple(expected.shape))
            assert (stored.numel(), stored.nbytes) == (expected.numel(), expected.nbytes)
            assert torch.equal(stored.read(), expected)
            flat = expected.reshape(-1)
            buffer = torch.empty(512, dtype=torch.uint8)
            for start in range(len(flat)):
                for stop in range(start, len(flat) + 1):
                    assert torch.equal(stored.slice(start, stop), flat[start:stop])
                    part = stored.slice(start, stop, buffer)
                    assert torch.equal(part, flat[start:stop])
                    if len(part):
                        assert part.data_ptr() == buffer.data_ptr()


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    """A file of which all bytes of tensors are damaged opens as ever."""
    path = as_safetensors(tmp_path)
    with opened(path) as found:
        sizes = {name: stored.nbytes for name, stored in found.tensors.items()}
    raw = bytearray(path.read_bytes())
    raw[-sum(sizes.values()) :] = bytes(sum(sizes.values()))
    path.write_bytes(raw)
    with opened(path) as found:
        assert torch.equal(found.tensors["a.weight"].read(), torch.zeros(3, 5))


@pytest.mark.parametrize("make", [as_safetensors, as_torch])
def test_a_file_that_shrinks_while_it_is_open_is_noticed(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    """An error, and neither values of nothing nor the end of the process."""
    path = make(tmp_path)
    with opened(path) as found:
        os.truncate(path, path.stat().st_size - 70)
        with pytest.raises(ValueError, match=r"it ends at byte .*, and was longer"):
            read_all(found)


def test_a_tree_keeps_its_form(tmp_path: Path) -> None:
    """Nested dicts, lists, numbers; a path leads into it, over keys with dots."""
    w = torch.arange(6.0).view(2, 3)
    tree = {
        "model": {"layer.weight": w, "layer": {"bias": w[0]}},
        "ema": {"shadow_params": [w, w.t()], "decay": 0.9, "collected_params": None},
        3: "three",
    }
    torch.save(tree, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as found:
        assert found.tree["ema"]["decay"] == 0.9
        assert found.tree["ema"]["collected_params"] is None
        assert found.tree[3] == "three"
        assert list(found.tensors) == [
            *("model.layer.weight", "model.layer.bias"),
            *("ema.shadow_params.0", "ema.shadow_params.1"),
        ]
        assert torch.equal(found.at("model.layer.weight").read(), w)
        assert torch.equal(found.at("model.layer.bias").read(), w[0])
        assert torch.equal(found.at("ema.shadow_params.1").read(), w.t())
        assert torch.equal(found.at("ema.shadow_params.1").slice(1, 4), w.t().reshape(-1)[1:4])
        assert found.at("3") == "three"
        assert found.at("") == found.tree
        with pytest.raises(
            ValueError, match=r"nothing at 'model.head': where 'head' should be.*'layer"
        ):
            found.at("model.head")


def test_ties_are_known_where_the_file_can_tell(tmp_path: Path) -> None:
    """Two names of one tensor have one identity; two equal tensors do not."""
    w = torch.randn(3, 2)
    torch.save({"a": w, "b": w, "c": w.clone(), "d": w[:2]}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as found:
        a, b, c, d = (found.tensors[name].identity for name in "abcd")
        assert a == b
        assert len({a, c, d}) == 3


Box = tuple[tuple[int, ...], tuple[int, ...]]


def pieces_of(
    whole: Tensor, boxes: list[Box], folder: Path, form: Callable[[Tensor], Tensor]
) -> None:
    """Write a tensor in pieces, two files of them, as many processes would."""
    folder.mkdir()
    where, chunks, blobs = {}, [], [b"", b""]
    for number, (offsets, sizes) in enumerate(boxes):
        region = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        blob = io.BytesIO()
        torch.save(form(whole[region]), blob)
        index = MetadataIndex("w", torch.Size(offsets))
        file = number % 2
        where[index] = _StorageInfo(f"{file}.distcp", len(blobs[file]), len(blob.getvalue()))
        blobs[file] += blob.getvalue()
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    for file, bytes_ in enumerate(blobs):
        (folder / f"{file}.distcp").write_bytes(bytes_)
    kind = TensorStorageMetadata(TensorProperties(whole.dtype), whole.shape, chunks)
    metadata = Metadata({"w": kind}, storage_data=where)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


ROWS: list[Box] = [((0, 0, 0), (3, 6, 2)), ((3, 0, 0), (1, 6, 2)), ((4, 0, 0), (0, 6, 2))]
COLUMNS: list[Box] = [((0, 0, 0), (4, 4, 2)), ((0, 4, 0), (4, 2, 2))]
GRID: list[Box] = [
    ((i, j, k), (2, 3, 1)) for k in range(2) for i in range(0, 4, 2) for j in range(0, 6, 3)
]
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "in order": lambda piece: piece.clone(memory_format=torch.contiguous_format),
    "columns first": lambda piece: piece.transpose(0, 1).contiguous().transpose(0, 1),
    "in a larger storage": lambda piece: torch.cat([piece, piece]).chunk(2)[1],
}


@pytest.mark.parametrize("boxes", [ROWS, COLUMNS, GRID], ids=["rows", "columns", "grid"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_a_sharded_dcp_is_put_together(
    boxes: list[Box], form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Pieces of rows, of columns, of both, by their places, whatever their own layout."""
    whole = torch.arange(48).to(dtype).view(4, 6, 2)
    pieces_of(whole, boxes, tmp_path / "a", FORMS[form])
    with opened(tmp_path / "a") as found:
        stored = found.tensors["w"]
        assert torch.equal(stored.read(), whole)
        for start in range(0, 48, 5):
            for stop in range(start, 49):
                assert torch.equal(stored.slice(start, stop), whole.view(-1)[start:stop])


def test_of_a_piece_of_a_dcp_only_what_is_asked_for_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all of it, which may be larger than memory."""
    monkeypatch.setattr(pieces, "read_value", lambda *_: pytest.fail("was read whole"))
    for name, boxes in (("rows", ROWS), ("columns", COLUMNS)):
        whole = torch.randn(4, 6, 2)
        pieces_of(whole, boxes, tmp_path / name, FORMS["in order"])
        with opened(tmp_path / name) as found:
            assert torch.equal(found.tensors["w"].slice(7, 40), whole.view(-1)[7:40])


def test_pieces_that_do_not_make_a_tensor_are_refused(tmp_path: Path) -> None:
    """Twice the same place and another left out, overlaps, what reaches beyond, too few."""
    whole = torch.zeros(4, 6, 2)
    for number, boxes in enumerate(
        [
            [((0, 0, 0), (2, 6, 2)), ((0, 0, 0), (2, 6, 2))],
            [((0, 0, 0), (3, 6, 2)), ((2, 0, 0), (1, 6, 2))],
            [((0, 0, 0), (4, 4, 2)), ((0, 3, 0), (4, 2, 2))],
            [((0, 0, 0), (4, 3, 2))],
            [],
        ]
    ):
        pieces_of(whole, boxes, tmp_path / str(number), FORMS["in order"])
        refused(tmp_path / str(number), r"the pieces of w do not make torch.float32 \(4, 6, 2\)")
    pieces_of(whole, [((0, 0, 0), (4, 6, 2))], tmp_path / "a", lambda piece: piece[:2].clone())
    refused(tmp_path / "a", r"is said to be in|there is no torch.float32 \(4, 6, 2\)|fewer than")


def test_a_dcp_of_a_nested_state_has_its_form(tmp_path: Path) -> None:
    """What was flattened is nested again, values that are no tensors included."""
    model = nn.Linear(2, 2)
    state = {"model": model.state_dict(), "step": 7, "list": [torch.ones(2), 3]}
    dcp_save(state, tmp_path / "a")
    with opened(tmp_path / "a") as found:
        assert torch.equal(found.at("model.weight").read(), model.weight)
        assert found.tree["step"] == 7
        assert found.tree["list"][1] == 3
        assert torch.equal(found.at("list.0").read(), torch.ones(2))


def test_values_of_a_program_in_a_dcp_are_named_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors beside them can be read all the same."""
    monkeypatch.chdir(tmp_path)
    dcp_save({"w": torch.ones(2), "lr": [0.1, {"a": 3}], "trap": Trap()}, Path("a"))
    with opened("a") as found:
        assert found.tree["trap"] == "an object of a program (posix.mkdir), which is not read"
        assert found.tensors.keys() == {"w"}
        assert torch.equal(found.tensors["w"].read(), torch.ones(2))
    assert not Path("trapped").exists()


def test_the_arguments_of_a_script_are_values(tmp_path: Path) -> None:
    """A namespace of argparse is read as the dictionary that it is; who trusted it still does."""
    w = torch.ones(2)
    torch.save({"args": argparse.Namespace(lr=0.1, ema=w), "w": w}, tmp_path / "a.pt")
    for told in ([], [argparse.Namespace]):
        with torch.serialization.safe_globals(told):
            trusted = set(torch.serialization.get_safe_globals())
            with opened(tmp_path / "a.pt") as found:
                assert found.tree["args"]["lr"] == 0.1
                assert found.tensors.keys() == {"args.ema", "w"}
            assert set(torch.serialization.get_safe_globals()) == trusted


def test_tensors_that_are_not_plain_are_told_and_not_read(tmp_path: Path) -> None:
    """Sparse, quantized, without data: what they are, in the place of values."""
    others = {
        "sparse": torch.eye(2).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "buffer": nn.Buffer(torch.ones(2)),
        "parameter": nn.Parameter(torch.ones(2)),
        "conjugate": torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    }
    torch.save(others, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as found:
        assert found.tensors.keys() == {"buffer", "parameter", "conjugate"}
        assert torch.equal(found.tensors["conjugate"].read(), others["conjugate"])
        assert found.tree["sparse"] == "a Tensor of torch.float32 in the layout torch.sparse_coo"


def test_links_are_followed_and_never_written_through(tmp_path: Path) -> None:
    """A folder in a cache, as Hugging Face's: the index and its files lead to blobs elsewhere."""
    files.write_sharded(tmp_path / "real", tensors(), 64)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted((tmp_path / "real").iterdir())):
        (blobs / str(number)).write_bytes(file.read_bytes())
        (blobs / str(number)).chmod(0o444)
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")

    def state() -> dict[Path, Any]:
        return {
            path: (path.lstat().st_mtime_ns, path.lstat().st_mode, path.read_bytes())
            for path in [*blobs.iterdir(), *snapshot.iterdir()]
        }

    before = state()
    for path in (snapshot, snapshot / "model.safetensors.index.json"):
        with opened(path) as found:
            for name, expected in tensors().items():
                assert torch.equal(found.tensors[name].read(), expected)
    assert state() == before


def test_a_folder_of_one_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    """Whatever else is in it; of several the caller has to say which."""
    (tmp_path / "config.json").write_text("{}")
    with (
        pytest.raises(ValueError, match=r"folder without a checkpoint: it has config.json"),
        opened(tmp_path),
    ):
        pass
    as_safetensors(tmp_path)
    with opened(tmp_path) as found:
        assert found.container == "safetensors"
    safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "b.safetensors")
    with (
        pytest.raises(ValueError, match=r"has 2 checkpoints: a.safetensors, b.safetensors"),
        opened(tmp_path),
    ):
        pass


def test_a_slice_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """Before the file, or after the tensor, or into too small a buffer."""
    with opened(as_safetensors(tmp_path)) as found:
        stored = found.tensors["a.weight"]
        for start, stop in ((-1, 2), (3, 2), (0, 16), (16, 16)):
            with pytest.raises(ValueError, match=f"elements {start} to {stop} of 15 into new mem"):
                stored.slice(start, stop)
        with pytest.raises(ValueError, match=r"into 8 bytes: pass .* at least 12 bytes"):
            stored.slice(0, 3, torch.empty(8, dtype=torch.uint8))


def test_two_tensors_at_one_path_are_told_apart_by_their_places(tmp_path: Path) -> None:
    """None of the two takes the place of the other."""
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as found:
        with pytest.raises(ValueError, match=r"two tensors at 'a\.b', by different keys"):
            _ = found.tensors
        assert checkpoint.named(found.tree["a"])["b"].read().tolist() == [0.0]


# ------------------------------------------------------------------------------------ never wrong


def open_and_read(path: Path) -> None:
    with opened(path) as found:
        read_all(found)


def refused(path: Path, match: str) -> None:
    with pytest.raises((ValueError, OSError), match=match):
        open_and_read(path)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by torch.save, nor as a bare pickle, nor in what DCP calls metadata."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "trap": Trap()}, "a.pt")
    refused(Path("a.pt"), r"holds objects of a program \(posix.mkdir\), which could run any code")
    Path("a.pkl").write_bytes(pickle.dumps(Trap()))
    refused(Path("a.pkl"), r"is a pickle, which could run any code")
    torch.save({"a": torch.ones(1)}, "old.pt", _use_new_zipfile_serialization=False)
    refused(Path("old.pt"), r"is a pickle")
    Path("a").mkdir()
    Path("a/.metadata").write_bytes(pickle.dumps(Trap()))
    refused(Path("a"), r"holds an object that no checkpoint has \(posix.mkdir\)")
    for name in ("getattr", "eval", "exec", "__import__"):
        Path("a/.metadata").write_bytes(f"cbuiltins\n{name}\n.".encode())
        refused(Path("a"), rf"builtins.{name}")
    Path("a/.metadata").write_bytes(b"ctorch.distributed.checkpoint.metadata\nos.system\n.")
    refused(Path("a"), r".metadata")
    assert not Path("trapped").exists()


def test_what_is_read_of_a_dcp_cannot_change_its_classes(tmp_path: Path) -> None:
    """Attributes are set of values, and never of a class, which would last."""
    folder = as_dcp(tmp_path)
    name = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
    for value in (name, b"ctorch.serialization\n_get_layout\n", b"}"):
        raw = value + b"N}(V__hash__\nNu\x86b."  # BUILD with (None, {"__hash__": None})
        (folder / ".metadata").write_bytes(raw)
        refused(folder, r"the attributes of")
    assert hash(MetadataIndex("w")) == hash(MetadataIndex("w"))


def test_what_holds_itself_or_is_too_deep_is_refused(tmp_path: Path) -> None:
    """A list in itself, a thousand lists in each other, a list of lists that are all the same."""
    itself: list[Any] = []
    itself.append(itself)
    many: list[Any] = [torch.ones(1)]
    for _ in range(20):
        many = [many] * 20
    for number, value in enumerate((itself, many)):
        torch.save(value, tmp_path / f"{number}.pt")
        refused(tmp_path / f"{number}.pt", "is said to hold more than|nested too deep")
    torch.save("DEEP", tmp_path / "deep.pt")
    with (
        zipfile.ZipFile(tmp_path / "deep.pt") as old,
        zipfile.ZipFile(tmp_path / "2.pt", "w") as new,
    ):
        for entry in old.namelist():
            pickled = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
            new.writestr(entry, pickled if entry.endswith("data.pkl") else old.read(entry))
    refused(tmp_path / "2.pt", "its contents are nested too deep")


def test_a_tensor_that_is_one_element_repeated_is_no_larger_than_its_file(tmp_path: Path) -> None:
    """Which could be of terabytes, and is written as no such thing."""
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", r"a tensor in it is said to be torch.float32 \(1099511627776,\)")
    torch.save({"w": torch.ones(1).expand(5, 3)}, tmp_path / "a.pt")
    with opened(tmp_path / "a.pt") as found:
        assert torch.equal(found.tensors["w"].read(), torch.ones(5, 3))


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for."""
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is neither a file nor a folder, and reading it may never end")
    refused(tmp_path / "none", "No such file")


def test_a_truncated_file_is_refused_at_every_byte(tmp_path: Path) -> None:
    """Of the header each byte, of the body some; of every container."""
    for make in (as_safetensors, as_torch):
        path = make(tmp_path)
        whole = path.read_bytes()
        cuts = {*range(min(len(whole), 1200)), *range(0, len(whole), 37), len(whole) - 1}
        for cut in sorted(cuts - {len(whole)}):
            path.write_bytes(whole[:cut])
            refused(path, "is not a whole checkpoint|no checkpoint that can be read")
    folder = as_dcp(tmp_path)
    for file in (folder / ".metadata", next(folder.glob("*.distcp"))):
        whole = file.read_bytes()
        for cut in range(0, len(whole), 97):
            file.write_bytes(whole[:cut])
            refused(folder, "is not a whole checkpoint|that no checkpoint has")
        file.write_bytes(whole)
    folder = as_shards(tmp_path)
    index = folder / "model.safetensors.index.json"
    whole = index.read_bytes()
    for cut in range(0, len(whole) - 1, 5):
        index.write_bytes(whole[:cut])
        refused(folder, "is no index of tensors|it does not fit its files")


def safetensors_file(path: Path, head: Any, body: bytes = b"", length: int | None = None) -> Path:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + body)
    return path


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("head", "length", "what"),
    [
        ({"a": F32}, 1 << 62, "its header is said to have"),
        ({"a": F32 | {"data_offsets": [0, 8]}}, None, "has 8 bytes, and F32 .* takes 4"),
        ({"a": F32 | {"data_offsets": [4, 8]}}, None, "'a' begins at byte 4"),
        ({"a": F32 | {"data_offsets": [-4, 0]}}, None, "from byte -4"),
        ({"a": F32 | {"data_offsets": [4, 0]}}, None, "bytes"),
        ({"a": F32 | {"shape": [-1]}}, None, r"the shape \[-1\]"),
        ({"a": F32 | {"shape": [1.0]}}, None, "shape"),
        ({"a": F32 | {"shape": [True]}}, None, "shape"),
        ({"a": F32 | {"shape": [1 << 40, 1 << 40]}}, None, "takes"),
        ({"a": F32 | {"shape": [0, 1 << 62], "data_offsets": [0, 0]}}, None, "torch can count"),
        ({"a": F32 | {"dtype": "Q7"}}, None, "dtype 'Q7'"),
        ({"a": F32, "b": F32}, None, "'b' begins at byte 0|'a' begins at byte 0"),
        ({"a": {"dtype": "F32"}}, None, "shape"),
        ({"a": 3}, None, "header says"),
        ([1, 2], None, "no checkpoint|header says"),
        ({"__metadata__": {"a": 1}, "a": F32}, None, "metadata"),
        ({"__metadata__": 3, "a": F32}, None, "header says"),
        (b'{"a":' + b"[" * 100_000, None, "header says|nested too deep"),
        (
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            *(None, "'a' twice"),
        ),
    ],
)
def test_a_header_that_misleads_is_refused(
    head: Any, length: int | None, what: str, tmp_path: Path
) -> None:
    """Sizes, offsets, duplicate names, depth: each by its fault."""
    refused(safetensors_file(tmp_path / "a.safetensors", head, bytes(4), length), what)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/etc/passwd", "b/a.safetensors", "..", "", 3]
)
def test_an_index_that_leads_elsewhere_is_refused(name: Any, tmp_path: Path) -> None:
    """Only files beside it, whatever the index says."""
    inside = tmp_path / "inside"
    (inside / "b").mkdir(parents=True)
    as_safetensors(tmp_path)
    as_safetensors(inside / "b")
    index = inside / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": name}}))
    refused(index, "which is no file beside it|it is no index of tensors")


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Names that a file has not, that the index has not, files that are not there."""
    as_safetensors(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for where, what in (
        ({"x": "a.safetensors"}, "there is no 'x' in 'a.safetensors'"),
        ({"half": "a.safetensors"}, "it leaves out 'a.weight' in 'a.safetensors'"),
        ({"half": index.name}, "which is another index"),
        ({"half": "b.safetensors"}, "tells of 'b.safetensors', which is not beside it"),
    ):
        index.write_text(json.dumps({"weight_map": where}))
        refused(index, what)


def test_a_dcp_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """A file outside of the folder, or a place beyond the end of one."""
    folder = as_dcp(tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(iter(metadata.storage_data))
    own = metadata.storage_data[index]
    for info, what in (
        (_StorageInfo("../a.pt", 0, 4), "which is no file in it"),
        (_StorageInfo("/etc/passwd", 0, 4), "which is no file in it"),
        (_StorageInfo(own.relative_path, 0, 1 << 40), "beyond the"),
        (_StorageInfo(own.relative_path, -8, 4), "beyond the"),
    ):
        metadata.storage_data[index] = info
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        refused(folder, what)


def test_a_zip_that_grows_is_refused(tmp_path: Path) -> None:
    """A compressed one (a bomb unpacks to anything), names twice, sizes that are not there."""
    path = as_torch(tmp_path)
    for number, (compression, twice, what) in enumerate(
        (
            (zipfile.ZIP_DEFLATED, False, "it is compressed"),
            (zipfile.ZIP_STORED, True, "of one name"),
        )
    ):
        made = tmp_path / f"{number}.pt"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w", compression) as new:
            for entry in old.namelist():
                new.writestr(entry, old.read(entry))
            if twice:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    new.writestr(old.namelist()[0], b"")
        refused(made, what)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"PK"  # two programs may find two directories in such a file
    refused(path, "it has a comment")


HOSTILE = """
import resource, sys
import torch
from polyak.checkpoint import opened
import torch.distributed.checkpoint.filesystem  # its memory is not what is measured
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (size, size))
for path in sys.argv[1:]:
    try:
        with opened(path) as found:
            for stored in found.tensors.values():
                stored.read()
    except (ValueError, OSError) as error:
        if "emory" not in str(error):  # it was refused, and not merely too much
            continue
        raise
    raise SystemExit(f"{path} was read")
"""


def test_what_declares_much_takes_little(tmp_path: Path) -> None:
    """Headers that tell of terabytes, in a process that may have 256 MB more than torch."""
    paths = [
        safetensors_file(tmp_path / "1.safetensors", {"a": F32}, b"", 90 << 20),
        safetensors_file(
            tmp_path / "2.safetensors",
            {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}},
        ),
    ]
    original = torch.ones(4)
    torch.save({"a": original}, tmp_path / "3.pt")
    raw = (tmp_path / "3.pt").read_bytes()
    # The number of elements of the storage, and the shape, of a pickle are in its text.
    (tmp_path / "4.pt").write_bytes(raw.replace(b"K\x04", b"K\xff"))
    paths.append(tmp_path / "4.pt")
    for number, opcode in enumerate((b"Nr\xff\xff\xff\x7f.", b"\x8e" + b"\xff" * 5 + bytes(3))):
        folder = tmp_path / f"dcp{number}"
        folder.mkdir()
        (folder / ".metadata").write_bytes(opcode)  # room for 2^31 objects, for 2^40 bytes
        paths.append(folder)
    found = subprocess.run(
        [sys.executable, "-c", HOSTILE, *map(str, paths)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert found.returncode == 0, found.stderr + found.stdout


def mutated(data: st.DataObject, whole: bytes) -> bytes:
    """Some bytes changed, cut out, doubled."""
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(raw) - 1)))
        size = data.draw(st.integers(1, 16))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "double"]))
        if kind == "flip" and raw:
            raw[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "set":
            raw[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del raw[at : at + size]
        else:
            raw[at:at] = raw[at : at + size]
    return bytes(raw)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(
    deadline=None,
    max_examples=int(os.environ.get("EXAMPLES", "150")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_mutated_files_are_read_or_refused(
    kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the bytes: values, or an error that says so; never another exception."""
    folder = tmp_path_factory.mktemp("mutated")
    path = KINDS[kind](folder)
    targets = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    target = data.draw(st.sampled_from(targets))
    target.write_bytes(mutated(data, target.read_bytes()))
    try:
        with opened(path) as found:
            read_all(found)
    except (ValueError, OSError):
        pass
