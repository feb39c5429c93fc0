"""MEMORY: what a call allocates of tensors, and what of it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile


class Traced(NamedTuple):
    """Bytes of tensor memory, against what was there before."""

    held: int  # after the call
    peak: int  # during it


def traced(call: Callable[[], object]) -> Traced:
    """Run a call and return what torch's allocator gave and took back meanwhile.

    Memory of other kinds, such as Python's own objects, is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    del result
    results = profiled.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return Traced(held, peak)
