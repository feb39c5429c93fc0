"""What self-supervised and semi-supervised methods need of a teacher."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from polyak import EMA, Constant, Cosine, Only, parameters, trainable, update_
from polyak.files import read_facts


def backbone() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU())


class Teacher(nn.Module):
    """A backbone and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projector = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projector(self.backbone(x))
        return out


class Student(Teacher):
    """The same with a predictor, which the teacher has not."""

    def __init__(self) -> None:
        super().__init__()
        self.predictor = nn.Linear(3, 3)


def pair() -> tuple[Student, Teacher]:
    student, teacher = Student(), Teacher()
    teacher.backbone.load_state_dict(student.backbone.state_dict())
    teacher.projector.load_state_dict(student.projector.state_dict())
    return student, teacher


def step_(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += torch.rand(tensor.shape, generator=generator)
            else:
                tensor += 1


def test_a_subset_by_name_is_averaged_and_the_rest_left_alone() -> None:
    """Backbone and projector by the formula, the predictor in nobody's way."""
    student, teacher = pair()
    before = copy.deepcopy(teacher.state_dict())
    ema = EMA(student, 0.5, into=teacher, policy=Only("backbone", "projector"))
    step_(student, 1)
    ema.update()
    assert "predictor.weight" not in ema.averages
    new = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, (before[name] + new[name]) / 2, rtol=0, atol=2e-7), name
        else:
            assert torch.equal(tensor, new[name])


def test_without_the_subset_the_difference_is_listed() -> None:
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"(?s)predictor\.weight: not in the teacher.*'leave'"):
        EMA(student, 0.5, into=teacher)


def test_a_part_that_is_not_there_is_refused() -> None:
    """A misspelled part would silently leave its tensors alone."""
    student, teacher = pair()
    with pytest.raises(ValueError, match=r"projektor: there is no such part"):
        EMA(student, 0.5, into=teacher, policy=Only("backbone", "projektor"))
    with pytest.raises(TypeError, match=r"Only takes names of parts.*write Only\('backbone'\)"):
        Only()


def test_a_part_is_a_name_and_not_the_beginning_of_one() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "header": nn.Linear(2, 2)})
    assert set(EMA(model, policy=Only("head")).averages) == {"head.weight", "head.bias"}


def test_only_is_a_value() -> None:
    only = Only("a", "b.c", policy=trainable)
    assert repr(only) == "Only('a', 'b.c', policy=trainable)"
    assert only == eval(repr(only))
    assert only != Only("a", "b.c")
    assert hash(Only("a")) == hash(Only("a"))


def test_the_policy_inside_of_only_decides_there() -> None:
    student = Student()
    student.backbone[0].requires_grad_(False)
    averaged = set(EMA(student, policy=Only("backbone", policy=trainable)).averages)
    assert averaged == {
        f"backbone.1.{n}" for n in ("weight", "bias", "running_mean", "running_var")
    }


def test_a_teacher_in_train_mode_keeps_its_own_statistics() -> None:
    """Policy "leave": weights are averaged, statistics are what the teacher itself has seen."""
    student, teacher = Teacher(), Teacher()
    ema = EMA(student, Constant(0.5), into=teacher, policy=parameters)
    teacher.train()
    plain = nn.BatchNorm1d(8)
    for seed in range(3):
        x = torch.randn(16, 4)
        with torch.no_grad():
            teacher(x)
            plain(teacher.backbone[0](x))
        step_(student, seed)
        ema.update()
        assert teacher.training, "a later .train() is respected"
        assert torch.equal(teacher.backbone[1].running_mean, plain.running_mean)
        assert torch.equal(teacher.backbone[1].num_batches_tracked, plain.num_batches_tracked)
    exported = ema.model_state_dict()
    assert torch.equal(exported["backbone.1.running_mean"], plain.running_mean)


def test_several_teachers_watch_one_student() -> None:
    student = Teacher()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teachers = [copy.deepcopy(student) for _ in range(3)]
    decays = (Constant(0.0), Constant(0.5), Constant(1.0))
    for decay, teacher in zip(decays, teachers, strict=True):
        EMA(student, decay, into=teacher).attach(optimizer)
    frozen = copy.deepcopy(teachers[2].state_dict())
    for _ in range(3):
        student(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    for name, tensor in student.state_dict().items():
        assert torch.equal(teachers[0].state_dict()[name], tensor)
    for name, tensor in frozen.items():
        assert tensor.dtype == torch.int64 or torch.equal(teachers[2].state_dict()[name], tensor)
    assert not torch.equal(teachers[1].projector.weight, student.projector.weight)


def test_a_schedule_ends_where_it_says() -> None:
    """After the given number of steps the decay is its end: the teacher stands still."""
    student, teacher = Teacher(), Teacher()
    ema = EMA(student, Cosine(0.5, 1.0, steps=3), into=teacher)
    for seed in range(4):
        step_(student, seed)
        ema.update()
    before = teacher.projector.weight.clone()
    step_(student, 9)
    ema.update()
    assert torch.equal(teacher.projector.weight, before)


def test_an_optimizer_that_trains_the_teacher_is_refused() -> None:
    student, teacher = pair()
    ema = EMA(student, 0.5, into=teacher, policy=Only("backbone", "projector"))
    both = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    with pytest.raises(ValueError, match="trains parameters of the teacher"):
        ema.attach(both)


def test_a_teacher_that_takes_gradients_is_refused() -> None:
    """Somebody unfreezes the whole model, teacher included: found at the next update."""
    student, teacher = pair()
    ema = EMA(student, 0.5, into=teacher, policy=Only("backbone", "projector"))
    ema.update()
    nn.ModuleDict({"student": student, "teacher": teacher}).requires_grad_(True)
    before = copy.deepcopy(teacher.state_dict())
    step_(student, 1)
    with pytest.raises(RuntimeError, match=r"(?s)tensors of the teacher take gradients.*optimizer"):
        ema.update()
    assert ema.clock == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    teacher.requires_grad_(False)
    ema.update()
    assert ema.clock == 2


@pytest.mark.parametrize("into", [False, True])
def test_the_backbone_is_exported_alone_under_its_own_names(tmp_path: Path, into: bool) -> None:
    """A downstream task loads it strictly into a plain backbone, without polyak."""
    student, teacher = pair()
    policy = Only("backbone", "projector")
    ema = EMA(student, 0.5, policy=policy, into=teacher if into else None)
    for seed in range(3):
        step_(student, seed)
        ema.update()
    ema.save(tmp_path / "backbone.safetensors", part="backbone")
    plain = backbone()
    plain.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    for name, tensor in plain.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, ema.averages[f"backbone.{name}"]), name
    exported = ema.model_state_dict("backbone")
    assert list(exported) == list(plain.state_dict())
    facts = read_facts(tmp_path / "backbone.safetensors")
    assert facts["part"] == "backbone"
    assert "0.weight" in facts["averaged"]


def test_a_part_to_export_that_is_not_there_is_refused(tmp_path: Path) -> None:
    ema = EMA(Teacher(), 0.5)
    ema.update()
    with pytest.raises(ValueError, match=r"no part 'encoder'.*such as 'backbone', 'projector'"):
        ema.save(tmp_path / "a.safetensors", part="encoder")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no part 'back'"):
        ema.model_state_dict("back")


def test_the_function_takes_parts_by_taking_modules() -> None:
    """`update_` has no policy: hand it the parts."""
    student, teacher = pair()
    step_(student, 1)
    update_(teacher.backbone, student.backbone, decay=0.5)
    update_(teacher.projector, student.projector, decay=0.5)
    assert not torch.equal(teacher.projector.weight, student.projector.weight)
