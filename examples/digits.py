"""Does averaging the weights help? Handwritten digits, measured over several seeds.

Small convolutional networks, with and without batch normalization, learn scikit-learn's digits from
partly wrong labels at a constant learning rate. Averages of several horizons watch each run. Two
controls are run as well, where less is to be gained: clean labels, and a learning rate that is
annealed to zero. What is printed and saved is what was measured, whichever way it went.

    python examples/digits.py
    python examples/digits.py --seeds 3 --noise 0.4 --out out/noisier
"""

from __future__ import annotations

import itertools
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib
import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from load_without_polyak import Network, accuracy, load_halves
from polyak import EMA, Debiased, PowerLaw, Uniform
from polyak.decay import Decay
from polyak.profile import History, weights

DECAYS: dict[str, Decay] = {
    "PowerLaw(0.10)": PowerLaw(0.10),  # what EMA(model) uses
    "Debiased(0.9)": Debiased(0.9),
    "Debiased(0.998)": Debiased(0.998),
    "Uniform()": Uniform(),
}
RAW = "raw weights"
REESTIMATED = ", re-estimated"
MODELS = {"CNN": False, "CNN + BatchNorm": True}  # name -> whether it has batch normalization


class Data(NamedTuple):
    """The two halves of the data: images of shape (n, 1, 8, 8) and labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Settings:
    """What all runs have in common. ``noise`` is the share of wrong labels in the training half."""

    seeds: int
    epochs: int
    batch_size: int
    noise: float
    lr: float
    momentum: float


@dataclass(frozen=True)
class Regime:
    """How hard training shakes the weights."""

    name: str
    noise: float
    annealed: bool


@dataclass
class Run:
    """One training run, and the averages that watch it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: dict[str, EMA]
    steps: int
    rng: Tensor  # the state of the random number generator after the last step


Accuracies = dict[str, float]  # in %, on the test half, by name of the weights
Curve = list[tuple[int, Accuracies]]  # by optimizer step
Results = dict[tuple[str, str], list[Accuracies]]  # by regime and model, one entry per seed


# ------------------------------------------------------------------ training with averages


def train(
    settings: Settings,
    regime: Regime,
    batch_norm: bool,
    seed: int,
    data: Data,
    decays: dict[str, Decay],
) -> Iterator[Run]:
    """Train one network; yield the run after each epoch.

    The averages are made, attached to the optimizer, and need no line in the loop.
    """
    torch.manual_seed(seed)
    labels = with_wrong_labels(data.labels, regime.noise)
    model = Network(batch_norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=settings.momentum)
    steps_per_epoch = len(labels) // settings.batch_size
    annealing = CosineAnnealingLR(optimizer, settings.epochs * steps_per_epoch)

    averages = {name: EMA(model, decay) for name, decay in decays.items()}
    for ema in averages.values():
        ema.attach(optimizer)

    for epoch in range(1, settings.epochs + 1):
        model.train()
        order = torch.randperm(len(labels))
        for batch in order.split(settings.batch_size)[:steps_per_epoch]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.images[batch]), labels[batch]).backward()
            optimizer.step()
            if regime.annealed:
                annealing.step()
        yield Run(model, optimizer, averages, epoch * steps_per_epoch, torch.get_rng_state())


def with_wrong_labels(labels: Tensor, share: float) -> Tensor:
    """Return the labels with a share of them replaced by another digit."""
    wrong = torch.randperm(len(labels))[: round(share * len(labels))]
    labels = labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, 10, wrong.shape)) % 10
    return labels


def validate(run: Run, data: Data) -> Accuracies:
    """Return the test accuracy of the trained weights and of each average."""
    found = {RAW: accuracy(run.model, data.test_images, data.test_labels)}
    for name, ema in run.averages.items():
        with ema.applied():
            found[name] = accuracy(run.model, data.test_images, data.test_labels)
    return found


