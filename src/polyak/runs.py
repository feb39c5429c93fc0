"""RUNS: which averages have seen the same states: those of one model, and of what it goes on from.

Every average of a model in this process is of one run, and so is what is resumed from its state. A
run that goes on from a checkpoint branches there: it may have gone on from it before, to other
states at the same clocks. All processes of a group agree on the names.
"""

from __future__ import annotations

import itertools
import os
import uuid
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from polyak.profile import History

__all__ = ["begin", "branch_of", "resume", "run_of"]


@dataclass
class _Run:
    """What is known of a model.

    Attributes:
        name: of the run.
        branch: in which its averages go on at present; empty where it has none yet.
        since: the clock of the model where that begins.
        members: the histories of the averages in it, and how many ticks they came with.
    """

    name: str
    branch: str = ""
    since: int = -1
    members: list[tuple[weakref.ref[History], int]] = field(default_factory=list)

    def join(self, history: History, clock: int, ticks: int) -> None:
        """Let an average go on with the others, or in a branch of its own.

        Another branch begins where the model goes back, to a clock that others have passed; where a
        state is loaded of which none is here, since the run may have gone on from it before; and
        where those that were here are gone, and with them how far they had come.

        Args:
            history: of the average.
            clock: of the model, at which it begins, or goes on.
            ticks: how many it comes with; -1 where it begins.
        """
        alive = [(one, count) for ref, count in self.members if (one := ref()) is not None]
        mates = [(one, count) for one, count in alive if one.run == history.run]
        went_back = any(one.clock > clock and one.ticks != count for one, count in mates)
        if went_back or (not mates and (ticks >= 0 or len(alive) < len(self.members))):
            since = clock if ticks >= 0 else clock - 1  # what it begins with is its own
            self.branch, self.since, alive = _agreed("branch"), since, []
        self.members = [(weakref.ref(one), count) for one, count in alive]
        self.members.append((weakref.ref(history), ticks))
        if self.branch and [name for _, name in history.branches][-1:] != [self.branch]:
            history.branch(self.branch, clock if ticks >= 0 else self.since)


_runs: weakref.WeakKeyDictionary[nn.Module, _Run] = weakref.WeakKeyDictionary()
_names: dict[str, itertools.count[int]] = {}  # how many names were asked for, of each kind


def run_of(model: nn.Module) -> str:
    """Return the name of the run that averages of a model are of."""
    if model not in _runs:
        _runs[model] = _Run(_agreed("run"))
    return _runs[model].name


def branch_of(model: nn.Module) -> str:
    """Return the name of the branch in which they go on; empty where there is none."""
    return _runs[model].branch


def begin(model: nn.Module, name: str, clock: int, inherited: bool = False) -> History:
    """Return the history of an average that begins.

    Args:
        model: that is averaged.
        name: of the run of the average.
        clock: of what it begins with.
        inherited: whether that is no state of the model.
    """
    history, run = History(name, clock, inherited), _runs[model]
    if inherited:  # at a clock that need not be the model's
        run.members.append((weakref.ref(history), -1))
        if run.branch:
            history.branch(run.branch, run.since)
    else:
        run.join(history, clock, ticks=-1)
    return history


def resume(model: nn.Module, history: History, clock: int) -> None:
    """Note that an average goes on from a state.

    The history that it had has to be there still: it tells whether the model goes back.

    Args:
        model: that is averaged.
        history: that of the average from now on.
        clock: of the model, when the state was taken.
    """
    run = _runs[model]
    run.name = history.run
    run.join(history, clock, history.ticks)


def _agreed(kind: str) -> str:
    """Return a new name, the same on all processes of a group: of the n-th that each asks for."""
    name, number = uuid.uuid4().hex, next(_names.setdefault(kind, itertools.count()))
    dist = torch.distributed
    group = dist.is_available() and dist.is_initialized() and dist.get_backend() != "fake"
    if group and dist.get_world_size() > 1:
        # Whoever comes first sets it in the group's store; nobody waits for anybody. The store may
        # be older than these processes.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.distributed_c10d._get_default_store()
        name = store.compare_set(f"polyak/{kind}/{attempt}/{number}", "", name).decode()
    return name
