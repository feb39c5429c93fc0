"""CONTENT: what is in an open checkpoint: a tree, and what a dotted path in it leads to.

Nothing here knows of which container the tree is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polyak.checkpoint.broken import broken
from polyak.checkpoint.stored import Stored

__all__ = ["Checkpoint", "named"]


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint.

    Attributes:
        path: the file or folder.
        container: "safetensors", "sharded safetensors", "torch" or "dcp".
        tree: what is in it: nested dicts and lists, `Stored` tensors, plain values.
        metadata: what a safetensors header says besides tensors.
        files: the files that the tensors are in.
    """

    path: Path
    container: str
    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: Sequence[Path] = ()

    @property
    def tensors(self) -> dict[str, Stored]:
        """All tensors, by the dotted path to each."""
        return named(self.tree)

    @property
    def facts(self) -> dict[str, Any] | None:
        """The fact sheet, if polyak wrote it."""
        sheet = self.metadata.get("polyak")
        if sheet is None:
            return None
        try:
            facts = json.loads(sheet)["facts"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise broken(self.path, f"its fact sheet cannot be read ({error})") from None
        return facts if isinstance(facts, dict) else None

    def at(self, place: str) -> Any:
        """Return what is at a dotted path, such as `"ema.module"`; the whole tree for `""`.

        Raises:
            ValueError: there is no such place; the message names what there is.
        """
        found, rest = self.tree, place
        while rest:
            key = next((key for key in _prefixes(rest) if _has(found, key)), None)
            if key is None:
                there = sorted(map(str, found))[:20] if isinstance(found, dict) else []
                raise ValueError(
                    f"{str(self.path)!r} has nothing at {place!r}: where {rest!r} should be, there "
                    f"is {', '.join(map(repr, there)) or f'a {type(found).__name__}'}. Pass one of "
                    "the paths that are there, such as 'state_dict'"
                )
            found, rest = _get(found, key), rest[len(key) + 1 :]
        return found


def named(tree: Any, prefix: str = "") -> dict[str, Stored]:
    """Return the tensors in a tree by the dotted path to each, in its order.

    Raises:
        ValueError: one path leads to two tensors.
    """
    if isinstance(tree, Stored):
        return {prefix: tree}
    items: Any = ()
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, (list, tuple)):
        items = enumerate(tree)
    found: dict[str, Stored] = {}
    for key, value in items:
        inside = named(value, f"{prefix}.{key}" if prefix else str(key))
        twice = found.keys() & inside.keys()
        if twice:
            raise ValueError(
                f"there are two tensors at {min(twice)!r}, by different keys: pass the place of "
                "one of the parts that they are in"
            )
        found |= inside
    return found


def _prefixes(place: str) -> Iterator[str]:
    """Yield the ways to read the first key of a dotted path, the longest first."""
    parts = place.split(".")
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])


def _has(tree: Any, key: str) -> bool:
    if isinstance(tree, dict):
        return key in tree or (key.isdigit() and int(key) in tree)
    return isinstance(tree, list) and key.isdigit() and int(key) < len(tree)


def _get(tree: Any, key: str) -> Any:
    return tree[key] if isinstance(tree, dict) and key in tree else tree[int(key)]
