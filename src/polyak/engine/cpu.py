"""The CPU kernel: one pass over memory, in C (`lerp.c`), over raw pointers.

It takes pairs of tensors in host memory that fill their memory alike; the others go to `foreach`.
The loops are compiled when polyak is installed, where there is a compiler, and used where they do,
bit for bit, what torch does on this machine.

A pointer is only as good as the memory behind it. Each tensor is held as long as its pointer is,
and `Plan.current` reads the pointers anew before each run.
"""

from __future__ import annotations

import array
import ctypes
import functools
import importlib.util
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polyak.engine.foreach import fills_alike

__all__ = ["Cpu", "Loops", "loops", "obstacle"]

# As lerp.c numbers them: what is read, and what it is mixed into.
_PAIRS = {
    (torch.float32, torch.float32): 0,
    (torch.float32, torch.bfloat16): 1,
    (torch.float32, torch.float16): 2,
    (torch.float64, torch.float64): 3,
}
_KINDS = (2, 1, 0)  # the widest first
_PIECE = 1 << 16  # elements that a thread takes at a time
_SHARE = 1 << 18  # elements for which it is worth waking a thread


class Cpu:
    """One group of local tensors: the targets share device and dtype, and so do the sources."""

    name = "cpu"

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether this pair can be run here."""
        return (
            target.device.type == source.device.type == "cpu"
            and (target.dtype, source.dtype) in _PAIRS
            and fills_alike(target, source)
            and not obstacle()
        )

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], own: Loops | None = None
    ) -> None:
        found = own or loops()
        if isinstance(found, str):
            raise RuntimeError(f"there is no compiled loop: {found}; use the path foreach")
        self._loops = found
        self._held = [*targets, *sources]
        self._versioned = [target for target in targets if not target.is_inference()]
        self._pointers = array.array("Q", (tensor.data_ptr() for tensor in self._held))
        self._ends = array.array("q", itertools.accumulate(tensor.numel() for tensor in targets))
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")
        first = self._pointers.buffer_info()[0]
        self._job = _Job(
            tensors=len(targets),
            targets=first,
            sources=first + len(targets) * self._pointers.itemsize,
            ends=self._ends.buffer_info()[0],
            piece=_PIECE,
            skipped=self.skipped.data_ptr(),
            kind=found.kind,
            source=_PAIRS[targets[0].dtype, sources[0].dtype],
        )

    def lerp(self, weight: float | Tensor) -> None:
        """Move the targets; the weight is a float or a 0-dim tensor."""
        share = float(weight)
        if share == 0.0:
            return
        self._job.weight, self._job.next = share, 0
        # What autograd has saved of a target is about to change, which torch cannot see. This comes
        # before the pass over memory, which drives these objects from the cache.
        torch.autograd.graph.increment_version(self._versioned)
        threads = torch.get_num_threads()
        helpers = min(threads, self._ends[-1] // _SHARE) - 1
        if helpers < 1:
            self._work()
        elif team := _team():
            team(self._loops.dll.polyak_lerp, ctypes.byref(self._job), threads, 0)
        else:
            _helpers().run(self._work, helpers)

    def _work(self) -> None:
        """Take pieces of the job until none is left. Other threads may do so at the same time."""
        self._loops.dll.polyak_lerp(ctypes.byref(self._job))


class Loops(NamedTuple):
    """What lerp.c was compiled to, and the kind of loops in it that is right here."""

    dll: ctypes.CDLL
    kind: int
    held: ctypes.PyDLL  # the same, for what is called with the GIL held


def loops() -> Loops | str:
    """Return the loops for this machine, or why there are none."""
    if not _found:
        _found.append(_search())
    return _found[0]


def obstacle() -> str:
    """Return why there are no loops for this machine; empty if there are."""
    found = loops()
    return found if isinstance(found, str) else ""


class _Job(ctypes.Structure):
    """`job` of lerp.c."""

    _fields_ = (
        ("tensors", ctypes.c_int64),
        ("targets", ctypes.c_void_p),
        ("sources", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("piece", ctypes.c_int64),
        ("weight", ctypes.c_double),
        ("skipped", ctypes.c_void_p),
        ("next", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("source", ctypes.c_int32),
    )


_found: list[Loops | str] = []  # once looked for
_pools: dict[int, _Helpers] = {}  # process -> its threads: a fork has none of its parent's


def _search() -> Loops | str:
    """Return the widest loops that run here and do what torch does, or what is in the way."""
    found = importlib.util.find_spec("polyak.engine._lerp")
    if found is None or found.origin is None:
        return "no compiler when polyak was installed"
    try:
        library = ctypes.CDLL(found.origin)
        library.polyak_lerp.argtypes = [ctypes.POINTER(_Job)]
        library.polyak_lerp.restype = None
        library.polyak_runs.argtypes = [ctypes.c_int]
        # It reads objects of Python and of torch, which nobody may free meanwhile: under the GIL.
        held = ctypes.PyDLL(found.origin)
        held.polyak_same.argtypes = [*[ctypes.c_int64] * 2, *[ctypes.c_void_p] * 3, ctypes.c_int]
    except (OSError, AttributeError) as error:  # the latter is of another build
        return f"the compiled loops cannot be loaded: {error}"
    for kind in _KINDS:
        found_here = Loops(library, kind, held)
        if library.polyak_runs(kind) and _agrees(found_here):
            return found_here
    return f"no compiled loop rounds as torch does ({torch.backends.cpu.get_cpu_capability()})"


def _agrees(loops: Loops) -> bool:
    """Whether the loops do what `torch.lerp` does, bit for bit, on numbers that tell.

    Both forms (weight below one half and not), a vector's tail, and subnormal numbers.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    with torch.inference_mode(False):
        scale = torch.logspace(-44, 4, 67, **wide)
        for (target, source), weight in itertools.product(_PAIRS, (1e-3, 0.3, 0.5, 0.75, 1.0)):
            before = (torch.randn(67, generator=generator, **wide) * scale).to(target)
            now = (torch.randn(67, generator=generator, **wide) * scale).to(source)
            expected = torch.lerp(before, now.to(target), weight)
            Cpu([before], [now], loops).lerp(weight)
            if not torch.equal(before, expected):
                return False
    return True


