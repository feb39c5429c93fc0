"""A teacher that follows a student: the smallest use of polyak, checked at every step.

``teacher <- decay * teacher + (1 - decay) * student``: with a decay of 0.5, a teacher of ones and a
student of twos meet at 1.5, and the student stays where it was.

    python examples/teacher_student.py
"""

import torch
from torch import nn

import polyak
from polyak import EMA


class Model(nn.Module):
    """Nine weights, so that all of them can be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output for inputs of three numbers."""
        return self.layer(x)


def filled_with(value: float) -> Model:
    """Return a model whose weights all have the same value."""
    model = Model()
    nn.init.constant_(model.layer.weight, value)
    return model


def show(name: str, model: Model) -> None:
    """Print a model's state dict, and which mode it is in."""
    print(f"{name}, in {'train' if model.training else 'eval'} mode:")
    for key, tensor in model.state_dict().items():
        print(f"  {key}: {tensor.tolist()}")


def check(teacher: Model, student: Model) -> None:
    """Raise unless the teacher moved halfway, exactly, and the student not at all."""
    if not torch.equal(teacher.layer.weight, torch.full((3, 3), 1.5)):
        raise RuntimeError(f"the teacher should hold 1.5, and holds {teacher.layer.weight}")
    if not torch.equal(student.layer.weight, torch.full((3, 3), 2.0)):
        raise RuntimeError(f"the student should hold 2.0, and holds {student.layer.weight}")
    if teacher.training or not student.training:
        raise RuntimeError("the teacher should be in eval mode, the student still in train mode")


def main() -> None:
    """Move a teacher once with the function, then another one with the object."""
    teacher, student = filled_with(1.0), filled_with(2.0)
    show("teacher before", teacher)
    show("student before", student)

    print("\npolyak.update_(teacher, student, decay=0.5)\n")
    polyak.update_(teacher, student, decay=0.5)

    show("teacher after", teacher)
    show("student after", student)
    check(teacher, student)

    print("\nThe same with an object, which adds a clock, schedules, saving and resuming:")
    print("ema = EMA(student, 0.5, into=teacher); ema.update()\n")
    teacher = filled_with(1.0)
    ema = EMA(student, 0.5, into=teacher)
    ema.update()  # in a training loop: after each optimizer step, or once ema.attach(optimizer)

    show("teacher after", teacher)
    check(teacher, student)
    print("\nChecked: the teacher is exactly 1.5 and in eval mode, the student is still 2.0.")


if __name__ == "__main__":
    main()
