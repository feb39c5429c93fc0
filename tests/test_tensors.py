"""Tensors that are not plain (sparse, expanded, one byte wide), and state that is no tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polyak import EMA, everything, trainable
from polyak.files import read, read_facts


class Graph(nn.Module):
    """A layer with a sparse adjacency, an expanded constant and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("adjacency", torch.eye(3).to_sparse())
        self.register_buffer("grid", torch.arange(3.0).expand(4, 3))

    def get_extra_state(self) -> Any:
        return {"version": 2}

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize("policy", [trainable, everything])
def test_what_cannot_be_averaged_is_left_alone(policy: Any) -> None:
    """The model has them before, inside and after; the average and its export are right beside."""
    model = Graph()
    ema = EMA(model, 0.5, policy=policy)
    for _ in range(3):
        ema.update()
        with torch.no_grad():
            model.layer.weight += 1
    assert set(ema.averages) == {"layer.weight", "layer.bias"}
    with ema.applied():
        assert torch.equal(model.adjacency.to_dense(), torch.eye(3))
        assert torch.equal(model.grid, torch.arange(3.0).expand(4, 3))
        assert torch.equal(model.layer.weight, ema.averages["layer.weight"])
    exported = ema.model_state_dict()
    assert list(exported) == list(model.state_dict())
    assert exported["_extra_state"] == {"version": 2}
    assert torch.equal(exported["adjacency"].to_dense(), torch.eye(3))


def test_what_a_file_cannot_hold_is_said(tmp_path: Path) -> None:
    """Nothing is left out of a published file without a word."""
    ema = EMA(Graph(), 0.5)
    ema.update()
    with pytest.warns(UserWarning, match=r"(?s)left out:.*adjacency.*for torch.save"):
        ema.save(tmp_path / "a.safetensors")
    assert read_facts(tmp_path / "a.safetensors")["left_out"] == ["_extra_state", "adjacency"]
    assert set(read(tmp_path / "a.safetensors")) == {"layer.weight", "layer.bias", "grid"}
    ema.save(tmp_path / "b.safetensors", averages_only=True)  # nobody asked for the rest


def test_a_sparse_parameter_is_refused_by_name() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(
        ValueError, match=r"weight is trained as a Parameter in the layout .*keep it an ordinary"
    ):
        EMA(model)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_one_byte_weights_are_averaged_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight = nn.Parameter(torch.ones(2, 2).to(dtype))
    ema = EMA(model, 0.9)
    ema.update()
    model.weight.data.copy_(torch.full((2, 2), 2.0))
    ema.update()
    assert ema.averages["weight"].dtype == torch.float32
    assert torch.allclose(ema.averages["weight"], torch.full((2, 2), 1.1))
    with ema.applied():
        assert torch.equal(model.weight.float(), torch.full((2, 2), 1.1).to(dtype).float())
    assert torch.equal(model.weight.float(), torch.full((2, 2), 2.0))


def test_a_decay_of_zero_is_not_told_to_be_one() -> None:
    with pytest.warns(UserWarning, match=r"copy of the last weights; .*Constant\(decay=0.0\)"):
        EMA(nn.Linear(1, 1), 0.0)
