"""Checkpoints of every version so far, kept for ever: this version reads them."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import polyak
from polyak import EMA, HalfLife, files
from polyak.checkpoint import opened

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(
    path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name[0].isdigit()
)


@pytest.fixture(params=VERSIONS)
def folder(request: pytest.FixtureRequest) -> Path:
    return GOLDEN / str(request.param)


def expected(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def model() -> nn.Module:
    spec = importlib.util.spec_from_file_location("make", GOLDEN / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: nn.Module = module.model()
    return made


def same(
    found: dict[str, Tensor], values: dict[str, Any], dtype: torch.dtype | None = None
) -> None:
    assert set(found) == set(values)
    for name, value in values.items():
        wanted = torch.tensor(value, dtype=found[name].dtype if dtype is None else torch.float32)
        if dtype is not None and wanted.is_floating_point():
            wanted = wanted.to(found[name].dtype)
        assert torch.equal(found[name], wanted), name


def test_there_are_golden_files() -> None:
    """Of the first format at least."""
    assert "0.1" in VERSIONS


def test_saved_files_are_read(folder: Path) -> None:
    """As weights, by a plain model too; whole, with their facts and checksums."""
    values = expected(folder)
    same(files.read(folder / "model.safetensors"), values["model"])
    averages = files.read(folder / "averages.safetensors")
    assert torch.equal(averages.pop("2.weight"), averages["0.weight"])  # tied: under both names
    same(averages, values["averages"])
    for name in ("model", "averages", "half"):
        path = folder / f"{name}.safetensors"
        assert files.verify(path) == []
        facts = files.read_facts(path)
        assert facts["clock"] == values["clock"]
        assert facts["averaged"]
    half = files.read(folder / "half.safetensors")
    for name, value in values["model"].items():
        assert torch.equal(half[name], torch.tensor(value).to(half[name].dtype))
    made = model()
    made.load_state_dict(files.read(folder / "model.safetensors"), strict=True)


def test_a_folder_of_shards_is_read(folder: Path) -> None:
    """By its index."""
    with opened(folder / "sharded") as found:
        tensors = {name: stored.read() for name, stored in found.tensors.items()}
        assert len(found.files) > 1
    same(tensors, expected(folder)["model"])


def test_a_state_is_loaded(folder: Path) -> None:
    """From a file of torch.save and from a folder of torch.distributed.checkpoint: to go on."""
    values = expected(folder)
    for kind in ("training.pt", "dcp"):
        ema = EMA(model(), HalfLife(3))
        if kind == "dcp":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it is one process
                dcp.load({"ema": ema}, checkpoint_id=folder / kind, no_dist=True)
        else:
            ema.load_state_dict(torch.load(folder / kind, weights_only=True)["ema"])
        same(dict(ema.averages), values["averages"])
        assert ema.clock == values["clock"]
        assert ema.history
        assert ema.history.ticks == values["ticks"]
        assert repr(ema.decay) == values["decay"]
        assert ema.report().mean_age == pytest.approx(values["mean_age"], rel=1e-12)
        ema.update(values["clock"] + 10)


def test_averages_are_loaded_from_each(folder: Path) -> None:
    """By name, from every kind of file that polyak writes."""
    values = expected(folder)["averages"]
    for kind in ("averages.safetensors", "model.safetensors", "training.pt", "dcp", "sharded"):
        at = "ema" if kind in ("training.pt", "dcp") else ""
        loaded = polyak.load_averages(folder / kind, at=at)
        assert loaded.clock == expected(folder)["clock"]
        for name, value in values.items():
            assert torch.equal(loaded[name], torch.tensor(value)), (kind, name)
