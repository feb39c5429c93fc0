"""HOOKS: what counts as a step of an optimizer. It knows optimizers, and no averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from polyak.callers import pretending_a_step

__all__ = ["Attachment", "checked_optimizer"]


class Attachment:
    """A pair of hooks on an optimizer, which `remove` takes off.

    Args:
        optimizer: a `torch.optim.Optimizer`.
        parameters: gives the parameters of the model, some of which it has to step.
        before: called before each step; what it raises keeps the step from being made.
        after: called after each step that may have changed the weights, with a number that says
            whether it has not, or None where it is known to have.

    Raises:
        ValueError: it steps none of the parameters; also later, before a step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        parameters: Callable[[], Iterable[Tensor]],
        before: Callable[[], None],
        after: Callable[[Tensor | None], None],
    ) -> None:
        self._known = {id(parameter) for parameter in parameters()}

        def checked(*_: object) -> None:
            if pretending_a_step():
                return
            if not _steps(optimizer, self._known):  # both may have been replaced
                self._known = {id(parameter) for parameter in parameters()}
                _refuse_foreign(optimizer, self._known)
            before()

        def counted(*_: object) -> None:
            if not pretending_a_step():
                after(_skipped(optimizer))

        _refuse_foreign(optimizer, self._known)
        untraced: Any = torch.compiler.disable  # a compiled step would trace its hooks
        self._handles = [
            optimizer.register_step_pre_hook(untraced(checked)),
            optimizer.register_step_post_hook(untraced(counted)),
        ]

    def add(self, handle: RemovableHandle) -> None:
        """Take this hook off with the others."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)


def checked_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """Return what is an optimizer with hooks."""
    hooked = hasattr(optimizer, "_optimizer_step_pre_hooks")  # a wrapper may only pretend
    if not (isinstance(optimizer, torch.optim.Optimizer) and hooked):
        raise TypeError(
            f"attach takes a torch.optim.Optimizer, got {type(optimizer).__name__}; if it wraps "
            "one (Accelerate, Lightning), pass the optimizer inside: wrapper.optimizer"
        )
    return optimizer


def _steps(optimizer: torch.optim.Optimizer, known: set[int]) -> bool:
    return any(id(p) in known for group in optimizer.param_groups for p in group["params"])


def _refuse_foreign(optimizer: torch.optim.Optimizer, known: set[int]) -> None:
    if not _steps(optimizer, known):
        raise ValueError(
            f"this {type(optimizer).__name__} steps none of the parameters of the model: it is of "
            "another model, was built before this one was sharded or replaced, or steps copies "
            "that are written back later (DeepSpeed). Attach the optimizer that was built from "
            "model.parameters(), or call update() after each whole step"
        )


def _skipped(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return what is not 0 if the step that an optimizer just made changed nothing.

    An unfused one is not called at all when GradScaler skips a step. A fused one is, with this
    number, which may be on an accelerator, and then changes nothing.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf
