"""How fast is an update on a GPU? polyak and its peers against what a copy on the device reaches.

Every call is timed behind a queue that is busy, as in training: by events on the device, so that
what the host does in the meantime costs nothing as long as it is not waited for, and on the host,
where a sync shows as the time of the queue. In each round a copy is timed beside it. Before
anything is timed its result is compared with the definition in float64.

    python benchmarks/gpu.py --quick                  # a minute or two: does all of it run?
    python benchmarks/gpu.py --out docs               # all of it
    python benchmarks/gpu.py --section updates --out out/gpu

Sections: `updates` (each path, each peer), `chunks` (of the foreach path), `blocks` (of the
kernel), `graph` (capture and replay), `step` (share of a training step, with averages on the GPU
and in host memory). Needs an NVIDIA GPU and Triton; a peer that is not installed is left out.
Without a GPU it ends with status 2.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import itertools
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from harness import machine, peers
from harness.contender import DECAY, Candidate, Contender, check
from harness.ours import Alone, Whole
from harness.shapes import Entry, Weights, elements, listed, one
from harness.timing import Spread, ratios, spread
from harness.training import Transformer
from polyak import EMA, engine
from polyak.engine import foreach
from scale import PRESETS

DEVICE = "cuda"
BUSY = 100_000_000  # cycles that the queue is busy before a timed call: 50 ms at 2 GHz
COPIED = 1 << 30  # elements of float32 that the copy copies: far more than a cache holds
CHUNKS = [1 << k for k in range(20, 27)]
BLOCKS = [
    (block, step, warps)
    for block, step, warps in itertools.product(
        [1 << 12, 1 << 13, 1 << 14], [1 << 10, 1 << 11, 1 << 12], [4, 8]
    )
]
Row = dict[str, Any]

# ------------------------------------------------------------------ what is updated


def billion() -> list[Entry]:
    """Return the parameters of Llama 3.2 1B: 1.24 billion numbers in 146 tensors."""
    return [Entry(name, "parameter", shape) for name, shape, _ in PRESETS["1B"].stage(0, 1)]


LARGE = "Llama 3.2 1B"
MODELS: dict[str, Callable[[], list[Entry]]] = {
    LARGE: billion,
    "ResNet-50": functools.partial(listed, "resnet50"),
}
DTYPES = [torch.bfloat16, torch.float32]


def on_device(entries: Sequence[Entry], dtype: torch.dtype) -> nn.Module:
    """Return a model of these tensors on the GPU."""
    return Weights(entries, dtype).to(DEVICE)


def moved(entries: Sequence[Entry], dtype: torch.dtype) -> int:
    """Return the bytes that an update has to move: weights once, float32 averages twice."""
    return elements(entries) * (dtype.itemsize + 8)


def kernel() -> type[engine.Path]:
    """Return the path of the kernel.

    Raises:
        RuntimeError: it cannot be used here.
    """
    from polyak.engine import cuda

    device = torch.device(DEVICE, torch.cuda.current_device())
    for dtype in DTYPES:
        obstacle = cuda.obstacle(device, torch.float32, dtype)
        if obstacle:
            raise RuntimeError(f"for {dtype} on this machine: {obstacle}")
    return cuda.Cuda


def contenders() -> list[Candidate]:
    """Return polyak as its users have it, each path of its engine alone, and the peers."""
    ours = [Candidate("polyak", Whole, family="ours")]
    for path in (kernel(), foreach.Foreach):
        make = functools.partial(Alone, path=path)
        ours.append(Candidate(f"polyak, {path.name}, engine alone", make, family="engine"))
    return [*ours, *peers.candidates()[0]]


# ------------------------------------------------------------------ how it is timed


class Timed(NamedTuple):
    """Seconds of a call, round by round."""

    device: list[float]
    host: list[float]


def alternate(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timed]:
    """Time each call once a round, behind a busy queue."""
    times = {name: Timed([], []) for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    gc.collect()
    gc.disable()
    try:
        for _, (name, call) in itertools.product(range(rounds), calls.items()):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY)
            begin.record()
            started = time.perf_counter()
            call()
            times[name].host.append(time.perf_counter() - started)
            end.record()
            end.synchronize()
            times[name].device.append(begin.elapsed_time(end) / 1e3)
    finally:
        gc.enable()
    return times


@functools.cache
def _copied() -> tuple[Tensor, Tensor]:
    source = torch.ones(COPIED, device=DEVICE)
    return torch.empty_like(source), source


def copying() -> None:
    """Copy on the device: what the shares are shares of."""
    target, source = _copied()
    target.copy_(source)


def timed(call: Callable[[], object], bytes_moved: int, rounds: int) -> Row:
    """Return what a call takes, and what share of the copy's bandwidth it reaches."""
    times = alternate({"copy": copying, "call": call}, rounds)
    shares = ratios(times["copy"].device, times["call"].device)
    scale = bytes_moved / (8 * COPIED)
    return {
        "device_seconds": spread(times["call"].device),
        "host_seconds": spread(times["call"].host),
        "bytes": bytes_moved,
        "bytes_per_second": bytes_moved / spread(times["call"].device).median,
        "copy_bytes_per_second": 8 * COPIED / spread(times["copy"].device).median,
        "share_of_copy": Spread(*(scale * value for value in shares)),
    }


