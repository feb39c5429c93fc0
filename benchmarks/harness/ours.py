"""OURS: every path that the engine offers, through `EMA.update()` and alone."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import warnings
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from harness.contender import DECAY, Candidate
from harness.shapes import floating
from polyak import EMA, engine


class Whole:
    """`EMA.update()`, with everything that a user pays for.

    Args:
        model: what to average.
        path: the engine's path; by default the one that polyak takes.
    """

    def __init__(self, model: nn.Module, path: type[engine.Path] | None = None) -> None:
        self.ema = EMA(model, DECAY)
        self.ema.update()
        with patch.object(engine, "Plan", functools.partial(engine.Plan, path=path)):
            self.ema.update()  # makes the plan that is kept

    def update(self) -> None:
        """Update."""
        self.ema.update()

    def averages(self) -> dict[str, Tensor]:
        """Return the averages."""
        return dict(self.ema.averages)

    def enter(self) -> None:
        """Enter `applied()`."""
        self._block: AbstractContextManager[Any] = self.ema.applied()
        with warnings.catch_warnings():  # so short a run is mostly the first state, as it says
            warnings.simplefilter("ignore")
            self._block.__enter__()

    def leave(self) -> None:
        """Leave it."""
        self._block.__exit__(None, None, None)


class Alone:
    """A plan of the engine, and nothing above it."""

    def __init__(self, model: nn.Module, path: type[engine.Path] | None = None) -> None:
        weights = floating(model)
        self._averages = {n: t.to(torch.float32, copy=True) for n, t in weights.items()}
        self._plan = engine.Plan(list(self._averages.values()), list(weights.values()), path)

    def update(self) -> None:
        """Move the averages."""
        engine.lerp(self._plan, 1 - DECAY)

    def averages(self) -> dict[str, Tensor]:
        """Return the averages."""
        return self._averages


def paths(dtype: torch.dtype) -> tuple[dict[str, type[engine.Path]], dict[str, str]]:
    """Return the paths that run here for weights of that dtype, and why the others do not.

    Each has been taken, by a small `EMA`. The reference is no path: nothing runs it in earnest.
    """
    found, refused = {}, {}
    for module in sorted(info.name for info in pkgutil.iter_modules(engine.__path__)):
        if module == "reference" or module.startswith("_"):
            continue
        try:
            classes = vars(importlib.import_module(f"polyak.engine.{module}")).values()
        except ImportError as reason:
            refused[module] = str(reason)
            continue
        for path in classes:
            if not _is_path(path, f"polyak.engine.{module}"):
                continue
            if hasattr(path, "wait"):
                refused[path.name] = "works while others do, so that a call says nothing"
                continue
            try:
                taken = _taken(dtype, path)
            except Exception as reason:  # whatever it misses: a device, a compiler, a library
                refused[path.name] = f"{type(reason).__name__}: {reason}".splitlines()[0]
                continue
            if _name(taken) == path.name:
                found[path.name] = path
            else:
                refused[path.name] = f"{taken} was taken in its place"
    return found, refused


def default(dtype: torch.dtype) -> str:
    """Return the path that polyak takes for weights of that dtype."""
    return _name(_taken(dtype, None))


def candidates(dtype: torch.dtype) -> list[Candidate]:
    """Return polyak as its users have it, then every other way to run it."""
    found, usual = paths(dtype)[0], default(dtype)
    order = sorted(found, key=lambda name: name != usual)
    return [
        Candidate(f"polyak, {name}{what}", functools.partial(kind, path=found[name]), family=family)
        for family, kind, what in (("ours", Whole, ""), ("engine", Alone, ", engine alone"))
        for name in order
    ]


def _is_path(value: object, module: str) -> bool:
    return (
        isinstance(value, type)
        and value.__module__ == module
        and isinstance(getattr(value, "name", None), str)
        and callable(getattr(value, "lerp", None))
    )


def _name(taken: str) -> str:
    """Return a path without the reason why it is no faster one."""
    return taken.partition(" (")[0]


def _taken(dtype: torch.dtype, path: type[engine.Path] | None) -> str:
    """Return the path that a small EMA takes when it is told to take this one."""
    report = Whole(nn.Linear(3, 2, dtype=dtype), path).ema.report()
    return " and ".join(report.paths)
