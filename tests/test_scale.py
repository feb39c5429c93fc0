"""What `benchmarks/scale.py` computes is what torch shards and what polyak holds and moves.

Shapes: models are sharded by torch itself under a fake process group, which has any number of ranks
and sends nothing; each rank is a fresh process, as torch remembers the rank with the mesh. Bytes:
two real processes run small models, and what they allocate, move and write is counted.

``python test_scale.py RANK SIZE FOLDER`` is one of the two processes.
"""

from __future__ import annotations

import datetime
import doctest
import importlib.util
import itertools
import json
import math
import multiprocessing
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import typer
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

from polyak import EMA, engine
from polyak.engine import foreach
from test_distributed import run

ROOT = Path(__file__).parent.parent


def _script() -> Any:
    """Import benchmarks/scale.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["scale"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


scale = sys.modules.get("scale") or _script()

IMPORTED = [  # once, for all processes that shapes are made in
    "hypothesis",
    "polyak",
    "pytest",
    "rich.table",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.testing._internal.distributed.fake_pg",
    "typer.testing",
]

# Nothing divides anything: short shards, empty shards, tensors with fewer rows than ranks.
TINY = scale.Config(layers=2, hidden=12, heads=3, kv_heads=1, ffn=19, vocab=37, tied=True)
UNTIED = replace(TINY, tied=False)
# One rank of two holds more than a chunk of scratch. Rows are of 64 bytes or a multiple, to which
# files are padded.
SMALL = scale.Config(layers=2, hidden=128, heads=4, kv_heads=2, ffn=331, vocab=513, tied=False)


# -------------------------------------------------------------- the model that the script is about


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        hidden, kv = config.hidden, config.hidden // config.heads * config.kv_heads
        self.heads = config.heads, config.kv_heads
        self.q = nn.Linear(hidden, hidden, bias=False)
        self.k = nn.Linear(hidden, kv, bias=False)
        self.v = nn.Linear(hidden, kv, bias=False)
        self.o = nn.Linear(hidden, hidden, bias=False)
        self.gate = nn.Linear(hidden, config.ffn, bias=False)
        self.up = nn.Linear(hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, hidden, bias=False)
        self.attention_norm = nn.RMSNorm(hidden)
        self.ffn_norm = nn.RMSNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_norm(x)
        heads = zip((self.q, self.k, self.v), (self.heads[0], *[self.heads[1]] * 2), strict=True)
        q, k, v = (f(y).unflatten(-1, (n, -1)).transpose(-2, -3) for f, n in heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(mixed.transpose(-2, -3).flatten(-2))
        y = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Transformer(nn.Module):
    """A stage of a transformer, under the names that its parts have in the whole one."""

    def __init__(self, config: Any, stage: int = 0, stages: int = 1) -> None:
        super().__init__()
        names = {weight.name for weight in config.stage(stage, stages)}
        mine = [n for n in range(config.layers) if f"layers.{n}.q.weight" in names]
        last = stage == stages - 1
        self.embed = nn.Embedding(config.vocab, config.hidden) if stage == 0 else None
        self.layers = nn.ModuleDict({str(number): Layer(config) for number in mine})
        self.norm = nn.RMSNorm(config.hidden) if last else None
        self.head = nn.Linear(config.hidden, config.vocab, bias=False) if last else None
        self.tied = config.tied and stages == 1
        self.tie()

    def tie(self) -> None:
        if self.tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.embed is None else self.embed(x)
        for layer in self.layers.values():
            x = layer(x)
        return x if self.head is None else self.head(self.norm(x))


def sharded(config: Any, mesh: Any, rank: int, device: str = "cpu") -> nn.Module:
    """Return a rank's part of the model, sharded by torch as the script says that it is."""
    sizes = {name: n for name, n in vars(mesh).items() if n > 1}
    ranks = init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    with torch.device(device):
        model = Transformer(config, mesh.place(rank).stage, mesh.pipeline)
    if mesh.tensor > 1:
        in_parallel(model, ranks["tensor"])
    if mesh.shard > 1:
        data = ranks["replicate", "shard"] if mesh.replicate > 1 else ranks["shard"]
        for layer in model.layers.values():
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)
    elif mesh.replicate > 1 and mesh.tensor == 1 and device == "cpu":
        model = nn.parallel.DistributedDataParallel(
            model, process_group=ranks.get_group("replicate")
        )
    return model


