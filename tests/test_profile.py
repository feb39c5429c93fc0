"""Profiles: against brute force, the papers' numbers, and what a capped history promises."""

import copy
import itertools
import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polyak import profile
from polyak.decay import (
    After,
    Constant,
    Cosine,
    Debiased,
    HalfLife,
    PowerLaw,
    Ramp,
    Uniform,
    as_decay,
)
from polyak.profile import History, Moments, gram, inner, moments, weights

EPS = torch.finfo(torch.float64).eps

DECAYS = [
    Constant(0.9),
    Constant(0.0),
    Constant(1.0),
    HalfLife(30),
    Debiased(0.95),
    PowerLaw(0.05),
    PowerLaw(0.2),
    Uniform(),
    Cosine(0.5, 1.0, 100),
    Ramp(),
    After(40, Uniform()),
    After(60, 0.8),
]

# A history as data: where it begins, whether that was inherited, and (decay, length, times) ticks.
stretches = st.lists(
    st.tuples(st.sampled_from(DECAYS), st.integers(1, 50), st.integers(1, 6)), max_size=10
)
plans = st.tuples(st.integers(0, 200), st.booleans(), stretches)

# Scalar and vector keeps agree to a few ulp of d^dt, dt <= 50, or of a ratio to the power
# g + 1 <= 18 (test_decay derives it); at most 60 of them are multiplied.
TOLERANCE = 60 * 4 * 50 * EPS


def recorded(plan, run="a run"):
    origin, inherited, ticks = plan
    history = History(run, origin, inherited)
    for decay, dt, times in ticks:
        for _ in range(times):
            history.tick(decay, dt)
    return history


def brute(plan):
    """The shares of all states, by updating every one of them at every tick."""
    origin, inherited, ticks = plan
    clock, shares = origin, {("inherited", origin) if inherited else origin: 1.0}
    for decay, dt, times in ticks:
        for _ in range(times):
            clock += dt
            keep = decay.keep(clock, dt)
            shares = {state: share * keep for state, share in shares.items()}
            shares[clock] = 1 - keep
    return shares


def brute_moments(shares, clock):
    ages = [clock - (state[1] if isinstance(state, tuple) else state) for state in shares]
    mean = math.fsum(p * age for p, age in zip(shares.values(), ages, strict=True))
    return {
        "mean_age": mean,
        "variance": math.fsum(
            p * (age - mean) ** 2 for p, age in zip(shares.values(), ages, strict=True)
        ),
        "concentration": math.fsum(p * p for p in shares.values()),
        "largest_share": max(shares.values()),
        "first_share": next(iter(shares.values())),
    }


def differs(a, b, scale=1.0):
    return abs(a - b) > TOLERANCE * scale


# Against brute force ----------------------------------------------------------------------------


@given(plans)
def test_weights(plan):
    clocks, shares = weights(recorded(plan))
    expected = brute(plan)
    assert clocks.dtype == torch.int64
    assert shares.dtype == torch.float64
    assert clocks.tolist() == [s[1] if isinstance(s, tuple) else s for s in expected]
    assert shares.tolist() == pytest.approx(list(expected.values()), rel=0, abs=TOLERANCE)


@given(plans)
def test_a_profile_is_non_negative_and_sums_to_one(plan):
    _, shares = weights(recorded(plan))
    assert (shares >= 0).all()
    # Each product of keeps is rounded once and each share once, by u = EPS / 2 of at most 1.
    assert abs(math.fsum(shares.tolist()) - 1) <= EPS * len(shares)


@given(plans)
def test_moments(plan):
    history = recorded(plan)
    running = Moments()
    clock = plan[0]
    for decay, dt, times in plan[2]:
        for _ in range(times):
            clock += dt
            running.tick(decay.keep(clock, dt), dt)
    whole = moments(history)
    span = max(clock - plan[0], 1)
    for name, expected in brute_moments(brute(plan), clock).items():
        scale = {"mean_age": span, "variance": span**2}.get(name, 1.0)
        assert not differs(getattr(running, name), expected, scale), name
        assert not differs(getattr(whole, name), expected, scale), name
    assert running.deviation == math.sqrt(running.variance)
    assert running.effective_samples == 1 / running.concentration


@given(plans, plans, st.booleans())
def test_inner_products(a, b, same_run):
    histories = [recorded(a), recorded(b, "a run" if same_run else "another")]
    shares = [brute(a), brute(b)]
    shared = shares[0].keys() & shares[1].keys() if same_run else set()
    expected = math.fsum(
        shares[0][state] * shares[1][state] for state in shared if not isinstance(state, tuple)
    )
    assert not differs(inner(*histories), expected)
    assert inner(*histories) == pytest.approx(inner(*reversed(histories)), rel=1e-13, abs=1e-300)
    norms = [math.fsum(p * p for p in each.values()) for each in shares]
    products = gram([*histories, histories[0]])
    assert not differs(products[0, 1].item(), expected)
    assert not differs(products[0, 0].item(), norms[0])
    assert not differs(products[1, 1].item(), norms[1])
    assert products[0, 2] == products[0, 0], "an inherited start is shared with itself"


