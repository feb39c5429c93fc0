"""A folder of snapshots: what is due is there, what is removed is what matters least."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import bit_identical, convolutional, train
from polyak import EMA, After, Debiased, HalfLife, PowerLaw, Uniform, files, snapshots
from polyak.posthoc import reconstruct, solve
from polyak.profile import History
from polyak.snapshots import Geometric, SnapshotFolder

WIDTHS = (0.03, 0.04, 0.055, 0.075, 0.10, 0.14, 0.19, 0.25)


def averages(model: nn.Module, *stds: float) -> list[EMA]:
    return [EMA(model, PowerLaw(std)) for std in stds or (0.05, 0.10)]


def walk(model: nn.Module, emas: Sequence[EMA], clocks: Sequence[int]) -> Iterator[int]:
    """A random walk of the weights, which the averages see at these clocks."""
    for clock in clocks:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        for ema in emas:
            ema.update(clock)
        yield clock


def load(emas: Sequence[EMA], states: Sequence[Any]) -> None:
    """Let averages go on from states, which stay as they are."""
    for ema, state in zip(emas, copy.deepcopy(states), strict=True):
        ema.load_state_dict(state)


def clocks(paths: Sequence[Path]) -> list[int]:
    return [int(path.name.partition("-")[0]) for path in paths]


def run(
    folder: Path,
    steps: Sequence[int] = range(1, 101),
    every: int | Geometric = 10,
    **how: Any,
) -> list[Path]:
    model = nn.Linear(2, 1)
    emas = averages(model)
    with SnapshotFolder(folder, emas, every, **how) as kept:
        for _ in walk(model, emas, steps):
            kept.update()
    return kept.files


# ------------------------------------------------------------------------------------ when


def test_a_snapshot_whenever_the_clock_passes_a_multiple(tmp_path: Path) -> None:
    assert clocks(run(tmp_path / "a")) == sorted([*range(10, 101, 10)] * 2)
    assert clocks(run(tmp_path / "b", [3, 9, 12, 13, 47, 48, 50])) == sorted([12, 47, 50] * 2)


def test_a_geometric_schedule(tmp_path: Path) -> None:
    found = clocks(run(tmp_path, every=Geometric(1.5, first=4)))
    assert found[::2] == found[1::2] == [4, 6, 9, 14, 21, 32, 48, 72, 100]


def test_the_last_averages_are_saved_in_the_end(tmp_path: Path) -> None:
    assert clocks(run(tmp_path, range(1, 26)))[::2] == [10, 20, 25]


def test_a_block_that_fails_saves_no_more(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 10)

    def training() -> None:
        with folder:
            for clock in walk(model, emas, range(1, 100)):
                folder.update()
                if clock == 25:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()
    assert clocks(folder.files)[::2] == [10, 20]


def test_update_says_whether_one_was_due(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 3)
    due = [clock for clock in walk(model, emas, range(1, 10)) if folder.update()]
    assert due == [3, 6, 9]
    before = folder.files
    folder.save()  # of this clock it is there
    assert folder.files == before


# ------------------------------------------------------------------------------------ what


@pytest.mark.parametrize("background", [False, True])
def test_the_files_are_those_of_save(tmp_path: Path, background: bool) -> None:
    """To the byte: float32, whatever the model's dtype; integers and statistics as they are."""
    model = convolutional().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    emas = [EMA(model, PowerLaw(0.05)), EMA(model, Debiased(0.9)), EMA(model, After(2, Uniform()))]
    folder = SnapshotFolder(tmp_path / "a", emas, 5, background=background)
    saved: dict[str, bytes] = {}
    for step in train(model, optimizer, range(1, 21)):
        for ema in emas:
            ema.update(step)
        folder.update()
        if step % 5 == 0:
            names = ("powerlaw-0.05", "debiased-constant-0.9", "after-2-uniform")
            for name, ema in zip(names, emas, strict=True):
                ema.save(tmp_path / "one", dtype=torch.float32)
                path = f"{step:012d}-{name}.safetensors"
                saved[path] = (tmp_path / "one").read_bytes()
    assert {path.name: path.read_bytes() for path in folder.files} == saved
    assert all(files.verify(path) == [] for path in folder.files)


def test_averages_alone(tmp_path: Path) -> None:
    """What merely follows is left out on request, and `applied` does not matter."""
    model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 1, averages_only=True)
    for ema in emas:
        ema.update(1)
    with emas[0].applied():
        folder.update()
    assert [set(files.read(path)) for path in folder.files] == [{"1.weight", "1.bias"}] * 2


