"""Weighted sums of files: right to the last rounding, in little memory, all or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import polyak
from polyak import combine as room
from polyak import files
from polyak.checkpoint import opened
from polyak.combine import Target, combine, ema, lr_decay, outline, uniform


def mixed(paths: list[Path], coefficients: list[float], **how: Any) -> dict[str, Tensor]:
    """The sum as a dictionary."""
    out: dict[str, Tensor] = {}
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in paths]
        combine(sources, [Target(coefficients, out)], **how)
    return out


def written(folder: Path, *contents: dict[str, Tensor]) -> list[Path]:
    for number, tensors in enumerate(contents):
        files.write(folder / f"{number}.safetensors", tensors)
    return [folder / f"{number}.safetensors" for number in range(len(contents))]


def random(seed: int, dtype: torch.dtype = torch.float32, size: int = 1000) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------------- coefficients


def test_coefficients_are_those_of_the_papers() -> None:
    """WSM's values for 1-sqrt, k = 10; linear decay is the mean; an EMA begins with the first."""
    known = [0.3015, 0.1249, 0.0958, 0.0808, 0.0712, 0.0643, 0.0592, 0.0551, 0.0517, 0.0489, 0.0465]
    assert [round(c, 4) for c in lr_decay(11, "1-sqrt")] == known
    assert lr_decay(7, "linear") == pytest.approx(uniform(7), abs=1e-15)
    for kind in ("linear", "1-sqrt", "cosine"):
        for count in (1, 2, 9):
            row = lr_decay(count, kind)
            assert sum(row) == pytest.approx(1.0, abs=1e-14)
            assert min(row) >= 0
    average = 0.0
    states = [3.0, -1.0, 4.0, 1.5]
    for number, state in enumerate(states):
        average = 0.7 * average + 0.3 * state if number else state
    assert sum(c * s for c, s in zip(ema(4, 0.7), states, strict=True)) == pytest.approx(average)
    for decay in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"0 to 1, and is {decay}"):
            ema(3, decay)
    with pytest.raises(ValueError, match="no decay 'square'; pass one of linear, 1-sqrt, cosine"):
        lr_decay(3, "square")  # type: ignore[arg-type]


def test_decaying_the_rate_gives_what_the_sum_gives() -> None:
    """Updates times multipliers, added to the first checkpoint, for each form."""
    torch.manual_seed(0)
    updates = torch.randn(6, 5, dtype=torch.float64)
    states = torch.cat([torch.zeros(1, 5, dtype=torch.float64), updates.cumsum(0)])
    for kind in ("linear", "1-sqrt", "cosine"):
        row = torch.tensor(lr_decay(7, kind), dtype=torch.float64)
        multipliers = row.flip(0).cumsum(0).flip(0)[1:]
        assert float(multipliers.max()) <= 1 + 1e-12
        torch.testing.assert_close(row @ states, multipliers @ updates)


