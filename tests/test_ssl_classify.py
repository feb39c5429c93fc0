"""Pretraining without labels, and what its features are worth: both stages as a user runs them."""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file

from polyak import EMA, HalfLife
from polyak.files import read_facts

SSL = Path(__file__).parent.parent / "examples" / "ssl"
TARGETS = ["ema", "constant", "copy", "frozen"]


def run(program: str, *arguments: str) -> str:
    """Return what a stage prints; warnings are errors, and so is anything on stderr."""
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(SSL / program), *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "400", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SSL)
    return importlib.import_module("pretrain")


def test_pretrain_then_classify(tmp_path: Path, pretrain: ModuleType) -> None:
    # One test: the run takes a while, and parallel workers would each make it for themselves.
    printed = run("pretrain.py", "--fast", "--out", str(tmp_path))
    pretraining_is_told(printed, json.loads((tmp_path / "pretrain.json").read_text()))
    backbones_are_what_their_targets_say(tmp_path, pretrain)
    printed = run("classify.py", "--fast", "--out", str(tmp_path))
    table_is_what_was_measured(printed, json.loads((tmp_path / "classify.json").read_text()))
    for picture in ("pretrain.png", "classify.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def pretraining_is_told(printed: str, results: dict[str, Any]) -> None:
    assert results["command"].startswith("python examples/ssl/pretrain.py --fast ")
    assert [(r["target"], r["seed"]) for r in results["runs"]] == [
        (target, seed) for target in TARGETS for seed in (0, 1)
    ]
    for of_run in results["runs"]:
        assert [m["step"] for m in of_run["measures"]] == [10, 20]
        assert not of_run["collapsed"]
    assert "None of 8 runs has collapsed" in printed
    assert {row["task"] for row in results["rows"]} == {"loss", "spread, %", "rank"}


def backbones_are_what_their_targets_say(out: Path, pretrain: ModuleType) -> None:
    settings = pretrain.Settings()
    start = pretrain.begin(pretrain.Target.ema, 0, settings).student.backbone.state_dict()
    for target in TARGETS:
        teacher, student = (
            load_file(pretrain.backbone_path(out, target, 0, who)) for who in ("teacher", "student")
        )
        backbone = pretrain.Backbone()
        for weights in (teacher, student):
            backbone.load_state_dict(weights, strict=True)  # the backbone's own names, no others
        assert same_parameters(backbone, teacher, student) == (target == "copy")
        assert same_parameters(backbone, teacher, start) == (target == "frozen")
        # Its statistics are its own: measured by 20 forward passes of its own weights, which are
        # the student's only where the target is a copy.
        assert teacher["layers.1.num_batches_tracked"] == 20
        assert not torch.equal(teacher["layers.1.running_mean"], start["layers.1.running_mean"])
        same = torch.equal(teacher["layers.5.running_var"], student["layers.5.running_var"])
        assert same == (target == "copy")
    facts = read_facts(pretrain.backbone_path(out, "ema", 0, "teacher"))
    assert facts["decay"] == {"type": "Cosine", "start": 0.6, "end": 1.0, "steps": 20}
    assert (facts["part"], facts["clock"], facts["updates"]) == ("backbone", 20, 20)


def same_parameters(
    backbone: torch.nn.Module, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]
) -> bool:
    return all(torch.equal(a[name], b[name]) for name, _ in backbone.named_parameters())


def table_is_what_was_measured(printed: str, results: dict[str, Any]) -> None:
    methods = [f"{target} {who}" for target in TARGETS for who in ("teacher", "student")]
    tasks = [f"{j}, {n}" for j in ("probe", "k-NN") for n in ("5 per class", "10 per class")]
    found = {(row["task"], row["method"]): row["values"] for row in results["rows"]}
    assert set(found) == {(t, m) for t in tasks for m in ("raw pixels", "random network", *methods)}
    for values in found.values():
        assert len(values) == 2
        assert min(values) > 50  # chance is 10 %
        assert f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}" in printed
    for task in tasks:
        # A frozen teacher is the random network, with statistics of distorted images.
        frozen, at_random = found[task, "frozen teacher"], found[task, "random network"]
        assert all(abs(a - b) < 5 for a, b in zip(frozen, at_random, strict=True))
    assert "│ ema teacher - random network " in printed
    assert "What probe, 5 per class shows" in printed
    assert "instead of a frozen random network: " in printed


def test_classify_says_what_to_run_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SSL)
    classify = importlib.import_module("classify")
    with pytest.raises(typer.Exit) as ended:
        classify.methods_in(tmp_path, seeds=2)
    assert ended.value.exit_code == 1
    said = "".join(capsys.readouterr().out.split())  # wherever its lines are broken
    assert "nopretrain-ema-seed0-teacher.safetensorsandlacks3morefiles" in said
    assert f"pythonexamples/ssl/pretrain.py--seeds2--out{tmp_path}" in said


def test_the_random_network_is_where_pretraining_began(pretrain: ModuleType) -> None:
    classify = importlib.import_module("classify")
    begun = pretrain.begin(pretrain.Target.ema, 5, pretrain.Settings())
    backbone = classify.random_backbone(5, pretrain.load_images()[0])
    assert same_parameters(backbone, backbone.state_dict(), begun.student.backbone.state_dict())


def test_collapse_is_detected(pretrain: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    images, _ = pretrain.load_images()
    collapsed = {}
    for predictor in (True, False):  # without a predictor, a constant is what is learned
        settings = pretrain.Settings(steps=60, lr=0.01, measure_every=60, predictor=predictor)
        begun = pretrain.begin(pretrain.Target.copy, 0, settings)
        *_, last = pretrain.train(begun, images, settings)
        collapsed[predictor] = pretrain.has_collapsed(last)
    assert collapsed == {True: False, False: True}

    runs = [{"target": "copy", "seed": seed, "collapsed": seed == 1} for seed in (0, 1)]
    pretrain.report_collapse(runs)
    said = " ".join(capsys.readouterr().out.split())
    assert "Collapsed: 1 of 2 runs" in said
    assert "copy target, seed 1." in said


def test_effective_rank_counts_directions(pretrain: ModuleType) -> None:
    torch.manual_seed(0)
    plane = torch.randn(5000, 2) @ torch.linalg.qr(torch.randn(20, 2))[0].T
    assert pretrain.effective_rank(plane) == pytest.approx(2, abs=0.01)
    assert pretrain.effective_rank(torch.ones(10, 3)) == 1


def test_a_validation_average_changes_no_bit(pretrain: ModuleType) -> None:
    images, _ = pretrain.load_images()
    settings = pretrain.Settings(steps=15, measure_every=5)
    finished = []
    for watched in (False, True):
        begun = pretrain.begin(pretrain.Target.ema, 3, settings)
        if watched:
            average = EMA(begun.student, HalfLife(5))
            average.attach(begun.optimizer)
        measures = pretrain.train(begun, images, settings)
        finished.append((begun, measures, torch.get_rng_state()))
    assert average.clock == 15
    (plain, measures, rng), (watched_run, same_measures, same_rng) = finished
    assert measures == same_measures
    assert torch.equal(rng, same_rng)
    for who in ("student", "teacher"):
        a, b = getattr(plain, who).state_dict(), getattr(watched_run, who).state_dict()
        assert a.keys() == b.keys()
        assert all(a[k].numpy().tobytes() == b[k].numpy().tobytes() for k in a)
