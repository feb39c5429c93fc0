"""One process of several: runs every case in one process group, and writes down how each went.

``python distributed_worker.py RANK SIZE FOLDER``; `test_distributed.py` starts one for each rank
and reads ``FOLDER/RANK.json``: the name of each case -> None, or the traceback of its failure. When
the ranks are no longer in step after a failure, no further case is begun.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from models import batch, bit_identical, convolutional
from polyak import EMA, PowerLaw

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}

# ------------------------------------------------------------------------------------- tools


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def everybodys(value: Any) -> list[Any]:
    """Return what each rank passed."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def full(tensors: Any) -> dict[str, Tensor]:
    """Return whole tensors of sharded ones; a collective."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in dict(tensors).items()
    }


def shards(tensors: Any) -> dict[str, Tensor]:
    """Return copies of what this rank holds."""
    with torch.no_grad():
        return {
            name: (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in dict(tensors).items()
        }


class Uneven(nn.Module):
    """Sizes that two ranks cannot share evenly, one that leaves a rank without any, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 7)
        self.norm = nn.BatchNorm1d(7)
        self.out = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.hidden(x)))) * self.scale


def uneven() -> Uneven:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Uneven()


def sharded(model: nn.Module | None = None) -> Uneven:
    model = uneven() if model is None else model
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.hidden, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, number: int, *, alike: bool = False
) -> None:
    """Train on a batch that is this rank's own, or the same for all."""
    x, y = batch(number if alike else 1000 * dist.get_rank() + number)
    model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def registered_shards(model: nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


# --------------------------------------------------------------------------------------- DDP


@case
def ddp_averages_are_the_same_on_all_ranks(folder: Path) -> None:
    """Different data on each rank: parameters agree bit for bit, statistics are each rank's own."""
    model = convolutional()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(ddp)
    ema = EMA(ddp, 0.5)
    ema.attach(optimizer)
    statistics: list[Tensor] = []
    for number in range(5):
        torch.manual_seed(number)  # one dropout mask for all
        step(ddp, optimizer, number)
        statistics.append(model.norm.running_mean.double())
    assert ema.clock == 5
    assert set(ema.averages) == {name for name, _ in model.named_parameters()} | {
        "norm.running_mean",
        "norm.running_var",
    }
    averages = everybodys(copies(ema.averages))
    for name, average in averages[0].items():
        agree = bit_identical(average, averages[1][name])
        assert agree != name.startswith("norm.running"), name
    expected = statistics[0]
    for mean in statistics[1:]:
        expected = 0.5 * expected + 0.5 * mean
    torch.testing.assert_close(ema.averages["norm.running_mean"].double(), expected)
    state = ema.state_dict()
    bare = EMA(convolutional(seed=1), 0.5)
    bare.load_state_dict(state)
    assert bit_identical(dict(bare.averages), dict(ema.averages))


@case
def ddp_applied_leaves_training_as_it_was(folder: Path) -> None:
    """A validation on the averages in each step, and the run ends at the same bits."""
    runs = []
    for validate in (False, True):
        model = convolutional()
        ddp = nn.parallel.DistributedDataParallel(model)
        optimizer = sgd(ddp)
        ema = EMA(ddp, 0.5)
        ema.attach(optimizer)
        outputs = []
        for number in range(4):
            torch.manual_seed(number)
            step(ddp, optimizer, number)
            if validate:
                model.eval()
                with ema.applied(), torch.no_grad():
                    outputs.append(model(batch(7)[0]))
                fresh = convolutional(seed=1)
                fresh.load_state_dict(ema.model_state_dict())
                assert bit_identical(outputs[-1], fresh.eval()(batch(7)[0]).detach())
        runs.append([copies(model.state_dict()), copies(ema.averages)])
    assert bit_identical(*runs)
    # A forward of DDP itself hands out the buffers of rank 0 first, in eval mode too.
    before = copies(model.state_dict())
    with ema.applied(), torch.no_grad():
        output = ddp.eval()(batch(7)[0])
    assert bit_identical(output, everybodys(outputs[-1])[0])
    assert bit_identical(copies(model.state_dict()), before)


@case
def ddp_saves_the_plain_model(folder: Path) -> None:
    """Every rank may save; the file has the plain model's names."""
    model = convolutional()
    ddp = nn.parallel.DistributedDataParallel(model)
    ema = EMA(ddp)
    ema.update()
    path = folder / f"ddp-{dist.get_rank()}.safetensors"
    ema.save(path)
    from polyak import files

    convolutional(seed=1).load_state_dict(files.read(path), strict=True)


# ------------------------------------------------------------------------------------- FSDP2


@case
def fsdp_the_sharded_average_is_the_unsharded_one(folder: Path) -> None:
    """The same weights, averaged in shards and whole: the same bits, at any size of the shards."""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.10))
    plain = uneven()
    whole = EMA(plain, PowerLaw(0.10))
    sizes = []
    for number in range(6):
        step(model, optimizer, number)
        ema.update()
        plain.load_state_dict(full(model.state_dict()))
        whole.update()
        assert set(ema.averages) == set(whole.averages)
        assert bit_identical(full(ema.averages), dict(whole.averages))
        sizes = [average.to_local().numel() for average in ema.averages.values() if _split(average)]
    assert ema.averages["hidden.weight"].shape == (7, 8)
    assert len({tuple(s) for s in everybodys(sizes)}) == 2, "the shards are even"
    assert 0 in everybodys(sizes)[1], "no rank is without elements"
    assert ema.report().updates == 6


