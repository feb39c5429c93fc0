"""PURE NUMBERS: how much of the old average survives a tick of the clock.

A decay is a value. It holds no state and knows nothing about models, tensors that are averaged, or
devices. Each one is written once, as `_keep(t, dt, xp)`, and serves Python integers (`xp` is the
`math` of one number) and float64 vectors (`xp` is `torch`) from that one formula.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias, overload, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "After",
    "Constant",
    "Cosine",
    "Debiased",
    "Decay",
    "DecayLike",
    "ExponentialRamp",
    "HalfLife",
    "InverseGamma",
    "Linear",
    "PowerLaw",
    "Ramp",
    "Uniform",
    "as_decay",
    "from_spec",
    "to_spec",
]

Spec: TypeAlias = dict[str, Any]
"""A decay as plain JSON: `{"type": "PowerLaw", "std": 0.1}`."""


@runtime_checkable
class DecayLike(Protocol):
    """Anything with `keep(t, dt)`: the share of the old average that survives a tick."""

    def keep(self, t: int, dt: int, /) -> float:
        """Return the share kept when the clock moves from `t - dt` to `t`."""
        ...


class Decay(ABC):
    """The share of the old average that survives a tick: `average <- k average + (1 - k) weights`.

    A value: frozen, comparable, picklable, its `repr` is the code that makes it.
    """

    @property
    def exact(self) -> bool:
        """Whether the cadence law `keep(t, a + b) = keep(t - b, a) * keep(t, b)` is exact.

        If so, an update every k steps with `dt = k` keeps exactly what k updates would have kept.
        """
        return True

    @overload
    def keep(self, t: int, dt: int, /) -> float: ...
    @overload
    def keep(self, t: Tensor, dt: Tensor | int, /) -> Tensor: ...
    def keep(self, t: int | Tensor, dt: int | Tensor, /) -> float | Tensor:
        """Return the share of the old average that survives the tick from `t - dt` to `t`.

        >>> Uniform().keep(4, 1)
        0.75
        >>> Uniform().keep(torch.tensor([1, 2, 4]), 1)
        tensor([0.0000, 0.5000, 0.7500], dtype=torch.float64)

        Args:
            t: the clock after the tick, an integer in the units of the clock, or a tensor of them.
            dt: the length of the tick, 0 <= dt <= t, or a tensor that expands to the shape of t;
                a tick of length 0 keeps everything.

        Returns:
            A float in [0, 1], or a float64 tensor of them where `t` is a tensor.

        Raises:
            ValueError: dt is outside [0, t].
            TypeError: t or dt is no integer.
        """
        if type(t) is int and type(dt) is int:
            if 0 < dt <= t:
                return float(self._keep(t, dt, _NUMBERS))
            if 0 == dt <= t:
                return 1.0
            raise ValueError(_outside(t, dt))
        if isinstance(t, Tensor):
            return self._keep_vector(t, torch.as_tensor(dt))
        return self.keep(_integer("t", t), _integer("dt", dt))

    def _keep_vector(self, t: Tensor, dt: Tensor) -> Tensor:
        t, dt = t.to(torch.float64), dt.to(torch.float64).expand(t.shape)
        outside = ~((dt >= 0) & (dt <= t))
        if outside.any():
            raise ValueError(_outside(t[outside][0].item(), dt[outside][0].item()))
        kept: Tensor = torch.where(dt == 0, 1.0, self._keep(t, dt, torch))
        return kept

    @abstractmethod
    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        """Return the share, for 0 < dt <= t; in vectors, what it is at dt = 0 is not used."""

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


class _Schedule(Decay):
    """A decay per unit of the clock that changes with the clock: d(t)^dt.

    A tick longer than 1 uses the decay at its end for its whole length: an approximation.
    """

    @property
    def exact(self) -> bool:
        return False

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        return self._decay(t, xp) ** dt

    @abstractmethod
    def _decay(self, t: Any, xp: Any) -> Any:
        """Return the share kept by the tick of length 1 that ends at t."""


@dataclass(frozen=True)
class _Passage(_Schedule):
    """A decay that goes from `start` to `end` within `steps`, and stays there."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        self._set(
            start=_share("start", self.start),
            end=_share("end", self.end),
            steps=_count("steps", self.steps, 1),
        )

    def _decay(self, t: Any, xp: Any) -> Any:
        left = self._left(xp.clamp((t - 1) / self.steps, 0.0, 1.0), xp)
        return left * self.start + (1 - left) * self.end

    @abstractmethod
    def _left(self, s: Any, xp: Any) -> Any:
        """Return what is left of `start` when the share s of the way is gone, from 1 to 0."""


