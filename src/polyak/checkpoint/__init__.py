"""CHECKPOINTS: the tensors of any checkpoint by name, each read when it is asked for, in slices.

safetensors, several of them with an index, files of `torch.save`, folders of
torch.distributed.checkpoint. Whatever a file says is checked before it is believed: nothing is
unpickled that could run code, no declared size is allocated before the bytes are known to be there,
and no name leads out of the checkpoint's own folder. These modules know no producers (`formats`
does) and write nothing (`files` does).
"""

from polyak.checkpoint.content import Checkpoint, named
from polyak.checkpoint.opening import NO_WEIGHTS, opened
from polyak.checkpoint.stored import Stored

__all__ = ["NO_WEIGHTS", "Checkpoint", "Stored", "named", "opened"]
