"""Every misuse is an error of its own that says what to do, and changes nothing.

`refused` compares the model, the averages and the clock before and after each failed call, bit for
bit. Messages are tested on their text: what is wrong, the values, what to type instead.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import polyak
from models import Snapshot, batch, bit_identical, convolutional, frozen, plain, tied, train
from polyak import EMA, Cosine, HalfLife, Uniform, files


class Everything:
    """An EMA and its modules at this moment; `differences` says what is no longer so."""

    def __init__(self, ema: EMA | None, *modules: nn.Module) -> None:
        self._ema, self._snapshots = ema, [Snapshot(module) for module in modules]
        self._seen = self._look()

    def _look(self) -> dict[str, object]:
        if self._ema is None:
            return {}
        plain = {k: v for k, v in vars(self._ema).items() if type(v) in (bool, int, float, str)}
        values = {f"average {name}": t.clone() for name, t in self._ema.averages.items()}
        return plain | values | {"repr": repr(self._ema), "history": repr(self._ema._history)}

    def differences(self) -> list[str]:
        now = self._look()
        return [
            name
            for name in {**self._seen, **now}
            if name not in now
            or name not in self._seen
            or not bit_identical(now[name], self._seen[name])
        ] + [name for snapshot in self._snapshots for name in snapshot.differences()]


@contextmanager
def refused(
    kind: type[BaseException], match: str, ema: EMA | None = None, *modules: nn.Module
) -> Iterator[None]:
    """The block raises this error, whose text matches, and nothing has changed afterwards."""
    before = Everything(ema, *modules)
    with pytest.raises(kind, match=f"(?s){match}"):
        yield
    assert before.differences() == []


def test_the_helper_can_fail() -> None:
    """It sees a bit of a weight, of an average, a mode, a gradient, and the clock."""
    model = plain()
    ema = EMA(model, 0.5)
    ema.update()

    def nudge() -> None:
        with torch.no_grad():
            model.head.bias[0] += 1e-3

    def touch() -> None:
        ema.averages["head.bias"][0] += 1e-3

    changes: list[Callable[[], object]] = [nudge, touch, model.eval, ema.update, ema.reset]
    for change in changes:
        before = Everything(ema, model)
        assert before.differences() == []
        change()
        assert before.differences() != []

    def fail() -> None:
        with refused(ValueError, "no", ema, model):
            nudge()
            raise ValueError("no")

    with pytest.raises(AssertionError):
        fail()


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


def copies(tensors: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def trained(updates: int = 3, model: nn.Module | None = None) -> tuple[nn.Module, EMA]:
    """Return a model and an EMA of it that has seen so many different weights."""
    model = convolutional() if model is None else model
    ema = EMA(model, 0.5)
    for _ in train(model, sgd(model), range(updates)):
        ema.update()
    return model, ema


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# ------------------------------------------------------------------------------ construction


def test_nothing_to_average() -> None:
    """An EMA of nothing would run for days without a word."""
    model = frozen()
    model.requires_grad_(False)
    with refused(
        ValueError,
        r"nothing to average: the policy 'trainable' averages none of the 4 tensors \(all "
        r"parameters are frozen.*unfreeze before building the EMA, or pass policy=everything",
        None,
        model,
    ):
        EMA(model)
    with refused(
        ValueError, r"nothing to average: .* none of the 0 tensors; pass a model that has"
    ):
        EMA(nn.ReLU())
    with refused(
        ValueError, r"nothing to average: .*none of the 4 tensors; let it return 'average'"
    ):
        EMA(plain(), policy=lambda *_: "follow")


def test_everything_was_frozen_before_the_first_update() -> None:
    """The same when the model changed between construction and the first update."""
    model = plain()
    ema = EMA(model)
    model.requires_grad_(False)
    with refused(ValueError, "nothing to average"):
        ema.update()
    assert ema.clock == 0
    model.requires_grad_(True)
    ema.update()
    assert ema.clock == 1


@pytest.mark.parametrize(
    "decay", [-0.1, 1.5, 1000, math.nan, math.inf, 1.0, 1], ids=lambda value: f"{value}"
)
def test_a_decay_out_of_range(decay: float) -> None:
    """A share is between 0 and 1; 1 itself never moves."""
    with refused(
        ValueError, rf"decay.*{decay}.*(0\.999|[Ww]rite|HalfLife)", None, model := plain()
    ):
        EMA(model, decay)


@pytest.mark.parametrize(
    ("decay", "text"),
    [
        ("0.9", "'0.9' of type str.*write 0.999"),
        (True, "True of type bool.*write 0.999"),
        (HalfLife, r"HalfLife is a class.*write HalfLife\(...\)"),
        (torch.optim.SGD, r"a decay is a float or a decay value, not .*SGD"),
        ([0.9], r"\[0.9\] of type list.*write 0.999"),
    ],
)
def test_a_decay_of_another_kind(decay: Any, text: str) -> None:
    """A string from a configuration file, a class instead of a value."""
    with refused(TypeError, text, None, model := plain()):
        EMA(model, decay)


def test_a_decay_that_looks_like_its_complement() -> None:
    """0.001 is a decay, but hardly ever meant as one."""
    with pytest.warns(UserWarning, match=r"keeps only 0.10% .*0\.999.*Constant\(.*0\.001\)"):
        ema = EMA(plain(), 0.001)
    assert ema.decay == polyak.Constant(0.001)
    EMA(plain(), polyak.Constant(0.001))  # meant, and said so
    EMA(plain(), 0.1)


def test_a_teacher_without_a_decay() -> None:
    """How fast the teacher's own values fade is the user's to say."""
    student, teacher = plain(), plain(1)
    with refused(
        ValueError,
        r"starts from the teacher's own values.*pass a decay, for example EMA\(student, 0.996",
        None,
        student,
        teacher,
    ):
        EMA(student, into=teacher)


@pytest.mark.parametrize(
    ("dtype", "zone"), [(torch.bfloat16, "3.9"), (torch.float16, "0.49")], ids=["bf16", "fp16"]
)
def test_averages_too_narrow_to_move(dtype: torch.dtype, zone: str) -> None:
    """The error shows the change that such an average ignores."""
    with refused(
        ValueError,
        rf"averages in {dtype} would stand still: at decay 0.999 .* below {zone}, in float32 below "
        "6e-05. Leave dtype out",
    ):
        EMA(plain(), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, "float64", 32, torch.Tensor])
def test_a_dtype_that_is_none(dtype: Any) -> None:
    """What is no floating dtype is refused with the two that are taken."""
    kind = ValueError if isinstance(dtype, torch.dtype) else TypeError
    with refused(kind, r"dtype must be torch.float32 or torch.float64, got"):
        EMA(plain(), dtype=dtype)


def test_a_device_that_is_not_to_be_had() -> None:
    """Averages are beside their parameters."""
    EMA(plain(), device="cpu")
    with refused(ValueError, "averages on meta for a model on cpu .*leave device out"):
        EMA(plain(), device="meta")


def test_a_lazy_module() -> None:
    """It has no shapes before a forward, and so no averages."""
    model = nn.Sequential(nn.LazyLinear(3))
    with refused(ValueError, r"0\.weight.*lazy.*run one forward"):
        EMA(model)
    model(batch()[0])
    EMA(model).update()


def test_tensors_without_data() -> None:
    """An EMA may be built on the meta device, and averages nothing until there are values."""
    with torch.device("meta"):
        model = nn.Linear(2, 3)
    ema = EMA(model)
    text = r"2 tensors are on the meta device.*weight.*bias.*load its weights before the first"
    for call in (ema.update, ema.state_dict):
        with refused(ValueError, text):
            call()
    assert ema.clock == 0
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(2.0)
    ema.update()
    assert ema.averages["bias"].tolist() == [2.0] * 3


@pytest.mark.parametrize(
    "build",
    [
        lambda model: model.state_dict(),
        lambda model: model.parameters(),
        lambda model: sgd(model),
        lambda model: None,
    ],
    ids=["state dict", "parameters", "optimizer", "None"],
)
def test_what_is_no_model(build: Callable[[nn.Module], Any]) -> None:
    """Names come from a module; anything else is named in the error."""
    value = build(plain())
    with refused(TypeError, rf"expected a torch.nn.Module, got {type(value).__name__}"):
        EMA(value)
    with refused(TypeError, rf"expected a torch.nn.Module, got {type(value).__name__}"):
        trained()[1].copy_to(value)


def test_fsdp1_says_to_use_fsdp2(group: None) -> None:
    """Its parameters are flat pieces without names."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(plain(), device_id=torch.device("cpu"))
    for wrapper in (model, nn.Sequential(model)):
        with refused(TypeError, r"\(FSDP1\).*flat pieces.*fully_shard \(FSDP2\)"):
            EMA(wrapper)


