"""Pictures: their lines are the numbers, whatever the number of states, and no state is shared."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import nn

from polyak import EMA, plot
from polyak.decay import After, Constant, Cosine, Debiased, Decay, HalfLife, PowerLaw, Uniform
from polyak.posthoc import Curve, Point, Snapshot, solve
from polyak.posthoc.fit import LIMIT, NOISE
from polyak.profile import History, moments, weights

EPS = 2.0**-52
DECAYS: dict[str, Decay] = {
    "narrow": PowerLaw(0.05),
    "uniform": Uniform(),
    "debiased": Debiased(HalfLife(100)),
    "cold": Constant(0.999),
    "tail": After(700, Uniform()),
    "teacher": Cosine(0.99, 1.0, 1000),
}


def ticked(decay: Decay, ticks: int, every: int = 1, origin: int = 0) -> History:
    """The history of an average that was updated at even clocks."""
    history = History("a run", origin)
    for _ in range(ticks):
        history.tick(decay, every)
    return history


def snapshots(
    count: int = 8, steps: int = 2000, decays: Sequence[Decay] = (PowerLaw(0.05), PowerLaw(0.10))
) -> list[History]:
    whole = [ticked(decay, steps) for decay in decays]
    return [h.until(steps * part // count) for h in whole for part in range(1, count + 1)]


def stairs(axes: Axes, number: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The edges and the heights of a line that is drawn as steps."""
    line = axes.lines[number]
    assert line.get_drawstyle() == "steps-pre"
    x, y = (torch.tensor(list(values), dtype=torch.float64) for values in line.get_data())
    assert y[0] == y[1]
    return x, y[1:]


def legend(axes: Axes) -> list[str]:
    found = axes.get_legend()
    assert found is not None
    return [text.get_text() for text in found.get_texts()]


def curve(family: Any = PowerLaw, horizons: Sequence[float] = (0.05, 0.08, 0.12)) -> Curve:
    scores = [3.0 + abs(number - 1) for number in range(len(horizons))]
    points = zip(horizons, scores, strict=True)
    return Curve(
        1000,
        (min(horizons) / 2, max(horizons) * 2),
        tuple(Point(h, family(h), s, 0.01 * s) for h, s in points),
    )


# ------------------------------------------------------------------------------------ profiles


@pytest.mark.parametrize("name", DECAYS)
def test_few_states_are_drawn_one_by_one(name: str) -> None:
    """The height of each is its share, by the length of its tick."""
    history = ticked(DECAYS[name], 120, every=25)
    clocks, shares = weights(history)
    x, y = stairs(plot.profiles({name: history}).axes[0])
    assert torch.equal(x[1:], clocks.double())
    assert x[0] == -25  # the first state stands for as long a time as the tick after it
    torch.testing.assert_close(y, shares / 25, rtol=0, atol=120 * EPS)  # 120 sums up to 1
    assert math.isclose((25 * y).sum().item(), 1, abs_tol=1e-9)


@pytest.mark.parametrize("name", DECAYS)
def test_the_area_of_many_states_is_1_and_no_state_is_far_from_its_place(name: str) -> None:
    """Each step ends at a state and has the shares of its own: the sums so far are equal there.

    A step is no wider than an n-th of the states, so the mean age is as near.
    """
    ticks = 50_000
    history = ticked(DECAYS[name], ticks)
    _, shares = weights(history)
    x, y = stairs(plot.profiles({name: history}).axes[0])
    rounding = 2 * ticks * EPS  # two sums of shares that are 1 together
    assert len(y) < 2000
    sums = (y * x.diff()).cumsum(0)
    assert abs(sums[-1].item() - 1) < rounding
    torch.testing.assert_close(sums, shares.cumsum(0)[x[1:].long()], rtol=0, atol=rounding)
    widest = math.ceil(ticks / (plot._POINTS - 1)) + 1
    assert x.diff().max() <= widest
    mean = (y * x.diff() * (ticks - (x[1:] + x[:-1]) / 2)).sum().item()
    assert abs(mean - moments(history).mean_age) <= widest / 2 + 0.5