def test_the_references_can_fail():
    plan = (3, False, [(Constant(0.9), 2, 5), (Uniform(), 1, 4)])
    wrong = (3, False, [(Constant(0.9), 2, 5), (PowerLaw(0.2), 1, 4)])
    assert differs(weights(recorded(plan))[1][0].item(), next(iter(brute(wrong).values())))
    assert any(
        differs(getattr(moments(recorded(plan)), name), value)
        for name, value in brute_moments(brute(wrong), 17).items()
    )


def test_an_old_narrow_average_has_no_spread():
    # A mean of squares minus a squared mean would leave sqrt(eps) of the age.
    running = Moments()
    for _ in range(1000):
        running.tick(1.0, 10**6)
    assert running.mean_age == 1e9
    assert running.deviation == 0.0


# The papers' numbers ----------------------------------------------------------------------------


def steps(decay, count, dt=1):
    """`count` equal ticks, without making them one by one."""
    history = History("a run")
    history.tick(decay, dt)
    values = history.to_dict()
    values["segments"][0]["runs"] = [[count, count * dt, 0]]
    return History.from_dict(values)


def test_equal_ticks_at_once_are_equal_ticks_one_by_one():
    history = History("a run")
    for _ in range(7):
        history.tick(0.5, 3)
    assert steps(Constant(0.5), 7, 3) == history
    assert steps(Constant(0.5), 8, 3) != history


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_constant_decay(decay):
    # After 40 time constants what is left of the start is e^-40 < 1e-17.
    whole = moments(steps(Constant(decay), round(40 / (1 - decay))))
    assert whole.mean_age == pytest.approx(decay / (1 - decay), rel=1e-9)
    assert whole.effective_samples == pytest.approx((1 + decay) / (1 - decay), rel=1e-9)
    first = weights(steps(Constant(decay), 100))[1][0].item()
    assert first == pytest.approx(decay**100, rel=100 * EPS)


@pytest.mark.parametrize(("std", "mean"), [(0.05, 0.947341), (0.10, 0.888158)])
def test_power_law_mean_and_width(std, mean):
    whole = moments(steps(PowerLaw(std), 10000))
    assert 1 - whole.mean_age / 10000 == pytest.approx(mean, abs=5.1e-7)
    assert whole.deviation / 10000 == pytest.approx(std, abs=5.1e-7)


def test_uniform_is_uniform():
    _, shares = weights(steps(Uniform(), 100))
    assert shares[0] == 0
    assert shares[1:].tolist() == pytest.approx([0.01] * 100, rel=200 * EPS)
    tail = weights(steps(After(90, Uniform()), 100))[1]
    assert (tail[:91] == 0).all()
    assert tail[91:].tolist() == pytest.approx([0.1] * 10, rel=20 * EPS)


@given(plans, plans, st.integers(1, 40))
def test_inner_products_are_the_same_in_blocks_of_any_length(a, b, length):
    histories = [recorded(a), recorded(b), recorded(b).until(b[0] + 100)]
    whole = gram(histories)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(profile, "_BLOCK", length)
        assert torch.allclose(gram(histories), whole, rtol=0, atol=TOLERANCE)


@given(plans, st.integers(0, 300))
def test_a_history_until_a_clock_is_what_it_was_then(plan, later):
    origin, inherited, ticks = plan
    history, then = recorded(plan), History("a run", origin, inherited)
    for decay, dt, times in ticks:
        for _ in range(times):
            if then.clock + dt > origin + later:
                break
            then.tick(decay, dt)
        else:
            continue
        break
    cut = history.until(origin + later)
    assert (cut.clock, cut.ticks) == (then.clock, then.ticks)
    assert cut.to_dict()["segments"] == then.to_dict()["segments"]
    assert cut.inherited == inherited
    assert inner(cut, cut) == inner(then, then)
    assert history == recorded(plan) or inherited, "it is left as it was"
    assert history.until(history.clock) == history
    cut.tick(0.5, 3)
    then.tick(0.5, 3)
    assert cut.to_dict()["segments"] == then.to_dict()["segments"]


def test_a_history_that_began_later_was_not_there():
    with pytest.raises(ValueError, match="began at the clock 7, so it was not there at 6: pass"):
        History("a run", 7).until(6)


