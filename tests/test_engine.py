"""The engine: law 1 (reference), the guard, plans, and what an update costs.

Every test of a path runs over `PATHS` and `DEVICES`: a new path joins the suite by being added.

The tolerance of one update, "2 ulp", is counted at M, the larger of |target| and |source|. With
u = 2^-24 for float32 (ulp(M) >= u M), a fused lerp of weight w < 1/2 rounds the weight (relative
u), the difference (u) and the result (u), so that the error is at most
2 u w |s - t| + u |r| <= u M (1 + 2 w) <= 2 u M <= 2 ulp(M), the worst case being s = -t. For
w >= 1/2 the form s - (s - t)(1 - w) gives the same bound with 1 - w in place of w. Counted at the
result itself no bound exists: where t + w (s - t) cancels, the rounding of s - t remains.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import models
import polyak
from polyak import engine
from polyak.engine import cpu, foreach
from polyak.engine.reference import Reference
from syncs import no_sync

PATHS = [foreach.Foreach, cpu.Cpu]
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])

every_path = pytest.mark.parametrize("path", [*PATHS, Reference], ids=lambda path: path.name)
fast_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
every_device = pytest.mark.parametrize("device", DEVICES)

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
REAL = [torch.float32, torch.float64, torch.bfloat16, torch.float16, *FLOAT8]
PAIRS = [
    *((target, source) for target in (torch.float32, torch.float64) for source in REAL),
    (torch.complex64, torch.complex64),
    (torch.complex64, torch.complex128),
    (torch.complex128, torch.complex64),
    (torch.complex128, torch.complex128),
]
dtype_pairs = pytest.mark.parametrize(
    ("target", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch.")
)

# ------------------------------------------------------------------------------------- layouts


def _dense(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else _dense(t)


def _permuted(t: Tensor) -> Tensor:
    """Every dimension in the opposite order in memory."""
    order = tuple(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else _transposed(t)


def _sliced(t: Tensor) -> Tensor:
    """A window of a larger tensor, every second element of it in the last dimension."""
    if t.dim() == 0:
        return _offset(t)
    room = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype, device=t.device)
    room[..., 1 : 2 * t.shape[-1] + 1 : 2] = t
    return room[..., 1 : 2 * t.shape[-1] + 1 : 2]


def _offset(t: Tensor) -> Tensor:
    """Contiguous, but not at the beginning of its storage."""
    room = torch.zeros(t.numel() + 5, dtype=t.dtype, device=t.device)
    room[5:] = t.reshape(-1)
    return room[5:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    """All rows the same memory; the values change, so that this is for sources only."""
    return t[:1].expand_as(t) if t.dim() and len(t) else _dense(t)


WRITABLE = [_dense, _transposed, _permuted, _channels_last, _sliced, _offset]
SHAPES = [(), (0,), (0, 3), (1,), (7,), (2, 3), (3, 1), (5, 4), (2, 3, 4), (2, 3, 4, 5), (1, 8, 1)]

# ---------------------------------------------------------------------------------- comparison


def _ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance between neighboring numbers of ``dtype`` at ``magnitude``, in float64."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(magnitude.double().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def _assert_within_2_ulp(
    got: list[Tensor], expected: list[Tensor], before: list[Tensor], sources: list[Tensor]
) -> None:
    for g, e, b, s in zip(*(map(_real, x) for x in (got, expected, before, sources)), strict=True):
        magnitude = torch.maximum(b.abs().double(), s.to(b.dtype).abs().double())
        error = (g.double() - e.double()).abs()
        assert bool((error <= 2 * _ulp(magnitude, g.dtype)).all()), f"{error.max()} at {g.shape}"


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values over several orders of magnitude, a few zeros among them, in range of any dtype."""
    wide = torch.complex128 if dtype.is_complex else torch.float64
    values = torch.randn(shape, dtype=wide, generator=generator)
    scale = torch.exp2(torch.randint(-4, 5, shape, generator=generator).double())
    return (values * scale * (torch.rand(shape, generator=generator) > 0.05)).to(dtype)


