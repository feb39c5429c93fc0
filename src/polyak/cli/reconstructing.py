"""RECONSTRUCT: `polyak reconstruct`, any average of a run from those that were stored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak.cli.asked import DryRun, Dtype, Force, Json, Out, check_out, refuse_other_formats, size
from polyak.cli.averages import (
    Decays,
    HalfLives,
    Stds,
    UniformToo,
    averages_in,
    decays,
    in_options,
    left_out_rows,
)
from polyak.cli.program import UnfulfilledError
from polyak.cli.told import Rows, in_bytes, progress_bar, tell

if TYPE_CHECKING:
    from polyak.decay import Decay
    from polyak.posthoc import Solution

__all__ = ["EPILOG", "reconstruct"]

EPILOG = """
\b
Examples:
  polyak reconstruct run --std 0.08 -o ema.safetensors
  polyak reconstruct run --std 0.08 -o ema.safetensors --dry-run
  polyak reconstruct run --std 0.05 --std 0.1 --uniform -o averages
  polyak reconstruct run --half-life 1000 --at 20000 -o ema.safetensors
  polyak reconstruct narrow-*.safetensors wide-*.safetensors --decay 0.999 -o ema.safetensors

Several averages are made in one pass over the files, and OUT is a folder with a file for each:
powerlaw-0.05.safetensors, powerlaw-0.1.safetensors, uniform.safetensors. Of a folder take part the
files that EMA.save wrote, and the answer says which others are left out.

Exit codes: 0 done; 1 refused, as the files cannot give it; 2 nothing done, as an argument or a file
is not what it should be; 130 Ctrl-C, which leaves nothing behind.
"""


def reconstruct(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDER|FILES", help="Averages of one run, in any order."),
    ],
    out: Out,
    std: Stds = None,
    half_life: HalfLives = None,
    decay: Decays = None,
    uniform: UniformToo = False,
    at: Annotated[
        int | None,
        typer.Option(metavar="CLOCK", help="When; by default that of the newest average."),
    ] = None,
    limit: Annotated[
        float, typer.Option(metavar="ERROR", help="The largest predicted error; inf for any.")
    ] = 0.2,
    dtype: Annotated[Dtype, typer.Option(help="Of the averages.")] = "float32",
    shard_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Folders, of files up to this size, as in 5GB."),
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Make an average that nobody kept, from those that a run stored.

    How near it comes is known before a tensor is read. What the files cannot give is refused, with
    the nearest that they can. OUT is safetensors, complete or not there: never an input, and
    another file only with --force.
    """
    import torch

    from polyak import files, posthoc

    targets = decays(std, half_life, decay, uniform)
    if not targets:
        raise ValueError(
            "no average is asked for. Pass one or more of --std 0.1, --half-life 1000, "
            "--decay 0.999 and --uniform"
        )
    shard, several = None if shard_bytes is None else size(shard_bytes), len(targets) > 1
    found, left_out = averages_in(paths)
    refuse_other_formats(out)
    check_out(out, several or shard is not None, [p for one in found for p in one.inputs], force)
    inputs, wanted = [one.path for one in found], list(targets.values())
    solutions = _solved(inputs, wanted, at, limit)
    rows = list(zip(*(solution.coefficients for solution in solutions), strict=True))
    bytes_read = sum(one.bytes for one, row in zip(found, rows, strict=True) if any(row))
    names = [f"{name}.safetensors" if shard is None else name for name in targets]
    notes = [
        f"{one.path} was reconstructed itself; its error of {one.error:.2%} is in what is predicted"
        for one, row in zip(found, rows, strict=True)
        if one.error and any(row)
    ]
    if not dry_run:
        with ExitStack() as stack:
            heard = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            folder = stack.enter_context(files.atomic_folder(out)) if several else out
            progress = stack.enter_context(progress_bar("reconstructing", bytes_read))
            try:
                posthoc.reconstruct(
                    inputs,
                    wanted,
                    [folder / name for name in names] if several else [out],
                    at=at,
                    limit=limit,
                    dtype=getattr(torch, dtype),
                    shard_bytes=shard,
                    progress=progress,
                )
            except ValueError as error:
                raise UnfulfilledError(in_options(str(error))) from error
        notes += [str(warning.message) for warning in heard]
    answer: dict[str, Any] = {
        "out": str(out),
        "written": not dry_run,
        "at": solutions[0].at,
        "limit": limit,
        "dtype": dtype,
        "targets": [
            {
                "name": name,
                "decay": repr(target),
                "out": str(out / file if several else out),
                "predicted_error": solution.predicted_error,
                "amplification": solution.amplification,
                "storage_noise": solution.storage_noise,
            }
            for (name, target), file, solution in zip(
                targets.items(), names, solutions, strict=True
            )
        ],
        "files": [
            {"path": str(one.path), "clock": one.history.clock, "coefficients": list(row)}
            for one, row in zip(found, rows, strict=True)
        ],
        "left_out": left_out,
        "read_bytes": bytes_read,
        "notes": notes,
    }
    tell(answer, as_json, _rows)


def _solved(
    paths: Sequence[Path], targets: Sequence[Decay], at: int | None, limit: float
) -> list[Solution]:
    """Return how each average is made, or refuse: all of them that cannot be."""
    from polyak import posthoc

    solutions, refusals = [], []
    for target in targets:
        try:
            solutions.append(posthoc.solve(paths, target, at, limit=limit))
        except ValueError as error:
            refusals.append(in_options(str(error)))
    if refusals:
        raise UnfulfilledError("\n".join(dict.fromkeys(refusals)))
    return solutions


def _rows(answer: Mapping[str, Any]) -> Rows:
    targets = answer["targets"]
    numbers = [
        ("", [one["name"] for one in targets], ""),
        ("predicted error", [f"{one['predicted_error']:.2%}" for one in targets], ""),
        ("amplification", [f"{one['amplification']:.2f}" for one in targets], ""),
        ("storage noise", [f"{one['storage_noise']:.1e}" for one in targets], ""),
        *(
            ("", [_coefficient(share) for share in one["coefficients"]], one["path"])
            for one in answer["files"]
        ),
    ]
    width = max(len(cell) for _, cells, _ in numbers for cell in cells)
    taken = sum(any(one["coefficients"]) for one in answer["files"])
    return [
        ("wrote" if answer["written"] else "would write", answer["out"]),
        ("at", f"{answer['at']:,}"),
        *(
            (name, "  ".join([*(cell.rjust(width) for cell in cells), path]).rstrip())
            for name, cells, path in numbers
        ),
        ("dtype", answer["dtype"]),
        (
            "bytes",
            f"{in_bytes(answer['read_bytes'])} to read, of {taken} of {len(answer['files'])} files",
        ),
        *left_out_rows(answer["left_out"]),
        *(("note", note) for note in answer["notes"]),
    ]


def _coefficient(share: float) -> str:
    return "0" if not share else f"{share:.4f}" if abs(share) >= 5e-5 else f"{share:.0e}"
