"""INSPECT: `polyak inspect`, what a checkpoint is, whether it is whole, how far from another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from polyak.cli.asked import Json, Place, Which, chosen, open_checkpoint
from polyak.cli.program import UnfulfilledError
from polyak.cli.told import (
    SHOWN,
    Rows,
    aligned,
    in_bytes,
    print_json,
    printable,
    progress_bar,
    some,
    tell,
)

__all__ = ["EPILOG", "inspect"]

EPILOG = """
\b
Examples:
  polyak inspect ema.safetensors
  polyak inspect run                  a line for each checkpoint in a folder
  polyak inspect ema.safetensors --verify
  polyak inspect ema.safetensors --against step-3000.pt
  polyak inspect ema.safetensors --json

--verify names what is damaged, by polyak's own checksums or those that torch.save writes; of other
files it says what cannot be checked. It also names tensors with NaN or infinite elements.

Exit codes: 0 done; 1 --verify found something, or --against found names or shapes that differ; 2
an argument or a file is not what it should be.
"""


def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="A checkpoint, or a folder of some.")
    ],
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all of it: is it whole, is it finite?")
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="OTHER", help="How far is it from this checkpoint?"),
    ] = None,
    which: Which = None,
    at: Place = "",
    as_json: Json = False,
) -> None:
    """Say what a checkpoint is: whose it is, what is averaged and how, how large it is.

    Only headers are read, unless --verify or --against asks for every tensor.
    """
    from polyak import examine

    found = examine.found_in(path)
    if against is not None and len(found) > 1:
        raise ValueError(
            f"{str(path)!r} has {len(found)} checkpoints, and --against compares one. Pass one of "
            f"them, such as {str(found[-1])!r}"
        )
    answers, holds = [], True
    for one in found:
        try:
            answer, one_holds = _inspected(one, verify, against, which, at)
        except (OSError, ValueError, UnfulfilledError) as error:
            if len(found) == 1:
                raise
            answer, one_holds = {"path": str(one), "error": str(error)}, False
        answers.append(answer)
        holds = holds and one_holds
    if len(answers) == 1:
        tell(answers[0], as_json, _inspect_rows)
    elif as_json:
        print_json({"path": str(path), "checkpoints": answers})
    else:
        _print_table(answers)
    if not holds:
        raise typer.Exit(1)


def _inspected(
    path: Path, verify: bool, against: Path | None, which: str | None, at: str
) -> tuple[dict[str, Any], bool]:
    """Return what there is to say of a checkpoint, and whether all that was asked holds."""
    from polyak import examine

    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_checkpoint(path))
        except ValueError as error:
            if verify:
                raise UnfulfilledError(str(error)) from error
            raise
        answer = examine.describe(opened, at) | {"path": str(path)}
        holds = True
        if verify:
            with progress_bar("reading", 2 * answer["bytes"]) as progress:
                verdict = examine.verify(opened, progress)
            answer["verified"] = asdict(verdict)
            holds = not verdict.damaged and not verdict.nonfinite
        if against is not None:
            other = stack.enter_context(open_checkpoint(against))
            (_, tensors), (_, others) = chosen(opened, which, at), chosen(other, which, at)
            size = sum(stored.nbytes for held in (tensors, others) for stored in held.values())
            with progress_bar("comparing", size) as progress:
                distance = examine.distance(tensors, others, progress)
            answer["against"] = {"path": str(against), **asdict(distance)}
            holds = holds and not (distance.missing or distance.unexpected or distance.reshaped)
    return answer, holds


def _inspect_rows(answer: Mapping[str, Any]) -> Rows:
    rows = [("path", answer["path"]), ("producer", f"{answer['producer']} ({answer['container']})")]
    for name, held in answer["sets"].items():
        size = (
            f"{held['tensors']:,} tensors, {held['elements']:,} elements, {in_bytes(held['bytes'])}"
        )
        rows += [(name, f"{size}, {', '.join(held['dtypes'])}"), ("decay", held["decay"] or "")]
    if answer["averaged"] is not None:
        rows.append(("averaged", f"{answer['averaged']:,} of these, the others as in the model"))
    if answer["clock"] is not None:
        rows.append(("clock", f"{answer['clock']:,}"))
    if answer["horizon"] is not None:
        rows.append(("horizon", _horizon(answer["horizon"])))
    if answer["combined"] is not None:
        made = answer["combined"]
        rows.append(("average", made["rule"]))
        pairs = zip(made["coefficients"], made["sources"], strict=True)
        rows += [("", f"{coefficient:.4f}  {source}") for coefficient, source in pairs]
    details = {key: value for key, value in answer["details"].items() if key not in answer}
    rows += [
        ("details", ", ".join(f"{key}={_short(value)}" for key, value in details.items())),
        ("in all", f"{answer['tensors']:,} tensors, {in_bytes(answer['bytes'])}"),
        ("note", answer["note"] or ""),
    ]
    rows += _verified_rows(answer["verified"]) if "verified" in answer else []
    rows += _against_rows(answer["against"]) if "against" in answer else []
    return [(name, value) for name, value in rows if value]


def _verified_rows(verified: Mapping[str, Any]) -> Rows:
    return [
        *(("checked", what) for what in verified["checked"]),
        *(("unchecked", what) for what in verified["unchecked"]),
        *(("DAMAGED", f"{name}: {how}") for name, how in verified["damaged"].items()),
        *(("NOT FINITE", f"{name}: {n:,} elements") for name, n in verified["nonfinite"].items()),
        ("verified", "" if verified["damaged"] else _no_damage(verified)),
        ("finite", "" if verified["nonfinite"] else "every element"),
    ]


def _no_damage(verified: Mapping[str, Any]) -> str:
    return f"no damage found{' in what could be checked' if verified['unchecked'] else ''}"


def _against_rows(against: Mapping[str, Any]) -> Rows:
    far = {name: math.inf if math.isnan(d) else d for name, d in against["tensors"].items()}
    farthest = sorted(far.items(), key=lambda item: -item[1])[:SHOWN]
    shapes = [f"{name} {a} and {b}" for name, (a, b) in against["reshaped"].items()]
    return [
        ("against", against["path"]),
        (
            "distance",
            f"{against['total']:.2e} of its length, over {len(against['tensors'])} tensors",
        ),
        *(("", f"{value:.2e}  {name}") for name, value in farthest),
        ("MISSING", some(against["missing"])),
        ("ONLY HERE", some(against["unexpected"])),
        ("SHAPES", some(shapes)),
    ]


def _print_table(answers: Sequence[Mapping[str, Any]]) -> None:
    lines: list[Sequence[str]] = [
        ("checkpoint", "producer", "clock", "decay", "mean age", "tensors", "size", "")
    ]
    for answer in answers:
        name = Path(answer["path"]).name
        if "error" in answer:
            lines.append((name, *[""] * 6, f"UNREADABLE: {answer['error']}"))
            continue
        decays = [held["decay"] for held in answer["sets"].values() if held["decay"]]
        horizon, verified = answer["horizon"], answer.get("verified")
        state = "" if verified is None else "whole, finite"
        if verified and (verified["damaged"] or verified["nonfinite"]):
            state = f"LOOK AT {some([*verified['damaged'], *verified['nonfinite']])}"
        lines.append(
            (
                name,
                answer["producer"],
                "" if answer["clock"] is None else f"{answer['clock']:,}",
                ", ".join(dict.fromkeys(decays)),
                "" if horizon is None else f"{horizon['mean_age']:,.1f}",
                f"{answer['tensors']:,}",
                in_bytes(answer["bytes"]),
                state,
            )
        )
    for line in aligned(lines):
        typer.echo(printable(line))


def _horizon(horizon: Mapping[str, float]) -> str:
    return (
        f"mean age {horizon['mean_age']:,.1f} ± {horizon['deviation']:,.1f} on the clock, as "
        f"little noise as {horizon['effective_samples']:,.1f} states"
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
