"""FIT: how near a sum of some profiles comes to another one. Numbers, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polyak.profile import History, gram

__all__ = ["LIMIT", "NOISE", "Fit", "fit", "fits", "harm", "refuse_limit"]

LIMIT = 0.2
"""The largest predicted error, by default."""

NOISE = 0.01
"""The largest storage noise."""

_SAME = 1e-6  # a relative difference of profiles below which they are one: rounding of float32
_TOGETHER = 8  # of each pass over the ticks; of more, their products with one another take longer
_RANK = 1e-10  # the smallest eigenvalue that counts, as a share of the largest; see `solve`


@dataclass(frozen=True)
class Fit:
    """How near some stored averages come to another one.

    Attributes:
        coefficients: one for each of them.
        error: the distance of the profiles, as a share of the wanted one's length, and what the
            errors of the stored ones add at most.
        amplification: the sum of the sizes of the coefficients.
        noise: what rounding adds at most, as a share of the largest value.
    """

    coefficients: list[float]
    error: float
    amplification: float
    noise: float

    def within(self, limit: float) -> bool:
        """Whether it is good enough: the error within the limit, the noise within `NOISE`."""
        return self.error <= limit and self.noise <= NOISE


def fits(
    histories: Sequence[History],
    roundings: Sequence[float],
    wanted: Sequence[History],
    errors: Sequence[float] | None = None,
) -> list[Fit]:
    """Return how near some averages come to each of others.

    Args:
        histories: of the averages that are there, at least one.
        roundings: the unit by which the values of each are rounded.
        wanted: the histories of the others.
        errors: by what share of its length the profile of each differs from that of its history;
            by default by nothing.
    """
    count, found = len(histories), []
    for first in range(0, len(wanted), _TOGETHER):
        products = gram([*histories, *wanted[first : first + _TOGETHER]])
        stored = products[:count, :count]
        squares = products.diagonal().tolist()
        found += [
            fit(stored, products[:count, number], squares[number], roundings, errors)
            for number in range(count, len(products))
        ]
    return found


def fit(
    stored: Tensor,
    with_target: Tensor,
    square: float,
    roundings: Sequence[float],
    errors: Sequence[float] | None = None,
) -> Fit:
    """Return how near some averages come to another one, from the products of their profiles.

    min |sum_i c_i p_i - p| subject to sum_i c_i = 1. Of one `gram`, any of the averages can be
    left out: `fit(stored[kept][:, kept], with_target[kept], ...)`. Those with an error are, where
    that is better.

    >>> p = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    >>> target = torch.tensor([0.75, 0.25], dtype=torch.float64)
    >>> found = fit(p @ p.T, p @ target, (target @ target).item(), [0.0, 0.0])
    >>> [round(coefficient, 6) for coefficient in found.coefficients]
    [0.5, 0.5]

    Args:
        stored: the inner products of their profiles, [n, n], float64.
        with_target: those with the profile of the wanted one, [n], float64.
        square: that of the wanted one with itself.
        roundings: the unit by which the values of each are rounded, n of them.
        errors: as for `fits`.
    """
    errors = [0.0] * len(roundings) if errors is None else errors
    exact = [number for number, error in enumerate(errors) if not error]
    found = _fit(stored, with_target, square, roundings, errors)
    if not 0 < len(exact) < len(errors):
        return found
    units = [roundings[number] for number in exact]
    other = _fit(stored[exact][:, exact], with_target[exact], square, units, [0.0] * len(exact))
    if found.error <= other.error + _SAME:
        return found
    coefficients = [0.0] * len(errors)
    for number, coefficient in zip(exact, other.coefficients, strict=True):
        coefficients[number] = coefficient
    return replace(other, coefficients=coefficients)


def harm(products: Tensor, count: int) -> list[float]:
    """Return what the averages that are wanted would miss, without each of those that are stored.

    The squared error of a fit with sum c = 1 rises by c_i^2 / M_ii if the i-th is left out, where M
    is the inverse of the products, less its part along the constraint. Of all that are wanted the
    sum is returned, in units of their squared lengths.

    Args:
        products: of all profiles, those that are stored first.
        count: how many are stored.
    """
    stored, with_wanted = products[:count, :count], products[:count, count:]
    squares, lengths = products.diagonal()[count:], stored.diagonal().sqrt()
    scaled = stored / torch.outer(lengths, lengths)
    # What is the same twice can be spared once: the inverse of nearly nothing stays a number.
    inverse = torch.linalg.inv(scaled + _RANK * torch.eye(count, dtype=scaled.dtype))
    along = inverse @ (1 / lengths)
    total = along @ (1 / lengths)
    free = inverse @ (with_wanted / lengths[:, None])
    row = free + torch.outer(along, (1 - (1 / lengths) @ free) / total)
    part = (inverse - torch.outer(along, along) / total).diagonal()
    found: list[float] = ((row.square() / squares).sum(1) / part).tolist()
    return found


def refuse_limit(limit: float) -> None:
    """Refuse what is no largest error."""
    if not limit >= 0:
        raise ValueError(
            f"limit={limit} is the largest predicted error, as a share of what is wanted: pass one "
            f"of 0 or more, such as the default of {LIMIT:g}; math.inf refuses nothing"
        )


def _fit(
    stored: Tensor,
    with_target: Tensor,
    square: float,
    roundings: Sequence[float],
    errors: Sequence[float],
) -> Fit:
    distances = stored.diagonal() - 2 * with_target + square
    if distances.min() <= _SAME**2 * square:
        row = torch.zeros_like(with_target)
        row[distances.argmin()] = 1.0
    else:
        row = _least_squares(stored, with_target)
    # What is left of the squares may be less than nothing, by rounding.
    left = (row @ stored @ row - 2 * (row @ with_target)).item() + square
    coefficients = row.tolist()
    sizes = [abs(coefficient) for coefficient in coefficients]
    lengths = (stored.diagonal() / square).sqrt().tolist()
    added = math.fsum(a * b * c for a, b, c in zip(sizes, errors, lengths, strict=True))
    return Fit(
        coefficients=coefficients,
        error=math.sqrt(max(left, 0.0) / square) + added,
        amplification=math.fsum(sizes),
        noise=math.fsum(a * b for a, b in zip(sizes, roundings, strict=True)),
    )


def _least_squares(stored: Tensor, target: Tensor) -> Tensor:
    """Return the c that minimizes c G c - 2 c g, G = stored, g = target, subject to sum c = 1.

    With the profiles scaled to length 1, in the basis of the eigenvectors of G whose eigenvalues
    are above the rounding: there G is diagonal, and the condition is one Lagrange multiplier. What
    is equal gets equal coefficients, as it is equal in every one of these vectors.
    """
    lengths = stored.diagonal().sqrt()
    values, vectors = torch.linalg.eigh(stored / torch.outer(lengths, lengths))
    kept = values > _RANK * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    ones = vectors.T @ (1 / lengths)
    free = (vectors.T @ (target / lengths)) / values
    missing = (1 - ones @ free) / (ones @ (ones / values))
    row: Tensor = (vectors @ (free + missing * ones / values)) / lengths
    row[row.abs().argmax()] += 1 - math.fsum(row.tolist())
    return row
