"""What only a GPU shows of a whole EMA: the laws hold there, and training never waits for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models import bit_identical
from polyak import EMA, PowerLaw, files
from polyak.snapshots import SnapshotFolder
from syncs import no_sync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can show it")

GPU = "cuda"
HOST: dict[str, Any] = {"device": "cpu"}
PLACES = pytest.mark.parametrize("place", [{}, HOST], ids=["beside", "host"])
Build = Callable[[int], nn.Module]
BUILDS = pytest.mark.parametrize("build", models.MODELS.values(), ids=models.MODELS.keys())


def wide(build: Build = models.convolutional) -> nn.Module:
    return build(0).to(GPU)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> Iterator[int]:
    for step in steps:
        x, y = (each.to(GPU) for each in models.batch(step))
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        yield step


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def test_a_wait_would_be_seen() -> None:
    with no_sync(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(2, device=GPU).sum().item()


@BUILDS
@PLACES
def test_training_is_not_touched(build: Build, place: dict[str, Any]) -> None:
    def run(averaged: bool) -> list[Any]:
        torch.manual_seed(0)
        model = wide(build)
        optimizer = sgd(model)
        if averaged:
            ema = EMA(model, **place)
            ema.attach(optimizer)
        for step in train(model, optimizer, range(12)):
            if averaged and step % 5 == 4:
                with ema.applied():
                    model.eval()(models.batch(99)[0].to(GPU))
        return [model.state_dict(), torch.cuda.get_rng_state(), torch.get_rng_state()]

    assert bit_identical(run(True), run(False))


@BUILDS
def test_averages_in_host_memory_are_those_of_a_model_that_is_there(build: Build) -> None:
    """Nothing is lost on the way: the same path mixes copies that were waited for."""
    model, twin = wide(build), build(0)
    optimizer = sgd(model)
    far, here = EMA(model, 0.9, device="cpu"), EMA(twin, 0.9)
    far.attach(optimizer)
    for _ in train(model, optimizer, range(60)):
        twin.load_state_dict(model.state_dict())
        here.update()
    assert bit_identical(dict(far.averages), dict(here.averages))
    assert all(average.is_pinned() for average in far.averages.values() if average.numel())


@BUILDS
def test_averages_on_the_gpu_are_those_of_the_definition(build: Build) -> None:
    model = wide(build)
    ema, definition = EMA(model, 0.9), dict[str, Tensor]()
    for _ in train(model, sgd(model), range(20)):
        ema.update()
        now = {
            name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float64))
            for name, tensor in model.state_dict().items()
            if name in ema.averages
        }
        for name, weights in now.items():
            old = definition.get(name, weights)
            definition[name] = old + (1 - 0.9) * (weights - old)
    assert definition.keys() == ema.averages.keys()
    for name, average in ema.averages.items():
        torch.testing.assert_close(
            average.to(definition[name].dtype), definition[name], rtol=1e-5, atol=1e-6
        )


@PLACES
def test_the_weights_are_back_bit_for_bit(place: dict[str, Any]) -> None:
    model = wide()
    optimizer = sgd(model)
    ema = EMA(model, **place)
    for _ in train(model, optimizer, range(10)):
        ema.update()
    before = models.Snapshot(model)
    with ema.applied():
        for name, average in ema.averages.items():
            assert torch.equal(model.state_dict()[name], average.to(GPU)), name
    assert before.differences() == []


@PLACES
def test_steps_that_a_scaler_skips_are_none(place: dict[str, Any]) -> None:
    """A fused optimizer skips on the GPU, and nobody waits to learn of it."""
    torch.manual_seed(0)
    model = wide(models.plain)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    scaler = torch.amp.GradScaler(GPU, init_scale=2.0**40, growth_interval=3)
    ema = EMA(model, 0.5, **place)
    ema.update(0)  # what the first update copies is looked at
    ema.attach(optimizer)
    definition, real = on_host(ema.averages), 0
    for step in range(40):
        x, y = (each.to(GPU) for each in models.batch(step))
        optimizer.zero_grad()
        with torch.autocast(GPU, torch.float16):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        before = on_host(dict(model.named_parameters()))
        if step < 2:  # the first calls make buffers
            scaler.step(optimizer)
        else:
            with no_sync():
                scaler.step(optimizer)
        scaler.update()
        now = on_host(dict(model.named_parameters()))
        if not bit_identical(before, now):
            real += 1
            for name, weights in now.items():
                definition[name] = torch.lerp(definition[name], weights, 0.5)
    assert 0 < real < 40
    assert ema.clock == real
    assert ema.report().updates == real + 1
    for name, average in ema.averages.items():
        torch.testing.assert_close(average.cpu(), definition[name], rtol=1e-6, atol=1e-7)


@PLACES
def test_an_update_does_not_wait(place: dict[str, Any]) -> None:
    model = wide()
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.1), **place)
    ema.attach(optimizer)
    for _ in train(model, optimizer, range(3)):
        pass
    gradients = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    with no_sync():
        for _ in range(5):
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name]
            optimizer.step()
    assert ema.clock == 8


@PLACES
def test_what_is_saved_loads_where_there_is_no_gpu(place: dict[str, Any], tmp_path: Path) -> None:
    model = wide()
    optimizer = sgd(model)
    ema = EMA(model, **place)
    for _ in train(model, optimizer, range(10)):
        ema.update()
    ema.save(tmp_path / "a.safetensors")
    assert bit_identical(files.read(tmp_path / "a.safetensors"), on_host(ema.model_state_dict()))
    plain = models.convolutional(1)
    plain.load_state_dict(files.read(tmp_path / "a.safetensors"))
    assert not list(files.verify(tmp_path / "a.safetensors"))


@PLACES
def test_a_resumed_run_is_one_that_was_not_interrupted(
    place: dict[str, Any], tmp_path: Path
) -> None:
    def run(cut: int | None) -> list[Any]:
        model = wide(models.plain)
        optimizer = sgd(model)
        ema = EMA(model, **place)
        for step in train(model, optimizer, range(20)):
            ema.update()
            if step == cut:
                torch.save([model.state_dict(), ema.state_dict()], tmp_path / "state.pt")
                model = models.plain(7).to(GPU)
                optimizer = sgd(model)
                ema = EMA(model, **place)
                state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
                ema.load_state_dict(state[1])
                model.load_state_dict(state[0])
                for _ in train(model, optimizer, range(step + 1, 20)):
                    ema.update()
                break
        return [model.state_dict(), dict(ema.averages), ema.clock]

    assert bit_identical(run(9), run(None))


def test_built_before_the_model_moves() -> None:
    model = models.convolutional()
    ema = EMA(model, 0.5)
    model.to(GPU)
    ema.update()
    assert {average.device.type for average in ema.averages.values()} == {"cuda"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_is_written_in_place(dtype: torch.dtype) -> None:
    student, teacher = (build.to(GPU, dtype) for build in (models.plain(0), models.plain(1)))
    start = {n: p.detach().double() for n, p in teacher.named_parameters()}
    ema = EMA(student, 0.5, into=teacher)
    ema.update()
    for name, parameter in teacher.named_parameters():
        mixed = (start[name] + student.get_parameter(name).detach().double()) / 2
        ulp = torch.finfo(dtype).eps * float(mixed.abs().max())
        torch.testing.assert_close(parameter, mixed.to(dtype), rtol=0, atol=2 * ulp)


@PLACES
def test_what_is_not_finite_stays_out(place: dict[str, Any]) -> None:
    model = wide(models.plain)
    ema = EMA(model, 0.5, **place)
    ema.update()
    before = on_host(ema.averages)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
        model.head.bias += 1
    ema.update()
    after = on_host(ema.averages)
    assert after["head.weight"][0, 0] == before["head.weight"][0, 0]
    torch.testing.assert_close(after["head.bias"], before["head.bias"] + 0.5)
    with pytest.warns(UserWarning, match="not finite"):
        assert ema.report().nonfinite == 1


def test_statistics_are_estimated_there() -> None:
    model = wide()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(5)):
        ema.update()
    before = models.Snapshot(model)
    ema.reestimate_statistics([models.batch(step)[0].to(GPU) for step in range(4)])
    assert before.differences() == []
    with ema.applied():
        assert not torch.equal(model.norm.running_mean, before._seen["norm.running_mean"])


@PLACES
def test_snapshots_are_written_behind_training(place: dict[str, Any], tmp_path: Path) -> None:
    """What is in the files is what the averages were when they were due; nobody waits for it."""
    model = wide()
    optimizer = sgd(model)
    emas = [EMA(model, PowerLaw(std), **place) for std in (0.05, 0.10)]
    folder = SnapshotFolder(tmp_path, emas, every=5, background=True)
    then: dict[int, list[dict[str, Tensor]]] = {}
    for step in train(model, optimizer, range(1, 41)):
        for ema in emas:
            ema.update(step)
        if step % 5 == 0:
            then[step] = [on_host(ema.model_state_dict()) for ema in emas]
        folder.update()
    for path in folder.files:
        step, _, label = path.stem.partition("-")
        saved = then[int(step)][label == "powerlaw-0.1"]
        assert bit_identical(files.read(path), saved), path.name


def test_an_update_is_refused_while_a_graph_is_captured() -> None:
    model = wide(models.plain)
    ema = EMA(model, 0.5)
    ema.update()
    torch.cuda.synchronize()
    number = torch.zeros((), device=GPU)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        number.add_(1)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="replay"):
            ema.update()
    torch.cuda.synchronize()
    ema.update()
    assert ema.clock == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.filterwarnings("ignore")  # of the compiler, about its own parts
def test_compiled_code_sees_the_averages(mode: str) -> None:
    """Also where it replays CUDA graphs: the averages are written into the same memory."""
    model = wide(models.plain)
    compiled, x = torch.compile(model, mode=mode), models.batch()[0].to(GPU)
    ema = EMA(compiled, 0.5)
    optimizer = sgd(model)
    for step in range(6):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        ema.update(step + 1)
    with torch.no_grad():
        trained, averaged = compiled(x).clone(), None
        with ema.applied():
            averaged = compiled(x).clone()
            torch.testing.assert_close(averaged, model(x))
        torch.testing.assert_close(compiled(x), trained, rtol=0, atol=0)
    assert not torch.allclose(averaged, trained)


def test_shards_on_a_gpu(tmp_path: Path) -> None:
    """FSDP2 over nccl, in a group of one: the averages are those of the model that is whole."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        whole, sharded = wide(models.plain), wide(models.plain)
        fully_shard(sharded)
        runs = []
        for model in (whole, sharded):
            ema = EMA(model, 0.5)
            ema.attach(optimizer := sgd(model))
            for _ in train(model, optimizer, range(10)):
                pass
            with ema.applied():
                outputs = model(models.batch()[0].to(GPU))
            ema.save(tmp_path / "a.safetensors")
            runs.append((outputs, files.read(tmp_path / "a.safetensors")))
    finally:
        distributed.destroy_process_group()
    torch.testing.assert_close(runs[0], runs[1])