@pytest.mark.parametrize("verdict", [True, None, "mean", 0])
def test_a_policy_that_answers_nonsense(verdict: Any) -> None:
    """All tensors for which the answer is none are listed."""

    def mine(name: str, tensor: Tensor, module: nn.Module) -> Any:
        return verdict if name.startswith("head") else "average"

    with refused(
        ValueError,
        rf"policy .*mine.* is unclear.*head.weight: {verdict!r} is none of average, follow, leave"
        rf".*head.bias: {verdict!r}.*return one of the three words",
    ):
        EMA(plain(), policy=mine)


def test_one_tensor_under_two_names_with_two_verdicts() -> None:
    """One storage cannot be averaged and followed."""

    def mine(name: str, tensor: Tensor, module: nn.Module) -> Any:
        return "follow" if name == "decoder.weight" else "average"

    with refused(
        ValueError,
        r"'encoder.weight': 'average', 'decoder.weight': 'follow'.*one tensor .* takes one verdict",
    ):
        EMA(tied(), policy=mine)


# ------------------------------------------------------------------------ teacher and student


class Other(nn.Module):
    """`plain()` with one layer of another shape, one missing and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 9)
        self.tail = nn.Linear(9, 3)


MISMATCHES = (
    r"hidden.weight: \(9, 8\) in the teacher, \(8, 8\) in the model",
    r"hidden.bias: \(9,\) in the teacher, \(8,\) in the model",
    r"head.weight: not in the teacher",
    r"head.bias: not in the teacher",
    r"tail.weight: only in the teacher",
    r"tail.bias: only in the teacher",
)


@pytest.mark.parametrize("line", MISMATCHES)
def test_a_teacher_of_another_kind(line: str) -> None:
    """All differences are listed, and the teacher is as it was."""
    student, teacher = plain(), Other()
    text = rf"teacher and model do not match.*{line}.*build both from the same code"
    with refused(ValueError, text, None, student, teacher):
        EMA(student, 0.9, into=teacher)
    with refused(ValueError, text, None, student, teacher):
        polyak.update_(teacher, student)


def test_a_teacher_that_shares_with_the_student() -> None:
    """An average in the student's own tensors would overwrite its training."""
    student, teacher = plain(), plain(1)
    with refused(ValueError, r"hidden.weight: the same tensor in both.*head.bias: the same"):
        EMA(student, 0.9, into=student)
    with refused(ValueError, r"hidden.weight: the same tensor in both"):
        EMA(student, 0.9, into=torch.compile(student, backend="eager"))
    teacher.head = student.head
    with refused(ValueError, r"head.weight: the same tensor in both.*copy.deepcopy\(model\)"):
        EMA(student, 0.9, into=teacher)
    teacher = plain(1)
    teacher.head.weight = nn.Parameter(student.head.weight.data)  # other object, same memory
    with refused(ValueError, r"head.weight: the same tensor in both.*copy.deepcopy\(model\)"):
        EMA(student, 0.9, into=teacher)


