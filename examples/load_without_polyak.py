"""What somebody runs who is given averaged weights: PyTorch and safetensors, and no polyak.

It loads files that ``digits.py`` has saved into the model's own class and prints the test accuracy
of each. The model and the data are defined here, so that this program imports nothing else.

    python examples/load_without_polyak.py out/digits/cnn-powerlaw.safetensors
"""

import json
import sys

import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


class Network(nn.Module):
    """A small convolutional network for images of 8 by 8 pixels.

    Args:
        batch_norm: whether each convolution is followed by batch normalization.
    """

    def __init__(self, batch_norm: bool) -> None:
        super().__init__()

        def block(channels_in: int, channels_out: int) -> list[nn.Module]:
            convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1)
            norm = [nn.BatchNorm2d(channels_out)] if batch_norm else []
            return [convolution, *norm, nn.ReLU()]

        self.features = nn.Sequential(
            *block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.MaxPool2d(2)
        )
        self.classify = nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits for images of shape (n, 1, 8, 8)."""
        return self.classify(self.features(images).flatten(1))


def load_halves() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return images and labels to train on, then images and labels to test on.

    scikit-learn's handwritten digits: 1,797 real images, shipped inside its wheel. The split is
    always the same, with the same share of each digit in both halves.
    """
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        torch.arange(len(labels)).numpy(), test_size=0.5, stratify=digits.target, random_state=0
    )
    return images[train], labels[train], images[test], labels[test]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images that the model, put into eval mode, classifies correctly."""
    model.eval()
    with torch.no_grad():
        correct = model(images).argmax(dim=1) == labels
    return 100 * correct.sum().item() / len(labels)


def main(paths: list[str]) -> None:
    """Print the test accuracy of each file, as one JSON object."""
    torch.set_num_threads(1)
    _, _, images, labels = load_halves()
    accuracies = {}
    for path in paths:
        weights = load_file(path)
        model = Network(batch_norm=any("running_mean" in name for name in weights))
        model.load_state_dict(weights, strict=True)
        accuracies[path] = accuracy(model, images, labels)
    if "polyak" in sys.modules:
        raise RuntimeError("this was meant to work without polyak, which something has imported")
    print(json.dumps(accuracies))


if __name__ == "__main__":
    main(sys.argv[1:])
