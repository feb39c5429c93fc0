"""What goes wrong with averages in the wild, and that it cannot go wrong here.

Each test is named after a fault that users of averaging code have hit, and numbered by the kind of
fault. Its docstring says how the fault showed, and what rules it out. Sharding (4), compiled models
and several processes have files of their own.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import polyak
from models import (
    Snapshot,
    batch,
    bit_identical,
    convolutional,
    frozen,
    mixed,
    nested,
    plain,
    reversed_,
    scramble_,
    tied,
    train,
)
from polyak import EMA, Cosine, Debiased, HalfLife, PowerLaw, engine, everything, files
from polyak.decay import from_spec


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr, momentum=0.9)


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def mixture(old: Tensor, new: Tensor, decay: float) -> Tensor:
    """What one update makes of an average, in float64."""
    return old.double() * decay + new.double() * (1 - decay)


def assert_close(average: Tensor, expected: Tensor, updates: int = 1) -> None:
    """Within the rounding of so many float32 updates."""
    bound = 2 * updates * 2**-24 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(average.double(), expected.double(), rtol=0, atol=bound)


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


# ---------------------------------------------------------------- 1: a resume loses the average


@pytest.mark.parametrize("ema_first", [True, False], ids=["ema first", "model first"])
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_01_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    ema_first: bool, used: bool, tmp_path: Path
) -> None:
    """After a resume the average is the model, or its warm-up counter begins again.

    The state is one object: averages, clock, and the optimizer steps since the last update. The
    order of loading does not matter, nor whether the new EMA has already seen other weights.
    """
    model = convolutional()
    optimizer = sgd(model)
    ema = EMA(model, PowerLaw(0.10))
    ema.attach(optimizer, every=3)
    for step in train(model, optimizer, range(20)):
        if step == 10:  # eleven steps: in the middle of a tick
            checkpoint = {"model": model.state_dict(), "sgd": optimizer.state_dict()}
            torch.save(checkpoint | {"ema": ema.state_dict()}, tmp_path / "run.pt")
            torch.save(torch.get_rng_state(), tmp_path / "rng.pt")
    assert ema.clock == 18

    again = convolutional(seed=1)
    optimizer = sgd(again)
    resumed = EMA(again, PowerLaw(0.10))
    for _ in range(5 * used):
        resumed.update()
    resumed.attach(optimizer, every=3)
    checkpoint = torch.load(tmp_path / "run.pt", weights_only=True)
    if ema_first:
        resumed.load_state_dict(checkpoint["ema"])
    again.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["sgd"])
    if not ema_first:
        resumed.load_state_dict(checkpoint["ema"])
    assert resumed.clock == 9
    torch.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    for _ in train(again, optimizer, range(11, 20)):
        pass
    assert bit_identical(model.state_dict(), again.state_dict())
    assert resumed.clock == 18
    assert bit_identical(dict(ema.averages), dict(resumed.averages))
    facts = [json.loads(each.state_dict()["facts"]) for each in (ema, resumed)]
    assert facts[1]["history"].pop("branches")[0][0] == 11, "which is known to be gone on with"
    assert facts[0] == facts[1]


def test_01_a_name_that_is_missing_never_passes() -> None:
    """A checkpoint without the average, or with half of it, loads, and the run goes on without.

    Every name that is missing or too many is listed, and nothing is loaded.
    """
    ema = EMA(plain())
    ema.update()
    state = ema.state_dict()
    averages = copies(state["averages"])
    averages["ghost"] = averages.pop("head.bias")
    averages["hidden.bias"] = torch.zeros(9)
    before = copies(ema.averages)
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        ema.load_state_dict({**state, "averages": averages})
    for line in (
        "head.bias: missing in the state",
        "ghost: only in the state",
        "hidden.bias: (9,) in the state, (8,) in the model",
    ):
        assert line in str(caught.value)
    assert bit_identical(dict(ema.averages), before)
    assert ema.clock == 1


def test_01_a_state_from_before_the_first_update_is_one_too() -> None:
    """A run killed before its first update resumes to averages of zeros, or not at all."""
    state = copy.deepcopy(EMA(plain()).state_dict())
    model = plain(seed=1)
    ema = EMA(model)
    ema.update(7)
    ema.load_state_dict(state)
    assert ema.clock == 0
    ema.update()
    assert bit_identical(dict(ema.averages), copies(model.state_dict()))


# ----------------------------------------------------------------- 2: a swap that is not undone


class StoppedError(Exception):
    """What a validation may raise."""


@pytest.mark.parametrize("stop", [StoppedError, KeyboardInterrupt, SystemExit])
def test_02_validating_on_the_averages_does_not_change_the_run(stop: type[BaseException]) -> None:
    """An exception in the validation leaves the averages in the model, and training goes on there.

    `applied` is the only way to swap; the trained weights are back after it, however it is left.
    """
    runs = []
    for validate in (False, True):
        torch.manual_seed(1)
        model = convolutional()
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        ema.attach(optimizer)
        for step in train(model, optimizer, range(12)):
            if not validate:
                continue
            trained = copies(model.state_dict())
            rng = torch.get_rng_state()
            with suppress(stop), ema.applied():
                inside = copies(model.state_dict())
                model(batch(step + 100)[0])  # in train mode: writes statistics, draws dropout
                raise stop
            torch.set_rng_state(rng)
            assert bit_identical(inside, ema.model_state_dict())
            assert step == 0 or not bit_identical(inside, trained)
        runs.append([copies(model.state_dict()), copies(ema.averages)])
    assert bit_identical(*runs)


def test_02_what_is_saved_inside_is_what_is_saved_outside(tmp_path: Path) -> None:
    """A checkpoint written during validation holds the averages as the trained weights.

    The block yields the trained weights for whoever must save there; the EMA's own files and states
    are the same inside and outside, so that saving needs no swap at all.
    """
    model = convolutional()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(5)):
        ema.update()
    trained = copies(model.state_dict())
    ema.save(tmp_path / "outside.safetensors")
    exported, state = ema.model_state_dict(), copies(ema.state_dict()["averages"])
    assert not bit_identical(exported, trained)
    with ema.applied() as weights:
        with ema.applied() as again:
            assert bit_identical(dict(weights), trained)
            assert bit_identical(dict(again), trained)
        assert bit_identical(copies(model.state_dict()), exported), "the inner block swapped back"
        ema.save(tmp_path / "inside.safetensors")
        assert bit_identical(ema.model_state_dict(), exported)
        assert bit_identical(dict(ema.state_dict()["averages"]), state)
    assert bit_identical(copies(model.state_dict()), trained)
    inside = (tmp_path / "inside.safetensors").read_bytes()
    assert inside == (tmp_path / "outside.safetensors").read_bytes()


def test_02_a_swap_between_forward_and_backward_is_not_silent() -> None:
    """Weights swapped under a running graph give gradients of nothing, or of the wrong weights.

    Values are written in place, which autograd notices. An update writes no weight and is free.
    """
    model = plain()
    ema = EMA(model, 0.5)
    ema.update()
    x, y = batch()
    loss = nn.functional.cross_entropy(model(x), y)
    ema.update()
    loss.backward()
    gradient = model.hidden.weight.grad.clone()
    with ema.applied():
        assert bit_identical(model.hidden.weight.grad, gradient)
    assert bit_identical(model.hidden.weight.grad, gradient)
    loss = nn.functional.cross_entropy(model(x), y)
    with ema.applied():
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_02_a_validation_that_is_never_finished_gives_the_weights_back() -> None:
    """A generator that is dropped in the middle of its loop leaves its context managers open."""
    model = plain()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(2)):
        ema.update()
    trained = copies(model.state_dict())

    def predictions() -> Iterator[Tensor]:
        with ema.applied():
            for seed in range(9):
                yield model(batch(seed)[0])

    iterator = predictions()
    next(iterator)
    assert not bit_identical(copies(model.state_dict()), trained)
    del iterator
    assert bit_identical(copies(model.state_dict()), trained)
    ema.update()


def test_02_a_second_average_sees_the_trained_weights_through_the_first() -> None:
    """Saved while another average is applied, a fresh one takes that for the model.

    Whatever is read inside is the trained model, also where an average refers to it: before its
    first update, and for what merely follows.
    """
    model = convolutional()
    first, fresh = EMA(model, 0.5), EMA(model, 0.8)
    head = EMA(model.head, 0.5)
    for _ in train(model, sgd(model), range(4)):
        first.update()
    second = EMA(model, 0.8)
    second.update()
    own = copies(model.state_dict())
    exported = second.model_state_dict()
    with first.applied() as trained:
        model(batch(30)[0])  # in train mode: counts a batch, moves statistics
        assert bit_identical(fresh.model_state_dict(), own)
        assert bit_identical(dict(fresh.state_dict()["averages"]), _averaged_only(own))
        assert bit_identical(second.model_state_dict(), exported)
        assert second.report().distance == 0
        assert bit_identical(dict(trained), own)
        assert bit_identical(head.model_state_dict()["bias"], own["head.bias"])
        with pytest.raises(RuntimeError, match="cannot update now"):
            head.update()
    assert bit_identical(copies(model.state_dict()), own)


def _averaged_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


# ---------------------------------------------------------------- 3: the average never moves


def test_03_every_trained_tensor_has_an_average_that_moves_towards_it() -> None:
    """Names that do not match, or an update in the wrong direction: the average stays the start.

    The names are exactly the trained ones, and an update of decay d moves each average by 1 - d of
    the way to the weights.
    """
    model = convolutional()
    ema = EMA(model, 0.75)
    ema.update(0)  # the weights before training
    trained = {name for name, _ in model.named_parameters()}
    assert set(ema.averages) == trained | {"norm.running_mean", "norm.running_var"}
    for _ in train(model, sgd(model), range(10)):
        before = copies(ema.averages)
        ema.update()
        for name, weights in model.state_dict().items():
            if name in before:
                assert_close(ema.averages[name], mixture(before[name], weights, 0.75))
                moved = not torch.equal(ema.averages[name], before[name])
                assert moved or name == "conv.bias"  # before a BatchNorm: it has no gradient
    assert 0 < ema.report().distance < 1


def test_03_updates_that_never_come_are_seen(tmp_path: Path) -> None:
    """The line that updates got lost, and what is published is the model at its start.

    The report says that there was no update, and saving warns.
    """
    model = plain()
    ema = EMA(model)
    assert ema.report().updates == 0
    with pytest.warns(UserWarning, match="made no update, so that what is saved is the model"):
        ema.save(tmp_path / "a.safetensors")
    assert bit_identical(files.read(tmp_path / "a.safetensors"), copies(model.state_dict()))


# ------------------------------------------------------------------- 5: decay and warm-up


def test_05_the_initial_weights_do_not_dominate_by_default() -> None:
    """A decay of .9999 on a short run: after it the average still is mostly the random start.

    The first update copies, and the default looks back over the same fraction of any run.
    """
    shares = []
    for steps in (30, 300):
        model = plain()
        ema = EMA(model)
        start = copies(model.state_dict())
        ema.update()
        assert bit_identical(dict(ema.averages), start)
        for _ in range(steps - 1):
            ema.update()
        report = ema.report()
        shares.append(report.mean_age / report.clock)
        assert report.largest_share < 8 / steps  # (g + 1) / t with g = 6.94 for the newest
        with ema.applied():  # no warning
            pass
    assert shares == pytest.approx([0.1119, 0.1119], abs=0.02)


def test_05_a_horizon_too_long_for_the_run_is_told_once() -> None:
    """The average is "noise": nobody saw that .9999 needs tens of thousands of steps.

    The share of a single state is known exactly; from ten percent on `applied` warns, and names
    what to do.
    """
    model = plain()
    ema = EMA(model, 0.9999)
    for _ in train(model, sgd(model), range(50)):
        ema.update()
    assert ema.report().largest_share == pytest.approx(0.9999**49)
    with (
        pytest.warns(UserWarning, match=r"the first weights seen still are 100% .*Debiased\(decay"),
        ema.applied(),
    ):
        pass
    with ema.applied():
        pass

    ema = EMA(model, Debiased(0.9999))
    for _ in train(model, sgd(model), range(50)):
        ema.update()
    assert ema.report().largest_share == pytest.approx(1 / 50, rel=0.01)
    with ema.applied():
        pass


def test_05_a_horizon_can_be_said_in_images() -> None:
    """The batch size is doubled, and the horizon with it, because a decay counts steps."""
    model = plain()
    optimizer = sgd(model)
    by_steps, by_images = EMA(model, HalfLife(10)), EMA(model, HalfLife(640))
    by_steps.attach(optimizer)
    by_images.attach(optimizer, tick=64)
    for _ in train(model, optimizer, range(20)):
        pass
    assert (by_steps.clock, by_images.clock) == (20, 20 * 64)
    for name, average in by_steps.averages.items():
        assert_close(by_images.averages[name], average, updates=20)


# ------------------------------------------------------------------------------- 6: buffers


def test_06_counters_are_the_models_and_statistics_are_averaged() -> None:
    """Integer buffers get averaged and truncated, or stay at 0; statistics belong to other weights.

    Integers follow the model, running statistics are averaged like the weights they belong to.
    """
    model = convolutional()
    ema = EMA(model, 0.5)
    means = []
    for _ in train(model, sgd(model), range(6)):
        ema.update()
        means.append(model.norm.running_mean.clone())
    expected = means[0].double()
    for mean in means[1:]:
        expected = mixture(expected, mean, 0.5)
    assert_close(ema.averages["norm.running_mean"], expected, updates=6)
    assert "norm.num_batches_tracked" not in ema.averages
    with ema.applied():
        assert_close(model.norm.running_mean, expected, updates=6)
        assert model.norm.num_batches_tracked.item() == 6
    exported = ema.model_state_dict()["norm.num_batches_tracked"]
    assert exported.dtype == torch.int64
    assert exported.item() == 6
    assert bit_identical(model.norm.running_mean, means[-1])


class Causal(nn.Module):
    """Minus infinity above the diagonal, in a buffer that is saved or not."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 3)
        mask = torch.full((3, 3), -math.inf).triu(1)
        self.register_buffer("mask", mask, persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return (self.scores(x)[:, None] + self.mask).logsumexp(-1)


@pytest.mark.parametrize("persistent", [True, False])
def test_06_a_mask_of_infinities_stays_one(persistent: bool) -> None:
    """An averaged mask is NaN after one step: minus infinity minus minus infinity.

    What is not trained follows the model; the mask is the model's own.
    """
    model = Causal(persistent)
    mask = model.mask.clone()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(5)):
        ema.update()
    assert set(ema.averages) == {"scores.weight", "scores.bias"}
    with ema.applied():
        assert bit_identical(model.mask, mask)
        assert model(batch()[0]).isfinite().all()
    exported = ema.model_state_dict()
    assert exported.keys() == model.state_dict().keys()
    assert ("mask" in exported) == persistent
    assert not persistent or bit_identical(exported["mask"], mask)

    teacher = Causal(persistent)

    def weights_only(name: str, tensor: Tensor, module: nn.Module) -> polyak.selection.Verdict:
        return "follow" if name == "mask" else everything(name, tensor, module)

    into = EMA(model, 0.9, into=teacher, policy=weights_only)
    for _ in train(model, sgd(model), range(2)):
        into.update()
    assert bit_identical(teacher.mask, mask)
    assert teacher.scores.weight.isfinite().all()


