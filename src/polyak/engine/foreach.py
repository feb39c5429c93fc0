"""What torch already has: `_foreach_copy_` and `_foreach_lerp_` over bounded scratch chunks.

Runs wherever torch runs. The tensors are cut into pieces and the pieces gathered into chunks of at
most `CHUNK` elements; a chunk is read into scratch, mixed there, tested, and written back, so
that a value which is not finite never reaches an average, tensors of any dtype and number cost the
same few calls, and the scratch stays in the cache. Nothing is allocated after construction, and
nothing on an accelerator is waited for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# Elements of a chunk. On the CPU the scratch of a float32 chunk stays in a core's second-level
# cache; an accelerator wants enough work to hide the launches.
CHUNK = {"cpu": 1 << 16}
CHUNK_ACCELERATOR = 1 << 24


class Foreach:
    """One group of local tensors: the targets share device and dtype, and so do the sources."""

    name = "foreach"

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether this pair can be run here: any can."""
        return True

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        device, dtype = targets[0].device, targets[0].dtype
        size = min(CHUNK.get(device.type, CHUNK_ACCELERATOR), sum(t.numel() for t in targets))
        with unrecorded():
            mixed, spare = torch.empty(2, size, dtype=dtype, device=device)
            self._finite = torch.empty(size, dtype=torch.bool, device=device)
            self._weight = torch.empty((), dtype=dtype, device=device)
            self._sum = torch.empty((), dtype=dtype, device=device)
            self._count = torch.empty((), dtype=torch.int64, device=device)
            self._nonzero = torch.empty((), dtype=torch.bool, device=device)
            self._moves = torch.ones((), dtype=torch.int64, device=device)  # 0 at a weight of 0
            self._infinity = torch.full((), math.inf, dtype=dtype, device=device)
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._cheap_to_read = device.type == "cpu"
        self._alike = (sources[0].device, sources[0].dtype) == (device, dtype)
        self._chunks = [_Chunk(held, mixed, spare) for held in cut(targets, sources, size)]

    def lerp(self, weight: Any) -> None:
        """Move the targets, chunk by chunk; the weight is a float or a 0-dim tensor."""
        known = not isinstance(weight, Tensor)
        with unrecorded():
            by: Any = weight if known else self._weight.copy_(weight)
            if not known:
                self._moves.copy_(torch.ne(by, 0.0, out=self._nonzero))
            for chunk in self._chunks:
                torch._foreach_copy_(chunk.mixed_views, chunk.targets)
                if self._alike and known:  # a tensor it would read on the host
                    torch._foreach_lerp_(chunk.mixed_views, chunk.sources, by)
                else:
                    torch._foreach_copy_(chunk.spare_views, chunk.sources)
                    torch.lerp(chunk.mixed, chunk.spare, by, out=chunk.mixed)
                if not (self._cheap_to_read and self._all_finite(chunk.mixed)):
                    self._keep_old(chunk)
                torch._foreach_copy_(chunk.targets, chunk.mixed_views)

    def _all_finite(self, mixed: Tensor) -> bool:
        # A sum is not finite when an element is not. The reverse does not hold (it may overflow):
        # then the elements are looked at one by one, and the result is the same.
        torch.sum(mixed, dim=0, out=self._sum)
        return math.isfinite(self._sum.item())

    def _keep_old(self, chunk: _Chunk) -> None:
        finite = self._finite[: chunk.mixed.numel()]
        torch.abs(chunk.mixed, out=chunk.spare)
        torch.lt(chunk.spare, self._infinity, out=finite)  # false for NaN; isfinite has no out=
        # A sum of booleans would allocate; one of ones is exact, since a chunk has less than 2^24.
        torch.sum(chunk.spare.copy_(finite), dim=0, out=self._sum)
        self._count.copy_(self._sum).neg_().add_(chunk.size)
        self.skipped.add_(self._count.mul_(self._moves))
        torch._foreach_copy_(chunk.spare_views, chunk.targets)
        torch.where(finite, chunk.mixed, chunk.spare, out=chunk.mixed)


@contextmanager
def unrecorded() -> Iterator[None]:
    """Write tensors outside of autograd, and ordinary ones also within inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class _Chunk:
    """Some pieces, and the scratch for them: flat to compute, in views of their shapes to copy."""

    def __init__(self, held: Sequence[tuple[Tensor, Tensor]], mixed: Tensor, spare: Tensor) -> None:
        self.targets = [target for target, _ in held]
        self.sources = [source for _, source in held]
        sizes = [target.numel() for target in self.targets]
        self.mixed, self.spare = mixed[: sum(sizes)], spare[: sum(sizes)]
        self.size = torch.tensor(sum(sizes), device=mixed.device)
        self.mixed_views, self.spare_views = (
            [
                flat.view(t.shape)
                for flat, t in zip(torch.split(s, sizes), self.targets, strict=True)
            ]
            for s in (self.mixed, self.spare)
        )


def cut(
    targets: Sequence[Tensor], sources: Sequence[Tensor], size: int
) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield lists of pieces of at most `size` elements together."""
    held: list[tuple[Tensor, Tensor]] = []
    room = size
    for target, source in zip(targets, sources, strict=True):
        for piece in pieces(target, source, size):
            if piece[0].numel() > room:
                yield held
                held, room = [], size
            held.append(piece)
            room -= piece[0].numel()
    yield held


def pieces(target: Tensor, source: Tensor, size: int = 1 << 20) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut a pair of tensors of one shape into pairs of views of at most `size` elements."""
    if fills_alike(target, source):
        flat = (target.numel(),), (1,)
        target, source = target.as_strided(*flat), source.as_strided(*flat)
    if target.numel() <= size:
        yield target, source
        return
    axis = max(range(target.dim()), key=lambda d: target.shape[d])
    rows = max(1, size // (target.numel() // target.shape[axis]))
    for pair in zip(torch.split(target, rows, axis), torch.split(source, rows, axis), strict=True):
        yield from pieces(*pair, size)


def fills_alike(target: Tensor, source: Tensor) -> bool:
    """Whether both fill one run of memory with their elements, in the same order."""
    if target.stride() != source.stride():
        return False
    run = 1
    for stride, length in sorted(zip(target.stride(), target.shape, strict=True)):
        if length != 1:
            if stride != run:
                return False
            run *= length
    return True
