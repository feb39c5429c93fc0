"""What does averaging checkpoint files cost, beside what people do and beside reading alone?

Ten files of the tensors of GPT-2 medium (1.4 GB each in float32) are made on the spot, as
safetensors and as files of torch.save. Each way to average them runs in a process of its own, all
of them in turn, round after round, each beside a reading of the same files from their first byte to
their last. Before every run the files are dropped from the system's cache, as those of last week
are. Reported are the time in units of that reading, and how much anonymous memory a process took
above what it had with torch imported; pages of files that are mapped are not anonymous.

The linear merge of mergekit is one of the ways where mergekit is installed, on the safetensors only
(`pip install mergekit typer rich -e .`, best in an environment of its own). What it merges are
folders: before the clock runs, each file gets one, with a config and a link to the file, and
mergekit is imported, so that neither is in its time, nor the imports in its memory.

    python benchmarks/merge.py --quick          # small files: does it run? (without mergekit)
    python benchmarks/merge.py --out docs       # all of it: needs 35 GB of disk, and ten minutes
    python benchmarks/merge.py --dtype bfloat16
    python benchmarks/merge.py --way "polyak average" --way "mergekit linear"
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

Dtype = Enum("Dtype", {"float32": "float32", "bfloat16": "bfloat16"}, type=str)
STEP_BYTES = 16 << 20
ROUNDS = 3
KINDS = ["safetensors", "pt"]
STDS = (0.06, 0.07, 0.08, 0.12)  # none of which is stored
# The model whose tensors are in the files, as transformers and mergekit know it.
GPT2_MEDIUM = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
}
# Lazy reading, and weights only; what is not named is as mergekit has it: one file, no GPU.
MERGEKIT = {
    "lazy_unpickle": True,
    "copy_tokenizer": False,
    "write_model_card": False,
    "quiet": True,
}


# ------------------------------------------------------------------ what is run, each in a process


def read_once(paths: list[Path], out: Path) -> None:
    """Read every byte of the files."""
    buffer = bytearray(STEP_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def ours(paths: list[Path], out: Path) -> None:
    """polyak: `combine`, which `polyak average` calls."""
    from contextlib import ExitStack

    from polyak import checkpoint, combine

    with ExitStack() as stack:
        sources = [stack.enter_context(checkpoint.opened(path)).tensors for path in paths]
        combine.combine(sources, [combine.Target(combine.uniform(len(paths)), out)])


def reconstructed(paths: list[Path], out: Path, stds: tuple[float, ...] = (0.07,)) -> None:
    """polyak: averages that were not kept, as if the files were some of 100,000 steps."""
    from polyak.decay import PowerLaw
    from polyak.posthoc import Snapshot, reconstruct
    from polyak.profile import History

    steps, clocks = 100_000, len(paths) // 2
    whole = {std: History("a run") for std in (0.05, 0.10)}
    for std, history in whole.items():
        for _ in range(steps):
            history.tick(PowerLaw(std), 1)
    stored = [
        Snapshot(path, whole[(0.05, 0.10)[number % 2]].until(steps * (number // 2 + 1) // clocks))
        for number, path in enumerate(paths)
    ]
    outs = [out.with_suffix(f".{std}.safetensors") for std in stds]
    reconstruct(stored, [PowerLaw(std) for std in stds], outs)


def running_sum(paths: list[Path], out: Path) -> None:
    """A sum in float32, a whole file at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    total: dict[str, Any] = {}
    for path in paths:
        for name, tensor in _loaded(path, load_file).items():
            if name in total:
                total[name] += tensor.float()
            else:
                total[name] = tensor.to(torch.float32, copy=True)
    dtypes = {name: tensor.dtype for name, tensor in _loaded(paths[-1], load_file).items()}
    save_file({n: (t / len(paths)).to(dtypes[n]) for n, t in total.items()}, out)


def load_everything(paths: list[Path], out: Path) -> None:
    """All files in memory, then the mean of each tensor."""
    import torch
    from safetensors.torch import load_file, save_file

    models = [_loaded(path, load_file) for path in paths]
    mean = {
        name: torch.stack([model[name].float() for model in models]).mean(0).to(tensor.dtype)
        for name, tensor in models[0].items()
    }
    save_file(mean, out)