@dataclass(frozen=True)
class Constant(Decay):
    """Keep the same share at every tick: the textbook exponential moving average.

    keep = d^dt. Mean age d / (1 - d).

    >>> Constant(0.9).keep(1, 1)
    0.9

    Args:
        decay: the share d kept per unit of the clock, in [0, 1]. 0 copies, 1 never moves.

    Raises:
        ValueError: decay is outside [0, 1].
        TypeError: decay is no number.
    """

    decay: float

    def __post_init__(self) -> None:
        self._set(decay=_share("decay", self.decay))

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        return self.decay**dt

    @property
    def _log(self) -> float:
        return math.log(self.decay) if self.decay else -math.inf


@dataclass(frozen=True)
class HalfLife(Decay):
    """Halve what is left of the old average every `half_life` units of the clock.

    keep = 2^(-dt/h). The same as `Constant(2 ** (-1 / h))`.

    >>> HalfLife(1000).keep(5000, 1000)
    0.5

    Args:
        half_life: h > 0, in units of the clock (steps, if the clock counts steps).

    Raises:
        ValueError: half_life is not positive and finite.
        TypeError: half_life is no number.
    """

    half_life: float

    def __post_init__(self) -> None:
        self._set(half_life=_positive("half_life", self.half_life, "a number of ticks"))

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        return 2.0 ** (-dt / self.half_life)

    @property
    def _log(self) -> float:
        return -math.log(2.0) / self.half_life


@dataclass(frozen=True)
class Debiased(Decay):
    """Average uniformly at first, then exponentially: the average without its start-up bias.

    keep = d^dt (1 - d^(t-dt)) / (1 - d^t): the average started at zero and divided by 1 - d^t,
    written as a recursion. The first tick copies.

    >>> [round(Debiased(0.999).keep(t, 1), 6) for t in (1, 2, 100)]
    [0.0, 0.49975, 0.989497]

    Args:
        inner: the decay it turns into: a float (meaning `Constant`), `Constant` or `HalfLife`,
            with 0 < d < 1.

    Raises:
        ValueError: inner keeps nothing or everything.
        TypeError: inner is another kind of decay.

    Source: Adam's bias correction (arXiv 1412.6980, section 3).
    """

    inner: Constant | HalfLife

    def __init__(self, inner: float | Constant | HalfLife) -> None:
        decay = as_decay(inner)
        if not isinstance(decay, Constant | HalfLife):
            raise TypeError(
                f"Debiased corrects a constant decay, not {decay!r}: "
                "pass a float, Constant(...) or HalfLife(...); the others start without bias"
            )
        if not -math.inf < decay._log < 0:
            raise ValueError(
                f"Debiased needs a decay strictly between 0 and 1, not {decay!r}: "
                "write Uniform() for what 1 tends to, Constant(0.0) for what 0 does"
            )
        self._set(inner=decay)

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        log = self.inner._log
        ratio = xp.expm1((t - dt) * log) / xp.expm1(t * log)
        return self.inner._keep(t, dt, xp) * ratio


