"""The laws: what polyak guarantees, whatever the model, the dtype, the decay and the ticks.

Here are laws 1 to 6 and 9 to 12, through real EMAs of real models. Law 1 for tensors in isolation
is in ``test_engine``, law 7 in ``test_resume``, law 8 in ``test_distributed``; laws 13 and 14 are
beside what they are about, post-hoc averages and foreign files.

Tolerances are derived, never tuned. With u half the relative spacing of the average's dtype
(2^-24 for float32, eps = 2u) and M the largest magnitude that an element has met:

* One update is within 2 ulp(M) <= 2 eps M of the definition (``test_engine`` says why), and an
  average never amplifies an older error (keep <= 1). After n updates: 2 n eps M.
* A noisy trajectory: errors of single updates are independent and at most u|e|, so that they add
  up in squares, u / sqrt(1 - d^2): the norm-relative bound is 2u / sqrt(1 - d).
* A smooth trajectory: an update that moves by less than half an ulp moves nothing, so that an
  average may stand up to 2u max|x| / (1 - d) away: the dead zone.
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
import polyak
from models import MODELS, Snapshot, bit_identical
from polyak import (
    EMA,
    After,
    Constant,
    Cosine,
    Debiased,
    HalfLife,
    Linear,
    PowerLaw,
    Uniform,
    checks,
    engine,
    everything,
    profile,
)
from polyak.decay import Decay, ExponentialRamp, InverseGamma, Ramp
from polyak.engine import cpu, foreach, host
from polyak.engine.reference import Reference


class Anywhere(host.Host):
    """Averages in host memory of weights that are there too."""

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        return True


PATHS = {"cpu": cpu.Cpu, "foreach": foreach.Foreach, "host": Anywhere}


@pytest.fixture(scope="module", autouse=True, params=PATHS)
def _path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every law holds on every path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_PATHS", (PATHS[request.param], foreach.Foreach))
        if request.param == "host":
            patch.setattr(host, "BUFFER_BYTES", 256)
            patch.setattr(checks, "checked_device", lambda device, view: torch.device("cpu"))
        yield


def test_the_laws_run_on_the_path_that_they_say(request: pytest.FixtureRequest) -> None:
    ema = EMA(nn.Linear(2, 2), device="cpu")
    ema.update()
    assert ema.report().paths == (request.node.callspec.params["_path"],)


# ---------------------------------------------------------------------------------- strategies

shares = st.floats(0.0, 1.0)
exact = (
    st.builds(Constant, shares)
    | st.builds(HalfLife, st.floats(0.1, 1e6))
    | st.builds(Debiased, st.builds(Constant, st.floats(0.1, 0.99999)))
    | st.builds(PowerLaw, st.floats(0.01, 0.28))
    | st.just(Uniform())
)
inexact = (
    st.builds(Cosine, shares, shares, st.integers(1, 100))
    | st.builds(Linear, shares, shares, st.integers(1, 100))
    | st.builds(InverseGamma, st.floats(0.1, 2.0))
    | st.builds(Ramp, shares)
    | st.builds(ExponentialRamp, shares, st.integers(1, 100))
)
decays = exact | inexact | st.builds(After, st.integers(0, 50), exact | inexact)
ticks = st.lists(st.integers(1, 50), min_size=1, max_size=10)
seeds = st.integers(0, 2**31)
names = st.sampled_from(sorted(MODELS))
every_model = pytest.mark.parametrize("name", sorted(MODELS))

# ------------------------------------------------------------------------------------- helpers


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, outside of autograd."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in found}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def seen(ema: EMA, model: nn.Module) -> dict[str, Tensor]:
    """What an update sees now: the averaged tensors of the model, in the averages' dtypes."""
    tensors = tensors_of(model)
    return {name: tensors[name].to(average.dtype) for name, average in ema.averages.items()}


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64, copy=True)


def largest_of(model: nn.Module) -> float:
    tensors = [t for t in model.state_dict().values() if t.is_floating_point() or t.is_complex()]
    return max(float(t.abs().max()) for t in tensors if t.numel())


def assert_near(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    updates: int | Mapping[str, int],
    magnitude: float | Mapping[str, Tensor],
) -> None:
    """Hold every element to 2 n eps M; ``expected`` is in float64."""
    assert got.keys() == expected.keys()
    for name, average in got.items():
        m = magnitude if isinstance(magnitude, float) else magnitude[name]
        n = updates if isinstance(updates, int) else updates[name]
        bound = 2 * n * torch.finfo(average.dtype).eps * m
        error = (wide(average) - expected[name]).abs()
        assert bool((error <= bound).all()), f"{name}: {(error - bound).max()} beyond the bound"


def history_of(ema: EMA) -> profile.History:
    return profile.History.from_dict(json.loads(ema.state_dict()["facts"])["history"])


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int]) -> None:
    for _ in models.train(model, optimizer, steps):
        pass


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


# ------------------------------------------------------------------- the helpers can fail


def test_bit_identical_can_fail() -> None:
    """Dtype, shape, one bit, the sign of zero, a key, a length, a number: each is a difference."""
    a = torch.tensor([1.0, -0.0, math.nan])
    assert bit_identical(a, a.clone())
    assert bit_identical({"x": [a, 1]}, {"x": [a.clone(), 1]})
    assert bit_identical(a[:0], a[:0].clone())
    assert bit_identical(a.expand(2, 3).t(), a.repeat(2, 1).t())
    assert not bit_identical(a, torch.tensor([1.0, 0.0, math.nan]))
    assert not bit_identical(a, torch.tensor([1.0 + 2**-23, -0.0, math.nan]))
    assert not bit_identical(a, a.double())
    assert not bit_identical(a, a[:2])
    assert not bit_identical(a, a[None])
    assert not bit_identical(torch.zeros(2), torch.zeros(2, dtype=torch.int32))
    assert not bit_identical({"x": a}, {"x": a, "y": a})
    assert not bit_identical({"x": a}, {"y": a})
    assert not bit_identical([a], [a, a])
    assert not bit_identical({"x": 1}, {"x": 2})
    assert not bit_identical({"x": 1}, {"x": True})
    assert not bit_identical(a, [1.0, 0.0, math.nan])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda m: m.head.weight.data.view(-1)[3:4].mul_(1 + 2**-23), "head.weight"),
        (lambda m: m.norm.num_batches_tracked.add_(1), "norm.num_batches_tracked"),
        (lambda m: m.norm.running_mean.neg_(), "norm.running_mean"),
        (lambda m: m.eval(), "drop (module)"),
        (lambda m: setattr(m, "head", copy.deepcopy(m.head)), "head (module)"),
        (lambda m: setattr(m.head.bias, "data", m.head.bias.data.clone()), "head.bias (object)"),
        (lambda m: m.head.bias.requires_grad_(False), "head.bias (object)"),
        (lambda m: setattr(m.head.bias, "grad", torch.zeros(3)), "head.bias (gradient)"),
        (lambda m: setattr(m.norm, "running_var", m.norm.running_var.clone()), "norm.running_var"),
        (lambda m: m.register_buffer("more", torch.zeros(1)), "more"),
        (lambda m: m.norm.register_buffer("running_var", None), "norm.running_var"),
        (lambda m: models.reversed_(m), "order"),
    ],
)
def test_a_snapshot_can_fail(change: Callable[[Any], object], name: str) -> None:
    """`Snapshot` sees a bit, a counter, a mode, an object, a storage, a gradient, a name."""
    model = models.convolutional()
    snapshot = Snapshot(model)
    assert snapshot.differences() == []
    change(model)
    found = snapshot.differences()
    assert any(line in (name, f"{name} (object)") for line in found), found