def test_what_is_kept_makes_other_averages(tmp_path: Path) -> None:
    """Kept within a budget of 16 of 100 files, it gives a width between, nearly as it was."""
    model = nn.Linear(20, 20)
    emas = averages(model, 0.05, 0.10, 0.075)
    with SnapshotFolder(tmp_path, emas[:2], every=20, most_files=16) as folder:
        for _ in walk(model, emas, range(1, 1001)):
            folder.update()
    solution = solve(folder.files, PowerLaw(0.075))
    (made,) = reconstruct(folder.files, [PowerLaw(0.075)])
    away = torch.cat([(made[n] - a).flatten() for n, a in emas[2].averages.items()]).norm()
    lag = torch.cat([(model.state_dict()[n] - a).flatten() for n, a in emas[2].averages.items()])
    assert solution.predicted_error < 0.05
    assert away < solution.predicted_error * lag.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_narrow_dtype_is_warned_of_with_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    """What it says is so: coefficients whose sizes sum to more than that are refused."""
    with pytest.warns(UserWarning, match=r"rounds by up to 0\.[0-9]+%.*refused") as caught:
        paths = run(tmp_path, every=10, dtype=dtype)
    limit = float(re.findall(r"more than ([0-9.]+),", str(caught[0].message))[0])
    assert limit == pytest.approx(0.01 / (torch.finfo(dtype).eps / 2), rel=0.05)
    assert {t.dtype for path in paths for t in files.read(path).values()} == {dtype}
    for std in (0.03, 0.05, 0.08, 0.2):
        sizes = solve(paths, PowerLaw(std), limit=float("inf")).amplification
        if sizes > limit * 1.05:
            with pytest.raises(ValueError, match="coefficients"):
                solve(paths, PowerLaw(std), limit=1e9)


# ---------------------------------------------------------------------------------- the budget


def histories(steps: int, at: Sequence[int], std: float) -> list[History]:
    whole = History("a run")
    for _ in range(steps):
        whole.tick(PowerLaw(std), 1)
    return [whole.until(clock) for clock in at]


def errors(found: Sequence[Path] | Sequence[History], stds: Sequence[float]) -> list[float]:
    return [solve(found, PowerLaw(std), limit=float("inf")).predicted_error for std in stds]


def test_within_its_budget_at_every_moment(tmp_path: Path) -> None:
    """And the newest of each average is among what is left."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 5, most_files=6)
    for clock in walk(model, emas, range(1, 201)):
        if folder.update():
            found = folder.files
            assert len(found) == min(6, 2 * (clock // 5))
            assert clocks(found)[-2:] == [clock, clock]


def test_a_budget_of_bytes(tmp_path: Path) -> None:
    size = max(path.stat().st_size for path in run(tmp_path / "all"))
    most = 7 * size
    paths = run(tmp_path / "few", most_bytes=most)
    sizes = [path.stat().st_size for path in paths]
    assert sum(sizes) <= most < sum(sizes) + 2 * size


def test_what_goes_is_what_the_others_miss_least(tmp_path: Path) -> None:
    """Compared with all there is to remove, through `solve`."""
    every = run(tmp_path / "all", range(1, 81))
    assert len(every) == 16
    left = run(tmp_path / "one less", range(1, 81), most_files=15)
    harm = {}
    for gone in every[:-2]:
        rest = [path for path in every if path != gone]
        harm[gone.name] = sum(error**2 for error in errors(rest, WIDTHS))
    (missing,) = {path.name for path in every} - {path.name for path in left}
    assert harm[missing] == pytest.approx(min(harm.values()), rel=1e-6)


def test_a_thinned_folder_is_as_good_as_one_that_knew_the_end(tmp_path: Path) -> None:
    """Within a half of the error of as many that are spread evenly, over all widths together."""
    kept = run(tmp_path, range(1, 2001), every=50, most_files=16)
    even = [
        history for std in (0.05, 0.10) for history in histories(2000, range(250, 2001, 250), std)
    ]
    ours, theirs = (sum(error**2 for error in errors(found, WIDTHS)) for found in (kept, even))
    assert ours**0.5 < 1.5 * theirs**0.5


def test_a_budget_for_less_than_one_snapshot(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="most_files=1 is too little for one snapshot of each"):
        run(tmp_path / "a", most_files=1)
    with pytest.raises(ValueError, match=r"alone are beyond the budget: .* most_bytes=100\."):
        run(tmp_path / "b", most_bytes=100)
    assert len(list((tmp_path / "b").iterdir())) == 2, "what was saved is there"


def test_other_files_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not of here")
    paths = run(tmp_path, most_files=4)
    assert len(paths) == 4
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == b"not of here"


# ------------------------------------------------------------------------------ in the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event without which nothing is written."""
    event, write = threading.Event(), files.write

    def wait(*arguments: Any, **named: Any) -> None:
        assert event.wait(30)
        write(*arguments, **named)

    monkeypatch.setattr(files, "write", wait)
    yield event
    event.set()


