"""NAMES: what the tensors of a model are called, which of them are one, and which are averaged.

A `Tree` is one walk over a module: every parameter and buffer under the name it has in the plain
model, whatever wraps the model or its parts, tied tensors once. A *policy* then says what becomes
of each. This file reads modules and never changes one; of tensors it knows what they are called,
whether they are numbers, and which are one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from polyak.engine import is_dense, is_floating, layout, loaded, overlaps_itself, same_layout

__all__ = [
    "Only",
    "Policy",
    "Slot",
    "Tree",
    "Verdict",
    "View",
    "by_parameter",
    "decide",
    "describe",
    "everything",
    "listed",
    "named_throughout",
    "parameters",
    "parameters_of",
    "trainable",
    "unwrap",
]

Verdict = Literal["average", "follow", "leave"]
Policy = Callable[[str, Tensor, nn.Module], Verdict]


class _HasShape(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


_Value = TypeVar("_Value")
_Shaped = TypeVar("_Shaped", bound=_HasShape)


def trainable(name: str, tensor: Tensor, module: nn.Module) -> Verdict:
    """Average what is trained: parameters that require grad, and running statistics.

    The statistics of normalization layers (`running_mean`, `running_var`) are averaged too:
    copied from the last step, they belong to other weights. The rest follows the model: frozen
    parameters, counters, masks, spectral-norm vectors.

    >>> trainable("weight", nn.Linear(2, 2).weight, nn.Linear(2, 2))
    'average'
    """
    if _is_cache(name, tensor, module):
        return "leave"
    if not is_floating(tensor):
        return "follow"
    statistic = _key(name) in ("running_mean", "running_var") and not isinstance(
        tensor, nn.Parameter
    )
    return "average" if tensor.requires_grad or statistic else "follow"


def everything(name: str, tensor: Tensor, module: nn.Module) -> Verdict:
    """Average every floating tensor of the state dict; the rest follows the model.

    >>> everything("num_batches_tracked", nn.BatchNorm1d(2).num_batches_tracked, nn.BatchNorm1d(2))
    'follow'
    """
    if _is_cache(name, tensor, module):
        return "leave"
    return "average" if is_floating(tensor) else "follow"


def parameters(name: str, tensor: Tensor, module: nn.Module) -> Verdict:
    """Average the parameters, and leave buffers alone: a teacher that keeps its own statistics.

    >>> parameters("running_mean", nn.BatchNorm1d(2).running_mean, nn.BatchNorm1d(2))
    'leave'
    """
    return "average" if isinstance(tensor, nn.Parameter) else "leave"


@dataclass(frozen=True)
class Only:
    """A policy for some parts of a model; the rest is left alone.

    >>> only = Only("backbone", "projector")
    >>> only("backbone.weight", nn.Linear(2, 2).weight, nn.Linear(2, 2))
    'average'
    >>> only("predictor.weight", nn.Linear(2, 2).weight, nn.Linear(2, 2))
    'leave'

    Args:
        parts: names of modules or tensors, as in `model.get_submodule(name)`. Each must be there.
        policy: what is done with them; by default `everything`.
    """

    parts: tuple[str, ...]
    policy: Policy = everything

    def __init__(self, *parts: str, policy: Policy = everything) -> None:
        if not parts or not all(isinstance(part, str) and part for part in parts):
            raise TypeError(f"Only takes names of parts, got {parts!r}; write Only('backbone')")
        object.__setattr__(self, "parts", parts)
        object.__setattr__(self, "policy", policy)

    def __call__(self, name: str, tensor: Tensor, module: nn.Module) -> Verdict:
        """Return the inner policy's verdict on what is in one of the parts."""
        inside = any(name == part or name.startswith(f"{part}.") for part in self.parts)
        return self.policy(name, tensor, module) if inside else "leave"

    def __repr__(self) -> str:
        inner = "" if self.policy is everything else f", policy={describe(self.policy)}"
        return f"Only({', '.join(map(repr, self.parts))}{inner})"

    def missing(self, names: Iterable[str]) -> list[str]:
        """Return the parts that none of these tensors is in."""
        names = list(names)
        return [
            part
            for part in self.parts
            if not any(name == part or name.startswith(f"{part}.") for name in names)
        ]


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside DDP, DeepSpeed, `torch.compile` and checkpoint wrappers."""
    while (inner := _inside(module)) is not module:
        module = inner
    return module


@dataclass
class Slot:
    """One tensor of a model: all its names, and every place where it is registered."""

    tensor: Tensor
    names: list[str]
    modules: list[nn.Module]  # the owner under each name
    places: list[tuple[dict[str, Any], str, Tensor]] = field(repr=False)
    persistent: bool

    @property
    def name(self) -> str:
        """The first of its names, by which the average is known."""
        return self.names[0]

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer, not a parameter."""
        return not isinstance(self.tensor, nn.Parameter)


