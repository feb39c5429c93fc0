"""The horizon is chosen as the example says, and its page quotes what was measured."""

from __future__ import annotations

import importlib
import json
import math
import re
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib.image
import pytest
import torch

from polyak import PowerLaw
from polyak.posthoc import Curve, reconstruct, solve
from test_examples import run

ROOT = Path(__file__).parent.parent
KEPT = [
    "raw weights",
    "PowerLaw(0.10), the default",
    *("EMA(0.99)", "EMA(0.999)", "EMA(0.9999)", "Debiased(0.9999)", "Uniform()"),
]
CHOSEN = {"frechet": "chosen by Fréchet distance", "loss": "chosen by denoising loss"}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("choose_the_horizon")


# ------------------------------------------------------------------ the page


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "horizon.json").read_text())


@pytest.fixture(scope="module")
def page() -> str:
    return (ROOT / "docs" / "horizon.md").read_text()


def test_the_tables_of_the_page_are_those_that_were_measured(
    example: ModuleType, measured: dict[str, Any], page: str
) -> None:
    assert measured["table"] == example.table_rows(measured["runs"])
    assert measured["gains"] == example.gain_rows(measured["runs"])
    for title, lines in example.tables(measured).items():
        assert "\n".join(lines) in page, title
    assert page.count("|---") == sum(
        lines[1].count("|---") for lines in example.tables(measured).values()
    )


def prose(page: str) -> set[str]:
    """The numbers with a point that the text quotes, but for those in code."""
    text = "\n".join(line for line in page.split("```")[::2])
    text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    return set(re.findall(r"(?<![\d.,])\d+\.\d+", re.sub(r"`[^`]*`|\[arXiv [^)]*\)", "", text)))


def test_the_prose_quotes_what_is_in_the_tables_or_was_set(
    measured: dict[str, Any], page: str
) -> None:
    cells = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    known = set(re.findall(r"\d+\.\d+", cells))
    known |= {f"{measured['settings']['lr']}", f"{measured['classifier_accuracy']:.1f}"}
    known |= {f"{distance:.3f}" for distance in measured["real"].values()}
    known |= {f"{100 * one['profiles']['EMA(0.9999)']['start']:.1f}" for one in measured["runs"]}
    assert prose(page) <= known
    assert len(prose(page)) >= 5
    assert prose("found `0.5` at 0.25, 1.75 ([arXiv 2312.02696](https://a.b/1.2))") == {
        "0.25",
        "1.75",
    }