@pytest.mark.parametrize(
    "normalize", [spectral_norm, nn.utils.spectral_norm], ids=["parametrization", "hook"]
)
def test_06_spectral_norm_vectors_keep_unit_norm(
    normalize: Callable[[nn.Module], nn.Module],
) -> None:
    """A mean of unit vectors is shorter than one, so that the averaged layer is scaled up.

    The vectors follow the model; only the weight is averaged.
    """
    model = nn.Sequential(normalize(nn.Linear(8, 8)), nn.Linear(8, 3))
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model, lr=0.5), range(10)):
        ema.update()
    vectors = {name for name, buffer in model.named_buffers() if buffer.dim() == 1}
    assert len(vectors) == 2
    assert not vectors & set(ema.averages)
    own = copies(model.state_dict())
    with ema.applied():
        inside = copies(model.state_dict())
        model(batch()[0])  # in train mode: a power iteration on the averaged weight
        moved = copies(model.state_dict())
    exported = ema.model_state_dict()
    for name in vectors:
        assert_close(exported[name].norm(), torch.tensor(1.0), updates=4)
        assert bit_identical(exported[name], own[name])
        assert bit_identical(inside[name], own[name])
        assert_close(moved[name].norm(), torch.tensor(1.0), updates=4)
        assert not bit_identical(moved[name], own[name])
    assert bit_identical(copies(model.state_dict()), own)


