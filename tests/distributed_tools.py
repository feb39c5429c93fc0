"""What the cases of several processes share: how they are declared, models, layouts, comparisons.

A case is a function of a folder of its own, which all ranks see; `case` says in groups of which
sizes it runs. A layout spreads a model over all ranks and returns what is called in its place.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from models import batch, bit_identical
from polyak import EMA

Case = Callable[[Path], None]
Layout = Callable[[Any], Any]
Law = Callable[[Layout, Path], None]

# ------------------------------------------------------------------------------------- cases

_cases: dict[str, tuple[Case, tuple[int, ...]]] = {}


def case(*sizes: int) -> Callable[[Case], Case]:
    """Declare a case that runs in groups of these sizes."""

    def declare(function: Case) -> Case:
        _cases[function.__name__] = function, sizes
        return function

    return declare


def law(layouts: Iterable[Layout], *sizes: int) -> Callable[[Law], Law]:
    """Declare a case for each of these layouts, in groups of these sizes that can have it."""

    def declare(function: Law) -> Law:
        for layout in layouts:
            possible = tuple(size for size in sizes if size == 4 or layout not in ON_A_SQUARE)
            name = f"{function.__name__}[{layout.__name__}]"
            _cases[name] = functools.partial(function, layout), possible
        return function

    return declare


def cases(size: int) -> dict[str, Case]:
    """Return name -> case of all that run in a group of this size."""
    return {name: function for name, (function, sizes) in _cases.items() if size in sizes}


# ------------------------------------------------------------------------------------- models


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


class OnPurposeError(Exception):
    """What a model raises in the middle of a forward, where a test has asked for it."""


class Block(nn.Module):
    """What tensor parallelism splits, in a number of rows that four ranks share unevenly."""

    breaks = False

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.breaks:
            raise OnPurposeError("in a block")
        return x + self.down(F.gelu(y))


class Net(nn.Module):
    """All that is hard to spread: odd sizes, a tied weight, BatchNorm, a frozen layer, one number.

    Dropout too, so that random numbers are drawn.
    """

    breaks = False

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 6, bias=False)
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.first = Block()
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.1)
        self.second = Block()
        self.back = nn.Linear(8, 6, bias=False)
        self.back.weight = self.embed.weight
        self.out = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.base(self.embed(x)))
        if self.breaks:
            raise OnPurposeError("between the blocks")
        h = self.second(self.drop(self.norm(h)))
        return self.out(h @ self.back.weight) * self.scale


def seeded(kind: Callable[[], nn.Module], seed: int = 3) -> Any:
    """Return a new model, the same on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


def net(seed: int = 3) -> Net:
    return seeded(Net, seed)


def uneven() -> Uneven:
    return seeded(Uneven)


# ------------------------------------------------------------------------------------ layouts


@functools.cache
def line() -> DeviceMesh:
    """Return all ranks in a line."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


@functools.cache
def square() -> DeviceMesh:
    """Return four ranks as 2 x 2."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))


def sharded(model: Any = None) -> Any:
    """Return an `Uneven` in shards, or what is given."""
    model = uneven() if model is None else model
    fully_shard(model.hidden, mesh=line())
    return fully_shard(model, mesh=line())


def plain(model: Net) -> nn.Module:
    """Leave it whole, on each rank for itself."""
    return model


def ddp(model: Net) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp(model: Net) -> nn.Module:
    """Shard the blocks in groups of their own, and the rest in another."""
    return shard_groups(model, line())


def fsdp_mixed(model: Net) -> nn.Module:
    """Compute in bfloat16, but for BatchNorm, and gather each group ahead of its turn."""
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    exact = MixedPrecisionPolicy(torch.float32, output_dtype=torch.bfloat16)
    root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    policies = {model.first: low, model.norm: exact, model.second: low, model: root}
    for module, policy in policies.items():
        fully_shard(module, mesh=line(), mp_policy=policy)
    prefetching(model)
    return model


def hsdp(model: Net) -> nn.Module:
    """Shard over pairs, matrices by their columns, and replicate over two of these."""
    return shard_groups(model, square(), columns)


def columns(parameter: nn.Parameter) -> Shard | None:
    return Shard(1) if parameter.dim() == 2 else None


def tp(model: Net) -> nn.Module:
    """Split the blocks; all else is plain on each rank."""
    return split_blocks(model, line())


def fsdp_tp(model: Net) -> nn.Module:
    """Split the blocks over pairs, and shard all that is left over two of these."""
    return shard_groups(split_blocks(model, square()["inner"]), square()["outer"])


