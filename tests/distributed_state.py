"""State through torch.distributed.checkpoint: stopped on some ranks, continued on others.

Four ranks write, and groups of other sizes read: they find the folder of the four beside their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import models
from distributed_tools import (
    Layout,
    assert_same,
    averaged,
    case,
    ddp,
    fsdp,
    fsdp_tp,
    full,
    hsdp,
    law,
    line,
    load,
    move_,
    net,
    sgd,
    sharded,
    shards,
    step,
    tp,
    uneven,
)
from models import batch, bit_identical
from polyak import EMA, PowerLaw

WRITTEN = (ddp, fsdp, hsdp, tp, fsdp_tp)
STOP, END = 4, 8  # the steps before and after which a run is stopped and over

# ----------------------------------------------------------------------------- on other ranks


@law(WRITTEN, 4)
def a_run_stops(layout: Layout, folder: Path) -> None:
    """Write the model and its averages, for the others to go on with."""
    model = net()
    layout(model)
    ema = averaged(model, range(STOP), PowerLaw(0.10))
    dcp.save({"model": model, "ema": ema}, checkpoint_id=folder / "moved")


@law((ddp, fsdp, tp, fsdp_tp), 2, 3, 4)
def a_run_goes_on(layout: Layout, folder: Path) -> None:
    """Whatever layout on four ranks it was stopped in: the bits of never having stopped."""
    for written in WRITTEN:
        go_on(layout, folder.parents[1] / "4" / f"a_run_stops[{written.__name__}]" / "moved")


def go_on(layout: Layout, checkpoint: Path) -> None:
    """Load what four ranks have written, continue, and compare with a run that never stopped."""
    model, alone = net(seed=8), net()
    outer = layout(model)
    ema = EMA(outer, PowerLaw(0.10))
    load({"model": model, "ema": ema}, checkpoint)
    assert ema.clock == STOP
    for number in range(STOP, END):
        move_(model, number)
        ema.update()
    whole = averaged(alone, range(END), PowerLaw(0.10))
    assert_same(full(model.state_dict()), dict(alone.state_dict()))
    assert_same(full(ema.averages), dict(whole.averages))
    assert without_run(ema) == without_run(whole)


def without_run(ema: EMA) -> dict[str, Any]:
    facts = json.loads(ema.state_dict()["facts"])
    ids = ("run", "branches")
    return facts | {"history": {k: v for k, v in facts["history"].items() if k not in ids}}


class Training(Stateful):
    """Model and optimizer as one entry of a checkpoint, under names that no sharding changes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def double(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch[0].double(), batch[1]


def training(shard: bool) -> tuple[Any, torch.optim.Optimizer, EMA]:
    """Return a model in float64, its optimizer, and an EMA that is attached to it."""
    model = uneven().double()
    if shard:
        sharded(model)
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.10))
    ema.attach(optimizer)
    return model, optimizer, ema


def train(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    """Train in float64, on the same data on all ranks."""
    for number in numbers:
        x, y = double(batch(number))
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@case(4)
def a_training_stops(folder: Path) -> None:
    """Write model, optimizer and averages in the middle of a training."""
    model, optimizer, ema = training(shard=True)
    train(model, optimizer, range(STOP))
    state = {"training": Training(model, optimizer), "ema": ema}
    dcp.save(state, checkpoint_id=folder / "trained")


@case(2, 3, 4)
def a_training_goes_on(folder: Path) -> None:
    """Real gradients, reduced over other ranks: where never having stopped would have led."""
    train_on(folder.parents[1] / "4" / "a_training_stops" / "trained", shard=True)


def train_on(checkpoint: Path, *, shard: bool) -> None:
    """Continue the training of four ranks, and compare with one process that never stopped."""
    model, optimizer, ema = training(shard)
    load({"training": Training(model, optimizer), "ema": ema}, checkpoint)
    assert ema.clock == STOP
    train(model, optimizer, range(STOP, END))
    assert ema.clock == END
    alone, its_optimizer, whole = training(shard=False)
    train(alone, its_optimizer, range(END))
    # The mean of equal gradients over three ranks is rounded. In float64 that is 1e-16 of values of
    # about 1, which a few steps amplify a thousandfold at the very most; momentum that is lost, or
    # one update too many, shows in the second digit.
    for found, wanted in (
        (full(ema.averages), dict(whole.averages)),
        (full(model.state_dict()), dict(alone.state_dict())),
    ):
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-12)


# --------------------------------------------------------------------------- on the same ranks


