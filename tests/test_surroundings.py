"""What surrounds an average in real programs: autocast, caches, threads, signals, shared parts."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from polyak import EMA, Constant, engine, swap, trainable, update_
from polyak.files import read, read_facts
from polyak.profile import inner
from polyak.swap import uninterrupted


def walk_(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)


def moved(model: nn.Module, decay: float = 0.5, **arguments: Any) -> EMA:
    """An EMA whose average is not where the weights are."""
    ema = EMA(model, decay, **arguments)
    for _ in range(3):
        walk_(model)
        ema.update()
    return ema


def test_autocast_does_not_remember_the_other_weights() -> None:
    """Raw and averaged weights validated under one autocast: each with its own weights."""
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    ema = moved(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = model(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        raw = model(x)
        with ema.applied():
            averaged = model(x)
        again = model(x)
        ema.copy_to(model)
        healed = model(x)
    assert torch.equal(raw, alone)
    assert torch.equal(again, alone)
    assert not torch.equal(averaged, alone)
    assert torch.equal(healed, averaged)


def test_an_update_leaves_autocast_to_training() -> None:
    """Between two forwards of one step the casts stay: gradients are bit-identical to without."""
    gradients = []
    for watched in (False, True):
        torch.manual_seed(1)
        model, teacher = nn.Linear(4, 4), nn.Linear(4, 4)
        emas = [EMA(model, 0.9), EMA(model, 0.9, into=teacher)] if watched else []
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(8, 4)).square().mean()
            for ema in emas:
                ema.update()
                ema.update()
            loss = loss + model(torch.randn(8, 4)).square().mean()
        loss.backward()
        gradients.append(model.weight.grad)
    assert torch.equal(*gradients)


def test_cached_parametrizations_are_computed_anew() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 3, bias=False))
    ema, x = moved(model), torch.randn(2, 3)
    with torch.no_grad(), parametrize.cached():
        raw = model(x)
        with ema.applied():
            averaged = model(x)
        assert torch.equal(model(x), raw)
    assert not torch.equal(averaged, raw)


def test_statistics_re_estimated_before_the_first_update_end_with_it() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    ema = EMA(model, 0.9)
    ema.reestimate_statistics([torch.randn(8, 3) * 5 + 3])
    assert not torch.equal(ema.model_state_dict()["1.running_mean"], model[1].running_mean)
    ema.update()
    assert torch.equal(ema.model_state_dict()["1.running_mean"], model[1].running_mean)


@pytest.mark.parametrize("narrow", [False, True])
def test_statistics_re_estimated_in_a_teacher_are_not_its_state(narrow: bool) -> None:
    """Resuming continues from the average, as a run does that has not stopped."""
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(student)
    if narrow:
        teacher[0].bfloat16()
    ema = EMA(student, 0.9, into=teacher)
    student[1].running_mean += 1
    ema.update()
    average = ema.averages["1.running_mean"].clone()
    teacher[0].float()
    ema.reestimate_statistics([torch.randn(8, 3) * 5 + 3])
    assert not torch.equal(teacher[1].running_mean, average)
    state = copy.deepcopy(ema.state_dict())
    assert torch.equal(state["averages"]["1.running_mean"], average)
    ema.update()
    expected = torch.lerp(average, student[1].running_mean, 0.1)
    assert torch.allclose(teacher[1].running_mean, expected, rtol=0, atol=2e-7)


class Branch(nn.Module):
    def __init__(self, embedding: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.embedding, self.drop = embedding, drop
        self.head = nn.Linear(4, 2)


def test_a_part_that_teacher_and_student_share_stays_the_students() -> None:
    """Training is never touched: a shared embedding trains on, a shared dropout stays on."""
    embedding, drop = nn.Linear(3, 4), nn.Dropout()
    student, teacher = Branch(embedding, drop), Branch(embedding, drop)
    teacher.head.load_state_dict(student.head.state_dict())

    def policy(name: str, tensor: Tensor, module: nn.Module) -> Any:
        return "leave" if name.startswith("embedding") else "average"

    EMA(student, 0.9, into=teacher, policy=policy)
    assert embedding.weight.requires_grad
    assert embedding.training
    assert drop.training
    assert not teacher.head.training
    assert not teacher.head.weight.requires_grad
    teacher.head.train()
    update_(nn.Sequential(teacher.head, drop), nn.Sequential(student.head, drop))
    assert drop.training
    assert not teacher.head.training


def test_a_narrow_teacher_that_is_converted_or_moved_is_still_written() -> None:
    student = nn.Linear(3, 3)
    teacher = copy.deepcopy(student).bfloat16()
    ema = moved(student, 0.5, into=teacher)
    for change in (teacher.half, teacher.bfloat16, teacher.float):
        change()
        walk_(student)
        ema.update()
        assert torch.equal(teacher.weight, ema.averages["weight"].to(teacher.weight.dtype))
    teacher.bfloat16()
    teacher.weight.data = teacher.weight.data.clone()
    walk_(student)
    ema.update()
    assert torch.equal(teacher.weight, ema.averages["weight"].bfloat16())


def test_a_followed_tensor_whose_storage_is_replaced_is_still_followed() -> None:
    student = nn.Linear(3, 3)
    teacher = copy.deepcopy(student)
    ema = EMA(
        student, 0.5, into=teacher, policy=lambda n, t, m: "follow" if n == "bias" else "average"
    )
    ema.update()
    student.bias.data = torch.full((3,), 7.0)
    ema.update()
    assert torch.equal(teacher.bias, student.bias)


def test_a_teacher_made_in_inference_mode_can_be_updated() -> None:
    student = nn.Linear(3, 3)
    teacher = copy.deepcopy(student).bfloat16()
    with torch.inference_mode():
        ema = EMA(student, 0.5, into=teacher)
    walk_(student)
    ema.update()
    assert ema.clock == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGALRM", "SIGUSR1"])
@pytest.mark.parametrize("verb", ["write", "lerp"])
def test_a_signal_handler_that_raises_waits(
    monkeypatch: pytest.MonkeyPatch, name: str, verb: str
) -> None:
    """Preemption: SIGTERM -> SystemExit in the middle of a restore or an update tears nothing."""
    number = getattr(signal, name)
    original = getattr(engine, verb)

    def interrupted(plan: Any, *weight: Any) -> None:
        os.kill(os.getpid(), number)
        original(plan, *weight)

    def leave(*_: Any) -> None:
        raise SystemExit(1)

    model = nn.Linear(3, 3)
    ema = moved(model)
    before, clock = copy.deepcopy(model.state_dict()), ema.clock
    previous = signal.signal(number, leave)
    try:
        if verb == "write":
            with pytest.raises(SystemExit), ema.applied():
                monkeypatch.setattr(engine, verb, interrupted)
        else:
            monkeypatch.setattr(engine, verb, interrupted)
            with pytest.raises(SystemExit):
                ema.update()
    finally:
        assert signal.getsignal(number) is leave
        signal.signal(number, previous)
    monkeypatch.undo()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert ema.clock == clock + (verb == "lerp")
    assert ema.report().updates == ema.clock


def test_blocks_that_end_in_another_order_keep_the_averages_to_the_last() -> None:
    """A generator that is closed early, a second validation thread: nobody loses the averages."""
    model = nn.Linear(3, 3)
    ema = moved(model)
    before = model.weight.detach().clone()

    def validation() -> Iterator[int]:
        with ema.applied():
            yield 1

    outer = validation()
    next(outer)
    with ema.applied():
        outer.close()  # type: ignore[attr-defined]
        assert torch.equal(model.weight, ema.averages["weight"])
        with pytest.raises(RuntimeError, match="cannot update now"):
            ema.update()
    assert torch.equal(model.weight, before)
    ema.update()


def test_a_second_attach_is_refused_whatever_the_optimizer() -> None:
    model = nn.Linear(3, 3)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    ema = EMA(model)
    handle = ema.attach(first)
    with pytest.raises(ValueError, match=r"attached already.*steps last.*remove\(\)"):
        ema.attach(second)
    handle.remove()
    ema.attach(second)


def test_a_state_that_is_the_averages_themselves_is_no_way_back() -> None:
    """state_dict aliases, as a module's does; rolling back with it would mix two clocks."""
    model = nn.Linear(3, 3)
    ema = moved(model)
    alias, best = ema.state_dict(), copy.deepcopy(ema.state_dict())
    ema.load_state_dict(alias)  # nothing has happened in between
    walk_(model)
    ema.update()
    with pytest.raises(ValueError, match=r"tensors are the averages themselves.*deepcopy"):
        ema.load_state_dict(alias)
    ema.load_state_dict(best)
    assert ema.clock == 3
    assert torch.equal(ema.averages["weight"], best["averages"]["weight"])