# ----------------------------------------------------------- 7: which weights are in the file?


def test_07_a_file_says_which_weights_it_has(tmp_path: Path) -> None:
    """Two sets of weights in one checkpoint, or none marked: the wrong set gets published.

    The file has one set, under the model's own names; its facts say which tensors are averages, by
    which decay, at which clock. A file of somebody else's has no facts, and says so.
    """
    model = convolutional()
    ema = EMA(model, HalfLife(1))
    for _ in train(model, sgd(model), range(6)):
        ema.update()
    ema.save(tmp_path / "ema.safetensors")
    facts = files.read_facts(tmp_path / "ema.safetensors")
    assert set(facts["averaged"]) == set(ema.averages)
    assert facts["clock"] == 6
    assert facts["updates"] == 6
    assert from_spec(facts["decay"]) == HalfLife(1)
    assert facts["policy"] == "trainable"
    assert facts["reestimated"] == []
    assert facts["producer"] == f"polyak {polyak.__version__}"

    loaded = safetensors.torch.load_file(tmp_path / "ema.safetensors")
    fresh = convolutional(seed=1)
    fresh.load_state_dict(loaded, strict=True)
    assert bit_identical(copies(fresh.state_dict()), ema.model_state_dict())
    assert not bit_identical(copies(fresh.state_dict()), copies(model.state_dict()))

    ema.reestimate_statistics([batch(9)[0]])
    ema.save(tmp_path / "ema.safetensors")
    facts = files.read_facts(tmp_path / "ema.safetensors")
    assert facts["reestimated"] == ["norm.running_mean", "norm.running_var"]

    safetensors.torch.save_file(loaded, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="polyak did not write it"):
        files.read_facts(tmp_path / "other.safetensors")


