"""PRODUCERS: who wrote a checkpoint, and what is where in it.

A checkpoint is recognized by its content. A file name is a hint only where a producer keeps its
facts in it. No peer is imported, and nothing here guesses, writes, or knows a model: what only a
model can tell is left open, and said to be.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from polyak.checkpoint import Checkpoint, Stored
from polyak.decay import After, Constant, Decay, InverseGamma, PowerLaw, Ramp, from_spec
from polyak.files import LONGEST_HEADER_BYTES, StrPath
from polyak.selection import listed

__all__ = [
    "Content",
    "naming",
    "read_json",
    "recognized",
    "respelled",
    "stripped",
    "under",
]

Tensors: TypeAlias = "Mapping[str, Stored] | Sequence[Stored]"
Plain: TypeAlias = "bool | int | float | str"


@dataclass(frozen=True)
class Content:
    """What a checkpoint is, and what is in it.

    Attributes:
        producer: the program that wrote it.
        sets: every set of tensors in it: `"averages"`, or, of several, such as
            `"averages std=0.05"`; `"weights"`, which are the trained ones. By their names in the
            plain model, or, where the producer keeps no names, as a sequence in the order of
            `model.parameters()`, tied ones once.
        clock: how many updates the averages have seen, as the producer counts; None if it is not
            told.
        decays: name of a set -> the decay that continues it, where the file tells.
        details: what else it tells: counters and settings, by the producer's own words.
        dot: what the names of the averages have for a dot, where only a model can tell.
    """

    producer: str
    sets: Mapping[str, Tensors]
    clock: int | None = None
    decays: Mapping[str, Decay] = field(default_factory=dict)
    details: Mapping[str, Plain] = field(default_factory=dict)
    dot: str = "."

    @property
    def averages(self) -> Tensors | None:
        """The averages, if there is one set of them."""
        return self.sets.get("averages")

    @property
    def weights(self) -> Tensors | None:
        """The trained weights, if they are in it."""
        return self.sets.get("weights")

    @property
    def decay(self) -> Decay | None:
        """The decay that continues the averages, if there is one set of them."""
        return self.decays.get("averages")

    def pick(self, which: str | None = None) -> str:
        """Return the name of the set that is meant: this one, or the only one there is.

        Raises:
            ValueError: there is no such set, or there are several and none is named.
        """
        if which is None and len(self.sets) == 1:
            return next(iter(self.sets))
        if which in self.sets:
            return str(which)
        there = " and ".join(f"{name!r} ({len(held)} tensors)" for name, held in self.sets.items())
        advice = " or ".join(f"which={name!r}" for name in self.sets)
        if which is None:
            raise ValueError(
                f"a checkpoint of {self.producer} with {there}: which of them are meant is not to "
                f"be guessed. Pass {advice}"
            )
        raise ValueError(
            f"a checkpoint of {self.producer} without {which!r}: it has {there}. Pass {advice}"
        )


def recognized(found: Checkpoint, at: str = "") -> Content:
    """Say which program wrote a checkpoint, and what is where in it.

    >>> import tempfile
    >>> import torch
    >>> from polyak import formats
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, f"{folder}/last.pt")
    ...     with formats.opened(f"{folder}/last.pt") as found:
    ...         content = recognized(found)
    >>> content.producer, list(content.sets), dict(content.details)
    ('plain weights', ['weights'], {'epoch': 3})

    Args:
        found: an open checkpoint.
        at: the dotted path of the part of it to look at; by default all of it.

    Raises:
        ValueError: nothing in it is known as weights or averages, or it is known to be of no use.
            The message says what is there.
    """
    facts = found.facts
    tree = found.at(at)
    with naming(found.path):
        if facts and not at and (content := _polyak_file(tree, facts)):
            return content
        for recognizer in _RECOGNIZERS if isinstance(tree, dict) else ():
            if content := recognizer(tree, found.path):
                return content
        raise ValueError(_nothing(tree, at))


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """Let errors say which file they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)!r}: {error}") from None


