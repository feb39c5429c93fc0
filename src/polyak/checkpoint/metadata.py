"""METADATA: what torch.distributed.checkpoint says of a folder: a pickle, read with suspicion.

It makes the few kinds of objects that such a description has, and calls nothing else.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
from collections.abc import Mapping
from typing import Any, ClassVar

from polyak.files import CODES

__all__ = ["unpickle"]


def unpickle(raw: bytes) -> Any:
    """Return the description of a checkpoint.

    Raises:
        pickle.UnpicklingError: there is an object in it that no description has; the message names
            it.
        Exception: of any other kind, for the bytes can be anything.
    """
    return _Metadata(io.BytesIO(raw)).load()


class _Metadata(pickle._Unpickler):  # the one in C makes room for as many objects as it is told
    """Reads the description of a checkpoint, and makes no other objects than such have."""

    _PLAIN: ClassVar[Mapping[str, set[str] | None]] = {
        "torch.distributed.checkpoint.metadata": None,  # all classes of it
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size", *(str(dtype).removeprefix("torch.") for dtype in CODES)},
        "collections": {"OrderedDict", "defaultdict"},
        "builtins": {"set"},
        "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "Path"},
    }
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        names = self._PLAIN.get(module, set())
        if names is None or name in names:
            found = super().find_class(module, name)
            if names is not None or (isinstance(found, type) and found.__module__ == module):
                return found
        raise pickle.UnpicklingError(f"{module}.{name}")

    def _build(self) -> None:
        """Set attributes, of values only: those of a class would be set for the whole process."""
        if not dataclasses.is_dataclass(type(self.stack[-2])):
            raise pickle.UnpicklingError(f"the attributes of {self.stack[-2]!r}")
        pickle._Unpickler.dispatch[pickle.BUILD[0]](self)  # type: ignore[arg-type]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}
