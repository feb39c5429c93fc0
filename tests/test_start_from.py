"""An average that goes on from what something else has made."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from models import bit_identical, convolutional, plain, tied, walk_
from polyak import EMA, Debiased, PowerLaw, parameters


@pytest.mark.parametrize("decay", [0.9, PowerLaw(0.1), Debiased(0.95)], ids=repr)
def test_going_on_is_as_if_nothing_had_been(decay: object) -> None:
    """The values and the clock are all that an update needs: the same bits as without a break."""
    model = convolutional()
    whole = EMA(model, decay)  # type: ignore[arg-type]
    for seed in range(6):
        walk_(model, seed)
        whole.update(10 * (seed + 1))
    other = EMA(model, decay)  # type: ignore[arg-type]
    other.start_from(whole.averages, whole.clock)
    assert bit_identical(dict(other.averages), dict(whole.averages))
    assert other.averages["head.weight"] is not whole.averages["head.weight"]
    for seed in range(6, 12):
        walk_(model, seed)
        whole.update(10 * (seed + 1))
        other.update(10 * (seed + 1))
    assert bit_identical(dict(other.averages), dict(whole.averages))
    assert other.clock == whole.clock == 120


def test_what_is_not_averaged_is_left_out_and_what_is_narrow_is_widened() -> None:
    """Counters of a whole state dict, and values in bfloat16."""
    model = convolutional()
    ema = EMA(model, 0.5)
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    assert not set(state) <= set(dict(model.named_parameters()))
    ema.start_from(state, 3)
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        assert torch.equal(average, state[name].float())


def test_a_teacher_takes_the_values() -> None:
    """With into= they are written into the teacher's own tensors."""
    student, teacher = plain(), plain(1)
    ema = EMA(student, 0.5, into=teacher)
    values = {name: torch.full_like(value, 2.0) for name, value in student.state_dict().items()}
    ema.start_from(values, 7)
    assert all(bool((p == 2.0).all()) for p in teacher.parameters())
    ema.update()
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, torch.lerp(values[name], student.state_dict()[name], 0.5))
    assert ema.clock == 8


def test_all_that_does_not_fit_is_listed_and_nothing_changes() -> None:
    """Missing and unknown names, shapes, values that are not finite, a clock that is none."""
    model = plain()
    ema = EMA(model, 0.5)
    ema.update()
    before = {name: average.clone() for name, average in ema.averages.items()}
    values = {name: value.clone() for name, value in model.state_dict().items()}
    values["other"] = torch.ones(1)
    values["head.weight"] = values["head.weight"][:1]
    values["hidden.weight"] = values["hidden.weight"] * torch.nan
    del values["head.bias"]
    with pytest.raises(ValueError, match="does not fit this EMA") as caught:
        ema.start_from(values, 5)
    for line in (
        *("head.bias: missing", "other: only in", "head.weight: (1,", "hidden.weight: not finite"),
    ):
        assert line in str(caught.value)
    with pytest.raises(ValueError, match="clock must be 0 or more, got -1"):
        ema.start_from(model.state_dict(), -1)
    with pytest.raises(TypeError, match="clock counts optimizer steps"):
        ema.start_from(model.state_dict(), 1.5)  # type: ignore[arg-type]
    with ema.applied(), pytest.raises(RuntimeError, match="cannot start from other averages now"):
        ema.start_from(model.state_dict(), 5)
    assert bit_identical(dict(ema.averages), before)
    assert ema.clock == 1


def test_it_can_be_saved_and_goes_on_after_that() -> None:
    """The state has the clock and that what was first is inherited."""
    model = plain()
    ema = EMA(model, PowerLaw(0.1))
    ema.start_from(model.state_dict(), 1000)
    assert ema.history is not None
    assert (ema.history.inherited, ema.history.clock, ema.history.ticks) == (True, 1000, 0)
    walk_(model, 1)
    ema.update()
    resumed = EMA(model, PowerLaw(0.1))
    resumed.load_state_dict(copy.deepcopy(ema.state_dict()))
    walk_(model, 2)
    ema.update()
    resumed.update()
    assert bit_identical(dict(resumed.averages), dict(ema.averages))
    assert resumed.clock == 1002
    assert resumed.history == ema.history


def test_a_long_horizon_that_was_inherited_is_no_mistake() -> None:
    """What came before is meant to weigh most: nobody is warned."""
    model = plain()
    ema = EMA(model, 0.9999)
    ema.start_from(model.state_dict(), 100_000)
    for seed in range(30):
        walk_(model, seed)
        ema.update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ema.applied():
            pass


def test_parameters_alone_are_enough_for_a_policy_of_parameters() -> None:
    """As peers that know no buffers have them; for the others the message says what is missing."""
    model = convolutional()
    loaded = {name: value.detach() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match="running_mean: missing"):
        EMA(model, 0.5).start_from(loaded, 1)
    ema = EMA(model, 0.5, policy=parameters)
    ema.start_from(loaded, 1)
    assert set(ema.averages) == set(loaded)
    whole = EMA(model, 0.5)
    whole.start_from(dict(model.state_dict()) | loaded, 1)
    assert set(whole.averages) > set(loaded)


def test_a_tied_tensor_may_come_under_each_of_its_names() -> None:
    """As files have it; two values for one tensor are refused."""
    model = tied()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    ema = EMA(model, 0.5)
    ema.start_from(state, 1)
    assert torch.equal(ema.averages["encoder.weight"], state["decoder.weight"])
    state["decoder.weight"] = state["decoder.weight"] + 1
    for values in (state, dict(reversed(state.items()))):
        with pytest.raises(ValueError, match=r"weight \(a second time\)"):
            ema.start_from(values, 1)
    state["decoder.weight"] = state["encoder.weight"].double()
    ema.start_from(state, 2)  # the same values


def test_the_clock_where_it_began_is_no_repeat_to_warn_of() -> None:
    """`update(clock)` right after it: nothing is new, and nothing is wrong."""
    model = plain()
    ema = EMA(model, 0.5)
    ema.start_from(model.state_dict(), 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.update(7)
    assert (ema.clock, ema.report().repeats) == (7, 1)