def under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is under a module, by its names there."""
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}


def stripped(names: Iterable[str]) -> dict[str, str]:
    """Return name -> the same without the names of wrappers."""
    short = {n: ".".join(part for part in n.split(".") if part not in _WRAPPERS) for n in names}
    while short and all(name.startswith("module.") for name in short.values()):
        short = {name: value.removeprefix("module.") for name, value in short.items()}
    return short


def respelled(
    tensors: Mapping[str, Stored], names: Mapping[str, str], dot: str
) -> dict[str, Stored] | None:
    """Return tensors by names of which they have something else for each dot, if all are known.

    Args:
        tensors: by name without dots.
        names: name -> how it was called before the dots were replaced.
        dot: what they were replaced by.
    """
    known: dict[str, list[str]] = {}
    for name, called in names.items():
        known.setdefault(called.replace(".", dot), []).append(name)
    if not tensors.keys() <= known.keys():
        return None
    twice = [f"{name}: {' or '.join(known[name])}" for name in tensors if len(known[name]) > 1]
    if twice:
        raise ValueError(
            f"{len(twice)} names of the averages have no dots and could be several:{listed(twice)}"
            "\nthe program that wrote it mixed these tensors up too: take which='weights'"
        )
    return {known[name][0]: stored for name, stored in tensors.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary that a file of JSON holds; an empty one if it holds none."""
    with path.open("rb") as file:
        return _parsed(file.read(LONGEST_HEADER_BYTES).decode(errors="replace"))


# ------------------------------------------------------------------- an averager's own state


def _polyak_file(tree: Any, facts: Mapping[str, Any]) -> Content | None:
    tensors = _weights(tree)
    if tensors is None:
        return None
    if isinstance(facts.get("averaged"), list):
        return _polyak(facts, tensors)
    converted = facts.get("converted")
    if not isinstance(converted, dict):
        return None
    which = "weights" if converted.get("which") == "weights" else "averages"
    return _polyak({**facts, **converted}, tensors, which)


def _polyak_state(tree: dict[str, Any], path: Path) -> Content | None:
    averages, sheet = _weights(tree.get("averages")), tree.get("facts")
    if averages is None or not isinstance(sheet, str):
        return None
    facts = _parsed(sheet)
    return _polyak(facts, averages) if facts else None


def _polyak(
    facts: Mapping[str, Any], tensors: Mapping[str, Stored], name: str = "averages"
) -> Content:
    decay = _decay(from_spec, facts.get("decay"))
    clock = _count(facts.get("clock"))
    return Content("polyak", {name: tensors}, clock, _told(name, decay), _plain(facts))


def _averaged_model(tree: dict[str, Any], path: Path) -> Content | None:
    tensors = _unwrapped(_weights(tree) or {})
    if "n_averaged" not in tensors:
        return None
    averages = under("module", tensors)
    if not averages or len(averages) != len(tensors) - 1:
        return None
    clock = _count(_scalar(tensors["n_averaged"]))
    return Content("torch AveragedModel", {"averages": _unwrapped(averages)}, clock)


def _torch_ema(tree: dict[str, Any], path: Path) -> Content | None:
    averages = _list(tree.get("shadow_params"))
    if averages is None or not {"decay", "num_updates"} <= tree.keys():
        return None
    collected = _list(tree.get("collected_params"))
    clock = _count(tree["num_updates"])
    decay = _decay(Constant if clock is None else Ramp, tree["decay"])
    sets = _sets(averages, collected)
    return Content("torch_ema", sets, clock, _told("averages", decay), _plain(tree))


def _diffusers_state(tree: dict[str, Any], path: Path) -> Content | None:
    averages = _list(tree.get("shadow_params"))
    if averages is None or "optimization_step" not in tree:
        return None
    return _diffusers("diffusers EMAModel", averages, tree)


def _diffusers(producer: str, averages: Tensors, settings: Mapping[str, Any]) -> Content:
    """Return what diffusers has written, whose decay at step n is that of s = n - after - 1."""
    clock = _count(settings.get("optimization_step"))
    least, limit = settings.get("min_decay", 0.0), settings.get("decay")
    after, warm = settings.get("update_after_step", 0), settings.get("use_ema_warmup", False)
    decay: Decay | None = None
    if type(after) is int and type(warm) is bool and _is_share(least):
        if least == limit:
            decay = _after(after + 1, _decay(Constant, limit))
        elif warm:
            shape = settings.get("power"), settings.get("inv_gamma"), limit
            decay = _after(after, _decay(InverseGamma, *shape))
        else:
            decay = _after(after + 1, _decay(Ramp, limit))
        if decay is not None and least != limit and decay.keep((clock or 0) + 1, 1) < least:
            decay = None  # the floor still holds
    told = _told("averages", decay)
    return Content(producer, {"averages": averages}, clock, told, _plain(settings))


def _after(start: int, decay: Decay | None) -> Decay | None:
    return decay if start == 0 else _decay(After, start, decay)


def _simple_tuner(tree: dict[str, Any], path: Path) -> Content | None:
    found = under("shadow_params", {k: v for k, v in tree.items() if isinstance(k, str)})
    averages = _list([found.get(str(index)) for index in range(len(found))])
    if averages is None or "optimization_step" not in tree:
        return None
    settings = _plain({k: _scalar(v) for k, v in tree.items() if not str(k).startswith("shadow_")})
    clock = _count(settings.get("optimization_step"))
    return Content("SimpleTuner", {"averages": averages}, clock, details=settings)


def _ema_pytorch(tree: dict[str, Any], path: Path) -> Content | None:
    if not all(isinstance(key, str) for key in tree):
        return None
    tensors = _unwrapped({key: value for key, value in tree.items() if isinstance(value, Stored)})
    if not {"initted", "step"} <= tensors.keys():
        return None
    averages = _unwrapped(under("ema_model", tensors))
    weights = _unwrapped(under("online_model", tensors))
    step = _scalar(tensors["step"])
    if not averages:
        if len(tensors) > 2:
            return None
        raise ValueError(
            "the state of ema-pytorch's EMAPytree or EMATensor, which keep their averages in a "
            f"plain attribute: all that was saved is the step, {step}. Where the object still "
            'lives, torch.save(ema.ema_pytree, "averages.pt")'
        )
    sets = _sets(averages, weights)
    settings: dict[str, Plain] = {"initted": bool(_scalar(tensors["initted"]))}
    if not tensors["step"].dtype.is_floating_point:
        return Content("ema-pytorch", sets, _count(step), details=settings)
    # In float16 a step is exact up to 2048 and infinite from 65520 on; the file's name has it too.
    name = re.fullmatch(r"(\d+)\.(\d+)\.pt", path.name)
    if name:
        settings["gamma_idx"] = int(name[1])
    clock = int(name[2]) if name else _count(step)
    if not name and (clock or 0) > 2048:
        clock = None
    return Content("ema-pytorch PostHocEMA", sets, clock, details=settings)


_Recognizer: TypeAlias = "Callable[[dict[str, Any], Path], Content | None]"
_STATES: list[_Recognizer] = [
    _polyak_state,
    _averaged_model,
    _torch_ema,
    _diffusers_state,
    _simple_tuner,
    _ema_pytorch,
]


# ------------------------------------------------------------------------- whole checkpoints


def _state(tree: dict[str, Any], path: Path) -> Content | None:
    return next((found for state in _STATES if (found := state(tree, path))), None)


def _lightning_averaging(tree: dict[str, Any], path: Path) -> Content | None:
    averages = _weights(tree.get("state_dict"))
    weights = _weights(tree.get("current_model_state"))
    counters = tree.get("averaging_state")
    if averages is None or weights is None or not isinstance(counters, dict):
        return None
    clock = _count(_scalar(counters.get("n_averaged")))
    sets = _sets(_unwrapped(averages), _unwrapped(weights))
    callback = _at(tree, "callbacks.EMAWeightAveraging")
    details = _plain(tree) | (_plain(callback) if isinstance(callback, dict) else {})
    return Content("Lightning EMAWeightAveraging", sets, clock, details=details)


