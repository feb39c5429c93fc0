"""The semi-supervised example: it runs, its teacher is only ever averaged, it disturbs nothing."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models import bit_identical

FOLDER = Path(__file__).parent.parent / "examples" / "ssl"
LINES = [
    "supervised",
    "supervised + EMA",
    "Pi-model",
    "Pi-model + EMA",
    "Mean Teacher: student",
    "Mean Teacher: teacher",
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module; it imports what lies beside it."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module("mean_teacher")


def test_it_runs(tmp_path: Path) -> None:
    """Alone, without warnings; what is printed is what was written."""
    finished = subprocess.run(
        [
            *(sys.executable, "-W", "error", str(FOLDER / "mean_teacher.py")),
            *("--fast", "--labels", "5", "--out", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "200", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    results = json.loads((tmp_path / "mean_teacher.json").read_text())
    assert results["command"].startswith("python examples/ssl/mean_teacher.py --fast")
    assert results["settings"]["labels"] == [5]
    assert [r["method"] for r in results["rows"]] == LINES
    values = {r["method"]: r["values"] for r in results["rows"]}
    for row in results["rows"]:
        assert (row["task"], row["metric"]) == ("5 labels per class", "accuracy %")
        assert len(row["values"]) == results["settings"]["seeds"] == 2
        assert all(20 < value <= 100 for value in row["values"])  # chance is 10
        mean, std = statistics.mean(row["values"]), statistics.stdev(row["values"])
        assert f"{mean:.1f} ± {std:.1f}" in finished.stdout
    gains = [
        a - b for a, b in zip(values["Mean Teacher: teacher"], values["supervised"], strict=True)
    ]
    assert f"{statistics.mean(gains):+.1f} ({min(gains):+.1f} to" in finished.stdout


def test_the_labels_are_few_and_the_test_half_is_apart(example: Any) -> None:
    first, second, other = (example.load(n, seed) for n, seed in [(3, 0), (3, 0), (3, 1)])
    assert first.labels.bincount().tolist() == [3] * 10
    assert bit_identical(first.labeled, second.labeled)
    assert not bit_identical(first.labeled, other.labeled)
    assert bit_identical(first.test_images, other.test_images)
    assert (len(first.images), len(first.test_images)) == (898, 899)
    everywhere = torch.cat([first.images, first.test_images])
    digits = torch.tensor(example.load_digits().images, dtype=torch.float32) / 16
    assert bit_identical(_sorted(everywhere.flatten(1)), _sorted(digits.flatten(1)))


def _sorted(rows: torch.Tensor) -> list[list[float]]:
    return sorted(rows.tolist())


def test_the_teacher_is_nothing_but_an_average(example: Any) -> None:
    """In no optimizer, without gradient, on the paper's schedule: min(1 - 1/(t + 1), decay)."""
    settings = replace(example.Settings(), steps=8, decay=0.8)
    run = example.train(example.MEAN_TEACHER, example.load(3, 0), settings, seed=0)
    trained = [p for group in run.optimizer.param_groups for p in group["params"]]
    for teachers in run.teacher.parameters():
        assert not any(teachers is p or teachers.data_ptr() == p.data_ptr() for p in trained)
        assert not teachers.requires_grad
        assert teachers.grad is None
    assert {id(p) for p in trained} == {id(p) for p in run.student.parameters()}
    assert not run.teacher.training
    for name, average in run.ema.averages.items():
        assert average.data_ptr() == run.teacher.get_parameter(name).data_ptr()
    assert run.ema.clock == settings.steps + 1  # the initial weights, then each step
    for t in range(1, settings.steps + 1):
        published = min(1 - 1 / (t + 1), settings.decay)
        assert run.ema.decay.keep(t + 1, 1) == pytest.approx(published, rel=0, abs=2**-52)
    with pytest.raises(ValueError, match="trains parameters of the teacher"):
        run.ema.attach(torch.optim.SGD(run.teacher.parameters(), lr=0.1))


@pytest.mark.parametrize("method", ["supervised", "Pi-model"])
def test_watching_changes_nothing(example: Any, method: str) -> None:
    """The student of "+ EMA" is that of the line above it, bit for bit; so is all else."""
    settings = replace(example.Settings(), steps=8)
    data = example.load(3, 0)
    plain = example.train(method, data, settings, seed=0, watched=False)
    rng = torch.get_rng_state()
    watched = example.train(method, data, settings, seed=0)
    assert plain.ema is None
    assert watched.ema.clock == settings.steps + 1
    assert bit_identical(watched.student.state_dict(), plain.student.state_dict())
    assert bit_identical(watched.optimizer.state_dict(), plain.optimizer.state_dict())
    assert bit_identical(torch.get_rng_state(), rng)
    assert not bit_identical(dict(watched.ema.averages), watched.student.state_dict())


def test_views_are_shifted_by_a_pixel_and_noisy(example: Any) -> None:
    """Without noise a view is one of the nine shifts; with it, no pixel stays."""
    image = torch.rand(1, 1, 8, 8) + 1
    clean = replace(example.Settings(), noise=0.0)
    views = example.augment(image.expand(200, 1, 8, 8), clean)
    padded = torch.nn.functional.pad(image, [1] * 4)
    shifts = [padded[0, 0, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    found = [[i for i, shift in enumerate(shifts) if torch.equal(v[0], shift)] for v in views]
    assert {i for (i,) in found} == set(range(9))
    assert not torch.eq(example.augment(image, example.Settings()), image).any()
