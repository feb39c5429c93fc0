"""Decays: their numbers, their laws, what they refuse, and how they are written down."""

import copy
import json
import math
import pickle
import warnings
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyak import decay as module
from polyak.decay import (
    After,
    Constant,
    Cosine,
    Debiased,
    Decay,
    DecayLike,
    ExponentialRamp,
    HalfLife,
    InverseGamma,
    Linear,
    Opaque,
    PowerLaw,
    Ramp,
    Uniform,
    as_decay,
    from_spec,
    to_spec,
)

EPS = torch.finfo(torch.float64).eps

shares = st.floats(0.0, 1.0)
constants = st.builds(Constant, shares) | st.builds(HalfLife, st.floats(0.1, 1e6))
exact_inner = (
    constants
    | st.builds(Debiased, st.builds(Constant, st.floats(1e-3, 1 - 1e-9)))
    | st.builds(Debiased, st.builds(HalfLife, st.floats(0.1, 1e6)))
    | st.builds(PowerLaw, st.floats(0.001, 0.288))
    | st.just(Uniform())
)
exact = exact_inner | st.builds(After, st.integers(0, 2000), exact_inner)
schedules = (
    st.builds(Cosine, shares, shares, st.integers(1, 5000))
    | st.builds(Linear, shares, shares, st.integers(1, 5000))
    | st.builds(InverseGamma, st.floats(0.1, 2), st.floats(0.1, 100), shares)
    | st.builds(Ramp, shares)
    | st.builds(ExponentialRamp, shares, st.integers(1, 5000))
)
anything = exact | schedules | st.builds(After, st.integers(0, 2000), schedules)

EXAMPLES = [
    Constant(0.9),
    Constant(0.0),
    Constant(1.0),
    HalfLife(1000),
    Debiased(0.999),
    Debiased(HalfLife(50)),
    PowerLaw(0.1),
    Uniform(),
    Cosine(0.99, 1.0, 1000),
    Linear(0.5, 0.75, 100),
    After(10, 0.5),
    After(3, After(4, Cosine(0.5, 1.0, 7))),
    InverseGamma(),
    InverseGamma(0.75, 2.0, 0.99),
    Ramp(),
    ExponentialRamp(0.99, 100),
]


# Numbers of the papers and of the peers ---------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "half_life"),
    [(0.9, 6.579), (0.99, 68.968), (0.999, 692.801), (0.9999, 6931.125), (0.99999, 69314.37)],
)
def test_half_life_of_a_constant(decay, half_life):
    # The table is rounded in its last digit: 1e-3 covers half a unit of it, or 5e-3 of the last.
    assert math.log(0.5) / math.log(Constant(decay).keep(1, 1)) == pytest.approx(
        half_life, abs=5e-3
    )
    # One half-life halves: the exponent's relative error is the table's, 5e-4 / 6.5 at most.
    assert Constant(decay).keep(10**6, round(half_life)) == pytest.approx(
        HalfLife(half_life).keep(10**6, round(half_life)), rel=1e-4
    )


@pytest.mark.parametrize(
    ("half_life", "decay"),
    [(10, 0.9330329915), (100, 0.9930924954), (1000, 0.9993070930), (10000, 0.9999306877)],
)
def test_constant_of_a_half_life(half_life, decay):
    assert HalfLife(half_life).keep(1, 1) == pytest.approx(decay, abs=5.1e-11)
    assert HalfLife(half_life).keep(half_life, half_life) == 0.5


@pytest.mark.parametrize(
    ("t", "weight"),
    [
        (1, 1.0),
        (2, 0.500250125),
        (10, 0.1004508254),
        (100, 0.0105033353),
        (1000, 0.0015815163),
        (10000, 0.0010000452),
    ],
)
def test_debiased_weights(t, weight):
    assert 1 - Debiased(0.999).keep(t, 1) == pytest.approx(weight, abs=5.1e-10)
    assert Debiased(Constant(0.999)) == Debiased(0.999)


