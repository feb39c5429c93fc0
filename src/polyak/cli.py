"""CLI: `polyak average`, `polyak inspect`, `polyak convert`: checkpoints from a shell.

A command reads its arguments, asks a room of the library and tells what came of it: nothing is
computed here. The answer is on stdout, with `--json` as one object; all else is on stderr. torch
is imported inside the commands, so that `--help` comes at once.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from polyak.checkpoint import Checkpoint, Stored

__all__ = ["app", "average", "convert", "inspect"]


Unmatched = Literal["refuse", "drop", "keep"]
LrDecay = Literal["linear", "1-sqrt", "cosine"]
Dtype = Literal["float64", "float32", "float16", "bfloat16"]
At = Annotated[
    str, typer.Option(metavar="PLACE", help="Where in a file to look, such as trainer.ema.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file OUT if it is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The checkpoint to write.")]
Which = Annotated[
    str | None,
    typer.Option(metavar="SET", help="averages or weights, of a file that has both."),
]

# ------------------------------------------------------------------------------- the commands


def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Checkpoints, the oldest first.")
    ],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="A number for each file; divided by their sum."),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="What each file keeps of the average before it."),
    ] = None,
    lr_decay: Annotated[
        LrDecay | None,
        typer.Option(help="As if the learning rate had decayed so since the first file."),
    ] = None,
    which: Which = None,
    at: At = "",
    unmatched: Annotated[
        Unmatched,
        typer.Option(
            help="Tensors that not all files have in one shape: drop, or keep the newest."
        ),
    ] = "refuse",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the averages. By default as in the newest file.")
    ] = None,
    copy_config: Annotated[
        bool,
        typer.Option("--copy-config", help="OUT is a folder, with the newest file's config in it."),
    ] = False,
    shard_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="OUT is a folder, of files up to this size, as in 5GB."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would be done, and write nothing.")
    ] = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints, in little memory, however large they are.

    All files count alike, unless --weights, --ema or --lr-decay says otherwise. What is no floating
    number, such as a counter, is the newest file's, which is the last one. OUT is safetensors,
    complete or not there: never an input, and another file only with --force.
    """
    import torch

    from polyak import combine, files
    from polyak.selection import listed

    rule, coefficients = _coefficients(len(paths), weights, ema, lr_decay)
    shard = None if shard_bytes is None else _size(shard_bytes)
    stored = None if dtype is None else getattr(torch, dtype)
    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(path)) for path in paths]
        chosen = [_chosen(one, which, at) for one in opened]
        _refuse_mixture(opened, [name for name, _ in chosen])
        sources = [tensors for _, tensors in chosen]
        configs = _configs(opened[-1]) if copy_config else []
        is_folder = copy_config or shard is not None
        _check_out(out, is_folder, paths, opened, force)
        outline = combine.outline(sources, [coefficients], dtype=stored, unmatched=unmatched)
        if outline.differences and unmatched == "refuse":
            raise _UnfulfilledError(
                f"the files differ in {len(outline.differences)} tensors:"
                f"{listed(outline.differences)}\nPass --unmatched drop to leave these out, or "
                "--unmatched keep to have them from the newest file that has them"
            )
        if not outline.promised:
            raise _UnfulfilledError(
                f"the files have no tensor in common: {len(outline.dropped)} were to be dropped. "
                "Pass --unmatched keep, or files of one model"
            )
        if not dry_run:
            facts: dict[str, Any] = {
                "producer": f"polyak {version('polyak')}",
                "combined": {
                    "rule": rule,
                    "sources": [path.name for path in paths],
                    "coefficients": coefficients,
                },
            }
            folder = stack.enter_context(files.atomic_folder(out)) if is_folder else out.parent
            name = "model.safetensors" if is_folder else out.name
            target = folder / name if shard is None else folder
            with _progress("averaging", outline.read_bytes) as progress:
                combine.combine(
                    sources,
                    [combine.Target(coefficients, target, facts)],
                    dtype=stored,
                    shard_bytes=shard,
                    unmatched=unmatched,
                    progress=progress,
                )
            for config in configs:
                with files.atomic(folder / config.name) as file:
                    file.write(config.read_bytes())
    promised = outline.promised.values()
    answer: dict[str, Any] = {
        "out": str(out),
        "written": not dry_run,
        "rule": rule,
        "files": [
            {"path": str(path), "coefficient": coefficient}
            for path, coefficient in zip(paths, coefficients, strict=True)
        ],
        "averaged": list(outline.mixed),
        "copied": {name: str(paths[number]) for name, number in outline.copied.items()},
        "dropped": list(outline.dropped),
        "differences": list(outline.differences),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in promised}),
        "read_bytes": outline.read_bytes,
        "write_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in promised),
        "config": [path.name for path in configs],
    }
    _tell(answer, as_json, _average_rows)


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
    at: At = "",
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
        except (OSError, ValueError, _UnfulfilledError) as error:
            if len(found) == 1:
                raise
            answer, one_holds = {"path": str(one), "error": str(error)}, False
        answers.append(answer)
        holds = holds and one_holds
    if len(answers) == 1:
        _tell(answers[0], as_json, _inspect_rows)
    elif as_json:
        _print_json({"path": str(path), "checkpoints": answers})
    else:
        _print_table(answers)
    if not holds:
        raise typer.Exit(1)


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint of any program.")],
    out: Out,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="What OUT is for; see below.")],
    which: Which = None,
    at: At = "",
    clock: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many updates it has seen, if IN does not tell."),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="For programs that keep it, if IN does not tell."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the averages or the weights of a checkpoint as another program expects them.

    OUT is complete or not there: never the input, and another file only with --force.
    """
    from polyak import formats

    with _opened(source) as opened:
        _check_out(out, to == "diffusers", [source], [opened], force)
    content = formats.convert(source, out, to, which=which, at=at, clock=clock, decay=decay)
    name = content.pick(which)
    answer: dict[str, Any] = {
        "out": str(out),
        "format": to,
        "producer": content.producer,
        "set": name,
        "tensors": len(content.sets[name]),
    }
    _tell(answer, as_json, _convert_rows)


# -------------------------------------------------------------------------------- what is asked


@contextmanager
def _opened(path: Path) -> Iterator[Checkpoint]:
    from polyak import formats

    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}. Pass the path of a file or a folder")
    with formats.opened(path) as opened:
        yield opened


def _refuse_mixture(opened: Sequence[Checkpoint], sets: Sequence[str]) -> None:
    """Refuse to take averages of some files and trained weights of others unless told."""
    kinds = {name.partition(" ")[0] for name in sets}
    if len(kinds) > 1:
        each = ", ".join(f"{one.path.name}: {name}" for one, name in zip(opened, sets, strict=True))
        raise ValueError(
            f"some files hold averages and some trained weights ({each}), and a mean of both is "
            "neither. Pass files of one kind"
        )


def _chosen(opened: Checkpoint, which: str | None, at: str) -> tuple[str, Mapping[str, Stored]]:
    """Return which of its sets is meant, and its tensors by name."""
    from polyak import formats

    content = formats.recognized(opened, at)
    try:
        name = content.pick(which)
    except ValueError as error:
        raise ValueError(f"{str(opened.path)!r}: {error}") from None
    tensors = content.sets[name]
    if not isinstance(tensors, Mapping) or (content.dot != "." and name != "weights"):
        raise ValueError(
            f"{str(opened.path)!r}: {content.producer} keeps its {len(tensors)} averages without "
            "names, and only the model tells which is which. In Python, "
            "polyak.formats.convert(path, out, 'safetensors', model=model) names them"
        )
    return name, tensors


def _coefficients(
    count: int, weights: str | None, ema: float | None, lr_decay: LrDecay | None
) -> tuple[str, list[float]]:
    """Return the rule in words, and what it gives each file."""
    from polyak import combine

    given = {"--weights": weights, "--ema": ema, "--lr-decay": lr_decay}
    rules = [option for option, value in given.items() if value is not None]
    if len(rules) > 1:
        raise ValueError(f"{' and '.join(rules)} say what each file counts. Pass one of them")
    if weights is not None:
        return "weights", _shares(weights, count)
    if ema is not None:
        return f"ema {ema}", combine.ema(count, ema)
    if lr_decay is not None:
        return f"lr-decay {lr_decay}", combine.lr_decay(count, lr_decay)
    return "uniform", combine.uniform(count)


def _shares(weights: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 <= n < math.inf for n in numbers) or not any(numbers):
        raise ValueError(
            f"--weights {weights} is not a number for each of the {count} files, 0 or more and not "
            f"all 0. Pass {count} of them with commas between, such as "
            f"--weights {','.join(map(str, range(1, count + 1)))}"
        )
    shares = [number / max(numbers) for number in numbers]  # whose sum no number is too large for
    return [share / math.fsum(shares) for share in shares]


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(min(float(match[1]), 1e18) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"--shard-bytes {text} is no size of 1 byte or more. Pass a number of bytes, or one "
            "with a unit: 500MB, 5GB, 2GiB"
        )
    return size


def _check_out(
    out: Path, is_folder: bool, paths: Sequence[Path], opened: Sequence[Checkpoint], force: bool
) -> None:
    """Refuse what must not be overwritten, before anything is read."""
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(out.parent)!r} for {str(out)!r}. Make it first: "
            f"mkdir -p {shlex.quote(str(out.parent))}"
        )
    folders = [path for path in paths if path.is_dir()]
    if any(out.absolute().resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(
            f"{str(out)!r} would be inside of an input, which then is another checkpoint. Pass a "
            "name beside it"
        )
    if not out.exists():
        return
    inputs = [path for one in opened for path in (one.path, *one.files)]
    if any(out.samefile(path) for path in inputs):
        raise ValueError(
            f"{str(out)!r} is one of the inputs, and would be gone if the result is not what was "
            "meant. Pass another name"
        )
    if is_folder and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(
            f"{str(out)!r} is there already, and a folder cannot be replaced without a moment in "
            "which neither is there. Pass another name, or remove it first"
        )
    if not is_folder and out.is_dir():
        raise IsADirectoryError(
            f"{str(out)!r} is a folder. Pass the path of a file, such as "
            f"{str(out / 'model.safetensors')!r}"
        )
    if not is_folder and not force:
        raise FileExistsError(
            f"{str(out)!r} is there already ({out.stat().st_size} bytes). Pass another name, or "
            "--force to replace it, once the new one is complete; what it holds is lost then"
        )


_CONFIGS = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
_NO_CONFIGS = (".index.json", "trainer_state.json")


def _configs(opened: Checkpoint) -> list[Path]:
    """Return the small files beside a checkpoint that describe its model."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no config.json beside {str(opened.path)!r}, so that --copy-config has "
            "nothing to copy. Leave it out, or pass the folder of a model as the last of the files"
        )
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _CONFIGS and not path.name.endswith(_NO_CONFIGS)
    )


