"""WRITERS: averages as other programs expect them.

Each format is a function that lays a `Job` out as one program reads it. What a format needs and
was not given is asked for, never made up. Nothing here looks into a program's files, but for the
settings that go on in new ones; files are written through `files` or as atomically, and no peer is
imported.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from polyak import files
from polyak.checkpoint import Stored
from polyak.decay import (
    After,
    Constant,
    Decay,
    DecayLike,
    InverseGamma,
    Ramp,
    as_decay,
    to_spec,
)
from polyak.files import StrPath
from polyak.producers import read_json
from polyak.selection import Tree, by_parameter, listed, named_throughout, parameters_of

__all__ = ["KEEPING_WEIGHTS", "WRITERS", "Job", "read_all", "write"]

Source: TypeAlias = "Stored | Tensor"
_Key = TypeVar("_Key")


def write(
    path: StrPath,
    tensors: Mapping[str, Source] | Sequence[Source],
    to: str,
    *,
    which: str = "averages",
    weights: Mapping[str, Source] | Sequence[Source] | None = None,
    clock: int | None = None,
    decay: float | DecayLike | None = None,
    model: nn.Module | None = None,
    config: StrPath | None = None,
) -> None:
    """Write averages as a program expects them.

    Atomic, as `files.write`. `"safetensors"` and `"diffusers"` are written tensor by tensor; the
    others are files of `torch.save`, for which all tensors are in memory once.

    >>> import tempfile
    >>> from torch import nn
    >>> from torch.optim.swa_utils import AveragedModel
    >>> from polyak import EMA
    >>> model = nn.Linear(2, 1)
    >>> ema = EMA(model, 0.999)
    >>> ema.update()
    >>> averaged = AveragedModel(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write(f"{folder}/swa.pt", ema.model_state_dict(), "averaged-model", clock=ema.clock)
    ...     averaged.load_state_dict(torch.load(f"{folder}/swa.pt"))
    <All keys matched successfully>

    Args:
        path: the file to write or to replace; for `"diffusers"` a folder to make.
        tensors: the averages, by their names in the plain model; or a list in the order of
            `model.parameters()`, which is named by the model.
        to: one of `WRITERS`.
        which: what they are, for the metadata of `"safetensors"`.
        weights: the trained weights, given as the averages are, for programs that keep them
            beside these. Without them Lightning, which needs both, finds the averages in their
            place.
        clock: how many updates the averages have seen, as the program counts.
        decay: for programs that keep it: torch_ema, diffusers.
        model: whose tensors they are. Its parameters are the order of a list without names.
        config: a diffusers `config.json`, or a folder with one, of the model's own arguments.

    Raises:
        ValueError: there is no such format, it needs something that is missing, or cannot express
            the decay.
        OSError: the path cannot be written.
    """
    if to not in WRITERS:
        raise ValueError(f"there is no format {to!r}: pass one of {', '.join(map(repr, WRITERS))}")
    value = None if decay is None else as_decay(decay)
    WRITERS[to](Path(path), Job(tensors, which, weights, clock, value, model, config))


def read_all(tensors: Mapping[_Key, Source]) -> dict[_Key, Tensor]:
    """Read tensors into memory, those that are one only once."""
    read: dict[object, Tensor] = {}
    found = {}
    for name, source in tensors.items():
        if isinstance(source, Stored):
            if source.identity not in read:
                read[source.identity] = source.read()
            found[name] = read[source.identity]
        else:
            found[name] = source.detach().cpu()
    return found


# ------------------------------------------------------------------------- each of the formats


class Job(NamedTuple):
    """What is to be written; see `write`."""

    tensors: Mapping[str, Source] | Sequence[Source]
    which: str
    weights: Mapping[str, Source] | Sequence[Source] | None
    clock: int | None
    decay: Decay | None
    model: nn.Module | None
    config: StrPath | None

    def named(self) -> Mapping[str, Source]:
        """Return the averages by name."""
        return self._by_name(self.tensors)

    def trained(self) -> Mapping[str, Source] | None:
        """Return the weights by name, if there are any."""
        return None if self.weights is None else self._by_name(self.weights)

    def _by_name(self, tensors: Mapping[str, Source] | Sequence[Source]) -> Mapping[str, Source]:
        if isinstance(tensors, Mapping):
            return tensors
        if self.model is None:
            raise ValueError(
                f"this format has names, and {len(tensors)} tensors were given as a list: pass "
                "model=, whose parameters have the names"
            )
        tree = Tree(self.model)
        return named_throughout(by_parameter(tensors, tree), tree)

    def counted(self) -> int:
        """Return the clock, where a program would begin anew without it."""
        if self.clock is not None and 0 < self.clock < 1 << 63:
            return self.clock
        raise ValueError(
            f"this format needs the number of updates that the averages have seen, got "
            f"{self.clock}: without it the program takes the next weights for its first and "
            "overwrites the averages. Pass clock="
        )

    def in_order(self) -> list[Source]:
        """Return the averages in the order of the model's parameters."""
        if not isinstance(self.tensors, Mapping):
            return list(self.tensors)
        if self.model is None:
            raise ValueError(
                "this format is a list in the order of model.parameters(), which names do not "
                f"tell ({len(self.tensors)} are given): pass model="
            )
        tree = Tree(self.model)
        slots = {tree.by_name[n].name: s for n, s in self.tensors.items() if n in tree.by_name}
        names = [name for name, _ in parameters_of(tree)]
        missing = [name for name in names if tree.by_name[name].name not in slots]
        if missing:
            raise ValueError(
                f"{len(missing)} of the model's {len(names)} parameters have no average:"
                f"{listed(missing)}\nthis format has no gaps: add their weights to the averages"
            )
        return [slots[tree.by_name[name].name] for name in names]


def _write_safetensors(path: Path, job: Job) -> None:
    decay = None if job.decay is None else to_spec(job.decay)
    facts: dict[str, files.JSON] = {
        "producer": f"polyak {importlib.metadata.version('polyak')}",
        "converted": {"which": job.which, "clock": job.clock, "decay": decay},
    }
    files.write(path, _lazy(job.named()), facts)


def _write_averaged_model(path: Path, job: Job) -> None:
    tensors = read_all(job.named())
    _save(path, {"n_averaged": torch.tensor(job.counted()), **_prefix("module", tensors)})


def _write_timm(path: Path, job: Job) -> None:
    trained = job.trained()
    weights = {} if trained is None else {"state_dict": read_all(trained)}
    _save(path, {**weights, "state_dict_ema": read_all(job.named())})


def _write_lightning(path: Path, job: Job) -> None:
    averages = read_all(job.named())
    clock, trained = job.counted(), job.trained()
    tree = {
        "epoch": 0,
        "global_step": clock,
        "pytorch-lightning_version": "2.6.0",  # the first with this callback
        "state_dict": averages,
        "current_model_state": averages if trained is None else read_all(trained),
        "averaging_state": {"n_averaged": torch.tensor(clock)},
        "callbacks": {"EMAWeightAveraging": {"latest_update_step": clock}},
        "loops": {},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    _save(path, tree)


def _write_torch_ema(path: Path, job: Job) -> None:
    if isinstance(job.decay, Constant):
        decay, updates = job.decay.decay, None
    elif isinstance(job.decay, Ramp):
        decay, updates = job.decay.limit, job.counted()
    else:
        raise ValueError(
            f"torch_ema keeps its decay in the file and knows no {job.decay!r}: pass decay=0.999 "
            "(or another share), or decay=Ramp(0.999), which is its use_num_updates=True"
        )
    tensors = read_all(dict(enumerate(job.in_order())))
    tree = {"decay": decay, "num_updates": updates, "shadow_params": list(tensors.values())}
    _save(path, {**tree, "collected_params": None})


def _write_ema_pytorch(path: Path, job: Job) -> None:
    counters = {"initted": torch.tensor(True), "step": torch.tensor(job.counted())}
    trained = job.trained()
    weights = {} if trained is None else _prefix("online_model", read_all(trained))
    _save(path, {**counters, **_prefix("ema_model", read_all(job.named())), **weights})


def _write_diffusers(path: Path, job: Job) -> None:
    config: dict[str, Any] = {}
    if job.config is not None:
        given = Path(job.config)
        config = read_json(given / "config.json" if given.is_dir() else given)
        if not config:
            raise ValueError(
                f"{os.fspath(given)!r} is no config.json of diffusers: pass the folder of the "
                "model, such as 'unet'"
            )
    if job.clock is not None:
        config["optimization_step"] = job.clock
    config |= _diffusers_settings(job.decay)
    tensors = _lazy(job.named())
    with files.atomic_folder(path) as folder:
        files.write(folder / "diffusion_pytorch_model.safetensors", tensors)
        with files.atomic(folder / "config.json") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True).encode())


