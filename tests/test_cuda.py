"""The Triton kernel: the same results as torch, bit for bit, and what it promises beyond them.

Without a GPU its logic runs in Triton's interpreter, on CPU tensors, in a child process, since the
interpreter is chosen where Triton is imported; and it is compiled for GPUs that are not here. With
a GPU the same laws run on it, and those that only a GPU can show.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from polyak import engine
from polyak.engine import foreach
from polyak.engine.reference import Reference
from syncs import no_sync
from test_engine import POISON, SHAPES, WRITABLE, _assert_within_2_ulp, _expanded, _random

triton = pytest.importorskip("triton", reason="Triton, of which this is a kernel, is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from polyak.engine import cuda, triton_lerp  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"

NEEDS_A_GPU = "only a GPU can show it"
NOT_COMPILED = "nothing is compiled in the interpreter"
IN_THE_PARENT = "this is the child, or there is no need of one"
ROUNDS_TWICE = "torch rounds twice on this CPU"

law = pytest.mark.skipif(
    not (INTERPRETED or ON_GPU), reason="runs in the child with the interpreter, or on a GPU"
)
on_a_gpu = pytest.mark.skipif(not ON_GPU, reason=NEEDS_A_GPU)
# numpy, in which the interpreter computes, warns of what the guard is for.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

FLOATS = [torch.float32, torch.float64]
SOURCES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtype_pairs = pytest.mark.parametrize(
    ("target", "source"),
    [(t, s) for t in FLOATS for s in SOURCES],
    ids=lambda dtype: str(dtype).removeprefix("torch."),
)
B, S = cuda.BLOCK, cuda.STEP
EDGES = [1, 7, S - 1, S, S + 1, B - 1, B, B + 1, 2 * B, 3 * B + 5]
WEIGHTS = [1e-4, 0.3, 0.5 - 2**-25, 0.5, 0.7, 1 - 2**-24, 1.0]

# ------------------------------------------------------------------------- what torch would give


def _fused(dtype: np.dtype) -> Callable[..., np.ndarray]:
    """Return C's fused multiply-add, which rounds once, over arrays of one dtype."""
    number = ctypes.c_float if dtype == np.float32 else ctypes.c_double
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    function = libm.fmaf if dtype == np.float32 else libm.fma
    function.argtypes, function.restype = [number] * 3, number
    return lambda x, y, z: np.asarray(np.frompyfunc(function, 3, 1)(x, y, z), dtype)


def _lerp_of_torch(target: Tensor, source: Tensor, weight: float) -> Tensor:
    """Return torch's lerp as its CUDA kernels round it, of a source that has been cast."""
    if ON_GPU:
        return torch.lerp(target, source, weight)
    t, s = target.numpy(), source.numpy()
    w = t.dtype.type(weight)
    with np.errstate(all="ignore"):
        fma = _fused(t.dtype)
        mixed = fma(w, s - t, t) if abs(w) < 0.5 else fma(-(s - t), 1 - w, s)
    return torch.from_numpy(mixed)


def _expected(target: Tensor, source: Tensor, weight: float) -> Tensor:
    if torch.tensor(weight, dtype=target.dtype) == 0:  # also what is so small that it rounds to 0
        return target.clone()
    mixed = _lerp_of_torch(target, source.to(target.dtype), weight)
    return torch.where(mixed.isfinite(), mixed, target)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter have tensors of the CPU, and a multiply-add that rounds once.

    In some versions its own rounds twice, and the path would refuse it.
    """
    if INTERPRETED:
        from triton.runtime import interpreter

        def create_fma(self: object, x: Any, y: Any, z: Any) -> Any:
            fused = _fused(z.data.dtype)(x.data, y.data, z.data)
            return interpreter.TensorHandle(fused, z.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)
        monkeypatch.setattr(cuda, "_DEVICE", "cpu")
        monkeypatch.setattr(cuda, "obstacle", lambda *of: "")


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two steps of 16 elements, so that small tensors have several."""
    monkeypatch.setattr(cuda, "BLOCK", 32)
    monkeypatch.setattr(cuda, "STEP", 16)


