"""All stages, and one table and one page of pictures of what they found.

Runs pretraining and classification beside segmentation and Mean Teacher, two processes at a time,
and puts their rows together: ``report.md``, ``report.json`` and ``report.png`` in the folder.

    python examples/ssl/report.py
    python examples/ssl/report.py --seeds 8 --out out/ssl-8
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import typer
from common import (
    OUT,
    Fast,
    Out,
    Row,
    Seeds,
    console,
    describe,
    differences,
    mean_std,
    write_results,
)

# Each list runs in order, both at the same time.
STAGES = [["pretrain", "classify"], ["segment", "mean_teacher"]]
# What is compared on the same seeds: (method, with which).
PAIRS = {
    "classify": [
        ("ema teacher", "raw pixels"),
        ("ema teacher", "random network"),
        ("ema teacher", "ema student"),
        ("ema student", "constant student"),
        ("ema student", "copy student"),
        ("ema student", "frozen student"),
    ],
    "segment": [
        ("teacher", "random initialization"),
        ("teacher", "teacher, global loss alone"),
        ("teacher", "student"),
        ("random initialization + EMA", "random initialization"),
        ("teacher + EMA", "teacher"),
    ],
    "mean_teacher": [
        ("supervised + EMA", "supervised"),
        ("Mean Teacher: teacher", "supervised"),
        ("Mean Teacher: teacher", "Pi-model"),
        ("Mean Teacher: teacher", "Pi-model + EMA"),
    ],
}
PICTURES = ["pretrain", "classify", "segment", "mean_teacher"]


def run(stages: list[str], options: list[str]) -> list[float]:
    """Run some stages one after the other; return how long each took, in seconds."""
    taken = []
    for stage in stages:
        started = time.perf_counter()
        program = Path(__file__).with_name(f"{stage}.py")
        done = subprocess.run(
            [sys.executable, str(program), *options], capture_output=True, text=True, check=False
        )
        taken.append(time.perf_counter() - started)
        if done.returncode:
            raise RuntimeError(f"{program.name} failed:\n{done.stdout}\n{done.stderr}")
        console.print(f"{stage}: {taken[-1]:.0f} seconds")
    return taken


def markdown(found: dict[str, list[Row]]) -> str:
    """Return one table a stage: a line per method or pair of methods, a column per task."""
    lines = []
    for stage, rows in found.items():
        metrics = ", ".join(dict.fromkeys(row["metric"] for row in rows))
        tasks = list(dict.fromkeys(row["task"] for row in rows))
        cells = {(row["method"], row["task"]): mean_std(row["values"]) for row in rows}
        lines += [f"**{stage}**, {metrics}", ""]
        lines.append("| | " + " | ".join(tasks) + " |")
        lines.append("|---" * (len(tasks) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in rows):
            numbers = [cells.get((method, task), "") for task in tasks]
            lines.append(f"| {method} | " + " | ".join(numbers) + " |")
        for a, b in PAIRS.get(stage, []):
            pairs = [differences(rows, task, a, b) for task in tasks]
            numbers = [describe(values) if values else "" for values in pairs]
            if any(numbers):
                lines.append(f"| *{a} - {b}* | " + " | ".join(numbers) + " |")
        lines.append("")
    return "\n".join(lines)


def draw(out: Path, path: Path) -> None:
    """Put the pictures of the stages on one page."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    images = {s: plt.imread(out / f"{s}.png") for s in PICTURES if (out / f"{s}.png").exists()}
    heights = [image.shape[0] / image.shape[1] for image in images.values()]
    figure, axes = plt.subplots(
        len(images), 1, figsize=(10, 10 * sum(heights) + len(images)), layout="constrained",
        gridspec_kw={"height_ratios": heights}, squeeze=False, dpi=120,
    )  # fmt: skip
    for axis, (stage, image) in zip(axes[:, 0], images.items(), strict=True):
        axis.imshow(image)
        axis.set_title(stage, loc="left")
        axis.set_axis_off()
    figure.savefig(path)
    plt.close(figure)


def main(seeds: Seeds = 4, out: Out = OUT, fast: Fast = False) -> None:
    """Run every stage, and report."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    options = ["--seeds", str(seeds), "--out", str(out)] + (["--fast"] if fast else [])
    with ThreadPoolExecutor(len(STAGES)) as pool:
        taken = list(pool.map(lambda stages: run(stages, options), STAGES))
    names = [stage for stages in STAGES for stage in stages]
    seconds = dict(zip(names, [s for part in taken for s in part], strict=True))
    found: dict[str, list[Row]] = {}
    settings: dict[str, Any] = {}
    for stage in names:
        results = json.loads((out / f"{stage}.json").read_text())
        found[stage], settings[stage] = results["rows"], results["settings"]
    text = markdown(found)
    (out / "report.md").write_text(text)
    draw(out, out / "report.png")
    console.print(text, markup=False)
    rows = [{"stage": stage, **row} for stage, stage_rows in found.items() for row in stage_rows]
    elapsed = time.perf_counter() - started
    write_results(out / "report.json", rows, settings, elapsed, seconds_of_stages=seconds)


if __name__ == "__main__":
    typer.run(main)
