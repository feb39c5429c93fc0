"""Averages of model weights for PyTorch: EMA, power-law, uniform, teacher-student."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from polyak.decay import (
        After,
        Constant,
        Cosine,
        Debiased,
        HalfLife,
        Linear,
        PowerLaw,
        Uniform,
    )
    from polyak.ema import EMA, update_
    from polyak.formats import load_averages
    from polyak.selection import Only, everything, parameters, trainable

__version__ = version("polyak")

__all__ = [
    "EMA",
    "After",
    "Constant",
    "Cosine",
    "Debiased",
    "HalfLife",
    "Linear",
    "Only",
    "PowerLaw",
    "Uniform",
    "everything",
    "load_averages",
    "parameters",
    "trainable",
    "update_",
]

_HOMES = ("decay", "selection", "ema", "formats")  # of the public names
_ROOMS = (
    *_HOMES,
    "batchnorm",
    "checkpoint",
    "combine",
    "examine",
    "files",
    "plot",
    "posthoc",
    "profile",
    "report",
    "snapshots",
)

if not TYPE_CHECKING:  # a type checker would take it for a promise of any name

    def __getattr__(name: str) -> object:
        """Import what a name stands for when it is first used: `polyak --help` does without."""
        if name in _ROOMS:
            return import_module(f"polyak.{name}")
        if name in __all__:
            homes = (import_module(f"polyak.{home}") for home in _HOMES)
            value = next(getattr(home, name) for home in homes if name in home.__all__)
            return globals().setdefault(name, value)
        raise AttributeError(f"module 'polyak' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