def mergekit_linear(paths: list[Path], out: Path) -> None:
    """mergekit: a linear merge, with equal weights, of the models that `as_models` made."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [_model(path) for path in paths]
    stored = json.loads((models[0] / "config.json").read_text())["dtype"]
    config = {
        "merge_method": "linear",
        "dtype": "float32",
        "out_dtype": stored,
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
    }
    merged = out.with_suffix("")
    run_merge(MergeConfiguration.model_validate(config), str(merged), MergeOptions(**MERGEKIT))
    (merged / "model.safetensors").replace(out)


def _model(path: Path) -> Path:
    """Return the folder of a file that is read as a model."""
    return path.with_suffix("")


def _loaded(path: Path, load_file: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    import torch

    if path.suffix == ".pt":
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    return load_file(path)


WAYS: dict[str, Callable[[list[Path], Path], None]] = {
    "reading alone": read_once,
    "polyak average": ours,
    "polyak reconstruct": reconstructed,
    "polyak reconstruct, 4 at once": functools.partial(reconstructed, stds=STDS),
    "running sum": running_sum,
    "load everything": load_everything,
    "mergekit linear": mergekit_linear,
}
Way = Enum("Way", {way: way for way in WAYS}, type=str)
MEANS = ("polyak average", "running sum", "load everything", "mergekit linear")
SAFETENSORS_ALONE = ("polyak reconstruct", "polyak reconstruct, 4 at once", "mergekit linear")
# What is imported before the clock runs, besides torch and safetensors.
IMPORTED = {"mergekit linear": "mergekit.merge"}


# ------------------------------------------------------------------------------------- measuring


def anonymous_bytes() -> int:
    """Return how much anonymous memory this process has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not say how much anonymous memory a process has")


def run_here(way: str, paths: list[Path], out: Path) -> dict[str, float]:
    """Run one way in this process; return its seconds and the peak of its anonymous memory."""
    import torch  # its memory is not what is measured
    from safetensors.torch import load_file  # noqa: F401

    if way in IMPORTED:
        importlib.import_module(IMPORTED[way])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    WAYS[way](paths, out)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    return {"seconds": seconds, "anonymous_bytes": max(0, peak[0] - before)}


def evict(paths: list[Path]) -> None:
    """Let the system forget what is in the files, as far as it does, and have nothing to write."""
    os.sync()
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(way: str, paths: list[Path], out: Path) -> dict[str, float]:
    """Run one way in a process of its own, on files that are on the disk only."""
    evict(paths)
    job = json.dumps([way, [str(path) for path in paths], str(out)])
    process = subprocess.run(
        [sys.executable, __file__, "--job", job],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise RuntimeError(f"{way} failed:\n{process.stderr}")
    found: dict[str, float] = json.loads(process.stdout)
    return found


def make(
    folder: Path, count: int, dtype: str, model: str, kinds: list[str]
) -> dict[str, list[Path]]:
    """Write files of random weights; return them by kind."""
    import torch
    from safetensors.torch import save_file

    from harness.shapes import listed

    found: dict[str, list[Path]] = {kind: [] for kind in kinds}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            entry.name: torch.randn(entry.shape, generator=generator).to(getattr(torch, dtype))
            for entry in listed(model)
            if entry.kind != "counter"
        }
        for kind in kinds:
            path = folder / f"{number}.{kind}"
            if kind == "pt":
                torch.save(tensors, path)
            else:
                save_file(tensors, path, {"format": "pt"})
            found[kind].append(path)
    return found


def as_models(paths: list[Path], dtype: str) -> None:
    """Make a folder for each file that transformers and mergekit take for a model of GPT-2."""
    for path in paths:
        folder = _model(path)
        folder.mkdir()
        (folder / "model.safetensors").symlink_to(path.resolve())
        (folder / "config.json").write_text(json.dumps(GPT2_MEDIUM | {"dtype": dtype}))


def check(paths: list[Path], outs: dict[str, Path]) -> dict[str, float]:
    """Return how far each result is from the float64 mean, in roundings of float32."""
    import torch
    from safetensors import safe_open

    off = {}
    opened = [safe_open(path, "pt") for path in paths]
    for way, out in outs.items():
        worst = 0.0
        with safe_open(out, "pt") as result:
            if set(result.keys()) != set(opened[0].keys()):
                raise RuntimeError(f"{way} wrote other tensors than those of the files")
            for name in list(result.keys())[::40]:
                exact = torch.stack([file.get_tensor(name).double() for file in opened]).mean(0)
                scale = torch.finfo(result.get_tensor(name).dtype).eps / 2
                error = (result.get_tensor(name).double() - exact).abs() / (scale * exact.abs())
                worst = max(worst, float(error[exact != 0].max()))
        off[way] = worst
    return off


