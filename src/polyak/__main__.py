"""ENTRY: `polyak` and `python -m polyak` begin here, with or without what the commands need."""

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """Run the command line, or say what it takes."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.stderr.write(
            f"polyak: the command line needs {' and '.join(missing)}, not installed here. Type "
            "pip install 'polyak[cli]', which adds these and a few small packages\n"
        )
        sys.exit(2)
    try:
        from polyak.cli import app

        app(prog_name="polyak")
    except KeyboardInterrupt:  # before the command has begun
        sys.stderr.write("polyak: stopped by Ctrl-C\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