def test_debiased_is_the_average_from_zero_divided_by_its_weight():
    # m <- d m + (1 - d) x from 0, divided by 1 - d^t: the textbook form of the same numbers.
    generator = torch.Generator().manual_seed(0)
    xs = torch.rand(500, dtype=torch.float64, generator=generator).tolist()
    biased, average = 0.0, 0.0
    for t, x in enumerate(xs, 1):
        biased = 0.99 * biased + 0.01 * x
        keep = Debiased(0.99).keep(t, 1)
        average = keep * average + (1 - keep) * x
        # Each of t convex steps rounds thrice; 1 - d^t >= .01 magnifies what cancels in it.
        assert average == pytest.approx(biased / (1 - 0.99**t), rel=(3 * t + 100) * EPS)


def test_debiased_tiny_rates_are_uniform():
    # 1 - d^t would cancel to nothing here; -expm1(t log d) does not.
    assert Debiased(HalfLife(1e15)).keep(4, 1) == pytest.approx(0.75, rel=1e-14)


@pytest.mark.parametrize(
    ("std", "exponent"),
    [
        (0.01, 96.9948978237),
        (0.05, 16.9721986023),
        (0.10, 6.9372039376),
        (0.15, 3.5578687749),
        (0.20, 1.8262137799),
        (0.25, 0.719823958001),
    ],
)
def test_power_law_exponent(std, exponent):
    g = PowerLaw(std).exponent
    assert g == pytest.approx(exponent, abs=5.1e-11)
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std, rel=8 * EPS)


@given(st.floats(1e-9, 0.2886))
def test_power_law_exponent_inverts_the_width(std):
    g = PowerLaw(std).exponent
    # x = g + 2 is found to a few ulp; near the upper end, where g is small, g + 1 is still > 1.
    assert math.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))) == pytest.approx(std, rel=32 * EPS)


def test_power_law_exponent_at_the_ends():
    assert 0 < PowerLaw(0.28867513).exponent < 1e-6
    assert PowerLaw(1e-300).exponent == pytest.approx(1e300, rel=4 * EPS)


@pytest.mark.parametrize(
    ("std", "t", "keep"),
    [
        (0.05, 1, 0.0),
        (0.05, 2, 3.888921105e-6),
        (0.05, 10, 0.1505349325),
        (0.05, 100, 0.8347469683),
        (0.05, 1000, 0.9821795063),
        (0.10, 2, 0.0040800317),
        (0.10, 10, 0.4333247207),
        (0.10, 100, 0.9233272422),
        (0.10, 1000, 0.9920902726),
        (0.10, 10000, 0.9992065549),
    ],
)
def test_power_law_keep(std, t, keep):
    assert PowerLaw(std).keep(t, 1) == pytest.approx(keep, rel=2e-10, abs=5.1e-11)


@pytest.mark.parametrize(
    ("power", "n", "decay"),
    [
        (2 / 3, 0, 0.0),
        (2 / 3, 1, 0.370039),
        (2 / 3, 10, 0.797820),
        (2 / 3, 100, 0.953891),
        (2 / 3, 1000, 0.990007),
        (2 / 3, 10**4, 0.997846),
        (2 / 3, 10**5, 0.999536),
        (3 / 4, 1, 0.405396),
        (3 / 4, 100, 0.968612),
        (3 / 4, 10**4, 0.999),
        (2 / 3, 10**8, 0.9999),
    ],
)
def test_inverse_gamma(power, n, decay):
    assert InverseGamma(power).keep(n + 1, 1) == pytest.approx(decay, abs=5.1e-7)


def test_inverse_gamma_of_power_one_is_uniform():
    for t in (1, 2, 10, 1000):
        uniform = InverseGamma(1, limit=1.0).keep(t, 1)
        assert uniform == pytest.approx(Uniform().keep(t, 1), abs=2 * EPS)


