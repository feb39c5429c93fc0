"""PEERS: what else keeps averages, in its newest release, on its fastest settings.

All keep averages of all parameters in float32 at a decay of .999, updated at every call. Nothing of
a peer is changed; what its users would set is set. (With transformers installed diffusers asks it
about DeepSpeed at each tensor.) Each is imported when it is asked for.
"""

# ruff: noqa: D102  (the methods are those of Contender and Swapping)
from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from harness.contender import DECAY, Candidate
from harness.shapes import floating

ROUNDED = "rounds (1 - decay) * weights to bfloat16 before it is added"


class AveragedModel:
    """torch's own."""

    def __init__(self, model: nn.Module) -> None:
        how: dict[str, Any] = {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(DECAY)}
        if _narrow(model):  # which the multi-tensor function refuses beside float32 averages
            how = {"avg_fn": swa_utils.get_ema_avg_fn(DECAY)}
        self._model = model
        self._average = swa_utils.AveragedModel(model, use_buffers=True, **how).float()

    def update(self) -> None:
        self._average.update_parameters(self._model)

    def averages(self) -> dict[str, Tensor]:
        return floating(self._average.module)


class Timm:
    """timm's ModelEmaV3."""

    def __init__(self, model: nn.Module) -> None:
        dtype = torch.float32 if _narrow(model) else None
        self._model = model
        self._average = _timm().ModelEmaV3(model, decay=DECAY, foreach=True, dtype=dtype)

    def update(self) -> None:
        self._average.update(self._model)

    def averages(self) -> dict[str, Tensor]:
        return floating(self._average.module)


class EmaPytorch:
    """ema-pytorch's EMA."""

    def __init__(self, model: nn.Module, foreach: bool) -> None:
        from ema_pytorch import EMA

        narrow = _narrow(model)
        self._average = EMA(
            model,
            copy.deepcopy(model).float() if narrow else None,
            beta=DECAY,
            min_value=DECAY,
            update_after_step=0,
            update_every=1,
            include_online_model=False,
            use_foreach=foreach,
            coerce_dtype=narrow,
        )

    def update(self) -> None:
        self._average.update()

    def averages(self) -> dict[str, Tensor]:
        return floating(self._average.ema_model)


class TorchEma:
    """torch_ema's ExponentialMovingAverage: of parameters alone."""

    def __init__(self, model: nn.Module) -> None:
        from torch_ema import ExponentialMovingAverage

        self._model = model  # which the other only refers to weakly
        self._names = [name for name, _ in model.named_parameters()]
        self._average = ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
        self._average.to(dtype=torch.float32)

    def update(self) -> None:
        self._average.update()

    def averages(self) -> dict[str, Tensor]:
        return _named(self._names, self._average.shadow_params)

    def enter(self) -> None:
        self._average.store()
        self._average.copy_to()

    def leave(self) -> None:
        self._average.restore()
        self._average.collected_params = None  # which it would hold until the next store()


class Diffusers:
    """diffusers' EMAModel: of parameters alone."""

    def __init__(self, model: nn.Module, foreach: bool) -> None:
        from diffusers.training_utils import EMAModel

        self._model = model
        self._names = [name for name, _ in model.named_parameters()]
        self._average = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
        self._average.to(dtype=torch.float32)

    def update(self) -> None:
        self._average.step(self._model.parameters())

    def averages(self) -> dict[str, Tensor]:
        return _named(self._names, self._average.shadow_params)

    def enter(self) -> None:
        self._average.store(self._model.parameters())
        self._average.copy_to(self._model.parameters())

    def leave(self) -> None:
        self._average.restore(self._model.parameters())


