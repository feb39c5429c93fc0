"""ARCHIVE: what `torch.save` wrote, in a file of its own or within a larger one, without its code.

Only tensors and plain values are made of it, and nothing larger than the archive itself.
"""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

__all__ = ["check_archive", "load", "program_of"]


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive of this size in which something could be larger than it is."""
    entries = archive.infolist()
    if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
        raise zipfile.BadZipFile("it is compressed, which torch.save never does")
    if archive.comment:  # in which there could be another directory
        raise zipfile.BadZipFile("it has a comment, which torch.save never writes")
    if len({entry.filename for entry in entries}) != len(entries):
        raise zipfile.BadZipFile("it has two entries of one name")
    if sum(entry.file_size for entry in entries) > size:
        raise zipfile.BadZipFile("its entries are said to be larger than it is")


def load(source: Path | BinaryIO, *, mapped: bool) -> Any:
    """Return what torch.save wrote, if it is tensors and plain values."""
    # Of programs only the arguments of a script, which many keep: plain values. What is trusted
    # here torch forgets at the end, also where the user had said so before.
    trusted = torch.serialization.get_safe_globals()
    plain: list[Any] = [kind for kind in (argparse.Namespace,) if kind not in trusted]
    with (
        torch.inference_mode(False),
        torch.serialization.safe_globals(plain),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # of older files, and of bytes that were changed
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


def program_of(error: Exception) -> str | None:
    """Return what of a program a file would have called, if that is why it was not read."""
    found = re.search(r"GLOBAL (\w[\w.]*)", str(error))
    return found[1] if found and isinstance(error, pickle.UnpicklingError) else None