def _lerp(
    path: type, targets: list[Tensor], sources: list[Tensor], weight: float | Tensor
) -> engine.Plan:
    plan = engine.Plan(targets, sources, path)
    engine.lerp(plan, weight)
    return plan


def test_the_tolerance_can_fail() -> None:
    """`_assert_within_2_ulp` accepts 2 ulp and refuses 3, also in a single element."""
    before, source = [torch.full((5,), 1.5)], [torch.full((5,), 1.0)]
    off = [torch.full((5,), 1.25)]
    off[0][3] += 2 * 2**-23
    _assert_within_2_ulp(off, [torch.full((5,), 1.25)], before, source)
    off[0][3] += 2**-23
    with pytest.raises(AssertionError):
        _assert_within_2_ulp(off, [torch.full((5,), 1.25)], before, source)


def test_an_ulp_is_what_torch_says() -> None:
    """`_ulp` is the gap to the next number, in both dtypes and at powers of two."""
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([1.0, 1.5, 2.0, 3e-5, 1e30], dtype=dtype)
        gap = torch.nextafter(x, torch.full_like(x, math.inf)).double() - x.double()
        assert torch.equal(_ulp(x, dtype), gap)


# ------------------------------------------------------------------------------- law 1, values


@fast_path
@every_device
@dtype_pairs
@given(data=st.data())
def test_a_path_is_the_reference(
    path: type, device: str, target: torch.dtype, source: torch.dtype, data: st.DataObject
) -> None:
    """Law 1: every path equals the float64 definition, for every dtype, layout and weight."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6))
    targets, sources = [], []
    for shape in shapes:
        put, take = (data.draw(st.sampled_from(x)) for x in (WRITABLE, [*WRITABLE, _expanded]))
        targets.append(put(_random(shape, target, generator).to(device)))
        sources.append(take(_random(shape, source, generator).to(device)))
    weight = data.draw(st.sampled_from([0.0, 1e-4, 0.5, 1.0]) | st.floats(0.0, 1.0))
    before = [t.clone() for t in targets]
    read = [s.clone() for s in sources]
    expected = [t.clone() for t in targets]

    plan = _lerp(path, targets, sources, weight)
    _lerp(Reference, expected, sources, weight)

    _assert_within_2_ulp(targets, expected, before, sources)
    assert models.bit_identical(sources, read)
    assert plan.skipped() == 0


@fast_path
@every_device
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("chunks", [1, 2])
def test_sizes_around_a_chunk(
    path: type, device: str, source: torch.dtype, off: int, chunks: int
) -> None:
    """Law 1 where tensors meet the boundaries of chunks, alone and after other tensors."""
    size = chunks * (1 << 16) + off
    generator = torch.Generator().manual_seed(size)
    for shapes in ([(size,)], [(7,), (size,), (3, 5)], [(2, size // 2)], [(size // 3, 3), (size,)]):
        for layout in (_dense, _transposed, _sliced):
            targets = [layout(_random(s, torch.float32, generator)).to(device) for s in shapes]
            sources = [_random(s, source, generator).to(device) for s in shapes]
            before = [t.clone() for t in targets]
            expected = [t.clone() for t in targets]
            _lerp(path, targets, sources, 0.3)
            _lerp(Reference, expected, sources, 0.3)
            _assert_within_2_ulp(targets, expected, before, sources)


@given(data=st.data())
def test_foreach_cuts_anywhere(data: st.DataObject) -> None:
    """Law 1 with chunks of a few elements: however tensors are cut, each element is met once."""
    size = data.draw(st.integers(1, 40))
    shapes = data.draw(st.lists(st.sampled_from([*SHAPES, (41,), (6, 13)]), min_size=1, max_size=6))
    source = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = torch.Generator().manual_seed(size)
    layouts = [data.draw(st.sampled_from(WRITABLE)) for _ in shapes]
    targets = [
        put(_random(s, torch.float32, generator)) for put, s in zip(layouts, shapes, strict=True)
    ]
    sources = [_random(s, source, generator) for s in shapes]
    before, expected = [t.clone() for t in targets], [t.clone() for t in targets]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(foreach.CHUNK, "cpu", size)
        _lerp(foreach.Foreach, targets, sources, 0.3)
    _lerp(Reference, expected, sources, 0.3)
    _assert_within_2_ulp(targets, expected, before, sources)


@fast_path
@every_device
@dtype_pairs
def test_weight_one_is_the_source_and_zero_the_target(
    path: type, device: str, target: torch.dtype, source: torch.dtype
) -> None:
    """The ends are exact: w = 1 gives the source as cast, w = 0 changes nothing.

    (The definition itself is exact there only where float64 is wider than the average.)
    """
    generator = torch.Generator().manual_seed(1)
    t = _random((50,), target, generator).to(device)
    s = _random((50,), source, generator).to(device)
    before = t.clone()
    _lerp(path, [t], [s], 0.0)
    assert torch.equal(t, before)
    _lerp(path, [t], [s], 1.0)
    assert torch.equal(t, s.to(target))


@every_path
@every_device
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_may_be_a_tensor(path: type, device: str, source: torch.dtype) -> None:
    """A 0-dim weight on the targets' device does what the number does, bit for bit."""
    generator = torch.Generator().manual_seed(2)
    start = _random((1000,), torch.float32, generator).to(device)
    s = _random((1000,), source, generator).to(device)
    number, tensor = start.clone(), start.clone()
    for weight in (0.0, 0.25, 0.75, 1.0):  # exact in float32
        _lerp(path, [number], [s], weight)
        _lerp(path, [tensor], [s], torch.tensor(weight, device=device))
        assert torch.equal(number, tensor)


