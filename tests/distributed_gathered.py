"""What FSDP2 has gathered: whole weights around a forward, and gathers that were begun ahead.

Full copies outlive their forward: at the root after one without a backward, everywhere after one
that an exception has broken off. None of them may bring averages into training, or the reverse.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed_tools import (
    Layout,
    Net,
    OnPurposeError,
    assert_same,
    averaged,
    case,
    fsdp,
    fsdp_mixed,
    fsdp_tp,
    gradients,
    hsdp,
    law,
    line,
    momenta,
    net,
    prefetching,
    refused,
    registered_shards,
    replicated_tp,
    seeded,
    sgd,
    sharded,
    shards,
    step,
    uneven,
)
from models import batch
from polyak import EMA, files


def resharding(model: Net) -> Net:
    """Shard again after every forward, the root as well; gather ahead."""
    return _after_forward(model, True)


def keeping(model: Net) -> Net:
    """Keep what is gathered from forward to backward; gather ahead."""
    return _after_forward(model, False)


def halving(model: Net) -> Net:
    """Shard over half of the ranks between forward and backward; gather ahead."""
    return _after_forward(model, dist.get_world_size() // 2)


def partly(model: Net) -> Net:
    """Shard the blocks only, so that each of them is a root."""
    for block in (model.first, model.second):
        fully_shard(block, mesh=line())
    return model


def _after_forward(model: Any, reshard: bool | int) -> Any:
    for module in (model.first, model.second, model):
        fully_shard(module, mesh=line(), reshard_after_forward=reshard)
    prefetching(model)
    return model


GATHERING = (fsdp, fsdp_mixed, partly, resharding, keeping, halving, hsdp, fsdp_tp, replicated_tp)
AHEAD = (fsdp_mixed, resharding, keeping, halving)


def begun_ahead(model: nn.Module) -> bool:
    """Whether a gather is under way that no forward has asked for yet."""
    states = [m._get_fsdp_state() for m in model.modules() if hasattr(m, "unshard")]
    groups = [group for state in states for group in state._fsdp_param_groups]
    return any(group._all_gather_result is not None for group in groups)


@case(2)
def fsdp_update_after_a_forward_without_backward(folder: Path) -> None:
    """A validation leaves the root unsharded: its registered parameters are full copies."""
    runs = []
    for validate in (False, True):
        model = sharded()
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        unsharded = 0
        for number in range(5):
            step(model, optimizer, number)
            if validate:
                model.eval()
                with torch.no_grad():
                    model(batch()[0])
                unsharded += not registered_shards(model)
            ema.update()
        assert unsharded == 5 * validate, "the state that this is about did not occur"
        runs.append([shards(ema.averages), shards(model.state_dict())])
        assert ema.averages["out.weight"].shape == (3, 7)
    assert_same(*runs)


@law((fsdp, fsdp_mixed, resharding, keeping, halving, hsdp, fsdp_tp), 4)
def an_update_between_forward_and_backward(layout: Layout, folder: Path) -> None:
    """An update or a look in the middle of a step changes no gradient."""
    runs = []
    for disturb in (False, True):
        torch.manual_seed(1)
        model = net()
        layout(model)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        found = []
        for number in range(4):
            x, y = batch(1000 * dist.get_rank() + number)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            if disturb:
                ema.update()
                ema.report()
                ema.state_dict()
            loss.backward()
            found.append(gradients(model))
            optimizer.step()
        runs.append([found, shards(model.state_dict())])
    assert_same(*runs)


@law((fsdp, fsdp_mixed, partly, keeping, halving, hsdp, fsdp_tp, replicated_tp), 4)
def whatever_comes_after_a_validation(layout: Layout, folder: Path) -> None:
    """A forward without a backward leaves full copies: what looks or writes gives the same."""
    model = net()
    layout(model)
    ema = averaged(model, range(3))
    ema.save(folder / "before")
    state = copy.deepcopy(ema.state_dict())
    wanted = shards(ema.model_state_dict())
    report = ema.report()
    before = shards(model.state_dict())

    def validate() -> None:
        with torch.no_grad():
            model.eval()(batch(7)[0])

    validate()
    assert ema.report() == report
    validate()
    assert_same(shards(ema.model_state_dict()), wanted)
    validate()
    ema.save(folder / "after")
    assert_same(files.read(folder / "after"), files.read(folder / "before"))
    validate()
    with ema.applied():
        validate()
        ema.save(folder / "inside")
    assert_same(files.read(folder / "inside"), files.read(folder / "before"))
    assert_same(shards(model.state_dict()), before)
    validate()
    ema.reset()
    validate()
    ema.update()
    assert_same(shards(ema.averages), {name: before[name] for name in ema.averages})
    validate()
    ema.load_state_dict(state)
    assert_same(shards(ema.averages), shards(state["averages"]))
    validate()
    ema.copy_to(model)
    assert_same(shards(model.state_dict()), wanted)
    twin = net(seed=9)
    layout(twin)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_same(model(batch(7)[0]), twin.eval()(batch(7)[0]))


@case(2)
def fsdp_that_stays_unsharded(folder: Path) -> None:
    """Without resharding after forwards every layer is whole most of the time."""
    runs = []
    for keep in (False, True):
        model = uneven()
        mesh = line()
        fully_shard(model.hidden, mesh=mesh, reshard_after_forward=not keep)
        fully_shard(model, mesh=mesh, reshard_after_forward=not keep)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        outputs = []
        for number in range(4):
            step(model, optimizer, number)
            with torch.no_grad():
                model.eval()(batch(7)[0])
                if number == 2:
                    assert isinstance(model.hidden.weight, DTensor) != keep
                ema.update()
                with ema.applied():
                    outputs.append(model(batch(7)[0]))
                outputs.append(model(batch(7)[0]))
        runs.append([shards(ema.averages), outputs])
        model.reshard()
    assert_same(*runs)


@law(GATHERING, 4)
def a_forward_that_breaks_in_a_validation_is_forgotten(layout: Layout, folder: Path) -> None:
    """An exception in a forward on the averages: training goes on as if that had not been tried."""
    runs = []
    for validate in (False, True):
        torch.manual_seed(1)
        model = net()
        layout(model)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        found = []
        for number in range(4):
            step(model, optimizer, number)
            found.append(gradients(model))
            ema.update()
            if validate:
                place = model.second if number % 2 else model
                place.breaks = True
                ahead = break_a_forward(model, ema, caught_inside=number > 1)
                place.breaks = False
                assert ahead or layout not in AHEAD or place is not model
        state = shards(model.state_dict())
        runs.append([found, state, momenta(optimizer), torch.get_rng_state(), shards(ema.averages)])
    assert_same(*runs)


def break_a_forward(model: Any, ema: EMA, *, caught_inside: bool) -> bool:
    """Run a forward on the averages that breaks; return whether a gather was under way then."""
    x, ahead = batch(7)[0], False
    try:
        with ema.applied():
            try:
                if caught_inside:
                    with torch.random.fork_rng(devices=[]):
                        model.train()(x)
                with torch.no_grad():
                    model.eval()(x)
            except OnPurposeError:
                ahead = begun_ahead(model)
                if not caught_inside:
                    raise
    except OnPurposeError:
        assert not caught_inside
    return ahead


@law((fsdp_mixed, keeping, hsdp), 4)
def a_validation_goes_on_after_a_broken_forward(layout: Layout, folder: Path) -> None:
    """Told to forget it (`reset_iter_state`), the next forward of the block uses the averages."""
    model, twin = net(), net(seed=9)
    layout(model)
    layout(twin)
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(2):
        step(model, optimizer, number)
        ema.update()
    before = shards(model.state_dict())
    twin.load_state_dict(ema.model_state_dict())
    with torch.no_grad():
        wanted = twin.eval()(batch(7)[0])
        with ema.applied():
            model.second.breaks = True
            refused(OnPurposeError, lambda: model.eval()(batch(7)[0]))
            model.second.breaks = False
            model.reset_iter_state()
            assert_same(model(batch(7)[0]), wanted)
    assert_same(shards(model.state_dict()), before)


@law((fsdp, fsdp_mixed, keeping, hsdp, fsdp_tp), 4)
def a_forward_that_breaks_in_training_is_told(layout: Layout, folder: Path) -> None:
    """FSDP2 may keep what it has gathered: no average is brought in before it is reset."""
    model = net()
    layout(model)
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    teacher = net()
    layout(teacher)
    taught = EMA(model, 0.5, into=teacher)
    for number in range(2):
        step(model, optimizer, number)
        ema.update()
        taught.update()
    before = shards(model.state_dict())
    model.breaks = True
    refused(OnPurposeError, lambda: step(model, optimizer, 2))
    model.breaks = False
    for call in (lambda: ema.applied().__enter__(), lambda: ema.copy_to(model), ema.report):
        text = refused(RuntimeError, call)
        assert "a forward of this FSDP2 model is running, or was broken off by an except" in text
        assert "call reset_iter_state() on its outermost FSDP2 module" in text
    teacher.breaks = True
    with torch.no_grad():
        refused(OnPurposeError, lambda: teacher(batch()[0]))
    teacher.breaks = False
    fresh = EMA(teacher, 0.5)
    averages = averaged(net(), range(1))
    for call in (taught.update, fresh.update, lambda: averages.copy_to(teacher)):
        text = refused(RuntimeError, call)
        assert "a forward of this FSDP2 model is running, or was broken off by an except" in text
    assert ema.clock == taught.clock == 2
    model.reset_iter_state()
    teacher.reset_iter_state()
    twin = net()
    layout(twin)
    twin.load_state_dict(ema.model_state_dict())
    with ema.applied(), torch.no_grad():
        inside = model.eval()(batch(7)[0])
    with torch.no_grad():
        assert_same(inside, twin.eval()(batch(7)[0]))
    assert_same(shards(model.state_dict()), before)
    step(model, optimizer, 3)
    taught.update()


@law((fsdp, fsdp_mixed, keeping, hsdp), 4)
def a_backward_that_breaks_leaves_shards(layout: Layout, folder: Path) -> None:
    """After an exception in a backward the averages can be used, and the weights are as before."""
    model, twin = net(), net(seed=9)
    layout(model)
    layout(twin)
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    for number in range(2):
        step(model, optimizer, number)
        ema.update()
    handle = model.drop.register_full_backward_hook(_break)
    refused(OnPurposeError, lambda: step(model, optimizer, 2))
    handle.remove()
    before = shards(model.state_dict())
    with torch.no_grad():
        twin.load_state_dict(ema.model_state_dict())
        with ema.applied():
            assert_same(model.eval()(batch(7)[0]), twin.eval()(batch(7)[0]))
        twin.load_state_dict(model.state_dict())
        assert_same(model(batch(7)[0]), twin(batch(7)[0]))
    assert_same(shards(model.state_dict()), before)


def _break(*_: object) -> None:
    raise OnPurposeError("in a backward")


@law((fsdp, fsdp_mixed, keeping, hsdp), 4)
def a_forward_that_runs_is_not_changed(layout: Layout, folder: Path) -> None:
    """From inside a forward (a hook) nothing is written or looked up; an update reads shards."""
    model = net()
    layout(model)
    optimizer = sgd(model)
    ema, fresh = EMA(model, 0.5), EMA(model, 0.5)
    for number in range(2):
        step(model, optimizer, number)
        ema.update()
    texts = []

    def look(*_: object) -> None:
        for call in (
            lambda: ema.applied().__enter__(),
            lambda: ema.copy_to(model),
            ema.state_dict,
            fresh.update,
        ):
            texts.append(refused(RuntimeError, call))
        ema.update()

    before = shards(model.state_dict())
    with torch.no_grad():
        wanted = model.eval()(batch(7)[0])
        handle = model.second.register_forward_hook(look)
        assert_same(model(batch(7)[0]), wanted)
    handle.remove()
    assert len(texts) == 4
    assert all("a forward of this FSDP2 model is running" in text for text in texts)
    assert (ema.clock, fresh.clock) == (3, 0)
    assert_same(shards(model.state_dict()), before)
    step(model, optimizer, 2)
    fresh.update()
    now = shards(model.state_dict())
    assert_same(shards(fresh.averages), {name: now[name] for name in fresh.averages})


@law((fsdp, fsdp_mixed, keeping, halving, hsdp, fsdp_tp), 4)
def a_gather_under_way_brings_no_old_values(layout: Layout, folder: Path) -> None:
    """`unshard(async_op=True)` before the block, or in it, changes neither side's forward."""
    runs = []
    for disturb in (False, True):
        torch.manual_seed(1)
        model, twin = net(), net(seed=9)
        layout(model)
        layout(twin)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        for number in range(3):
            step(model, optimizer, number)
            ema.update()
            twin.load_state_dict(ema.model_state_dict())
            early = (model, model.second) if disturb else ()
            handles = [module.unshard(async_op=True) for module in early]
            with ema.applied(), torch.no_grad():
                inside = model.eval()(batch(7)[0])
                model.first.reshard()
                handles += [model.first.unshard(async_op=True)] if disturb else []
                assert begun_ahead(model) == disturb
            with torch.no_grad():
                assert_same(inside, twin.eval()(batch(7)[0]))
            for handle in handles:
                handle.wait()
        runs.append([shards(model.state_dict()), shards(ema.averages)])
    assert_same(*runs)