# ---------------------------------------------------------- 8: bfloat16 and float16 averages


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_08_the_average_of_a_narrow_model_moves(dtype: torch.dtype) -> None:
    """An average in bfloat16 ignores small steps: at .999 it is the initial weights for ever.

    Averages are float32 at least. The same recursion in the model's dtype does not move at all.
    """
    model = plain().to(dtype)
    narrow = plain(seed=1).to(dtype)
    with torch.no_grad():
        for parameter in [*model.parameters(), *narrow.parameters()]:
            parameter.fill_(1.0)
    ema = EMA(model, 0.999)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.1)
    for _ in range(100):
        ema.update()
        with torch.no_grad():
            for mine, weights in zip(narrow.parameters(), model.parameters(), strict=True):
                mine.lerp_(weights, 1 - 0.999)
    assert all((parameter == 1).all() for parameter in narrow.parameters())
    step = model.head.bias[0].item() - 1  # 0.1, to the dtype's rounding
    for average in ema.averages.values():
        assert average.dtype == torch.float32
        expected = torch.full_like(average, 1 + step * (1 - 0.999**100))
        assert_close(average, expected, updates=100)
    for name, weights in ema.model_state_dict().items():
        assert bit_identical(weights, ema.averages[name].to(dtype))


def test_08_each_dtype_of_a_model_has_averages_wide_enough() -> None:
    """One dtype for all averages loses float64, or doubles what bfloat16 needs."""
    model = mixed()
    model.head.double()
    ema = EMA(model)
    ema.update()
    dtypes = {name: average.dtype for name, average in ema.averages.items()}
    assert dtypes.pop("head.weight") == dtypes.pop("head.bias") == torch.float64
    assert set(dtypes.values()) == {torch.float32}
    exported = {name: tensor.dtype for name, tensor in ema.model_state_dict().items()}
    assert exported == {name: tensor.dtype for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------- 9: one NaN poisons it


def test_09_a_nan_never_enters_an_average(tmp_path: Path) -> None:
    """One bad batch, and the average is NaN for the rest of the run; guards then save nothing.

    An element that is not finite keeps its average; how many did is counted and told; saving goes
    on; the average heals the model.
    """
    model = convolutional()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for _ in train(model, optimizer, range(3)):
        ema.update()
    before = copies(ema.averages)
    with torch.no_grad():
        model.head.weight[0, :5] = math.nan
        model.conv.weight[0] = math.inf
        model.norm.running_var[2] = -math.inf
    bad = 5 + model.conv.weight[0].numel() + 1
    ema.update()
    assert bit_identical(ema.averages["head.weight"][0, :5], before["head.weight"][0, :5])
    assert_close(
        ema.averages["head.weight"][1], mixture(before["head.weight"][1], model.head.weight[1], 0.5)
    )
    with pytest.warns(UserWarning, match=f"{bad} elements .* not finite .* copy_to.model. heals"):
        ema.save(tmp_path / "ema.safetensors")
    assert all(t.isfinite().all() for t in files.read(tmp_path / "ema.safetensors").values())
    assert ema.report().nonfinite == bad  # told once

    ema.copy_to(model)
    optimizer.state.clear()
    for _ in train(model, optimizer, range(3, 9)):
        ema.update()
    assert all(average.isfinite().all() for average in ema.averages.values())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert ema.report().nonfinite == bad
    assert ema.clock == 10
    resumed = EMA(model, 0.5)
    resumed.load_state_dict(ema.state_dict())
    assert resumed.report().nonfinite == bad


# ---------------------------------------------------------------------------- 10: when to update


@pytest.mark.parametrize("kind", ["unfused", "fused", "fused, far", "foreach"])
@pytest.mark.parametrize("every", [1, 2])
def test_10_steps_that_a_grad_scaler_skips_are_not_counted(
    kind: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With mixed precision the clock ran ahead of the training, by the steps that were skipped.

    `attach` counts the steps that changed the weights. Fused optimizers, too, whose hooks run on
    skipped steps as well, and where only an accelerator knows: there the weight of the update
    becomes 0, and the clock is set right when the flag has arrived.
    """
    model = plain()
    if kind == "fused, far":
        monkeypatch.setattr(engine, "is_near", lambda _: False)
    how = {} if kind == "unfused" else {kind.removesuffix(", far"): True}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, **how)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    ema = EMA(model, 0.5)
    ema.attach(optimizer, every=every)
    expected: dict[str, Tensor] = {}
    real = 0
    for step in range(10):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        if step in (0, 4, 5):
            model.head.bias.grad[0] = math.inf
        before = copies(model.state_dict())
        scaler.step(optimizer)
        scaler.update()
        skipped = step in (0, 4, 5)
        assert bit_identical(copies(model.state_dict()), before) == skipped
        real += not skipped
        if skipped or real % every:
            continue
        now = copies(model.state_dict())
        keep = 0.5**every
        expected = {n: mixture(expected[n], now[n], keep) if expected else now[n] for n in now}
    assert real == 7
    assert ema.clock == real - real % every
    assert ema.report().updates == real // every
    for name, average in ema.averages.items():
        assert_close(average, expected[name], updates=10)


@pytest.mark.parametrize("every", [1, 3])
def test_10_nobody_sees_that_a_flag_comes_late(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag of a skipped step, read at once or later: the same bits, whoever asks, whenever."""
    models_, emas, optimizers = [], [], []
    for _ in range(2):
        models_.append(plain())
        optimizers.append(torch.optim.SGD(models_[-1].parameters(), lr=0.1, fused=True))
        emas.append(EMA(models_[-1], Debiased(0.9)))
        emas[-1].attach(optimizers[-1], every=every)
    near, far = emas
    generator = torch.Generator().manual_seed(0)
    for step in range(60):
        skipped = torch.rand((), generator=generator) < 0.3
        for number, (model, optimizer) in enumerate(zip(models_, optimizers, strict=True)):
            monkeypatch.setattr(engine, "is_near", lambda _, number=number: number == 0)
            x, y = batch(step)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.grad_scale, optimizer.found_inf = None, skipped.float()
            optimizer.step()
            optimizer.found_inf.zero_()  # its memory may be used for something else by now
            del optimizer.grad_scale, optimizer.found_inf
            optimizer.zero_grad()
        ask = int(torch.randint(7, (), generator=generator))
        if ask == 0:
            assert far.clock == near.clock
        elif ask == 1:
            facts = [json.loads(ema.state_dict()["facts"]) for ema in emas]
            for each in facts:
                (each["history"] or {}).pop("run", None)
            assert facts[0] == facts[1]
        elif ask == 2:
            assert str(far.report()) == str(near.report())
        elif ask == 3:
            assert len({ema.history and ema.history.ticks for ema in emas}) == 1
        elif ask == 4:
            far.load_state_dict(copy.deepcopy(far.state_dict()))
        elif ask == 5:
            with far.applied(), near.applied():
                assert bit_identical(models_[1].state_dict(), models_[0].state_dict())
        assert bit_identical(dict(far.averages), dict(near.averages))
    assert repr(far) == repr(near)
    far.reset()
    assert far.clock == 0


def test_10_gradient_accumulation_ticks_once_per_step() -> None:
    """Updates in the loop over micro-batches shorten the horizon by their number."""
    model = plain()
    optimizer = sgd(model)
    attached, by_hand = EMA(model, 0.5), EMA(model, 0.5)
    attached.attach(optimizer)
    for micro in range(12):
        x, y = batch(micro)
        (nn.functional.cross_entropy(model(x), y) / 4).backward()
        if micro % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
            by_hand.update()
    assert attached.clock == 3
    assert bit_identical(dict(attached.averages), dict(by_hand.averages))


def test_10_a_step_of_many_evaluations_is_one_step() -> None:
    """LBFGS evaluates the model many times in one step; averages of its trials mean nothing."""
    model = plain()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        x, y = batch(3)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    seen = []
    for _ in range(3):
        optimizer.step(closure)
        seen.append(copies(model.state_dict()))
    assert evaluations > 6
    assert ema.clock == 3
    expected = mixture(
        mixture(seen[0]["head.bias"], seen[1]["head.bias"], 0.5), seen[2]["head.bias"], 0.5
    )
    assert_close(ema.averages["head.bias"], expected, updates=3)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    ],
    ids=["StepLR", "OneCycleLR", "WarmRestarts"],
)
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_10_a_scheduler_does_not_change_the_count(
    schedule: Callable[..., Any], scheduler_first: bool
) -> None:
    """Schedulers wrap `optimizer.step`, so that what counts its calls may count them twice."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model)
    if not scheduler_first:
        ema.attach(optimizer)
    scheduler = schedule(optimizer)
    if scheduler_first:
        ema.attach(optimizer)
    for _ in train(model, optimizer, range(8)):
        scheduler.step()
    assert ema.clock == 8


def test_10_with_two_optimizers_the_one_that_steps_last_counts() -> None:
    """Two attached optimizers tick twice per step; one, the last, sees both of them done."""
    model = plain()
    first = torch.optim.SGD(model.hidden.parameters(), lr=0.1)
    last = torch.optim.SGD(model.head.parameters(), lr=0.1)
    ema = EMA(model, 0.5)
    handle = ema.attach(last)
    by_hand = EMA(model, 0.5)
    for _ in train(model, first, range(4)):
        last.step()
        by_hand.update()
    assert ema.clock == 4
    assert bit_identical(dict(ema.averages), dict(by_hand.averages))
    handle.remove()
    last.step()
    assert ema.clock == 4
    ema.update()  # by hand again
    assert ema.clock == 5


def test_21_several_horizons_are_several_emas_on_one_optimizer() -> None:
    """One horizon is chosen before the run, and the run is made again to change it.

    Several EMAs watch one run, each right on its own, and are applied one after the other.
    """
    model = plain()
    optimizer = sgd(model)
    decays = [0.2, 0.5, 0.8]
    emas = [EMA(model, decay) for decay in decays]
    for ema in emas:
        ema.attach(optimizer)
    expected: list[dict[str, Tensor]] = [{}, {}, {}]
    for _ in train(model, optimizer, range(6)):
        now = copies(model.state_dict())
        for i, decay in enumerate(decays):
            old = expected[i]
            expected[i] = {n: mixture(old[n], now[n], decay) if old else now[n] for n in now}
    for ema, wanted in zip(emas[:2], expected, strict=False):
        assert ema.clock == 6
        with ema.applied():
            for name, weights in model.state_dict().items():
                assert_close(weights, wanted[name], updates=6)
    for name, average in emas[2].averages.items():
        assert_close(average, expected[2][name], updates=6)
    assert bit_identical(copies(model.state_dict()), now)


# ------------------------------------------------------------- 12: deepcopy at construction


class Uncopied(nn.Module):
    """What cannot be copied: a lock, a file, a refusal, a tensor in the middle of a graph."""

    def __init__(self, why: object) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.why = why

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Refusing(Uncopied):
    def __deepcopy__(self, memo: object) -> Uncopied:
        raise RuntimeError("this module is not copied")


def old_weight_norm(why: object) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3))


def pruned(why: object) -> nn.Module:
    layer = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    return nn.Sequential(layer, nn.Linear(8, 3))


UNCOPIED: dict[str, Callable[[object], nn.Module]] = {
    "old weight_norm": old_weight_norm,
    "prune": pruned,
    "process group": Uncopied,
    "lock": lambda _: Uncopied(threading.Lock()),
    "file": lambda _: Uncopied(io.StringIO()),
    "non-leaf": lambda _: Uncopied(torch.ones(2, requires_grad=True) * 2),
    "refusing": Refusing,
}


@pytest.mark.parametrize("name", UNCOPIED)
def test_12_a_module_that_cannot_be_copied_is_averaged(
    name: str, group: dist.ProcessGroup, tmp_path: Path
) -> None:
    """The average is a deep copy of the model, and so the constructor crashes on such modules.

    polyak never copies a module: it knows names and tensors.
    """
    model = UNCOPIED[name](group)
    if name != "file":  # shown here to be what the test says; a StringIO is merely emptied
        with pytest.raises((RuntimeError, TypeError)):
            copy.deepcopy(model)
    ema = EMA(model, 0.5)
    optimizer = sgd(model)
    ema.attach(optimizer)
    expected: dict[str, Tensor] = {}
    for _ in train(model, optimizer, range(5)):
        now = copies(model.named_parameters())
        expected = {n: mixture(expected[n], now[n], 0.5) if expected else now[n] for n in now}
    assert set(ema.averages) == set(expected)
    before = model(batch()[0])
    with ema.applied():
        inside = model(batch()[0])
        for key, parameter in model.named_parameters():
            assert_close(parameter, expected[key], updates=5)
    assert not torch.equal(inside, before)
    assert bit_identical(model(batch()[0]).detach(), before.detach())
    ema.save(tmp_path / "ema.safetensors")
    assert set(files.read(tmp_path / "ema.safetensors")) == set(model.state_dict())


@pytest.mark.parametrize("kind", ["old weight_norm", "prune"])
def test_12_a_weight_that_is_computed_is_computed_from_averages(kind: str) -> None:
    """Averaging the product of averaged factors twice, or using the one of the last step."""
    model = UNCOPIED[kind](None)
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(5)):
        ema.update()
    x = batch()[0]
    with ema.applied(), torch.no_grad():
        found = model(x)
        a = {name.removeprefix("0."): average for name, average in ema.averages.items()}
        if kind == "prune":
            weight = a["weight_orig"] * model[0].weight_mask
            assert 0 < model[0].weight_mask.sum() < 64
        else:
            weight = a["weight_v"] * (a["weight_g"] / a["weight_v"].norm(dim=1, keepdim=True))
        expected = model[1](nn.functional.linear(x, weight, a["bias"]))
    torch.testing.assert_close(found, expected)


def test_12_parametrized_weights_are_averaged_as_what_is_trained() -> None:
    """The new `weight_norm` keeps its factors in a submodule, under long names."""
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 3))
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(3)):
        ema.update()
    assert set(ema.averages) == {name for name, _ in model.named_parameters()}
    assert ema.model_state_dict().keys() == model.state_dict().keys()


# ------------------------------------------------------------- 13: names under wrappers


class Named(nn.Module):
    """Children whose names are those that wrappers use."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 8)
        self._orig_mod = nn.Linear(8, 8)
        self._checkpoint_wrapped_module = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self._checkpoint_wrapped_module(self._orig_mod(self.module(x)))


