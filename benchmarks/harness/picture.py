"""THE PICTURE: four panels, whose marks are told apart by shape and lightness."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

from harness.report import Results, _of
from harness.sections import DTYPES, Row
from harness.shapes import MODELS

Styles = dict[str, dict[str, Any]]
# Contender -> marker and color; what has no entry is left to the tables.
STYLES: Styles = {
    "timm ModelEmaV3": {"marker": "s", "color": "#E69F00"},
    "torch AveragedModel": {"marker": "D", "color": "#C8500A"},
    "ema-pytorch, foreach": {"marker": "v", "color": "#6f6f6f"},
    "torch_ema": {"marker": "^", "color": "#111111"},
    "diffusers EMAModel, foreach": {"marker": "P", "color": "#9a9a9a"},
    "Lightning EMAWeightAveraging": {"marker": "X", "color": "#444444"},
}
MINE = {"marker": "o", "color": "#0072B2", "markersize": 10, "zorder": 3}


def draw(results: Results, path: Path) -> None:
    """Draw the shares of the limit, the overhead and the share of a step, as far as measured."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows: list[Row] = [row for row in results["rows"] if row["malloc"] == "keep"]
    styles = _styles(rows)
    panels = [
        partial(_draw_shares, rows=_of(rows, "shapes", dtype=dtype, threads=1), dtype=dtype)
        for dtype in DTYPES
    ]
    panels.append(partial(_draw_overhead, rows=_of(rows, "tensors")))
    panels.append(partial(_draw_steps, rows=_of(rows, "step")))
    panels = [panel for panel in panels if panel.keywords["rows"]]
    if not panels:
        return
    height = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        height, 2, figsize=(12, 0.6 + 3.7 * height), layout="constrained", dpi=150, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        panel(axis, styles=styles)
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    marks = [plt.Line2D([], [], linestyle="", label=name, **s) for name, s in styles.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def _styles(rows: list[Row]) -> Styles:
    mine = [row["contender"] for row in rows if row.get("default")]
    present = {row.get("contender") for row in rows}
    peers = {name: {"markersize": 7} | style for name, style in STYLES.items() if name in present}
    return dict.fromkeys(mine, MINE) | peers


def _draw_shares(axis: Any, rows: list[Row], dtype: str, styles: Styles) -> None:
    """Draw one line of marks for each model."""
    models = [model for model in MODELS.values() if any(row["model"] == model for row in rows)]
    _draw_marks(axis, rows, models, styles, "of_limit")
    axis.axvline(100, color="#111111", linewidth=1.2, linestyle=(0, (4, 2)))
    axis.set_xlim(left=0)
    axis.set_xlabel("share of the limit, %")
    axis.set_title(f"{dtype} weights into float32 averages, one thread", fontsize=10.5)


def _draw_overhead(axis: Any, rows: list[Row], styles: Styles) -> None:
    """Draw time over the number of tensors."""
    for name, style in styles.items():
        mine = sorted(
            (row["tensors"], 1e3 * row["seconds"][0]) for row in rows if row["contender"] == name
        )
        axis.plot([n for n, _ in mine], [time for _, time in mine], linewidth=1.2, **style)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.set_xlabel("tensors of one element")
    axis.set_ylabel("time of an update, ms")
    axis.set_title("Overhead, one thread", fontsize=10.5)


def _draw_steps(axis: Any, rows: list[Row], styles: Styles) -> None:
    """Draw one line of marks for each network."""
    from matplotlib import ticker

    models = list(dict.fromkeys(row["model"] for row in rows))
    _draw_marks(axis, rows, models, styles, "of_step")
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("share of a training step, %")
    axis.set_title("An update beside forward, backward and AdamW, one thread", fontsize=10.5)


def _draw_marks(axis: Any, rows: list[Row], models: list[str], styles: Styles, ratio: str) -> None:
    for name, style in styles.items():
        mine = [row for row in rows if row["contender"] == name]
        places = [-models.index(row["model"]) for row in mine]
        axis.plot([100 * row[ratio][0] for row in mine], places, linestyle="", **style)
    axis.set_yticks([-i for i in range(len(models))], [m.replace(", ", "\n") for m in models])
    axis.set_ylim(-len(models) + 0.5, 0.5)
