"""Small models for the tests, one for each thing that makes averaging hard, and comparisons.

Every builder takes a seed and gives the same weights for the same seed. Every model takes a float32
batch of shape (n, 8), whatever its own dtype, and returns (n, 3), so that `train` can train any of
them. Names that tests import: the builders, `MODELS` (name -> builder), `batch`, `train`,
`scramble_`, `walk_`, `reversed_`, `bit_identical` and `Snapshot`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------------------- models


class Convolutional(nn.Module):
    """A convolution, BatchNorm with running statistics and a counter, dropout, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv.weight.dtype).view(-1, 1, 2, 4)
        x = F.relu(self.norm(self.conv(x)))
        return self.head(self.drop(x.flatten(1)))


class Plain(nn.Module):
    """Two linear layers and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x.to(self.hidden.weight.dtype))))


class Tied(nn.Module):
    """One weight under two names, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(8, 8, bias=False)
        self.decoder = nn.Linear(8, 8, bias=False)
        self.decoder.weight = self.encoder.weight
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.decoder(torch.tanh(self.encoder(x)))
        return self.head(self.second(torch.tanh(self.first(x))))


class Spectral(nn.Module):
    """A spectral norm: a parametrized weight whose buffers change in every training forward."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(x)))


class Masked(nn.Module):
    """Buffers of every kind: a mask of -inf, booleans, a counter, a cache that is not saved."""

    mask: Tensor
    kept: Tensor
    seen: Tensor
    cache: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(8, 4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))
        self.register_buffer("kept", torch.tensor([True, False, True, True]))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shares = torch.softmax(self.scores(x) + self.mask, -1) * self.kept
        if self.training:
            self.seen += len(x)
            self.cache = shares.detach().mean(0).to(self.cache.dtype)  # assigned, not written
        return self.head(shares)


class Nested(nn.Module):
    """Children called `module`, which is what wrappers call theirs, and a parameter `module_`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Module()
        self.module.module = nn.Linear(8, 8)
        self.module_ = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.module.module(x) + self.module_))


class Frozen(nn.Module):
    """A frozen backbone and a trained head, as in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.backbone(x)))


class Complex(nn.Module):
    """A complex weight beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64) / 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x.to(self.spectrum.dtype) @ self.spectrum).abs())


class Odd(nn.Module):
    """Every layout: no dimension, no element, transposed, sliced, channels last; mixed dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(3, 8).t() / 3)
        self.sliced = nn.Parameter(torch.randn(8, 16)[:, 1:9:2] / 3)
        self.wide = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(3).to(torch.bfloat16))
        self.head = nn.Conv2d(4, 3, (1, 2)).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scale * x @ self.turned + self.wide.float() + self.narrow.float()
        image = (x @ self.sliced).view(-1, 4, 1, 1).expand(-1, -1, 1, 2)
        return y + self.head(image).flatten(1)


class Mixed(nn.Module):
    """A bfloat16 layer, a float16 one and a float32 head with a float32 BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.second = nn.Linear(8, 8, dtype=torch.float16)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.bfloat16()))
        x = torch.tanh(self.second(x.half()))
        return self.head(self.norm(x.float()))