def replicated_tp(model: Net) -> nn.Module:
    """Replicate over tensor parallelism, in the way of torch that keeps DTensors."""
    return replicate(split_blocks(model, square()["inner"]), mesh=square()["outer"])


def prefetching(model: Any) -> None:
    """Let each group gather the one after it ahead of its turn, forwards and backwards."""
    chain = [model, model.first, model.norm, model.second]
    chain = [module for module in chain if hasattr(module, "unshard")]
    for module, following in itertools.pairwise(chain):
        module.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([module])


def shard_groups(model: Any, mesh: DeviceMesh, placement: Any = None) -> nn.Module:
    """Lay FSDP2 over the blocks, each in a group of its own, and over the rest."""
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=mesh, shard_placement_fn=placement)
    return model


def split_blocks(model: Any, mesh: DeviceMesh) -> nn.Module:
    """Lay tensor parallelism over the blocks."""
    # What is between the layers stays a DTensor: of uneven parts torch could not tell the whole.
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    for block in (model.first, model.second):
        parallelize_module(block, mesh, plan)
    return model


ON_A_SQUARE = (hsdp, fsdp_tp, replicated_tp)
SHARDED = (fsdp, fsdp_mixed, hsdp, tp, fsdp_tp, replicated_tp)  # those with DTensors
LAYOUTS = (ddp, *SHARDED)

# ----------------------------------------------------------------------------------- training


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
    # One by one: torch's lists take no mixture of DTensors and others, or of several meshes.
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)


def move_(model: nn.Module, number: int) -> None:
    """Change all that is averaged, in place, to the same bits however the model is spread.

    Each operation is of single elements and rounds once.
    """
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.requires_grad or (tensor.is_floating_point() and not is_parameter(tensor)):
                tensor.mul_(0.75).add_(0.125 * number)


def is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def averaged(model: Any, numbers: Iterable[int], decay: Any = 0.5, **options: Any) -> EMA:
    """Return an EMA of a model that was moved by these numbers, with an update after each."""
    ema = EMA(model, decay, **options)
    for number in numbers:
        move_(model, number)
        ema.update()
    return ema


def load(state: dict[str, Any], checkpoint: Path) -> None:
    """Load from a checkpoint folder, in a group or in one process without."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, checkpoint_id=checkpoint)


# --------------------------------------------------------------------------------- comparison


def everybodys(value: Any) -> list[Any]:
    """Return what each rank passed."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: a view."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def full(tensors: Any) -> dict[str, Tensor]:
    """Return whole tensors of sharded ones; a collective."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in dict(tensors).items()
    }


def shards(tensors: Any) -> dict[str, Tensor]:
    """Return copies of what this rank holds."""
    return {name: part(tensor).clone() for name, tensor in dict(tensors).items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients that this rank holds."""
    return shards({n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def momenta(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return copies of the momentum that this rank holds, numbered."""
    return shards(
        {str(n): state["momentum_buffer"] for n, state in enumerate(optimizer.state.values())}
    )


def spread(tensor: Tensor) -> object:
    """Return how a tensor is spread: mesh, placements, global shape and stride."""
    if not isinstance(tensor, DTensor):
        return "whole", tensor.shape, tensor.stride()
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()


def described(tensor: Any) -> str:
    """Return the words of an error for how a tensor is spread."""
    ranks = tensor.device_mesh.mesh.flatten().tolist()
    shape = " x ".join(map(str, tensor.device_mesh.shape))
    return f"{list(tensor.placements)} on {shape} ranks from {ranks[0]} to {ranks[-1]}"


def registered_shards(model: nn.Module) -> bool:
    return all(isinstance(parameter, DTensor) for parameter in model.parameters())


def assert_same(a: Any, b: Any) -> None:
    """Hold that two nested values are the same to the bit, and say where they are not."""
    wrong = [] if bit_identical(a, b) else list(_differences(a, b, "it"))
    assert not wrong, ", ".join(wrong)


def _differences(a: Any, b: Any, where: str) -> Iterator[str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for number, pair in enumerate(zip(a, b, strict=True)):
            yield from _differences(*pair, f"{where}[{number}]")
    elif not bit_identical(a, b):
        yield where


@contextmanager
def silence() -> Iterator[None]:
    """Hold that nothing is communicated in the block."""
    with CommDebugMode() as counter:
        yield
    assert counter.get_total_counts() == 0, counter.get_comm_counts()


def refused(kind: type[BaseException], call: Callable[[], object]) -> str:
    """Return the message of the error that a call has to raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")