@pytest.mark.skipif(ON_GPU, reason="torch itself is asked on a GPU")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_torch_would_give_is_what_it_gives(dtype: torch.dtype) -> None:
    """`_lerp_of_torch` is torch's own lerp where the CPU has a fused multiply-add (but for -0)."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip(ROUNDS_TWICE)
    generator = torch.Generator().manual_seed(0)
    t, s = (_random((1000,), dtype, generator) for _ in range(2))
    for weight in WEIGHTS:
        assert torch.equal(_lerp_of_torch(t, s, weight), torch.lerp(t, s, weight))


@pytest.mark.skipif(INTERPRETED or ON_GPU, reason=IN_THE_PARENT)
def test_the_laws_hold_in_the_interpreter() -> None:
    """Every law below, in a process of its own: none fails, and none but a GPU's is skipped."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", __file__],
        env={**environment, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert int(re.search(r"(\d+) passed", child.stdout)[1]) > 40, child.stdout
    reasons = set(re.findall(r"SKIPPED .*: (.*)", child.stdout))
    assert reasons <= {NEEDS_A_GPU, NOT_COMPILED, IN_THE_PARENT, ROUNDS_TWICE}


# ---------------------------------------------------------------------------------- compilation


@pytest.mark.skipif(INTERPRETED, reason=NOT_COMPILED)
@pytest.mark.parametrize("capability", [80, 90, 100])
@dtype_pairs
def test_it_compiles_for_gpus_that_are_not_here(
    capability: int,
    target: torch.dtype,
    source: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is launched: loads and stores of 16 bytes, one rounding, nothing flushed or spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    how = cuda.launch(target, source)
    constants = {name: how[name] for name in how if name.isupper()}
    compiled = triton.compile(
        ASTSource(
            triton_lerp.lerp,
            {"table": "*i64", "owner": "*i32", "weight": "*fp64", "skipped": "*i64"}
            | dict.fromkeys(constants, "constexpr"),
            constants,
            {(i,): [["tt.divisibility", 16]] for i in (0, 1, 3)},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={name: how[name] for name in how if not name.isupper()},
    )
    ptx = compiled.asm["ptx"]
    wide = "v4.b32" if target == torch.float32 else "v2.b64"
    assert f"ld.global.{wide}" in ptx
    assert f"st.global.{wide}" in ptx
    bits = 8 * target.itemsize
    assert f"fma.rn.f{bits}" in ptx
    assert ".ftz" not in ptx
    assert ".local" not in ptx
    assert re.search(r"(atom|red)\.global\.gpu\.relaxed\.add\.u64", ptx)
    assert compiled.asm["cubin"]


# --------------------------------------------------------------------------------------- values


@law
@pytest.mark.usefixtures("_small_blocks")
@dtype_pairs
@given(data=st.data())
def test_it_is_torchs_lerp_bit_for_bit(
    target: torch.dtype, source: torch.dtype, data: st.DataObject
) -> None:
    """Law 1, and more: many tensors, any layout and weight, the bits of torch's CUDA lerp."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shapes = data.draw(
        st.lists(st.sampled_from([*SHAPES, (31,), (32,), (33,), (5, 21)]), min_size=1, max_size=8)
    )
    targets, sources = [], []
    for shape in shapes:
        put = data.draw(st.sampled_from(WRITABLE))
        take = data.draw(st.sampled_from([put, *WRITABLE, _expanded]))
        targets.append(put(_random(shape, target, generator).to(DEVICE)))
        sources.append(take(_random(shape, source, generator).to(DEVICE)))
    weight = data.draw(st.sampled_from(WEIGHTS) | st.floats(0.0, 1.0))
    before, read = [t.clone() for t in targets], [s.clone() for s in sources]
    expected = [_expected(t, s, weight) for t, s in zip(targets, sources, strict=True)]
    exact = [t.clone() for t in targets]

    plan = engine.Plan(targets, sources, cuda.Cuda)
    engine.lerp(plan, weight)
    engine.lerp(engine.Plan(exact, sources, Reference), weight)

    _assert_within_2_ulp(targets, exact, before, sources)
    assert models.bit_identical(sources, read)
    assert plan.skipped() == 0
    for t, e, s, b in zip(targets, expected, sources, before, strict=True):
        if cuda.Cuda.takes(t, s):  # foreach rounds as the CPU does, in the interpreter
            assert models.bit_identical(t, e), (b, s)


@law
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", EDGES)
def test_sizes_around_steps_and_blocks(source: torch.dtype, size: int) -> None:
    """Each element is met once where tensors meet the boundaries, alone and among others."""
    generator = torch.Generator().manual_seed(size)
    for sizes in ([size], [7, size, 15, 1], [size, size]):
        targets = [_random((n,), torch.float32, generator).to(DEVICE) for n in sizes]
        sources = [_random((n,), source, generator).to(DEVICE) for n in sizes]
        expected = [_expected(t, s, 0.3) for t, s in zip(targets, sources, strict=True)]
        cuda.Cuda(targets, sources).lerp(0.3)
        assert models.bit_identical(targets, expected)


@law
@dtype_pairs
def test_any_alignment(target: torch.dtype, source: torch.dtype) -> None:
    """Tensors may begin anywhere in memory; what lies before and after them stays as it is."""
    generator = torch.Generator().manual_seed(0)
    size = cuda.BLOCK + 9
    for begin_target in (0, 1, 2, 3, 4):
        for begin_source in (0, 1, 4, 7, 8):
            room = _random((size + 12,), target, generator).to(DEVICE)
            t = room[begin_target : begin_target + size]
            s = _random((size + 8,), source, generator).to(DEVICE)[begin_source:][:size]
            expected = room.clone()
            expected[begin_target : begin_target + size] = _expected(t, s, 0.7)
            cuda.Cuda([t], [s]).lerp(0.7)
            assert models.bit_identical(room, expected)


@law
@pytest.mark.usefixtures("_small_blocks")
def test_many_tensors() -> None:
    """A thousand tensors of all sizes, in one launch."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(7 * i) % 100 for i in range(1000 if ON_GPU else 150)]
    targets = [_random((n,), torch.float32, generator).to(DEVICE) for n in sizes]
    sources = [_random((n,), torch.bfloat16, generator).to(DEVICE) for n in sizes]
    expected = [_expected(t, s, 0.3) for t, s in zip(targets, sources, strict=True)]
    plan = engine.Plan(targets, sources, cuda.Cuda)
    engine.lerp(plan, 0.3)
    assert models.bit_identical(targets, expected)
    assert plan.paths == ["cuda"]


@law
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_numbers_of_all_magnitudes(dtype: torch.dtype) -> None:
    """Denormal numbers are neither flushed nor rounded otherwise than torch does."""
    generator = torch.Generator().manual_seed(0)
    low = -1074 if dtype == torch.float64 else -149
    scale = torch.exp2(torch.randint(low, low + 60, (2, 5000), generator=generator).double())
    start, s = (torch.randn(2, 5000, generator=generator) * scale).to(DEVICE, dtype)
    assert bool((s.abs() < torch.finfo(dtype).tiny).any())
    for weight in WEIGHTS:
        t = start.clone()
        cuda.Cuda([t], [s]).lerp(weight)
        assert models.bit_identical(t, _expected(start, s, weight))


@law
@dtype_pairs
def test_the_ends_are_exact(target: torch.dtype, source: torch.dtype) -> None:
    """A weight of 1 gives the source as cast, and one of 0 writes and counts nothing at all."""
    generator = torch.Generator().manual_seed(1)
    t = _random((50,), target, generator).to(DEVICE)
    s = _random((50,), source, generator).to(DEVICE)
    path = cuda.Cuda([t], [s])
    path.lerp(1.0)
    assert torch.equal(t, s.to(target))
    before = t.clone()
    s[::3], s[1::3] = math.nan, math.inf
    path.lerp(0.0)
    path.lerp(torch.zeros((), device=DEVICE))
    assert models.bit_identical(t, before)
    assert int(path.skipped) == 0


@law
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5),
)
def test_the_fixed_point_is_exact(value: float, weights: list[float]) -> None:
    """Law 3: equal target and source stay as they are, for any float and weight."""
    for dtype in FLOATS:
        target = torch.full((3,), value, dtype=dtype, device=DEVICE)
        source, before = target.clone(), target.clone()
        path = cuda.Cuda([target], [source])
        for weight in weights:
            path.lerp(weight)
        assert torch.equal(target, before)
        assert int(path.skipped) == 0


@law
@pytest.mark.parametrize("target", FLOATS, ids=str)
def test_the_weight_may_be_a_tensor(target: torch.dtype) -> None:
    """A tensor does what the number does, bit for bit, in any dtype and wherever it lies."""
    generator = torch.Generator().manual_seed(2)
    start = _random((1000,), target, generator).to(DEVICE)
    s = _random((1000,), torch.bfloat16, generator).to(DEVICE)
    number, tensor = start.clone(), start.clone()
    by_number, by_tensor = cuda.Cuda([number], [s]), cuda.Cuda([tensor], [s])
    for weight in (0.25, 0.75, 0.0, 1.0):  # exact in each dtype
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            by_number.lerp(weight)
            by_tensor.lerp(torch.full((5,), weight, dtype=dtype, device=DEVICE)[3])
            by_number.lerp(weight)
            by_tensor.lerp(torch.tensor(weight, dtype=dtype))  # from the host
            assert models.bit_identical(number, tensor)


@law
def test_found_inf_folds_into_the_weight() -> None:
    """Multiplied by (1 - found_inf), a weight makes a skipped step no update."""
    t, s = torch.ones(100, device=DEVICE), torch.full((100,), math.inf, device=DEVICE)
    path = cuda.Cuda([t], [s])
    found, weight = torch.ones((), device=DEVICE), torch.full((), 0.5, device=DEVICE)
    path.lerp(weight * (1 - found))
    assert bool((t == 1).all())
    assert int(path.skipped) == 0
    s.fill_(3.0)
    path.lerp(weight * (1 - found.zero_()))
    assert bool((t == 2).all())


# ------------------------------------------------------------------------------------- the guard


@law
@pytest.mark.usefixtures("_small_blocks")
@dtype_pairs
@given(data=st.data())
def test_what_is_not_finite_is_kept_out(
    target: torch.dtype, source: torch.dtype, data: st.DataObject
) -> None:
    """Law 12: a poisoned element keeps its value to the bit, the others move as without poison."""
    sizes = data.draw(st.lists(st.integers(1, 80), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(sum(sizes))
    targets = [_random((n,), target, generator).to(DEVICE) for n in sizes]
    sources = [_random((n,), source, generator).to(DEVICE) for n in sizes]
    weight = data.draw(st.sampled_from(WEIGHTS))
    clean = [_expected(t, s, weight) for t, s in zip(targets, sources, strict=True)]
    hits = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), device=DEVICE)
        for n in sizes
    ]
    for s, hit in zip(sources, hits, strict=True):
        s[hit] = data.draw(st.sampled_from(POISON))
    expected = [torch.where(h, t, c) for h, t, c in zip(hits, targets, clean, strict=True)]

    path = cuda.Cuda(targets, sources)
    path.lerp(weight)
    assert models.bit_identical(targets, expected)
    assert int(path.skipped) == sum(int(hit.sum()) for hit in hits)


