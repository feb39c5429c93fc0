"""Stage 2: what are the features worth? Few labels, frozen features, k-NN and a linear probe.

It reads the backbones that ``pretrain.py`` has left, in plain torch, and compares for each target
the teacher's features with the student's, with those of a random network, and with raw pixels. Of
1, 5 and 10 labels per class several draws are averaged for each seed; all methods see the same.

    python examples/ssl/pretrain.py
    python examples/ssl/classify.py

What to look at: ``ema teacher - random network`` says that the pipeline works. It does not say that
the average is what makes it work. Two other lines do: ``ema teacher - ema student`` says what the
average gives as the network that is used, and ``ema student - frozen student`` and its neighbors
what it gives as the target that the student learns from: the frozen target is a random network that
never moves, the copy is no average at all. `verdict` says in words what was found.

When this was written, pretraining helped with every seed and the average did not: a copy of the
student did as well or better as the target, a frozen random network nearly as well. So this stage
is evidence for the pipeline, and not for the EMA target. The probe was not tuned; its tolerance was
set for speed.

The random network has the weights with which the runs of that seed began, and BatchNorm statistics
of the training images, without which it would be at a disadvantage that has nothing to do with
learning. All features are standardized by the training images, whose labels that does not need.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

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
    describe,
    differences,
    print_pairs,
    print_table,
    progress,
    row,
    write_results,
)
from network import Backbone, backbone_path, load_images, load_labels
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

PIXELS = "raw pixels"
RANDOM = "random network"
TARGETS = ["ema", "constant", "copy", "frozen"]  # as pretrain.py names its files


@dataclass(frozen=True)
class Settings:
    """How features are judged. Labels are per class; 0 means all."""

    labels: tuple[int, ...] = (1, 5, 10, 50, 0)
    draws: int = 10  # of which labels are given, per seed; 1 from 50 per class on
    c: float = 1.0  # inverse strength of the probe's L2 penalty
    tolerance: float = 1e-3  # of the gradient, at which the probe's fit ends
    neighbors: int = 5  # 1 where there are fewer than 10 labels per class


@dataclass(frozen=True)
class Data:
    """Something of the images to train on, and of those to test on: pixels, features, labels."""

    train: Tensor
    test: Tensor


# ------------------------------------------------------------------ features


def features_of(method: str, seed: int, out: Path, images: Data) -> Data:
    """Return the standardized features of all images by one method."""
    if method == PIXELS:
        return standardized(Data(images.train.flatten(1), images.test.flatten(1)))
    if method == RANDOM:
        backbone = random_backbone(seed, images.train)
    else:
        target, who = method.split()
        backbone = Backbone()
        backbone.load_state_dict(load_file(backbone_path(out, target, seed, who)), strict=True)
    backbone.eval()
    with torch.no_grad():
        return standardized(Data(backbone(images.train), backbone(images.test)))


def random_backbone(seed: int, images: Tensor) -> Backbone:
    """Return a backbone as it was before pretraining, with statistics of the images."""
    torch.manual_seed(seed)
    backbone = Backbone()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches, of which there is one
    with torch.no_grad():
        backbone(images)
    return backbone


def standardized(features: Data) -> Data:
    """Return features with mean 0 and variance 1 over the training images; constant ones stay."""
    std, center = torch.std_mean(features.train, dim=0)
    scale = torch.where(std > 1e-6, std, 1.0)
    return Data((features.train - center) / scale, (features.test - center) / scale)


def methods_in(out: Path, seeds: int) -> list[str]:
    """Return what there is to compare; end the program if pretraining is missing."""
    methods = [PIXELS, RANDOM]
    missing = []
    for target in TARGETS:
        paths = [
            backbone_path(out, target, s, w) for s in range(seeds) for w in ("teacher", "student")
        ]
        if all(path.exists() for path in paths):
            methods += [f"{target} teacher", f"{target} student"]
        elif any(path.exists() for path in paths) or target == "ema":
            missing += [path.name for path in paths if not path.exists()]
    if missing:
        console.print(
            f"{out} has no {missing[0]}"
            + (f" and lacks {len(missing) - 1} more files" if len(missing) > 1 else "")
            + ". Run pretraining first, which takes minutes:\n"
            f"    python examples/ssl/pretrain.py --seeds {seeds} --out {out}"
        )
        raise typer.Exit(1)
    return methods


# ------------------------------------------------------------------ few labels


def drawn(labels: Tensor, per_class: int, draws: int, seed: int) -> Iterator[Tensor]:
    """Yield which training images have labels, anew for each draw; 0 per class means all, once."""
    if per_class == 0:
        yield torch.arange(len(labels))
        return
    generator = torch.Generator().manual_seed(1000 * seed + per_class)
    for _ in range(draws):
        order = torch.randperm(len(labels), generator=generator)
        yield torch.cat([order[labels[order] == digit][:per_class] for digit in range(10)])


def accuracies(
    features: Data, labels: Data, per_class: int, seed: int, settings: Settings
) -> dict[str, float]:
    """Return the test accuracy of k-NN and linear probe in %, averaged over the draws."""
    neighbors = settings.neighbors if per_class == 0 or per_class >= 10 else 1
    found: dict[str, list[float]] = {"probe": [], "k-NN": []}
    draws = settings.draws if 0 < per_class < 50 else 1
    for chosen in drawn(labels.train, per_class, draws, seed):
        judges = {
            "probe": LogisticRegression(C=settings.c, tol=settings.tolerance, max_iter=1000),
            "k-NN": KNeighborsClassifier(neighbors),
        }
        for name, judge in judges.items():
            judge.fit(features.train[chosen].numpy(), labels.train[chosen].numpy())
            found[name].append(100 * judge.score(features.test.numpy(), labels.test.numpy()))
    return {name: mean(values) for name, values in found.items()}


def task_name(judge: str, per_class: int) -> str:
    """Return how a task is called, such as ``probe, 5 per class``."""
    return f"{judge}, {f'{per_class} per class' if per_class else 'all labels'}"


# ------------------------------------------------------------------ the program


def measure(methods: list[str], seeds: range, out: Path, settings: Settings) -> list[Row]:
    """Return the accuracy of each method in each task, one value per seed."""
    images, labels = Data(*load_images()), Data(*load_labels())
    rows = {
        (judge, per_class, method): row(task_name(judge, per_class), method, [])
        for judge in ("probe", "k-NN")
        for per_class in settings.labels
        for method in methods
    }
    with progress() as bar:
        task = bar.add_task("", total=len(seeds) * len(methods) * len(settings.labels))
        for seed in seeds:
            for method in methods:
                bar.update(task, description=f"{method}, seed {seed}")
                features = features_of(method, seed, out, images)
                for per_class in settings.labels:
                    found = accuracies(features, labels, per_class, seed, settings)
                    for judge, accuracy in found.items():
                        rows[judge, per_class, method]["values"].append(accuracy)
                    bar.advance(task)
    return list(rows.values())


def pairs_of(methods: list[str]) -> list[tuple[str, str]]:
    """Return which methods are compared on the same seeds."""
    pairs = [("ema teacher", PIXELS), ("ema teacher", RANDOM), ("ema teacher", "ema student")]
    pairs += [("ema student", f"{target} student") for target in TARGETS[1:]]
    return [(a, b) for a, b in pairs if a in methods and b in methods]


def verdict(rows: list[Row], task: str) -> str:
    """Return in words what the averages give in a task, as used network and as target."""
    gain = differences(rows, task, "ema teacher", RANDOM)
    used = differences(rows, task, "ema teacher", "ema student")
    lines = [
        f"What {task} shows, better in k of {len(gain)} seeds:",
        f"- the pipeline: teacher against random network {describe(gain)}, {weighed(gain)}",
        f"- the average as the network that is used: teacher against its student {describe(used)}, "
        + weighed(used),
    ]
    for target in TARGETS[1:]:
        found = differences(rows, task, "ema student", f"{target} student")
        if found:
            lines.append(
                f"- the average as the target, instead of {MEANING[target]}: {describe(found)}, "
                + weighed(found)
            )
    return "\n".join(lines)


def weighed(found: list[float]) -> str:
    """Return what may be concluded from differences of the same seeds."""
    if len(found) < 4:
        return "too few seeds to say"
    if min(found) > 0:
        return "better with each seed"
    if max(found) < 0:
        return "worse with each seed"
    return "no clear difference"


MEANING = {
    "constant": "an average of constant decay",
    "copy": "a copy of the student",
    "frozen": "a frozen random network",
}


def draw(rows: list[Row], task: str, path: Path) -> None:
    """Draw the accuracy of each method in a task: a dot per seed, a line at the mean."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    mine = [r for r in rows if r["task"] == task][::-1]
    figure, axis = plt.subplots(
        figsize=(6.5, 0.4 + 0.32 * len(mine)), layout="constrained", dpi=150
    )
    for place, found in enumerate(mine):
        color = "#0072B2" if found["method"].startswith("ema") else "#777777"
        axis.plot(found["values"], [place] * len(found["values"]), "o", color=color, markersize=4)
        axis.plot([mean(found["values"])], [place], "|", color=color, markersize=16)
    axis.set_yticks(range(len(mine)), [r["method"] for r in mine])
    axis.set_xlabel(f"accuracy %, {task}; a dot per seed, a line at the mean")
    axis.grid(color="#e4e4e4", linewidth=0.8, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main(seeds: Seeds = 4, out: Out = OUT, fast: Fast = False) -> None:
    """Classify with few labels on the frozen features of ``pretrain.py``."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    settings = Settings()
    if fast:
        seeds = min(seeds, 2)
        settings = replace(settings, labels=(5, 10), draws=1)
    methods = methods_in(out, seeds)
    with threadpool_limits(1):  # of scikit-learn's libraries: the problems are too small to share
        rows = measure(methods, range(seeds), out, settings)

    for judge, name in {"probe": "Linear probe", "k-NN": "Nearest neighbors"}.items():
        mine = [r for r in rows if r["task"].startswith(judge)]
        print_table(mine, f"{name} on frozen features, {seeds} seeds")
        print_pairs(mine, pairs_of(methods), f"{name}: differences, seed by seed")
    console.print(verdict(rows, task_name("probe", 5)))
    draw(rows, task_name("probe", 5), out / "classify.png")
    seconds = time.perf_counter() - started
    pretraining = json.loads((out / "pretrain.json").read_text())["settings"]
    facts = asdict(settings) | {"pretraining": pretraining}
    write_results(out / "classify.json", rows, facts, seconds)


if __name__ == "__main__":
    typer.run(main)