def _split(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


@case
def fsdp_attached_it_is_the_same(folder: Path) -> None:
    """The hook of a sharded optimizer, against updates by hand."""
    model = sharded()
    optimizer = sgd(model)
    attached, by_hand = EMA(model, 0.5), EMA(model, 0.5)
    attached.attach(optimizer)
    for number in range(4):
        step(model, optimizer, number)
        by_hand.update()
    assert attached.clock == 4
    assert bit_identical(shards(attached.averages), shards(by_hand.averages))


@case
def fsdp_built_before_sharding(folder: Path) -> None:
    """An EMA may be there before the model is sharded: it has read nothing yet."""
    model = uneven()
    ema = EMA(model, 0.5)
    sharded(model)
    optimizer = sgd(model)
    other = EMA(model, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
        other.update()
    assert all(map(_split, (ema.averages[name] for name, _ in model.named_parameters())))
    assert bit_identical(shards(ema.averages), shards(other.averages))


@case
def fsdp_update_communicates_nothing(folder: Path) -> None:
    """Each rank averages what it holds. (A forward communicates: the counter can count.)"""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        with CommDebugMode() as counter:
            ema.update()
        assert counter.get_total_counts() == 0, counter.get_comm_counts()
    with CommDebugMode() as counter:
        ema.report()
        ema.state_dict()
    assert counter.get_total_counts() == 0, counter.get_comm_counts()
    with CommDebugMode() as counter:
        model(batch()[0])
    assert counter.get_total_counts() > 0


@case
def fsdp_update_after_a_forward_without_backward(folder: Path) -> None:
    """A validation leaves the root unsharded: its registered parameters are full copies."""
    runs = []
    for validate in (False, True):
        model = sharded()
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        unsharded = 0
        for number in range(5):
            step(model, optimizer, number)
            if validate:
                model.eval()
                with torch.no_grad():
                    model(batch()[0])
                unsharded += not registered_shards(model)
            ema.update()
        assert unsharded == 5 * validate, "the state that this is about did not occur"
        runs.append([shards(ema.averages), shards(model.state_dict())])
        assert ema.averages["out.weight"].shape == (3, 7)
    assert bit_identical(*runs)


@case
def fsdp_applied(folder: Path) -> None:
    """Forwards inside use the averages, whatever ran before; afterwards training is as it was."""
    runs = []
    for validate in (False, True):
        model = sharded()
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        ema.attach(optimizer)
        x = batch(7)[0]
        for number in range(5):
            step(model, optimizer, number)
            if not validate:
                continue
            model.eval()
            before = shards(model.state_dict())
            if number % 2:
                with torch.no_grad():
                    model(x)  # leaves the root unsharded
            with ema.applied(), torch.no_grad():
                inside = model(x)
                again = model(x)
            plain = uneven().eval()
            plain.load_state_dict(full(ema.model_state_dict()))
            torch.testing.assert_close(inside, plain(x).detach())
            assert bit_identical(inside, again)
            assert registered_shards(model)
            assert bit_identical(shards(model.state_dict()), before)
            with torch.no_grad():
                after = model(x)
            plain.load_state_dict(full(model.state_dict()))
            torch.testing.assert_close(after, plain(x).detach())
            assert number == 0 or not torch.allclose(after, inside)
        model.train()
        runs.append([shards(model.state_dict()), shards(ema.averages)])
    assert bit_identical(*runs)


@case
def fsdp_applied_after_an_exception(folder: Path) -> None:
    """The shards come back bit for bit, also when a forward inside was the last thing."""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
    before = shards(model.state_dict())
    try:
        with ema.applied() as trained:
            assert bit_identical(shards(trained), before)
            model(batch()[0])  # in train mode: the statistics change
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert registered_shards(model)
    assert bit_identical(shards(model.state_dict()), before)


@case
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
        dcp.load({"ema": resumed}, checkpoint_id=str(folder / "dcp"))
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


def without_run(ema: EMA) -> dict[str, Any]:
    facts = json.loads(ema.state_dict()["facts"])
    return facts | {"history": {k: v for k, v in facts["history"].items() if k != "run"}}


@case
def fsdp_the_run_is_one(folder: Path) -> None:
    """All ranks see the same states: the id that says so in their states is the same."""
    model = sharded()
    fast, slow = EMA(model, 0.5), EMA(model, PowerLaw(0.10))
    fast.update()
    slow.update()
    runs = everybodys([json.loads(e.state_dict()["facts"])["history"]["run"] for e in (fast, slow)])
    assert len({run for rank in runs for run in rank}) == 1, runs
    other = EMA(sharded(), 0.5)
    other.update()
    assert json.loads(other.state_dict()["facts"])["history"]["run"] != runs[0][0]


def scramble_weights(model: nn.Module) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.1 * (number + 1))


@case
def fsdp_saved_in_shards_loaded_whole(folder: Path) -> None:
    """What several ranks saved loads into a model that is not sharded, bit for bit."""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(3):
        step(model, optimizer, number)
        ema.update()
    with torch.no_grad():  # statistics are each rank's own; one copy of them is stored
        statistics = everybodys(shards({k: ema.averages[k] for k in ("norm.running_mean",)}))
    dcp.save({"ema": ema}, checkpoint_id=str(folder / "whole"))
    whole = EMA(uneven(), 0.5)
    dcp.load({"ema": whole}, checkpoint_id=str(folder / "whole"))
    assert whole.clock == 3
    averages = full(ema.averages)
    for name, average in whole.averages.items():
        assert not isinstance(average, DTensor)
        if not name.startswith("norm.running"):
            assert bit_identical(average, averages[name]), name
    found = {"norm.running_mean": whole.averages["norm.running_mean"]}
    assert any(bit_identical(found, rank) for rank in statistics)


@case
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
        dcp.load({"ema": ema}, checkpoint_id=str(folder / "other"))
    except dcp.api.CheckpointException:  # a BaseException
        failed = True
    assert failed, "the damaged checkpoint loaded"
    assert ema.clock == 3
    assert bit_identical(shards(ema.averages), before)
    assert ema.state_dict()["facts"] == state["facts"]


@case
def fsdp_save_says_what_to_do(folder: Path) -> None:
    """One file cannot hold what is spread over processes; nothing is written."""
    model = sharded()
    ema = EMA(model, 0.5)
    ema.update()
    path = folder / f"sharded-{dist.get_rank()}.safetensors"
    texts = []
    for inside in (False, True):
        try:
            with ema.applied() if inside else nullcontext():
                ema.save(path)
        except ValueError as error:
            texts.append(str(error))
    assert len(texts) == 2, "save wrote a file of shards"
    for text in texts:
        assert "spread over processes" in text
        assert "torch.distributed.checkpoint.save({'ema': ema}" in text
    assert not path.exists()


@case
def fsdp_teacher(folder: Path) -> None:
    """A sharded teacher is moved shard by shard, and predicts with its averages."""
    student, teacher = sharded(), sharded()
    optimizer = sgd(student)
    ema = EMA(student, 0.5, into=teacher)
    start = shards(teacher.state_dict())["hidden.weight"].double()
    step(student, optimizer, 0)
    ema.update()
    student_now = shards(student.state_dict())["hidden.weight"].double()
    found = shards(teacher.state_dict())["hidden.weight"]
    torch.testing.assert_close(found.double(), (start + student_now) / 2, rtol=0, atol=1e-7)
    with torch.no_grad():
        teacher(batch()[0])  # leaves its root unsharded
    step(student, optimizer, 1)
    ema.update()
    with torch.no_grad():
        predicted = teacher(batch()[0])
    plain = uneven().eval()
    plain.load_state_dict(full(teacher.state_dict()))
    torch.testing.assert_close(predicted, plain(batch()[0]).detach())


@case
def fsdp_between_forward_and_backward(folder: Path) -> None:
    """An update or a look in the middle of a step changes no gradient."""
    runs = []
    for disturb in (False, True):
        model = sharded()
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        for number in range(4):
            x, y = batch(1000 * dist.get_rank() + number)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if disturb:
                ema.update()
                ema.report()
                ema.state_dict()
            loss.backward()
            optimizer.step()
        runs.append(shards(model.state_dict()))
    assert bit_identical(*runs)


@case
def fsdp_that_stays_unsharded(folder: Path) -> None:
    """Without resharding after forwards every layer is whole most of the time."""
    runs = []
    for keep in (False, True):
        model = uneven()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.hidden, mesh=mesh, reshard_after_forward=not keep)
        fully_shard(model, mesh=mesh, reshard_after_forward=not keep)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        outputs = []
        for number in range(4):
            step(model, optimizer, number)
            with torch.no_grad():
                model.eval()(batch(7)[0])
                if number == 2:
                    assert isinstance(model.hidden.weight, DTensor) != keep
                ema.update()
                with ema.applied():
                    outputs.append(model(batch(7)[0]))
                outputs.append(model(batch(7)[0]))
        runs.append([shards(ema.averages), outputs])
        model.reshard()
    assert bit_identical(*runs)