def syncs(call: Callable[[], object]) -> int:
    """Return how often a call waits for the device, by CUDA's own account."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def launches(call: Callable[[], object]) -> int:
    """Return how many kernels, copies and fills a call gives to the device."""
    torch.cuda.synchronize()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities, acc_events=True) as profiled:
        call()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == device for event in profiled.events())


def extra_bytes(call: Callable[[], object]) -> int:
    """Return the device memory that a call takes for itself while it runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def costs(call: Callable[[], object], bytes_moved: int, rounds: int) -> Row:
    """Return all that is measured of a call."""
    return timed(call, bytes_moved, rounds) | {
        "syncs": syncs(call),
        "launches": launches(call),
        "extra_bytes": extra_bytes(call),
    }


def _clear() -> None:
    """Give what nobody holds back to the device."""
    gc.collect()
    torch.cuda.empty_cache()


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------ sections


def updates(rounds: int, models: Sequence[str]) -> Iterator[Row]:
    """Yield the cost of an update for each model, dtype and contender; first the references."""
    lerp = functools.partial(torch.zeros(COPIED, device=DEVICE).lerp_, _copied()[1], 1 - DECAY)
    row = timed(lerp, 12 * COPIED, rounds)
    yield {"model": "one tensor", "dtype": "float32", "contender": "torch lerp_"} | row
    del lerp
    for name, dtype in itertools.product(models, DTYPES):
        entries = MODELS[name]()
        whole = Candidate(
            "polyak, cuda, all in one tensor",
            functools.partial(Alone, path=kernel()),
            family="engine",
        )
        for candidate in (whole, *contenders()):
            of = one(elements(entries)) if candidate is whole else entries
            row = _of_contender(candidate, of, dtype, rounds)
            about = {"contender": candidate.name, "family": candidate.family}
            yield {"model": name, "dtype": _named(dtype)} | about | row
            _clear()


def _of_contender(
    candidate: Candidate, entries: Sequence[Entry], dtype: torch.dtype, rounds: int
) -> Row:
    model = on_device(entries, dtype)
    try:
        contender: Contender = candidate.make(model)
        if dtype == torch.float32 or not candidate.differs:
            check(contender, model)
    except Exception as reason:  # whatever a peer does not do on a GPU, it is told
        return {"failed": f"{type(reason).__name__}: {reason}".splitlines()[0]}
    found = costs(contender.update, moved(entries, dtype), rounds)
    if isinstance(contender, Whole):
        found["paths"] = list(contender.ema.report().paths)
    return found


def chunks(rounds: int, models: Sequence[str]) -> Iterator[Row]:
    """Yield the cost of the foreach path for each size of its scratch."""
    for name, dtype, chunk in itertools.product(models, DTYPES, CHUNKS):
        entries = MODELS[name]()
        with patch.object(foreach, "CHUNK_ACCELERATOR", chunk):
            alone = Alone(on_device(entries, dtype), foreach.Foreach)
            alone.update()  # which cuts the tensors
        row = costs(alone.update, moved(entries, dtype), rounds)
        yield {"model": name, "dtype": _named(dtype), "chunk": chunk} | row
        del alone
        _clear()