@dataclass(frozen=True)
class PowerLaw(Decay):
    """Look back over a fixed fraction of the run so far, whatever its length.

    keep = (1 - dt/t)^(g+1), with g from std = sqrt((g+1) / ((g+2)^2 (g+3))). The weight of the
    state at clock s is proportional to s^g; its mean age is t / (g+2). The first tick copies.

    >>> round(PowerLaw(0.10).exponent, 6), round(PowerLaw(0.10).keep(1000, 1), 6)
    (6.937204, 0.99209)

    Args:
        std: the standard deviation of the profile as a fraction of the clock, in
            (0, 1/sqrt(12)); .05 and .10 are the values of the paper.

    Attributes:
        exponent: g, a float > 0.

    Raises:
        ValueError: std is outside (0, 1/sqrt(12)).
        TypeError: std is no number.

    Source: EDM2 (arXiv 2312.02696), equations 123 (std), 126 (g) and 127 (keep).
    """

    std: float
    exponent: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        std = _number("std", self.std)
        if not sys.float_info.min <= std < 1 / math.sqrt(12):
            raise ValueError(
                f"std must be between 0 and 1/sqrt(12) = 0.2887, got {std!r}: it is the width of "
                "the average as a fraction of the run so far. Write PowerLaw(0.10), or Uniform() "
                "for the widest there is; for a horizon in ticks, HalfLife(n)"
            )
        self._set(std=std, exponent=_exponent(std))

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        return ((t - dt) / t) ** (self.exponent + 1)


@dataclass(frozen=True)
class Uniform(Decay):
    """Give every state the same weight per unit of the clock: SWA, Polyak-Ruppert averaging.

    keep = 1 - dt/t. The first tick copies.

    >>> [Uniform().keep(t, 1) for t in (1, 2, 4)]
    [0.0, 0.5, 0.75]

    Source: Polyak & Juditsky 1992 (10.1137/0330046); SWA (arXiv 1803.05407).
    """

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        return (t - dt) / t


@dataclass(frozen=True)
class Cosine(_Passage):
    """Move the decay from `start` to `end` along half a cosine: self-supervised teachers.

    keep = d^dt, d = end - (end - start) (cos(pi min(s/steps, 1)) + 1) / 2 with s = t - 1, so that
    the first tick uses `start`. Exact for ticks of length 1, approximate for longer ones.

    >>> teacher = Cosine(0.996, 1.0, steps=1000)
    >>> teacher.keep(1, 1), teacher.keep(501, 1), teacher.keep(1001, 1)
    (0.996, 0.998, 1.0)

    Args:
        start: the share kept by the first tick, in [0, 1].
        end: the share kept from `steps` on, in [0, 1].
        steps: the length of the schedule in units of the clock, an integer >= 1.

    Raises:
        ValueError: start or end is outside [0, 1], or steps < 1.
        TypeError: start or end is no number, or steps no integer.

    Source: BYOL (arXiv 2006.07733, section 3.2); DINO (arXiv 2104.14294).
    """

    def _left(self, s: Any, xp: Any) -> Any:
        return (xp.cos(math.pi * s) + 1) / 2


@dataclass(frozen=True)
class Linear(_Passage):
    """Move the decay from `start` to `end` along a straight line: I-JEPA's teacher.

    keep = d^dt, d = start + (end - start) min(s/steps, 1) with s = t - 1, so that the first tick
    uses `start`. Exact for ticks of length 1, approximate for longer ones.

    >>> Linear(0.5, 1.0, steps=4).keep(3, 1)
    0.75

    Args:
        start: the share kept by the first tick, in [0, 1].
        end: the share kept from `steps` on, in [0, 1].
        steps: the length of the schedule in units of the clock, an integer >= 1.

    Raises:
        ValueError: start or end is outside [0, 1], or steps < 1.
        TypeError: start or end is no number, or steps no integer.

    Source: I-JEPA (arXiv 2301.08243, appendix A).
    """

    def _left(self, s: Any, xp: Any) -> Any:
        return 1 - s


