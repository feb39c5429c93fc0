"""`EMA.save` of spread models: one file by all ranks together, and what happens when one fails."""

from __future__ import annotations

import gc
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from distributed_tools import (
    LAYOUTS,
    Layout,
    assert_same,
    averaged,
    case,
    ddp,
    fsdp,
    fsdp_tp,
    hsdp,
    law,
    line,
    move_,
    net,
    refused,
    seeded,
    silence,
    square,
    tp,
)
from polyak import EMA, PowerLaw, engine, files
from polyak.snapshots import SnapshotFolder

INDEX = "model.safetensors.index.json"


OPTIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "narrow": {"dtype": torch.bfloat16},
    "averages": {"averages_only": True},
    "part": {"part": "first"},
}


@law(LAYOUTS, 4)
def the_file_is_that_of_one_process(layout: Layout, folder: Path) -> None:
    """The same tensors, names, dtypes and facts, and right checksums; nothing else is left."""
    model, alone = net(), net()
    outer = layout(model)
    ema, whole = averaged(outer, range(3)), averaged(alone, range(3))
    mine, together = folder / str(dist.get_rank()), folder / "together"
    together = mine if layout is ddp else together
    for path in (mine, together):
        path.mkdir(exist_ok=True)
    for name, options in OPTIONS.items():
        found, wanted = together / name, mine / f"{name}-alone"
        ema.save(found, **options)
        assert found.exists(), "this rank has come back before the file was there"
        whole.save(wanted, **options)
        assert_same(files.read(found), files.read(wanted))
        assert facts(found) == facts(wanted)
        assert files.verify(found) == []
    net(seed=9).load_state_dict(load_file(together / "all"), strict=True)
    assert {path.name for path in together.iterdir()} - {f"{n}-alone" for n in OPTIONS} == {
        *OPTIONS
    }


def facts(path: Path) -> dict[str, Any]:
    """Return the facts of a file, but for the id of its run."""
    found = files.read_facts(path)
    return found | {"history": {k: v for k, v in found["history"].items() if k != "run"}}


@case(4)
def replicas_write_without_a_word(folder: Path) -> None:
    """Under DDP nothing is gathered: whoever calls `save` writes its own."""
    model = net()
    ddp(model)
    ema = averaged(model, range(2))
    if dist.get_rank() == 1:
        with silence():
            ema.save(folder / "one.safetensors")


@law((fsdp, hsdp, tp, fsdp_tp), 4)
def it_is_right_while_applied(layout: Layout, folder: Path) -> None:
    """Inside the block the averages are written, and what follows the model as it is trained."""
    model = net()
    layout(model)
    ema = averaged(model, range(3))
    ema.save(folder / "before")
    with ema.applied():
        ema.save(folder / "inside")
    assert_same(files.read(folder / "inside"), files.read(folder / "before"))


@law((fsdp, fsdp_tp), 4)
def the_folder_has_each_tensor_once(layout: Layout, folder: Path) -> None:
    """Several files and an index, as Hugging Face has them: complete, small enough, checked."""
    model, alone = net(), net()
    layout(model)
    ema, whole = averaged(model, range(3)), averaged(alone, range(3))
    path = folder / "model"
    ema.save(path, shard_bytes=300)
    index = json.loads((path / INDEX).read_text())
    where = index["weight_map"]
    assert sorted(where) == sorted(whole.model_state_dict())
    assert {file.name for file in path.iterdir()} == {*where.values(), INDEX}
    found: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        tensors = load_file(path / file)
        assert {name for name, place in where.items() if place == file} == set(tensors)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 300
        assert files.verify(path / file) == []
        assert facts(path / file)["clock"] == 3
        found |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert_same(found, whole.model_state_dict())
    assert len(set(where.values())) > 3
    text = refused(
        FileExistsError if dist.get_rank() == 0 else RuntimeError,
        lambda: ema.save(path, shard_bytes=300),
    )
    assert "it exists already, and a folder cannot be replaced" in text