def test_assert_near_can_fail() -> None:
    """The bound is 2 n eps M: an error of it passes, one of half an eps more does not."""
    eps = torch.finfo(torch.float32).eps
    one = {"x": torch.ones(3, dtype=torch.float64)}
    assert_near({"x": torch.full((3,), 1 + 2 * eps)}, one, 1, 1.0)
    for got in ({"x": torch.full((3,), 1 + 3 * eps)}, {"y": torch.ones(3)}, {}):
        with pytest.raises(AssertionError):
            assert_near(got, one, 1, 1.0)
    with pytest.raises(AssertionError):  # NaN is no small error
        assert_near({"x": torch.full((3,), math.nan)}, one, 1, 1.0)


@every_model
def test_the_models_train_and_are_made_again_from_their_seed(name: str) -> None:
    """Every model of the suite trains, changes, stays finite, and is the same for the same seed."""
    model, twin = MODELS[name](3), MODELS[name](3)
    assert bit_identical(tensors_of(model), tensors_of(twin))
    assert not bit_identical(tensors_of(model), tensors_of(MODELS[name](4)))
    snapshot = Snapshot(model)
    fit(model, torch.optim.SGD(trained(model), lr=0.05), range(3))
    assert snapshot.differences()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# ---------------------------------------------------------------------------- law 1, reference


@given(name=names, decay=decays, ticks=ticks, seed=seeds)
def test_reference(name: str, decay: Decay, ticks: list[int], seed: int) -> None:
    """Law 1: an EMA is the definition, tick by tick: average <- k average + (1 - k) weights.

    Each update is held to 2 ulp of the definition applied to the average before it.
    """
    model = MODELS[name](seed)
    ema = EMA(model, decay)
    ema.update(0)
    assert bit_identical(dict(ema.averages), seen(ema, model))
    for step, tick in enumerate(ticks):
        models.scramble_(model, seed + step + 1)
        before, weights = copied(ema.averages), seen(ema, model)
        weight = 1.0 - decay.keep(ema.clock + tick, tick)
        ema.update(ema.clock + tick)
        expected = {n: wide(b) + weight * (wide(weights[n]) - wide(b)) for n, b in before.items()}
        magnitude = {n: torch.maximum(b.abs(), weights[n].abs()) for n, b in before.items()}
        assert_near(ema.averages, expected, 1, magnitude)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("smooth", [False, True])
def test_ten_thousand_updates_of_a_narrow_model(dtype: torch.dtype, smooth: bool) -> None:
    """Law 1 at length: narrow weights at decay .9999 move their average as float64 says.

    Noisy: norm-relative 2u / sqrt(1 - d) = 1.2e-5. Smooth (the weights do not change after the
    first update): elementwise the dead zone, 2u max|x| / (1 - d) = 1.2e-3 max|x|. In the model's
    own dtype the average would not move at all.
    """
    decay, updates, u = 0.9999, 10_000, 2.0**-24
    model = nn.Linear(64, 4, bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1.0, 1.0, 256).view(4, 64))
    target = model.weight.detach().double() * 1.5
    ema = EMA(model, decay)
    ema.update()
    expected = model.weight.detach().double()
    start, narrow, largest = expected.clone(), model.weight.detach().clone(), 1.0
    noise = torch.randn(100, 4, 64, generator=generator, dtype=torch.float64) * 0.1
    for step in range(updates):
        state = target if smooth else target + noise[step % 100]
        model.weight.data.copy_(state)
        ema.update()
        expected.lerp_(model.weight.detach().double(), 1.0 - decay)
        narrow.lerp_(model.weight.detach(), 1.0 - decay)
        largest = max(largest, float(model.weight.detach().abs().max()))
    average = ema.averages["weight"]
    assert average.dtype == torch.float32
    error = average.double() - expected
    if smooth:
        assert error.abs().max() <= 2 * u * largest / (1 - decay)
    else:
        assert error.norm() <= 2 * u / math.sqrt(1 - decay) * expected.norm()
    moved = (expected - start).norm()
    assert (average.double() - start).norm() > 0.9 * moved
    assert (narrow.double() - start).norm() < 0.5 * moved


# ------------------------------------------------------------------------------ law 2, weights


@given(decay=decays, ticks=ticks, origin=st.integers(0, 1000))
def test_weights(decay: Decay, ticks: list[int], origin: int) -> None:
    """Law 2: the weights of an average are non-negative and sum to 1, to float64's rounding."""
    history = profile.History("run", origin)
    for tick in ticks:
        history.tick(decay, tick)
    clocks, weights = profile.weights(history)
    assert len(weights) == len(ticks) + 1
    assert torch.equal(clocks, torch.tensor([origin, *ticks]).cumsum(0))
    assert bool((weights >= 0).all())
    # Telescoping: each factor k and 1 - k is rounded once, so that a tick loses at most 2 u.
    assert abs(float(weights.sum()) - 1.0) <= 2 * len(ticks) * torch.finfo(torch.float64).eps


