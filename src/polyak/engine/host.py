"""HOST: averages in host memory, updated while the accelerator goes on with its work.

Parameters stand still from one optimizer step to the next. So they are copied, a chunk at a time
and in their own dtype, through a ring of buffers of fixed size, on a stream of their own, while a
worker thread mixes each chunk into the averages. `read` waits until all have been copied, which is
what has to be done before they change; `wait` until all are mixed, which every reader does. Running
statistics do not stand still: any forward changes them. So they are copied aside first.

The same code runs with the sources in host memory, where a copy is an ordinary one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from polyak.engine.cpu import Cpu
from polyak.engine.foreach import Foreach, cut, unrecorded

__all__ = ["Host"]

RING = 3  # buffers: one is being filled while another is mixed, and one is between the two
BUFFER_BYTES = 64 << 20


class Host:
    """One group of local tensors: targets in host memory, sources on one accelerator.

    Args:
        targets: the averages.
        sources: as many, of the same shapes.
        still: whether the sources stand still until `read` has been called.
    """

    name = "host"

    @staticmethod
    def takes(target: Tensor, source: Tensor) -> bool:
        """Whether this pair can be run here."""
        return target.device.type == "cpu" and source.device.type == "cuda"

    def __init__(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor], still: bool = True
    ) -> None:
        device, dtype = sources[0].device, sources[0].dtype
        size = min(BUFFER_BYTES // dtype.itemsize, sum(target.numel() for target in targets))
        self._moving = [] if still else list(sources)
        with torch.inference_mode(False):
            self._aside = [torch.empty_like(source) for source in self._moving]
            sources = self._aside or sources
            ring = torch.empty(RING, size, dtype=dtype, pin_memory=device.type == "cuda")
        self._chunks = [
            _Chunk(pairs, ring[number % RING])
            for number, pairs in enumerate(cut(targets, sources, size))
        ]
        self._link = _Cuda(device) if device.type == "cuda" else _Link()
        self._worker: ThreadPoolExecutor | None = None
        self._process = 0  # that has the worker: a fork has none
        self._job: Future[None] | None = None
        self._copied = threading.Event()

    @property
    def skipped(self) -> Tensor:
        """Elements that kept their value, of all updates so far."""
        self.wait()
        counts = [mixer.skipped for chunk in self._chunks for mixer in chunk.mixers]
        return torch.stack(counts).sum()

    def lerp(self, weight: float | Tensor) -> None:
        """Begin to move the targets towards what the sources hold now; see `read` and `wait`."""
        self.wait()
        if self._worker is None or self._process != os.getpid():
            self._process = os.getpid()
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="polyak-host")
        self._copied = threading.Event()
        weight = self._link.near(weight)
        if self._moving:
            with unrecorded():
                torch._foreach_copy_(self._aside, self._moving)
        self._link.begin()
        self._job = self._worker.submit(self._run, self._link.number(weight), self._copied)

    def read(self) -> None:
        """Wait until the sources may change. On an accelerator its stream waits, not the host.

        Raises what went wrong in the worker.
        """
        if self._job is None:
            return
        self._refuse_fork()
        self._copied.wait()
        self._link.hold()
        if self._job.done():
            self._job.result()

    def wait(self) -> None:
        """Wait until all targets have moved. Raises what went wrong in the worker, each time."""
        if self._job is not None:
            self._refuse_fork()
            self._job.result()

    def _refuse_fork(self) -> None:
        if self._process != os.getpid() and self._job is not None and not self._job.done():
            raise RuntimeError(
                "this process was forked while the averages were being updated, and has half of "
                "them; call ema.state_dict() or ema.report() before the fork, which wait"
            )

    def _run(self, weight: float | Tensor, copied: threading.Event) -> None:
        """Copy all chunks and mix them: in the worker."""
        try:
            with torch.no_grad():
                for chunk in self._chunks[:RING]:
                    self._link.copy(chunk)
                for number, chunk in enumerate(self._chunks):
                    following = self._chunks[number + RING : number + RING + 1]
                    if not following:
                        copied.set()
                    self._link.arrived(chunk)  # and the weight, which was sent before
                    share = float(weight)
                    for mixer in chunk.mixers if share else ():
                        mixer.lerp(share)
                    for other in following:  # the buffer is free again
                        self._link.copy(other)
        finally:
            copied.set()  # also of what failed, for which nobody is to wait


class _Chunk:
    """Pieces of sources, the parts of a buffer that they are copied to, and what mixes these."""

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], buffer: Tensor) -> None:
        targets = [target for target, _ in pairs]
        self.sources = [source for _, source in pairs]
        sizes = [target.numel() for target in targets]
        parts = torch.split(buffer[: sum(sizes)], sizes)
        self.staged = [part.view(t.shape) for part, t in zip(parts, targets, strict=True)]
        couples = list(zip(targets, self.staged, strict=True))
        fast = [couple for couple in couples if Cpu.takes(*couple)]
        slow = [couple for couple in couples if not Cpu.takes(*couple)]
        self.mixers = [
            path([target for target, _ in group], [staged for _, staged in group])
            for path, group in ((Cpu, fast), (Foreach, slow))
            if group
        ]


class _Link:
    """How chunks get into host memory that is not pinned: at once."""

    def begin(self) -> None:
        """Let what comes see all that was queued before."""

    def near(self, weight: float | Tensor) -> float | Tensor:
        """Return the weight, where it is a tensor, on the device of the sources."""
        return weight

    def number(self, weight: float | Tensor) -> float | Tensor:
        """Queue the copy of a number; return where it will be."""
        return float(weight)

    def copy(self, chunk: _Chunk) -> None:
        """Queue the copies of a chunk."""
        torch._foreach_copy_(chunk.staged, chunk.sources)

    def arrived(self, chunk: _Chunk) -> None:
        """Wait until they are done."""

    def hold(self) -> None:
        """Let what is queued from now on come after all copies so far."""


class _Cuda(_Link):
    """On a stream of its own, beside the one that trains."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events: dict[_Chunk, Any] = {}

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def near(self, weight: float | Tensor) -> float | Tensor:
        return weight.to(self._device) if isinstance(weight, Tensor) else weight

    def number(self, weight: float | Tensor) -> float | Tensor:
        if not isinstance(weight, Tensor):
            return weight
        with torch.cuda.stream(self._stream):
            here = torch.empty((), dtype=weight.dtype, device="cpu", pin_memory=True)
            weight.record_stream(self._stream)  # it may be let go before it is sent
            return here.copy_(weight, non_blocking=True)

    def copy(self, chunk: _Chunk) -> None:
        with torch.cuda.stream(self._stream):
            for staged, source in zip(chunk.staged, chunk.sources, strict=True):
                staged.copy_(source, non_blocking=True)
            if chunk not in self._events:
                self._events[chunk] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._events[chunk].record(self._stream)

    def arrived(self, chunk: _Chunk) -> None:
        self._events[chunk].synchronize()

    def hold(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
