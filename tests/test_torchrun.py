"""examples/fsdp2.py as a user runs it: torchrun, other numbers of processes, kills, exceptions.

Every run has a time cap, at which torchrun and its workers are ended.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from models import bit_identical
from polyak.files import read_facts, verify

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT_SECONDS = 90
RUN = (str(EXAMPLES / "fsdp2.py"), "--steps", "20", "--save-every", "5", "--folder")


class Finished(NamedTuple):
    """How a run ended, and what all of its processes wrote."""

    code: int
    stdout: str
    stderr: str


@contextmanager
def started(size: int, *command: str, logs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start torchrun with so many workers; end what still runs when the block is left."""
    logs.mkdir(exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "error",
        "PYTHONIOENCODING": "utf-8",
        "COLUMNS": "400",
    }
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size))
    with (logs / "stdout").open("wb") as stdout, (logs / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, *torchrun, *command],
            env=environment,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # torchrun then ends its workers, which have sessions of their own
            try:
                process.wait(45)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def run(size: int, *command: str, logs: Path, limit: float = LIMIT_SECONDS) -> Finished:
    """Run a program under torchrun to its end; one that does not end is a failure."""
    with started(size, *command, logs=logs) as process:
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit} seconds:\n{_written(logs, 'stderr')[-4000:]}")
    return Finished(code, _written(logs, "stdout"), _written(logs, "stderr"))


def train(size: int, folder: Path, *arguments: str) -> str:
    """Run the example; return what it prints. Warnings are errors, and so is anything on stderr."""
    finished = run(size, *RUN, str(folder), *arguments, logs=folder.with_name(f"{folder.name}-log"))
    assert finished.code == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout


# Runs a program, and holds one rank for ever where it syncs a file for the given time.
HELD = """
import os, runpy, sys, time
from pathlib import Path

logs, rank, left, program = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
(logs / f"{os.getpid()}.pid").touch()
sync = os.fsync

def hold(descriptor):
    global left
    left -= 1
    if left == 0:
        (logs / "held").touch()
        time.sleep(600)
    sync(descriptor)

if os.environ["RANK"] == rank:
    os.fsync = hold
sys.path[0] = str(Path(program).parent)
sys.argv = sys.argv[4:]
runpy.run_path(program, run_name="__main__")
"""


def kill_in_a_save(folder: Path, logs: Path, *, rank: int, sync: int) -> str:
    """Run the example on 2 ranks; kill all of it where a rank syncs a file for the given time.

    Of a checkpoint each rank syncs its shards, and rank 0 then what completes it.
    """
    logs.mkdir()
    program = logs / "held.py"
    program.write_text(HELD)
    arguments = (str(program), str(logs), str(rank), str(sync), *RUN, str(folder))
    with started(2, *arguments, logs=logs) as process:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not (logs / "held").exists():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"no save to kill:\n{_written(logs, 'stderr')[-4000:]}")
            time.sleep(0.02)
        process.kill()
        workers = [int(path.stem) for path in logs.glob("*.pid")]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(workers) == 2
    return _written(logs, "stdout")