@pytest.mark.parametrize("gap", [0, 1, 20])
def test_histories_one_after_the_other(gap):
    """The states of both; what lies between is one tick. Both are left as they were."""
    first, second = History("a run", 5), History("a run", 35 + gap)
    for _ in range(10):
        first.tick(0.5, 3)
        second.tick(Uniform(), 2)
    before = [first.to_dict(), second.to_dict()]
    joined = first.then(second)
    clocks, shares = weights(joined.under(Uniform()))
    expected = [*range(5, 36, 3), *([35 + gap] if gap else []), *range(37 + gap, 56 + gap, 2)]
    assert clocks.tolist() == expected
    assert shares[0] == pytest.approx(5 / (55 + gap))
    assert (joined.clock, joined.ticks) == (55 + gap, 20 + bool(gap))
    joined.tick(Uniform(), 2)
    assert [first.to_dict(), second.to_dict()] == before
    assert History("a run", 5).then(second).ticks == 11


@pytest.mark.parametrize(
    "later", [History("a run", 2), History("another", 9), History("a run", 9, inherited=True)]
)
def test_histories_that_do_not_follow_one_another_are_refused(later):
    first = History("a run")
    first.tick(0.5, 3)
    with pytest.raises(ValueError, match=r"does not go on where .* ends: pass a history of the sa"):
        first.then(later)


@pytest.mark.parametrize(("std_a", "std_b"), [(0.05, 0.10), (0.10, 0.10), (0.2, 0.05)])
@pytest.mark.parametrize(("share_a", "share_b"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8)])
def test_inner_products_tend_to_the_integral(std_a, std_b, share_a, share_b):
    # EDM2 eq. 151, per unit of the clock. The sum is a quadrature with T points per run: what it
    # lacks falls at least as 1/T.
    ga, gb = PowerLaw(std_a).exponent, PowerLaw(std_b).exponent

    def error(total):
        ta, tb = round(share_a * total), round(share_b * total)
        power = gb if ta < tb else -ga
        integral = (ga + 1) * (gb + 1) * (ta / tb) ** power / ((ga + gb + 1) * max(ta, tb))
        exact = inner(steps(PowerLaw(std_a), ta), steps(PowerLaw(std_b), tb))
        return abs(exact / integral - 1)

    assert error(10000) < 10 * 20 / 10000
    assert error(10000) < error(1000) / 8


