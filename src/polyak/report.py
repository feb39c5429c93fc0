"""REPORT: how an average stands, as a value that people read and loggers take. It only tells."""

from __future__ import annotations

from dataclasses import asdict, dataclass

__all__ = ["Report"]


@dataclass(frozen=True)
class Report:
    """What `EMA.report` found: `str` of it is a table, `metrics` a flat dict for loggers.

    Attributes:
        decay: the decay, as code.
        clock: how far the average has come, in the user's unit.
        updates: states seen.
        repeats: calls of `update(t)` with the clock where it stood.
        tensors: number of tensors averaged.
        bytes: what the averages hold, in bytes.
        mean_age: how far the average lags behind the model, in the clock's unit.
        deviation: standard deviation of the ages of its states, in the clock's unit.
        effective_samples: of how many states the mean would have as little noise.
        largest_share: of a single seen state, 0 to 1.
        distance: `|average - weights| / |weights|`.
        nonfinite: elements that kept their average, summed over all updates.
        dead_zone: relative change below which the weights no longer move the average.
        paths: how the engine runs.
    """

    decay: str
    clock: int
    updates: int
    repeats: int
    tensors: int
    bytes: int
    mean_age: float
    deviation: float
    effective_samples: float
    largest_share: float
    distance: float
    nonfinite: int
    dead_zone: float
    paths: tuple[str, ...]

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """Return the numbers as a flat dict, for any logger.

        Args:
            prefix: put before each name, for example `"ema/"`.
        """
        numbers = {k: v for k, v in asdict(self).items() if isinstance(v, (int, float))}
        return {prefix + name: float(value) for name, value in numbers.items()}

    def __str__(self) -> str:
        rows = {
            "decay": self.decay,
            "clock": f"{self.clock:,} after {self.updates:,} updates, {self.repeats:,} repeated",
            "mean age": f"{self.mean_age:,.1f} ± {self.deviation:,.1f} on the clock",
            "effective samples": f"{self.effective_samples:,.1f}",
            "largest share of a state": f"{self.largest_share:.2%}",
            "distance to the weights": f"{self.distance:.2%}",
            "non-finite, kept out": f"{self.nonfinite:,} elements",
            "dead zone": f"{self.dead_zone:.1e}",
            "held": f"{self.bytes:,} bytes in {self.tensors:,} tensors",
            "engine": ", ".join(self.paths) or "not run yet",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
