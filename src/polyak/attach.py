"""HOOKS: what counts as a step of an optimizer. It knows optimizers, and no averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"attach takes a torch.optim.Optimizer, got {type(optimizer).__name__}; if it "
                "wraps one (Accelerate, Lightning), pass the optimizer inside: wrapper.optimizer"
            )
        self.optimizer = optimizer
        self._before, self._after = before, after
        self._handles = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
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

    def _pre(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._before()

    def _post(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # An unfused optimizer is not called at all when GradScaler skips a step. A fused one is,
        # with this flag, and then changes nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self._after()