@pytest.mark.parametrize(
    ("count", "std", "error"),
    [
        (8, 0.03, 0.10),
        (8, 0.08, 0.011),
        (8, 0.15, 0.033),
        (8, 0.20, 0.077),
        (8, 0.25, 0.18),
        (16, 0.03, 0.039),
        (16, 0.15, 0.0090),
        (16, 0.20, 0.023),
        (16, 0.25, 0.079),
    ],
)
def test_gram_predicts_the_error_of_a_reconstruction(count, std, error):
    total = 6400
    stored = [
        steps(PowerLaw(width), total * (i + 1) // count)
        for width in (0.05, 0.10)
        for i in range(count)
    ]
    products = gram([*stored, stored[-1].under(PowerLaw(std))])
    n = len(stored)
    # Least squares with coefficients that sum to 1, by a Lagrange multiplier.
    system = torch.ones(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[n, n] = products[:n, :n], 0
    right = torch.cat([products[:n, n], torch.ones(1, dtype=torch.float64)])
    scale = products[n, n]
    system[:n, :n] /= scale
    right[:n] /= scale
    solution = torch.linalg.lstsq(system, right, driver="gelsd").solution
    coefficients = torch.cat([solution[:n], -torch.ones(1, dtype=torch.float64)])
    squared = (coefficients @ products @ coefficients / scale).item()
    # Half a unit of two digits is up to 5 %; 6400 steps instead of a continuum are below 1 %.
    assert math.sqrt(squared) == pytest.approx(error, rel=0.06)


# Inherited starts and runs ----------------------------------------------------------------------


def test_an_inherited_start_is_shared_by_its_own_average_only():
    teacher, other, own = History("a run", 0, True), History("a run", 0, True), History("a run")
    snapshot = History.from_dict(json.loads(json.dumps(teacher.to_dict())))
    for history in (teacher, other, own):
        history.tick(0.5, 1)
    assert teacher.inherited
    assert not own.inherited
    assert inner(teacher, teacher) == 0.5
    assert inner(teacher, snapshot) == 0.5, "an earlier snapshot of the same average"
    assert inner(teacher, other) == 0.25, "another teacher's own values"
    assert inner(teacher, own) == 0.25, "a state of the run"
    assert inner(teacher, teacher.under(0.25)) == 0.5 * 0.25 + 0.5 * 0.75
    assert teacher != other


def test_an_average_that_does_not_tick_keeps_what_it_has():
    early, late = History("a run"), History("a run")
    for _ in range(10):
        early.tick(0.9, 1)
        late.tick(0.9, 1)
    before = inner(early, late)
    late.tick(0.5, 1)
    assert inner(early, late) == pytest.approx(before / 2, rel=4 * EPS)


def test_averages_of_different_cadence_share_what_both_saw():
    fine, coarse = steps(Uniform(), 12), steps(Uniform(), 4, dt=3)
    assert inner(fine, coarse) == pytest.approx(4 * (1 / 12) * (1 / 4), rel=1e-14)
    late = History("a run", origin=1)
    late.tick(0.5, 3)
    assert inner(coarse, late) == 0.0


# Recording --------------------------------------------------------------------------------------


def test_ticks_are_run_length_encoded():
    history = History("a run", origin=5)
    for _ in range(1000):
        history.tick(Constant(0.9), 1)
    history.tick(Constant(0.9), 7)
    history.tick(Constant(0.9), 7)
    history.tick(Uniform(), 7)
    assert (history.clock, history.ticks, history.shift) == (5 + 1021, 1003, 0.0)
    assert history.to_dict() == {
        "run": "a run",
        "origin": 5,
        "start": None,
        "segments": [
            {
                "decay": {"type": "Constant", "decay": 0.9},
                "runs": [[1000, 1000, 0], [2, 14, 0]],
            },
            {"decay": {"type": "Uniform"}, "runs": [[1, 7, 0]]},
        ],
    }
    assert repr(history) == "History(run='a run', origin=5, clock=1026, ticks=1003)"


@given(plans)
def test_a_history_is_written_down_and_read_again(plan):
    history = recorded(plan)
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history == copy.deepcopy(history)
    assert (again.clock, again.ticks) == (history.clock, history.ticks)
    assert again.inherited == history.inherited
    for ours, theirs in zip(weights(history), weights(again), strict=True):
        assert torch.equal(ours, theirs)


@given(plans, stretches)
def test_a_resumed_history_goes_on_as_if_nothing_had_happened(plan, more):
    history = recorded(plan)
    resumed = History.from_dict(json.loads(json.dumps(history.to_dict())))
    for decay, dt, times in more:
        for _ in range(times):
            history.tick(decay, dt)
            resumed.tick(copy.deepcopy(decay), dt)
    assert resumed == history


def test_what_is_written_down_does_not_change_with_later_ticks():
    history = History("a run")
    history.tick(0.5, 1)
    before = history.to_dict()
    written = json.dumps(before)
    history.tick(0.5, 1)
    assert json.dumps(before) == written
    other = history.under(Uniform())
    other.tick(Uniform(), 1)
    assert history.ticks == 2


def test_histories_compare_by_all_they_hold():
    assert History("a") == History("a")
    assert History("a") != History("b")
    assert History("a") != History("a", 1)
    assert History("a") != "a"
    with pytest.raises(TypeError, match="unhashable"):
        hash(History("a"))


def test_under_asks_what_another_decay_would_have_made():
    plan = (7, False, [(Constant(0.9), 2, 5), (Uniform(), 2, 4), (Ramp(), 3, 2)])
    instead = (7, False, [(PowerLaw(0.1), 2, 9), (PowerLaw(0.1), 3, 2)])
    other = recorded(plan).under(PowerLaw(0.1))
    assert (other.clock, other.ticks) == (recorded(plan).clock, recorded(plan).ticks)
    for ours, theirs in zip(weights(other), weights(recorded(instead)), strict=True):
        assert torch.equal(ours, theirs)
    assert weights(History("a run", 4).under(0.5))[1].tolist() == [1.0]


class Foreign:
    def __repr__(self):
        return "Foreign()"

    def keep(self, t, dt):
        return (1 - dt / t) ** 3


def test_somebody_elses_decay_has_a_profile_while_it_is_there():
    history = History("a run")
    decay = as_decay(Foreign())
    for _ in range(20):
        history.tick(decay, 2)
    expected = brute((0, False, [(decay, 2, 20)]))
    assert weights(history)[1].tolist() == pytest.approx(list(expected.values()), abs=TOLERANCE)

    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again == history
    message = r"profile of this average is unknown: its decay Foreign\(\) was an object of the"
    for ask in (weights, moments, lambda h: inner(h, h)):
        with pytest.raises(ValueError, match=message):
            ask(again)
    again.tick(decay, 2)
    assert (again.clock, again.ticks) == (42, 21)
    with pytest.raises(ValueError, match=message):
        weights(again)
    assert weights(again.under(Uniform()))[0].tolist() == list(range(0, 43, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1,), TypeError, r"a history is of a run \(text\) .* not of 1 from 0: write History\("),
        (("a", 1.0), TypeError, r"not of 'a' from 1\.0"),
        (("a", True), TypeError, "not of 'a' from True"),
        (("a", -1), ValueError, "a clock is never negative, got origin=-1: write 0 or more"),
    ],
)
def test_a_history_needs_a_run_and_a_clock(arguments, error, message):
    with pytest.raises(error, match=message):
        History(*arguments)


def test_a_tick_moves_the_clock_by_an_integer():
    history = History("a run")
    with pytest.raises(ValueError, match="a tick of length 0 does not move the clock: pass"):
        history.tick(0.5, 0)
    with pytest.raises(ValueError, match="a tick of length -1 does not move"):
        history.tick(0.5, -1)
    with pytest.raises(TypeError, match=r"a tick is an integer, not 1\.5 of type float: pass"):
        history.tick(0.5, 1.5)
    with pytest.raises(TypeError, match="a decay is a float or a decay value, not None"):
        history.tick(None, 1)
    assert history == History("a run"), "a refused tick leaves no trace"


