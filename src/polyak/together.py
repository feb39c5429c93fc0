"""TOGETHER: one file of tensors that are spread over processes, one tensor at a time.

Every process gives its shards in the same order, and the first of them writes. Before each tensor
they tell each other how they are, so that nobody waits for one that has given up. Nothing here
knows what an average is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from polyak import engine
from polyak.files import Lazy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["write"]


class _GivenUpError(Exception):
    """Another process has failed, and said so."""


def write(
    writer: Callable[[Mapping[str, Lazy]], None],
    tensors: Mapping[str, Lazy],
    groups: Sequence[ProcessGroup],
) -> None:
    """Let the first process write tensors that all of them read in step.

    Communicates: all processes of the groups call it with the same tensors. It returns when the
    file is there. At any moment each process has one whole tensor beside its shards.

    Args:
        writer: writes what it is given, reading the tensors in their order; only the first process
            calls it.
        tensors: name -> how the whole tensor is read, a collective.
        groups: the process groups that hold them.

    Raises:
        RuntimeError: another process failed. The one that failed raises its own error.
    """

    def read(name: str) -> Tensor:
        _tell(None, groups)
        return tensors[name].read()

    mine: Exception | None = None
    try:
        if torch.distributed.get_rank() == min(engine.exchange(None, groups)):
            writer({n: lazy._replace(read=partial(read, n)) for n, lazy in tensors.items()})
        else:
            for name in tensors:
                read(name)
    except _GivenUpError as told:
        raise RuntimeError(str(told)) from None
    except Exception as error:
        mine = error
    try:
        _tell(mine, groups)
    except _GivenUpError as told:
        raise mine or RuntimeError(str(told)) from None


def _tell(error: Exception | None, groups: Sequence[ProcessGroup]) -> None:
    """Tell the others how it goes here, and raise if it goes wrong anywhere."""
    told = engine.exchange(None if error is None else f"{type(error).__name__}: {error}", groups)
    wrong = [f"rank {rank}: {text}" for rank, text in told.items() if text is not None]
    if wrong:
        raise _GivenUpError(
            f"nothing was written, since another process failed: {'; '.join(wrong)}"
        )
