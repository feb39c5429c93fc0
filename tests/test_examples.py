"""The examples run as a user runs them, in processes of their own, and show what they promise."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from polyak.files import read_facts
from polyak.profile import History, weights

EXAMPLES = Path(__file__).parent.parent / "examples"
AVERAGES = ["PowerLaw(0.10)", "Debiased(0.9)", "Debiased(0.998)", "Uniform()"]
REESTIMATED = [f"{name}, re-estimated" for name in AVERAGES]


def run(program: str, *arguments: str) -> str:
    """Return what an example prints; warnings are errors, and so is anything on stderr."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / program), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "400", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


def test_teacher_and_student_meet_halfway() -> None:
    before, after = run("teacher_student.py").split("\npolyak.update_")
    after, with_an_object = after.split("The same with an object")
    ones, halves, twos = (f"layer.weight: {[[value] * 3] * 3}\n" for value in (1.0, 1.5, 2.0))
    assert f"teacher before, in train mode:\n  {ones}" in before
    assert f"student before, in train mode:\n  {twos}" in before
    assert f"teacher after, in eval mode:\n  {halves}" in after
    assert f"student after, in train mode:\n  {twos}" in after
    assert f"teacher after, in eval mode:\n  {halves}" in with_an_object
    assert "Checked" in with_an_object


def test_digits(tmp_path: Path) -> None:
    # One test: the run takes a while, and parallel workers would each make it for themselves.
    picture = tmp_path / "a picture.png"
    printed = run("digits.py", "--fast", "--out", str(tmp_path), "--picture", str(picture))
    results = json.loads((tmp_path / "results.json").read_text())
    table_is_what_was_measured(printed, results)
    report_is_shown(printed, results)
    saved_files_give_the_same_accuracy(printed, results, tmp_path)
    saved_files_know_their_profiles(results, tmp_path)
    assert results["bit_identical_to_a_run_without_polyak"] is True
    assert "are bit-identical to those of a run without polyak" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 50_000
    assert results["command"].startswith("python examples/digits.py --fast ")
    assert results["versions"]["torch"] == torch.__version__


def table_is_what_was_measured(printed: str, results: dict[str, Any]) -> None:
    shaken = results["table"][0]["regime"]
    assert len({row["regime"] for row in results["table"]}) == 3
    for row in results["table"]:
        values = row["accuracies"]
        raw = accuracies(results, row["regime"], row["model"], "raw weights")
        assert len(values) == len(raw) == row["seeds"] == results["settings"]["seeds"] == 2
        assert row["mean"] == pytest.approx(statistics.mean(values))
        assert row["std"] == pytest.approx(statistics.stdev(values))
        assert row["better_than_raw"] == sum(a > b for a, b in zip(values, raw, strict=True))
        assert row["regime"] in printed
        if row["regime"] == shaken or row["weights"] not in REESTIMATED:
            count = f"  {row['better_than_raw']} of 2" if row["weights"] != "raw weights" else ""
            assert f"{row['mean']:.1f} ± {row['std']:.1f}{count}" in printed
    for name in ("raw weights", *AVERAGES, *REESTIMATED):
        assert f"│ {name} " in printed
        # Two epochs are few, but with BatchNorm and clean labels all are far above chance, 10 %.
        assert min(accuracies(results, "clean labels, constant rate", "CNN + BatchNorm", name)) > 75


def report_is_shown(printed: str, results: dict[str, Any]) -> None:
    steps = 2 * (898 // results["settings"]["batch_size"])
    assert results["report"]["clock"] == results["report"]["updates"] == steps
    assert results["report"]["repeats"] == results["report"]["nonfinite"] == 0
    assert f"{steps} after {steps} updates, 0 repeated" in printed


def saved_files_give_the_same_accuracy(printed: str, results: dict[str, Any], out: Path) -> None:
    assert "A fresh process without polyak loads them" in printed
    shaken = results["table"][0]["regime"]
    files = [
        ("cnn-powerlaw-0.10", "CNN", "PowerLaw(0.10)"),
        ("cnn-uniform", "CNN", "Uniform()"),
        ("cnn-batchnorm-powerlaw-0.10", "CNN + BatchNorm", "PowerLaw(0.10), re-estimated"),
        ("cnn-batchnorm-debiased-0.998", "CNN + BatchNorm", "Debiased(0.998), re-estimated"),
    ]
    paths = [str(out / f"{file}.safetensors") for file, *_ in files]
    loaded = json.loads(run("load_without_polyak.py", *paths))
    for path, (file, model, name) in zip(paths, files, strict=True):
        expected = accuracies(results, shaken, model, name)[0]
        assert loaded[path] == results["accuracy_without_polyak"][f"{file}.safetensors"] == expected
    assert len(list(out.glob("*.safetensors"))) == len(results["accuracy_without_polyak"]) == 8


def saved_files_know_their_profiles(results: dict[str, Any], out: Path) -> None:
    steps = int(results["report"]["updates"])
    facts = read_facts(out / "cnn-uniform.safetensors")
    clocks, shares = weights(History.from_dict(facts["history"]))
    assert clocks.tolist() == list(range(1, steps + 1))
    torch.testing.assert_close(shares, torch.full((steps,), 1 / steps, dtype=torch.float64))
    path = out / "cnn-batchnorm-uniform.safetensors"
    measured = [n for n in load_file(path) if n.endswith(("running_mean", "running_var"))]
    assert read_facts(path)["reestimated"] == sorted(measured) != []


def accuracies(results: dict[str, Any], regime: str, model: str, name: str) -> list[float]:
    """Return the test accuracies of one row, by seed; the CNN has no statistics to re-estimate."""
    wanted = {"regime": regime, "model": model, "weights": name}
    (row,) = (r for r in results["table"] if wanted.items() <= r.items())
    return row["accuracies"]


def test_the_check_for_bit_identity_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    digits = importlib.import_module("digits")
    settings = digits.Settings(seeds=2, epochs=1, batch_size=100, noise=0.3, lr=0.01, momentum=0.9)
    regime = digits.Regime("noisy", 0.3, annealed=True)
    data = digits.Data(*digits.load_halves())
    runs = {}
    for model, batch_norm in digits.MODELS.items():
        *_, runs[model] = digits.train(settings, regime, batch_norm, 0, data, digits.DECAYS)
    digits.check_bit_identical(settings, regime, data, runs)

    momentum = runs["CNN"].optimizer.state_dict()["state"][0]["momentum_buffer"]
    kept = momentum.clone()
    momentum.view(-1)[0] = torch.nextafter(kept.view(-1)[0], torch.tensor(torch.inf))
    with pytest.raises(RuntimeError, match=r"CNN: the averages have changed optimizer$"):
        digits.check_bit_identical(settings, regime, data, runs)
    momentum.copy_(kept)

    runs["CNN + BatchNorm"].rng = torch.zeros_like(runs["CNN"].rng)
    buffer = runs["CNN + BatchNorm"].model.features[1].running_mean
    buffer[0] = torch.nextafter(buffer[0], torch.tensor(torch.inf))
    wrong = r"BatchNorm: the averages have changed trained weights, random numbers$"
    with pytest.raises(RuntimeError, match=wrong):
        digits.check_bit_identical(settings, regime, data, runs)
