"""What an average costs on each rank: bytes held and moved, for the shape of a model and a mesh.

Nothing is run and nothing is measured here. Shapes, sharding and the engine's way of working are
arithmetic; `tests/test_scale.py` holds it to models that torch has really sharded, under process
groups of up to 512 ranks, and to the bytes that small real runs allocate, move and write.

    python benchmarks/scale.py                            # 1B to 400B under common layouts
    python benchmarks/scale.py 8B --shard 8
    python benchmarks/scale.py 70B --shard 32 --tensor 8 --weights bfloat16 --every 10
    python benchmarks/scale.py 1B --layers 24 --vocab 50304 --replicate 8 --json
    python benchmarks/scale.py --markdown > docs/scale-table.md

Bytes are those of parameters alone: gradients, optimizer state, activations, and the padding that
FSDP2 puts on shards that are shorter than the first, are the trainer's. GB are 10^9 bytes.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from polyak.engine import average_dtype, foreach

# ------------------------------------------------------------------ models


class Weight(NamedTuple):
    """A parameter: its name, its shape, and the dimension that tensor parallelism cuts."""

    name: str
    shape: tuple[int, ...]
    cut: int | None = None


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer: grouped-query attention, gated feed-forward, no biases."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool  # embedding and head are one tensor

    def layer(self, number: int) -> list[Weight]:
        """Return the parameters of one layer.

        Tensor parallelism cuts the outputs of q, k, v, gate and up, and the inputs of o and down.
        """
        kv = self.hidden // self.heads * self.kv_heads
        shapes = {
            "q": ((self.hidden, self.hidden), 0),
            "k": ((kv, self.hidden), 0),
            "v": ((kv, self.hidden), 0),
            "o": ((self.hidden, self.hidden), 1),
            "gate": ((self.ffn, self.hidden), 0),
            "up": ((self.ffn, self.hidden), 0),
            "down": ((self.hidden, self.ffn), 1),
            "attention_norm": ((self.hidden,), None),
            "ffn_norm": ((self.hidden,), None),
        }
        return [Weight(f"layers.{number}.{n}.weight", *shape) for n, shape in shapes.items()]

    def stage(self, stage: int, stages: int) -> list[Weight]:
        """Return the parameters of one pipeline stage.

        The layers are dealt out in order, one more to each of the first stages where they do not
        divide. The embedding is on the first stage, the last norm and the head on the last. Tied
        ones are one tensor on one stage, and two on two.
        """
        each, more = divmod(self.layers, stages)
        first = stage * each + min(stage, more)
        table = (self.vocab, self.hidden)
        weights = [Weight("embed.weight", table, 0)] if stage == 0 else []
        for number in range(first, first + each + (stage < more)):
            weights += self.layer(number)
        if stage == stages - 1:
            weights.append(Weight("norm.weight", (self.hidden,)))
            if not self.tied or stages > 1:
                weights.append(Weight("head.weight", table, 0))
        return weights

    @property
    def parameters(self) -> int:
        """How many numbers the model has, tied ones once."""
        return sum(math.prod(weight.shape) for weight in self.stage(0, 1))


# The shapes of Llama 3.2 1B and Llama 3.1 8B, 70B and 405B.
PRESETS = {
    "1B": Config(16, 2048, 32, 8, 8192, 128256, tied=True),
    "8B": Config(32, 4096, 32, 8, 14336, 128256, tied=False),
    "70B": Config(80, 8192, 64, 8, 28672, 128256, tied=False),
    "400B": Config(126, 16384, 128, 8, 53248, 128256, tied=False),
}

# ------------------------------------------------------------------ meshes


class Place(NamedTuple):
    """Where a rank is in the mesh."""

    stage: int
    replica: int
    shard: int
    tensor: int


@dataclass(frozen=True)
class Mesh:
    """So many pipeline stages x replicas x FSDP2 shards x tensor-parallel parts."""

    pipeline: int = 1
    replicate: int = 1
    shard: int = 1
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """How many processes, each with a device of its own."""
        return math.prod(self.sizes)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes of the dimensions, the one whose ranks are neighbors last."""
        return self.pipeline, self.replicate, self.shard, self.tensor

    def place(self, rank: int) -> Place:
        """Return where a rank is, as `init_device_mesh` numbers them."""
        found = []
        for size in reversed(self.sizes):
            rank, index = divmod(rank, size)
            found.append(index)
        return Place(*reversed(found))

    def __str__(self) -> str:
        data = f"HSDP {self.replicate} x {self.shard}" if self.shard > 1 < self.replicate else ""
        data = data or (f"FSDP2 {self.shard}" if self.shard > 1 else "")
        data = data or (f"DDP {self.replicate}" if self.replicate > 1 else "")
        parts = (
            f"pipeline {self.pipeline}" if self.pipeline > 1 else "",
            data,
            f"TP {self.tensor}" if self.tensor > 1 else "",
        )
        return " x ".join(part for part in parts if part) or "one process"


