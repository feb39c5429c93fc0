"""batchnorm.py: the statistics of all batches as if they were one; the model is as it was."""

import itertools
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

from polyak.batchnorm import Statistics, _merged, _Moments, reestimate


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.BatchNorm1d(5, affine=False),
    )


def snapshot(model: nn.Module) -> list[Any]:
    """Everything that must be as it was: objects, their versions, bits, modes, momenta, hooks."""
    return [
        (
            name,
            module.training,
            getattr(module, "momentum", None),
            [
                (key, None if tensor is None else (id(tensor), tensor._version, tensor.tolist()))
                for key, tensor in [*module._buffers.items(), *module._parameters.items()]
            ],
            [list(hooks) for key, hooks in vars(module).items() if "hooks" in key and hooks],
            sorted(vars(module)),
        )
        for name, module in model.named_modules()
    ]


def pooled(x: Tensor) -> Statistics:
    """The definition, in float64, over all dimensions but the second."""
    var, mean = torch.var_mean(x.double(), [d for d in range(x.dim()) if d != 1])
    return Statistics(mean, var)


def assert_pooled(found: Statistics, x: Tensor, unit: float) -> None:
    """Within the rounding of any order of summation: n u max|x| for a mean of n values.

    The variance sums squares of deviations of up to 2 max|x|, each with the error of the mean.
    """
    n, largest = x.numel() // x.shape[1], x.abs().max().item()
    wanted = pooled(x)
    assert_close(found.mean.double(), wanted.mean, rtol=0, atol=n * unit * largest)
    assert_close(found.var.double(), wanted.var, rtol=0, atol=4 * n * unit * largest**2)