def test_a_teacher_with_values_that_are_none() -> None:
    """What starts as NaN stays NaN."""
    student, teacher = plain(), plain(1)
    with torch.no_grad():
        teacher.head.bias[0] = math.nan
    with refused(ValueError, r"1 tensors .* not finite.*head.bias", None, student, teacher):
        EMA(student, 0.9, into=teacher)
    with refused(ValueError, "meta device.*materialize", None, student):
        EMA(student, 0.9, into=copy.deepcopy(teacher).to("meta"))


def test_the_seeds_function() -> None:
    """`update_` has no clock and no room for wide averages."""
    student, teacher = plain(), plain(1)
    with refused(TypeError, r"no clock, which HalfLife.*into=teacher", None, student, teacher):
        polyak.update_(teacher, student, HalfLife(3))  # type: ignore[arg-type]
    narrow = plain(1).bfloat16()
    with refused(
        ValueError,
        r"too narrow.*hidden.weight: torch.bfloat16.*into=teacher",
        None,
        student,
        narrow,
    ):
        polyak.update_(narrow, student, 0.9)
    with refused(ValueError, "the same tensor in both", None, student):
        polyak.update_(student, student)
    with refused(TypeError, "expected a torch.nn.Module, got OrderedDict"):
        polyak.update_(teacher, student.state_dict())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------- the clock


def test_what_is_no_clock() -> None:
    """The model, an epoch of a schedule, a flag: each says what t is."""
    model, ema = trained()
    with refused(
        TypeError,
        r"got a model \(Convolutional\).*update\(\) after each optimizer step",
        ema,
        model,
    ):
        ema.update(model)  # type: ignore[arg-type]
    for value in (1.5, True, "4", math.nan, torch.tensor(4.0)):
        with refused(
            TypeError,
            r"t counts optimizer steps .* must be an integer, got .*\((float|bool|str|Tensor)\).*"
            "pass the count, or leave t out",
            ema,
            model,
        ):
            ema.update(value)  # type: ignore[arg-type]
    ema.update(torch.tensor(4))  # type: ignore[arg-type]  # an integer all the same
    assert ema.clock == 4