def test_training_goes_on_while_a_snapshot_is_written(
    tmp_path: Path, gate: threading.Event
) -> None:
    """What is in the file is what the averages were, not what they have become."""
    model = nn.Linear(4, 3)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 5, background=True)
    then: list[dict[str, Tensor]] = []
    for clock in walk(model, emas, range(1, 10)):
        folder.update()
        if clock == 5:
            then = [ema.model_state_dict() for ema in emas]
    assert list(tmp_path.iterdir()) == []
    gate.set()
    assert bit_identical([files.read(path) for path in folder.files], then)


def test_the_next_snapshot_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    model = nn.Linear(4, 3)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 1, background=True)
    for _ in walk(model, emas, [1]):
        folder.update()
    threading.Timer(0.2, gate.set).start()
    for _ in walk(model, emas, [2]):
        folder.update()
    assert gate.is_set()
    assert clocks(folder.files) == [1, 1, 2, 2]


def test_the_buffers_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    write = files.write

    def look(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        seen.append([tensor.data_ptr() for tensor in tensors.values()])
        write(path, tensors, facts)

    monkeypatch.setattr(files, "write", look)
    run(tmp_path, every=20, background=True)
    assert len(seen) == 10
    assert seen[2:] == seen[:2] * 4
    assert not set(seen[0]) & set(seen[1])


def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let writes fail, until what is returned is called."""
    write = files.write

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", fail)
    return lambda: monkeypatch.setattr(files, "write", write)


@pytest.mark.parametrize("call", ["update", "save", "close", "files"])
def test_a_failed_write_is_raised_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Once; older files are all there, and the next one that is due is written."""
    model = nn.Linear(4, 3)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 5, most_files=2, background=True)
    for _ in walk(model, emas, range(1, 6)):
        folder.update()
    before = folder.files
    mend = failing(monkeypatch)
    for _ in walk(model, emas, range(6, 11)):
        folder.update()
    folder._writer._job.exception()  # it is done
    mend()
    with pytest.raises(OSError, match="No space left"):
        folder.files if call == "files" else getattr(folder, call)()
    assert folder.files == before
    for _ in walk(model, emas, range(11, 16)):
        folder.update()
    assert clocks(folder.files) == [15, 15]


def test_a_failed_write_is_raised_at_once_without_a_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Linear(4, 3)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 5, most_files=2)
    for _ in walk(model, emas, range(1, 6)):
        folder.update()
    mend = failing(monkeypatch)
    for clock in walk(model, emas, range(6, 11)):
        if clock == 10:
            with pytest.raises(OSError, match="No space left"):
                folder.update()
    mend()
    assert not folder.update(), "it is tried again when the next one is due"
    assert clocks(folder.files) == [5, 5]


PROGRAM = """
import sys, torch
from polyak import EMA, PowerLaw, files
from polyak.snapshots import SnapshotFolder
if sys.argv[2] == "fails":
    def fail(*arguments):
        raise OSError(28, "No space left on device")
    files.write = fail
model = torch.nn.Linear(300, 300)
emas = [EMA(model, PowerLaw(0.05)), EMA(model, PowerLaw(0.10))]
folder = SnapshotFolder(sys.argv[1], emas, every=10, most_files=6, background=True)
for step in range(1, 10_000 if sys.argv[2] == "killed" else 11):
    for ema in emas:
        ema.update(step)
    folder.update()
    print(step, flush=True)
"""


