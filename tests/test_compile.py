"""torch.compile: no recompilation, the plain model's names, and compiled code that sees averages.

Most cases use the "eager" backend, which traces and guards as any other does, and counts how often
it is asked to compile. One goes through inductor.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import batch, bit_identical, convolutional, plain, train
from polyak import EMA, files

# What torch says to itself while it traces and when inductor is imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Counter:
    """A backend that runs what it gets as it is, and counts."""

    def __init__(self) -> None:
        self.compilations = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.compilations += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def whole(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def part(model: nn.Module, backend: Any) -> nn.Module:
    model.head = torch.compile(model.head, backend=backend)
    return model


class Head(nn.Linear):
    """A layer of one's own: torch compiles its own layers in place only as parts of others."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.0


def part_in_place(model: nn.Module, backend: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        head = Head(18, 3)
    head.load_state_dict(model.head.state_dict())
    model.head = head
    model.head.compile(backend=backend)
    return model


WAYS = {f.__name__: f for f in (whole, in_place, part, part_in_place)}


def test_the_counter_counts() -> None:
    """Another shape of a weight is another compilation."""
    model, counter = plain(), Counter()
    compiled = torch.compile(model, backend=counter)
    compiled(batch()[0])
    compiled(batch()[0])
    first = counter.compilations
    assert first >= 1
    model.head = nn.Linear(8, 5)
    compiled(batch()[0])
    assert counter.compilations > first


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("attached", [True, False], ids=["attached", "by hand"])
def test_nothing_is_compiled_anew(way: str, attached: bool) -> None:
    """Updates and swaps change values, never objects: guards hold, whatever happens in the loop."""
    counter = Counter()
    model = convolutional()
    compiled = WAYS[way](model, counter)
    optimizer = sgd(model)
    ema = EMA(compiled, 0.5)
    if attached:
        ema.attach(optimizer)
    x = batch(50)[0]
    warm = 0
    for step in train(compiled, optimizer, range(8)):
        if not attached:
            ema.update()
        compiled.eval()
        with ema.applied(), torch.no_grad():
            inside = compiled(x)
        with torch.no_grad():
            outside = compiled(x)
        assert step == 0 or not torch.equal(inside, outside)
        ema.model_state_dict()
        ema.report()
        if step == 1:
            warm = counter.compilations
            ema.load_state_dict(ema.state_dict())
    assert ema.clock == 8
    assert warm >= 2, "a mode was not compiled at all"
    assert counter.compilations == warm


@pytest.mark.parametrize("way", WAYS)
def test_names_are_those_of_the_plain_model(way: str, tmp_path: Any) -> None:
    """No `_orig_mod.` anywhere, and states and files fit compiled and plain models alike."""
    bare = convolutional()
    names = list(bare.state_dict())
    model = convolutional()
    compiled = WAYS[way](model, "eager")
    ema = EMA(compiled, 0.5)
    for _ in train(compiled, sgd(compiled), range(3)):
        ema.update()
    averaged = [name for name in names if not name.endswith("num_batches_tracked")]
    assert set(ema.averages) == set(averaged)
    exported = ema.model_state_dict()
    assert list(exported) == names
    bare.load_state_dict(exported, strict=True)
    ema.save(tmp_path / "ema.safetensors")
    assert bit_identical(files.read(tmp_path / "ema.safetensors"), exported)
    plainly = EMA(bare, 0.5)
    plainly.load_state_dict(ema.state_dict())
    assert bit_identical(dict(plainly.averages), dict(ema.averages))
    again = EMA(WAYS[way](convolutional(1), "eager"), 0.5)
    again.load_state_dict(plainly.state_dict())
    assert bit_identical(dict(again.averages), dict(ema.averages))


@pytest.mark.parametrize("outside", [True, False], ids=["of the wrapper", "of the model"])
@pytest.mark.parametrize("way", WAYS)
def test_an_ema_of_either_is_the_same(way: str, outside: bool) -> None:
    """It may be built of what is compiled or of what was there before, and compiled afterwards."""
    runs = []
    for compile_it in (False, True):
        torch.manual_seed(1)
        model = convolutional()
        early = EMA(model, 0.5)
        runner = WAYS[way](model, "eager") if compile_it else model
        ema = EMA(runner if outside else model, 0.5)
        optimizer = sgd(model)
        ema.attach(optimizer)
        early.attach(optimizer)
        for _ in train(runner, optimizer, range(4)):
            pass
        assert bit_identical(dict(early.averages), dict(ema.averages))
        runs.append(copies(ema.averages))
    assert bit_identical(*runs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_uses_the_averages_inside_applied(way: str, backend: str) -> None:
    """Its predictions inside are those of a plain model that holds the averages."""
    model = convolutional()
    compiled = WAYS[way](model, backend)
    ema = EMA(compiled, 0.5)
    x = batch(50)[0]
    plainly = convolutional(1).eval()
    for _ in train(compiled, sgd(model), range(3)):
        ema.update()
        compiled.eval()
        before = copies(model.state_dict())
        with ema.applied(), torch.no_grad():
            inside = compiled(x)
        with torch.no_grad():
            after = compiled(x)
            plainly.load_state_dict(ema.model_state_dict())
            torch.testing.assert_close(inside, plainly(x))
            plainly.load_state_dict({k.replace("_orig_mod.", ""): t for k, t in before.items()})
            torch.testing.assert_close(after, plainly(x))
        assert bit_identical(copies(model.state_dict()), before)


def test_a_compiled_teacher_and_a_compiled_student() -> None:
    """Teachers predict in every step: compiled once, with the values of now."""
    counter = Counter()
    student, teacher = convolutional(), convolutional(1)
    fast, slow = torch.compile(student, backend=counter), torch.compile(teacher, backend=counter)
    ema = EMA(fast, 0.9, into=slow)
    optimizer = sgd(student)
    ema.attach(optimizer)
    x = batch(50)[0]
    outputs, warm = [], 0
    for step in train(fast, optimizer, range(6)):
        with torch.no_grad():
            outputs.append(slow(x))
            torch.testing.assert_close(outputs[-1], teacher(x))
        if step == 1:
            warm = counter.compilations
    assert counter.compilations == warm
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(outputs))


def test_a_compiled_optimizer_step_counts_once() -> None:
    """A step that is compiled has its hooks called all the same."""
    model = plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)
    ema, by_hand = EMA(model, 0.5), EMA(model, 0.5)
    ema.attach(optimizer)
    step = torch.compile(optimizer.step, backend="eager")
    for number in range(4):
        x, y = batch(number)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        step()
        by_hand.update()
    assert ema.clock == 4
    assert bit_identical(dict(ema.averages), dict(by_hand.averages))


def test_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default backend, whose code reads weights through pointers: the same laws."""
    model = plain()
    compiled = torch.compile(model)
    optimizer = sgd(model)
    ema = EMA(compiled, 0.5)
    ema.attach(optimizer)
    x = batch(50)[0]
    plainly = plain(1)
    for step in train(compiled, optimizer, range(6)):
        before = copies(model.state_dict())
        with ema.applied():
            inside = compiled(x)
        after = compiled(x)
        ema.copy_to(plainly)
        torch.testing.assert_close(inside, plainly(x))
        plainly.load_state_dict(before)
        torch.testing.assert_close(after, plainly(x))
        assert bit_identical(copies(model.state_dict()), before)
        if step == 1:
            monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    assert torch._dynamo.utils.counters["inductor"], "inductor did not run"
    assert ema.clock == 6