def test_ramp():
    assert Ramp().keep(1, 1) == pytest.approx(2 / 11, rel=EPS)
    for limit, n in ((0.99, 890), (0.999, 8990), (0.9999, 89990)):
        assert Ramp(limit).keep(n - 1, 1) < Ramp(limit).keep(n, 1) == pytest.approx(limit, rel=EPS)
        assert Ramp(limit).keep(n + 1, 1) == limit
    # Uncapped, the weight of the newest state tends to (8 + 1) / t: a power average of exponent 8.
    assert (1 - Ramp(1.0).keep(10**9, 1)) * 10**9 == pytest.approx(9, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "decay"),
    [
        (1, 0.0005),
        (100, 0.048766),
        (1000, 0.393430),
        (2000, 0.632057),
        (5000, 0.917823),
        (10**4, 0.993163),
        (2 * 10**4, 0.999855),
    ],
)
def test_exponential_ramp(n, decay):
    assert ExponentialRamp().keep(n, 1) == pytest.approx(decay, abs=5.1e-7)


@pytest.mark.parametrize(
    ("start", "decays"),
    [
        (0.99, [0.99, 0.99146447, 0.995, 0.99853553, 1.0]),
        (0.996, [0.996, 0.99658579, 0.998, 0.99941421, 1.0]),
    ],
)
def test_cosine(start, decays):
    cosine = Cosine(start, 1.0, 400)
    for quarter, decay in enumerate(decays):
        assert cosine.keep(1 + 100 * quarter, 1) == pytest.approx(decay, abs=5.1e-9)
    assert cosine.keep(1, 1) == start
    assert cosine.keep(401, 1) == cosine.keep(10**6, 1) == 1.0


def test_linear():
    line = Linear(0.996, 1.0, 1000)
    assert line.keep(1, 1) == 0.996
    assert line.keep(251, 1) == pytest.approx(0.997, rel=EPS)
    assert line.keep(1001, 1) == line.keep(10**6, 1) == 1.0


def test_schedules_raise_their_decay_to_the_length_of_the_tick():
    assert Ramp().keep(8, 3) == 0.5**3
    assert Linear(0.5, 1.0, 4).keep(3, 2) == 0.75**2


def test_after():
    tail = After(10, Uniform())
    assert [tail.keep(t, 1) for t in (1, 10, 11, 12, 13)] == [0, 0, 0, 0.5, 2 / 3]
    assert tail.keep(12, 3) == 0, "a tick that crosses the start copies"
    constant = After(10, 0.25)
    assert [constant.keep(t, 1) for t in (10, 11, 12)] == [0, 0.25, 0.25]
    assert After(0, Uniform()).keep(5, 1) == Uniform().keep(5, 1)
    nested = After(10, After(5, 0.25))
    assert [nested.keep(t, 1) for t in (10, 11, 15, 16)] == [0, 0, 0, 0.25]


def test_constants_are_powers_to_the_bit():
    assert Constant(0.5).keep(1, 1) == 0.5
    assert Constant(0.999).keep(1, 1) == 0.999
    assert Constant(0).keep(3, 1) == 0.0
    assert Constant(1).keep(3, 2) == 1.0


# Laws -------------------------------------------------------------------------------------------


def cadence_holds(decay, t, a, b):
    """Whether one tick of a + b keeps what a tick of a and then one of b keep.

    Each of the three keeps is off by the rounding of its parts. The worst parts: a power g + 1 of a
    rounded ratio, relative error (g + 1) u, and 2^x of a rounded x > -1075, relative error below
    750 u; four such factors at most. Below the normal numbers only absolute error is left.
    """
    inner = decay.inner if isinstance(decay, After) else decay
    relative = 4 * (800 + getattr(inner, "exponent", 0.0)) * EPS
    together = decay.keep(t, a + b)
    return math.isclose(
        together, decay.keep(t - b, a) * decay.keep(t, b), rel_tol=relative, abs_tol=1e-300
    )