def blocks(rounds: int, models: Sequence[str]) -> Iterator[Row]:
    """Yield the time of the kernel for each way to cut the work."""
    path = kernel()
    from polyak.engine import cuda

    for name, dtype in itertools.product(models, DTYPES):
        entries = MODELS[name]()
        model = on_device(entries, dtype)
        for block, step, warps in BLOCKS:
            with patch.multiple(cuda, BLOCK=block, STEP=step, WARPS=warps):
                alone = Alone(model, path)
                alone.update()  # which cuts the tensors
            row = timed(alone.update, moved(entries, dtype), rounds)
            about = {"block": block, "step": step, "warps": warps}
            yield {"model": name, "dtype": _named(dtype)} | about | row
            del alone
        del model
        _clear()


def graph(rounds: int, models: Sequence[str]) -> Iterator[Row]:
    """Yield the time of a replayed update, and whether it gives the bits of one that is called."""
    for name, dtype in itertools.product(models, DTYPES):
        entries = MODELS[name]()
        sources = [p.detach() for p in on_device(entries, dtype).parameters()]
        replayed, called = ([s.float() * 0.5 for s in sources] for _ in range(2))
        plans = [engine.Plan(targets, sources, kernel()) for targets in (replayed, called)]
        weight = torch.zeros((), device=DEVICE)
        engine.lerp(plans[0], weight)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            engine.lerp(plans[0], weight)
        for value in (0.25, 0.75, 0.0, 1e-3):
            weight.fill_(value)
            captured.replay()
            engine.lerp(plans[1], value)
        same = all(map(torch.equal, replayed, called))
        size = sum(s.numel() for s in sources) * (dtype.itemsize + 8)
        row = timed(captured.replay, size, rounds)
        yield {"model": name, "dtype": _named(dtype), "same_bits": same} | row
        del captured, plans, sources, replayed, called
        _clear()


