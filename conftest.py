"""Every code block of the README and the docs is a test (docstrings: pytest's own doctests)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

torch.set_num_threads(1)


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Examples write files: they run in a folder of their own, from the same seed."""
    here = os.getcwd()  # noqa: PTH109
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        torch.manual_seed(0)
        yield
        os.chdir(here)


def _setup(namespace: dict[str, Any]) -> None:
    namespace["_elsewhere"] = context = _elsewhere()
    context.__enter__()


def _teardown(namespace: dict[str, Any]) -> None:
    namespace["_elsewhere"].__exit__(None, None, None)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_setup, teardown=_teardown
).pytest()
