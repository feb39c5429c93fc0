"""Pipeline stages, each with an average of its own, and layouts that are laid over each other."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from distributed_tools import (
    Block,
    assert_same,
    averaged,
    case,
    described,
    everybodys,
    full,
    load,
    net,
    refused,
    seeded,
    sgd,
    shard_groups,
    shards,
    silence,
    split_blocks,
    spread,
    square,
)
from models import batch
from polyak import EMA, PowerLaw


class Deep(nn.Module):
    """Four blocks between an embedding and a head, of which a stage has some, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Linear(8, 6)
        self.blocks = nn.ModuleDict({str(number): Block() for number in range(4)})
        self.head: nn.Module | None = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None else self.head(x)


def deep(seed: int = 3) -> Deep:
    return seeded(Deep, seed)


def stage(number: int) -> Deep:
    """Return one half of the model, under the names that its parts have in the whole one."""
    model = deep()
    for name in ("2", "3") if number == 0 else ("0", "1"):
        del model.blocks[name]
    if number == 0:
        model.head = None
    else:
        model.embed = None
    return model


@case(4)
def pipeline_stages_average_what_they_have(folder: Path) -> None:
    """Two stages on two ranks each: together their averages are those of the whole model.

    They are applied in a forward through all stages, saved into one checkpoint, and loaded whole.
    """
    mesh = square()
    number = mesh.get_local_rank("outer")
    model = stage(number)
    fully_shard(model, mesh=mesh["inner"])
    piece = PipelineStage(model, number, 2, torch.device("cpu"), group=mesh.get_group("outer"))
    schedule = ScheduleGPipe(piece, n_microbatches=2, loss_fn=F.cross_entropy)
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.10))
    ema.attach(optimizer)
    alone = deep(seed=8)
    whole = EMA(alone, PowerLaw(0.10))
    for turn in range(3):
        x, y = batch(10 * mesh.get_local_rank("inner") + turn, n=8)
        optimizer.zero_grad()
        schedule.step(x) if number == 0 else schedule.step(target=y)
        optimizer.step()
        model.reshard()
        alone.load_state_dict(merged(full(model.state_dict())))
        whole.update()
    assert ema.clock == 3
    assert_same(merged(full(ema.averages)), dict(whole.averages))
    assert all(name in whole.averages for name in ema.averages)
    with silence():
        ema.update(4)
        with ema.applied():
            pass
    whole.update()

    x, y = batch(99, n=8)
    before = shards(model.state_dict())
    with ema.applied():
        output = schedule.eval(x) if number == 0 else schedule.eval(target=y)
    assert_same(shards(model.state_dict()), before)
    if number == 1:
        with whole.applied(), torch.no_grad():
            # Two halves of a batch and all of it at once may differ in the last bits.
            torch.testing.assert_close(output, alone(x))

    dcp.save({"model": model, "ema": ema}, checkpoint_id=folder / "stages")
    load_stages(folder / "stages", whole)
    ema.save(folder / str(number))
    dist.barrier()
    assert_same(load_file(folder / "0") | load_file(folder / "1"), dict(whole.model_state_dict()))


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what all ranks have, of all stages; a collective."""
    return {name: tensor for rank in everybodys(tensors) for name, tensor in rank.items()}


def load_stages(checkpoint: Path, wanted: EMA | None = None) -> None:
    """Load the checkpoint of all stages into the whole model, and go on with it."""
    model = deep(seed=8)
    ema = EMA(model, PowerLaw(0.10))
    load({"model": model, "ema": ema}, checkpoint)
    assert ema.clock == 4
    assert set(ema.averages) == set(dict(model.named_parameters()))
    if wanted is not None:
        assert_same(dict(ema.averages), dict(wanted.averages))
    ema.update()
    assert ema.report().updates == 5


@case(4)
def what_is_split_is_not_split_again(folder: Path) -> None:
    """Averages in the parts of one layout cannot be cut to those of another without a gather."""
    model = split_blocks(net(), square()["inner"])
    ema = averaged(model, range(2))
    name = "first.down.weight"
    before, was = shards(ema.averages), described(ema.averages[name])
    shard_groups(model, square()["outer"])
    for call in (ema.update, ema.state_dict, lambda: ema.applied().__enter__()):
        text = refused(ValueError, call)
        assert f"{name}: was {was}, is {described(model.first.down.weight)}" in text
        assert "scale: was" not in text, "which was whole, and can be cut"
        assert "change or convert the model before the first update, or call reset()" in text
    assert_same(shards(ema.averages), before)
    ema.reset()
    ema.update()
    found = shards(model.state_dict())
    assert_same(shards(ema.averages), {name: found[name] for name in ema.averages})


@case(4)
def built_between_two_layouts(folder: Path) -> None:
    """Before the first update an EMA has read nothing: any layout may come after it."""
    model = split_blocks(net(), square()["inner"])
    ema = EMA(model, 0.5)
    shard_groups(model, square()["outer"])
    ema.update()
    for name, average in ema.averages.items():
        if not name.startswith("norm.running"):
            assert spread(average) == spread(model.get_parameter(name)), name
    assert ema.averages["first.up.weight"].device_mesh.ndim == 2
    assert ema.averages["out.weight"].device_mesh.ndim == 1


@case(4)
def ddp_that_hides_tensor_parallelism_is_refused(folder: Path) -> None:
    """Given a mesh, torch's DDP registers bare shards: they would be taken for the whole model."""
    model = split_blocks(net(), square()["inner"])
    ddp = nn.parallel.DistributedDataParallel(model, device_mesh=square()["outer"])
    text = refused(ValueError, lambda: EMA(ddp, 0.5))
    assert "first.up.weight" in text
    assert "tensor parallel" in text.lower()