@given(exact, st.integers(1, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
def test_cadence(decay, t, a, b):
    a %= t + 1
    b %= t - a + 1
    assert decay.exact
    assert cadence_holds(decay, t, a, b)


@pytest.mark.parametrize("decay", EXAMPLES)
def test_what_is_not_exact_says_so_and_differs(decay):
    broken = [t for t in range(5, 40) if not cadence_holds(decay, t, 2, 3)]
    assert bool(broken) == (not decay.exact)


def test_the_cadence_helper_can_fail():
    @dataclass(frozen=True)
    class OffByAMillionth(Constant):
        def _keep(self, t, dt, xp):
            return super()._keep(t, dt, xp) * (1 - 1e-6 * (dt > 1))

    assert cadence_holds(Constant(0.9), 10, 2, 3)
    assert not cadence_holds(OffByAMillionth(0.9), 10, 2, 3)


@given(anything, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_share_is_between_0_and_1(decay, t, dt):
    assert 0.0 <= decay.keep(t, min(t, dt)) <= 1.0


@given(anything, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 1000)), min_size=1))
def test_vectors_agree_with_scalars(decay, ticks):
    t = torch.tensor([t for t, _ in ticks])
    dt = torch.tensor([min(t, dt) for t, dt in ticks])
    kept = decay.keep(t, dt)
    assert kept.dtype == torch.float64
    # One formula, two libraries, each within ulps: a decay that is off by u moves d^dt by at most
    # dt u <= 1000 u, a ratio to the power g + 1 by at most (g + 1) u <= 1000 u.
    alone = [decay.keep(*tick) for tick in zip(t.tolist(), dt.tolist(), strict=True)]
    assert kept.tolist() == pytest.approx(alone, rel=0, abs=4 * 1000 * EPS)


@given(anything)
def test_a_tick_of_no_length_keeps_everything(decay):
    assert decay.keep(0, 0) == decay.keep(7, 0) == 1.0
    assert decay.keep(torch.arange(5), 0).eq(1).all()


def test_vectors_take_integers_and_floats_alike():
    t, dt = torch.tensor([[2, 4], [8, 16]]), 2
    whole = PowerLaw(0.1).keep(t, dt)
    assert whole.shape == (2, 2)
    assert torch.equal(whole, PowerLaw(0.1).keep(t.float(), torch.tensor(2.0)))
    assert torch.equal(whole, PowerLaw(0.1).keep(t, torch.full((2, 2), 2)))


def test_large_clocks_and_long_ticks():
    # Tokens: clocks beyond what products of integers would hold in 64 bits.
    t, dt = 10**15, 4 * 10**6
    for decay in EXAMPLES:
        assert 0 <= decay.keep(t, dt) <= 1
        assert 0 <= decay.keep(torch.tensor([t]), dt).item() <= 1
    assert Constant(0.5).keep(10**9, 10**9) == 0.0
    assert Debiased(0.5).keep(10**9, 10**9 - 1) == 0.0


@pytest.mark.parametrize(("t", "dt"), [(3, 4), (3, -1), (-1, 0), (0, 1)])
def test_a_tick_lies_within_the_clock(t, dt):
    message = rf"a tick of length {dt}(\.0)? cannot end at clock {t}(\.0)?: .*0 <= dt <= t"
    with pytest.raises(ValueError, match=message):
        Uniform().keep(t, dt)
    with pytest.raises(ValueError, match=message):
        Uniform().keep(torch.tensor([5, t]), torch.tensor([1, dt]))


def test_clocks_are_integers():
    with pytest.raises(TypeError, match=r"t must be an integer, not 2\.0 of type float"):
        Uniform().keep(2.0, 1)
    with pytest.raises(TypeError, match="dt must be an integer, not True"):
        Uniform().keep(2, True)
    assert Uniform().keep(torch.tensor([4])[0], 1).item() == 0.75


def test_numpy_integers_are_integers():
    numpy = pytest.importorskip("numpy")
    assert Uniform().keep(numpy.int64(4), numpy.int32(1)) == 0.75
    assert type(Constant(numpy.float32(0.5)).decay) is float


# Values -----------------------------------------------------------------------------------------


