"""AVERAGES: which ones are asked for, by options, and which ones some paths lead to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyak.cli.asked import open_checkpoint, parts
from polyak.cli.told import SHOWN, some

if TYPE_CHECKING:
    from polyak.decay import Decay
    from polyak.profile import History

__all__ = [
    "Decays",
    "Found",
    "HalfLives",
    "Stds",
    "UniformToo",
    "averages_in",
    "decays",
    "in_options",
    "left_out_rows",
]

Stds = Annotated[
    list[float] | None,
    typer.Option("--std", metavar="S", help="A power law: S is its width, a share of the run."),
]
HalfLives = Annotated[
    list[float] | None,
    typer.Option("--half-life", metavar="H", help="States count half every H units of the clock."),
]
Decays = Annotated[
    list[float] | None,
    typer.Option("--decay", metavar="D", help="Keep the share D at each unit of the clock."),
]
UniformToo = Annotated[bool, typer.Option("--uniform", help="All states count alike.")]


def decays(
    stds: Sequence[float] | None,
    half_lives: Sequence[float] | None,
    constants: Sequence[float] | None,
    uniform: bool,
) -> dict[str, Decay]:
    """Return the decays that are asked for, by names that a file may have."""
    from polyak.decay import Constant, HalfLife, PowerLaw, Uniform

    try:
        asked: list[tuple[str, Decay]] = [
            *((f"powerlaw-{_short(std)}", PowerLaw(std)) for std in stds or ()),
            *((f"halflife-{_short(half)}", HalfLife(half)) for half in half_lives or ()),
            *((f"decay-{_short(share)}", Constant(share)) for share in constants or ()),
            *([("uniform", Uniform())] if uniform else []),
        ]
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
    named = dict(asked)
    if len(named) < len(asked):
        names = [name for name, _ in asked]
        twice = [name for name in named if names.count(name) > 1]
        raise ValueError(f"asked for more than once: {', '.join(twice)}. Pass each of them once")
    return named


@dataclass(frozen=True)
class Found:
    """An average in a file, and what the file tells of it.

    Attributes:
        path: as it was given, or as it was found in a folder.
        history: of the average.
        in_folder: whether it was found in a folder with others.
        bytes: how much its tensors take.
        inputs: the file, and those that it consists of.
        error: the predicted one, of an average that was reconstructed itself.
    """

    path: Path
    history: History
    in_folder: bool
    bytes: int
    inputs: Sequence[Path]
    error: float | None


def averages_in(paths: Sequence[Path]) -> tuple[list[Found], dict[str, str]]:
    """Return the averages that paths lead to, and why which other files are left out.

    In a folder all sorts of checkpoints lie side by side, and what is there besides averages is
    left out. Whoever names a file wants it to take part, so that it is refused if it cannot.
    """
    from polyak import examine

    found: list[Found] = []
    left_out: dict[str, str] = {}
    refused: dict[str, str] = {}
    for path in paths:
        inside = examine.found_in(path)
        if inside == [path]:
            if any(one.path == path for one in found):
                continue
            one = _told(path, in_folder=False)
            if isinstance(one, Found):
                found.append(one)
            else:
                refused[str(path)] = one
            continue
        for entry in inside:
            if any(one.path == entry for one in found):
                continue
            try:
                one = _told(entry, in_folder=True)
            except (OSError, ValueError) as error:
                one = f"cannot be read: {error}"
            if isinstance(one, str):
                left_out[str(entry)] = one
            elif one.error is not None:
                left_out[str(entry)] = "reconstructed from others, and only as good as predicted"
            else:
                found.append(one)
    if refused:
        raise ValueError(
            f"{len(refused)} of the files cannot take part:{_lines(refused)}\nPass files that "
            "EMA.save wrote. In Python, polyak.posthoc.Snapshot(path, clock) says what another "
            "file is"
        )
    if not found:
        raise ValueError(
            f"there is no average of a run in {', '.join(map(str, paths))}, of the "
            f"{len(left_out)} checkpoints that are there:{_lines(left_out)}\nPass files that "
            "EMA.save wrote. In Python, polyak.posthoc.Snapshot(path, clock) says what another "
            "file is"
        )
    return found, left_out


def left_out_rows(left_out: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return which files are left out, a line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out.items():
        by_reason.setdefault(reason, []).append(Path(path).name)
    return [("left out", f"{some(names)} ({reason})") for reason, names in by_reason.items()]


def in_options(message: str) -> str:
    """Return what the library says, with options in the place of its arguments."""
    for name, option in _OPTIONS.items():
        message = re.sub(rf"\b{name}\((?:\w+=)?([^()]+)\)", rf"{option} \1", message)
    message = message.replace("Uniform()", "--uniform").replace("limit=math.inf", "--limit inf")
    message = re.sub(r"\b(at|limit)=(-?\d)", r"--\1 \2", message)
    return message.replace(" Snapshot(", " polyak.posthoc.Snapshot(")


_OPTIONS = {"PowerLaw": "--std", "HalfLife": "--half-life", "Constant": "--decay"}


def _told(path: Path, in_folder: bool) -> Found | str:
    """Return what a file tells of its average, or why it cannot take part."""
    from polyak.profile import History

    with open_checkpoint(path) as opened:
        facts = opened.facts or {}
        if facts.get("history") is None:
            return "no history of an average in it"
        try:
            history = History.from_dict(facts["history"])
        except ValueError as error:
            raise ValueError(f"{str(path)!r}: {error}") from None
        if history.opaque:
            return f"averaged by {', '.join(history.opaque)}, which only its program knows"
        return Found(
            path=path,
            history=history,
            in_folder=in_folder,
            bytes=sum(stored.nbytes for stored in opened.tensors.values()),
            inputs=[path, *parts([opened])],
            error=facts.get("predicted_error"),
        )


def _lines(reasons: Mapping[str, str]) -> str:
    lines = [f"{path}: {reason}" for path, reason in reasons.items()]
    more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "".join(f"\n  {line}" for line in [*lines[:SHOWN], *more])


def _short(number: float) -> str:
    return str(number).removesuffix(".0")