@case
def fsdp_in_mixed_precision(folder: Path) -> None:
    """Computed in bfloat16, kept and averaged in float32."""
    model = uneven()
    model.norm = nn.LayerNorm(7)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    expected: dict[str, Tensor] = {}
    for number in range(4):
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(x.bfloat16()).float(), y).backward()
        optimizer.step()
        ema.update()
        now = {name: tensor.double() for name, tensor in shards(model.state_dict()).items()}
        expected = {n: (expected[n] + now[n]) / 2 if expected else now[n] for n in now}
    for name, average in shards(ema.averages).items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=0, atol=1e-6)
    with ema.applied(), torch.no_grad():
        inside = model(batch(9)[0].bfloat16())
    assert inside.dtype == torch.bfloat16
    assert registered_shards(model)


@case
def fsdp_statistics_are_reestimated(folder: Path) -> None:
    """The sharded averaged model runs over data; the trained one's statistics stay."""
    model = sharded()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(3):
        step(model, optimizer, number, alike=True)
        ema.update()
    before = shards(model.state_dict())
    data = [batch(20)[0], batch(21)[0]]
    ema.reestimate_statistics(data)
    assert registered_shards(model)
    assert bit_identical(shards(model.state_dict()), before)
    averaged = full(ema.averages)
    inputs = F.linear(torch.cat(data), averaged["hidden.weight"], averaged["hidden.bias"])
    found = ema.model_state_dict()
    torch.testing.assert_close(found["norm.running_mean"], inputs.mean(0))
    torch.testing.assert_close(found["norm.running_var"], inputs.var(0))