@dataclass(frozen=True)
class After(Decay):
    """Copy until the clock reaches `start`, then average with `inner` from that state on.

    keep = 0 where t - dt < start, otherwise inner's keep(t - start, dt). A tick that crosses
    `start` copies.

    >>> tail = After(1000, Uniform())  # SWA over what comes after step 1000
    >>> tail.keep(1000, 1), tail.keep(1001, 1), tail.keep(1004, 1)
    (0.0, 0.0, 0.75)

    Args:
        start: the clock at which the inner average begins, an integer >= 0.
        inner: its decay; a float means `Constant`.

    Raises:
        ValueError: start is negative.
        TypeError: start is no integer, or inner no decay.
    """

    start: int
    inner: Decay

    def __init__(self, start: int, inner: float | DecayLike) -> None:
        self._set(start=_count("start", start, 0), inner=as_decay(inner))

    @property
    def exact(self) -> bool:
        """Whether the cadence law is exact: it is if it is for `inner`."""
        return self.inner.exact

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        # Where the answer is 0, inner is evaluated all the same, so at a tick it has: (dt, dt).
        kept = self.inner._keep(xp.maximum(t - self.start, dt), dt, xp)
        return xp.where(t - dt < self.start, 0.0, kept)


@dataclass(frozen=True)
class InverseGamma(_Schedule):
    """Warm up along an inverse power of the clock: k-diffusion, timm, ema-pytorch, diffusers.

    keep = d^dt, d = clamp(1 - (1 + n/inv_gamma)^-power, 0, limit) with n = t - 1, so that the first
    tick copies. Exact for ticks of length 1, approximate for longer ones.

    >>> round(InverseGamma().keep(1001, 1), 6)
    0.990007

    Args:
        power: how fast it warms up, > 0; 1 gives the uniform average, 2/3 suits runs of a million
            steps, 3/4 shorter ones.
        inv_gamma: the clock at which the warm-up bends, > 0, in units of the clock.
        limit: the largest decay, in [0, 1].

    Raises:
        ValueError: a number is out of its range.
        TypeError: an argument is no number.

    Source: github.com/crowsonkb/k-diffusion, `EMAWarmup`.
    """

    power: float = 2 / 3
    inv_gamma: float = 1.0
    limit: float = 0.9999

    def __post_init__(self) -> None:
        self._set(
            power=_positive("power", self.power, "an exponent"),
            inv_gamma=_positive("inv_gamma", self.inv_gamma, "a number of ticks"),
            limit=_share("limit", self.limit),
        )

    def _decay(self, t: Any, xp: Any) -> Any:
        return xp.clamp(1 - (1 + (t - 1) / self.inv_gamma) ** -self.power, 0.0, self.limit)


@dataclass(frozen=True)
class Ramp(_Schedule):
    """Warm up as (1 + n) / (10 + n): TensorFlow, torch_ema.

    keep = d^dt, d = min(limit, (1 + n) / (10 + n)) with n = t. Exact for ticks of length 1,
    approximate for longer ones.

    >>> Ramp().keep(8, 1)
    0.5

    Args:
        limit: the largest decay, in [0, 1].

    Raises:
        ValueError: limit is outside [0, 1].
        TypeError: limit is no number.

    Source: `tf.train.ExponentialMovingAverage`, `num_updates`.
    """

    limit: float = 0.9999

    def __post_init__(self) -> None:
        self._set(limit=_share("limit", self.limit))

    def _decay(self, t: Any, xp: Any) -> Any:
        return xp.clamp((1 + t) / (10 + t), 0.0, self.limit)


@dataclass(frozen=True)
class ExponentialRamp(_Schedule):
    """Warm up as 1 - exp(-n/steps): YOLO.

    keep = d^dt, d = limit (1 - exp(-n/steps)) with n = t. Exact for ticks of length 1, approximate
    for longer ones.

    >>> round(ExponentialRamp().keep(2000, 1), 6)
    0.632057

    Args:
        limit: the decay it tends to, in [0, 1].
        steps: the time constant of the warm-up in units of the clock, an integer >= 1.

    Raises:
        ValueError: limit is outside [0, 1], or steps < 1.
        TypeError: limit is no number, or steps no integer.

    Source: github.com/ultralytics/yolov5, `ModelEMA`.
    """

    limit: float = 0.9999
    steps: int = 2000

    def __post_init__(self) -> None:
        self._set(limit=_share("limit", self.limit), steps=_count("steps", self.steps, 1))

    def _decay(self, t: Any, xp: Any) -> Any:
        return -self.limit * xp.expm1(-t / self.steps)