GOOD = {
    "run": "a",
    "origin": 0,
    "start": None,
    "segments": [{"decay": {"type": "Uniform"}, "runs": [[2, 4, 0]]}],
}


def segment(decay=None, runs=((1, 1, 0),)):
    return {"segments": [{"decay": decay or {"type": "Uniform"}, "runs": runs}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": 1}, "a history is of a run"),
        ({"origin": "0"}, "a history is of a run"),
        ({"origin": -2}, "never negative"),
        ({"start": 3}, "start is 3"),
        ({"segments": None}, "TypeError"),
        ({"segments": [3]}, "TypeError"),
        (segment(decay="Uniform"), "a decay spec is an object such as"),
        (segment(decay={"type": "Quartic"}), "unknown decay type 'Quartic'"),
        (segment(decay={"repr": "x"}), "a decay spec is an object such as"),
        (segment(runs=[]), "a segment without runs"),
        (segment(runs=[[1, 1]]), "ValueError"),
        (segment(runs=[[0, 0, 0]]), "0 where a whole number of 1 or more belongs"),
        (segment(runs=[[2, 1, 0]]), "1 where a whole number of 2 or more belongs"),
        (segment(runs=[[2, 2, -1]]), "-1 where a whole number of 0 or more belongs"),
        (segment(runs=[[2.0, 2, 0]]), r"2\.0 where a whole number"),
        (segment(runs=[[True, 2, 0]]), "True where a whole number"),
        (segment(runs=[["2", 2, 0]]), "'2' where a whole number"),
    ],
)
def test_what_is_no_history_is_refused(change, message):
    assert History.from_dict(GOOD).clock == 4
    with pytest.raises(ValueError, match=rf"(?s)this is no tick history \(.*{message}.*upgrade"):
        History.from_dict(GOOD | change)


@pytest.mark.parametrize("missing", GOOD)
def test_every_part_of_a_history_is_needed(missing):
    values = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(ValueError, match=f"this is no tick history .KeyError: '{missing}'"):
        History.from_dict(values)
    with pytest.raises(ValueError, match="this is no tick history"):
        History.from_dict(None)


# Capping ----------------------------------------------------------------------------------------


def irregular(lengths, decay=PowerLaw(0.1), run="a run"):  # noqa: B008
    history = History(run)
    for dt in lengths:
        history.tick(decay, dt)
    return history


def true_clocks(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def jittered(count, low, high, seed=0):
    source = random.Random(seed)
    return [source.randint(low, high) for _ in range(count)]


def kept_within_bound(history, lengths):
    clocks, shares = weights(history)
    assert (history.clock, history.ticks) == (sum(lengths), len(lengths))
    assert (clocks.diff() >= 1).all(), "seen states stay distinct and in order"
    assert (shares >= 0).all()
    assert abs(math.fsum(shares.tolist()) - 1) <= EPS * len(shares)
    return (clocks - true_clocks(lengths)).abs().max().item() <= history.shift


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 100, 10**6, 10**9]), st.booleans()),
        min_size=1,
        max_size=80,
    ),
    st.randoms(use_true_random=False),
)
def test_no_clock_is_off_by_more_than_the_shift(stretches, source):
    lengths = [
        source.randint(1, length) if jitter else length
        for count, length, jitter in stretches
        for _ in range(count)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "RUNS", 30)
        assert kept_within_bound(irregular(lengths), lengths)


def test_the_bound_can_fail():
    lengths = jittered(3000, 1, 100)
    values = irregular(lengths).to_dict()
    for run in values["segments"][0]["runs"]:
        run[2] //= 4
    assert not kept_within_bound(History.from_dict(values), lengths)


def test_the_state_stops_growing():
    lengths = jittered(30000, 1, 1000)
    history, most = History("a run"), 0
    for dt in lengths:
        history.tick(PowerLaw(0.1), dt)
        most = max(most, len(history._segments[0].runs))
    assert most == profile.RUNS
    assert len(json.dumps(history.to_dict())) < 20000
    assert 0 < history.shift < history.clock / 100
    assert kept_within_bound(history, lengths)
    # A share u of the average, counted from the oldest, belongs to the first tick at or after a
    # clock c(u) that merging does not move. That tick is less than the longest one after c(u); in
    # the merged history, where the ticks around c(u) moved by the shift, by two shifts more.
    exact = Moments()
    clock = 0
    for dt in lengths:
        clock += dt
        exact.tick(PowerLaw(0.1).keep(clock, dt), dt)
    assert abs(moments(history).mean_age - exact.mean_age) <= 2 * history.shift + 1000