def local_shape(weight: Weight, mesh: Mesh, place: Place) -> tuple[int, ...]:
    """Return the shape of the part of a parameter that a rank holds.

    Tensor parallelism cuts its dimension first; FSDP2 then cuts dimension 0 of what is left. Both
    deal out `ceil(rows / parts)` rows to each part until none are left: the last part with rows
    may be shorter than the others, and those after it are empty.
    """
    shape = list(weight.shape)
    if weight.cut is not None:
        shape[weight.cut] = _rows(shape[weight.cut], mesh.tensor, place.tensor)
    shape[0] = _rows(shape[0], mesh.shard, place.shard)
    if mesh.shard > 1 and 0 in shape:  # what is empty has no rows, says FSDP2
        shape[0] = 0
    return tuple(shape)


def _rows(rows: int, parts: int, index: int) -> int:
    each = -(-rows // parts)
    return max(0, min(each, rows - index * each))


# ------------------------------------------------------------------ costs


@dataclass(frozen=True)
class Dtypes:
    """Of the weights as they are stored between steps, and of their averages."""

    weights: torch.dtype
    averages: torch.dtype


@dataclass(frozen=True)
class Cost:
    """What one rank holds and moves. All but the first are bytes."""

    parameters: float
    weights: float
    averages: float  # held beside the weights; the rank's part of the state as well
    scratch: float  # held by the engine, see `scratch_bytes`
    read: float  # of averages and weights, by an update
    written: float  # of averages, by an update
    through_scratch: float  # read and written besides, by an update: in the cache, if it is large
    communicated: float  # by an update, and by entering and leaving `applied()`
    aside: float  # held a second time inside of `applied()`
    swapped: float  # read and written by entering and leaving `applied()`

    @property
    def moved(self) -> float:
        """What an update has to move through memory."""
        return self.read + self.written

    @property
    def touched(self) -> float:
        """What an update moves through memory if nothing of the scratch stays in a cache."""
        return self.moved + self.through_scratch


def cost(parameters: int, dtypes: Dtypes, device: str) -> Cost:
    """Return the cost of an average of so many numbers on one rank."""
    w, a = dtypes.weights.itemsize, dtypes.averages.itemsize
    return Cost(
        parameters=parameters,
        weights=parameters * w,
        averages=parameters * a,
        scratch=scratch_bytes(parameters, dtypes, device),
        read=parameters * (a + w),
        written=parameters * a,
        through_scratch=parameters * scratch_traffic(dtypes, device),
        communicated=0,
        aside=parameters * w,
        # Weights are copied aside, averages over the weights, and what is aside over these.
        swapped=parameters * (2 * w + a + w + 2 * w),
    )


def scratch_bytes(parameters: int, dtypes: Dtypes, device: str) -> int:
    """Return the bytes of scratch: two chunks of averages and one of booleans, but for scalars.

    It is made with the second update and held. (One group of tensors: all of one dtype.)
    """
    chunk = foreach.CHUNK.get(device, foreach.CHUNK_ACCELERATOR)
    return min(chunk, parameters) * (2 * dtypes.averages.itemsize + 1)


def scratch_traffic(dtypes: Dtypes, device: str) -> int:
    """Return the bytes per parameter that an update's operators read and write besides the least.

    The averages are read into scratch, mixed there, tested, and written back, a chunk at a time.
    What of it reaches memory depends on the cache: of a core, all of a chunk stays in it. On an
    accelerator nobody looks at the result of the test, so that the guard always runs: absolute
    values, comparison, count, the old averages once more, and the choice between both.
    """
    a = dtypes.averages.itemsize
    mix = 3 * a if dtypes.weights == dtypes.averages else 5 * a  # other dtypes are cast first
    test = a if device == "cpu" else 2 * a + (a + 1) + (1 + a) + a + 2 * a + (1 + 3 * a)
    return mix + test + a


# ------------------------------------------------------------------ rows


@dataclass(frozen=True)
class Row:
    """One model under one mesh."""

    name: str
    config: Config
    mesh: Mesh
    dtypes: Dtypes
    device: str = "cuda"

    def on_rank(self, rank: int) -> Cost:
        """Return what a rank holds and moves."""
        return self._at(self.mesh.place(rank))

    def _at(self, place: Place) -> Cost:
        held = (
            count * math.prod(local_shape(Weight("", *kind), self.mesh, place))
            for kind, count in _kinds(self.config, place.stage, self.stages).items()
        )
        return cost(sum(held), self.dtypes, self.device)

    @property
    def stages(self) -> int:
        """The number of pipeline stages."""
        return self.mesh.pipeline

    def all_costs(self) -> Iterator[Cost]:
        """Yield the cost of each rank of one replica; the replicas are alike."""
        sizes = (self.stages, 1, self.mesh.shard, self.mesh.tensor)
        for place in itertools.product(*map(range, sizes)):
            yield self._at(Place(*place))

    def largest(self) -> Cost:
        """Return the cost of the rank that holds most."""
        return max(self.all_costs(), key=lambda found: found.parameters)

    def mean(self) -> Cost:
        """Return the mean over the ranks."""
        costs = [asdict(found) for found in self.all_costs()]
        return Cost(**{key: sum(c[key] for c in costs) / len(costs) for key in costs[0]})

    def all_weights(self) -> list[Weight]:
        """Return the parameters of all stages."""
        return [w for stage in range(self.stages) for w in self.config.stage(stage, self.stages)]

    @property
    def checkpoint(self) -> int:
        """The bytes of averages in a checkpoint of the state: each number once, replicas or not."""
        numbers = sum(math.prod(weight.shape) for weight in self.all_weights())
        return numbers * self.dtypes.averages.itemsize

    @property
    def largest_tensor(self) -> Weight:
        """The parameter that is most to gather when a file is written tensor by tensor."""
        return max(self.all_weights(), key=lambda weight: math.prod(weight.shape))


@functools.cache
def _kinds(config: Config, stage: int, stages: int) -> Counter[tuple[tuple[int, ...], int | None]]:
    """Return how many parameters of each shape and cut a stage has: layers are alike."""
    return Counter((weight.shape, weight.cut) for weight in config.stage(stage, stages))


FLOAT32 = Dtypes(torch.float32, torch.float32)
BFLOAT16 = Dtypes(torch.bfloat16, torch.float32)

COMMON = [
    ("1B", Mesh(replicate=8)),
    ("1B", Mesh(shard=8)),
    ("8B", Mesh(shard=8)),
    ("8B", Mesh(replicate=8, shard=8)),
    ("8B", Mesh(shard=96)),
    ("70B", Mesh(shard=64)),
    ("70B", Mesh(replicate=4, shard=64)),
    ("70B", Mesh(shard=32, tensor=8)),
    ("400B", Mesh(shard=512)),
    ("400B", Mesh(shard=64, tensor=8)),
    ("400B", Mesh(pipeline=8, shard=8, tensor=8)),
]

# ------------------------------------------------------------------ output


def size(count: float) -> str:
    """Return bytes as text, in three digits.

    >>> size(4_015_130_624), size(37_748_736), size(0)
    ('4.02 GB', '37.7 MB', '0')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "bytes")):
        if count >= unit:
            return f"{digits(count / unit)} {name}"
    return "0"


def digits(value: float) -> str:
    """Return a number in three digits, and never less than its whole part.

    >>> digits(0.1234), digits(1.2345), digits(123.45), digits(4321.0)
    ('0.123', '1.23', '123', '4,321')
    """
    if value < 1:
        return f"{value:.3g}"
    places = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{places}f}"


def milliseconds(moved: float, bandwidth: float, every: int) -> float:
    """Return the time per optimizer step that moving these bytes takes at so many GB/s."""
    return moved / (bandwidth * 1e9) * 1e3 / every


def cells(row: Row, bandwidth: float, every: int) -> dict[str, str]:
    """Return a row of the table, by column."""
    most, mean = row.largest(), row.mean()
    step = "update" if every == 1 else "step"
    return {
        "model": row.name,
        "layout": str(row.mesh),
        "GPUs": f"{row.mesh.ranks}",
        "parameters per GPU": f"{digits(most.parameters / 1e6)} M",
        "mean GPU holds": f"{mean.parameters / most.parameters:.1%}",
        "weights": size(most.weights),
        "averages": size(most.averages),
        f"moved per {step}": size(most.moved / every),
        f"least time per {step}": f"{digits(milliseconds(most.moved, bandwidth, every))} ms",
        "without a cache": f"{digits(milliseconds(most.touched, bandwidth, every))} ms",
        "more inside `applied()`": size(most.aside),
        "checkpoint": size(row.checkpoint),
    }


def markdown(rows: Sequence[Row], bandwidth: float, every: int) -> str:
    """Return a table for each pair of dtypes that the rows have."""
    parts = []
    for dtypes in dict.fromkeys(row.dtypes for row in rows):
        lines = [cells(row, bandwidth, every) for row in rows if row.dtypes == dtypes]
        parts.append(
            f"**Weights in {short(dtypes.weights)}, averages in {short(dtypes.averages)}**, "
            f"{bandwidth:,.0f} GB/s assumed\n\n"
            + "".join(
                f"| {' | '.join(line)} |\n"
                for line in [list(lines[0]), ["---", "---", *["---:"] * (len(lines[0]) - 2)]]
                + [list(line.values()) for line in lines]
            )
        )
    return "\n".join(parts)


def plain(row: Row, bandwidth: float, every: int) -> dict[str, Any]:
    """Return all that is known of a row, for JSON."""
    most = row.largest()
    return {
        "model": row.name,
        "config": asdict(row.config) | {"parameters": row.config.parameters},
        "layout": str(row.mesh),
        "mesh": asdict(row.mesh) | {"ranks": row.mesh.ranks},
        "weights_dtype": short(row.dtypes.weights),
        "averages_dtype": short(row.dtypes.averages),
        "device": row.device,
        "largest_rank": asdict(most),
        "mean_rank": asdict(row.mean()),
        "checkpoint_bytes": row.checkpoint,
        "largest_tensor": row.largest_tensor._asdict(),
        "bandwidth_gb_per_second": bandwidth,
        "every": every,
        "milliseconds_per_step": {
            "least": milliseconds(most.moved, bandwidth, every),
            "most": milliseconds(most.touched, bandwidth, every),
        },
    }


def print_row(console: Console, row: Row, bandwidth: float, every: int) -> None:
    """Print one row in full, and the arithmetic of its largest rank."""
    most, mean = row.largest(), row.mean()
    console.print(f"{row.name} as {row.mesh}: {row.mesh.ranks} ranks")
    table = Table(box=box.SIMPLE)
    for column in ("per rank", "largest", "mean"):
        table.add_column(column, justify="left" if column == "per rank" else "right")
    table.add_row("parameters", f"{most.parameters:,.0f}", f"{mean.parameters:,.0f}")
    lines = {
        f"weights, {short(row.dtypes.weights)}": "weights",
        f"averages, {short(row.dtypes.averages)}": "averages",
        "scratch of the path foreach": "scratch",
        "read by an update": "read",
        "written by an update": "written",
        "in and out of that scratch": "through_scratch",
        "communicated": "communicated",
        "held aside inside applied()": "aside",
        "read and written by applied()": "swapped",
    }
    for text, key in lines.items():
        table.add_row(text, size(getattr(most, key)), size(getattr(mean, key)))
    console.print(table)
    for line in arithmetic(row, bandwidth, every):
        console.print(line, soft_wrap=True)


def arithmetic(row: Row, bandwidth: float, every: int) -> list[str]:
    """Return the arithmetic of a row, a line each."""
    most, tensor = row.largest(), row.largest_tensor
    w, a = row.dtypes.weights.itemsize, row.dtypes.averages.itemsize
    through = scratch_traffic(row.dtypes, row.device)
    least = milliseconds(most.moved, bandwidth, 1)
    bound = milliseconds(most.touched, bandwidth, 1)
    whole = math.prod(tensor.shape) * a
    lines = [
        f"model: {row.config.parameters:,} parameters",
        f"update: {most.parameters:,.0f} x ({a} + {w} read + {a} written) bytes = "
        f"{size(most.moved)}; at {bandwidth:,.0f} GB/s {digits(least)} ms",
        f"on foreach, if no scratch stays in a cache: {most.parameters:,.0f} x "
        f"({2 * a + w} + {through}) bytes = {size(most.touched)}; {digits(bound)} ms",
        f"checkpoint of the state: {size(row.checkpoint)} for all ranks together",
        f"largest tensor: {tensor.name}, {size(whole)} as an average",
    ]
    if every > 1:
        lines.insert(
            3,
            f"every={every}: {size(most.moved / every)} and {digits(least / every)} ms per "
            "optimizer step",
        )
    return lines


def short(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module."""
    return str(dtype).removeprefix("torch.")


# ------------------------------------------------------------------ the program

Preset = Enum("Preset", {name: name for name in PRESETS})
Count = Annotated[int | None, typer.Option(min=1, show_default="of the preset")]
Size = Annotated[int, typer.Option(min=1)]


class Weights(str, Enum):
    """Dtypes of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Averages(str, Enum):
    """Dtypes that `EMA(dtype=...)` takes."""

    float32 = "float32"
    float64 = "float64"


def main(
    preset: Annotated[
        Preset | None, typer.Argument(help="Whose shape; without it, all of them in one table.")
    ] = None,
    layers: Count = None,
    hidden: Count = None,
    heads: Count = None,
    kv_heads: Count = None,
    ffn: Count = None,
    vocab: Count = None,
    tied: Annotated[
        bool | None, typer.Option(help="Embedding and head are one.", show_default="of the preset")
    ] = None,
    pipeline: Size = 1,
    replicate: Size = 1,
    shard: Size = 1,
    tensor: Size = 1,
    weights: Annotated[
        Weights | None, typer.Option(help="As stored between steps.", show_default="float32")
    ] = None,
    averages: Annotated[Averages, typer.Option(help="The least dtype.")] = Averages.float32,
    device: Annotated[str, typer.Option(help="Kind of device: cpu, or an accelerator.")] = "cuda",
    every: Annotated[int, typer.Option(min=1, help="Update after so many steps.")] = 1,
    bandwidth: Annotated[
        float, typer.Option(min=1, help="Of memory, GB/s: an assumption that is yours to make.")
    ] = 3000,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="A table for a page.")] = False,
) -> None:
    """Print what an average holds and moves on each rank."""
    console = Console(highlight=False)
    shape = {
        key: value
        for key, value in {
            "layers": layers,
            "hidden": hidden,
            "heads": heads,
            "kv_heads": kv_heads,
            "ffn": ffn,
            "vocab": vocab,
            "tied": tied,
        }.items()
        if value is not None
    }
    mesh = Mesh(pipeline, replicate, shard, tensor)
    floor = getattr(torch, averages.value)
    chosen = [getattr(torch, weights.value)] if weights else [torch.float32]
    if preset is None and not weights:
        chosen.append(torch.bfloat16)
    pairs = [Dtypes(dtype, average_dtype(dtype, floor)) for dtype in chosen]
    if preset is None:
        if shape or mesh.ranks > 1:
            raise typer.BadParameter(f"name the preset to begin from: {', '.join(PRESETS)}")
        rows = [Row(n, PRESETS[n], m, pair, device) for pair in pairs for n, m in COMMON]
    else:
        config = replace(PRESETS[preset.value], **shape)
        if config.hidden % config.heads or config.heads % config.kv_heads:
            raise typer.BadParameter("heads must divide hidden, and kv-heads must divide heads")
        if config.layers < pipeline:
            raise typer.BadParameter(f"{config.layers} layers do not make {pipeline} stages")
        name = preset.value if config == PRESETS[preset.value] else f"{preset.value}, changed"
        rows = [Row(name, config, mesh, pairs[0], device)]
    if as_json:
        typer.echo(json.dumps([plain(row, bandwidth, every) for row in rows], indent=1))
    elif as_markdown:
        typer.echo(markdown(rows, bandwidth, every), nl=False)
    elif preset is None:
        for dtypes in pairs:
            some = [cells(row, bandwidth, every) for row in rows if row.dtypes == dtypes]
            table = Table(
                title=f"weights in {short(dtypes.weights)}, averages in {short(dtypes.averages)}, "
                f"{bandwidth:,.0f} GB/s assumed"
            )
            for column in some[0]:
                table.add_column(column.replace("`", ""))
            for line in some:
                table.add_row(*line.values())
            console.print(table)
    else:
        print_row(console, rows[0], bandwidth, every)


if __name__ == "__main__":
    typer.run(main)
