"""formats.py: what a peer wrote is read as what it is; what is written for a peer, it loads.

Where a peer is installed its own code writes and loads the files. Its tests skip where it is not.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import os
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import polyak
from models import bit_identical, convolutional, frozen, nested, plain, scramble_, tied, walk_
from polyak import EMA, files
from polyak.decay import After, Constant, Decay, InverseGamma, PowerLaw, Ramp, Uniform
from polyak.formats import (
    WRITERS,
    Averages,
    convert,
    load_averages,
    opened,
    recognized,
    write,
)

U = 2.0**-24  # half the distance of 1 to the next float32


@contextmanager
def quiet() -> Iterator[None]:
    """A peer's own warnings are not of interest here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peer(name: str) -> ModuleType:
    """Import a peer, or skip."""
    with quiet():
        return pytest.importorskip(name, reason=f"{name} is not installed")


def timm() -> ModuleType:
    """Load timm's one file: all of it needs torchvision, which may not fit this torch."""
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("timm is not installed")
    path = f"{spec.submodule_search_locations[0]}/utils/model_ema.py"
    found = importlib.util.spec_from_file_location("timm_model_ema", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters, tied ones under each name."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: tensor.detach().clone() for name, tensor in named}


def other(model: nn.Module, seed: int = 9) -> dict[str, Tensor]:
    """Values that differ from the model's in every floating tensor, tied ones alike."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[int, Tensor] = {}
    values = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in made:
            noise = torch.randn(tensor.shape, generator=generator)
            made[tensor.data_ptr()] = noise if tensor.is_floating_point() else tensor + 3
        values[name] = made[tensor.data_ptr()]
    return values


def save(tree: Any, path: Path) -> Path:
    torch.save(tree, path)
    return path


def sets(path: Path) -> dict[str, dict[str, Tensor]]:
    """Every named set in a file, read."""
    with opened(path) as found:
        content = recognized(found)
    return {name: dict(load_averages(path, which=name)) for name in content.sets}


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor], updates: int, each: float) -> bool:
    """Whether averages agree but for a relative error of `each` (in U) that an update may make.

    An update is a weighted mean: it does not enlarge the errors that were there before.
    """
    return a.keys() == b.keys() and all(
        (a[n] - b[n]).abs().max() <= updates * each * U * max(1.0, float(b[n].abs().max()))
        for n in a
        if a[n].is_floating_point()
    )


# ---------------------------------------------------------------------------- torch AveragedModel


def averaged(model: nn.Module, decay: float = 0.9, updates: int = 5) -> AveragedModel:
    made = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for seed in range(updates):
        made.update_parameters(walk_(model, seed))
    return made


@pytest.mark.parametrize("build", [plain, convolutional, tied, nested])
def test_averaged_model_is_read_and_written(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Its state dict loads under the model's names, whatever these are, and the other way round."""
    model = build()
    theirs = averaged(model)
    path = save(theirs.state_dict(), tmp_path / "theirs.pt")
    for given in (None, model, nn.DataParallel(model)):
        ours = load_averages(path, given)
        assert bit_identical(ours, state(theirs.module))
        assert (ours.producer, ours.clock, ours.decay) == ("torch AveragedModel", 5, None)

    again = AveragedModel(build())
    write(tmp_path / "ours.pt", ours, "averaged-model", clock=ours.clock)
    again.load_state_dict(torch.load(tmp_path / "ours.pt"))
    assert bit_identical(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "module.module.", "_orig_mod.module."])
def test_averaged_model_of_a_wrapped_model(prefix: str, tmp_path: Path) -> None:
    """What compile and DDP add to the names is dropped. The layout is built from the table."""
    model = convolutional()
    counter = "n_averaged" if prefix.startswith("module") else "_orig_mod.n_averaged"
    named = {prefix + name: tensor for name, tensor in state(model).items()}
    path = save({counter: torch.tensor(3), **named}, tmp_path / "a.pt")
    assert bit_identical(load_averages(path, model), state(model))
    assert bit_identical(load_averages(path), state(model))


class Only(nn.Module):
    """A model whose only child is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)


def test_a_child_called_module_keeps_its_name_where_the_model_tells(tmp_path: Path) -> None:
    """Without a model `module` in front of all is a wrapper; with it, whatever it is there."""
    model = Only()
    path = save(averaged(model).state_dict(), tmp_path / "a.pt")
    assert set(load_averages(path, model)) == {"module.weight", "module.bias"}
    assert set(load_averages(path)) == {"weight", "bias"}
    path = save({"state_dict": {f"module.{n}": t for n, t in state(model).items()}}, path)
    assert set(load_averages(path, model)) == {"module.weight", "module.bias"}


@pytest.mark.parametrize(
    ("use_buffers", "policy"), [(True, polyak.everything), (False, polyak.parameters)]
)
def test_continuing_an_averaged_model(use_buffers: bool, policy: Any, tmp_path: Path) -> None:
    """A run that began with AveragedModel goes on with polyak as it would have, bit for bit."""
    model = convolutional()
    function = get_ema_multi_avg_fn(0.9)
    theirs = AveragedModel(model, multi_avg_fn=function, use_buffers=use_buffers)
    for seed in range(5):
        theirs.update_parameters(walk_(model, seed))
    averages = load_averages(save(theirs.state_dict(), tmp_path / "a.pt"), model)
    ema = EMA(model, 0.9, policy=policy)
    ema.start_from(averages, averages.clock)
    assert ema.clock == 5
    for seed in range(100, 110):
        scramble_(model, seed)
        theirs.update_parameters(model)
        ema.update()
    assert bit_identical(ema.model_state_dict(), state(theirs.module))


def test_continuing_averages_of_tied_weights(tmp_path: Path) -> None:
    """A tied tensor that is there under each of its names is one average."""
    model = tied()
    theirs = averaged(model, 0.9)
    averages = load_averages(save(theirs.state_dict(), tmp_path / "a.pt"), model)
    ema = EMA(model, 0.9)
    ema.start_from(averages, 5)
    assert bit_identical(ema.model_state_dict(), state(theirs.module))


def test_continuing_a_uniform_average(tmp_path: Path) -> None:
    """AveragedModel's own default is Uniform. Its form x + (y - x) / n takes three roundings."""
    model = plain()
    theirs = AveragedModel(model)
    for seed in range(5):
        theirs.update_parameters(walk_(model, seed))
    averages = load_averages(save(theirs.state_dict(), tmp_path / "a.pt"), model)
    ema = EMA(model, Uniform())
    ema.start_from(averages, averages.clock)
    for seed in range(100, 110):
        walk_(model, seed)
        theirs.update_parameters(model)
        ema.update()
    assert close(dict(ema.averages), state(theirs.module), updates=10, each=8)


def test_torchvision_keeps_an_averaged_model_beside_the_weights(tmp_path: Path) -> None:
    """Both sets are found, under one clock. torchvision is not needed: the averager is torch's."""
    model = convolutional()
    theirs = averaged(model)
    tree = {"model": model.state_dict(), "model_ema": theirs.state_dict(), "epoch": 4}
    path = save(tree, tmp_path / "checkpoint.pth")
    with opened(path) as found:
        content = recognized(found)
    assert (content.producer, content.clock) == ("torchvision", 5)
    assert content.details["epoch"] == 4
    assert bit_identical(sets(path), {"averages": state(theirs.module), "weights": state(model)})


# ------------------------------------------------------------------------------------------ timm