def reestimate(run: Run, data: Data) -> Accuracies:
    """Measure the BatchNorm statistics of each average anew; return the test accuracies with them.

    By default the running statistics are averaged like the weights. Each average keeps the measured
    ones until its next update, so that they are also what ``save`` writes.
    """
    for ema in run.averages.values():
        ema.reestimate_statistics(data.images.split(100))
    found = validate(run, data)
    return {name + REESTIMATED: found[name] for name in run.averages}


# ------------------------------------------------------------------ the experiment


def measure(
    settings: Settings, regimes: list[Regime], data: Data, console: Console
) -> tuple[Results, dict[str, Curve], dict[str, Run]]:
    """Train every model in every regime with every seed.

    Returns:
        The final accuracies; by model, the first seed of the first regime: its accuracies during
        training, and the run itself.
    """
    results: Results = {(regime.name, model): [] for regime in regimes for model in MODELS}
    curves: dict[str, Curve] = {model: [] for model in MODELS}
    first_runs: dict[str, Run] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(results) * settings.seeds * settings.epochs)
        for regime, (model, batch_norm), seed in itertools.product(
            regimes, MODELS.items(), range(settings.seeds)
        ):
            progress.update(task, description=f"{model}, {regime.name}, seed {seed}")
            first = regime is regimes[0] and seed == 0
            for run in train(settings, regime, batch_norm, seed, data, DECAYS):
                if first:
                    curves[model].append((run.steps, validate(run, data)))
                progress.advance(task)
            if first:
                first_runs[model] = run
            accuracies = validate(run, data) | (reestimate(run, data) if batch_norm else {})
            results[regime.name, model].append(accuracies)
    return results, curves, first_runs


def save(runs: dict[str, Run], out: Path) -> dict[str, dict[str, Path]]:
    """Save each average as a file that any safetensors loader reads; return the paths."""
    paths: dict[str, dict[str, Path]] = {}
    for model, run in runs.items():
        paths[model] = {}
        for name, ema in run.averages.items():
            path = out / f"{slug(model)}-{slug(name)}.safetensors"
            ema.save(path)
            paths[model][name] = path
    return paths


def slug(name: str) -> str:
    """Return a name as a file name: ``CNN + BatchNorm`` as ``cnn-batchnorm``."""
    words = "".join(c if c.isalnum() or c == "." else " " for c in name.lower()).split()
    return "-".join(words)


# ------------------------------------------------------------------ the checks


def check_bit_identical(
    settings: Settings, regime: Regime, data: Data, runs: dict[str, Run]
) -> None:
    """Train the first seed again without polyak; raise unless every bit of the outcome agrees."""
    for model, batch_norm in MODELS.items():
        *_, plain = train(settings, regime, batch_norm, 0, data, decays={})
        watched = runs[model]
        wrong = [
            what
            for what, a, b in [
                ("trained weights", plain.model.state_dict(), watched.model.state_dict()),
                ("optimizer", plain.optimizer.state_dict(), watched.optimizer.state_dict()),
                ("random numbers", plain.rng, watched.rng),
            ]
            if not identical(a, b)
        ]
        if wrong:
            raise RuntimeError(f"{model}: the averages have changed {', '.join(wrong)}")