@fast_path
@every_device
@given(
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
    weights=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5),
)
def test_the_fixed_point_is_exact(
    path: type, device: str, value: float, weights: list[float]
) -> None:
    """Law 3 in the engine: equal target and source stay as they are, for any float and weight."""
    for dtype in (torch.float32, torch.float64):
        target = torch.full((3,), value, dtype=dtype, device=device)
        source, before = target.clone(), target.clone()
        plan = engine.Plan([target], [source], path)
        for weight in weights:
            engine.lerp(plan, weight)
        assert torch.equal(target, before)
        assert plan.skipped() == 0


def test_mul_and_add_would_drift() -> None:
    """Why lerp: `t * d + s * (1 - d)` moves a tenth of all elements even where t equals s."""
    t = _random((10_000,), torch.float32, torch.Generator().manual_seed(0))
    assert ((t * 0.999 + t * (1 - 0.999)) != t).float().mean() > 0.1


# --------------------------------------------------------------------------- law 12, the guard

POISON = [math.nan, math.inf, -math.inf]


@every_path
@every_device
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@given(data=st.data())
def test_what_is_not_finite_is_kept_out(
    path: type, device: str, source: torch.dtype, data: st.DataObject
) -> None:
    """Law 12: a poisoned element keeps its value to the bit, the others move as without poison."""
    sizes = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(sum(sizes))
    targets = [_random((n,), torch.float32, generator).to(device) for n in sizes]
    sources = [_random((n,), source, generator).to(device) for n in sizes]
    hits = [
        torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), device=device)
        for n in sizes
    ]
    value = data.draw(st.sampled_from(POISON))
    poisoned = [torch.where(h, value, s).to(source) for h, s in zip(hits, sources, strict=True)]
    before, clean = [t.clone() for t in targets], [t.clone() for t in targets]

    plan = _lerp(path, targets, poisoned, 0.3)
    _lerp(path, clean, sources, 0.3)

    expected = [torch.where(h, b, c) for h, b, c in zip(hits, before, clean, strict=True)]
    assert models.bit_identical(targets, expected)
    assert plan.skipped() == sum(int(h.sum()) for h in hits)