def test_timm_is_read_and_written(tmp_path: Path) -> None:
    """Its saver puts `module.state_dict()` at `state_dict_ema`; so does the file that we write.

    The averages are made by timm's own class; the layout around them is built from the table.
    """
    model = convolutional()
    theirs = timm().ModelEmaV3(model, decay=0.9)
    for seed in range(3):
        theirs.update(walk_(model, seed))
    tree = {
        "epoch": 3,
        "arch": "resnet18",
        "version": 2,
        "state_dict": model.state_dict(),
        "state_dict_ema": theirs.module.state_dict(),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1).state_dict(),
        "metric": 71.5,
    }
    path = save(tree, tmp_path / "checkpoint-3.pth.tar")
    assert bit_identical(sets(path), {"averages": state(theirs.module), "weights": state(model)})
    content = convert(path, tmp_path / "ours.pth.tar", "timm", which="averages")
    assert content.producer == "timm"
    ours = torch.load(tmp_path / "ours.pth.tar")
    again = timm().ModelEmaV3(convolutional(1))
    again.module.load_state_dict(ours["state_dict_ema"])
    assert bit_identical(state(again.module), state(theirs.module))
    assert bit_identical(ours["state_dict"], state(model))


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        ({"decay": 0.9}, Constant(0.9)),
        ({"decay": 0.9, "use_warmup": True}, InverseGamma(limit=0.9)),
        (
            {"decay": 0.9, "use_warmup": True, "update_after_step": 3, "warmup_gamma": 2.0},
            After(3, InverseGamma(limit=0.9, inv_gamma=2.0)),
        ),
        ({"decay": 0.9, "update_after_step": 3}, After(4, 0.9)),
    ],
)
@pytest.mark.parametrize("before", [2, 6])
def test_continuing_timm(
    settings: dict[str, Any], decay: Decay, before: int, tmp_path: Path
) -> None:
    """ModelEmaV3 with its steps goes on bit for bit: everything is averaged, by lerp."""
    model = convolutional()
    theirs = timm().ModelEmaV3(model, **settings)
    for step in range(1, before + 1):
        theirs.update(walk_(model, step), step=step)
    path = save({"state_dict_ema": theirs.module.state_dict()}, tmp_path / "a.pth.tar")
    ema = EMA(model, decay, policy=polyak.everything)
    ema.start_from(load_averages(path, model), before)
    for step in range(before + 1, before + 10):
        walk_(model, step)
        theirs.update(model, step=step)
        ema.update(step)
    floating = {n: t for n, t in state(theirs.module).items() if t.is_floating_point()}
    assert bit_identical(dict(ema.averages), floating)


# ------------------------------------------------------------------------------------- torch_ema


@pytest.mark.parametrize("use_num_updates", [True, False])
@pytest.mark.parametrize("build", [plain, convolutional, tied, nested])
def test_torch_ema_is_read_and_written(
    build: Callable[[], nn.Module], use_num_updates: bool, tmp_path: Path
) -> None:
    """A list in the order of the parameters gets its names from the model, tied ones once."""
    module, model = peer("torch_ema"), build()
    theirs = module.ExponentialMovingAverage(model.parameters(), 0.95, use_num_updates)
    for seed in range(4):
        walk_(model, seed)
        theirs.update()
    with theirs.average_parameters():
        expected = parameters(model)
    theirs.collected_params = None
    path = save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = load_averages(path, model)
    assert bit_identical(ours, expected)
    assert ours.clock == (4 if use_num_updates else None)
    assert ours.decay == (Ramp(0.95) if use_num_updates else Constant(0.95))

    write(tmp_path / "ours.pt", ours, "torch-ema", clock=4, decay=ours.decay, model=model)
    again = module.ExponentialMovingAverage(build().parameters(), 0.5)
    again.load_state_dict(torch.load(tmp_path / "ours.pt"))
    assert bit_identical(again.state_dict(), theirs.state_dict())
    convert(path, tmp_path / "without.pt", "torch-ema")  # a list stays one without a model
    assert bit_identical(torch.load(tmp_path / "without.pt"), theirs.state_dict())


@pytest.mark.parametrize("use_num_updates", [True, False])
def test_continuing_torch_ema(use_num_updates: bool, tmp_path: Path) -> None:
    """Its form x - (1 - d) (x - y) takes three roundings, ours at most as many."""
    module, model = peer("torch_ema"), plain()
    theirs = module.ExponentialMovingAverage(model.parameters(), 0.8, use_num_updates)
    for seed in range(4):
        walk_(model, seed)
        theirs.update()
    averages = load_averages(save(theirs.state_dict(), tmp_path / "a.pt"), model)
    assert averages.decay is not None
    ema = EMA(model, averages.decay, policy=polyak.parameters)
    ema.start_from(averages, averages.clock or 4)
    for seed in range(100, 140):
        walk_(model, seed)
        theirs.update()
        ema.update()
    with theirs.average_parameters():
        expected = parameters(model)
    assert close(dict(ema.averages), expected, updates=40, each=8)


def test_another_decay_would_be_seen() -> None:
    """`close` tells a run from one with another decay, or without its clock."""
    model = plain()
    runs = [EMA(model, decay) for decay in (Ramp(0.8), Constant(0.8), Ramp(0.8))]
    for seed in range(20):
        walk_(model, seed)
        runs[0].update()
        runs[1].update()
        runs[2].update(2 * seed + 1)
    right, *wrong = (dict(ema.averages) for ema in runs)
    assert close(right, right, updates=20, each=0)
    assert not any(close(other, right, updates=40, each=16) for other in wrong)


