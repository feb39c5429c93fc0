"""EMA: the one object with state. It reads a model while it trains and keeps an average beside it.

Everything here is bookkeeping: which tensors, at which clock, by which decay. The arithmetic is in
`engine`, the names in `selection`, the numbers in `decay` and `profile`. Nothing here
touches training: the model is read, and written only inside `applied` and by `copy_to`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import itertools
import json
import math
import operator
import os
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from polyak import batchnorm, callers, checks, engine, files, runs, together
from polyak.attach import Attachment, checked_optimizer
from polyak.decay import Constant, Decay, DecayLike, PowerLaw, as_decay, from_spec, to_spec
from polyak.profile import History, Moments
from polyak.report import Report
from polyak.selection import (
    Policy,
    Slot,
    Tree,
    View,
    describe,
    everything,
    listed,
    trainable,
    unwrap,
)
from polyak.state import Facts, matched
from polyak.swap import Aside, uninterrupted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["EMA", "update_"]

_SHARE = 0.10  # of the first state in the average, from where on `applied` warns
_DEAD_ZONE = 1e-3  # relative, from where on `report` warns
_REPEATS = 32  # for each update, from where on it warns: more than micro-batches to a step

# Of whoever changes an average, or lets a model hold one: threads may validate, save and train.
_lock = threading.RLock()
# The averages that some model holds at this moment, in place of its trained weights.
_applied: list[EMA] = []
# Those whose updates go on beside training, and may still be reading the weights.
_beside: weakref.WeakSet[EMA] = weakref.WeakSet()


class EMA:
    """An average of the weights of a model, kept while the model trains.

    `average <- keep * average + (1 - keep) * weights`, with `keep` from the decay.

    >>> from torch import nn; from polyak import EMA, HalfLife
    >>> model = nn.Linear(2, 1)
    >>> ema = EMA(model, HalfLife(100))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> handle = ema.attach(optimizer)            # updates after each optimizer step
    >>> model(torch.ones(1, 2)).sum().backward()
    >>> optimizer.step()
    >>> with ema.applied():                       # the model holds the averages in here
    ...     prediction = model(torch.ones(1, 2))
    >>> ema.clock
    1

    Args:
        model: what to average; wrappers (DDP, `torch.compile`, activation checkpoints) are seen
            through. It may be built before the model is moved, loaded or sharded: nothing is read
            before the first update.
        decay: how much of the average survives a tick, see `polyak.decay`; a float is
            `Constant`. By default `PowerLaw(0.10)`: a mean age of 11 % of the run so far.
        policy: `policy(name, tensor, module)` says of each tensor whether to `"average"` it,
            let it `"follow"` the model, or `"leave"` it alone. By default `trainable`, with
            `into` `everything`.
        into: a module of the same names (a teacher) whose own tensors hold the averages. They start
            from its values, so that a decay must be given, and one that keeps nothing at the first
            tick (Debiased, PowerLaw, Uniform, After) overwrites these. The teacher is put into eval
            mode and out of autograd, once.
        dtype: the least dtype of the averages, `torch.float32` (default) or `torch.float64`.
        device: where the averages are: beside each parameter (`None`, the default), or, for a model
            on CUDA devices, `"cpu"`: in pinned host memory, where an update goes on while the next
            forward and backward run if `attach` is used. Optimizer steps and all methods here wait
            for it; call `report()` before changing the weights in another way.

    Raises:
        ValueError: the policy averages nothing; teacher and student do not match; the dtype is too
            narrow; a decay is missing or out of range.
        TypeError: an argument is of another kind.

    Source: Polyak and Juditsky 1992 (averaging); Tarvainen and Valpola 2017, arXiv 1703.01780
    (teachers); Karras et al. 2024, arXiv 2312.02696 (power-law averages).
    """

    # What reset() forgets; see _start_over.
    _averages: dict[str, Tensor]
    _dtypes: dict[str, torch.dtype]  # of the model's tensors, when first seen
    _statistics: dict[str, Tensor]  # re-estimated, until the next update
    _underneath: dict[str, Tensor]  # what these hide in the teacher
    _apart: set[str]  # averages that a teacher is too narrow to hold
    _view: View | None
    _plan: engine.Plan | None  # the update
    _broken: Exception | None  # what an update failed of that went on beside training
    _through: engine.Plan  # these averages -> the teacher
    _follow: engine.Plan  # model -> what follows it in the teacher
    _history: History | None
    _moments: Moments
    _clock: int
    _pending: int  # ticks of optimizer steps that no update has seen yet
    _doubt: tuple[engine.Flag, Callable[[EMA], None]] | None  # skipped? and what to note if not
    _updates: int
    _repeats: int
    _nonfinite: int
    _nonfinite_told: int
    _repeats_told: bool
    _dominance_told: bool

    def __init__(
        self,
        model: nn.Module,
        decay: DecayLike | float | None = None,
        *,
        policy: Policy | None = None,
        into: nn.Module | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if into is not None and decay is None:
            raise ValueError(
                "into= starts from the teacher's own values, so how fast they fade is yours to "
                "say: pass a decay, for example EMA(student, 0.996, into=teacher)"
            )
        self._model = unwrap(model)
        self._teacher = None if into is None else unwrap(into)
        self._decay: Decay = PowerLaw(0.10) if decay is None else as_decay(decay)
        self._policy = policy or (trainable if into is None else everything)
        self._floor = checks.checked_floor(dtype)
        self._run = self._first_run = runs.run_of(self._model)
        self._attachments: list[Attachment] = []
        self._aside: Aside | None = None
        self._blocks: list[object] = []  # the open blocks of `applied`
        view = self._walk()
        checks.refuse_nothing(view, self._policy)
        self._device = checks.checked_device(device, view)
        if self._device is not None:
            _beside.add(self)
        self._start_over()
        if self._teacher is not None:
            self._start_from_teacher(view)
            trained = {id(parameter) for parameter in self._model.parameters()}
            for parameter in self._teacher.parameters():
                if id(parameter) not in trained:  # a part that both share stays the model's
                    parameter.requires_grad_(False)
            _put_into_eval(self._teacher if into is None else into, self._model)

    # -------------------------------------------------------------- the clock and the update

    @property
    def clock(self) -> int:
        """How far the average has come, in what the user counts: steps, images, tokens."""
        self._learn()
        return self._clock

    @property
    def decay(self) -> DecayLike:
        """The decay in use."""
        return self._decay

    @property
    def history(self) -> History | None:
        """A copy of which states it has seen, for `polyak.profile`; None before the first."""
        self._learn()
        return copy.deepcopy(self._history)

    def update(self, t: int | None = None) -> None:
        """Let the average see the weights as they are now.

        Without `into` the first update copies them, whatever the decay. An element that is not
        finite keeps its average. All averages are updated or none.

        Args:
            t: the clock now; by default one more than before. The same clock again does nothing.

        Raises:
            TypeError: `t` is no integer.
            ValueError: `t` is behind the clock; the model's tensors are not what they were; the
                first weights ever seen are not finite.
            RuntimeError: it is attached to an optimizer and `t` is missing, the model holds
                averages at the moment, the teacher takes gradients, or a CUDA graph is being
                captured.
        """
        if t is None and any(attachment.active for attachment in self._attachments):
            raise RuntimeError(
                "this EMA is attached to an optimizer and updates after each of its steps; a bare "
                "update() would tick twice per step and halve the horizon. Delete the call, or "
                "remove() the handle that attach returned"
            )
        self._learn()
        next_clock = self._clock + self._pending + 1
        self._update(next_clock if t is None else checks.checked_clock(t))
        self._read()

    def attach(
        self, optimizer: torch.optim.Optimizer, *, every: int = 1, tick: int = 1
    ) -> Attachment:
        """Update after each real step of the optimizer, whatever calls it.

        Right under gradient accumulation; steps that a GradScaler skips are not counted. With
        several optimizers, attach to the one that steps last.

        Args:
            optimizer: a `torch.optim.Optimizer`.
            every: update after every so many steps, with a tick of `every * tick`: the same
                horizon for a fraction of the cost.
            tick: how far the clock moves with a step, for example the images of a batch.

        Returns:
            A handle; `handle.remove()` detaches.

        Raises:
            TypeError: it is no `torch.optim.Optimizer`, or `every` or `tick` no integer.
            ValueError: it is attached already, `every` or `tick` is not positive, or the
                optimizer steps no parameter of the model, or one of the teacher.
        """
        every, tick = checks.positive("every", every), checks.positive("tick", tick)

        def after(skipped: Tensor | None) -> None:
            with _lock:  # others may ask, and so learn, how the last step went
                self._learn()
                if skipped is not None and (engine.is_near(skipped) or not self._can_doubt()):
                    if skipped.item():
                        return
                    skipped = None
                elif skipped is not None:
                    checks.refuse_capture()
                pending = self._pending + tick
                self._note(partial(EMA._wait_for_more, tick=tick), skipped)
                if pending >= every * tick:
                    self._update(self._clock + pending, skipped)

        def parameters() -> Iterator[nn.Parameter]:
            engine.reshard(list(self._model.modules()))
            return self._model.parameters()

        self._refuse_optimizer(checked_optimizer(optimizer))
        attachment = Attachment(
            optimizer,
            parameters=parameters,
            before=partial(self._refuse_applied, "step the optimizer"),
            after=after,
        )
        if self._device is not None:  # any optimizer may change what is still being read
            attachment.add(self._before_any_step())
        self._attachments = [a for a in self._attachments if a.active] + [attachment]
        return attachment

    def reset(self) -> None:
        """Forget everything seen: the clock is 0, and the next update copies the weights.

        With `into` the next update starts from what the teacher holds then.
        """
        self._refuse_applied("reset")
        with suppress(RuntimeError):
            self._settle()
        view = self._walk()
        self._forget_statistics()
        if self._history is not None:  # what comes shares no states with what was
            self._run += f"/reset{runs.branch_of(self._model)}"
        self._start_over()
        if self._teacher is not None:
            self._start_from_teacher(view)

    # -------------------------------------------------------------- reading the averages

    @property
    def averages(self) -> Mapping[str, Tensor]:
        """Name -> average, read-only: the tensors themselves, outside of autograd.

        Before the first update the average is the model, and these are the model's own tensors.
        """
        self._settle()
        if self._averages:
            return MappingProxyType(self._averages)
        view = self._walk()
        return MappingProxyType({n: _trained(s.tensor) for n, s in view.average.items()})

    @contextmanager
    def applied(self) -> Iterator[Mapping[str, Tensor]]:
        """Let the model hold the averages inside the block, and its trained weights after it.

        The same tensors are written in place, so that it is safe with DDP, FSDP2, `torch.compile`
        and tied weights. The averaged weights and all buffers come back bit for bit, whatever
        happens in the block (frozen parameters are not copied aside: do not write to them). On the
        same EMA it may be nested.

        Yields:
            The state dict of the trained model, for whoever must save it inside.

        Raises:
            RuntimeError: another EMA of this model is applied, or inductor has frozen weights; on
                leaving, a parameter or a module was replaced inside (after all is back).
            ValueError: the model's tensors are not what they were; all differences are listed.
        """
        block = object()
        trained: dict[str, Tensor] = {}
        changed: list[str] = []
        try:
            try:
                with _lock:
                    trained |= self._enter(block)
                yield MappingProxyType(trained)
            finally:
                changed += self._leave(block)
        finally:  # for a Ctrl-C on the first line of the other; else there is nothing left to do
            changed += self._leave(block)
            trained.clear()  # or a reference to it would keep a whole model
            if changed:
                raise RuntimeError(
                    "the model was changed inside applied(). Its trained weights, buffers and "
                    f"modules are in their places again; what happened:{listed(changed)}\n"
                    "make such changes outside of the block"
                )

    def model_state_dict(self, part: str = "") -> dict[str, Any]:
        """Return copies of the averaged model, with the keys of its `state_dict()`.

        In the model's dtypes. What is not averaged is the model's own; with `into` the teacher's,
        where it has a tensor of that name, be it one that was left alone. A plain model loads it
        with `load_state_dict(..., strict=True)`. State dict hooks of the model are not run.

        Args:
            part: the name of a module in it, to get that module alone under its own names.

        Raises:
            ValueError: there is no such part, or the model's tensors are not what they were.
        """
        view = self._look()
        names = _names_in(view.tree, part)
        exported = self._exported(view)
        with engine.unrecorded():
            return {
                name: exported[key].to(view.tree.by_name[key].tensor.dtype, copy=True)
                if key in exported
                else view.tree.extra[key]()
                for key, name in names.items()
            }

    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged model into a module of the same names, the model itself included.

        Raises:
            ValueError: names or shapes differ; all differences are listed and nothing is written.
            RuntimeError: the model holds averages at the moment.
        """
        exported = self._exported(self._look())
        modules = list(unwrap(module).modules())
        checks.refuse_forward(modules, "copy into the module")
        engine.reshard(modules)
        target = Tree(module)
        _refuse_applied("copy into the model", {id(slot.tensor) for slot in target.slots})
        slots = target.entries
        wrong = [f"{key}: not in the module" for key in exported if key not in slots]
        wrong += [f"{key}: only in the module" for key in slots if key not in exported]
        wrong += [
            f"{key}: {tuple(value.shape)} here, {tuple(slots[key].tensor.shape)} in the module"
            for key, value in exported.items()
            if key in slots and slots[key].tensor.shape != value.shape
        ]
        wrong += [
            f"{key}: {engine.layout(value)} here, {engine.layout(slots[key].tensor)} in the module"
            for key, value in exported.items()
            if key in slots and not engine.movable(value, slots[key].tensor)
        ]
        if wrong:
            raise ValueError(
                f"the averages do not fit {type(module).__name__}:{listed(wrong)}\n"
                "build the module as the model was, or pick by name from ema.averages"
            )
        _let_weights_change()
        with engine.unrecorded():
            targets = [slots[key].tensor for key in exported]
            sources = [engine.spread_like(exported[key], slots[key].tensor) for key in exported]
            engine.write(engine.Plan(targets, sources))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        part: str = "",
        dtype: torch.dtype | None = None,
        averages_only: bool = False,
        shard_bytes: int | None = None,
    ) -> None:
        """Write the averaged model as one safetensors file, under the model's own names.

        Any loader reads it as weights. The metadata says what it is: clock, decay, history, which
        tensors are averages, checksums. Atomic: a run that is killed leaves the old file or the new
        one. It is right inside `applied` too.

        Where the model is sharded all of its processes call it: they gather one tensor at a time,
        the first of them writes, and all return when the file is there. Elsewhere nothing is
        communicated, and one process calls it (under DDP with its own BatchNorm statistics).

        Args:
            path: the file; its folder must exist.
            part: the name of a module in it, to write that module alone under its own names.
            dtype: of all floating tensors; by default the model's own, with `averages_only`
                that of the averages.
            averages_only: leave out what merely follows the model (LoRA: adapters only).
            shard_bytes: makes `path` a new folder of files with at most so many bytes of tensors
                each, and an index, as Hugging Face has them; by default one file.

        Raises:
            ValueError: the dtype is not floating, or the model's tensors are not what they were.
            OSError: the file cannot be written; an older one of that name is untouched.
            RuntimeError: the processes have not made the same updates, or another one failed.
        """
        if shard_bytes is not None:
            checks.positive("shard_bytes", shard_bytes)
        view = self._look()
        tensors, facts = self._contents(view, part, dtype, averages_only)
        groups = engine.groups(slot.tensor for slot in view.tree.slots)
        with _lock:  # no update of another thread while the file is written
            facts |= self._facts()
            if shard_bytes is None:
                writer = partial(files.write, path, facts=facts)
            else:
                writer = partial(files.write_sharded, path, shard_bytes=shard_bytes, facts=facts)
            if groups:
                checks.refuse_out_of_step(engine.exchange(self._clock, groups))
                order = files.writing_order(tensors)
                together.write(writer, {name: tensors[name] for name in order}, groups)
            else:
                writer(tensors)

    def contents(
        self, *, dtype: torch.dtype | None = None, averages_only: bool = False
    ) -> tuple[dict[str, files.Lazy], dict[str, Any]]:
        """Return what `save` writes, for whoever stores it elsewhere: tensors by name, and facts.

        Nothing is copied: read the tensors before the next update. `files.write(path, *contents)`
        is `save`.

        >>> from torch import nn
        >>> ema = EMA(nn.Linear(2, 1), 0.5)
        >>> ema.update()
        >>> tensors, facts = ema.contents()
        >>> sorted(tensors), tensors["bias"].shape, facts["clock"]
        (['bias', 'weight'], torch.Size([1]), 1)

        Args:
            dtype: as for `save`.
            averages_only: as for `save`.

        Returns:
            For each name what reads the tensor, once, where the average is; and the fact sheet, of
            plain JSON values.

        Raises:
            ValueError: as for `save`, or the model is sharded: then its processes have to write
                together, as `save` does.
        """
        view = self._look()
        if engine.groups(slot.tensor for slot in view.tree.slots):
            raise ValueError(
                "the averages are spread over several processes, and what one of them has is no "
                "file: call save() on all of them"
            )
        tensors, facts = self._contents(view, "", dtype, averages_only)
        with _lock:
            return tensors, facts | self._facts()

    def reestimate_statistics(self, batches: Iterable[Any], limit: int | None = None) -> None:
        """Re-estimate the BatchNorm statistics by running the averaged model over data.

        They belong to the average until its next update: `applied`, `save` and
        `model_state_dict` use them. The trained model's own stay as they are.

        Args:
            batches: tensors, tuples whose first entry is the input, or dicts of keyword arguments.
            limit: the number of batches to use; by default all.

        Raises:
            ValueError: there is no batch, or a layer gets statistics that are not finite.
        """
        if self._teacher is None:
            with self.applied():
                found = batchnorm.reestimate(self._model, batches, limit)
            tree = Tree(self._model)
            self._statistics = _by_name(tree, found)
            if self._aside is not None:  # called inside of applied(): the model holds them at once
                with engine.unrecorded():
                    for name, value in self._statistics.items():
                        tree.by_name[name].tensor.copy_(value)
            return
        view, tree = self._look(), Tree(self._teacher)
        aside = Aside(tree, [])  # a forward may change other buffers too
        try:
            found = batchnorm.reestimate(self._teacher, batches, limit)
        finally:
            with uninterrupted(), engine.unrecorded():
                aside.restore()
        own = {id(slot.tensor) for slot in view.tree.slots}
        statistics = _by_name(tree, found)
        statistics = {n: s for n, s in statistics.items() if id(tree.by_name[n].tensor) not in own}
        with _lock, engine.unrecorded():
            self._forget_statistics()
            for name, value in statistics.items():
                tensor = tree.by_name[name].tensor
                self._underneath[name] = tensor.clone()
                tensor.copy_(value)
            self._statistics = statistics

    # -------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Return the state: `{"averages": {name: tensor}, "facts": JSON string}`.

        Plain types only, for `torch.load(weights_only=True)` and torch.distributed.checkpoint.
        Like `nn.Module.state_dict` it does not copy; before the first update the tensors are
        copies of the weights. Re-estimated statistics are not in it: they end with the next update.
        """
        view = self._look()
        self._warn_of_nonfinite()
        averages = self._averages or self._copied(view.average)
        hidden = {
            n: t for n, t in self._underneath.items() if n in averages and n not in self._apart
        }
        averages = averages | hidden
        if callers.loading_in_place():
            averages = {name: torch.empty_like(average) for name, average in averages.items()}
        return {"averages": dict(averages), "facts": json.dumps(self._facts())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that `state_dict` gave, before or after the model's own is loaded.

        Everything is checked before anything is written. The decay stays the one that this EMA was
        built with; if another one is recorded, a warning names both.

        Raises:
            ValueError: the state is of something else, of a newer format, of another model, or not
                finite; all differences are listed, and nothing has changed.
            RuntimeError: the averages are applied at the moment.
        """
        self._refuse_applied("load a state")
        facts = Facts.from_state(state)
        with suppress(RuntimeError):  # what is broken is about to be replaced
            self._settle()
        view = self._compared()
        slots = {n: _found(view, n) for n in self._averages} or view.average
        averages = matched(state["averages"], view, slots)
        if (facts.updates, facts.clock) != (self._updates, self._clock) and any(
            engine.same(averages[name], mine) for name, mine in self._averages.items()
        ):
            raise ValueError(
                f"this state was taken from this EMA at update {facts.updates}, and its tensors "
                f"are the averages themselves, now at {self._updates}; to go back later, keep "
                "copy.deepcopy(ema.state_dict())"
            )
        if facts.decay != to_spec(self._decay):
            warnings.warn(
                f"the state was made with {_spelled(facts.decay)}, this EMA was built with "
                f"{self._decay!r}, which is used from now on; to continue as before, build it with "
                "the recorded one",
                stacklevel=2,
            )
        with _lock, uninterrupted():
            if facts.history is None:
                self.reset()
            else:
                # While the history that it has is there, which tells whether the model goes back.
                runs.resume(self._model, facts.history, facts.clock + facts.pending)
                self._take(slots, averages)
                self._drop_plan()
                self._broken = None
                self._history, self._moments = facts.history, facts.moments
                self._run = facts.history.run
            self._clock, self._pending = facts.clock, facts.pending
            self._updates, self._repeats = facts.updates, facts.repeats
            self._nonfinite = self._nonfinite_told = facts.nonfinite

    def start_from(self, averages: Mapping[str, Tensor], clock: int) -> None:
        """Go on from averages that something else has made: a peer's checkpoint, another run.

        As if they were what was seen first, at that clock: the next update moves them by the decay,
        and to `history` they are one state. Everything is checked before anything is written.

        >>> from torch import nn; from polyak import EMA
        >>> model = nn.Linear(2, 1)
        >>> ema = EMA(model, 0.999)
        >>> ema.start_from({"weight": torch.ones(1, 2), "bias": torch.zeros(1)}, clock=5000)
        >>> ema.clock, ema.averages["weight"]
        (5000, tensor([[1., 1.]]))

        Args:
            averages: by the model's names, such as `polyak.load_averages` returns; values of
                tensors that are not averaged here are left out.
            clock: how far they have come, in what this EMA counts.

        Raises:
            ValueError: a name is missing or unknown, a shape differs, or a value is not finite; all
                are listed, and nothing has changed.
            TypeError: the clock is no integer.
            RuntimeError: the averages are applied at the moment.
        """
        clock = checks.nonnegative("clock", clock)
        self._refuse_applied("start from other averages")
        with suppress(RuntimeError):  # what is broken is about to be replaced
            self._settle()
        view = self._compared()
        slots = {n: _found(view, n) for n in self._averages} or view.average
        known = (view.teacher or view.tree).by_name
        wide: dict[str, Tensor] = {}
        with engine.unrecorded():
            for given, average in averages.items():
                name = known[given].name if given in known else given
                if name not in slots and given in known:
                    continue  # what follows the model
                twice = name in wide and not engine.equal(wide[name], average)
                wide[f"{given} (a second time)" if twice else name] = engine.widened(average)
        taken = matched(wide, view, slots)
        with _lock, uninterrupted():
            self._take(slots, taken)
            self._drop_plan()
            self._broken = None
            self._run += f"/{uuid.uuid4().hex}"  # what it has seen so far is nobody else's
            self._history = runs.begin(self._model, self._run, clock, inherited=True)
            self._moments = Moments()
            self._clock, self._pending, self._updates, self._repeats = clock, 0, 0, 0
            self._nonfinite = self._nonfinite_told = 0
            self._repeats_told = self._dominance_told = False

    def report(self, group: ProcessGroup | None = None) -> Report:
        """Say how the average stands: its horizon, its distance to the weights, what it skipped.

        Without a group nothing is communicated, and on sharded models distance, bytes and skipped
        elements are those of this process's shards.

        >>> from torch import nn; from polyak import EMA
        >>> ema = EMA(nn.Linear(2, 1))
        >>> ema.update()
        >>> ema.report().largest_share
        1.0

        Args:
            group: processes that all call this, such as `torch.distributed.group.WORLD`: then the
                distance is that of the whole model, and bytes and skipped elements are added up,
                each copy counted.

        Raises:
            RuntimeError: the processes of the group have not made the same updates.
        """
        view = self._look()
        weights = [_trained(_found(view, name).tensor) for name in self._averages]
        averages, processes = list(self._averages.values()), group.size() if group else 1
        with engine.unrecorded():
            difference, norm = engine.distance(averages, weights, processes)
        held = sum(engine.local(average).nbytes for average in averages)
        nonfinite = self._count_nonfinite()
        if group:
            checks.refuse_out_of_step(engine.exchange(self._clock, [group]))
            told = engine.exchange((difference, norm, held, nonfinite), [group]).values()
            difference, norm, held, nonfinite = map(sum, zip(*told, strict=True))
        self._warn_of_nonfinite()
        report = Report(
            decay=repr(self._decay),
            clock=self._clock,
            updates=self._updates,
            repeats=self._repeats,
            tensors=len(self._averages),
            bytes=held,
            mean_age=self._moments.mean_age,
            deviation=self._moments.deviation,
            effective_samples=self._moments.effective_samples,
            largest_share=self._moments.largest_share,
            distance=(difference / (norm or 1.0)) ** 0.5,
            nonfinite=nonfinite,
            dead_zone=self._dead_zone(),
            paths=tuple(self._current_plan().paths) if self._averages else (),
        )
        if _DEAD_ZONE < report.dead_zone < math.inf:
            warnings.warn(
                f"a relative change of the weights below {report.dead_zone:.1e} no longer moves "
                "the averages: it is less than their dtype can hold of one update. Update every "
                "k-th step (attach(optimizer, every=k)), or build with dtype=torch.float64",
                stacklevel=2,
            )
        return report

    def __repr__(self) -> str:
        seen = f"{len(self._averages)} averages" if self._averages else "no update yet"
        return f"EMA({type(self._model).__name__}, {self._decay!r}, clock={self.clock}, {seen})"

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(_NO_COPY)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(_NO_COPY)

    # -------------------------------------------------------------- the update, inside

    def _update(self, clock: int, skipped: Tensor | None = None) -> None:
        if clock < self._clock:
            raise ValueError(
                f"the clock stands at {self._clock} and cannot go back to {clock}; pass the number "
                "of optimizer steps since the beginning of the run, or reset() to start over"
            )
        with _lock:
            self._refuse_applied("update")
            if self._history is None:
                self._begin(clock)
            elif clock == self._clock:
                self._repeat()
            else:
                self._advance(self._history, clock, skipped)

    def _begin(self, clock: int) -> None:
        """See the weights for the first time: copy them."""
        view = self._walk()
        checks.refuse_forward(view.tree.modules, "make the first update")
        checks.refuse_nothing(view, self._policy)
        averages = self._copied(view.average)
        with uninterrupted():
            self._statistics = {}
            self._averages, self._clock, self._updates, self._pending = averages, clock, 1, 0
            self._dtypes = {name: slot.tensor.dtype for name, slot in view.average.items()}
            if self._run == self._first_run:  # the model may have been resumed since
                self._run = runs.run_of(self._model)
            self._history = runs.begin(self._model, self._run, clock)

    def _advance(self, history: History, clock: int, skipped: Tensor | None) -> None:
        self._finish()
        dt = clock - self._clock
        keep = self._decay.keep(clock, dt)
        teacher = self._view.teacher if self._view is not None else None
        if teacher is not None:
            engine.reshard(teacher.modules)
            checks.refuse_forward(teacher.modules, "update the teacher")
        plan = self._current_plan()
        checks.refuse_capture()
        if self._teacher is not None and self._view is not None:
            checks.refuse_trained_teacher(self._view)
        with uninterrupted():
            if self._statistics or self._underneath:
                self._forget_statistics()
            weight = 1.0 - keep
            engine.lerp(plan, weight if skipped is None else engine.weight_unless(skipped, weight))
            if self._teacher is not None:
                plan.wait()  # it is read without asking
                engine.copy(self._through)
                engine.copy(self._follow)
            self._note(partial(EMA._moved, history=history, keep=keep, dt=dt), skipped)

    def _moved(self, history: History, keep: float, dt: int) -> None:
        """Note an update."""
        history.tick(self._decay, dt)
        self._moments.tick(keep, dt)
        self._clock, self._updates, self._pending = self._clock + dt, self._updates + 1, 0

    def _wait_for_more(self, tick: int) -> None:
        """Note a step that no update follows yet."""
        self._pending += tick

    def _note(self, what: Callable[[EMA], None], skipped: Tensor | None) -> None:
        """Note what a step has come to; what only an accelerator knows yet, as soon as it tells."""
        if skipped is None:
            what(self)
        else:
            self._doubt = engine.Flag(skipped), what

    def _can_doubt(self) -> bool:
        """Whether an update that turns out to be none has changed nothing."""
        return self._history is not None and self._teacher is None and not self._statistics

    def _learn(self) -> None:
        """Note the last step, if it was not known whether it was one."""
        if self._doubt is None:
            return
        with _lock, uninterrupted():
            if self._doubt is not None:  # nobody else has learned it meanwhile
                skipped, note = self._doubt
                try:
                    if not skipped.read():
                        note(self)
                finally:
                    self._doubt = None

    def _repeat(self) -> None:
        self._repeats += 1
        if self._repeats > _REPEATS * max(self._updates, 1) and not self._repeats_told:
            self._repeats_told = True
            warnings.warn(
                f"update(t) was called {self._repeats} times with t={self._clock}, where the clock "
                f"stood already, and only {self._updates} updates moved it: an epoch was passed "
                "for a step? Pass the number of optimizer steps, or no t at all",
                stacklevel=4,
            )

    def _start_over(self) -> None:
        self._averages = {}
        self._dtypes = {}
        self._statistics = {}
        self._underneath = {}
        self._apart = set()
        self._view = None
        self._plan = None
        self._broken = None
        self._through = self._follow = engine.Plan([], [])
        self._history = None
        self._moments = Moments()
        self._doubt = None
        self._clock = self._pending = self._updates = self._repeats = 0
        self._nonfinite = self._nonfinite_told = 0
        self._repeats_told = self._dominance_told = False

    def _start_from_teacher(self, view: View) -> None:
        """Let the averages live in the teacher: in its own tensors where they are wide enough."""
        homes = {name: view.home(name) for name in view.average}
        mine = {name: home for name, home in homes.items() if home is not None}
        checks.refuse_no_data(mine)
        checks.refuse_nonfinite({name: home.tensor for name, home in mine.items()})
        for name, home in mine.items():
            wide = torch.promote_types(home.tensor.dtype, _found(view, name).tensor.dtype)
            dtype = engine.average_dtype(wide, self._floor)
            with engine.unrecorded():
                self._averages[name] = home.tensor.detach().to(dtype)  # itself, if wide enough
            if home.tensor.dtype != dtype:
                self._apart.add(name)
        self._history = runs.begin(self._model, self._run, 0, inherited=True)

    def _copied(self, slots: Mapping[str, Slot]) -> dict[str, Tensor]:
        """Return copies of the model's tensors in the dtype of averages."""
        checks.refuse_no_data(slots)
        tensors = {name: _trained(slot.tensor) for name, slot in slots.items()}
        checks.refuse_nonfinite(tensors)
        copies = {name: self._empty(tensor) for name, tensor in tensors.items()}
        with engine.unrecorded():
            engine.copy(engine.Plan(list(copies.values()), list(tensors.values())))
        return copies

    def _take(self, slots: Mapping[str, Slot], averages: Mapping[str, Tensor]) -> None:
        """Take over averages from a state: into the tensors that there are, or into new ones."""
        mine = self._averages or {
            name: torch.empty_like(averages[name]) if s.tensor.is_meta else self._empty(s.tensor)
            for name, s in slots.items()
        }
        with engine.unrecorded():
            theirs = [engine.spread_like(averages[name], average) for name, average in mine.items()]
            plan = engine.Plan(list(mine.values()), theirs)
            with uninterrupted():
                engine.copy(plan)
                self._averages, self._statistics, self._underneath = mine, {}, {}
                if self._teacher is not None:
                    self._current_plan()
                    engine.copy(self._through)

    def _empty(self, tensor: Tensor) -> Tensor:
        dtype = engine.average_dtype(tensor.dtype, self._floor)
        return engine.empty_like(tensor, dtype, self._device)

    def _forget_statistics(self) -> None:
        with engine.unrecorded():
            for name, average in self._underneath.items():
                home = self._view.home(name) if self._view is not None else None
                if home is not None:
                    home.tensor.copy_(average)
        self._statistics, self._underneath = {}, {}

    def _enter(self, block: object) -> dict[str, Tensor]:
        """Begin a block of `applied`; return the state dict of the trained model."""
        if self._aside is not None:
            self._blocks.append(block)
            return self._aside.state_dict()
        self._refuse_applied("apply the averages")
        checks.refuse_freezing()
        _let_weights_change()
        view = self._look()
        checks.refuse_forward(view.tree.modules, "apply the averages")
        checks.refuse_merged(view.tree.modules)
        self._warn_of_dominance(stacklevel=5)  # past the context manager
        self._warn_of_nonfinite(stacklevel=5)
        values = self._values(view)
        slots = [slot for slot in view.tree.slots if slot.name in values]
        with engine.unrecorded():
            plan = engine.Plan([s.tensor for s in slots], [values[s.name] for s in slots])
            aside = Aside(view.tree, slots)
            self._blocks.append(block)
            self._aside = aside
            _applied.append(self)
            engine.write(plan)
        return aside.state_dict()

    def _leave(self, block: object) -> list[str]:
        """End a block of `applied`; with the last one the trained weights are back.

        Returns what else had changed. What was begun and not finished is done again.
        """
        with _lock, uninterrupted(), engine.unrecorded():
            if block in self._blocks:
                self._blocks.remove(block)
            if self._blocks or self._aside is None:
                return []
            changed = self._aside.restore()
            self._aside = None
            _applied[:] = [ema for ema in _applied if ema is not self]
        return changed

    # -------------------------------------------------------------- averages in host memory, inside

    def _read(self) -> None:
        """Wait until the last update has read the weights, if it still does."""
        try:
            if self._plan is not None:
                self._plan.read()
        except Exception:
            self._settle()

    def _before_any_step(self) -> RemovableHandle:
        """Hook onto the steps of every optimizer, for as long as this EMA lives."""
        reference = weakref.ref(self)

        def before(*_: object) -> None:
            ema = reference()
            if ema is not None:
                ema._read()

        handle = register_optimizer_step_pre_hook(before)
        weakref.finalize(self, handle.remove)
        return handle

    def _settle(self) -> None:
        """Let all that was begun be done and noted."""
        self._learn()
        self._finish()

    def _finish(self) -> None:
        """Wait until the last update is done, if it still goes on; refuse what it broke."""
        try:
            if self._plan is not None:
                self._plan.wait()
        except Exception as error:
            self._plan, self._broken = None, error
        if self._broken is not None:
            raise RuntimeError(
                "an update failed half-way, while training went on, and left some averages behind "
                f"the others ({type(self._broken).__name__}: {self._broken}); load_state_dict() of "
                "an earlier state, or reset()"
            ) from self._broken

    # -------------------------------------------------------------- which tensors, inside

    def _walk(self) -> View:
        for module in (self._model, self._teacher):
            modules = [] if module is None else list(module.modules())
            if not engine.in_forward(modules):  # else it would lose its weights under way
                engine.reshard(modules)
        return View(self._model, self._teacher, self._policy)

    def _look(self) -> View:
        """Walk the model; refuse it if it is not the one that was averaged so far."""
        self._settle()
        return self._compared()

    def _compared(self) -> View:
        view = self._walk()
        if self._averages:
            self._refuse_differences(view)
            plan = self._plan
            if self._view is None or not self._view.same(view) or (plan and not plan.current()):
                self._drop_plan()
            self._place(view)
            self._view = view
        return view

    def _refuse_differences(self, view: View) -> None:
        wrong = [f"{n}: new, or newly trainable" for n in view.average if n not in self._averages]
        for name, average in self._averages.items():
            slot = view.slot(name)
            if slot is None:
                wrong.append(f"{name}: no longer there")
                continue
            shape, dtype = tuple(slot.tensor.shape), slot.tensor.dtype
            if shape != tuple(average.shape):
                wrong.append(f"{name}: was {tuple(average.shape)}, is {shape}")
            if dtype != self._dtypes.get(name, dtype):
                wrong.append(f"{name}: was {self._dtypes[name]}, is {dtype}")
            if self._teacher is None and engine.unsharded(slot.tensor, average):
                wrong.append(
                    f"{name}: was {engine.layout(average)}, is whole; if an FSDP2 module outside "
                    "of this model has gathered it, call reshard() on that one first"
                )
            elif self._teacher is None and not engine.movable(average, slot.tensor):
                was, now = engine.layout(average), engine.layout(slot.tensor)
                wrong.append(f"{name}: was {was}, is {now}")
            if self._teacher is None and slot.name != name:
                wrong.append(f"{name}: is now tied to {slot.name}")
        if wrong:
            checks.refuse_forward(view.tree.modules, "look at the model's shards")
            raise ValueError(
                f"the model is not the one that was averaged so far:{listed(wrong)}\n"
                "change or convert the model before the first update, or call reset() to begin a "
                "new average"
            )

    def _place(self, view: View) -> None:
        """Let the averages be where their tensors are now: in the teacher, or beside the model."""
        with engine.unrecorded():
            for name, average in self._averages.items():
                tensor, home = _found(view, name).tensor, view.home(name)
                self._dtypes.setdefault(name, tensor.dtype)
                if home is not None and home.tensor.dtype != average.dtype:
                    self._apart.add(name)
                elif home is not None and name not in self._apart:
                    self._averages[name] = home.tensor.detach()
                elif home is None and not tensor.is_meta:
                    here = engine.spread_like(average, tensor)
                    self._averages[name] = here.to(self._device or tensor.device)

    def _current_plan(self) -> engine.Plan:
        """Return the plan of the update, made anew where tensors were replaced or moved."""
        if self._plan is not None and self._view is not None:
            known = [self._plan]
            if self._teacher is not None:
                known += [self._through, self._follow]
            if _intact(self._view) and all(plan.current() for plan in known):
                return self._plan
            self._drop_plan()
        view = self._compared()
        if self._plan is None:
            seen = {name: _found(view, name) for name in self._averages}
            checks.refuse_no_data(seen)
            # A teacher's own tensors are watched, since others may give them other memory.
            averages = [
                home.tensor if (home := view.home(name)) and name not in self._apart else average
                for name, average in self._averages.items()
            ]
            homes = {name: home.tensor for name in self._apart if (home := view.home(name))}
            # What was averaged stays so, also while it is frozen and a policy would let it follow.
            follow = [(a, b) for a, b in view.follow if a.name not in self._averages]
            with engine.unrecorded():
                plans = (
                    engine.Plan(averages, [slot.tensor for slot in seen.values()]),
                    engine.Plan(list(homes.values()), [self._averages[name] for name in homes]),
                    engine.Plan([a.tensor for a, _ in follow], [b.tensor for _, b in follow]),
                )
            self._plan, self._through, self._follow = plans
        return self._plan

    def _drop_plan(self) -> None:
        if self._plan is not None:
            self._nonfinite += self._plan.skipped()
        self._plan = None

    def _values(self, view: View) -> dict[str, Tensor]:
        """Return what stands for the model's tensors in the averaged model, where not they."""
        values = {}
        for slot in view.tree.slots:
            name, home = view.name(slot.name), view.home(slot.name)
            if name in self._statistics:
                values[slot.name] = self._statistics[name]
            elif name in self._averages:
                values[slot.name] = self._averages[name]
            elif home and slot.persistent and home.tensor.shape == slot.tensor.shape:
                values[slot.name] = home.tensor.detach()
        return values

    def _exported(self, view: View) -> dict[str, Tensor]:
        """Return the averaged model under the keys of its state dict, nothing copied."""
        values = self._values(view)
        return {
            key: values[slot.name] if slot.name in values else _trained(slot.tensor)
            for key, slot in view.tree.entries.items()
        }

    def _contents(
        self, view: View, part: str, dtype: torch.dtype | None, averages_only: bool
    ) -> tuple[dict[str, files.Lazy], dict[str, Any]]:
        """Return what is written, and what is said of it beside `_facts`."""
        checks.refuse_unwritable(dtype)
        names = _names_in(view.tree, part)
        exported = {key: value for key, value in self._exported(view).items() if key in names}
        left_out = [names[key] for key in view.tree.extra if key in names]
        if self._history is None:
            warnings.warn(
                "this EMA has made no update, so that what is saved is the model itself; call "
                "update() after each optimizer step, or attach(optimizer) once",
                stacklevel=3,
            )
        self._warn_of_dominance(stacklevel=4)
        self._warn_of_nonfinite(stacklevel=4)
        if left_out and not averages_only:
            warnings.warn(
                "what is no dense tensor cannot be written to this file, and is left out:"
                f"{listed(left_out)}\nmodel_state_dict() has it, for torch.save",
                stacklevel=3,
            )
        known = set(self._averages or view.average)
        averaged = [key for key in exported if view.name(key) in known]
        tensors = {}
        for key in averaged if averages_only else exported:
            own = None if averages_only else view.tree.by_name[key].tensor.dtype
            tensors[names[key]] = _lazy(key, exported[key], dtype or own)
        return tensors, {
            "producer": f"polyak {importlib.metadata.version('polyak')}",
            "part": part,
            "averaged": [names[key] for key in averaged],
            "reestimated": [names[key] for key in sorted(self._statistics) if key in names],
            "left_out": sorted(left_out),
        }

    # -------------------------------------------------------------- facts and warnings, inside

    def _facts(self) -> dict[str, Any]:
        self._learn()
        return Facts(
            clock=self._clock,
            pending=self._pending,
            updates=self._updates,
            repeats=self._repeats,
            nonfinite=self._count_nonfinite(),
            policy=describe(self._policy),
            decay=to_spec(self._decay),
            history=self._history,
            moments=self._moments,
        ).to_dict()

    def _count_nonfinite(self) -> int:
        return self._nonfinite + (0 if self._plan is None else self._plan.skipped())

    def _dead_zone(self) -> float:
        """Relative change of a weight below which one update no longer moves its average."""
        rounding = max((torch.finfo(a.dtype).eps / 2 for a in self._averages.values()), default=0.0)
        weight = self._moments.newest_share
        return rounding / weight if weight else math.inf

    def _refuse_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if self._teacher is not None and any(id(p) in trained for p in self._teacher.parameters()):
            raise ValueError(
                "this optimizer trains parameters of the teacher, which then would be no average; "
                "build it from the student's parameters only"
            )
        if any(attachment.active for attachment in self._attachments):
            raise ValueError(
                "this EMA is attached already, and a second attach would tick it twice per step; "
                "attach it once, to the optimizer that steps last, or remove() the first handle"
            )

    def _refuse_applied(self, verb: str) -> None:
        if _applied:
            _refuse_applied(verb, self._tensors())

    def _tensors(self) -> set[int]:
        modules = [self._model] + ([self._teacher] if self._teacher is not None else [])
        return {id(t) for m in modules for t in itertools.chain(m.parameters(), m.buffers())}

    def _warn_of_nonfinite(self, stacklevel: int = 3) -> None:
        count = self._count_nonfinite()
        if count > self._nonfinite_told:
            self._nonfinite_told = count
            warnings.warn(
                f"{count} elements of the weights were not finite at an update and kept their "
                "average, which is clean; the model may not be: copy_to(model) heals it",
                stacklevel=stacklevel,
            )

    def _warn_of_dominance(self, stacklevel: int) -> None:
        share = self._moments.first_share
        if share < _SHARE or share * self._updates <= 2.0 or self._dominance_told:
            return
        if self._history is not None and self._history.inherited:
            return  # it is meant to keep what it began with for a while
        self._dominance_told = True
        warnings.warn(
            f"after {self._updates} updates the first weights seen still are {share:.0%} of this "
            "average: it began in the middle of a run, or its horizon is too long so far. "
            "Debiased(decay) weighs all states alike at first, PowerLaw grows with the run, "
            "After(start, decay) begins later",
            stacklevel=stacklevel,
        )


