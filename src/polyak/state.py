"""STATE: what is written down about an average, and how it is read back with suspicion.

A state is `{"averages": {name: tensor}, "facts": JSON string}`; a saved file has the same facts
in its metadata. Everything is checked here before anything is taken over. Nothing here writes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from polyak import engine
from polyak.decay import Spec
from polyak.profile import History, Moments
from polyak.selection import Slot, View, listed

__all__ = ["FORMAT", "Facts", "matched"]

FORMAT = 1  # a reader refuses what is newer

_COUNTS = ("clock", "pending", "updates", "repeats", "nonfinite")


@dataclass(frozen=True)
class Facts:
    """All of an average's state that is no tensor.

    Attributes:
        clock: how far the average has come.
        pending: ticks of optimizer steps that no update has seen yet.
        updates: states seen.
        repeats: updates with the clock where it stood.
        nonfinite: elements that kept their average.
        policy: the name of the policy.
        decay: the decay, as `to_spec` gives it.
        history: which states were seen, or None before the first.
        moments: what their profile is like.
    """

    clock: int
    pending: int
    updates: int
    repeats: int
    nonfinite: int
    policy: str
    decay: Spec
    history: History | None
    moments: Moments

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        plain = {key: getattr(self, key) for key in (*_COUNTS, "policy", "decay")}
        history = None if self.history is None else self.history.to_dict()
        return {"format": FORMAT, **plain, "history": history, "moments": asdict(self.moments)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Facts:
        """Return the facts of a state.

        Raises:
            ValueError: it is something else, of a newer format, or damaged.
        """
        if not isinstance(state, Mapping) or not {"averages", "facts"} <= set(state):
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                "this is no state of a polyak EMA, which has 'averages' and 'facts'; got "
                f"{keys!s:.200}. A model's own state dict goes to model.load_state_dict"
            )
        try:
            plain = json.loads(state["facts"])
            version = int(plain["format"])
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"the facts of this state cannot be read ({error!r}): {state['facts']!r:.80}; "
                "load another checkpoint, as this one is damaged or not of polyak"
            ) from None
        if version > FORMAT:
            raise ValueError(
                f"the state has format {version}, this polyak reads up to {FORMAT}; install the "
                "newer polyak that wrote it"
            )
        try:
            history = None if plain["history"] is None else History.from_dict(plain["history"])
            facts = cls(
                **{key: _count(key, plain[key]) for key in _COUNTS},
                policy=str(plain["policy"]),
                decay=dict(plain["decay"]),
                history=history,
                moments=Moments(**{k: float(v) for k, v in plain["moments"].items()}),
            )
            if facts.clock != (0 if history is None else history.clock):
                raise ValueError(f"clock {facts.clock} is not where its history ends")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the facts of this state are damaged ({type(error).__name__}: {error}); load "
                "another checkpoint"
            ) from None
        return facts


def matched(averages: Any, view: View, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
    """Return the averages of a state under this model's names, all fit for these slots.

    A tied tensor is known by any of its names: which comes first depends on how the model is built.

    Raises:
        ValueError: a name is missing, unknown or there twice, or a value is no average for it. All
            differences are listed.
    """
    known = (view.teacher or view.tree).by_name
    found: dict[str, Any] = {}
    wrong = []
    for given, average in (averages if isinstance(averages, Mapping) else {}).items():
        name = known[given].name if given in known else given
        if name in found:
            wrong.append(f"{given}: another average of {name}, which is tied to it in this model")
        elif name not in slots:
            wrong.append(f"{given}: only in the state")
        else:
            found[name] = average
    wrong += [f"{name}: missing in the state" for name in slots if name not in found]
    wrong += [
        f"{name}: {fault}" for name in found if (fault := _fault(found[name], slots[name].tensor))
    ]
    if wrong:
        raise ValueError(
            f"the state does not fit this EMA, and nothing was loaded:{listed(wrong)}\n"
            "build the model and the policy as they were when it was saved; a state of other "
            "shards is loaded with torch.distributed.checkpoint"
        )
    return {name: found[name] for name in slots}


def _fault(average: Any, tensor: Tensor) -> str | None:
    if not isinstance(average, Tensor):
        return f"a {type(average).__name__}, no tensor"
    if average.shape != tensor.shape:
        return f"{tuple(average.shape)} in the state, {tuple(tensor.shape)} in the model"
    if not engine.is_floating(average) or average.is_complex() != tensor.is_complex():
        return f"{average.dtype} in the state, {tensor.dtype} in the model"
    if average.dtype != engine.average_dtype(average.dtype):
        return f"{average.dtype} in the state, too narrow for an average"
    if not engine.movable(average, tensor):
        return f"{engine.layout(average)} in the state, {engine.layout(tensor)} in the model"
    if average.is_meta:
        return "on the meta device, without values"
    if engine.nonfinite([average]):
        return "not finite"
    if average.dtype.itemsize > engine.average_dtype(tensor.dtype).itemsize:
        largest = torch.finfo(engine.average_dtype(tensor.dtype)).max
        if engine.local(average).numel() and float(engine.local(average).abs().max()) > largest:
            return f"values beyond {largest:.2g}, the largest that this model's averages hold"
    return None


def _count(key: str, value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{key} is {value!r}, not a count")
    return value