def identical(a: Any, b: Any) -> bool:
    """Return whether two state dicts agree, tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same_kind = (a.dtype, a.shape) == (b.dtype, b.shape)
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    return bool(a == b)


def check_fresh_process(
    paths: dict[str, dict[str, Path]], expected: dict[str, Accuracies]
) -> dict[str, float]:
    """Load the saved files in a process without polyak; return the accuracies it measures there."""
    program = Path(__file__).with_name("load_without_polyak.py")
    files = [str(path) for of_model in paths.values() for path in of_model.values()]
    finished = subprocess.run(
        [sys.executable, str(program), *files], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, float] = json.loads(finished.stdout)
    for model, of_model in paths.items():
        for name, path in of_model.items():
            here = expected[model].get(name + REESTIMATED, expected[model][name])
            if found[str(path)] != here:
                raise RuntimeError(f"{path}: {here} % here, {found[str(path)]} % without polyak")
    return {Path(path).name: value for path, value in found.items()}


# ------------------------------------------------------------------ tables


def table_rows(results: Results) -> list[dict[str, Any]]:
    """Return the results as flat rows: mean, standard deviation, and how often better than raw."""
    rows = []
    for (regime, model), seeds in results.items():
        for name in seeds[0]:
            accuracies = [seed[name] for seed in seeds]
            rows.append(
                {
                    "regime": regime,
                    "model": model,
                    "weights": name,
                    "mean": statistics.mean(accuracies),
                    "std": statistics.stdev(accuracies),
                    "better_than_raw": sum(seed[name] > seed[RAW] for seed in seeds),
                    "seeds": len(seeds),
                    "accuracies": accuracies,
                }
            )
    return rows


def print_tables(
    console: Console,
    rows: list[dict[str, Any]],
    shaken: Regime,
    controls: list[Regime],
    seeds: int,
) -> None:
    """Print the main table, and the controls without the re-estimated rows."""
    main_rows = [row for row in rows if row["regime"] == shaken.name]
    print_table(console, main_rows, f"Much to average away: {shaken.name}")
    for control in controls:
        kept = [r for r in rows if r["regime"] == control.name and r["weights"] in [RAW, *DECAYS]]
        print_table(console, kept, f"Control: {control.name}")
    console.print(
        f"Mean ± standard deviation of {seeds} seeds at the last step; k of {seeds}: in so many "
        "the average is better than the raw weights of the same run. One fixed split. "
        "PowerLaw(0.10) is what EMA(model) uses.\n"
    )


def print_table(console: Console, rows: list[dict[str, Any]], title: str) -> None:
    """Print the rows of one regime, one column per model."""
    cells = {(row["weights"], row["model"]): row for row in rows}
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("test accuracy, %")
    for model in MODELS:
        table.add_column(model, justify="right")
    for name in dict.fromkeys(name for name, _ in cells):
        table.add_row(name, *(cell(cells.get((name, model))) for model in MODELS))
    console.print(table)


def cell(row: dict[str, Any] | None) -> str:
    """Return one measurement as text."""
    if row is None:
        return ""
    text = f"{row['mean']:.1f} ± {row['std']:.1f}"
    count = f"  {row['better_than_raw']} of {row['seeds']}"
    return text + (" " * len(count) if row["weights"] == RAW else count)


# ------------------------------------------------------------------ the picture

# Told apart by color, by lightness, by width and by dashes.
STYLES: dict[str, dict[str, Any]] = {
    RAW: {"color": "#9a9a9a", "linewidth": 1.4, "marker": "o", "markersize": 3},
    "PowerLaw(0.10)": {"color": "#0072B2", "linewidth": 2.4},
    "Debiased(0.9)": {"color": "#E69F00", "linewidth": 1.8, "linestyle": (0, (6, 1.5, 1, 1.5))},
    "Debiased(0.998)": {"color": "#C8500A", "linewidth": 2.0, "linestyle": (0, (4, 1.5))},
    "Uniform()": {"color": "#111111", "linewidth": 2.2, "linestyle": (0, (1, 1.2))},
}


def draw(curves: dict[str, Curve], histories: dict[str, History], title: str, path: Path) -> None:
    """Draw the accuracies during training, and what each average is made of, into one picture."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.5), layout="constrained", dpi=150)
    settled = [found[RAW] for curve in curves.values() for _, found in curve[len(curve) // 3 :]]
    for axis, (model, curve) in zip(axes, curves.items(), strict=False):
        draw_curve(axis, curve)
        axis.set_title(f"{model}\n{title}", fontsize=10.5)
        axis.set_ylim(max(0, min(settled) - 3), 100)
    draw_profiles(axes[-1], histories)
    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.set_xlim(left=0)
        axis.grid(color="#e4e4e4", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def draw_curve(axis: Any, curve: Curve) -> None:
    """Draw the test accuracy of each set of weights over the steps of a run."""
    steps = [step for step, _ in curve]
    for name, style in STYLES.items():
        axis.plot(steps, [found[name] for _, found in curve], label=name, **style)
    axis.set_ylabel("test accuracy, %")


def draw_profiles(axis: Any, histories: dict[str, History]) -> None:
    """Draw the share that the weights after each past step have in each average."""
    for name, history in histories.items():
        steps, shares = weights(history)
        axis.plot(steps, 100 * shares, **STYLES[name])
    axis.set_title("What each average is made of\nat the last step", fontsize=10.5)
    axis.set_ylabel("share in the average, % per step")
    axis.set_yscale("log")
    axis.set_ylim(0.01, 20)
    axis.set_yticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])


# ------------------------------------------------------------------ the program


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Runs per cell of the table.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training half.")] = 20,
    batch_size: Annotated[int, typer.Option(min=2, max=898, help="Images per step.")] = 16,
    noise: Annotated[float, typer.Option(min=0, max=1, help="Share of wrong labels.")] = 0.3,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 0.01,
    momentum: Annotated[float, typer.Option(min=0, max=1, help="Of SGD.")] = 0.9,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/digits"),
    picture: Annotated[
        Path | None, typer.Option(help="The picture; by default digits.png beside the results.")
    ] = None,
    fast: Annotated[bool, typer.Option(help="Two seeds, two epochs: does it run?")] = False,
) -> None:
    """Measure what averages of the weights give on handwritten digits."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the networks are too small to share
    if fast:
        seeds, epochs = 2, 2
    settings = Settings(seeds, epochs, batch_size, noise, lr, momentum)
    wrong = f"{noise:.0%} wrong labels"
    shaken = Regime(f"{wrong}, constant rate", noise, annealed=False)
    controls = [
        Regime("clean labels, constant rate", 0.0, annealed=False),
        Regime(f"{wrong}, annealed rate", noise, annealed=True),
    ]
    out.mkdir(parents=True, exist_ok=True)
    data = Data(*load_halves())
    console = Console(highlight=False)

    results, curves, runs = measure(settings, [shaken, *controls], data, console)
    rows = table_rows(results)
    print_tables(console, rows, shaken, controls, seeds)
    report = runs["CNN"].averages["PowerLaw(0.10)"].report()
    console.print(Panel(str(report), title="ema.report()", expand=False))

    paths = save(runs, out)
    expected = {model: results[shaken.name, model][0] for model in MODELS}
    without_polyak = check_fresh_process(paths, expected)
    console.print(
        f"Saved {len(without_polyak)} averages in {out}. A fresh process without polyak loads them "
        "and measures the same accuracies."
    )
    check_bit_identical(settings, shaken, data, runs)
    console.print(
        "Trained weights, optimizer state and random numbers are bit-identical to those of a run "
        "without polyak."
    )
    histories = {name: ema.history for name, ema in runs["CNN"].averages.items() if ema.history}
    picture = picture or out / "digits.png"
    draw(curves, histories, f"{shaken.name}, seed 0", picture)

    seconds = time.perf_counter() - started
    facts = {
        "command": shlex.join(["python", "examples/digits.py", *sys.argv[1:]]),
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        "versions": versions(),
        "table": rows,
        "report": report.metrics(),
        "accuracy_without_polyak": without_polyak,
        "bit_identical_to_a_run_without_polyak": True,  # or check_bit_identical would have raised
    }
    (out / "results.json").write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"Wrote {picture} and {out / 'results.json'} after {seconds:.0f} seconds.")


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    names = ["polyak", "torch", "safetensors", "scikit-learn"]
    return {"python": platform.python_version()} | {name: version(name) for name in names}


if __name__ == "__main__":
    typer.run(main)
