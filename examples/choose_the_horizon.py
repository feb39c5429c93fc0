"""Which horizon is best? Ask after training: a small diffusion model of handwritten digits.

How far back an average should look differs by model and by what is measured, and is not known
before training (EDM2, arXiv 2312.02696). So two power-law averages are kept and stored now and
then, and when training is over any other width is made from the files and scored. Beside them the
usual averages of a fixed decay are kept; all are compared on images that neither the training nor
the choice has seen. What is printed and saved is what was measured, whichever way it went.

    python examples/choose_the_horizon.py
    python examples/choose_the_horizon.py --lr 0.0005 --out out/slower
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from polyak import EMA, Debiased, PowerLaw, Uniform, plot
from polyak.posthoc import Curve, reconstruct, search, solve
from polyak.profile import History, moments
from polyak.snapshots import SnapshotFolder

SIGMA_LOG = -1.2, 1.2  # mean and deviation of the logarithm of the noise level in training
SIGMA_RANGE = 0.002, 80.0  # of the noise levels that a sample passes through
CURVATURE = 7  # how much denser these are towards the low end
SAMPLER_STEPS = 18
FEATURES = 32

RAW, DEFAULT = "raw weights", "PowerLaw(0.10), the default"
FIXED = {"EMA(0.99)": 0.99, "EMA(0.999)": 0.999, "EMA(0.9999)": 0.9999}
ONLINE = FIXED | {"Debiased(0.9999)": Debiased(0.9999), "Uniform()": Uniform()}
CHECKED = PowerLaw(0.08)  # is kept as well, to be compared with what the files give
METRICS = {"frechet": "Fréchet distance, %", "loss": "denoising loss"}
BEST = {metric: f"chosen by {name.partition(',')[0]}" for metric, name in METRICS.items()}

Weights = dict[str, Tensor]
Scores = dict[str, float]  # by name of the weights; lower is better


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    seeds: int = 4
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 0.002
    width: int = 192
    classifier_steps: int = 2000
    evaluations: int = 12  # of a search
    samples: int = 3000  # of which each Fréchet distance is measured
    draws: int = 3  # times that the final scores are measured, with new noise each time

    @property
    def every(self) -> int:
        """Steps from one snapshot to the next."""
        return self.steps // 20


class Part(NamedTuple):
    """Some of the data: images of shape (n, 64) from -1 to 1, and labels."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """To train on, to choose the horizon with, and to report the outcome on."""

    train: Part
    validation: Part
    test: Part


def load() -> Data:
    """Return scikit-learn's digits, 1,797 real images inside its wheel; always the same split."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 8 - 1
    labels = torch.tensor(digits.target)
    train, rest = train_test_split(
        range(len(labels)), test_size=0.4, stratify=digits.target, random_state=0
    )
    validation, test = train_test_split(
        rest, test_size=0.5, stratify=digits.target[rest], random_state=0
    )
    return Data(*(Part(images[part], labels[part]) for part in (train, validation, test)))


# ------------------------------------------------------------------ a diffusion model