@law((fsdp, fsdp_mixed, hsdp), 4)
def gradients_that_accumulate_are_kept(layout: Layout, folder: Path) -> None:
    """A validation between the microbatches of a step, whose gradients are not reduced yet."""
    runs = []
    for validate in (False, True):
        model = net()
        layout(model)
        optimizer = sgd(model)
        ema = EMA(model, 0.5)
        for number in range(3):
            optimizer.zero_grad()
            for half in (0, 1):
                model.set_requires_gradient_sync(bool(half))
                x, y = batch(1000 * dist.get_rank() + 2 * number + half)
                torch.manual_seed(number)
                F.cross_entropy(model.train()(x), y).backward()
                if validate:
                    with ema.applied(), torch.no_grad():
                        model.eval()(x)
            found = gradients(model)
            optimizer.step()
            ema.update()
        runs.append([found, shards(model.state_dict()), shards(ema.averages)])
    assert_same(*runs)


# ------------------------------------------------------------ parameters of a module outside


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def wrapped(seed: int = 3) -> Any:
    """Return a sharded module whose inner one has no FSDP2 state of its own."""
    return fully_shard(seeded(Wrapper, seed), mesh=line())


@case(2)
def an_inner_module_is_averaged(folder: Path) -> None:
    """Updates are right, whatever the outer module has gathered, also the first of them."""
    runs = []
    for validate in (False, True):
        torch.manual_seed(1)
        outer = wrapped()
        optimizer = sgd(outer)
        ema = EMA(outer.net, 0.5)
        for number in range(4):
            step(outer, optimizer, number)
            if validate:
                with torch.no_grad():
                    outer.eval()(batch(7)[0])
                assert not registered_shards(outer)
            ema.update()
        outer.reshard()
        ema.update(5)
        for name, average in ema.averages.items():
            assert isinstance(average, DTensor) != name.startswith("norm.running"), name
        runs.append([shards(outer.state_dict()), shards(ema.averages)])
    assert_same(*runs)


