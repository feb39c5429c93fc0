"""The harness of `benchmarks/update.py`, on tiny tensors: what it would measure is right.

Peers are not in the test environment, but for those that torch itself has; what needs the others is
in `make bench` alone, which compares each with the definition as well before it is timed.
"""

from __future__ import annotations

import doctest
import importlib
import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import Tensor, nn
from typer.testing import CliRunner

from polyak import engine

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

sys.path.insert(0, str(ROOT / "benchmarks"))
update = importlib.import_module("update")
gpu = importlib.import_module("gpu")
NAMES = "contender jobs limit machine memory ours peers report sections shapes timing training"
MODULES = [importlib.import_module(f"harness.{name}") for name in NAMES.split()]
contender, jobs, limit, machine, memory, ours, *rest = MODULES
peers, report, sections, shapes, timing, training = rest

DTYPES = [torch.float32, torch.bfloat16]
ENTRIES = [
    shapes.Entry("scale", "parameter", ()),
    shapes.Entry("stem.weight", "parameter", (7, 3)),
    shapes.Entry("stem.bias", "parameter", (7,)),
    shapes.Entry("norm.running_mean", "statistic", (5,)),
    shapes.Entry("norm.num_batches_tracked", "counter", ()),
    shapes.Entry("head.0.weight", "parameter", (70_001,)),  # more than is sampled, and odd
]
TORCHS = [peer for peer in peers.CANDIDATES if peer.package == "torch"]
BRIEF = timing.Effort(0.0, 2, 2)

needs_compiler = pytest.mark.skipif(
    limit.compiler() is None, reason="the limit is in C, and there is no C compiler"
)


@pytest.fixture(autouse=True)
def _torch_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever else is installed here takes no part."""
    monkeypatch.setattr(peers, "CANDIDATES", TORCHS)
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


# -------------------------------------------------------------- the models

# What the papers and the model cards say, in numbers of parameters.
PARAMETERS = {
    "mobilenetv3_large": 5_483_032,
    "resnet50": 25_557_032,
    "convnext_small": 50_223_688,
    "vit_b16": 86_567_656,
    "gpt2_medium": 354_823_168,
}


@pytest.mark.parametrize("model", PARAMETERS)
def test_the_shapes_are_those_of_the_models(model: str) -> None:
    """As many parameters as the model is known for, each tensor with a name of its own."""
    entries = shapes.listed(model)
    kinds = {
        kind: sum(math.prod(entry.shape) for entry in entries if entry.kind == kind)
        for kind in ("parameter", "statistic", "counter")
    }
    said = json.loads((shapes.FOLDER / f"{model}.json").read_text())
    assert kinds["parameter"] == said["parameters"] == PARAMETERS[model]
    assert shapes.elements(entries) == kinds["parameter"] + kinds["statistic"]
    assert len({entry.name for entry in entries}) == len(entries)
    # A counter for each BatchNorm, with two statistics of as many channels.
    counters = [entry for entry in entries if entry.kind == "counter"]
    statistics = [entry for entry in entries if entry.kind == "statistic"]
    assert len(statistics) == 2 * len(counters)
    assert bool(counters) == (model in ("mobilenetv3_large", "resnet50"))
    assert {e.name.rpartition(".")[2] for e in statistics} <= {"running_mean", "running_var"}


def test_there_is_a_list_for_each_model() -> None:
    """And no other."""
    assert {path.stem for path in shapes.FOLDER.iterdir()} == set(shapes.MODELS) == set(PARAMETERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_is_its_list(dtype: torch.dtype) -> None:
    """Names, order, shapes, dtypes, and which are parameters."""
    entries = shapes.listed("mobilenetv3_large")
    model = shapes.Weights(entries, dtype)
    state = model.state_dict()
    assert [(name, tuple(t.shape)) for name, t in state.items()] == [
        (e.name, e.shape) for e in entries
    ]
    assert [n for n, _ in model.named_parameters()] == [
        e.name for e in entries if e.kind == "parameter"
    ]
    counters = [e.name for e in entries if e.kind == "counter"]
    assert all(t.dtype == (torch.int64 if n in counters else dtype) for n, t in state.items())
    assert len({t.data_ptr() for t in state.values()}) == len(entries)


def test_a_flat_model_lives_in_the_buffer() -> None:
    """All of it, one tensor after the other."""
    buffer = torch.full((shapes.elements(ENTRIES),), math.nan)
    model = shapes.Weights(ENTRIES, torch.float32, buffer)
    assert torch.equal(torch.cat([t.flatten() for t in shapes.floating(model).values()]), buffer)
    assert bool(buffer.isfinite().all())


# -------------------------------------------------------------- the clock


def test_ratios_are_those_within_a_round() -> None:
    """A machine that becomes ten times slower in the middle changes no ratio."""
    drift = [1.0] * 5 + [10.0] * 5
    slower = [2.0 * factor for factor in drift]
    assert timing.ratios(slower, drift) == (2.0, 2.0, 2.0)
    # The same times against those of another half of the run would say anything.
    assert timing.ratios(slower, drift[::-1]).low < 1.0 < timing.ratios(slower, drift[::-1]).high


def test_a_stumble_moves_no_median() -> None:
    """One of nine rounds is a hundred times slower for one of both."""
    fast, slow = [1.0] * 9, [1.5] * 9
    slow[4] = 150.0
    assert timing.ratios(slow, fast) == (1.5, 1.5, 1.5)


def test_quartiles_are_around_the_median() -> None:
    """Those of 1 to 9 are 3, 5 and 7; a single value is all three."""
    assert timing.spread([float(i) for i in (9, 1, 8, 2, 7, 3, 6, 4, 5)]) == (5.0, 3.0, 7.0)
    assert timing.spread([4.0]) == (4.0, 4.0, 4.0)


class Clock:
    """A clock that only goes when somebody works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds
            self.calls.append(name)

        return call