def wrapped(kind: str, model: nn.Module) -> nn.Module:
    if kind == "DDP":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "DataParallel":
        return nn.DataParallel(model)
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "compile of DDP":
        return torch.compile(wrapped("DDP", model), backend="eager")
    if kind == "checkpoint":
        from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

        return checkpoint_wrapper.checkpoint_wrapper(model)
    return model


@pytest.mark.parametrize(
    "kind", ["plain", "DDP", "DataParallel", "compile", "compile of DDP", "checkpoint"]
)
@pytest.mark.parametrize("build", [Named, nested])
def test_13_names_are_those_of_the_plain_model(
    kind: str, build: Callable[[], nn.Module], group: dist.ProcessGroup, tmp_path: Path
) -> None:
    """Names gain or lose `module.` and `_orig_mod.`: nothing matches, all is skipped silently.

    Wrappers are recognized by their type, never by the name of a child: a child called `module`
    keeps its name.
    """
    model = build()
    names = list(model.state_dict())
    assert any(name.startswith("module.") for name in names)
    wrapper = wrapped(kind, model)
    ema = EMA(wrapper, 0.5)
    bare = EMA(model, 0.5)
    for _ in train(wrapper, sgd(wrapper), range(3)):
        ema.update()
        bare.update()
    assert list(ema.averages) == [name for name, _ in model.named_parameters()]
    assert list(ema.model_state_dict()) == names
    assert bit_identical(dict(ema.averages), dict(bare.averages))
    ema.save(tmp_path / "ema.safetensors")
    assert set(files.read(tmp_path / "ema.safetensors")) == set(names)
    bare.load_state_dict(ema.state_dict())
    fresh = build()
    ema.copy_to(fresh)
    assert bit_identical(copies(fresh.state_dict()), ema.model_state_dict())
    with ema.applied():
        inside = wrapper(batch()[0])
    assert bit_identical(inside.detach(), fresh(batch()[0]).detach())


