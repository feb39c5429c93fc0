"""BACKGROUND: files that are written while the program goes on, from copies in host memory.

What is to be written may change as soon as it has been copied; the buffers are used again each
time. What a write has failed with is raised by whoever asks next. It is not known here what is
written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from polyak import engine
from polyak.files import Lazy

__all__ = ["Writer"]


class Writer:
    """A thread that writes, and buffers in host memory that it writes from."""

    def __init__(self) -> None:
        self._begin_process()
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._events: list[Any] = []

    def _begin_process(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="polyak-snapshots")
        self._process = os.getpid()
        self._job: Future[None] | None = None

    def copied(self, label: str, tensors: Mapping[str, Lazy]) -> dict[str, Tensor]:
        """Return copies, which stay as they are until the next call with this label."""
        copies, devices = {}, set()
        with engine.unrecorded():
            for name, lazy in tensors.items():
                source = lazy.read()
                copies[name] = self._buffer((label, name), source)
                copies[name].copy_(source, non_blocking=source.is_cuda)
                devices |= {source.device} if source.is_cuda else set()
        for device in devices:
            self._events.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
            self._events[-1].record(torch.cuda.current_stream(device))
        return copies

    def begin(self, write: Callable[[], None]) -> None:
        """Write when all copies are complete."""
        events, self._events = self._events, []

        def run() -> None:
            for event in events:
                event.synchronize()
            write()

        self._job = self._pool.submit(run)

    def check(self) -> None:
        """Raise what the last write has failed with, if it is done."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last write, and raise what it has failed with, once."""
        if self._process != os.getpid():  # a fork has no thread, and has begun nothing
            self._begin_process()
        if self._job is not None:
            try:
                self._job.result()
            finally:
                if self._job.done():  # not where waiting was interrupted
                    self._job = None

    def _buffer(self, key: tuple[str, str], like: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (like.shape, like.dtype):
            with torch.inference_mode(False):
                pinned = like.is_cuda
                buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer
