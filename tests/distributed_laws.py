"""The laws that hold in every layout: DDP, FSDP2, HSDP, tensor parallel, and two of these at once.

Each case is run once for every layout, named in brackets.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import polyak
from distributed_tools import (
    LAYOUTS,
    SHARDED,
    Layout,
    assert_same,
    averaged,
    case,
    copies,
    ddp,
    described,
    everybodys,
    fsdp,
    fsdp_mixed,
    fsdp_tp,
    full,
    gradients,
    hsdp,
    law,
    momenta,
    move_,
    net,
    part,
    plain,
    refused,
    replicated_tp,
    sgd,
    shards,
    silence,
    spread,
    step,
    tp,
)
from models import batch, bit_identical
from polyak import EMA, PowerLaw


@law(LAYOUTS, 2, 4)
def the_average_is_that_of_one_process(layout: Layout, folder: Path) -> None:
    """The same weights, averaged as they are spread and whole: the same bits, nothing sent.

    Averages are spread as their parameters are; some rank has more than another, and one nothing.
    """
    model = net()
    outer = layout(model)
    optimizer = sgd(model)
    ema = EMA(outer, PowerLaw(0.10))
    alone = net()
    whole = EMA(alone, PowerLaw(0.10))
    for number in range(5):
        step(outer, optimizer, number)
        if hasattr(model, "reshard"):
            model.reshard()
        with silence():
            ema.update()
        alone.load_state_dict(full(model.state_dict()))
        whole.update()
        assert bit_identical(full(ema.averages), dict(whole.averages))
    parameters = dict(model.named_parameters())
    for name, average in ema.averages.items():
        if name in parameters:
            assert spread(average) == spread(parameters[name]), name
    assert "back.weight" not in ema.averages
    assert "base.weight" not in ema.averages
    sizes = everybodys({n: t.numel() for n, t in shards(ema.averages).items()})
    uneven = {name for name in sizes[0] if len({rank[name] for rank in sizes}) > 1}
    empty = {name for name in sizes[0] if any(rank[name] == 0 for rank in sizes)}
    if layout in (fsdp, fsdp_mixed, hsdp, fsdp_tp):
        assert {"out.bias", "scale"} <= uneven
        assert "scale" in empty
    if layout is tp and dist.get_world_size() == 4:
        assert "first.up.weight" in uneven


@law(LAYOUTS, 2, 4)
def looking_at_an_average_sends_nothing(layout: Layout, folder: Path) -> None:
    """No collective in update, applied, report and the state dicts. (The counter can count.)"""
    model = net()
    outer = layout(model)
    ema = averaged(model, range(3))
    with silence():
        ema.update()
        ema.report()
        ema.state_dict()
        ema.model_state_dict()
        with ema.applied():
            ema.report()
            ema.state_dict()
        ema.load_state_dict(ema.state_dict())
        ema.copy_to(model)
        ema.reset()
        ema.update()
    with CommDebugMode() as counter:
        ema.report(torch.distributed.group.WORLD)
    assert counter.get_total_counts() > 0
    if layout is not ddp:  # its collectives are not torch's operators
        with CommDebugMode() as counter, torch.no_grad():
            outer(batch()[0])
        assert counter.get_total_counts() > 0


@law(LAYOUTS, 2, 4)
def training_is_as_without(layout: Layout, folder: Path) -> None:
    """With polyak and without: the same weights, gradients, momentum and random numbers.

    In each step the averages are applied twice: once to validate, where the model predicts what one
    does that was loaded with them; once with a forward in training mode and an exception on all
    ranks.
    """
    runs = []
    for averaging in (False, True):
        torch.manual_seed(1)
        model = net()
        outer = layout(model)
        optimizer = sgd(model)
        twin = net(seed=9)
        layout(twin)
        if averaging:
            ema = EMA(outer, 0.5)
            ema.attach(optimizer)
        found = []
        for number in range(4):
            step(outer, optimizer, number)
            found.append(gradients(model))
            if averaging:
                break_a_validation(ema, model)
                twin.load_state_dict(ema.model_state_dict())
                inside, after = validate(ema, model, twin, stale=number % 2 == 1)
                assert number == 0 or not bit_identical(inside, after)
        state = shards(model.state_dict())
        runs.append([found, state, momenta(optimizer), torch.get_rng_state()])
    assert_same(*runs)


def break_a_validation(ema: EMA, model: Any) -> None:
    """Apply the averages, run a forward that changes buffers, and raise.

    Not a forward of DDP itself: after one without gradients its next one hands out no buffers.
    """
    try:
        with ema.applied(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.train()(batch(8)[0])
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


@torch.no_grad()
def validate(ema: EMA, model: Any, twin: Any, *, stale: bool) -> tuple[Tensor, Tensor]:
    """Return what the model predicts with its averages, as its twin has to, and what after that."""
    x = batch(7)[0]
    wanted = twin.eval()(x)
    model.eval()
    if stale:
        model(x)  # leaves what FSDP2 has gathered
    with ema.applied():
        for _ in range(2):
            assert_same(model(x), wanted)
    return wanted, model(x)


@law(LAYOUTS, 2, 4)
def a_model_is_spread_later(layout: Layout, folder: Path) -> None:
    """An EMA that was built before, and averages that were made or loaded before, go on.

    They are cut without a word, as if the model had been spread from the beginning.
    """
    early = net()
    layout(early)
    wanted = averaged(early, range(4))
    for seen, loaded in ((0, False), (2, False), (2, True)):
        late = net()
        ema = averaged(late, range(seen))
        if loaded:
            state = ema.state_dict()
            ema = EMA(late, 0.5)
            ema.load_state_dict(state)
        layout(late)
        for number in range(seen, 4):
            move_(late, number)
            with silence():
                ema.update()
        assert bit_identical(shards(ema.averages), shards(wanted.averages))
        for name, average in ema.averages.items():
            assert spread(average) == spread(wanted.averages[name]), name
        assert ema.report().mean_age == wanted.report().mean_age


@law(LAYOUTS, 4)
def a_whole_state_is_cut(layout: Layout, folder: Path) -> None:
    """What one process has saved loads into a model that is spread, used or fresh, silently."""
    source = averaged(net(), range(3))
    for used in (False, True):
        model = net(seed=8)
        layout(model)
        ema = averaged(model, (5, 6) if used else ())
        with silence():
            ema.load_state_dict(source.state_dict())
        assert bit_identical(full(ema.averages), dict(source.averages))
        assert ema.clock == 3
        before = copies(source.averages)
        move_(model, 4)
        ema.update()
        assert bit_identical(dict(source.averages), before), "the state was written to"


@law((fsdp, hsdp, tp, fsdp_tp), 4)
def a_state_of_other_shards_is_refused(layout: Layout, folder: Path) -> None:
    """The parts that a rank holds are not those of another layout: both are named, nothing read."""
    model = net()
    layout(model)
    ema = averaged(model, range(2))
    before, name = shards(ema.averages), "first.down.weight"
    for other in (fsdp, hsdp, tp, fsdp_tp):
        if other is layout:
            continue
        source = net()
        other(source)
        state = averaged(source, range(3)).state_dict()
        text = refused(ValueError, lambda state=state: ema.load_state_dict(state))
        theirs, mine = described(state["averages"][name]), described(ema.averages[name])
        assert f"{name}: {theirs} in the state, {mine} in the model" in text
        assert "a state of other shards is loaded with torch.distributed.checkpoint" in text
        assert ema.clock == 2
        assert bit_identical(shards(ema.averages), before)
    alone = averaged(net(), range(1))
    whole = copies(alone.averages)
    text = refused(ValueError, lambda: alone.load_state_dict(ema.state_dict()))
    assert f"{name}: {described(ema.averages[name])} in the state, whole in the model" in text
    assert bit_identical(copies(alone.averages), whole)


@law(LAYOUTS, 4)
def the_report_of_a_group_is_that_of_the_whole(layout: Layout, folder: Path) -> None:
    """Distances of the whole model, bytes and skipped elements of all, each copy counted."""
    model, alone = net(), net()
    layout(model)
    ema, whole = averaged(model, range(3)), averaged(alone, range(3))
    move_(model, 3)
    move_(alone, 3)
    mine = ema.report()
    found, wanted = ema.report(dist.group.WORLD), whole.report()
    # Sums of a few hundred float64 squares, in another order.
    assert abs(found.distance / wanted.distance - 1) < 1e-12
    held = sum(tensor.nbytes for tensor in shards(ema.averages).values())
    assert mine.bytes == held
    assert found.bytes == sum(everybodys(held))
    assert found.mean_age == wanted.mean_age
    assert everybodys(found) == [found] * dist.get_world_size()
    assert found.nonfinite == 0
    sick = part(model.embed.weight)[:1, :1].fill_(torch.nan)  # an element of each part, if any
    ema.update()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of these, where there are any
        found = ema.report(dist.group.WORLD)
    assert found.nonfinite == sum(everybodys(sick.numel())) > 0


@law((fsdp, fsdp_mixed, hsdp, tp, fsdp_tp, replicated_tp), 2, 4)
def a_teacher_is_moved_where_it_is(layout: Layout, folder: Path) -> None:
    """Student and teacher spread alike: the bits of one process, and a teacher that predicts so."""
    student, teacher, alone, its_teacher = net(), net(seed=9), net(), net(seed=9)
    layout(student)
    layout(teacher)
    ema = EMA(student, 0.5, into=teacher)
    whole = EMA(alone, 0.5, into=its_teacher)
    twin = net(seed=8)
    layout(twin)
    for number in range(3):
        move_(student, number)
        move_(alone, number)
        with silence():
            ema.update()
        whole.update()
        with torch.no_grad():
            predicted = teacher(batch()[0])  # leaves what FSDP2 has gathered
        twin.load_state_dict(ema.model_state_dict())
        with torch.no_grad():
            assert bit_identical(predicted, twin.eval()(batch()[0]))
    assert bit_identical(full(teacher.state_dict()), dict(its_teacher.state_dict()))


@law(SHARDED, 4)
def the_function_moves_a_teacher(layout: Layout, folder: Path) -> None:
    """`update_` without an object: shard by shard, and what one process gives."""
    student, teacher, alone, its_teacher = net(), net(seed=9), net(), net(seed=9)
    layout(student)
    layout(teacher)
    for number in range(2):
        move_(student, number)
        move_(alone, number)
        with silence():
            polyak.update_(teacher, student, 0.75)
        polyak.update_(its_teacher, alone, 0.75)
        with torch.no_grad():
            teacher(batch()[0])  # leaves what FSDP2 has gathered
    assert_same(full(teacher.state_dict()), dict(its_teacher.state_dict()))


@law((fsdp, hsdp, fsdp_tp, replicated_tp), 4)
def a_narrow_teacher_is_written_through(layout: Layout, folder: Path) -> None:
    """Averages of a bfloat16 teacher are kept in float32 beside its shards."""
    pairs = []
    for spread_by in (layout, plain):
        student, teacher = net().bfloat16(), net(seed=9).bfloat16()
        spread_by(student)
        spread_by(teacher)
        ema = EMA(student, 0.75, into=teacher)
        for number in range(3):
            move_(student, number)
            with silence():
                ema.update()
        assert {average.dtype for average in ema.averages.values()} == {torch.float32}
        pairs.append([full(ema.averages), full(teacher.state_dict())])
    assert_same(*pairs)


@law(SHARDED, 4)
def wider_averages(layout: Layout, folder: Path) -> None:
    """In float64 they are spread as the float32 parameters are."""
    model, alone = net(), net()
    layout(model)
    ema = averaged(model, range(3), PowerLaw(0.10), dtype=torch.float64)
    whole = averaged(alone, range(3), PowerLaw(0.10), dtype=torch.float64)
    assert_same(full(ema.averages), dict(whole.averages))
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & ema.averages.keys():
        assert spread(ema.averages[name]) == spread(parameters[name]), name


@law(SHARDED, 4)
def the_run_is_one(layout: Layout, folder: Path) -> None:
    """All ranks see the same states, and the id that says so in their states is the same."""
    model = net()
    layout(model)
    states = [averaged(model, (1,), decay).state_dict() for decay in (0.5, PowerLaw(0.10))]
    runs = everybodys([json.loads(state["facts"])["history"]["run"] for state in states])
    assert len({run for rank in runs for run in rank}) == 1, runs
    other = averaged(net(), (1,)).state_dict()
    assert json.loads(other["facts"])["history"]["run"] != runs[0][0]


@law(SHARDED, 4)
def the_branch_is_one(layout: Layout, folder: Path) -> None:
    """All averages that go on together are in one, on all ranks; those that go on again are not."""
    model = net()
    layout(model)
    decays = 0.5, PowerLaw(0.10)
    emas = [EMA(model, decay) for decay in decays]
    move_(model, 1)
    for ema in emas:
        ema.update()
    states = [copy.deepcopy(ema.state_dict()) for ema in emas]
    for ema in emas:
        ema.update()
    told: list[Any] = []
    for _ in range(2):
        again = [EMA(model, decay) for decay in decays]
        for ema, state in zip(again, states, strict=True):
            ema.load_state_dict(copy.deepcopy(state))
        late = EMA(model, 0.9)
        for ema in (*again, late):
            ema.update(2)
        late.update(3)
        histories = [json.loads(ema.state_dict()["facts"])["history"] for ema in (*again, late)]
        told.append([history["branches"] for history in histories])
    for ranks in (everybodys(each) for each in told):
        assert all(branches == ranks[0][0] for rank in ranks for branches in rank), ranks
    first, second = (each[0] for each in told)
    assert [clock for clock, _ in first] == [clock for clock, _ in second] == [1]
    assert first != second


@case(2)
def the_measures_can_fail(folder: Path) -> None:
    """What these cases are held to notices a bit, a collective, and an error that is not raised."""
    ones = {"a": [torch.ones(2)]}
    text = refused(AssertionError, lambda: assert_same(ones, {"a": [torch.ones(2).double()]}))
    assert text == "it['a'][0]"
    text = refused(AssertionError, lambda: assert_same([1, torch.zeros(1)], [1, -torch.zeros(1)]))
    assert text == "it[1]"

    def speak() -> None:
        with silence():
            dist.all_reduce(torch.ones(1))

    assert "allreduce" in refused(AssertionError, speak)
    assert refused(AssertionError, lambda: refused(ValueError, int)) == "no ValueError was raised"