def test_a_clock_that_goes_back() -> None:
    """A step counter that began again after a resume, or an epoch after steps."""
    model, ema = trained()
    with refused(
        ValueError, r"clock stands at 3 and cannot go back to 2.*since the beginning", ema, model
    ):
        ema.update(2)
    with refused(ValueError, "cannot go back to -1", fresh := EMA(plain())):
        fresh.update(-1)


def test_an_epoch_passed_for_a_step() -> None:
    """Most updates do nothing then; it is said once, when they far outnumber the real ones."""
    ema = EMA(plain())
    for _ in range(1 + 32):  # as many micro-batches to a step as anybody has
        ema.update(1)
    with pytest.warns(UserWarning, match=r"33 times with t=1.*only 1 updates.*an epoch was passed"):
        ema.update(1)
    for _ in range(5):
        ema.update(1)
    ema.update(2)
    report = ema.report()
    assert (report.clock, report.updates, report.repeats) == (2, 2, 38)


def test_a_bare_update_of_an_attached_ema() -> None:
    """Two ticks per step halve the horizon."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    handle = ema.attach(optimizer)
    for _ in train(model, optimizer, range(2)):
        with refused(
            RuntimeError,
            r"attached.*tick twice per step.*Delete the call, or remove\(\)",
            ema,
            model,
        ):
            ema.update()
    assert ema.clock == 2
    handle.remove()
    ema.update()
    assert ema.clock == 3


def test_first_weights_that_are_not_finite() -> None:
    """There is no older average to keep."""
    model = convolutional()
    with torch.no_grad():
        model.head.bias[0] = math.nan
        model.norm.running_var[1] = math.inf
    ema = EMA(model, 0.5)
    for call in (ema.update, ema.state_dict):
        with refused(
            ValueError,
            r"2 tensors .* not finite.*norm.running_var.*head.bias.*start before the weights",
            ema,
            model,
        ):
            call()
    with torch.no_grad():
        model.head.bias[0] = 0.0
        model.norm.running_var[1] = 1.0
    ema.update()
    assert ema.clock == 1


# ------------------------------------------------------------------------------- inside applied


INSIDE: dict[str, Callable[[EMA, nn.Module], object]] = {
    "update": lambda ema, model: ema.update(9),
    "reset": lambda ema, model: ema.reset(),
    "load a state": lambda ema, model: ema.load_state_dict(ema.state_dict()),
    "copy into the model": lambda ema, model: ema.copy_to(model),
}


@pytest.mark.parametrize("verb", INSIDE)
@pytest.mark.parametrize("other", [False, True], ids=["its own", "another EMA's"])
def test_what_is_not_for_the_inside_of_applied(verb: str, other: bool) -> None:
    """The model holds averages there: what reads or replaces its weights is an error."""
    model, ema = trained()
    second = EMA(model, 0.8)
    second.update()
    victim = second if other else ema
    before = Everything(ema, model), Everything(second)
    text = (
        rf"cannot {verb} now: inside applied\(\) the model holds averages, those of "
        r"EMA\(Convolutional, Constant\(decay=0.5\).*leave the block"
    )
    with ema.applied(), refused(RuntimeError, text, victim, model):
        INSIDE[verb](victim, model)
    assert before[0].differences() == before[1].differences() == []


def test_copying_into_another_module_inside_applied() -> None:
    """That writes nothing that the block would write back."""
    _model, ema = trained()
    target = convolutional(1)
    with ema.applied():
        ema.copy_to(target)
    assert bit_identical(copies(target.state_dict()), ema.model_state_dict())


def test_another_ema_is_not_applied_over_the_first() -> None:
    """It would keep the first one's averages aside as the trained weights."""
    model, ema = trained()
    second = EMA(model, 0.8)
    second.update()
    before = Everything(second, model)

    def nested() -> None:
        with second.applied():
            raise AssertionError("it was applied")

    with ema.applied(), refused(RuntimeError, "cannot apply the averages now", second, model):
        nested()
    assert before.differences() == []
    with second.applied():
        assert bit_identical(copies(model.state_dict()), second.model_state_dict())
    unrelated = EMA(plain(), 0.5)
    with ema.applied():
        unrelated.update()
        with unrelated.applied():
            pass


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_inside_applied(fused: bool) -> None:
    """An attached optimizer refuses before it has changed anything."""
    model = plain()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    for _ in train(model, optimizer, range(3)):
        pass
    moments = copy.deepcopy(optimizer.state_dict())
    before = Everything(ema, model)
    with ema.applied(), refused(RuntimeError, "cannot step the optimizer now", ema, model):
        optimizer.step()
    assert before.differences() == []
    assert bit_identical(optimizer.state_dict()["state"], moments["state"])
    for _ in train(model, optimizer, range(3, 5)):
        pass
    assert ema.clock == 5


