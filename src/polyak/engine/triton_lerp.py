"""The loop of `cuda.py`, in Triton. Imported only when there is a tensor on a GPU.

Values, casts and rounding are those of torch's lerp on the same device, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["DTYPES", "lerp"]

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit  # type: ignore[untyped-decorator]
def _step(  # type: ignore[no-untyped-def]  # Triton takes other annotations for its own
    target,
    source,
    left,
    weight,
    offsets,
    ALIGNED: tl.constexpr,  # noqa: N803
):
    """Move the elements of one step; return 1 for each that kept its value.

    `ALIGNED` is what the address of the source is a multiple of, or 0: then all loads are scalar,
    and only the `left` first elements exist.
    """
    target += offsets
    source += offsets
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        source = tl.multiple_of(source, ALIGNED)
        t = tl.load(target)
        s = tl.load(source).to(t.dtype)
    else:
        t = tl.load(target, offsets < left, 0.0)
        s = tl.load(source, offsets < left, 0.0).to(t.dtype)
    # torch: t + w (s - t) for w < 1/2, else s - (s - t) (1 - w), each with one fused multiply-add.
    # Multiplied by -1, and not subtracted from 0, since that makes a zero negative too.
    near = tl.abs(weight) < 0.5
    share = tl.where(near, weight, (1.0 - weight) * -1.0)
    mixed = tl.fma(s - t, share, tl.where(near, t, s))
    finite = tl.abs(mixed) < float("inf")  # false for NaN
    mixed = tl.where(finite, mixed, t)
    if ALIGNED:
        tl.store(target, mixed)
    else:
        tl.store(target, mixed, offsets < left)
    return tl.where(finite, 0, 1)


@triton.jit(do_not_specialize=["weight"])  # type: ignore[untyped-decorator]
def lerp(  # type: ignore[no-untyped-def]
    table,  # of each tensor: address of target and source, number of elements, first block
    owner,  # of each block: its tensor
    weight,
    skipped,
    TARGET: tl.constexpr,  # noqa: N803
    SOURCE: tl.constexpr,  # noqa: N803
    ALIGNED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
):
    """Move the elements of one block, and count those that kept their value."""
    w = tl.load(weight).to(TARGET)
    if w != 0.0:  # else it is no update, and an infinity times nothing is nothing to count
        block = tl.program_id(0)
        row = table + 4 * tl.load(owner + block).to(tl.int64)
        target_address = tl.load(row)
        source_address = tl.load(row + 1)
        begin = (block - tl.load(row + 3)) * BLOCK
        left = tl.load(row + 2) - begin
        target = target_address.to(tl.pointer_type(TARGET), bitcast=True) + begin
        source = source_address.to(tl.pointer_type(SOURCE), bitcast=True) + begin
        offsets = tl.arange(0, STEP)
        kept = tl.zeros((STEP,), tl.int32)
        if (left >= BLOCK) & (target_address % 16 == 0) & (source_address % ALIGNED == 0):
            for i in range(0, BLOCK, STEP):
                kept += _step(target + i, source + i, STEP, w, offsets, ALIGNED)
        else:
            rest = tl.minimum(left, BLOCK).to(tl.int32)
            for i in range(0, rest, STEP):
                kept += _step(target + i, source + i, rest - i, w, offsets, 0)
        count = tl.sum(kept)
        if count > 0:
            tl.atomic_add(skipped, count.to(tl.int64), sem="relaxed")
