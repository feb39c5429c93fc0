"""The CPU kernel: its bits, its threads, and its pointers.

What holds for every path is in test_engine.py, which this path has joined. Here is what a compiled
loop over raw pointers could get wrong beside that: rounding, the ends of vectors and pieces, races,
forks, memory that has gone, and an installation without it.

The arithmetic is promised to be that of `torch.lerp`, so that is what every bit is compared with.
"""

from __future__ import annotations

import copy
import gc
import importlib.machinery
import importlib.util
import itertools
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from polyak import EMA, engine, trainable
from polyak.engine import cpu, foreach

SOURCE = Path(cpu.__file__).parent / "lerp.c"
COMPILER = shutil.which(os.environ.get("CC", "cc")) or ""
FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# Where there is a compiler there are loops, and a test that finds none fails.
pytestmark = pytest.mark.skipif(
    bool(cpu.obstacle()) and not COMPILER, reason=f"no compiled loops: {cpu.obstacle()}"
)
compiled = pytest.mark.skipif(not COMPILER, reason="no C compiler")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="capabilities of x86"
)

PAIRS = list(cpu._PAIRS)
every_pair = pytest.mark.parametrize(
    ("wide", "narrow"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)

# Both forms and the border between them, also where it shows only after rounding to float32; the
# ends; and a weight that float32 cannot tell from 0.
WEIGHTS = [1e-3, 0.3, 0.5 - 2**-25, 0.5 - 2**-30, 0.5, 0.75, 1 - 2**-24, 1.0, 1e-46]


def ended(work: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a function of this file in a process of its own, to whatever end it comes."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import test_cpu; test_cpu.{work}()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def child(work: str, **environment: str) -> str:
    """Run a function of this file in a process of its own, and return what it prints."""
    process = ended(work, **environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def tell(*words: object) -> None:
    """Say something, in a child."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def built(source: Path, result: Path, *flags: str) -> Path:
    """Compile a C file as the installation does, but for the flags."""
    command = [COMPILER, *FLAGS, *flags, str(source), "-o", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return result


# ------------------------------------------------------------------------------- the definition


def wild(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return numbers of every kind: ordinary ones, any bits at all, and the ends of the scale."""
    generator = torch.Generator().manual_seed(seed)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    low, high = torch.iinfo(whole).min, torch.iinfo(whole).max
    bits = torch.randint(low, high, (count,), dtype=whole, generator=generator).view(dtype)
    usual = torch.randn(count, dtype=torch.float64, generator=generator).to(dtype)
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    ends = [0.0, least, 7 * least, info.smallest_normal, 1.0, info.max, torch.inf, torch.nan]
    signed = torch.tensor(ends + [-x for x in ends], dtype=torch.float64).to(dtype)
    odd = signed[torch.randint(len(signed), (count,), generator=generator)]
    which = torch.randint(4, (count,), generator=generator)
    return torch.where(which == 0, bits, torch.where(which == 1, odd, usual))


def by_torch(target: Tensor, source: Tensor, weight: float) -> tuple[Tensor, int]:
    """Return what `torch.lerp` and the guard make of a target, and how many elements stay.

    Whole vectors are computed: in what is left over at the end torch itself may give a zero the
    other sign, so that its result would depend on an element's place.
    """
    more = target.new_zeros(64)
    longer = torch.cat([target, more]), torch.cat([source.to(target.dtype), more])
    mixed = torch.lerp(*longer, weight)[: len(target)]
    finite = torch.isfinite(mixed)
    return torch.where(finite, mixed, target), int((~finite).sum())


def kinds() -> list[int]:
    """Return the loops that run on this processor and round as torch does here."""
    chosen = cpu.loops().kind
    runs = cpu.loops().dll.polyak_runs
    return [kind for kind in cpu._KINDS if runs(kind) and (kind == 0) == (chosen == 0)]


def mixer(targets: Sequence[Tensor], sources: Sequence[Tensor], kind: int | None = None) -> cpu.Cpu:
    """Return the path over these tensors, by default with the loops that polyak has chosen."""
    loops = cpu.loops()
    return cpu.Cpu(targets, sources, loops if kind is None else loops._replace(kind=kind))


def check(target: Tensor, source: Tensor, weight: float, kind: int) -> None:
    """Hold one pair to the definition, to the bit."""
    expected, kept = by_torch(target, source, weight)
    got = target.clone()
    group = mixer([got], [source], kind)
    group.lerp(weight)
    assert models.bit_identical(got, expected), (target.shape, source.dtype, weight, kind)
    assert group.skipped == kept


def test_there_are_loops_where_there_is_a_compiler() -> None:
    assert cpu.obstacle() == ""
    assert engine.Plan([torch.zeros(3)], [torch.ones(3)]).paths == ["cpu"]


def test_the_comparison_can_fail() -> None:
    """`check` sees one bit in one element, and one element that is counted too often."""
    t, s = torch.ones(5), torch.full((5,), 3.0)
    expected, kept = by_torch(t, s, 0.25)
    assert (expected.tolist(), kept) == ([1.5] * 5, 0)
    assert not models.bit_identical(torch.nextafter(expected, t), expected)
    s[2] = torch.nan
    assert by_torch(t, s, 0.25)[1] == 1
    values = wild(4000, torch.float32, 0)
    assert 100 < int((~torch.isfinite(values)).sum()) < 1000
    assert int(((values.abs() < 1e-38) & (values != 0)).sum()) > 100


# ------------------------------------------------------------------------------------- the bits


def laid_out(pieces: Iterable[Tensor], off: int) -> tuple[Tensor, list[Tensor]]:
    """Return memory and views in it with these values, each `off` elements after a boundary.

    Boundaries are 16 elements apart: the longest vector there is, and more.
    """
    pieces, starts, end = list(pieces), [], off
    for piece in pieces:
        starts.append(end)
        end += (piece.numel() + 31) // 16 * 16
    room = torch.full((end,), 7.0, dtype=pieces[0].dtype)
    views = [room[at : at + p.numel()] for at, p in zip(starts, pieces, strict=True)]
    for view, piece in zip(views, pieces, strict=True):
        view.copy_(piece)
    return room, views


@every_pair
def test_every_size_at_every_alignment(wide: torch.dtype, narrow: torch.dtype) -> None:
    """Tensors of 0 to 70 elements, each pair of offsets from 0 to 15: torch's bits.

    Nothing is written between the tensors, before or after them. `foreach` does the same, but for
    the sign of a zero.
    """
    sizes = list(range(71))
    t, s = (wild(sum(sizes), dtype, 1).split(sizes) for dtype in (wide, narrow))
    mixed = {w: [by_torch(a, b, w) for a, b in zip(t, s, strict=True)] for w in WEIGHTS}
    kept = {w: sum(count for _, count in results) for w, results in mixed.items()}
    readable = [laid_out(s, off)[1] for off in range(16)]
    turns = itertools.cycle(WEIGHTS)
    for off in range(16):
        before, _ = laid_out(t, off)
        room, targets = laid_out(t, off)
        after = {w: laid_out([value for value, _ in mixed[w]], off)[0] for w in WEIGHTS}
        for sources, kind in itertools.product(readable, kinds()):
            weight = next(turns)  # as many as there are of them is no multiple of 16
            room.copy_(before)
            group = mixer(targets, sources, kind)
            group.lerp(weight)
            assert models.bit_identical(room, after[weight]), (off, weight, kind)
            assert group.skipped == kept[weight]
    for weight in WEIGHTS:
        room.copy_(before)
        plan = engine.Plan(targets, readable[3], foreach.Foreach)
        engine.lerp(plan, weight)
        assert models.bit_identical(room + 0.0, after[weight] + 0.0)  # -0 + 0 is +0
        assert plan.skipped() == kept[weight]


@every_pair
@pytest.mark.parametrize("off", [-1, 0, 1])
def test_sizes_around_what_a_loop_and_a_thread_take(
    wide: torch.dtype, narrow: torch.dtype, off: int
) -> None:
    """Around 4096 elements (one run), a piece of a thread, and several of both; alone and in a row.

    In a row every piece but the first begins somewhere in a tensor.
    """
    sizes = [n + off for n in (16, 4096, 8192, cpu._PIECE, 2 * cpu._PIECE, cpu._SHARE)]
    before = [wild(n + 3, wide, n)[3:] for n in sizes]  # not where memory begins
    sources = [wild(n + 1, narrow, n)[1:] for n in sizes]
    for weight, kind in itertools.product((0.3, 0.75), kinds()):
        expected = [by_torch(t, s, weight) for t, s in zip(before, sources, strict=True)]
        targets = [t.clone() for t in before]
        for target, source in zip(targets, sources, strict=True):
            mixer([target], [source], kind).lerp(weight)
        assert models.bit_identical(targets, [value for value, _ in expected])
        targets = [t.clone() for t in before]
        group = mixer(targets, sources, kind)
        group.lerp(weight)
        assert models.bit_identical(targets, [value for value, _ in expected])
        assert group.skipped == sum(count for _, count in expected)


@every_pair
@pytest.mark.parametrize("piece", [1, 2, 5, 64, 100])
def test_pieces_of_any_size_meet_every_element_once(
    wide: torch.dtype, narrow: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short a piece is: tensors in one piece, pieces in one tensor, empty ones between."""
    monkeypatch.setattr(cpu, "_PIECE", piece)
    sizes = [0, 1, 2, 0, 0, 3, 200, 1, 1, 64, 63, 65, 0]
    before = wild(sum(sizes), wide, 4).split(sizes)
    sources = wild(sum(sizes), narrow, 5).split(sizes)
    targets = [t.clone() for t in before]
    mixer(targets, sources).lerp(0.3)
    expected = [by_torch(t, s, 0.3)[0] for t, s in zip(before, sources, strict=True)]
    assert models.bit_identical(targets, expected)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_there_is(narrow: torch.dtype) -> None:
    """All 65,536 bit patterns of a narrow weight, into averages of every kind.

    With a weight of 1 the average is the weight, cast as torch casts it.
    """
    source = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(narrow)
    assert len(set(source.view(torch.int16).tolist())) == 65_536
    for kind in kinds():
        for weight in WEIGHTS:
            for seed in range(3):
                check(wild(len(source), torch.float32, seed), source, weight, kind)
        cast = torch.zeros(len(source))
        group = mixer([cast], [source], kind)
        group.lerp(1.0)
        finite = torch.isfinite(source)
        assert torch.equal(cast, torch.where(finite, source.float(), 0.0))
        assert group.skipped == int((~finite).sum())


@every_pair
def test_any_bits_by_any_weight(wide: torch.dtype, narrow: torch.dtype) -> None:
    """A hundred thousand numbers of every kind, by each of the weights and by some at random."""
    more = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(6)).tolist()
    for number, weight in enumerate(WEIGHTS + more):
        target, source = wild(100_000, wide, number), wild(100_000, narrow, number + 100)
        for kind in kinds():
            check(target, source, weight, kind)


@every_pair
def test_what_is_not_finite_and_what_becomes_so(wide: torch.dtype, narrow: torch.dtype) -> None:
    """NaN and infinities on either side, and finite numbers whose mixture overflows: all pairs."""
    top = torch.finfo(wide).max
    near = torch.finfo(narrow).max
    t = [0.0, -0.0, 1.0, top, -top, torch.inf, -torch.inf, torch.nan]
    s = [0.0, -0.0, 1.0, near, -near, torch.inf, -torch.inf, torch.nan]
    pairs = torch.tensor(list(itertools.product(t, s)), dtype=torch.float64)
    target, source = pairs[:, 0].clone().to(wide), pairs[:, 1].clone().to(narrow)
    for weight, kind in itertools.product(WEIGHTS, kinds()):
        check(target, source, weight, kind)


@pytest.mark.parametrize("kind", cpu._KINDS)
def test_memory_that_no_number_would_be_put_at(kind: int) -> None:
    """Tensors at odd addresses, as a file may hold them that is mapped into memory."""
    if not cpu.loops().dll.polyak_runs(kind):
        pytest.skip("this processor has no such instructions")
    for (wide, narrow), here, there in itertools.product(PAIRS, range(3), range(3)):
        values = wild(1000, wide, 8), wild(1000, narrow, 9)
        straight = values[0].clone()
        mixer([straight], [values[1]], kind).lerp(0.3)
        target, source = (
            torch.frombuffer(
                bytearray(off) + bytearray(value.view(torch.uint8).numpy()), dtype=value.dtype,
                offset=off,
            )
            for value, off in zip(values, (here, there), strict=True)
        )  # fmt: skip
        assert target.data_ptr() % target.itemsize == here % target.itemsize
        mixer([target], [source], kind).lerp(0.3)
        assert models.bit_identical(target.clone(), straight)


@every_pair
@pytest.mark.parametrize("start", [2**31 - 5, 2**32 - 5, 2**35 + 3])
def test_more_elements_than_32_bits_count(
    wide: torch.dtype, narrow: torch.dtype, start: int
) -> None:
    """The end of a tensor of billions of elements, and the tensor after it.

    Only the last elements have memory: the job is begun there, as if all else were done.
    """
    count, after = 100, 50
    before, source = wild(count + after, wide, 10), wild(count + after, narrow, 11)
    last, second = before[:count].clone(), before[count:].clone()
    group = mixer([last, second], [source[:count], source[count:]])
    group._pointers[0] -= start * wide.itemsize
    group._pointers[2] -= start * narrow.itemsize
    group._ends[0], group._ends[1] = start + count, start + count + after
    group._job.piece, group._job.weight, group._job.next = 7, 0.3, start
    group._work()
    expected, kept = by_torch(before, source, 0.3)
    assert models.bit_identical(torch.cat([last, second]), expected)
    assert group.skipped == kept


def test_an_average_that_is_its_own_source_stays() -> None:
    """Target and source in one memory: the fixed point, in either form."""
    for dtype in (torch.float32, torch.float64):
        t = wild(10_000, dtype, 12)
        before = t.clone()
        for weight in (0.3, 0.75):
            mixer([t], [t]).lerp(weight)
        # But for the sign of zero: 0 - 0 is +0, and -0 + 0 is +0.
        assert torch.equal(t.nan_to_num(), before.nan_to_num())
        assert torch.equal(t.isnan(), before.isnan())


# ---------------------------------------------------------------------------------- the threads


def jobs() -> dict[str, list[int]]:
    """Return the sizes of tensors that threads have to share: few and many, large and small."""
    drawn = torch.randint(0, 300, (8000,), generator=torch.Generator().manual_seed(13)).tolist()
    return {
        "one": [1_200_001],
        "many": drawn,
        "both": [5, 500_003, *drawn[:1000], 299_999, 1, *drawn[1000:2000], 300_000],
    }


def runtimes() -> set[str]:
    """Return the OpenMP runtimes that this process has loaded."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    names = {Path(line.split()[-1]).name for line in lines if "/" in line}
    return {name for name in names if "omp" in name and ".so" in name}


def some_threads() -> None:
    """In a child: all that threads and forks may do to a job. Prints what it has seen."""
    before = runtimes()
    cpu._PIECE, cpu._SHARE = 1 << 12, 1 << 15  # so that eight find something to do
    turns = itertools.cycle([*zip(PAIRS, (0.3, 0.75, 1e-3, 0.5), strict=True)])
    for name, sizes in jobs().items():
        for (wide, narrow), weight in itertools.islice(turns, 2):
            start = wild(sum(sizes), wide, 14)
            source = wild(sum(sizes), narrow, 15)
            expected, kept = by_torch(start, source, weight)
            sources = source.split(sizes)
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                for _ in range(2):
                    target = start.clone()
                    group = mixer(target.split(sizes), sources)
                    group.lerp(weight)
                    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8)), name
                    assert group.skipped == kept, (name, threads)
        tell(name)
    torch.set_num_threads(2)
    _at_once()
    _forked()
    assert runtimes() == before, "a second OpenMP runtime"
    tell("runtimes", len(before))
    threading.Thread(target=_after_the_main_thread).start()


def _trained(model: nn.Linear, ema: EMA, steps: int) -> bool:
    """Train, after two updates, and say whether the average is what torch makes of the weights."""
    expected = ema.averages["weight"].clone()
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
        expected.lerp_(model.weight.detach(), 0.25)
    return models.bit_identical(ema.averages["weight"], expected)


def _large(seed: int) -> tuple[nn.Linear, EMA]:
    """A model of which several threads take a share, and an average with a plan."""
    torch.manual_seed(seed)
    model = nn.Linear(1024, 1024, bias=False)
    ema = EMA(model, 0.75)
    ema.update()
    ema.update()
    return model, ema


def _at_once() -> None:
    """Several averages, each trained in a thread of its own."""
    results = []
    pairs = [_large(seed) for seed in range(4)]
    threads = [
        threading.Thread(target=lambda pair=pair: results.append(_trained(*pair, steps=10)))
        for pair in pairs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 4, results
    plans, started = [], threading.Barrier(4)
    for seed in range(4):  # the engine itself has no lock
        target, source = wild(1 << 20, torch.float32, seed), wild(1 << 20, torch.float32, seed + 50)
        plans.append((engine.Plan([target], [source]), target, by_torch(target, source, 0.3)))

    def run(plan: engine.Plan) -> None:
        started.wait()
        engine.lerp(plan, 0.3)

    threads = [threading.Thread(target=run, args=(plan,)) for plan, _, _ in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for plan, target, (expected, kept) in plans:
        assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))
        assert plan.skipped() == kept
    tell("at once")


def _forked() -> None:
    """A fork, as a loader of data makes them, has the averages and none of the threads."""
    model, ema = _large(9)
    assert _trained(model, ema, 2)
    before = ema.averages["weight"].clone()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            ema.update()  # with helpers of its own
            torch.set_num_threads(1)  # torch's own are not for forks
            status = int(not _trained(model, ema, 2))
        finally:
            os._exit(status)
    deadline = time.monotonic() + 60
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended == (pid, 0), ended
    assert models.bit_identical(ema.averages["weight"], before)
    assert _trained(model, ema, 2)
    tell("forked")


def _after_the_main_thread() -> None:
    """A thread that goes on training when the program's own is at its end."""
    model, ema = _large(10)
    threading.main_thread().join(60)
    good = not threading.main_thread().is_alive() and _trained(model, ema, 2)
    tell("after the main thread" if good else "wrong")


@on_linux
def test_threads_share_a_job() -> None:
    """1, 2, 3 and 8 threads give the same bits and counts: one tensor, many, and both.

    So do several averages at once, a fork and its parent, and a thread that outlives the main one.
    No OpenMP runtime is loaded beside torch's.
    """
    seen = child("some_threads").splitlines()
    count = int(torch.backends.openmp.is_available())
    told = ["one", "many", "both", "at once", "forked", f"runtimes {count}"]
    assert seen == [*told, "after the main thread"]


@pytest.fixture
def three_threads(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Threads of polyak's own, as where torch has no OpenMP runtime, and in a fork."""
    monkeypatch.setattr(cpu, "_team", lambda: None)
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(1)


@pytest.mark.skipif(not cpu._openmp(), reason="torch has another runtime, or none")
def test_the_threads_of_torch_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as torch has, each of them, and none of polyak's own."""
    torch.set_num_threads(3)
    try:
        t, s = torch.zeros(40 * cpu._SHARE), torch.ones(40 * cpu._SHARE)
        group, asked = mixer([t], [s]), []
        team = cpu._team()

        def told(*arguments: Any) -> None:
            asked.append(arguments[2])
            team(*arguments)

        monkeypatch.setattr(cpu, "_team", lambda: told)
        before = {thread.name for thread in threading.enumerate()}
        for _ in range(4):
            group.lerp(0.5)
            torch.rand(1 << 20).mul_(2.0)  # torch's own work in between
        assert bool((t == 1 - 0.5**4).all())
        assert asked == [3] * 4
        assert {thread.name for thread in threading.enumerate()} == before
        mixer([t[: cpu._SHARE]], [s[: cpu._SHARE]]).lerp(0.5)  # too small to be shared
        assert asked == [3] * 4
    finally:
        torch.set_num_threads(1)


def test_as_many_threads_work_as_torch_has(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work does not begin before three threads are there; a small job wakes nobody."""
    gate, who, work = threading.Barrier(3, timeout=30), [], cpu.Cpu._work

    def meet(self: cpu.Cpu) -> None:
        gate.wait()
        who.append(threading.get_ident())
        work(self)

    monkeypatch.setattr(cpu.Cpu, "_work", meet)
    t, s = torch.zeros(3 * cpu._SHARE), torch.ones(3 * cpu._SHARE)
    mixer([t], [s]).lerp(0.25)
    assert len(who) == len(set(who)) == 3
    assert bool((t == 0.25).all())

    gate, who = threading.Barrier(1), []
    mixer([t[: cpu._SHARE]], [s[: cpu._SHARE]]).lerp(0.25)
    assert who == [threading.get_ident()]


def test_threads_that_cannot_be_had_are_not_needed(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that gives no more threads gets the same average from those that there are."""

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(cpu, "_pools", {})
    monkeypatch.setattr(threading.Thread, "start", refuse)
    model, ema = _large(11)
    assert _trained(model, ema, 2)
    assert ema.clock == 4


def test_a_helper_that_fails_takes_nothing_with_it(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that is out of memory before it has taken a piece leaves all of them to the others.

    Neither this job nor the next one waits for it.
    """
    work = cpu.Cpu._work

    def fail(self: cpu.Cpu) -> None:
        if threading.current_thread().name == "polyak":
            raise MemoryError
        work(self)

    monkeypatch.setattr(cpu, "_pools", {})
    t, s = torch.zeros(3 * cpu._SHARE), torch.ones(3 * cpu._SHARE)
    group = mixer([t], [s])

    def twice() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(cpu.Cpu, "_work", fail)
            group.lerp(0.5)
        group.lerp(0.5)

    runner = threading.Thread(target=twice, daemon=True)  # so that a wait for ever is a failure
    runner.start()
    runner.join(30)
    assert not runner.is_alive()
    assert bool((t == 0.75).all())


def test_threads_that_wait_hold_nothing(three_threads: None) -> None:
    """With the model and its average gone their memory is free, whoever has worked on it."""
    model, ema = _large(12)
    gone = [weakref.ref(x) for x in (model.weight, ema.averages["weight"], ema._plan._groups[0])]
    assert all(ref() is not None for ref in gone)
    del model, ema
    deadline = time.monotonic() + 10  # a helper may be on its way back
    while any(ref() is not None for ref in gone) and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert [ref() for ref in gone] == [None] * 3


def test_a_signal_in_the_middle_comes_after_the_update(
    three_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ctrl-C while threads are at work is raised when all of them are done."""
    model, ema = _large(13)
    expected = torch.lerp(ema.averages["weight"], model.weight.detach() + 1, 0.25)
    work, main = cpu.Cpu._work, threading.main_thread()

    def interrupted(self: cpu.Cpu) -> None:
        if threading.current_thread() is main:
            signal.raise_signal(signal.SIGINT)
        else:
            time.sleep(0.05)
        work(self)

    with torch.no_grad():
        model.weight.add_(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(cpu.Cpu, "_work", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ema.update()
    assert models.bit_identical(ema.averages["weight"], expected)
    assert ema.clock == 3
    assert _trained(model, ema, 2)


# ----------------------------------------------------------------------- which loops are chosen


def every_bit() -> None:
    """In a child: hold the loops that were chosen to all bits, and say which they are."""
    tell(torch.backends.cpu.get_cpu_capability(), cpu.loops().kind)
    for pair in PAIRS:
        test_every_size_at_every_alignment(*pair)
        test_any_bits_by_any_weight(*pair)
        test_what_is_not_finite_and_what_becomes_so(*pair)
    for narrow in (torch.float16, torch.bfloat16):
        test_every_half_there_is(narrow)
    tell("all bits")


def widest() -> int:
    """Return the widest loops with one rounding that this processor runs; 0 if none."""
    return max(kind for kind in cpu._KINDS if cpu.loops().dll.polyak_runs(kind))


@on_x86
def test_the_loops_round_as_torch_does_here() -> None:
    """Twice where torch has no fused multiply-add, else once and as wide as the processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    assert cpu.loops().kind == (0 if capability == "DEFAULT" else widest())


@on_x86
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_loops_round_as_torch_is_told_to(capability: str) -> None:
    """Under ATEN_CPU_CAPABILITY torch rounds otherwise, and so do the loops, to the last bit."""
    if not widest():
        pytest.skip("this processor has no fused multiply-add")
    kind = 0 if capability == "default" else widest()
    seen = child("every_bit", ATEN_CPU_CAPABILITY=capability).splitlines()
    assert seen == [f"{capability.upper()} {kind}", "all bits"]


def test_the_search_leaves_everything_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No generator is seeded, of any device; the default device and dtype do not matter."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the random numbers of training are not to be touched")

    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    state, found = torch.get_rng_state(), cpu.loops()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert cpu._search().kind == found.kind
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_device_is_for_others() -> None:
    """An update of weights in host memory while tensors are made elsewhere by default."""
    model = nn.Linear(3, 3)
    ema = EMA(model, 0.5)
    ema.update()
    with torch.device("meta"):
        with torch.no_grad():
            model.bias[1] = torch.nan
        ema.update()
        with pytest.warns(UserWarning, match="1 elements of the weights were not finite"):
            assert ema.report().nonfinite == 1
    assert ema.averages["bias"].device.type == "cpu"


# ----------------------------------------------------------------------- without the right loops


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path | None], None]:
    """Let polyak find another library, or none."""

    def find(path: Path | None) -> None:
        real = importlib.util.find_spec
        spec = path and importlib.machinery.ModuleSpec("_lerp", None, origin=str(path))
        monkeypatch.setattr(cpu, "_found", [])
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: spec if name == "polyak.engine._lerp" else real(name, *rest),
        )

    return find


def by_foreach(reason: str) -> None:
    """Hold a small run to foreach, and its report to the reason."""
    model = models.convolutional()
    emas = [EMA(model, 0.9), EMA(model, 0.9, into=models.convolutional(1))]
    for seed in range(3):
        models.walk_(model, seed)
        for ema in emas:
            ema.update()
    for ema in emas:
        assert ema.report().paths == (f"foreach ({reason})",)
    targets, sources = [torch.zeros(70)], [torch.ones(70)]
    engine.lerp(engine.Plan(targets, sources), 0.25)
    assert targets[0].tolist() == [0.25] * 70
    with pytest.raises(RuntimeError, match=r"there is no compiled loop: .*; use the path foreach"):
        cpu.Cpu(targets, sources)


def test_without_a_library_all_is_done_by_torch(library: Callable[[Path | None], None]) -> None:
    library(None)
    by_foreach("no compiler when polyak was installed")


def test_a_file_that_is_no_library_is_not_used(
    library: Callable[[Path | None], None], tmp_path: Path
) -> None:
    """One that was cut off, or is of another machine, is named with the loader's own words."""
    (tmp_path / "lerp.so").write_bytes(b"\x7fELF and no more")
    library(tmp_path / "lerp.so")
    assert cpu.obstacle().startswith("the compiled loops cannot be loaded: ")
    by_foreach(cpu.obstacle())


@compiled
def test_a_library_without_the_functions_is_not_used(
    library: Callable[[Path | None], None], tmp_path: Path
) -> None:
    """What an older build has left behind has other functions, or none."""
    (tmp_path / "other.c").write_text("int other(void) { return 1; }")
    library(built(tmp_path / "other.c", tmp_path / "other.so", "-shared", "-fPIC"))
    assert cpu.obstacle().startswith("the compiled loops cannot be loaded: ")
    by_foreach(cpu.obstacle())


# What a compiler, its flags or a mistake could make of the loops: old text, new text.
OTHERWISE = {
    "two roundings": ("__builtin_fmaf(a, b, c)", "((a) * (b) + (c))"),
    "two roundings of doubles": ("__builtin_fma(a, b, c)", "((a) * (b) + (c))"),
    "one form": ("if (weight < (TYPE)0.5) {", "if (weight < (TYPE)2) {"),
    "no subnormal halves": ("(rest < 0x0400u ? small : shifted)", "shifted"),
    "truncated": ("(uint32_t)value << 16", "(uint32_t)(value & 0xfff0u) << 16"),
    "mul and add": ("FMA##_##TYPE(weight, s - t, t)", "(t * (1 - weight) + s * weight)"),
    "a vector short": ("for (int64_t i = 0; i < run;", "for (int64_t i = 0; i < run / 4 * 4;"),
    "no subnormal floats": (
        "const TYPE result = RESULT;",
        "const TYPE r = RESULT, result = r < (TYPE)1e-38 && r > (TYPE)-1e-38 ? 0 : r;",
    ),
}


@compiled
@pytest.mark.parametrize("change", OTHERWISE)
def test_a_library_that_rounds_otherwise_is_not_used(
    library: Callable[[Path | None], None], tmp_path: Path, change: str
) -> None:
    """Whatever has become of the loops on the way: they do what torch does, or nothing."""
    if not cpu.loops().kind:
        pytest.skip("this torch rounds twice, as some of these do")
    old, new = OTHERWISE[change]
    text = SOURCE.read_text()
    assert text.count(old) == 1
    (tmp_path / "lerp.c").write_text(text.replace(old, new))
    library(built(tmp_path / "lerp.c", tmp_path / "lerp.so", "-O1", "-shared", "-fPIC"))
    capability = torch.backends.cpu.get_cpu_capability()
    assert cpu.obstacle() == f"no compiled loop rounds as torch does ({capability})"
    by_foreach(cpu.obstacle())


@compiled
def test_the_same_source_compiled_anew_is_used(
    library: Callable[[Path | None], None], tmp_path: Path
) -> None:
    """The tests above refuse what was changed, not what was compiled in a test."""
    kind = cpu.loops().kind
    library(built(SOURCE, tmp_path / "lerp.so", "-O1", "-shared", "-fPIC"))
    assert cpu.obstacle() == ""
    assert cpu.loops().kind == kind


# --------------------------------------------------------------------------------- the pointers


class Weights(nn.Module):
    """Tensors of one dimension, of two and of four, and a part; large enough to be mapped alone."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(300, 300))
        self.vector = nn.Parameter(torch.randn(300))
        kernel = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
        self.kernel = nn.Parameter(kernel)
        self.part = nn.Linear(30, 3)
        self.to(dtype)


class Run:
    """A model in training with its average, in a teacher or not, and what that has to be.

    With a weight of 1/4 the product is exact, so that all forms and paths give the same bits.
    """

    def __init__(self, dtype: torch.dtype, taught: bool, folder: Path) -> None:
        torch.manual_seed(15)
        self.dtype, self.folder, self.model = dtype, folder, Weights(dtype)
        self.teacher = Weights(torch.float32) if taught else None
        self.ema = EMA(self.model, 0.75, into=self.teacher)
        for _ in range(2):
            self.ema.update()
        self.average = dict(self.ema.averages)["matrix"]
        self.expected = {name: a.clone() for name, a in self.ema.averages.items()}
        self.trains()  # so that the next update has something to do

    def fresh(self, *shape: int) -> Tensor:
        """Return a weight that the model has not."""
        return torch.randn(*shape).to(self.dtype)

    def sees(self) -> None:
        """Update, and hold the averages to what the model's tensors are now."""
        self.ema.update()
        for name, parameter in self.model.named_parameters():
            average = self.expected[name]
            average += 0.25 * (parameter.detach().float() - average)
        assert models.bit_identical(dict(self.ema.averages), self.expected)
        if self.teacher is not None:
            held = {n: p.detach().float() for n, p in self.teacher.named_parameters()}
            assert models.bit_identical(held, self.expected)

    def trains(self) -> None:
        """Give every weight another value, in place."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape))

    def goes_on(self) -> None:
        """Train and update twice more."""
        for _ in range(2):
            self.trains()
            self.sees()

    def refuses(self, message: str, *apart: str) -> None:
        """Update in vain: an error, and no average has changed, but for those without memory."""
        clock = self.ema.clock
        with pytest.raises(ValueError, match=message):
            self.ema.update()
        assert self.ema.clock == clock
        kept = {n: a for n, a in self.ema.averages.items() if n not in apart}
        assert models.bit_identical(kept, {n: self.expected[n] for n in kept})


FREED = "was freed or shrunk"
ALONE: dict[str, Callable[[Run], None]] = {}  # what may be done to a model and its averages
TAUGHT: dict[str, Callable[[Run], None]] = {}  # to a teacher


def between(changes: dict[str, Callable[[Run], None]]) -> Callable[..., Any]:
    """Let a function be one of the things that are done between two updates."""

    def declare(change: Callable[[Run], None]) -> Callable[[Run], None]:
        changes[change.__name__] = change
        return change

    return declare


def shrinks(run: Run, tensor: Tensor, name: str, *apart: str) -> None:
    """Take all, half and less than half of a tensor's memory, and give it back.

    Half is taken twice, so that it may be where the whole was: a pointer would not show it.
    """
    storage = tensor.untyped_storage()
    whole = storage.nbytes()
    for sizes in ([0], [whole // 2], [0, whole // 2], [whole // 3, whole // 2], [whole - 1]):
        values = tensor.detach().clone()
        for size in sizes:
            storage.resize_(size)
        run.refuses(FREED, *apart)
        storage.resize_(whole)
        with torch.no_grad():
            tensor.copy_(values)
        run.sees()


@between(ALONE)
def new_data(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.data = torch.randn_like(parameter)
    run.sees()


@between(ALONE)
def transposed_data(run: Run) -> None:
    run.model.matrix.data = run.model.matrix.data.t()
    run.sees()
    run.model.matrix.data = run.model.matrix.data.t()
    run.sees()


@between(ALONE)
def other_strides(run: Run) -> None:
    run.model.to(memory_format=torch.contiguous_format)
    run.sees()
    run.model.to(memory_format=torch.channels_last)
    run.sees()


@between(ALONE)
def data_in_the_middle_of_something(run: Run) -> None:
    run.model.matrix.data = run.fresh(400, 301)[50:350, 1:]
    run.sees()
    run.model.matrix.data = run.fresh(400, 300)[50:350]
    run.sees()


@between(ALONE)
def data_in_one_flat_tensor(run: Run) -> None:
    count = sum(parameter.numel() for parameter in run.model.parameters())
    flat = run.fresh(count)
    nn.utils.vector_to_parameters(flat, run.model.parameters())
    run.sees()
    flat.mul_(2.0)
    run.sees()
    flat.untyped_storage().resize_(0)
    run.refuses(FREED)
    flat.untyped_storage().resize_(count * flat.itemsize)
    flat.fill_(1.0)
    run.sees()


@between(ALONE)
def fewer_rows(run: Run) -> None:
    whole = run.model.matrix.data
    run.model.matrix.data = whole[:5]
    run.refuses(r"matrix: was \(300, 300\), is \(5, 300\)")
    run.model.matrix.data = whole
    run.sees()


@between(ALONE)
def another_dtype(run: Run) -> None:
    run.model.half()
    run.refuses("matrix: was torch.*, is torch.float16")
    run.model.to(run.dtype)
    run.sees()


@between(ALONE)
def another_dtype_and_back(run: Run) -> None:
    run.model.double().to(run.dtype)
    run.sees()


@between(ALONE)
def another_dtype_and_back_by_swapping(run: Run) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        run.model.double().to(run.dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    run.sees()


@between(ALONE)
def swapped_tensors(run: Run) -> None:
    other = nn.Parameter(run.fresh(300, 300))
    torch.utils.swap_tensors(run.model.matrix, other)
    run.sees()
    other.data.untyped_storage().resize_(0)
    run.sees()


@between(ALONE)
def no_memory(run: Run) -> None:
    for name in ("matrix", "vector", "kernel"):
        shrinks(run, getattr(run.model, name), name)


@between(ALONE)
def set_to_nothing(run: Run) -> None:
    for name in ("matrix", "vector"):
        parameter = getattr(run.model, name)
        shape = tuple(parameter.shape)
        with torch.no_grad():
            parameter.set_()
        run.refuses(rf"{name}: was \({shape[0]},.*\), is \(0,\)")
        with torch.no_grad():
            parameter.set_(run.fresh(*shape))
        run.sees()


@between(ALONE)
def a_part_made_anew(run: Run) -> None:
    del run.model.part
    gc.collect()
    run.model.part = nn.Linear(30, 3).to(run.dtype)
    run.sees()
    run.model.part.weight = nn.Parameter(run.fresh(3, 30))
    run.sees()


@between(ALONE)
def memory_that_others_get(run: Run) -> None:
    for parameter in run.model.parameters():
        parameter.data = torch.randn_like(parameter)
    run.sees()  # this lets go of what was there before
    gc.collect()
    others = [run.fresh(300, 300) for _ in range(8)]
    before = [other.clone() for other in others]
    run.goes_on()
    assert models.bit_identical(others, before)


@between(ALONE)
def shared_memory(run: Run) -> None:
    run.model.share_memory()
    assert run.model.matrix.is_shared()
    run.sees()
    for average in run.ema.averages.values():
        average.share_memory_()
    run.sees()


@between(ALONE)
def a_file_as_memory(run: Run) -> None:
    path = run.folder / "weights.pt"
    torch.save({name: torch.randn_like(p) for name, p in run.model.named_parameters()}, path)
    state = torch.load(path, mmap=True)
    run.model.load_state_dict(state, assign=True)
    del state
    path.unlink()
    run.sees()


@between(ALONE)
def a_file_that_cannot_be_written(run: Run) -> None:
    path = run.folder / "weights"
    values = run.fresh(300, 300)
    path.write_bytes(bytearray(values.view(torch.uint8).numpy()))
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that it cannot write
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        run.model.matrix.data = torch.frombuffer(memory, dtype=run.dtype).view(300, 300)
    path.unlink()
    run.sees()
    assert models.bit_identical(run.model.matrix.data, values)
    run.model.matrix.data = values


@between(ALONE)
def no_data_at_all(run: Run) -> None:
    values = run.model.state_dict()
    run.model.to("meta")
    run.refuses("are on the meta device and have no values to average")
    run.model.to_empty(device="cpu").load_state_dict(values)
    run.sees()


@between(ALONE)
def an_average_of_another_shape(run: Run) -> None:
    run.average.resize_(5, 3)
    run.refuses(r"matrix: was \(5, 3\), is \(300, 300\)", "matrix")
    run.average.resize_(400, 400)  # moves
    run.refuses(r"matrix: was \(400, 400\), is \(300, 300\)", "matrix")
    run.average.resize_(300, 300)
    run.sees()


@between(ALONE)
def an_average_without_memory(run: Run) -> None:
    for name, average in run.ema.averages.items():
        shrinks(run, average, name, name)


@between(ALONE)
def an_average_elsewhere(run: Run) -> None:
    for average in run.ema.averages.values():
        kept = average.data
        average.data = average.data.clone()
        before = kept.clone()
        run.sees()
        assert models.bit_identical(kept, before)


@between(TAUGHT)
def a_teacher_with_new_data(run: Run) -> None:
    kept = [parameter.data for parameter in run.teacher.parameters()]
    before = [value.clone() for value in kept]
    for parameter in run.teacher.parameters():
        parameter.data = parameter.data.clone()
    run.sees()
    run.goes_on()
    assert models.bit_identical(kept, before)


@between(TAUGHT)
def a_teacher_that_lies_otherwise(run: Run) -> None:
    run.teacher.matrix.data = run.teacher.matrix.data.t().contiguous().t()
    run.sees()
    run.teacher.matrix.data = run.teacher.matrix.data.t()
    run.expected["matrix"] = run.expected["matrix"].t().contiguous()
    run.sees()


@between(TAUGHT)
def a_teacher_without_memory(run: Run) -> None:
    for name, parameter in run.teacher.named_parameters():
        shrinks(run, parameter, name, name)


@between(TAUGHT)
def a_teacher_swapped(run: Run) -> None:
    other = nn.Parameter(run.teacher.matrix.detach().clone(), requires_grad=False)
    torch.utils.swap_tensors(run.teacher.matrix, other)
    before = other.clone()
    run.sees()
    assert models.bit_identical(other, before)


@between(TAUGHT)
def a_teacher_made_anew(run: Run) -> None:
    state = run.teacher.part.state_dict()
    del run.teacher.part
    gc.collect()
    run.teacher.part = nn.Linear(30, 3).requires_grad_(False)
    run.teacher.part.load_state_dict(state)
    run.sees()


@between(TAUGHT)
def a_teacher_whose_memory_others_get(run: Run) -> None:
    for parameter in run.teacher.parameters():
        parameter.data = parameter.data.clone()
    run.sees()
    gc.collect()
    others = [torch.randn(300, 300) for _ in range(8)]
    before = [other.clone() for other in others]
    run.goes_on()
    assert models.bit_identical(others, before)


@between(TAUGHT)
def a_teacher_in_shared_memory(run: Run) -> None:
    run.teacher.share_memory()
    run.sees()
    assert run.teacher.matrix.is_shared()


@between(TAUGHT)
def a_teacher_converted(run: Run) -> None:
    run.teacher.double()
    run.ema.update()
    run.teacher.float()
    for name, parameter in run.model.named_parameters():
        run.expected[name] += 0.25 * (parameter.detach().float() - run.expected[name])
    run.sees()


CHANGES = [(change, False) for change in ALONE.values()] + [(c, True) for c in TAUGHT.values()]


def happens(change: Callable[[Run], None], taught: bool, dtype: torch.dtype, folder: Path) -> None:
    """Let something happen between two updates of a run."""
    run = Run(dtype, taught, folder)
    change(run)
    run.goes_on()
    assert run.ema.report().nonfinite == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("change", "taught"), CHANGES, ids=lambda x: getattr(x, "__name__", ""))
def test_what_happens_to_memory_between_two_updates(
    change: Callable[[Run], None], taught: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """An update reads and writes what is the model's now, or refuses and says why.

    Nothing is read or written that was the model's once; see the sanitizers below.
    """
    happens(change, taught, dtype, tmp_path)


@pytest.mark.parametrize("layout", ["dense", "every second column"])
def test_a_first_update_of_freed_memory_is_refused(layout: str) -> None:
    """The copying update looks at the memory before it reads it."""
    model = nn.Module()
    whole = torch.ones(400, 400)
    model.weight = nn.Parameter(whole if layout == "dense" else whole[:, ::2])
    ema = EMA(model, 0.5)
    whole.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=FREED):
        ema.update()
    assert ema.clock == 0
    whole.untyped_storage().resize_(4 * 400 * 400)
    whole.fill_(2.0)
    ema.update()
    assert bool((ema.averages["weight"] == 2.0).all())


def test_what_was_refused_once_follows_again() -> None:
    """A frozen part whose memory was away for an update is copied to the teacher by the next."""
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].requires_grad_(False)
    teacher = copy.deepcopy(student)
    ema = EMA(student, 0.5, into=teacher, policy=trainable)
    student[1].weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=FREED):
        ema.update()
    student[1].weight.untyped_storage().resize_(4 * 4 * 4)
    with torch.no_grad():
        student[1].weight.fill_(7.0)
    ema.update()
    assert torch.equal(teacher[1].weight, student[1].weight)


# ------------------------------------------------------------------------------- the sanitizers


def runtime(name: str) -> Path | None:
    """Return the library of a sanitizer, where the compiler has one."""
    command = [COMPILER, f"-print-file-name={name}"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return Path(found) if COMPILER and Path(found).is_absolute() else None


def sanitized() -> None:
    """Load the loops that the sanitizer watches, in place of those of the installation."""
    real, path = importlib.util.find_spec, os.environ["LERP"]
    spec = importlib.machinery.ModuleSpec("_lerp", None, origin=path)
    importlib.util.find_spec = lambda name, *rest: (  # type: ignore[assignment]
        spec if name == "polyak.engine._lerp" else real(name, *rest)
    )
    cpu._found.clear()
    assert cpu.obstacle() == ""
    assert cpu.loops().dll._name == path


def everything_that_happens() -> None:
    """In a child under a sanitizer: all that may happen to memory between two updates."""
    sanitized()
    with tempfile.TemporaryDirectory() as folder:
        dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float16])
        for (change, taught), dtype in zip(CHANGES, dtypes, strict=False):
            happens(change, taught, dtype, Path(folder))
    for pair in PAIRS:
        test_every_size_at_every_alignment(*pair)
    test_memory_that_no_number_would_be_put_at(cpu.loops().kind)
    tell("all that happens")


def a_stale_pointer() -> None:
    """In a child under a sanitizer: what must never be, done by hand."""
    sanitized()
    t, s = torch.zeros(1000), torch.ones(1000)
    group = mixer([t], [s])
    s.untyped_storage().resize_(0)
    group.lerp(0.5)
    tell("not seen")


@pytest.fixture(scope="module")
def address_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which loops run whose every access is looked at."""
    library = runtime("libasan.so")
    if library is None:
        pytest.skip("this compiler has no AddressSanitizer to load into Python")
    path = tmp_path_factory.mktemp("address") / "lerp.so"
    built(SOURCE, path, "-O1", "-g", "-fsanitize=address", "-shared", "-fPIC")
    return {"LD_PRELOAD": str(library), "ASAN_OPTIONS": "detect_leaks=0", "LERP": str(path)}


@compiled
@on_linux
def test_no_access_beside_the_memory(address_sanitizer: dict[str, str]) -> None:
    """AddressSanitizer finds nothing, whatever happens to memory, at any size and alignment."""
    assert child("everything_that_happens", **address_sanitizer) == "all that happens\n"


@compiled
@on_linux
def test_the_sanitizer_sees_a_stale_pointer(address_sanitizer: dict[str, str]) -> None:
    """The test above can fail."""
    process = ended("a_stale_pointer", **address_sanitizer)
    assert process.returncode != 0
    assert "heap-use-after-free" in process.stderr
    assert "lerp.c" in process.stderr
    assert process.stdout == ""


# Three threads over pieces of a few elements do what one call does over the whole.
DRIVER = """
#include "lerp.c"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

static int kind, source;

static void *help(void *work) {
    polyak_lerp(work);
    return NULL;
}

static void *noise(size_t bytes, unsigned *seed) {
    unsigned char *memory = malloc(bytes ? bytes : 1);
    for (size_t i = 0; i < bytes; i++)
        memory[i] = (unsigned char)((*seed = *seed * 1664525u + 1013904223u) >> 24);
    return memory;
}

static int check(int64_t size, int64_t piece, double weight) {
    enum { TENSORS = 4 };
    const size_t wide = source == 3 ? 8 : 4, narrow = source == 1 || source == 2 ? 2 : wide;
    const int64_t sizes[TENSORS] = {size, 0, size + 1, 3};
    void *targets[TENSORS], *expected[TENSORS];
    const void *sources[TENSORS];
    int64_t ends[TENSORS], end = 0, skipped = 0, kept = 0;
    unsigned seed = (unsigned)(size * 31 + piece);
    int wrong = 0;
    for (int i = 0; i < TENSORS; i++) {
        const size_t bytes = (size_t)sizes[i] * wide;
        ends[i] = end += sizes[i];
        targets[i] = noise(bytes, &seed);
        sources[i] = noise((size_t)sizes[i] * narrow, &seed);
        memcpy(expected[i] = malloc(bytes ? bytes : 1), targets[i], bytes);
        kept += loops[kind][source](expected[i], sources[i], sizes[i], weight);
    }
    job work = {TENSORS, targets, sources, ends, piece, weight, &skipped, 0, kind, source};
    pthread_t helpers[2];
    for (int i = 0; i < 2; i++)
        pthread_create(&helpers[i], NULL, help, &work);
    help(&work);
    for (int i = 0; i < 2; i++)
        pthread_join(helpers[i], NULL);
    for (int i = 0; i < TENSORS; i++) {
        wrong |= memcmp(targets[i], expected[i], (size_t)sizes[i] * wide) != 0;
        free(targets[i]);
        free((void *)sources[i]);
        free(expected[i]);
    }
    return wrong || skipped != kept;
}

int main(void) {
    const int64_t sizes[] = {0, 1, 2, 7, 15, 16, 17, 33, 70, 4095, 4097}, pieces[] = {1, 7, 4096};
    job nothing = {0, NULL, NULL, NULL, 1, 0.5, NULL, 0, 0, 0};
    int wrong = 0, done = 0;
    polyak_lerp(&nothing);
    for (kind = 0; kind < 3; kind++)
        for (source = 0; source < 4 && polyak_runs(kind); source++)
            for (int i = 0; i < 11; i++)
                for (int j = sizes[i] > 100; j < 3; j++, done++)
                    wrong |= check(sizes[i], pieces[j], 0.3) | check(sizes[i], pieces[j], 0.75);
    printf("%s\\n", wrong ? "differs" : done ? "equal" : "nothing was run");
    return wrong;
}
"""


@compiled
@on_linux
@pytest.mark.parametrize("sanitizer", ["undefined", "address", "thread"])
def test_the_loops_alone_under_a_sanitizer(sanitizer: str, tmp_path: Path) -> None:
    """No undefined behavior, no access beside a tensor, no race between threads."""
    flags = ["-O1", "-g", "-pthread", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = [COMPILER, *flags, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    tried = subprocess.run(command, capture_output=True, timeout=120).returncode
    if tried or subprocess.run(tmp_path / "empty", capture_output=True, timeout=60).returncode:
        pytest.skip(f"nothing runs here with -fsanitize={sanitizer}")
    built(tmp_path / "driver.c", tmp_path / "driver", *flags, f"-I{SOURCE.parent}", "-lm")
    done = subprocess.run(tmp_path / "driver", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "equal\n"), done.stderr


# -------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("path", [cpu.Cpu, foreach.Foreach], ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_backward_through_what_was_updated_is_refused(
    path: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after any write in place, torch says that what it has saved is no longer there.

    Without it the gradients would be those of other weights than the forward's, and no error.
    """
    monkeypatch.setattr(engine, "_PATHS", (path, foreach.Foreach))
    student = nn.Linear(3, 3).to(dtype)
    teacher = nn.Linear(3, 3)
    ema = EMA(student, 0.5, into=teacher)
    ema.update()
    version = teacher.weight._version
    x = torch.ones(2, 3, requires_grad=True)
    through = teacher(x), nn.functional.linear(x, ema.averages["weight"])
    ema.update()
    assert ema.report().paths == (path.name,)
    assert teacher.weight._version == ema.averages["weight"]._version == version + 1
    for output in through:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
    teacher(x).sum().backward()  # one that was made after the update is right
    assert torch.equal(x.grad, teacher.weight.sum(0).expand(2, 3))


def test_an_update_that_does_nothing_leaves_graphs_alone() -> None:
    """With a weight of 0 nothing is written, and a backward goes on."""
    t, s = torch.randn(3), torch.full((3,), torch.nan)
    plan = engine.Plan([t], [s], cpu.Cpu)
    for weight in (0.0, torch.tensor(0.0)):
        engine.lerp(plan, weight)
    assert (t._version, plan.skipped()) == (0, 0)


def test_averages_of_inference_tensors_are_updated() -> None:
    """A model that was built in inference mode has tensors without a version."""
    with torch.inference_mode():
        t, s = torch.zeros(5), torch.ones(5)
        engine.lerp(engine.Plan([t], [s], cpu.Cpu), 0.25)
    engine.lerp(engine.Plan([t], [s], cpu.Cpu), 0.25)
    assert t.tolist() == [0.4375] * 5


# --------------------------------------------------------------------------------- which go where

PLACES: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.mT.contiguous().mT,
    "reversed": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "a window": lambda t: nn.functional.pad(t, (1, 2))[..., 1:-2],
    "every second": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@every_pair
@pytest.mark.parametrize("there", PLACES)
@pytest.mark.parametrize("here", PLACES)
def test_pairs_that_lie_alike_are_mixed_in_one_pass(
    wide: torch.dtype, narrow: torch.dtype, here: str, there: str
) -> None:
    """Those that fill their memory in the same order; others go to foreach. Both are right."""
    t = PLACES[here](torch.randn(3, 4, 5, 6, dtype=wide))
    s = PLACES[there](torch.randn(3, 4, 5, 6, dtype=wide).to(narrow))
    dense = here == there and here not in ("a window", "every second")
    expected = t + 0.25 * (s.to(wide) - t)  # exact but for one rounding each, see `Run`
    plan = engine.Plan([t], [s])
    engine.lerp(plan, 0.25)
    assert plan.paths == ["cpu" if dense else "foreach"]
    assert torch.equal(t, expected)


def test_a_plan_uses_both_paths() -> None:
    """Each tensor goes where it can, and the counts add up."""
    names = [*itertools.product(PLACES, PLACES)]
    targets = [PLACES[here](torch.randn(3, 4, 5, 6)) for here, _ in names]
    sources = [PLACES[there](torch.randn(3, 4, 5, 6)) for _, there in names]
    for number, source in enumerate(sources):
        source[0, 0, 0, : number % 5] = torch.nan
    kept = [s.isnan() for s in sources]
    expected = [
        torch.where(k, t, t + 0.25 * (s - t))
        for t, s, k in zip(targets, sources, kept, strict=True)
    ]
    plan = engine.Plan(targets, sources)
    engine.lerp(plan, 0.25)
    assert plan.paths == ["cpu", "foreach"]
    assert all(map(torch.equal, targets, expected))
    assert plan.skipped() == sum(int(k.sum()) for k in kept) > 50


@pytest.mark.parametrize(
    ("target", "source", "path"),
    [
        (torch.complex64, torch.complex64, "cpu"),
        (torch.complex128, torch.complex128, "cpu"),
        (torch.complex128, torch.complex64, "foreach"),
        (torch.float64, torch.float32, "foreach"),
        (torch.float64, torch.bfloat16, "foreach"),
        (torch.float32, torch.float64, "foreach"),
        (torch.float32, torch.float8_e4m3fn, "foreach"),
    ],
    ids=str,
)
def test_pairs_of_dtypes_that_go_elsewhere(
    target: torch.dtype, source: torch.dtype, path: str
) -> None:
    """Complex numbers are two real ones; what has no loop is foreach's."""
    t, s = torch.randn(3, 5).to(target), torch.randn(3, 5).to(source)
    expected = t + 0.25 * (s.to(target) - t)
    plan = engine.Plan([t], [s])
    engine.lerp(plan, 0.25)
    assert plan.paths == [path]
    assert torch.equal(t, expected)
