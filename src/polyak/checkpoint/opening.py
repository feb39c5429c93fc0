"""OPENING: which container a file or folder is, by its content, and who opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from polyak.checkpoint.broken import broken
from polyak.checkpoint.content import Checkpoint
from polyak.checkpoint.dcp import open_dcp
from polyak.checkpoint.index import open_index
from polyak.checkpoint.safetensors import open_safetensors
from polyak.checkpoint.saved import open_saved
from polyak.files import StrPath

__all__ = ["NO_WEIGHTS", "opened"]

# What trainers keep beside weights, in files that look alike.
NO_WEIGHTS = {"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"}


@contextmanager
def opened(path: StrPath) -> Iterator[Checkpoint]:
    """Open a checkpoint: a file, a folder, or the index of several files.

    What it is, its content says, not its name.

    >>> import tempfile
    >>> import torch
    >>> from polyak import checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"model": {"w": torch.ones(2, 3)}}, f"{folder}/a.pt")
    ...     with checkpoint.opened(f"{folder}/a.pt") as a:
    ...         a.container, a.tensors["model.w"].shape, a.tensors["model.w"].slice(0, 2)
    ('torch', (2, 3), tensor([1., 1.]))

    Args:
        path: is only read.

    Raises:
        ValueError: it is no checkpoint, cut short or damaged, or could only be unpickled.
        OSError: there is no such file, or it cannot be read.
    """
    with ExitStack() as stack:
        try:
            found = _open(Path(path), stack)
        except RecursionError:
            raise broken(Path(path), "its contents are nested too deep") from None
        except MemoryError:
            raise broken(Path(path), "it asks for more memory than there is") from None
        yield found


def _open(path: Path, stack: ExitStack) -> Checkpoint:
    if path.is_dir():
        return _open_folder(path, stack)
    if path.exists() and not path.is_file():
        raise ValueError(
            f"{str(path)!r} is neither a file nor a folder, and reading it may never end. Pass the "
            "path of a checkpoint"
        )
    with path.open("rb") as file:
        start = file.read(9)
    if path.name.endswith(".index.json"):
        return open_index(path, partial(_open, stack=stack))
    if start.startswith(b"PK\x03\x04"):
        return open_saved(path)
    if start[8:9] == b"{":
        return open_safetensors(path, stack)
    if start[:1] == b"\x80":
        raise ValueError(
            f"{str(path)!r} is a pickle, which could run any code when it is read, so it is not. "
            "If torch before 1.6 wrote it, torch.save(torch.load(path, weights_only=True), "
            "'new.pt') makes a file that is read; else load it where its program is installed, and "
            "save its tensors: safetensors.torch.save_file(model.state_dict(), 'new.safetensors')"
        )
    raise ValueError(
        f"{str(path)!r} is no checkpoint that can be read: it begins with {start!r}. Pass a "
        "safetensors file, an index of several, a file of torch.save, or a folder of "
        "torch.distributed.checkpoint"
    )


def _open_folder(path: Path, stack: ExitStack) -> Checkpoint:
    if (path / ".metadata").is_file():
        return open_dcp(path)
    names = sorted(e.name for e in path.iterdir() if e.is_file() and e.name not in NO_WEIGHTS)
    for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
        found = [name for name in names if name.endswith(ending)]
        if len(found) == 1:
            return _open(path / found[0], stack)
        if found:
            raise ValueError(
                f"{str(path)!r} has {len(found)} checkpoints: {', '.join(found[:20])}. Pass the "
                "path of the one that is meant"
            )
    raise ValueError(
        f"{str(path)!r} is a folder without a checkpoint: it has {', '.join(names[:20]) or 'no'} "
        "files. Pass the path of a file, or a folder with safetensors or a .metadata file in it"
    )
