"""Averages in host memory: an update goes on beside training, and nobody ever sees half of it.

There is no accelerator here: the sources are in host memory too, and everything but the stream is
the same code. `tests/test_gpu.py` has what needs a GPU.
"""

from __future__ import annotations

import gc
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import batch, bit_identical, convolutional, plain, train
from polyak import EMA, Debiased, checks, engine, files
from polyak.engine import foreach, host


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every update take this path, in many small chunks."""
    monkeypatch.setattr(host.Host, "takes", staticmethod(lambda target, source: True))
    monkeypatch.setattr(engine, "_PATHS", (host.Host, foreach.Foreach))
    monkeypatch.setattr(host, "BUFFER_BYTES", 64)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event without which no chunk is copied."""
    event, copy = threading.Event(), host._Link.copy

    def wait(self: Any, chunk: Any) -> None:
        assert event.wait(30)
        copy(self, chunk)

    monkeypatch.setattr(host._Link, "copy", wait)
    yield event
    event.set()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)


def values(ema: EMA) -> dict[str, Tensor]:
    return {name: average.clone() for name, average in ema.averages.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ten_thousand_updates_with_delays(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Whoever is late, the trainer or the worker: the bits are those of one after the other."""
    generator, copy = random.Random(0), host._Link.copy

    def late(self: Any, chunk: Any) -> None:
        if generator.random() < 0.02:
            time.sleep(generator.random() * 2e-4)
        copy(self, chunk)

    monkeypatch.setattr(host._Link, "copy", late)
    model = nn.ModuleList(nn.Linear(n, 3) for n in (1, 5, 9)).to(dtype)
    optimizer = sgd(model)
    ema = EMA(model, 0.99, device="cpu")
    ema.attach(optimizer)
    expected: list[Tensor] = []
    for number in range(10_000):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, (number * 37 % 64 - 32) / 64)
        if generator.random() < 0.02:
            time.sleep(generator.random() * 2e-4)
        optimizer.step()
        now = [p.detach().to(torch.promote_types(dtype, torch.float32)) for p in model.parameters()]
        expected = (
            [torch.lerp(e, n, 1.0 - 0.99) for e, n in zip(expected, now, strict=True)]
            if expected
            else now
        )
    assert ema.report().paths == ("host",)
    assert bit_identical(list(ema.averages.values()), expected)


def test_weights_that_do_not_wait_are_seen_to_change(gate: threading.Event) -> None:
    """The test above can fail: the worker does read the weights after the update has begun."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    ema._update(2)  # as `attach` does, without a wait
    with torch.no_grad():
        model.weight.fill_(1.0)
    gate.set()
    assert ema.averages["weight"].unique().tolist() == [0.5]


def test_a_bare_update_has_read_the_weights(gate: threading.Event) -> None:
    """Without an optimizer to wait for, `update` waits itself; the mixing may go on."""
    model = nn.Linear(4, 4, bias=False)
    nn.init.zeros_(model.weight)
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    threading.Timer(0.2, gate.set).start()
    ema.update()
    assert gate.is_set()
    with torch.no_grad():
        model.weight.fill_(1.0)
    assert ema.averages["weight"].unique().tolist() == [0.0]


def test_statistics_are_those_of_the_step(gate: threading.Event) -> None:
    """The next forward changes them, and may come before anything has been read."""
    model = convolutional()
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    first = values(ema)
    model(batch()[0])
    second = {name: model.state_dict()[name].clone() for name in first}
    ema._update(2)  # as `attach` does, without a wait
    model(batch(1)[0])
    assert not torch.equal(model.norm.running_mean, second["norm.running_mean"])
    gate.set()
    mixed = {name: torch.lerp(average, second[name], 0.5) for name, average in first.items()}
    assert bit_identical(values(ema), mixed)


@pytest.mark.parametrize("other", [False, True], ids=["its own optimizer", "another one"])
def test_a_step_waits_until_the_weights_are_read(gate: threading.Event, other: bool) -> None:
    """Also that of an optimizer which steps another part of the model, before the attached one."""
    model = plain()
    first, last = sgd(model.hidden), sgd(model.head)
    ema = EMA(model, 0.5, device="cpu")
    handle = ema.attach(last)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for optimizer in (first, last):
        optimizer.step()
    before = values(ema)
    for optimizer in (first, last):
        optimizer.step()  # the update that begins here finds the gate shut
    seen = {name: p.detach().clone() for name, p in model.named_parameters()}
    threading.Timer(0.2, gate.set).start()
    (first if other else last).step()
    assert gate.is_set()
    if other:
        ema._settle()
        assert all(
            torch.equal(average, torch.lerp(before[name], seen[name], 0.5))
            for name, average in ema.averages.items()
        )
    handle.remove()
    gate.clear()
    first.step()  # nobody waits any more


def test_the_hook_on_all_optimizers_goes_with_the_ema() -> None:
    """It is torch's, for the whole process: what is forgotten must not be asked for ever."""
    from torch.optim import optimizer as torch_optimizer

    hooks = torch_optimizer._global_optimizer_pre_hooks
    gc.collect()
    before = len(hooks)
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model, 0.5, device="cpu")
    ema.attach(optimizer)
    assert len(hooks) == before + 1
    del model, optimizer, ema
    gc.collect()
    assert len(hooks) == before


READERS = {
    "averages": lambda ema, _: dict(ema.averages),
    "state_dict": lambda ema, _: ema.state_dict()["averages"],
    "model_state_dict": lambda ema, _: ema.model_state_dict(),
    "report": lambda ema, _: ema.report().distance,
    "save": lambda ema, path: ema.save(path) or files.read(path),
    "copy_to": lambda ema, _: (module := plain(seed=9), ema.copy_to(module), module.state_dict())[
        2
    ],
}


@pytest.mark.parametrize("name", [*READERS, "applied", "update"])
def test_every_reader_waits(gate: threading.Event, tmp_path: Path, name: str) -> None:
    """None sees an average that is half old and half new."""
    gate.set()
    model = plain()
    optimizer = sgd(model)
    ema, wanted = EMA(model, 0.5, device="cpu"), EMA(model, 0.5, device="cpu")
    for e in (ema, wanted):
        e.attach(optimizer)
    for _ in train(model, optimizer, range(3)):
        pass
    for e in (ema, wanted):
        e._settle()
    gate.clear()
    for _ in train(model, optimizer, range(1)):
        threading.Timer(0.1, gate.set).start()
    path = tmp_path / "a.safetensors"
    if name == "applied":
        with ema.applied():
            found = {n: p.detach().clone() for n, p in model.named_parameters()}
        assert bit_identical(found, dict(wanted.averages))
    elif name == "update":
        handles = [a for e in (ema, wanted) for a in e._attachments]
        for handle in handles:
            handle.remove()
        ema.update()
        wanted.update()
        assert bit_identical(values(ema), values(wanted))
    else:
        read = READERS[name]
        assert gate.is_set() or read(ema, path) is not None
        assert bit_identical(read(ema, path), read(wanted, path))


def broken(monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, EMA, dict[str, Any]]:
    """An EMA whose last update failed in the worker, after some chunks; and an earlier state."""
    model = plain()
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    ema.update()
    state = dict(ema.state_dict())
    state["averages"] = {name: t.clone() for name, t in state["averages"].items()}
    copy, left = host._Link.copy, [4]

    def fail(self: Any, chunk: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError("the link is down")
        copy(self, chunk)

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(host._Link, "copy", fail)
        ema._update(3)
        with pytest.raises(OSError, match="the link is down"):
            ema._plan.wait()
    return model, ema, state


def test_an_error_of_the_worker_is_raised_at_the_next_call(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And at every one after it: no file and no state is made of averages that are half updated."""
    _, ema, state = broken(monkeypatch)
    path = tmp_path / "a.safetensors"
    calls = [
        *READERS.values(),
        lambda ema, _: ema.update(),
        lambda ema, _: ema.applied().__enter__(),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"half-way.*OSError: the link is down.*reset\(\)"):
            call(ema, path)
    assert not path.exists()
    with pytest.raises(ValueError, match="no state of a polyak EMA"):
        ema.load_state_dict({})  # what cannot be loaded does not make it whole
    with pytest.raises(RuntimeError, match="half-way"):
        ema.state_dict()
    ema.load_state_dict(state)
    assert bit_identical(dict(ema.averages), state["averages"])
    ema.update()
    assert ema.clock == 3


def test_reset_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ema, _ = broken(monkeypatch)
    ema.reset()
    ema.update()
    assert bit_identical(values(ema), {n: p.detach() for n, p in model.named_parameters()})


def test_an_error_is_told_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training does not go on for days with an average that stands still."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model, 0.5, device="cpu")
    ema.attach(optimizer)
    for _ in train(model, optimizer, range(2)):
        pass
    monkeypatch.setattr(host._Link, "copy", lambda self, chunk: 1 / 0)
    with pytest.raises(RuntimeError, match=r"half-way.*ZeroDivisionError"):
        for _ in train(model, optimizer, range(3)):
            pass


def test_an_interrupt_while_waiting(gate: threading.Event) -> None:
    """Ctrl-C is heard; the update goes on, and is waited for by the next call. No deadlock."""
    model = plain()
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    ema._update(2)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ema.state_dict()
    gate.set()
    assert ema.report().updates == 2
    assert bit_identical(values(ema), {n: p.detach() for n, p in model.named_parameters()})


def test_a_fork_in_the_middle(gate: threading.Event) -> None:
    """The child has no worker: it says so instead of waiting for ever; the parent goes on."""
    model = plain()
    ema = EMA(model, 0.5, device="cpu")
    ema.update()
    ema._update(2)
    child = os.fork()
    if not child:
        try:
            ema.state_dict()
        except RuntimeError as error:
            os._exit(7 if "forked while" in str(error) else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    gate.set()
    assert ema.report().updates == 2
    child = os.fork()
    if not child:  # and a child that was forked in peace may update for itself
        ema.update()
        os._exit(0 if ema.report().updates == 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_is_not_finite_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard and its count are those of the other paths."""
    found = []
    for paths in ((host.Host, foreach.Foreach), (foreach.Foreach,)):
        monkeypatch.setattr(engine, "_PATHS", paths)
        model = convolutional()
        ema = EMA(model, Debiased(0.9), device="cpu")
        for number in range(4):
            with torch.no_grad():
                model.conv.weight.add_(0.1)
                model.head.bias[number % 2] = torch.nan if number in (2, 3) else 0.5
            ema.update()
        with pytest.warns(UserWarning, match="^3 elements"):
            report = ema.report()
        assert (report.nonfinite, report.paths) == (3, (paths[0].name,))
        found.append(values(ema))
    assert bit_identical(*found)


def test_the_ring_is_all_the_memory_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three buffers of a fixed size, whatever the model's, and of a small model no more than it."""
    monkeypatch.setattr(host, "BUFFER_BYTES", 1 << 12)
    for size, held in ((1 << 16, 3 << 12), (100, 3 * 400)):
        group = host.Host([torch.zeros(size)], [torch.zeros(size)])
        storages = {
            staged.untyped_storage().data_ptr(): staged.untyped_storage().nbytes()
            for chunk in group._chunks
            for staged in chunk.staged
        }
        assert sum(storages.values()) == held


def view(*devices: str, teacher: object = None) -> Any:
    slots = [SimpleNamespace(tensor=SimpleNamespace(device=torch.device(d))) for d in devices]
    return SimpleNamespace(tree=SimpleNamespace(slots=slots), teacher=teacher)


def test_which_devices_are_accepted() -> None:
    """Beside the parameters, or in host memory for a model on CUDA devices."""
    check = checks.checked_device
    assert check(None, view("cuda:0")) is None
    assert check("cuda", view("cuda:0", "cuda:1")) is None
    assert check("cuda:1", view("cuda:1")) is None
    assert check("cpu", view("cpu")) == torch.device("cpu")  # which may be moved later
    assert check("cpu", view("cuda:0", "cuda:1")) == torch.device("cpu")
    for device, there in (("cuda", ["cpu"]), ("cpu", ["cuda:0", "cpu"]), ("cuda:0", ["cuda:1"])):
        with pytest.raises(ValueError, match=r"are not to be had, only on 'cpu' for a model"):
            check(device, view(*there))
    with pytest.raises(ValueError, match="those of into= are kept in the teacher"):
        check("cpu", view("cuda:0", teacher=object()))