@given(name=names, decay=decays, ticks=ticks, origin=st.integers(0, 100), seed=seeds)
def test_the_average_is_its_profile(
    name: str, decay: Decay, ticks: list[int], origin: int, seed: int
) -> None:
    """Laws 1 and 2 end to end: an average is the sum of its profile's weights times the states.

    2 n eps M for the updates. Where the average is float64 too, the profile's own rounding is of
    that order: a keep (1 - dt/t)^(g+1) is off by (g+1) eps, g < 97, in each of n products.
    """
    model = MODELS[name](seed)
    ema = EMA(model, decay)
    clocks, states = [origin], []
    for step, tick in enumerate([0, *ticks]):
        clocks.append(clocks[-1] + tick)
        models.scramble_(model, seed + step)
        ema.update(clocks[-1])
        states.append({n: wide(t) for n, t in seen(ema, model).items()})
    counted, weights = profile.weights(history_of(ema))
    assert counted.tolist() == clocks[1:]
    expected = {
        n: sum(float(w) * state[n] for w, state in zip(weights, states, strict=True))
        for n in states[0]
    }
    magnitude = {n: torch.stack([s[n].abs() for s in states]).amax(0) for n in states[0]}
    updates = {
        n: len(ticks) * (100 if torch.finfo(a.dtype).bits == 64 else 1) + 1
        for n, a in ema.averages.items()
    }
    assert_near(ema.averages, expected, updates, magnitude)


# -------------------------------------------------------------------------- law 3, fixed point


@given(name=names, decay=decays, ticks=ticks, seed=seeds)
def test_fixed_point(name: str, decay: Decay, ticks: list[int], seed: int) -> None:
    """Law 3: the average of a constant is that constant, bit for bit, at any decay and dtype."""
    model = models.scramble_(MODELS[name](seed), seed, scale=100.0)
    ema = EMA(model, decay)
    weights = seen(ema, model)
    for tick in [0, *ticks]:
        ema.update(ema.clock + tick)
        for n, average in ema.averages.items():
            assert torch.equal(average, weights[n]), n


@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8
    ),
    decay=decays,
    ticks=ticks,
)
def test_fixed_point_of_any_float(values: list[float], decay: Decay, ticks: list[int]) -> None:
    """Law 3 at the ends of the range: the largest floats and denormals are fixed points too."""
    model = nn.Linear(len(values), 1, bias=False)
    model.weight.data.copy_(torch.tensor([values]))
    ema = EMA(model, decay)
    for tick in [0, *ticks]:
        ema.update(ema.clock + tick)
    assert torch.equal(ema.averages["weight"], model.weight.detach())


# ------------------------------------------------------------------------------- law 4, affine