def test_calls_are_timed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once a round, in orders that differ, as long as the effort says."""
    clock = Clock(monkeypatch)
    calls = {name: clock.work(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0))}
    times = timing.alternate(calls, timing.Effort(seconds=25.0, least=3, most=50))
    assert times == {"a": [1.0] * 9, "b": [2.0] * 9}  # the ninth round begins at 24 seconds
    rounds = ["".join(clock.calls[i : i + 2]) for i in range(2, 20, 2)]
    assert set(rounds) == {"ab", "ba"}


@pytest.mark.parametrize(
    ("effort", "rounds"), [((1.0, 4, 50), 4), ((1e9, 3, 7), 7), ((0.1, 9, 9), 3)]
)
def test_effort_has_bounds(
    monkeypatch: pytest.MonkeyPatch, effort: tuple[float, int, int], rounds: int
) -> None:
    """At least and at most so many rounds; of calls that take for ever, three."""
    clock = Clock(monkeypatch)
    times = timing.alternate({"a": clock.work("a", 1.0)}, timing.Effort(*effort))
    assert len(times["a"]) == rounds


def test_a_short_call_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the clock can tell; its time is that of one."""
    clock = Clock(monkeypatch)
    times = timing.alternate({"a": clock.work("a", timing.SHORTEST / 8)}, BRIEF)
    assert times["a"] == pytest.approx([timing.SHORTEST / 8] * 2)
    assert len(clock.calls) == 2 + 8 * 2