# ---------------------------------------------------------------------------------------- values


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_a_sum_is_the_float64_sum_cast_once(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any dtypes, numbers of files, coefficients, also negative ones."""
    folder = tmp_path_factory.mktemp("sum")
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
    dtype = data.draw(st.sampled_from(dtypes))
    count = data.draw(st.integers(1, 5))
    row = data.draw(st.lists(st.floats(-3, 3), min_size=count, max_size=count).filter(any))
    shape = data.draw(st.sampled_from([(), (7,), (3, 4), (0, 2)]))
    torch.manual_seed(count)
    kind = torch.complex64 if dtype.is_complex else torch.float32
    contents = [{"w": torch.randn(shape, dtype=kind).to(dtype)} for _ in range(count)]
    found = mixed(written(folder, *contents), row)["w"]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    used = [(c, x["w"].to(wide)) for c, x in zip(row, contents, strict=True) if c]
    exact = sum(c * x for c, x in used)
    assert found.dtype == dtype
    assert found.shape == shape
    assert isinstance(exact, Tensor)
    scale = sum(abs(c) * x.abs() for c, x in used)
    # Each product and sum in float64 is rounded by at most 2^-53 of the terms; then one cast.
    eps = torch.finfo(dtype).eps / 2
    bound = eps * exact.abs() + 2 * count * 2.0**-52 * scale + torch.finfo(dtype).smallest_normal
    assert bool(((found.to(wide) - exact).abs() <= bound).all())


def test_the_mean_of_narrow_files_is_right_before_the_last_cast(tmp_path: Path) -> None:
    """Ten bfloat16 files: float32 rounding, where a bfloat16 accumulation is off by 2.6e-3."""
    contents = [{"w": random(seed, torch.bfloat16, 10_000)} for seed in range(10)]
    paths = written(tmp_path, *contents)
    exact = torch.stack([x["w"].double() for x in contents]).mean(0)
    found = mixed(paths, uniform(10), dtype=torch.float32)["w"]
    assert bool(((found.double() - exact).abs() <= 2**-24 * exact.abs() + 1e-15).all())
    # A cast keeps order: the sum, rounded by at most 10 2^-53 of its terms, lies between the casts
    # of what is so much below and above. Means of ten bfloat16 often are ties, which that decides.
    slack = 10 * 2.0**-52 * torch.stack([x["w"].double().abs() for x in contents]).mean(0)
    cast = mixed(paths, uniform(10))["w"]
    low, high = ((exact + sign * slack).to(torch.bfloat16) for sign in (-1, 1))
    assert bool(((low <= cast) & (cast <= high)).all())
    assert float((low != high).float().mean()) < 0.05  # so that it says something
    narrow = torch.zeros(10_000, dtype=torch.bfloat16)
    for x in contents:
        narrow += x["w"] / 10
    assert float((narrow.double() - exact).abs().max()) > 2e-3  # what this test would find


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_files_give_that_file(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, also where the coefficients do not sum to 1 in floating point."""
    same = {"w": random(1, dtype, 5000)}
    paths = written(tmp_path, *[same] * 10)
    for row in (uniform(10), ema(10, 0.9), lr_decay(10, "1-sqrt")):
        assert torch.equal(mixed(paths, row)["w"], same["w"])


def test_slices_of_large_tensors_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice ends anywhere in a tensor; several targets, files and dictionaries, in one pass."""
    monkeypatch.setattr(room, "_SLICE_BYTES", 512)
    contents = [
        {"a": random(s, size=1001), "b": random(s, torch.float64, 130), "n": torch.arange(s, 99)}
        for s in range(3)
    ]
    for x in contents:
        x["n"] = torch.arange(100)
    contents[-1]["n"] = torch.arange(100) * 2
    paths = written(tmp_path, *contents)
    rows = [[0.2, 0.3, 0.5], [0.0, 0.0, 1.0], [1.5, -1.0, 0.5]]
    outs: list[Any] = [tmp_path / "x.safetensors", {}, tmp_path / "y.safetensors"]
    seen = []
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in paths]
        targets = [Target(row, out, {"row": row}) for row, out in zip(rows, outs, strict=True)]
        plan = combine(sources, targets, progress=seen.append)
    assert sum(seen) == plan.read_bytes == 3 * (4 * 1001 + 8 * 130) + 800
    for row, out in zip(rows, outs, strict=True):
        found = out if isinstance(out, dict) else files.read(out)
        for name in ("a", "b"):
            exact = sum(c * x[name].double() for c, x in zip(row, contents, strict=True))
            torch.testing.assert_close(found[name], exact.to(contents[0][name].dtype))
        assert torch.equal(found["n"], torch.arange(100) * 2)
    assert files.read_facts(outs[0]) == {"row": rows[0]}
    assert files.verify(outs[2]) == []


def test_a_file_of_no_weight_is_not_read(tmp_path: Path) -> None:
    """A coefficient of 0 is none, also where the file is not finite."""
    paths = written(tmp_path, {"w": torch.tensor([torch.nan])}, {"w": torch.ones(1)})
    assert mixed(paths, [0.0, 1.0]) == {"w": torch.ones(1)}
    files.write(tmp_path / "2.safetensors", {"w": torch.tensor([4.0])})
    outs: list[dict[str, Tensor]] = [{}, {}]
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in sorted(tmp_path.iterdir())]
        rows = [[0.0, 0.5, 0.5], [0.0, 2.0, 0.0]]
        combine(sources, [Target(row, out) for row, out in zip(rows, outs, strict=True)])
        assert [out["w"].item() for out in outs] == [2.5, 2.0]
        outs = [{}]
        for order in (sources, sources[1:] + sources[:1]):  # it is read, for another sum
            row = [0.0 if source is sources[0] else 0.5 for source in order]
            other = [1.0 if source is sources[0] else 0.0 for source in order]
            with pytest.raises(ValueError, match="one of the checkpoints is not finite"):
                combine(order, [Target(row, outs[0]), Target(other, {})])
            assert outs == [{}]


def test_every_kind_of_number_fits_the_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Complex numbers are two, of up to 16 bytes each; float8 is one byte, and 8 in a sum."""
    monkeypatch.setattr(room, "_SLICE_BYTES", 64)
    wide = torch.complex(random(1).double(), random(2).double())
    torch.save({"c": wide, "d": random(3, torch.float64)}, tmp_path / "wide.pt")
    narrow = {"c": wide.to(torch.complex64) / 2, "d": random(4).to(torch.float8_e4m3fn)}
    paths = [tmp_path / "wide.pt", *written(tmp_path, narrow)]
    found = mixed(paths, [0.5, 0.5])
    exact = (wide + narrow["c"].to(wide.dtype)) / 2
    torch.testing.assert_close(found["c"], exact.to(torch.complex64))
    assert found["d"].dtype == torch.float8_e4m3fn
    found = mixed(paths, [0.5, 0.5], dtype=torch.float32)
    exact = (random(3, torch.float64) + narrow["d"].double()) / 2
    torch.testing.assert_close(found["d"], exact.float())


# -------------------------------------------------------------------------- what files do not share


def test_differences_are_listed_and_refused_unless_told(tmp_path: Path) -> None:
    """Missing names, other shapes, other kinds, all at once; or left out; or kept of the newest."""
    paths = written(
        tmp_path,
        {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(3), "d": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(2).int(), "e": torch.ones(1)},
    )
    with pytest.raises(ValueError, match="differ in 4 tensors") as caught:
        mixed(paths, uniform(2))
    for line in (
        *("b: (2,), (4,)", "c: not in checkpoint 2", "d: torch.float32, torch.int32"),
        *("e: not in checkpoint 1", "unmatched='drop'", "'keep'"),
    ):
        assert line in str(caught.value)
    assert mixed(paths, uniform(2), unmatched="drop").keys() == {"a"}
    kept = mixed(paths, uniform(2), unmatched="keep")
    assert kept["a"].tolist() == [0.5, 0.5]
    assert (kept["b"].tolist(), kept["c"].tolist()) == ([0.0] * 4, [1.0] * 3)
    assert (kept["d"].dtype, kept["e"].tolist()) == (torch.int32, [1.0])


def test_tied_names_meet(tmp_path: Path) -> None:
    """One file has a tied tensor under both names, another leaves out one of them."""
    first, second = torch.full((3,), 2.0), torch.full((3,), 4.0)
    torch.save({"embed": first, "head": first}, tmp_path / "a.pt")
    files.write(tmp_path / "b.safetensors", {"embed": second})
    paths = [tmp_path / "a.pt", tmp_path / "b.safetensors"]
    for order in (paths, paths[::-1]):
        found = mixed(order, [0.5, 0.5])
        assert found["embed"].tolist() == found["head"].tolist() == [3.0] * 3


def test_counters_and_masks_are_those_of_the_newest(tmp_path: Path) -> None:
    """A mean of integers would be another model's."""
    first = {"n": torch.tensor(3), "mask": torch.tensor([True, False]), "w": torch.ones(1)}
    last = {"n": torch.tensor(8), "mask": torch.tensor([False, True]), "w": torch.zeros(1)}
    found = mixed(written(tmp_path, first, last), [1.0, 0.0])
    assert (found["n"].item(), found["mask"].tolist()) == (8, [False, True])
    assert found["w"].tolist() == [1.0]


def test_what_would_not_be_finite_is_refused(tmp_path: Path) -> None:
    """With its name, and whether a file or the dtype is to blame; the old file stays."""
    paths = written(
        tmp_path,
        {"v": torch.ones(2), "w": torch.tensor([1.0, torch.nan])},
        {"v": torch.full((2,), 1e6), "w": torch.ones(2)},
    )
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in paths]
        with pytest.raises(ValueError, match=r"'w' of the sum .* one of the checkpoints is not"):
            combine(sources, [Target([0.5, 0.5], out)])
        with pytest.raises(ValueError, match=r"'v' of the sum .* torch.float16 is too narrow"):
            combine(sources, [Target([0.0, 1.0], out)], dtype=torch.float16)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("0.safetensors", "1.safetensors", "out.safetensors"),
    ]