class Tree:
    """One walk over a module, in the order of its state dict.

    Attributes:
        slots: the distinct tensors.
        by_name: name -> slot; a tied tensor is there under each of its names.
        keys: the keys of the plain model's `state_dict()`, in its order.
        extra: key -> function that gives a copy of what stands there in the state dict and is
            never averaged: the extra state of a module, a sparse buffer, a quantized weight.
        modules: every module, each wrapper included.
        links: (dictionary, key, value) that lead to the tensors: while they all hold, so does
            the walk.
    """

    def __init__(self, root: nn.Module) -> None:
        self.slots: list[Slot] = []
        self.by_name: dict[str, Slot] = {}
        self.keys: list[str] = []
        self.extra: dict[str, Callable[[], object]] = {}
        self.modules: list[nn.Module] = []
        self.links: list[tuple[dict[str, Any], str, object]] = []
        self._known: dict[object, Slot] = {}
        self._walk(root, "")

    @property
    def entries(self) -> dict[str, Slot]:
        """The dense tensors of the state dict by their keys, in its order."""
        return {key: self.by_name[key] for key in self.keys if key in self.by_name}

    def _walk(self, module: nn.Module, prefix: str) -> None:
        inner = unwrap(module)
        while module is not inner:
            self.modules.append(module)
            self.links += [(module._modules, key, child) for key, child in module._modules.items()]
            module = _inside(module)
        self.modules.append(module)
        owners: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for owner in owners:
            for key, tensor in owner.items():
                if tensor is not None:
                    self._add(module, owner, prefix + key, key, tensor)
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            self.keys.append(f"{prefix}_extra_state")
            self.extra[self.keys[-1]] = module.get_extra_state
        for key, child in module._modules.items():
            if child is not None:
                self.links.append((module._modules, key, child))
                self._walk(child, f"{prefix}{key}.")

    def _add(
        self, module: nn.Module, owner: dict[str, Any], name: str, key: str, tensor: Tensor
    ) -> None:
        if getattr(tensor, "ds_id", None) is not None:  # how DeepSpeed itself tells
            raise ValueError(
                f"{name} is partitioned by DeepSpeed ZeRO-3, which shows an empty tensor in its "
                "place; averages need the values: train with ZeRO-1 or ZeRO-2, or shard the model "
                "with torch.distributed.fsdp.fully_shard (FSDP2), whose shards are averaged"
            )
        if getattr(tensor, "_st_info", None) is not None:  # how torch itself tells
            raise ValueError(
                f"{name} is a shard of tensor parallelism that DistributedDataParallel has made "
                "look whole; replicate the sharded model with torch.distributed.fsdp.fully_shard("
                "model, mesh=mesh['dp']), under which shards stay known as such"
            )
        if is_lazy(tensor):
            raise ValueError(
                f"{name} has no shape yet (a lazy module); run one forward pass, then build the EMA"
            )
        persistent = key not in module._non_persistent_buffers_set
        if not is_dense(tensor):
            if tensor.requires_grad:
                raise ValueError(
                    f"{name} is trained as a {type(tensor).__name__} in the layout "
                    f"{tensor.layout}, of which averages are not to be had; keep it an ordinary "
                    "dense parameter, or freeze it (requires_grad_(False))"
                )
            if persistent:
                self.keys.append(name)
                self.extra[name] = tensor.clone
            return
        identities = list(_identities(tensor))
        slot = next((self._known[i] for i in identities if i in self._known), None)
        if slot is None:
            slot = Slot(tensor, [], [], [], persistent)
            self.slots.append(slot)
        self._known.update(dict.fromkeys(identities, slot))
        slot.names.append(name)
        slot.modules.append(module)
        slot.places.append((owner, key, tensor))
        slot.persistent |= persistent
        self.links.append((owner, key, tensor))
        self.by_name[name] = slot
        if persistent:
            self.keys.append(name)