def test_torch_ema_in_the_middle_of_a_swap_holds_both(tmp_path: Path) -> None:
    """What `store` kept is a second set, and which is meant has to be said."""
    module, model = peer("torch_ema"), plain()
    theirs = module.ExponentialMovingAverage(model.parameters(), 0.9)
    walk_(model, 1)
    theirs.update()
    theirs.store()
    path = save({"ema": theirs.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'averages' \(4 tensors\) and 'weights' \(4 tensors\)"):
        load_averages(path, model)
    assert bit_identical(load_averages(path, model, which="weights"), parameters(model))


# ------------------------------------------------------------------------------------- diffusers

DIFFUSERS = [
    ({"decay": 0.9}, After(1, Ramp(0.9))),
    ({"decay": 0.9, "update_after_step": 3}, After(4, Ramp(0.9))),
    ({"decay": 0.9, "min_decay": 0.9}, After(1, Constant(0.9))),
    ({"decay": 0.9, "use_ema_warmup": True, "inv_gamma": 2.0}, InverseGamma(2 / 3, 2.0, 0.9)),
    (
        {"decay": 0.9, "use_ema_warmup": True, "power": 0.75, "update_after_step": 2},
        After(2, InverseGamma(0.75, 1.0, 0.9)),
    ),
]


@pytest.mark.parametrize(("settings", "decay"), DIFFUSERS)
def test_continuing_diffusers(settings: dict[str, Any], decay: Decay, tmp_path: Path) -> None:
    """The decay is read off the settings. Its form x - (1 - d) (x - y) takes three roundings."""
    training, model = peer("diffusers.training_utils"), convolutional()
    theirs = training.EMAModel(model.parameters(), **settings)
    for seed in range(5):
        theirs.step(walk_(model, seed).parameters())
    path = save(theirs.state_dict(), tmp_path / "custom_checkpoint_0.pkl")
    averages = load_averages(path, model)
    assert (averages.producer, averages.clock) == ("diffusers EMAModel", 5)
    assert averages.decay == decay
    assert bit_identical(list(averages.values()), [t.detach() for t in theirs.shadow_params])
    ema = EMA(model, averages.decay, policy=polyak.parameters)
    ema.start_from(averages, averages.clock)
    for seed in range(100, 140):
        walk_(model, seed)
        theirs.step(model.parameters())
        ema.update()
    theirs.copy_to(model.parameters())
    assert close(dict(ema.averages), parameters(model), updates=40, each=8)


def test_a_floor_of_diffusers_that_still_holds_is_no_decay_of_ours(tmp_path: Path) -> None:
    """Where min_decay is above the ramp the decay is unknown, later it is not. Built by hand."""
    settings = {"decay": 0.99, "min_decay": 0.5, "update_after_step": 0, "use_ema_warmup": False}
    tree = {**settings, "inv_gamma": 1.0, "power": 2 / 3, "shadow_params": [torch.ones(2)]}
    for step, decay in ((3, None), (50, After(1, Ramp(0.99)))):
        path = save({**tree, "optimization_step": step}, tmp_path / "a.pt")
        with opened(path) as found:
            content = recognized(found)
        assert content.decay == decay
        assert content.details["min_decay"] == 0.5


def test_a_diffusers_folder_is_read_and_written(tmp_path: Path) -> None:
    """`save_pretrained` of the EMA is read with its settings, and `from_pretrained` reads ours."""
    training = peer("diffusers.training_utils")
    models, configs = peer("diffusers.models.modeling_utils"), peer("diffusers.configuration_utils")

    class Net(models.ModelMixin, configs.ConfigMixin):  # type: ignore[name-defined,misc]
        config_name = "config.json"

        @configs.register_to_config
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.first = nn.Linear(width, 4)
            self.second = nn.Linear(4, 2)

    model = Net(width=5)
    theirs = training.EMAModel(
        model.parameters(), decay=0.9, model_cls=Net, model_config=model.config
    )
    for seed in range(5):
        theirs.step(walk_(model, seed).parameters())
    theirs.save_pretrained(tmp_path / "unet_ema")
    ours = load_averages(tmp_path / "unet_ema", model)
    assert (ours.producer, ours.clock) == ("diffusers EMAModel", 5)
    assert ours.decay == After(1, Ramp(0.9))
    assert bit_identical(list(ours.values()), [t.detach() for t in theirs.shadow_params])

    model.save_config(tmp_path / "unet")
    for decay in (ours.decay, Constant(0.9), InverseGamma(limit=0.9), None):
        folder = tmp_path / type(decay).__name__
        write(folder, ours, "diffusers", clock=ours.clock, decay=decay, config=tmp_path / "unet")
        with quiet():
            again = training.EMAModel.from_pretrained(folder, Net)
        assert again.optimization_step == 5
        assert again.model_config["width"] == 5
        assert bit_identical(
            [t.detach() for t in again.shadow_params], [t.detach() for t in theirs.shadow_params]
        )
        if decay is not None:
            steps = range(1, 60)
            assert [again.get_decay(n) for n in steps] == [decay.keep(n, 1) for n in steps]
            assert load_averages(folder, model).decay == decay
    convert(tmp_path / "unet_ema", tmp_path / "copy", "diffusers")  # with the config beside it
    with quiet():
        again = training.EMAModel.from_pretrained(tmp_path / "copy", Net)
    assert again.model_config["width"] == 5
    assert bit_identical(again.shadow_params, theirs.shadow_params)


@pytest.mark.parametrize("before", [1, 4])
def test_diffusers_goes_on_with_a_constant_decay(before: int, tmp_path: Path) -> None:
    """What is written with `Constant` EMAModel continues at that decay, also its second step.

    Its form x - (1 - d) (x - y) takes three roundings.
    """
    training, model = peer("diffusers.training_utils"), convolutional()
    ema = EMA(model, 0.9, policy=polyak.parameters)
    for seed in range(before):
        walk_(model, seed)
        ema.update()
    averages, folder = dict(ema.averages), tmp_path / "ema"
    write(folder, averages, "diffusers", clock=before, decay=ema.decay)
    assert load_averages(folder, model).decay == Constant(0.9)
    theirs = training.EMAModel([nn.Parameter(tensor) for tensor in averages.values()])
    theirs.load_state_dict(json.loads((folder / "config.json").read_text()))
    for seed in range(100, 140):
        walk_(model, seed)
        theirs.step(model.parameters())
        ema.update()
    theirs.copy_to(model.parameters())
    assert close(dict(ema.averages), parameters(model), updates=40, each=8)


@pytest.mark.parametrize(
    "decay", [Uniform(), polyak.Debiased(0.9), PowerLaw(0.1), After(3, Uniform())]
)
def test_a_decay_that_diffusers_does_not_have_is_refused(decay: Decay, tmp_path: Path) -> None:
    """EMAModel would go on with its default, which is another average."""
    with pytest.raises(
        ValueError, match=r"diffusers keeps its decay.*knows no .*pass decay=0\.999"
    ):
        write(tmp_path / "ema", other(plain()), "diffusers", decay=decay)
    assert not (tmp_path / "ema").exists()


@pytest.mark.parametrize(
    "change",
    [
        *({"min_decay": value} for value in (math.nan, math.inf, -math.inf, 10**400, True, None)),
        *({"use_ema_warmup": value} for value in (math.nan, "x", None)),
        *({"decay": math.nan}, {"decay": math.inf}, {"update_after_step": math.nan}),
        {"use_ema_warmup": True, "power": math.nan},
        {"use_ema_warmup": True, "inv_gamma": math.inf},
    ],
)
def test_settings_of_diffusers_that_mean_nothing_are_no_decay(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Where a setting is no finite number of its range the decay is unknown. Built by hand."""
    settings = {"decay": 0.99, "min_decay": 0.0, "update_after_step": 0, "use_ema_warmup": False}
    tree = {**settings, "inv_gamma": 1.0, "power": 2 / 3, "optimization_step": 9}
    path = save({**tree, "shadow_params": [torch.ones(2)]}, tmp_path / "a.pt")
    for given, told in ((tree, True), ({**tree, **change}, False)):
        save({**given, "shadow_params": [torch.ones(2)]}, path)
        with opened(path) as found:
            assert (recognized(found).decay is not None) == told


# ----------------------------------------------------------------------------------- ema-pytorch


@pytest.mark.parametrize("online", [True, False])
@pytest.mark.parametrize("build", [convolutional, tied, nested])
def test_ema_pytorch_is_read_and_written(
    build: Callable[[], nn.Module], online: bool, tmp_path: Path
) -> None:
    """Its state dict holds the trained model too, or not."""
    module, model = peer("ema_pytorch"), build()
    theirs = module.EMA(model, update_every=1, update_after_step=0, include_online_model=online)
    for seed in range(4):
        walk_(model, seed)
        theirs.update()
    path = save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = load_averages(path, model, which="averages")
    assert (ours.producer, ours.clock) == ("ema-pytorch", 4)
    assert bit_identical(ours, state(theirs.ema_model))
    expected = {"averages": ours, "weights": state(model)} if online else {"averages": ours}
    assert bit_identical(sets(path), expected)

    convert(path, tmp_path / "ours.pt", "ema-pytorch", which="averages")
    again = module.EMA(build(), include_online_model=online)
    again.load_state_dict(torch.load(tmp_path / "ours.pt"))
    assert bit_identical(again.state_dict(), theirs.state_dict())


@pytest.mark.parametrize(("after", "every"), [(0, 1), (7, 1), (6, 2), (100, 10)])
def test_continuing_ema_pytorch(after: int, every: int, tmp_path: Path) -> None:
    """The clock counts its mixings; the decay it computes in float32.

    It mixes at the calls 1, 1 + every, 1 + 2 every, ..., so after n calls it has ceil(n / every).
    """
    module, model = peer("ema_pytorch"), plain()
    theirs = module.EMA(
        model, beta=0.95, inv_gamma=2.0, update_after_step=after, update_every=every
    )
    calls = 3 * every
    for seed in range(calls):
        walk_(model, seed)
        theirs.update()
    path = save(theirs.state_dict(), tmp_path / "a.pt")
    averages = load_averages(path, model, which="averages")
    assert averages.clock == calls
    decay = After(after // every, InverseGamma(inv_gamma=2.0 / every, limit=0.95))
    ema = EMA(model, decay, policy=polyak.everything)
    ema.start_from(averages, -(-averages.clock // every))
    for call in range(calls, calls + 30 * every):
        walk_(model, 100 + call)
        theirs.update()
        if call % every == 0:
            ema.update()
    # Its decay is off by 5 U (power, difference), which moves the mean by 5 U |x - y|, at most 10 U
    # of the largest value; a lerp takes up to 3 roundings, theirs and ours.
    assert close(dict(ema.averages), state(theirs.ema_model), updates=30, each=16)


def test_ema_pytorch_post_hoc(tmp_path: Path) -> None:
    """A float16 step is believed where it is exact, and else read off the name. Built by hand."""
    model = plain()
    held = {f"ema_model.{name}": tensor.half() for name, tensor in state(model).items()}
    for name, step, clock in (
        ("1.70000.pt", math.inf, 70000),
        ("a.pt", 100.0, 100),
        ("b.pt", 5000.0, None),
    ):
        counters = {"initted": torch.tensor(1.0).half(), "step": torch.tensor(step).half()}
        ours = load_averages(save({**counters, **held}, tmp_path / name), model)
        assert (ours.producer, ours.clock) == ("ema-pytorch PostHocEMA", clock)
        assert ours["head.bias"].dtype == torch.float16


def test_ema_pytorch_post_hoc_by_its_own_code(tmp_path: Path) -> None:
    """What its checkpoints hold is read with the step and the index of their names."""
    module, model = peer("ema_pytorch"), plain()
    theirs = module.PostHocEMA(
        model,
        sigma_rels=(0.05, 0.2),
        update_every=1,
        checkpoint_every_num_steps=4,
        checkpoint_folder=tmp_path,
    )
    for seed in range(4):
        walk_(model, seed)
        theirs.update()
    paths = sorted(tmp_path.glob("*.pt"))
    assert len(paths) == 2
    for index, path in enumerate(paths):
        ours = load_averages(path, model)
        expected = {n: t.half() for n, t in state(theirs.ema_models[index].ema_model).items()}
        assert bit_identical(ours, expected)
        assert ours.details["gamma_idx"] == index
        assert ours.clock == int(path.stem.split(".")[1])


def test_ema_pytorch_saves_no_pytree(tmp_path: Path) -> None:
    """A state that has lost its averages is refused with what would have kept them."""
    tree = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    for nested_tree in (tree, {"ema": tree}):
        path = save(nested_tree, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"all that was saved is the step, 9.*ema\.ema_pytree"):
            load_averages(path)


# ------------------------------------------------------------------------------------- Lightning


def test_lightning_is_read_and_written(tmp_path: Path) -> None:
    """A Trainer's checkpoint with EMAWeightAveraging holds both sets; so does the one we write."""
    lightning = peer("lightning.pytorch")
    callbacks = peer("lightning.pytorch.callbacks")

    class Module(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = convolutional()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.model(batch).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Module(), callbacks.EMAWeightAveraging(decay=0.9)
    path = tmp_path / "last.ckpt"
    expected = {}

    class Saver(callbacks.Callback):  # type: ignore[name-defined,misc]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            trainer.save_checkpoint(path)
            expected["averages"] = state(callback._average_model.module)
            expected["weights"] = state(module)

    with quiet():
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[callback, Saver()],
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=4))
    ours = load_averages(path, module, which="averages")
    assert (ours.producer, ours.clock) == ("Lightning EMAWeightAveraging", 3)
    assert bit_identical(sets(path), expected)
    inner = load_averages(path, module.model, which="averages", part="model")
    assert bit_identical(inner, {n.removeprefix("model."): t for n, t in ours.items()})

    convert(path, tmp_path / "ours.ckpt", "lightning", which="averages")
    again, fresh = callbacks.EMAWeightAveraging(decay=0.9), Module()
    with quiet():
        loaded = Module.load_from_checkpoint(tmp_path / "ours.ckpt")
        again.setup(trainer, fresh, "fit")
    assert bit_identical(state(loaded), expected["averages"])
    again.on_load_checkpoint(trainer, fresh, torch.load(tmp_path / "ours.ckpt"))
    assert bit_identical(state(again._average_model.module), expected["averages"])
    assert bit_identical(state(fresh), expected["weights"])
    assert int(again._average_model.n_averaged) == 3


def test_a_lightning_checkpoint_without_the_callback_is_plain_weights(tmp_path: Path) -> None:
    """Nothing says that it holds averages, so they are not to be had of it. Built by hand."""
    tree = {"pytorch-lightning_version": "2.6.0", "state_dict": state(plain()), "epoch": 1}
    path = save(tree, tmp_path / "last.ckpt")
    ours = load_averages(path)
    assert (ours.producer, ours.which) == ("plain weights", "weights")
    message = r"last\.ckpt'.*without 'averages'.*'weights' \(4 tensors\).*which='weights'"
    with pytest.raises(ValueError, match=message):
        load_averages(path, which="averages")


# -------------------------------------------------------- layouts of what is not installed here

Layout = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Any]]


def prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def flattened(tensors: dict[str, Tensor], dot: str) -> dict[str, Tensor]:
    return {name.replace(".", dot): tensor for name, tensor in tensors.items()}


def shadow(active: bool) -> Layout:
    def layout(a: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Any]:
        aside, inside = (w, a) if active else (a, w)
        buffers = {n: t for n, t in aside.items() if "running" in n or "batches" in n}
        trained = {n: t for n, t in aside.items() if n not in buffers}
        held = {"named_parameters_dict": trained, "named_buffers_dict": buffers}
        ema = {"ema_model": held, "ema_weights_active": active, "ema_started": True}
        return {"state": {"model": inside, "algorithms": [("EMA", {"repr": "EMA()", **ema})]}}

    return layout


LAYOUTS: dict[str, tuple[Layout, int | None]] = {
    "timm": (lambda a, w: {"epoch": 1, "state_dict": w, "state_dict_ema": a}, None),
    "MAE, ConvNeXt, DeiT": (lambda a, w: {"model": w, "model_ema": a, "epoch": 3}, None),
    "RT-DETR, D-FINE": (lambda a, w: {"model": w, "ema": {"module": a, "updates": 40}}, 40),
    "fairseq": (lambda a, w: {"model": w, "extra_state": {"ema": a}}, None),
    "d2go": (lambda a, w: {"model": w, "ema_state": prefixed("module.", a)}, None),
    "I-JEPA, V-JEPA": (
        lambda a, w: {
            "encoder": prefixed("module.", w),
            "predictor": {"module.w": torch.ones(1)},
            "target_encoder": prefixed("module.", a),
            "opt": {"state": {}, "param_groups": []},
            "epoch": 7,
        },
        None,
    ),
    "DINO": (lambda a, w: {"student": prefixed("module.", w), "teacher": a}, None),
    "DINOv3": (
        lambda a, w: {
            "iteration": 12,
            "model": prefixed("student.", w) | prefixed("teacher.", a) | prefixed("model_ema.", a),
        },
        12,
    ),
    "BasicSR": (lambda a, w: {"params": w, "params_ema": a}, None),
    "a training script": (lambda a, w: {"model": w, "ema": a}, None),
    "cosmos predict1": (lambda a, w: {"model": w, "ema": flattened(a, "-")}, None),
    "cosmos predict2": (lambda a, w: prefixed("net.", w) | prefixed("net_ema.", a), None),
    "mmengine": (
        lambda a, w: {
            "meta": {"epoch": 3},
            "state_dict": a,
            "ema_state_dict": {"steps": torch.tensor(30), **prefixed("module.", w)},
        },
        30,
    ),
    "composer": (shadow(active=False), None),
    "composer, active": (shadow(active=True), None),
    "LitEma": (
        lambda a, w: {
            "state_dict": {
                **prefixed("model.", w),
                **prefixed("model_ema.", flattened(a, "")),
                "model_ema.decay": torch.tensor(0.5),
                "model_ema.num_updates": torch.tensor(20),
            }
        },
        20,
    ),
    "nequip": (
        lambda a, w: {
            **prefixed("model.", w),
            **{f"ema.ema_weight_{i}": tensor for i, tensor in enumerate(a.values())},
            "ema._extra_state": {
                "decay": 0.99,
                "num_updates": 8,
                "is_holding_ema_weights": True,
            },
        },
        8,
    ),
    "nequip, swapped": (
        lambda a, w: {
            **prefixed("model.", a),
            **{f"ema.ema_weight_{i}": tensor for i, tensor in enumerate(w.values())},
            "ema._extra_state": {
                "decay": 0.99,
                "num_updates": 8,
                "is_holding_ema_weights": False,
            },
        },
        8,
    ),
    "momentum encoder (lightly, solo-learn)": (
        lambda a, w: {
            "pytorch-lightning_version": "2.0.0",
            "state_dict": prefixed("backbone.", w) | prefixed("momentum_backbone.", a),
        },
        None,
    ),
    "NeMo": (
        lambda a, w: {
            "state_dict": w,
            "optimizer_states": [
                {
                    "opt": {"state": {}, "param_groups": [{"params": [0, 1, 2, 3]}]},
                    "ema": tuple(a.values()),
                    "current_step": 50,
                    "decay": 0.99,
                    "every_n_steps": 1,
                }
            ],
        },
        50,
    ),
    "EDM2": (
        lambda a, w: {
            "state": {"cur_nimg": 4096},
            "net": w,
            "ema": {"stds": [0.05], "emas": [a]},
        },
        4096,
    ),
    "polyak": (
        lambda a, w: {"model": w, "ema": {"averages": a, "facts": '{"format": 1, "clock": 6}'}},
        6,
    ),
    "SimpleTuner": (
        lambda a, w: {
            "model": w,
            "ema": {
                **{f"shadow_params.{i}": tensor for i, tensor in enumerate(a.values())},
                **{"decay": 0.99, "min_decay": 0.0, "optimization_step": torch.tensor(11)},
                **{"update_after_step": 0, "warmup_steps": 0, "use_ema_warmup": False},
                **{"inv_gamma": 1.0, "power": 0.75},
            },
        },
        11,
    ),
    "torch AveragedModel": (
        lambda a, w: {
            "state_dict": {
                **prefixed("net.", w),
                **prefixed("ema.module.", a),
                "ema.n_averaged": torch.tensor(2),
            }
        },
        2,
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_from_the_table(name: str, tmp_path: Path) -> None:
    """Averages and weights are told apart. Built by hand from each producer's documented layout."""
    model = plain()
    a, w = other(model), state(model)
    layout, clock = LAYOUTS[name]
    path = save(layout(a, w), tmp_path / "checkpoint.pth")
    with opened(path) as found:
        content = recognized(found)
    producer = name.split(", active")[0].split(", swapped")[0]
    assert (content.producer, content.clock) == (producer, clock)
    which = next(key for key in content.sets if key.startswith("averages"))
    assert set(content.sets) == {which, "weights"}
    parts = {"LitEma": "model", "nequip": "model", "torch AveragedModel": "net"}
    parts |= {"momentum encoder (lightly, solo-learn)": "backbone"}
    for key, expected in ((which, a), ("weights", w)):
        held = content.sets[key]
        named = isinstance(held, Mapping)
        part = parts.get(producer, "") if named else ""
        if producer == "torch AveragedModel" and key == which:
            part = ""
        ours = load_averages(path, model, which=key, part=part)
        assert bit_identical(ours, expected)
        assert ours.producer == producer
    with pytest.raises(ValueError, match=rf"'{which}'.*'weights'|'weights'.*'{which}'"):
        load_averages(path, model)


def test_several_averages_in_one_file(tmp_path: Path) -> None:
    """Each set has a name, and its own decay. Built by hand."""
    a, b = other(plain(), 1), other(plain(), 2)
    tree = {"ema": {"stds": [0.05, 0.1], "emas": [a, b]}, "state": {"cur_nimg": 64}}
    path = save(tree, tmp_path / "training-state-0000000.pt")
    ours = load_averages(path, plain(), which="averages std=0.1")
    assert bit_identical(ours, b)
    assert (ours.decay, ours.clock) == (PowerLaw(0.1), 64)
    fast, slow = EMA(plain(), 0.9), EMA(plain(), PowerLaw(0.1))
    fast.update(3)
    slow.update(3)
    path = save({"fast": fast.state_dict(), "slow": slow.state_dict()}, tmp_path / "both.pt")
    with pytest.raises(ValueError, match=r"which='averages fast' or which='averages slow'"):
        load_averages(path)
    ours = load_averages(path, which="averages fast")
    assert (ours.decay, ours.clock) == (Constant(0.9), 3)
    assert bit_identical(ours, dict(fast.averages))


def test_edm2_names_its_sets_by_their_exact_widths(tmp_path: Path) -> None:
    """Widths that round alike are two sets all the same. Built by hand."""
    a, b = other(plain(), 1), other(plain(), 2)
    path = save({"ema": {"stds": [0.0501, 0.0502], "emas": [a, b]}}, tmp_path / "a.pt")
    assert bit_identical(sets(path), {"averages std=0.0501": a, "averages std=0.0502": b})


@pytest.mark.parametrize(
    "stds", [[True], [0.05, 0.05], [math.nan], [10**400], ["0.05"], [0.05, 0.1]]
)
def test_edm2_without_a_width_for_each_set_is_refused(stds: list[Any], tmp_path: Path) -> None:
    """What cannot be told apart is not passed over: the place of each is named. Built by hand."""
    a = other(plain())
    emas = [a, {"epoch": 1}] if stds == [0.05, 0.1] else [a] * len(stds)
    path = save({"net": state(plain()), "ema": {"stds": stds, "emas": emas}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"EDM2 with {len(emas)} sets.*such as at='ema\.emas\.0'"):
        load_averages(path)
    assert bit_identical(load_averages(path, plain(), at="ema.emas.0"), a)


def test_every_convention_in_a_file_counts(tmp_path: Path) -> None:
    """Averages under several conventions are several sets, named by their places."""
    a, b, c, w = (other(plain(), seed) for seed in range(4))
    tree = {"state_dict": w, "state_dict_ema": a, "ema": b, "extra_state": {"ema": c}}
    path = save(tree, tmp_path / "a.pt")
    named = {"state_dict_ema": a, "ema": b, "extra_state.ema": c}
    expected = {f"averages {place}": tensors for place, tensors in named.items()}
    assert bit_identical(sets(path), {**expected, "weights": w})
    with pytest.raises(ValueError, match=r"timm, fairseq, a training script.*'averages ema' \(4"):
        load_averages(path)
    path = save({"model_ema": a, "ema": {"module": b, "updates": 7}}, path)
    assert load_averages(path, which="averages ema.module").clock is None


def test_counters_alone_are_nothing(tmp_path: Path) -> None:
    """No set is empty: an averager that has lost its tensors is not recognized."""
    counter, path = torch.tensor(3), tmp_path / "a.pt"
    lit = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": counter}
    for tree in (
        {"n_averaged": counter},
        lit,
        {"state_dict": lit},
        {"ema": {"n_averaged": counter}},
    ):
        with pytest.raises(ValueError, match=r"a\.pt'.*there are no tensors by name in it"):
            load_averages(save(tree, path))
    w = state(plain())
    ours = load_averages(save({"state_dict": w, "averaging_state": {"n_averaged": counter}}, path))
    assert (ours.producer, ours.which) == ("plain weights", "weights")
    ours = load_averages(save({"state_dict": prefixed("model.", w) | lit}, path), part="model")
    assert (ours.producer, ours.which) == ("LitEma", "weights")
    assert bit_identical(ours, w)


def test_what_only_looks_like_an_averager_is_passed_over(tmp_path: Path) -> None:
    """Counters beside other tensors, or facts without any, are no averages. Built by hand."""
    counter, w, path = torch.tensor(3), state(plain()), tmp_path / "a.pt"
    for tree in (
        {"n_averaged": counter, "module.w": torch.ones(2), "other": torch.ones(2)},
        {"initted": torch.tensor(True), "step": counter, "w": torch.ones(2)},
    ):
        ours = load_averages(save(tree, path))
        assert (ours.producer, dict(ours).keys()) == ("plain weights", tree.keys())
    tree = {"model": {"w": torch.ones(2)}, "ema": {"w": torch.ones(2)}}  # of no dot, so no dash
    assert load_averages(save(tree, path), which="averages").producer == "a training script"
    with pytest.raises(ValueError, match=r"there are tensors at\n  averages \(4 tensors\)"):
        load_averages(save({"averages": w, "facts": "{"}, path))
    files.write(tmp_path / "a.safetensors", {}, {"averaged": []})
    with pytest.raises(ValueError, match=r"there are no tensors by name in it; there is nothing"):
        load_averages(tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{")
    assert load_averages(save(w, path)).producer == "plain weights"


def test_names_of_wrappers_stay_where_two_tensors_would_be_one(tmp_path: Path) -> None:
    """Without `_orig_mod` these would be called alike, so that none is renamed."""
    held = {"a._orig_mod.w": torch.ones(2), "a.w": torch.zeros(2)}
    assert bit_identical(load_averages(save(held, tmp_path / "a.pt")), held)


WRAPPED = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize(
    "name",
    [
        "LitEma",
        "nequip",
        "torch AveragedModel",
        "cosmos predict2",
        "momentum encoder (lightly, solo-learn)",
    ],
)
def test_averages_inside_a_wrapped_module(name: str, prefix: str, tmp_path: Path) -> None:
    """What DDP and compile put in front of all names changes nothing. Built by hand."""
    model = plain()
    a, w = other(model), state(model)
    tree = LAYOUTS[name][0](a, w)
    node = tree.get("state_dict", tree)
    path = save({"state_dict": prefixed(prefix, node)}, tmp_path / "wrapped.pt")
    bare = sets(save(tree, tmp_path / "bare.pt")) if name != "nequip" else {}
    with opened(path) as found:
        content = recognized(found)
    assert content.producer == name
    assert content.clock == LAYOUTS[name][1]
    for key, tensors in bare.items():
        assert bit_identical(load_averages(path, which=key), tensors)
    if name == "nequip":
        assert bit_identical(load_averages(path, model, which="averages"), a)
        assert bit_identical(load_averages(path, model, which="weights", part="model"), w)


@pytest.mark.parametrize("live", ["model.", "model._orig_mod."])
@pytest.mark.parametrize("theirs", ["", "_orig_mod"])
def test_lit_ema_of_a_compiled_model(live: str, theirs: str, tmp_path: Path) -> None:
    """Compiled before LitEma saw it, or after: the names are those of the plain model."""
    model = plain()
    a, w = other(model), state(model)
    counters = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(2)}
    averages = prefixed(f"model_ema.{theirs}", flattened(a, ""))
    path = save({"state_dict": prefixed(live, w) | averages | counters}, tmp_path / "a.ckpt")
    expected = {"averages": prefixed("model.", a), "weights": prefixed("model.", w)}
    assert bit_identical(sets(path), expected)
    save({"state_dict": averages | counters}, path)
    assert bit_identical(load_averages(path, model), a)


def test_what_is_left_of_a_module_beside_its_averager_is_unwrapped_too(tmp_path: Path) -> None:
    """`module.` in front of all weights is dropped of these as of the averages. Built by hand."""
    model = plain()
    a, w = other(model), prefixed("module.", state(model))
    counters = {"model_ema.decay": torch.tensor(0.5), "model_ema.num_updates": torch.tensor(2)}
    listed = {f"ema.ema_weight_{i}": tensor for i, tensor in enumerate(a.values())}
    extra = {"decay": 0.99, "num_updates": 8, "is_holding_ema_weights": True}
    for tree in (
        w | prefixed("ema.module.", a) | {"ema.n_averaged": torch.tensor(2)},
        w | prefixed("model_ema.", flattened(a, "")) | counters,
        {**w, **listed, "ema._extra_state": extra},
    ):
        path = save(tree, tmp_path / "a.pt")
        assert bit_identical(load_averages(path, which="weights"), state(model))
        assert bit_identical(load_averages(path, model, which="averages"), a)


def test_several_averagers_in_one_module(tmp_path: Path) -> None:
    """Each is a set, and none is left among the weights. Built by hand."""
    a, b, w = other(plain(), 1), other(plain(), 2), prefixed("net.", state(plain()))
    tree = w | prefixed("fast.module.", a) | prefixed("slow.module.", b)
    tree |= {"fast.n_averaged": torch.tensor(5), "slow.n_averaged": torch.tensor(5)}
    path = save({"state_dict": tree}, tmp_path / "a.ckpt")
    assert bit_identical(sets(path), {"averages fast": a, "averages slow": b, "weights": w})
    assert load_averages(path, which="averages slow").clock == 5


def test_weights_in_another_place_are_not_overlooked(tmp_path: Path) -> None:
    """Averages under one convention beside weights under another are two sets all the same."""
    a, w = other(plain()), state(plain())
    path = save({"ema": a, "state_dict": w}, tmp_path / "a.pt")
    assert bit_identical(sets(path), {"averages": a, "weights": w})


def test_fairseq_has_a_second_set_in_float32(tmp_path: Path) -> None:
    """The averages as the model has them, and as they were kept. Built by hand."""
    a = other(plain())
    extra = {"ema": {n: t.half() for n, t in a.items()}, "ema_fp32_params": a}
    path = save({"model": state(plain()), "extra_state": extra}, tmp_path / "checkpoint.pt")
    assert bit_identical(load_averages(path, plain(), which="averages float32"), a)


def test_nemo_with_several_groups_is_sent_to_its_other_file(tmp_path: Path) -> None:
    """An optimizer's order is the model's only if it has one group. Built by hand."""
    a, w = other(plain()), state(plain())
    groups = [{"params": [0, 2]}, {"params": [1, 3]}]
    optimizer = {"opt": {"param_groups": groups}, "ema": tuple(a.values()), "current_step": 5}
    tree = {"state_dict": w, "optimizer_states": [{**optimizer, "every_n_steps": 1, "decay": 0.9}]}
    with opened(save(tree, tmp_path / "x.ckpt")) as found:
        content = recognized(found)
    assert set(content.sets) == {"weights"}
    assert "-EMA.ckpt" in str(content.details["averages"])
    tree = {"state_dict": a, "pytorch-lightning_version": "2.0"}
    ours = load_averages(save(tree, tmp_path / "x-EMA.ckpt"), plain())
    assert (ours.producer, ours.which) == ("NeMo", "averages")


def test_names_of_files_and_folders_that_producers_give(tmp_path: Path) -> None:
    """Plain weights are averages where their producers call the file so. Built by hand."""
    a = other(plain())
    for name, beside, producer, clock in (
        ("ema_0.9999_050000.pt", "", "guided-diffusion", 50000),
        ("bema.pt", "", "TRL BEMA", None),
        ("bema/model.safetensors", "", "TRL BEMA", None),
        ("ema.safetensors", "running_states.json", "Open-Sora", None),
        ("weights.pt", "", "plain weights", None),
    ):
        path = tmp_path / producer / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if beside:
            (path.parent / beside).write_text('{"global_step": 7}')
        if path.suffix == ".pt":
            save(a, path)
        else:
            files.write(path, a)
        ours = load_averages(path, plain())
        assert (ours.producer, ours.clock) == (producer, clock)
        assert ours.which == ("weights" if producer == "plain weights" else "averages")
        assert bit_identical(ours, a)
    assert load_averages(tmp_path / "guided-diffusion/ema_0.9999_050000.pt").decay == Constant(
        0.9999
    )
    assert load_averages(tmp_path / "Open-Sora/ema.safetensors").details == {"global_step": 7}


def test_names_without_dots(tmp_path: Path) -> None:
    """LitEma's names come from the live ones or the model; what could be two is refused."""
    model = plain()
    a = other(model)
    counters = {"decay": torch.tensor(0.5), "num_updates": torch.tensor(-1)}
    held = prefixed("model_ema.", flattened(a, "") | counters)
    path = save({"state_dict": held}, tmp_path / "a.ckpt")
    ours = load_averages(path, model)
    assert bit_identical(ours, a)
    assert (ours.clock, ours.decay) == (None, Constant(0.5))
    with pytest.raises(
        ValueError, match=r"LitEma keeps its 4 averages under names without dots.*model="
    ):
        load_averages(path)
    twins = nn.ModuleDict({"a": nn.ParameterDict({"b": torch.ones(1)})})
    twins.register_parameter("ab", nn.Parameter(torch.ones(1)))
    held = prefixed("model_ema.", {"ab": torch.ones(1)} | counters)
    save({"state_dict": prefixed("model.", state(twins)) | held}, path)
    with pytest.raises(ValueError, match=r"ab: ab or a\.b\n.*take which='weights'"):
        load_averages(path, twins, which="averages")
    assert bit_identical(load_averages(path, twins, which="weights", part="model"), state(twins))
    with pytest.raises(ValueError, match=r"without names, so that there is no part 'model'"):
        load_averages(path, twins, which="averages", part="model")
    held = {"model": {"x.y": torch.ones(1)}, "ema": {"a-b": torch.ones(1)}}
    with pytest.raises(ValueError, match=r"cosmos predict1.*names with '-' for each dot"):
        load_averages(save(held, path), which="averages")


# -------------------------------------------------------------------------------------- polyak


def test_polyaks_own_files(tmp_path: Path) -> None:
    """What `save` and `state_dict` give is read back, with clock and decay, wherever it is."""
    model = nested()
    ema = EMA(model, 0.5)
    for seed in range(3):
        walk_(model, seed)
        ema.update()
    ema.save(tmp_path / "a.safetensors")
    ema.save(tmp_path / "folder", shard_bytes=100)
    for path in (tmp_path / "a.safetensors", tmp_path / "folder"):
        ours = load_averages(path, model)
        assert (ours.producer, ours.clock, ours.decay) == ("polyak", 3, Constant(0.5))
        assert bit_identical(ours, ema.model_state_dict())
        assert ours.details["policy"] == "trainable"
    tree = {"trainer": {"ema": ema.state_dict()}, "model": model.state_dict()}
    path = save(tree, tmp_path / "run.pt")
    for ours in (
        load_averages(path, model, which="averages"),
        load_averages(path, model, at="trainer.ema"),
    ):
        assert (ours.producer, ours.clock, ours.decay) == ("polyak", 3, Constant(0.5))
        assert bit_identical(ours, dict(ema.averages))
    assert bit_identical(load_averages(path, model, at="model"), state(model))


def test_distributed_checkpoints(tmp_path: Path) -> None:
    """A folder of torch.distributed.checkpoint is read as the tree that was saved."""
    import torch.distributed.checkpoint as dcp

    model = convolutional()
    ema = EMA(model, 0.9)
    ema.update(5)
    with quiet():
        tree = {"model": model.state_dict(), "ema": ema.state_dict()}
        dcp.save(tree, checkpoint_id=tmp_path / "dcp", no_dist=True)
    ours = load_averages(tmp_path / "dcp", model, which="averages")
    assert (ours.producer, ours.clock, ours.decay) == ("polyak", 5, Constant(0.9))
    assert bit_identical(ours, dict(ema.averages))


def test_a_converted_file_says_what_it_is(tmp_path: Path) -> None:
    """Plain loaders read weights; ours also whether they are averages, of which clock and decay."""
    a, w = other(plain()), state(plain())
    path = save({"state_dict": w, "state_dict_ema": a}, tmp_path / "a.pth.tar")
    out = tmp_path / "a.safetensors"
    convert(path, out, "safetensors", which="averages", clock=9, decay=0.99)
    ours = load_averages(out, plain(), which="averages")
    assert (ours.clock, ours.decay) == (9, Constant(0.99))
    assert bit_identical(ours, a)
    assert bit_identical(files.read(out), a)
    convert(path, out, "safetensors", which="weights")
    assert bit_identical(load_averages(out, which="weights"), w)
    files.write(out, w, {"note": "not of an average"})
    assert load_averages(out).producer == "plain weights"


def test_the_weights_that_go_along_fit_the_model_too(tmp_path: Path) -> None:
    """Weights beside averages are renamed and checked as these are, where they have a place."""
    model, out = Only(), tmp_path / "out.pt"
    a, w = other(model), state(model)
    path = save({"state_dict": w, "state_dict_ema": a}, tmp_path / "a.pt")
    convert(path, out, "timm", which="averages", model=model)
    assert bit_identical(torch.load(out), {"state_dict": w, "state_dict_ema": a})
    w["module.extra"] = torch.ones(1)
    save({"state_dict": w, "state_dict_ema": a}, path)
    with pytest.raises(ValueError, match=r"the weights of timm do not fit.*\n  extra: only"):
        convert(path, tmp_path / "not.pt", "timm", which="averages", model=model)
    convert(path, out, "safetensors", which="averages", model=model)  # which has no place for them
    assert bit_identical(files.read(out), a)


def test_weights_without_names_go_along_by_the_model(tmp_path: Path) -> None:
    """What torch_ema has put aside gets its names as the averages do. Built by hand."""
    model, path, out = plain(), tmp_path / "a.pt", tmp_path / "out.pt"
    a, w = other(model), state(model)
    shadow, collected = list(a.values()), list(w.values())
    lists = {"shadow_params": shadow, "collected_params": collected}
    save({"decay": 0.9, "num_updates": 3, **lists}, path)
    convert(path, out, "timm", which="averages", model=model)
    assert bit_identical(torch.load(out), {"state_dict": w, "state_dict_ema": a})
    tree = LAYOUTS["nequip, swapped"][0](a, w)
    save(tree, path)
    with pytest.raises(ValueError, match=r"4 tensors were given as a list: pass model="):
        convert(path, tmp_path / "not.pt", "timm", which="averages")
    assert not (tmp_path / "not.pt").exists()


def test_weights_have_no_clock_and_no_decay(tmp_path: Path) -> None:
    """What the file tells of the averages is not said of the weights beside them."""
    model, out = plain(), tmp_path / "out.safetensors"
    module = {"ema_model": other(model), "online_model": state(model)}
    tree = {f"{part}.{name}": t for part, held in module.items() for name, t in held.items()}
    counters = {"initted": torch.tensor(True), "step": torch.tensor(9)}
    path = save(tree | counters, tmp_path / "a.pt")
    assert load_averages(path, which="averages").clock == 9
    assert load_averages(path, which="weights").clock is None
    convert(path, out, "safetensors", which="weights")
    assert files.read_facts(out)["converted"] == {"which": "weights", "clock": None, "decay": None}
    two = save({"fast": tree | counters, "slow": tree | counters}, tmp_path / "two.pt")
    assert load_averages(two, which="averages fast").clock == 9
    assert load_averages(two, which="weights fast").clock is None
    with pytest.raises(ValueError, match=r"Pass clock="):
        convert(path, out, "averaged-model", which="weights")
    convert(path, out, "safetensors", which="weights", clock=4, decay=0.9)  # as the caller says
    facts = files.read_facts(out)["converted"]
    assert (facts["which"], facts["clock"]) == ("weights", 4)


@pytest.mark.parametrize("build", [plain, tied, frozen])
def test_a_list_is_named_by_the_model(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Given the model, a list is written under all names of its parameters, tied ones too."""
    model, path = build(), tmp_path / "a.pt"
    averages = [tensor + 1 for tensor in model.parameters()]
    weights = [tensor.detach() for tensor in model.parameters()]
    write(path, averages, "timm", weights=weights, model=model)
    expected = {name: tensor + 1 for name, tensor in parameters(model).items()}
    held = {"state_dict": parameters(model), "state_dict_ema": expected}
    assert bit_identical(torch.load(path), held)
    with pytest.raises(ValueError, match=r"a list of 1 tensors, and the model has \d parameters"):
        write(path, averages[:1], "timm", model=model)
    averages[0] = torch.ones(7)
    with pytest.raises(ValueError, match=r"0: \(7,\) in the list, .* in the model"):
        write(path, averages, "timm", model=model)


# ------------------------------------------------------------------------------- what is refused


def test_a_wrong_model_is_told_all_differences(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors are listed together, by name or by place."""
    model = plain()
    held = other(model)
    held["extra"] = held.pop("head.bias")
    held["hidden.bias"] = torch.ones(5)
    path = save({"state_dict_ema": held}, tmp_path / "a.pth.tar")
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the whole message is looked at
        load_averages(path, model)
    for line in (
        "a.pth.tar': the averages of timm do not fit Plain:",
        "head.bias: missing in the file",
        "extra: only in the file",
        "hidden.bias: (5,) in the file, (8,) in the model",
    ):
        assert line in str(error.value)
    tree = {"decay": 0.9, "num_updates": 3, "collected_params": None}
    for count, match in (
        (4, r"2: \(8,\) in the list, head\.weight \(3, 8\) in the model"),
        (3, r"a list of 3 tensors, and the model has 4 parameters, 4 of them trained"),
    ):
        wrong = [torch.ones(8, 8), torch.ones(8), torch.ones(8), torch.ones(3)][:count]
        save({**tree, "shadow_params": wrong}, path)
        with pytest.raises(ValueError, match=match):
            load_averages(path, model)
    with pytest.raises(ValueError, match=r"3 averages as a list.*pass model="):
        load_averages(path)
    with pytest.raises(ValueError, match=r"no part 'head': leave part= out"):
        load_averages(path, model, part="head")


def test_parts_that_fit_are_proposed(tmp_path: Path) -> None:
    """Names that fit but for what a module calls the model lead to `part=`."""
    a = other(plain())
    path = save({"state_dict": prefixed("model.", a)}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="or pass part='model'"):
        load_averages(path, plain())
    assert bit_identical(load_averages(path, plain(), part="model"), a)
    with pytest.raises(ValueError, match=r"no part 'net' in it: its tensors are in model"):
        load_averages(path, plain(), part="net")


def test_only_what_is_trained_must_be_there(tmp_path: Path) -> None:
    """Frozen parameters and buffers may be missing, by name and in a list."""
    model = frozen()
    trained = {n: t for n, t in other(model).items() if n.startswith("head")}
    tree: dict[str, Any] = {"model_ema": trained}
    assert bit_identical(load_averages(save(tree, tmp_path / "a.pt"), model), trained)
    tree = {"decay": 0.9, "num_updates": 1, "shadow_params": list(trained.values())}
    assert bit_identical(load_averages(save(tree, tmp_path / "a.pt"), model), trained)


def test_ties_that_the_file_does_not_have_are_refused(tmp_path: Path) -> None:
    """One tensor of the model cannot take two values."""
    model = tied()
    held = other(model)
    assert bit_identical(load_averages(save(held, tmp_path / "a.pt"), model), held)
    held["decoder.weight"] = held["decoder.weight"] + 1
    with pytest.raises(
        ValueError, match=r"several values.*\n.*encoder\.weight and decoder\.weight"
    ):
        load_averages(save(held, tmp_path / "a.pt"), model)


def test_what_is_not_recognized_says_what_there_is(tmp_path: Path) -> None:
    """Tensors under unknown names can be reached by `at`."""
    a = other(plain())
    path = save({"gan": {"G": a, "D": a}, "optimizer": {"m": a}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"tensors at\n  gan\.G \(4 tensors\)\n  gan\.D.*\npass"):
        load_averages(path)
    assert bit_identical(load_averages(path, at="gan.G"), a)
    with pytest.raises(ValueError, match=r"no tensors by name in it; there is epoch, note"):
        load_averages(save({"epoch": 1, "note": "x"}, path))
    with pytest.raises(ValueError, match=r"there is a list"):
        load_averages(save([1, 2], path))


def test_what_can_only_be_unpickled_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice is what to type in the peer's own environment, and what it gives is then read."""
    for module, advice in (
        (
            "ultralytics.nn.tasks",
            r'torch\.save\(\(c\["ema"\] or c\["model"\]\)\.float\(\)\.state_d',
        ),
        ("dnnlib.util", r'"state": dict\(c\["state"\]\)'),
        ("mmengine.logging", r'if "state_dict" in k'),
        ("elsewhere", r"could run any code.*load it there"),
    ):
        kind = type("Thing", (), {"__module__": module})
        parts = module.split(".")
        with monkeypatch.context() as patch:
            for count in range(1, len(parts) + 1):
                name = ".".join(parts[:count])
                patch.setitem(sys.modules, name, ModuleType(name))
            sys.modules[module].Thing = kind  # type: ignore[attr-defined]
            path = save({"ema": kind()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=advice):
            load_averages(path)
    path = tmp_path / "network-snapshot-0001000-0.050.pkl"
    path.write_bytes(pickle.dumps({"ema": 1}))
    with pytest.raises(ValueError, match=r'pickle\.load\(open\(path, "rb"\)\)\["ema"\]'):
        load_averages(path)


def test_arguments_of_a_training_script_are_no_obstacle(tmp_path: Path) -> None:
    """timm, torchvision and MAE keep an argparse.Namespace, which is plain values."""
    a, w = other(plain()), state(plain())
    tree = {"state_dict": w, "state_dict_ema": a, "args": argparse.Namespace(lr=0.1)}
    path = save(tree, tmp_path / "a.pth.tar")
    assert bit_identical(load_averages(path, plain(), which="averages"), a)


def test_pieces_of_fsdp1_and_old_composer_are_refused(tmp_path: Path) -> None:
    """What cannot be told without the program that wrote it is not guessed. Built by hand."""
    tree = {"teacher": {"backbone._flat_param": torch.ones(9), "backbone.w": torch.ones(2)}}
    with pytest.raises(ValueError, match=r"1 of its 2 tensors are flat pieces of FSDP1"):
        load_averages(save(tree, tmp_path / "a.pt"))
    ema = {"ema_model": {}, "training_model": {}}
    path = save({"state": {"algorithms": [("EMA", ema)]}}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"composer before 0\.13.*ema_model, training_model"):
        load_averages(path)


NONSENSE: list[Any] = [
    *(None, -1, math.nan, math.inf, 10**400, True, "x", [], {}, [1, "a"], {"a": 1}, {1: 2}),
    *(torch.ones(2), torch.tensor(math.nan), torch.ones(1, dtype=torch.complex64), torch.ones(0)),
]


def places(tree: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to all nodes of a tree but its root."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    for key, value in tree.items() if isinstance(tree, dict) else ():
        yield (*place, key)
        yield from places(value, (*place, key))


@pytest.mark.parametrize("seed", range(4))
def test_nonsense_in_known_places_is_refused_or_passed_over(seed: int, tmp_path: Path) -> None:
    """Whatever stands where a producer has something else, the only error is a ValueError."""
    chosen, model = random.Random(seed), plain()
    a, w = other(model), state(model)
    trees = [layout(a, w) for layout, _ in LAYOUTS.values()]
    trees += [
        {"decay": 0.9, "num_updates": 3, "shadow_params": list(a.values())},
        {"decay": 0.9, "optimization_step": 3, "shadow_params": list(a.values()), "min_decay": 0.1},
        {"initted": torch.tensor(True), "step": torch.tensor(3), **prefixed("ema_model.", a)},
        {"n_averaged": torch.tensor(3), **prefixed("module.", a)},
        {"state_dict": a, "current_model_state": w, "averaging_state": {"n_averaged": a}},
    ]
    refused = 0
    for _ in range(100):
        tree = copy.deepcopy(chosen.choice(trees))
        *path, last = chosen.choice(list(places(tree)))
        node: Any = tree
        for key in path:
            node = node[key]
        node[last] = copy.deepcopy(chosen.choice(NONSENSE))
        save(tree, tmp_path / "a.pt")
        for which in ("averages", "weights"):
            try:
                load_averages(tmp_path / "a.pt", model, which=which)
            except ValueError as error:
                refused += "a.pt" in str(error)
    assert refused > 50


def test_writers_ask_for_what_they_need(tmp_path: Path) -> None:
    """Without a clock, a decay, names or an order the file would be wrong, so it is not written."""
    a, path = other(plain()), tmp_path / "a"
    for to in ("averaged-model", "lightning", "ema-pytorch"):
        with pytest.raises(ValueError, match=r"overwrites the averages\. Pass clock="):
            write(path, a, to)
        with pytest.raises(ValueError, match=r"4 tensors were given as a list: pass model="):
            write(path, list(a.values()), to, clock=1)
    with pytest.raises(ValueError, match=r"knows no PowerLaw\(std=0\.1\): pass decay=0\.999"):
        write(path, a, "torch-ema", decay=PowerLaw(0.1), model=plain())
    with pytest.raises(ValueError, match=r"Pass clock="):
        write(path, a, "torch-ema", decay=Ramp(0.9), model=plain())
    with pytest.raises(ValueError, match=r"order of model\.parameters\(\).*pass model="):
        write(path, a, "torch-ema", decay=0.9)
    del a["head.bias"]
    with pytest.raises(ValueError, match=r"1 of the model.s 4 parameters have no average:\n  head"):
        write(path, a, "torch-ema", decay=0.9, model=plain())
    with pytest.raises(ValueError, match=r"no format 'orbax': pass one of 'safetensors'"):
        write(path, a, "orbax")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is no config\.json of diffusers"):
        write(path, a, "diffusers", config=tmp_path)
    assert not path.exists()


@pytest.mark.parametrize("to", [name for name in WRITERS if name != "diffusers"])
def test_writing_is_all_or_nothing(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure the old file is as it was."""
    path = tmp_path / "a"
    path.write_text("old")

    def fail(_: int) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write(path, other(plain()), to, clock=1, decay=0.9, model=plain())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert path.read_text() == "old"


def test_the_result_of_loading_is_a_mapping_that_says_what_it_is(tmp_path: Path) -> None:
    """A model loads it, and its repr tells where it is from."""
    model = convolutional()
    ours = load_averages(save(averaged(model).state_dict(), tmp_path / "a.pt"), model)
    fresh = scramble_(convolutional(), 5)
    fresh.load_state_dict(ours)
    assert bit_identical(state(fresh), ours)
    assert isinstance(ours, Averages)
    assert repr(ours) == (
        "Averages(9 tensors, producer='torch AveragedModel', which='averages', clock=5, decay=None)"
    )