def _inspected(
    path: Path, verify: bool, against: Path | None, which: str | None, at: str
) -> tuple[dict[str, Any], bool]:
    """Return what there is to say of a checkpoint, and whether all that was asked holds."""
    from polyak import examine

    with ExitStack() as stack:
        try:
            opened = stack.enter_context(_opened(path))
        except ValueError as error:
            if verify:
                raise _UnfulfilledError(str(error)) from error
            raise
        answer = examine.describe(opened, at) | {"path": str(path)}
        holds = True
        if verify:
            with _progress("reading", 2 * answer["bytes"]) as progress:
                verdict = examine.verify(opened, progress)
            answer["verified"] = asdict(verdict)
            holds = not verdict.damaged and not verdict.nonfinite
        if against is not None:
            other = stack.enter_context(_opened(against))
            (_, tensors), (_, others) = _chosen(opened, which, at), _chosen(other, which, at)
            size = sum(stored.nbytes for held in (tensors, others) for stored in held.values())
            with _progress("comparing", size) as progress:
                distance = examine.distance(tensors, others, progress)
            answer["against"] = {"path": str(against), **asdict(distance)}
            holds = holds and not (distance.missing or distance.unexpected or distance.reshaped)
    return answer, holds


# ----------------------------------------------------------------------------- what is answered