def test_only_many_runs_are_merged():
    assert irregular([5] * 10000).shift == 0.0
    epochs = ([512] * 20 + [100]) * (profile.RUNS // 2)
    assert irregular(epochs).shift == 0.0
    assert irregular([*epochs, 512]).shift > 0.0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=400), st.data())
def test_which_knots_are_left_does_not_depend_on_when_they_were_merged(lengths, data):
    runs = [[1, dt, 0] for dt in lengths]
    total = sum(lengths)
    now = data.draw(st.integers(total, 4 * total))
    moments_between = data.draw(st.lists(st.integers(total, now), max_size=4).map(sorted))
    stepwise = runs
    for then in moments_between:
        stepwise = profile._thin(stepwise, 0, then)
    at_once = profile._thin(runs, 0, now)
    stepwise = profile._thin(stepwise, 0, now)
    assert [run[:2] for run in stepwise] == [run[:2] for run in at_once]
    # Merging in steps adds up bounds, so it may state a larger one, never a smaller.
    assert all(s[2] >= a[2] for s, a in zip(stepwise, at_once, strict=True))


@pytest.fixture(scope="module")
def capped():
    """Snapshots of one average along an irregular run, one more average, and the truth."""
    lengths = jittered(20000, 90, 110)
    decay, history, snapshots = PowerLaw(0.1), History("a run"), []
    for i, dt in enumerate(lengths, 1):
        history.tick(decay, dt)
        if i in (5000, 13000, 20000):
            snapshots.append((i, copy.deepcopy(history)))
    clocks = true_clocks(lengths)

    def true_shares(decay, count):
        lengths = clocks[: count + 1].diff()
        keep = torch.cat([torch.zeros(1).double(), decay.keep(clocks[1 : count + 1], lengths)])
        after = torch.cat([keep[1:], torch.ones(1).double()]).flip(0).cumprod(0).flip(0)
        shares = torch.zeros(len(clocks)).double()
        shares[: count + 1] = (1 - keep) * after
        return shares

    rows = [true_shares(decay, count) for count, _ in snapshots]
    rows.append(true_shares(PowerLaw(0.15), len(lengths)))
    histories = [history for _, history in snapshots]
    histories.append(history.under(PowerLaw(0.15)))
    profiles = torch.stack(rows)
    return histories, profiles @ profiles.T


def test_capped_snapshots_still_share_their_states(capped):
    histories, exact = capped
    assert all(history.shift for history in histories)
    error = gram(histories) / exact - 1
    # Evenly spaced ticks have the mean of the squared lengths less their variance: uniform on
    # 90..110 it is (21^2 - 1) / 12 / 100^2 = .0037 of it. The rest is the sample's own spread.
    assert error.abs().max() < 2 * 0.0037
    assert inner(histories[0], histories[2]) == pytest.approx(exact[0, 2].item(), rel=2 * 0.0037)
    assert torch.linalg.eigvalsh(gram(histories))[0] > 0


def test_capped_snapshots_would_not_share_them_by_their_clocks_alone(capped, monkeypatch):
    histories, exact = capped
    monkeypatch.setattr(profile, "_aligned", lambda histories: histories)
    assert gram(histories)[0, 2] < 0.5 * exact[0, 2]


def test_a_capped_history_until_a_clock_is_nearly_what_it_was_then(capped):
    """Between the knots it is the even one; what both have seen, they share."""
    histories, exact = capped
    whole, lengths = histories[2], jittered(20000, 90, 110)
    clocks = true_clocks(lengths)
    for ticks in (4321, 13000, 19999):
        cut = whole.until(clocks[ticks].item())
        assert cut.clock <= clocks[ticks]
        assert abs(cut.clock - clocks[ticks]) <= cut.shift + 110
        assert cut.shift <= whole.shift + 1
        # A tick of 100 is off by at most the shift, in number too.
        assert abs(cut.ticks - ticks) <= cut.shift / 90 + 1
        again = whole.under(PowerLaw(0.1)).until(cut.clock)
        assert inner(cut, whole) == pytest.approx(inner(again, whole), rel=1e-12)
        # What is left of the earlier one in the later one: the keeps, telescoped.
        survives = (cut.clock / whole.clock) ** (PowerLaw(0.1).exponent + 1)
        products = gram([cut, whole])
        assert products[0, 1].item() == pytest.approx(survives * products[0, 0].item(), rel=1e-9)
    same = whole.until(clocks[13000].item())
    assert inner(same, whole) == pytest.approx(exact[1, 2].item(), rel=0.02)


def test_a_capped_history_goes_on_after_a_resume():
    lengths = jittered(5000, 1, 100)
    history = irregular(lengths)
    resumed = History.from_dict(json.loads(json.dumps(irregular(lengths[:3000]).to_dict())))
    for dt in lengths[3000:]:
        resumed.tick(PowerLaw(0.1), dt)
    assert resumed == history


