"""Every recipe of docs/recipes.md against the method's own update rule, update by update.

The code of the page is run as it stands there, except that its stand-in for a training loop is
replaced: by one that trains in the same way with a *transcript* beside it, the update rule of the
paper or of the authors' code in plain torch, on a copy of its own. The two must agree before every
forward pass of the teacher, which is where it matters, and at the end.

The tolerance. Let u = 2^-24 and M the largest absolute value that a tensor had in student,
teacher or transcript. To first order in u, one update makes these errors:

- the transcript, in any of its forms: two products, each of a factor m or 1 - m that is itself
  rounded to float32 and a value of at most M, and one sum of at most M: at most 2u (m + 1 - m) M
  + u M = 3uM. Of x + (1 - m) (y - x): as below, 4uM.
- polyak, a + w (x - a), or from the other end for w > 1/2: with v = min(w, 1 - w) <= 1/2, a
  difference of at most 2M, the rounding of v, one product, one sum: 3u v 2M + uM <= 4uM.

Errors of earlier updates are kept by the share m <= 1. So after n updates the two differ by at most
8nuM; the second order is u times that.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import bit_identical
from polyak import EMA, After
from polyak.decay import Ramp

PAGE = Path(__file__).parent.parent / "docs" / "recipes.md"
U = 2.0**-24
STEPS = 12  # of a run, as on the page

Update = Callable[[int, nn.Module, nn.Module], None]  # step from 0, student, teacher


# ------------------------------------------------------------------ the transcripts


def mean_teacher(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """`update_ema_variables` of the authors' code, with global_step counted before it."""
    global_step = step + 1
    alpha = min(1 - 1 / (global_step + 1), 0.999)
    for ema_param, param in zip(teacher.parameters(), student.parameters(), strict=True):
        ema_param.data.mul_(alpha).add_(param.data, alpha=1 - alpha)