@pytest.mark.parametrize(
    "row", [[0.5], [0.5, 0.25, 0.25], [0.5, float("nan")], [float("inf"), 0.0], [0.0, 0.0]]
)
def test_coefficients_that_do_not_fit_are_refused(row: list[float], tmp_path: Path) -> None:
    paths = written(tmp_path, {"w": torch.ones(1)}, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match=f"{len(row)} coefficients for 2 checkpoints"):
        mixed(paths, row)


def test_an_outline_reads_nothing(tmp_path: Path) -> None:
    """What would be done, from headers alone."""
    paths = written(
        tmp_path,
        {"w": torch.ones(5), "n": torch.ones(2).int()},
        {"w": torch.ones(5).bfloat16(), "n": torch.ones(2).int()},
    )
    with opened(paths[0]) as a, opened(paths[1]) as b:
        found = outline([a.tensors, b.tensors], [uniform(2)], dtype=None)
    assert list(found.mixed) == ["w"]
    assert dict(found.copied) == {"n": 1}
    assert found.promised["w"].dtype == torch.bfloat16
    assert found.read_bytes == 20 + 10 + 8


def test_shards_are_written_and_read(tmp_path: Path) -> None:
    """Into a folder with an index, from one too."""
    tensors = [{f"w{i}": random(10 * s + i) for i in range(5)} for s in range(2)]
    for s in range(2):
        files.write_sharded(tmp_path / str(s), tensors[s], 9000)
    with opened(tmp_path / "0") as a, opened(tmp_path / "1") as b:
        combine([a.tensors, b.tensors], [Target([0.5, 0.5], tmp_path / "out")], shard_bytes=4000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5
    with opened(tmp_path / "out") as found:
        for name, stored in found.tensors.items():
            expected = (tensors[0][name].double() + tensors[1][name].double()) / 2
            assert torch.equal(stored.read(), expected.float())


# ----------------------------------------------------------------------------------- all or nothing

KILLS = """
import os, random, sys
from contextlib import ExitStack
from pathlib import Path
import torch
from polyak import combine, files
from polyak.checkpoint import opened

combine._SLICE_BYTES = 8000
folder = Path(sys.argv[1])
out = folder / "out" / "x.safetensors"
out.parent.mkdir()
inputs = [folder / f"{number}.safetensors" for number in range(3)]
for number, path in enumerate(inputs):
    files.write(path, {f"t{i}": torch.full((5000,), float(number)) for i in range(4)})
random.seed(0)
left = 0

def moment(*_):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), 9)

def with_moments(function):
    def call(*args, **kwargs):
        moment()
        try:
            return function(*args, **kwargs)
        finally:
            moment()
    return call

os.fsync = with_moments(os.fsync)
Path.replace = with_moments(Path.replace)

def average(number, progress=moment):
    rows = [[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in inputs]
        target = combine.Target(rows[number % 3], out, {"number": number})
        combine.combine(sources, [target], progress=progress)

average(0, None)
number = cut = 0
for end in [random.randrange(1, 90) for _ in range(50)]:
    pid = os.fork()
    if not pid:
        left = end
        while True:
            number += 1
            average(number)
    assert os.waitpid(pid, 0)[1] == 9
    number = files.read_facts(out)["number"]
    assert files.verify(out) == []
    value = [0.0, 1.5, 2.0][number % 3]
    tensors = files.read(out)
    assert len(tensors) == 4
    assert all(t.unique().tolist() == [value] and len(t) == 5000 for t in tensors.values())
    assert len(os.listdir(out.parent)) <= 2
    cut += len(os.listdir(out.parent)) == 2
average(number + 1)
assert os.listdir(out.parent) == [out.name]
print(cut)
"""


def test_a_killed_sum_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """Kill -9 at fifty moments of an average; what the dead leave is gone after the next run."""
    (package,) = polyak.__path__
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(package).parent)}
    run = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 25


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_nothing(
    sharded: bool, error: type[BaseException], tmp_path: Path
) -> None:
    """No file, no folder, no thread; a dictionary is as it was."""
    paths = written(tmp_path, *[{f"w{i}": random(i) for i in range(5)}] * 2)
    calls = []

    def stop(_: int) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise error

    out: dict[str, Tensor] = {}
    with ExitStack() as stack:
        sources = [stack.enter_context(opened(path)).tensors for path in paths]
        with pytest.raises(error):
            combine(
                sources,
                [Target([0.5, 0.5], tmp_path / "out"), Target([0.5, 0.5], out)],
                shard_bytes=4000 if sharded else None,
                progress=stop,
            )
    assert out == {}
    assert sorted(tmp_path.iterdir()) == paths
    assert not [thread for thread in threading.enumerate() if "polyak-read" in thread.name]


MEMORY = """
import sys, threading
from contextlib import ExitStack
from pathlib import Path
import torch
from polyak import combine
from polyak.checkpoint import opened

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

paths, out = sys.argv[1:-1], sys.argv[-1]
before, peak = anonymous(), 0
def look(_):
    global peak
    peak = max(peak, anonymous())
with ExitStack() as stack:
    sources = [stack.enter_context(opened(path)).tensors for path in paths]
    combine.combine(sources, [combine.Target(combine.uniform(len(paths)), out)], progress=look)
print(peak - before)
"""


def test_memory_is_that_of_slices(tmp_path: Path) -> None:
    """Of files of 60 MB each, of both kinds, not more than a few slices are in memory."""
    big = torch.zeros(15_000_000)
    for number in range(2):
        files.write(tmp_path / f"{number}.safetensors", {"w": big + number})
        torch.save({"w": big + number}, tmp_path / f"{number + 2}.pt")
    del big
    paths = [tmp_path / name for name in ("0.safetensors", "1.safetensors", "2.pt", "3.pt")]
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, paths), str(tmp_path / "out.safetensors")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 100e6
    assert set(files.read(tmp_path / "out.safetensors")["w"].unique().tolist()) == {0.5}