def test_steps_that_are_too_few_would_be_noticed() -> None:
    """The bounds above are not empty: of every 200th state the mean age is off by more."""
    ticks = 50_000
    clocks, shares = weights(ticked(Constant(0.9), ticks))
    coarse = slice(0, None, 200)
    heights = shares.cumsum(0)[coarse].diff() / clocks[coarse].diff()
    middles = (clocks[coarse][1:] + clocks[coarse][:-1]) / 2
    mean = (heights * clocks[coarse].diff() * (ticks - middles)).sum().item()
    assert abs(mean - 9) > math.ceil(ticks / (plot._POINTS - 1)) / 2 + 1


def test_a_peak_is_as_high_as_it_is_however_narrow() -> None:
    """The newest states of a short average among many have steps of their own."""
    history = ticked(Constant(0.9), 50_000)
    _, y = stairs(plot.profiles({"short": history}).axes[0])
    rounding = 2 * 50_000 * EPS
    assert abs(y[-1].item() - 0.1) < rounding
    assert abs(y[-2].item() - 0.09) < rounding


def test_a_state_that_is_heavy_has_a_step_of_its_own() -> None:
    """Where an average was moved once, in the middle of many states."""
    history = ticked(Constant(1.0), 12_345)
    history.tick(Constant(0.8), 1)
    for _ in range(20_000):
        history.tick(Constant(1.0), 1)
    x, y = stairs(plot.profiles({"moved once": history}).axes[0])
    (step,) = y[1:].nonzero()[:, 0] + 1
    assert (x[step], x[step + 1]) == (12_345, 12_346)
    assert math.isclose(y[step].item(), 0.2, rel_tol=1e-12)


def test_the_legend_has_the_moments() -> None:
    figure = plot.profiles(DECAYS, at=5000)
    for text, (name, decay) in zip(legend(figure.axes[0]), DECAYS.items(), strict=True):
        expected = moments(ticked(decay, 5000))
        found = re.match(r"(.*): mean age ([\d.,]+), width ([\d.,]+)", text)
        assert found is not None
        assert found[1] == name
        for number, value in ((2, expected.mean_age), (3, expected.deviation)):
            assert found[number] == (f"{value:,.0f}" if value >= 100 else f"{value:.3g}")


def test_a_first_state_that_is_much_is_named() -> None:
    cold, warm = legend(plot.profiles({"c": Constant(0.999), "w": Debiased(0.999)}, 500).axes[0])
    assert cold.endswith(f", first state {100 * 0.999**500:.2g} %")
    assert "first" not in warm


def test_a_decay_beside_a_history_is_of_the_same_ticks() -> None:
    history = ticked(PowerLaw(0.10), 40, every=50)
    axes = plot.profiles({"mine": history, "other": Uniform()}).axes[0]
    x, y = stairs(axes, 1)
    assert torch.equal(x, stairs(axes, 0)[0])
    torch.testing.assert_close(y[1:], torch.full((40,), 1 / 2000, dtype=torch.float64))


def test_long_and_short_ticks_compare() -> None:
    """An average of every 10th state lies on the one of every state."""
    every, some = ticked(PowerLaw(0.10), 1000), ticked(PowerLaw(0.10), 100, every=10)
    axes = plot.profiles({"1": every, "10": some}).axes[0]
    (_, dense), (_, sparse) = stairs(axes, 0), stairs(axes, 1)
    # By the cadence law a long tick has the shares of the short ones in it.
    _, shares = weights(every)
    torch.testing.assert_close(sparse[1:], shares[1:].view(100, 10).mean(1), rtol=1e-9, atol=1e-15)
    assert math.isclose(dense[-1].item(), sparse[-1].item(), rel_tol=0.05)