def complete(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/.metadata"))


def whole(checkpoint: Path, path: Path) -> dict[str, Any]:
    """Return what is in a checkpoint, unsharded; two runs differ in their ids."""
    dcp_to_torch_save(checkpoint, path)
    state = torch.load(path, weights_only=True)
    found = json.loads(state["ema"]["facts"])
    assert found["history"].pop("run")
    found["history"].pop("branches", None)
    return state | {"ema": state["ema"] | {"facts": found}}


def facts(path: Path) -> dict[str, Any]:
    """Return the facts of a file; two runs differ in their ids."""
    found = read_facts(path)
    assert found["history"].pop("run")
    found["history"].pop("branches", None)
    return found


def _written(logs: Path, stream: str) -> str:
    return (logs / stream).read_text(encoding="utf-8")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module; it imports what lies beside it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("fsdp2")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on 2 ranks that nothing stops."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(2, folder)
    assert complete(folder) == ["000005", "000010", "000015", "000020"]
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on 2 ranks that was killed twice, each time in the middle of a save."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    # The shards of rank 1 are missing.
    kill_in_a_save(folder, folder.with_name("first"), rank=1, sync=2)
    assert complete(folder) == ["000005"]
    assert (folder / "000010").exists()
    # All is there, under its own name but for what DCP renames last.
    printed = kill_in_a_save(folder, folder.with_name("second"), rank=0, sync=4)
    assert printed.startswith(f"Resumed from {folder}/000005, world size 2.\nstep 10: ")
    assert complete(folder) == ["000005", "000010"]
    assert (folder / "000015" / ".metadata.tmp").stat().st_size > 0
    return folder


def test_a_save_that_was_killed_is_no_checkpoint(
    straight: Path, killed: Path, tmp_path: Path
) -> None:
    """A killed run goes on from the checkpoint before, to the bit as if nothing had happened.

    Weights, optimizer and average of the next checkpoint are those of a run that nothing stopped.
    """
    first, again, before = (
        whole(folder / step, tmp_path / f"{number}.pt")
        for number, (folder, step) in enumerate(
            [(straight, "000010"), (killed, "000010"), (killed, "000005")]
        )
    )
    assert bit_identical(again, first)
    assert not bit_identical(again, before)


def test_another_number_of_processes_goes_on(
    straight: Path, killed: Path, tmp_path: Path, example: Any
) -> None:
    """From 2 ranks to 3: the average has seen what that of one straight run on 2 has seen.

    Anybody loads the file that it leaves, which is right on as many images as was printed. Loaded
    on 2 ranks or in one process, the last checkpoint gives the same bits.
    """
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    printed = train(3, folder)
    assert printed.startswith(f"Resumed from {folder}/000010, world size 3.\nstep 15: ")
    assert [len(list((folder / n).glob("*.distcp"))) for n in complete(folder)] == [2, 2, 3, 3]

    path = folder / "ema.safetensors"
    assert verify(path) == []
    assert facts(path) == facts(straight / "ema.safetensors")
    assert (facts(path)["clock"], facts(path)["updates"]) == (20, 20)
    weights = load_file(path)
    model = example.Transformer()
    model.load_state_dict(weights, strict=True)
    _, _, *test = example.load_halves()
    right = example.accuracy(model, *test)
    assert right > 60  # chance is 10
    wrote = f"Wrote {path}: a plain Transformer() loads it.\n"
    assert printed.endswith(f" % raw, {right:.1f} % averaged\n{wrote}")

    averages = whole(folder / "000020", tmp_path / "whole.pt")["ema"]["averages"]
    assert bit_identical(averages, weights)
    content = path.read_bytes()
    path.unlink()
    again = train(2, folder)
    assert again == f"Resumed from {folder}/000020, world size 2.\n{wrote}"
    assert path.read_bytes() == content


APPLIED = """
import sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from polyak import EMA

def shards(tensors):
    local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items()}
    return {n: t.detach().clone().reshape(-1).view(torch.uint8) for n, t in local.items()}

def same(left, right):
    return all(torch.equal(left[n], right[n]) for n in right)

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
x = torch.randn(8, 6)
for module in (*model, model):
    fully_shard(module)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
ema = EMA(model, 0.5)
ema.attach(optimizer)

def step():
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()

for _ in range(3):
    step()
before = shards(model.state_dict())
try:
    with ema.applied():
        model(x)
        inside = shards(model.state_dict())
        model(x[:, :4])  # inputs of a wrong shape, in the middle of a forward
except RuntimeError as error:
    caught = "cannot be multiplied" in str(error)
after = shards(model.state_dict())
step()
moved, back = not same(inside, before), same(after, before)
sys.stdout.write(f"rank {rank}: caught {caught}, moved {moved}, back {back}\\n")
sys.stdout.flush()
with ema.applied():
    if rank == 1:
        raise RuntimeError("rank 1 has had enough")
    model(x)  # waits for rank 1
"""


def test_an_exception_inside_applied(tmp_path: Path) -> None:
    """On all ranks and caught: each has its weights back, bit for bit, and they train on.

    On one rank alone: the group ends with what that rank says, and does not wait for it.
    """
    program = tmp_path / "applied.py"
    program.write_text(APPLIED)
    finished = run(2, str(program), logs=tmp_path / "log")
    assert sorted(finished.stdout.splitlines()) == [
        f"rank {rank}: caught True, moved True, back True" for rank in range(2)
    ]
    assert finished.code != 0
    assert "RuntimeError: rank 1 has had enough" in finished.stderr


def test_what_is_left_running_is_ended(tmp_path: Path) -> None:
    """A run that hangs fails its test, and leaves no process behind."""
    program = tmp_path / "hangs.py"
    program.write_text(
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "Path(sys.argv[1], f'{os.getpid()}.pid').touch()\n"
        "time.sleep(600)\n"
    )
    command = (str(program), str(tmp_path))
    deadline = time.monotonic() + LIMIT_SECONDS
    with started(2, *command, logs=tmp_path / "log") as process:
        while len(list(tmp_path.glob("*.pid"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert process.poll() is not None
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)
    with pytest.raises(pytest.fail.Exception, match=r"^still running after 0.1 seconds"):
        run(2, *command, logs=tmp_path / "log", limit=0.1)