def update_(teacher: nn.Module, student: nn.Module, decay: Constant | float = 0.5) -> None:
    """Move a teacher towards a student: `teacher <- decay * teacher + (1 - decay) * student`.

    Over all entries of the state dict, by name; integer entries are copied. The teacher is put into
    eval mode, the student only read. It keeps no state: for schedules, resuming and narrow teachers
    there is `EMA(student, decay, into=teacher)`.

    >>> from torch import nn; import polyak
    >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.ones_(teacher.weight), nn.init.constant_(student.weight, 2.0)
    >>> polyak.update_(teacher, student, decay=0.5)
    >>> teacher.weight.item(), student.weight.item()
    (1.5, 2.0)

    Args:
        teacher: is written; its floating tensors are float32 or wider.
        student: a module of the same names and shapes.
        decay: the share of the teacher that is kept, 0 to 1.

    Raises:
        ValueError: names or shapes differ (all are listed), the decay is out of range, or the
            teacher is too narrow to be moved.
        TypeError: the decay needs a clock.
    """
    value = as_decay(decay)
    if not isinstance(value, Constant):
        raise TypeError(
            f"update_ has no clock, which {value!r} needs; pass a float, or keep the state in "
            "ema = EMA(student, decay, into=teacher)"
        )
    student, teacher = unwrap(student), unwrap(teacher)
    engine.reshard([*student.modules(), *teacher.modules()])
    view = View(student, teacher, everything)
    tensors = {id(slot.tensor) for slot in view.tree.slots}
    tensors |= {id(home.tensor) for key in view.tree.by_name if (home := view.home(key))}
    _refuse_applied("update a teacher", tensors)
    pairs = [(view.home(name), slot) for name, slot in view.average.items()]
    homes = [home for home, _ in pairs if home is not None]
    narrow = [
        f"{home.name}: {home.tensor.dtype}"
        for home in homes
        if home.tensor.dtype != engine.average_dtype(home.tensor.dtype)
    ]
    if narrow:
        raise ValueError(
            f"the teacher is too narrow to be moved by small steps:{listed(narrow)}\n"
            "EMA(student, decay, into=teacher) keeps float32 averages and writes them through"
        )
    with engine.unrecorded():
        plans = [
            engine.Plan([home.tensor for home in homes], [slot.tensor for _, slot in pairs]),
            engine.Plan([a.tensor for a, _ in view.follow], [b.tensor for _, b in view.follow]),
        ]
        _put_into_eval(teacher, student)
        with uninterrupted():
            engine.lerp(plans[0], 1.0 - value.decay)
            engine.copy(plans[1])
            plans[0].wait()


