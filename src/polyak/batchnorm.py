"""STATISTICS: the mean and variance of what each BatchNorm layer gets, over given data.

This module may not know what an average is, and may not change the model it runs: weights, buffers,
modes, momenta and hooks are afterwards what they were, also after an exception.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

__all__ = [
    "Statistics",
    "reestimate",
]


class Statistics(NamedTuple):
    """What a layer normalizes with, per channel: shape `(num_features,)`, at least float32.

    Args:
        mean: for `running_mean`.
        var: for `running_var`; unbiased, as BatchNorm keeps it.
    """

    mean: Tensor
    var: Tensor


def reestimate(
    model: nn.Module, batches: Iterable[Any], limit: int | None = None
) -> dict[nn.Module, Statistics]:
    """Return the statistics of each layer's input, over all batches as if they were one.

    Over the n values x of a channel, mean = sum x / n and var = sum (x - mean)^2 / (n - 1). So a
    smaller last batch counts for less, and each call of a layer that is called repeatedly counts.

    The model runs in eval mode (no dropout), the layers themselves in train mode: what a layer sees
    depends on how those before it normalize. RNGs are not touched, except by the batches' own code.

    >>> import torch
    >>> from polyak.batchnorm import reestimate
    >>> layer = torch.nn.BatchNorm1d(1)
    >>> batches = [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [3.0], [3.0]])]
    >>> reestimate(layer, batches)[layer]
    Statistics(mean=tensor([3.]), var=tensor([3.5000]))

    Args:
        model: any module. A compiled one runs eagerly here.
        batches: each a tensor, for `model(x)`; a tuple or list that begins with one, for
            `model(x[0])`; or a mapping, for `model(**x)`. Their tensors are moved to the device of
            the model's first. Not consumed when the model has no layers to estimate for.
        limit: how many batches to take, at least 1. None takes all.

    Returns:
        The statistics by layer, in the order of `model.modules()`: each BatchNorm and SyncBatchNorm
        that tracks running statistics and that a batch reached. In the dtype of its buffers or
        float32, whichever is wider.

    Raises:
        TypeError: the batches, or one of them, or the limit are of another type.
        ValueError: the limit is less than 1, there are no batches, a layer gets one value per
            channel (a batch of one sample), or statistics are not finite.

    Source: Izmailov et al. 2018 (https://arxiv.org/abs/1803.05407), section 3.2; merged in float64
        after Chan, Golub and LeVeque 1979, equations 2.1.
    """
    if isinstance(batches, Tensor):
        raise TypeError(
            f"batches is one tensor of shape {tuple(batches.shape)}, and its rows would be taken "
            "for batches. Pass [x] if it is a batch."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int)):
        raise TypeError(f"limit counts batches, and is {limit!r}. Pass an int, or None for all.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit counts batches, and is {limit}. Pass 1 or more, or None for all.")
    layers = {
        module: name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
    }
    if not layers:
        return {}
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    number = 0
    with _measuring(model, layers) as moments:
        for number, batch in enumerate(itertools.islice(batches, limit), 1):
            args, kwargs = _arguments(batch, device)
            with torch.no_grad():
                model(*args, **kwargs)
            _check_finite(moments, layers, number)
    if not number:
        raise ValueError(
            "batches is empty, and statistics of nothing are unknown. Pass at least one batch; a "
            "generator gives its batches only once, so make a new one."
        )
    return {layer: _statistics(layer, moments[layer]) for layer in layers if layer in moments}


_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


class _Moments(NamedTuple):
    """Of the values per channel so far: their number, mean, and summed squares around the mean."""

    n: int
    mean: Tensor
    squares: Tensor


def _merged(a: _Moments, b: _Moments) -> _Moments:
    n = a.n + b.n
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.n / n)
    squares = a.squares + b.squares + delta**2 * (a.n * b.n / n)
    return _Moments(n, mean, squares)


def _statistics(layer: _BatchNorm, moments: _Moments) -> Statistics:
    own = cast("Tensor", layer.running_mean)
    dtype = torch.promote_types(own.dtype, torch.float32)
    var = moments.squares / (moments.n - 1)
    return Statistics(moments.mean.to(own.device, dtype), var.to(own.device, dtype))


@contextmanager
def _measuring(
    model: nn.Module, layers: Mapping[_BatchNorm, str]
) -> Iterator[dict[nn.Module, _Moments]]:
    """Yield moments, to which forwards of the model add while the block is open.

    For that time the layers have momentum 1 and other buffers, which after a forward hold the
    statistics of that forward alone: those that the layer itself, synchronized or not, computes.
    The model's own buffers are never written, so that there is nothing to copy back.
    """
    moments: dict[nn.Module, _Moments] = {}

    def check(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        if x.numel() == layer.num_features:
            raise ValueError(
                f"the layer {layers[layer]!r} gets one value per channel (its input has shape "
                f"{tuple(x.shape)}), which has no variance. Pass batches of 2 samples or more, and "
                "leave out a last one of a single sample: DataLoader(..., drop_last=True)."
            )

    def add(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
        n = _input(args, kwargs).numel() // layer.num_features
        if n:
            new = _Moments(n, _taken(layer.running_mean), _taken(layer.running_var) * (n - 1))
            moments[layer] = _merged(moments[layer], new) if layer in moments else new

    modes = [(module, module.training) for module in model.modules()]
    kept = [(layer, layer.momentum, {k: layer._buffers[k] for k in _RUNNING}) for layer in layers]
    hooks: list[RemovableHandle] = []
    try:
        for module, _ in modes:
            module.training = False  # not eval(), which some modules override to do more
        for layer, _, buffers in kept:
            layer.training = True
            layer.momentum = 1.0
            for key, buffer in buffers.items():
                setattr(layer, key, None if buffer is None else torch.zeros_like(buffer))
            hooks.append(layer.register_forward_pre_hook(check, with_kwargs=True))
            hooks.append(layer.register_forward_hook(add, with_kwargs=True))
        # Compiled code would be compiled anew for these modes, and keep these hooks for the next
        # time that it runs in them.
        with _eager():
            yield moments
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum, buffers in kept:
            layer.momentum = momentum
            for key, buffer in buffers.items():
                setattr(layer, key, buffer)
        for module, training in modes:
            module.training = training


def _eager() -> AbstractContextManager[object]:
    """Return a block without compiled code; the compiler, if nobody has it, is not imported."""
    compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def _taken(buffer: Tensor | None) -> Tensor:
    """Return a copy, as the next forward overwrites the buffer; float64 is not on every device."""
    return cast("Tensor", buffer).to("cpu", copy=True).double()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what a layer was called with, by position or by name."""
    first: Tensor = next(itertools.chain(args, kwargs.values()))
    return first


def _arguments(batch: object, device: torch.device) -> tuple[list[Tensor], dict[str, Any]]:
    """Return what to call the model with, by position and by name."""
    match batch:
        case Tensor():
            return [batch.to(device)], {}
        case [Tensor() as first, *_]:
            return [first.to(device)], {}
        case Mapping():
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            return [], moved
        case [first, *_]:
            kind = f"{type(batch).__name__} that begins with a {type(first).__name__}"
        case _:
            kind = type(batch).__name__
    raise TypeError(
        f"a batch is a {kind}, and how to call the model with it is not clear. Make it a tensor x "
        "or a tuple (x, ...) for model(x), or a mapping for model(**batch): for instance "
        "(batch[0]['image'] for batch in batches)."
    )


def _check_finite(
    moments: Mapping[nn.Module, _Moments], layers: Mapping[_BatchNorm, str], number: int
) -> None:
    faults = [
        name
        for layer, name in layers.items()
        if layer in moments and not (moments[layer].mean + moments[layer].squares).isfinite().all()
    ]
    if faults:
        raise ValueError(
            f"the statistics of {', '.join(map(repr, faults))} are not finite from batch number "
            f"{number} on (the first is 1). Look for NaN or infinite values in that batch and in "
            "the weights, or use a wider dtype; nothing was changed."
        )
