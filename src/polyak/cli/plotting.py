"""PLOT: `polyak plot`, pictures of what averages are made of, can be made of, and were found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyak.cli.asked import Force, Json, check_out, existing
from polyak.cli.averages import (
    Decays,
    Found,
    HalfLives,
    Stds,
    UniformToo,
    averages_in,
    decays,
    in_options,
    left_out_rows,
)
from polyak.cli.told import Rows, some, tell

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from polyak.decay import Decay
    from polyak.posthoc import Curve

__all__ = ["EPILOG", "plot"]

EPILOG = """
\b
Examples:
  polyak plot --std 0.05 --std 0.1 --decay 0.999 --at 10000 -o profiles.png
  polyak plot narrow.safetensors wide.safetensors --uniform -o profiles.svg
  polyak plot run -o errors.png
  polyak plot run --std 0.08 -o approximation.pdf
  polyak plot curve.json -o scores.png

\b
What is drawn:
  decays, files, or both   profiles: which share each past state has in each average
  a folder                 the predicted error of power laws of any width, made of what is in it
  a folder and a decay     how the sum of the stored averages comes near the one that is wanted
  a .json file             what polyak.posthoc.search found: json.dump(curve.to_dict(), file)

No tensor is read. Pictures take matplotlib: pip install 'polyak[plot]'.

Exit codes: 0 done; 2 nothing done, as an argument or a file is not what it should be.
"""


def plot(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="OUT", help="The picture: .png, .svg or .pdf."),
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER|FILES", help="Averages of one run, or a curve."),
    ] = None,
    std: Stds = None,
    half_life: HalfLives = None,
    decay: Decays = None,
    uniform: UniformToo = False,
    at: Annotated[
        int | None,
        typer.Option("--at", "--clock", metavar="CLOCK", help="When; by default as files have it."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Draw what averages are made of, what stored ones can give, or what a search has found.

    OUT is complete or not there: never an input, and another file only with --force.
    """
    from polyak import plot as pictures

    paths, targets = paths or [], list(decays(std, half_life, decay, uniform).values())
    curves = [path for path in paths if path.suffix == ".json" and ".index" not in path.suffixes]
    if curves and (len(paths) > 1 or targets or at is not None):
        raise ValueError(
            f"{str(curves[0])!r} is a curve, which is a picture of its own. Pass it alone"
        )
    found, left_out = averages_in(paths) if paths and not curves else ([], {})
    check_out(out, False, [*curves, *(path for one in found for path in one.inputs)], force)
    try:
        if curves:
            picture, figure = "scores", pictures.scores(_curve(curves[0]))
        elif any(one.in_folder for one in found):
            picture, figure = _of_a_folder(found, targets, at)
        else:
            picture, figure = "profiles", _profiles(found, targets, at)
        pictures.save(figure, out)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
    answer = {
        "out": str(out),
        "picture": picture,
        "files": list(map(str, curves or [one.path for one in found])),
        "decays": list(map(repr, targets)),
        "left_out": left_out,
    }
    tell(answer, as_json, _rows)


def _curve(path: Path) -> Curve:
    from polyak.posthoc import Curve

    try:
        return Curve.from_dict(json.loads(existing(path).read_text()))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} holds no curve: {error}. In Python, json.dump(curve.to_dict(), file) "
            "writes the one that polyak.posthoc.search returned"
        ) from error


def _of_a_folder(
    found: Sequence[Found], targets: Sequence[Decay], at: int | None
) -> tuple[str, Figure]:
    """Return which picture of stored averages is meant, and the picture."""
    from polyak import plot as pictures

    if len(targets) > 1:
        raise ValueError(
            f"a picture shows how one average is made of a folder, and {len(targets)} are asked "
            "for. Pass one of them"
        )
    files = [one.path for one in found]
    if targets:
        return "approximation", pictures.approximation(files, targets[0], at)
    return "errors", pictures.errors(files, at)


def _profiles(found: Sequence[Found], targets: Sequence[Decay], at: int | None) -> Figure:
    from polyak import plot as pictures

    if not found and not targets:
        raise ValueError(
            "there is nothing to draw. Pass decays, such as --std 0.1 --at 10000, files of "
            "averages, a folder of them, or a curve"
        )
    if not found and at is None:
        raise ValueError(
            "a decay alone does not say how long it has averaged. Pass --at CLOCK, such as "
            "--at 10000"
        )
    names = [one.path.name for one in found]
    files = {
        str(one.path) if names.count(one.path.name) > 1 else one.path.name: one.history
        for one in found
    }
    return pictures.profiles(files | {repr(target): target for target in targets}, at)


def _rows(answer: Mapping[str, Any]) -> Rows:
    names = [Path(path).name for path in answer["files"]]
    rows = [
        ("wrote", answer["out"]),
        ("picture", answer["picture"]),
        ("files", some(names) if answer["picture"] in ("profiles", "scores") else f"{len(names)}"),
        ("decays", some(answer["decays"])),
        *left_out_rows(answer["left_out"]),
    ]
    return [(name, value) for name, value in rows if value]