def _built(kind: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind()


def convolutional(seed: int = 0) -> nn.Module:
    """Return a `Convolutional`."""
    return _built(Convolutional, seed)


def plain(seed: int = 0) -> nn.Module:
    """Return a `Plain`."""
    return _built(Plain, seed)


def tied(seed: int = 0) -> nn.Module:
    """Return a `Tied`."""
    return _built(Tied, seed)


def spectral(seed: int = 0) -> nn.Module:
    """Return a `Spectral`."""
    return _built(Spectral, seed)


def masked(seed: int = 0) -> nn.Module:
    """Return a `Masked`."""
    return _built(Masked, seed)


def nested(seed: int = 0) -> nn.Module:
    """Return a `Nested`."""
    return _built(Nested, seed)


def frozen(seed: int = 0) -> nn.Module:
    """Return a `Frozen`."""
    return _built(Frozen, seed)


def complexes(seed: int = 0) -> nn.Module:
    """Return a `Complex`."""
    return _built(Complex, seed)


def odd(seed: int = 0) -> nn.Module:
    """Return an `Odd`."""
    return _built(Odd, seed)


def mixed(seed: int = 0) -> nn.Module:
    """Return a `Mixed`."""
    return _built(Mixed, seed)


def bfloat16(seed: int = 0) -> nn.Module:
    """Return a `Convolutional` in bfloat16, statistics included."""
    return _built(Convolutional, seed).bfloat16()


def float16(seed: int = 0) -> nn.Module:
    """Return a `Plain` in float16."""
    return _built(Plain, seed).half()


def float64(seed: int = 0) -> nn.Module:
    """Return a `Convolutional` in float64."""
    return _built(Convolutional, seed).double()


MODELS: dict[str, Callable[[int], nn.Module]] = {
    build.__name__: build
    for build in (
        convolutional,
        plain,
        tied,
        spectral,
        masked,
        nested,
        frozen,
        complexes,
        odd,
        mixed,
        bfloat16,
        float16,
        float64,
    )
}

# ------------------------------------------------------------------------------------ training


def batch(seed: int = 0, n: int = 6) -> tuple[Tensor, Tensor]:
    """Return float32 inputs (n, 8) and integer labels (n,) in 0..2, without touching the RNG."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    return x, torch.randint(0, 3, (n,), generator=generator)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int]
) -> Iterator[int]:
    """Train on `batch(step)` for each step, in train mode; yield the step after each one."""
    for step in steps:
        x, y = batch(step)
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        yield step


def scramble_(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """Write random values into every parameter and floating buffer, in place.

    Buffers that must be positive (``running_var``) stay so; masks, booleans and counters are kept.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if name.endswith("mask"):
                continue
            wide = torch.complex128 if tensor.is_complex() else torch.float64
            noise = torch.randn(tensor.shape, dtype=wide, generator=generator) * scale
            tensor.copy_(noise.abs() if name.endswith("running_var") else noise)
    return model


def walk_(model: nn.Module, seed: int, scale: float = 0.1) -> nn.Module:
    """Add noise to every parameter, in place: one step of a random walk."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = torch.complex128 if parameter.is_complex() else torch.float64
            noise = torch.randn(parameter.shape, dtype=wide, generator=generator) * scale
            parameter.add_(noise.to(parameter.dtype))
    return model


def reversed_(model: nn.Module) -> nn.Module:
    """Let every module register its children, parameters and buffers in the opposite order."""
    for module in model.modules():
        for registry in (module._modules, module._parameters, module._buffers):
            items = list(registry.items())[::-1]
            registry.clear()
            registry.update(items)
    return model


# ---------------------------------------------------------------------------------- comparison


def bit_identical(a: object, b: object) -> bool:
    """Whether two values are the same to the bit: tensors, and mappings and sequences of them.

    Tensors agree in dtype, shape and every byte, so that NaN equals NaN and 0.0 does not equal
    -0.0. Mappings agree in their keys, in any order.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        a, b = a.detach(), b.detach()
        if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
            return False
        return torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(bit_identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(bit_identical, a, b))
    return type(a) is type(b) and a == b


def _bytes(tensor: Tensor) -> Tensor:
    dense = tensor.resolve_conj().clone(memory_format=torch.contiguous_format)
    return dense.view(-1).view(torch.uint8)


class Snapshot:
    """All that a module is at this moment: objects, storages, values, modes, gradients.

    `differences` says what has changed since, a line each; an empty list is the same module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._seen = self._look()

    def differences(self) -> list[str]:
        """Return the names of what is no longer as it was."""
        now = self._look()
        names = [*self._seen, *(name for name in now if name not in self._seen)]
        return [
            name
            for name in names
            if name not in now
            or name not in self._seen
            or not bit_identical(self._seen[name], now[name])
        ]

    def _look(self) -> dict[str, object]:
        look: dict[str, object] = {}
        module = self._module
        for name, child in module.named_modules(remove_duplicate=False):
            look[f"{name} (module)"] = (id(child), child.training)
        parameters = list(module.named_parameters(remove_duplicate=False))
        for name, tensor in [*parameters, *module.named_buffers(remove_duplicate=False)]:
            look[name] = tensor.detach().clone()
            layout = (id(tensor), tensor.data_ptr(), tensor.stride(), tensor.requires_grad)
            look[f"{name} (object)"] = layout
            look[f"{name} (gradient)"] = None if tensor.grad is None else tensor.grad.clone()
        look["order"] = tuple(module.state_dict())
        return look