def tabled(results: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table."""
    lines = []
    for row in results["rows"]:
        low, high = min(row["of_reading"]), max(row["of_reading"])
        off = row.get("off")
        lines.append(
            [
                row["way"],
                row["kind"],
                f"{statistics.median(row['seconds']):.1f}",
                f"{statistics.median(row['of_reading']):.2f} ({low:.2f} to {high:.2f})",
                f"{max(row['anonymous_bytes']) / 1e6:,.0f}",
                "" if off is None else f"{off:.2f}",
            ]
        )
    return lines


COLUMNS = [
    *("way", "files", "seconds", "of reading the files once", "anonymous memory, MB"),
    "off the mean, roundings",
]


def markdown(results: dict[str, Any]) -> str:
    """Return the table as a part of a page."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * 2 + " ---: |" * 4]
    lines = ["| " + " | ".join(line) + " |" for line in tabled(results)]
    told = (
        f"{results['count']} files of the tensors of {results['model']} in {results['dtype']}, "
        f"{results['file_bytes'] / 1e9:.2f} GB each; {results['rounds']} rounds, medians, lowest "
        f"and highest; torch {results['torch']}, {results['cpu']}. Made by `{results['command']}`."
    )
    if results["mergekit"]:
        told += (
            f" mergekit {results['mergekit']['version']}, its imports not counted: merge_method "
            f"linear, equal weights, dtype float32, {results['mergekit']['options']}."
        )
    skipped = "".join(f"\n\nNot measured: {reason}." for reason in results["skipped"])
    return "\n".join([*head, *lines]) + f"\n\n{told}{skipped}\n"


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Small files: does it run?")] = False,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in the files.")] = Dtype.float32,
    count: Annotated[int, typer.Option(min=2, help="How many files.")] = 10,
    way: Annotated[list[Way] | None, typer.Option(help="Only this; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/merge"),
    folder: Annotated[Path | None, typer.Option(help="Where the files are made.")] = None,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure what averaging checkpoint files costs."""
    if job is not None:
        name, paths, target = json.loads(job)
        sys.stdout.write(json.dumps(run_here(name, [Path(path) for path in paths], Path(target))))
        return
    import torch

    from harness import machine
    from harness.shapes import MODELS, elements, listed

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    model = "mobilenetv3_large" if quick else "gpt2_medium"
    size = elements(listed(model)) * getattr(torch, dtype.value).itemsize
    skipped = []
    ways = [each.value for each in Way if not way or each in way]
    needed = 3.2 * size * count
    if "load everything" in ways and machine.free_bytes() < needed:
        ways.remove("load everything")
        skipped.append(f"load everything, which needs about {needed / 1e9:.0f} GB of memory")
    if "mergekit linear" in ways:
        if importlib.util.find_spec("mergekit") is None:
            ways.remove("mergekit linear")
            skipped.append("mergekit linear, as mergekit is not installed")
        elif quick:
            ways.remove("mergekit linear")
            skipped.append(f"mergekit linear, which knows no {MODELS[model]}")
        else:
            skipped.append("mergekit linear on files of torch.save: safetensors are the rule")
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        inside = Path(made)
        if shutil.disk_usage(inside).free < 2.5 * size * count:
            raise typer.BadParameter(f"{inside} has too little room for {2 * count} files")
        console.print(f"Making {2 * count} files of {size / 1e9:.2f} GB.")
        files = make(inside, count, dtype.value, model, KINDS)
        if "mergekit linear" in ways:
            as_models(files["safetensors"], dtype.value)
        for number in range(ROUNDS):
            for kind, paths in files.items():
                here = [n for n in ways if kind == "safetensors" or n not in SAFETENSORS_ALONE]
                outs = {
                    name: inside / f"{name.replace(' ', '-')}.safetensors"
                    for name in here
                    if name != "reading alone"
                }
                for name in here[number:] + here[:number]:  # none is always the last
                    reading = run("reading alone", paths, inside)["seconds"]
                    found = run(name, paths, outs.get(name, inside))
                    row = rows.setdefault(
                        (name, kind),
                        {"way": name, "kind": kind, "seconds": [], "of_reading": []}
                        | {"anonymous_bytes": []},
                    )
                    row["seconds"].append(found["seconds"])
                    row["of_reading"].append(found["seconds"] / reading)
                    row["anonymous_bytes"].append(found["anonymous_bytes"])
                    console.print(f"{name}, {kind}: {found['seconds']:.1f} s, round {number + 1}")
                if kind == "safetensors" and not number:
                    means = {name: path for name, path in outs.items() if name in MEANS}
                    for name, off in check(paths, means).items():
                        rows[name, kind]["off"] = off
                for path in inside.glob("*-*.safetensors"):
                    path.unlink()
    results = {
        "command": shlex.join(["python", "benchmarks/merge.py", *_elsewhere(sys.argv[1:], folder)]),
        "quick": quick,
        "model": MODELS[model],
        "dtype": dtype.value,
        "count": count,
        "file_bytes": size,
        "rounds": ROUNDS,
        "torch": torch.__version__,
        "cpu": machine.facts()["cpu"],
        "mergekit": _mergekit() if "mergekit linear" in ways else None,
        "skipped": skipped,
        "rows": list(rows.values()),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "merge.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "merge-table.md").write_text(markdown(results))
    table = Table(title="Averaging checkpoint files", title_justify="left")
    for column in COLUMNS:
        table.add_column(column)
    for line in tabled(results):
        table.add_row(*line)
    console.print(table)


def _mergekit() -> dict[str, str]:
    """Return which mergekit was measured, and with which of its options."""
    options = ", ".join(f"{name}={value}" for name, value in MERGEKIT.items())
    return {"version": importlib.metadata.version("mergekit"), "options": options}


def _elsewhere(arguments: list[str], folder: Path | None) -> list[str]:
    """Return what was typed, without a name that means something on this machine only."""
    return ["FOLDER" if argument == str(folder) else argument for argument in arguments]


if __name__ == "__main__":
    typer.run(main)