def _nemo(tree: dict[str, Any], path: Path) -> Content | None:
    weights, states = _weights(tree.get("state_dict")), tree.get("optimizer_states")
    if weights is None or not isinstance(states, list):
        return None
    keys = {"ema", "every_n_steps"}
    state = next((s for s in states if isinstance(s, dict) and keys <= s.keys()), None)
    if state is None:
        return None
    details = _plain(state)
    averages, groups = _list(state["ema"]), _at(state, "opt.param_groups")
    if len(states) > 1 or not isinstance(groups, list) or len(groups) > 1:
        averages = None
        details["averages"] = "in an optimizer's order, which no model tells: see the -EMA.ckpt"
    decay = _decay(Constant, state.get("decay")) if state["every_n_steps"] == 1 else None
    clock = _count(_scalar(state.get("current_step")))
    sets = _sets(averages, _unwrapped(weights))
    return Content("NeMo", sets, clock, _told("averages", decay), details)


def _mmengine(tree: dict[str, Any], path: Path) -> Content | None:
    """Tell averages from weights, which its EMAHook swaps when it saves, for whoever deploys."""
    averages, beside = _weights(tree.get("state_dict")), _weights(tree.get("ema_state_dict"))
    if averages is None or beside is None or "steps" not in beside:
        return None
    sets = _sets(_unwrapped(averages), _unwrapped(under("module", beside)))
    return Content("mmengine", sets, _count(_scalar(beside["steps"])), details=_plain(tree))


def _composer(tree: dict[str, Any], path: Path) -> Content | None:
    algorithms = _at(tree, "state.algorithms")
    pairs = algorithms if isinstance(algorithms, list) else []
    states = (pair[1] for pair in pairs if isinstance(pair, list) and len(pair) == 2)
    state = next((s for s in states if isinstance(s, dict) and "ema_model" in s), None)
    if state is None:
        return None
    if "training_model" in state or not isinstance(state.get("ema_weights_active"), bool):
        raise ValueError(
            "a checkpoint of a composer before 0.13, which does not say whether its model holds "
            f"the averages: its EMA has {', '.join(map(str, state))}. Load it in that composer and "
            "save the state dict that is meant"
        )
    shadow = {
        **(_weights(_at(state, "ema_model.named_parameters_dict")) or {}),
        **(_weights(_at(state, "ema_model.named_buffers_dict")) or {}),
    }
    inside = _unwrapped(_weights(_at(tree, "state.model")) or {})
    active = state["ema_weights_active"]
    sets = _sets(inside, _unwrapped(shadow)) if active else _sets(_unwrapped(shadow), inside)
    return Content("composer", sets, details=_plain(state)) if sets else None


def _edm2(tree: dict[str, Any], path: Path) -> Content | None:
    stds, emas = _at(tree, "ema.stds"), _at(tree, "ema.emas")
    if not isinstance(stds, list) or not isinstance(emas, list):
        return None
    held = [tensors for tensors in map(_weights, emas) if tensors is not None]
    widths = {std for std in stds if _is_share(std)}
    if not len(held) == len(emas) == len(stds) == len(widths):
        raise ValueError(
            f"a training state of EDM2 with {len(emas)} sets of averages, {len(held)} of them "
            f"tensors by name, of the widths {stds!s:.200}: each takes a number of its own, "
            "between 0 and 1, to be told apart. Pass the place of one, such as at='ema.emas.0': "
            "its width is then not known"
        )
    sets: dict[str, Tensors] = {}
    decays: dict[str, Decay] = {}
    for std, averages in zip(stds, held, strict=True):
        name = f"averages std={std}"
        sets[name] = _unwrapped(averages)
        decays |= _told(name, _decay(PowerLaw, std))
    if weights := _weights(tree.get("net")):
        sets["weights"] = _unwrapped(weights)
    state = tree.get("state")
    details = _plain(state) if isinstance(state, dict) else {}
    return Content("EDM2", sets, _count(details.get("cur_nimg")), decays, details) if sets else None


