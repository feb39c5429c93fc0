"""PICTURES: what averages are made of, what stored ones can give, and what was found.

Each function returns a matplotlib `Figure`, drawn without pyplot and without state that is shared,
so that it works in any thread and beside any other picture. The background is white and opaque, and
what has to be told apart differs in lightness and dashes or markers as well as in color: a picture
looks the same on a light and on a dark page, and can be read in gray. Numbers come from the rooms
that know them; here they are drawn. matplotlib is imported when it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from polyak.decay import After, Debiased, Decay, HalfLife, PowerLaw, Spec, as_decay, from_spec
from polyak.files import StrPath, atomic
from polyak.posthoc import Average, Snapshot
from polyak.posthoc.fit import LIMIT, NOISE
from polyak.posthoc.solution import fits_of, histories_among, history_of, solved, stored_by
from polyak.posthoc.stored import read
from polyak.profile import History, moments, weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from polyak.posthoc import Curve

__all__ = ["approximation", "errors", "profiles", "save", "scores"]

_MOST = 50_000_000  # ticks that are drawn: as vectors they take some gigabytes
_BLOCK = 1 << 18  # ticks at a time, as many as a cache holds
_POINTS = 500  # bins of equal ticks, and as many of equal shares
_WIDTHS = 40  # of the errors


def profiles(
    averages: Mapping[str, Average], at: int | None = None, axes: Axes | None = None
) -> Figure:
    """Draw which share each past state has in some averages.

    The height is the share per unit of the clock, p_i / (t_i - t_(i-1)), so that averages with long
    and with short ticks compare, and the area under each line is 1. Of many states, neighbors are
    drawn as their mean, which keeps the area. Shares that differ a lot are on a logarithmic axis.

    >>> decays = {"narrow": PowerLaw(0.05), "wide": PowerLaw(0.10), "plain": 0.998}
    >>> figure = profiles(decays, at=1000)
    >>> narrow, wide, plain = figure.axes[0].get_legend().get_texts()
    >>> narrow.get_text(), wide.get_text()
    ('narrow: mean age 52.2, width 50', 'wide: mean age 111, width 100')
    >>> plain.get_text()
    'plain: mean age 432, width 332, first state 14 %'

    Args:
        averages: up to eight, by the names that they get in the legend: decays, or histories such
            as `ema.history`. With a history among them, a decay is of what it would have made of
            the ticks of the one that came furthest; else of `at` ticks of length 1 from clock 0.
        at: the clock of the averages, in units of the clock, at least 1. By default that of each
            history.
        axes: is drawn into, and keeps its looks; by default a new figure.

    Returns:
        The figure. In the legend, the mean age and the width (the standard deviation of the ages)
        are in units of the clock, and of an average that holds much of the state that it began
        with, so is that.

    Raises:
        ValueError: there are too many averages, or too many ticks; decays without histories, and
            no `at`; `at` is later than the histories know of.
        TypeError: one is no average, or they have no names.
        ImportError: matplotlib is not installed.
    """
    histories = _histories(averages, at)
    if axes is None:
        figure, (axis,) = _figure(4.2 + 0.2 * len(histories), [1])
        ends = {history.clock for history in histories.values()}
        _title(figure, f"What each average is made of{_at(ends)}")
    else:
        axis, figure = axes, axes.figure.figure
    peaks = []
    for (label, history), style in zip(histories.items(), _LINES, strict=False):
        states = weights(history)
        stairs, summary = _stairs(*states), _summary(*states)
        peaks.append(stairs.peak)
        axis.plot(*stairs.line, drawstyle="steps-pre", label=f"{label}: {summary}", **style)
    if max(peaks) > 30 * min(peaks):
        axis.set_yscale("log")
        axis.set_ylim(min(peaks) / 1000, 2 * max(peaks))
    else:
        axis.set_ylim(0, 1.08 * max(peaks))
    axis.set_ylabel("share in the average, per unit of the clock")
    _clock_axis(axis)
    _plain(axis.yaxis)
    _legend(axis)
    return figure


def approximation(
    files: Sequence[StrPath | Snapshot | History], target: Average, at: int | None = None
) -> Figure:
    """Draw how stored averages approximate one that was not kept.

    Three panels over the clock: the profile that is wanted and the one that the sum has, with a
    mark at the clock of each file; what they differ by; and the coefficient of each file.

    >>> history = History("a run")
    >>> for step in range(1, 1001):
    ...     history.tick(PowerLaw(0.10), 1)
    >>> stored = [history.until(step) for step in range(125, 1001, 125)]
    >>> figure = approximation(stored, PowerLaw(0.15))
    >>> figure.get_suptitle().splitlines()
    ['PowerLaw(std=0.15) at the clock 1,000', 'from 8 files: predicted error 14 %']

    Args:
        files: as for `solve`. Nothing is refused: what is wrong with a bad one can be seen.
        target: a decay, or the history of an average of the same run.
        at: the clock of the average, as for `solve`.

    Raises:
        ValueError: the files are of different runs, do not tell what they are, or are later.
        TypeError: a file or the target is of another kind.
        OSError: a file cannot be read.
        ImportError: matplotlib is not installed.
    """
    figure, (shapes, rest, parts) = _figure(7.4, [5, 2, 3])
    with ExitStack() as stack:
        known = read(files, stack, histories_among([target]))
        solution = solved(known, target, at, math.inf)
    places = stored_by(known, solution.at)
    taken = [known[i].history for i in places]
    used = [solution.coefficients[i] for i in places]
    stairs = _stairs(*weights(solution.history))
    mixed = stairs._replace(heights=_mixed(taken, used, stairs.edges) / stairs.edges.diff())
    (edges, asked), (_, given) = stairs.line, mixed.line
    off = [100 * (a - b) / stairs.peak for a, b in zip(given, asked, strict=True)]

    shapes.fill_between(edges, asked, step="pre", color="#a9c9e2", label="wanted")
    shapes.plot(edges, given, drawstyle="steps-pre", label="sum of the files", **_DARK)
    clocks = sorted({history.clock for history in taken})
    low = shapes.get_xaxis_transform()
    shapes.plot(clocks, [0.0] * len(clocks), transform=low, label="clock of a file", **_RUG)
    shapes.set_ylim(min(0.0, 1.08 * min(given)), 1.08 * max(stairs.peak, mixed.peak))
    shapes.set_ylabel("share, per unit\nof the clock")
    rest.plot(edges, off, drawstyle="steps-pre", label="difference", **_DARK)
    most = max([1.0, *(1.1 * abs(value) for value in off[2:])])
    rest.set_ylim(-most, most)
    rest.set_ylabel("difference,\n% of the peak")
    _draw_coefficients(parts, taken, used)
    parts.set_ylabel("coefficient\n(they sum to 1)")
    for axis in (rest, parts):
        axis.axhline(0, color=_QUIET, linewidth=0.8)
    for axis in (shapes, rest, parts):
        _plain(axis.yaxis)
    _clock_axis(parts)
    margin = 0.01 * (edges[-1] - edges[0])
    parts.set_xlim(edges[0] - margin, edges[-1] + margin)
    _legend(shapes, columns=3)
    name = _kind(target) if isinstance(target, History) else repr(as_decay(target))
    error = f"{_files(places)}: predicted error {_percent(solution.predicted_error)}"
    _title(figure, f"{name}{_at({solution.at})}\n{error}")
    return figure


def errors(files: Sequence[StrPath | Snapshot | History], at: int | None = None) -> Figure:
    """Draw how well stored averages give power laws of any width, before a tensor is read.

    Above, the predicted error over the width; below, the storage noise. Each has its limit as a
    dashed line. Where both are kept is shaded, and the widths that are stored are marked.

    >>> history = History("a run")
    >>> for step in range(1, 1001):
    ...     history.tick(PowerLaw(0.10), 1)
    >>> figure = errors([history.until(step) for step in range(125, 1001, 125)])
    >>> figure.axes[0].get_ylabel()
    'predicted error, %'

    Args:
        files: as for `solve`.
        at: the clock of the averages, as for `solve`.

    Raises:
        ValueError: the files are of different runs, do not tell what they are, or are later.
        TypeError: a file is of another kind.
        OSError: a file cannot be read.
        ImportError: matplotlib is not installed.
    """
    figure, (above, below) = _figure(5.6, [3, 2])
    with ExitStack() as stack:
        known = read(files, stack)
        history = history_of([file.history for file in known], PowerLaw(0.1), at)
        taken = [known[i] for i in stored_by(known, history.clock)]
    stored = _stored_widths([file.history for file in taken])
    widths = _grid(stored, history.clock)
    fits = fits_of(taken, [history.under(PowerLaw(std)) for std in widths])
    spans = _spans(widths, [fit.within(LIMIT) for fit in fits])

    panels = (
        (above, "predicted error", [100 * fit.error for fit in fits], 100 * LIMIT),
        (below, "storage noise", [100 * fit.noise for fit in fits], 100 * NOISE),
    )
    for axis, name, values, limit in panels:
        axis.plot(widths, values, marker=".", label=name, **_LINES[0])
        axis.axhline(limit, label=f"limit: {limit:g} %", **_BOUND)
        for number, std in enumerate(stored):
            axis.axvline(std, label="" if number else "width that is stored", **_MARK)
        for number, span in enumerate(spans):
            axis.axvspan(*span, label="" if number else f"within both: {_told(spans)}", **_BAND)
        axis.set_ylim(0, 2 * max(limit, *values))
    below.set_xscale("log")
    above.set_yscale("symlog", linthresh=0.1, linscale=0.3)  # a stored one has an error of 0
    below.set_yscale("log")
    below.set_ylim(min([100 * NOISE, *(100 * fit.noise for fit in fits if fit.noise)]) / 2)
    _plain(above.yaxis)
    _plain(below.yaxis)
    above.set_ylabel("predicted error, %")
    below.set_ylabel("storage noise,\n% of the weights")
    below.set_xlabel("width of the wanted power law (std), share of the run so far")
    below.set_xlim(widths[0], widths[-1])
    _log_axis(below, widths)
    _legend(above, columns=2)
    none = "" if spans else ": nothing within the limits"
    _title(figure, f"What can be had{_at({history.clock})}, {_files(taken)}{none}")
    return figure


def scores(curve: Curve, references: Mapping[str, float] | None = None) -> Figure:
    """Draw what a search for the best horizon has found.

    Above, the scores, of which lower is better, with the best one marked; below, the predicted
    error of each average that was tried. What the files support is shaded.

    >>> from polyak.posthoc import Curve, Point
    >>> tried = [(0.05, 3.0), (0.10, 2.5), (0.20, 2.8)]
    >>> points = [Point(std, PowerLaw(std), score, 0.02) for std, score in tried]
    >>> figure = scores(Curve(1000, (0.03, 0.25), tuple(points)), {"raw weights": 3.2})
    >>> figure.get_suptitle().splitlines()
    ['Best of 3 at the clock 1,000: PowerLaw(std=0.1)', 'score 2.5, predicted error 2 %']

    Args:
        curve: from `search`.
        references: up to five scores to compare with, by name: of the raw weights, or of averages
            that were kept. One that is far away is in the legend only, so that the curve is not
            flattened.

    Raises:
        ValueError: nothing has been evaluated, or there are too many references.
        ImportError: matplotlib is not installed.
    """
    references = dict(references or {})
    if not curve.points:
        raise ValueError(
            "nothing was evaluated, so that there is nothing to draw: pass the Curve that search() "
            "returned, or that its progress got"
        )
    if len(references) >= len(_LINES) - 2:
        raise ValueError(
            f"{len(references)} references, and up to {len(_LINES) - 3} can be told apart: pass "
            "those that matter"
        )
    figure, (above, below) = _figure(5.6 + 0.1 * len(references), [3, 1.3])
    best = curve.best
    horizons = [point.horizon for point in curve.points]
    found = [point.score for point in curve.points]
    bottom, top = _view(found, list(references.values()))
    above.plot(horizons, found, marker="o", markersize=5, label="average", **_LINES[0])
    label = f"best: {best.score:.4g} at {_number(best.horizon)}"
    above.plot([best.horizon], [best.score], label=label, **_BEST)
    for (name, value), style in zip(references.items(), _LINES[2:], strict=False):
        where = " (above)" if value > top else " (below)" if value < bottom else ""
        above.axhline(value, label=f"{name}: {value:.4g}{where}", zorder=1.5, **style)
    for axis in (above, below):
        axis.axvspan(*curve.supported, label=f"supported: {_told([curve.supported])}", **_BAND)
    above.set_ylim(bottom, top)
    above.set_ylabel("score (lower is better)")
    _plain(above.yaxis)
    off = [100 * point.predicted_error for point in curve.points]
    below.plot(horizons, off, marker="o", markersize=4, label="predicted error", **_LINES[0])
    below.set_ylim(0, 1.15 * max(1.0, *off))
    below.set_ylabel("predicted\nerror, %")
    ends = [*horizons, *curve.supported]
    below.set_xscale("log")
    below.set_xlim(min(ends) / 1.1, max(ends) * 1.1)
    _log_axis(below, ends)
    below.set_xlabel(_horizon(best.decay))
    _legend(above, columns=2)
    edge = ", at the edge of what was tried" if curve.at_edge else ""
    error = f"predicted error {_percent(best.predicted_error)}"
    _title(
        figure,
        f"Best of {len(found)}{_at({curve.at})}: {best.decay!r}\nscore {best.score:.4g}, "
        f"{error}{edge}",
    )
    return figure


def save(figure: Figure, path: StrPath) -> None:
    """Write a picture, cut to what is drawn: all of it, or nothing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(profiles({"wide": PowerLaw(0.10)}, at=100), f"{folder}/wide.png")
    ...     Path(folder, "wide.png").read_bytes()[1:4]
    b'PNG'

    Args:
        figure: from one of the functions above, or any other.
        path: ends in .png, .svg or .pdf; a file that is there is replaced.

    Raises:
        ValueError: the path ends otherwise.
        OSError: it cannot be written.
    """
    kind = Path(path).suffix.lower()
    if kind not in (".png", ".svg", ".pdf"):
        raise ValueError(
            f"a picture is saved as .png, .svg or .pdf, not as {str(path)!r}: write "
            f"{str(Path(path).with_suffix('.png'))!r}"
        )
    with atomic(path) as file:
        figure.savefig(file, format=kind[1:], bbox_inches="tight")


# -------------------------------------------------------------------------------- the numbers


class _Stairs(NamedTuple):
    """A profile as a density over the clock: heights[i] from edges[i] to edges[i + 1]."""

    edges: Tensor
    heights: Tensor

    @property
    def line(self) -> tuple[list[float], list[float]]:
        """What `drawstyle="steps-pre"` takes."""
        heights = self.heights.tolist()
        return self.edges.tolist(), [heights[0], *heights]

    @property
    def peak(self) -> float:
        """The largest height, but for that of the first state, which may stand for many."""
        later = self.heights[1:].max().item() if len(self.heights) > 1 else 0.0
        return later or self.heights.max().item()


def _histories(averages: Mapping[str, Average], at: int | None) -> dict[str, History]:
    """Return the history of each average."""
    if not isinstance(averages, Mapping) or not averages:
        raise TypeError(
            f"a picture is of averages by name, not of {averages!r}: pass a dictionary, such as "
            '{"wide": PowerLaw(0.10)}'
        )
    if len(averages) > len(_LINES):
        raise ValueError(
            f"{len(averages)} averages, and up to {len(_LINES)} lines can be told apart: draw the "
            "others in a picture of their own"
        )
    if at is not None and type(at) is not int:
        raise TypeError(f"at is a clock, an integer, not {at!r}: write at=1000")
    known = [average for average in averages.values() if isinstance(average, History)]
    seen = max(known, key=lambda history: history.clock, default=None)
    if seen is None:
        if at is None or at < 1:
            raise ValueError(
                f"a decay alone does not say how long it has averaged, and at={at}: pass the "
                "number of ticks, such as at=100_000"
            )
        runs = [[at, at, 0]]
        segments = [{"decay": {"type": "Uniform"}, "runs": runs}]
        seen = History.from_dict({"run": "", "origin": 0, "start": None, "segments": segments})
    elif at is not None and at > seen.clock:
        raise ValueError(
            f"the histories tell of the clocks up to {seen.clock}, not of at={at}: pass that or "
            "an earlier one"
        )
    end = seen.clock if at is None else at
    histories = {
        name: (a if isinstance(a, History) else seen.under(as_decay(a))).until(end)
        for name, a in averages.items()
    }
    most = max(history.ticks for history in histories.values())
    if most > _MOST:
        raise ValueError(
            f"{most:,} ticks are more than can be drawn, {_MOST:,}: draw a History with longer "
            "ticks, which is the same profile for the decays that say `exact`"
        )
    return histories


def _stairs(clocks: Tensor, shares: Tensor) -> _Stairs:
    """Return a profile whose neighboring states share a step where there are too many.

    A step ends at every n-th state, and wherever the shares so far reach another part of all: so no
    step is wide, and none is heavy but of a single state. The first state has one of its own, as
    long as the tick after it.
    """
    sums, newest = shares.cumsum(0), len(clocks) - 1
    evenly = torch.linspace(0, newest, min(_POINTS, newest + 1), dtype=torch.float64).round().long()
    parts = torch.linspace(0, 1, _POINTS, dtype=torch.float64) * sums[-1]
    heavy = torch.searchsorted(sums, parts).clamp(max=newest)
    last = _unique(torch.tensor([0, newest]), evenly, heavy, (heavy - 1).clamp(min=0))
    first = clocks[0] - (clocks[1] - clocks[0] if newest else 1)
    edges = torch.cat([first[None], clocks[last]]).double()
    held = torch.diff(sums[last], prepend=torch.zeros(1, dtype=torch.float64))
    return _Stairs(edges, held / edges.diff())


def _summary(clocks: Tensor, shares: Tensor) -> str:
    """Return the moments of a profile as text, from the vectors that are there anyway."""
    mean = _mean(clocks, shares, lambda clock: clocks[-1] - clock)
    square = _mean(clocks, shares, lambda clock: (clocks[-1] - clock).double().sub_(mean).square_())
    first = shares[0].item()
    much = f", first state {_percent(first)}" if first > max(0.01, 2 / len(shares)) else ""
    return f"mean age {_number(mean)}, width {_number(math.sqrt(square))}{much}"


def _mean(clocks: Tensor, shares: Tensor, of: Callable[[Tensor], Tensor]) -> float:
    """Return the mean of what is made of the clocks, a block at a time."""
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(clocks), _BLOCK)]
    return math.fsum(torch.dot(shares[b], of(clocks[b]).double()).item() for b in blocks)


def _mixed(histories: Sequence[History], coefficients: Sequence[float], edges: Tensor) -> Tensor:
    """Return what sum_i c_i p_i holds between some clocks, and of what is older in the first.

    Of an average that was stored several times, the earlier profiles are the last one, cut off and
    scaled up: one pass over the ticks serves them all, as far as the numbers reach.
    """
    ends = torch.tensor([history.clock for history in histories], dtype=torch.float64)
    points = _unique(edges[1:], ends)
    total = torch.zeros(len(points), dtype=torch.float64)
    passes: list[tuple[History, Tensor]] = []
    order = sorted(range(len(histories)), key=lambda i: -histories[i].clock)
    for i in order:
        history, here = histories[i], points <= histories[i].clock
        for whole, sums in passes:
            if sums[here][-1] > 1e-200 and whole.until(history.clock) == history:
                break
        else:
            clocks, shares = weights(history)
            so_far = torch.cat([torch.zeros(1, dtype=torch.float64), shares.cumsum(0)])
            sums = so_far[torch.searchsorted(clocks.double(), points, right=True)]
            passes.append((history, sums))
        newest = sums[here][-1]
        total += coefficients[i] * (torch.where(here, sums, newest) / newest)
    held = total[torch.searchsorted(points, edges[1:])]
    return torch.diff(held, prepend=torch.zeros(1, dtype=torch.float64))


def _unique(*parts: Tensor) -> Tensor:
    values: Tensor = torch.unique(torch.cat(parts))
    return values


def _stored_widths(histories: Sequence[History]) -> list[float]:
    """Return the width of each kind of average, as a share of the run: its newest's."""
    newest = {_kind(h): h for h in sorted(histories, key=lambda h: h.clock) if h.ticks}
    widths = set()
    for history in newest.values():
        spec = _spec(history)
        is_known = spec["type"] == "PowerLaw"
        widths.add(spec["std"] if is_known else moments(history).deviation / history.clock)
    return sorted(width for width in widths if width > 0)


