"""BROKEN: what is said of a checkpoint that is not whole."""

from __future__ import annotations

from pathlib import Path

__all__ = ["broken"]


def broken(path: Path, what: str) -> ValueError:
    """Return the error that says what is wrong with a file or folder."""
    size = f" ({path.stat().st_size} bytes)" if path.is_file() else ""
    return ValueError(
        f"{str(path)!r}{size} is not a whole checkpoint: {what}. It was cut short, damaged or made "
        "to mislead: copy it again, or use an earlier one"
    )