class Empty(nn.Linear):
    """A module that is falsy, as containers of nothing are."""

    def __len__(self) -> int:
        return 0


def test_a_falsy_teacher_is_a_teacher() -> None:
    student, teacher = Empty(2, 2), Empty(2, 2)
    ema = EMA(student, 0.5, into=teacher)
    both = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="trains parameters of the teacher"):
        ema.attach(both)


def test_overlapping_averages_without_parameters_are_protected() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    whole, part = EMA(model, 0.5), EMA(model[1], 0.5)
    whole.update()
    with whole.applied(), pytest.raises(RuntimeError, match="cannot update now"):
        part.update()


def test_two_parameters_on_one_memory_are_known_by_both() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)
    ema = moved(model)
    trained = model["b"].weight.detach().clone()
    part = EMA(model["b"], 0.5)
    with ema.applied():
        assert torch.equal(part.state_dict()["averages"]["weight"], trained)


class Rotary(nn.Module):
    """Grows a cache in its forward, and remembers its size in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.length = 0
        self.grow(4)

    def grow(self, length: int) -> None:
        self.length = length
        self.register_buffer("positions", torch.arange(float(length)), persistent=False)

    def forward(self, length: int) -> Tensor:
        if length > self.length:
            self.grow(length)
        out: Tensor = self.scale * self.positions[:length]
        return out


def test_a_cache_that_grows_during_validation_may_stay() -> None:
    model = Rotary()
    ema = moved(model)
    with ema.applied():
        model(16)
    assert model.length == len(model.positions) == 16
    assert model(16).shape == (16,)


def test_a_file_written_by_a_thread_is_of_one_clock(tmp_path: Path) -> None:
    """An update waits for the file: what it holds and what it says are of the same moment."""
    model = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
    ema = EMA(model, Constant(0.0))  # an average that is its clock
    for clock in range(1, 3):
        for parameter in model.parameters():
            parameter.data.fill_(clock)
        ema.update()
    started, path = threading.Event(), tmp_path / "a.safetensors"

    def save() -> None:
        started.set()
        ema.save(path)

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    started.wait()
    for clock in range(3, 30):
        for parameter in model.parameters():
            parameter.data.fill_(clock)
        ema.update()
    thread.join(60)
    assert not thread.is_alive()
    clock = read_facts(path)["clock"]
    assert {float(tensor.unique()) for tensor in read(path).values()} == {float(clock)}


class Packed(torch.Tensor):
    """A weight in a format of its own, as quantized ones are: almost no operation is there."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return "Packed"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("detach", "clone", "alias"):
            return cls(args[0].inner)
        raise NotImplementedError(name)