class Lightning:
    """Lightning's EMAWeightAveraging, called as its trainer calls it."""

    def __init__(self, model: nn.Module) -> None:
        from lightning.pytorch import LightningModule
        from lightning.pytorch.callbacks import EMAWeightAveraging

        self._module = LightningModule()
        self._module.model = model
        self._trainer: Any = SimpleNamespace(global_step=0)
        self._callback = EMAWeightAveraging(decay=DECAY)
        self._callback.setup(self._trainer, self._module, "fit")
        self._callback._average_model.float()

    def update(self) -> None:
        self._trainer.global_step += 1
        self._callback.on_train_batch_end(self._trainer, self._module, None, None, 0)

    def averages(self) -> dict[str, Tensor]:
        return floating(self._callback._average_model.module.model)

    def enter(self) -> None:
        self._callback.on_validation_epoch_start(self._trainer, self._module)

    def leave(self) -> None:
        self._callback.on_validation_epoch_end(self._trainer, self._module)


class Loop:
    """What many write themselves."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._average = {
            name: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for name, value in model.state_dict().items()
        }

    @torch.no_grad()
    def update(self) -> None:
        for name, value in self._model.state_dict().items():
            if value.is_floating_point():
                self._average[name].mul_(DECAY).add_(value, alpha=1 - DECAY)
            else:
                self._average[name].copy_(value)

    def averages(self) -> dict[str, Tensor]:
        return {n: t for n, t in self._average.items() if t.is_floating_point()}

    def enter(self) -> None:
        self._stored = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)

    def leave(self) -> None:
        self._model.load_state_dict(self._stored)
        del self._stored


CANDIDATES = [
    Candidate(
        "torch AveragedModel",
        AveragedModel,
        "get_ema_multi_avg_fn, use_buffers=True",
        "get_ema_avg_fn (the other refuses), .float()",
        differs=ROUNDED,
        package="torch",
    ),
    Candidate("timm ModelEmaV3", Timm, "foreach=True", "dtype=torch.float32", package="timm"),
    Candidate(
        "ema-pytorch, foreach",
        lambda model: EmaPytorch(model, foreach=True),
        "use_foreach=True, update_every=1",
        "ema_model in float32, coerce_dtype=True",
        package="ema-pytorch",
    ),
    Candidate(
        "ema-pytorch",
        lambda model: EmaPytorch(model, foreach=False),
        "update_every=1",
        "ema_model in float32, coerce_dtype=True",
        package="ema-pytorch",
    ),
    Candidate(
        "torch_ema",
        TorchEma,
        "use_num_updates=False; parameters alone",
        "to(dtype=torch.float32)",
        package="torch-ema",
    ),
    Candidate(
        "diffusers EMAModel, foreach",
        lambda model: Diffusers(model, foreach=True),
        "foreach=True; parameters alone; without transformers installed",
        "to(dtype=torch.float32)",
        package="diffusers",
    ),
    Candidate(
        "diffusers EMAModel",
        lambda model: Diffusers(model, foreach=False),
        "parameters alone; without transformers installed",
        "to(dtype=torch.float32)",
        package="diffusers",
    ),
    Candidate(
        "Lightning EMAWeightAveraging",
        Lightning,
        "the callback's hooks, without a trainer",
        "_average_model.float()",
        differs=ROUNDED,
        package="lightning",
    ),
    Candidate(
        "state_dict loop",
        Loop,
        "mul_ and add_, in place",
        "averages in float32",
        package="torch",
    ),
]


def candidates() -> tuple[list[Candidate], list[str]]:
    """Return the peers that are installed, and the packages that are missing."""
    missing = [package for package in packages() if not _installed(package)]
    return [peer for peer in CANDIDATES if peer.package not in missing], missing


def packages() -> list[str]:
    """Return the packages that the peers are in."""
    return list(dict.fromkeys(peer.package for peer in CANDIDATES))


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _timm() -> ModuleType:
    """Load the one file of timm: all of it needs torchvision, which may not fit this torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("timm is not installed: pip install --no-deps timm")
    path = f"{spec.submodule_search_locations[0]}/utils/model_ema.py"
    found = importlib.util.spec_from_file_location("timm_model_ema", path)
    if found is None or found.loader is None:
        raise ImportError(f"there is no {path}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def _narrow(model: nn.Module) -> bool:
    return next(model.parameters()).dtype != torch.float32


def _named(names: Iterable[str], tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, tensors, strict=True))
