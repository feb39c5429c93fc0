"""Stage 1: learn features without labels. BYOL on handwritten digits, and four kinds of target.

A student sees two distorted views of each image. From one view it predicts what its teacher makes
of the other. The teacher takes no gradient: it is an average of the student, and the decay of that
average is the whole difference between the targets that are compared:

    ema       Cosine(0.99, 1.0, steps)   BYOL's own schedule
    constant  Constant(0.99)             an average of a fixed horizon
    copy      Constant(0.0)              no average: the student itself, without gradient (SimSiam)
    frozen    Constant(1.0)              no teacher at all: random weights, which never move

The student has a backbone, a projector and a predictor; the teacher has no predictor, and the
policy ``Only("backbone", "projector")`` says so. BYOL's teacher stays in train mode: it normalizes
each batch by that batch, and so its BatchNorm layers keep running statistics of *its own*
activations. These are left alone (policy `parameters`); averaging the student's into them would mix
in statistics that belong to other weights. They count afterwards, when the teacher is used in eval
mode, and the file of the teacher has them. (Here it hardly matters: with averaged ones the probe
differs by at most 0.1 points, seeds 10 and 11.)

Nothing pushes the views of different images apart, so that a constant would solve the task. Whether
that happens is measured during the run and reported: see `collapse`.

Each run leaves its two backbones, which ``classify.py`` reads, under their own names:

    python examples/ssl/pretrain.py
    python examples/ssl/pretrain.py --seeds 1 --no-predictor --out out/collapsed

Batch size and number of steps were chosen on the seeds 10 and 11, for what the EMA target gives in
the time there is; the rest is as first written down. The other targets run with the same settings.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import torch
import torch.nn.functional as F
import typer
from common import OUT, Fast, Out, Row, Seeds, console, print_table, progress, row, write_results
from network import FEATURES, Backbone, backbone_path, load_images
from safetensors.torch import save_file
from torch import Tensor, nn

from polyak import EMA, Constant, Cosine, Only, parameters
from polyak.decay import Decay


class Target(str, Enum):
    """What the student predicts."""

    ema = "ema"
    constant = "constant"
    copy = "copy"
    frozen = "frozen"


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    steps: int = 800
    batch_size: int = 64
    lr: float = 2e-3
    weight_decay: float = 1e-4
    decay: float = 0.99  # of the constant target, and at the start of the schedule
    predictor: bool = True
    measure_every: int = 100  # steps


# ------------------------------------------------------------------ student and teacher


class Student(nn.Module):
    """A backbone with BYOL's two heads."""

    def __init__(self, predictor: bool = True) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.projector = head(FEATURES)
        self.predictor = head(DIMENSIONS) if predictor else nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        """Return what the student predicts the teacher to see in another view."""
        return self.predictor(project(self, images))


DIMENSIONS = 64


def head(features: int) -> nn.Module:
    """Return a perceptron from some features to the dimensions of the projection."""
    return nn.Sequential(
        nn.Linear(features, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, DIMENSIONS)
    )


def project(model: nn.Module, images: Tensor) -> Tensor:
    """Return the projections by student or teacher."""
    return model.projector(model.backbone(images))


class Run(NamedTuple):
    """All that one pretraining holds."""

    student: Student
    teacher: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer


def begin(target: Target, seed: int, settings: Settings) -> Run:
    """Make student, teacher and optimizer. From here on each optimizer step moves the teacher."""
    torch.manual_seed(seed)
    student = Student(settings.predictor)
    teacher = copy.deepcopy(student)
    del teacher.predictor
    policy = Only("backbone", "projector", policy=parameters)
    ema = EMA(student, decay_of(target, settings), into=teacher, policy=policy)
    teacher.train()  # BYOL's teacher normalizes by the batch; the EMA had put it into eval mode
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    ema.attach(optimizer)
    return Run(student, teacher, ema, optimizer)


def decay_of(target: Target, settings: Settings) -> Decay:
    """Return the decay that makes this target."""
    return {
        Target.ema: Cosine(settings.decay, 1.0, settings.steps),
        Target.constant: Constant(settings.decay),
        Target.copy: Constant(0.0),
        Target.frozen: Constant(1.0),
    }[target]