@pytest.mark.parametrize("as_buffer", [False, True])
def test_quantized_weights_are_left_alone(tmp_path: Path, as_buffer: bool) -> None:
    """LoRA on a frozen base of packed weights: adapters are averaged, the base is not met."""
    model = nn.Module()
    model.adapter = nn.Linear(3, 3)
    packed = Packed(torch.randn(3, 3))
    if as_buffer:
        model.register_buffer("base", packed)
    else:
        model.base = nn.Parameter(packed, requires_grad=False)
    ema = moved(model)
    trained = model.adapter.weight.detach().clone()
    with ema.applied():
        assert torch.equal(model.adapter.weight, ema.averages["adapter.weight"])
    assert torch.equal(model.adapter.weight, trained)
    assert list(ema.model_state_dict()) == list(model.state_dict())
    ema.save(tmp_path / "adapter.safetensors", averages_only=True)
    ema.copy_to(model)
    assert torch.equal(model.adapter.weight, ema.averages["adapter.weight"])


def test_a_scripted_module_is_refused() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"scripted module.*before torch.jit.script"):
        EMA(scripted)


class Wrapped(nn.DataParallel):
    """A wrapper with a further module of its own."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.timer = nn.Identity()


def test_a_wrapper_may_have_modules_of_its_own() -> None:
    model = nn.Sequential(Wrapped(nn.Linear(2, 2)))
    assert set(EMA(model).averages) == {"0.weight", "0.bias"}
    assert set(EMA(Wrapped(nn.Linear(2, 2))).averages) == {"weight", "bias"}


def test_a_student_that_is_frozen_for_a_phase_does_not_overwrite_its_teacher() -> None:
    """A policy that looks at requires_grad: what was averaged stays an average."""
    student = nn.Linear(3, 3)
    teacher = copy.deepcopy(student)
    ema = EMA(student, 0.9, into=teacher, policy=trainable)
    expected = teacher.weight.detach().clone()
    for step in range(6):
        student.requires_grad_(step > 1)
        student.weight.data += torch.randn(3, 3)
        expected.lerp_(student.weight.detach(), 0.1)
        ema.update()
    assert torch.allclose(teacher.weight, expected, rtol=0, atol=1e-6)


def test_what_has_no_mean_is_not_averaged() -> None:
    model = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match=r"num_batches_tracked: torch.int64 has no mean; .*follow"):
        EMA(model, policy=lambda name, tensor, module: "average")


def test_a_policy_sees_the_owner_under_each_name() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 4), "out": nn.Linear(4, 3, bias=False)})
    model["out"].weight = model["embedding"].weight
    seen = {}

    def policy(name: str, tensor: Tensor, module: nn.Module) -> Any:
        seen[name] = type(module)
        return "average"

    EMA(model, policy=policy)
    assert seen == {"embedding.weight": nn.Embedding, "out.weight": nn.Linear}


def test_what_was_deleted_comes_back_in_its_place() -> None:
    """A Sequential runs its modules in the order of its dictionary."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    ema = moved(model)
    keys, first = list(model.state_dict()), model[0]
    with pytest.raises(RuntimeError, match="changed inside applied"), ema.applied():
        del model._modules["0"]
    assert list(model.state_dict()) == keys
    assert model[0] is first