@case(2)
def an_inner_module_does_not_see_what_the_outer_has_gathered(folder: Path) -> None:
    """A forward on the averages needs the outer module's `reshard()`: an error says so, each time.

    Nothing that is registered can be trusted while the outer module holds full copies, so that all
    that looks at the model is refused, and the model is as it was.
    """
    outer = wrapped()
    optimizer = sgd(outer)
    ema = EMA(outer.net, 0.5)
    for number in range(2):
        step(outer, optimizer, number)
        ema.update()
    before = shards(outer.state_dict())
    with torch.no_grad():
        outer.eval()(batch(7)[0])
        for call in (
            lambda: ema.applied().__enter__(),
            ema.state_dict,
            ema.model_state_dict,
            ema.report,
            lambda: ema.copy_to(outer.net),
            lambda: ema.save(folder / "never.safetensors"),
        ):
            text = refused(ValueError, call)
            assert "was [Shard(dim=0)] on 2 ranks from 0 to 1, is whole" in text
            assert "call reshard() on that one first" in text
        outer.reshard()

        def gather_inside() -> None:
            with ema.applied():
                outer(batch(7)[0])

        text = refused(RuntimeError, gather_inside)
        assert "embed.weight: an FSDP2 module outside of this model gathered the averages" in text
        assert "uses them until you call its reshard()" in text
        outer.reshard()
        twin = wrapped(seed=9)
        twin.load_state_dict(outer.state_dict())
        assert_same(outer(batch(7)[0]), twin.eval()(batch(7)[0]))
    assert_same(shards(outer.state_dict()), before)
    step(outer, optimizer, 2)
    ema.update()