def _cosmos_predict1(tree: dict[str, Any], path: Path) -> Content | None:
    averages, weights = _weights(tree.get("ema")), _weights(tree.get("model"))
    if averages is None or weights is None or any("." in name for name in averages):
        return None
    if not any("." in name for name in weights):
        return None
    weights = _unwrapped(weights)
    averages, dot = _by_live_names(averages, weights, "-")
    sets = _sets(averages, weights)
    return Content("cosmos predict1", sets, details=_plain(tree), dot=dot)


class _Keys(NamedTuple):
    """A checkpoint that has averages and weights as state dicts at these places."""

    producer: str
    averages: Mapping[str, str]
    weights: str
    clock: str = ""


_KEYS = [
    _Keys("timm", {"averages": "state_dict_ema"}, "state_dict"),
    _Keys("RT-DETR, D-FINE", {"averages": "ema.module"}, "model", "ema.updates"),
    _Keys(
        "fairseq",
        {"averages": "extra_state.ema", "averages float32": "extra_state.ema_fp32_params"},
        "model",
    ),
    _Keys("d2go", {"averages": "ema_state"}, "model"),
    _Keys("I-JEPA, V-JEPA", {"averages": "target_encoder"}, "encoder"),
    _Keys("DINO", {"averages": "teacher"}, "student"),
    _Keys("MAE, ConvNeXt, DeiT", {"averages": "model_ema"}, "model"),
    _Keys("BasicSR", {"averages": "params_ema"}, "params"),
    _Keys("a training script", {"averages": "ema"}, "model"),
]


def _keys(tree: dict[str, Any], path: Path) -> Content | None:
    rows = [row for row in _KEYS if _weights(_at(tree, row.averages["averages"]))]
    places = {name: place for row in rows for name, place in row.averages.items()}
    if len(rows) > 1:  # under several conventions, which of them are meant is to be said
        places = {f"averages {place}": place for row in rows for place in row.averages.values()}
    sets: dict[str, Tensors] = {
        name: _unwrapped(held)
        for name, place in places.items()
        if (held := _weights(_at(tree, place)))
    }
    if not sets:
        return None
    live = next(filter(None, (_weights(_at(tree, row.weights)) for row in rows)), None)
    if weights := _first(tree) if live is None else _unwrapped(live):
        sets["weights"] = weights
    producer = ", ".join(row.producer for row in rows)
    clock = _count(_scalar(_at(tree, rows[0].clock))) if len(rows) == 1 else None
    return Content(producer, sets, clock, details=_plain(tree))


def _states_inside(tree: dict[str, Any], path: Path) -> Content | None:
    """Find averagers' states beside a model's: `{"model": ..., "ema": ema.state_dict()}`."""
    found = dict(_states_under(tree, path))
    if not found:
        return None
    content = _together(found, _first(tree), _plain(tree))
    if list(found) == ["model_ema"] and content.producer == "torch AveragedModel":
        return replace(content, producer="torchvision")
    return content


def _together(
    found: Mapping[str, Content], live: Tensors | None, details: Mapping[str, Plain]
) -> Content:
    """Return what averagers at several places hold, and the weights beside them, as one."""
    sets: dict[str, Tensors] = {}
    decays: dict[str, Decay] = {}
    for place, content in found.items():
        for name, tensors in content.sets.items():
            key = name if len(found) == 1 else f"{name} {place}"
            sets[key] = tensors
            decays |= _told(key, content.decays.get(name))
        if len(found) == 1:
            details = {**details, **content.details}
    if live:
        sets.setdefault("weights", live)
    clocks = {content.clock for content in found.values()}
    producer = ", ".join(dict.fromkeys(content.producer for content in found.values()))
    return Content(producer, sets, clocks.pop() if len(clocks) == 1 else None, decays, details)