# ----------------------------------------------------------------------- 16: teacher and student


def test_16_a_teacher_is_made_one() -> None:
    """The teacher trains with dropout on, gets gradients, or gets the optimizer's steps.

    At construction it is put into eval mode and out of autograd, once; a later `train()` is the
    user's and is respected. An optimizer that holds its parameters is refused.
    """
    student, teacher = convolutional(), convolutional(seed=1)
    start = copies(teacher.state_dict())
    ema = EMA(student, 0.9, into=teacher)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    optimizer = sgd(student)
    both = torch.optim.SGD([*student.parameters(), *teacher.head.parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"trains parameters of the teacher.*student's parameters"):
        ema.attach(both)
    both.step()
    assert ema.clock == 0, "the hooks of the refused optimizer are still on"
    ema.attach(optimizer)
    for step in train(student, optimizer, range(4)):
        if step == 0:
            expected = mixture(start["head.bias"], student.head.bias.detach(), 0.9)
            assert_close(teacher.head.bias, expected)
    assert ema.averages["head.bias"].data_ptr() == teacher.head.bias.data_ptr()
    assert teacher.norm.num_batches_tracked.item() == 4
    teacher.train()
    for _ in train(student, optimizer, range(2)):
        assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


def test_16_the_schedule_is_a_function_of_the_clock_alone() -> None:
    """The schedule depends on the number of devices or loaders, or begins anew after a resume.

    The decay is a value: what it keeps at a clock is the same in every run that gets there.
    """
    schedule = Cosine(0.5, 1.0, 20)
    states = [copies(scramble_(plain(), seed).state_dict()) for seed in range(20)]

    def run(first: int, last: int, ema: EMA, student: nn.Module, by_hand: bool) -> None:
        for t in range(first, last + 1):
            student.load_state_dict(states[t - 1])
            ema.update(t if by_hand else None)

    results = []
    for split in (None, 7, 13):
        student, teacher = plain(), plain(seed=5)
        ema = EMA(student, schedule, into=teacher)
        if split is None:
            run(1, 20, ema, student, by_hand=False)
        else:
            run(1, split, ema, student, by_hand=True)
            stored = copy.deepcopy(ema.state_dict())
            student, teacher = plain(seed=8), plain(seed=9)
            ema = EMA(student, schedule, into=teacher)
            ema.load_state_dict(stored)
            run(split + 1, 20, ema, student, by_hand=False)
        results.append(copies(teacher.state_dict()))
    assert bit_identical(results[0], results[1])
    assert bit_identical(results[0], results[2])

    expected = plain(seed=5).state_dict()["head.weight"].double()
    for t in range(1, 21):
        keep = 1 - 0.5 * (math.cos(math.pi * (t - 1) / 20) + 1) / 2
        expected = mixture(expected, states[t - 1]["head.weight"], keep)
    assert_close(results[0]["head.weight"], expected, updates=20)


def test_16_a_narrow_teacher_does_not_stall() -> None:
    """A bfloat16 teacher at .999 never learns; float32 averages are written through to it."""
    student, teacher = plain().bfloat16(), plain().bfloat16()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.fill_(1.0)
        for parameter in student.parameters():
            parameter.fill_(1.5)
    ema = EMA(student, 0.999, into=teacher)
    for _ in range(700):
        ema.update()
    expected = 1 + 0.5 * (1 - 0.999**700)
    for parameter in teacher.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.float().sub(expected).abs().max() < 2**-8 + 1e-4


# ------------------------------------------------------------------------------- 17: DDP


def test_17_an_ema_is_not_part_of_the_model(group: dist.ProcessGroup) -> None:
    """The average is a submodule: DDP broadcasts it, optimizers train it, checkpoints double.

    An EMA is no module. It may be an attribute of the model, and nothing changes.
    """
    model = convolutional()
    names = list(model.state_dict())
    model.ema = EMA(model, 0.5)
    assert not isinstance(model.ema, nn.Module)
    assert not any(
        isinstance(value, nn.Module) for value in vars(model.ema).values() if value is not model
    )
    assert list(model.state_dict()) == names
    assert len(list(model.modules())) == 5
    before = len(list(model.parameters()))
    ddp = nn.parallel.DistributedDataParallel(model)
    model.ema.attach(optimizer := sgd(ddp))
    for _ in train(ddp, optimizer, range(3)):
        pass
    assert len(list(ddp.parameters())) == before
    assert model.ema.clock == 3
    assert not any(name.startswith("module.") for name in model.ema.averages)


# ------------------------------------------------------------------------------- 18: LoRA


class Adapted(nn.Module):
    """A frozen base with a trainable low-rank adapter beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(8, 64).requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 64, bias=False)
        self.head = nn.Linear(64, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(x) + self.up(self.down(x)))


def test_18_only_adapters_are_averaged_held_and_written(tmp_path: Path) -> None:
    """Averages of adapters copy the whole frozen base, or are switched off under LoRA.

    What is frozen follows: it is referred to, never copied, not written by `applied`, and left out
    of a file of averages only.
    """
    model = Adapted()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(4)):
        ema.update()
    adapters = {"down.weight", "up.weight"}
    nbytes = 4 * (model.down.weight.numel() + model.up.weight.numel())
    assert set(ema.averages) == adapters
    assert ema.report().bytes == nbytes
    state = ema.state_dict()["averages"]
    assert sum(tensor.untyped_storage().nbytes() for tensor in state.values()) == nbytes
    own = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not own & {average.data_ptr() for average in ema.averages.values()}

    versions = [model.base.weight._version, model.head.bias._version]
    pointers = [model.base.weight.data_ptr(), model.head.bias.data_ptr()]
    with ema.applied() as trained:
        assert trained["base.weight"].data_ptr() == pointers[0]
        assert not torch.equal(trained["up.weight"], model.up.weight)
    assert [model.base.weight._version, model.head.bias._version] == versions
    assert [model.base.weight.data_ptr(), model.head.bias.data_ptr()] == pointers

    ema.save(tmp_path / "adapters.safetensors", averages_only=True)
    assert bit_identical(files.read(tmp_path / "adapters.safetensors"), copies(ema.averages))
    ema.save(tmp_path / "all.safetensors")
    assert files.read(tmp_path / "all.safetensors").keys() == model.state_dict().keys()
    assert set(files.read_facts(tmp_path / "all.safetensors")["averaged"]) == adapters


def test_11_before_the_first_update_nothing_is_held() -> None:
    """An average is allocated with the model, before anybody knows on which device or in which
    dtype: memory for two, and copies of tensors that are never trained.
    """
    model = frozen()
    ema = EMA(model)
    for name, tensor in ema.averages.items():
        assert tensor.data_ptr() == model.state_dict()[name].data_ptr()
    assert ema.report().bytes == 0
    model.double()
    ema.update()
    assert set(ema.averages) == {"head.weight", "head.bias"}
    assert ema.report().bytes == 8 * sum(p.numel() for p in model.head.parameters())


# ------------------------------------------------------------------------ 19: positional zip


class Square(nn.Module):
    """Layers of one shape, so that a mistake in their order fits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.third = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)))


