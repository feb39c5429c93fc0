"""INDEX: several files as one checkpoint, by an index that says in which of them each tensor is.

What these files are, it does not know. None is opened that is not beside the index.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from polyak.checkpoint.broken import broken
from polyak.checkpoint.content import Checkpoint, named
from polyak.checkpoint.stored import Stored
from polyak.checkpoint.strict_json import parse

__all__ = ["open_index"]


def open_index(path: Path, open_file: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open the files that an index tells of.

    Args:
        path: of the index.
        open_file: opens one of them.

    Raises:
        ValueError: it is no index, it leads elsewhere, or it does not fit its files.
        OSError: one of them is not there.
    """
    try:
        index = parse(path.read_text())
        where = index["weight_map"]
        names = sorted(set(where.values()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise broken(path, f"it is no index of tensors ({type(error).__name__}: {error})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise broken(path, f"it leads to {name!r}, which is no file beside it")
        if name.endswith(".index.json"):
            raise broken(path, f"it leads to {name!r}, which is another index")
    shards = {}
    for name in names:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(
                f"{str(path)!r} tells of {name!r}, which is not beside it: the checkpoint is not "
                "complete. Copy all of its files into one folder"
            )
        shards[name] = open_file(path.parent / name)
    tree, missing = {}, []
    for name, file in where.items():
        stored = shards[file].tree.get(name) if isinstance(shards[file].tree, dict) else None
        if isinstance(stored, Stored):
            tree[name] = stored
        else:
            missing.append(f"{name!r} in {file!r}")
    extra = [
        f"{name!r} in {file!r}"
        for file, shard in shards.items()
        for name in named(shard.tree)
        if where.get(name) != file
    ]
    if missing or extra:
        lines = [f"there is no {line}" for line in missing] + [f"it leaves out {x}" for x in extra]
        raise broken(path, f"it does not fit its files: {'; '.join(lines[:20])}")
    first = next(iter(shards.values()), None)
    kind = first.container if first else "safetensors"
    metadata = first.metadata if first else {}
    return Checkpoint(
        path, f"sharded {kind}", tree, metadata, [path.parent / name for name in names]
    )