def train(
    run: Run,
    images: Tensor,
    settings: Settings,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, float]]:
    """Pretrain; return the measures of collapse over time."""
    measures = []
    losses = []
    for step in range(1, settings.steps + 1):
        batch = images[torch.randint(len(images), (settings.batch_size,))]
        losses.append(train_step(run, batch))
        if step % settings.measure_every == 0 or step == settings.steps:
            loss = sum(losses) / len(losses)
            measures.append({"step": step, "loss": loss} | collapse(run.student, images))
            losses.clear()
        advance()
    return measures


def train_step(run: Run, images: Tensor) -> float:
    """Let the student predict from each view what the teacher makes of the other."""
    views = torch.cat([distorted(images), distorted(images)])
    with torch.no_grad():
        seen = project(run.teacher, views).roll(len(images), 0)
    loss = 2 - 2 * F.cosine_similarity(run.student(views), seen).mean()
    run.optimizer.zero_grad()
    loss.backward()
    run.optimizer.step()
    return loss.item()


# ------------------------------------------------------------------ distorted views


def distorted(images: Tensor) -> Tensor:
    """Return each image turned, scaled, shifted, erased in a square, and with noise."""
    n = len(images)
    turn = between(n, -0.35, 0.35)  # radians, 20 degrees
    scale = between(n, 0.8, 1.2)
    shift = between((n, 2), -0.3, 0.3)  # of half the width: 1.2 pixels
    cos, sin = torch.cos(turn) * scale, torch.sin(turn) * scale
    moves = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(n, 2, 3)
    grid = F.affine_grid(moves, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    images = images * between((n, 1, 1, 1), 0.7, 1.3) + 0.1 * torch.randn_like(images)
    return erased(images, side=3)


def erased(images: Tensor, side: int) -> Tensor:
    """Return the images with a square somewhere set to zero, in half of them."""
    n, _, height, width = images.shape
    top = torch.randint(height - side + 1, (n, 1))
    left = torch.randint(width - side + 1, (n, 1))
    rows = torch.arange(height)
    columns = torch.arange(width)
    inside_rows = (rows >= top) & (rows < top + side) & (torch.rand(n, 1) < 0.5)
    inside_columns = (columns >= left) & (columns < left + side)
    hidden = inside_rows[:, :, None] & inside_columns[:, None, :]
    return images.masked_fill(hidden[:, None], 0.0)


def between(shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    """Return uniform random numbers."""
    return low + (high - low) * torch.rand(shape)


# ------------------------------------------------------------------ collapse

LEAST_SPREAD = 0.1
LEAST_RANK = 3.0


@torch.no_grad()
def collapse(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Measure how different a model's projections of different images are.

    Returns:
        ``spread``: the standard deviation of the normalized projections, per dimension and times
        the root of their number: 1 if they point in all directions alike, 0 if all are the same.
        ``rank``: how many directions the features use, exp(entropy of the shares of the variance)
        (Roy and Vetterli 2007): 1 if all lie on a line.
    """
    was_training = model.training
    model.eval()
    features = model.backbone(images)
    projections = F.normalize(model.projector(features), dim=1)
    model.train(was_training)
    spread = projections.std(dim=0).mean() * projections.shape[1] ** 0.5
    return {"spread": spread.item(), "rank": effective_rank(features)}


def effective_rank(features: Tensor) -> float:
    """Return exp(entropy) of the shares that the principal directions have in the variance."""
    values = torch.linalg.svdvals((features - features.mean(dim=0)).double()) ** 2
    if values.sum() == 0:
        return 1.0
    shares = values / values.sum()
    return torch.exp(torch.special.entr(shares).sum()).item()


def has_collapsed(measures: dict[str, float]) -> bool:
    """Whether the student tells images apart too little for its features to be of use."""
    return measures["spread"] < LEAST_SPREAD or measures["rank"] < LEAST_RANK


# ------------------------------------------------------------------ the files


def save(run: Run, target: Target, seed: int, out: Path) -> None:
    """Write both backbones under their own names: a plain backbone loads them."""
    run.ema.save(backbone_path(out, target.value, seed, "teacher"), part="backbone")
    save_file(run.student.backbone.state_dict(), backbone_path(out, target.value, seed, "student"))


# ------------------------------------------------------------------ the picture

COLORS = {"ema": "#0072B2", "constant": "#E69F00", "copy": "#111111", "frozen": "#9a9a9a"}


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the measures of collapse during each run, one color per target."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", dpi=150)
    for axis, name, least in zip(axes, ("spread", "rank"), (LEAST_SPREAD, LEAST_RANK), strict=True):
        for run in runs:
            steps = [measures["step"] for measures in run["measures"]]
            values = [measures[name] for measures in run["measures"]]
            label = f"{run['target']} target" if run["seed"] == 0 else None
            axis.plot(steps, values, color=COLORS[run["target"]], linewidth=1.5, label=label)
        axis.axhline(least, color="#C8500A", linestyle=(0, (4, 2)), label="collapsed below")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("optimizer step")
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("Spread of the student's projections", fontsize=10.5)
    axes[1].set_title("Effective rank of the student's features", fontsize=10.5)
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)


# ------------------------------------------------------------------ the program


def main(
    seeds: Seeds = 4,
    out: Out = OUT,
    target: Annotated[list[Target], typer.Option(help="By default all of them.")] = tuple(Target),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps per run.")] = Settings.steps,
    predictor: Annotated[bool, typer.Option(help="Without it the student collapses.")] = True,
    fast: Fast = False,
) -> None:
    """Pretrain a backbone without labels, for each kind of target and each seed."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the network is too small to share
    settings = Settings(steps=steps, predictor=predictor)
    if fast:
        seeds = min(seeds, 2)
        settings = replace(settings, steps=20, decay=0.6, measure_every=10)
    out.mkdir(parents=True, exist_ok=True)
    images, _ = load_images()

    runs = []
    with progress() as bar:
        task = bar.add_task("", total=seeds * len(target) * settings.steps)
        for kind, seed in itertools.product(target, range(seeds)):
            bar.update(task, description=f"target {kind.value}, seed {seed}")
            run = begin(kind, seed, settings)
            measures = train(run, images, settings, advance=lambda: bar.advance(task))
            save(run, kind, seed, out)
            runs.append({"target": kind.value, "seed": seed, "measures": measures})
    for found in runs:
        found["collapsed"] = has_collapsed(found["measures"][-1])

    rows = table_rows(runs)
    print_table(rows, "Pretraining without labels: the student after the last step")
    report_collapse(runs)
    draw(runs, out / "pretrain.png")
    seconds = time.perf_counter() - started
    write_results(out / "pretrain.json", rows, asdict(settings), seconds, runs=runs)


def table_rows(runs: list[dict[str, Any]]) -> list[Row]:
    """Return the last measures of all runs."""
    rows = []
    for target in dict.fromkeys(run["target"] for run in runs):
        last = [run["measures"][-1] for run in runs if run["target"] == target]
        for name, of in {"loss": 1, "spread, %": 100, "rank": 1}.items():
            values = [of * measures[name.partition(",")[0]] for measures in last]
            rows.append(row(name, f"{target} target", values, "last measure"))
    return rows


def report_collapse(runs: list[dict[str, Any]]) -> None:
    """Say which runs have collapsed, or that none has."""
    collapsed = [f"{run['target']} target, seed {run['seed']}" for run in runs if run["collapsed"]]
    if collapsed:
        console.print(
            f"[bold red]Collapsed[/]: {len(collapsed)} of {len(runs)} runs, with a spread below "
            f"{LEAST_SPREAD:.0%} or a rank below {LEAST_RANK}: {'; '.join(collapsed)}. To them "
            "all images look alike."
        )
    else:
        console.print(f"None of {len(runs)} runs has collapsed.")


if __name__ == "__main__":
    typer.run(main)