def _states_under(
    tree: dict[str, Any], path: Path, prefix: str = "", depth: int = 3
) -> Iterator[tuple[str, Content]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            if content := _state(value, path):
                yield f"{prefix}{key}", content
            elif depth:
                yield from _states_under(value, path, f"{prefix}{key}.", depth - 1)


# ------------------------------------------------------------ averages among a model's own tensors


def _inside(tree: dict[str, Any], path: Path) -> Content | None:
    """Find averages that are part of one state dict, under names of their own."""
    for node in (tree, *_live(tree)):
        if held := _weights(node):
            tensors = _unwrapped(held)
            for recognizer in (_lit_ema, _nequip, _submodule, _prefixed, _momentum):
                if content := recognizer(tensors, node, tree):
                    return content
    return None


def _lit_ema(tensors: dict[str, Stored], node: Any, tree: dict[str, Any]) -> Content | None:
    """Find the averages of LitEma, whose names have no dots."""
    averages = under("model_ema", tensors)
    if not {"decay", "num_updates"} <= averages.keys():
        return None
    limit, updates = _scalar(averages.pop("decay")), _scalar(averages.pop("num_updates"))
    weights = _beside(tensors, "model_ema")
    averages, dot = _by_live_names(averages, weights, "")
    clock = _count(updates)
    decay = _decay(Constant if clock is None else Ramp, limit)
    sets = _sets(averages, weights)
    if not sets:
        return None
    return Content("LitEma", sets, clock, _told("averages", decay), _plain(tree), dot)


_NEQUIP = "ema._extra_state"


def _nequip(tensors: dict[str, Stored], node: Any, tree: dict[str, Any]) -> Content | None:
    state = next((node[n] for n, short in stripped(node).items() if short == _NEQUIP), None)
    found = under("ema", tensors)
    held = _list([found.get(f"ema_weight_{index}") for index in range(len(found))])
    if held is None or not isinstance(state, dict):
        return None
    weights = _beside(tensors, "ema")
    swapped = state.get("is_holding_ema_weights") is False
    sets = _sets(weights, held) if swapped else _sets(held, weights)
    return Content("nequip", sets, _count(_scalar(state.get("num_updates"))), details=_plain(state))


def _submodule(tensors: dict[str, Stored], node: Any, tree: dict[str, Any]) -> Content | None:
    """Find averagers that are parts of the module that was saved."""
    found = {}
    for name in tensors:
        prefix, _, last = name.rpartition(".")
        if prefix and last in ("n_averaged", "initted"):
            state = under(prefix, tensors)
            if content := _averaged_model(state, Path()) or _ema_pytorch(state, Path()):
                found[prefix] = content
    return _together(found, _beside(tensors, *found), {}) if found else None


def _beside(tensors: Mapping[str, Stored], *modules: str) -> dict[str, Stored]:
    """Return what is under none of the modules, by its names in the plain model."""
    theirs = tuple(f"{module}." for module in modules)
    return _unwrapped({name: t for name, t in tensors.items() if not name.startswith(theirs)})


_PREFIXES = [
    ("cosmos predict2", "net_ema", "net"),
    ("DINOv3", "model_ema", "student"),
    ("DINO", "teacher", "student"),
]


def _prefixed(tensors: dict[str, Stored], node: Any, tree: dict[str, Any]) -> Content | None:
    for producer, theirs, live in _PREFIXES:
        averages, weights = under(theirs, tensors), under(live, tensors)
        if averages and weights:
            sets = _sets(_unwrapped(averages), _unwrapped(weights))
            clock = _count(_scalar(tree.get("iteration")))
            return Content(producer, sets, clock, details=_plain(tree))
    return None


def _momentum(tensors: dict[str, Stored], node: Any, tree: dict[str, Any]) -> Content | None:
    """Find momentum encoders, which averages are called by what they are averages of."""
    averages: dict[str, Stored] = {}
    theirs = set()
    for name, stored in tensors.items():
        for prefix, live in (("momentum_", ""), ("teacher_", "student_"), ("teacher_", "")):
            trained = live + name.removeprefix(prefix)
            if name.startswith(prefix) and trained in tensors:
                averages[trained] = stored
                theirs.add(name)
                break
    if not averages:
        return None
    weights = {name: stored for name, stored in tensors.items() if name not in theirs}
    sets = _sets(_unwrapped(averages), _unwrapped(weights))
    return Content("momentum encoder (lightly, solo-learn)", sets, details=_plain(tree))


# ---------------------------------------------------------------- what names and places tell of


def _named_files(tree: dict[str, Any], path: Path) -> Content | None:
    """Recognize plain weights that are averages by where they are, as their producers do."""
    tensors = _first(tree)
    if tensors is None:
        return None
    config = path.parent / "config.json"
    settings = read_json(config) if config.exists() else {}
    if "optimization_step" in settings:
        return _diffusers("diffusers EMAModel", tensors, settings)
    if path.parent.name == "bema" or path.name == "bema.pt":
        details: dict[str, Plain] = {"kind": "bias-corrected, so that it cannot be continued"}
        return Content("TRL BEMA", {"averages": tensors}, details=details)
    if rate := re.fullmatch(r"ema_(0?\.\d+)_(\d{6,})\.pt", path.name):
        decay = _decay(Constant, float(rate[1]))
        clock = int(rate[2])
        return Content("guided-diffusion", {"averages": tensors}, clock, _told("averages", decay))
    if path.name.endswith("-EMA.ckpt") and "pytorch-lightning_version" in tree:
        return Content("NeMo", {"averages": tensors}, details=_plain(tree))
    states = path.parent / "running_states.json"
    beside = states.exists() or (path.parent / "model").is_dir()
    if path.name in ("ema.pt", "ema.safetensors") and beside:
        details = _plain(read_json(states)) if states.exists() else {}
        return Content("Open-Sora", {"averages": tensors}, details=details)
    return None


_LIVE = (
    *("state_dict", "model", "net", "module", "network", "weights", "params", "model_state_dict"),
    *("model_state", "state.model"),
)


def _plain_weights(tree: dict[str, Any], path: Path) -> Content | None:
    tensors = _first(tree)
    if tensors is None:
        return None
    return Content("plain weights", {"weights": tensors}, details=_plain(tree))


def _first(tree: dict[str, Any]) -> dict[str, Stored] | None:
    """Return the tensors of the first state dict that is where such are."""
    found = next(filter(None, map(_weights, (tree, *_live(tree)))), None)
    return None if found is None else _unwrapped(found)


def _live(tree: dict[str, Any]) -> Iterator[Any]:
    for place in _LIVE:
        yield _at(tree, place)


_RECOGNIZERS: list[_Recognizer] = [
    _state,
    _lightning_averaging,
    _nemo,
    _mmengine,
    _composer,
    _edm2,
    _cosmos_predict1,
    _states_inside,
    _keys,
    _inside,
    _named_files,
    _plain_weights,
]


def _nothing(tree: Any, at: str) -> str:
    """Say what is in a tree in which nothing was recognized."""
    places = [f"{place} ({len(held)} tensors)" for place, held in _places(tree, at)]
    if places:
        return (
            "nothing in it is known as averages or weights by its name, but there are tensors at"
            f"{listed(places)}\npass one of these as at=, without the count"
        )
    there = ", ".join(map(str, tree)) if isinstance(tree, dict) else f"a {type(tree).__name__}"
    return (
        f"there are no tensors by name in it; there is {there or 'nothing'}. Pass a checkpoint "
        "with a state dict in it"
    )


def _places(tree: Any, place: str, depth: int = 3) -> Iterator[tuple[str, dict[str, Stored]]]:
    """Yield the dotted paths at which there are state dicts, and these."""
    if isinstance(tree, dict) and depth:
        for key, value in tree.items():
            here = f"{place}.{key}" if place else str(key)
            if tensors := _weights(value):
                yield here, tensors
            elif not str(key).startswith("optimizer"):
                yield from _places(value, here, depth - 1)


# ------------------------------------------------------------------------------ parts of a tree


_COUNTERS = {"decay", "initted", "n_averaged", "num_updates", "step", "steps"}


def _weights(node: Any) -> dict[str, Stored] | None:
    """Return a state dict's tensors: all that is in it, but for the extra state of modules.

    Counters that an averager keeps are no state dict of their own.
    """
    if not isinstance(node, dict):
        return None
    found = {}
    for name, value in node.items():
        if isinstance(name, str) and isinstance(value, Stored):
            found[name] = value
        elif not (isinstance(name, str) and name.endswith("_extra_state")):
            return None
    counters = (not t.shape and n.rpartition(".")[2] in _COUNTERS for n, t in found.items())
    return None if all(counters) else found


def _list(value: Any) -> list[Stored] | None:
    is_list = isinstance(value, list) and all(isinstance(item, Stored) for item in value)
    return value if is_list and value else None


def _at(tree: Any, place: str) -> Any:
    """Return what is at a dotted path of keys, or None."""
    for key in place.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _scalar(value: Any) -> Any:
    """Return a counter as a number, also one that is a tensor."""
    if isinstance(value, Stored):
        return value.read().item() if value.numel() == 1 else None
    return value


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < 2**63 else None  # so neither infinite nor NaN


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1  # so neither infinite nor NaN


def _plain(node: Mapping[Any, Any]) -> dict[str, Plain]:
    """Return the counters and settings of a dictionary."""
    return {
        key: value
        for key, value in node.items()
        if isinstance(key, str)
        and (isinstance(value, (bool, int, float)) or (isinstance(value, str) and len(value) < 200))
    }


def _parsed(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _decay(kind: Callable[..., Decay], *arguments: Any) -> Decay | None:
    """Return a decay, if what a file says makes one."""
    try:
        return kind(*arguments)
    except (TypeError, ValueError, RecursionError):
        return None


def _sets(averages: Tensors | None, weights: Tensors | None) -> dict[str, Tensors]:
    """Return the sets that there are."""
    both = {"averages": averages, "weights": weights}
    return {name: held for name, held in both.items() if held}


def _told(name: str, decay: Decay | None) -> dict[str, Decay]:
    return {} if decay is None else {name: decay}


# ---------------------------------------------------------------------------------------- names

_FLAT = re.compile(r"(^|\.)_?flat_param(_\d+)?$")
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _unwrapped(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Return tensors by their names in the plain model.

    What `torch.compile`, FSDP and activation checkpoints add is dropped wherever it is, since
    nobody calls a module that; `module` only in front and where all have it: it may be a child's
    own name, and then a model tells.
    """
    flat = [name for name in tensors if _FLAT.search(name)]
    if flat:
        raise ValueError(
            f"{len(flat)} of its {len(tensors)} tensors are flat pieces of FSDP1:{listed(flat)}\n"
            "only the processes that wrote them know which parameters these are: load them there, "
            "and save a full state dict"
        )
    names = stripped(tensors)
    if len(set(names.values())) != len(names):
        return dict(tensors)
    return {names[name]: stored for name, stored in tensors.items()}


def _by_live_names(
    averages: Mapping[str, Stored], weights: Mapping[str, Stored], dot: str
) -> tuple[dict[str, Stored], str]:
    """Return averages by the names of the weights, or of what is in `model`, and their dot."""
    short = {name: _without_wrappers(name, dot) for name in averages}
    if len(set(short.values())) == len(short):
        averages = {short[name]: stored for name, stored in averages.items()}
    whole = {name: name for name in weights}
    inner = {name: name.removeprefix("model.") for name in weights}
    try:
        found = respelled(averages, whole, dot) or respelled(averages, inner, dot)
    except ValueError:
        found = None  # which is an error once these are asked for
    return (found, ".") if found else (dict(averages), dot)


def _without_wrappers(name: str, dot: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(f"{wrapper}{dot}", "")
    return name