def test_at_is_the_clock_of_all() -> None:
    history = ticked(PowerLaw(0.10), 300)
    axes = plot.profiles({"mine": history, "other": 0.99}, at=200).axes[0]
    assert [stairs(axes, number)[0][-1] for number in (0, 1)] == [200, 200]
    assert legend(axes)[0] == legend(plot.profiles({"mine": history.until(200)}).axes[0])[0]


def test_shares_that_differ_a_lot_are_on_a_logarithmic_axis() -> None:
    alike = plot.profiles({"a": PowerLaw(0.05), "b": PowerLaw(0.10)}, at=1000).axes[0]
    apart = plot.profiles({"a": Constant(0.5), "b": Uniform()}, at=1000).axes[0]
    assert (alike.get_yscale(), apart.get_yscale()) == ("linear", "log")
    assert alike.get_ylim()[0] == 0


@pytest.mark.parametrize(
    "history",
    [History("a run"), ticked(Constant(1.0), 10), ticked(Uniform(), 1), ticked(Constant(0.0), 10)],
    ids=["one state", "never moved", "two states", "copies"],
)
def test_averages_that_hardly_are_ones_are_drawn(history: History, tmp_path: Path) -> None:
    figure = plot.profiles({"all of it": history, "beside": Uniform()})
    assert math.isclose(sum((y * x.diff()).sum() for x, y in [stairs(figure.axes[0])]), 1)
    plot.save(figure, tmp_path / "picture.png")


def test_profiles_draw_into_axes_that_are_there() -> None:
    figure = Figure(facecolor="#abcdef")
    sub, _ = figure.subfigures(1, 2)
    axes = sub.subplots()
    assert plot.profiles({"a": Uniform()}, at=10, axes=axes) is figure
    assert len(axes.lines) == 1
    assert to_rgb(figure.get_facecolor()) == to_rgb("#abcdef")
    assert figure.get_suptitle() == ""


