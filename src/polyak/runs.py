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

    def alive(self) -> list[tuple[History, int]]:
        """Return those that are still there."""
        found = [(reference(), ticks) for reference, ticks in self.takers]
        return [(history, ticks) for history, ticks in found if history is not None]

    def has_gone_on(self) -> bool:
        """Whether any of them has been updated since, or all are gone."""
        alive = self.alive()
        return not alive or any(history.ticks != ticks for history, ticks in alive)


@dataclass
class _Run:
    """What is known of a model.

    Attributes:
        name: of the run.
        branch: that its averages have gone on in last, if any has.
        histories: of its averages.
    """

    name: str
    branch: _Branch | None = None
    histories: list[weakref.ref[History]] = field(default_factory=list)

    def knows(self, history: History) -> bool:
        """Whether an average that is there, and has been updated here, stands where it does."""
        resumed = [] if self.branch is None else self.branch.alive()
        waiting = [id(taker) for taker, ticks in resumed if taker.ticks == ticks]
        alive = [one for reference in self.histories if (one := reference()) is not None]
        return any(
            one.run == history.run
            and (one.clock, one.ticks) == (history.clock, history.ticks)
            and one.branches == history.branches
            for one in alive
            if id(one) not in waiting
        )

    def add(self, history: History) -> None:
        """Note an average."""
        self.histories = [reference for reference in self.histories if reference() is not None]
        self.histories.append(weakref.ref(history))


_runs: weakref.WeakKeyDictionary[nn.Module, _Run] = weakref.WeakKeyDictionary()
# Their numbers, the same on all processes.
_models, _resumes = itertools.count(), itertools.count()


def run_of(model: nn.Module) -> str:
    """Return the name of the run that averages of a model are of."""
    if model not in _runs:
        _runs[model] = _Run(_agreed(f"run/{next(_models)}"))
    return _runs[model].name


def begin(model: nn.Module, name: str, clock: int, inherited: bool = False) -> History:
    """Return the history of an average that begins.

    Args:
        model: that is averaged.
        name: of the run of the average.
        clock: of what it begins with.
        inherited: whether that is no state of the model.
    """
    history, run = History(name, clock, inherited), _runs[model]
    if run.branch is not None:
        history.branch(run.branch.name, run.branch.clock)
    run.add(history)
    return history


def resume(model: nn.Module, history: History, clock: int) -> None:
    """Note that an average goes on from a state, with others of its model.

    Where another one stands at that state, nothing has gone back. Else a branch begins, unless the
    others have begun one, and have not been updated since.

    Args:
        model: that is averaged.
        history: that of the average from now on.
        clock: of the model, when the state was taken.
    """
    run = _runs[model]
    run.name, known = history.run, run.knows(history)
    run.add(history)
    if known:
        return
    if run.branch is None or run.branch.has_gone_on():
        run.branch = _Branch(_agreed(f"branch/{next(_resumes)}"), clock)
    run.branch.takers.append((weakref.ref(history), history.ticks))
    run.branch.clock = max(run.branch.clock, clock)
    for taker, _ in run.branch.alive():
        taker.branch(run.branch.name, run.branch.clock)


def _agreed(key: str) -> str:
    """Return a new name, the same on all processes of a group that ask for this key."""
    name = uuid.uuid4().hex
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake":
        # Whoever comes first sets it in the group's store; nobody waits for anybody.
        store = dist.distributed_c10d._get_default_store()
        name = store.compare_set(f"polyak/{key}", "", name).decode()
    return name