# The statistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [[20], [8, 8, 4], [2, 3, 15], [2] * 10], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(3), ()),
        (nn.BatchNorm1d(3, affine=False), (7,)),
        (nn.BatchNorm2d(3, momentum=None), (4, 5)),
        (nn.BatchNorm3d(3), (2, 3, 4)),
        (nn.SyncBatchNorm(3), (4, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_batches_are_pooled_as_if_they_were_one(
    layer: nn.Module, shape: tuple[int, ...], sizes: list[int], dtype: torch.dtype
) -> None:
    layer = layer.to(dtype)
    x = values(20, 3, *shape, dtype=dtype)
    found = reestimate(layer, x.split(sizes))
    assert list(found) == [layer]
    assert found[layer].mean.dtype == found[layer].var.dtype == dtype
    assert_pooled(found[layer], x, torch.finfo(dtype).eps / 2)


def test_pooling_check_tells_sizes_from_no_sizes() -> None:
    x = values(20, 3, dtype=torch.float64)
    parts = [pooled(part) for part in x.split([18, 2])]
    unweighted = Statistics(*(torch.stack(s).mean(0) for s in zip(*parts, strict=True)))
    with pytest.raises(AssertionError):
        assert_pooled(unweighted, x, 2**-24)


def test_statistics_are_what_batchnorm_stores_for_the_same_data() -> None:
    layer, x = nn.BatchNorm2d(3, momentum=1.0), values(6, 3, 4, 4)
    found = reestimate(layer, [x])[layer]
    layer(x)
    assert torch.equal(found.mean, layer.running_mean)
    # n - 1 times the variance, and back, is rounded twice in float64, then once to float32.
    assert_close(found.var, layer.running_var, rtol=2**-23, atol=0)


def test_mean_is_that_of_update_bn_for_equal_batches() -> None:
    model = network()
    model[3].p = 0.0  # which update_bn does not switch off
    batches = values(24, 2, 6, 6).split(8)
    found = reestimate(model, batches)
    update_bn(batches, model)
    # Two averages of three float32 means, each off by at most 3 u of the largest mean.
    for layer, statistics in found.items():
        tolerance = 6 * 2**-24 * statistics.mean.abs().max().item()
        assert_close(statistics.mean, layer.running_mean, rtol=0, atol=tolerance)
    assert len(found) == 3


def test_many_batches_do_not_add_up_their_rounding() -> None:
    layer = nn.BatchNorm1d(1)
    x = 1000 + values(6000, 1)
    found = reestimate(layer, x.split(2))[layer]
    # Per batch: the sum of two values and its storage, u max|x| each. A float32 running sum of 3000
    # would be allowed 3000 times as much.
    assert abs(found.mean.item() - pooled(x).mean.item()) <= 2 * 2**-24 * 1010 + 2**-24 * 1010


def test_merging_is_accurate_far_from_zero() -> None:
    x = 1e8 + values(1000, dtype=torch.float64)
    moments = [
        _Moments(len(part), part.mean(), (part - part.mean()).square().sum())
        for part in x.split([1, 2, 500, 7, 490])
    ]
    for order in itertools.permutations(moments):
        merged = order[0]
        for other in order[1:]:
            merged = _merged(merged, other)
        assert merged.n == 1000
        # Each mean is stored to u |x|, an absolute 1.1e-8; deviations are of the order of 10.
        assert_close(merged.mean, x.mean(), rtol=0, atol=5 * 2**-53 * 1e8)
        squares = (x - x.mean()).square().sum()
        assert_close(merged.squares, squares, rtol=0, atol=1000 * 2 * 10 * 5 * 2**-53 * 1e8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_give_float32(dtype: torch.dtype) -> None:
    layer = nn.BatchNorm1d(3).to(dtype)
    x = values(60, 3, dtype=dtype)
    found = reestimate(layer, x.split(20))[layer]
    assert found.mean.dtype == found.var.dtype == torch.float32
    # The layer itself rounds the statistics of each batch, to half an ulp.
    unit = torch.finfo(dtype).eps / 2
    parts = [pooled(part) for part in x.split(20)]
    assert_close(found.mean.double(), pooled(x).mean, rtol=2 * unit, atol=0)
    largest = max(part.var.max().item() for part in parts)
    assert_close(found.var.double(), pooled(x).var, rtol=0, atol=4 * unit * largest)


def test_what_the_buffers_held_does_not_matter() -> None:
    layer, x = nn.BatchNorm1d(3), values(8, 3)
    wanted = reestimate(layer, [x])[layer]
    layer.running_mean.fill_(torch.nan)
    layer.running_var.fill_(torch.inf)
    found = reestimate(layer, [x])[layer]
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.var, wanted.var)


def test_other_buffers_of_a_layer_are_in_use() -> None:
    class Masked(nn.BatchNorm1d):
        def __init__(self) -> None:
            super().__init__(3)
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0]))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.mask)

    layer, x = Masked(), values(8, 3)
    before = snapshot(layer)
    assert_pooled(reestimate(layer, x.split(4))[layer], x * layer.mask, 2**-24)
    assert snapshot(layer) == before


def test_a_layer_that_is_called_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = self.again = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.norm(x), self.again(input=10 * x[:4])])

    model, x = Twice(), values(20, 3)
    found = reestimate(model, x.split(10))
    assert list(found) == [model.norm]
    seen = torch.cat([x, 10 * x[:4], 10 * x[10:14]])
    assert_pooled(found[model.norm], seen, 2**-24)


def test_an_empty_call_counts_for_nothing() -> None:
    layer, x = nn.BatchNorm1d(3), values(8, 3)
    assert_pooled(reestimate(layer, [x[:4], x[:0], x[4:]])[layer], x, 2**-24)


def test_which_layers() -> None:
    class Some(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unreached = nn.BatchNorm1d(3)
            self.last = nn.BatchNorm1d(3)
            self.first = nn.BatchNorm1d(3).eval()  # frozen by the user
            self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
            self.other = nn.GroupNorm(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.other(self.untracked(self.first(x))))

    model, x = Some(), values(8, 3)
    before = snapshot(model)
    found = reestimate(model, [x])
    assert list(found) == [model.last, model.first]
    assert_pooled(found[model.first], x, 2**-24)
    assert snapshot(model) == before


def test_without_layers_no_batch_is_taken() -> None:
    def batches() -> Iterator[Tensor]:
        pytest.fail("a batch was taken")
        yield torch.ones(1)

    for model in (nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)):
        assert reestimate(model, batches()) == {}