@law
def test_every_poisoned_element_of_every_block_counts() -> None:
    """The count is exact where all is poison, over several blocks and updates."""
    size = 2 * cuda.BLOCK + 3
    targets = [torch.ones(size, device=DEVICE), torch.ones(5, device=DEVICE)]
    before = [t.clone() for t in targets]
    path = cuda.Cuda(targets, [torch.full_like(t, math.nan) for t in targets])
    for _ in range(3):
        path.lerp(0.5)
    assert models.bit_identical(targets, before)
    assert int(path.skipped) == 3 * (size + 5)


@law
def test_finite_values_whose_result_overflows_are_kept_out() -> None:
    """Law 12: what the cast or the mixing makes infinite does not enter; large sums may."""
    t = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    s = torch.tensor([1.0, 1e39, 5.0], dtype=torch.float64, device=DEVICE)
    path = cuda.Cuda([t], [s])
    path.lerp(0.5)
    assert t.tolist() == [1.0, 2.0, 4.0]
    assert int(path.skipped) == 1

    t = torch.tensor([3e38, 1.0, -3e38], device=DEVICE)
    s = torch.tensor([-3e38, 3.0, 3e38], device=DEVICE)
    before = t.clone()
    path = cuda.Cuda([t], [s])
    path.lerp(0.25)
    assert t.tolist() == [before[0], 1.5, before[2]]
    assert int(path.skipped) == 2

    t = torch.full((1000,), 1e38, device=DEVICE)
    path = cuda.Cuda([t], [torch.full((1000,), 2e38, device=DEVICE)])
    path.lerp(0.5)
    assert bool((t == 1.5e38).all())
    assert int(path.skipped) == 0