@given(anything)
def test_a_decay_is_written_down_and_made_again(decay):
    assert from_spec(json.loads(json.dumps(to_spec(decay)))) == decay
    assert eval(repr(decay), vars(module)) == decay
    assert pickle.loads(pickle.dumps(decay)) == copy.deepcopy(decay) == decay
    assert hash(copy.deepcopy(decay)) == hash(decay)


def test_the_examples_cover_every_decay():
    assert {type(decay).__name__ for decay in EXAMPLES} == set(module._KINDS)
    public = {name for name, value in vars(module).items() if not name.startswith("_")}
    assert not public & {"momentum", "beta", "tau", "smoothing"}


@pytest.mark.parametrize("decay", EXAMPLES, ids=repr)
def test_decays_are_values(decay):
    assert len({decay, copy.copy(decay), from_spec(to_spec(decay))}) == 1
    assert sum(decay == other for other in EXAMPLES) == 1
    with pytest.raises(FrozenInstanceError):
        decay.other = 1
    assert isinstance(decay, DecayLike)


def test_reprs_and_specs():
    assert repr(HalfLife(1000)) == "HalfLife(half_life=1000.0)"
    assert repr(PowerLaw(0.1)) == "PowerLaw(std=0.1)"
    assert repr(Debiased(0.5)) == "Debiased(inner=Constant(decay=0.5))"
    assert repr(After(1, 0.5)) == "After(start=1, inner=Constant(decay=0.5))"
    assert to_spec(PowerLaw(0.1)) == {"type": "PowerLaw", "std": 0.1}
    assert to_spec(Cosine(0, 1, 9)) == {"type": "Cosine", "start": 0.0, "end": 1.0, "steps": 9}
    assert to_spec(Debiased(HalfLife(7))) == {
        "type": "Debiased",
        "inner": {"type": "HalfLife", "half_life": 7.0},
    }


def test_a_decay_cannot_be_made_without_a_formula():
    with pytest.raises(TypeError, match="abstract"):
        Decay()


# Refusals ---------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    (
        lambda: Constant(-0.001),
        r"decay must be between 0 and 1, got -0\.001: .*Was 1 - decay meant",
    ),
    (lambda: Constant(1.5), r"got 1\.5: .*momentum or tau.* such as 0\.999$"),
    (lambda: Constant(1000), r"got 1000: .*; for a horizon in ticks, HalfLife\(1000\)"),
    (lambda: Constant(math.nan), "decay must be finite, got nan: write"),
    (lambda: Constant(10**400), "decay must be finite, got 1000"),
    (lambda: HalfLife(0), "half_life must be positive, got 0: write a number of ticks above 0"),
    (lambda: HalfLife(-3.0), r"half_life must be positive, got -3\.0"),
    (lambda: HalfLife(math.inf), "half_life must be finite, got inf"),
    (lambda: Debiased(Constant(1)), r"Debiased .* not Constant\(decay=1\.0\): write Uniform\(\)"),
    (lambda: Debiased(Constant(0)), r"strictly between 0 and 1, .*Constant\(0\.0\) for what 0"),
    (lambda: Debiased(HalfLife(1e-320)), "strictly between 0 and 1"),
    (lambda: PowerLaw(0.0), r"std must be between 0 and 1/sqrt\(12\) = 0\.2887, got 0\.0: "),
    (lambda: PowerLaw(0.3), r"got 0\.3: .*Write PowerLaw\(0\.10\), or Uniform\(\).*HalfLife\(n\)"),
    (lambda: PowerLaw(1 / math.sqrt(12)), "std must be between"),
    (lambda: PowerLaw(math.nan), "std must be finite, got nan"),
    (lambda: Cosine(1.2, 1, 9), r"start must be between 0 and 1, got 1\.2: .*Was 1 - decay meant"),
    (lambda: Cosine(0.9, -1, 9), r"end must be between 0 and 1, got -1"),
    (lambda: Cosine(0.9, 1, 0), "steps must be at least 1, got 0: write a whole number"),
    (lambda: Linear(0.9, 7, 9), r"end must be between 0 and 1, got 7"),
    (lambda: Linear(0.9, 1, -1), "steps must be at least 1, got -1"),
    (lambda: After(-1, 0.5), "start must be at least 0, got -1"),
    (lambda: After(1, 1.5), r"decay must be between 0 and 1, got 1\.5"),
    (lambda: After(1, 1.0), r"never moves.*Constant\(1\.0\)"),
    (lambda: InverseGamma(power=0), "power must be positive, got 0: write an exponent above 0"),
    (lambda: InverseGamma(inv_gamma=-1), "inv_gamma must be positive, got -1"),
    (lambda: InverseGamma(limit=2), "limit must be between 0 and 1, got 2"),
    (lambda: Ramp(-0.1), r"limit must be between 0 and 1, got -0\.1"),
    (lambda: ExponentialRamp(1.1), r"limit must be between 0 and 1, got 1\.1"),
    (lambda: ExponentialRamp(0.9, 0), "steps must be at least 1, got 0"),
]

