"""Write the golden files of this version: small checkpoints that every later version has to read.

    python tests/golden/make.py tests/golden/0.1

Run once for a format, and never again into the same folder: what is there stays as it is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from polyak import EMA, HalfLife


def model() -> nn.Module:
    """Return a model with tied weights, statistics and a counter."""
    made = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    made[2].weight = made[0].weight
    return made


def main(folder: Path) -> None:
    """Write one file or folder of each kind, and what is in them."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    trained = model()
    ema = EMA(trained, HalfLife(3))
    for step in range(5):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
            trained(torch.randn(4, 3))
        ema.update(10 * step)
    ema.save(folder / "model.safetensors")
    ema.save(folder / "averages.safetensors", averages_only=True)
    ema.save(folder / "half.safetensors", dtype=torch.float16)
    ema.save(folder / "sharded", shard_bytes=40)
    torch.save({"model": trained.state_dict(), "ema": ema.state_dict()}, folder / "training.pt")
    dcp.save({"ema": ema}, checkpoint_id=folder / "dcp", no_dist=True)
    expected = {
        "averages": {name: average.tolist() for name, average in ema.averages.items()},
        "model": {name: value.tolist() for name, value in ema.model_state_dict().items()},
        "clock": ema.clock,
        "ticks": ema.history.ticks if ema.history else None,
        "decay": repr(ema.decay),
        "mean_age": ema.report().mean_age,
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