def _let_weights_change() -> None:
    """Wait until no update that goes on beside training reads weights any more."""
    for ema in list(_beside):
        ema._read()


_get: Any = dict.get  # unbound: the fastest that `map` can call
_requires_grad: Any = operator.attrgetter("requires_grad")

_NO_COPY = (
    "an EMA cannot be copied or pickled: it refers to the model that it averages. Save "
    "ema.state_dict(), and load it into EMA(model, decay) of the other model"
)


def _put_into_eval(teacher: nn.Module, student: nn.Module) -> None:
    """Put the teacher into eval mode, but for modules that are the student's as well."""
    shared = set(teacher.modules()) & set(student.modules())
    modes = [(module, module.training) for module in shared]
    teacher.eval()
    for module, training in modes:
        module.training = training


def _refuse_applied(verb: str, tensors: set[int]) -> None:
    """Refuse while one of these tensors holds an average."""
    for ema in _applied:
        if ema._tensors() & tensors:
            raise RuntimeError(
                f"cannot {verb} now: inside applied() the model holds averages, those of {ema!r}, "
                "not its trained weights; leave the block first"
            )


def _trained(tensor: Tensor) -> Tensor:
    """Return what a tensor of a model holds in training, also while averages are applied."""
    kept = (ema._aside.trained(tensor) for ema in _applied if ema._aside is not None)
    return next((value for value in kept if value is not None), tensor.detach())


