"""The vision network that is pretrained, and the images: plain torch, no averages in here.

scikit-learn's handwritten digits are 1,797 real scans of 8 by 8 pixels, shipped inside its wheel.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

FEATURES = 256


class Backbone(nn.Module):
    """A small convolutional network from images of shape (n, 1, 8, 8) to 256 features."""

    def __init__(self) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]

        self.layers = nn.Sequential(
            *block(1, 16), nn.MaxPool2d(2), *block(16, 32), *block(32, 64), nn.MaxPool2d(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the features, of shape (n, 256)."""
        return self.layers(images).flatten(1)


def backbone_path(out: Path, target: str, seed: int, who: str) -> Path:
    """Return where the backbone of a run's ``teacher`` or ``student`` is."""
    return out / f"pretrain-{target}-seed{seed}-{who}.safetensors"


def load_images() -> tuple[Tensor, Tensor]:
    """Return the images to train on and those to test on, in [0, 1]. Always the same split."""
    images, _ = _load()
    return images


def load_labels() -> tuple[Tensor, Tensor]:
    """Return the labels of both. Pretraining does not call this."""
    _, labels = _load()
    return labels


def _load() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=1 / 3, stratify=digits.target, random_state=0
    )
    return (images[train], images[test]), (labels[train], labels[test])
