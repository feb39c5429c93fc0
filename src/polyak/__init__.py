"""Averages of model weights for PyTorch: EMA, power-law, uniform, teacher-student."""

from importlib.metadata import version

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
    "parameters",
    "trainable",
    "update_",
]
