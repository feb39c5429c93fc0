"""Averages that were not kept, from those that were: as near as predicted, or refused."""

from __future__ import annotations

import functools
import itertools
import json
import math
import resource
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import polyak
from polyak import EMA, files
from polyak.checkpoint import opened
from polyak.decay import (
    After,
    Constant,
    Cosine,
    Debiased,
    Decay,
    HalfLife,
    PowerLaw,
    Uniform,
)
from polyak.posthoc import Snapshot, reconstruct, solve
from polyak.posthoc.fit import fit, harm
from polyak.profile import History, gram, moments, weights
from polyak.state import Facts

STEPS = 2000
WIDTHS = (PowerLaw(0.05), PowerLaw(0.10))
F32 = 2.0**-24  # the most that rounding to float32 changes, as a share of the value
F64 = 2.0**-52


def recorded(decay: Decay, clocks: Sequence[int], run: str = "a run", **how: Any) -> History:
    """The history of an average that was updated at these clocks."""
    history = History(run, **how)
    for clock in clocks:
        if clock > history.clock:
            history.tick(decay, clock - history.clock)
    return history


def snapshots(
    count: int = 16,
    steps: int = STEPS,
    every: int = 1,
    decays: Sequence[Decay] = WIDTHS,
    run: str = "a run",
) -> list[History]:
    """Evenly spaced ones of each decay."""
    found = []
    for decay in decays:
        whole = recorded(decay, range(every, steps + 1, every), run)
        found += [whole.until(steps * part // count) for part in range(1, count + 1)]
    return found


def averaged(history: History, states: Tensor) -> Tensor:
    """What the average is, of states by their clock, in float64."""
    clocks, shares = weights(history)
    return shares @ states[clocks]


def stored(folder: Path, histories: Sequence[History], states: Tensor, **how: Any) -> list[Path]:
    """Files of averages, as EMA.save writes them."""
    paths = []
    for number, history in enumerate(histories):
        paths.append(folder / f"{number}.safetensors")
        facts = {"averaged": ["w"], "history": history.to_dict(), "clock": history.clock}
        tensors = {"w": averaged(history, states).to(how.get("dtype", torch.float32))}
        files.write(paths[-1], tensors, facts)
    return paths


def profile(histories: Sequence[History], coefficients: Sequence[float]) -> Tensor:
    """The shares of the states by their clock, of a sum of averages of one run."""
    shares = torch.zeros(max(h.clock for h in histories) + 1, dtype=torch.float64)
    for history, coefficient in zip(histories, coefficients, strict=True):
        clocks, each = weights(history)
        shares.index_add_(0, clocks, coefficient * each)
    return shares


def walk(steps: int = STEPS, size: int = 50) -> Tensor:
    return torch.randn(steps + 1, size, dtype=torch.float64).cumsum(0)


def ramp(steps: int = STEPS, size: int = 50) -> Tensor:
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None] * torch.randn(
        size, dtype=torch.float64
    )


def noise(steps: int = STEPS, size: int = 50) -> Tensor:
    return torch.randn(steps + 1, size, dtype=torch.float64)


@functools.cache
def training(steps: int = STEPS) -> Tensor:
    """The weights of a small network, after each step of SGD with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = torch.randn(256, 4)
    outputs = inputs.prod(1, keepdim=True).tanh() + 0.3 * torch.randn(256, 1)
    states = [nn.utils.parameters_to_vector(model.parameters()).detach().double()]
    for _ in range(steps):
        batch = torch.randint(256, (16,))
        (model(inputs[batch]) - outputs[batch]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append(nn.utils.parameters_to_vector(model.parameters()).detach().double())
    return torch.stack(states)


TARGETS = [
    *(PowerLaw(std) for std in (0.03, 0.05, 0.08, 0.12, 0.15, 0.20, 0.25)),
    HalfLife(150),
    HalfLife(400),
    Uniform(),
    After(STEPS // 2, Uniform()),
    After(3 * STEPS // 4, Uniform()),
    Debiased(0.99),
    Debiased(0.998),
]

# What is predicted ------------------------------------------------------------------------------


STDS = (0.03, 0.08, 0.15, 0.20, 0.25)


@pytest.mark.parametrize(
    ("count", "errors"),
    [
        (8, (0.10, 0.011, 0.033, 0.077, 0.18)),
        (16, (0.039, 0.0030, 0.0090, 0.023, 0.079)),
        (32, (0.011, 7.6e-4, 0.0023, 0.0064, 0.034)),
        (128, (7.3e-4, 4.8e-5, 1.4e-4, 4.4e-4, 0.0062)),
    ],
)
def test_the_errors_of_power_laws_are_the_known_ones(count, errors):
    """Of n snapshots each of .05 and .10, for targets at the end of the run: all digits."""
    histories = snapshots(count, 4096)
    solutions = [solve(histories, PowerLaw(std)) for std in STDS]
    assert [float(f"{solution.predicted_error:.2g}") for solution in solutions] == list(errors)


def test_the_amplification_of_power_laws_is_the_known_one():
    """1 to 1.6 between the stored widths, 1.7, 2.0 and 2.3 above, 4.8 to 13.6 below at .03."""
    few, many = snapshots(8, 4096), snapshots(128, 4096)
    assert [round(solve(few, PowerLaw(std)).amplification, 1) for std in (0.15, 0.25)] == [1.7, 2.3]
    assert round(solve(many, PowerLaw(0.20)).amplification, 1) == 2.0
    assert round(solve(few, PowerLaw(0.03)).amplification, 1) == 4.8
    assert round(solve(many, PowerLaw(0.03)).amplification, 1) == 13.6
    for std in (0.06, 0.07, 0.08, 0.09):
        assert 1.0 < solve(many, PowerLaw(std)).amplification < 1.6


DECAYS = [*WIDTHS, HalfLife(9), Constant(0.5), Uniform(), Debiased(0.9), Cosine(0.5, 1.0, 30)]


@given(
    st.lists(st.tuples(st.sampled_from(DECAYS), st.integers(2, 60)), min_size=1, max_size=8),
    st.sampled_from([*DECAYS, PowerLaw(0.2), HalfLife(4)]),
    st.lists(st.integers(1, 5), min_size=60, max_size=60),
)
def test_the_error_is_that_of_the_profiles(kept, target, lengths):
    """Coefficients sum to 1, no other such sum is nearer, and the error is the distance itself."""
    clocks = list(itertools.accumulate(lengths))
    histories = [recorded(decay, clocks[:ticks]) for decay, ticks in kept]
    solution = solve(histories, target, limit=math.inf)
    assert abs(math.fsum(solution.coefficients) - 1) <= F64 * (1 + solution.amplification)
    assert solution.at == max(history.clock for history in histories)
    assert solution.amplification == math.fsum(map(abs, solution.coefficients))
    wanted = profile([solution.history], [1.0])
    left = profile(histories, solution.coefficients) - wanted
    # Inner products are rounded to a few ulp, and what is left of their sum is squared.
    slack = 64 * F64 * (1 + solution.amplification) ** 2
    relative = (left.norm() / wanted.norm()).item()
    assert abs(relative**2 - solution.predicted_error**2) <= slack
    for history in histories:
        alone = profile([history], [1.0])
        alone = torch.cat([alone, alone.new_zeros(len(wanted) - len(alone))])
        assert solution.predicted_error <= (alone - wanted).norm() / wanted.norm() + 1e-4


@pytest.mark.parametrize("target", [*TARGETS, Cosine(0.9, 0.999, STEPS)], ids=repr)
@pytest.mark.parametrize("cadence", [1, 7, 100, "irregular"])
def test_the_wanted_profile_is_that_of_the_ticks(target, cadence):
    """Its mean and its width agree with updating every state at every tick, to 1e-9."""
    generator = torch.Generator().manual_seed(0)
    irregular = torch.randint(1, 20, (STEPS,), generator=generator).cumsum(0).tolist()
    clocks = irregular if cadence == "irregular" else range(cadence, STEPS + 1, cadence)
    clocks = [clock for clock in clocks if clock <= STEPS]
    solution = solve([recorded(WIDTHS[0], clocks)], target, limit=math.inf)
    shares, now = {0: 1.0}, 0
    for clock in clocks:
        keep = target.keep(clock, clock - now)
        shares = {state: share * keep for state, share in shares.items()}
        shares[clock], now = 1 - keep, clock
    mean = math.fsum(share * state for state, share in shares.items())
    width = math.sqrt(math.fsum(p * (s - mean) ** 2 for s, p in shares.items()))
    found = moments(solution.history)
    assert solution.at == now
    assert abs((now - found.mean_age) - mean) <= 1e-9 * now
    assert abs(found.deviation - width) <= 1e-9 * now


def edm2_product(a: Decay, time_a: float, b: Decay, time_b: float) -> float:
    """The inner product of two power-law profiles as an integral (EDM2, equation 151)."""
    ga, gb = a.exponent, b.exponent
    power = gb if time_a < time_b else -ga
    ratio = (time_a / time_b) ** power
    return (ga + 1) * (gb + 1) * ratio / ((ga + gb + 1) * max(time_a, time_b))


def test_what_is_exact_tends_to_the_integral_of_edm2():
    """Coefficients and errors of EDM2's own products differ by what a tick is of the run."""
    target, differences = PowerLaw(0.15), []
    for steps in (1_000, 10_000, 100_000):
        histories = snapshots(8, steps)
        kinds = [(decay, steps * part // 8) for decay in WIDTHS for part in range(1, 9)]
        kinds.append((target, steps))
        integral = torch.tensor(
            [[edm2_product(a, s, b, t) for b, t in kinds] for a, s in kinds], dtype=torch.float64
        )
        solution = solve(histories, target)
        exact = gram([*histories, solution.history])
        products = ((exact - integral).abs() / exact).max().item()
        # Their own least squares, without the condition that the sum is 1.
        free = torch.linalg.solve(integral[:-1, :-1], integral[:-1, -1])
        square = integral[-1, -1] - free @ integral[:-1, -1]
        error = math.sqrt(square / integral[-1, -1])
        assert error <= solution.predicted_error * (1 + 100 / steps)
        assert abs(free.sum() - 1) < 0.01
        differences.append((products, (free - torch.tensor(solution.coefficients)).abs().max()))
    for coarse, fine in itertools.pairwise(differences):
        assert fine[0] < coarse[0] / 9
    assert differences[-1][0] < 1e-3
    assert differences[-1][1] < 0.02


def test_any_can_be_left_out_of_one_matrix_of_products():
    """The fit of a part of the files, from the products of all, is that of these files alone."""
    histories = snapshots(4)
    target = solve(histories, PowerLaw(0.08)).history
    products, units = gram([*histories, target]), [F32] * len(histories)
    for left_out in range(len(histories) - 1):
        kept = [i for i in range(len(histories)) if i != left_out]
        found = fit(products[kept][:, kept], products[kept, -1], products[-1, -1].item(), units[1:])
        alone = solve([histories[i] for i in kept], target, limit=math.inf)
        # What is left of the squares is rounded to a few ulp of products, as a share of |p|^2.
        slack = 64 * F64 * (1 + alone.amplification) ** 2
        assert abs(found.error**2 - alone.predicted_error**2) <= slack
        assert found.coefficients == pytest.approx(alone.coefficients, abs=1e-9)
        assert found.noise == math.fsum(abs(c) * F32 for c in found.coefficients)


# What is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [walk, ramp, noise, training], ids=lambda f: f.__name__)
def test_no_element_is_off_by_more_than_the_law(tmp_path, path):
    """|error| <= distance of the profiles x norm of the deviations, and what is rounded off."""
    states = path()
    paths = stored(tmp_path, snapshots(), states)
    solutions = [solve(paths, target, limit=math.inf) for target in TARGETS]
    found = reconstruct(paths, TARGETS, limit=math.inf, dtype=torch.float64)
    deviations = (states - states.mean(0)).norm(dim=0)
    largest = states.abs().amax(0)
    for target, solution, tensors in zip(TARGETS, solutions, found, strict=True):
        distance = solution.predicted_error * math.sqrt(moments(solution.history).concentration)
        # float32 for what is stored. The square of the predicted error is left of products of
        # float64, by less than 1e-14 each; profiles have norms of up to sqrt(g / STEPS), g < 17.
        rounding = F32 * solution.amplification * largest
        error = (tensors["w"] - averaged(solution.history, states)).abs()
        slack = 1e-7 * (1 + solution.amplification) * deviations * math.sqrt(17 / STEPS)
        assert bool((error <= distance * deviations + rounding + slack).all()), target


def test_the_law_would_notice_another_average():
    """On a ramp the sum for one width breaks the law of another one that is near."""
    states, histories = ramp(), snapshots()
    deviations = (states - states.mean(0)).norm(dim=0)
    solution = solve(histories, PowerLaw(0.08))
    distance = solution.predicted_error * math.sqrt(moments(solution.history).concentration)
    found = profile(histories, solution.coefficients) @ states
    for std, holds in ((0.08, True), (0.082, False)):
        wanted = averaged(solution.history.under(PowerLaw(std)), states)
        assert bool(((found - wanted).abs() <= distance * deviations).all()) == holds


def test_the_error_on_independent_noise_is_the_predicted_one(tmp_path):
    """The error of the sums has the predicted share of the deviation, over 4000 elements."""
    states = noise(size=4000)
    paths = stored(tmp_path, snapshots(), states, dtype=torch.float64)
    targets = [PowerLaw(0.03), PowerLaw(0.15), PowerLaw(0.25), After(STEPS // 2, Uniform())]
    for target in targets:
        solution = solve(paths, target, limit=math.inf)
        (found,) = reconstruct(paths, [target], limit=math.inf, dtype=torch.float64)
        wanted = averaged(solution.history, states)
        measured = ((found["w"] - wanted).norm() / wanted.norm()).item()
        # Two norms of 4000 independent normal numbers: each has a relative deviation of
        # 1/sqrt(8000); five of them.
        assert abs(measured / solution.predicted_error - 1) < 5 * math.sqrt(2 / 8000), target


@pytest.mark.parametrize("path", [walk, ramp, training], ids=lambda f: f.__name__)
def test_the_error_is_small_beside_what_averaging_does(tmp_path, path):
    """On paths that go somewhere: relative to the way from the average to the last weights."""
    states = path()
    paths = stored(tmp_path, snapshots(), states)
    for std in (0.03, 0.04, 0.06, 0.08, 0.12, 0.15, 0.20, 0.25):
        solution = solve(paths, PowerLaw(std))
        (found,) = reconstruct(paths, [PowerLaw(std)])
        wanted = averaged(solution.history, states)
        error = (found["w"].double() - wanted).norm() / (states[-1] - wanted).norm()
        assert error < solution.predicted_error, std


class Net(nn.Module):
    """Has all that files hold: what is averaged, what follows, integers, what is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.layer.weight
        self.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("flag", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.norm(self.layer(x)))


def trained(
    folder: Path,
    decays: Sequence[Decay] = WIDTHS,
    saved: Sequence[int] = tuple(range(10, 81, 10)),
    dtype: torch.dtype = torch.float32,
    **how: Any,
) -> tuple[list[Path], Net]:
    """Files of EMA.save of a run, the averages of each decay one after the other."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    emas = [EMA(model, decay) for decay in decays]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for step in range(1, max(saved) + 1):
        model(torch.randn(8, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for number, ema in enumerate(emas):
            ema.update(step)
            if step in saved:
                ema.save(folder / f"{number}-{step}.safetensors", **how)
    return [folder / f"{n}-{step}.safetensors" for n in range(len(emas)) for step in saved], model


@pytest.mark.parametrize("how", ["model", "float32", "averages", "sharded", "bfloat16"])
def test_what_is_stored_is_found_bit_for_bit(tmp_path, how):
    """Every tensor of a file, from all files, whatever way it was saved."""
    options: dict[str, dict[str, Any]] = {
        "model": {},
        "float32": {"dtype": torch.float32},
        "averages": {"averages_only": True},
        "sharded": {"shard_bytes": 64},
        "bfloat16": {"dtype": torch.bfloat16},
    }
    paths, model = trained(tmp_path, **options[how])
    for path, clock, std in ((paths[-1], 80, 0.10), (paths[7], 80, 0.05), (paths[10], 30, 0.10)):
        solution = solve(paths, PowerLaw(std), clock)
        expected = [float(one == path) for one in paths]
        assert list(solution.coefficients) == expected
        assert solution.predicted_error == 0.0
        assert solution.amplification == 1.0
        dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
        (found,) = reconstruct(paths, [PowerLaw(std)], at=clock, dtype=dtype)
        with opened(path) as checkpoint:
            own = {name: one.read() for name, one in checkpoint.tensors.items()}
        assert set(found) == set(own) == set(found if how == "averages" else model.state_dict())
        for name, tensor in own.items():
            if how == "bfloat16" and name in ("frozen.weight", "mask"):
                tensor = tensor.to(found[name].dtype)
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name


def test_what_was_averaged_is_summed_and_the_rest_is_the_newest(tmp_path):
    """Against an EMA that was there; masks of -inf and counters are those of the newest file."""
    decays = (*WIDTHS, PowerLaw(0.08))
    paths, model = trained(tmp_path, decays, dtype=torch.float64)
    others, wanted = paths[:16], files.read(paths[-1])
    solution = solve(others, PowerLaw(0.08))
    (found,) = reconstruct(others, [PowerLaw(0.08)], dtype=torch.float64)
    assert 0 < solution.predicted_error < 0.02
    names = files.read_facts(paths[0])["averaged"]
    assert "norm.running_var" in names
    assert "head.weight" in names
    for name, tensor in wanted.items():
        if name in names:
            far = (files.read(others[0])[name] - tensor).norm()
            assert (found[name] - tensor).norm() < 0.02 * far + 1e-12, name
        else:
            assert torch.equal(found[name], tensor), name
    assert torch.equal(found["head.weight"], found["layer.weight"])
    assert found["norm.num_batches_tracked"].item() == 80
    earlier = reconstruct(others, [PowerLaw(0.08)], at=40)[0]
    assert earlier["norm.num_batches_tracked"].item() == 40
    model.load_state_dict(found)


def test_a_constant_stays_itself(tmp_path):
    """To the rounding of what is written, whatever the coefficients are."""
    states = torch.randn(100, dtype=torch.float64).float().double().expand(STEPS + 1, 100)
    paths = stored(tmp_path, snapshots(), states.contiguous())
    # What is stored is the constant to float32; the averages above are rounded in float64 first.
    for path in paths:
        assert torch.equal(files.read(path)["w"].double(), states[0])
    found = reconstruct(paths, TARGETS, limit=math.inf)
    for tensors in found:
        assert bool(((tensors["w"].double() - states[0]).abs() <= F32 * states[0].abs()).all())


def test_several_averages_take_one_pass(tmp_path):
    """The same as one by one, and every file is read once."""
    paths = stored(tmp_path, snapshots(4), walk(size=1000))
    targets = [PowerLaw(0.07), PowerLaw(0.15), HalfLife(200)]
    read: list[int] = []
    found = reconstruct(paths, targets, progress=read.append)
    assert sum(read) == len(paths) * 1000 * 4
    for target, tensors in zip(targets, found, strict=True):
        (alone,) = reconstruct(paths, [target])
        assert torch.equal(tensors["w"], alone["w"])


def test_what_is_written_is_an_average_like_any_other(tmp_path):
    """Its facts are read as those of EMA.save; it is a snapshot for the next one."""
    paths, _ = trained(tmp_path)
    out = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    solutions = reconstruct(paths, [PowerLaw(0.15), HalfLife(12)], out)
    original = files.read_facts(paths[0])
    for path, solution, decay in zip(out, solutions, (PowerLaw(0.15), HalfLife(12)), strict=True):
        assert files.verify(path) == []
        sheet = files.read_facts(path)
        facts = Facts.from_state({"averages": {}, "facts": json.dumps(sheet)})
        assert (facts.clock, facts.updates) == (80, original["updates"] * 8)
        assert facts.decay == polyak.decay.to_spec(decay)
        assert facts.history == solution.history
        assert facts.moments == moments(solution.history)
        assert set(original) <= set(sheet)
        assert sheet["averaged"] == sorted(original["averaged"], key=sheet["averaged"].index)
        assert set(sheet["averaged"]) == set(original["averaged"])
        assert sheet["policy"] == "trainable"
        assert sheet["predicted_error"] == solution.predicted_error
        assert sheet["combined"]["rule"] == "posthoc"
        assert len(sheet["combined"]["sources"]) == len(sheet["combined"]["coefficients"]) == 16
        assert math.fsum(sheet["combined"]["coefficients"]) == pytest.approx(1, abs=1e-15)
        again = solve([path, *paths[:5]], decay)
        assert list(again.coefficients) == [1.0, *[0.0] * 5]
    (found,) = reconstruct(paths, [PowerLaw(0.15)])
    assert all(torch.equal(found[name], tensor) for name, tensor in files.read(out[0]).items())
    for near in (PowerLaw(0.15 * (1 + 1e-9)), PowerLaw(0.15 * (1 - 1e-9))):
        assert solve([*out, *paths], near).coefficients[0] == 1.0
    assert solve([*out, *paths], Constant(2 ** (-1 / 12))).coefficients[1] == 1.0
    (both,) = reconstruct(out, [solutions[0].history])
    assert all(torch.equal(found[name], tensor) for name, tensor in both.items())
    shards = tmp_path / "shards"
    reconstruct(paths, [PowerLaw(0.15)], [shards], shard_bytes=100)
    assert len(list(shards.iterdir())) > 2
    assert solve([shards], PowerLaw(0.15)).coefficients == (1.0,)


# What files tell of -----------------------------------------------------------------------------


def test_files_that_repeat_one_another_share():
    """The error is that of one of each, the sum of their coefficients too, however often."""
    histories = snapshots(8)
    alone = solve(histories, PowerLaw(0.15))
    for times in (2, 3, 10):
        again = solve(histories * times, PowerLaw(0.15))
        rows = torch.tensor(again.coefficients).view(times, -1)
        assert torch.allclose(rows, rows[0].expand_as(rows), rtol=0, atol=1e-6)
        assert torch.allclose(rows.sum(0), torch.tensor(alone.coefficients), rtol=0, atol=1e-5)
        assert again.predicted_error == pytest.approx(alone.predicted_error, rel=1e-6)
    assert solve(histories * 3, WIDTHS[0]).coefficients.count(1.0) == 1


@pytest.mark.parametrize("apart", [1e-3, 1e-5, 1e-7, 1e-9, 1e-12])
def test_files_that_nearly_repeat_one_another_do_no_harm(apart):
    """Averages whose widths differ by so much: no error grows, and no storage noise."""
    near = [PowerLaw(std * (1 + sign * apart)) for std in (0.05, 0.10) for sign in (0, 1)]
    histories = snapshots(8, decays=near)
    for target in (PowerLaw(0.07), PowerLaw(0.15), HalfLife(200)):
        alone = solve(snapshots(8), target)
        both = solve(histories, target)
        assert both.predicted_error <= alone.predicted_error + 1e-5
        assert both.storage_noise < 0.001


def test_the_order_of_the_files_is_irrelevant(tmp_path):
    """Coefficients go with their files, to rounding; so does what is written."""
    paths = stored(tmp_path, snapshots(4), walk())
    order = torch.randperm(len(paths)).tolist()
    straight, mixed = solve(paths, PowerLaw(0.15)), solve([paths[i] for i in order], PowerLaw(0.15))
    for place, i in enumerate(order):
        assert mixed.coefficients[place] == pytest.approx(straight.coefficients[i], abs=1e-9)


def test_only_what_was_stored_by_then_takes_part():
    """An average in the middle of a run is made of what came before; between ticks, of the last."""
    histories = snapshots(8)
    early = solve(histories, PowerLaw(0.15), 1000)
    assert early.at == early.history.clock == 1000
    pairs = zip(early.coefficients, histories, strict=True)
    assert all((c == 0) == (h.clock > 1000) for c, h in pairs)
    short = [history for history in histories if history.clock <= 1000]
    assert early.predicted_error == pytest.approx(
        solve(short, PowerLaw(0.15)).predicted_error, rel=1e-9
    )
    # That there was a tick at 1001 only the later files tell.
    assert solve(histories, PowerLaw(0.15), 1001).at == 1001
    sparse = snapshots(8, every=7)
    assert solve(sparse, PowerLaw(0.15), 1250).at == 1246
    with pytest.raises(
        ValueError, match="newest of them is at the clock 1000: ask for that with a"
    ):
        solve(histories, PowerLaw(0.15), 1100)
    assert solve(histories, early.history).coefficients == early.coefficients


def test_states_are_those_of_the_finest_average():
    """Of averages of several cadences: each tick that the finest one made, up to the last."""
    fine, coarse = snapshots(8), snapshots(8, every=50)
    solution = solve([*coarse, *fine], PowerLaw(0.15))
    assert solution.history.ticks == STEPS
    assert solution.predicted_error <= solve(fine, PowerLaw(0.15)).predicted_error * (1 + 1e-9)
    further = recorded(WIDTHS[0], range(50, STEPS + 51, 50))
    assert solve([*fine, further], PowerLaw(0.15), limit=1).history.ticks == STEPS // 50 + 1


def test_an_average_that_began_anew_goes_on_with_the_states_before():
    """After reset(): what was seen before is known from the files of before."""
    first = [recorded(d, range(1, 1001)).until(t) for d in WIDTHS for t in range(100, 1001, 100)]
    second = [
        recorded(d, range(1003, 2001), origin=1002).until(t)
        for d in WIDTHS
        for t in range(1100, 2001, 100)
    ]
    solution = solve([*first, *second], Uniform(), limit=1)
    clocks, shares = weights(solution.history)
    assert clocks.tolist() == [*range(1001), *range(1002, 2001)]
    assert shares[0] == 0.0
    assert shares.max() == pytest.approx(2 / 2000), "the gap counts for the state that ends it"
    alone = solve(second, Uniform(), limit=1).history
    assert weights(alone)[1][0] == pytest.approx(1002 / 2000)


def test_a_start_that_is_no_state_belongs_to_its_own_average():
    """A teacher's own values, which no other average knows, are told from the run's states."""
    decay = HalfLife(300)
    teacher = recorded(decay, range(1, 501), inherited=True)
    student = recorded(decay, range(1, 501))
    assert solve([student, teacher], teacher).coefficients == (0.0, 1.0)
    apart = solve([teacher], student, limit=math.inf)
    share = weights(student)[1][0].item()
    missing = math.sqrt(2) * share / math.sqrt(moments(student).concentration)
    assert apart.predicted_error == pytest.approx(missing, rel=1e-9)
    assert not solve([teacher, student], decay).history.inherited
    earlier = [teacher.until(t) for t in range(50, 501, 50)]
    assert solve(earlier, HalfLife(200), limit=math.inf).history.inherited


def test_plain_checkpoints_are_states(tmp_path):
    """Weights of one moment take part with the clock that the caller gives; alone they are all."""
    states = walk()
    paths = []
    for clock in range(100, 1001, 100):
        paths.append(tmp_path / f"{clock}.pt")
        torch.save({"model": {"w": states[clock].float(), "n": torch.tensor(clock)}}, paths[-1])
    plain = [Snapshot(p, 100 * (i + 1), place="model") for i, p in enumerate(paths)]
    solution = solve(plain, Uniform())
    assert solution.coefficients == pytest.approx([0.1] * 10, abs=1e-12)
    assert solution.predicted_error < 1e-7
    (found,) = reconstruct(plain, [Uniform()])
    mean = torch.stack([states[clock].float() for clock in range(100, 1001, 100)]).double().mean(0)
    assert torch.allclose(found["w"].double(), mean, rtol=2 * F32, atol=1e-6)
    assert found["n"].item() == 1000
    reconstruct(plain, [PowerLaw(0.15)], [tmp_path / "mean.safetensors"])
    sheet = files.read_facts(tmp_path / "mean.safetensors")
    facts = Facts.from_state({"averages": {}, "facts": json.dumps(sheet)})
    assert (facts.clock, facts.updates, sheet["averaged"]) == (1000, 10, ["w"])
    # Beside averages: the last weights are a state that these have seen.
    ended = recorded(WIDTHS[1], range(1, 1001))
    files.write(tmp_path / "a.safetensors", {"w": averaged(ended, states).float()})
    both = [plain[-1], Snapshot(tmp_path / "a.safetensors", ended)]
    last = ended.under(Constant(0.0))
    assert solve(both, last).coefficients == (1.0, 0.0)
    solution = solve(both, PowerLaw(0.09), limit=1)
    assert solution.history.ticks == 1000
    assert 0 < solution.coefficients[0] < 0.1


def test_irregular_ticks_that_were_merged_give_the_same(monkeypatch):
    """Histories beyond the cap: the predicted error is true of the exact ones, also mid-run."""
    generator = torch.Generator().manual_seed(0)
    clocks = torch.randint(1, 40, (4000,), generator=generator).cumsum(0).tolist()

    def kept() -> list[History]:
        ends = range(499, 4000, 500)
        return [recorded(decay, clocks[: end + 1]) for decay in WIDTHS for end in ends]

    merged = kept()
    monkeypatch.setattr(polyak.profile, "RUNS", 4000)
    exact = kept()
    assert merged[-1].shift > 0 == exact[-1].shift
    for target in (PowerLaw(0.15), WIDTHS[0]):
        for at in (clocks[-1], clocks[1999]):
            solution = solve(merged, target, at)
            wanted = profile([exact[-1].until(at).under(target)], [1.0])
            left = profile(exact, solution.coefficients)[: len(wanted)] - wanted
            # The clocks of the states are off by up to a 64th of their age, and shares by as much.
            true = (left.norm() / wanted.norm()).item()
            assert solution.at == at
            assert true == pytest.approx(solution.predicted_error, rel=0.1, abs=1e-7)
    between = solve(merged, target, clocks[2100], limit=math.inf)
    assert abs(between.at - clocks[2100]) <= merged[-1].shift


def test_ten_million_ticks_take_seconds():
    """Of 32 snapshots: about one second, and twenty are allowed. The error is the known one."""
    spec = polyak.decay.to_spec
    whole = [
        History.from_dict(
            {
                "run": "a run",
                "origin": 0,
                "start": None,
                "segments": [{"decay": spec(decay), "runs": [[10_000_000, 10_000_000, 0]]}],
            }
        )
        for decay in WIDTHS
    ]
    histories = [one.until(625_000 * part) for one in whole for part in range(1, 17)]
    start = time.perf_counter()
    solution = solve(histories, PowerLaw(0.15))
    assert time.perf_counter() - start < 20
    assert round(solution.predicted_error, 4) == 0.0090


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "nearest"),
    [
        (PowerLaw(0.01), "PowerLaw(std=0.02"),
        (PowerLaw(0.28), "PowerLaw(std=0.2"),
        (HalfLife(1e6), "HalfLife(half_life=2"),
        (HalfLife(1), "HalfLife(half_life=3"),
        (Constant(1 - 1e-6), "Constant(decay=0.99"),
        (Debiased(HalfLife(20)), "Debiased(inner=HalfLife(half_life=3"),
        (Uniform(), "PowerLaw(std=0.2"),
        (After(STEPS - 60, Uniform()), "After(start=17"),
    ],
    ids=repr,
)
def test_what_cannot_be_given_is_refused(target, nearest):
    """With the error, and the nearest of its family that can be given, which then is."""
    histories = snapshots(8)
    limit = 0.2
    with pytest.raises(ValueError, match="these 16 files cannot give") as error:
        solve(histories, target, limit=limit)
    text = str(error.value)
    assert f"{target!r} at the clock {STEPS}: it would be off by" in text
    assert f"more than limit={limit}. The nearest that can be given is {nearest}" in text
    found = text.split("can be given is ")[1].split("; else store averages more often")[0]
    named = eval(found, vars(polyak.decay))
    assert solve(histories, named, limit=limit).predicted_error <= limit
    enough = float(text.split("or pass limit=")[1].split(",")[0])
    assert limit < solve(histories, target, limit=enough).predicted_error <= enough
    # What is nearer by two of the steps of the search would not do.
    if isinstance(target, PowerLaw):
        nearer = PowerLaw(named.std * 2 ** math.copysign(2 / 16, target.std - named.std))
        with pytest.raises(ValueError, match="cannot give"):
            solve(histories, nearer, limit=limit)


def test_what_has_no_relatives_is_refused_all_the_same():
    """A schedule, and a history: what is wrong and what it costs, without another target."""
    histories = snapshots(8)
    for target in (Cosine(0.1, 0.5, 10), histories[0].under(Constant(0.5)).until(250)):
        with pytest.raises(ValueError, match=r"more than limit=0\.2\. Else store averages more"):
            solve(histories, target)


def test_noise_of_storage_is_refused(tmp_path):
    """bfloat16 files give averages between their widths; others would be made of rounding."""
    paths = stored(tmp_path, snapshots(), walk(), dtype=torch.bfloat16)
    between = solve(paths, PowerLaw(0.08))
    assert between.storage_noise == pytest.approx(between.amplification * 2.0**-8)
    with pytest.raises(
        ValueError, match=r"sizes of its coefficients sum to 7\.\d, so that what"
    ) as e:
        solve(paths, PowerLaw(0.03))
    assert "grows to 3.0% of the weights, more than 1%" in str(e.value)
    assert "The nearest that can be given is PowerLaw(std=0.04" in str(e.value)
    assert "save(path, dtype=torch.float32), or pass limit=math.inf, and have that" in str(e.value)
    assert solve(paths, PowerLaw(0.03), limit=math.inf).storage_noise > 0.02
    wide = solve(snapshots(), PowerLaw(0.03))
    assert wide.storage_noise == pytest.approx(wide.amplification * F32)


class Own:
    """A decay that is nobody else's."""

    def keep(self, t: int, dt: int) -> float:
        return 0.9**dt


def test_files_that_do_not_tell_are_refused_together(tmp_path):
    """All of them, each with its reason: no facts, no update, a decay of another program."""
    files.write(tmp_path / "plain.safetensors", {"w": torch.ones(1)})
    unknown = recorded(polyak.decay.as_decay(Own()), [1, 2])
    assert solve([unknown], unknown).coefficients == (1.0,), "here it is known"
    sheet = {"averaged": ["w"], "history": unknown.to_dict()}
    files.write(tmp_path / "own.safetensors", {"w": torch.ones(1)}, sheet)
    sheet = {"averaged": ["w"], "history": None}
    files.write(tmp_path / "none.safetensors", {"w": torch.ones(1)}, sheet)
    (good,) = stored(tmp_path, snapshots(1)[:1], walk())
    names = ["plain.safetensors", "own.safetensors", "none.safetensors"]
    with pytest.raises(ValueError, match="3 of the 4 files have no profile") as error:
        solve([good, *(tmp_path / name for name in names)], Uniform())
    reasons = ("does not say", "Own object at", "before its first")
    for name, reason in zip(names, reasons, strict=True):
        assert any(name in x and reason in x for x in str(error.value).splitlines()), name
    assert "Snapshot(path, clock) for the weights at that clock" in str(error.value)


def test_files_of_several_runs_are_refused():
    """They have no states in common; which file is of which run is told."""
    with pytest.raises(ValueError, match="of 2 runs, which have no states in common") as error:
        solve([*snapshots(1), *snapshots(1, run="another")], Uniform())
    assert "history 1: of the run 'a run'" in str(error.value)
    assert "history 3: of the run 'another'" in str(error.value)
    with pytest.raises(ValueError, match="of 2 runs"):
        solve(snapshots(1), recorded(Uniform(), [1, 2], "another"))


def test_clocks_that_nothing_tells_of_are_refused():
    """Later than all files, earlier than all files, not the target's own, no integer."""
    histories = [one for one in snapshots(8) if one.clock >= 500]
    with pytest.raises(ValueError, match="tells of the clocks 0 to 2000, not of at=2001: pass one"):
        solve(histories, Uniform(), 2001)
    with pytest.raises(
        ValueError, match="nothing is stored at or before the clock 499: the oldest"
    ):
        solve(histories, Uniform(), 499)
    with pytest.raises(
        ValueError, match=r"is at the clock 2000, and at=10: .* target\.until\(10\)"
    ):
        solve(histories, histories[-1], 10)
    with pytest.raises(TypeError, match=r"at is a clock, an integer, not 10\.5"):
        solve(histories, Uniform(), 10.5)  # type: ignore[arg-type]


def test_what_is_nothing_stored_is_refused(tmp_path):
    """Arguments of another kind: each error says what to pass."""
    (path,) = stored(tmp_path, snapshots(1)[:1], walk())
    with pytest.raises(TypeError, match=r"made of stored ones, not of '.*': pass a list of paths"):
        solve(str(path), Uniform())
    with pytest.raises(TypeError, match=r"made of stored ones, not of \[\]"):
        solve([], Uniform())
    with pytest.raises(TypeError, match="3 of type int is nothing stored: pass the path"):
        solve([3], Uniform())  # type: ignore[list-item]
    files.write(tmp_path / "bad.safetensors", {"w": torch.ones(1)}, {"history": {"run": 1}})
    with pytest.raises(ValueError, match=r"bad\.safetensors: this is no tick history"):
        solve([tmp_path / "bad.safetensors"], Uniform())
    with pytest.raises(TypeError, match="has neither a clock nor a history: pass an integer"):
        solve([Snapshot(path, 1.5)], Uniform())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a history has no tensors: pass the path of the file"):
        reconstruct(snapshots(1), [Uniform()])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"not Uniform\(\): pass \[PowerLaw\(0.15\)\]"):
        reconstruct([path], Uniform())  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"a path for each of the targets, not 'a': pass \['a'\]"):
        reconstruct([path], [WIDTHS[0]], "a")


def test_outputs_that_do_not_fit_are_refused(tmp_path):
    """Nothing is written, and what was there is there."""
    paths = stored(tmp_path, snapshots(4), walk())
    before = sorted(tmp_path.iterdir())
    targets, a = [PowerLaw(0.08)], tmp_path / "a"
    with pytest.raises(ValueError, match=r"2 paths for 1 targets: .* pass one for each"):
        reconstruct(paths, targets, [a, a])
    with pytest.raises(
        ValueError, match=r"one of the files that are read: .*0\.safetensors; other"
    ):
        reconstruct(paths, targets, [tmp_path / "x" / ".." / "0.safetensors"])
    with pytest.raises(ValueError, match="shard_bytes=9 is about files that are written, and ther"):
        reconstruct(paths, targets, shard_bytes=9)  # type: ignore[call-overload]
    ends = [recorded(d, range(1, t)) for d in WIDTHS for t in (501, 1001)]
    with pytest.raises(
        ValueError, match=r"at the clocks \[500, 1000\], and the buffers of a model"
    ):
        reconstruct(paths, ends[:2], [a, tmp_path / "b"], limit=math.inf)
    with pytest.raises(ValueError, match="cannot give"):
        reconstruct(paths, [PowerLaw(0.08), HalfLife(1)], [a, tmp_path / "b"])
    assert sorted(tmp_path.iterdir()) == before


def test_files_that_differ_are_refused(tmp_path):
    """In what is averaged, in names, in shapes: all differences, before anything is written."""
    histories, contents = snapshots(1), [{"v": 3, "w": 2}, {"v": 3, "w": 2}]

    def written(second: dict[str, int], averaged: Sequence[str] = ("v", "w")) -> list[Path]:
        paths = []
        sheets = [["v", "w"], list(averaged)]
        for number, (sizes, sheet) in enumerate(zip([contents[0], second], sheets, strict=True)):
            paths.append(tmp_path / f"{number}.safetensors")
            tensors = {name: torch.ones(size) for name, size in sizes.items()}
            facts = {"averaged": sheet, "history": histories[number].to_dict()}
            files.write(paths[-1], tensors, facts)
        return paths

    with pytest.raises(ValueError, match=r"1 are averaged in some of them only:\n  v\npass files"):
        reconstruct(written({"v": 3, "w": 2}, ["w"]), [WIDTHS[0]])
    with pytest.raises(ValueError, match="differ in 2 tensors") as error:
        reconstruct(written({"v": 4}), [WIDTHS[0]])
    assert "v: (3,), (4,)" in str(error.value)
    assert "w: not in checkpoint 2" in str(error.value)


def test_statistics_that_were_estimated_for_another_average_are_told_of(tmp_path):
    """They are summed, and a warning says that this average would have found others."""
    torch.manual_seed(0)
    model = Net()
    ema = EMA(model, PowerLaw(0.1))
    paths = []
    for step in range(1, 5):
        model(torch.randn(8, 3))
        ema.update(step)
        ema.reestimate_statistics([torch.randn(8, 3)])
        paths.append(tmp_path / f"{step}.safetensors")
        ema.save(paths[-1])
    with pytest.warns(UserWarning, match="2 statistics were re-estimated for the stored averages"):
        reconstruct(paths, [PowerLaw(0.2)], limit=math.inf)


def test_what_was_reconstructed_is_as_good_as_it_was(tmp_path: Path) -> None:
    """Its error is in what is predicted, and files without one are preferred where they do."""
    originals = snapshots()
    paths = stored(tmp_path, originals, walk())
    made = tmp_path / "made.safetensors"
    (first,) = reconstruct(paths, [PowerLaw(0.22)], [made])
    assert first.predicted_error > 0.01
    assert solve([made], PowerLaw(0.22)).predicted_error == pytest.approx(
        first.predicted_error, rel=1e-6
    )
    exact = solve(paths, PowerLaw(0.18))
    both = solve([*paths, made], PowerLaw(0.18))
    assert both.predicted_error <= exact.predicted_error + 1e-6
    few = [path for path, history in zip(paths, originals, strict=True) if history.clock > 1200]
    found = solve([*few, made], PowerLaw(0.2), limit=math.inf)
    assert found.coefficients[-1] != 0.0
    coefficients = list(found.coefficients[-1] * torch.tensor(first.coefficients).double())
    for path, coefficient in zip(few, found.coefficients, strict=False):
        coefficients[paths.index(path)] += coefficient
    wanted = profile([originals[0], found.history], [0.0, 1.0])
    really = (profile(originals, coefficients) - wanted).norm() / wanted.norm()
    without = solve(few, PowerLaw(0.2), limit=math.inf).predicted_error
    assert really <= found.predicted_error * (1 + 1e-9)
    assert found.predicted_error <= without


def test_steps_that_were_made_twice_are_not_mixed(tmp_path: Path) -> None:
    """A run goes on from an earlier checkpoint: its files and those that it had gone on to."""
    model = nn.Linear(3, 3)
    emas = [EMA(model, decay) for decay in WIDTHS]
    kept: list[Path] = []

    def train(emas: Sequence[EMA], steps: range, name: str) -> list[Path]:
        found = []
        for step in steps:
            nn.init.normal_(emas[0]._model.weight)
            for number, ema in enumerate(emas):
                ema.update(step)
                if step % 20 == 0:
                    found.append(tmp_path / f"{name}-{number}-{step}.safetensors")
                    ema.save(found[-1], dtype=torch.float32)
        return found

    kept = train(emas, range(1, 101), "kept")
    states = [ema.state_dict() for ema in emas]
    torch.save([model.state_dict(), states], tmp_path / "state.pt")
    given_up = train(emas, range(101, 161), "given-up")
    weights, states = torch.load(tmp_path / "state.pt", weights_only=True)
    model = nn.Linear(3, 3)
    model.load_state_dict(weights)
    emas = [EMA(model, decay) for decay in WIDTHS]
    for ema, state in zip(emas, states, strict=True):
        ema.load_state_dict(state)
    emas.append(EMA(model, Constant(0.5)))  # which begins here
    gone_on = train(emas, range(101, 201), "gone-on")

    solution = solve([*kept, *gone_on], PowerLaw(0.07))
    assert solution.predicted_error < 0.1
    assert solve([*kept, *given_up], PowerLaw(0.07)).at == 160
    pattern = (
        r"6 of the 31 averages are of other steps than (.|\n)*given-up-0-120(.|\n)*leave these"
    )
    with pytest.raises(ValueError, match=pattern):
        solve([*kept, *gone_on, *given_up], PowerLaw(0.07))
    plain = Snapshot(tmp_path / "state.pt", 100, place="0")
    mixed = solve([*kept[:6], *gone_on, plain], PowerLaw(0.07))
    without = solve([*kept[:6], *gone_on], PowerLaw(0.07))
    assert mixed.predicted_error <= without.predicted_error + 1e-6
    history = emas[0].history
    assert history is not None
    state = Snapshot(tmp_path / "state.pt", 180, place="0")
    assert solve([state], history.state(180), limit=math.inf).predicted_error == 0.0


def test_elements_that_kept_their_average_are_told_of(tmp_path: Path) -> None:
    """They have not seen what the profile says; what is made of them says so too."""
    model = nn.Linear(2, 2)
    ema = EMA(model, PowerLaw(0.1))
    paths = []
    for step in range(1, 61):
        with torch.no_grad():
            model.weight += 1.0
            model.weight[0, 0] = torch.nan if 20 < step <= 30 else float(step)
        ema.update(step)
        if step % 10 == 0:
            paths.append(tmp_path / f"{step}.safetensors")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ema.save(paths[-1], dtype=torch.float32)
    out = tmp_path / "out.safetensors"
    with pytest.warns(UserWarning, match="up to 10 times an element of the stored averages"):
        reconstruct(paths, [PowerLaw(0.12)], [out])
    assert files.read_facts(out)["nonfinite"] == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reconstruct(paths[:2], [PowerLaw(0.12)], limit=math.inf)


def test_an_average_is_not_taken_for_weights(tmp_path: Path) -> None:
    (path,) = stored(tmp_path, snapshots(1)[:1], walk())
    with pytest.raises(ValueError, match=r"says that it is an average.*pass the path alone"):
        solve([Snapshot(path, 2000)], PowerLaw(0.1))


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    """The system's limit is told with what to type."""
    paths = stored(tmp_path, snapshots(8), walk())
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 6, limits[1]))
    try:
        with pytest.raises(OSError, match=r"16 files are more than .* `ulimit -n 132`"):
            solve(paths, PowerLaw(0.1))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("count", [3, 8, 24])
@pytest.mark.parametrize("repeated", [False, True])
def test_the_harm_of_leaving_one_out_is_what_it_is(count: int, repeated: bool) -> None:
    """In closed form, against the fits of all that remain."""
    histories = snapshots(count)
    histories += [histories[5 % count]] if repeated else []
    n = len(histories)
    wanted = [histories[-1].under(PowerLaw(std)) for std in (0.03, 0.06, 0.08, 0.2)]
    products = gram([*histories, *wanted])

    def errors(kept: Sequence[int]) -> list[float]:
        rows, units = products[:n, :n][kept][:, kept], [0.0] * len(kept)
        return [
            fit(rows, products[kept, n + j], products[n + j, n + j].item(), units).error ** 2
            for j in range(len(wanted))
        ]

    whole, found = sum(errors(range(n))), harm(products, n)
    for number in range(n):
        rest = [i for i in range(n) if i != number]
        assert found[number] == pytest.approx(sum(errors(rest)) - whole, rel=0.02, abs=1e-9)