@case(2)
def an_inner_module_after_a_broken_forward(folder: Path) -> None:
    """The outer module holds averages, which its `reshard()` does not drop: told what does."""
    outer = wrapped()
    ema = averaged(outer.net, range(2))
    before = shards(outer.state_dict())
    outer.net.breaks = True

    def break_inside() -> None:
        with ema.applied(), torch.no_grad():
            outer.eval()(batch(7)[0])

    text = refused(RuntimeError, break_inside)
    outer.net.breaks = False
    assert "embed.weight: an FSDP2 module outside of this model gathered the averages" in text
    assert "reset_iter_state()" in text
    outer.reset_iter_state()
    assert_same(shards(outer.state_dict()), before)
    twin = wrapped(seed=9)
    twin.load_state_dict(outer.state_dict())
    with torch.no_grad():
        assert_same(outer(batch(7)[0]), twin.eval()(batch(7)[0]))


@case(2)
def an_inner_teacher_is_never_stale(folder: Path) -> None:
    """What the outer module of a teacher has gathered hides its averages: each update says so."""
    for first_update_before in (True, False):
        student, teacher = wrapped(), wrapped(seed=9)
        ema = EMA(student.net, 0.5, into=teacher.net)
        optimizer = sgd(student)
        if first_update_before:
            ema.update()
        step(student, optimizer, 0)
        clock = ema.clock
        with torch.no_grad():
            teacher(batch()[0])
        text = refused(ValueError, ema.update)
        assert "embed.weight: whole in the teacher, [Shard(dim=0)] on 2 ranks" in text
        assert ema.clock == clock
        teacher.reshard()
        ema.update()
        twin = wrapped()
        twin.load_state_dict(teacher.state_dict())
        with torch.no_grad():
            assert_same(teacher(batch()[0]), twin.eval()(batch()[0]))