@every_path
@every_device
def test_finite_values_whose_result_overflows_are_kept_out(path: type, device: str) -> None:
    """Law 12: what the cast or the mixing makes infinite does not enter either.

    A float64 weight of 1e39 is infinite in a float32 average. On every path but the definition, so
    is 3e38 - (-3e38), an intermediate of lerp.
    """
    t = torch.tensor([1.0, 2.0, 3.0], device=device)
    s = torch.tensor([1.0, 1e39, 5.0], dtype=torch.float64, device=device)
    plan = _lerp(path, [t], [s], 0.5)
    assert t.tolist() == [1.0, 2.0, 4.0]
    assert plan.skipped() == 1

    t = torch.tensor([3e38, 1.0, -3e38], device=device)
    s = torch.tensor([-3e38, 3.0, 3e38], device=device)
    before = t.clone()
    plan = _lerp(path, [t], [s], 0.25)
    assert bool(torch.isfinite(t).all())
    assert t[1] == 1.5
    if path is not Reference:
        assert torch.equal(t[::2], before[::2])
        assert plan.skipped() == 2


@fast_path
@every_device
def test_a_sum_that_overflows_is_not_taken_for_poison(path: type, device: str) -> None:
    """Large finite values, whose sum is infinite, move and are not counted."""
    t = torch.full((1000,), 1e38, device=device)
    plan = _lerp(path, [t], [torch.full((1000,), 2e38, device=device)], 0.5)
    assert torch.equal(t, torch.full((1000,), 1.5e38, device=device))
    assert plan.skipped() == 0


@fast_path
@every_device
def test_the_count_adds_up_over_updates_and_groups(path: type, device: str) -> None:
    """`skipped` is the sum over updates, tensors and dtypes."""
    targets = [torch.zeros(4, device=device), torch.zeros(4, dtype=torch.float64, device=device)]
    sources = [torch.ones(4, device=device), torch.ones(4, dtype=torch.float64, device=device)]
    sources[0][1] = math.nan
    sources[1][:3] = math.inf
    plan = engine.Plan(targets, sources, path)
    for _ in range(5):
        engine.lerp(plan, 0.5)
    assert plan.skipped() == 5 * 4


# -------------------------------------------------------------------------------------- copy


@every_device
@pytest.mark.parametrize("target", REAL, ids=str)
@pytest.mark.parametrize("source", REAL, ids=str)
def test_copy_casts_as_torch_does(device: str, target: torch.dtype, source: torch.dtype) -> None:
    """`copy` writes the source, cast to the target's dtype, in every layout."""
    generator = torch.Generator().manual_seed(3)
    for put in WRITABLE:
        s = _expanded(_random((3, 4), source, generator)).to(device)
        t = put(torch.zeros(3, 4).to(target)).to(device)
        engine.copy(engine.Plan([t], [s]))
        assert models.bit_identical(t, s.to(target))


@every_device
def test_copy_is_no_guard(device: str) -> None:
    """`copy` writes infinities and NaN too: it puts the model back as it was."""
    s = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45], device=device)
    t = torch.ones(5, device=device)
    engine.copy(engine.Plan([t], [s]))
    assert models.bit_identical(t, s)


@every_device
def test_copy_takes_integers_and_booleans(device: str) -> None:
    """`copy` is for whatever follows a model: counters beyond 2^53 and masks included."""
    sources = [torch.tensor(2**62 + 1), torch.tensor([True, False]), torch.tensor([1, 255]).byte()]
    sources = [s.to(device) for s in sources]
    targets = [torch.zeros_like(s) for s in sources]
    engine.copy(engine.Plan(targets, sources))
    assert models.bit_identical(targets, sources)


# -------------------------------------------------------------------------------------- plans


