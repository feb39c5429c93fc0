"""CONTENDERS: whatever keeps an average of a model, and what it must compute before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from harness.shapes import floating

DECAY = 0.999
SAMPLE = 1 << 16  # elements of a tensor that are compared, evenly spaced over it
# Roundings of float32, half a unit in the last place each. The largest count is that of
# a + w (p - a): the difference, w, the product and the sum; and one for a w that was computed from
# a decay in float32. Each is at most |a| + |p|.
TOLERANCE = 5 * 2.0**-24


class Contender(Protocol):
    """An average of a model that was given to it."""

    def update(self) -> None:
        """Let the average see the model's weights."""

    def averages(self) -> dict[str, Tensor]:
        """Return the averages themselves, by the model's names."""


@runtime_checkable
class Swapping(Contender, Protocol):
    """One that lets the model itself hold the averages for a while."""

    def enter(self) -> None:
        """Let the model hold the averages."""

    def leave(self) -> None:
        """Let the model hold its trained weights again."""


@dataclass(frozen=True)
class Candidate:
    """How to make a contender, and what to know about it.

    Args:
        name: in the tables.
        make: takes a model, whose first average it may be.
        settings: what it was told to be fast.
        mixed: what it was told, besides, to average narrow weights in float32.
        differs: what it computes with narrow weights, where that is not the definition.
        package: that it is in.
        family: "ours", "engine" (ours, and nothing above the engine), "peer" or "limit".
    """

    name: str
    make: Callable[[nn.Module], Contender]
    settings: str = ""
    mixed: str = ""
    differs: str = ""
    package: str = "polyak"
    family: str = "peer"


class WrongResultError(RuntimeError):
    """What a contender computes is not the definition; its time would mean nothing."""


def check(contender: Contender, model: nn.Module) -> None:
    """Compare one update with the float64 definition, on a sample of each tensor.

    The weights change their signs, so that an update has much to do.

    Raises:
        WrongResultError: a parameter has no average, or an element of it is off.
    """
    for _ in range(2):  # the first may copy, the second may make something ready
        contender.update()
    before = {name: sample(tensor) for name, tensor in contender.averages().items()}
    weights = floating(model)
    for tensor in weights.values():
        tensor.neg_()
    contender.update()
    missing = [name for name, _ in model.named_parameters() if name not in before]
    wrong = [f"{name}: is not averaged" for name in missing]
    for name, average in contender.averages().items():
        if average.dtype != torch.float32:
            wrong.append(f"{name}: is averaged in {average.dtype}")
            continue
        a, p = before[name], sample(weights[name])
        off = (sample(average) - (a + (1 - DECAY) * (p - a))).abs()
        if bool((off > TOLERANCE * (a.abs() + p.abs())).any()):
            wrong.append(f"{name}: is off by up to {float(off.max()):.1e}")
    for tensor in weights.values():
        tensor.neg_()
    if wrong:
        raise WrongResultError(f"{type(contender).__name__} is wrong in " + "; ".join(wrong[:5]))


def check_swap(contender: Swapping, model: nn.Module) -> None:
    """Compare what a model holds while it is swapped, and afterwards, with what it should.

    Raises:
        WrongResultError: a parameter does not hold its average, or not what it held before.
    """
    parameters = dict(model.named_parameters())
    before = {name: sample(tensor) for name, tensor in parameters.items()}
    expected = {name: sample(tensor) for name, tensor in contender.averages().items()}
    contender.enter()
    inside = {name: sample(tensor) for name, tensor in parameters.items()}
    contender.leave()
    wrong = [f"{n}: does not hold its average" for n in before if not _same(inside, expected, n)]
    for name, tensor in parameters.items():
        if not torch.equal(sample(tensor), before[name]):
            wrong.append(f"{name}: is not what it was")
    if wrong:
        raise WrongResultError(f"{type(contender).__name__} is wrong in " + "; ".join(wrong[:5]))


def sample(tensor: Tensor) -> Tensor:
    """Return some elements, evenly spaced, and the last one, in float64."""
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:: max(1, flat.numel() // SAMPLE)], flat[-1:]]).double()


def _same(some: dict[str, Tensor], others: dict[str, Tensor], name: str) -> bool:
    return name in some and name in others and torch.equal(some[name], others[name])


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch, and whoever asks it, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
