"""One process of several that train with DeepSpeed: runs every case, and writes down how each went.

``python deepspeed_worker.py RANK SIZE FOLDER``; `test_deepspeed.py` starts one for each rank.

After `engine.step()` the module shows the new weights, on every rank, in ZeRO stages 0, 1 and 2. An
optimizer that steps on masters (float32 copies, or flat partitions of them) has its hooks run
before that. In stage 3 a parameter is there for as long as its layer computes, and no longer.
"""

from __future__ import annotations

import copy
import datetime
import gc
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from models import batch, bit_identical, convolutional, plain
from polyak import EMA, PowerLaw, files

Case = Callable[[Path], None]
CASES: dict[str, Case] = {}

STAGES = (0, 1, 2)
# BatchNorm does not run here in the narrow dtypes: DeepSpeed leaves its statistics in float32.
SETUPS: list[dict[str, Any]] = [{"stage": stage} for stage in STAGES]
SETUPS += [{"stage": stage, "bf16": {"enabled": True}} for stage in STAGES]
SETUPS += [
    {"stage": 1, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    {"stage": 2, "fp16": {"enabled": True, "initial_scale_power": 8}},
]

# ------------------------------------------------------------------------------------- tools


def case(function: Case) -> Case:
    CASES[function.__name__] = function
    return function


def everybodys(value: Any) -> list[Any]:
    """Return what each rank passed."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_narrow(setup: dict[str, Any]) -> bool:
    return "bf16" in setup or "fp16" in setup


def built(setup: dict[str, Any]) -> nn.Module:
    """Return the model of a setup: with BatchNorm where that can run."""
    return plain() if is_narrow(setup) else convolutional()


def start(
    stage: int,
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    accumulate: int = 1,
    zero: dict[str, Any] | None = None,
    **config: Any,
) -> Any:
    """Return a DeepSpeed engine."""
    import deepspeed  # here, so that whoever collects tests does not

    model = built(config) if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05) if optimizer is None else optimizer
    config |= {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "steps_per_print": None,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step(engine: Any, number: int) -> None:
    """Take a micro-step on a batch that is this rank's own."""
    x, y = batch(1000 * dist.get_rank() + number)
    torch.manual_seed(number)  # one dropout mask for all
    engine.train()
    engine.backward(F.cross_entropy(engine(x).float(), y))
    engine.step()


def shown(engine: Any) -> dict[str, Tensor]:
    """Return copies of the parameters that the module shows at this moment."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def masters(engine: Any) -> list[Tensor]:
    """Return copies of what the optimizer steps on and remembers, this rank's part of it."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    kept = [value for p in stepped for value in optimizer.state[p].values()]
    return [tensor.detach().clone() for tensor in stepped + kept if isinstance(tensor, Tensor)]


def refusal(kind: type[Exception], call: Callable[..., object], *arguments: object) -> str:
    """Return the text with which a call is refused."""
    try:
        call(*arguments)
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__}")


def averaged(engine: Any, setup: dict[str, Any], ema: EMA) -> nn.Module:
    """Return a plain model that holds the averages."""
    model = built(setup)
    for dtype in {p.dtype for p in engine.module.parameters()}:
        model.to(dtype)
    model.load_state_dict(ema.model_state_dict(), strict=True)
    return model.eval()


# --------------------------------------------------------------------------- what is averaged


@case
def averages_are_of_what_the_module_shows(folder: Path) -> None:
    """Whole parameters under the plain model's names, in float32, the same bits on every rank.

    Against a float64 average of what the module held after each step that was applied.
    """
    for setup in SETUPS:
        engine = start(accumulate=2, **setup)
        ema = EMA(engine, 0.5)
        expected: dict[str, Tensor] = {}
        largest = 0.0
        for number in range(10):
            before = shown(engine)
            step(engine, number)
            assert engine.was_step_applied() == (not bit_identical(shown(engine), before)), setup
            if engine.was_step_applied():
                ema.update()
                now = {name: value.double() for name, value in shown(engine).items()}
                expected = {n: (expected[n] + now[n]) / 2 if expected else now[n] for n in now}
                largest = max([largest, *(float(x.abs().max()) for x in now.values())])
        assert ema.clock == engine.global_steps == 5, setup
        statistics = {name for name, _ in engine.module.named_buffers() if "running" in name}
        assert set(ema.averages) == {name for name, _ in built(setup).named_parameters()} | (
            statistics
        ), setup
        everybodys_averages = everybodys({n: ema.averages[n] for n in expected})
        assert bit_identical(*everybodys_averages), setup
        # A step in float32 rounds three times, by 2**-24 of the largest value at most each; at
        # decay .5 all steps together round twice as much.
        bound = 6 * 2**-24 * largest
        for name, average in everybodys_averages[0].items():
            assert average.dtype == torch.float32, setup
            difference = float((average.double() - expected[name]).abs().max())
            assert difference <= bound, (setup, name, difference, bound)