def test_what_comes_before_a_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told which call follows."""
    clock = Clock(monkeypatch)
    told: list[str] = []

    def before(name: str) -> None:
        clock.now += 100.0
        told.append(name)

    calls = {"a": clock.work("a", 1.0), "b": clock.work("b", 2.0)}
    assert timing.alternate(calls, BRIEF, before) == {"a": [1.0] * 2, "b": [2.0] * 2}
    assert told == clock.calls[2:]


def test_waiting_for_threads_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """When they sleep; when it has waited long enough for one that does not."""
    awake = threading.Event()
    thread = threading.Thread(target=awake.wait)
    thread.start()
    started = time.perf_counter()
    timing.settle(most_seconds=30.0)
    assert time.perf_counter() - started < 20
    monkeypatch.setattr(timing, "_runs", lambda task: True)
    started = time.perf_counter()
    timing.settle(most_seconds=0.05)
    assert time.perf_counter() - started >= 0.05
    awake.set()
    thread.join()


# -------------------------------------------------------------- the contenders


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_of_our_rows_computes_the_definition(dtype: torch.dtype) -> None:
    """Every path that the engine offers here, through `EMA.update()` and alone."""
    found, refused = ours.paths(dtype)
    candidates = ours.candidates(dtype)
    assert "foreach" in found
    assert "reference" not in found | refused
    assert [c.family for c in candidates] == ["ours"] * len(found) + ["engine"] * len(found)
    assert candidates[0].name == f"polyak, {ours.default(dtype)}"
    for candidate in candidates:
        model = shapes.Weights(ENTRIES, dtype)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        made = candidate.make(model)
        contender.check(made, model)
        assert set(made.averages()) == set(shapes.floating(model))
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_row_runs_the_path_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the one that polyak would take."""
    used = []

    class Other(engine.foreach.Foreach):
        name = "other"

        def lerp(self, weight: Any) -> None:
            used.append(self.name)
            super().lerp(weight)

    Other.__module__ = "polyak.engine.foreach"
    monkeypatch.setattr(engine.foreach, "Other", Other, raising=False)
    assert "other" in ours.paths(torch.float32)[0]
    model = nn.Linear(2, 2)
    for candidate in ours.candidates(torch.float32):
        used.clear()
        candidate.make(model).update()
        assert bool(used) == ("other" in candidate.name)


def test_a_path_that_does_not_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no row, and not forgotten."""

    class Broken(engine.foreach.Foreach):
        name = "broken"

        def lerp(self, weight: Any) -> None:
            raise RuntimeError("needs another machine\nand more")

    Broken.__module__ = "polyak.engine.foreach"
    monkeypatch.setattr(engine.foreach, "Broken", Broken, raising=False)
    found, refused = ours.paths(torch.float32)
    assert "broken" not in found
    assert refused["broken"] == "RuntimeError: needs another machine"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["torch AveragedModel", "state_dict loop"])
def test_peers_of_torch_compute_what_their_rows_say(name: str, dtype: torch.dtype) -> None:
    """The definition, or something else where the row says so."""
    [peer] = [peer for peer in peers.candidates()[0] if peer.name == name]
    model = shapes.Weights(ENTRIES, dtype)
    if peer.differs and dtype != torch.float32:
        with pytest.raises(contender.WrongResultError, match=r"stem.weight: is off by up to"):
            contender.check(peer.make(model), model)
    else:
        contender.check(peer.make(model), model)


class Wrong:
    """An average that does one thing wrong."""

    def __init__(self, model: nn.Module, fault: str) -> None:
        self.model, self.fault = model, fault
        self.inner = peers.Loop(model)
        if fault == "narrow":
            self.inner._average["head.0.weight"] = self.inner._average["head.0.weight"].bfloat16()

    def update(self) -> None:
        if self.fault == "asleep":
            return
        before = {name: t.clone() for name, t in self.averages().items()}
        self.inner.update()
        if self.fault == "twice":
            self.inner.update()
        if self.fault == "one element":
            self.inner._average["head.0.weight"][-1] = before["head.0.weight"][-1]

    def averages(self) -> dict[str, Tensor]:
        found = self.inner.averages()
        if self.fault == "forgets":
            del found["scale"]
        return found


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("asleep", r"stem.weight: is off by up to \d"),
        ("twice", r"stem.weight: is off by up to \d"),
        ("one element", r"^Wrong is wrong in head.0.weight: is off by up to \S+$"),
        ("narrow", r"head.0.weight: is averaged in torch.bfloat16"),
        ("forgets", r"scale: is not averaged"),
    ],
)
def test_a_wrong_result_is_found(fault: str, complaint: str) -> None:
    """The check that everything passes can fail."""
    model = shapes.Weights(ENTRIES, torch.float32)
    contender.check(peers.Loop(model), model)
    with pytest.raises(contender.WrongResultError, match=complaint):
        contender.check(Wrong(model, fault), model)


@pytest.mark.parametrize("dtype", DTYPES)
@needs_compiler
def test_the_limit_computes_the_definition(dtype: torch.dtype) -> None:
    """On one thread and on several, and the triad what STREAM's does."""
    for count in (1, 2, 3):
        with contender.threads(count):
            buffer = torch.empty(shapes.elements(ENTRIES), dtype=dtype)
            model = shapes.Weights(ENTRIES, dtype, buffer)
            contender.check(limit.Limit(model, buffer), model)
            triad = limit.Triad(120_000, dtype)
            triad.update()
            assert triad.a.numel() == 120_000 * (8 + dtype.itemsize) // 12
            assert torch.allclose(triad.a, triad.b + 3 * triad.c, rtol=1e-6)


