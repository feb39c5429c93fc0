"""WHAT IS MEASURED, a function each: it yields rows, which are plain values.

A row says in which `section` and case it is and which `contender` it is about. `seconds` are those
of one call; `of_limit`, `times_ours` and `of_step` are ratios within a round; each is a median and
its quartiles. Sizes are in bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from harness import ours, peers, training
from harness.contender import Candidate, Contender, Swapping, check, check_swap, threads
from harness.limit import Limit, Triad
from harness.memory import traced
from harness.shapes import MODELS, Entry, Weights, elements, listed, many, one
from harness.timing import Effort, alternate, measure, ratios, settle, spread

Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights
LIMIT, OURS, TRIAD = "the limit, in C", "ours", "STREAM triad"
# From so many elements on a common machine has no room for four models, or for peers that make a
# temporary one.
LARGE = 10**9
FRUGAL = ["timm ModelEmaV3", "state_dict loop"]


def shapes(models: Sequence[str], thread_counts: Sequence[int], effort: Effort) -> Iterator[Row]:
    """One update of the tensors of well-known models, against the limit and against ours."""
    for model in models:
        for dtype in DTYPES:
            for row in against(listed(model), dtype, thread_counts, effort):
                yield {"section": "shapes", "model": MODELS[model], "dtype": dtype, **row}


def size(counts: Sequence[int], effort: Effort) -> Iterator[Row]:
    """One update of a single tensor of so many elements."""
    for count in counts:
        for dtype in DTYPES:
            for row in against(one(count), dtype, [1], effort, large=count >= LARGE):
                yield {"section": "size", "elements": count, "dtype": dtype, **row}


def tensors(counts: Sequence[int], effort: Effort) -> Iterator[Row]:
    """One update of so many tensors of one element: nothing but overhead."""
    for count in counts:
        for row in against(many(count), "float32", [1], effort):
            yield {"section": "tensors", "tensors": count, "dtype": "float32", **row}


def against(
    entries: Sequence[Entry],
    dtype: str,
    thread_counts: Sequence[int],
    effort: Effort,
    large: bool = False,
) -> Iterator[Row]:
    """Time every contender in turn with the limit and with ours, each on a model of its own.

    So what one of them finds in a cache the others find there as well. Each is compared with the
    definition before.

    Args:
        entries: the tensors of the model.
        dtype: of its weights.
        thread_counts: numbers of threads.
        effort: for each contender and number of threads.
        large: let all use one model, without the peers that need a temporary one.
    """
    narrow = DTYPES[dtype] != torch.float32
    buffer = torch.empty(elements(entries), dtype=DTYPES[dtype])
    flat = Weights(entries, DTYPES[dtype], buffer)
    model, other = (flat if large else Weights(entries, DTYPES[dtype]) for _ in range(2))
    default, *rest = ours.candidates(DTYPES[dtype])
    mine, bound = default.make(model), Limit(flat, buffer)
    check(mine, model)
    check(bound, flat)
    always = {OURS: mine.update, LIMIT: bound.update}

    def row(candidate: Candidate, contender: Contender, count: int) -> Row:
        call = {} if contender is mine else {candidate.name: contender.update}
        with threads(count):
            times = alternate(always | call, effort, before=_before if count > 1 else None)
        taken = times[candidate.name if call else OURS]
        return {
            "contender": candidate.name,
            "family": candidate.family,
            "default": contender is mine,
            "differs": candidate.differs if narrow else "",
            "threads": count,
            "rounds": len(taken),
            "seconds": spread(taken),
            "limit_seconds": spread(times[LIMIT]).median,
            "ours_seconds": spread(times[OURS]).median,
            "of_limit": ratios(times[LIMIT], taken),
            "times_ours": ratios(taken, times[OURS]),
        }

    for count in thread_counts:
        yield row(default, mine, count)
    if not large:
        triad = Triad(elements(entries), DTYPES[dtype])
        for count in thread_counts:
            yield row(Candidate(TRIAD, lambda model: triad, family="limit"), triad, count)
        del triad
    for candidate in rest + peers.candidates()[0]:
        if large and candidate.family == "peer" and candidate.name not in FRUGAL:
            continue
        contender = candidate.make(other)
        if not (narrow and candidate.differs):
            check(contender, other)
        for count in thread_counts:
            yield row(candidate, contender, count)
        del contender
        gc.collect()  # some refer to themselves, and models are large


def step(effort: Effort, width: int = 64, layers: int = 4) -> Iterator[Row]:
    """One update after a whole training step: forward, backward, AdamW; on one thread.

    A single run of each network, in which every step is followed by the update of one contender.

    Args:
        effort: rounds of as many steps as there are contenders.
        width: of the convolutions.
        layers: of the transformer.
    """
    image, text = training.resnet18(width), training.Transformer(layers=layers)
    for name, model, train in (
        ("ResNet-18, 8 images of 32 x 32", image, training.image_step(image)),
        ("transformer, 8 x 128 tokens", text, training.token_step(text)),
    ):
        made = [(candidate, candidate.make(model)) for candidate in _whole("float32")]
        for _, contender in made:
            check(contender, model)
        steps: dict[str, list[float]] = {candidate.name: [] for candidate, _ in made}
        with threads(1):
            train()
            times = alternate(
                {candidate.name: contender.update for candidate, contender in made},
                effort,
                before=lambda name, steps=steps, train=train: steps[name].append(measure(train)),
            )
        for candidate, _ in made:
            taken, before = times[candidate.name], steps[candidate.name]
            yield {
                "section": "step",
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "contender": candidate.name,
                "family": candidate.family,
                "rounds": len(taken),
                "seconds": spread(taken),
                "step_seconds": spread(before).median,
                "of_step": ratios(taken, before),
            }


def swap(model: str, effort: Effort) -> Iterator[Row]:
    """Let a model hold its averages and its trained weights again; float32, on one thread.

    Those who evaluate a second module have nothing to swap.
    """
    own, other = (Weights(listed(model), torch.float32) for _ in range(2))
    default, *rest = _whole("float32")
    mine = default.make(own)
    check(mine, own)
    check_swap(mine, own)
    for candidate in [default, *(peer for peer in rest if peer.family == "peer")]:
        contender = mine if candidate is default else candidate.make(other)
        if not isinstance(contender, Swapping):
            continue
        if contender is not mine:
            check(contender, other)
            check_swap(contender, other)
        with threads(1):
            times = alternate({OURS: _both(mine), candidate.name: _both(contender)}, effort)
        taken = times[candidate.name]
        yield {
            "section": "swap",
            "model": model,
            "contender": candidate.name,
            "family": candidate.family,
            "rounds": len(taken),
            "seconds": spread(taken),
            "ours_seconds": spread(times[OURS]).median,
            "times_ours": ratios(taken, times[OURS]),
        }
        del contender
        gc.collect()


def memory(model: str) -> Iterator[Row]:
    """Tensor memory beside the model's: what is held, and what is taken for a while."""
    for dtype in DTYPES:
        weights = Weights(listed(model), DTYPES[dtype])
        for candidate in _whole(dtype):
            made: list[Any] = []
            gc.collect()  # or what is left of the one before would go meanwhile
            held = traced(lambda: made.append(_settled(candidate, weights))).held  # noqa: B023
            yield {
                "section": "memory",
                "model": model,
                "dtype": dtype,
                "contender": candidate.name,
                "family": candidate.family,
                "weights": elements(listed(model)) * DTYPES[dtype].itemsize,
                "held": held,
                "update": traced(made[0].update).peak,
                "swap": traced(_both(made[0])).peak if isinstance(made[0], Swapping) else None,
            }


def allocator(effort: Effort) -> Iterator[Row]:
    """What the setting of malloc does: 64 MB that are taken, written to and given back."""
    times = alternate({"": lambda: torch.empty(1 << 24).fill_(1.0)}, effort)
    yield {"section": "allocator", "bytes": 1 << 26, "seconds": spread(times[""])}


def _whole(dtype: str) -> list[Candidate]:
    """Return the candidates that a user can have: not the engine alone."""
    mine = [mine for mine in ours.candidates(DTYPES[dtype]) if mine.family == "ours"]
    return mine + peers.candidates()[0]


def _settled(candidate: Candidate, model: Weights) -> Contender:
    """Return a contender that has made whatever it makes ready."""
    contender = candidate.make(model)
    for _ in range(3):
        contender.update()
    return contender


def _before(name: str) -> None:
    """Let the threads be as an update finds them.

    That is after a parallel operation of torch, such as the step of an optimizer, whose threads are
    still awake. The limit is what the machine can do: its second core is its own.
    """
    if name in (LIMIT, TRIAD):
        settle()
    else:
        torch.ones(1 << 16).mul_(2.0)


def _both(contender: Swapping) -> Callable[[], object]:
    def both() -> None:
        contender.enter()
        contender.leave()

    return both