@case(2)
def fsdp_state_travels_by_dcp(folder: Path) -> None:
    """Saved and loaded in place, into an EMA that is fresh or used; going on is not stopping.

    The ranks train on the same data here: of buffers, which are not sharded, DCP keeps one rank's.
    """
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.10))
    ema.attach(optimizer, every=2)
    stored: dict[str, Any] = {}
    for number in range(8):
        step(model, optimizer, number, alike=True)
        if number == 4:
            dcp.save({"ema": ema}, checkpoint_id=str(folder / "dcp"))
            stored["model"] = shards(model.state_dict())
            stored["momentum"] = [
                optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()
            ]
    wanted = shards(ema.averages)
    assert ema.clock == 8
    for used in (False, True):
        again = sharded()
        optimizer = sgd(again)
        resumed = EMA(again, PowerLaw(0.10))
        if used:
            scramble_weights(again)
            resumed.update(3)
            resumed.update(6)
        resumed.attach(optimizer, every=2)
        load({"ema": resumed}, str(folder / "dcp"))
        assert resumed.clock == 4
        with torch.no_grad():
            for name, tensor in again.state_dict().items():
                mine = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                mine.copy_(stored["model"][name])
        for parameter, momentum in zip(again.parameters(), stored["momentum"], strict=True):
            optimizer.state[parameter]["momentum_buffer"] = momentum.clone()
        for number in range(5, 8):
            step(again, optimizer, number, alike=True)
        assert bit_identical(shards(again.state_dict()), shards(model.state_dict()))
        assert resumed.clock == 8
        assert bit_identical(shards(resumed.averages), wanted), used
        assert resumed.averages["hidden.weight"].shape == (7, 8)
        assert without_run(resumed) == without_run(ema)


def scramble_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * (number + 1))


@case(2)
def fsdp_a_load_that_fails_changes_nothing(folder: Path) -> None:
    """DCP writes into what it is given; a damaged checkpoint must not cost the average."""
    model = sharded()
    ema = EMA(model, 0.5)
    optimizer = sgd(model)
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
    other = EMA(sharded(), 0.5)
    other.update(9)
    dcp.save({"ema": other}, checkpoint_id=str(folder / "other"))
    state = ema.state_dict()
    before = shards(ema.averages)
    if dist.get_rank() == 0:
        victim = next(folder.joinpath("other").glob("*.distcp"))
        victim.write_bytes(victim.read_bytes()[:64])
    dist.barrier()
    failed = False
    try:
        load({"ema": ema}, str(folder / "other"))
    except dcp.api.CheckpointException:  # a BaseException
        failed = True
    assert failed, "the damaged checkpoint loaded"
    assert ema.clock == 3
    assert bit_identical(shards(ema.averages), before)
    assert ema.state_dict()["facts"] == state["facts"]


@case(2, 4)
def a_snapshot_is_taken_before_async_save_returns(folder: Path) -> None:
    """The run goes on while the checkpoint is written, and nothing of that gets into it."""
    aside = dist.new_group()  # the writer talks among its own kind
    model = net()
    fsdp(model)
    optimizer = sgd(model)
    ema = averaged(model, range(2))
    for number in range(3):
        state, facts = shards(ema.averages), ema.state_dict()["facts"]
        weights = shards(model.state_dict())
        path = folder / str(number)
        writing = dcp.async_save(
            {"model": model, "ema": ema}, checkpoint_id=path, process_group=aside
        )
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(7)  # at once
        for _ in range(3):
            ema.update()
        step(model, optimizer, number, alike=True)
        with ema.applied(), torch.no_grad():
            model(batch()[0])
        writing.result()
        again = net(seed=8)
        fsdp(again)
        loaded = EMA(again, 0.5)
        load({"model": again, "ema": loaded}, path)
        assert_same(shards(loaded.averages), state)
        assert_same(shards(again.state_dict()), weights)
        assert without_run(loaded) == json.loads(facts) | {
            "history": without_run(loaded)["history"]
        }


@law((fsdp, fsdp_tp), 4)
def a_teacher_travels_by_dcp(layout: Layout, folder: Path) -> None:
    """Its averages are in its own tensors, and a load writes into these."""
    student, teacher = net(), net(seed=9)
    layout(student)
    layout(teacher)
    ema = EMA(student, 0.5, into=teacher)
    for number in range(3):
        move_(student, number)
        ema.update()
    dcp.save({"ema": ema}, checkpoint_id=folder / "taught")
    other = net(seed=8)
    layout(other)
    resumed = EMA(student, 0.5, into=other)
    load({"ema": resumed}, folder / "taught")
    found, wanted = shards(other.state_dict()), shards(teacher.state_dict())
    del (
        found["norm.num_batches_tracked"],
        wanted["norm.num_batches_tracked"],
    )  # follows, is no average
    assert_same(found, wanted)
    assert resumed.clock == 3


@case(4)
def hugging_face_files_of_the_averages(folder: Path) -> None:
    """Torch's own writer of safetensors takes the averaged model, and a plain one loads that.

    (It fails on integers, so that the model has none.)
    """
    model, alone = models.plain(), models.plain()
    fully_shard(model, mesh=line())
    ema, whole = averaged(model, range(3)), averaged(alone, range(3))
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), save_distributed=True, enable_consolidation=True
    )
    dcp.save(ema.model_state_dict(), storage_writer=writer)
    dist.barrier()
    (path,) = folder.glob("*.safetensors")
    models.plain(seed=1).load_state_dict(load_file(path), strict=True)
    assert_same(load_file(path), whole.model_state_dict())


@case(2)
def a_pretended_step_is_none(folder: Path) -> None:
    """Torch steps an optimizer with a rate of 0, so that it gets its state: no update, no tick."""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    assert ema.clock == 0
    step(model, optimizer, 0)
    assert ema.clock == 1
    other = sharded()
    its_optimizer = sgd(other)
    resumed = EMA(other, 0.5)
    resumed.attach(its_optimizer)
    resumed.load_state_dict(ema.state_dict())
    set_state_dict(
        other, its_optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    assert resumed.clock == 1
    assert resumed.report().updates == 1
    assert_same(shards(resumed.averages), shards(ema.averages))
