"""JOBS: what is measured, each in a process of its own, and how much memory that needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from harness import machine, sections
from harness.sections import Row
from harness.shapes import elements, listed
from harness.timing import Effort

PROGRAM = Path(__file__).parent.parent / "update.py"
# What malloc of glibc does with memory that is given back. "keep": it takes nothing from the system
# by mmap and gives nothing back; "return": from 64 KB on it gives everything back at once, and new
# memory is touched for the first time, page by page. A program in the wild is somewhere in between.
MALLOC = {
    "keep": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)},
    "return": {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
}
SECTIONS = ["allocator", "shapes", "size", "tensors", "step", "swap", "memory"]
# Bytes for each number of a model, as seen: the buffers of the limit, two models and their
# averages, and the three buffers of the triad or the average of a peer and a temporary copy; or all
# on one model, without temporary copies, where memory that is given back is there for the next one.
FOUR_MODELS, ONE_MODEL = 42, 17
SLACK = 2 * 10**9  # bytes: what a process needs besides


@dataclass(frozen=True)
class Job:
    """A call of a function of `sections` in a fresh process.

    Args:
        section: the name of the function.
        arguments: for it; plain values.
        malloc: a key of `MALLOC`.
        needs_bytes: of memory.
    """

    section: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    malloc: str = "keep"
    needs_bytes: int = 0

    def __str__(self) -> str:
        named = [*self.arguments.get("models", ()), self.arguments.get("model", "")]
        counts = [f"{count:,}" for count in self.arguments.get("counts", ())]
        return " ".join([self.section, *filter(None, named + counts)]) + f", malloc {self.malloc}"

    def rows(self) -> Iterator[Row]:
        """Measure, in this process."""
        arguments = dict(self.arguments)
        if "effort" in arguments:
            arguments["effort"] = Effort(*arguments["effort"])
        for row in getattr(sections, self.section)(**arguments):
            yield {"section": row["section"], "malloc": self.malloc, **row}

    def run(self) -> Iterator[Row]:
        """Measure, in a process of its own."""
        command = [sys.executable, str(PROGRAM), "--job", json.dumps(asdict(self))]
        environment = os.environ | MALLOC[self.malloc]
        with (
            tempfile.TemporaryFile("w+") as complaints,
            subprocess.Popen(
                command, env=environment, text=True, stdout=subprocess.PIPE, stderr=complaints
            ) as child,
        ):
            for line in child.stdout or ():
                yield json.loads(line)
            if child.wait():
                complaints.seek(0)
                raise RuntimeError(f"{self} failed:\n{complaints.read()}")


def planned(quick: bool, models: Sequence[str], largest: int, chosen: Sequence[str]) -> list[Job]:
    """Return the jobs of a run.

    Args:
        quick: seconds instead of minutes, and less of everything.
        models: keys of `MODELS`.
        largest: elements of the largest single tensor.
        chosen: sections.
    """
    effort = (0.1, 3, 9) if quick else (0.35, 5, 61)
    mallocs = ["keep"] if quick else list(MALLOC)
    jobs = [Job("allocator", {"effort": effort}, malloc) for malloc in mallocs]
    for model in models:
        for malloc in mallocs:
            counts = [1, 2] if malloc == "keep" else [1]
            arguments = {"models": [model], "thread_counts": counts, "effort": effort}
            jobs.append(Job("shapes", arguments, malloc, FOUR_MODELS * elements(listed(model))))
    for count in (10**k for k in range(6, 10) if 10**k <= largest):
        large = count >= sections.LARGE
        needs = (ONE_MODEL if large else FOUR_MODELS) * count
        malloc = "return" if large else "keep"
        jobs.append(Job("size", {"counts": [count], "effort": effort}, malloc, needs))
    counts = [10, 1000] if quick else [10, 100, 1000, 10_000, 100_000]
    jobs.append(Job("tensors", {"counts": counts, "effort": effort}))
    small = {"effort": (0.0, 2, 2), "width": 16, "layers": 1}
    jobs.append(Job("step", small if quick else {"effort": (5.0, 9, 9)}))
    by_size = sorted(models, key=lambda model: elements(listed(model)))
    for model in dict.fromkeys((by_size[0], by_size[-1])):
        for malloc in mallocs:
            needs = FOUR_MODELS * elements(listed(model))
            jobs.append(Job("swap", {"model": model, "effort": effort}, malloc, needs))
    needs = FOUR_MODELS * elements(listed(by_size[-1]))
    jobs.append(Job("memory", {"model": by_size[-1]}, needs_bytes=needs))
    return [job for job in jobs if job.section in chosen]


def short_of_memory(job: Job) -> str | None:
    """Return why a job cannot be run now, if it cannot."""
    free = machine.free_bytes()
    if job.needs_bytes + SLACK <= free:
        return None
    needs = (job.needs_bytes + SLACK) / 1e9
    return f"{job}: needs {needs:.1f} GB of memory, {free / 1e9:.1f} GB are free"
