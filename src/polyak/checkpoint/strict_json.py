"""STRICT JSON: what is where in a checkpoint, read so that no name can be there twice."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["parse"]


def parse(text: str) -> Any:
    """Read JSON.

    >>> parse('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: 'a' twice

    Raises:
        ValueError: it is none, or an object in it has two values of one name, of which different
            programs would take different ones.
    """
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)!r} twice")
    return found