@pytest.mark.parametrize(
    ("averages", "at", "error", "message"),
    [
        ({}, 10, TypeError, 'pass a dictionary, such as {"wide": PowerLaw(0.10)}'),
        (PowerLaw(0.1), 10, TypeError, "by name"),
        ({"a": "wide"}, 10, TypeError, "a decay is a float or a decay value, not 'wide'"),
        ({"a": PowerLaw(0.1)}, None, ValueError, "at=None: pass the number of ticks"),
        ({"a": PowerLaw(0.1)}, 0, ValueError, "at=0: pass the number of ticks"),
        ({"a": PowerLaw(0.1)}, 10.0, TypeError, "at is a clock, an integer, not 10.0"),
        ({"a": History("a run", 7)}, 8, ValueError, "clocks up to 7, not of at=8"),
        ({"a": Uniform()}, 10**9, ValueError, "1,000,000,000 ticks are more than can be drawn"),
        ({str(n): Uniform() for n in range(9)}, 9, ValueError, "9 averages, and up to 8 lines"),
    ],
)
def test_profiles_say_what_is_wrong(
    averages: Any, at: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        plot.profiles(averages, at)


# ----------------------------------------------------------------------------- approximations


@pytest.mark.parametrize("target", [PowerLaw(0.07), Debiased(HalfLife(300)), Uniform()])
def test_an_approximation_is_the_sum_of_its_files(target: Decay) -> None:
    """Of 400 states each has its own step: the lines are the target, the sum and the difference."""
    files = snapshots(4, steps=400)
    figure = plot.approximation(files, target)
    above, below, parts = figure.axes
    solution = solve(files, target, limit=math.inf)
    clocks, wanted = weights(solution.history)
    total = torch.zeros_like(wanted)
    for c, history in zip(solution.coefficients, files, strict=True):
        own, shares = weights(history)
        total[torch.searchsorted(clocks, own)] += c * shares
    # The sums so far are rounded as often as there are states, by coefficients that are not large.
    rounding = 2 * 400 * EPS * solution.amplification
    x, y = stairs(above)
    assert torch.equal(x[1:], clocks.double())
    torch.testing.assert_close(y, total, rtol=0, atol=rounding)
    _, off = stairs(below)
    peak = wanted[1:].max()
    torch.testing.assert_close(
        off, 100 * (total - wanted) / peak, rtol=0, atol=(100 * rounding / peak).item()
    )
    left = (off * peak / 100).norm() / wanted.norm()
    assert math.isclose(left.item(), solution.predicted_error, rel_tol=1e-6)
    drawn = {
        (clock, size)
        for line in parts.lines
        if line.get_marker() != "None"
        for clock, size in zip(*line.get_data(), strict=True)
    }
    given = zip((history.clock for history in files), solution.coefficients, strict=True)
    assert drawn == set(given)
    assert legend(parts) == ["PowerLaw(std=0.05)", "PowerLaw(std=0.1)"]


def test_an_approximation_marks_the_clocks_of_its_files_and_names_its_error() -> None:
    files = snapshots(4)
    figure = plot.approximation(files, PowerLaw(0.07), at=1500)
    (rug,) = [line for line in figure.axes[0].lines if line.get_marker() == "|"]
    assert list(rug.get_xdata()) == [500, 1000, 1500]
    error = solve(files, PowerLaw(0.07), at=1500).predicted_error
    assert figure.get_suptitle() == (
        f"PowerLaw(std=0.07) at the clock 1,500\nfrom 6 files: predicted error {100 * error:.2g} %"
    )


def test_an_approximation_that_would_be_refused_is_drawn() -> None:
    """What is wrong with it is what the picture is for."""
    with pytest.raises(ValueError, match="cannot give"):
        solve(snapshots(4), HalfLife(2))
    assert "predicted error 9" in plot.approximation(snapshots(4), HalfLife(2)).get_suptitle()


def test_an_approximation_of_files_that_are_far_apart_is_that_of_each() -> None:
    """The shares of the older ones are less than a float holds, seen from the newest."""
    decay = Constant(0.5)
    whole = ticked(decay, 4000)
    files = [whole.until(1500), whole]
    edges = torch.tensor([-1.0, 1499.0, 1500.0, 3999.0, 4000.0], dtype=torch.float64)
    found = plot._mixed(files, [0.25, 0.75], edges)
    expected = torch.tensor([0.125, 0.125, 0.375, 0.375], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=4000 * EPS)


def test_an_approximation_reads_files(tmp_path: Path) -> None:
    """Those of an EMA, and plain checkpoints beside them."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    ema, files = EMA(model, PowerLaw(0.10)), []
    for step in range(1, 101):
        ema.update(step)
        if step % 25 == 0:
            files.append(tmp_path / f"{step}.safetensors")
            ema.save(files[-1])
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    figure = plot.approximation([*files, Snapshot(tmp_path / "plain.pt", 60)], PowerLaw(0.15))
    assert legend(figure.axes[2]) == ["PowerLaw(std=0.1)", "weights of the run"]
    assert list(figure.axes[0].lines[1].get_xdata()) == [25, 50, 60, 75, 100]
    noise = plot.errors(files).axes[1].lines[0].get_data()
    solution = solve(files, PowerLaw(0.10))
    there = list(noise[0]).index(0.10)
    assert math.isclose(noise[1][there], 100 * solution.storage_noise)


def test_an_approximation_of_checkpoints_alone_has_their_steps() -> None:
    files = [History("a run", clock) for clock in (100, 200, 400)]
    figure = plot.approximation(files, Uniform())
    x, y = stairs(figure.axes[0])
    # The first file is as long as the time to the next. In it is a quarter of all: 100 of 400.
    assert x.tolist() == [0, 100, 200, 400]
    torch.testing.assert_close((y * x.diff()).sum().item(), 1.0)
    torch.testing.assert_close(y[1:], torch.full((2,), 1 / 400, dtype=torch.float64))


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("at", [None, 1600])
def test_errors_are_those_of_solve(at: int | None) -> None:
    """Bit for bit up to the order of sums, of which there are as many as states."""
    files = snapshots(8)
    above, below = plot.errors(files, at).axes
    widths, drawn = above.lines[0].get_data()
    _, noise = below.lines[0].get_data()
    assert len(widths) > 30
    for number in range(0, len(widths), 5):
        solution = solve(files, PowerLaw(float(widths[number])), at, limit=math.inf)
        # An error is a root of a difference of squares, which is rounded to sqrt(EPS) of them.
        assert math.isclose(drawn[number], 100 * solution.predicted_error, abs_tol=1e-5)
        assert math.isclose(noise[number], 100 * solution.storage_noise, rel_tol=1e-4)


def test_errors_show_what_is_stored_and_what_is_within_the_limits() -> None:
    files = snapshots(8)
    above, below = plot.errors(files).axes
    widths, drawn = (list(values) for values in above.lines[0].get_data())
    for width in (0.05, 0.10):
        assert drawn[widths.index(width)] == 0
    for axes, limit in ((above, LIMIT), (below, NOISE)):
        upright = {line.get_xdata()[0] for line in axes.lines[1:] if line.get_xdata()[1] != 1}
        assert {0.05, 0.10} <= upright
        assert any(list(line.get_ydata()) == [100 * limit] * 2 for line in axes.lines)
    good = [w for w, error in zip(widths, drawn, strict=True) if error <= 100 * LIMIT]
    for axes in (above, below):
        (band,) = axes.patches
        assert band.get_extents().transformed(axes.transData.inverted()).x0 == pytest.approx(
            good[0]
        )
        assert band.get_extents().transformed(axes.transData.inverted()).x1 == pytest.approx(
            good[-1]
        )
    assert f"within both: {good[0]:.3g} to {good[-1]:.3g}" in legend(above)


def test_errors_of_files_that_give_nothing_say_so() -> None:
    figure = plot.errors(snapshots(8), at=1900)
    assert figure.get_suptitle().endswith("from 14 files: nothing within the limits")
    assert not figure.axes[0].patches


def test_a_width_of_another_decay_is_the_deviation_of_its_ages() -> None:
    history = ticked(Debiased(HalfLife(100)), 2000)
    expected = moments(history).deviation / 2000
    assert plot._stored_widths([history.until(1000), history]) == [expected]


# -------------------------------------------------------------------------------------- scores


def test_scores_mark_the_best() -> None:
    found = curve()
    figure = plot.scores(found, {"raw weights": 4.5})
    above, below = figure.axes
    horizons, scores = above.lines[0].get_data()
    assert list(zip(horizons, scores, strict=True)) == [(p.horizon, p.score) for p in found.points]
    (star,) = [line for line in above.lines if line.get_marker() == "*"]
    assert (*star.get_xdata(), *star.get_ydata()) == (found.best.horizon, found.best.score)
    assert list(below.lines[0].get_ydata()) == [100 * p.predicted_error for p in found.points]
    assert "PowerLaw(std=0.08)" in figure.get_suptitle()
    assert "edge" not in figure.get_suptitle()
    for axes in (above, below):
        (band,) = axes.patches
        extent = band.get_extents().transformed(axes.transData.inverted())
        assert (extent.x0, extent.x1) == pytest.approx(found.supported)


def test_a_best_at_the_edge_is_called_so() -> None:
    at_edge = Curve(1000, (0.01, 0.2), curve().points[:2])
    assert at_edge.at_edge
    assert "at the edge" in plot.scores(at_edge).get_suptitle()


def test_references_are_lines_and_a_far_one_does_not_flatten_the_curve() -> None:
    """The scores are 3 to 4."""
    figure = plot.scores(curve(), {"near": 4.5, "far": 1000.0, "best": 0.0})
    above = figure.axes[0]
    for value in (4.5, 1000.0, 0.0):
        assert any(list(line.get_ydata()) == [value] * 2 for line in above.lines)
    assert {"near: 4.5", "far: 1000 (above)", "best: 0 (below)"} <= set(legend(above))
    low, high = above.get_ylim()
    assert 0 < low < 3 < 4.5 < high < 10


def test_scores_that_are_not_finite_are_left_out_of_the_view() -> None:
    points = [*curve().points, Point(0.2, PowerLaw(0.2), math.inf, 0.01)]
    above = plot.scores(Curve(1000, (0.01, 0.25), tuple(points))).axes[0]
    assert above.get_ylim()[1] < 5
    one = Curve(1000, (0.01, 0.25), tuple(points[:1]))
    assert plot.scores(one, {"raw": 9.0}).axes[0].get_ylim()[1] > 9


@pytest.mark.parametrize(
    ("family", "label"),
    [
        (PowerLaw, "width of the average (std), share of the run so far"),
        (HalfLife, "half-life of the average, in units of the clock"),
        (lambda h: Debiased(HalfLife(h)), "half-life of the average, in units of the clock"),
        (Constant, "horizon, as Constant takes it"),
    ],
)
def test_a_horizon_has_the_unit_of_its_family(family: Any, label: str) -> None:
    assert plot.scores(curve(family)).axes[1].get_xlabel() == label


def test_scores_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="nothing was evaluated"):
        plot.scores(Curve(1000, (0.1, 0.2), ()))
    with pytest.raises(ValueError, match="6 references, and up to 5 can be told apart"):
        plot.scores(curve(), {str(n): 1.0 for n in range(6)})


# ---------------------------------------------------------------------------------- all of them

PICTURES = {
    "profiles": lambda: plot.profiles(DECAYS, at=1000),
    "approximation": lambda: plot.approximation(snapshots(4), PowerLaw(0.07)),
    "errors": lambda: plot.errors(snapshots(4)),
    "scores": lambda: plot.scores(curve(), {"raw weights": 4.0}),
}


def contrast(color: str) -> float:
    """By how much a color differs from white in lightness (WCAG 2.2): 1 is not at all."""

    def linear(value: float) -> float:
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, to_rgb(color))
    return 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05)


@pytest.mark.parametrize("name", PICTURES)
def test_every_axis_has_a_label_and_every_text_is_legible(name: str) -> None:
    """Dark on opaque white, whatever the page; at 800 pixels across 8 inches 9 points are 12."""
    with matplotlib.rc_context({"text.color": "white", "axes.facecolor": "black"}):
        figure = PICTURES[name]()
        figure.draw_without_rendering()
    assert to_rgb(figure.get_facecolor()) == (1, 1, 1)
    assert figure.axes[-1].get_xlabel()
    texts = [figure._suptitle]  # type: ignore[attr-defined]
    for axes in figure.axes:
        assert axes.get_ylabel()
        assert to_rgb(axes.get_facecolor()) == (1, 1, 1)
        texts += [axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()]
        texts += axes.get_legend().get_texts() if axes.get_legend() else []
    for text in texts:
        assert text.get_fontsize() >= 9
        assert contrast(text.get_color()) > 7, text


@pytest.mark.parametrize("name", PICTURES)
def test_a_legend_covers_no_data(name: str) -> None:
    figure = PICTURES[name]()
    figure.draw_without_rendering()
    for axes in figure.axes:
        if axes.get_legend():
            box = axes.get_legend().get_window_extent()
            assert box.y0 >= axes.get_window_extent().y1
            assert box.x1 <= figure.bbox.x1


def test_units_are_named() -> None:
    labels = {name: [a.get_ylabel() for a in draw().axes] for name, draw in PICTURES.items()}
    assert labels == {
        "profiles": ["share in the average, per unit of the clock"],
        "approximation": [
            "share, per unit\nof the clock",
            "difference,\n% of the peak",
            "coefficient\n(they sum to 1)",
        ],
        "errors": ["predicted error, %", "storage noise,\n% of the weights"],
        "scores": ["score (lower is better)", "predicted\nerror, %"],
    }
    assert "clock" in PICTURES["profiles"]().axes[0].get_xlabel()
    assert "share of the run" in PICTURES["errors"]().axes[1].get_xlabel()


def test_lines_can_be_told_apart_without_color() -> None:
    """Any two differ in their dashes, or in lightness and width."""
    for i, one in enumerate(plot._LINES):
        for other in plot._LINES[:i]:
            dashes = one.get("linestyle") != other.get("linestyle")
            lightness = abs(contrast(one["color"]) / contrast(other["color"]) - 1) > 0.3
            assert dashes or (lightness and one["linewidth"] != other["linewidth"])


@pytest.mark.parametrize(
    ("suffix", "head"), [(".png", b"\x89PNG"), (".SVG", b"<?xml"), (".pdf", b"%PDF")]
)
def test_a_picture_is_saved_by_its_suffix_and_is_small(
    tmp_path: Path, suffix: str, head: bytes
) -> None:
    path = tmp_path / f"picture{suffix}"
    plot.save(plot.profiles(DECAYS, at=100_000), path)
    assert path.read_bytes().startswith(head)
    assert path.stat().st_size < 500_000
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_text("before")
    figure = plot.profiles({"$\\nothing$": Uniform()}, at=10)  # no mathematics
    with pytest.raises(ValueError, match="nothing"):
        plot.save(figure, path)
    assert path.read_text() == "before"
    with pytest.raises(ValueError, match=re.escape("write 'picture.png'")):
        plot.save(figure, "picture.jpg")


def test_pictures_may_be_drawn_in_threads(tmp_path: Path) -> None:
    """Each is what it is alone."""

    def drawn(number: int, name: str) -> bytes:
        path = tmp_path / f"{number}-{name}.png"
        plot.save(PICTURES[name](), path)
        return path.read_bytes()

    alone = {name: drawn(0, name) for name in ("profiles", "scores")}
    with ThreadPoolExecutor(4) as pool:
        names = ["profiles", "scores"] * 2
        found = list(pool.map(drawn, range(1, 5), names))
    assert found == [alone[name] for name in names]


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_pictures_need_no_pyplot_and_change_no_setting(tmp_path: Path) -> None:
    code = f"""
import sys, matplotlib
before = list(dict.items(matplotlib.rcParams))  # to look up the backend would import pyplot
from polyak import plot, PowerLaw
plot.save(plot.profiles({{"wide": PowerLaw(0.1)}}, at=100), {str(tmp_path / "a.png")!r})
print("matplotlib.pyplot" in sys.modules, list(dict.items(matplotlib.rcParams)) == before)
"""
    assert run(code) == "False True"


def test_matplotlib_is_imported_when_it_is_needed_and_its_extra_named() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
from polyak import plot, PowerLaw
try:
    plot.profiles({"wide": PowerLaw(0.1)}, at=100)
except ImportError as error:
    print(error)
"""
    assert run(code) == (
        "pictures need matplotlib, not installed here: type pip install 'polyak[plot]', which adds "
        "it and what it needs"
    )


def test_ten_million_states_are_a_matter_of_seconds() -> None:
    """About one; the bound is for a machine that does something else too."""
    code = (
        "import time, torch; torch.set_num_threads(1)\n"
        "from polyak import plot, PowerLaw\n"
        "start = time.process_time(); f = plot.profiles({'w': PowerLaw(0.1)}, at=10**7)\n"
        "print(len(f.axes[0].lines[0].get_xdata()), time.process_time() - start)"
    )
    points, seconds = map(float, run(code).split())
    assert points < 2000
    assert seconds < 10