def test_19_tensors_are_matched_by_name() -> None:
    """Parameters are paired by position: a registration order that differs mixes layers, silently.

    Order is irrelevant for teachers, states and copies; names are what matches.
    """
    student, teacher = Square(), reversed_(Square())
    assert list(student.state_dict()) != list(teacher.state_dict())
    start = copies(teacher.state_dict())
    ema = EMA(student, 0.5, into=teacher)
    ema.update()
    for name, weights in student.state_dict().items():
        assert_close(teacher.state_dict()[name], mixture(start[name], weights, 0.5))

    ema = EMA(student, 0.5)
    ema.update()
    target = reversed_(Square())
    ema.copy_to(target)
    for name, tensor in target.state_dict().items():
        assert bit_identical(tensor, ema.averages[name])
    other = EMA(target, 0.5)
    state = ema.state_dict()
    for averages in (state["averages"], dict(reversed(state["averages"].items()))):
        other.load_state_dict({**state, "averages": averages})
        assert bit_identical(dict(other.averages), dict(ema.averages))
    scramble_(target, 3)
    before = copies(other.averages)
    other.update()
    for name, weights in target.state_dict().items():
        assert_close(other.averages[name], mixture(before[name], weights, 0.5), updates=4)

    target = Square()
    start = copies(target.state_dict())
    polyak.update_(target, reversed_(student), decay=0.5)
    for name, weights in student.state_dict().items():
        assert_close(target.state_dict()[name], mixture(start[name], weights, 0.5))


