"""TRAINING: two small networks and their whole step, of which an update is a share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.around = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.around(x))


def resnet18(width: int = 64) -> nn.Module:
    """Return ResNet-18 for images of 32 x 32: 11.2 M parameters, as it is used on CIFAR."""
    widths = [width, width, 2 * width, 4 * width, 8 * width]
    blocks = [
        block
        for stage in range(4)
        for block in (
            Block(widths[stage], widths[stage + 1], 1 if stage == 0 else 2),
            Block(widths[stage + 1], widths[stage + 1], 1),
        )
    ]
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8 * width, 10),
    )


class Transformer(nn.Module):
    """A small language model: 5.3 M parameters as it stands."""

    def __init__(self, width: int = 256, layers: int = 4, vocabulary: int = 4096) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each place."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        return self.head(self.layers(self.embed(tokens), mask, is_causal=True))


def image_step(model: nn.Module, batch: int = 8) -> Callable[[], None]:
    """Return a call that makes a whole step: forward, backward, AdamW."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    return _step(model, lambda: F.cross_entropy(model(images), labels))


def token_step(model: Transformer, batch: int = 8, length: int = 128) -> Callable[[], None]:
    """Return the same of a language model."""
    generator = torch.Generator().manual_seed(0)
    most = model.embed.num_embeddings
    tokens = torch.randint(most, (batch, length + 1), generator=generator)
    return _step(
        model, lambda: F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    )


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step
