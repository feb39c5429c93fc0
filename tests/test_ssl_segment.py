"""The segmentation stage: scenes that are what they say, a run, and weights that stay untouched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from polyak.files import read_facts

SSL = Path(__file__).parent.parent / "examples" / "ssl"


@pytest.fixture(scope="module")
def stage() -> Iterator[ModuleType]:
    """The program as a module; its siblings are found beside it, as when it is run."""
    sys.path.insert(0, str(SSL))
    import segment

    yield segment
    sys.path.remove(str(SSL))


@pytest.fixture
def scenes(stage: ModuleType) -> ModuleType:
    return sys.modules["scenes"]


def test_scenes_follow_from_the_seed(scenes: ModuleType) -> None:
    first, again, other = (scenes.make_scenes(50, "train", seed) for seed in (3, 3, 4))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.images, other.images)
    assert torch.equal(first.first(20).images, scenes.make_scenes(20, "train", 3).images)


def test_scenes_are_in_range_and_vary(scenes: ModuleType) -> None:
    found = scenes.make_scenes(300, "train", 0)
    assert found.images.shape == (300, 1, 16, 16)
    assert found.images.dtype == torch.float32
    assert found.images.min() == 0
    assert found.images.max() == 1
    assert set(found.classes.unique().tolist()) == set(range(len(scenes.CLASSES)))
    assert 0.3 < (found.scans[:, 1] >= 0).float().mean() < 0.6  # have two digits
    brighter = [
        image[0][mask > 0].mean() > image[0][mask == 0].mean()
        for image, mask in zip(found.images, found.classes, strict=True)
    ]
    assert 0.3 < np.mean(brighter) < 0.7  # so that brightness does not give a digit away


@pytest.mark.parametrize("split", ["train", "test"])
def test_masks_are_those_of_the_scans(scenes: ModuleType, split: str) -> None:
    strokes, digits = scenes.load_scans()
    found = scenes.make_scenes(100, split, 0)
    for classes, scans, places in zip(found.classes, found.scans, found.places, strict=True):
        expected = np.zeros((16, 16), np.int64)
        for scan, (y, x) in zip(scans.tolist(), places.tolist(), strict=True):
            if scan >= 0:
                mask = strokes[scan] >= scenes.INK
                assert not expected[y : y + 8, x : x + 8][mask].any()  # no stroke under another
                expected[y : y + 8, x : x + 8][mask] = 1 + digits[scan]
        assert np.array_equal(classes, expected)


def test_train_and_test_share_nothing(scenes: ModuleType) -> None:
    train, test = (scenes.make_scenes(1000, split, 0) for split in ("train", "test"))
    used = [set(found.scans[found.scans >= 0].tolist()) for found in (train, test)]
    assert not used[0] & used[1]
    assert len(used[0]) > 400
    grounds = scenes.load_grounds()
    for name, left, right in zip(
        scenes.PHOTOGRAPHS.split(), grounds["train"], grounds["test"], strict=True
    ):
        whole = getattr(scenes.skimage.data, name)()
        assert left.shape[1] + right.shape[1] == whole.shape[1] // 2
        assert not np.shares_memory(left, right)


def small(stage: ModuleType) -> Any:
    return stage.Settings(1, width=8, tune_steps=4, tune_batch=4, steps=3, batch=8)


@pytest.mark.parametrize("annealed", [False, True])
def test_the_validation_average_leaves_the_trained_weights_alone(
    stage: ModuleType, annealed: bool
) -> None:
    settings, labeled = small(stage), stage.make_scenes(12, "train", 0)
    torch.manual_seed(0)
    backbone = stage.Backbone(settings.width)
    outcomes = []
    for decay in (stage.Debiased(0.9), None):
        model, ema = stage.fine_tune(backbone, labeled, settings, 0, annealed, decay)
        if ema is not None:
            assert ema.clock == settings.tune_steps
            averaged = ema.model_state_dict()
            with ema.applied():
                stage.segment(model, labeled)
        outcomes.append((model.state_dict(), torch.get_rng_state()))
    (watched, rng), (plain, plain_rng) = outcomes
    assert_identical(watched, plain)
    assert torch.equal(rng, plain_rng)
    with pytest.raises(AssertionError):  # the check can fail
        assert_identical(averaged, plain)


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].numpy().tobytes() == b[name].numpy().tobytes(), name


def test_only_backbone_and_projector_of_the_teacher_move(stage: ModuleType) -> None:
    settings = small(stage)
    images = stage.make_scenes(20, "train", 0).images
    student, ema, signs = stage.pretrain(images, settings, 0, dense=True)
    parts = {name.partition(".")[0] for name in ema.averages}
    assert parts == {"backbone", "projector"}
    assert ema.clock == settings.steps
    trained = student.backbone.state_dict()
    exported = ema.model_state_dict(part="backbone")
    assert exported.keys() == trained.keys()
    assert any(not torch.equal(exported[name], trained[name]) for name in trained)
    assert set(signs) == {"loss", "spread", "rank"}


def test_a_collapse_is_seen(stage: ModuleType) -> None:
    images = stage.make_scenes(50, "train", 0).images
    torch.manual_seed(0)
    backbone = stage.Backbone(8)
    assert not stage.has_collapsed(stage.collapse(backbone, images))
    last = backbone.blocks[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.ones_(last.bias)
    assert stage.has_collapsed(stage.collapse(backbone, images))


def test_mean_iou(stage: ModuleType) -> None:
    classes = torch.tensor([[0, 0, 1, 2, 3, 4, 5]])
    assert stage.mean_iou(classes, classes) == 100
    predicted = torch.tensor([[0, 1, 1, 2, 3, 4, 5]])
    assert stage.mean_iou(predicted, classes) == pytest.approx(100 * (0.5 + 0.5 + 4) / 6)


def test_hidden_blocks_are_whole_cells(stage: ModuleType) -> None:
    torch.manual_seed(0)
    hidden = stage.hide(10, 0.5)
    assert hidden.shape == (10, 1, 16, 16)
    assert hidden.mean((1, 2, 3)).tolist() == [0.5] * 10
    cells = hidden[:, :, :: stage.CELL, :: stage.CELL]
    assert torch.equal(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), hidden)


def test_segment_runs(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-W", "error", str(SSL / "segment.py"), "--fast", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"COLUMNS": "400", "PYTHONIOENCODING": "utf-8"},
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert finished.stderr == ""
    results = json.loads((tmp_path / "segment.json").read_text())
    assert set(results) >= {"command", "settings", "rows", "seconds", "collapse"}
    assert results["command"].startswith("python examples/ssl/segment.py --fast ")
    found = {(row["task"], row["method"]) for row in results["rows"]}
    assert len(found) == len(results["rows"]) == 14
    for row in results["rows"]:
        assert row["metric"] == "mean IoU %"
        assert len(row["values"]) == results["settings"]["seeds"] == 1
        assert 0 < row["values"][0] < 100
        assert row["method"] in finished.stdout
    assert "collapse" in finished.stdout.lower()
    picture = (tmp_path / "segment.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000
    teacher, student = (
        load_file(tmp_path / f"segment-{name}-0.safetensors") for name in ("teacher", "student")
    )
    assert teacher.keys() == student.keys()
    assert all(teacher[name].shape == student[name].shape for name in student)
    facts = read_facts(tmp_path / "segment-teacher-0.safetensors")
    assert facts["clock"] == results["settings"]["steps"]