class Denoiser(nn.Module):
    """Removes noise of a known level from images of a known digit (Karras et al., 2206.00364).

    Args:
        width: of the layers.
        sigma_data: the standard deviation of the pixels.
    """

    def __init__(self, width: int, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.image = nn.Linear(64, width)
        self.label = nn.Embedding(10, width)
        self.level = nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
            )
            for _ in range(2)
        )
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64))

    def forward(self, noisy: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """Return the images; `sigma` is of shape (n, 1)."""
        total = (sigma**2 + self.sigma_data**2).sqrt()
        angles = sigma.log() / 16 * 2.0 ** torch.arange(8)
        hidden = self.image(noisy / total) + self.label(labels)
        hidden = hidden + self.level(torch.cat([angles.sin(), angles.cos()], dim=1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        skip = (self.sigma_data / total) ** 2
        return skip * noisy + sigma * self.sigma_data / total * self.out(hidden)


def denoising_loss(model: Denoiser, part: Part, noise: torch.Generator | None = None) -> Tensor:
    """Return the mean squared error, weighted so that every noise level counts alike."""
    mean, deviation = SIGMA_LOG
    sigma = (mean + deviation * torch.randn(len(part.images), 1, generator=noise)).exp()
    noisy = part.images + sigma * torch.randn(part.images.shape, generator=noise)
    weight = 1 / sigma**2 + 1 / model.sigma_data**2
    return (weight * (model(noisy, sigma, part.labels) - part.images) ** 2).mean()


@torch.no_grad()
def sample(model: Denoiser, count: int, seed: int) -> Part:
    """Draw new images, the ten digits in turn: from noise, by Heun's method."""
    low, high = (sigma ** (1 / CURVATURE) for sigma in SIGMA_RANGE)
    levels = torch.linspace(high, low, SAMPLER_STEPS) ** CURVATURE
    labels = torch.arange(count) % 10
    images = levels[0] * torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))
    for sigma, following in zip(levels, [*levels[1:], torch.tensor(0.0)], strict=True):
        slope = (images - model(images, sigma.expand(count, 1), labels)) / sigma
        ahead = images + (following - sigma) * slope
        if following > 0:
            slope_ahead = (ahead - model(ahead, following.expand(count, 1), labels)) / following
            ahead = images + (following - sigma) * (slope + slope_ahead) / 2
        images = ahead
    return Part(images.clamp(-1, 1), labels)


# ------------------------------------------------------------------ training with averages


class Run(NamedTuple):
    """What is there when training is over."""

    files: list[Path]  # of the two averages that were stored
    online: dict[str, Weights]  # those that were kept, by name, and the raw weights
    histories: dict[str, History]
    spread: float  # the root of the sum over steps and weights of (weight - mean weight)^2


def train(
    settings: Settings, seed: int, data: Data, folder: Path, advance: Callable[[], object]
) -> Run:
    """Train a denoiser at a constant learning rate, with all averages beside it."""
    torch.manual_seed(seed)
    model = Denoiser(settings.width, data.train.images.std().item())
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr)

    narrow, wide = EMA(model, PowerLaw(0.05)), EMA(model)  # which is PowerLaw(0.10)
    averages = {DEFAULT: wide, str(CHECKED): EMA(model, CHECKED)}
    averages |= {name: EMA(model, decay) for name, decay in ONLINE.items()}
    for ema in (narrow, *averages.values()):
        ema.attach(optimizer)
    weights = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    from_start = 0.0

    with SnapshotFolder(folder, [narrow, wide], every=settings.every) as snapshots:
        for _ in range(settings.steps):
            batch = torch.randint(len(data.train.images), (settings.batch_size,))
            optimizer.zero_grad()
            images, labels = data.train
            denoising_loss(model, Part(images[batch], labels[batch])).backward()
            optimizer.step()
            snapshots.update()
            from_start += squared_distance(start, weights)
            advance()

    mean = averages["Uniform()"].averages
    return Run(
        files=snapshots.files,
        online={RAW: model.state_dict()}
        | {name: ema.model_state_dict() for name, ema in averages.items()},
        histories={name: ema.history for name, ema in averages.items() if ema.history},
        spread=math.sqrt(from_start - settings.steps * squared_distance(start, mean)),
    )