def test_the_function_is_refused_where_averages_are_applied() -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    for model in (student, teacher):
        ema = moved(model)
        before = copy.deepcopy(teacher.state_dict())
        with ema.applied(), pytest.raises(RuntimeError, match="cannot update a teacher now"):
            update_(teacher, student)
        assert all(torch.equal(t, before[key]) for key, t in teacher.state_dict().items())


def test_values_that_a_dtype_cannot_hold_are_not_written(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.weight.data.fill_(1e5)
    ema = EMA(model, 0.5)
    ema.update()
    ema.save(tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(
        ValueError, match=r"weight has values that torch.float16 cannot hold.*1e\+05"
    ):
        ema.save(tmp_path / "a.safetensors", dtype=torch.float16)
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_state_that_would_overflow_is_refused() -> None:
    wide, narrow = nn.Linear(2, 2).double(), nn.Linear(2, 2)
    wide.weight.data.fill_(1e300)
    source, ema = EMA(wide, 0.5), EMA(narrow, 0.5)
    source.update()
    with pytest.raises(ValueError, match=r"weight: values beyond 3\.4e\+38"):
        ema.load_state_dict(source.state_dict())
    assert ema.clock == 0


def test_a_wrapped_teacher_is_in_eval_mode_whole() -> None:
    student, teacher = nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))
    EMA(student, 0.5, into=teacher)
    assert not teacher.training
    assert not teacher.module.training


