"""TOLD: what a command answers, in aligned words or as one JSON object, and how far it is."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import typer

__all__ = [
    "SHOWN",
    "Rows",
    "aligned",
    "in_bytes",
    "print_json",
    "printable",
    "progress_bar",
    "some",
    "tell",
]

Rows: TypeAlias = list[tuple[str, str]]
"""Names and values, a line each."""

SHOWN = 10  # of a list; --json has all


def tell(
    answer: Mapping[str, Any], as_json: bool, rows: Callable[[Mapping[str, Any]], Rows]
) -> None:
    """Print an answer."""
    if as_json:
        print_json(answer)
        return
    for line in aligned(rows(answer)):
        typer.echo(printable(line))


def print_json(answer: Mapping[str, Any]) -> None:
    """Print an answer as one object."""
    typer.echo(json.dumps(_plain(answer), allow_nan=False))


def _plain(value: Any) -> Any:
    """Return JSON values: null for the numbers that it does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """Return text of a file without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return lines whose cells begin below one another."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def some(names: Sequence[str]) -> str:
    """Return a list in words, its first ones if it is long."""
    more = [f"and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    count = f"{len(names):,}: " if len(names) > 1 else ""
    return count + ", ".join([*names[:SHOWN], *more])


def in_bytes(count: int) -> str:
    """Return a size in words."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


@contextmanager
def progress_bar(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """Show on a terminal how many bytes are done, and how long the others take."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda count: bar.advance(task, count)
