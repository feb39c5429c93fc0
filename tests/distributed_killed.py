"""Processes that are killed while they save, at chosen moments, and what they leave behind.

``python distributed_killed.py 0 1 FOLDER`` forks a pair of ranks for each case, and writes down how
it went, as `distributed_worker.py` does. A case is a kind of save, and when which rank dies in it.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from distributed_tools import assert_same, averaged, fsdp, load, move_, net
from polyak import EMA, engine, files

LIMIT_SECONDS = 20


class Save(NamedTuple):
    """A way to save, and how what it wrote is looked at: `check` of the one before."""

    write: Callable[[Any, EMA, Path, int], None]  # the model, its EMA, the folder, 0 or 1
    check: Callable[[Path], None]


def to_file(model: Any, ema: EMA, folder: Path, turn: int) -> None:
    ema.save(folder / "ema.safetensors")  # in place of the one before


def to_folder(model: Any, ema: EMA, folder: Path, turn: int) -> None:
    ema.save(folder / str(turn), shard_bytes=300)


def to_checkpoint(model: Any, ema: EMA, folder: Path, turn: int) -> None:
    dcp.save({"model": model, "ema": ema}, checkpoint_id=folder / str(turn))


def check_file(folder: Path) -> None:
    """The old file is there and whole; what was begun is removed by whoever saves next."""
    path = folder / "ema.safetensors"
    assert files.verify(path) == []
    assert files.read_facts(path)["clock"] == 2
    assert_same(files.read(path), averaged(net(), range(2)).model_state_dict())
    averaged(net(), range(3)).save(path)
    assert [found.name for found in folder.glob("*ema*")] == [path.name]
    assert list(folder.glob(".polyak*")) == []


def check_folder(folder: Path) -> None:
    """The folder before is whole, and there is no new one."""
    assert not (folder / "1").exists()
    where = json.loads((folder / "0" / "model.safetensors.index.json").read_text())["weight_map"]
    assert all(files.verify(folder / "0" / file) == [] for file in where.values())
    found = {name: files.read(folder / "0" / file)[name] for name, file in where.items()}
    assert_same(found, averaged(net(), range(2)).model_state_dict())
    averaged(net(), range(3)).save(folder / "1", shard_bytes=300)
    assert list(folder.glob(".polyak*")) == []


def check_checkpoint(folder: Path) -> None:
    """What is begun does not load, and changes nothing; the checkpoint before does, as it was."""
    model = net(seed=8)
    ema = averaged(model, range(5, 6))
    before = {name: tensor.clone() for name, tensor in ema.averages.items()}
    state = {"model": model, "ema": ema}
    try:
        load(state, folder / "1")
    except dcp.api.CheckpointException:
        pass
    else:
        raise AssertionError("half a checkpoint was loaded")
    assert_same(dict(ema.averages), before)
    assert ema.clock == 1
    load(state, folder / "0")
    alone = net()
    whole = averaged(alone, range(2))
    assert_same(dict(ema.averages), dict(whole.averages))
    assert_same(dict(model.state_dict()), dict(alone.state_dict()))
    assert ema.clock == 2


FILE = Save(to_file, check_file)
FOLDER = Save(to_folder, check_folder)
CHECKPOINT = Save(to_checkpoint, check_checkpoint)

# ------------------------------------------------------------------------------------- moments


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(
    owner: Any, name: str, turn: int = 1, *, ends: str = "", after: bool = False
) -> Callable[[], None]:
    """Return what lets this process die at, or after, so many calls of a function.

    Only those count whose last argument ends so.
    """

    def arm() -> None:
        function, calls = getattr(owner, name), []

        def mortal(*args: Any, **options: Any) -> Any:
            calls.append(str(args[-1]).endswith(ends))
            if calls[-1] and sum(calls) == turn and not after:
                die()
            result = function(*args, **options)
            if calls[-1] and sum(calls) == turn:
                die()
            return result

        setattr(owner, name, mortal)

    return arm


class Case(NamedTuple):
    save: Save
    dying: dict[int, Callable[[], None]]  # rank -> what arms it


GATHER = at(engine, "whole", 5)
DATA = at(dcp.FileSystemWriter, "write_data", after=True)
CASES = {
    "the writer of a file, at a tensor": Case(FILE, {0: at(files, "_put", 5)}),
    "the writer of a file, at the last moment": Case(
        FILE, {0: at(Path, "replace", ends="ema.safetensors")}
    ),
    "another one, while a file is written": Case(FILE, {1: GATHER}),
    "both, while a file is written": Case(FILE, {0: GATHER, 1: GATHER}),
    "the writer of a folder, at its third file": Case(FOLDER, {0: at(files, "_writing", 3)}),
    "the writer of a folder, at the last moment": Case(FOLDER, {0: at(Path, "replace", ends="/1")}),
    "one, before it has written its part of a checkpoint": Case(
        CHECKPOINT, {1: at(dcp.FileSystemWriter, "write_data")}
    ),
    "both, after they have written their parts": Case(CHECKPOINT, {0: DATA, 1: DATA}),
    "the one that says that all is there": Case(
        CHECKPOINT, {0: at(dcp.FileSystemWriter, "finish")}
    ),
}

# ------------------------------------------------------------------------------------ processes


def rank_of(case: Case, rank: int, folder: Path) -> None:
    """Save once in peace; then be one of those who die, or be told that the other one has."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=10),
    )
    model = net()
    fsdp(model)
    ema = averaged(model, range(2))
    case.save.write(model, ema, folder, 0)
    move_(model, 2)
    ema.update()
    dist.barrier()
    case.dying.get(rank, int)()
    try:
        case.save.write(model, ema, folder, 1)
        told = "nothing"
    except BaseException as error:  # a CheckpointException is one
        told = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.txt").write_text(told)


def fork(case: Case, rank: int, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            rank_of(case, rank, folder)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return pid


def ended(pids: list[int]) -> list[int]:
    """Return how the processes ended, those that did not in time by their kill."""
    deadline = time.monotonic() + LIMIT_SECONDS
    codes = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [codes[pid] for pid in pids]


def check(case: Case, folder: Path, codes: list[int], seconds: float) -> None:
    assert seconds < LIMIT_SECONDS
    for rank, code in enumerate(codes):
        if rank in case.dying:
            assert code == -signal.SIGKILL, f"rank {rank} was to be killed"
            assert not (folder / f"{rank}.txt").exists()
        else:
            told = (folder / f"{rank}.txt").read_text()
            assert " by peer" in told, told
    case.save.check(folder)


def main(folder: Path) -> None:
    outcomes = {}
    for number, (name, case) in enumerate(CASES.items()):
        own = folder / str(number)
        own.mkdir()
        begun = time.monotonic()
        codes = ended([fork(case, rank, own) for rank in range(2)])
        outcomes[name] = case, own, codes, time.monotonic() - begun
    results: dict[str, str | None] = {}
    for (
        name,
        outcome,
    ) in outcomes.items():  # only now: no process is forked after a thread was begun
        try:
            check(*outcome)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
    (folder / "0.json").write_text(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(Path(sys.argv[3]))
