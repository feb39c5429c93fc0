"""Segmentation with few labels: what does a self-supervised teacher give, and what an average?

The scenes are composed (see `scenes`): real digit scans on real photographs, with true masks of 6
classes (background and the digits 0 to 4), 16x16 pixels.

1. Pretraining without labels. The student sees a scene with half of it hidden and its contrast
   changed; it predicts the teacher's features of the whole scene, place by place where it was
   hidden (the dense loss, masked as in data2vec and iBOT) and as one vector (the global loss). Each
   prediction has to tell its own target from those of the rest of the batch (as in MoCo v3). The
   teacher is ``EMA(student, Cosine(...), into=teacher, policy=Only("backbone", "projector"))``. A
   second pretraining has the global loss alone.
2. A linear head (a 1x1 convolution) on the frozen features of each backbone, from a few labeled
   scenes.
3. Fine-tuning of the whole network from random initialization and from the teacher, at a constant
   learning rate and under a cosine schedule, with an EMA of the segmentation model for validation.

Tuned on seeds 10 and 11, which the table does not use, by hand and with few tries: the losses
(regression of standardized features, as in data2vec, gained nothing in 600 steps), the share that
is hidden (.3, .5), what `recontrast` does, the rate of fine-tuning (.002, .005), the number of
digits and of labels (so that the task is neither hopeless nor done). The 700 steps of pretraining
are what the time allows: 1000, seen on the seeds of the table too, came out alike. Everything else
is a first guess.

    python examples/ssl/segment.py
    python examples/ssl/segment.py --labeled 50 --seeds 8
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import torch
import typer
from common import (
    OUT,
    Fast,
    Out,
    Row,
    Seeds,
    console,
    print_pairs,
    print_table,
    progress,
    row,
    write_results,
)
from safetensors.torch import load_file, save_file
from scenes import CLASSES, SIZE, Scenes, make_scenes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from polyak import EMA, Cosine, Debiased, Only
from polyak.decay import Decay

CELL = 2  # pixels along a side of a cell: the backbone gives one feature vector per cell
GRID = SIZE // CELL


@dataclass(frozen=True)
class Settings:
    """What all runs have in common."""

    seeds: int
    unlabeled: int = 4000  # scenes to pretrain on
    labeled: int = 100  # of these, with masks: for the linear head and for fine-tuning
    test: int = 1000
    width: int = 48
    steps: int = 700  # of pretraining
    batch: int = 64
    lr: float = 2e-3
    places: int = 512  # hidden places of a batch that the dense loss looks at
    hidden: float = 0.5  # share of a scene
    teacher_decay: float = 0.99  # at first; by a cosine to 1
    probe_steps: int = 300
    tune_labeled: int = 300
    tune_steps: int = 1000
    tune_batch: int = 16
    tune_lr: float = 5e-3
    average_decay: float = 0.98  # of the EMA for validation


# ------------------------------------------------------------------ the networks


class Block(nn.Module):
    """A residual block of one convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.convolution = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Return features of the same shape."""
        return features + self.convolution(F.relu(self.norm(features)))


class Backbone(nn.Module):
    """Scenes (n, 1, 16, 16) to dense features (n, width, 8, 8)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(4)), nn.GroupNorm(8, width))

    def forward(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Return the features; what is hidden (n, 1, 16, 16; 1 where it is) is not seen."""
        if hidden is None:
            hidden = torch.zeros_like(images)
        seen = (4 * images - 2) * (1 - hidden)
        return self.blocks(self.stem(torch.cat([seen, hidden], 1)))


class Pretrained(nn.Module):
    """A backbone, and what the self-supervised losses need on top of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.projector = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, width))
        self.predictor = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, width))
        self.dense_predictor = nn.Sequential(
            nn.Conv2d(width, 96, 1), nn.ReLU(), nn.Conv2d(96, width, 1)
        )