def test_a_capped_history_leaves_those_of_another_run_alone(capped):
    histories, _ = capped
    stranger = irregular(jittered(500, 1, 9), run="another")
    products = gram([histories[0], stranger])
    assert products[0, 1] == 0.0
    assert products[1, 1] == inner(stranger, stranger)


def test_averages_that_began_at_different_times_share_a_capped_past(capped):
    lengths = jittered(20000, 90, 110)
    late = History("a run", sum(lengths[:7777]))
    for dt in lengths[7777:]:
        late.tick(PowerLaw(0.1), dt)
    histories, exact = capped
    # The share of the late one's start is (7777 / 20000)^(g+1) < 1e-3; the rest is as in the other.
    assert inner(histories[2], late) == pytest.approx(exact[2, 2].item(), rel=2 * 0.0037 + 1e-3)


@pytest.mark.parametrize("every", [2, 3])
def test_capped_histories_of_different_ticks_are_refused(every):
    lengths = jittered(12000, 90, 110)
    dense = irregular(lengths)
    sparse = irregular([sum(lengths[i : i + every]) for i in range(0, 12000, every)])
    message = (
        "two averages of the run 'a run' were updated at different clocks, by ticks of more than "
        "1024 .* not known any more. Update averages that are to be combined at the same clocks"
    )
    with pytest.raises(ValueError, match=message):
        inner(dense, sparse)
    with pytest.raises(ValueError, match=message):
        inner(sparse, dense)
    # Before either is capped they are simply different, and exact.
    early = [irregular(lengths[:600]), irregular([sum(lengths[:every])])]
    assert inner(*early) > 0
    # One that had ended before the other began has nothing in common with it.
    late = History("a run", sum(lengths) + 5)
    late.tick(0.5, 1)
    assert inner(dense, late) == 0.0


def test_capped_averages_of_any_ages_share_what_they_saw():
    lengths = jittered(30000, 90, 110)
    clocks = true_clocks(lengths).tolist()
    average, late = History("a run"), History("a run", clocks[500])
    tail, stored = After(clocks[500], Uniform()), []
    for i, dt in enumerate(lengths, 1):
        average.tick(PowerLaw(0.1) if i < 9000 else Constant(0.999), dt)
        if i > 500:
            late.tick(tail, dt)
        if i in (600, 30000):
            stored += [copy.deepcopy(average), copy.deepcopy(late)]
    products = gram(stored)
    # A uniform average has 1 / n of its n last states, one that ended early 1 / 100 of the first
    # 100. The lengths deviate from their mean by 6 %: their sums by .006 in 100, .004 in squares.
    assert products[1, 3].item() == pytest.approx(100 * (1 / 100) * (1 / 29500), rel=0.02)
    assert products[3, 3].item() == pytest.approx(1 / 29500, rel=0.01)
    assert torch.linalg.eigvalsh(products)[0] > 0
    # In any order, and without the one that knows both ends of the early part.
    for order in map(list, itertools.permutations(range(1, 4))):
        fewer = gram([stored[i] for i in order])
        assert torch.allclose(fewer, products[order][:, order], rtol=0.02, atol=0)


def test_what_was_never_merged_may_differ():
    lengths = jittered(3000, 90, 110)
    fine, coarse = irregular([1000] * 100 + lengths), irregular([2000] * 50 + lengths)
    assert fine.shift > 0
    assert coarse.shift > 0
    assert inner(fine, coarse) == pytest.approx(inner(fine, fine), rel=1e-3)


def test_a_run_is_cut_only_where_it_can_have_ticked():
    run = [100, 10000, 50]
    assert profile._cutter({0: 0, 4020: 40})([run], 0) == [[40, 4020, 50], [60, 5980, 50]]
    assert profile._cutter({4020: 5, 10000: 65})([run], 0) == [[40, 4020, 50], [60, 5980, 50]]
    assert profile._cutter({0: 0, 8000: 40})([run], 0) == [run], "40 ticks do not get that far"
    assert profile._cutter({4020: 40})([run], 0) == [run], "counted from nowhere"
    assert profile._cutter({0: 0, 4000: 40})([[100, 10000, 0]], 0)[0] == [40, 4000, 0]
    assert profile._cutter({0: 0, 4001: 40})([[100, 10000, 0]], 0) == [[100, 10000, 0]]


def test_old_ticks_are_known_to_a_32nd_of_their_age():
    lengths = jittered(30000, 1, 1000)
    history = irregular(lengths)
    spans = [
        (begin + total, count, total) for (begin, count, total), shift in history._runs().items()
    ]
    assert max(count for _, count, _ in spans) > 100, "something was merged"
    for end, _, total in spans:
        assert total <= (history.clock - end) / 32 + 1000


def test_a_merged_run_is_not_continued():
    merged = {"decay": {"type": "Uniform"}, "runs": [[2, 5, 1]]}
    history = History.from_dict(GOOD | {"segments": [merged]})
    history.tick(Uniform(), 2)
    assert history.to_dict()["segments"][0]["runs"] == [[2, 5, 1], [1, 2, 0]]