def test_a_program_that_ends_has_written(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "ends"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert clocks(sorted(tmp_path.iterdir())) == [10, 10]


def test_a_program_that_ends_tells_of_a_failed_write(tmp_path: Path) -> None:
    """Although nobody has asked."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "fails"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "No space left on device" in ended.stderr


@pytest.mark.skipif(os.name != "posix", reason="kills as POSIX does")
def test_a_killed_program_leaves_whole_files(tmp_path: Path) -> None:
    """The files that are there are whole, and at most one snapshot beyond the budget."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), "killed"]
    for last in (35, 62, 71, 88):
        folder = tmp_path / str(last)
        folder.mkdir()
        command[3] = str(folder)
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if int(line) >= last:
                    child.kill()
                    break
        found = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
        assert 2 <= len(found) <= 8
        assert all(files.verify(path) == [] for path in found)


# ----------------------------------------------------------------------------------- going on


def interrupted(folder: Path, until: int, checkpoint: int) -> dict[str, Any]:
    """Train until a clock; return what was saved at an earlier one."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    state: dict[str, Any] = {}
    kept = SnapshotFolder(folder, emas, 10, most_files=8)
    for clock in walk(model, emas, range(1, until + 1)):
        kept.update()
        if clock == checkpoint:
            state = {"model": model.state_dict(), "emas": [ema.state_dict() for ema in emas]}
            state = torch.load(_saved(state, folder.parent), weights_only=True)
    return state


def _saved(state: dict[str, Any], folder: Path) -> Path:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def test_a_run_that_goes_on_goes_on_with_its_folder(tmp_path: Path) -> None:
    state = interrupted(tmp_path / "a", until=30, checkpoint=30)
    model = nn.Linear(2, 1)
    emas = averages(model)
    model.load_state_dict(state["model"])
    load(emas, state["emas"])
    folder = SnapshotFolder(tmp_path / "a", emas, 10, most_files=8)
    assert clocks(folder.files)[::2] == [10, 20, 30]
    for _ in walk(model, emas, range(31, 61)):
        folder.update()
    assert len(folder.files) == 8
    assert solve(folder.files, PowerLaw(0.07)).at == 60


def test_what_is_made_anew_is_set_aside(tmp_path: Path) -> None:
    """Snapshots of steps after the checkpoint are of states that the run does not pass again."""
    state = interrupted(tmp_path / "a", until=47, checkpoint=25)
    model = nn.Linear(2, 1)
    emas = averages(model)
    load(emas, state["emas"])
    with pytest.warns(UserWarning, match=r"at the clock 25 now, and 4 snapshots are of steps"):
        folder = SnapshotFolder(tmp_path / "a", emas, 10)
    assert clocks(folder.files)[::2] == [10, 20]
    assert len(list((tmp_path / "a").glob("*.abandoned"))) == 4
    for _ in walk(model, emas, [*range(26, 31)]):
        folder.update()
    assert clocks(folder.files)[::2] == [10, 20, 30]


def test_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    for begun in (False, True):
        model = nn.Linear(2, 1)
        emas = averages(model)
        if begun:
            for ema in emas:
                ema.update(50)
        text = r"holds 20 snapshots of another run(.|\n)*ema\.load_state_dict\(state\)"
        with pytest.raises(ValueError, match=text):
            SnapshotFolder(tmp_path, emas, 10)
    assert len(list(tmp_path.glob("*.safetensors"))) == 20


def test_a_run_that_goes_back_sets_aside_what_it_makes_anew(tmp_path: Path) -> None:
    """In one process, without another folder; whether it is seen at once or much later."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 10)
    for clock in walk(model, emas, range(1, 51)):
        folder.update()
        if clock == 25:
            states = copy.deepcopy([ema.state_dict() for ema in emas])
    ways = (26, [30, 40, 50, 60, 70]), (43, [43, 50, 60, 70, 80]), (90, [90])
    for seen_at, expected in ways:
        load(emas, states)
        for clock in walk(model, emas, range(26, expected[-1] + 1)):
            if clock == seen_at:
                with pytest.warns(UserWarning, match="snapshots are of steps that it makes anew"):
                    folder.update()
            elif clock > seen_at:
                folder.update()
        assert clocks(folder.files)[::2] == [10, 20, *expected]
        assert solve(folder.files, PowerLaw(0.07)).at == expected[-1]


@pytest.mark.parametrize("anew", ["reset", "start_from"])
def test_an_average_that_begins_anew_needs_another_folder(tmp_path: Path, anew: str) -> None:
    """It begins another run, of which the folder has nothing."""
    model = nn.Linear(2, 1)
    (ema,) = averages(model, 0.05)
    folder = SnapshotFolder(tmp_path, [ema], 10)
    for _ in walk(model, [ema], range(1, 31)):
        folder.update()
    if anew == "reset":
        ema.reset()
    else:
        ema.start_from(model.state_dict(), clock=0)
    next(walk(model, [ema], [1]))
    for call in (folder.update, folder.save):
        with pytest.raises(ValueError, match="holds 3 snapshots of another run"):
            call()
    assert len(list(tmp_path.iterdir())) == 3


def test_snapshots_of_another_branch_are_set_aside(tmp_path: Path) -> None:
    """Although their clocks are not later: they lead to a checkpoint that is not gone on from."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    states = {}
    kept = SnapshotFolder(tmp_path / "a", emas, 10)
    for clock in walk(model, emas, range(1, 61)):
        kept.update()
        if clock in (5, 50):
            states[clock] = copy.deepcopy([ema.state_dict() for ema in emas])

    model = nn.Linear(2, 1)
    emas = averages(model)
    load(emas, states[5])
    with pytest.warns(UserWarning, match="12 snapshots are of steps"):
        kept = SnapshotFolder(tmp_path / "a", emas, 10)
    for _ in walk(model, emas, range(6, 41)):
        kept.update()
    assert clocks(kept.files)[::2] == [10, 20, 30, 40]
    model = nn.Linear(2, 1)
    emas = averages(model)
    load(emas, states[50])
    with pytest.warns(UserWarning, match="at the clock 50 now, and 8 snapshots are of steps"):
        kept = SnapshotFolder(tmp_path / "a", emas, 10)
    assert kept.files == []
    aside = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(aside) == 20, "nothing is lost"
    assert "000000000010-powerlaw-0.05.safetensors.abandoned-2" in aside


def test_loading_once_more_is_no_branch(tmp_path: Path) -> None:
    """Unless something has been updated; averages that go on from different moments are told."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    list(walk(model, emas, range(1, 6)))
    states = copy.deepcopy([ema.state_dict() for ema in emas])
    for number in (0, 1, 0):
        emas[number].load_state_dict(copy.deepcopy(states[number]))
    folder = SnapshotFolder(tmp_path / "a", emas, 1)
    for _ in walk(model, emas, range(6, 9)):
        folder.update()
    assert solve(folder.files, PowerLaw(0.07)).at == 8
    emas[0].load_state_dict(copy.deepcopy(states[0]))
    for clock in range(6, 10):
        emas[0].update(clock)
    emas[1].update(9)
    with pytest.raises(ValueError, match="have gone on from states of different moments"):
        SnapshotFolder(tmp_path / "b", emas, 1).update()


def test_averages_of_every_step_and_of_every_fourth_go_on_together(tmp_path: Path) -> None:
    """A checkpoint at which one of them is a few steps behind branches both at one clock."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    emas = averages(model)

    def attach(emas: list[EMA], optimizer: torch.optim.Optimizer) -> None:
        for ema, every in zip(emas, (1, 4), strict=True):
            ema.attach(optimizer, every=every)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(torch.randn(4, 2)).sum().backward()
            optimizer.step()

    attach(emas, optimizer)
    train(model, optimizer, 50)
    states = copy.deepcopy([ema.state_dict() for ema in emas])
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    emas = averages(model)
    attach(emas, optimizer)
    for ema, state in zip(emas, states, strict=True):
        ema.load_state_dict(state)
    folder = SnapshotFolder(tmp_path, emas, 20)
    train(model, optimizer, 10)
    folder.update()
    assert clocks(folder.files) == [60, 60]
    assert emas[0].history is not None
    assert emas[1].history is not None
    assert emas[0].history.branches == emas[1].history.branches
    assert [clock for clock, _ in emas[0].history.branches] == [50]


def test_clocks_of_any_size(tmp_path: Path) -> None:
    """Tokens: files sort by their clock, all are found, and the run goes on."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 10**11)
    for _ in walk(model, emas, range(10**11, 15 * 10**11 + 1, 10**11)):
        folder.update()
    assert clocks(folder.files)[::2] == [*range(10**11, 15 * 10**11 + 1, 10**11)]
    again = SnapshotFolder(tmp_path, emas, 10**11, most_files=20)
    for _ in walk(model, emas, [16 * 10**11]):
        again.update()
    assert len(again.files) == 20
    assert clocks(again.files)[-1] == 16 * 10**11


def test_a_second_run_does_not_write_over_the_first(tmp_path: Path) -> None:
    """Both were begun on an empty folder."""
    folders = []
    for _ in range(2):
        model = nn.Linear(2, 1)
        emas = averages(model)
        folders.append((SnapshotFolder(tmp_path, emas, 10), walk(model, emas, range(1, 11))))
    (first, steps), (second, others) = folders
    for _ in steps:
        first.update()
    before = {path.name: path.read_bytes() for path in first.files}
    for clock in others:
        if clock == 10:
            with pytest.raises(FileExistsError, match="give each run a folder of its own"):
                second.update()
    assert {path.name: path.read_bytes() for path in first.files} == before


def test_files_that_somebody_removes_do_not_count(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 10, most_files=6)
    for clock in walk(model, emas, range(1, 81)):
        folder.update()
        if clock == 60:
            for path in folder.files[:4]:
                path.unlink()
    assert len(folder.files) == 6


def test_the_folder_of_the_process_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder("run", emas, 10)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for _ in walk(model, emas, range(1, 11)):
        folder.update()
    assert [path.parent for path in folder.files] == [tmp_path / "run"] * 2


@pytest.mark.parametrize("background", [False, True])
def test_what_failed_can_be_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    """At the same clock, on request or by the end of the block; an error before it is raised."""
    model = nn.Linear(2, 1)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 10, background=background)
    mend = failing(monkeypatch)

    def training() -> None:
        with folder:
            for clock in walk(model, emas, range(1, 11)):
                if clock < 10 or background:
                    folder.update()
                else:
                    with pytest.raises(OSError, match="No space left"):
                        folder.update()
            if folder._writer is not None:
                folder._writer._job.exception()  # it is done, and nobody has asked
            mend()

    if background:
        with pytest.raises(OSError, match="No space left"):
            training()
    else:
        training()
    assert clocks(folder.files) == [10, 10]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_while_a_snapshot_is_written(tmp_path: Path, gate: threading.Event) -> None:
    """The child has no thread that writes, and does not wait for one."""
    model = nn.Linear(4, 3)
    emas = averages(model)
    folder = SnapshotFolder(tmp_path, emas, 5, background=True)
    for _ in walk(model, emas, range(1, 6)):
        folder.update()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            folder.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    gate.set()
    assert clocks(folder.files) == [5, 5]