def test_threads_that_validate_do_not_lose_the_weights() -> None:
    """Whoever comes second sees the averages already applied, and waits with restoring."""
    model = nn.ModuleList(nn.Linear(32, 32) for _ in range(30))
    ema = moved(model)
    before = copy.deepcopy(model.state_dict())
    average = ema.averages["0.weight"].clone()
    wrong = []
    ready = threading.Barrier(3)

    def validate() -> None:
        ready.wait()
        for _ in range(10):
            with ema.applied():
                if not torch.equal(model[0].weight, average):
                    wrong.append("not the averages")

    threads = [threading.Thread(target=validate, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_every_handler_is_back_although_one_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C while the handlers are put back must not leave SIGTERM without one."""
    handled = []
    previous = signal.signal(signal.SIGTERM, lambda *_: handled.append("term"))
    original, interrupts = swap._signal.signal, [True]

    def install(number: int, handler: Any) -> Any:
        result = original(number, handler)
        if handler is signal.default_int_handler and interrupts:
            interrupts.clear()
            os.kill(os.getpid(), signal.SIGINT)
        return result

    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            monkeypatch.setattr(swap._signal, "signal", install)
        monkeypatch.undo()
        os.kill(os.getpid(), signal.SIGTERM)
        assert handled == ["term"]
    finally:
        signal.signal(signal.SIGTERM, previous)


class Counting(nn.Module):
    """Counts what it sees, also in eval mode."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.norm, self.head = norm, nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        out: Tensor = self.head(self.norm(x))
        return out


def test_re_estimating_a_teacher_changes_nothing_else() -> None:
    """Neither its own counters, nor the statistics of a layer that is the student's as well."""
    norm = nn.BatchNorm1d(3)
    student, teacher = Counting(norm), Counting(norm)
    ema = EMA(
        student, 0.5, into=teacher, policy=lambda n, t, m: "leave" if "norm" in n else "average"
    )
    before = norm.running_mean.clone()
    ema.reestimate_statistics([torch.randn(8, 3) + 5])
    assert torch.equal(norm.running_mean, before)
    assert float(teacher.seen) == 0


def test_a_reset_teacher_starts_from_its_average() -> None:
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teacher = copy.deepcopy(student)
    ema = EMA(student, 0.5, into=teacher)
    ema.update()
    average = ema.averages["1.running_mean"].clone()
    ema.reestimate_statistics([torch.randn(8, 3) + 5])
    ema.reset()
    assert torch.equal(ema.averages["1.running_mean"], average)


def test_what_comes_after_a_reset_shares_no_states_with_what_was() -> None:
    model = nn.Linear(2, 2)
    ema = moved(model)
    before = ema.history
    ema.reset()
    for _ in range(3):
        ema.update()
    assert before is not None
    assert ema.history is not None
    assert inner(before, before) > 0
    assert inner(before, ema.history) == 0


def test_steps_that_no_update_has_seen_count_after_all() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = EMA(model)
    handle = ema.attach(optimizer, every=4)
    for _ in range(6):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    handle.remove()
    ema.update()
    assert ema.clock == 7


def test_the_trained_weights_are_let_go_with_the_block() -> None:
    model = nn.Linear(2, 2)
    ema = moved(model)
    with ema.applied() as trained:
        assert torch.equal(trained["weight"], trained["weight"])
    assert not trained


def test_a_lazily_negated_parameter_is_refused() -> None:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    model.weight = nn.Parameter(model.weight.detach().conj())
    with pytest.raises(ValueError, match="weight is trained as a Parameter"):
        EMA(model)


def test_a_pretended_optimizer_is_refused() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    model = nn.Linear(2, 2)
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"pass the optimizer inside"):
        EMA(model).attach(wrapper)
