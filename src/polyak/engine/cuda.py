"""The kernel for NVIDIA GPUs: one launch for all tensors of a group, one pass over memory.

It takes pairs of tensors on one GPU that fill their memory alike; the others go to `foreach`. The
loop is in `triton_lerp.py`, which is imported when there is such a pair, and used where it does,
bit for bit, what torch does on that GPU.

A table on the device says of each tensor where its target and its source are and how many elements
it has; each block knows its row. The weight is read on the device, so that an update can be
captured in a CUDA graph; nothing is waited for, and nothing allocated unless a tensor has moved.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from polyak.engine.foreach import fills_alike, unrecorded

__all__ = ["Cuda", "launch", "obstacle"]

# Elements of a block, and those that its threads have in flight at once: two loads of 16 bytes each
# for the targets. A larger step takes more registers, so that fewer blocks share a multiprocessor
# and hide each other's waiting; a smaller block spends more of its time on the table.
BLOCK = 1 << 13
STEP = 1 << 11
WARPS = 8

_DEVICE = "cuda"
# The target's dtype is the one of the arithmetic. float8 is left to foreach: how it is cast depends
# on the GPU.
_TARGETS = (torch.float32, torch.float64)
_SOURCES = (*_TARGETS, torch.bfloat16, torch.float16)
_WEIGHTS = _TARGETS  # read as they are


class Cuda:
    """One group of local tensors: the targets share device and dtype, and so do the sources."""

    name = "cuda"

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether this pair can be run here."""
        return (
            target.device.type == _DEVICE
            and target.device == source.device
            and target.dtype in _TARGETS
            and source.dtype in _SOURCES
            and fills_alike(target, source)
            and not obstacle(target.device, target.dtype, source.dtype)
        )

    def __init__(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        from polyak.engine import triton_lerp

        self._device = device = targets[0].device
        self._sizes = [target.numel() for target in targets]
        self._held = list(itertools.chain(*zip(targets, sources, strict=True)))
        self._forms = list(map(_form, self._held))
        self._versioned = [target for target in targets if not target.is_inference()]
        self._addresses: list[int] = []
        counts = [-(-size // BLOCK) for size in self._sizes]
        self._first = [0, *itertools.accumulate(counts)][:-1]
        self._loop = triton_lerp.lerp[(sum(counts),)]
        self._how = launch(targets[0].dtype, sources[0].dtype)
        with torch.inference_mode(False):
            self.skipped = torch.zeros((), dtype=torch.int64, device=device)
            self._weight = torch.zeros((), dtype=torch.float64, device=device)
            self._table = torch.zeros(len(targets), 4, dtype=torch.int64, device=device)
            tensors, times = _on_host(range(len(targets))), _on_host(counts)
            self._owner = tensors.repeat_interleave(times).to(device, torch.int32)
        self._look()

    def lerp(self, weight: float | Tensor) -> None:
        """Move the targets; the weight is a float or a 0-dim tensor. One of 0 does nothing."""
        self._look()
        scalar = self._weight
        if not isinstance(weight, Tensor):
            scalar.fill_(weight)
        elif weight.device == self._device and weight.dtype in _WEIGHTS:
            scalar = weight
        else:
            scalar.copy_(weight)
        with torch.cuda.device(scalar.get_device()):
            self._loop(self._table, self._owner, scalar, self.skipped, **self._how)
        # What autograd has saved of a target is no longer what it was, which torch cannot see.
        increment_version(self._versioned)

    def _look(self) -> None:
        """Read the addresses again, and give them to the device if one has changed."""
        addresses = list(map(Tensor.data_ptr, self._held))
        if addresses == self._addresses:
            return
        self._refuse_what_is_gone()
        on_gpu = self._device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "tensors have moved since the last update, and a CUDA graph that is being captured "
                "cannot learn where they are; run one update, of weight 0 if none is due, before "
                "the capture"
            )
        columns = addresses[::2], addresses[1::2], self._sizes, self._first
        # In new pinned memory each time: the last rows may still be on their way. Its allocator
        # keeps it until it has been read.
        rows = _on_host(list(zip(*columns, strict=True)), pinned=on_gpu)
        self._table.copy_(rows, non_blocking=True)
        self._addresses = addresses

    def _refuse_what_is_gone(self) -> None:
        gone = [
            f"{tuple(t.shape)} {t.dtype} on {t.device}, made for {tuple(form[0])} {form[2]}"
            for t, form in zip(self._held, self._forms, strict=True)
            if _form(t) != form
            or (t.storage_offset() + t.numel()) * t.itemsize > t.untyped_storage().nbytes()
        ]
        if gone:
            raise RuntimeError(
                f"{len(gone)} of {len(self._held)} tensors have lost their memory or their form "
                f"since this plan was made: {'; '.join(gone)}; make a new Plan"
            )


def launch(target: torch.dtype, source: torch.dtype) -> dict[str, Any]:
    """Return how the loop is compiled for a pair of dtypes."""
    from polyak.engine.triton_lerp import DTYPES

    return {
        "TARGET": DTYPES[target],
        "SOURCE": DTYPES[source],
        # As many elements of the source to a load as of the target.
        "ALIGNED": min(16, 16 * source.itemsize // target.itemsize),
        "BLOCK": BLOCK,
        "STEP": STEP,
        "num_warps": WARPS,
        "enable_fp_fusion": False,  # what is to be fused says so
    }


@functools.cache
def obstacle(device: torch.device, target: torch.dtype, source: torch.dtype) -> str:
    """Return why the loop is not used for these dtypes on this GPU; empty if it is.

    The first call compiles it (a second, once for each machine) and runs it. Syncs.

    Args:
        device: a GPU.
        target: the dtype of the averages.
        source: that of the weights.
    """
    if torch.version.hip is not None:
        return "the kernel has not been tried on ROCm"
    try:
        agrees = _agrees(device, target, source)
    except Exception as error:  # of many kinds: no Triton, no compiler, an old driver, an old GPU
        return f"the kernel cannot run: {type(error).__name__}: {error}".splitlines()[0]
    return "" if agrees else "the kernel does not round as torch does"


def _agrees(device: torch.device, target: torch.dtype, source: torch.dtype) -> bool:
    """Whether the loop does what `torch.lerp` does, bit for bit, over values of all magnitudes.

    Full blocks and others, aligned and not, all forms of the weight, the guard and its count.
    """
    generator = torch.Generator().manual_seed(0)

    def values(size: int) -> Tensor:
        how: Any = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
        exponents = torch.randint(-149, 128, (size,), **how)
        return torch.randn(size, **how) * torch.exp2(exponents)

    with unrecorded():
        targets = [values(2 * BLOCK + 3).to(device, target)[i:] for i in (0, 1)]
        sources = [values(2 * BLOCK + 3).to(device, source)[i:] for i in (0, 1)]
        for s in sources:
            s[::101], s[1::101], s[2::101] = math.nan, math.inf, 0.0
        path = Cuda(targets, sources)
        for weight, dtype in itertools.product((0.3, 0.7, 1.0), (None, *_WEIGHTS)):
            by = weight if dtype is None else torch.tensor(weight, dtype=dtype, device=device)
            expected, skipped = [], path.skipped.clone()
            for t, s in zip(targets, sources, strict=True):
                mixed = torch.lerp(t, s.to(target), float(by))
                expected.append(torch.where(mixed.isfinite(), mixed, t))
                skipped += (~mixed.isfinite()).sum()
            path.lerp(by)
            if not all(map(_same_bits, targets, expected)) or path.skipped != skipped:
                return False
    return True


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def _on_host(numbers: Sequence[Any], pinned: bool = False) -> Tensor:
    """Return integers as a tensor, wherever tensors are made by default."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pinned)


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device
