"""MODELS: modules that hold the tensors of well-known networks, and compute nothing.

The lists in `benchmarks/shapes` were read off the models of timm and transformers, built on the
meta device: every tensor in the order of the state dict, with its name. Each file says which call
of which version made it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent.parent / "shapes"
# File -> what people call it, in the order of their sizes.
MODELS = {
    "mobilenetv3_large": "MobileNetV3-large",
    "resnet50": "ResNet-50",
    "convnext_small": "ConvNeXt-small",
    "vit_b16": "ViT-B/16",
    "gpt2_medium": "GPT-2 medium",
}
BLOCK = 1 << 20  # so many random numbers are drawn; a tensor repeats them


class Entry(NamedTuple):
    """A tensor of a model. Counters are 64-bit integers, everything else is floating."""

    name: str
    kind: str  # parameter, statistic or counter
    shape: tuple[int, ...]


def listed(model: str) -> list[Entry]:
    """Return the tensors of one of `MODELS`."""
    tensors = json.loads((FOLDER / f"{model}.json").read_text())["tensors"]
    return [Entry(name, kind, tuple(shape)) for name, kind, shape in tensors]


def one(elements: int) -> list[Entry]:
    """Return a model of a single tensor."""
    return [Entry("weight", "parameter", (elements,))]


def many(count: int) -> list[Entry]:
    """Return a model of so many tensors of one element, ten to a module."""
    return [Entry(f"{i // 10}.weight{i % 10}", "parameter", (1,)) for i in range(count)]


def elements(entries: Sequence[Entry]) -> int:
    """Return how many numbers are averaged."""
    return sum(math.prod(entry.shape) for entry in entries if entry.kind != "counter")


class Weights(nn.Module):
    """A model that is nothing but its tensors, in modules named as they are in the original.

    Args:
        entries: which tensors.
        dtype: of all floating ones.
        room: a buffer that they are to be views of; by default each has its own memory, as in a
            real model.
    """

    def __init__(
        self, entries: Sequence[Entry], dtype: torch.dtype, room: Tensor | None = None
    ) -> None:
        super().__init__()
        block = torch.rand(BLOCK, generator=torch.Generator().manual_seed(0)).sub_(0.5).to(dtype)
        for name, kind, shape in entries:
            size = math.prod(shape)
            if kind == "counter":
                _register(self, name, torch.zeros(shape, dtype=torch.int64))
                continue
            tensor = torch.empty(shape, dtype=dtype)
            if room is not None:
                tensor, room = room[:size].view(shape), room[size:]
            for piece in tensor.view(-1).split(BLOCK):
                piece.copy_(block[: piece.numel()])
            _register(self, name, nn.Parameter(tensor) if kind == "parameter" else tensor)


def floating(module: nn.Module) -> dict[str, Tensor]:
    """Return the floating tensors of a module, by the names of its state dict."""
    return {n: t for n, t in module.state_dict().items() if t.is_floating_point()}


def _register(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root._modules[step]
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(last, tensor)
    else:
        root.register_buffer(last, tensor)