@case
def the_engine_is_seen_through(folder: Path) -> None:
    """`EMA(engine)`, `EMA(engine.module)` and an EMA of the model from before are one."""
    for stage in STAGES:
        model = plain()
        earlier = EMA(model, 0.5)
        engine = start(stage, model=model)
        emas = [EMA(engine, 0.5), EMA(engine.module, 0.5), earlier]
        for number in range(3):
            step(engine, number)
            for ema in emas:
                ema.update()
        first, *others = (dict(ema.averages) for ema in emas)
        assert set(first) == set(dict(plain().named_parameters())), stage
        assert all(bit_identical(first, other) for other in others), stage


@case
def steps_that_overflow_are_not_counted(folder: Path) -> None:
    """A loss scale too large lets DeepSpeed skip steps, which its own count of steps has in it."""
    for stage in (1, 2):
        fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}
        engine = start(stage, fp16=fp16)
        ema = EMA(engine, PowerLaw(0.10))
        seen = EMA(engine.module, PowerLaw(0.10))  # told by the weights alone
        for number in range(14):
            before = shown(engine)
            step(engine, number)
            if engine.was_step_applied():
                ema.update()
            if not bit_identical(shown(engine), before):
                seen.update()
        assert engine.skipped_steps > 0, "the state that this is about did not occur"
        assert ema.clock == engine.global_steps - engine.skipped_steps > 3
        assert bit_identical(dict(ema.averages), dict(seen.averages)), stage


@case
def a_frozen_part_is_not_held(folder: Path) -> None:
    """LoRA's case: what is frozen is neither averaged nor held."""
    for stage in STAGES:
        model = plain()
        model.hidden.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        engine = start(stage, model=model, optimizer=torch.optim.AdamW(trained, lr=0.05))
        ema = EMA(engine, 0.5)
        step(engine, 0)
        ema.update()
        assert set(ema.averages) == {"head.weight", "head.bias"}, stage


# -------------------------------------------------------------------------- when it is updated


@case
def the_optimizer_may_be_attached_to_where_it_steps_on_the_parameters(folder: Path) -> None:
    """In stage 0 in float32 the engine's optimizer is torch's own: its hook comes at the end."""
    model = convolutional()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    early = EMA(model, 0.5)
    early.attach(optimizer)
    engine = start(0, model=model, optimizer=optimizer, accumulate=2)
    late, by_hand = EMA(engine, 0.5), EMA(engine, 0.5)
    late.attach(engine.optimizer)
    for number in range(8):
        step(engine, number)
        if engine.was_step_applied():
            by_hand.update()
    for attached in (early, late):
        assert attached.clock == by_hand.clock == 4
        assert bit_identical(dict(attached.averages), dict(by_hand.averages))


def assert_names_masters(text: str) -> None:
    assert "none of the parameters of the model" in text, text
    assert "DeepSpeed" in text, text
    assert "call update() after" in text, text


@case
def an_optimizer_of_masters_is_refused(folder: Path) -> None:
    """Its hook would come before the weights do, and the average be a step late."""
    for setup in SETUPS:
        if setup == {"stage": 0}:
            continue
        engine = start(**setup)
        ema = EMA(engine, 0.5)
        text = refusal(TypeError, ema.attach, engine.optimizer)
        assert type(engine.optimizer).__name__ in text, text
        assert_names_masters(refusal(ValueError, ema.attach, engine.optimizer.optimizer))
        step(engine, 0)
        assert ema.clock == 0, "a refused attach has left its hooks"
        ema.update()  # neither does it count as attached