@case(4)
def a_part_that_half_of_the_ranks_hold(folder: Path) -> None:
    """In two dimensions, what is sharded over one of them only is written once all the same."""
    model, alone = net(), net()
    fsdp_tp(model)
    ema, whole = averaged(model, range(2)), averaged(alone, range(2))
    wanted = whole.model_state_dict("out")
    ema.save(folder / "one", part="out")
    assert_same(load_file(folder / "one"), wanted)
    ema.save(folder / "several", part="out", shard_bytes=1)
    where = json.loads((folder / "several" / INDEX).read_text())["weight_map"]
    found = {name: load_file(folder / "several" / file)[name] for name, file in where.items()}
    assert_same(found, wanted)


@case(4)
def each_pair_writes_its_own(folder: Path) -> None:
    """Models on other ranks are other models: the first rank of each mesh writes."""
    pair = dist.get_rank() // 2
    model, alone = net(seed=pair), net(seed=pair)
    fully_shard(model, mesh=square()["inner"])
    ema, whole = averaged(model, range(2)), averaged(alone, range(2))
    ema.save(folder / str(pair))
    assert_same(load_file(folder / str(pair)), whole.model_state_dict())


# ----------------------------------------------------------------------------------- one tensor


def wide() -> Any:
    """Return a model in shards, of six tensors that are large beside all else."""
    layers = (nn.Linear(256, 256, bias=False) for _ in range(6))
    return fully_shard(seeded(lambda: nn.Sequential(*layers)), mesh=line())


WIDE_BYTES = 256 * 256 * 4


@case(4)
def no_rank_holds_more_than_one_whole_tensor(folder: Path) -> None:
    """Beside its shards, at any moment of a save; also while the dtype is changed."""
    model = wide()
    ema = averaged(model, range(2))
    for name, most, options in (
        ("same", 1, {}),
        ("narrow", 1.5, {"dtype": torch.bfloat16}),
        ("several", 1, {"shard_bytes": 1}),
    ):
        with watched() as held:
            ema.save(folder / name, **options)
        assert len(held) == 6, "not every tensor was gathered"
        assert WIDE_BYTES <= max(held) <= most * WIDE_BYTES + 1000, held
    kept = []
    with watched() as held:  # the measure can find too much
        for average in ema.averages.values():
            kept.append(engine.whole(average))
    assert max(held) >= 6 * WIDE_BYTES


@contextmanager
def watched() -> Iterator[list[int]]:
    """Yield a list to which each gather of a whole tensor adds the bytes that are new since."""
    found: list[int] = []
    gathered = engine.whole

    def whole(tensor: Tensor) -> Tensor:
        result = gathered(tensor)
        found.append(live_bytes())
        return result

    gc.collect()
    gc.freeze()  # what is there already is not looked at
    engine.whole = whole
    try:
        yield found
    finally:
        engine.whole = gathered
        gc.unfreeze()


def live_bytes() -> int:
    """Return the bytes of all tensors that are young enough to be listed."""
    storages = [t.untyped_storage() for t in gc.get_objects() if type(t) is Tensor]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


# ------------------------------------------------------------------------------------ failures


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let the first rank write no larger files, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refused_by_all(kind: type[Exception], words: str, call: Callable[[], object]) -> None:
    """Hold that the first rank raises this error, and the others one that tells of it, at once."""
    begun = time.monotonic()
    first = dist.get_rank() == 0
    text = refused(kind if first else RuntimeError, call)
    assert time.monotonic() - begun < 10.0  # half of what the group would wait
    assert words in text
    if not first:
        told = "nothing was written, since another process failed: rank 0: "
        assert text.startswith(f"{told}{kind.__name__}: "), text
    dist.barrier()  # the ranks are still in step