Rows = list[tuple[str, str]]


def _tell(
    answer: Mapping[str, Any], as_json: bool, rows: Callable[[Mapping[str, Any]], Rows]
) -> None:
    if as_json:
        _print_json(answer)
        return
    for line in _aligned(rows(answer)):
        typer.echo(_printable(line))


def _print_json(answer: Mapping[str, Any]) -> None:
    typer.echo(json.dumps(_plain(answer), allow_nan=False))


def _plain(value: Any) -> Any:
    """Return JSON values: null for the numbers that it does not have."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printable(text: str) -> str:
    """Return text of a file without what a terminal would take for a command."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _average_rows(answer: Mapping[str, Any]) -> Rows:
    rows = [
        ("wrote" if answer["written"] else "would write", answer["out"]),
        ("rule", answer["rule"]),
        *(("", f"{one['coefficient']:.4f}  {one['path']}") for one in answer["files"]),
        *((what, _some(list(answer[what]))) for what in ("averaged", "copied", "dropped")),
        ("dtype", ", ".join(answer["dtypes"])),
        (
            "bytes",
            f"{_bytes(answer['read_bytes'])} to read, {_bytes(answer['write_bytes'])} to write",
        ),
        ("config", ", ".join(answer["config"])),
    ]
    return [(name, value) for name, value in rows if value]


def _convert_rows(answer: Mapping[str, Any]) -> Rows:
    return [
        ("wrote", answer["out"]),
        ("for", answer["format"]),
        ("from", f"the {answer['set']} of {answer['producer']}, {answer['tensors']} tensors"),
    ]