def _names_in(tree: Tree, part: str) -> dict[str, str]:
    """Return key of the state dict -> its name in the part, for all that is in the part."""
    prefix = f"{part}." if part else ""
    names = {key: key.removeprefix(prefix) for key in tree.keys if key.startswith(prefix)}
    if part and not names:
        parts = sorted({key.partition(".")[0] for key in tree.keys if "." in key})
        raise ValueError(
            f"the model has no part {part!r} with a state; name a module in it, such as "
            f"{', '.join(map(repr, parts[:8]))}"
        )
    return names


def _found(view: View, name: str) -> Slot:
    slot = view.slot(name)
    if slot is None:
        raise KeyError(name)
    return slot


def _intact(view: View) -> bool:
    """Whether the modules still lead to the tensors that the walk found, and to no others."""
    if sum(map(len, view.dicts)) != view.entries or any(map(_requires_grad, view.frozen)):
        return False
    now = list(map(_get, view.owners, view.keys))
    if all(map(operator.is_, now, view.values)):
        return True
    # FSDP2 registers full copies around a forward: the model's shards can be read all the same.
    read = len(view.tree.links)
    return all(map(operator.is_, now[read:], view.values[read:])) and all(
        a is b or (isinstance(b, Tensor) and engine.unsharded(a, b))
        for a, b in zip(now[:read], view.values[:read], strict=True)
    )