# -------------------------------------------------------------------------- 20: tied tensors


class Tied(nn.Module):
    """An embedding whose weight is also that of the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8, bias=False)
        self.head = nn.Linear(3, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.head.weight


@pytest.mark.parametrize("teacher", [False, True], ids=["average", "teacher"])
def test_20_a_tied_tensor_is_updated_once(teacher: bool, tmp_path: Path) -> None:
    """A tensor under two names is updated twice: decay .9 acts as .81.

    One storage, one update; it is exported under both names.
    """
    model, home = Tied(), Tied()
    home.load_state_dict(model.state_dict())
    ema = EMA(model, 0.9, into=home) if teacher else EMA(model, 0.9)
    ema.update()
    start = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight += 1.0
    ema.update()
    assert list(ema.averages) == ["embed.weight"]
    exported = ema.model_state_dict()
    ema.save(tmp_path / "ema.safetensors")
    written = files.read(tmp_path / "ema.safetensors")
    for name in ("embed.weight", "head.weight"):
        for found in (exported[name], written[name]):
            assert_close(found - start, torch.full_like(start, 0.100), updates=2)
    assert ema.report().bytes == start.nbytes
    with ema.applied():
        assert model.head.weight is model.embed.weight
        assert_close(model.head.weight - start, torch.full_like(start, 0.100), updates=2)
    assert_close(model.head.weight - start, torch.full_like(start, 1.0), updates=2)
    fresh = Tied()
    fresh.load_state_dict(written, strict=True)


def test_20_a_tied_model_trains_to_the_same_average_as_an_untied_definition() -> None:
    """Ties of modules and of tensors, over a real run."""
    model = tied()
    ema = EMA(model, 0.5)
    expected: dict[str, Tensor] = {}
    for _ in train(model, sgd(model), range(6)):
        ema.update()
        now = copies(model.named_parameters())  # torch lists each once
        expected = {n: mixture(expected[n], now[n], 0.5) if expected else now[n] for n in now}
    assert set(ema.averages) == set(expected)
    for name, average in ema.averages.items():
        assert_close(average, expected[name], updates=6)
    exported = ema.model_state_dict()
    assert exported.keys() == model.state_dict().keys()
    assert bit_identical(exported["second.weight"], exported["first.weight"])


# ------------------------------------------------------------------------------- 22: words


def test_22_there_is_one_word_and_its_complement_is_refused() -> None:
    """Momentum in one library is one minus momentum in the next, and .001 is taken for .999.

    The word is decay, the share that is kept, everywhere; values that can only be the complement
    are refused or warned about with the value to write instead.
    """
    forbidden = {"momentum", "beta", "tau", "alpha", "smoothing", "rate"}
    public = [getattr(polyak, name) for name in polyak.__all__]
    public += [
        value for name, value in vars(EMA).items() if callable(value) and not name.startswith("_")
    ]
    seen = set()
    for function in public:
        seen |= set(inspect.signature(function).parameters)
    assert "decay" in seen
    assert not forbidden & seen
    model = plain()
    with pytest.warns(UserWarning, match=r"share that is replaced.*write .*0\.999"):
        EMA(model, 0.001)
    with pytest.raises(ValueError, match=r"between 0 and 1, got -0\.1.*1 - decay"):
        EMA(model, -0.1)
    with pytest.raises(ValueError, match=r"got 1000.*HalfLife\(1000\)"):
        EMA(model, 1000)
    with pytest.raises(ValueError, match=r"decay=1\.0 never moves"):
        EMA(model, 1.0)
    with pytest.raises(TypeError, match="momentum"):
        EMA(model, momentum=0.1)  # type: ignore[call-arg]


# ------------------------------------------------------------------------ 23: not seeing it


def test_23_the_report_shows_what_was_invisible(caplog: pytest.LogCaptureFixture) -> None:
    """A lost resume, an average that stands still and NaN are found at the end of the run.

    The report is a flat dict of floats for any logger, and each of these moves a number in it.
    """
    model = plain()
    ema = EMA(model, 0.5)
    optimizer = sgd(model)
    ema.attach(optimizer)
    for _ in train(model, optimizer, range(8)):
        pass
    metrics = ema.report().metrics("ema/")
    assert all(type(key) is str and type(value) is float for key, value in metrics.items())
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["ema/clock"] == metrics["ema/updates"] == 8
    assert metrics["ema/mean_age"] == pytest.approx(1.0, abs=0.05)
    assert metrics["ema/effective_samples"] == pytest.approx(3.0, abs=0.1)
    assert metrics["ema/tensors"] == 4
    difference = math.sqrt(
        sum(
            (ema.averages[n] - p).double().square().sum().item()
            for n, p in model.named_parameters()
        )
        / sum(p.double().square().sum().item() for p in model.parameters())
    )
    assert metrics["ema/distance"] == pytest.approx(difference)

    lost = EMA(model, 0.5).report().metrics("ema/")  # 1: a resume without its state
    assert lost["ema/clock"] == lost["ema/updates"] == 0
    stalled = EMA(model, 0.5)  # 3: updates that see nothing new
    stalled.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert stalled.report().distance > 10 * metrics["ema/distance"]
    with torch.no_grad():  # 9: NaN
        model.head.bias[1] = math.nan
    ema.update(ema.clock + 1)
    with pytest.warns(UserWarning, match="1 elements .* not finite"):
        assert ema.report().metrics()["nonfinite"] == 1.0
    with caplog.at_level(logging.INFO):
        logging.getLogger("run").info("%s", ema.report())
    assert "mean age" in caplog.text
    assert "1 elements" in caplog.text


def test_23_a_look_changes_nothing() -> None:
    """Logging that moves statistics, modes or the clock is worse than none."""
    model = convolutional()
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(3)):
        ema.update()
    snapshot, averages = Snapshot(model), copies(ema.averages)
    rng = torch.get_rng_state()
    ema.report()
    ema.state_dict()
    ema.model_state_dict()
    assert snapshot.differences() == []
    assert bit_identical(dict(ema.averages), averages)
    assert bit_identical(torch.get_rng_state(), rng)
    assert ema.clock == 3
