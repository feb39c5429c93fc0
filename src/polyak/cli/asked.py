"""ASKED: options that several commands have, and what becomes of the paths that they are given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from polyak.checkpoint import Checkpoint, Stored

__all__ = [
    "DryRun",
    "Dtype",
    "Force",
    "Json",
    "Out",
    "Place",
    "Which",
    "check_out",
    "chosen",
    "existing",
    "open_checkpoint",
    "parts",
    "refuse_other_formats",
    "size",
]

Dtype = Literal["float64", "float32", "float16", "bfloat16"]
Place = Annotated[
    str, typer.Option(metavar="PLACE", help="Where in a file to look, such as trainer.ema.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Tell what would be done, and write nothing.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file OUT if it is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="The checkpoint to write.")]
Which = Annotated[
    str | None,
    typer.Option(metavar="SET", help="averages or weights, of a file that has both."),
]


@contextmanager
def open_checkpoint(path: Path) -> Iterator[Checkpoint]:
    """Open a checkpoint of any program."""
    from polyak import formats

    with formats.opened(existing(path)) as opened:
        yield opened


def existing(path: Path) -> Path:
    """Return a path, unless there is nothing."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {str(path)!r}. Pass the path of a file or a folder")
    return path


def chosen(opened: Checkpoint, which: str | None, at: str) -> tuple[str, Mapping[str, Stored]]:
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


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def size(text: str) -> int:
    """Return the bytes that --shard-bytes asks for."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    size = int(min(float(match[1]), 1e18) * _UNITS.get(match[2], 0)) if match else 0
    if size < 1:
        raise ValueError(
            f"--shard-bytes {text} is no size of 1 byte or more. Pass a number of bytes, or one "
            "with a unit: 500MB, 5GB, 2GiB"
        )
    return size


def parts(opened: Sequence[Checkpoint]) -> list[Path]:
    """Return the files that some checkpoints consist of."""
    return [path for one in opened for path in (one.path, *one.files)]


def refuse_other_formats(out: Path) -> None:
    """Refuse a name that promises what safetensors is not."""
    if out.suffix in (".bin", ".ckpt", ".pt", ".pth"):
        raise ValueError(
            f"{str(out)!r} would be safetensors, which torch.load does not read. Pass "
            f"{str(out.with_suffix('.safetensors'))!r}; polyak convert then makes other formats"
        )


def check_out(out: Path, is_folder: bool, inputs: Sequence[Path], force: bool) -> None:
    """Refuse what must not be overwritten, before anything is read.

    Args:
        out: what is to be written.
        is_folder: whether that will be a folder.
        inputs: what is read: the paths that were given, and their parts.
        force: replace a file that is there.
    """
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {str(out.parent)!r} for {str(out)!r}. Make it first: "
            f"mkdir -p {shlex.quote(str(out.parent))}"
        )
    folders = [path for path in inputs if path.is_dir()]
    if any(out.absolute().resolve().is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(
            f"{str(out)!r} would be inside of an input, which then is another checkpoint. Pass a "
            "name beside it"
        )
    if not out.exists():
        return
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