@fast_path
def test_a_plan_of_nothing_runs(path: type) -> None:
    """No tensor, or only empty ones, is no error: torch's foreach refuses empty lists."""
    for tensors in ([], [torch.empty(0)], [torch.empty(0, 3), torch.empty(0)]):
        plan = engine.Plan(tensors, [t.clone() for t in tensors], path)
        engine.lerp(plan, 0.5)
        engine.copy(plan)
        assert plan.skipped() == 0
        assert plan.current()


@pytest.mark.parametrize(
    ("target", "source", "message"),
    [
        (
            torch.zeros(2, 3),
            torch.zeros(3, 2),
            r"cannot write \(3, 2\) torch.float32 into \(2, 3\)",
        ),
        (torch.zeros(2), torch.zeros(()), r"cannot write \(\) torch.float32 into \(2,\)"),
        (torch.zeros(2), torch.zeros(2).cfloat(), "both real or both complex"),
        (torch.zeros(2).cfloat(), torch.zeros(2), "both real or both complex"),
        (torch.zeros(2), torch.zeros(2, device="meta"), "meta device and has no data"),
        (torch.zeros(2, device="meta"), torch.zeros(2), "meta device and has no data"),
    ],
)
def test_a_plan_refuses_what_does_not_fit(target: Tensor, source: Tensor, message: str) -> None:
    """Shapes never broadcast, and a kind is never dropped: each mismatch is an error."""
    with pytest.raises(ValueError, match=message):
        engine.Plan([target], [source])


def test_a_plan_refuses_lists_of_different_lengths() -> None:
    """A target without a source is an error."""
    with pytest.raises(ValueError, match="zip"):
        engine.Plan([torch.zeros(2), torch.zeros(2)], [torch.zeros(2)])


def test_a_plan_knows_when_it_is_stale() -> None:
    """`current` is true while every tensor has its storage, shape and strides, else false."""

    def fresh() -> tuple[Tensor, Tensor, engine.Plan]:
        t, s = torch.zeros(4, 4), torch.ones(4, 4)
        return t, s, engine.Plan([t], [s])

    t, s, plan = fresh()
    t.fill_(3.0)
    s.mul_(2.0)
    assert plan.current()

    for change in (
        lambda t, s: t.set_(torch.zeros(4, 4)),
        lambda t, s: setattr(s, "data", torch.ones(4, 4)),
        lambda t, s: setattr(s, "data", s.data.double()),
        lambda t, s: setattr(s, "data", s.data.t()),
        lambda t, s: t.resize_(2, 4),
    ):
        t, s, plan = fresh()
        change(t, s)
        assert not plan.current()


@fast_path
def test_a_plan_reads_what_is_there_now(path: type) -> None:
    """A plan holds tensors, not values: in-place changes are seen by the next update."""
    t, s = torch.zeros(3), torch.zeros(3)
    plan = engine.Plan([t], [s], path)
    engine.lerp(plan, 0.5)
    s.fill_(8.0)
    engine.lerp(plan, 0.5)
    t.add_(1.0)
    engine.lerp(plan, 0.5)
    assert t.tolist() == [6.5] * 3


@fast_path
def test_a_plan_says_its_paths(path: type) -> None:
    """`paths` names what runs."""
    assert engine.Plan([torch.zeros(3)], [torch.zeros(3)], path).paths == [path.name]


# ---------------------------------------------------------------------------------- small verbs


def test_the_dtype_of_an_average() -> None:
    """At least the floor; float64 and complex stay; complex gets the floor's precision."""
    f, d = torch.float32, torch.float64
    table = {
        (torch.float16, f): f,
        (torch.bfloat16, f): f,
        (torch.float8_e4m3fn, f): f,
        (f, f): f,
        (d, f): d,
        (torch.bfloat16, d): d,
        (f, d): d,
        (torch.complex32, f): torch.complex64,
        (torch.complex64, f): torch.complex64,
        (torch.complex128, f): torch.complex128,
        (torch.complex64, d): torch.complex128,
    }
    assert {pair: engine.average_dtype(*pair) for pair in table} == table


