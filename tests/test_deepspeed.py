"""Real DeepSpeed runs of two processes, over gloo on CPUs: ZeRO stages 0 to 3.

One process group runs all cases of `deepspeed_worker.py`, under the time cap of
`test_distributed.py`, which also shows that the harness can fail.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import test_distributed
from test_distributed import failures, run

WORKER = Path(__file__).with_name("deepspeed_worker.py")


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In stages 0, 1 and 2 whole parameters are averaged; stage 3 is refused by name.

    What was refused disturbs nothing, and no optimizer is attached to whose step comes before the
    weights do.
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(test_distributed, "LIMIT_SECONDS", 90)
    results = run(2, tmp_path, WORKER)
    wrong = failures(results, list(results[0]))
    if wrong:
        pytest.fail("\n\n".join(wrong) + "\n" + (tmp_path / "output.txt").read_text()[-2000:])