WRONG_TYPE = [
    (lambda: Constant(True), "decay must be a number, not True of type bool: write a float"),
    (lambda: Constant("0.9"), "decay must be a number, not '0.9' of type str"),
    (lambda: Constant(torch.tensor(0.9)), "decay must be a number, not tensor"),
    (lambda: HalfLife(None), "half_life must be a number, not None"),
    (lambda: PowerLaw(False), "std must be a number, not False"),
    (lambda: Debiased(Uniform()), r"Debiased corrects a constant decay, not Uniform\(\): pass"),
    (lambda: Debiased("x"), "a decay is a float or a decay value, not 'x'"),
    (lambda: Cosine(0.9, 1, 9.0), r"steps must be an integer, not 9\.0 of type float"),
    (lambda: Cosine(0.9, 1, True), "steps must be an integer, not True"),
    (lambda: Linear(None, 1, 9), "start must be a number, not None"),
    (lambda: After(1.0, 0.5), r"start must be an integer, not 1\.0 of type float: write a whole"),
    (lambda: After(1, None), "a decay is a float or a decay value, not None"),
    (lambda: InverseGamma("a"), "power must be a number, not 'a'"),
    (lambda: Ramp(True), "limit must be a number, not True"),
    (lambda: ExponentialRamp(steps="9"), "steps must be an integer, not '9'"),
    (lambda: as_decay(None), r"not None of type NoneType: write 0\.999, PowerLaw\(0\.10\)"),
    (lambda: as_decay(True), "a decay is a float or a decay value, not True of type bool"),
    (lambda: as_decay(torch.tensor(0.9)), "a decay is a float or a decay value, not tensor"),
    (lambda: as_decay(PowerLaw), r"PowerLaw is a class: write PowerLaw\(\.\.\.\)"),
    (lambda: as_decay(object()), "a decay is a float or a decay value, not <object"),
]


@pytest.mark.parametrize(("make", "message"), OUT_OF_RANGE)
def test_values_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("make", "message"), WRONG_TYPE)
def test_wrong_types_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# What a user's value means ----------------------------------------------------------------------


def test_a_float_is_a_constant():
    assert as_decay(0.999) == Constant(0.999)
    assert as_decay(0.1) == Constant(0.1)
    assert as_decay(PowerLaw(0.1)) == PowerLaw(0.1)


@pytest.mark.parametrize("value", [0.001, 0.05, 0.0999])
def test_a_small_float_warns(value):
    kept, replaced = (rf"Constant\(decay={x}\)" for x in (float(value), 1.0 - value))
    message = rf"decay={value} keeps only .*tau in .*, write {replaced}; if .* meant, write {kept}"
    with pytest.warns(UserWarning, match=message):
        assert as_decay(value) == Constant(value)
    with pytest.warns(UserWarning, match="keeps only"):
        After(10, value)


def test_a_small_constant_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_decay(Constant(0.001)).keep(1, 1) == 0.001


