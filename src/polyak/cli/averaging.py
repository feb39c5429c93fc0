"""AVERAGE: `polyak average`, the weighted sum of some checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyak.cli.asked import (
    DryRun,
    Dtype,
    Force,
    Json,
    Out,
    Place,
    Which,
    check_out,
    chosen,
    open_checkpoint,
    parts,
    refuse_other_formats,
    size,
)
from polyak.cli.program import UnfulfilledError
from polyak.cli.told import Rows, in_bytes, progress_bar, some, tell

if TYPE_CHECKING:
    from polyak.checkpoint import Checkpoint

__all__ = ["EPILOG", "average"]

Unmatched = Literal["refuse", "drop", "keep"]
LrDecay = Literal["linear", "1-sqrt", "cosine"]

EPILOG = """
\b
Examples:
  polyak average step-1000.pt step-2000.pt step-3000.pt -o mean.safetensors
  polyak average step-*.pt -o mean.safetensors --dry-run
  polyak average step-1000.pt step-2000.pt -o mean.safetensors --weights 1,3
  polyak average step-1000.pt step-2000.pt -o ema.safetensors --ema 0.5
  polyak average step-*.pt -o annealed.safetensors --lr-decay 1-sqrt
  polyak average run/checkpoint-* -o mean --copy-config --shard-bytes 5GB

The last one makes a folder for from_pretrained: the config, tokenizer and other small files beside
the newest checkpoint come along. A shell sorts step-10000 before step-2000.

Exit codes: 0 done; 1 refused, as the files differ; 2 nothing done, as an argument or a file is not
what it should be; 130 Ctrl-C, which leaves nothing behind.
"""


def average(
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILES...", help="Checkpoints, the oldest first.")
    ],
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="A number for each file; divided by their sum."),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="What each file keeps of the average before it."),
    ] = None,
    lr_decay: Annotated[
        LrDecay | None,
        typer.Option(help="As if the learning rate had decayed so since the first file."),
    ] = None,
    which: Which = None,
    at: Place = "",
    unmatched: Annotated[
        Unmatched,
        typer.Option(
            help="Tensors that not all files have in one shape: drop, or keep the newest."
        ),
    ] = "refuse",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the averages. By default as in the newest file.")
    ] = None,
    copy_config: Annotated[
        bool,
        typer.Option("--copy-config", help="OUT is a folder, with the newest file's config in it."),
    ] = False,
    shard_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="OUT is a folder, of files up to this size, as in 5GB."),
    ] = None,
    dry_run: DryRun = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Average checkpoints, in little memory, however large they are.

    All files count alike, unless --weights, --ema or --lr-decay says otherwise. What is no floating
    number, such as a counter, is the newest file's, which is the last one. OUT is safetensors,
    complete or not there: never an input, and another file only with --force.
    """
    import torch

    from polyak import combine, files
    from polyak.selection import listed

    rule, coefficients = _coefficients(len(paths), weights, ema, lr_decay)
    shard = None if shard_bytes is None else size(shard_bytes)
    stored = None if dtype is None else getattr(torch, dtype)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_checkpoint(path)) for path in paths]
        sets = [chosen(one, which, at) for one in opened]
        _refuse_mixture(opened, [name for name, _ in sets])
        sources = [tensors for _, tensors in sets]
        configs = _configs(opened[-1]) if copy_config else []
        is_folder = copy_config or shard is not None
        refuse_other_formats(out)
        check_out(out, is_folder, [*paths, *parts(opened)], force)
        outline = combine.outline(sources, [coefficients], dtype=stored, unmatched=unmatched)
        if outline.differences and unmatched == "refuse":
            raise UnfulfilledError(
                f"the files differ in {len(outline.differences)} tensors:"
                f"{listed(outline.differences)}\nPass --unmatched drop to leave these out, or "
                "--unmatched keep to have them from the newest file that has them"
            )
        if not outline.promised:
            raise UnfulfilledError(
                f"the files have no tensor in common: {len(outline.dropped)} were to be dropped. "
                "Pass --unmatched keep, or files of one model"
            )
        if not dry_run:
            facts: dict[str, Any] = {
                "producer": f"polyak {version('polyak')}",
                "combined": {
                    "rule": rule,
                    "sources": [path.name for path in paths],
                    "coefficients": coefficients,
                },
            }
            folder = stack.enter_context(files.atomic_folder(out)) if is_folder else out.parent
            name = "model.safetensors" if is_folder else out.name
            target = folder / name if shard is None else folder
            with progress_bar("averaging", outline.read_bytes) as progress:
                combine.combine(
                    sources,
                    [combine.Target(coefficients, target, facts)],
                    dtype=stored,
                    shard_bytes=shard,
                    unmatched=unmatched,
                    progress=progress,
                )
            for config in configs:
                with files.atomic(folder / config.name) as file:
                    file.write(config.read_bytes())
    promised = outline.promised.values()
    answer: dict[str, Any] = {
        "out": str(out),
        "written": not dry_run,
        "rule": rule,
        "files": [
            {"path": str(path), "coefficient": coefficient}
            for path, coefficient in zip(paths, coefficients, strict=True)
        ],
        "averaged": list(outline.mixed),
        "copied": {name: str(paths[number]) for name, number in outline.copied.items()},
        "dropped": list(outline.dropped),
        "differences": list(outline.differences),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in promised}),
        "read_bytes": outline.read_bytes,
        "write_bytes": sum(math.prod(p.shape) * p.dtype.itemsize for p in promised),
        "config": [path.name for path in configs],
    }
    tell(answer, as_json, _average_rows)