@case
def an_optimizer_that_gets_masters_later_is_refused_at_its_step(folder: Path) -> None:
    """Attached before `deepspeed.initialize`, which then puts masters in the parameters' place."""
    for setup in SETUPS:
        if setup == {"stage": 0}:
            continue
        model = built(setup)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        ema = EMA(model, 0.5)
        ema.attach(optimizer)
        # Some of DeepSpeed's optimizers take a step when they are built, to make their state.
        run = partial(start, model=model, optimizer=optimizer, **setup)
        assert_names_masters(refusal(ValueError, lambda run: step(run(), 0), run))
        assert ema.clock == 0, setup


# ------------------------------------------------------------------------------ how it is used


@case
def applied_leaves_training_as_it_was(folder: Path) -> None:
    """A validation on the averages after each step, and the run ends at the same bits."""
    x = batch(7)[0]
    for setup in SETUPS:
        runs = []
        for validate in (False, True):
            engine = start(**setup)
            ema = EMA(engine, 0.5)
            for number in range(5):
                step(engine, number)
                if not validate:
                    continue
                ema.update()
                before = shown(engine)
                wanted = averaged(engine, setup, ema)
                engine.eval()
                with ema.applied(), torch.no_grad():
                    inside = engine(x)
                assert bit_identical(inside, wanted(x).detach()), setup
                assert bit_identical(shown(engine), before), setup
                with torch.no_grad():
                    assert number == 0 or not torch.equal(engine(x), inside), setup
            runs.append([shown(engine), masters(engine)])
        assert bit_identical(*runs), setup


@case
def every_rank_may_save(folder: Path) -> None:
    """One file under the plain model's names, in its dtypes; the same averages from each rank."""
    for number, setup in enumerate(SETUPS):
        engine = start(**setup)
        ema = EMA(engine, 0.5)
        for i in range(3):
            step(engine, i)
            ema.update()
        path = folder / f"{number}-{dist.get_rank()}.safetensors"
        ema.save(path)
        loaded = files.read(path)
        built(setup).load_state_dict(loaded, strict=True)
        assert loaded["head.weight"].dtype == next(engine.module.parameters()).dtype, setup
        assert bit_identical(*everybodys({n: loaded[n] for n in shown(engine)})), setup


@case
def a_run_goes_on_where_it_stopped(folder: Path) -> None:
    """The state travels as DeepSpeed's client state; going on is not stopping, bit for bit."""
    for number, setup in enumerate(SETUPS):
        place = str(folder / f"run-{number}")
        engine = start(accumulate=2, **setup)
        ema = EMA(engine, PowerLaw(0.10))
        for i in range(12):
            step(engine, i)
            if engine.was_step_applied():
                ema.update()
            if i == 5:
                engine.save_checkpoint(place, client_state={"ema": ema.state_dict()})
        again = start(accumulate=2, **setup)
        resumed = EMA(again, PowerLaw(0.10))
        _, client = again.load_checkpoint(place)
        resumed.load_state_dict(client["ema"])
        assert resumed.clock == again.global_steps == 3, setup
        for i in range(6, 12):
            step(again, i)
            if again.was_step_applied():
                resumed.update()
        assert bit_identical([shown(again), masters(again)], [shown(engine), masters(engine)])
        assert resumed.clock == ema.clock == 6
        # Statistics are each rank's own, and of buffers DeepSpeed stores those of rank 0.
        names = list(shown(engine))
        mine, theirs = ({n: e.averages[n] for n in names} for e in (resumed, ema))
        assert bit_identical(mine, theirs), setup


@case
def what_is_written_back_is_where_training_goes_on(folder: Path) -> None:
    """After `copy_to(engine.module)` the masters must be made anew, or the next step undoes it."""
    for setup in SETUPS:
        for refresh in (True, False):
            engine = start(**setup)
            ema = EMA(engine, 0.5)
            for number in range(4):
                step(engine, number)
                ema.update()
            trained = shown(engine)
            ema.copy_to(engine.module)
            written = shown(engine)
            assert not bit_identical(written, trained), setup
            has_masters = setup != {"stage": 0}
            if refresh and has_masters:
                engine.optimizer.refresh_fp32_params()
            for group in engine.optimizer.param_groups:
                group["lr"] = 0.0  # a step that changes nothing shows where it comes from
            step(engine, 9)
            kept = refresh or not has_masters
            assert bit_identical(shown(engine), written if kept else trained), (setup, refresh)