@pytest.mark.parametrize("layout", WRITABLE, ids=lambda layout: layout.__name__.strip("_"))
def test_empty_like_keeps_a_dense_layout(layout: object) -> None:
    """An average lies in memory as its parameter does, so that both are read in one run."""
    t = layout(torch.randn(2, 3, 4, 5)).requires_grad_()  # type: ignore[operator]
    made = engine.empty_like(t, torch.float64)
    assert (made.shape, made.dtype, made.requires_grad) == (t.shape, torch.float64, False)
    if layout is not _sliced:  # its gaps are not reproduced
        assert made.stride() == t.stride()
    assert made.data_ptr() != t.data_ptr()


def test_empty_like_is_writable_where_the_original_is_not() -> None:
    """An expanded tensor gets an average with memory of its own for each element."""
    expanded = torch.zeros(1, 3).expand(4, 3)
    assert engine.overlaps_itself(expanded)
    made = engine.empty_like(expanded, torch.float32)
    assert not engine.overlaps_itself(made)
    made.copy_(torch.arange(12.0).view(4, 3))
    assert made[3, 2] == 11.0


def test_empty_like_leaves_inference_mode() -> None:
    """An average built inside inference mode can be written outside of it."""
    with torch.inference_mode():
        made = engine.empty_like(torch.zeros(2), torch.float32)
    assert not made.is_inference()


def test_nonfinite_finds_each() -> None:
    """The indices of the tensors with a NaN or an infinity, real or complex."""
    tensors = [
        torch.zeros(3),
        torch.tensor([1.0, math.nan]),
        torch.empty(0),
        torch.tensor(complex(0, math.inf)),
        torch.tensor(7),
        torch.tensor([-math.inf], dtype=torch.bfloat16),
    ]
    assert engine.nonfinite(tensors) == [1, 3, 5]


