"""RUNS: which averages have seen the same states: those of one model, and of what it goes on from.

Every average of a model in this process is of one run, and so is what is resumed from its state. A
run that goes on from a checkpoint branches there: it may have gone on from it before, to other
states at the same clocks. All processes of a group agree on the names.
"""

from __future__ import annotations

import itertools
import uuid
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from polyak.profile import History

__all__ = ["begin", "resume", "run_of"]


@dataclass
class _Branch:
    """What follows a checkpoint.

    Attributes:
        name: that all averages which go on from it get.
        clock: the latest of theirs; those that are not updated at each step are behind.
        takers: their histories, and how many ticks these had then.
    """

    name: str
    clock: int
    takers: list[tuple[weakref.ref[History], int]] = field(default_factory=list)

    def histories(self) -> list[tuple[History, int]]:
        """Return those that are still there."""
        found = [(reference(), ticks) for reference, ticks in self.takers]
        return [(history, ticks) for history, ticks in found if history is not None]


_runs: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_branches: weakref.WeakKeyDictionary[nn.Module, _Branch] = weakref.WeakKeyDictionary()
# Their numbers, the same on all processes.
_models, _resumes = itertools.count(), itertools.count()


def run_of(model: nn.Module) -> str:
    """Return the name of the run that averages of a model are of."""
    if model not in _runs:
        _runs[model] = _agreed(f"run/{next(_models)}")
    return _runs[model]


def begin(model: nn.Module, run: str, clock: int) -> History:
    """Return the history of an average that sees its first state.

    Args:
        model: that is averaged.
        run: of the average.
        clock: of the state.
    """
    history, branch = History(run, clock), _branches.get(model)
    if branch is not None:
        history.branch(branch.name, branch.clock)
    return history


def resume(model: nn.Module, history: History, clock: int) -> None:
    """Note that an average goes on from a state, with others of its model.

    Where one of these has been updated since it was resumed, the model has gone back, and another
    branch begins.

    Args:
        model: that is averaged.
        history: that of the average from now on.
        clock: of the model, when the state was taken.
    """
    _runs[model] = history.run
    branch = _branches.get(model)
    known = branch.histories() if branch is not None else []
    if branch is None or not known or any(taker.ticks != ticks for taker, ticks in known):
        branch = _branches[model] = _Branch(_agreed(f"branch/{next(_resumes)}"), clock)
    branch.takers.append((weakref.ref(history), history.ticks))
    branch.clock = max(branch.clock, clock)
    for taker, _ in branch.histories():
        taker.branch(branch.name, branch.clock)


def _agreed(key: str) -> str:
    """Return a new name, the same on all processes of a group that ask for this key."""
    name = uuid.uuid4().hex
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake":
        # Whoever comes first sets it in the group's store; nobody waits for anybody.
        store = dist.distributed_c10d._get_default_store()
        name = store.compare_set(f"polyak/{key}", "", name).decode()
    return name
