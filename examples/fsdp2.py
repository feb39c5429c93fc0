"""Train a sharded model under torchrun, stop it, and go on with another number of processes.

A small transformer learns scikit-learn's handwritten digits. FSDP2 shards its weights, and their
average with them, over GPUs or over processes on a CPU. Killed at any moment and started again, it
goes on from its last complete checkpoint, which any number of processes can load.

    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 100
    torchrun --nproc-per-node 3 examples/fsdp2.py
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.fsdp import fully_shard

from load_without_polyak import accuracy, load_halves
from polyak import EMA

BATCH = 96  # images of all processes together


class Transformer(nn.Module):
    """A small vision transformer for images of 8 by 8 pixels, which it sees in 16 patches."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.classify = nn.Linear(16 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the ten digits for images of shape (n, 1, 8, 8)."""
        x = self.embed(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.classify(self.norm(x).flatten(1))


class Training(Stateful):
    """Model and optimizer as one entry of a checkpoint, under names that no sharding changes."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return both states, sharded as they are."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over both states."""
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


def last_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole: DCP writes `.metadata` last."""
    found = [max((path.parent for path in folder.glob("*/.metadata")), default=None)]
    dist.broadcast_object_list(found)  # one looks, so that all agree
    return found[0]


def main(
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the whole run.")] = 200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 50,
    folder: Annotated[Path, typer.Option(help="Checkpoints and the result.")] = Path("out/fsdp2"),
) -> None:
    """Train from the last complete checkpoint in the folder, or from the beginning."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    console = Console(quiet=rank != 0, highlight=False)
    images, labels, *test = (tensor.to(device) for tensor in load_halves())

    torch.manual_seed(0)  # the same weights everywhere; each process keeps its shard of them
    model = Transformer().to(device)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ema = EMA(model)
    ema.attach(optimizer)
    state = {"training": Training(model, optimizer), "ema": ema}
    if checkpoint := last_complete(folder):
        dcp.load(state, checkpoint_id=checkpoint)
        console.print(f"Resumed from {checkpoint}, world size {size}.")

    for step in range(ema.clock, steps):
        # What a step learns from depends on its number only, not on the processes or on resuming.
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(step))
        mine = order[:BATCH][rank::size].to(device)
        model.train()
        loss = nn.functional.cross_entropy(model(images[mine]), labels[mine], reduction="sum")
        (loss * size / BATCH).backward()  # FSDP takes the mean over processes
        optimizer.step()
        optimizer.zero_grad()

        if ema.clock % save_every == 0 or ema.clock == steps:
            raw = accuracy(model, *test)
            with ema.applied():  # on all processes: a sharded forward needs each of them
                averaged = accuracy(model, *test)
            console.print(f"step {ema.clock}: {raw:.1f} % raw, {averaged:.1f} % averaged")
            dcp.save(state, checkpoint_id=folder / f"{ema.clock:06}")
    ema.save(folder / "ema.safetensors")  # by all processes; the first one writes
    console.print(f"Wrote {folder / 'ema.safetensors'}: a plain Transformer() loads it.")
    dist.destroy_process_group()
    # Gloo's threads may still hold tensors of the last exchange; one that has to wait for Python
    # while that ends aborts the process (torch 2.13).
    time.sleep(0.2)


if __name__ == "__main__":
    typer.run(main)