def test_deeper_layers_see_normalized_batches_without_dropout() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9), nn.BatchNorm1d(3)).eval()
    model[0].running_mean.fill_(100.0)  # of the weights before they were averaged
    x = values(50, 3)
    statistics = reestimate(model, [x])[model[2]]
    normalized = (x - x.mean(0)) / (x.var(0, correction=0) + model[0].eps).sqrt()
    assert_close(statistics.mean, torch.zeros(3), rtol=0, atol=50 * 2**-24 * 4)
    assert_close(statistics.var, normalized.var(0), rtol=50 * 2**-22, atol=0)


# Batches


BATCHES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "parameter": nn.Parameter,
    "tuple": lambda x: (x, torch.zeros(len(x)), "label"),
    "list": lambda x: [x],
    "dict": lambda x: {"x": x, "scale": 1.0},
    "mapping": lambda x: UserDict({"x": x}),
}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.norm(x * scale)


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_each_kind(kind: str) -> None:
    model, x = Scaled(), values(20, 3)
    found = reestimate(model, (BATCHES[kind](part) for part in x.split(8)))
    assert_pooled(found[model.norm], x, 2**-24)


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ("text", "str"),
        (3, "int"),
        ((), "tuple"),
        ([[1.0, 2.0]], "list that begins with a list"),
        (({"x": torch.ones(2, 3)}, 1), "tuple that begins with a dict"),
    ],
)
def test_batches_of_another_kind(batch: object, kind: str) -> None:
    model = Scaled()
    before = snapshot(model)
    with pytest.raises(TypeError) as caught:
        reestimate(model, [batch])
    assert str(caught.value) == (
        f"a batch is a {kind}, and how to call the model with it is not clear. Make it a tensor x "
        "or a tuple (x, ...) for model(x), or a mapping for model(**batch): for instance "
        "(batch[0]['image'] for batch in batches)."
    )
    assert snapshot(model) == before


def test_batches_go_to_the_device_of_the_model() -> None:
    class Meta(Scaled):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            assert x.is_meta
            raise StopAsyncIteration

    for kind in BATCHES.values():
        with pytest.raises(StopAsyncIteration):
            reestimate(Meta().to("meta"), [kind(torch.ones(4, 3))])


def test_limit_takes_that_many_and_no_more() -> None:
    layer, x = nn.BatchNorm1d(3), values(40, 3)
    parts = iter(x.split(10))
    found = reestimate(layer, parts, limit=3)[layer]
    assert_pooled(found, x[:30], 2**-24)
    assert len(list(parts)) == 1
    assert_pooled(reestimate(layer, x.split(10), limit=100)[layer], x, 2**-24)


@pytest.mark.parametrize(
    ("limit", "error", "message"),
    [
        (0, ValueError, "limit counts batches, and is 0. Pass 1 or more, or None for all."),
        (-3, ValueError, "limit counts batches, and is -3. Pass 1 or more, or None for all."),
        (2.0, TypeError, "limit counts batches, and is 2.0. Pass an int, or None for all."),
        (True, TypeError, "limit counts batches, and is True. Pass an int, or None for all."),
    ],
)
def test_limits_that_are_none(limit: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        reestimate(nn.BatchNorm1d(3), [torch.ones(2, 3)], limit)
    assert str(caught.value) == message


def test_no_batches() -> None:
    with pytest.raises(
        ValueError, match=r"^batches is empty, .* a generator gives its batches only"
    ):
        reestimate(nn.BatchNorm1d(3), iter(()))


def test_one_tensor_is_not_batches() -> None:
    with pytest.raises(TypeError, match=r"is one tensor of shape \(8, 3\), .* Pass \[x\] if it is"):
        reestimate(nn.BatchNorm1d(3), torch.ones(8, 3))


# What cannot be estimated


def test_one_value_per_channel() -> None:
    model = network()
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"'7' gets one value per .* shape \(1, 5\)\), .*drop_last"
    ):
        reestimate(model, values(9, 2, 6, 6).split(4))
    assert snapshot(model) == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_statistics_that_are_not_finite(value: float) -> None:
    model = network()
    x = values(12, 2, 6, 6)
    x[7, 0] = value
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=r"^the statistics of '1'.* not finite from batch number 2 "
    ):
        reestimate(model, x.split(4))
    assert snapshot(model) == before