@dataclass(frozen=True, repr=False)
class Opaque(Decay):
    """Somebody else's decay: an object with `keep(t, dt)`, asked one tick at a time.

    What it answers is checked. It has no spec: a file records its `repr`, and a reader of that
    file cannot compute with it.

    Args:
        source: an object with `keep(t, dt)`.
    """

    source: DecayLike

    def __repr__(self) -> str:
        return repr(self.source)

    @property
    def exact(self) -> bool:
        """Whether the cadence law is exact: as nothing is known about it, no."""
        return False

    def _keep(self, t: Any, dt: Any, xp: Any) -> Any:
        if isinstance(t, Tensor):
            ticks = zip(t.flatten().tolist(), dt.flatten().tolist(), strict=True)
            kept = [self.keep(int(t), int(dt)) for t, dt in ticks]
            return torch.tensor(kept, dtype=torch.float64).reshape(t.shape)
        share = float(self.source.keep(t, dt))
        if not 0 <= share <= 1:
            raise ValueError(
                f"keep({t}, {dt}) of {self.source!r} is {share!r}, not a share between 0 and 1: "
                "return the share of the old average that is kept, not the one that is replaced"
            )
        return share


def as_decay(value: float | DecayLike) -> Decay:
    """Return the decay that a user's value means.

    >>> as_decay(0.999)
    Constant(decay=0.999)
    >>> as_decay(PowerLaw(0.10))
    PowerLaw(std=0.1)

    Args:
        value: a float d in [0, 1), meaning `Constant(d)`; a decay; or any object with
            `keep(t, dt)`. A float below .1 warns: 1 - d was probably meant.

    Raises:
        ValueError: a number outside [0, 1).
        TypeError: anything else.
    """
    if isinstance(value, Decay):
        return value
    if isinstance(value, type) and callable(getattr(value, "keep", None)):
        raise TypeError(
            f"a decay is a value, and {value.__name__} is a class: write {value.__name__}(...)"
        )
    if isinstance(value, DecayLike) and callable(value.keep):
        return Opaque(value)
    if not _is_number(value):
        raise TypeError(
            f"a decay is a float or a decay value, not {value!r} of type "
            f"{type(value).__name__}: write 0.999, PowerLaw(0.10) or HalfLife(1000)"
        )
    decay = Constant(value)
    if decay.decay == 1:
        raise ValueError(
            f"an average with decay={value!r} never moves: write the share that is kept, such as "
            "0.999, or Constant(1.0) if an average that never moves is meant"
        )
    if decay.decay < 0.1:
        meant = "the average would be a copy of the last weights"
        if decay.decay > 0:
            meant = (
                "if it was the share that is replaced (momentum or tau in some libraries), write "
                f"{Constant(1 - decay.decay)!r}"
            )
        warnings.warn(
            f"decay={value!r} keeps only {decay.decay:.2%} of the old average at each tick; "
            f"{meant}; if it is meant, write {decay!r}",
            UserWarning,
            stacklevel=3,
        )
    return decay


def to_spec(decay: Decay) -> Spec:
    """Return a decay as a small JSON object, from which `from_spec` makes it again.

    >>> to_spec(After(10, 0.5))
    {'type': 'After', 'start': 10, 'inner': {'type': 'Constant', 'decay': 0.5}}

    Args:
        decay: any decay; somebody else's, or one around somebody else's, becomes
            `{"type": "opaque", "repr": ...}`.
    """
    opaque = {"type": "opaque", "repr": repr(decay)}
    spec: Spec = {"type": type(decay).__name__}
    if _KINDS.get(spec["type"]) is not type(decay):
        return opaque
    for parameter in dataclasses.fields(decay):  # type: ignore[arg-type]
        if parameter.init:
            value = getattr(decay, parameter.name)
            if isinstance(value, Decay):
                value = to_spec(value)
                if value["type"] == "opaque":
                    return opaque
            spec[parameter.name] = value
    return spec