# --------------------------------------------------------------------------- what is left to others


@law
def test_what_is_not_taken_goes_to_foreach() -> None:
    """A plan gives what lies in another order to foreach, and adds up the counts."""
    generator = torch.Generator().manual_seed(0)
    start = _random((40, 60), torch.float32, generator).to(DEVICE)
    s = _random((40, 60), torch.bfloat16, generator).to(DEVICE)
    s[0, 0] = math.inf
    expected = torch.where(s.isfinite(), torch.lerp(start, s.float(), 0.25), start)
    turned = start.t().contiguous().t()
    for targets, paths in (
        ([start.clone()], {"cuda"}),
        ([turned.clone()], {"foreach"}),
        ([start.clone(), turned.clone()], {"cuda", "foreach"}),
    ):
        plan = engine.Plan(targets, [s] * len(targets), cuda.Cuda)
        engine.lerp(plan, 0.25)
        for t in targets:
            assert torch.allclose(t, expected, rtol=1e-6, atol=0)
        assert plan.skipped() == len(targets)
        assert {path.partition(" ")[0] for path in plan.paths} == paths


@law
def test_what_is_taken() -> None:
    """Float32 and float64 from the common floats, on one device, in any order of memory."""
    base = torch.zeros(2, 3, 4, 5, device=DEVICE)
    for layout in WRITABLE:
        assert cuda.Cuda.takes(layout(base), layout(base)) == (layout.__name__ != "_sliced")
    for target in (*SOURCES, torch.float8_e5m2):
        for source in (*SOURCES, torch.float8_e5m2):
            taken = cuda.Cuda.takes(base.to(target), base.to(source))
            assert taken == (target in FLOATS and source in SOURCES)
    assert not cuda.Cuda.takes(base, base.to("meta"))
    assert not cuda.Cuda.takes(base.to("meta"), base.to("meta"))


@law
def test_nothing_is_no_error() -> None:
    """No tensor, or only empty ones: nothing is launched."""
    for tensors in ([], [torch.empty(0, device=DEVICE)], [torch.empty(0, 3, device=DEVICE)] * 2):
        plan = engine.Plan(tensors, [t.clone() for t in tensors], cuda.Cuda)
        engine.lerp(plan, 0.5)
        assert plan.skipped() == 0


# ------------------------------------------------------------------------------------- addresses


def _pair() -> tuple[Tensor, Tensor, cuda.Cuda]:
    t, s = torch.zeros(40, device=DEVICE), torch.full((40,), 8.0, device=DEVICE)
    path = cuda.Cuda([t], [s])
    path.lerp(0.5)
    assert bool((t == 4).all())
    return t, s, path


@law
def test_addresses_are_read_again() -> None:
    """A source or target whose storage is another one, or has moved, is met where it is now."""
    t, s, path = _pair()
    old, s.data = s.data, torch.full((40,), 16.0, device=DEVICE)
    old.fill_(math.nan)
    path.lerp(0.5)
    assert bool((t == 10).all())
    old, t.data = t.data, torch.zeros(40, device=DEVICE)
    path.lerp(0.5)
    assert bool((t == 8).all())
    assert bool((old == 10).all())

    t, s, path = _pair()
    kept = s.clone()
    s.untyped_storage().resize_(0)
    blocker = torch.full((40,), math.nan, device=DEVICE)  # where it was
    s.untyped_storage().resize_(160)
    s.copy_(kept)
    path.lerp(0.5)
    assert bool((t == 6).all())
    assert bool(blocker.isnan().all())
    assert int(path.skipped) == 0