def in_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Cut a model as is usual: by output features, then by input features; norms are whole."""
    plan: dict[str, Any] = {"embed": RowwiseParallel(), "head": ColwiseParallel()}
    plan["norm"] = SequenceParallel()
    for number in model.layers:
        plan |= {f"layers.{number}.{n}": ColwiseParallel() for n in ("q", "k", "v", "gate", "up")}
        plan |= {f"layers.{number}.{n}": RowwiseParallel() for n in ("o", "down")}
        plan |= {f"layers.{number}.{n}_norm": SequenceParallel() for n in ("attention", "ffn")}
    modules = dict(model.named_modules())
    parallelize_module(model, mesh, {n: style for n, style in plan.items() if n in modules})
    model.tie()  # each name has got a tensor of its own


def local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def expected_shapes(config: Any, mesh: Any, rank: int) -> dict[str, tuple[int, ...]]:
    place = mesh.place(rank)
    weights = config.stage(place.stage, mesh.pipeline)
    return {weight.name: scale.local_shape(weight, mesh, place) for weight in weights}


# -------------------------------------------------------------- shapes, for any number of ranks


def layouts(world: int) -> list[Any]:
    """The meshes of so many ranks."""
    two, eight = min(2, world), min(8, world)
    sizes = {
        (1, world, 1, 1),  # DDP
        (1, 1, world, 1),  # FSDP2
        (1, two, world // two, 1),  # HSDP
        (1, 1, 1, world),  # TP
        (1, 1, world // eight, eight),  # FSDP2 x TP
        (two, two, world // eight, two) if world > 4 else (two, 1, world // two, 1),  # all
    }
    return [scale.Mesh(*size) for size in sorted(sizes)]


def in_fresh_processes(function: Callable[..., None], cases: list[tuple[Any, ...]]) -> None:
    """Call a function with each case in a process of its own; raise what it raises."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with context.Pool(2, maxtasksperchild=1) as pool:
        failures = pool.starmap_async(told, [(function, *case) for case in cases], 1).get(90)
    if any(failures):
        pytest.fail("\n\n".join(filter(None, failures)))


def told(function: Callable[..., None], *case: Any) -> str | None:
    """Call a function; return what went wrong."""
    torch.set_num_threads(1)
    try:
        function(*case)
    except BaseException:
        return f"{case}:\n{traceback.format_exc()}"
    return None