def _refuse_mixture(opened: Sequence[Checkpoint], sets: Sequence[str]) -> None:
    """Refuse to take averages of some files and trained weights of others unless told."""
    kinds = {name.partition(" ")[0] for name in sets}
    if len(kinds) > 1:
        each = ", ".join(f"{one.path.name}: {name}" for one, name in zip(opened, sets, strict=True))
        raise ValueError(
            f"some files hold averages and some trained weights ({each}), and a mean of both is "
            "neither. Pass files of one kind"
        )


def _coefficients(
    count: int, weights: str | None, ema: float | None, lr_decay: LrDecay | None
) -> tuple[str, list[float]]:
    """Return the rule in words, and what it gives each file."""
    from polyak import combine

    given = {"--weights": weights, "--ema": ema, "--lr-decay": lr_decay}
    rules = [option for option, value in given.items() if value is not None]
    if len(rules) > 1:
        raise ValueError(f"{' and '.join(rules)} say what each file counts. Pass one of them")
    if weights is not None:
        return "weights", _shares(weights, count)
    if ema is not None:
        return f"ema {ema}", combine.ema(count, ema)
    if lr_decay is not None:
        return f"lr-decay {lr_decay}", combine.lr_decay(count, lr_decay)
    return "uniform", combine.uniform(count)


def _shares(weights: str, count: int) -> list[float]:
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count or not all(0 <= n < math.inf for n in numbers) or not any(numbers):
        raise ValueError(
            f"--weights {weights} is not a number for each of the {count} files, 0 or more and not "
            f"all 0. Pass {count} of them with commas between, such as "
            f"--weights {','.join(map(str, range(1, count + 1)))}"
        )
    shares = [number / max(numbers) for number in numbers]  # whose sum no number is too large for
    return [share / math.fsum(shares) for share in shares]


_CONFIGS = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
_NO_CONFIGS = (".index.json", "trainer_state.json")


def _configs(opened: Checkpoint) -> list[Path]:
    """Return the small files beside a checkpoint that describe its model."""
    folder = opened.path if opened.path.is_dir() else opened.path.parent
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"there is no config.json beside {str(opened.path)!r}, so that --copy-config has "
            "nothing to copy. Leave it out, or pass the folder of a model as the last of the files"
        )
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and path.suffix in _CONFIGS and not path.name.endswith(_NO_CONFIGS)
    )


def _average_rows(answer: Mapping[str, Any]) -> Rows:
    rows = [
        ("wrote" if answer["written"] else "would write", answer["out"]),
        ("rule", answer["rule"]),
        *(("", f"{one['coefficient']:.4f}  {one['path']}") for one in answer["files"]),
        *((what, some(list(answer[what]))) for what in ("averaged", "copied", "dropped")),
        ("dtype", ", ".join(answer["dtypes"])),
        (
            "bytes",
            f"{in_bytes(answer['read_bytes'])} to read, {in_bytes(answer['write_bytes'])} to write",
        ),
        ("config", ", ".join(answer["config"])),
    ]
    return [(name, value) for name, value in rows if value]