@torch.no_grad()
def squared_distance(ones: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return the sum of (one - other)^2 over all weights."""
    return sum((ones[name] - others[name]).square().sum().item() for name in ones)


# ------------------------------------------------------------------ what is measured


class Statistics(NamedTuple):
    """Mean and covariance of the features of some images."""

    mean: Tensor
    covariance: Tensor


def train_features(settings: Settings, data: Data) -> tuple[nn.Module, float]:
    """Train a classifier of the real digits; return the layer before its last, and its accuracy."""
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, FEATURES), nn.ReLU())
    classify = nn.Sequential(features, nn.Linear(FEATURES, 10))
    optimizer = torch.optim.AdamW(classify.parameters())
    images, labels = data.train
    for _ in range(settings.classifier_steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(classify(images[batch]), labels[batch]).backward()
        optimizer.step()
    right = classify(data.test.images).argmax(dim=1) == data.test.labels
    return features, 100 * right.double().mean().item()


@torch.no_grad()
def statistics_of(features: nn.Module, images: Tensor) -> Statistics:
    """Return the statistics of images, in float64."""
    found = features(images).double()
    return Statistics(found.mean(dim=0), found.T.cov())


def frechet_distance(found: Statistics, real: Statistics) -> float:
    """Return |m - n|^2 + tr(S + T - 2 (S T)^(1/2)) in percent of the real variance, tr T."""
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    common = torch.linalg.eigvalsh(root @ found.covariance @ root).clamp(min=0).sqrt().sum()
    variances = found.covariance.trace() + real.covariance.trace() - 2 * common
    means = (found.mean - real.mean).square().sum()
    return 100 * ((means + variances) / real.covariance.trace()).item()


@dataclass(frozen=True)
class Judge:
    """Scores weights against one part of the real images."""

    model: Denoiser  # is given the weights
    features: nn.Module
    real: Part
    samples: int

    def score(self, metric: str, weights: Weights, seed: int) -> float:
        """Return a score, of which lower is better; all weights get the noise of that seed."""
        self.model.load_state_dict(weights)
        if metric == "frechet":
            found = statistics_of(self.features, sample(self.model, self.samples, seed).images)
            return frechet_distance(found, statistics_of(self.features, self.real.images))
        often = Part(self.real.images.repeat(20, 1), self.real.labels.repeat(20))
        with torch.no_grad():
            noise = torch.Generator().manual_seed(seed)
            return denoising_loss(self.model, often, noise).item()


# ------------------------------------------------------------------ the experiment


def choose(settings: Settings, run: Run, judge: Judge, metric: str, at: int | None = None) -> Curve:
    """Search the best width at a step, by default the last, with the validation images."""
    with warnings.catch_warnings():
        # That the best is the shortest or the longest that there is, is told in the tables.
        warnings.simplefilter("ignore")
        return search(
            run.files,
            lambda weights: judge.score(metric, weights, seed=0),
            evaluations=settings.evaluations,
            at=at,
        )


def measure(
    settings: Settings, seed: int, run: Run, validation: Judge, test: Judge
) -> tuple[dict[str, Any], dict[str, Weights]]:
    """Choose widths; score them and what was kept; return the numbers and all weights.

    The least loss is also searched as if training had ended earlier: the files tell of that, too.
    """
    curves = {metric: choose(settings, run, validation, metric) for metric in METRICS}
    clocks = settings.steps // 4, settings.steps // 2
    earlier = [choose(settings, run, validation, "loss", clock) for clock in clocks]
    chosen = reconstruct(run.files, [curve.best.decay for curve in curves.values()])
    rivals = {name: weights for name, weights in run.online.items() if name != str(CHECKED)}
    everyone = rivals | dict(zip(BEST.values(), chosen, strict=True))
    histories = run.histories | {
        BEST[metric]: solve(run.files, curve.best.decay).history for metric, curve in curves.items()
    }
    facts = {
        "seed": seed,
        "curves": {metric: curve.to_dict() for metric, curve in curves.items()},
        "earlier": [curve.to_dict() for curve in earlier],
        "profiles": {name: profile(histories.get(name), settings.steps) for name in everyone},
        "validation": {
            metric: {name: validation.score(metric, rivals[name], seed=0) for name in rivals}
            for metric in METRICS
        },
        "test": {
            metric: {
                name: [test.score(metric, weights, 1 + draw) for draw in range(settings.draws)]
                for name, weights in everyone.items()
            }
            for metric in METRICS
        },
        "check": check(run, test),
    }
    return facts, everyone


def profile(history: History | None, steps: int) -> Scores:
    """Return mean age and width of an average as shares of the run, and the share of the start."""
    if history is None:
        return {"mean_age": 0.0, "width": 0.0, "start": 0.0}
    found = moments(history)
    return {
        "mean_age": found.mean_age / steps,
        "width": found.deviation / steps,
        "start": found.first_share,
    }


def check(run: Run, judge: Judge) -> dict[str, float]:
    """Compare an average that was kept with what the files give for it.

    With e = sum_i c_i p_i - p, which sums to 0, the two differ in each weight by the sum over the
    steps of e_t (weight_t - mean weight): over all weights at most |e| times their spread.
    """
    kept = run.online[str(CHECKED)]
    solution = solve(run.files, CHECKED)
    (made,) = reconstruct(run.files, [CHECKED])
    norm = sum(weight.square().sum().item() for weight in kept.values())
    to_raw = squared_distance(kept, run.online[RAW])
    off = squared_distance(kept, made)
    length = math.sqrt(moments(solution.history).concentration)
    return {
        "predicted_error": solution.predicted_error,
        "distance": math.sqrt(off / norm),
        "distance_bound": solution.predicted_error * length * run.spread / math.sqrt(norm),
        "distance_of_raw_weights": math.sqrt(to_raw / norm),
        "loss_kept": judge.score("loss", kept, seed=1),
        "loss_reconstructed": judge.score("loss", made, seed=1),
    }


def real_distances(features: nn.Module, data: Data) -> Scores:
    """Return the Fréchet distances between real images: what no model can be expected to beat."""
    train, validation, test = (statistics_of(features, part.images) for part in data)
    return {
        "train_to_validation": frechet_distance(train, validation),
        "train_to_test": frechet_distance(train, test),
        "validation_to_test": frechet_distance(validation, test),
    }


# ------------------------------------------------------------------ tables


def table_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the scores on the test images as flat rows, lower is better.

    `std` is over the runs, `better_than_default` counts them. `noise` is what other noise makes of
    the difference to the default: the standard deviation over the draws within a run.
    """
    rows = []
    for metric in METRICS:
        for name in runs[0]["test"][metric]:
            draws = [run["test"][metric][name] for run in runs]
            base = [run["test"][metric][DEFAULT] for run in runs]
            scores = [statistics.mean(values) for values in draws]
            differences = [
                [a - b for a, b in zip(ours, theirs, strict=True)]
                for ours, theirs in zip(draws, base, strict=True)
            ]
            variances = [statistics.variance(values) for values in differences]
            rows.append(
                {
                    "metric": metric,
                    "weights": name,
                    "mean": statistics.mean(scores),
                    "std": statistics.stdev(scores),
                    "difference": statistics.mean(map(statistics.mean, differences)),
                    "noise": math.sqrt(statistics.mean(variances)),
                    "better_than_default": sum(statistics.mean(of) < 0 for of in differences),
                    "runs": len(runs),
                    "width": statistics.mean(run["profiles"][name]["width"] for run in runs),
                    "mean_age": statistics.mean(run["profiles"][name]["mean_age"] for run in runs),
                }
            )
    return rows


def gain_rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return by how much the chosen average is better than the default, a value a run.

    On the validation images, with which it was chosen, and on the test images, which decide.
    """
    rows = []
    for metric in METRICS:
        curves = [Curve.from_dict(run["curves"][metric]) for run in runs]
        chosen = [[curve.best.score] for curve in curves]
        default = [[run["validation"][metric][DEFAULT]] for run in runs]
        rows.append(gain_row(metric, "validation images", chosen, default))
        chosen = [run["test"][metric][BEST[metric]] for run in runs]
        default = [run["test"][metric][DEFAULT] for run in runs]
        rows.append(gain_row(metric, "test images", chosen, default))
    return rows


def gain_row(
    metric: str, images: str, chosen: list[list[float]], default: list[list[float]]
) -> dict[str, Any]:
    """Return one line of the gains, from the scores by run and by draw."""
    gains = [
        statistics.mean(b - a for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(chosen, default, strict=True)
    ]
    shares = [gain / statistics.mean(of) for gain, of in zip(gains, default, strict=True)]
    return {"metric": metric, "images": images, "gains": gains, "shares": shares}


def tables(facts: dict[str, Any]) -> dict[str, list[str]]:
    """Return the tables by title, as lines of Markdown."""
    return {
        "Scores on the test images, lower is better": score_table(facts["table"]),
        "Chosen widths": width_table(facts["runs"], facts["settings"]["steps"]),
        "What the choice gains over the default": gain_table(facts["gains"]),
        f"{CHECKED}, kept and made from the files": check_table(facts["runs"]),
    }


def score_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the scores, a line for each kind of weights."""
    cells = {(row["weights"], row["metric"]): row for row in rows}
    lines = []
    for name in dict.fromkeys(row["weights"] for row in rows):
        line = [name, percent(cells[name, "loss"]["mean_age"], 1)]
        for metric in METRICS:
            row = cells[name, metric]
            text = f"{number(metric, row['mean'])} ± {number(metric, row['std'])}"
            count = f", {row['better_than_default']} of {row['runs']}"
            noise = f"± {number(metric, row['noise'])}"
            line += [text, ""] if name == DEFAULT else [text + count, noise]
        lines.append(line)
    columns = [text for name in METRICS.values() for text in (name, "noise")]
    return grid(["weights", "mean age", *columns], lines)


def width_table(runs: list[dict[str, Any]], steps: int) -> list[str]:
    """Return the best widths, a column a run; `edge` where the files give none beyond it."""
    curves = {
        f"denoising loss, step {run['at']:,}": [other["earlier"][i] for other in runs]
        for i, run in enumerate(runs[0]["earlier"])
    }
    for metric in reversed(METRICS):
        name = METRICS[metric].partition(",")[0]
        curves[f"{name}, step {steps:,}"] = [run["curves"][metric] for run in runs]
    lines = []
    for name, found in curves.items():
        known = [Curve.from_dict(curve) for curve in found]
        edge = [", edge" if curve.at_edge else "" for curve in known]
        widths = [f"{curve.best.horizon:.3f}" for curve in known]
        in_steps = statistics.mean(curve.best.horizon * curve.at for curve in known)
        cells = map("".join, zip(widths, edge, strict=True))
        lines.append([name, *cells, f"{in_steps:,.0f}"])
    return grid(["best by", *(f"seed {run['seed']}" for run in runs), "mean, in steps"], lines)


def gain_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the gains in percent of the score of the default, a column a run."""
    lines = [
        [METRICS[row["metric"]].partition(",")[0], row["images"]]
        + [f"{share:+.1%}".replace("%", " %") for share in row["shares"]]
        for row in rows
    ]
    seeds = range(len(rows[0]["shares"]))
    return grid(["chosen by", "gain on", *(f"seed {seed}" for seed in seeds)], lines)


def check_table(runs: list[dict[str, Any]]) -> list[str]:
    """Return how near the files come to an average that was kept, a column a run."""
    checks = [run["check"] for run in runs]
    shares = {
        "predicted error": ("predicted_error", 2),
        "distance of the two, of the weights": ("distance", 4),
        "the most that it can be": ("distance_bound", 2),
        "distance of the raw weights": ("distance_of_raw_weights", 1),
    }
    losses = {
        "loss of the one that was kept": "loss_kept",
        "loss of the other": "loss_reconstructed",
    }
    return grid(
        ["", *(f"seed {run['seed']}" for run in runs)],
        [[n, *(percent(c[key], digits) for c in checks)] for n, (key, digits) in shares.items()]
        + [[n, *(f"{c[key]:.5f}" for c in checks)] for n, key in losses.items()],
    )


def number(metric: str, value: float) -> str:
    """Return a score with the digits that matter."""
    return f"{value:.4f}" if metric == "loss" else f"{value:.3f}"


def percent(share: float, digits: int) -> str:
    """Return a share as text."""
    return f"{100 * share:.{digits}f} %"


def grid(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def print_tables(console: Console, facts: dict[str, Any]) -> None:
    """Print the tables, and what they are of."""
    for title, lines in tables(facts).items():
        table = Table(title=title, title_justify="left", title_style="bold")
        head, _, *rows = ([text.strip() for text in line.split("|")[1:-1]] for line in lines)
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    real, settings = facts["real"], facts["settings"]
    console.print(
        f"Scores: mean ± standard deviation of {settings['seeds']} runs; k of n: in so many the "
        "weights are better than the default. Mean age: of the states in the average, as a share "
        "of the run. Noise: the standard deviation of the difference to the default, over "
        f"{settings['draws']} draws of the noise within a run. Between real images, the Fréchet "
        f"distance is {real['train_to_validation']:.3f} from training to validation images, "
        f"{real['train_to_test']:.3f} from training to test images, and "
        f"{real['validation_to_test']:.3f} from validation to test images."
    )


# ------------------------------------------------------------------ the pictures

MARKED = {DEFAULT: "o", "EMA(0.99)": "v", "EMA(0.999)": "^", "Uniform()": "s"}
COLORS = "#0072B2", "#E69F00", "#111111", "#C8500A"
DASHES: tuple[Any, ...] = "-", (0, (7, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5))  # in gray


def draw(facts: dict[str, Any], path: Path) -> None:
    """Draw both scores over the width: what was searched, what was kept, and the raw weights."""
    figure, axes = figure_of(1, 2, (11, 4.9))
    for axis, (metric, title) in zip(axes, METRICS.items(), strict=True):
        found: list[float] = []
        for run in facts["runs"]:
            curve = Curve.from_dict(run["curves"][metric])
            found += [point.score for point in curve.points]
            found += [run["validation"][metric][name] for name in (RAW, *MARKED)]
            draw_curve(axis, curve, run, metric)
        low, high = min(found), max(found)
        axis.set(xscale="log", xlim=(0.004, 0.33), title=f"{title}, on the validation images")
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_xlabel("width of the average, share of the run (log scale)")
        axis.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"], minor=False)
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    entries = zip(*axes[0].get_legend_handles_labels(), strict=True)
    ordered = sorted(entries, key=lambda entry: not entry[1].startswith("seed"))
    figure.legend(
        *zip(*ordered, strict=True), loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    plot.save(figure, path)


def draw_curve(axis: Any, curve: Curve, run: dict[str, Any], metric: str) -> None:
    """Draw one run: its curve and its best point, and what was kept at the width that it has."""
    number, scores = run["seed"] % len(COLORS), run["validation"][metric]
    color, dashes = COLORS[number], DASHES[number]
    first = run["seed"] == 0  # what is alike in all runs is in the legend once
    axis.plot(
        [point.horizon for point in curve.points],
        [point.score for point in curve.points],
        color=color, linestyle=dashes, linewidth=1.8, label=f"seed {run['seed']}, from the files",
    )  # fmt: skip
    axis.plot(
        curve.best.horizon, curve.best.score, "*", color=color, markersize=13,
        label="best of these" if first else None,
    )  # fmt: skip
    axis.axhline(
        scores[RAW], color=color, linestyle=dashes, linewidth=0.8, label=RAW if first else None
    )
    for name, marker in MARKED.items():
        axis.plot(
            run["profiles"][name]["width"], scores[name], marker, label=name if first else None,
            markerfacecolor="white", markeredgecolor=color, markersize=6,
        )  # fmt: skip


def draw_samples(model: Denoiser, shown: dict[str, Weights], path: Path) -> None:
    """Draw what each of several sets of weights makes of the same noise, a row each."""
    figure, axes = figure_of(len(shown), 1, (11, 0.52 * len(shown)))
    for axis, (name, weights) in zip(axes, shown.items(), strict=True):
        model.load_state_dict(weights)
        images = sample(model, 20, seed=0).images.reshape(20, 8, 8)
        tiles = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0).permute(1, 0, 2).flatten(1)
        axis.imshow(tiles.numpy(), cmap="gray_r", vmin=-1, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    plot.save(figure, path)


def figure_of(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """Return a figure and its axes."""
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    return figure, figure.subplots(rows, columns)


def to_show(run: Run, everyone: dict[str, Weights], curve: Curve) -> dict[str, Weights]:
    """Return weights from which to draw samples: raw, of too short a horizon, best, too long."""
    short, long = (PowerLaw(width) for width in curve.supported)
    ends = reconstruct(run.files, [short, long])
    best = curve.best.horizon
    return {
        RAW: run.online[RAW],
        f"{short}, shortest": ends[0],
        f"PowerLaw(std={best:.3f}), best by loss": everyone[BEST["loss"]],
        f"{long}, longest": ends[1],
        "EMA(0.9999)": run.online["EMA(0.9999)"],
    }


# ------------------------------------------------------------------ the program


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Runs, with the seeds 0, 1, ...")] = 4,
    steps: Annotated[int, typer.Option(min=200, help="Optimizer steps of a run.")] = Settings.steps,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate, constant.")] = Settings.lr,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/horizon"),
    docs: Annotated[Path | None, typer.Option(help="Folder that gets a copy of them.")] = None,
    fast: Annotated[bool, typer.Option(help="Few steps, few samples: does it run?")] = False,
) -> None:
    """Train, then find the horizon, and compare it with what is usually kept."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the network is too small to share
    settings = Settings(seeds=seeds, steps=steps, lr=lr)
    if fast:
        settings = replace(
            settings, seeds=2, steps=240, width=64, classifier_steps=300, evaluations=5,
            samples=100, draws=2,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    data = load()
    features, accuracy = train_features(settings, data)
    scratch = Denoiser(settings.width, data.train.images.std().item())
    validation, test = (
        Judge(scratch, features, part, settings.samples) for part in (data.validation, data.test)
    )

    runs = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=settings.seeds * settings.steps)
        for seed in range(settings.seeds):
            folder = out / "snapshots" / f"seed-{seed}"
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
            progress.update(task, description=f"seed {seed}")
            run = train(settings, seed, data, folder, lambda: progress.advance(task))
            progress.update(task, description=f"seed {seed}, choosing")
            numbers, everyone = measure(settings, seed, run, validation, test)
            runs.append(numbers)
            if seed == 0:
                curve = Curve.from_dict(numbers["curves"]["loss"])
                draw_samples(scratch, to_show(run, everyone, curve), out / "samples.png")
                references = {name: numbers["validation"]["loss"][name] for name in MARKED}
                plot.save(plot.scores(curve, references), out / "search.png")

    facts = {
        "command": shlex.join(["python", "examples/choose_the_horizon.py", *sys.argv[1:]]),
        "settings": asdict(settings),
        "versions": versions(),
        "classifier_accuracy": accuracy,
        "real": real_distances(features, data),
        "table": table_rows(runs),
        "gains": gain_rows(runs),
        "runs": runs,
    }
    print_tables(console, facts)
    draw(facts, out / "horizon.png")
    facts["seconds"] = round(time.perf_counter() - started, 1)
    (out / "horizon.json").write_text(json.dumps(facts, indent=1) + "\n")
    names = ["horizon.json", "horizon.png", "samples.png"]
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(out / name, docs / name)
    console.print(f"Wrote {', '.join(names)} to {out} after {facts['seconds']:.0f} seconds.")


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    names = ["polyak", "torch", "scikit-learn"]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


if __name__ == "__main__":
    typer.run(main)