@case
def a_teacher_beside_the_engine(folder: Path) -> None:
    """A float32 teacher follows the student that DeepSpeed trains, whatever that one's dtype."""
    for setup in SETUPS:
        teacher = built(setup)
        engine = start(**setup)
        ema = EMA(engine, 0.5, into=teacher)
        expected = {name: p.detach().double().clone() for name, p in teacher.named_parameters()}
        for number in range(3):
            step(engine, number)
            ema.update()
            for name, now in shown(engine).items():
                expected[name] = (expected[name] + now.double()) / 2
        found = {name: p.detach().double() for name, p in teacher.named_parameters()}
        for name, value in found.items():
            largest = float(expected[name].abs().max()) + 0.2  # a step of Adam moves by .05
            assert float((value - expected[name]).abs().max()) <= 6 * 2**-24 * largest, setup
        assert bit_identical(*everybodys(found)), setup


# ------------------------------------------------------------------------------------ stage 3


def assert_names_zero_3(text: str) -> None:
    assert "ZeRO-3" in text, text
    assert "hidden.weight" in text, text
    assert "ZeRO-2" in text, text  # which keeps whole parameters
    assert "fully_shard" in text, text


@case
def stage_3_is_refused_by_name(folder: Path) -> None:
    """Its parameters are empty between the layers' turns: nothing averages empty tensors."""
    model = plain()
    earlier = EMA(model, 0.5)
    engine = start(3, model=model, zero={"stage3_param_persistence_threshold": 0})
    assert {tuple(p.shape) for p in model.parameters()} == {(0,)}
    uses: list[Callable[[], object]] = [
        partial(EMA, engine),
        partial(EMA, engine.module),
        partial(EMA, plain(), 0.5, into=engine.module),
        earlier.update,
        earlier.state_dict,
    ]
    for number in range(3):
        for use in uses:
            assert_names_zero_3(refusal(ValueError, use))
        step(engine, number)


@case
def stage_3_is_refused_where_it_does_not_show(folder: Path) -> None:
    """By default small parameters stay whole after their first use; large ones would not."""
    import deepspeed

    engine = start(3, model=plain())
    step(engine, 0)
    assert engine.module.hidden.weight.shape == (8, 8), "the state that this is about"
    assert_names_zero_3(refusal(ValueError, EMA, engine))
    engine = start(3, model=plain(), zero={"stage3_param_persistence_threshold": 0})
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        assert engine.module.hidden.weight.shape == (8, 8)
        assert_names_zero_3(refusal(ValueError, EMA, engine))
    with deepspeed.zero.Init():
        model = plain()
    assert_names_zero_3(refusal(ValueError, EMA, model))


@case
def stage_3_after_the_first_update(folder: Path) -> None:
    """An average of a whole model stays what it is when DeepSpeed takes that model apart."""
    model = plain()
    ema = EMA(model, 0.5)
    ema.update()
    before = copy.deepcopy(dict(ema.averages))
    start(3, model=model, zero={"stage3_param_persistence_threshold": 0})
    for use in (ema.update, ema.state_dict, ema.applied().__enter__):
        assert_names_zero_3(refusal(ValueError, use))
    assert ema.clock == 1
    assert bit_identical(dict(ema._averages), before)


# -------------------------------------------------------------------------------------- main


def main(rank: int, size: int, folder: Path) -> None:
    import deepspeed

    # DeepSpeed asks these, although the process group knows.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=20),  # a rank that waits in vain says so
    )
    # Its own all-reduce for CPUs would be compiled on first use, and needs a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It refuses float16 where a CPU has no instructions for it, but torch computes in it anywhere.
    deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    gc.freeze()  # DeepSpeed collects garbage for each engine, several times
    aside = dist.new_group()  # where no collective of a case can be mistaken for another
    results: dict[str, str | None] = dict.fromkeys(CASES, "it was not run")
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function(folder)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        try:
            dist.barrier(aside)
        except RuntimeError:
            return
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    # DeepSpeed calls torch by old names, and imports parts of it that do.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