def from_spec(spec: Spec) -> Decay:
    """Return the decay that `to_spec` wrote down.

    >>> from_spec({"type": "After", "start": 10, "inner": {"type": "Uniform"}})
    After(start=10, inner=Uniform())

    Args:
        spec: a JSON object with a `type` and that decay's arguments.

    Raises:
        ValueError: it is of an opaque or unknown type, or its arguments are not that type's.
    """
    if not isinstance(spec, dict) or not isinstance(spec.get("type"), str):
        raise ValueError(
            f'a decay spec is an object such as {{"type": "PowerLaw", "std": 0.1}}, not {spec!r}: '
            "write it with to_spec"
        )
    arguments = {
        name: from_spec(value) if isinstance(value, dict) else value
        for name, value in spec.items()
        if name != "type"
    }
    kind = spec["type"]
    if kind == "opaque":
        raise ValueError(
            f"the decay {spec.get('repr', '?')} cannot be made from its spec: it was an object of "
            "the program that recorded it. Make it there and pass it as decay="
        )
    if kind not in _KINDS:
        raise ValueError(
            f"unknown decay type {kind!r}: this polyak knows {', '.join(_KINDS)}. "
            "A newer version may have written it; upgrade polyak"
        )
    try:
        return _KINDS[kind](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the decay spec {spec!r} makes no {kind}: {error}") from error


_KINDS: dict[str, type[Decay]] = {
    kind.__name__: kind
    for kind in (
        Constant,
        HalfLife,
        Debiased,
        PowerLaw,
        Uniform,
        Cosine,
        Linear,
        After,
        InverseGamma,
        Ramp,
        ExponentialRamp,
    )
}

# What torch offers on vectors, for one number; only the names that the formulas use.
_NUMBERS = SimpleNamespace(
    cos=math.cos,
    expm1=math.expm1,
    maximum=max,
    clamp=lambda x, low, high: min(max(x, low), high),
    where=lambda condition, x, y: x if condition else y,
)


def _exponent(std: float) -> float:
    """Return the largest root g of g^3 + 7 g^2 + (16 - T) g + (12 - T) = 0, T = std^-2 (eq. 126).

    With x = g + 2 and divided by T it reads (std x)^2 (x + 1) = x - 1, convex for x > 0 and above
    its root at x = 1/std: Newton's method falls monotonically from there, until rounding stops it.
    """
    x, lower = math.inf, 1 / std
    while lower < x:
        x = lower
        y = std * x
        lower = x - (y * y * (x + 1) - (x - 1)) / (y * (3 * y + 2 * std) - 1)
    return x - 2


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _number(name: str, value: Any) -> float:
    if not _is_number(value):
        raise TypeError(
            f"{name} must be a number, not {value!r} of type {type(value).__name__}: write a float"
        )
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {value!r}: write an ordinary float")
    return number


def _share(name: str, value: Any) -> float:
    share = _number(name, value)
    if not 0 <= share <= 1:
        ticks = f"; for a horizon in ticks, HalfLife({value!r})" if share >= 2 else ""
        raise ValueError(
            f"{name} must be between 0 and 1, got {value!r}: it is the share of the old average "
            "that a tick keeps. Was 1 - decay meant, the share that is replaced (momentum or tau "
            f"in some libraries)? Write the share that is kept, such as 0.999{ticks}"
        )
    return share


def _positive(name: str, value: Any, what: str) -> float:
    number = _number(name, value)
    if number <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}: write {what} above 0")
    return number


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}: write a number of ticks")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer, not {value!r} of type {type(value).__name__}: "
            "write a whole number of ticks"
        ) from None


def _count(name: str, value: Any, least: int) -> int:
    count = _integer(name, value)
    if count < least:
        raise ValueError(
            f"{name} must be at least {least}, got {count}: write a whole number of ticks"
        )
    return count


def _outside(t: float, dt: float) -> str:
    return (
        f"a tick of length {dt} cannot end at clock {t}: "
        "pass the clock after the tick, then its length, with 0 <= dt <= t"
    )