# Size -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [PowerLaw(0.1), Constant(0.9999)])
def test_ten_million_ticks(decay):
    history = steps(decay, 10**7)
    clocks, shares = weights(history)
    assert clocks[-1] == history.clock == 10**7
    # Each product is rounded by at most u; ten million of them by ten million u.
    assert abs(shares.sum().item() - 1) <= 1e7 * EPS
    assert (shares >= 0).all()
    whole = moments(history)
    expected = 1e7 / (decay.exponent + 2) if isinstance(decay, PowerLaw) else 9999
    assert whole.mean_age == pytest.approx(expected, rel=1e-6)


def test_inner_product_of_ten_million_ticks():
    # A uniform average has 1 / T of every state: the inner product is what the other has of them.
    uniform = steps(Uniform(), 10**7)
    expected = pytest.approx(1e-7, rel=1e-7)
    assert inner(steps(Constant(0.9), 5 * 10**6, dt=2), uniform) == expected


def test_clocks_of_tokens_do_not_overflow():
    history = History.from_dict(
        GOOD | {"segments": [{"decay": {"type": "Uniform"}, "runs": [[10**6, 10**17 + 7, 9]]}]}
    )
    clocks, _ = weights(history)
    assert clocks[-1] == history.clock == 10**17 + 7
    assert clocks.diff().max() - clocks.diff().min() <= 1


# Branches ---------------------------------------------------------------------------------------


def ticked(history, count, decay=None):
    decay = decay or PowerLaw(0.1)
    for _ in range(count):
        history.tick(decay, 1)
    return history


def shared_until(a, b, shared):
    """The inner product of two profiles that share the states up to a clock."""
    (clocks_a, shares_a), (clocks_b, shares_b) = weights(a), weights(b)
    found = dict(zip(clocks_b.tolist(), shares_b.tolist(), strict=True))
    pairs = zip(clocks_a.tolist(), shares_a.tolist(), strict=True)
    return sum(share * found.get(clock, 0.0) for clock, share in pairs if clock <= shared)


def test_states_after_a_branch_are_not_shared():
    """Up to it they are, whatever the decays, and after it by those of one name."""
    first = ticked(History("a run"), 300)
    second = ticked(History("a run"), 100)
    other = ticked(History("a run"), 100, Constant(0.99))
    for history, decay in ((second, PowerLaw(0.1)), (other, Constant(0.99))):
        history.branch("once more")
        ticked(history, 150, decay)
    third = ticked(History("a run", origin=120), 0)
    third.branch("once more", 100)
    ticked(third, 130)
    products = gram([first, second, other, third])
    whole = 10**6
    for (i, j), shared in {
        (0, 1): 100,
        (0, 2): 100,
        (1, 2): whole,
        (0, 3): 100,
        (1, 3): whole,
    }.items():
        pair = [first, second, other, third][i], [first, second, other, third][j]
        assert products[i, j].item() == pytest.approx(shared_until(*pair, shared), rel=1e-12)
    assert products[0, 1] < shared_until(first, second, whole) / 10


def test_which_histories_diverge():
    trunk, resumed, again = (ticked(History("a run"), 100) for _ in range(3))
    resumed.branch("b")
    again.branch("c")
    assert not trunk.diverges(resumed), "nothing has followed yet"
    for history in (resumed, again):
        ticked(history, 50)
    assert not trunk.diverges(resumed), "at the clocks that both tell of they are one"
    assert resumed.diverges(again)
    assert again.diverges(resumed)
    ticked(trunk, 10)
    assert trunk.diverges(resumed)
    assert not trunk.until(100).diverges(resumed)
    assert resumed.state(105).diverges(trunk.state(105))
    assert not resumed.state(100).diverges(trunk.state(100))
    late = History("a run", origin=130)
    late.branch("b", 100)
    assert not late.diverges(resumed)
    assert late.diverges(again)


def test_branches_are_written_down():
    """Where something has followed; what never branched is written as it always was."""
    history = ticked(History("a run"), 10)
    before = history.to_dict()
    assert "branches" not in before
    history.branch("first try")
    history.branch("b")
    assert history.to_dict() == before
    ticked(history, 5)
    values = history.to_dict()
    assert values["branches"] == [[10, "b"]]
    assert History.from_dict(values) == history
    assert history.until(10).to_dict() == before
    assert history.under(Uniform()).branches == ((10, "b"),)
    later = ticked(History("a run", origin=20), 5)
    later.branch("c", 18)
    assert history.then(later).branches == ((10, "b"), (18, "c"))
    for wrong in ([[10]], [[-2, "b"]], [["b", 10]], [[10, "a"], [5, "b"]], [[5, "a"]] * 2, 7):
        with pytest.raises(ValueError, match="no tick history"):
            History.from_dict(values | {"branches": wrong})