@law
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.untyped_storage().resize_(0),
        lambda t: t.untyped_storage().resize_(100),
        lambda t: setattr(t, "data", torch.zeros(20, device=DEVICE)),
        lambda t: setattr(t, "data", torch.zeros(40, device=DEVICE, dtype=torch.float64)),
        lambda t: setattr(t, "data", torch.zeros(80, device=DEVICE)[::2]),
    ],
    ids=["freed", "shrunk", "shorter", "wider", "spread"],
)
def test_what_is_gone_is_neither_read_nor_written(
    which: int, change: Callable[[Tensor], object]
) -> None:
    """Lost memory or another form is an error that names it, before anything is written."""
    t, s, path = _pair()
    other = torch.zeros(3, 3, device=DEVICE)
    path = cuda.Cuda([other, t], [torch.ones(3, 3, device=DEVICE), s])
    change((t, s)[which])
    with pytest.raises(
        RuntimeError,
        match=r"^1 of 4 tensors have lost their memory or their form since this plan was made: "
        r".*made for \(40,\) torch.float32; make a new Plan$",
    ):
        path.lerp(0.5)
    assert not bool(other.any())
    assert int(path.skipped) == 0


@law
def test_offsets_have_64_bits() -> None:
    """The last block of a tensor of more than 2^32 elements is found where it is.

    Of such a tensor only this block exists here: the table says that it begins far before it.
    """
    t = torch.zeros(cuda.BLOCK, device=DEVICE)
    s = torch.ones(cuda.BLOCK, dtype=torch.bfloat16, device=DEVICE)
    path = cuda.Cuda([t], [s])
    blocks = (1 << 33) // cuda.BLOCK
    row = [t.data_ptr() - 4 * (1 << 33), s.data_ptr() - 2 * (1 << 33), (1 << 33) + 100, -blocks]
    path._table.copy_(torch.tensor([row]))
    path.lerp(0.5)
    assert bool((t[:100] == 0.5).all())
    assert not bool(t[100:].any())