WRITERS: dict[str, Callable[[Path, Job], None]] = {
    "safetensors": _write_safetensors,
    "averaged-model": _write_averaged_model,
    "timm": _write_timm,
    "diffusers": _write_diffusers,
    "lightning": _write_lightning,
    "torch-ema": _write_torch_ema,
    "ema-pytorch": _write_ema_pytorch,
}
"""The formats that `write` knows, by name."""

KEEPING_WEIGHTS = {"timm", "lightning", "ema-pytorch"}
"""Those that have a place for the trained weights beside the averages."""


def _diffusers_settings(decay: Decay | None) -> dict[str, Any]:
    """Return the settings of diffusers' EMAModel that continue a decay."""
    if decay is None:
        return {}
    start, inner = (decay.start, decay.inner) if isinstance(decay, After) else (0, decay)
    settings = {"min_decay": 0.0, "inv_gamma": 1.0, "power": 2 / 3, "use_ema_warmup": False}
    if isinstance(inner, Constant):
        change = {"decay": inner.decay, "min_decay": inner.decay}
        return settings | change | {"update_after_step": start - 1}
    if isinstance(inner, Ramp):
        return settings | {"decay": inner.limit, "update_after_step": start - 1}
    if isinstance(inner, InverseGamma):
        shape = {"decay": inner.limit, "inv_gamma": inner.inv_gamma, "power": inner.power}
        return settings | shape | {"use_ema_warmup": True, "update_after_step": start}
    raise ValueError(
        f"diffusers keeps its decay in config.json and knows no {decay!r}: pass decay=0.999 (or "
        "another share), Ramp(0.999), or InverseGamma(limit=0.999), which is its "
        "use_ema_warmup=True"
    )


def _prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def _lazy(tensors: Mapping[str, Source]) -> dict[str, Tensor | files.Lazy]:
    return {
        name: files.Lazy(source.dtype, source.shape, source.read)
        if isinstance(source, Stored)
        else source
        for name, source in tensors.items()
    }


def _save(path: Path, tree: Mapping[str, Any]) -> None:
    with files.atomic(path) as file:
        try:
            torch.save(tree, file)
        except RuntimeError as error:  # of its own writer, which hides what the system said
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