@given(
    decay=decays,
    ticks=ticks,
    a=st.integers(-16, 16).map(lambda n: n / 4),
    b=st.integers(-16, 16).map(lambda n: n / 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=seeds,
)
def test_affine(
    decay: Decay, ticks: list[int], a: float, b: float, dtype: torch.dtype, seed: int
) -> None:
    """Law 4: EMA(a x + b) = a EMA(x) + b.

    To rounding: 2 n eps M of each of the two averages, and one eps of the states a x + b.
    """
    plain, moved = models.plain().to(dtype), models.plain().to(dtype)
    ema, other = EMA(plain, decay), EMA(moved, decay)
    largest = 0.0
    for step, tick in enumerate([0, *ticks]):
        models.scramble_(plain, seed + step)
        with torch.no_grad():
            for x, y in zip(plain.parameters(), moved.parameters(), strict=True):
                y.copy_(a * x + b)
        largest = max(largest, largest_of(plain))
        ema.update(ema.clock + tick)
        other.update(other.clock + tick)
    expected = {n: a * x.double() + b for n, x in ema.averages.items()}
    # M of EMA(a x + b) is |a| M + |b|, that of a EMA(x) is |a| M; the product and the sum in the
    # states are rounded by half an eps of M each.
    magnitude = 2 * (abs(a) * largest + abs(b))
    assert_near(other.averages, expected, len(ticks) + 1, magnitude)


# ------------------------------------------------------------------------------ law 5, cadence


@given(decay=exact, k=st.integers(2, 7), rounds=st.integers(1, 4), seed=seeds)
def test_cadence(decay: Decay, k: int, rounds: int, seed: int) -> None:
    """Law 5: an update every k-th step with dt = k keeps what k updates of dt = 1 keep.

    Shown by weights that change every k steps only: both averages are then the same numbers.
    """
    model = models.plain()
    often, seldom = EMA(model, decay), EMA(model, decay)
    often.update(0)
    seldom.update(0)
    largest = largest_of(model)
    for turn in range(rounds):
        models.scramble_(model, seed + turn)
        largest = max(largest, largest_of(model))
        for step in range(k):
            often.update(turn * k + step + 1)
        seldom.update((turn + 1) * k)
    assert often.clock == seldom.clock == rounds * k
    expected = {n: x.double() for n, x in often.averages.items()}
    assert_near(seldom.averages, expected, rounds * k + rounds, largest)
    clocks, fine = profile.weights(history_of(often))
    _, coarse = profile.weights(history_of(seldom))
    assert clocks.tolist() == list(range(rounds * k + 1))
    grouped = torch.cat([fine[:1], fine[1:].view(rounds, k).sum(1)])
    # (g + 1) eps for a keep of PowerLaw, g < 97, in each of the products.
    torch.testing.assert_close(coarse, grouped, rtol=0.0, atol=100 * k * rounds * 2.0**-52)


def test_cadence_of_an_attached_average() -> None:
    """Law 5 through `attach(every=k)`: the clock moves by k at every k-th step of the optimizer."""
    model = models.plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, twin = EMA(model, 0.9), EMA(model, 0.9)
    ema.attach(optimizer, every=3, tick=5)
    clocks = []
    for step in models.train(model, optimizer, range(10)):
        clocks.append(ema.clock)
        if step % 3 == 2:
            twin.update((step + 1) * 5)
    assert clocks == [0, 0, 15, 15, 15, 30, 30, 30, 45, 45]
    assert bit_identical(dict(ema.averages), dict(twin.averages))


# -------------------------------------------------------------------------- law 6, idempotence


@given(name=names, decay=decays, ticks=ticks, seed=seeds)
def test_idempotence(name: str, decay: Decay, ticks: list[int], seed: int) -> None:
    """Law 6: `update(t)` twice is once, also when the weights have changed in between."""
    model = MODELS[name](seed)
    ema = EMA(model, decay)
    for step, tick in enumerate([0, *ticks]):
        models.scramble_(model, seed + step)
        ema.update(ema.clock + tick)
        once, before = copied(ema.averages), json.loads(ema.state_dict()["facts"])
        models.scramble_(model, seed - step - 1)
        ema.update(ema.clock)
        assert bit_identical(dict(ema.averages), once)
        after = json.loads(ema.state_dict()["facts"])
        assert after.pop("repeats") == before.pop("repeats") + 1
        assert after == before


# ------------------------------------------------------------------------------ law 9, applied


class Stop(BaseException):
    """Neither an `Exception` nor a `KeyboardInterrupt`."""


def _forward(model: nn.Module) -> None:
    model(models.batch(9)[0])


def _edit(model: nn.Module) -> None:
    with torch.no_grad():
        for p in trained(model):  # frozen ones are not kept aside: they may be most of the memory
            p.mul_(-3.0)
        for b in model.buffers():
            b.zero_()


def _poison(model: nn.Module) -> None:
    with torch.no_grad():
        for p in trained(model):
            p.fill_(math.nan)


def _reassign_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for key, buffer in module._buffers.items():
            setattr(module, key, torch.zeros_like(buffer))


def _drop_buffers(model: nn.Module) -> None:
    for module in model.modules():
        for key in module._buffers:
            setattr(module, key, None)


def _replace_data(model: nn.Module) -> None:
    for p in model.parameters():
        p.data = torch.zeros(2, 2, dtype=p.dtype)


def _convert(model: nn.Module) -> None:
    narrow = all(p.dtype == torch.float16 for p in model.parameters())
    model.double() if narrow else model.half()


def _replace_head(model: nn.Module) -> None:
    model.head = nn.Linear(5, 5)


def _replace_parameter(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(torch.zeros(1))


QUIET = [_forward, _edit, _poison, _reassign_buffers, _drop_buffers]
LOUD = [_replace_data, _convert, _replace_head, _replace_parameter]
ENDS = [None, ValueError, KeyboardInterrupt, SystemExit, GeneratorExit, Stop]


def _averaged(name: str, seed: int = 0) -> tuple[nn.Module, EMA]:
    """A model in training, and an EMA whose averages are far from its weights."""
    model = MODELS[name](seed)
    ema = EMA(model, 0.5)
    optimizer = torch.optim.SGD(trained(model), lr=0.05)
    for _ in models.train(model, optimizer, range(3)):
        ema.update()
    models.walk_(model, seed, scale=0.5)
    return model, ema


@settings(max_examples=25)
@given(
    name=names,
    quiet=st.lists(st.sampled_from(QUIET), max_size=3),
    end=st.sampled_from(ENDS),
    training=st.booleans(),
    nested=st.booleans(),
)
def test_applied(
    name: str,
    quiet: list[Callable[[nn.Module], None]],
    end: type[BaseException] | None,
    training: bool,
    nested: bool,
) -> None:
    """Law 9: the model is bit-identical after the block, whatever happened in it.

    Values, objects, storages and gradients; after forwards, edits, NaN, new buffers; on return and
    on any exception, which goes on. Inside, the model holds the averages.
    """
    model, ema = _averaged(name)
    model.train(training)
    snapshot = Snapshot(model)
    averages = copied(ema.averages)

    def block() -> None:
        with ema.applied() as own:
            inside = tensors_of(model)
            for n, average in averages.items():
                assert torch.equal(inside[n], average.to(inside[n].dtype)), n
            if nested:
                with ema.applied() as again:
                    assert bit_identical(dict(again), dict(own))
                assert all(inside[n] is not None for n in averages)
            for act in quiet:
                with suppress(TypeError):  # a forward without its buffers
                    act(model)
            if end is not None:
                raise end("in the block")

    if end is None:
        block()
    else:
        with pytest.raises(end, match="in the block"):
            block()
    assert snapshot.differences() == []
    assert bit_identical(copied(ema.averages), averages)


@every_model
@pytest.mark.parametrize("act", LOUD, ids=lambda act: act.__name__.strip("_"))
@pytest.mark.parametrize("end", [None, KeyboardInterrupt])
def test_applied_puts_back_what_was_replaced_and_says_so(
    name: str, act: Callable[[nn.Module], None], end: type[BaseException] | None
) -> None:
    """Law 9: new storages, dtypes, Parameters or modules are undone; the error names them all."""
    model, ema = _averaged(name)
    model.zero_grad()  # `half` converts gradients too, and those nobody keeps aside
    snapshot = Snapshot(model)

    def block() -> None:
        with ema.applied():
            act(model)
            if end is not None:
                raise end("in the block")

    with pytest.raises(RuntimeError, match="was changed inside applied") as caught:
        block()
    assert snapshot.differences() == []
    if end is not None:
        assert isinstance(caught.value.__context__, end)
    if act is _replace_data:
        assert all(n in str(caught.value) for n, p in model.named_parameters() if n in ema.averages)
    else:
        assert "head" in str(caught.value)


def test_applied_holds_the_averages_again_in_the_outer_block() -> None:
    """A nested block is no block: after it the model still holds the averages."""
    model, ema = _averaged("convolutional")
    snapshot = Snapshot(model)
    with ema.applied():
        outer = copied(tensors_of(model))
        with suppress(ValueError), ema.applied():
            raise ValueError
        assert bit_identical(tensors_of(model), outer)
    assert snapshot.differences() == []


def test_applied_yields_the_trained_weights() -> None:
    """Inside, the trained model is at hand under its state dict's keys, to the bit."""
    model, ema = _averaged("tied")
    state = copied(model.state_dict())
    with ema.applied() as own:
        assert not bit_identical(dict(model.state_dict()), state)
        assert bit_identical(dict(own), state)


@contextmanager
def interrupting(monkeypatch: pytest.MonkeyPatch, verb: str, call: int) -> Iterator[list[str]]:
    """Press Ctrl-C in the middle of the ``call``-th use of an engine verb, between two tensors."""
    whole, met = getattr(engine, verb), []

    def halfway(plan: engine.Plan, *args: Any) -> None:
        met.append(verb)
        if len(met) != call:
            return whole(plan, *args)
        pairs = plan._pairs
        first, second = engine.Plan(*_split(pairs[:1])), engine.Plan(*_split(pairs[1:]))
        whole(first, *args)
        os.kill(os.getpid(), signal.SIGINT)
        whole(second, *args)
        for part in (first, second):
            part.wait()
        return None

    with monkeypatch.context() as patch:
        patch.setattr(engine, verb, halfway)
        yield met


def _split(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [t for t, _ in pairs], [s for _, s in pairs]


@pytest.mark.parametrize("name", ["plain", "convolutional", "bfloat16", "tied"])
@pytest.mark.parametrize("call", [1, 2], ids=["applying", "restoring"])
def test_applied_survives_an_interrupt_in_the_middle(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int
) -> None:
    """Law 9: Ctrl-C while the averages are written, or while the weights are put back."""
    model, ema = _averaged(name)
    snapshot = Snapshot(model)
    with (
        interrupting(monkeypatch, "copy", call) as met,
        pytest.raises(KeyboardInterrupt),
        ema.applied(),
    ):
        assert call == 2
    assert len(met) == 2
    assert snapshot.differences() == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with ema.applied():
        assert snapshot.differences()
    assert snapshot.differences() == []


@pytest.mark.parametrize("name", ["plain", "convolutional", "bfloat16"])
def test_an_update_is_whole_although_interrupted(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """All averages or none: Ctrl-C in the middle of an update comes through after it."""
    model, ema = _averaged(name)
    _, twin = model, EMA(model, 0.5)
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    twin.update()
    with interrupting(monkeypatch, "lerp", 1), pytest.raises(KeyboardInterrupt):
        ema.update()
    assert ema.clock == twin.clock
    assert bit_identical(dict(ema.averages), dict(twin.averages))
    assert bit_identical(ema.state_dict(), twin.state_dict())


def test_the_function_is_whole_although_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`update_` too writes all of the teacher or none: floats, and the integers that follow."""
    student = models.scramble_(models.convolutional(0), 0)
    student.norm.num_batches_tracked.fill_(7)
    teacher, other = models.convolutional(1), models.convolutional(1)
    polyak.update_(other, student, 0.5)
    with interrupting(monkeypatch, "lerp", 1), pytest.raises(KeyboardInterrupt):
        polyak.update_(teacher, student, 0.5)
    assert bit_identical(dict(teacher.state_dict()), dict(other.state_dict()))


def test_a_teacher_is_whole_although_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a narrow teacher or none: averages, what is written through, and what follows."""
    for verb, call in (("lerp", 1), ("copy", 1), ("copy", 2)):
        student = models.bfloat16(0)
        teacher, other = models.bfloat16(1), models.bfloat16(1)
        ema, twin = EMA(student, 0.5, into=teacher), EMA(student, 0.5, into=other)
        student.norm.num_batches_tracked.fill_(7)
        for each in (ema, twin):
            each.update()
        models.walk_(student, 1)
        student.norm.num_batches_tracked.fill_(8)
        twin.update()
        with interrupting(monkeypatch, verb, call), pytest.raises(KeyboardInterrupt):
            ema.update()
        assert bit_identical(dict(teacher.state_dict()), dict(other.state_dict()))
        assert bit_identical(dict(ema.averages), dict(twin.averages))


POLYAK = str(Path(polyak.__file__).parent)


@contextmanager
def interrupted_at(line: int) -> Iterator[list[int]]:
    """Press Ctrl-C when the `line`-th line of polyak's own files is about to run.

    A tracer can press where the interpreter itself never looks for signals: between the end of a
    `with` block and its `__exit__`. There gradients would stay off, and a lock locked for ever, so
    that both are put right again here.
    """
    count = [0]

    def lines(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(POLYAK):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == line:
                sys.settrace(None)
                os.kill(os.getpid(), signal.SIGINT)
        return lines

    before = sys.gettrace()
    sys.settrace(lines)
    try:
        yield count
    finally:
        sys.settrace(before)
        polyak.ema._lock = threading.RLock()
        torch.set_grad_enabled(True)


def _bystander() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.zeros(2))
    return model


def test_applied_survives_an_interrupt_at_any_line() -> None:
    """Law 9 and Ctrl-C at every single line that polyak runs: none leaves the averages behind.

    Checked while the `KeyboardInterrupt` is being handled, which is when people save. Not covered:
    the lines of `contextlib` itself, between the end of the block and polyak's first line.
    """
    model = _bystander()
    ema = EMA(model, Constant(0.5))
    ema.update()
    models.walk_(model, 1)
    snapshot, stuck, reached = Snapshot(model), [], True
    line = 0
    while reached:
        line += 1
        reached = False
        try:
            with interrupted_at(line), ema.applied():
                pass
        except KeyboardInterrupt:
            reached = True
            if snapshot.differences():
                stuck.append(line)
        try:
            with ema.applied():
                if not snapshot.differences():
                    stuck.append(-line)  # thinks that it is open, and applies nothing
        except RuntimeError:
            stuck.append(-line)
        if snapshot.differences() or stuck:
            break
    assert line > 50, "the tracer saw nothing"
    assert stuck == [], f"after an interrupt at line {line}"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def unbranched(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state without the branches of its run: the twin goes back where an update was none."""
    facts = json.loads(state["facts"])
    facts["history"].pop("branches", None)
    return {"averages": dict(state["averages"]), "facts": facts}


def test_an_update_is_whole_although_interrupted_at_any_line() -> None:
    """All or none, with Ctrl-C at every single line: averages, clock and history agree."""
    model = _bystander()
    ema, twin = EMA(model, Constant(0.5)), EMA(model, Constant(0.5))
    ema.update()
    ema.update()
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    line, reached = 0, True
    while reached:
        line += 1
        reached = False
        models.walk_(model, line)
        none = copy.deepcopy(ema.state_dict())
        twin.load_state_dict(copy.deepcopy(none))
        twin.update()
        try:
            with interrupted_at(line):
                ema.update()
        except KeyboardInterrupt:
            reached = True
        wanted = none if json.loads(none["facts"])["clock"] == ema.clock else twin.state_dict()
        assert bit_identical(unbranched(ema.state_dict()), unbranched(wanted)), f"line {line}"
    assert line > 20, "the tracer saw nothing"


def test_a_first_update_is_whole_although_interrupted_at_any_line() -> None:
    """All or none of the copying first update too: no average, or all of them and a clock of 1."""
    model = _bystander()
    line, reached, whole = 0, True, False
    while reached:
        line += 1
        reached = False
        ema = EMA(model, Constant(0.5))
        try:
            with interrupted_at(line):
                ema.update()
        except KeyboardInterrupt:
            reached = True
        whole = ema.clock == 1
        assert (json.loads(ema.state_dict()["facts"])["history"] is not None) == whole
        assert ema.report().updates == ema.clock
        before = Snapshot(model)
        models.walk_(model, line)
        assert bool(before.differences()) is True
        changed = not bit_identical(dict(ema.averages), seen(ema, model))
        assert changed == whole, f"line {line}"  # before the first update the average is the model
    assert whole
    assert line > 20, "the tracer saw nothing"


@pytest.mark.parametrize("every", [1, 2])
def test_an_attached_average_counts_right_although_interrupted(
    monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Who goes on after a Ctrl-C in the middle of an update has as many ticks as steps."""
    model = models.plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model, 0.9)
    ema.attach(optimizer, every=every, tick=3)
    fit(model, optimizer, range(2 * every))
    assert ema.clock == 6 * every
    with interrupting(monkeypatch, "lerp", 1), pytest.raises(KeyboardInterrupt):
        fit(model, optimizer, range(2 * every, 3 * every))
    assert ema.clock == 9 * every
    fit(model, optimizer, range(3 * every, 5 * every))
    assert ema.clock == 15 * every


# -------------------------------------------------------------------------------- law 10, names


@given(name=names.filter(lambda name: name != "spectral"), seed=seeds)  # its list has an order
def test_order_of_names_is_irrelevant(name: str, seed: int) -> None:
    """Law 10: teachers, states and modules of another order of registration are matched by name."""
    _, ema = _averaged(name)
    plain = copied(ema.averages)
    state = ema.state_dict()
    state["averages"] = dict(reversed(list(state["averages"].items())))
    other = EMA(models.reversed_(MODELS[name](seed)), 0.5)
    other.load_state_dict(state)
    home = models.reversed_(MODELS[name](seed))
    ema.copy_to(home)
    exported = ema.model_state_dict()
    for n, average in other.averages.items():
        alias = n if n in plain else {"decoder.weight": "encoder.weight"}.get(n, n)
        alias = alias.replace("second.", "first.") if alias not in plain else alias
        assert bit_identical(average, plain[alias])
    assert bit_identical(dict(home.state_dict()), exported)


MISMATCHES: dict[str, Callable[[nn.Module], None]] = {
    "head.weight": lambda m: setattr(m.head, "weight", nn.Parameter(torch.zeros(2, 2))),
    "head.extra": lambda m: m.head.register_parameter("extra", nn.Parameter(torch.zeros(2))),
    "extra": lambda m: m.register_buffer("extra", torch.zeros(1)),
    "conv.bias": lambda m: m.conv.register_parameter("bias", None),
    "norm.running_mean": lambda m: m.norm.register_buffer("running_mean", torch.zeros(7)),
    "norm.running_var": lambda m: m.norm.register_buffer("running_var", None),
    "conv.weight": lambda m: setattr(m.conv, "weight", nn.Parameter(m.conv.weight.data[:3])),
}
mismatches = st.sets(st.sampled_from(sorted(MISMATCHES)), min_size=1)


def _changed(wrong: set[str], seed: int = 1) -> nn.Module:
    model = models.convolutional(seed)
    for name in wrong:
        MISMATCHES[name](model)
    return model


@given(wrong=mismatches)
def test_every_mismatch_is_listed(wrong: set[str]) -> None:
    """Law 10: whatever differs, in number, name or shape, the error names every one of them.

    For teachers, for `update_`, for `copy_to`, for states, and for a model changed after the first
    update. And nothing was written before it was raised.
    """
    model, ema = _averaged("convolutional")
    state = copy.deepcopy(ema.state_dict())
    other = _changed(wrong)

    def refused(call: Callable[[], object], names: set[str]) -> None:
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            call()
        missing = {name for name in names if f"{name}:" not in str(caught.value)}
        assert not missing, str(caught.value)

    unchanged = [Snapshot(model), Snapshot(other)]
    refused(lambda: EMA(model, 0.5, into=other), wrong)
    refused(lambda: polyak.update_(other, model), wrong)
    refused(lambda: polyak.update_(model, other), wrong)
    refused(lambda: ema.copy_to(other), wrong)
    assert [snapshot.differences() for snapshot in unchanged] == [[], []]

    averaged = wrong - {"extra"}  # a buffer that merely follows
    if averaged:
        fresh = EMA(other, 0.5)
        refused(lambda: fresh.load_state_dict(state), averaged)
        assert fresh.clock == 0
        changed = EMA(twin := models.convolutional(), 0.5)
        changed.update()
        changed.update()
        before = copied(changed.averages)
        for name in averaged:
            MISMATCHES[name](twin)
        for call in (
            changed.state_dict,
            changed.model_state_dict,
            changed.applied().__enter__,
            changed.update,
        ):
            if call != changed.update or averaged != {"head.extra"}:
                refused(call, averaged)
        assert bit_identical(dict(changed.averages), before)


# ---------------------------------------------------------------------------- law 11, spectator

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4),
}


@every_model
@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_spectator(name: str, kind: str, tmp_path: Path) -> None:
    """Law 11: training with polyak attached gives the same weights, optimizer state and RNG.

    To the bit, with validation on the averages, reports, states and files in between; with
    momentum, dropout, BatchNorm.
    """

    def run(watched: bool) -> tuple[object, ...]:
        model = MODELS[name](0)
        optimizer = OPTIMIZERS[kind](trained(model))
        torch.manual_seed(1)
        ema = EMA(model, HalfLife(3)) if watched else None
        if ema is not None:
            ema.attach(optimizer)
        for step in models.train(model, optimizer, range(8)):
            if ema is not None and step % 3 == 2:
                model.eval()
                with ema.applied(), torch.no_grad():
                    model(models.batch(100)[0])
                    ema.save(tmp_path / "ema.safetensors")
                ema.report()
                ema.load_state_dict(copy.deepcopy(ema.state_dict()))
                ema.model_state_dict()
        if ema is not None:
            assert ema.clock == 8
        rng = torch.get_rng_state()
        return tensors_of(model), optimizer.state_dict(), rng, [p.grad for p in trained(model)]

    assert bit_identical(run(False), run(False))
    assert bit_identical(run(False), run(True))


@every_model
def test_an_update_only_reads(name: str) -> None:
    """An update makes no autograd node, writes no weight, takes no random number.

    It may stand between forward and backward, and inside `inference_mode`.
    """
    model = MODELS[name](0).train()
    ema = EMA(model, 0.9)
    ema.update()
    fit(model, torch.optim.SGD(trained(model), lr=0.05), range(1))
    loss = model(models.batch(0)[0]).float().square().mean()
    snapshot, rng = Snapshot(model), torch.get_rng_state()
    versions = {n: t._version for n, t in tensors_of(model).items()}
    ema.update()
    ema.update()
    with torch.inference_mode():
        ema.update()
    assert snapshot.differences() == []
    assert {n: t._version for n, t in tensors_of(model).items()} == versions
    assert torch.equal(torch.get_rng_state(), rng)
    for average in ema.averages.values():
        assert average.grad_fn is None
        assert not average.requires_grad
        assert not average.is_inference()
    loss.backward()
    assert all(p.grad is not None for p in trained(model) if p.numel())


# -------------------------------------------------------------------------------- law 12, clean

POISONS = [math.nan, math.inf, -math.inf]


@settings(max_examples=25)
@given(name=names, seed=seeds, data=st.data())
def test_clean(name: str, seed: int, data: st.DataObject) -> None:
    """Law 12: no non-finite value ever enters an average, at whatever element and step it occurs.

    A poisoned element keeps its average to the bit, every other one moves as if there were no
    poison, and the count is exact.
    """
    model, twin = MODELS[name](seed), MODELS[name](seed)
    ema, clean = EMA(model, 0.9), EMA(twin, 0.9)
    ema.update()
    clean.update()
    skipped, generator = 0, torch.Generator().manual_seed(seed)
    for step in range(data.draw(st.integers(1, 4))):
        models.scramble_(model, seed + step)
        models.scramble_(twin, seed + step)
        before = copied(ema.averages)
        for n, average in clean.averages.items():
            average.copy_(before[n])
        expected = {}
        clean.update()
        for n, tensor in tensors_of(model).items():
            if n not in before:
                continue
            often = data.draw(st.sampled_from([0.0, 0.2, 1.0]))
            hit = torch.rand(tensor.shape, generator=generator) < often
            value = data.draw(st.sampled_from(POISONS))
            if tensor.is_complex():  # its parts are two elements
                value = torch.complex(torch.tensor(value), torch.tensor(value)).to(tensor.dtype)
                skipped += int(hit.sum())
            tensor.copy_(torch.where(hit, value, tensor))
            expected[n] = torch.where(hit, before[n], clean.averages[n])
            skipped += int(hit.sum())
        ema.update()
        assert bit_identical(dict(ema.averages), expected)
        assert all(bool(torch.isfinite(a).all()) for a in ema.averages.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ema.report().nonfinite == skipped


def test_clean_of_finite_values_that_overflow() -> None:
    """Law 12: 3e38 on an average of -3e38 is finite, their difference is not: kept out, counted."""
    model = nn.Linear(4, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[-3e38, 3e38, 1.0, -1.0]]))
    for decay in (0.9, 0.1, 0.0):
        ema = EMA(model, Constant(decay))
        ema.update()
        average = ema.averages["weight"].clone()
        model.weight.data.neg_()
        ema.update()
        after = ema.averages["weight"]
        assert bool(torch.isfinite(after).all())
        assert torch.equal(after[0, :2], average[0, :2])
        torch.testing.assert_close(after[0, 2:], (2 * decay - 1) * average[0, 2:])
        with pytest.warns(UserWarning, match="2 elements of the weights were not finite"):
            assert ema.report().nonfinite == 2


def test_clean_from_the_start() -> None:
    """Law 12: a first update that would copy a NaN or an infinity is refused, with the names."""
    model = models.convolutional()
    model.head.bias.data[1] = math.nan
    model.norm.running_var[0] = math.inf
    ema = EMA(model, 0.9)
    with pytest.raises(ValueError, match=r"(?s)norm.running_var.*head.bias"):
        ema.update()
    assert ema.clock == 0
    with pytest.raises(ValueError, match=r"(?s)norm.running_var.*head.bias"):
        EMA(models.convolutional(), 0.9, into=model)
    model.head.bias.data[1] = 0.0
    model.norm.running_var[0] = 1.0
    ema.update()


def test_a_diverged_model_is_healed_by_its_average() -> None:
    """Law 12: after a run that diverged, the averages are clean, and `copy_to(model)` heals it."""
    model, ema = _averaged("convolutional")
    models.walk_(model, 0, scale=math.inf)
    with torch.no_grad():
        model.norm.running_mean.fill_(math.nan)
    for _ in range(3):
        ema.update()
    with pytest.warns(UserWarning, match="not finite"):
        state = ema.state_dict()
    assert all(bool(torch.isfinite(a).all()) for a in state["averages"].values())
    ema.copy_to(model)
    assert all(bool(torch.isfinite(t).all()) for t in tensors_of(model).values())


# ----------------------------------------------------------------- teachers: the seed's formula


def seed_update(teacher: nn.Module, student: nn.Module, decay: float = 0.5) -> None:
    """The loop that polyak began as, to the letter."""
    with torch.no_grad():
        for t, s in zip(teacher.state_dict().values(), student.state_dict().values()):  # noqa: B905
            t.copy_(t * decay + s * (1 - decay))


def _near_the_seed(
    got: nn.Module, expected: nn.Module, student: nn.Module, updates: int, largest: float
) -> None:
    """Floating entries: ours is off by 2 eps M at most, the seed's by less; integers: copied."""
    ours, theirs, own = got.state_dict(), expected.state_dict(), student.state_dict()
    assert ours.keys() == theirs.keys()
    for n, tensor in ours.items():
        if tensor.is_floating_point() or tensor.is_complex():
            assert_near({n: tensor}, {n: wide(theirs[n])}, 2 * updates, largest)
        else:
            assert torch.equal(tensor, own[n]), n


TEACHABLE = ["complexes", "convolutional", "float64", "frozen", "nested", "plain", "tied"]


@given(name=st.sampled_from(TEACHABLE), decay=st.floats(0.1, 0.9999), seed=seeds)
def test_the_seeds_loop(name: str, decay: float, seed: int) -> None:
    """`update_` and `EMA(into=)` are the seed's loop over the whole state dict, to rounding.

    Whatever the order of registration (theirs goes by position, ours by name); integer entries are
    copied, not truncated averages. Tied tensors count once, where the loop decays them twice.
    """
    student = models.scramble_(MODELS[name](seed), seed)
    twins = [models.scramble_(MODELS[name](seed + 1), seed + 1) for _ in range(3)]
    seeds_, function, object_ = twins
    ema = EMA(student, decay, into=models.reversed_(object_))
    models.reversed_(function)
    largest, before = 0.0, {n: wide(t) for n, t in seeds_.state_dict().items()}
    for step in range(3):
        models.scramble_(student, seed + step)
        for buffer in student.buffers():
            if not buffer.is_floating_point():
                buffer.fill_(2**53 + 2 * step + 1)
        for each in (student, *twins):
            largest = max(largest, largest_of(each))
        if name == "tied":
            with torch.no_grad():
                for t, s in zip(seeds_.parameters(), student.parameters(), strict=True):
                    t.copy_(t * decay + s * (1 - decay))
        else:
            seed_update(seeds_, student, decay)
        polyak.update_(function, student, decay)
        ema.update()
        _near_the_seed(function, seeds_, student, step + 1, largest)
        _near_the_seed(object_, seeds_, student, step + 1, largest)
    assert before.keys() == seeds_.state_dict().keys()


def test_the_seeds_own_case() -> None:
    """A teacher of ones, a student of twos, decay .5: the teacher is 1.5, the student 2.0."""
    teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.ones_(teacher.weight)
    nn.init.constant_(student.weight, 2.0)
    polyak.update_(teacher, student, decay=0.5)
    assert (teacher.weight.item(), student.weight.item()) == (1.5, 2.0)
    polyak.update_(teacher, student)  # .5 is the default
    assert (teacher.weight.item(), student.weight.item()) == (1.75, 2.0)
    nn.init.ones_(teacher.weight)
    EMA(student, 0.5, into=teacher).update()
    assert (teacher.weight.item(), student.weight.item()) == (1.5, 2.0)


@every_model
@pytest.mark.parametrize("by", ["update_", "into"])
def test_the_student_is_only_read(name: str, by: str) -> None:
    """The teacher is put into eval mode; the student keeps values, mode, gradients, autograd."""
    student, teacher = MODELS[name](0).train(), MODELS[name](1).train()
    if name == "masked":  # a mask of -inf cannot be averaged: polyak says so
        student.mask.zero_()
        teacher.mask.zero_()
    fit(student, torch.optim.SGD(trained(student), lr=0.01), range(1))
    student.train()
    snapshot = Snapshot(student)
    if by == "update_":
        narrow = any(
            t.is_floating_point() and torch.finfo(t.dtype).bits < 32
            for t in tensors_of(teacher).values()
        )
        if narrow:
            with pytest.raises(ValueError, match="too narrow to be moved"):
                polyak.update_(teacher, student, 0.5)
            return
        polyak.update_(teacher, student, 0.5)
        requires = [p.requires_grad for p in MODELS[name](1).parameters()]
        assert [p.requires_grad for p in teacher.parameters()] == requires
    else:
        EMA(student, 0.5, into=teacher).update()
        assert not any(p.requires_grad for p in teacher.parameters())
    assert snapshot.differences() == []
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad_fn is None and p.grad is None for p in teacher.parameters())


