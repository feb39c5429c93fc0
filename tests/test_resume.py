"""Law 7, resume: train N, save, kill, load, train M equals train N + M, bit for bit.

For every model, decay and cadence, for every order in which a script may load things, through
``torch.save`` and ``torch.load(weights_only=True)``; and with a real process that is killed.
"""

from __future__ import annotations

import copy
import gc
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import models
from models import MODELS, bit_identical
from polyak import (
    EMA,
    After,
    Constant,
    Cosine,
    Debiased,
    HalfLife,
    PowerLaw,
    Uniform,
    files,
)
from polyak.decay import Decay

DECAYS: list[Decay] = [
    Constant(0.9),
    HalfLife(3),
    Debiased(0.9),
    PowerLaw(0.10),
    Uniform(),
    Cosine(0.5, 1.0, 20),
    After(4, Uniform()),
]

# What a script loads, in the order it likes.
PARTS = ["model", "optimizer", "average", "teacher"]


class Run:
    """A training script: a model, its optimizer, an average of it, and maybe a teacher."""

    def __init__(
        self,
        name: str,
        decay: Decay,
        *,
        seed: int = 0,
        into: bool = False,
        every: int = 1,
        attached: bool = True,
    ) -> None:
        self.model = MODELS[name](seed)
        self.teacher = MODELS[name](seed + 1) if into else None
        if name == "masked":  # with a teacher every floating tensor is averaged
            self.model.mask.zero_()
            if self.teacher is not None:
                self.teacher.mask.zero_()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        self.ema = EMA(self.model, decay, into=self.teacher)
        self.every, self.attached = every, False
        if attached:
            self.attach()

    def attach(self) -> None:
        if not self.attached:
            self.ema.attach(self.optimizer, every=self.every, tick=3)
        self.attached = True

    def train(self, begin: int, end: int) -> None:
        self.attach()
        for _ in models.train(self.model, self.optimizer, range(begin, end)):
            pass

    def checkpoint(self) -> dict[str, Any]:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.ema.state_dict(),
            "rng": torch.get_rng_state(),
        }
        if self.teacher is not None:
            state["teacher"] = self.teacher.state_dict()
        return state

    def load(self, state: Mapping[str, Any], order: tuple[str, ...] = tuple(PARTS)) -> None:
        objects = {
            "model": self.model,
            "optimizer": self.optimizer,
            "average": self.ema,
            "teacher": self.teacher,
        }
        for part in order:
            if part in state and objects[part] is not None:
                objects[part].load_state_dict(state[part])
        torch.set_rng_state(state["rng"])

    def all(self) -> dict[str, Any]:
        """Everything that must be the same: all states, what is exported, what is reported."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metrics = self.ema.report().metrics()
        state = copy.deepcopy(self.checkpoint())
        state["average"] = without_run(state["average"])
        return state | {"exported": self.ema.model_state_dict(), "metrics": metrics}


def without_run(state: Mapping[str, Any]) -> dict[str, Any]:
    """Drop from an EMA's state the ids that two runs never share; read the facts as JSON."""
    facts = json.loads(state["facts"])
    if facts["history"] is not None:
        ids = ("run", "start", "branches")
        facts["history"] = {k: v for k, v in facts["history"].items() if k not in ids}
    return {"averages": dict(state["averages"]), "facts": facts}


