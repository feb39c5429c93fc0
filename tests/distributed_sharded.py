"""FSDP2 and its surroundings: the plain model as the measure, statistics, dtypes, teachers.

What holds in every layout is in `distributed_laws.py`; what is gathered, in `distributed_gathered`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distributed_tools import (
    assert_same,
    averaged,
    case,
    columns,
    described,
    full,
    line,
    move_,
    refused,
    registered_shards,
    seeded,
    sgd,
    sharded,
    shards,
    silence,
    step,
    uneven,
)
from models import batch, bit_identical
from polyak import EMA, files


@case(2)
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


@case(2)
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


@case(2)
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


@case(2)
def fsdp_in_mixed_precision(folder: Path) -> None:
    """Computed in bfloat16, kept and averaged in float32."""
    model = uneven()
    model.norm = nn.LayerNorm(7)
    mesh = line()
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


@case(2)
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


@case(2)
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

    model = seeded(Odd)
    fully_shard(model, mesh=line())
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


@case(2)
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


@case(4)
def fsdp_a_teacher_of_other_parts_is_refused(folder: Path) -> None:
    """The same shape, even the same size of every shard, but other elements: each is listed."""

    def build() -> Any:
        return seeded(lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 12)))

    student = fully_shard(build(), mesh=line())
    across = fully_shard(build(), mesh=line(), shard_placement_fn=columns)
    turned = fully_shard(build(), mesh=DeviceMesh("cpu", [3, 2, 1, 0]))
    whole = build()
    sizes = [model[0].weight.to_local().numel() for model in (student, across, turned)]
    assert len(set(sizes)) == 1
    for teacher in (across, turned, whole):
        start = shards(teacher.state_dict())
        text = refused(ValueError, lambda teacher=teacher: EMA(student, 0.5, into=teacher))
        assert "teacher and model do not match:" in text
        for name, mine in student.named_parameters():
            theirs = teacher.get_parameter(name)
            if teacher is across and name == "1.bias":
                assert name not in text, "which both split alike"
                continue
            words = "whole" if teacher is whole else described(theirs)
            assert f"{name}: {words} in the teacher, {described(mine)} in the model" in text
        assert_same(shards(teacher.state_dict()), start)
    text = refused(ValueError, lambda: EMA(build(), 0.5, into=student))
    assert f"0.weight: {described(student[0].weight)} in the teacher, whole in the model" in text


@case(4)
def fsdp_a_teacher_from_the_meta_device(folder: Path) -> None:
    """Built without data, sharded, given memory, loaded from the student: it never was whole."""
    student, alone = sharded(), uneven()
    with torch.device("meta"):
        teacher = sharded(seeded(type(alone)))
    text = refused(ValueError, lambda: EMA(student, 0.5, into=teacher))
    assert "on the meta device" in text
    teacher.to_empty(device="cpu")
    teacher.load_state_dict(student.state_dict())
    ema = EMA(student, 0.5, into=teacher)
    whole = EMA(alone, 0.5, into=uneven())
    for number in range(3):
        move_(student, number)
        move_(alone, number)
        with silence():
            ema.update()
        whole.update()
    assert_same(full(teacher.state_dict()), dict(whole.model_state_dict()))


@case(4)
def fsdp_a_copy_into_other_parts_is_refused(folder: Path) -> None:
    """`copy_to` writes what each rank has: shards into the same, and what is whole into any."""
    model, alone = sharded(), uneven()
    ema, whole = averaged(model, range(2)), averaged(alone, range(2))
    for source in (ema, whole):
        target = sharded()
        with silence():
            source.copy_to(target)
        assert_same(shards(target.state_dict()), shards(ema.model_state_dict()))
    across = fully_shard(uneven(), mesh=DeviceMesh("cpu", [3, 2, 1, 0]))
    for target in (uneven(), across):
        start = shards(target.state_dict())
        text = refused(ValueError, lambda target=target: ema.copy_to(target))
        for name, parameter in target.named_parameters():
            words = described(parameter) if target is across else "whole"
            assert f"{name}: {described(ema.averages[name])} here, {words} in the module" in text
        assert_same(shards(target.state_dict()), start)


@case(4)
def fsdp_a_rank_with_nothing(folder: Path) -> None:
    """A model smaller than its group: some ranks hold no element at all, and take part in all."""
    model = fully_shard(seeded(lambda: nn.Linear(4, 1)), mesh=line())
    alone = seeded(lambda: nn.Linear(4, 1))
    ema, whole = averaged(model, range(3)), averaged(alone, range(3))
    held = sum(tensor.numel() for tensor in shards(ema.averages).values())
    assert held == (5 if dist.get_rank() == 0 else 0)
    report = ema.report()
    assert (report.distance, report.bytes) == ((whole.report().distance, 20) if held else (0.0, 0))
    assert ema.report(dist.group.WORLD).distance == whole.report().distance
    with ema.applied(), torch.no_grad():
        inside = model(torch.ones(1, 4))
    with whole.applied(), torch.no_grad():
        assert_same(inside, alone(torch.ones(1, 4)))
    ema.save(folder / "a.safetensors")
    assert_same(files.read(folder / "a.safetensors"), dict(whole.model_state_dict()))
    again = EMA(model, 0.5)
    again.load_state_dict(ema.state_dict())
    assert_same(shards(again.averages), shards(ema.averages))


@case(4)
def fsdp_a_replicated_state_is_whole(folder: Path) -> None:
    """Replicas that are DTensors hold all of their model: shards are cut from them, and back."""
    source = replicate(seeded(lambda: nn.Linear(6, 5)), mesh=line())
    ema = averaged(source, range(3))
    assert isinstance(ema.averages["weight"], DTensor)
    model = fully_shard(seeded(lambda: nn.Linear(6, 5), seed=8), mesh=line())
    loaded = EMA(model, 0.5)
    loaded.load_state_dict(ema.state_dict())
    assert_same(full(loaded.averages), full(ema.averages))
    alone = EMA(seeded(lambda: nn.Linear(6, 5), seed=8), 0.5)
    alone.load_state_dict(ema.state_dict())
    assert_same(dict(alone.averages), full(ema.averages))
    text = refused(ValueError, lambda: ema.load_state_dict(loaded.state_dict()))
    assert f"weight: {described(loaded.averages['weight'])} in the state, whole in the" in text
