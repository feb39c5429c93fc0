"""THE LIMIT: the same mixing of the same number of bytes in one buffer, in C, and STREAM's triad.

Compiled for this machine when it is first asked for, into a folder that is gone afterwards.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from harness.contender import DECAY
from harness.shapes import Weights, floating

SOURCE = Path(__file__).parent.parent / "limit.c"
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-pthread"]
KINDS = {torch.float32: 0, torch.bfloat16: 1}
TRIAD = 2


def compiler() -> str | None:
    """Return the C compiler, where there is one."""
    return shutil.which(os.environ.get("CC", "cc"))


class Limit:
    """`average += weight * (weights - average)` over a flat buffer: no guard, no names, no tensors.

    Args:
        model: what to average.
        weights: the buffer that all tensors of the model are views of.
    """

    def __init__(self, model: Weights, weights: Tensor) -> None:
        self._model, self._weights = model, weights
        self._average = weights.to(torch.float32, copy=True)
        self._kind = KINDS[weights.dtype]

    def update(self) -> None:
        """Run the loop on as many threads as torch has."""
        run(self._kind, self._average, self._weights, None, 1 - DECAY)

    def averages(self) -> dict[str, Tensor]:
        """Return views of the buffer."""
        return {
            name: self._average.as_strided(view.shape, view.stride(), view.storage_offset())
            for name, view in floating(self._model).items()
        }


class Triad:
    """`a = b + scalar * c` over as many bytes as an update of that model moves."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        moved = elements * (8 + dtype.itemsize)
        length = moved // 12
        self.a, self.b, self.c = torch.zeros(length), torch.rand(length), torch.rand(length)

    def update(self) -> None:
        """Run the triad on as many threads as torch has."""
        run(TRIAD, self.a, self.b, self.c, 3.0)


def run(kind: int, target: Tensor, source: Tensor, other: Tensor | None, weight: float) -> None:
    """Call the C code."""
    pointers = (target.data_ptr(), source.data_ptr(), other.data_ptr() if other is not None else 0)
    if _loop()(kind, *pointers, weight, target.numel(), torch.get_num_threads()):
        raise RuntimeError(f"the limit cannot have {torch.get_num_threads()} threads")


@functools.cache
def _loop() -> Callable[..., int]:
    found = compiler()
    if found is None:
        raise RuntimeError(
            "there is no C compiler to measure the limit with; install one, or set CC"
        )
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "limit.so"
        subprocess.run([found, *FLAGS, "-o", str(library), str(SOURCE)], check=True)
        loaded = ctypes.CDLL(str(library))
    pointer = ctypes.c_void_p
    loaded.run.argtypes = [
        *(ctypes.c_int, pointer, pointer, pointer),
        *(ctypes.c_float, ctypes.c_size_t, ctypes.c_int),
    ]
    return loaded.run