@law
def test_whoever_differentiates_a_teacher_is_told() -> None:
    """As with torch's own in-place operations, autograd notices that a saved value has changed."""
    teacher, x = nn.Linear(3, 3).to(DEVICE), torch.ones(1, 3, device=DEVICE, requires_grad=True)
    student = nn.Linear(3, 3).to(DEVICE)
    targets = [p.detach() for p in teacher.requires_grad_(False).parameters()]
    loss = teacher(teacher(x)).sum()
    cuda.Cuda(targets, [p.detach() for p in student.parameters()]).lerp(0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@law
def test_a_plan_is_made_and_used_in_inference_mode() -> None:
    """Made inside of inference mode it works outside, and the other way round."""
    t, s = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    with torch.inference_mode():
        path = cuda.Cuda([t], [s])
        path.lerp(0.5)
        made_inside = torch.zeros(5, device=DEVICE)
        cuda.Cuda([made_inside], [s]).lerp(0.5)
    path.lerp(0.5)
    assert t.tolist() == [0.75] * 5
    assert made_inside.tolist() == [0.5] * 5


@law
def test_tensors_may_be_made_elsewhere_by_default() -> None:
    """`torch.set_default_device` changes nothing: what the path needs is where it has to be."""
    t, s = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    with torch.device("meta"):
        path = cuda.Cuda([t], [s])
        path.lerp(0.5)
        s.data = torch.full((5,), 2.5, device=DEVICE)
        path.lerp(0.5)
    assert t.tolist() == [1.5] * 5


# --------------------------------------------------------------------------------- when it is used


OBSTACLE = cuda.obstacle.__wrapped__  # without its memory


@law
def test_a_kernel_that_differs_from_torch_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ulp, a count, or an error of any kind, and the path says why it takes nothing."""
    device = torch.device("cuda", torch.cuda.current_device()) if ON_GPU else torch.device("cpu")
    lerp = cuda.Cuda.lerp
    if not ON_GPU:  # the CPU's own gives some zeros another sign
        monkeypatch.setattr(torch, "lerp", _lerp_of_torch)
    for target in FLOATS:
        for source in SOURCES:
            if ON_GPU or source != torch.bfloat16:  # the interpreter flushes its denormal numbers
                with torch.device("meta"):
                    assert OBSTACLE(device, target, source) == ""

    def told(change: Callable[..., object]) -> str:
        monkeypatch.setattr(cuda.Cuda, "lerp", change)
        return OBSTACLE(device, torch.float32, torch.float16)

    def off_by_an_ulp(path: cuda.Cuda, weight: float) -> None:
        lerp(path, weight)
        last = path._held[2][-1:]
        last.copy_(torch.nextafter(last, torch.ones_like(last)))

    def counting_one_more(path: cuda.Cuda, weight: float) -> None:
        lerp(path, weight)
        path.skipped += 1

    def without_a_compiler(path: cuda.Cuda, weight: float) -> None:
        raise FileNotFoundError("no compiler\nin any of these folders")

    assert told(off_by_an_ulp) == "the kernel does not round as torch does"
    assert told(counting_one_more) == "the kernel does not round as torch does"
    assert told(without_a_compiler) == "the kernel cannot run: FileNotFoundError: no compiler"


def test_it_is_not_used_where_nobody_has_tried_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On ROCm, whose devices torch calls cuda too."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    of = torch.device("cuda", 0), torch.float32, torch.float32
    assert OBSTACLE(*of) == "the kernel has not been tried on ROCm"


def test_it_is_not_used_where_there_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton the reason is told, and nothing fails."""
    monkeypatch.delattr("polyak.engine.triton_lerp")
    monkeypatch.setitem(sys.modules, "polyak.engine.triton_lerp", None)
    of = torch.device("cpu"), torch.float32, torch.float32
    assert re.match(r"the kernel cannot run: \w+: .*triton_lerp", OBSTACLE(*of))


def test_triton_is_imported_for_tensors_on_a_gpu_alone() -> None:
    """The path can be asked about other tensors without it."""
    code = (
        "import sys, torch; from polyak.engine import cuda; t = torch.zeros(3); "
        "assert not cuda.Cuda.takes(t, t); print('triton' in sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (child.stdout, child.stderr) == ("False\n", "")


# ----------------------------------------------------------------------------- what a GPU can show


@on_a_gpu
@dtype_pairs
def test_it_is_used_on_a_gpu(target: torch.dtype, source: torch.dtype) -> None:
    """The kernel compiles, loads and gives torch's bits on this device."""
    assert cuda.obstacle(torch.device("cuda", 0), target, source) == ""


@on_a_gpu
@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_it_is_foreach_bit_for_bit(source: torch.dtype) -> None:
    """What is averaged does not depend on the path: `_foreach_lerp_` gives the same bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1000, 1000), (3,), (64, 3, 7, 7), (1 << 20,), (), (4097,)]
    for target in FLOATS:
        start = [_random(shape, target, generator).cuda() for shape in shapes]
        sources = [_random(shape, source, generator).cuda() for shape in shapes]
        sources[0][5] = math.nan
        for weight in WEIGHTS:
            mine, theirs, plain = ([t.clone() for t in start] for _ in range(3))
            paths = cuda.Cuda(mine, sources), foreach.Foreach(theirs, sources)
            for path in paths:
                path.lerp(weight)
            assert models.bit_identical(mine, theirs)
            assert torch.equal(paths[0].skipped, paths[1].skipped)
            torch._foreach_lerp_(plain[1:], [s.to(target) for s in sources[1:]], weight)
            assert models.bit_identical(mine[1:], plain[1:])


@on_a_gpu
def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    """Its last elements are met, where the memory for it is free."""
    size = (1 << 31) + 5
    if torch.cuda.mem_get_info()[0] < 8 * size:
        pytest.skip("too little memory is free")
    t = torch.zeros(size, device="cuda")
    s = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    cuda.Cuda([t], [s]).lerp(0.5)
    assert bool((t[-10:] == 0.5).all())
    assert float(t.double().sum()) == size / 2


@on_a_gpu
def test_an_update_neither_waits_nor_allocates() -> None:
    """CUDA's own check sees no sync, and torch's allocator no request, also of a moved tensor."""
    sizes = [1, 1000, 100_000, 3_000_000]
    targets = [torch.zeros(n, device="cuda") for n in sizes]
    sources = [torch.ones(n, device="cuda", dtype=torch.bfloat16) for n in sizes]
    sources[1][3] = math.nan
    path = cuda.Cuda(targets, sources)
    weight = torch.tensor(0.25, device="cuda")
    others = [s.clone() for s in sources]
    for w in (0.5, weight):  # compiled
        path.lerp(w)
    with no_sync():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        for w in (0.5, weight, 0.0):
            path.lerp(w)
        for s, other in zip(sources, others, strict=True):
            s.data = other
        path.lerp(weight)
        after = torch.cuda.memory_stats()["allocation.all.allocated"]
    assert after == before
    assert int(path.skipped) == 5


@on_a_gpu
def test_addresses_change_behind_a_busy_queue() -> None:
    """An update meets the tensors that were there when it was called, however late it runs."""
    t = torch.zeros(1000, device="cuda")
    s = torch.zeros(1000, device="cuda")
    path = cuda.Cuda([t], [s])
    path.lerp(0.5)
    values = [torch.full((1000,), float(i), device="cuda") for i in range(20)]
    expected = 0.0
    torch.cuda._sleep(200_000_000)
    for i, value in enumerate(values):
        s.data = value
        path.lerp(0.5)
        expected = expected + 0.5 * (i - expected)
    assert t.tolist() == pytest.approx([expected] * 1000, rel=1e-6)


@on_a_gpu
def test_an_update_is_captured_and_replayed() -> None:
    """A graph replays the update with the weights, and the mixing weight, of the moment."""
    sizes = [5, 100_000]
    t = [torch.zeros(n, device="cuda") for n in sizes]
    s = [torch.ones(n, device="cuda", dtype=torch.bfloat16) for n in sizes]
    path = cuda.Cuda(t, s)
    weight = torch.zeros((), device="cuda")
    path.lerp(weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        path.lerp(weight)
    assert not any(bool(x.any()) for x in t)
    expected = 0.0
    for w, value in ((0.5, 8.0), (0.25, 4.0), (0.75, 2.0), (0.0, 100.0), (1.0, 3.0)):
        weight.fill_(w)
        for x in s:
            x.fill_(value)
        graph.replay()
        expected = expected + w * (value - expected)
        assert [x.unique().tolist() for x in t] == [[expected]] * 2
    s[0][2] = math.inf
    graph.replay()
    assert int(path.skipped) == 1

    s[1].data = torch.zeros(sizes[1], device="cuda", dtype=torch.bfloat16)
    second = torch.cuda.CUDAGraph()
    with torch.cuda.graph(second):
        weight.add_(0.0)  # torch warns of an empty graph
        with pytest.raises(RuntimeError, match="moved since the last update, and a CUDA graph"):
            path.lerp(weight)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=NEEDS_A_GPU)
def test_the_current_device_may_be_another() -> None:
    """The kernel runs where its tensors are."""
    t, s = torch.zeros(5000, device="cuda:1"), torch.ones(5000, device="cuda:1")
    with torch.cuda.device(0):
        cuda.Cuda([t], [s]).lerp(0.5)
        assert torch.cuda.current_device() == 0
    assert bool((t == 0.5).all())