def _inspect_rows(answer: Mapping[str, Any]) -> Rows:
    rows = [("path", answer["path"]), ("producer", f"{answer['producer']} ({answer['container']})")]
    for name, held in answer["sets"].items():
        size = (
            f"{held['tensors']:,} tensors, {held['elements']:,} elements, {_bytes(held['bytes'])}"
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
        ("details", ", ".join(f"{key}={value}" for key, value in details.items())),
        ("in all", f"{answer['tensors']:,} tensors, {_bytes(answer['bytes'])}"),
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
    farthest = sorted(far.items(), key=lambda item: -item[1])[:_SHOWN]
    shapes = [f"{name} {a} and {b}" for name, (a, b) in against["reshaped"].items()]
    return [
        ("against", against["path"]),
        (
            "distance",
            f"{against['total']:.2e} of its length, over {len(against['tensors'])} tensors",
        ),
        *(("", f"{value:.2e}  {name}") for name, value in farthest),
        ("MISSING", _some(against["missing"])),
        ("ONLY HERE", _some(against["unexpected"])),
        ("SHAPES", _some(shapes)),
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
            state = f"LOOK AT {_some([*verified['damaged'], *verified['nonfinite']])}"
        lines.append(
            (
                name,
                answer["producer"],
                "" if answer["clock"] is None else f"{answer['clock']:,}",
                ", ".join(dict.fromkeys(decays)),
                "" if horizon is None else f"{horizon['mean_age']:,.1f}",
                f"{answer['tensors']:,}",
                _bytes(answer["bytes"]),
                state,
            )
        )
    for line in _aligned(lines):
        typer.echo(_printable(line))


def _horizon(horizon: Mapping[str, float]) -> str:
    return (
        f"mean age {horizon['mean_age']:,.1f} ± {horizon['deviation']:,.1f} on the clock, as "
        f"little noise as {horizon['effective_samples']:,.1f} states"
    )


_SHOWN = 10  # of a list; --json has all


def _some(names: Sequence[str]) -> str:
    more = [f"and {len(names) - _SHOWN:,} more"] if len(names) > _SHOWN else []
    count = f"{len(names):,}: " if len(names) > 1 else ""
    return count + ", ".join([*names[:_SHOWN], *more])


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


@contextmanager
def _progress(what: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
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


# --------------------------------------------------------------------------------- the program


class _UnfulfilledError(Exception):
    """What was asked does not hold: exit code 1."""


# What every version of typer has, but each in another module.
_UsageError: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Tells of errors as the commands tell their answers: in words or JSON, with an exit code."""

    _as_json = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._as_json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise self._failed("stopped by Ctrl-C, and nothing was written", 130) from None
        except BrokenPipeError:
            raise  # whoever reads the answer has read enough
        except _UnfulfilledError as error:
            raise self._failed(str(error), 1) from error
        except (OSError, TypeError, ValueError) as error:
            raise self._failed(str(error), 2) from error
        except _UsageError as error:
            if not self._as_json:
                raise
            raise self._failed(error.format_message(), error.exit_code) from error

    def _failed(self, message: str, exit_code: int) -> typer.Exit:
        message = re.sub(
            r"\b([Pp]ass|or) (which|at|clock|decay)=", r"\1 --\2 ", message
        )  # of the library's arguments
        if self._as_json:
            _print_json({"error": message})
        else:
            typer.echo(_printable(f"polyak: {message}"), err=True)
        return typer.Exit(exit_code)


_AVERAGE = """
\b
Examples:
  polyak average step-1000.pt step-2000.pt step-3000.pt -o mean.safetensors
  polyak average step-*.pt -o mean.safetensors --dry-run
  polyak average step-1000.pt step-2000.pt -o mean.safetensors --weights 1,3
  polyak average step-1000.pt step-2000.pt -o ema.safetensors --ema 0.5
  polyak average step-*.pt -o annealed.safetensors --lr-decay 1-sqrt
  polyak average run/checkpoint-* -o mean --copy-config --shard-bytes 5GB

The last one makes a folder for from_pretrained: the config, tokenizer and other small files beside
the newest checkpoint come along. A shell sorts step-10000 before step-2000.

Exit codes: 0 done; 1 refused, as the files differ; 2 nothing done, as an argument or a file is not
what it should be; 130 Ctrl-C, which leaves nothing behind.
"""

_INSPECT = """
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

_CONVERT = """
\b
Examples:
  polyak convert last.ckpt -o ema.safetensors --to safetensors --which averages
  polyak convert ema.safetensors -o swa.pt --to averaged-model
  polyak convert ema.safetensors -o unet_ema --to diffusers

\b
Formats:
  safetensors      plain weights, for any loader
  averaged-model   torch.optim.swa_utils.AveragedModel
  timm             a checkpoint with state_dict_ema
  diffusers        a folder, for EMAModel and for from_pretrained
  lightning        a checkpoint of EMAWeightAveraging
  ema-pytorch      the state of an EMA
  torch-ema        has no names, so that it takes Python: polyak.formats.convert

Exit codes: 0 done; 2 nothing done, as an argument or a file is not what it should be.
"""

app = typer.Typer(
    cls=_Commands,
    help="Averages of model weights, from checkpoints of any kind.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(epilog=_AVERAGE)(average)
app.command(epilog=_INSPECT)(inspect)
app.command(epilog=_CONVERT)(convert)