def test_applied_is_checked_as_well() -> None:
    """The model holds the averages inside, its own weights after."""
    model = shapes.Weights(ENTRIES, torch.float32)
    for made in (ours.Whole(model), peers.Loop(model)):
        contender.check(made, model)
        contender.check_swap(made, model)


class Stuck(peers.Loop):
    """A swap that does one half."""

    def __init__(self, model: nn.Module, half: str) -> None:
        super().__init__(model)
        self.half = half

    def enter(self) -> None:
        if self.half == "enter":
            super().enter()

    def leave(self) -> None:
        pass


@pytest.mark.parametrize(
    ("half", "complaint"),
    [("enter", "scale: is not what it was"), ("", "stem.weight: does not hold its average")],
)
def test_half_a_swap_is_found(half: str, complaint: str) -> None:
    """In whichever half it is."""
    model = shapes.Weights(ENTRIES, torch.float32)
    made = Stuck(model, half)
    contender.check(made, model)
    with pytest.raises(contender.WrongResultError, match=complaint):
        contender.check_swap(made, model)


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """And named."""
    absent = replace(peers.CANDIDATES[0], name="other", package="no-such-package")
    monkeypatch.setattr(peers, "CANDIDATES", [*peers.CANDIDATES, absent])
    found, missing = peers.candidates()
    assert "other" not in [peer.name for peer in found]
    assert missing == ["no-such-package"]
    assert machine.versions()["no-such-package"] == "not installed"


# -------------------------------------------------------------- what is measured


def test_memory_is_what_was_allocated() -> None:
    """What stays, and what was there for a while."""
    kept: list[Tensor] = []

    def call() -> None:
        kept.append(torch.empty(1000))
        torch.empty(5000)
        torch.empty(2000)

    assert memory.traced(call) == (4000, 24_000)
    assert memory.traced(kept.clear).held == -4000


def test_the_networks_that_are_trained_are_trained() -> None:
    """A step changes every parameter; the first has as many as ResNet-18 has for ten classes."""
    sizes = [
        sum(p.numel() for p in model.parameters())
        for model in (training.resnet18(), training.Transformer())
    ]
    assert sizes == [11_173_962, 5_260_288]
    small, text = training.resnet18(4), training.Transformer(32, 1, 64)
    for model, step in (
        (small, training.image_step(small, batch=2)),
        (text, training.token_step(text, batch=2, length=8)),
    ):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        step()
        assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


CASES = [("resnet50", 1, "keep"), ("gpt2_medium", 2, "keep"), ("resnet50", 1, "return")]