def test_a_teacher_that_is_trained_again_stays_so() -> None:
    """`eval` is called once, at construction: a later `train()` is respected (noisy teachers)."""
    student, teacher = models.convolutional(0), models.convolutional(1)
    ema = EMA(student, 0.5, into=teacher)
    assert not teacher.training
    teacher.train()
    ema.update()
    assert teacher.training


@every_model
def test_the_averages_are_the_teachers_own_tensors(name: str) -> None:
    """Wide teachers hold the averages themselves; narrow ones are written through from float32."""
    student, teacher = MODELS[name](0), MODELS[name](1)
    if name == "masked":
        student.mask.zero_()
        teacher.mask.zero_()
    ema = EMA(student, 0.9, into=teacher)
    start = {n: wide(t) for n, t in tensors_of(teacher).items() if n in ema.averages}
    pointers = {n: t.data_ptr() for n, t in tensors_of(teacher).items()}
    expected = dict(start)
    for step in range(5):
        models.scramble_(student, step)
        ema.update()
        for n, s in tensors_of(student).items():
            if n in expected:
                expected[n] = 0.9 * expected[n] + (1 - 0.9) * wide(s)
        for n, tensor in tensors_of(teacher).items():
            assert tensor.data_ptr() == pointers[n]
            if n in ema.averages:
                average = ema.averages[n]
                assert torch.finfo(average.dtype).bits >= 32
                assert torch.equal(tensor, average.to(tensor.dtype)), n
                own = average.data_ptr() == tensor.data_ptr()
                assert own == (tensor.dtype == average.dtype), n
    assert_near(ema.averages, expected, 10, 10.0)


