"""BOXES: parts of a tensor: whether they fill it, and which elements are in one. No tensors."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from typing import TypeAlias

__all__ = ["Box", "runs", "tile"]

Box: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...]]"  # where it begins, and how large it is


def tile(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether boxes, in order, fill a shape, each element once."""
    open_boxes: list[Box] = []
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape):
            return False
        if any(o < 0 or n < 0 or o + n > s for o, n, s in zip(offsets, sizes, shape, strict=True)):
            return False
        if not math.prod(sizes) or not shape:
            continue
        open_boxes = [(o, n) for o, n in open_boxes if o[0] + n[0] > offsets[0]]
        for others, lengths in open_boxes:
            sides = zip(offsets, sizes, others, lengths, strict=True)
            if all(o < other + length and other < o + n for o, n, other, length in sides):
                return False
        open_boxes.append((offsets, sizes))
    return sum(math.prod(sizes) for _, sizes in boxes) == math.prod(shape)


def runs(box: Box, shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield which elements from `start` to `stop` are in a box, and where in it, run by run."""
    offsets, sizes = box
    inner = len(shape)
    while inner and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)  # from this dimension on, elements of the box follow each other
    length, count = math.prod(sizes[inner:]), math.prod(sizes[:inner])

    def begin(number: int) -> int:
        at, stride = 0, 1
        for dim in reversed(range(len(shape))):
            number, index = divmod(number, sizes[dim]) if dim < inner else (number, 0)
            at += (offsets[dim] + index) * stride
            stride *= shape[dim]
        return at

    for number in range(bisect.bisect_right(range(count), start - length, key=begin), count):
        first = begin(number)
        low, high = max(start, first), min(stop, first + length)
        if low >= high:
            return
        yield low, high, number * length + low - first