@pytest.mark.parametrize("value", [1.0, 1])
def test_one_is_refused_unless_it_is_spelled_out(value):
    with pytest.raises(ValueError, match=rf"decay={value} never moves: .*Constant\(1\.0\)"):
        as_decay(value)
    assert as_decay(Constant(value)).keep(5, 5) == 1.0


def test_a_number_of_ticks_is_refused():
    with pytest.raises(ValueError, match=r"HalfLife\(1000\)"):
        as_decay(1000)


# Somebody else's --------------------------------------------------------------------------------


class Foreign:
    def __repr__(self):
        return "Foreign()"

    def keep(self, t, dt):
        assert type(t) is int, "somebody else's decay sees plain integers"
        return (1 - dt / t) ** 3


def test_anything_with_keep_is_a_decay():
    decay = as_decay(source := Foreign())
    assert isinstance(decay, Decay)
    assert decay == Opaque(source) == as_decay(source)
    assert repr(decay) == "Foreign()"
    assert not decay.exact
    assert decay.keep(4, 2) == 0.125
    assert decay.keep(0, 0) == 1.0
    t = torch.tensor([[0, 1], [2, 4]])
    assert torch.equal(
        decay.keep(t, t.clamp(max=1)),
        torch.tensor([[1, 0], [0.125, 0.75**3]], dtype=torch.float64),
    )
    tail = After(2, source)
    assert tail.keep(torch.tensor([2, 3, 4]), 1).tolist() == [0.0, 0.0, 0.125]
    assert not tail.exact


@pytest.mark.parametrize("share", [1.5, -0.1, math.nan])
def test_what_it_answers_is_checked(share):
    class Wrong(Foreign):
        def keep(self, t, dt):
            return share

    message = rf"keep\(5, 1\) of Foreign\(\) is {share}, not a share between 0 and 1: return"
    with pytest.raises(ValueError, match=message):
        as_decay(Wrong()).keep(5, 1)
    with pytest.raises(ValueError, match="not a share between 0 and 1"):
        as_decay(Wrong()).keep(torch.tensor([5]), 1)


def test_somebody_elses_decay_has_no_spec():
    opaque = {"type": "opaque", "repr": "Foreign()"}
    assert to_spec(as_decay(Foreign())) == opaque
    assert to_spec(After(3, Foreign())) == {
        "type": "opaque",
        "repr": "After(start=3, inner=Foreign())",
    }
    with pytest.raises(ValueError, match=r"the decay Foreign\(\) cannot be made from its spec: "):
        from_spec(opaque)


def test_a_subclass_is_somebody_elses():
    class Mine(Uniform):
        pass

    assert to_spec(Mine()) == {"type": "opaque", "repr": repr(Mine())}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "Quartic", "a": 1}, "unknown decay type 'Quartic': this polyak knows Constant, "),
        ({"type": "Quartic"}, "A newer version may have written it; upgrade polyak"),
        ({"type": "Decay"}, "unknown decay type 'Decay'"),
        ({"type": "After", "start": 1, "inner": {"type": "X"}}, "unknown decay type 'X'"),
        ({"type": "Constant"}, "makes no Constant: .*missing"),
        ({"type": "Constant", "decay": 2.0}, "makes no Constant: decay must be between 0 and 1"),
        ({"type": "Constant", "decay": None}, "makes no Constant: decay must be a number"),
        ({"type": "Constant", "decay": 0.5, "extra": 1}, "makes no Constant: .*unexpected"),
        ({"type": "PowerLaw", "std": 0.1, "exponent": 1}, "makes no PowerLaw: .*unexpected"),
        ({"decay": 0.5}, "a decay spec is an object such as"),
        (0.5, r"a decay spec is an object such as .* not 0\.5"),
        ({"type": ["Constant"]}, "a decay spec is an object such as"),
    ],
)
def test_bad_specs_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        from_spec(spec)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_floats_survive_json_to_the_bit(value):
    again = from_spec(json.loads(json.dumps(to_spec(Constant(value)))))
    assert again.decay.hex() == value.hex()
