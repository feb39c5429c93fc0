"""How fast is an update? polyak and its peers against what the memory of the machine can do.

In one run, call by call in turn: the limit (a flat loop in C over the same bytes), polyak, and each
peer in its newest release on its fastest settings, on the tensors of well-known models, with
float32 and with bfloat16 weights, on one thread and on two, with an allocator that keeps memory and
with one that returns it; then overhead, size, share of a training step, swapping and memory. Before
anything is timed its result is compared with the definition in float64.

    python benchmarks/update.py --quick           # a minute or two: does all of it run?
    python benchmarks/update.py --out docs        # all of it: leave the machine alone meanwhile
    python benchmarks/update.py --section shapes --model resnet50
    python benchmarks/update.py --redraw --out docs  # table and picture from the JSON file

Needs a C compiler, and the packages of the group `bench`; a peer that is not installed is left out.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from harness import jobs, machine, ours, peers, picture, report
from harness.report import Results
from harness.shapes import MODELS

Model = Enum("Model", {name: name for name in MODELS}, type=str)
Section = Enum("Section", {name: name for name in jobs.SECTIONS}, type=str)
QUICK = ["mobilenetv3_large"]
LARGEST, LARGEST_QUICK = 10**9, 10**6


def measure(chosen: Sequence[jobs.Job], console: Console) -> tuple[list[Any], list[str]]:
    """Run the jobs that there is memory for; return the rows, and why the others were not run."""
    rows, skipped = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=len(chosen))
        for job in chosen:
            reason = jobs.short_of_memory(job)
            if reason:
                skipped.append(reason)
                console.print(f"skipped: {reason}")
            else:
                for row in job.run():
                    rows.append(row)
                    progress.update(task, description=f"{job}: {row.get('contender', '')}")
            progress.advance(task)
    return rows, skipped


def plain(value: Any) -> Any:
    """Return a row with numbers of five digits.

    >>> plain({"seconds": (0.00123456789, 1.0)})
    {'seconds': [0.0012346, 1.0]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def dumped(results: Results) -> str:
    """Return the results as JSON, a line for each row."""
    head = json.dumps(results | {"rows": []}, indent=1).removesuffix("[]\n}")
    return head + "[\n" + ",\n".join(map(json.dumps, results["rows"])) + "\n]\n}\n"


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for table in report.tables(results):
        shown = Table(title=table.title.replace("`", ""), title_justify="left", title_style="bold")
        for i, column in enumerate(table.columns):
            shown.add_column(
                column.replace("`", ""), justify="right" if i and table.numbers else "left"
            )
        for line in table.lines:
            shown.add_row(*(cell.replace("`", "") for cell in line))
        console.print(shown)
        if table.note:
            console.print(table.note.replace("\\", ""), "\n")


def save(results: Results, out: Path, console: Console) -> None:
    """Write the JSON file, the tables and the picture."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark.json").write_text(dumped(results))
    (out / "benchmark-table.md").write_text(report.markdown(results))
    picture.draw(results, out / "benchmark.png")
    console.print(f"Wrote benchmark.json, benchmark-table.md and benchmark.png in {out}.")


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A minute: does it run?")] = False,
    model: Annotated[list[Model] | None, typer.Option(help="Some models only.")] = None,
    section: Annotated[list[Section] | None, typer.Option(help="Some sections only.")] = None,
    largest: Annotated[
        int | None,
        typer.Option(min=10**6, help="Elements of the largest tensor: 4 GB at a billion."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/benchmark"),
    redraw: Annotated[bool, typer.Option("--redraw", help="From the JSON file there.")] = False,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what an update of an average costs."""
    if job is not None:
        rows = jobs.Job(**json.loads(job)).rows()
        stdout = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):  # where others may print
            for row in rows:
                print(json.dumps(plain(row)), file=stdout, flush=True)
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    if redraw:
        results = json.loads((out / "benchmark.json").read_text())
        save(results, out, console)
        show(results, console)
        return
    models = [one.value for one in model] if model else QUICK if quick else list(MODELS)
    sections = [one.value for one in section] if section else jobs.SECTIONS
    largest = largest or (LARGEST_QUICK if quick else LARGEST)
    missing = peers.candidates()[1]
    if missing:
        console.print(f"not installed, so left out: {', '.join(missing)}")
    for dtype in (torch.float32, torch.bfloat16):
        for name, reason in ours.paths(dtype)[1].items():
            console.print(f"the path {name} does not run here, {dtype}: {reason}")
    load, started = machine.load(), time.perf_counter()
    rows, skipped = measure(jobs.planned(quick, models, largest, sections), console)
    results = plain(
        {
            "command": shlex.join(["python", "benchmarks/update.py", *sys.argv[1:]]),
            "quick": quick,
            "seconds": time.perf_counter() - started,
            "load": [load, machine.load()],
            "machine": machine.facts(),
            "versions": machine.versions(),
            "skipped": skipped,
            "rows": rows,
        }
    )
    save(results, out, console)
    show(results, console)


if __name__ == "__main__":
    typer.run(main)
