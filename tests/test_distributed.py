"""Several real processes: DDP and FSDP2 over gloo.

Each world size is one process group that runs all cases of `distributed_worker.py`; the processes
have a time cap, and are ended as a group.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT_SECONDS = 120


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


def test_two_processes(tmp_path: Path) -> None:
    """Averages of replicated and of sharded models are those of one process.

    DDP: bit-identical on the ranks. FSDP2 and tensor parallelism: shard by shard, without
    communication, bit-identical to the unsharded average; applied, restored, saved and loaded as
    shards.
    """
    import distributed_worker

    results = run(2, tmp_path)
    wrong = failures(results, list(distributed_worker.CASES))
    if wrong:
        pytest.fail("\n\n".join(wrong) + "\n" + (tmp_path / "output.txt").read_text()[-2000:])


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