def group(world: int, rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


@pytest.mark.parametrize("world", [1, 2, 8, 64, 512])
def test_an_average_lies_as_its_parameter_does(world: int) -> None:
    """Mesh, placements, global shape, stride and local shape; nothing is communicated."""
    ranks = sorted({0, 7, world // 3, world - 1} & set(range(world)))
    cases = itertools.product((TINY,), layouts(world), ranks)
    in_fresh_processes(runs_on_a_rank, list(cases))


def runs_on_a_rank(config: Any, mesh: Any, rank: int) -> None:
    group(mesh.ranks, rank)
    model = sharded(config, mesh, rank)
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    held = dict(inner.named_parameters())
    with torch.no_grad():  # what TP has scattered over a fake group is whatever was in memory
        for number, parameter in enumerate(held.values()):
            local(parameter).fill_(number)
    ema = EMA(model, 0.5)
    with CommDebugMode() as counter:
        ema.update()
        for parameter in held.values():
            local(parameter).add_(1.0)
        ema.update()
        before = {name: local(parameter).clone() for name, parameter in held.items()}
        with ema.applied():
            for name, average in ema.averages.items():
                assert torch.equal(local(held[name]), local(average)), name
        for name, parameter in held.items():
            assert torch.equal(local(parameter), before[name]), name
        report = ema.report()
    assert counter.get_total_counts() == 0, counter.get_comm_counts()

    expected = expected_shapes(config, mesh, rank)
    assert {name: tuple(local(p).shape) for name, p in held.items()} == expected
    assert list(ema.averages) == list(held)
    for number, (name, parameter) in enumerate(held.items()):
        average = ema.averages[name]
        assert type(average) is (DTensor if isinstance(parameter, DTensor) else Tensor), name
        assert (average.shape, average.stride()) == (parameter.shape, parameter.stride()), name
        assert tuple(local(average).shape) == expected[name], name
        assert bool((local(average) == number + 0.5).all()), name
        if isinstance(parameter, DTensor):
            assert average.device_mesh == parameter.device_mesh, name
            assert average.placements == parameter.placements, name
    cost = scale.Row("", config, mesh, scale.FLOAT32, "cpu").on_rank(rank)
    assert report.bytes == cost.averages
    assert cost.parameters == sum(map(math.prod, expected.values()))
    with CommDebugMode() as counter:  # it can count
        dist.all_reduce(torch.zeros(1))
    assert counter.get_total_counts() == 1


def test_shards_are_short_and_empty_in_this() -> None:
    """What is above covers what it is meant to: ranks with fewer rows, and with none."""
    sizes = [
        {math.prod(expected_shapes(TINY, mesh, rank)["layers.0.gate.weight"])}
        for mesh in (scale.Mesh(shard=8), scale.Mesh(shard=64))
        for rank in (0, mesh.ranks - 1)
    ]
    assert sizes == [{3 * 12}, {0}, {12}, {0}]
    assert expected_shapes(TINY, scale.Mesh(tensor=2), 1)["layers.0.down.weight"] == (12, 9)


def test_the_shapes_of_the_page_are_those_that_torch_makes() -> None:
    """Every model and mesh of the table, on the meta device, on the last rank.

    Nothing is read before the first update, so that the averages then are the model's own tensors.
    """
    cases = [(name, mesh, mesh.ranks - 1) for name, mesh in scale.COMMON]
    cases += [(name, mesh, 0) for name, mesh in scale.COMMON if mesh.pipeline > 1]
    in_fresh_processes(has_the_shapes, cases)


def has_the_shapes(name: str, mesh: Any, rank: int) -> None:
    group(mesh.ranks, rank)
    config = scale.PRESETS[name]
    averages = EMA(sharded(config, mesh, rank, "meta"), 0.5).averages
    found = {key: tuple(local(average).shape) for key, average in averages.items()}
    assert found == expected_shapes(config, mesh, rank)
    cost = scale.Row(name, config, mesh, scale.FLOAT32).on_rank(rank)
    assert cost.parameters == sum(map(math.prod, found.values()))


def test_a_wrong_shape_would_be_found() -> None:
    """A rank that is taken for its neighbor is told."""
    with pytest.raises(pytest.fail.Exception, match="AssertionError"):
        in_fresh_processes(takes_its_neighbors_shapes, [()])


def takes_its_neighbors_shapes() -> None:
    mesh = scale.Mesh(shard=2)
    group(2, 0)
    averages = EMA(sharded(TINY, mesh, 0), 0.5).averages
    found = {key: tuple(local(average).shape) for key, average in averages.items()}
    assert found == expected_shapes(TINY, mesh, 1)


@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    cut=st.sampled_from([0, 1]),
    shard=st.integers(1, 12),
    tensor=st.integers(1, 6),
)
def test_shards_make_up_the_whole(
    rows: int, columns: int, cut: int, shard: int, tensor: int
) -> None:
    """Each row is on one rank of a replica, and the largest part is that of the first rank."""
    mesh, weight = scale.Mesh(1, 3, shard, tensor), scale.Weight("", (rows, columns), cut)
    parts = [
        math.prod(scale.local_shape(weight, mesh, scale.Place(0, 1, s, t)))
        for s in range(shard)
        for t in range(tensor)
    ]
    assert sum(parts) == rows * columns
    assert max(parts) == parts[0]


@given(layers=st.integers(1, 20), stages=st.integers(1, 20))
def test_stages_make_up_the_whole(layers: int, stages: int) -> None:
    """Every layer is on one stage, in order, and no stage has two more than another."""
    config = replace(UNTIED, layers=layers)
    parts = [config.stage(stage, stages) for stage in range(stages)]
    assert list(itertools.chain(*parts)) == config.stage(0, 1)
    counts = [sum(weight.name.endswith(".q.weight") for weight in part) for part in parts]
    assert max(counts) - min(counts) <= 1


@given(rank=st.integers(0, 2 * 3 * 4 * 5 - 1))
def test_ranks_are_numbered_as_a_mesh_numbers_them(rank: int) -> None:
    """The last dimension runs fastest."""
    ranks = torch.arange(120).view(2, 3, 4, 5)
    assert ranks[tuple(scale.Mesh(2, 3, 4, 5).place(rank))] == rank


def test_mean_and_largest_are_over_all_ranks() -> None:
    """Against one rank after the other."""
    row = scale.Row("", TINY, scale.Mesh(2, 2, 3, 2), scale.BFLOAT16, "cpu")
    costs = [row.on_rank(rank) for rank in range(24)]
    assert row.largest() == max(costs, key=lambda cost: cost.parameters)
    assert row.mean().weights == pytest.approx(sum(c.weights for c in costs) / 24, rel=1e-12)
    assert len({cost.parameters for cost in costs}) > 2


# -------------------------------------------------------------- bytes, counted in real runs


class Traffic(TorchDispatchMode):
    """Counts the bytes of tensors that operators read and write: of those known, and of others."""

    def __init__(self, **known: list[Tensor]) -> None:
        super().__init__()
        self._known = {
            t.untyped_storage().data_ptr(): name for name, ts in known.items() for t in ts
        }
        self.read = dict.fromkeys([*known, "other"], 0)
        self.written = dict.fromkeys([*known, "other"], 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema, kwargs = func._schema, kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes again, with what this rank holds
        out = func(*args, **kwargs)
        if func.is_view or schema.name in ("aten::detach", "aten::empty_like", "aten::is_set_to"):
            return out
        only_writes = schema.name in ("aten::copy_", "aten::_foreach_copy_")
        for argument, value in zip(schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            self._count(self.read, value, not (writes and only_writes))
            self._count(self.written, value, writes)
        for argument in schema.arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if argument.kwarg_only:
                self._count(self.written if writes else self.read, kwargs.get(argument.name), True)
        if not any(r.alias_info is not None for r in schema.returns):
            self._count(self.written, out, True)
        return out

    def _count(self, counts: dict[str, int], value: Any, really: bool) -> None:
        tensors = value if isinstance(value, (list, tuple)) else [value]
        for tensor in tensors if really else ():
            if isinstance(tensor, Tensor) and tensor.dim():  # scalars are not worth a count
                name = self._known.get(tensor.untyped_storage().data_ptr(), "other")
                counts[name] += tensor.nbytes


def update_traffic(ema: EMA, weights: list[Tensor]) -> tuple[dict[str, int], dict[str, int]]:
    averages = [local(average) for average in ema.averages.values()]
    with Traffic(averages=averages, weights=weights) as traffic:
        ema.update()
    return traffic.read, traffic.written


@pytest.mark.parametrize("dtypes", [scale.FLOAT32, scale.BFLOAT16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_operators_move_what_the_script_says(
    monkeypatch: pytest.MonkeyPatch, dtypes: Any, device: str
) -> None:
    """Averages and weights, and everything else, by the operands of each operator.

    Of torch's own kernels; an accelerator's branch runs on the CPU too: the guard is not skipped.
    """
    monkeypatch.setattr(engine, "_PATHS", (foreach.Foreach,))
    model = Transformer(SMALL).to(dtypes.weights)
    ema = EMA(model, 0.5)
    ema.update()
    ema.update()
    for part in ema._plan._lerp_groups():
        part._cheap_to_read = device == "cpu"
    read, written = update_traffic(ema, [local(p) for p in model.parameters()])
    cost = scale.Row("", SMALL, scale.Mesh(), dtypes, device).on_rank(0)
    assert sum(read.values()) + sum(written.values()) == cost.touched
    assert written["averages"] == cost.written
    assert written["weights"] == 0
    assert read["weights"] == cost.weights
    again = 0 if device == "cpu" else cost.averages  # the guard reads the old ones once more
    assert read["averages"] + read["weights"] == cost.read + again


def test_traffic_counts() -> None:
    """The counter tells reading from writing, in place and out of place."""
    a, b = torch.zeros(10), torch.zeros(10, dtype=torch.bfloat16)
    with Traffic(a=[a], b=[b]) as traffic:
        a.copy_(b)
        a.add_(1)
        torch.abs(a, out=a)
        a.clone()
        a.view(2, 5)
        torch._foreach_lerp_([a], [b.float()], 0.5)
    assert traffic.read == {"a": 160, "b": 40, "other": 40}
    assert traffic.written == {"a": 160, "b": 0, "other": 80}


def allocated(work: Callable[[], object]) -> int:
    """Return the bytes of tensor memory that a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = profiled.profiler.kineto_results.events()
    return sum(max(event.nbytes(), 0) for event in events if event.name() == "[memory]")


def measure(folder: Path, config: Any, dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Train a small model under FSDP2 on two ranks; return what its average costs on this one."""
    torch.manual_seed(0)
    mesh = scale.Mesh(shard=2)
    model = sharded(config, mesh, rank).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    found: dict[str, Any] = {"updates": []}
    for _ in range(3):
        tokens = torch.randint(config.vocab, (2, 5))
        F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found["updates"].append(allocated(ema.update))
    model.reshard()
    weights = [local(parameter) for parameter in model.parameters()]
    found["weights"] = sum(weight.nbytes for weight in weights)
    found["averages"] = ema.report().bytes
    found["read"], found["written"] = update_traffic(ema, weights)

    block = ema.applied()
    found["aside"] = allocated(block.__enter__)
    block.__exit__(None, None, None)
    with Traffic() as traffic, ema.applied():
        pass
    found["swapped"] = traffic.read["other"] + traffic.written["other"]

    dcp.save({"ema": ema}, checkpoint_id=str(folder))
    found["tensors"] = len(ema.averages)
    return found


def stage_of_two(folder: Path, rank: int) -> dict[str, Any]:
    """Average one of two pipeline stages on each rank, save both together, load them as one."""
    torch.manual_seed(rank)
    model = Transformer(TINY, rank, 2)
    ema = EMA(model, 0.5)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update()
    dcp.save({"ema": ema}, checkpoint_id=str(folder / "stages"))
    ema.save(folder / f"stage-{rank}.safetensors")
    whole = EMA(Transformer(UNTIED), 0.5)  # on two stages tied tensors are two
    dcp.load({"ema": whole}, checkpoint_id=str(folder / "stages"))
    sums = {name: average.sum().item() for name, average in ema.averages.items()}
    loaded = {name: average.sum().item() for name, average in whole.averages.items()}
    return {"mine": sums, "loaded": loaded, "clock": whole.clock}


MEASURED = {  # Sizes between which only the bytes of tensors change.
    "small": (SMALL, torch.float32),
    "large": (replace(SMALL, ffn=1200, vocab=2000), torch.float32),
    "bfloat16": (SMALL, torch.bfloat16),
}


def main(rank: int, size: int, folder: Path) -> None:
    engine._PATHS = (foreach.Foreach,)  # whose scratch is to be measured
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=20),
    )
    found: dict[str, Any] = {
        name: measure(folder / name, *settings, rank) for name, settings in MEASURED.items()
    }
    found["stages"] = stage_of_two(folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("measured")
    return folder, run(2, folder, Path(__file__))


@pytest.mark.parametrize("name", MEASURED)
def test_two_ranks_hold_and_move_what_the_script_says(
    measured: tuple[Path, list[dict[str, Any]]], name: str
) -> None:
    """Averages, scratch, what is kept aside, and what is read and written, on each rank."""
    config, dtype = MEASURED[name]
    dtypes = scale.Dtypes(dtype, torch.float32)
    row = scale.Row(name, config, scale.Mesh(shard=2), dtypes, "cpu")
    for rank, results in enumerate(measured[1]):
        found, cost = results[name], row.on_rank(rank)
        assert found["weights"] == cost.weights
        assert found["averages"] == cost.averages
        assert found["updates"][0] >= cost.averages
        # Scalars: a few for the group, and one of 8 bytes for each chunk. Of two neighboring chunks
        # one is at least half full.
        chunks = 2 * cost.parameters / min(1 << 16, cost.parameters) + 1
        assert 0 <= found["updates"][1] - cost.scratch <= 37 + 8 * chunks
        assert found["updates"][2] == 0
        assert found["read"]["weights"] + found["read"]["averages"] == cost.read
        assert (found["written"]["averages"], found["written"]["weights"]) == (cost.written, 0)
        assert found["read"]["other"] + found["written"]["other"] == cost.through_scratch
        assert found["aside"] == cost.aside
        assert found["swapped"] == cost.swapped


def test_a_checkpoint_is_as_large_as_the_script_says(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Of two models that differ in size alone, the folders differ by what the script says.

    What else is in the folder does not grow with the model: names, and a header for each shard.
    """
    folder, results = measured
    sizes = {
        name: sum(file.stat().st_size for file in (folder / name).glob("*.distcp"))
        for name in MEASURED
    }
    said = {
        name: scale.Row(name, config, scale.Mesh(shard=2), scale.Dtypes(dtype, torch.float32))
        for name, (config, dtype) in MEASURED.items()
    }
    beside = {name: sizes[name] - said[name].checkpoint for name in MEASURED}
    assert sizes["large"] > 2 * sizes["small"]
    assert beside["large"] == beside["small"] == beside["bfloat16"]
    assert beside["small"] < 4096 * 2 * results[0]["small"]["tensors"]


def test_stages_that_were_saved_together_load_as_one_model(
    measured: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Stages whose parts have the names of the whole model make one checkpoint of it."""
    folder, results = measured
    stages = [found["stages"] for found in results]
    for found in stages:
        assert found["clock"] == 2
        assert found["loaded"] == stages[0]["mine"] | stages[1]["mine"]
    files = [load_file(folder / f"stage-{rank}.safetensors") for rank in (0, 1)]
    assert {name: tensor.sum().item() for name, tensor in (files[0] | files[1]).items()} == found[
        "loaded"
    ]
    Transformer(UNTIED).load_state_dict(files[0] | files[1], strict=True)


# -------------------------------------------------------------- the command and the page


def command(*arguments: str) -> str:
    """Return what the script prints."""
    app = typer.Typer()
    app.command()(scale.main)
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100"})
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    """`python benchmarks/scale.py --markdown > docs/scale-table.md` changes nothing."""
    assert (ROOT / "docs" / "scale-table.md").read_text() == command("--markdown")


def quoted(page: str) -> list[tuple[str, str]]:
    """The commands of a page, each with the output that stands under it."""
    return re.findall(r"```text\n\$ python benchmarks/scale\.py ([^\n]*)\n(.*?)```", page, re.S)


def test_the_page_shows_what_the_command_prints() -> None:
    """Every block that begins with the command."""
    blocks = quoted((ROOT / "docs" / "scale.md").read_text())
    assert blocks
    for arguments, output in blocks:
        printed = command(*shlex.split(arguments))
        assert [line.rstrip() for line in printed.splitlines()] == output.splitlines()


def test_the_examples_of_the_script_run() -> None:
    """Those in its docstrings."""
    result = doctest.testmod(scale)
    assert (result.failed, result.attempted > 0) == (0, True)


def test_json_has_the_numbers() -> None:
    """All of a row, as numbers."""
    [found] = json.loads(command("8B", "--shard", "8", "--every", "4", "--json"))
    row = scale.Row("8B", scale.PRESETS["8B"], scale.Mesh(shard=8), scale.FLOAT32)
    assert found["config"]["parameters"] == 8_030_261_248
    assert found["largest_rank"] == vars(row.largest())
    assert found["checkpoint_bytes"] == 4 * 8_030_261_248
    assert found["milliseconds_per_step"]["least"] == pytest.approx(
        12 * row.largest().parameters / 3000e9 * 1e3 / 4
    )


def test_a_model_of_your_own() -> None:
    """Any number of the preset can be another."""
    text = command("1B", "--layers", "2", "--vocab", "1000", "--no-tied", "--averages", "float64")
    [found] = json.loads(command("1B", "--layers", "2", "--vocab", "1000", "--no-tied", "--json"))
    config = replace(scale.PRESETS["1B"], layers=2, vocab=1000, tied=False)
    model = Transformer(config)
    assert found["config"]["parameters"] == sum(p.numel() for p in model.parameters())
    assert "1B, changed as one process: 1 ranks" in text
    assert "averages, float64" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "8"], "name the preset to begin from: 1B, 8B, 70B, 400B"),
        (["1B", "--heads", "33"], "heads must divide hidden, and kv-heads must divide heads"),
        (["1B", "--pipeline", "17"], "16 layers do not make 17 stages"),
        (["1B", "--averages", "bfloat16"], "'bfloat16' is not one of"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], message: str) -> None:
    """With what to type instead."""
    app = typer.Typer()
    app.command()(scale.main)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
