"""FLAG: a yes or no that an accelerator knows, and the host only learns of later.

Asking at once would wait for all work that is queued. So the answer is sent for, and read when it
is needed; meanwhile `weight_unless` lets the accelerator itself act on it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Flag", "is_near", "weight_unless"]


class Flag:
    """Whether a number was not 0.

    Args:
        number: one element, on any device; it may change as soon as this is made.
    """

    def __init__(self, number: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            far = number.device.type == "cuda"
            self._here = torch.empty((), dtype=number.dtype, device="cpu", pin_memory=far)
            self._here.copy_(number.detach().reshape(()), non_blocking=far)
        self._arrived = torch.cuda.Event() if far else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def read(self) -> bool:
        """Return it, when it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._here.item())


def is_near(number: Tensor) -> bool:
    """Whether it is read at once: on other devices than CUDA nothing is gained by waiting."""
    return number.device.type != "cuda"


def weight_unless(number: Tensor, weight: float) -> Tensor:
    """Return the weight, or 0 where the number is not 0: 0-dim float64, on the number's device."""
    with torch.inference_mode(False), torch.no_grad():
        full = torch.full((), weight, dtype=torch.float64, device=number.device)
        return full.mul_(number.detach().reshape(()) == 0)