# ------------------------------------------------------------------------------------ bad input


class Own:
    """A decay of the user's."""

    def keep(self, t: float, dt: float) -> float:
        return 0.5


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    narrow, wide = averages(model)

    def refused(kind: type[Exception], words: str, *arguments: Any, **how: Any) -> None:
        with pytest.raises(kind, match=words):
            SnapshotFolder(tmp_path / "none", *arguments, **how)
        assert not (tmp_path / "none").exists()

    refused(TypeError, r"a list of EMAs.*pass \[narrow, wide\]", narrow, 10)
    refused(TypeError, "a list of EMAs", [model], 10)
    refused(ValueError, "none or alike", [], 10)
    refused(ValueError, "none or alike", [narrow, EMA(model, PowerLaw(0.05))], 10)
    refused(ValueError, "an object of this program", [narrow, EMA(model, Own())], 10)
    refused(TypeError, r"every=10\.0 is neither an integer", [narrow, wide], 10.0)
    refused(ValueError, "every=0", [narrow, wide], 0)
    refused(TypeError, r"most_files=1\.5 is no integer", [narrow, wide], 1, most_files=1.5)
    refused(ValueError, "most_bytes=0 is too little", [narrow, wide], 1, most_bytes=0)
    refused(ValueError, "weights cannot be written as", [narrow, wide], 1, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"Geometric\(ratio=1\.0, first=1\) never comes"):
        Geometric(1.0)


def test_averages_that_are_not_of_one_moment_are_refused(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    narrow, wide = averages(model)
    folder = SnapshotFolder(tmp_path, [narrow, wide], 1)
    narrow.update(1)
    with pytest.raises(ValueError, match=r"PowerLaw\(std=0.1\): no update has been made"):
        folder.update()
    wide.update(2)
    with pytest.raises(ValueError, match=r"different clocks: PowerLaw\(std=0.05\) at 1, .* at 2"):
        folder.update()
    other = EMA(nn.Linear(2, 1), HalfLife(3))
    narrow.update(2)
    other.update(2)
    with pytest.raises(ValueError, match="of different models or runs"):
        SnapshotFolder(tmp_path, [narrow, other], 1).update()
    assert list(tmp_path.iterdir()) == []


def test_the_tests_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that removes the oldest is not as good as one that knew the end."""
    monkeypatch.setattr(snapshots, "harm", lambda products, count: list(range(count)))
    with pytest.raises(AssertionError):
        test_a_thinned_folder_is_as_good_as_one_that_knew_the_end(tmp_path)