def step(rounds: int, models: Sequence[str]) -> Iterator[Row]:
    """Yield the time of a training step of a 1 B language model, with and without an average.

    The averages in host memory need the engine's path for them: without it they are left out.
    """
    width, layers = (2048, 20) if LARGE in models else (512, 4)
    how: dict[str, dict[str, Any] | None] = {"none": None, "beside the model": {}}
    if importlib.util.find_spec("polyak.engine.host") is not None:
        how["in host memory"] = {"device": "cpu"}
    for name, arguments in how.items():
        torch.manual_seed(0)
        model = Transformer(width, layers).to(DEVICE, torch.bfloat16)
        call, optimizer = _training(model)
        if arguments is not None:
            EMA(model, DECAY, **arguments).attach(optimizer)
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):  # several steps together: what overlaps with the next one counts
            started = time.perf_counter()
            for _ in range(5):
                call()
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / 5)
        yield {
            "average": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "step_seconds": spread(seconds),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
        del model, call, optimizer
        _clear()


def _training(
    model: Transformer, batch: int = 8, length: int = 512
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(0)
    most = model.embed.num_embeddings
    tokens = torch.randint(most, (batch, length + 1), generator=generator).to(DEVICE)

    def call() -> None:
        optimizer.zero_grad()
        with torch.device(DEVICE):  # where the model makes its mask
            logits = model(tokens[:, :-1]).flatten(0, 1).float()
        F.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return call, optimizer


SECTIONS: dict[str, Callable[[int, Sequence[str]], Iterator[Row]]] = {
    "updates": updates,
    "chunks": chunks,
    "blocks": blocks,
    "graph": graph,
    "step": step,
}
Section = Enum("Section", {name: name for name in SECTIONS}, type=str)

# ------------------------------------------------------------------ results


def facts() -> Row:
    """Return what the machine and the versions are."""
    properties = torch.cuda.get_device_properties(DEVICE)
    found: Row = {
        "gpu": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "system": platform.system(),
    }
    found["versions"] = machine.versions() | {"triton": version("triton")}
    return found


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def plain(value: Any) -> Any:
    """Return a row with numbers of five digits.

    >>> plain({"seconds": (0.00123456789, 1.0)})
    {'seconds': [0.0012346, 1.0]}
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def save(results: Row, path: Path) -> None:
    """Write the results, a line for each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(results | {"rows": []}, indent=1).removesuffix("[]\n}")
    path.write_text(head + "[\n" + ",\n".join(map(json.dumps, results["rows"])) + "\n]\n}\n")


def cells(row: Row) -> dict[str, str]:
    """Return what a table shows of a row: columns and what is in them."""
    shown = {}
    for key in ("model", "dtype", "contender", "chunk", "block", "step", "warps", "average"):
        if key in row:
            shown[key] = f"{row[key]:,}" if isinstance(row[key], int) else str(row[key])
    if "failed" in row:
        return shown | {"device ms": row["failed"]}
    for key, name in (("device_seconds", "device ms"), ("step_seconds", "step ms")):
        if key in row:
            median, low, high = (1e3 * value for value in row[key])
            shown[name] = f"{median:.3f}, {low:.3f} to {high:.3f}"
    if "share_of_copy" in row:
        shown["of the copy"] = f"{row['share_of_copy'][0]:.0%}"
        shown["TB/s"] = f"{row['bytes_per_second'] / 1e12:.2f}"
        shown["host ms"] = f"{1e3 * row['host_seconds'][0]:.2f}"
    for key, name in (("syncs", "syncs"), ("launches", "launches"), ("same_bits", "same bits")):
        if key in row:
            shown[name] = str(row[key])
    for key, name in (("extra_bytes", "extra MB"), ("peak_bytes", "peak MB")):
        if key in row:
            shown[name] = f"{row[key] / 1e6:,.0f}"
    return shown


def show(section: str, rows: Sequence[Row], console: Console) -> None:
    """Print a section as a table."""
    lines = [cells(row) for row in rows]
    columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
    table = Table(title=section, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column)
    for line in lines:
        table.add_row(*(line.get(column, "") for column in columns))
    console.print(table)


def markdown(results: Row) -> str:
    """Return all sections as a part of a page."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    parts = [
        f"{machine['gpu']}, {machine['multiprocessors']} multiprocessors, CUDA {machine['cuda']}, "
        f"driver {machine['driver']}; {versions}. `{results['command']}`\n"
    ]
    for section in SECTIONS:
        lines = [cells(row) for row in results["rows"] if row["section"] == section]
        if lines:
            columns = list(dict.fromkeys(itertools.chain.from_iterable(lines)))
            rows = [columns, ["---"] * len(columns)]
            rows += [[line.get(column, "") for column in columns] for line in lines]
            table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            parts.append(f"**{section}**\n\n{table}\n")
    return "\n".join(parts)


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds, small models.")] = False,
    section: Annotated[list[Section] | None, typer.Option(help="Some sections only.")] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Timed calls of each.")] = 15,
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu-table.md.")] = Path(
        "out/gpu"
    ),
) -> None:
    """Measure what an update of an average costs on a GPU."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if not torch.cuda.is_available():
        console.print("There is no GPU here that torch can use; nothing was measured.")
        raise typer.Exit(2)
    missing = peers.candidates()[1]
    if missing:
        console.print(f"not installed, so left out: {', '.join(missing)}")
    models = ["ResNet-50"] if quick else list(MODELS)
    results: Row = {
        "command": shlex.join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "quick": quick,
        "machine": facts(),
        "rows": [],
    }
    for name in [chosen.value for chosen in section] if section else SECTIONS:
        rows = []
        for row in SECTIONS[name](3 if quick else rounds, models):
            rows.append(plain({"section": name} | row))
            results["rows"].append(rows[-1])
            save(results, out / "gpu.json")  # as it goes: a machine may be taken back
        show(name, rows, console)
    (out / "gpu-table.md").write_text(markdown(results))
    console.print(f"Wrote gpu.json and gpu-table.md in {out}.")


if __name__ == "__main__":
    typer.run(main)