@law((fsdp, hsdp, tp, fsdp_tp), 4)
def a_writer_without_a_folder(layout: Layout, folder: Path) -> None:
    """It fails before the first tensor: all ranks raise, and the next save works."""
    model = net()
    layout(model)
    ema = averaged(model, range(2))
    nowhere = folder / "nowhere" / "a.safetensors"
    refused_by_all(FileNotFoundError, "there is no folder", lambda: ema.save(nowhere))
    refused_by_all(
        FileNotFoundError, "there is no folder", lambda: ema.save(nowhere, shard_bytes=300)
    )
    assert list(folder.iterdir()) == []
    ema.save(folder / "a.safetensors")


@case(2, 4)
def a_writer_whose_disk_is_full(folder: Path) -> None:
    """It fails at a later tensor: all ranks raise, the old file is whole, and nothing is left."""
    model = wide()
    ema = averaged(model, range(2))
    ema.save(folder / "a.safetensors")
    old = (folder / "a.safetensors").read_bytes()
    ema.update()
    dist.barrier()
    for size in (WIDE_BYTES // 2, 3 * WIDE_BYTES, 6 * WIDE_BYTES):  # the last: in the last one
        with at_most(size):
            refused_by_all(OSError, "File too large", lambda: ema.save(folder / "a.safetensors"))
        assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
        assert (folder / "a.safetensors").read_bytes() == old
        dist.barrier()
    with at_most(3 * WIDE_BYTES):
        refused_by_all(
            OSError,
            "File too large",
            lambda: ema.save(folder / "several", shard_bytes=5 * WIDE_BYTES),
        )
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    dist.barrier()
    ema.save(folder / "a.safetensors")
    assert files.read_facts(folder / "a.safetensors")["clock"] == 3


@law((fsdp, hsdp, tp, fsdp_tp), 4)
def a_folder_of_snapshots(layout: Layout, folder: Path) -> None:
    """All ranks call it, one writes and removes: what is left is what one process would leave."""
    model, alone = net(), net()
    layout(model)
    paths = folder / "together", folder / str(dist.get_rank())
    emas = [[EMA(m, PowerLaw(std)) for std in (0.05, 0.10)] for m in (model, alone)]
    folders = [
        SnapshotFolder(path, pair, every=2, most_files=5)
        for path, pair in zip(paths, emas, strict=True)
    ]
    for number in range(9):
        for one, pair, kept in zip((model, alone), emas, folders, strict=True):
            move_(one, number)
            for ema in pair:
                ema.update()
            kept.update()
    dist.barrier()
    together, mine = (kept.files for kept in folders)
    assert [path.name for path in together] == [path.name for path in mine]
    assert len(mine) == 5
    for a, b in zip(together, mine, strict=True):
        assert_same(load_file(a), load_file(b))
    behind = SnapshotFolder(folder / "behind", emas[0], every=1, background=True)
    assert "call save() on all of them" in refused(ValueError, behind.save)


@case(2)
def a_value_that_no_rank_can_write(folder: Path) -> None:
    """All ranks see the whole tensor, and raise the same error."""
    model = wide()
    ema = averaged(model, range(2))
    with torch.no_grad():
        model[3].weight.fill_(1e6)
    ema.update()
    for _ in range(2):
        text = refused(ValueError, lambda: ema.save(folder / "a.safetensors", dtype=torch.float16))
        assert "3.weight has values that torch.float16 cannot hold" in text
        dist.barrier()
    assert list(folder.iterdir()) == []


@law((fsdp, hsdp, fsdp_tp), 4)
def ranks_out_of_step_are_told(layout: Layout, folder: Path) -> None:
    """One rank has made another update: what all do together is refused on all."""
    model = net()
    layout(model)
    ema = averaged(model, range(2))
    if dist.get_rank() == 2:
        ema.update()
    for call in (
        lambda: ema.save(folder / "a.safetensors"),
        lambda: ema.report(dist.group.WORLD),
    ):
        text = refused(RuntimeError, call)
        assert "the processes are not in step:" in text
        assert "rank 0: clock 2" in text
        assert "rank 2: clock 3" in text
        assert "call update() on every one of them at the same steps" in text
        dist.barrier()
    assert list(folder.iterdir()) == []
    if dist.get_rank() != 2:
        ema.update()
    ema.save(folder / "a.safetensors")
