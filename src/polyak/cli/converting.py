"""CONVERT: `polyak convert`, the averages of one program as another one loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from polyak.cli.asked import Force, Json, Out, Place, Which, check_out, open_checkpoint, parts
from polyak.cli.told import Rows, tell

__all__ = ["EPILOG", "convert"]

EPILOG = """
\b
Examples:
  polyak convert last.ckpt -o ema.safetensors --to safetensors --which averages
  polyak convert ema.safetensors -o swa.pt --to averaged-model
  polyak convert ema.safetensors -o unet_ema --to diffusers

\b
Formats:
  safetensors      plain weights, for any loader
  averaged-model   torch.optim.swa_utils.AveragedModel
  timm             a checkpoint with state_dict_ema
  diffusers        a folder, for EMAModel and for from_pretrained
  lightning        a checkpoint of EMAWeightAveraging
  ema-pytorch      the state of an EMA
  torch-ema        has no names, so that it takes Python: polyak.formats.convert

Exit codes: 0 done; 2 nothing done, as an argument or a file is not what it should be.
"""


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A checkpoint of any program.")],
    out: Out,
    to: Annotated[str, typer.Option(metavar="FORMAT", help="What OUT is for; see below.")],
    which: Which = None,
    at: Place = "",
    clock: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many updates it has seen, if IN does not tell."),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(metavar="DECAY", help="For programs that keep it, if IN does not tell."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the averages or the weights of a checkpoint as another program expects them.

    OUT is complete or not there: never the input, and another file only with --force.
    """
    from polyak import formats

    with open_checkpoint(source) as opened:
        check_out(out, to == "diffusers", [source, *parts([opened])], force)
    content = formats.convert(source, out, to, which=which, at=at, clock=clock, decay=decay)
    name = content.pick(which)
    answer: dict[str, Any] = {
        "out": str(out),
        "format": to,
        "producer": content.producer,
        "set": name,
        "tensors": len(content.sets[name]),
    }
    tell(answer, as_json, _convert_rows)


def _convert_rows(answer: Mapping[str, Any]) -> Rows:
    return [
        ("wrote", answer["out"]),
        ("for", answer["format"]),
        ("from", f"the {answer['set']} of {answer['producer']}, {answer['tensors']} tensors"),
    ]