def test_all_layers_that_are_not_finite_are_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(
        ValueError, match=r"^the statistics of '0', '1' are not finite from .* 1 on"
    ):
        reestimate(model, [torch.full((4, 3), torch.nan)])
    with pytest.raises(ValueError, match=r"^the statistics of 'BatchNorm1d' are not finite"):
        reestimate(nn.BatchNorm1d(3), [torch.full((4, 3), torch.nan)])


# The model is as it was


def test_snapshot_helper_sees_changes() -> None:
    changes: list[Callable[[nn.Sequential], object]] = [
        lambda model: model[3].train(),
        lambda model: setattr(model[1], "momentum", 0.2),
        lambda model: model[1].running_mean.add_(0.0),
        lambda model: setattr(model[1], "running_var", model[1].running_var.clone()),
        lambda model: model[4][1].num_batches_tracked.add_(1),
        lambda model: model[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model[1], "extra", 1),
    ]
    for change in changes:
        model = network().eval()
        before = snapshot(model)
        assert snapshot(model) == before
        change(model)
        assert snapshot(model) != before


@pytest.mark.parametrize("mode", [True, False])
def test_the_model_is_as_it_was(mode: bool) -> None:
    model = network().train(mode)
    model[1].train(not mode)
    model(values(4, 2, 6, 6))  # buffers that are not the initial ones
    calls: list[bool] = []
    model[3].register_forward_hook(lambda module, *_: calls.append(module.training))
    before, rng = snapshot(model), torch.get_rng_state()
    found = reestimate(model, values(8, 2, 6, 6).split(4))
    assert calls == [False, False]
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), rng)
    assert not any(t.requires_grad for statistics in found.values() for t in statistics)
    model(values(4, 2, 6, 6))
    assert snapshot(model) != before  # and its own buffers are the ones in use again


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("where", ["batches", "forward"])
def test_the_model_is_as_it_was_after_an_exception(where: str, error: type[BaseException]) -> None:
    model = network()
    if where == "forward":
        model[6].register_forward_hook(lambda *_: fail())
    before = snapshot(model)

    def fail() -> None:
        assert snapshot(model) != before
        raise error

    def batches() -> Iterator[Tensor]:
        yield values(4, 2, 6, 6)
        fail()

    with pytest.raises(error):
        reestimate(model, batches())
    assert snapshot(model) == before


def test_train_and_eval_of_a_module_are_not_called() -> None:
    class Merging(nn.BatchNorm1d):
        def train(self, mode: bool = True) -> "Merging":
            pytest.fail("some modules merge their weights here")

    layer = Merging(3)
    assert_pooled(reestimate(layer, [values(8, 3)])[layer], values(8, 3), 2**-24)


def test_batches_may_need_gradients() -> None:
    def batches() -> Iterator[Tensor]:
        assert torch.is_grad_enabled()
        yield values(8, 3)

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model[1].register_forward_hook(
        lambda *_: pytest.fail("a graph") if torch.is_grad_enabled() else None
    )
    assert list(reestimate(model, batches())) == [model[1]]


@pytest.mark.parametrize("inside", [True, False], ids=["compile()", "torch.compile"])
def test_compiled_models_are_measured_and_not_recompiled(inside: bool) -> None:
    class Outer(nn.Module):  # compile() does nothing for a module of torch's own
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    torch._dynamo.reset()
    model, x = Outer(), values(12, 2, 6, 6)
    wanted = [*reestimate(model, x.split(4)).values()]
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled: nn.Module = model
    if inside:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)  # type: ignore[assignment]
    compiled.eval()
    with torch.no_grad():
        compiled(x[:4])
    assert len(graphs) == 1
    for _ in range(2):
        found = reestimate(compiled, x.split(4))
        assert list(found) == [model.inner[1], model.inner[4][1], model.inner[7]]
        for left, right in zip(found.values(), wanted, strict=True):
            assert torch.equal(left.mean, right.mean)
            assert torch.equal(left.var, right.var)
    with torch.no_grad():
        compiled(x[:4])
    assert len(graphs) == 1