def test_a_narrow_teacher_moves() -> None:
    """Why float32 behind a bfloat16 teacher: at decay .999 it arrives; by itself it would stall."""
    student, teacher = models.bfloat16(0), models.bfloat16(1)
    alone, start = copy.deepcopy(teacher), wide(teacher.head.weight)
    ema = EMA(student, 0.999, into=teacher)
    for _ in range(5000):
        ema.update()
        alone.head.weight.data.lerp_(student.head.weight.detach(), 0.001)
    wanted, got = wide(student.head.weight), wide(teacher.head.weight)
    left = 0.999**5000 * (wanted - start).abs()  # .0067 of the way, and a rounding to bfloat16
    assert bool(((got - wanted).abs() <= left + 2.0**-8 * wanted.abs()).all())
    assert (wide(alone.head.weight) - wanted).norm() > 10 * (got - wanted).norm()


def test_everything_is_what_the_seed_averaged() -> None:
    """The policy of teachers: every floating entry of the state dict, frozen ones too."""
    model = models.frozen()
    assert set(EMA(model, 0.9, policy=everything).averages) == set(model.state_dict())
    assert set(EMA(model, 0.9).averages) == {"head.weight", "head.bias"}


def test_the_definition_is_the_textbook() -> None:
    """`engine.reference` is d t + (1 - d) s, written out by hand for one number."""
    t, s = torch.tensor([3.0]), torch.tensor([7.0])
    engine.lerp(engine.Plan([t], [s], Reference), 0.25)
    assert t.item() == 0.75 * 3.0 + 0.25 * 7.0
