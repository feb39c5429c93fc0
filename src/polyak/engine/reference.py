"""The definition, in float64. Every other path is tested against it; nothing runs it in earnest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Reference:
    """`target <- target + weight * (source - target)`, where the stored result is finite."""

    name = "reference"

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether this pair can be run here: any can."""
        return True

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        self._targets, self._sources = targets, sources
        self.skipped = torch.zeros((), dtype=torch.int64, device=targets[0].device)

    def lerp(self, weight: float | Tensor) -> None:
        """Move the targets, tensor by tensor."""
        if float(weight) == 0.0:
            return
        for target, source in zip(self._targets, self._sources, strict=True):
            cast = source.to(target.device, target.dtype)
            result = target.double() + weight * (cast.double() - target.double())
            stored = result.to(target.dtype)
            finite = torch.isfinite(cast) & torch.isfinite(stored)
            self.skipped += (~finite).sum()
            target.copy_(torch.where(finite, stored, target))