_home = os.getpid()


def _team() -> Any:
    """Return what runs a C function in all threads of torch's OpenMP runtime, or None.

    After an operation of torch, such as the step of an optimizer, these are awake for a while and
    would keep other threads from their cores. A fork has lost them, and each thread of a program
    would have as many of its own.
    """
    usual = os.getpid() == _home and threading.current_thread() is threading.main_thread()
    return _openmp() if usual else None


@functools.cache
def _openmp() -> Any:
    forked = multiprocessing.get_start_method(allow_none=True) == "fork"
    if forked and multiprocessing.parent_process() is not None:
        return None  # by whoever may have used the runtime before
    # The one that torch is linked to: whichever comes first for the process, else torch's own, that
    # is loaded already. A library gives the symbols of those that it needs, too.
    own = str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
    loaded = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0)
    for name, mode in ((None, ctypes.DEFAULT_MODE), (own, loaded)):
        with suppress(OSError, AttributeError, TypeError):  # another system, another runtime
            return ctypes.CDLL(name, mode=mode).GOMP_parallel
    return None


class _Helpers:
    """Threads that share in the work of whoever has it; as many as the system gives."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Callable[[], None], SimpleQueue[None]]] = SimpleQueue()
        self._threads = 0

    def run(self, work: Callable[[], None], most: int) -> None:
        """Run the work here, and at the same time in at most so many of the threads."""
        with suppress(RuntimeError):  # a thread that cannot be had is not needed
            while self._threads < most:
                threading.Thread(target=self._serve, name="polyak", daemon=True).start()
                self._threads += 1
        done: SimpleQueue[None] = SimpleQueue()
        others = min(most, self._threads)
        for _ in range(others):
            self._tasks.put((work, done))
        work()
        for _ in range(others):
            done.get()

    def _serve(self) -> None:
        while True:
            work, done = self._tasks.get()
            with suppress(Exception):  # what one does not take, the others do
                work()
            done.put(None)
            del work, done  # or a thread that waits would keep whole models


def _helpers() -> _Helpers:
    process = os.getpid()
    if process not in _pools:
        _pools[process] = _Helpers()
    return _pools[process]