def test_the_model_changed_inside_applied() -> None:
    """Everything is put back first, and then it is said what had changed."""
    model, ema = trained()
    before = Everything(ema, model)

    def replace() -> None:
        with ema.applied():
            model.head = nn.Linear(18, 3)
            model.conv.weight = nn.Parameter(torch.zeros(6, 1, 2, 2))

    def move() -> None:
        with ema.applied():
            model.head.weight.data = torch.zeros(3, 18)

    with pytest.raises(
        RuntimeError, match=r"(?s)changed inside applied.*conv.weight: .*head .*outside"
    ):
        replace()
    assert before.differences() == []
    with pytest.raises(RuntimeError, match=r"(?s)head.weight: its storage was replaced.*outside"):
        move()
    assert before.differences() == []


def test_frozen_inductor_code_does_not_see_averages() -> None:
    """Inductor with freezing on keeps copies of the weights in its code."""
    import torch._inductor.config

    model, ema = trained()

    def apply() -> None:
        with ema.applied():
            pass

    with (
        torch._inductor.config.patch(freezing=True),
        refused(RuntimeError, r"freezing is on.*model_state_dict\(\)", ema, model),
    ):
        apply()
    apply()


# ------------------------------------------------------------------------- a model that changes


class Grown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.head = nn.Linear(4, 2)


def insert(model: Any) -> None:
    model.layers.insert(1, nn.Linear(4, 4))


def remove(model: Any) -> None:
    del model.layers[1]


def reshape(model: Any) -> None:
    model.head = nn.Linear(4, 3)


def tie(model: Any) -> None:
    model.layers[1].weight = model.layers[0].weight


CHANGES: dict[str, tuple[Callable[[Any], object], list[str]]] = {
    "a layer inserted": (insert, ["layers.2.weight: new", "layers.2.bias: new"]),
    "a layer removed": (
        remove,
        ["layers.1.weight: no longer there", "layers.1.bias: no longer there"],
    ),
    "another shape": (
        reshape,
        [r"head.weight: was \(2, 4\), is \(3, 4\)", r"head.bias: was \(2,\), is \(3,\)"],
    ),
    "tied": (tie, ["layers.1.weight: is now tied to layers.0.weight"]),
    "half": (
        lambda model: model.half(),
        ["head.weight: was torch.float32, is torch.float16", "layers.0.bias: was torch.float32"],
    ),
    "bfloat16": (
        lambda model: model.bfloat16(),
        ["head.weight: was torch.float32, is torch.bfloat16"],
    ),
    "double": (
        lambda model: model.double(),
        ["head.weight: was torch.float32, is torch.float64"],
    ),
}
READS: dict[str, Callable[[EMA, Path], object]] = {
    "applied": lambda ema, path: ema.applied().__enter__(),
    "save": lambda ema, path: ema.save(path),
    "state_dict": lambda ema, path: ema.state_dict(),
    "model_state_dict": lambda ema, path: ema.model_state_dict(),
    "copy_to": lambda ema, path: ema.copy_to(Grown()),
    "report": lambda ema, path: ema.report(),
}