def byol(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """Section 3.2, k = step from 0: 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2."""
    tau = 1 - (1 - 0.996) * (math.cos(math.pi * step / STEPS) + 1) / 2
    for part in ("backbone", "projector"):
        online, target = student.get_submodule(part), teacher.get_submodule(part)
        for y, x in zip(online.parameters(), target.parameters(), strict=True):
            x.data = x.data + (1 - tau) * (y.data - x.data)


def moco(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """Equation 2, `_momentum_update_key_encoder`: in the forward pass, before the keys."""
    m = 0.999
    for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
        param_k.data = param_k.data * m + param_q.data * (1.0 - m)


def moco_v3(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """`adjust_moco_momentum` and `_update_momentum_encoder`: in the forward pass."""
    m = 1.0 - 0.5 * (1.0 + math.cos(math.pi * step / STEPS)) * (1.0 - 0.99)
    for part in ("backbone", "projector"):
        base, momentum = student.get_submodule(part), teacher.get_submodule(part)
        for param_b, param_m in zip(base.parameters(), momentum.parameters(), strict=True):
            param_m.data = param_m.data * m + param_b.data * (1.0 - m)


def dino(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """1 - (1 - m0) (cos(pi t / T) + 1) / 2, after the optimizer's step, t from 0."""
    m = 1 - (1 - 0.996) * (math.cos(math.pi * step / STEPS) + 1) / 2
    for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
        param_k.data.mul_(m).add_((1 - m) * param_q.detach().data)


def data2vec(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """`set_num_updates` of the authors' code: before the forward pass, and not when it is 0.

    `EMAModule` goes over the state dict. A counter of batches is none of its business (its product
    with a decay would raise), and is set as polyak does.
    """
    start, end, total = 0.999, 0.9999, STEPS // 2
    if step == 0:  # makes the teacher
        return
    decay = end - (end - start) * (1 - step / total) if step < total else end
    mine = teacher.state_dict()
    for key, param in student.state_dict().items():
        if param.is_floating_point():
            mine[key].mul_(decay).add_(param, alpha=1 - decay)
        else:
            mine[key].copy_(param)


def ijepa(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """`next(momentum_scheduler)` after the optimizer's step: ema[0] + i (ema[1] - ema[0]) / T."""
    m = 0.996 + step * (1.0 - 0.996) / STEPS
    for param_q, param_k in zip(student.parameters(), teacher.parameters(), strict=True):
        param_k.data.mul_(m).add_((1.0 - m) * param_q.detach().data)


def sac(step: int, student: nn.Module, teacher: nn.Module) -> None:
    """TD3's code, tau theta + (1 - tau) theta'; statistics as in Stable-Baselines3, tau 1."""
    tau = 0.005
    for param, target_param in zip(student.parameters(), teacher.parameters(), strict=True):
        target_param.data.copy_(tau * param.data + (1 - tau) * target_param.data)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        mine.copy_(theirs)


def ldm(step: int, student: nn.Module, shadow: nn.Module) -> None:
    """`LitEma`, made before training: num_updates is counted before it is used."""
    num_updates = step + 1
    one_minus_decay = 1.0 - min(0.9999, (1 + num_updates) / (10 + num_updates))
    for param, s_param in zip(student.parameters(), shadow.parameters(), strict=True):
        s_param.data.sub_(one_minus_decay * (s_param.data - param.data))


def diffusers(step: int, student: nn.Module, shadow: nn.Module) -> None:
    """`EMAModel.get_decay` with use_ema_warmup, inv_gamma 1, power 3/4, update_after_step 0."""
    optimization_step = step + 1
    n = max(0, optimization_step - 1)
    decay = 0.0 if n <= 0 else min(1 - (1 + n / 1.0) ** -(3 / 4), 0.9999)
    for s_param, param in zip(shadow.parameters(), student.parameters(), strict=True):
        s_param.data.sub_((1 - decay) * (s_param.data - param.data))


def swa(step: int, student: nn.Module, average: nn.Module) -> None:
    """`moving_average(swa_model, model, 1 / (swa_n + 1))` of the authors' code; until then a copy.

    swa_start is the first step whose weights are in the mean; the page's `start` is the one before.
    """
    swa_n = max(step + 1 - 5, 0)
    alpha = 1.0 / (swa_n + 1)
    for param1, param2 in zip(average.parameters(), student.parameters(), strict=True):
        param1.data *= 1.0 - alpha
        param1.data += param2.data * alpha


# ------------------------------------------------------------------ what the methods are


@dataclass(frozen=True)
class Method:
    """A recipe, its transcript, and when it is due."""

    heading: str
    block: int  # of those under the heading
    update: Update
    early: bool = False  # before the teacher's forward pass, not after the optimizer's step
    train_mode: bool = False  # of the teacher
    buffers: bool = True  # whether they are compared: the transcript has them


METHODS = {
    "Mean Teacher": Method("Mean Teacher", 0, mean_teacher, train_mode=True),
    "BYOL": Method("BYOL", 0, byol, train_mode=True),
    "MoCo v1, v2": Method("MoCo", 0, moco, early=True, train_mode=True),
    "MoCo v3": Method("MoCo", 1, moco_v3, early=True, train_mode=True),
    "DINO": Method("DINO", 0, dino, train_mode=True),
    "data2vec": Method("data2vec", 0, data2vec, early=True),
    "I-JEPA": Method("I-JEPA", 0, ijepa, train_mode=True),
    "SAC and TD3": Method("SAC and TD3", 0, sac),
    "LDM": Method("Diffusion models", 0, ldm, buffers=False),
    "diffusers": Method("Diffusion models", 1, diffusers, buffers=False),
    "SWA": Method("SWA", 0, swa, buffers=False),
}


def blocks(heading: str) -> list[str]:
    """Return the Python blocks under a heading of the page; of "", those before the first."""
    text = PAGE.read_text(encoding="utf-8")
    sections = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    found = dict(zip(["", *sections[1::2]], sections[::2], strict=True))
    return re.findall(r"^```python\n(.*?)^```$", found[heading], flags=re.MULTILINE | re.DOTALL)


@dataclass
class Beside:
    """Trains as the page does, with a transcript beside the recipe; what a block calls `train`."""

    method: Method
    namespace: dict[str, Any]
    largest: dict[str, float] = field(default_factory=dict)  # M, of each tensor
    comparisons: int = 0
    disagreements: list[str] = field(default_factory=list)
    other: nn.Module | None = None  # what the transcript has made

    def __call__(
        self, student: nn.Module, optimizer: torch.optim.Optimizer, teacher: nn.Module | None = None
    ) -> None:
        method = self.method
        other = copy.deepcopy(student if teacher is None else teacher)
        other.train(method.train_mode)
        for step in range(STEPS):
            if method.early:
                method.update(step, student, other)
            self.compare(step + method.early, student, teacher, other)
            one_view, another = torch.randn(2, 16, 8)
            with torch.no_grad():
                target = another[:, :4]
                if teacher is not None:
                    target = teacher(another)
                    other(another)
            loss = (student.predictor(student(one_view)) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if not method.early:
                method.update(step, student, other)
        if not method.early:
            self.compare(STEPS, student, teacher, other)
        self.other = other

    def compare(
        self, updates: int, student: nn.Module, teacher: nn.Module | None, other: nn.Module
    ) -> None:
        """Note the tensors that differ by more than the tolerance allows."""
        here, there = self.averaged(teacher), other.state_dict()
        names = there if self.method.buffers else dict(other.named_parameters())
        for state in (student.state_dict(), here, there):
            for name, value in state.items():
                self.largest[name] = max(self.largest.get(name, 0.0), value.abs().max().item())
        apart = {
            name: (here[name].double() - there[name].double()).abs().max().item() for name in names
        }
        self.comparisons += 1
        self.disagreements += [
            f"{name} after {updates} updates: {distance}"
            for name, distance in apart.items()
            if not distance <= 8 * updates * U * self.largest[name]
        ]

    def averaged(self, teacher: nn.Module | None) -> dict[str, Tensor]:
        """Return what the recipe has made so far: the teacher, or the averaged model."""
        if teacher is not None:
            return teacher.state_dict()
        return self.namespace["ema" if "ema" in self.namespace else "swa"].model_state_dict()


def run(method: Method, change: tuple[str, str] = ("", "")) -> Beside:
    """Run the page's code of a method with its transcript beside it.

    Args:
        method: which.
        change: what to replace in the code by what, to see a recipe that is wrong.
    """
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    (preamble,) = blocks("")
    exec(preamble, namespace)
    beside = namespace["train"] = Beside(method, namespace)
    code = blocks(method.heading)[method.block]
    assert change[0] in code, f"the page no longer says {change[0]!r}"
    exec(code.replace(*change), namespace)
    return beside


# ------------------------------------------------------------------ the tests


def test_all_blocks_of_the_page_are_tested() -> None:
    """One block of each section trains, two of those on MoCo and diffusion; one is `update_`."""
    text = PAGE.read_text(encoding="utf-8")
    training = {(m.heading, m.block) for m in METHODS.values()}
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    found = {(h, n) for h in headings for n, code in enumerate(blocks(h)) if "train(" in code}
    assert found == training
    assert text.count("```python") == 1 + len(training) + 1


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_is_the_methods_own_rule(name: str) -> None:
    """Weights within the tolerance, and buffers too, before every forward pass of the teacher."""
    beside = run(METHODS[name])
    assert beside.disagreements == []
    assert beside.comparisons == STEPS + (not METHODS[name].early)


WRONG = {
    "Mean Teacher": [("ema.update()", ""), ("power=1", "power=3/4"), ("teacher.train()", "")],
    "BYOL": [
        ("(0.996", "(0.995"),
        ("steps)", "steps + 1)"),
        ("ema.attach", "ema.update(); ema.attach"),
    ],
    "MoCo v1, v2": [("0.999", "0.99"), ("parameters", "copied_statistics")],
    "MoCo v3": [
        ("ema.update()", ""),
        ("0.99,", "0.996,"),
        ("policy=parts", "policy=parameters"),
    ],
    "DINO": [("ema.attach", "ema.update(); ema.attach"), (", policy=parameters", "")],
    "data2vec": [
        ("ema.update()", ""),
        ("steps // 2", "steps"),
        ("ema.attach", "teacher.train(); ema.attach"),
    ],
    "I-JEPA": [("ema.attach", "ema.update(); ema.attach"), ("Linear", "Cosine")],
    "SAC and TD3": [
        ("0.995", "0.994"),
        ("copied_statistics", "parameters"),
        (", policy=copied_statistics", ""),
    ],
    "LDM": [("ema.update(0)", ""), ("ema.update(0)", "ema.update(1)")],
    "diffusers": [("ema.attach", "ema.update(0); ema.update(1); ema.attach"), ("3 / 4", "2 / 3")],
    "SWA": [("start, Uniform", "start + 1, Uniform"), ("start, Uniform", "start - 1, Uniform")],
}


@pytest.mark.parametrize(("name", "change"), [(n, c) for n, cs in WRONG.items() for c in cs])
def test_a_recipe_that_is_wrong_is_found_out(name: str, change: tuple[str, str]) -> None:
    """The tolerance is narrow enough for a wrong first index, number, policy or mode."""
    assert run(METHODS[name], change).disagreements != []


def schedule(name: str) -> list[float]:
    """Return the decays of a recipe's updates after optimizer steps, one each."""
    ema = run(METHODS[name]).namespace["ema"]
    return [ema.decay.keep(t, 1) for t in range(ema.clock - STEPS + 1, ema.clock + 1)]


def test_the_schedules_have_the_published_indices() -> None:
    """To the rounding of a few operations on numbers up to 1, in float64.

    An average that is updated before the teacher's forward pass has no use for its value at 0.
    """
    k = range(STEPS)

    def cosine(start: float, t: float) -> float:
        return 1 - (1 - start) * (math.cos(math.pi * t / STEPS) + 1) / 2

    published = {
        "Mean Teacher": [min(1 - 1 / (t + 2), 0.999) for t in k],
        "BYOL": [cosine(0.996, t) for t in k],
        "MoCo v3": [cosine(0.99, t + 1) for t in k],
        "DINO": [cosine(0.996, t) for t in k],
        "data2vec": [min(0.999 + 0.0009 * (t + 1) / (STEPS // 2), 0.9999) for t in k],
        "I-JEPA": [0.996 + 0.004 * t / STEPS for t in k],
        "LDM": [min(0.9999, (2 + t) / (11 + t)) for t in k],
        "diffusers": [1 - (1 + t) ** -0.75 for t in k],
    }
    for name, decays in published.items():
        assert schedule(name) == pytest.approx(decays, rel=0, abs=8 * 2**-53), name
    without_warmup = [0.0] + [min((1 + n) / (10 + n), 0.9999) for n in range(1, STEPS)]
    late = After(1, Ramp(0.9999))
    assert [late.keep(t + 1, 1) for t in k] == pytest.approx(without_warmup, rel=0, abs=8 * 2**-53)
    assert published["Mean Teacher"][0] == 1 / 2
    assert published["LDM"][0] == 2 / 11
    assert published["diffusers"][0] == 0


def test_what_becomes_of_the_statistics() -> None:
    """Bit for bit: a teacher's own are those of its inputs, copied ones are the student's.

    The network normalizes its inputs, so that its statistics depend on nothing that is averaged.
    """
    for name, method in METHODS.items():
        beside = run(method)
        student = beside.namespace.get("student", beside.namespace.get("critic"))
        teacher = beside.namespace.get("teacher", beside.namespace.get("target"))
        if teacher is None:
            continue
        mine, theirs, students = (
            dict(module.named_buffers()) for module in (teacher, beside.other, student)
        )
        assert all(module.training is method.train_mode for module in teacher.modules()), name
        if method.train_mode:
            assert bit_identical(mine, theirs), name
            assert mine["backbone.0.num_batches_tracked"] == STEPS
        assert bit_identical(mine, students) is (name == "SAC and TD3"), name


def test_update_in_place_is_one_step_of_it() -> None:
    """`polyak.update_` on the page, against tau theta + (1 - tau) theta'; 8uM, as above."""
    namespace = run(METHODS["SAC and TD3"]).namespace
    critic, target = namespace["critic"], namespace["target"]
    other = copy.deepcopy(target)
    sac(0, critic, other)
    exec(blocks("SAC and TD3")[1], namespace)
    for param, expected in zip(target.parameters(), other.parameters(), strict=True):
        largest = max(
            critic.get_parameter(n).abs().max().item() for n, _ in other.named_parameters()
        )
        largest = max(largest, expected.abs().max().item())
        torch.testing.assert_close(param, expected, rtol=0, atol=8 * U * largest)


def test_targets_that_move_once_per_step_of_the_actor() -> None:
    """TD3: `policy_freq` is 2; a tick per update, so that tau is not applied twice."""
    critic, actor = nn.Linear(3, 1), nn.Linear(3, 1)
    target, other = copy.deepcopy(critic), copy.deepcopy(critic)
    of_critic, of_actor = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (critic, actor))
    ema = EMA(critic, 0.995, into=target)
    with pytest.raises(ValueError, match=r"this SGD steps none.*another model.*call update\(\)"):
        ema.attach(of_actor)
    largest, updates = 0.0, 0
    for total_it in range(1, STEPS + 1):
        for model, optimizer in ((critic, of_critic), (actor, of_actor)):
            if model is critic or total_it % 2 == 0:
                optimizer.zero_grad()
                model(torch.randn(8, 3)).square().mean().backward()
                optimizer.step()
        if total_it % 2 == 0:
            ema.update()
            sac(total_it, critic, other)
            updates += 1
        largest = max(
            largest, *(p.abs().max().item() for p in [*critic.parameters(), *other.parameters()])
        )
        for param, expected in zip(target.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(param, expected, rtol=0, atol=8 * updates * U * largest)
    assert updates == STEPS // 2


def test_statistics_of_swa_are_those_of_the_data() -> None:
    """As `update_bn` has them if the data are one batch: rounding of the mean and of the square.

    n terms are summed, pairwise or not: at most n roundings of the mean of absolute values, and
    n + 2 of the mean of squares.
    """
    namespace = run(METHODS["SWA"]).namespace
    swa_average, data = namespace["swa"], namespace["data"]
    model = copy.deepcopy(namespace["model"])
    model.load_state_dict(swa_average.model_state_dict())
    torch.optim.swa_utils.update_bn([data], model)
    found, expected = swa_average.model_state_dict(), model.state_dict()
    for name, n in (("running_mean", len(data)), ("running_var", len(data) + 2)):
        key = f"backbone.0.{name}"
        size = data.abs().mean() if name == "running_mean" else 2 * data.square().mean()
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=n * U * size.item())
