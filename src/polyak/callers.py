"""CALLERS: what torch.distributed.checkpoint is about when it calls, which it does not say.

Found by walking the call stack, which is done only where that library is loaded.
"""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["loading_in_place", "pretending_a_step"]


def loading_in_place() -> bool:
    """Whether it asks for tensors to read into.

    It reads into what `state_dict` returns before it calls `load_state_dict`. A read that fails
    half-way must not leave half of its values in the averages.
    """
    return _called_from("torch.distributed.checkpoint.state_dict_loader")


def pretending_a_step() -> bool:
    """Whether it steps an optimizer with a learning rate of 0, so that it gets its state."""
    return _called_from("torch.distributed.checkpoint.state_dict")


def _called_from(module: str) -> bool:
    frame: FrameType | None = sys._getframe() if module in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == module:
            return True
        frame = frame.f_back
    return False
