"""Several real processes over gloo: the cases of `distributed_*.py`.

Each world size is one process group that runs all of its cases; the processes have a time cap, and
are ended as a group. Four write checkpoints, from which two, three and one go on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

import distributed_killed
import distributed_parallel
import distributed_state
import distributed_tools
import distributed_worker  # noqa: F401 - imports all that declare cases
from distributed_tools import cases

WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT_SECONDS = 240


def run(size: int, folder: Path, worker: Path = WORKER) -> list[dict[str, str | None]]:
    """Run the worker in so many processes; return what each rank wrote down."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    output = folder / "output.txt"
    with output.open("wb") as log:
        processes = [
            subprocess.Popen(
                [sys.executable, str(worker), str(rank), str(size), str(folder)],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for rank in range(size)
        ]
        deadline = time.monotonic() + LIMIT_SECONDS
        try:
            for process in processes:
                process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    found = [folder / f"{rank}.json" for rank in range(size)]
    if not all(path.exists() for path in found):
        pytest.fail(f"a process wrote nothing:\n{output.read_text()[-4000:]}")
    return [json.loads(path.read_text()) for path in found]


def failures(results: list[dict[str, str | None]], cases: list[str]) -> list[str]:
    """Return a text for each failure, and one for all cases that did not run on every rank."""
    broken = [
        f"{name}, rank {rank}:\n{result[name]}"
        for name in cases
        for rank, result in enumerate(results)
        if result.get(name) is not None
    ]
    missing = [name for name in cases if any(name not in result for result in results)]
    return broken + [f"not run on every rank: {', '.join(missing)}"] * bool(missing)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where each group has a folder of its own, named after its size."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def four(folder: Path) -> list[dict[str, str | None]]:
    """Return how the group of four went, whose checkpoints the others read."""
    return run(4, made(folder / "4"))


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def passed(results: list[dict[str, str | None]], names: Iterable[str], folder: Path) -> None:
    """Fail with what went wrong, and the end of what the processes wrote."""
    wrong = failures(results, list(names))
    if wrong:
        pytest.fail("\n\n".join(wrong) + "\n" + (folder / "output.txt").read_text()[-2000:])


def test_four_processes(four: list[dict[str, str | None]], folder: Path) -> None:
    """Whatever a model is spread by, its averages are those of one process, bit for bit.

    DDP, FSDP2, HSDP, tensor parallelism, two of them over each other, and pipeline stages: without
    communication, applied and restored as if nothing had been, saved together as one file.
    """
    passed(four, cases(4), folder / "4")


@pytest.mark.usefixtures("four")
def test_two_processes(folder: Path) -> None:
    """The same on two, what does not need four, and to go on where four have stopped."""
    passed(run(2, made(folder / "2")), cases(2), folder / "2")


@pytest.mark.usefixtures("four")
def test_three_processes(folder: Path) -> None:
    """To go on where four have stopped equals never having stopped."""
    passed(run(3, made(folder / "3")), cases(3), folder / "3")


@pytest.mark.usefixtures("four")
def test_one_process(folder: Path) -> None:
    """To go on where four have stopped, without a process group."""
    for layout in distributed_state.WRITTEN:
        stopped = folder / "4" / f"a_run_stops[{layout.__name__}]" / "moved"
        distributed_state.go_on(distributed_tools.plain, stopped)
    stopped = folder / "4" / "a_training_stops" / "trained"
    distributed_state.train_on(stopped, shard=False)
    stages = folder / "4" / "pipeline_stages_average_what_they_have" / "stages"
    distributed_parallel.load_stages(stages)


def test_processes_that_are_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle of a save: what was saved before is whole, and what survives is told.

    A process forks the pairs of ranks that are killed, so that torch is imported once.
    """
    results = run(1, tmp_path, Path(distributed_killed.__file__))
    passed(results, distributed_killed.CASES, tmp_path)


def test_the_harness_can_fail(tmp_path: Path) -> None:
    """A case that fails on one rank, and a process that dies, are told with their traceback."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, pathlib, sys\n"
        "rank, size, folder = sys.argv[1:]\n"
        "found = {'fine': None}\n"
        "if rank == '1':\n"
        "    found['broken'] = 'Traceback: it broke'\n"
        "pathlib.Path(folder, rank + '.json').write_text(json.dumps(found))\n"
    )
    wrong = failures(run(2, tmp_path, worker), ["fine", "broken"])
    assert wrong == ["broken, rank 1:\nTraceback: it broke", "not run on every rank: broken"]

    worker.write_text("raise SystemExit('it died early')")
    folder = tmp_path / "second"
    folder.mkdir()
    with pytest.raises(pytest.fail.Exception, match="it died early"):
        run(2, folder, worker)