def test_distance_is_the_two_sums() -> None:
    """`distance` is |t - s|^2 and |s|^2 in float64, across dtypes, layouts and sizes."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(3, 4), (2, 3, 4, 5), (1 << 20) + 1, 0]
    targets = [torch.randn(s, generator=generator) for s in shapes]
    sources = [_transposed(torch.randn(s, generator=generator).bfloat16()) for s in shapes]
    targets.append(torch.randn(5, dtype=torch.complex64, generator=generator))
    sources.append(torch.randn(5, dtype=torch.complex64, generator=generator))
    wide = [
        (t.to(torch.complex128), s.to(torch.complex128))
        for t, s in zip(targets, sources, strict=True)
    ]
    expected = (
        sum(float((t - s).abs().square().sum()) for t, s in wide),
        sum(float(s.abs().square().sum()) for _, s in wide),
    )
    assert engine.distance(targets, sources) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128], ids=str)
def test_distance_only_reads(dtype: torch.dtype) -> None:
    """`distance` leaves both lists as they are, also where nothing has to be cast."""
    tensors = [[torch.full((3,), 2.0, dtype=dtype)], [torch.full((3,), 5.0, dtype=dtype)]]
    assert engine.distance(*tensors) == (27.0, 75.0)
    assert [t[0].tolist() for t in tensors] == [[2.0] * 3, [5.0] * 3]


@given(
    shape=st.lists(st.integers(1, 9), max_size=4),
    size=st.integers(1, 30),
    put=st.sampled_from(WRITABLE),
    take=st.sampled_from([*WRITABLE, _expanded]),
)
def test_pieces_cover_each_element_once(
    shape: list[int], size: int, put: object, take: object
) -> None:
    """A pair is cut into pairs of views, none too large, that meet every element once."""
    target = put(torch.zeros(shape))  # type: ignore[operator]
    source = take(torch.arange(math.prod(shape), dtype=torch.float32).view(shape))  # type: ignore[operator]
    for t, s in foreach.pieces(target, source, size):
        assert t.shape == s.shape
        assert 0 < t.numel() <= size
        t.add_(s + 1)
    assert torch.equal(target, source + 1)


# --------------------------------------------------------------------------- what an update costs


def _allocated(work: object, times: int = 3) -> int:
    """Return the bytes of tensor memory that calls of ``work`` allocate, by the profiler."""
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        for _ in range(times):
            work()  # type: ignore[operator]
    events = profiled.profiler.kineto_results.events()
    return sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")


def test_the_profiler_sees_an_allocation() -> None:
    """`_allocated` can fail: it counts what is allocated, also when it is freed at once."""
    assert _allocated(lambda: None) == 0
    assert _allocated(lambda: torch.zeros(100).sum()) >= 3 * 400


def _sized(dtype: torch.dtype) -> torch.nn.Module:
    """Tensors of all sizes: smaller than a chunk, one more than a chunk, several chunks."""
    model = models.convolutional().to(dtype)
    for i, shape in enumerate([((1 << 16) + 1,), (500, 300), (3,), (1 << 16,), ()]):
        model.register_parameter(f"p{i}", torch.nn.Parameter(torch.randn(shape).to(dtype)))
    model.register_parameter("turned", torch.nn.Parameter(torch.randn(200, 400).to(dtype).t()))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("poisoned", [False, True])
def test_an_update_allocates_nothing(dtype: torch.dtype, poisoned: bool) -> None:
    """From the third update on no tensor memory is allocated, also when elements are kept out.

    (The first copies the weights, the second makes the plan and its scratch.)
    """
    model = _sized(dtype)
    ema = polyak.EMA(model, 0.9)
    ema.update()
    ema.update()
    if poisoned:
        with torch.no_grad():
            model.p0[7] = math.nan
    assert _allocated(ema.update) == 0
    assert ema.clock == 5


def test_an_update_into_a_teacher_allocates_nothing() -> None:
    """Nor does one that writes through to a narrow teacher and copies counters."""
    student, teacher = models.bfloat16(0), models.bfloat16(1)
    ema = polyak.EMA(student, 0.9, into=teacher)
    ema.update()
    assert _allocated(ema.update) == 0


@pytest.mark.parametrize("weight", [0.3, torch.tensor(0.3)], ids=["float", "tensor"])
def test_an_update_does_not_wait_for_the_device(weight: float | Tensor) -> None:
    """As on an accelerator, an update reads no element back, poisoned or not.

    A sync itself cannot be seen on a CPU. What can be seen is that the branch that accelerators
    take calls none of the operators that would make one: `item`, `nonzero` and their like. That
    branch gives the same values and counts as the one of the CPU, bit for bit.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = [(1 << 16) + 1, 5, 1000]
    start = [torch.randn(n, generator=generator) for n in shapes]
    sources = [torch.randn(n, generator=generator).bfloat16() for n in shapes]
    sources[1][2] = math.nan
    sources[2][::7] = math.inf
    blind, seeing = [t.clone() for t in start], [t.clone() for t in start]
    path = foreach.Foreach  # what runs on any accelerator
    plans = [engine.Plan(blind, sources, path), engine.Plan(seeing, sources, path)]
    for group in plans[0]._lerp_groups():
        group._cheap_to_read = False
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        for _ in range(3):
            engine.lerp(plans[0], weight)
    names = {event.name for event in profiled.events()}
    waiting = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
    assert names & {"aten::_foreach_lerp_", "aten::lerp"}  # the profiler has seen the update
    assert not names & waiting
    for _ in range(3):
        engine.lerp(plans[1], 0.3)
    assert models.bit_identical(blind, seeing)
    assert plans[0].skipped() == plans[1].skipped() == 3 * (1 + 143)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a sync can only be seen on a GPU")
def test_an_update_makes_no_sync_on_a_gpu() -> None:
    """CUDA's own check finds no synchronizing call in an update."""
    model = _sized(torch.bfloat16).cuda()
    ema = polyak.EMA(model, 0.9)
    ema.update()
    ema.update()
    with no_sync():
        ema.update()
