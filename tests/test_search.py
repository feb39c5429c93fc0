"""The horizon whose average is best, found from stored averages by a handful of evaluations."""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from polyak import EMA
from polyak.decay import After, Constant, Decay, HalfLife, PowerLaw, Uniform
from polyak.posthoc import Curve, Point, Snapshot, reconstruct, search, solve
from polyak.posthoc.reach import reach
from polyak.posthoc.stored import File
from polyak.profile import History, weights

STEPS = 600
RATE = 0.01  # of descent: the start is forgotten by a factor of e every 100 steps
WIDTHS = (PowerLaw(0.05), PowerLaw(0.10))


@functools.cache
def states() -> Tensor:
    """What a run goes through: its clock, then 64 noisy descents to 0, in float32."""
    generator = torch.Generator().manual_seed(0)
    x = torch.full((64,), 5.0)
    path = [torch.cat([torch.zeros(1), x])]
    for step in range(1, STEPS + 1):
        x = x - RATE * x + 0.02 * torch.randn(64, generator=generator)
        path.append(torch.cat([torch.tensor([float(step)]), x]))
    return torch.stack(path)


class Run(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(states()[0].clone())
        self.register_buffer("step", torch.tensor(0))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of EMA.save: 12 of each of two widths, every 50 steps."""
    folder, model = tmp_path_factory.mktemp("run"), Run()
    emas, paths = [EMA(model, decay) for decay in WIDTHS], []
    for step, state in enumerate(states()):
        model.w.data.copy_(state)
        model.step.fill_(step)
        for number, ema in enumerate(emas):
            ema.update(step)
            if step and step % 50 == 0:
                paths.append(folder / f"{number}-{step}.safetensors")
                ema.save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Snapshot]:
    """The weights alone, every 20 steps."""
    folder, found = tmp_path_factory.mktemp("plain"), []
    for step in range(20, STEPS + 1, 20):
        torch.save({"model": {"w": states()[step]}}, folder / f"{step}.pt")
        found.append(Snapshot(folder / f"{step}.pt", step, place="model"))
    return found


SPACING = 0.02  # of the logarithms of the horizons of a dense scan


@pytest.fixture(scope="module")
def dense(stored: list[Path]) -> dict[float, dict[str, Tensor]]:
    """What the files give at all horizons, in one pass."""
    low, high = 0.0185, 0.269
    found = logspaced(low, high, round(math.log(high / low) / SPACING))
    averages = reconstruct(stored, [PowerLaw(horizon) for horizon in found])
    return dict(zip(found, averages, strict=True))


def std(average: dict[str, Tensor]) -> float:
    """The width of a power-law average of the whole run, read off the mean of its clocks.

    The mean is T (g + 1) / (g + 2), and std^2 = (g + 1) / ((g + 2)^2 (g + 3)).
    """
    x = STEPS / (STEPS - average["w"][0].item())  # g + 2
    return math.sqrt((x - 1) / (x * x * (x + 1)))


def from_optimum(horizon: float) -> Callable[[dict[str, Tensor]], float]:
    """A score that is lowest at a horizon."""
    return lambda average: math.log(std(average) / horizon) ** 2


def loss(average: dict[str, Tensor]) -> float:
    """What is left of the descents: of short averages noise, of long ones the start."""
    return average["w"][1:].square().mean().item()


class Counted:
    """A score that remembers what it gave."""

    def __init__(self, score: Callable[[dict[str, Tensor]], Any]) -> None:
        self.score, self.given = score, []

    def __call__(self, average: dict[str, Tensor]) -> Any:
        self.given.append(self.score(average))
        return self.given[-1]


def horizons(curve: Curve) -> list[float]:
    return [point.horizon for point in curve.points]


def logspaced(low: float, high: float, count: int) -> list[float]:
    return torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64).tolist()


# What is found ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimum", [0.03, 0.045, 0.06, 0.1, 0.14, 0.2])
@pytest.mark.parametrize("steeper", [1, 20])
def test_the_optimum_of_a_smooth_score_is_found(stored, dense, optimum, steeper):
    """To 5%, also where the score rises 20 times as fast on one side."""

    def score(average: dict[str, Tensor]) -> float:
        far = math.log(std(average) / optimum)
        return far**2 * (steeper if far > 0 else 1)

    counted = Counted(score)
    curve = search(stored, counted)
    assert len(counted.given) == len(curve.points) <= 12
    assert not curve.at_edge
    assert curve.best.decay == PowerLaw(curve.best.horizon)
    assert curve.best.score == min(counted.given)
    best = min(dense, key=lambda horizon: score(dense[horizon]))
    assert abs(math.log(curve.best.horizon / best)) <= math.log(1.05) + SPACING / 2


@pytest.mark.parametrize("optimum", [0.06, 0.08, 0.1])
def test_a_parabola_is_found_at_once(stored, optimum):
    """By the first evaluation after the first pass, as near as it can be read off the averages."""
    told: list[Curve] = []
    search(stored, from_optimum(optimum), progress=told.append)
    five, six = told[4:6]
    assert abs(math.log(five.best.horizon / optimum)) > 0.1
    assert abs(math.log(six.best.horizon / optimum)) < 0.05


@pytest.mark.parametrize("family", [PowerLaw, HalfLife])
def test_the_best_of_a_descent_is_that_of_a_dense_scan(stored, family):
    """Of averages that were there, at 100 horizons: no better than 1% of what the scores span."""
    score = Counted(loss)
    curve = search(stored, score, family)
    assert len(score.given) == len(curve.points) <= 12
    assert not curve.at_edge
    history = solve(stored, Uniform(), limit=math.inf).history
    exact = []
    for horizon in logspaced(*curve.supported, 100):
        clocks, shares = weights(history.under(family(horizon)))
        exact.append(loss({"w": shares @ states()[clocks].double()}))
    assert curve.best.score <= min(exact) + 0.01 * (max(exact) - min(exact))
    # And of what the files give: 100 averages in one pass.
    made = reconstruct(stored, [family(horizon) for horizon in logspaced(*curve.supported, 100)])
    best = min(map(loss, made))
    assert curve.best.score <= best * 1.01


def test_scores_are_those_of_the_averages_that_reconstruct_makes(stored):
    """With all that a model loads, in float32; the errors are those that solve predicts."""
    seen = []

    def score(average: dict[str, Tensor]) -> float:
        Run().load_state_dict(average)
        assert (average["w"].dtype, average["step"].item()) == (torch.float32, STEPS)
        seen.append(average["w"].clone())
        return loss(average)

    order: list[Curve] = []
    curve = search(stored, score, evaluations=5, progress=order.append)
    for w, before, after in zip(seen, [Curve(0, (0, 1), ()), *order], order, strict=False):
        (point,) = set(after.points) - set(before.points)
        (average,) = reconstruct(stored, [point.decay])
        assert torch.equal(average["w"], w)
        assert point.score == loss(average)
        solution = solve(stored, point.decay)
        assert point.predicted_error == pytest.approx(solution.predicted_error, rel=1e-9)
    assert curve == order[-1]


def test_an_earlier_average_is_searched_for_with_at(stored):
    """What was stored later takes no part; between ticks it is the one before."""
    score = Counted(lambda average: average["w"][0].item())
    with pytest.warns(UserWarning, match="than the longest"):
        curve = search(stored, score, at=300, evaluations=4)
    assert curve.at == 300
    assert max(score.given) < 300
    early = [path for path in stored if int(path.stem.split("-")[1]) <= 300]
    with pytest.warns(UserWarning, match="than the longest"):
        alone = search(early, score, evaluations=4)
    assert horizons(alone) == horizons(curve)
    assert [p.score for p in alone.points] == pytest.approx([p.score for p in curve.points])


def test_plain_checkpoints_are_searched_too(plain):
    """They give all averages of themselves, from a tick to the uniform one."""
    curve = search(plain, loss)
    assert curve.supported == (0.0334, 0.286)
    assert all(point.predicted_error < 1e-6 for point in curve.points)
    assert not curve.at_edge


def test_any_family_is_searched(stored):
    """A lambda whose number is a horizon: of the tail, of the decay per step."""
    tail = search(stored, loss, lambda share: After(round((1 - share) * STEPS), Uniform()))
    assert isinstance(tail.best.decay, After)
    steps = search(stored, loss, lambda n: Constant(1 - 1 / n))
    half = search(stored, loss, HalfLife)
    assert steps.best.score == pytest.approx(half.best.score, rel=0.01)
    assert steps.supported[0] == pytest.approx(half.supported[0] / math.log(2), rel=0.05)


# How far files reach ----------------------------------------------------------------------------


def histories(count: int, decays: Sequence[Decay] = WIDTHS, steps: int = STEPS) -> list[History]:
    whole = []
    for decay in decays:
        whole.append(History("a run"))
        for _ in range(steps):
            whole[-1].tick(decay, 1)
    return [one.until(steps * part // count) for one in whole for part in range(1, count + 1)]


@pytest.mark.parametrize("family", [PowerLaw, HalfLife])
@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize("limit", [0.05, 0.2])
def test_the_range_is_what_files_give(family, count, limit):
    """Within it solve gives all; 2% outside of it, unless the family ends there, none."""
    stored = histories(count)
    files = [File(str(i), one, 2.0**-24) for i, one in enumerate(stored)]
    low, high = reach(files, stored[-1], family, limit)
    for horizon in logspaced(low, high, 12):
        assert solve(stored, family(horizon), limit=limit).predicted_error <= limit
    for horizon in (low / 1.02, high * 1.02):
        with pytest.raises(ValueError, match=r"cannot give|std must be"):
            solve(stored, family(horizon), limit=limit)
    for end in (low, high):
        assert end == float(f"{end:.3g}")


def test_noise_of_storage_narrows_the_range():
    """bfloat16 files give less than float32 ones, as solve says."""
    stored = histories(12)
    ends = [
        reach([File("", one, unit) for one in stored], stored[-1], PowerLaw, 0.2)
        for unit in (2.0**-24, 2.0**-8)
    ]
    assert ends[0][0] < ends[1][0]
    assert ends[0][1] >= ends[1][1]


def test_without_a_limit_the_range_is_that_of_the_family():
    """From one tick to the uniform average, or in units of the clock to the whole history."""
    stored = histories(3)
    files = [File("", one, 2.0**-24) for one in stored]
    low, high = reach(files, stored[-1], PowerLaw, math.inf)
    assert low == pytest.approx(1 / STEPS, rel=0.01)
    assert 0.98 / math.sqrt(12) < high < 1 / math.sqrt(12)
    assert reach(files, stored[-1], HalfLife, math.inf) == (1.0, 600.0)


@pytest.mark.parametrize(("limit", "ratio"), [(0.05, 1.2), (0.01, 1.05)])
def test_what_is_stored_alone_is_found(limit, ratio):
    """One average whose relatives are few: those that are nearest to it are searched."""
    one = histories(1, [PowerLaw(0.0777)])
    low, high = reach([File("", one[0], 2.0**-24)], one[0], PowerLaw, limit)
    assert 0.0777 / ratio < low < 0.0777 < high < 0.0777 * ratio


def test_one_horizon_alone_is_nothing_to_search():
    """The average that is stored is there, and within the limit nothing else is."""
    one = histories(1, [PowerLaw(1 / STEPS)])
    with pytest.raises(ValueError, match=r"files give nothing but PowerLaw\(std=0\.0016.*: store"):
        reach([File("", one[0], 2.0**-24)], one[0], PowerLaw, 1e-5)


# Edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sign", "end"), [(1, "longest"), (-1, "shortest")])
def test_a_best_at_the_end_of_what_files_give_is_warned_of(stored, sign, end):
    """With what to store next time; the search goes towards it."""
    score = Counted(lambda average: sign * average["w"][0].item())
    with pytest.warns(UserWarning, match=f"none is better than the {end}, PowerLaw") as told:
        curve = search(stored, score)
    assert curve.at_edge
    place = 1 if sign == 1 else 0
    assert curve.best.horizon == curve.supported[place]
    text = str(told[0].message)
    low, high = curve.supported
    assert f"But {low:g} to {high:g} is all that the files give within limit=0.2: store ave" in text
    assert f"averages of a {'larger' if sign == 1 else 'smaller'} width too" in text
    assert told[0].filename == __file__
    ends = sorted(horizons(curve), reverse=sign == 1)[:2]
    assert abs(math.log(ends[0] / ends[1])) < math.log(1.05)
    assert len(score.given) < 12


@pytest.mark.parametrize("sign", [1, -1])
def test_a_best_at_the_end_of_the_users_range_tells_to_widen_it(stored, sign):
    """And what is typed then goes on from there, without evaluating anything twice."""
    score = Counted(lambda average: sign * math.log(std(average) / 0.07))
    with pytest.warns(UserWarning, match="The files give") as told:
        curve = search(stored, score, between=(0.06, 0.09))
    assert horizons(curve)[0] == 0.06
    assert horizons(curve)[-1] == 0.09
    low, high = curve.supported
    wider = (low, 0.09) if sign == 1 else (0.06, high)
    assert (
        f"pass between={wider}, and go on from here with start=curve and "
        f"evaluations={2 * len(curve.points)}" in str(told[0].message)
    )
    count = len(score.given)
    with pytest.warns(UserWarning, match="is all that the files give"):
        wide = search(stored, score, between=wider, start=curve, evaluations=2 * len(curve.points))
    assert len(score.given) == len(wide.points) > count
    assert set(curve.points) < set(wide.points)
    assert wide.best.horizon == (low if sign == 1 else high)


def test_a_best_inside_is_not_warned_of(stored):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(stored, from_optimum(0.08))


# What is known already --------------------------------------------------------------------------


def test_progress_is_told_of_each_evaluation_and_start_goes_on(stored):
    """Whatever was evaluated before it stopped, it ends as if it had not."""
    told: list[Curve] = []
    whole = search(stored, loss, progress=told.append)
    assert [len(curve.points) for curve in told] == list(range(1, len(whole.points) + 1))
    assert told[-1] == whole
    for curve in (told[0], told[3], told[7], whole):  # in both passes, and at the end
        score = Counted(loss)
        start = Curve.from_dict(json.loads(json.dumps(curve.to_dict())))
        assert search(stored, score, start=start) == whole
        assert len(score.given) == len(whole.points) - len(curve.points)


def test_what_evaluate_raises_is_passed_on_and_nothing_is_lost(stored):
    told: list[Curve] = []

    def broken(average: dict[str, Tensor]) -> float:
        if len(told) == 4:
            raise RuntimeError("out of memory")
        return loss(average)

    with pytest.raises(RuntimeError, match="out of memory"):
        search(stored, broken, progress=told.append)
    assert search(stored, loss, start=told[-1]) == search(stored, loss)


def test_more_evaluations_refine_what_is_known(stored):
    """What is near to what is known is not evaluated again in the first pass."""
    curve = search(stored, loss, evaluations=6)
    score = Counted(loss)
    finer = search(stored, score, evaluations=16, start=curve)
    assert set(curve.points) <= set(finer.points)
    assert len(score.given) == len(finer.points) - 6
    assert finer.best.score <= curve.best.score
    found = horizons(finer)
    assert all(b / a > 1.0099 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("between", [(0.1, 0.2), (0.03, 0.08)])
def test_a_part_of_what_is_known_is_looked_at_more_closely(stored, between):
    """What is known outside of the range stays; all that is new is within it, its ends too."""
    curve = search(stored, loss, evaluations=6)
    part = search(stored, loss, between=between, start=curve, evaluations=14)
    new = {point.horizon for point in set(part.points) - set(curve.points)}
    assert set(curve.points) <= set(part.points)
    assert len(new) > 3
    assert all(between[0] <= horizon <= between[1] for horizon in new)
    assert set(between) <= new


def test_the_ends_of_a_range_are_evaluated(stored):
    """Unless what is known is within 1% of them, and of what is inside only what is far from it."""
    score = from_optimum(0.075)
    curve = search(stored, score, between=(0.06, 0.09), evaluations=3)
    wide = search(stored, score, between=(0.055, 0.0904), start=curve, evaluations=6)
    assert {0.055, *horizons(curve)} < set(horizons(wide))
    assert max(horizons(wide)) == 0.09


def test_what_is_known_counts(stored):
    """A curve has at most as many points as were asked for; one that has more gets none."""
    curve = search(stored, loss, between=(0.1, 0.2), evaluations=8)
    score = Counted(loss)
    wide = search(stored, score, start=curve, evaluations=len(curve.points) + 1)
    assert len(score.given) == 1
    assert len(wide.points) == len(curve.points) + 1
    assert search(stored, nothing, start=wide, evaluations=3) == wide


def test_a_start_of_something_else_is_refused(stored):
    """Of another clock, of another family, no curve at all."""
    curve = search(stored, loss, evaluations=3)
    with pytest.raises(ValueError, match="at the clock 600, and these are at 300: pass at=600, or"):
        search(stored, loss, start=curve, at=300)
    with pytest.raises(ValueError, match=r"start has PowerLaw\(.*\) for the horizon .*HalfLife"):
        search(stored, loss, HalfLife, start=curve)
    long = search(stored, loss, HalfLife, evaluations=3)
    with pytest.raises(ValueError, match=r"start has HalfLife\(.* pass the family that it was"):
        search(stored, loss, start=long)
    with pytest.raises(TypeError, match=r"start is a curve, not \{'at.*Curve.from_dict\(\.\.\.\)"):
        search(stored, loss, start=curve.to_dict())


# Scores -----------------------------------------------------------------------------------------


def test_scores_that_are_not_finite_are_the_worst_and_stay(stored):
    """The best is found beside them, and they are in what is stored."""

    def score(average: dict[str, Tensor]) -> float:
        width = std(average)
        if width > 0.2:
            return math.nan
        return -math.inf if width < 0.03 else from_optimum(0.1)(average)

    curve = search(stored, score)
    assert curve.best.horizon == pytest.approx(0.1, rel=0.05)
    scores = [point.score for point in curve.points]
    assert scores[0] == -math.inf
    assert math.isnan(scores[-1])
    text = json.dumps(curve.to_dict(), allow_nan=False)
    again = Curve.from_dict(json.loads(text))
    assert json.dumps(again.to_dict()) == text
    assert repr(again) == repr(curve)


def test_no_finite_score_at_all_is_an_error(stored):
    """After the first pass, which is listed and which progress was told of."""
    score, told = Counted(lambda average: math.nan), []
    with pytest.raises(ValueError, match="no score of 5 horizons is finite") as error:
        search(stored, score, progress=told.append)
    assert len(score.given) == len(told) == 5
    for point in told[-1].points:
        assert f"\n  {point.decay!r}: nan" in str(error.value)
    with pytest.raises(ValueError, match="no score of 5 horizons is finite"):
        search(stored, score, start=told[-1])
    assert len(score.given) == 5


@pytest.mark.parametrize(
    "number",
    [1, 0.5, torch.tensor(0.5), torch.tensor(3), np.float32(0.5), np.float64(0.5)],
    ids=repr,
)
def test_numbers_of_all_kinds_are_scores(stored, number):
    """Equal scores: the shortest of them is the best, and there is nothing to warn of."""
    curve = search(stored, lambda average: number, evaluations=3)
    assert all(type(point.score) is float for point in curve.points)
    assert curve.best is curve.points[0]


@pytest.mark.parametrize(
    "wrong", [None, "0.5", True, torch.zeros(1), torch.tensor(1j), torch.tensor(True), 1j], ids=repr
)
def test_what_is_no_number_is_no_score(stored, wrong):
    with pytest.raises(TypeError, match=r"evaluate returned .* for PowerLaw\(.*\): return one num"):
        search(stored, lambda average: wrong)


def test_one_average_is_in_memory_at_a_time(stored):
    """The one before is gone when the next one comes."""
    last: list[weakref.ref[Tensor]] = []

    def score(average: dict[str, Tensor]) -> float:
        assert all(one() is None for one in last)
        last[:] = [weakref.ref(average["w"])]
        return loss(average)

    search(stored, score, evaluations=4)
    assert last


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the process has open from /proc")
def test_no_file_is_open_while_an_average_is_evaluated(stored):
    def score(average: dict[str, Tensor]) -> float:
        handles = [handle.resolve() for handle in Path("/proc/self/fd").iterdir()]
        assert not set(handles) & {path.resolve() for path in stored}
        assert str(stored[0].parent) not in Path("/proc/self/maps").read_text()
        return loss(average)

    search(stored, score, evaluations=3)


# Curves -----------------------------------------------------------------------------------------


def curve_of(*scores: float) -> Curve:
    points = [Point(h / 100, PowerLaw(h / 100), score, 0.01) for h, score in enumerate(scores, 3)]
    return Curve(1000, (0.02, 0.25), tuple(reversed(points)))


def test_curves_are_in_order_and_know_their_best():
    assert horizons(curve_of(3, 1, 2)) == [0.03, 0.04, 0.05]
    assert curve_of(3, 1, 2).best.horizon == 0.04
    assert not curve_of(3, 1, 2).at_edge
    assert curve_of(1, 2, 3).at_edge
    assert curve_of(3, 2, 1).at_edge
    assert curve_of(3, 2, 2).at_edge
    assert not curve_of(2, 2, 2).at_edge
    assert not curve_of(1).at_edge
    assert curve_of(2, 1, 1, 3).best.horizon == 0.04, "of equals the shorter one"
    assert curve_of(math.nan, 1, math.nan).best.horizon == 0.04
    with pytest.raises(ValueError, match="evaluate a horizon first"):
        _ = Curve(0, (0.1, 0.2), ()).best


@pytest.mark.parametrize("family", [PowerLaw, HalfLife])
def test_curves_are_read_back_as_they_were(stored, family):
    """All digits, through JSON that any program reads."""
    curve = search(stored, loss, family, evaluations=5)
    text = json.dumps(curve.to_dict(), allow_nan=False)
    assert Curve.from_dict(json.loads(text)) == curve
    assert json.loads(text)["points"][0]["decay"]["type"] == family.__name__


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"at": None}, "at is a clock, and not None"),
        ({"at": -1}, "at is a clock, and not -1"),
        ({"supported": [0.1]}, "not enough values"),
        ({"supported": [0.1, "0.2"]}, "supported is a finite number, and not '0.2'"),
        ({"points": [{}]}, "KeyError: 'horizon'"),
        ({"points": [3]}, "TypeError"),
        ({"points": {"horizon": -1.0}}, "horizon is positive, and not -1.0"),
        ({"points": {"horizon": True}}, "horizon is a finite number, and not True"),
        ({"points": {"decay": {"type": "Nothing"}}}, "unknown decay type 'Nothing'"),
        ({"points": {"decay": {"type": "opaque", "repr": "<Own>"}}}, "an object of the program"),
        ({"points": {"score": "good"}}, "score is a finite number, and not 'good'"),
        ({"points": {"score": math.nan}}, "score is a finite number, and not nan"),
        ({"points": {"predicted_error": None}}, "predicted_error is a finite number, and not No"),
    ],
)
def test_what_is_no_curve_is_refused(change, reason):
    values = curve_of(2, 1, 3).to_dict()
    if isinstance(change.get("points"), dict):
        values["points"][1] |= change["points"]
    else:
        values |= change
    with pytest.raises(ValueError, match="this is no curve") as error:
        Curve.from_dict(values)
    assert reason in str(error.value)
    assert "pass what Curve.to_dict returned" in str(error.value)


def test_a_horizon_that_is_there_twice_is_refused():
    values = curve_of(2, 1).to_dict()
    values["points"].append(values["points"][0])
    with pytest.raises(ValueError, match=r"the horizon 0\.03 is there twice"):
        Curve.from_dict(values)
    with pytest.raises(ValueError, match="this is no curve"):
        Curve.from_dict([])  # type: ignore[arg-type]


# What is refused --------------------------------------------------------------------------------


def nothing(average: dict[str, Tensor]) -> float:
    raise AssertionError("nothing is evaluated")


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"evaluations": 2}, ValueError, "evaluations=2 cannot tell .* so write 3 or more"),
        ({"evaluations": 5.0}, TypeError, r"evaluations is a count, not 5\.0: write evaluations="),
        ({"between": (0.1, 0.05)}, ValueError, r"\(0\.1, 0\.05\) is no range: write the shorter"),
        ({"between": (0, 0.05)}, ValueError, "is no range"),
        ({"between": (0.05, math.inf)}, ValueError, "is no range"),
        ({"between": 0.1}, TypeError, r"between is two horizons, not 0\.1: write between=\(0\.05"),
        ({"between": ("a", "b")}, TypeError, "between is two horizons"),
        (
            {"between": (0.001, 0.1)},
            ValueError,
            r"which are horizons from 0\.0\d* to 0\.2\d*:",
        ),
        ({"between": (0.1, 0.5)}, ValueError, r"\(0\.1, 0\.5\) is not all within limit=0\.2 of"),
        ({"at": 10}, ValueError, "nothing is stored at or before the clock 10"),
        ({"at": 601}, ValueError, "tells of the clocks 0 to 600, not of at=601"),
        ({"family": lambda h: "no decay"}, TypeError, "a decay is a float or a decay value"),
        ({"family": lambda h: PowerLaw(-h)}, ValueError, "makes no decay of any horizon from"),
        ({"limit": 1e-12}, ValueError, r"these 24 files cannot give PowerLaw\(std=.* at the clock"),
    ],
)
def test_what_cannot_be_searched_is_refused(stored, how, error, words):
    """Before anything is evaluated."""
    with pytest.raises(error, match=words):
        search(stored, nothing, **how)


def test_files_that_cannot_be_searched_are_refused(stored, plain):
    """Bare histories; states of one clock; averages that give none of their family but one."""
    with pytest.raises(TypeError, match="a history has no tensors to evaluate: pass the path"):
        search(histories(2), nothing)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass a list of paths"):
        search(str(stored[0]), nothing)
    with pytest.raises(TypeError, match="evaluate is what scores an average, not 3: pass a func"):
        search(stored, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tell of one state, at the clock 20"):
        search(plain[:1], nothing)
    with pytest.raises(ValueError, match="these 1 files cannot give HalfLife"):
        search(stored[-1:], nothing, HalfLife, limit=0.01)


def test_a_plateau_that_reaches_the_end_is_warned_of(stored):
    """A better one may lie beyond it, although one before the end is as good."""
    with pytest.warns(UserWarning, match="none is better than the longest"):
        curve = search(stored, lambda average: max(0.1 - std(average), 0.0), evaluations=6)
    assert curve.best.horizon < curve.points[-1].horizon
    assert curve.at_edge


def test_what_is_no_family_of_horizons_is_refused(stored):
    with pytest.raises(TypeError, match=r"family makes a decay.*between="):
        search(stored, loss, [0.05, 0.1])
    with pytest.raises(ValueError, match="which is no horizon: pass HalfLife"):
        search(stored, loss, Constant)


@pytest.mark.parametrize("limit", [math.nan, -1.0])
def test_what_is_no_limit_is_refused(stored, limit):
    """Of a search, of a solution, and of what is made."""
    for call in (
        lambda: search(stored, loss, limit=limit),
        lambda: solve(stored, PowerLaw(0.07), limit=limit),
        lambda: reconstruct(stored, [PowerLaw(0.07)], limit=limit),
    ):
        with pytest.raises(ValueError, match="is the largest predicted error"):
            call()


def test_a_known_point_beside_the_range_stands_for_its_end(stored):
    """The optimum is near it, and found: it is a neighbor of what is tried."""
    score = Counted(lambda average: math.log(std(average) / 0.105) ** 2)
    with pytest.warns(UserWarning, match="none is better than the shortest"):
        known = search(stored, score, between=(0.0995, 0.2009), evaluations=3)
    start = Curve(known.at, known.supported, (known.points[0], known.points[-1]))
    curve = search(stored, score, between=(0.1, 0.2), start=start)
    assert abs(math.log(curve.best.horizon / 0.105)) < 0.05
