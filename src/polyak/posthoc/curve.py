"""CURVE: scores by the horizon, as far as they are known: a value, and JSON."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeGuard

from polyak.decay import Decay, from_spec, to_spec

__all__ = ["Curve", "Point", "best_of", "is_real"]


@dataclass(frozen=True)
class Point:
    """A horizon that was evaluated.

    Attributes:
        horizon: the number that the family makes the decay of.
        decay: of the average.
        score: what `evaluate` made of it; lower is better.
        predicted_error: of the average, as in `Solution`.
    """

    horizon: float
    decay: Decay
    score: float
    predicted_error: float


@dataclass(frozen=True)
class Curve:
    """The score by the horizon, as far as it is known.

    >>> from polyak import PowerLaw
    >>> points = [Point(h, PowerLaw(h), (h - 0.1) ** 2, 0.01) for h in (0.05, 0.11, 0.2)]
    >>> curve = Curve(2000, (0.03, 0.25), tuple(points))
    >>> curve.best.decay, curve.at_edge
    (PowerLaw(std=0.11), False)

    Attributes:
        at: the clock of the averages.
        supported: the shortest and the longest horizon that the files give.
        points: what was evaluated, by horizon.
    """

    at: int
    supported: tuple[float, float]
    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        ordered = sorted(self.points, key=lambda point: point.horizon)
        object.__setattr__(self, "points", tuple(ordered))

    @property
    def best(self) -> Point:
        """The point of the lowest score, of equals the one of the shortest horizon.

        A score that is not finite is worse than any that is. Where nothing was evaluated yet there
        is none, and `ValueError` is raised.
        """
        if not self.points:
            raise ValueError("the best of no points is asked for: evaluate a horizon first")
        return best_of(self.points)

    @property
    def at_edge(self) -> bool:
        """Whether none is better than the shortest or the longest: a better one may lie beyond.

        Not where all are equally good.
        """
        best, scores = self.best.score, {point.score for point in self.points}
        return len(scores) > 1 and best in (self.points[0].score, self.points[-1].score)

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain JSON values; a score that is not finite as text."""
        return {
            "at": self.at,
            "supported": list(self.supported),
            "points": [
                {
                    "horizon": point.horizon,
                    "decay": to_spec(point.decay),
                    "score": point.score if math.isfinite(point.score) else str(point.score),
                    "predicted_error": point.predicted_error,
                }
                for point in self.points
            ],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Curve:
        """Return the curve that `to_dict` wrote down.

        Raises:
            ValueError: values is not what `to_dict` writes, or a decay was an object of another
                program.
        """
        try:
            at, (low, high) = values["at"], values["supported"]
            if type(at) is not int or at < 0:
                raise ValueError(f"at is a clock, and not {at!r}")
            supported = _positive("supported", low), _positive("supported", high)
            points = [
                Point(
                    horizon=_positive("horizon", point["horizon"]),
                    decay=from_spec(point["decay"]),
                    score=_score(point["score"]),
                    predicted_error=_finite("predicted_error", point["predicted_error"]),
                )
                for point in values["points"]
            ]
            curve = cls(at, supported, tuple(points))
            for one, other in pairwise(curve.points):
                if one.horizon == other.horizon:
                    raise ValueError(f"the horizon {one.horizon} is there twice")
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"this is no curve ({type(error).__name__}: {error}): pass what Curve.to_dict "
                "returned; if a newer version wrote it, upgrade polyak"
            ) from error
        return curve


def best_of(points: Sequence[Point]) -> Point:
    """Return the point of the lowest score, as `Curve.best` says."""

    def order(point: Point) -> tuple[float, float]:
        return point.score if math.isfinite(point.score) else math.inf, point.horizon

    return min(points, key=order)


def is_real(value: object) -> TypeGuard[float]:
    """Whether it is a number, and no yes or no."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _score(value: object) -> float:
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    return _finite("score", value)


def _positive(name: str, value: object) -> float:
    number = _finite(name, value)
    if number <= 0:
        raise ValueError(f"{name} is positive, and not {value!r}")
    return number


def _finite(name: str, value: object) -> float:
    if not is_real(value) or not math.isfinite(value):
        raise ValueError(f"{name} is a finite number, and not {value!r}")
    return float(value)