@case
def fsdp_tied_and_frozen(folder: Path) -> None:
    """A tied tensor is averaged once and a frozen one is not held, in shards as well."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(8, 5, bias=False)
            self.base = nn.Linear(5, 5).requires_grad_(False)
            self.head = nn.Linear(8, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.base(self.embed(x)) @ self.head.weight

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = Odd()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD([model.embed.weight], lr=0.1)
    ema = EMA(model, 0.9)
    step(model, optimizer, 0)
    ema.update()
    start = shards(ema.averages)["embed.weight"]
    step(model, optimizer, 1)
    ema.update()
    assert list(ema.averages) == ["embed.weight"]
    now = shards(model.state_dict())["head.weight"]
    found = shards(ema.model_state_dict())
    assert bit_identical(found["embed.weight"], found["head.weight"])
    expected = 0.9 * start.double() + 0.1 * now.double()
    torch.testing.assert_close(found["head.weight"].double(), expected, rtol=0, atol=1e-6)
    with ema.applied():
        assert model.head.weight is model.embed.weight
    assert bit_identical(shards(model.state_dict())["head.weight"], now)


@case
def tensor_parallel(folder: Path) -> None:
    """Sharded and plain parameters side by side: the same bits as whole."""

    def build() -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.LayerNorm(8))

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(build(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert {isinstance(p, DTensor) for p in model.parameters()} == {True, False}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    ema = EMA(model, 0.5)
    plain = build()
    whole = EMA(plain, 0.5)
    for number in range(3):
        x, y = batch(number)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        with CommDebugMode() as counter:
            ema.update()
        assert counter.get_total_counts() == 0
        plain.load_state_dict(full(model.state_dict()))
        whole.update()
    assert bit_identical(full(ema.averages), dict(whole.averages))
    before = shards(model.state_dict())
    with ema.applied(), torch.no_grad():
        inside = model(batch(9)[0])
    assert bit_identical(shards(model.state_dict()), before)
    with whole.applied():
        torch.testing.assert_close(inside, plain(batch(9)[0]).detach())


# -------------------------------------------------------------------------------------- main


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=20),  # a rank that waits in vain says so
    )
    aside = dist.new_group()  # where no collective of a case can be mistaken for another
    results: dict[str, str | None] = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function(folder)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        try:
            dist.barrier(aside)
        except RuntimeError:
            return
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
