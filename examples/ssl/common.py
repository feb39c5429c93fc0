"""What the stages of this folder share: options, a progress bar, tables, and the files of results.

Every stage measures rows, ``row(task, method, one value per seed)``, prints them with `print_table`
and `print_pairs`, and leaves them as ``OUT/<stage>.json`` with `write_results`.
"""

from __future__ import annotations

import json
import platform
import shlex
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

Seeds = Annotated[int, typer.Option(min=1, help="Runs, with the seeds 0, 1, ...")]
Out = Annotated[Path, typer.Option(help="Folder of the results.")]
Fast = Annotated[bool, typer.Option(help="Few seeds, few steps: does it run?")]
OUT = Path("out/ssl")

Row = dict[str, Any]  # task, method, metric, values: one per seed

console = Console(highlight=False)


def row(task: str, method: str, values: list[float], metric: str = "accuracy %") -> Row:
    """Return one measurement: what was to be done, by what, and how well with each seed."""
    return {"task": task, "method": method, "metric": metric, "values": values}


def progress() -> Progress:
    """Return a progress bar, to be used as a context."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, TimeElapsedColumn(), console=console)


def write_results(
    path: Path, rows: list[Row], settings: dict[str, Any], seconds: float, **more: Any
) -> None:
    """Write the results of a stage as JSON, with what is needed to repeat them."""
    program = Path(sys.argv[0]).name
    facts = {
        "command": shlex.join(["python", f"examples/ssl/{program}", *sys.argv[1:]]),
        "settings": settings,
        "rows": rows,
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("polyak", "torch", "scikit-learn")},
    }
    path.write_text(json.dumps(facts | more, indent=1) + "\n")
    console.print(f"Wrote {path} after {seconds:.0f} seconds.")


def print_table(rows: list[Row], title: str) -> None:
    """Print mean ± standard deviation over the seeds, a line per method, a column per task."""
    cells = {(r["method"], r["task"]): mean_std(r["values"]) for r in rows}
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    metrics = ", ".join(dict.fromkeys(r["metric"] for r in rows))
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(metrics)
    for task in tasks:
        table.add_column(task, justify="right")
    for method in dict.fromkeys(r["method"] for r in rows):
        table.add_row(method, *(cells.get((method, task), "") for task in tasks))
    console.print(table)


def print_pairs(rows: list[Row], pairs: list[tuple[str, str]], title: str) -> None:
    """Print how much better one method is than another on the same seeds, a column per task.

    Args:
        rows: what was measured.
        pairs: (method, method that it is compared with).
        title: of the table.
    """
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("difference: mean (min to max), better in")
    for task in tasks:
        table.add_column(task, justify="right")
    for a, b in pairs:
        found = (differences(rows, task, a, b) for task in tasks)
        table.add_row(f"{a} - {b}", *(describe(values) if values else "" for values in found))
    console.print(table)


def differences(rows: list[Row], task: str, a: str, b: str) -> list[float]:
    """Return method ``a`` minus method ``b`` for each seed; nothing if one was not measured."""
    values = {r["method"]: r["values"] for r in rows if r["task"] == task}
    if a not in values or b not in values:
        return []
    return [x - y for x, y in zip(values[a], values[b], strict=True)]


def describe(found: list[float]) -> str:
    """Return differences as text: ``+4.9 (+4.2 to +5.6) 4 of 4``."""
    better = sum(value > 0 for value in found)
    mean = statistics.mean(found)
    return f"{mean:+.1f} ({min(found):+.1f} to {max(found):+.1f}) {better} of {len(found)}"


def mean_std(values: list[float]) -> str:
    """Return ``87.1 ± 1.0``; of one value, the value."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