def _grid(stored: Sequence[float], clock: int) -> list[float]:
    """Return the widths to ask for: evenly in their logarithms, and what is stored."""
    high = 0.285
    low = max(min([0.01, *(width / 3 for width in stored)]), min(0.1, 1 / max(clock, 1)))
    even = [low * (high / low) ** (i / (_WIDTHS - 1)) for i in range(_WIDTHS)]
    return sorted({*even, *(width for width in stored if low < width < high)})


def _spans(widths: Sequence[float], good: Sequence[bool]) -> list[tuple[float, float]]:
    """Return from where to where all is good."""
    spans = []
    for is_good, group in groupby(zip(widths, good, strict=True), key=lambda pair: pair[1]):
        inside = [width for width, _ in group]
        if is_good:
            spans.append((inside[0], inside[-1]))
    return spans


def _view(found: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the limits of an axis that shows all scores, and what else is not far from them."""
    finite = [value for value in found if math.isfinite(value)] or [0.0]
    reach = 2 * (max(finite) - min(finite)) or math.inf
    low, high = min(finite) - reach, max(finite) + reach
    shown = finite + [value for value in others if low <= value <= high]
    margin = 0.08 * (max(shown) - min(shown)) or abs(max(shown)) / 10 or 1.0
    return min(shown) - margin, max(shown) + margin


def _spec(history: History) -> Spec:
    """Return the decay of the last update."""
    spec: Spec = history.to_dict()["segments"][-1]["decay"]
    return spec


def _kind(history: History) -> str:
    """Return what kind of average it is, as text."""
    if not history.ticks:
        return "weights of the run"
    spec = _spec(history)
    return str(spec["repr"]) if spec["type"] == "opaque" else repr(from_spec(spec))


# ------------------------------------------------------------------------------------- the words


def _at(clocks: set[int]) -> str:
    return f" at the clock {clocks.pop():,}" if len(clocks) == 1 else ""


def _files(files: Sequence[object]) -> str:
    return f"from {len(files)} file{'s' if len(files) > 1 else ''}"


def _told(spans: Sequence[tuple[float, float]]) -> str:
    return " and ".join(f"{_number(low)} to {_number(high)}" for low, high in spans)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _horizon(decay: Decay) -> str:
    """Return what the number is that a decay was made from, with its unit."""
    inner = decay.inner if isinstance(decay, After | Debiased) else decay
    if isinstance(inner, PowerLaw):
        return "width of the average (std), share of the run so far"
    if isinstance(inner, HalfLife):
        return "half-life of the average, in units of the clock"
    return f"horizon, as {type(decay).__name__} takes it"


# -------------------------------------------------------------------------------------- the looks

_INK, _QUIET = "#222222", "#777777"

# Told apart by color, by lightness, by width and by dashes.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0072B2", "linewidth": 2.2},
    {"color": "#C8500A", "linewidth": 2.0, "linestyle": (0, (5, 1.6))},
    {"color": "#111111", "linewidth": 2.2, "linestyle": (0, (1, 1.2))},
    {"color": "#E69F00", "linewidth": 2.0, "linestyle": (0, (6, 1.5, 1, 1.5))},
    {"color": "#8a8a8a", "linewidth": 1.4},
    {"color": "#007a5a", "linewidth": 1.6, "linestyle": (0, (9, 2, 1, 2, 1, 2))},
    {"color": "#7b3f98", "linewidth": 1.4, "linestyle": (0, (3, 3))},
    {"color": "#56B4E9", "linewidth": 3.0, "linestyle": (0, (1.6, 1))},
)
_MARKS = (("o", "#0072B2"), ("s", "#E69F00"), ("^", "#111111"), ("D", "#8a8a8a"), ("v", "#C8500A"))
_DARK: dict[str, Any] = {"color": "#0b2f4a", "linewidth": 1.4}
_BOUND: dict[str, Any] = {"color": "#C8500A", "linewidth": 1.6, "linestyle": (0, (5, 2))}
_MARK: dict[str, Any] = {"color": "#111111", "linewidth": 1.4, "linestyle": (0, (1, 1.5))}
_BAND: dict[str, Any] = {"facecolor": "#e6e6e6", "edgecolor": "#b4b4b4", "zorder": 0.5}
_BEST: dict[str, Any] = {
    **{"linestyle": "", "marker": "*", "markersize": 17, "zorder": 4},
    **{"markerfacecolor": "#E69F00", "markeredgecolor": "#111111"},
}
_RUG: dict[str, Any] = {
    **{"linestyle": "", "marker": "|", "markersize": 9, "markeredgewidth": 1.6},
    **{"color": "#C8500A", "clip_on": False},
}


def _figure(height: float, ratios: Sequence[float]) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, of panels above one another over one axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib, not installed here: type pip install 'polyak[plot]', which "
            "adds it and what it needs"
        ) from error
    figure = Figure(figsize=(8, height), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)
    for axis in panels[:, 0]:
        axis.set_facecolor("white")
        axis.set_axisbelow(True)
        axis.grid(color="#dcdcdc", linewidth=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color(_QUIET)
        axis.tick_params(color=_QUIET, labelcolor=_INK, labelsize=9.5)
        for label in (axis.xaxis.label, axis.yaxis.label):
            label.set(color=_INK, fontsize=10.5)
    return figure, list(panels[:, 0])


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=11.5, color=_INK)


def _legend(axis: Axes, columns: int = 1) -> None:
    """Put the legend above the axes, where no data is."""
    axis.legend(
        **{"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderaxespad": 0, "ncols": columns},
        **{"frameon": False, "fontsize": 9.5, "labelcolor": _INK, "handlelength": 3.2},
    )


def _clock_axis(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("clock (steps, or what the average counts)")
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _plain(axis.xaxis)


def _log_axis(axis: Axes, values: Sequence[float]) -> None:
    """Label a logarithmic axis with ordinary numbers, more of them where it is short."""
    from matplotlib.ticker import LogLocator, NullLocator

    subs = (1.0, 2.0, 5.0) if max(values) > 8 * min(values) else tuple(map(float, range(1, 10)))
    axis.xaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.xaxis.set_minor_locator(NullLocator())
    _plain(axis.xaxis)


def _plain(axis: Any) -> None:
    """Label an axis with ordinary numbers."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, _: object) -> str:
        small = 0 < abs(value) < 1e-6
        return f"{value:.6g}" if small else f"{value:,.9f}".rstrip("0").rstrip(".")

    axis.set_major_formatter(FuncFormatter(text))


def _draw_coefficients(
    axis: Axes, histories: Sequence[History], coefficients: Sequence[float]
) -> None:
    """Draw a stem at the clock of each file, with a mark for each kind of average."""
    kinds = list(dict.fromkeys(map(_kind, histories)))
    for number, kind in enumerate(kinds):
        clocks, sizes = [], []
        for history, coefficient in zip(histories, coefficients, strict=True):
            if _kind(history) == kind:
                clocks.append(history.clock)
                sizes.append(coefficient)
        # Each kind is thinner than the one before it, so that it hides nothing at the same clock.
        marker, color = _MARKS[number % len(_MARKS)]
        axis.vlines(clocks, 0, sizes, color=color, linewidth=max(4 - 2.6 * number, 1.2))
        size = max(10 - 4.5 * number, 4)
        axis.plot(clocks, sizes, marker, color=color, markersize=size, label=kind)
    axis.margins(y=0.12)
    _legend(axis, columns=3 if max(map(len, kinds)) < 25 else 1)