def parameters_of(tree: Tree) -> list[tuple[str, Tensor]]:
    """Return what `model.parameters()` gives, in its order and by first name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, slot in tree.by_name.items():
        tensor = slot.places[slot.names.index(name)][2]
        if isinstance(tensor, nn.Parameter):
            found.setdefault(id(tensor), (name, tensor))
    return list(found.values())


def by_parameter(values: Sequence[_Shaped], tree: Tree) -> dict[str, _Shaped]:
    """Return values that are in the order of `model.parameters()` by name.

    Raises:
        ValueError: they are neither of all parameters nor of those that are trained.
    """
    parameters = parameters_of(tree)
    trained = [(name, tensor) for name, tensor in parameters if tensor.requires_grad]
    for chosen in (parameters, trained):
        if [tuple(value.shape) for value in values] == [tuple(t.shape) for _, t in chosen]:
            return {name: value for (name, _), value in zip(chosen, values, strict=True)}
    pairs = [
        f"{index}: {tuple(value.shape)} in the list, {name} {tuple(tensor.shape)} in the model"
        for index, (value, (name, tensor)) in enumerate(zip(values, parameters, strict=False))
        if tuple(value.shape) != tuple(tensor.shape)
    ]
    raise ValueError(
        f"a list of {len(values)} tensors, and the model has {len(parameters)} parameters, "
        f"{len(trained)} of them trained:{listed(pairs)}\n"
        "build the model as it was in training"
    )


def named_throughout(values: Mapping[str, _Value], tree: Tree) -> dict[str, _Value]:
    """Return values with those of tied tensors under each name, in the order of the model."""
    slots = {tree.by_name[name].name: value for name, value in values.items()}
    return {
        name: values.get(name, slots[slot.name])
        for name, slot in tree.by_name.items()
        if slot.name in slots
    }


def decide(tree: Tree, policy: Policy) -> dict[str, Verdict]:
    """Ask the policy about every slot; return name (the slot's first) -> verdict.

    Raises:
        ValueError: the policy says something that is no verdict, or not the same of all the names
            of a tied tensor, or names a part that is not there. All are listed.
    """
    verdicts: dict[str, Verdict] = {}
    wrong = []
    if isinstance(policy, Only):
        wrong += [f"{part}: there is no such part" for part in policy.missing(tree.by_name)]
    for slot in tree.slots:
        owners = zip(slot.names, slot.modules, strict=True)
        said = {name: policy(name, slot.tensor, module) for name, module in owners}
        if len(set(said.values())) > 1:
            wrong.append(f"{said}: one tensor under several names takes one verdict")
        wrong += [
            f"{name}: {verdict!r} is none of {', '.join(get_args(Verdict))}"
            for name, verdict in said.items()
            if verdict not in get_args(Verdict)
        ]
        if "average" in said.values() and not is_floating(slot.tensor):
            wrong.append(f"{slot.name}: {slot.tensor.dtype} has no mean; say 'follow' of it")
        verdicts[slot.name] = said[slot.name]
    if wrong:
        raise ValueError(
            f"the policy {describe(policy)} is unclear:{listed(wrong)}\n"
            "return one of the three words, the same for all names of a tensor, and name parts "
            "that are there"
        )
    return verdicts


class View:
    """A model, and the teacher that holds its averages if there is one, as one walk sees them.

    An average goes by the first name of its tensor: in the teacher if there is one, else in the
    model.

    Attributes:
        tree: the model.
        teacher: the module that holds the averages, or None.
        average: name of an average that the policy wants -> the model's slot that it sees.
        follow: (teacher's slot, model's slot) of what the teacher copies on each update.
        owners, keys, values: while `owner.get(key) is value` for all, so does the walk hold,
        dicts, entries: if these owners together have as many entries as they had,
        frozen: and none of these parameters takes gradients by now.

    Raises:
        ValueError: the policy is unclear, or names, shapes or kinds of teacher and model differ.
            All differences are listed.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module | None, policy: Policy) -> None:
        self.tree = Tree(model)
        self.teacher = None if teacher is None else Tree(teacher)
        self.average: dict[str, Slot] = {}
        self.follow: list[tuple[Slot, Slot]] = []
        links = self.tree.links + (self.teacher.links if self.teacher else [])
        self.owners = [owner for owner, _, _ in links]
        self.keys = [key for _, key, _ in links]
        self.values = [value for _, _, value in links]
        self.dicts = list({id(owner): owner for owner in self.owners}.values())
        self.entries = sum(map(len, self.dicts))
        still = (slot.tensor for slot in self.tree.slots if not slot.is_buffer)
        self.frozen = [tensor for tensor in still if not tensor.requires_grad]
        verdicts = decide(self.tree, policy)
        if self.teacher is None:
            slots = {slot.name: slot for slot in self.tree.slots}
            self.average = {n: s for n, s in slots.items() if verdicts[n] == "average"}
            return
        wrong = list(self._differences(self.teacher, verdicts, decide(self.teacher, policy)))
        if wrong:
            raise ValueError(
                f"teacher and model do not match:{listed(wrong)}\n"
                "build both from the same code (teacher = copy.deepcopy(model)), or let the policy "
                "say 'leave' where they are meant to differ"
            )
        for mine in self.teacher.slots:
            slot = self.slot(mine.name)
            if slot is not None and verdicts[slot.name] == "average":
                self.average[mine.name] = slot
            elif slot is not None and verdicts[slot.name] == "follow":
                self.follow.append((mine, slot))

    def same(self, other: View) -> bool:
        """Whether both walks found the same tensors under the same names."""
        return len(self.values) == len(other.values) and all(
            map(operator.is_, self.values, other.values)
        )

    def slot(self, name: str) -> Slot | None:
        """Return the model's tensor that the average of this name sees, if it is still there."""
        if self.teacher is None:
            return self.tree.by_name.get(name)
        home = self.teacher.by_name.get(name)
        names = home.names if home else [name]
        return next((self.tree.by_name[n] for n in names if n in self.tree.by_name), None)

    def home(self, key: str) -> Slot | None:
        """Return the teacher's tensor of this name."""
        return None if self.teacher is None else self.teacher.by_name.get(key)

    def name(self, key: str) -> str:
        """Return the name of the average that stands for the model's tensor `key`."""
        return (self.home(key) or self.tree.by_name[key]).name

    def _differences(
        self, teacher: Tree, verdicts: dict[str, Verdict], theirs: dict[str, Verdict]
    ) -> Iterator[str]:
        met: dict[str, Slot] = {}
        for slot in self.tree.slots:
            for name in slot.names if verdicts[slot.name] != "leave" else ():
                mine = teacher.by_name.get(name)
                if mine is None:
                    yield f"{name}: not in the teacher"
                elif met.setdefault(mine.name, slot) is not slot:
                    yield f"{name}: tied to {mine.name} in the teacher, not in the model"
                elif {*_identities(mine.tensor)} & {*_identities(slot.tensor)}:
                    yield f"{name}: the same tensor in both; the teacher needs its own"
                elif mine.tensor.shape != slot.tensor.shape:
                    shapes = tuple(mine.tensor.shape), tuple(slot.tensor.shape)
                    yield f"{name}: {shapes[0]} in the teacher, {shapes[1]} in the model"
                elif not same_layout(mine.tensor, slot.tensor):
                    layouts = layout(mine.tensor), layout(slot.tensor)
                    yield f"{name}: {layouts[0]} in the teacher, {layouts[1]} in the model"
                elif is_floating(mine.tensor) != is_floating(slot.tensor):
                    dtypes = mine.tensor.dtype, slot.tensor.dtype
                    yield f"{name}: {dtypes[0]} in the teacher, {dtypes[1]} in the model"
        for mine in teacher.slots:
            for name in mine.names if theirs[mine.name] != "leave" else ():
                if name not in self.tree.by_name:
                    yield f"{name}: only in the teacher"