@pytest.mark.parametrize("updates", [1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_not_the_one_that_was_averaged(
    change: str, updates: int, tmp_path: Path
) -> None:
    """Averaging on, tensors would be lost or mixed with others; all differences are listed."""
    model = Grown()
    ema = EMA(model, 0.5)
    for _ in range(updates):
        ema.update()
    function, lines = CHANGES[change]
    function(model)
    calls = dict(READS)
    if change != "a layer inserted":  # seen by whatever walks the model, which an update need not
        calls["update"] = lambda ema, path: ema.update()
    for name, call in calls.items():
        for line in lines:
            with refused(
                ValueError,
                rf"not the one .* averaged.*{line}.*before the first update.*reset\(\)",
                ema,
                model,
            ):
                call(ema, tmp_path / "a.safetensors")
        assert not (tmp_path / "a.safetensors").exists(), name
    ema.reset()
    ema.update()
    assert set(ema.averages) == {name for name, _ in model.named_parameters()}


def test_a_layer_of_the_same_shape_is_picked_up() -> None:
    """A new head, or one that was loaded anew, under the same names: it is what trains now."""
    model, ema = trained()
    for replacement in range(4):
        before = copies(ema.averages)
        if replacement == 0:
            model.head = nn.Linear(18, 3)
        elif replacement == 1:
            model.head.weight = nn.Parameter(torch.randn(3, 18))
        elif replacement == 2:
            model.head.weight.data = torch.randn(3, 18)
        else:
            model.norm.running_mean = torch.randn(6)
        ema.update()
        for name in ("head.weight", "head.bias", "norm.running_mean"):
            new = model.state_dict()[name]
            expected = (before[name].double() + new.double()) / 2
            torch.testing.assert_close(ema.averages[name].double(), expected, rtol=0, atol=2**-22)


def test_what_is_newly_trainable_is_found(tmp_path: Path) -> None:
    """The backbone is unfrozen after a while, and never gets into the average."""
    model = frozen()
    ema = EMA(model, 0.5)
    ema.update()
    ema.update()
    model.backbone.requires_grad_(True)
    calls = {**READS, "update": lambda ema, _: ema.update()}
    for call in calls.values():
        with refused(
            ValueError,
            r"backbone.weight: new, or newly trainable.*backbone.bias: new.*reset\(\)",
            ema,
            model,
        ):
            call(ema, tmp_path / "a.safetensors")
    model.backbone.requires_grad_(False)
    ema.update()
    model.backbone.adapter = nn.Parameter(torch.zeros(3))
    with refused(ValueError, "backbone.adapter: new, or newly trainable", ema, model):
        ema.update()


# -------------------------------------------------------------------------------------- states


def test_a_state_of_another_model() -> None:
    """All differences are listed, and nothing is loaded."""
    model, ema = trained(model=plain())
    stranger = EMA(Other())
    stranger.update()
    for line in (
        r"hidden.weight: \(9, 8\) in the state, \(8, 8\) in the model",
        "head.weight: missing in the state",
        "tail.bias: only in the state",
    ):
        for victim in (ema, EMA(model, 0.5)):
            with refused(
                ValueError,
                rf"does not fit this EMA, and nothing was loaded.*{line}.*build the model and the",
                victim,
                model,
            ):
                victim.load_state_dict(stranger.state_dict())


def test_what_is_no_state(tmp_path: Path) -> None:
    """A model's own state dict, a checkpoint around the state, a path."""
    model, ema = trained(model=plain())
    for value, found in (
        (model.state_dict(), r"\['head.bias', 'head.weight'.*model.load_state_dict"),
        ({"ema": ema.state_dict(), "step": 3}, r"\['ema', 'step'\]"),
        ("ema.pt", "str"),
        (None, "NoneType"),
        (ema, "EMA"),
    ):
        with refused(
            ValueError, rf"no state of a polyak EMA, which has 'averages' and 'facts'.*{found}", ema
        ):
            ema.load_state_dict(value)  # type: ignore[arg-type]


def test_a_state_of_a_newer_format() -> None:
    """What this version does not know it does not guess."""
    _model, ema = trained(model=plain())
    state = ema.state_dict()
    facts = json.loads(state["facts"]) | {"format": 99}
    with refused(ValueError, r"format 99, this polyak reads up to \d+; install the newer", ema):
        ema.load_state_dict({**state, "facts": json.dumps(facts)})


@pytest.mark.parametrize(
    "facts",
    ["", "{", "[]", "{}", '{"format": 1}', '{"format": "1"}', None, 3],
    ids=repr,
)
def test_facts_that_are_damaged(facts: Any) -> None:
    """Damage is a ValueError that says so, not a KeyError from within."""
    model, ema = trained(model=plain())
    with refused(
        ValueError, r"facts.*load another checkpoint|incomplete.*missing; load another", ema, model
    ):
        ema.load_state_dict({**ema.state_dict(), "facts": facts})


@pytest.mark.parametrize("key", ["clock", "updates", "history", "pending"])
@pytest.mark.parametrize("value", ["three", -1, 1.5])
def test_a_fact_that_is_nonsense(key: str, value: Any) -> None:
    """A clock that is no clock must not be taken over."""
    model, ema = trained(model=plain())
    state = ema.state_dict()
    facts = json.loads(state["facts"]) | {key: value}
    with refused(ValueError, f"{key}|history", ema, model):
        ema.load_state_dict({**state, "facts": json.dumps(facts)})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: torch.full_like(t, math.nan), "head.bias: not finite"),
        (lambda t: t / 0 * t.sign(), "head.bias: not finite"),
        (lambda t: t.bfloat16(), "head.bias: torch.bfloat16 in the state, too narrow"),
        (lambda t: t.half(), "head.bias: torch.float16 in the state, too narrow"),
        (lambda t: t.long(), "head.bias: torch.int64 in the state"),
        (lambda t: t.to(torch.complex64), "head.bias: torch.complex64 in the state"),
        (lambda t: t[:2], r"head.bias: \(2,\) in the state, \(3,\) in the model"),
        (lambda t: t.tolist(), "head.bias: .*list"),
        (lambda t: t.to("meta"), "head.bias: .*meta"),
    ],
    ids=["nan", "inf", "bf16", "fp16", "int", "complex", "shape", "list", "meta"],
)
@pytest.mark.parametrize("used", [True, False], ids=["used", "fresh"])
def test_a_state_with_values_that_are_none(
    change: Callable[[Tensor], Any], text: str, used: bool
) -> None:
    """Each bad tensor is named with what is wrong with it."""
    model, ema = trained(model=plain())
    state = ema.state_dict()
    averages = copies(state["averages"])
    averages["head.bias"] = change(averages["head.bias"])
    victim = ema if used else EMA(model, 0.5)
    with refused(ValueError, f"nothing was loaded.*{text}", victim, model):
        victim.load_state_dict({**state, "averages": averages})


