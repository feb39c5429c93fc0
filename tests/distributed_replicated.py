"""DDP: every rank holds the whole model, sees its own data, and has its own statistics."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distributed_tools import case, copies, everybodys, sgd, step
from models import batch, bit_identical, convolutional
from polyak import EMA, files


@case(2)
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


@case(2)
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


@case(2)
def ddp_saves_the_plain_model(folder: Path) -> None:
    """Every rank may save; the file has the plain model's names."""
    model = convolutional()
    ddp = nn.parallel.DistributedDataParallel(model)
    ema = EMA(ddp)
    ema.update()
    path = folder / f"ddp-{dist.get_rank()}.safetensors"
    ema.save(path)
    convolutional(seed=1).load_state_dict(files.read(path), strict=True)