def _by_name(tree: Tree, found: Mapping[nn.Module, batchnorm.Statistics]) -> dict[str, Tensor]:
    """Return the statistics that were found, by the name of the buffer they are for."""
    names = {id(tensor): slot.name for slot in tree.slots for _, _, tensor in slot.places}
    return {
        names[id(tensor)]: value
        for layer, (mean, var) in found.items()
        for tensor, value in ((layer.running_mean, mean), (layer.running_var, var))
    }


def _lazy(name: str, tensor: Tensor, dtype: torch.dtype | None) -> files.Lazy:
    if dtype is None or not engine.is_floating(tensor):
        dtype = tensor.dtype
    elif tensor.is_complex():
        dtype = dtype.to_complex()
    return files.Lazy(dtype, tensor.shape, partial(_cast, name, tensor, dtype))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the whole tensor in a dtype that can hold its values."""
    tensor = engine.whole(tensor)
    cast = tensor.to(dtype)
    if cast is not tensor and engine.nonfinite([cast]) and not engine.nonfinite([tensor]):
        raise ValueError(
            f"{name} has values that {dtype} cannot hold, up to {float(tensor.abs().max()):.3g}; "
            "save with dtype=torch.float32 or torch.bfloat16"
        )
    return cast


def _spelled(spec: Any) -> str:
    try:
        return repr(from_spec(spec))
    except ValueError:
        return str(spec)