def test_a_file_that_was_cut_short(tmp_path: Path) -> None:
    """Half a file is none: its reader says so."""
    _, ema = trained()
    path = tmp_path / "ema.safetensors"
    ema.save(path)
    whole = path.read_bytes()
    for length in (0, 7, 8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused(
            ValueError, rf"\({length} bytes\) is not a whole safetensors file.*cut short", ema
        ):
            files.read(path)


def test_a_checkpoint_that_was_cut_short(tmp_path: Path) -> None:
    """Torch refuses half a checkpoint, and what a cautious script makes of it is refused here."""
    model, ema = trained()
    path = tmp_path / "state.pt"
    torch.save(ema.state_dict(), path)
    whole = path.read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        state: Any = {}
        with suppress(RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            state = torch.load(path, weights_only=True)
        with refused(ValueError, r"no state of a polyak EMA.*got \[\]", ema, model):
            ema.load_state_dict(state)


def test_another_decay_than_the_recorded_one_is_told() -> None:
    """The decay is configuration: the one in the code is used, and both are named."""
    model, ema = trained(model=plain())
    other = EMA(model, HalfLife(7))
    with pytest.warns(
        UserWarning,
        match=r"made with Constant\(decay=0.5\).*built with HalfLife\(.*7.*\).*used from",
    ):
        other.load_state_dict(ema.state_dict())
    assert other.decay == HalfLife(7)
    assert other.clock == ema.clock


# -------------------------------------------------------------------------- copies and pickles


@pytest.mark.parametrize(
    "function",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda ema: torch.save(ema, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_an_ema_is_not_copied(function: Callable[[object], object]) -> None:
    """A copy would go on averaging the other one's model."""
    model, ema = trained()
    text = r"cannot be copied or pickled.*ema.state_dict\(\).*of the other model"
    with refused(TypeError, text, ema, model):
        function(ema)
    model.ema = ema  # type: ignore[assignment]
    with refused(TypeError, text, ema, model):
        function(model) if function is not copy.copy else function(model.ema)


# -------------------------------------------------------------------------------------- attach


class Wrapper:
    """What Accelerate and Lightning put around an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


def hooks(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_what_cannot_be_attached_to() -> None:
    """A wrapper has no hooks: the optimizer in it has."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model)
    with refused(
        TypeError, r"got Wrapper; if it wraps one.*pass the optimizer inside: wrapper.opt", ema
    ):
        ema.attach(Wrapper(optimizer))  # type: ignore[arg-type]
    for value in (model, torch.optim.SGD, None, torch.optim.lr_scheduler.StepLR(optimizer, 1)):
        with refused(TypeError, r"attach takes a torch.optim.Optimizer, got", ema):
            ema.attach(value)  # type: ignore[arg-type]
    assert hooks(optimizer) == 0


def test_attached_twice() -> None:
    """It would tick twice per step."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model)
    handle = ema.attach(optimizer)
    installed = hooks(optimizer)
    with refused(
        ValueError, r"attached already.*tick it twice per step.*remove\(\) the first", ema
    ):
        ema.attach(optimizer, every=2)
    assert hooks(optimizer) == installed
    handle.remove()
    handle.remove()
    assert hooks(optimizer) == 0
    ema.attach(optimizer)
    for _ in train(model, optimizer, range(3)):
        pass
    assert ema.clock == 3


@pytest.mark.parametrize("name", ["every", "tick"])
def test_a_cadence_that_is_none(name: str) -> None:
    """Counts are whole and positive."""
    model = plain()
    optimizer = sgd(model)
    ema = EMA(model)
    for value in (0, -1):
        with refused(ValueError, f"{name} must be 1 or more, got {value}; leave it out for 1", ema):
            ema.attach(optimizer, **{name: value})
    for value in (1.5, True, "2", None):
        with refused(TypeError, f"{name} counts .* must be an integer, got", ema):
            ema.attach(optimizer, **{name: value})  # type: ignore[arg-type]
    assert hooks(optimizer) == 0


def test_an_attached_step_on_another_model_says_so_and_goes_on_when_it_is_mended() -> None:
    """The error comes out of `optimizer.step`; no tick is lost or made up."""
    model = Grown()
    optimizer = sgd(model)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    loss = sum(p.square().sum() for p in model.parameters())
    loss.backward()
    optimizer.step()
    head = model.head
    averages = copies(ema.averages)
    reshape(model)
    with pytest.raises(ValueError, match=r"(?s)not the one that was averaged.*head.weight: was"):
        optimizer.step()
    assert ema.clock == 1
    assert bit_identical(dict(ema.averages), averages)
    model.head = head
    optimizer.step()
    assert ema.clock == 3  # of three steps, one was not seen


# -------------------------------------------------------------------------------- writing out


def test_copy_to_a_module_of_other_names() -> None:
    """All differences are listed, and the module is as it was."""
    model, ema = trained(model=plain())
    target = Other()
    for line in (
        "head.weight: not in the module",
        "tail.bias: only in the module",
        r"hidden.weight: \(8, 8\) here, \(9, 8\) in the module",
    ):
        with refused(ValueError, rf"the averages do not fit Other:.*{line}", ema, model, target):
            ema.copy_to(target)


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    """The old file is as it was, and nothing is left behind."""
    model, ema = trained()
    ema.save(tmp_path / "a.safetensors")
    old = (tmp_path / "a.safetensors").read_bytes()
    with refused(FileNotFoundError, "there is no folder.*Make it first", ema, model):
        ema.save(tmp_path / "missing" / "a.safetensors")
    with refused(IsADirectoryError, "exists and is not a file", ema, model):
        ema.save(tmp_path)
    with refused(TypeError, "path|PathLike", ema, model):
        ema.save(None)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert (tmp_path / "a.safetensors").read_bytes() == old


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, "float32", torch.complex64])
def test_a_dtype_in_which_weights_cannot_be_written(dtype: Any, tmp_path: Path) -> None:
    """Weights cast to integers are zeros."""
    model, ema = trained()
    with refused((TypeError, ValueError), "dtype", ema, model):  # type: ignore[arg-type]
        ema.save(tmp_path / "a.safetensors", dtype=dtype)
    assert not list(tmp_path.iterdir())


class Opaque:
    """Somebody's own decay, which is wrong from some clock on."""

    def keep(self, t: int, dt: int) -> float:
        return 0.5 if t < 3 else 1.5


def test_a_decay_of_ones_own_that_keeps_more_than_all() -> None:
    """What it answers is checked before anything is written."""
    model = plain()
    ema = EMA(model, Opaque())
    ema.update()
    ema.update()
    with refused(ValueError, r"keep\(3, 1\).*is 1.5, not a share between 0 and 1", ema, model):
        ema.update()


def test_a_schedule_out_of_range() -> None:
    """The ends of a schedule are shares as well."""
    with refused(ValueError, "end must be between 0 and 1, got 1.1"):
        EMA(plain(), Cosine(0.9, 1.1, 10))
    with refused(ValueError, "steps must be at least 1, got 0"):
        EMA(plain(), Cosine(0.9, 1.0, 0))


def test_reestimating_over_nothing_changes_nothing() -> None:
    """A generator that was used up, a batch that is none."""
    model, ema = trained(2)
    with refused(ValueError, "batches is empty", ema, model):
        ema.reestimate_statistics([])
    with refused(TypeError, r"Pass \[x\] if it is a batch", ema, model):
        ema.reestimate_statistics(batch()[0])
    with refused(TypeError, "a batch is a str", ema, model):
        ema.reestimate_statistics(["x"])


def test_a_uniform_average_is_never_too_long() -> None:
    """The warning about one state's share is for averages that began badly, not for any."""
    model = plain()
    ema = EMA(model, Uniform())
    for _ in train(model, sgd(model), range(20)):
        ema.update()
        with ema.applied():
            pass


@pytest.mark.parametrize("how", ["save", "contents"])
def test_what_is_warned_of_a_file_points_at_the_caller(tmp_path: Path, how: str) -> None:
    """At the line that asks for it: of no update, of the first weights, of elements."""
    model = plain()
    ema = EMA(model, 0.99)

    def ask() -> list[str]:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            if how == "save":
                ema.save(tmp_path / "a.safetensors")
            else:
                ema.contents()
        assert {each.filename for each in told} == {__file__}
        return [str(each.message) for each in told]

    (before,) = ask()
    assert "has made no update" in before
    for step in range(1, 31):
        with torch.no_grad():
            model.head.weight[0, 0] = torch.nan if step == 20 else 1.0
        ema.update(step)
    first, elements = ask()
    assert "the first weights seen" in first
    assert "not finite" in elements
