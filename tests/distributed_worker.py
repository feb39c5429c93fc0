"""One process of several: runs every case of its group, and writes down how each went.

``python distributed_worker.py RANK SIZE FOLDER``; `test_distributed.py` starts one for each rank
and reads ``FOLDER/RANK.json``: the name of each case -> None, or the traceback of its failure. When
the ranks are no longer in step after a failure, no further case is begun.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import distributed_gathered  # noqa: F401 - declares cases, as the others do
import distributed_laws  # noqa: F401
import distributed_parallel  # noqa: F401
import distributed_replicated  # noqa: F401
import distributed_save  # noqa: F401
import distributed_sharded  # noqa: F401
import distributed_state  # noqa: F401
from distributed_tools import cases


def main(rank: int, size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=20),  # a rank that waits in vain says so
    )
    aside = dist.new_group()  # where no collective of a case can be mistaken for another
    results: dict[str, str | None] = {}
    for name, function in cases(size).items():
        torch.manual_seed(0)
        own = folder / name
        own.mkdir(exist_ok=True)
        try:
            function(own)
            results[name] = None
        except BaseException:
            results[name] = traceback.format_exc()
        (folder / f"{rank}.json").write_text(json.dumps(results))
        try:
            dist.barrier(aside)
        except RuntimeError:
            return
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