def measured() -> dict[str, Any]:
    """Return the results of a run of every section, in this process."""
    effort = (0.0, 2, 2)
    chosen = [
        jobs.Job("allocator", {"effort": effort}),
        *(
            jobs.Job(
                "shapes", {"models": [model], "thread_counts": [count], "effort": effort}, malloc
            )
            for model, count, malloc in CASES
        ),
        jobs.Job("size", {"counts": [1000, 5000], "effort": effort}),
        jobs.Job("tensors", {"counts": [10, 1000], "effort": effort}),
        jobs.Job("step", {"effort": effort, "width": 4, "layers": 1}),
        jobs.Job("swap", {"model": "resnet50", "effort": effort}),
        jobs.Job("memory", {"model": "resnet50"}),
    ]
    return update.plain(
        {
            "command": "python benchmarks/update.py",
            "quick": False,
            "seconds": 1.0,
            "load": [0.0, 0.0],
            "machine": machine.facts(),
            "versions": machine.versions(),
            "skipped": ["size: too large"],
            "rows": [row for job in chosen for row in job.rows()],
        }
    )


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Of a run in which every model is a tiny one, and peers are those of torch."""
    if limit.compiler() is None:
        pytest.skip("the limit is in C, and there is no C compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "CANDIDATES", TORCHS)
        patch.setattr(sections, "listed", lambda model: ENTRIES)
        patch.setattr(sections, "LARGE", 5000)
        return measured()


def test_a_run_measures_everybody(results: dict[str, Any], tmp_path: Path) -> None:
    """All sections, cases and contenders; tables of all, the same from the JSON file; a picture."""
    rows = results["rows"]
    assert [s for s in jobs.SECTIONS if not any(row["section"] == s for row in rows)] == []
    mine = [c.name for c in ours.candidates(torch.float32)]
    torchs = ["torch AveragedModel", "state_dict loop"]
    whole = [name for name in mine if "alone" not in name] + torchs

    def names(section: str, **case: Any) -> list[str]:
        return [row["contender"] for row in report._of(rows, section, **case)]

    for dtype in sections.DTYPES:
        for model, threads, malloc in CASES:
            named = {"model": shapes.MODELS[model], "threads": threads, "malloc": malloc}
            case = {"dtype": dtype, **named}
            assert sorted(names("shapes", **case)) == sorted([*mine, *torchs, "STREAM triad"])
        assert sorted(names("size", dtype=dtype, elements=1000)) == sorted(
            [*mine, *torchs, "STREAM triad"]
        )
        assert names("size", dtype=dtype, elements=5000) == [*mine, "state_dict loop"]
        assert names("memory", dtype=dtype) == whole
    for name in ("ResNet-18, 8 images of 32 x 32", "transformer, 8 x 128 tokens"):
        assert names("step", model=name) == whole
    assert names("swap") == [mine[0], "state_dict loop"]

    for row in report._of(rows, "shapes"):
        assert row["rounds"] == 2
        assert min(*row["seconds"], row["limit_seconds"], *row["of_limit"], *row["times_ours"]) > 0
        assert row["default"] == (row["contender"] == mine[0])
        rounding = row["contender"] == torchs[0] and row["dtype"] == "bfloat16"
        assert row["differs"] == (peers.ROUNDED if rounding else "")

    update.save(results, tmp_path, update.Console(quiet=True))
    again = json.loads((tmp_path / "benchmark.json").read_text())
    assert again == results
    table = (tmp_path / "benchmark-table.md").read_text()
    assert report.markdown(again) == table
    assert {len(line.split(" | ")) for line in table.splitlines() if "| ---:" in line} >= {2, 8}
    for name in [*whole, "GPT-2 medium", "Not measured: size: too large."]:
        assert name in table
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")

    app = typer.Typer()
    app.command()(update.main)
    (tmp_path / "benchmark-table.md").unlink()
    redrawn = CliRunner().invoke(app, ["--redraw", "--out", str(tmp_path)])
    assert redrawn.exit_code == 0, redrawn.output
    assert (tmp_path / "benchmark-table.md").read_text() == table
    for shown in report.tables(results):
        assert shown.title.replace("`", "")[:40] in redrawn.output


def test_memory_rows_say_what_is_held(results: dict[str, Any]) -> None:
    """An average of each number in float32, and what a loop and `applied()` take besides."""
    numbers = shapes.elements(ENTRIES)
    rows = {(r["contender"], r["dtype"]): r for r in report._of(results["rows"], "memory")}
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        loop = rows["state_dict loop", dtype]
        assert loop["weights"] == numbers * size
        assert loop["held"] == numbers * 4 + 8  # and its counter
        assert loop["swap"] == numbers * size + 8
        mine = rows["polyak, foreach", dtype]
        assert mine["held"] >= numbers * 4
        assert mine["update"] < 4096
        assert rows["torch AveragedModel", dtype]["swap"] is None


# -------------------------------------------------------------- the report


def row(contender: str, times_ours: float, differs: str = "", **more: Any) -> dict[str, Any]:
    """Return a row of a peer, as far as it matters who is fastest."""
    times = (times_ours, times_ours - 0.1, times_ours + 0.1)
    return {
        "contender": contender,
        "family": "peer",
        "differs": differs,
        "times_ours": times,
    } | more


def test_the_fastest_peer_does_the_same_work() -> None:
    """Not one that computes something else, nor ours, nor the limit."""
    rows = [
        row("slow", 3.0),
        row("fast", 1.4),
        row("wrong", 0.9, differs="rounds"),
        row("triad", 0.5) | {"family": "limit"},
        row("engine", 0.7) | {"family": "engine"},
    ]
    assert report.fastest_peer(rows)["contender"] == "fast"
    assert report.fastest_peer(rows[2:]) is None


def test_the_overview_is_what_the_rows_say() -> None:
    """Medians and quartiles, beside the fastest peer."""
    case = {
        "section": "shapes",
        "malloc": "keep",
        "threads": 1,
        "dtype": "bfloat16",
        "model": "ResNet-50",
        "limit_seconds": 0.00521,
    }
    mine = row("polyak, cpu", 1.0) | {
        "family": "ours",
        "default": True,
        "seconds": (0.0056, 0.0055, 0.0057),
        "of_limit": (0.93, 0.91, 0.94),
    }
    peer = row("timm", 2.25) | {"default": False, "of_limit": (0.4, 0.3, 0.5)}
    table = report.overview([mine | case, peer | case], "keep", 1)
    assert table.lines == [
        [
            *("ResNet-50", "bfloat16", "5.21", "5.6", "0.93 (0.91 to 0.94)"),
            *("timm", "0.40", "2.25 (2.15 to 2.35)"),
        ]
    ]
    assert report.overview([mine | case, peer | case], "keep", 2).lines == []


def test_overhead_is_the_line_through_two_counts() -> None:
    """20 us and 0.2 us for each tensor give just these."""
    rows = [
        {
            "section": "tensors",
            "contender": "polyak",
            "family": "ours",
            "tensors": count,
            "seconds": (20e-6 + 0.2e-6 * count, 0.0, 0.0),
        }
        for count in (10, 1000, 100_000)
    ]
    assert report.overhead(rows).lines == [["polyak", "20.0", "0.20", "0.022", "0.22", "20"]]


def test_the_page_shows_what_was_measured() -> None:
    """The table of the docs is made from the JSON file beside it, and so is all of it."""
    results = json.loads((DOCS / "benchmark.json").read_text())
    assert (DOCS / "benchmark-table.md").read_text() == report.markdown(results)
    assert not results["quick"]
    assert report.summary(results) in (DOCS.parent / "README.md").read_text()


def test_the_page_shows_what_was_measured_on_a_gpu() -> None:
    """And what it says of it in words follows from the numbers."""
    results = json.loads((DOCS / "gpu.json").read_text())
    assert (DOCS / "gpu-table.md").read_text() == gpu.markdown(results)
    assert not results["quick"]
    ours, shares, fastest = {}, {}, {}
    for row in results["rows"]:
        if row["section"] == "updates" and "failed" not in row:
            case, seconds = (row["model"], row["dtype"]), row["device_seconds"][0]
            if row["contender"] == "polyak":
                ours[case], shares[case] = seconds, row["share_of_copy"][0]
                assert (row["syncs"], row["launches"], row["extra_bytes"]) == (0, 2, 0)
            elif row.get("family") not in (None, "ours", "engine"):
                fastest[case] = min(seconds, fastest.get(case, math.inf))
    said = "".join(
        f"| {' | '.join(case)} | {100 * shares[case]:.0f} % | {fastest[case] / seconds:.1f} |\n"
        for case, seconds in ours.items()
    )
    assert said in (DOCS / "benchmark.md").read_text()
    llama = "Llama 3.2 1B", "bfloat16"
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    assert f"at {100 * shares[llama]:.0f} % of a copy's bandwidth" in words
    assert f"takes {fastest[llama] / ours[llama]:.1f} times as long" in words


# -------------------------------------------------------------- the jobs and the command


def test_a_full_run_has_every_case() -> None:
    """Five models, both allocators, one thread and two, 1 M to 1 B elements, 10 to 100,000."""
    planned = jobs.planned(False, list(shapes.MODELS), update.LARGEST, jobs.SECTIONS)
    assert {job.section for job in planned} == set(jobs.SECTIONS)
    cases = {
        (model, job.malloc, threads)
        for job in planned
        if job.section == "shapes"
        for model in job.arguments["models"]
        for threads in job.arguments["thread_counts"]
    }
    assert cases == {
        (model, malloc, threads)
        for model in shapes.MODELS
        for malloc, threads in (("keep", 1), ("keep", 2), ("return", 1))
    }
    counts = {
        section: [
            n for job in planned if job.section == section for n in job.arguments.get("counts", [])
        ]
        for section in ("size", "tensors")
    }
    assert counts == {
        "size": [10**6, 10**7, 10**8, 10**9],
        "tensors": [10, 100, 1000, 10_000, 100_000],
    }
    largest = max(planned, key=lambda job: job.needs_bytes)
    assert largest.needs_bytes < 20 * 10**9


def test_a_quick_run_is_short() -> None:
    """Every section once, on the smallest model."""
    planned = jobs.planned(True, update.QUICK, update.LARGEST_QUICK, jobs.SECTIONS)
    assert [job.section for job in planned] == jobs.SECTIONS
    assert max(job.needs_bytes for job in planned) < 10**9
    assert [job.section for job in jobs.planned(True, update.QUICK, 10**6, ["swap"])] == ["swap"]


def test_what_does_not_fit_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason, which the report repeats."""
    job = jobs.Job("size", {"counts": [10**9]}, "keep", 17 * 10**9)
    monkeypatch.setattr(machine, "free_bytes", lambda: 12_300_000_000)
    reason = jobs.short_of_memory(job)
    assert reason == ("size 1,000,000,000, malloc keep: needs 19.0 GB of memory, 12.3 GB are free")
    rows, skipped = update.measure([job], update.Console(quiet=True))
    assert (rows, skipped) == ([], [reason])
    monkeypatch.setattr(machine, "free_bytes", lambda: 19_000_000_000)
    assert jobs.short_of_memory(job) is None


def test_a_job_runs_in_a_process_of_its_own() -> None:
    """With the allocator that it asks for, and its complaint when it fails."""
    [found] = jobs.Job("allocator", {"effort": (0.0, 2, 2)}, "return").run()
    assert (found["section"], found["malloc"], len(found["seconds"])) == ("allocator", "return", 3)
    with pytest.raises(RuntimeError, match=r"swap nonsense, malloc keep failed:[\s\S]*nonsense"):
        list(jobs.Job("swap", {"model": "nonsense", "effort": (0.0, 2, 2)}).run())


def test_the_examples_of_the_harness_run() -> None:
    """Those in its docstrings."""
    found = [doctest.testmod(module) for module in [update, *MODULES]]
    assert sum(result.failed for result in found) == 0
    assert sum(result.attempted for result in found) >= 5


def test_help_names_what_can_be_chosen() -> None:
    """Models, sections, the largest tensor; what is for its own processes is hidden."""
    app = typer.Typer()
    app.command()(update.main)
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for option in ("--quick", "--model", "--section", "--largest", "--out", "--redraw"):
        assert re.search(rf"{option}\b", text)
    assert "--job" not in text
