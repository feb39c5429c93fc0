"""Scenes to segment: real digit scans composed on real photographs, with true masks.

No packaged data set has real images with real masks in number. So these scenes are composed, which
is why their masks are true: one or two of scikit-learn's handwritten digits (real scans, 8x8) are
laid over a crop of a photograph or texture that ships with scikit-image. Stroke and ground get a
random contrast, brightness and polarity, so that no threshold finds the digits. The mask of a digit
is the threshold of its scan; a pixel's class is 0 for background and 1 + the digit otherwise.

Training and test scenes share neither a scan nor a pixel of a photograph: training takes crops from
the left part of each photograph, test from the right. Everything follows from the seed; nothing is
downloaded.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import skimage.data
import torch
from skimage.color import rgb2gray
from sklearn.datasets import load_digits
from torch import Tensor

Split = Literal["train", "test"]

SIZE = 16  # pixels along a side of a scene
SCAN = 8  # pixels along a side of a scan
INK = 6  # a scan's pixel is a stroke from this value on, of 16
DIGITS = 5  # the digits 0 to 4
CLASSES = ["background", *map(str, range(DIGITS))]
TRAIN_SCANS = 600  # of 901
PHOTOGRAPHS = "brick grass gravel camera moon coins chelsea coffee astronaut rocket clock cell"
_TRIES = 20  # to find a place for the second digit


class Scenes(NamedTuple):
    """Images of shape (n, 1, SIZE, SIZE) with values 0 to 1, and classes (n, SIZE, SIZE).

    ``scans`` holds the scans in each scene and ``places`` their upper left corners, with -1 where
    there is no second digit: (n, 2) and (n, 2, 2).
    """

    images: Tensor
    classes: Tensor
    scans: Tensor
    places: Tensor

    def first(self, count: int) -> Scenes:
        """Return the first so many of these scenes."""
        return Scenes(*(field[:count] for field in self))


def make_scenes(count: int, split: Split, seed: int) -> Scenes:
    """Compose scenes; the same arguments give the same scenes, bit for bit.

    >>> make_scenes(3, "train", seed=0).images.shape
    torch.Size([3, 1, 16, 16])

    Args:
        count: how many.
        split: whether to use the scans and the photographs' parts for training, or those for test.
        seed: of all random choices.
    """
    rng = np.random.default_rng([seed, split == "test"])
    composed = [compose(split, rng) for _ in range(count)]
    images, classes, scans, places = (np.stack(part) for part in zip(*composed, strict=True))
    return Scenes(
        torch.from_numpy(images.astype(np.float32))[:, None],
        torch.from_numpy(classes.astype(np.int64)),
        torch.from_numpy(scans),
        torch.from_numpy(places),
    )


def compose(split: Split, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Return one scene: its image, classes, scans and places."""
    strokes, digits = load_scans()
    image = crop(split, rng)
    ground = image.mean()
    classes = np.zeros((SIZE, SIZE), np.int64)
    scans, places = np.full(2, -1), np.full((2, 2), -1)
    for which in range(rng.integers(1, 3)):
        scan = int(rng.choice(scans_of(split)))
        polarity = 1 if rng.random() < 0.5 else -1
        ink = ground + polarity * rng.uniform(0.3, 0.6)
        place = find_place(strokes[scan] >= INK, classes, rng)
        if place is None:
            continue
        window = place[0] + np.arange(SCAN)[:, None], place[1] + np.arange(SCAN)
        opacity = strokes[scan] / 16
        image[window] = (1 - opacity) * image[window] + opacity * ink
        classes[window] = np.where(strokes[scan] >= INK, 1 + digits[scan], classes[window])
        scans[which], places[which] = scan, place
    low, high = image.min(), image.max()
    return (image - low) / (high - low), classes, scans, places


def find_place(
    mask: np.ndarray, classes: np.ndarray, rng: np.random.Generator
) -> tuple[int, int] | None:
    """Return a random corner where the strokes cover no other digit, or None if none is found."""
    for _ in range(_TRIES):
        y, x = rng.integers(0, SIZE - SCAN + 1, 2).tolist()
        if not (classes[y : y + SCAN, x : x + SCAN][mask]).any():
            return y, x
    return None


def crop(split: Split, rng: np.random.Generator) -> np.ndarray:
    """Return a crop of a photograph, flipped and turned at random, at a random contrast."""
    grounds = load_grounds()[split]
    ground = grounds[rng.integers(len(grounds))]
    y, x = (int(rng.integers(side - SIZE + 1)) for side in ground.shape)
    patch = np.rot90(ground[y : y + SIZE, x : x + SIZE], rng.integers(4))
    patch = patch if rng.random() < 0.5 else patch[:, ::-1]
    patch = patch - patch.mean()
    return patch * rng.uniform(0.05, 0.2) / max(patch.std(), 0.02)


def scans_of(split: Split) -> np.ndarray:
    """Return which scans a split may use: a fixed random cut, the same for every seed."""
    order = shuffled_scans()
    return order[:TRAIN_SCANS] if split == "train" else order[TRAIN_SCANS:]


@lru_cache
def shuffled_scans() -> np.ndarray:
    """Return the numbers of all scans in a fixed random order."""
    return np.random.default_rng(0).permutation(len(load_scans()[1]))


@lru_cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's scans (n, 8, 8), 0 to 16, and their digits (n,)."""
    images, digits = load_digits(n_class=DIGITS, return_X_y=True)
    return images.reshape(-1, SCAN, SCAN), digits.astype(np.int64)


@lru_cache
def load_grounds() -> dict[Split, list[np.ndarray]]:
    """Return the photographs in gray at half size, 0 to 1: left parts for training, right for test.

    >>> [left.shape[1] + right.shape[1] for left, right in zip(*load_grounds().values())][:1]
    [256]
    """
    grounds: dict[Split, list[np.ndarray]] = {"train": [], "test": []}
    for name in PHOTOGRAPHS.split():
        photograph = getattr(skimage.data, name)()
        gray = rgb2gray(photograph) if photograph.ndim == 3 else photograph / 255
        height, width = (side // 2 * 2 for side in gray.shape)
        halved = gray[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))
        cut = round(0.7 * halved.shape[1])
        grounds["train"].append(halved[:, :cut])
        grounds["test"].append(halved[:, cut:])
    return grounds