def describe(policy: Policy) -> str:
    """Return the policy's name for messages and files."""
    return getattr(policy, "__qualname__", repr(policy))


def listed(lines: Iterable[str], most: int = 20) -> str:
    """Return the lines as an indented block, for an error message."""
    lines = list(lines)
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  {line}" for line in lines[:most] + more)


_CHECKPOINT = "torch.distributed.algorithms._checkpoint.checkpoint_wrapper"


def _inside(module: nn.Module) -> nn.Module:
    """Return the module that a wrapper wraps; what is no wrapper itself."""
    module = _checked(module)
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return _checked(module.module)
    if type(module) is loaded("torch._dynamo.eval_frame", "OptimizedModule"):
        return _checked(module._orig_mod)
    if isinstance(module, loaded(_CHECKPOINT, "ActivationWrapper") or ()):
        return _checked(module._checkpoint_wrapped_module)
    if isinstance(module, loaded("deepspeed.runtime.engine", "DeepSpeedEngine") or ()):
        return _checked(module.module)
    return module


def _checked(module: object) -> nn.Module:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module, got {type(module).__name__}; pass the model itself, not "
            "its parameters or its state dict"
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{type(module).__name__} is a scripted module, whose tensors cannot be followed; "
            "build the EMA from the module before torch.jit.script"
        )
    fsdp1 = loaded("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel")
    if fsdp1 is not None and isinstance(module, fsdp1):
        raise TypeError(
            "FullyShardedDataParallel (FSDP1) holds flat pieces of its parameters: they have no "
            "shape of their own, what is written into them after a validation is ignored by the "
            "next forward, and checkpoints mix the pieces of different processes. Shard the model "
            "with torch.distributed.fsdp.fully_shard (FSDP2), which loads FSDP1's sharded "
            "checkpoints; or average a plain copy that loads the full state dict every k steps, at "
            "the cost of gathering the whole model each time"
        )
    return module


def _identities(tensor: Tensor) -> Iterator[object]:
    """What makes two registered tensors one: the object, or the very same memory."""
    yield id(tensor)
    if type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.data_ptr():
        # An empty tensor has no memory, and some devices do not tell: then only the object counts.
        yield tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _is_cache(name: str, tensor: Tensor, module: nn.Module) -> bool:
    """Whether a module makes it for itself: not in the state dict, or an expanded constant."""
    return overlaps_itself(tensor) or _key(name) in module._non_persistent_buffers_set


def _key(name: str) -> str:
    return name.rpartition(".")[2]
