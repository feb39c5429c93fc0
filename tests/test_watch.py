"""Whether a tensor that got other memory, or another form, is noticed before the next update."""

from __future__ import annotations

import array
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polyak import EMA
from polyak.engine import cpu, watch
from polyak.engine.watch import Watch


@pytest.fixture(params=["bytes", "torch"], autouse=True)
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the bytes of torch's objects, and by torch's own answers."""
    if request.param == "bytes" and isinstance(cpu.loops(), str):
        pytest.skip("no compiled library")
    if request.param == "torch":
        monkeypatch.setattr(watch, "_tells", lambda loops: False)
    return str(request.param)


def tensors() -> list[Tensor]:
    """Several, so that the one that changes is neither first nor last."""
    return [nn.Parameter(torch.rand(3, 4)), torch.rand(5, 2), nn.Parameter(torch.rand(7))]


def other_data(tensor: Any, like: Tensor) -> None:
    tensor.data = torch.rand_like(like)


def freed_and_given_back(tensor: Tensor, _: Tensor) -> None:
    size = tensor.untyped_storage().nbytes()
    keep = torch.empty(1)
    tensor.untyped_storage().resize_(0)
    keep = torch.rand(size // 4)  # may be where it was
    tensor.untyped_storage().resize_(size)
    del keep


CHANGES: dict[str, Callable[[Any, Tensor], object]] = {
    "other data": other_data,
    "other dtype": lambda t, _: setattr(t, "data", t.data.double()),
    "swapped": lambda t, like: torch.utils.swap_tensors(t, nn.Parameter(torch.rand_like(like))),
    "set": lambda t, like: t.set_(torch.rand_like(like)),
    "transposed": lambda t, _: t.t_(),
    "resized": lambda t, _: t.resize_(2, 2),
    "other view": lambda t, _: t.as_strided_((2, 2), (2, 1), 1),
    "freed": lambda t, _: t.untyped_storage().resize_(0),
    "grown": lambda t, _: t.untyped_storage().resize_(1 << 14),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_memory_and_other_forms_are_noticed(change: str) -> None:
    """Whichever way a tensor gets them; and it stays noticed."""
    held = tensors()
    held[1] = nn.Parameter(held[1], requires_grad=False)
    seen = Watch(held)
    assert seen.same()
    with torch.no_grad():
        CHANGES[change](held[1], torch.rand(5, 2))
    assert not seen.same()
    gc.collect()
    assert not seen.same()


def test_memory_that_was_freed_and_came_back_elsewhere_is_noticed() -> None:
    """As FSDP1 does it; where it comes back to the same place all is as it was."""
    for _ in range(20):
        held = tensors()
        seen, before = Watch(held), held[1].data_ptr()
        freed_and_given_back(held[1], held[1])
        assert seen.same() == (held[1].data_ptr() == before)


def test_what_training_does_is_no_change(how: str) -> None:
    """Gradients, hooks, views, in-place writes, flags; and asking stays as cheap as it was."""
    held = tensors()
    seen = Watch(held)
    assert seen.same()
    parameter = held[0]
    keep = []
    for action in (
        lambda: (parameter * 2).sum().backward(),
        lambda: parameter.register_hook(lambda gradient: gradient),
        lambda: keep.append(parameter.view(-1)),
        lambda: parameter.data.mul_(2),
        lambda: parameter.requires_grad_(False),
        lambda: parameter.requires_grad_(True),
        lambda: setattr(parameter, "mine", 3),
        lambda: keep.append(parameter.untyped_storage()),
        lambda: keep.append(parameter.numpy(force=True)),
    ):
        action()
        assert seen.same()
        if how == "bytes":
            assert seen._bytes is not None
            assert seen._bytes.same()


def test_many_dimensions_and_none() -> None:
    """More dimensions than torch's object holds itself, a scalar, an empty tensor, no tensor."""
    deep = torch.rand(1, 2, 1, 2, 1, 2, 3)
    held = [deep, torch.rand(()), torch.empty(0, 3)]
    seen = Watch(held)
    assert seen.same()
    deep.transpose_(1, 6)
    assert not seen.same()
    assert Watch([]).same()


def test_what_does_not_tell_is_not_relied_on(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that miss a change, as in a torch whose objects are made otherwise."""
    loops = cpu.loops()
    if how == "torch" or isinstance(loops, str):
        return
    for missing in ((0, 20, 6), (2, 0, 6), (2, 20, 0)):
        monkeypatch.setattr(watch, "_WORDS", array.array("q", missing))
        assert not watch._tells.__wrapped__(loops)
    monkeypatch.setattr(watch.sys.implementation, "name", "other")
    assert not watch._tells.__wrapped__(loops)


def test_another_storage_over_the_same_memory_is_watched_too() -> None:
    """As from numpy: torch says that all is the same, until that storage gets other memory."""
    parameter = nn.Parameter(torch.rand(4, 3))
    seen = Watch([parameter])
    assert seen.same()
    parameter.data = torch.from_numpy(parameter.detach().numpy())
    assert seen.same()
    parameter.data.share_memory_()
    assert not seen.same()


def test_an_average_follows_what_is_noticed() -> None:
    """`p.data = ...` between two updates: the average sees the new values, nobody the old."""
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema.update()
    ema.update()
    model.weight.data = torch.full((2, 3), 3.0)
    ema.update()
    assert torch.equal(ema.averages["weight"], torch.full((2, 3), 2.0))