class Segmenter(nn.Module):
    """A backbone with a linear head: each cell's features to the classes of its pixels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = Backbone(width)
        self.head = nn.Conv2d(width, len(CLASSES) * CELL**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (n, classes, 16, 16)."""
        return to_pixels(self.head(self.backbone(images)))


def to_pixels(cells: Tensor) -> Tensor:
    """Return (n, 4 c, 8, 8) as (n, c, 16, 16)."""
    return F.pixel_shuffle(cells, CELL)


# ------------------------------------------------------------------ 1. pretraining


def pretrain(
    images: Tensor, settings: Settings, seed: int, dense: bool
) -> tuple[Pretrained, EMA, dict[str, float]]:
    """Pretrain without labels.

    Returns:
        The student, the average that is the teacher, and the signs of a collapse.
    """
    torch.manual_seed(seed)
    student = Pretrained(settings.width)
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), settings.lr, weight_decay=0.01)
    schedule = warmup_and_cosine(optimizer, settings.steps)
    decay = Cosine(settings.teacher_decay, 1.0, settings.steps)
    ema = EMA(student, decay, into=teacher, policy=Only("backbone", "projector"))
    ema.attach(optimizer)

    for _ in range(settings.steps):
        batch = images[torch.randint(len(images), (settings.batch,))]
        hidden = hide(settings.batch, settings.hidden)
        with torch.no_grad():
            target = teacher.backbone(recontrast(batch))
            whole_target = teacher.projector(target.mean((2, 3)))
        features = student.backbone(recontrast(batch), hidden)
        whole = student.predictor(student.projector(features.mean((2, 3))))
        loss = recognition_loss(whole, whole_target)
        if dense:
            where = hidden[:, 0, ::CELL, ::CELL].bool()
            wanted = target.movedim(1, -1)[where]
            predicted = student.dense_predictor(features).movedim(1, -1)[where]
            some = torch.randperm(len(wanted))[: settings.places]
            loss = loss + recognition_loss(predicted[some], wanted[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return student, ema, {"loss": loss.item()} | collapse(teacher.backbone, images[:500])


def recontrast(images: Tensor) -> Tensor:
    """Return the images with a random contrast, brightness and polarity each."""
    shape = len(images), 1, 1, 1
    sign = torch.randint(0, 2, shape) * 2 - 1
    contrast = torch.empty(shape).uniform_(0.5, 1.2) * sign
    return 0.5 + contrast * (images - 0.5) + torch.empty(shape).uniform_(-0.2, 0.2)


def hide(count: int, share: float) -> Tensor:
    """Return which pixels to hide, (n, 1, 16, 16): random blocks of 4x4 pixels."""
    blocks = torch.rand(count, 1, SIZE // 4, SIZE // 4).flatten(1)
    hidden = blocks.argsort(1) < round(share * blocks.shape[1])
    return F.interpolate(hidden.float().view(count, 1, SIZE // 4, SIZE // 4), scale_factor=4)


def recognition_loss(predicted: Tensor, wanted: Tensor, temperature: float = 0.1) -> Tensor:
    """Return how badly each prediction tells its own target from those of the others."""
    wanted = wanted - wanted.mean(0)
    logits = F.normalize(predicted, dim=1) @ F.normalize(wanted, dim=1).T / temperature
    return F.cross_entropy(logits, torch.arange(len(logits)))


def warmup_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Return a schedule that rises over a tenth of the steps and then falls to 0."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        rising = (step + 1) / warmup
        falling = (1 + math.cos(math.pi * min(1.0, step / steps))) / 2
        return min(rising, falling)

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def collapse(backbone: Backbone, images: Tensor) -> dict[str, float]:
    """Return what tells of a collapse: how features vary, over scenes and over places.

    ``spread`` is the share of the features' mean square that is variance between scenes and places;
    ``rank`` the effective number of directions (the exponential of the spectrum's entropy). After a
    collapse they are near 0 and 1.
    """
    features = backbone(images).movedim(1, -1).flatten(0, 2)
    centered = features - features.mean(0)
    spectrum = torch.linalg.eigvalsh(centered.T @ centered).clamp(min=0)
    shares = spectrum / spectrum.sum().clamp(min=1e-12)
    rank = torch.special.entr(shares).sum().exp()
    return {
        "spread": (centered.square().mean() / features.square().mean()).item(),
        "rank": rank.item(),
    }


def has_collapsed(signs: dict[str, float]) -> bool:
    """Return whether the features hardly vary, or in hardly more than one direction."""
    return signs["spread"] < 0.05 or signs["rank"] < 2


# ------------------------------------------------------------------ 2. and 3. with few labels


def probe(backbone: Backbone, labeled: Scenes, test: Scenes, settings: Settings) -> Tensor:
    """Train a linear head on frozen features; return what it predicts of the test scenes."""
    torch.manual_seed(0)
    features, test_features = dense_features(backbone, labeled), dense_features(backbone, test)
    mean, std = features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True)
    features, test_features = (features - mean) / std, (test_features - mean) / std
    head = nn.Conv2d(features.shape[1], len(CLASSES) * CELL**2, 1)
    rarity = labeled.classes.flatten().bincount(minlength=len(CLASSES)).clamp(min=1).rsqrt()
    optimizer = torch.optim.AdamW(head.parameters(), 1e-2, weight_decay=0.1)
    schedule = CosineAnnealingLR(optimizer, settings.probe_steps)
    for _ in range(settings.probe_steps):
        optimizer.zero_grad()
        logits = to_pixels(head(features))
        F.cross_entropy(logits, labeled.classes, weight=rarity / rarity.mean()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return to_pixels(head(test_features)).argmax(1)


@torch.no_grad()
def dense_features(backbone: Backbone, scenes: Scenes) -> Tensor:
    """Return the features of all scenes."""
    return torch.cat([backbone(images) for images in scenes.images.split(250)])


def fine_tune(
    backbone: Backbone,
    labeled: Scenes,
    settings: Settings,
    seed: int,
    annealed: bool,
    decay: Decay | None,
) -> tuple[Segmenter, EMA | None]:
    """Train a segmenter from a backbone's weights; with a decay, an average watches.

    The trained weights are the same, bit for bit, with the average and without.
    """
    torch.manual_seed(seed)
    model = Segmenter(settings.width)
    model.backbone.load_state_dict(backbone.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), settings.tune_lr, weight_decay=0.01)
    schedule = CosineAnnealingLR(optimizer, settings.tune_steps)
    ema = None
    if decay is not None:
        ema = EMA(model, decay)
        ema.attach(optimizer)
    for _ in range(settings.tune_steps):
        batch = torch.randint(len(labeled.images), (settings.tune_batch,))
        optimizer.zero_grad()
        logits = model(recontrast(labeled.images[batch]))
        F.cross_entropy(logits, labeled.classes[batch]).backward()
        optimizer.step()
        if annealed:
            schedule.step()
    return model, ema


@torch.no_grad()
def segment(model: Segmenter, scenes: Scenes) -> Tensor:
    """Return the predicted classes (n, 16, 16)."""
    return torch.cat([model(images).argmax(1) for images in scenes.images.split(250)])


def mean_iou(predicted: Tensor, classes: Tensor) -> float:
    """Return intersection over union in %, the mean over the classes, of all pixels together."""
    count = len(CLASSES)
    table = (count * classes + predicted).flatten().bincount(minlength=count**2)
    table = table.view(count, count).double()
    both = table.diagonal()
    return 100 * (both / (table.sum(0) + table.sum(1) - both).clamp(min=1)).mean().item()


# ------------------------------------------------------------------ the experiment

LINEAR, CONSTANT, ANNEALED = "linear, frozen", "fine-tuned, constant rate", "fine-tuned, cosine"
RANDOM, STUDENT, TEACHER = "random initialization", "student", "teacher"
GLOBAL = "teacher, global loss alone"
AVERAGE = " + EMA"
BACKBONES = {
    LINEAR: [RANDOM, STUDENT, TEACHER, GLOBAL],
    CONSTANT: [RANDOM, TEACHER],
    ANNEALED: [RANDOM, TEACHER, GLOBAL],
}
PAIRS = [
    (TEACHER, RANDOM),
    (TEACHER, STUDENT),
    (GLOBAL, RANDOM),
    (TEACHER, GLOBAL),
    (TEACHER + AVERAGE, RANDOM + AVERAGE),
    (RANDOM + AVERAGE, RANDOM),
    (TEACHER + AVERAGE, TEACHER),
]
STAGES = 2 + 1 + 5  # of a seed: two pretrainings, the linear heads, five fine-tunings


class Found(NamedTuple):
    """What one seed gave: what was predicted by (task, method), and signs of a collapse."""

    test: Scenes
    predictions: dict[tuple[str, str], Tensor]
    collapse: dict[str, dict[str, float]]


def run_seed(seed: int, settings: Settings, out: Path, tell: Callable[[str], None]) -> Found:
    """Pretrain, save, and segment with what was saved; ``tell`` hears of each stage."""
    unlabeled = make_scenes(settings.unlabeled, "train", seed)
    test = make_scenes(settings.test, "test", seed)
    torch.manual_seed(seed)
    backbones = {RANDOM: Backbone(settings.width)}
    signs: dict[str, dict[str, float]] = {}
    for name, dense in ((TEACHER, True), (GLOBAL, False)):
        tell(f"pretraining, {'dense and global loss' if dense else 'global loss alone'}")
        student, ema, signs[name] = pretrain(unlabeled.images, settings, seed, dense)
        paths = paths_of(out, seed, dense)
        ema.save(paths[TEACHER], part="backbone")
        save_file(student.backbone.state_dict(), paths[STUDENT])
        backbones[name] = load_backbone(paths[TEACHER], settings)
        if dense:
            backbones[STUDENT] = load_backbone(paths[STUDENT], settings)

    tell("linear heads")
    few = unlabeled.first(settings.labeled)
    predictions = {
        (LINEAR, name): probe(backbones[name], few, test, settings) for name in BACKBONES[LINEAR]
    }
    few = unlabeled.first(settings.tune_labeled)
    decay = Debiased(settings.average_decay)
    for task in (CONSTANT, ANNEALED):
        for name in BACKBONES[task]:
            tell(f"{task}, from {name}")
            model, ema = fine_tune(backbones[name], few, settings, seed, task == ANNEALED, decay)
            predictions[task, name] = segment(model, test)
            with ema.applied():
                predictions[task, name + AVERAGE] = segment(model, test)
    return Found(test, predictions, signs)


def paths_of(out: Path, seed: int, dense: bool) -> dict[str, Path]:
    """Return where the backbones of a seed are saved."""
    kind = "" if dense else "-global"
    return {name: out / f"segment{kind}-{name}-{seed}.safetensors" for name in (STUDENT, TEACHER)}


def load_backbone(path: Path, settings: Settings) -> Backbone:
    """Return a backbone with the weights of a file."""
    backbone = Backbone(settings.width)
    backbone.load_state_dict(load_file(path))
    return backbone


def measured_rows(found: list[Found]) -> list[Row]:
    """Return the mean IoU of each task and method, one value per seed."""
    return [
        row(*key, [mean_iou(f.predictions[key], f.test.classes) for f in found], "mean IoU %")
        for key in found[0].predictions
    ]


def print_collapse(found: list[Found], width: int) -> None:
    """Print what tells of a collapse of the teachers."""
    for name in (TEACHER, GLOBAL):
        spread = min(f.collapse[name]["spread"] for f in found)
        rank = min(f.collapse[name]["rank"] for f in found)
        collapsed = sum(has_collapsed(f.collapse[name]) for f in found)
        console.print(
            f"{name}: collapsed with {collapsed} of {len(found)} seeds; at least {spread:.0%} of "
            f"the features' power varies, in {rank:.1f} effective directions of {width}."
        )


# ------------------------------------------------------------------ the picture

COLORS = ["#f2f2f2", "#0072B2", "#E69F00", "#009E73", "#CC3311", "#AA55CC"]
PANELS = {
    "student,\nlinear head": (LINEAR, STUDENT),
    "teacher,\nlinear head": (LINEAR, TEACHER),
    "fine-tuned,\nraw weights": (CONSTANT, TEACHER),
    "fine-tuned,\nEMA": (CONSTANT, TEACHER + AVERAGE),
}


def draw(found: Found, path: Path, count: int = 8) -> None:
    """Draw the first test scenes: input, truth, and what was predicted."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    figure, axes = plt.subplots(
        count, 2 + len(PANELS), figsize=(8.4, 1.4 * count + 1.2), layout="constrained", dpi=130
    )
    columns = {"scene": found.test.images[:, 0], "true mask": found.test.classes}
    columns |= {title: found.predictions[key] for title, key in PANELS.items()}
    classes = {"cmap": ListedColormap(COLORS), "vmin": -0.5, "vmax": len(COLORS) - 0.5}
    for column, (title, images) in enumerate(columns.items()):
        axes[0, column].set_title(title, fontsize=10.5)
        style = {"cmap": "gray"} if title == "scene" else classes
        for axis, image in zip(axes[:, column], images, strict=False):
            axis.imshow(image.numpy(), interpolation="nearest", **style)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_color("#c8c8c8")
    patches = [Patch(facecolor=c, edgecolor="#999999") for c in COLORS]
    figure.legend(patches, CLASSES, loc="outside lower center", ncols=len(CLASSES), frameon=False)
    figure.suptitle("Digit scans on photographs: the first test scenes of seed 0", fontsize=11.5)
    figure.savefig(path)
    plt.close(figure)


# ------------------------------------------------------------------ the program


def main(
    seeds: Seeds = 4,
    labeled: Annotated[int, typer.Option(min=2, help="Scenes with masks, linear head.")] = 100,
    steps: Annotated[int, typer.Option(min=1, help="Steps of pretraining.")] = Settings.steps,
    out: Out = OUT,
    fast: Fast = False,
) -> None:
    """Measure what a teacher and an average give to segmentation."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the networks are too small to share
    settings = Settings(seeds, labeled=labeled, steps=steps)
    if fast:
        settings = replace(
            settings, seeds=1, unlabeled=200, labeled=20, tune_labeled=20, test=50, width=16,
            steps=20, batch=32, teacher_decay=0.5, probe_steps=20, tune_steps=20,
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    found = []
    with progress() as bar:
        task = bar.add_task("", total=settings.seeds * STAGES)
        for seed in range(settings.seeds):
            stages = itertools.count(len(found) * STAGES)

            def tell(
                stage: str, name: str = f"seed {seed}", stages: Iterator[int] = stages
            ) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=next(stages))

            found.append(run_seed(seed, settings, out, tell))
        bar.update(task, completed=settings.seeds * STAGES)
    rows = measured_rows(found)
    print_table(rows, f"Segmentation of composed scenes, {settings.seeds} seeds")
    print_pairs(rows, PAIRS, "The same seed with and without")
    print_collapse(found, settings.width)
    draw(found[0], out / "segment.png")
    seconds = time.perf_counter() - started
    signs = [f.collapse for f in found]
    write_results(out / "segment.json", rows, asdict(settings), seconds, collapse=signs)


if __name__ == "__main__":
    typer.run(main)