def test_what_the_page_says_in_words_is_so(
    example: ModuleType, measured: dict[str, Any], page: str
) -> None:
    raw, default, *_ = KEPT
    settings, runs = example.Settings(**measured["settings"]), measured["runs"]
    assert settings == example.Settings(), "the page is of what the example does by default"
    rows = {(row["metric"], row["weights"]): row for row in measured["table"]}
    gains = {(row["metric"], row["images"]): row["shares"] for row in measured["gains"]}
    assert len(runs) == settings.seeds == 4

    # Averaging matters more than which.
    for metric in CHOSEN:
        assert rows[metric, raw]["better_than_default"] == 0
    assert rows["frechet", default]["mean"] < 0.75 * rows["frechet", raw]["mean"]
    assert rows["frechet", raw]["std"] > 3 * rows["frechet", default]["std"]
    # The best horizon is not known before.
    steps = [settings.steps // 4, settings.steps // 2, settings.steps]
    curves = [
        [Curve.from_dict(curve) for curve in (*one["earlier"], one["curves"]["loss"])]
        for one in runs
    ]
    widths = [[curve.best.horizon for curve in of_run] for of_run in curves]
    assert all(first < second < third for first, second, third in widths)
    assert not any(curve.at_edge for of_run in curves for curve in of_run)
    for at, of_runs in zip(steps, zip(*widths, strict=True), strict=True):
        assert f"{statistics.mean(of_runs) * at:,.0f}" in page
    # The default was good.
    assert all(0.0025 < gain < 0.0055 for gain in gains["loss", "test images"])
    chosen = rows["loss", CHOSEN["loss"]]
    assert -chosen["difference"] > 10 * chosen["noise"]
    # The two measures do not agree, and one of them cannot decide.
    for one in runs:
        curve = Curve.from_dict(one["curves"]["frechet"])
        assert curve.best == curve.points[-1]
        assert curve.best.score < one["validation"]["frechet"][default]
    assert all(0.07 < gain < 0.17 for gain in gains["frechet", "validation images"])
    pairs = zip(gains["frechet", "test images"], gains["frechet", "validation images"], strict=True)
    assert all(left < 0.4 * gain for left, gain in pairs)
    noise = rows["frechet", CHOSEN["frechet"]]["noise"] / rows["frechet", default]["mean"]
    assert sum(abs(gain) <= noise for gain in gains["frechet", "test images"]) == 2
    # A fixed decay fits one length of training.
    for metric in CHOSEN:
        assert rows[metric, "EMA(0.9999)"]["mean"] > rows[metric, raw]["mean"]
    # Whether the files tell the truth.
    for one in runs:
        assert one["check"]["distance"] < one["check"]["distance_bound"] / 50


# ------------------------------------------------------------------ the example, as a user runs it


def test_choose_the_horizon(tmp_path: Path) -> None:
    # One test: the run takes a while, and parallel workers would each make it for themselves.
    docs = tmp_path / "docs"
    printed = run("choose_the_horizon.py", "--fast", "--out", str(tmp_path), "--docs", str(docs))
    facts = json.loads((tmp_path / "horizon.json").read_text())
    each_search_is_short_and_returns_its_minimum(facts)
    what_is_chosen_is_scored_on_other_images(printed, facts)
    the_files_give_the_average_that_was_kept(facts, tmp_path)
    for name in ("horizon.json", "horizon.png", "samples.png"):
        assert (docs / name).read_bytes() == (tmp_path / name).read_bytes()
    for name in ("horizon.png", "samples.png", "search.png"):
        pixels = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert 0.01 < (pixels < 0.9).any(axis=-1).mean() < 0.9, f"{name} is empty"
    assert facts["command"].startswith("python examples/choose_the_horizon.py --fast ")
    assert facts["versions"]["torch"] == torch.__version__


def each_search_is_short_and_returns_its_minimum(facts: dict[str, Any]) -> None:
    steps, most = facts["settings"]["steps"], facts["settings"]["evaluations"]
    for found in facts["runs"]:
        curves = [*found["earlier"], *found["curves"].values()]
        assert [curve["at"] for curve in curves] == [steps // 4, steps // 2, steps, steps]
        for curve in map(Curve.from_dict, curves):
            assert 3 <= len(curve.points) <= most
            assert curve.best.score == min(point.score for point in curve.points)
            low, high = curve.supported
            assert all(low <= point.horizon <= high for point in curve.points)
            assert all(point.predicted_error <= 0.2 for point in curve.points)
        for metric, name in CHOSEN.items():
            best = Curve.from_dict(found["curves"][metric]).best
            # A power law over discrete steps is nearly as wide as the continuous one: to a step.
            assert found["profiles"][name]["width"] == pytest.approx(best.horizon, abs=1 / steps)


def what_is_chosen_is_scored_on_other_images(printed: str, facts: dict[str, Any]) -> None:
    runs, draws = facts["runs"], facts["settings"]["draws"]
    assert len(runs) == facts["settings"]["seeds"] == 2
    for row in facts["table"]:
        values = [found["test"][row["metric"]][row["weights"]] for found in runs]
        base = [found["test"][row["metric"]]["PowerLaw(0.10), the default"] for found in runs]
        assert all(len(scores) == draws for scores in values)
        means, of_default = list(map(statistics.mean, values)), list(map(statistics.mean, base))
        assert row["mean"] == pytest.approx(statistics.mean(means))
        assert row["std"] == pytest.approx(statistics.stdev(means))
        pairs = zip(means, of_default, strict=True)
        assert row["better_than_default"] == sum(ours < default for ours, default in pairs)
        assert f"{row['mean']:.{4 if row['metric'] == 'loss' else 3}f} ± " in printed
    names = [row["weights"] for row in facts["table"] if row["metric"] == "loss"]
    assert names == [*KEPT, *CHOSEN.values()]
    assert all(f"│ {name} " in printed for name in names)
    # The two halves of the held-out images give other numbers, and real ones are nearest.
    for found in runs:
        assert found["test"]["loss"]["raw weights"][0] != found["validation"]["loss"]["raw weights"]
    nearest = min(row["mean"] for row in facts["table"] if row["metric"] == "frechet")
    assert 0 < facts["real"]["train_to_test"] < nearest


def the_files_give_the_average_that_was_kept(facts: dict[str, Any], out: Path) -> None:
    """|difference| <= |sum_i c_i p_i - p| |weights - mean weights|, which another width breaks."""
    for found in facts["runs"]:
        files = sorted((out / "snapshots" / f"seed-{found['seed']}").glob("*.safetensors"))
        solution = solve(files, PowerLaw(0.08))
        check = found["check"]
        assert check["predicted_error"] == pytest.approx(solution.predicted_error)
        assert check["distance"] <= check["distance_bound"] + solution.storage_noise
        ours, wrong = reconstruct(files, [PowerLaw(0.08), PowerLaw(0.09)])
        off = math.sqrt(sum((ours[name] - wrong[name]).square().sum().item() for name in ours))
        norm = math.sqrt(sum(value.square().sum().item() for value in ours.values()))
        assert off / norm > check["distance_bound"]


# ------------------------------------------------------------------ what it is made of


def test_the_frechet_distance_of_gaussians_is_the_known_one(example: ModuleType) -> None:
    """With diagonal covariances: the squared distances of the means and of the deviations."""
    mean, deviations = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    other, wider = torch.tensor([1.5, 0.0]), torch.tensor([2.0, 3.5])
    a = example.Statistics(mean.double(), deviations.double().square().diag())
    b = example.Statistics(other.double(), wider.double().square().diag())
    expected = 100 * (0.5**2 + 2**2 + 1.5**2 + 0.5**2) / (2**2 + 3.5**2)
    assert example.frechet_distance(a, b) == pytest.approx(expected)
    assert example.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_the_sampler_is_of_second_order(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the exact denoiser of Gaussian images: at twice the steps its error falls by about 4."""
    deviation = torch.tensor(0.1)  # so small that nothing is cut off at -1 and 1

    def denoise(noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return noisy * deviation**2 / (deviation**2 + sigma**2)

    start = 80.0 * torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
    exact = start * deviation / (deviation**2 + 80.0**2).sqrt()
    errors = []
    for steps in (20, 40, 80):
        monkeypatch.setattr(example, "SAMPLER_STEPS", steps)
        found = example.sample(denoise, 50, seed=3).images
        errors.append(((found - exact).norm() / exact.norm()).item())
    assert 1.5 < math.log2(errors[0] / errors[1]) < 2.5
    assert 1.5 < math.log2(errors[1] / errors[2]) < 2.5


def test_the_loss_weights_noise_levels_alike(example: ModuleType) -> None:
    """Where the network in it answers 0 the loss is 1, as its target is of unit variance."""
    model = example.Denoiser(8, sigma_data=0.5)
    torch.nn.init.zeros_(model.out[1].weight)
    torch.nn.init.zeros_(model.out[1].bias)
    noise = torch.Generator().manual_seed(0)
    images = 0.5 * torch.randn(20_000, 64, generator=noise)
    part = example.Part(images, torch.zeros(20_000, dtype=torch.long))
    # The mean of 1.28e6 squares of deviation sqrt(2): five standard errors.
    loss = example.denoising_loss(model, part, noise).item()
    assert loss == pytest.approx(1, abs=5 * math.sqrt(2 / (20_000 * 64)))
