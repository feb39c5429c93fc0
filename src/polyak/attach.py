"""HOOKS: what counts as a step of an optimizer. It knows optimizers, and no averages."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Attachment"]


class Attachment:
    """A pair of hooks on an optimizer, which `remove` takes off.

    Args:
        optimizer: a `torch.optim.Optimizer`.
        before: called before each step; what it raises keeps the step from being made.
        after: called after each step that changed the weights.

    Raises:
        TypeError: it is no `torch.optim.Optimizer`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        hooked = hasattr(optimizer, "_optimizer_step_pre_hooks")  # a wrapper may only pretend
        if not (isinstance(optimizer, torch.optim.Optimizer) and hooked):
            raise TypeError(
                f"attach takes a torch.optim.Optimizer, got {type(optimizer).__name__}; if it "
                "wraps one (Accelerate, Lightning), pass the optimizer inside: wrapper.optimizer"
            )
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: before()),
            optimizer.register_step_post_hook(lambda *_: None if _skipped(optimizer) else after()),
        ]

    def remove(self) -> None:
        """Take the hooks off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return bool(self._handles)


def _skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that an optimizer just made changed nothing.

    An unfused one is not called at all when GradScaler skips a step. A fused one is, with this
    flag, and then changes nothing.
    """
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())