def through_a_file(state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``torch.load`` gives back in a process that trusts no file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resumed_equals_straight(n: int, m: int, order: tuple[str, ...], warm: int, **how: Any) -> None:
    """Train n, save, load into a new script, train m; compare with n + m in one go."""
    torch.manual_seed(5)
    straight = Run(**how)
    straight.train(0, n + m)

    torch.manual_seed(5)
    first = Run(**how)
    first.train(0, n)
    state = through_a_file(first.checkpoint())
    del first

    torch.manual_seed(6)
    second = Run(**how | {"seed": 100, "attached": False})
    if warm:  # the new script has trained before it loads
        second.train(0, warm)
    second.load(state, order)
    second.train(n, n + m)
    left, right = straight.all(), second.all()
    different = [part for part in left if not bit_identical(left[part], right[part])]
    assert not different, {
        part: (left[part], right[part]) for part in different if part in ("metrics", "average")
    }


# --------------------------------------------------------------------------------- in process


def test_without_run_and_the_comparison_can_fail() -> None:
    """`Run.all` sees one step more, another clock, another average."""
    run = Run("convolutional", Constant(0.9))
    run.train(0, 3)
    before = run.all()
    assert bit_identical(before, run.all())
    run.ema.averages["head.bias"].view(-1)[0] += 1e-3
    assert not bit_identical(before["average"], run.all()["average"])
    assert not bit_identical(before["exported"], run.all()["exported"])
    run.train(3, 4)
    after = run.all()
    assert not any(bit_identical(before[part], after[part]) for part in before)


def test_a_resume_that_forgets_the_average_is_seen() -> None:
    """`resumed_equals_straight` fails where the average, or the optimizer, is not loaded."""
    for forgotten in ("average", "optimizer", "model"):
        order = tuple(part for part in PARTS if part != forgotten)
        with pytest.raises(AssertionError):
            resumed_equals_straight(3, 3, order, 0, name="plain", decay=Constant(0.9))


@given(
    name=st.sampled_from(sorted(MODELS)),
    decay=st.sampled_from(DECAYS),
    n=st.integers(0, 6),
    m=st.integers(0, 6),
    every=st.integers(1, 3),
    warm=st.integers(0, 2),
    order=st.permutations(PARTS).map(tuple),
    into=st.booleans(),
)
def test_resume(
    name: str,
    decay: Decay,
    n: int,
    m: int,
    every: int,
    warm: int,
    order: tuple[str, ...],
    into: bool,
) -> None:
    """Law 7: for every model, decay, cadence, order of loading, with and without a teacher.

    n = 0 is a state from before the first update; every > 1 stops between two updates; warm > 0
    loads into an average that has seen updates of its own.
    """
    resumed_equals_straight(n, m, order, warm, name=name, decay=decay, every=every, into=into)


@pytest.mark.parametrize("order", list(itertools.permutations(["model", "average"])), ids=str)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_order_of_loading(name: str, order: tuple[str, ...], warm: int) -> None:
    """Law 7: the average may be loaded before or after the model, before or after an update."""
    order = (*order, "optimizer")
    resumed_equals_straight(4, 3, order, warm, name=name, decay=PowerLaw(0.10))


@settings(max_examples=15)
@given(
    name=st.sampled_from(["convolutional", "bfloat16", "tied", "mixed", "float64"]),
    n=st.integers(1, 5),
    order=st.permutations(["model", "optimizer", "average"]).map(tuple),
)
def test_a_teacher_comes_back_with_the_average(name: str, n: int, order: tuple[str, ...]) -> None:
    """Law 7: who saves the average need not save the teacher: it holds the averages again."""
    resumed_equals_straight(n, 3, order, 0, name=name, decay=Constant(0.9), into=True)


def test_an_average_built_after_the_load() -> None:
    """Law 7: a script may load its model first, and build the EMA then."""
    first = Run("convolutional", HalfLife(3))
    first.train(0, 4)
    state = through_a_file(first.checkpoint())
    model = models.convolutional(9)
    model.load_state_dict(state["model"])
    ema = EMA(model, HalfLife(3))
    ema.load_state_dict(state["average"])
    assert bit_identical(without_run(ema.state_dict()), without_run(first.ema.state_dict()))
    with ema.applied(), first.ema.applied():
        assert bit_identical(dict(model.state_dict()), dict(first.model.state_dict()))


def test_loading_copies() -> None:
    """A state can be loaded twice: averages do not share memory with it."""
    first = Run("plain", HalfLife(3))
    first.train(0, 4)
    state = through_a_file(first.ema.state_dict())
    kept = copy.deepcopy(state)
    one, two = (Run("plain", HalfLife(3)) for _ in range(2))
    one.ema.load_state_dict(state)
    two.ema.load_state_dict(state)
    one.train(4, 8)
    assert bit_identical(state, kept)
    assert bit_identical(without_run(two.ema.state_dict()), without_run(kept))


def test_a_resume_in_the_middle_of_a_run_of_resumes() -> None:
    """Law 7 again and again: nine resumes in a row, one after each step or two."""
    straight = Run("convolutional", PowerLaw(0.10), every=2)
    torch.manual_seed(5)
    straight.train(0, 14)
    wanted = straight.all()
    torch.manual_seed(5)
    run, step = Run("convolutional", PowerLaw(0.10), every=2), 0
    for turn in range(9):
        steps = 1 + turn % 2
        run.train(step, step + steps)
        step += steps
        state = through_a_file(run.checkpoint())
        run = Run("convolutional", PowerLaw(0.10), every=2, seed=turn)
        run.load(state)
    run.train(step, 14)
    assert bit_identical(run.all(), wanted)


def test_what_was_kept_out_is_still_counted() -> None:
    """Law 7: the count of non-finite elements goes on from where it was, and is not told twice."""
    run = Run("plain", HalfLife(3))
    run.train(0, 2)
    run.model.head.bias.data[:2] = float("nan")
    run.ema.update(run.ema.clock + 3)
    with pytest.warns(UserWarning, match="2 elements of the weights were not finite"):
        state = through_a_file(run.ema.state_dict())
    other = Run("plain", HalfLife(3))
    other.ema.load_state_dict(state)
    assert other.ema.report().nonfinite == 2
    other.model.head.bias.data[:1] = float("nan")
    other.ema.update(other.ema.clock + 3)
    with pytest.warns(UserWarning, match="3 elements of the weights were not finite"):
        assert other.ema.report().nonfinite == 3


def test_another_decay_is_told_and_wins() -> None:
    """On load the decay that the EMA was built with is used; a warning names it and the other."""
    first = Run("plain", HalfLife(3))
    first.train(0, 4)
    state = through_a_file(first.ema.state_dict())
    second = Run("plain", Constant(0.5))
    with pytest.warns(UserWarning, match=r"HalfLife\(.*3.*Constant\(.*0\.5"):
        second.ema.load_state_dict(state)
    assert second.ema.decay == Constant(0.5)
    assert second.ema.clock == first.ema.clock
    before = {n: a.double() for n, a in second.ema.averages.items()}
    second.ema.update(second.ema.clock + 1)
    for n, p in second.model.named_parameters():
        expected = (before[n] + p.detach().double()) / 2
        torch.testing.assert_close(second.ema.averages[n].double(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["facts"].update(format=99), "format 99"),
        (lambda s: s.pop("facts"), "no state of a polyak EMA"),
        (lambda s: s.pop("averages"), "no state of a polyak EMA"),
        (lambda s: s["averages"].pop("head.weight"), r"head.weight: missing in the state"),
        (lambda s: s["averages"].update(x=torch.zeros(1)), r"x: only in the state"),
        (lambda s: s["averages"].update({"head.bias": torch.zeros(4)}), r"head.bias: \(4,\)"),
        (lambda s: s["averages"]["head.bias"].fill_(float("nan")), r"head.bias: not finite"),
        (
            lambda s: s["averages"].update({"head.bias": torch.zeros(3).bfloat16()}),
            r"head.bias: torch.bfloat16 in the state, too narrow",
        ),
    ],
)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("into", [False, True])
def test_a_state_that_does_not_fit_changes_nothing(
    change: Any, message: str, warm: int, into: bool
) -> None:
    """Every difference is an error that says so; nothing has been written when it is raised."""
    first = Run("plain", HalfLife(3), into=into)
    first.train(0, 4)
    state = through_a_file(first.ema.state_dict())
    state["facts"] = json.loads(state["facts"])
    change(state)
    if "facts" in state:
        state["facts"] = json.dumps(state["facts"])
    second = Run("plain", HalfLife(3), into=into, seed=7)
    second.train(0, warm)
    before = second.all()
    with pytest.raises(ValueError, match=message):
        second.ema.load_state_dict(state)
    assert bit_identical(second.all(), before)


def test_a_models_own_state_is_no_state_of_an_average() -> None:
    """Loading the model's checkpoint into the EMA is an error that says where it belongs."""
    run = Run("plain", HalfLife(3))
    with pytest.raises(ValueError, match=r"model.load_state_dict"):
        run.ema.load_state_dict(run.model.state_dict())


def test_the_state_does_not_grow() -> None:
    """Ten thousand ticks of three lengths leave a state of a bounded size."""
    model = nn.Linear(1, 1, bias=False)
    ema = EMA(model, HalfLife(3))
    generator = random.Random(0)
    sizes = []
    for step in range(10_000):
        ema.update(ema.clock + generator.choice((1, 2, 5)))
        if step in (4_999, 9_999):
            sizes.append(len(ema.state_dict()["facts"]))
    assert sizes[1] < 1.5 * sizes[0]
    assert sizes[1] < 64_000


# ----------------------------------------------------------------------------- killed for real

STEPS = 60


def child(folder: Path) -> None:
    """Train to `STEPS`, from the checkpoint if there is one; write one after every step."""
    torch.set_num_threads(1)
    torch.manual_seed(5)
    run, begin = Run("convolutional", PowerLaw(0.10), every=2), 0
    path = folder / "checkpoint.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        run.load(state)
        begin = state["step"]
    for step in range(begin, STEPS):
        run.train(step, step + 1)
        torch.save(run.checkpoint() | {"step": step + 1}, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(path)
        if run.ema.clock:
            run.ema.save(folder / "ema.safetensors")
        sys.stdout.write(f"{step + 1}\n")
        sys.stdout.flush()


def _killed_after(folder: Path, step: int, delay: float) -> int:
    """Start a child, kill it some time after that step; return the last step it told of."""
    command = [sys.executable, str(Path(__file__)), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        told = 0
        for line in process.stdout:
            told = int(line)
            if told >= step:
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(delay)
                process.send_signal(signal.SIGKILL)
                break
        process.wait(60)
        assert process.returncode in (0, -signal.SIGKILL)
        assert (process.returncode == 0) == (told == STEPS)
    return told


def test_a_killed_process_resumes_to_the_bit(tmp_path: Path) -> None:
    """Law 7 with SIGKILL: killed twice at random moments, resumed, it ends as if nothing was.

    The average that `save` wrote beside the checkpoints is whole at every moment.
    """
    generator = random.Random(11)
    for stop in (generator.randint(5, 20), generator.randint(30, 45)):
        assert stop <= _killed_after(tmp_path, stop, generator.uniform(0.0, 0.01)) < STEPS
        published = tmp_path / "ema.safetensors"
        assert files.verify(published) == []
        step = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
        assert 0 <= step * 3 - files.read_facts(published)["clock"] <= 6
    assert _killed_after(tmp_path, STEPS + 1, 0.0) == STEPS

    torch.manual_seed(5)
    straight = Run("convolutional", PowerLaw(0.10), every=2)
    straight.train(0, STEPS)
    got, wanted = torch.load(tmp_path / "checkpoint.pt", weights_only=True), straight.checkpoint()
    assert got.pop("step") == STEPS
    for state in (got, wanted):
        state["average"] = without_run(state["average"])
    assert [part for part in wanted if not bit_identical(got[part], wanted[part])] == []
    assert got.keys() == wanted.keys()


if __name__ == "__main__":
    child(Path(sys.argv[1]))


def test_a_run_branches_where_it_is_gone_on_with() -> None:
    """One branch for all averages of a model; another one where it goes back once more."""
    model = models.plain()
    narrow, wide = EMA(model, PowerLaw(0.05)), EMA(model, PowerLaw(0.10))

    def go_on(emas: Sequence[EMA], clock: int) -> list[tuple[tuple[int, str], ...]]:
        for ema in emas:
            ema.update(clock)
        return [ema.history.branches for ema in emas if ema.history is not None]

    assert go_on((narrow, wide), 1) == [(), ()]
    states = [copy.deepcopy(ema.state_dict()) for ema in (narrow, wide)]
    seen = [()]
    assert go_on((narrow, wide), 2) == [(), ()], "nothing was loaded"
    for again in (False, True, True):  # averages that are there, and new ones
        emas = [EMA(model, 0.5), EMA(model, 0.9)] if again else [narrow, wide]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the other decay
            for ema, state in zip(emas, states, strict=True):
                ema.load_state_dict(copy.deepcopy(state))
        assert emas[0].history is not None
        assert emas[0].history.branches == (), "nothing has followed"
        late = EMA(model, 0.5)
        first, second, third = go_on((*emas, late), 2)
        assert first == second == third
        assert first not in seen
        assert [clock for clock, _ in first] == [1]
        seen.append(first)
        del emas


def test_who_joins_an_average_that_is_there_makes_no_branch() -> None:
    """The model has not gone back: a second average takes over a state, or one loads its own."""
    model = models.plain()
    ema, twin = EMA(model, 0.5), EMA(model, 0.5)
    for clock in range(1, 5):
        ema.update(clock)
    twin.load_state_dict(copy.deepcopy(ema.state_dict()))
    ema.load_state_dict(copy.deepcopy(ema.state_dict()))
    for each in (ema, twin):
        each.update(5)
    assert ema.history == twin.history
    assert ema.history is not None
    assert ema.history.branches == ()


def gone_on_with(
    model: nn.Module, states: Sequence[Mapping[str, Any]], every: Sequence[int]
) -> tuple[list[EMA], Callable[[int], None]]:
    """Averages of two cadences that have loaded states, and what trains on from there."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    emas = [EMA(model, PowerLaw(std)) for std in (0.05, 0.10)]
    for ema, k in zip(emas, every, strict=True):
        ema.attach(optimizer, every=k)
    for ema, state in zip(emas, states, strict=False):
        ema.load_state_dict(copy.deepcopy(state))

    def train(steps: int) -> None:
        for _ in range(steps):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()

    return emas, train


def diverge(emas: Sequence[EMA]) -> bool:
    first, second = (ema.history for ema in emas)
    assert first is not None
    assert second is not None
    return first.diverges(second) or first.run != second.run


@pytest.mark.parametrize("every", [(1, 1), (1, 50), (1, 100)])
def test_averages_of_two_cadences_go_on_together(every: tuple[int, int]) -> None:
    """Twice within one interval of the slow one, in new processes and after going back in one."""
    emas, train = gone_on_with(models.plain(), [], every)
    train(150)
    for steps in (20, 3, 130):
        states = [copy.deepcopy(ema.state_dict()) for ema in emas]
        emas, train = gone_on_with(models.plain(), states, every)
        train(steps)
    assert not diverge(emas)
    states = [copy.deepcopy(ema.state_dict()) for ema in emas]
    for order in ((0, 1), (1, 0)):
        train(110)
        for i in order:
            emas[i].load_state_dict(copy.deepcopy(states[i]))
        train(120)
        assert not diverge(emas)
    (clock, _), *_ = emas[0].history.branches  # type: ignore[union-attr]
    assert clock == 150


def test_a_checkpoint_before_the_first_update_of_a_slow_average() -> None:
    """It has nothing to load, and begins later, in the run that the other one goes on with.

    So does one that is new, whether it was built before the load or after it.
    """
    emas, train = gone_on_with(models.plain(), [], (1, 100))
    train(50)
    states = [copy.deepcopy(ema.state_dict()) for ema in emas]
    emas, train = gone_on_with(models.plain(), states, (1, 100))
    train(170)
    assert not diverge(emas)
    model = models.plain()
    ema, before = EMA(model, PowerLaw(0.05)), EMA(model, 0.9)
    ema.load_state_dict(copy.deepcopy(states[0]))
    after = EMA(model, 0.9)
    for clock in range(51, 60):
        for each in (ema, before, after):
            each.update(clock)
    assert not diverge([ema, before])
    assert not diverge([ema, after])


def test_a_later_checkpoint_that_was_tried_first_leaves_no_trace() -> None:
    """The branch begins at the one that is gone on from."""
    emas, train = gone_on_with(models.plain(), [], (1, 1))
    train(100)
    early = [copy.deepcopy(ema.state_dict()) for ema in emas]
    train(200)
    late = [copy.deepcopy(ema.state_dict()) for ema in emas]
    emas, train = gone_on_with(models.plain(), late, (1, 1))
    for ema, state in zip(emas, early, strict=True):
        ema.load_state_dict(copy.deepcopy(state))
    train(50)
    assert [[clock for clock, _ in e.history.branches] for e in emas if e.history] == [[100]] * 2
    assert not diverge(emas)


def test_who_holds_a_state_does_not_hide_that_the_model_went_on() -> None:
    """The best average is kept in another EMA, and gone back to."""
    (ema, best), train = gone_on_with(models.plain(), [], (1, 10**6))
    train(100)
    best = EMA(ema._model, PowerLaw(0.05))
    best.load_state_dict(copy.deepcopy(ema.state_dict()))
    train(100)
    passed = copy.deepcopy(ema.history)
    ema.load_state_dict(copy.deepcopy(best.state_dict()))
    train(50)
    assert ema.history is not None
    assert passed is not None
    assert [clock for clock, _ in ema.history.branches] == [100]
    assert ema.history.diverges(passed)


def test_what_begins_again_in_one_process_shares_nothing() -> None:
    """A loop over seeds with one model; and what is reset after it was resumed, twice."""
    model = models.plain()
    seen = []
    for _ in range(3):
        ema = EMA(model, 0.5)
        for clock in range(1, 6):
            ema.update(clock)
        seen.append(ema)
    histories = [ema.history for ema in seen]
    del ema, seen
    gc.collect()
    ema = EMA(model, 0.5)  # where nobody is left who knows
    for clock in range(1, 6):
        ema.update(clock)
    histories.append(ema.history)
    assert all(a.diverges(b) for a, b in itertools.combinations(histories, 2))
    state = copy.deepcopy(ema.state_dict())
    resets = []
    for _ in range(2):
        ema = EMA(models.plain(), 0.5)
        ema.load_state_dict(copy.deepcopy(state))
        ema.reset()
        for clock in range(1, 4):
            ema.update(clock)
        resets.append(ema.history)
    assert resets[0].run != resets[1].run
