"""LoRA by the real `peft`: adapters are averaged, held, exported and resumed, and nothing else.

The models are small and random, of `transformers` and of plain torch; nothing is downloaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models import bit_identical, plain
from polyak import EMA, PowerLaw

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

WORDS = 31

# ------------------------------------------------------------------------------------- models


def gpt2() -> nn.Module:
    """Embeddings tied to the head, and a layer whose weight is transposed."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": WORDS, "n_positions": 16, "n_embd": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(**sizes, **ends, n_layer=2, n_head=2, loss_type="ForCausalLM")
    return GPT2LMHeadModel(config)


def llama(*, tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def narrow() -> nn.Module:
    """A bfloat16 base: peft keeps adapters in float32, and whole modules in the base's dtype."""
    return llama().bfloat16()


def tied() -> nn.Module:
    return llama(tied=True)


Kind = tuple[Callable[[], nn.Module], dict[str, Any]]
LANGUAGE = {"task_type": "CAUSAL_LM", "r": 2, "lora_dropout": 0.1}
KINDS: dict[str, Kind] = {
    "transposed": (gpt2, LANGUAGE | {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "embedding": (gpt2, LANGUAGE | {"target_modules": ["wte"], "fan_in_fan_out": True}),
    "several": (llama, LANGUAGE | {"target_modules": ["q_proj", "v_proj"]}),
    "magnitudes": (llama, LANGUAGE | {"target_modules": ["q_proj"], "use_dora": True}),
    "a whole module": (
        llama,
        LANGUAGE | {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "a whole tied module": (
        tied,
        LANGUAGE
        | {
            "target_modules": ["q_proj"],
            "modules_to_save": ["lm_head"],
            "ensure_weight_tying": True,
        },
    ),
    "a narrow base": (
        narrow,
        LANGUAGE | {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ),
    "plain torch": (plain, {"target_modules": ["hidden"], "modules_to_save": ["head"], "r": 2}),
}


def adapted(kind: Kind, seed: int = 1) -> PeftModel:
    """Return a model with fresh adapters, on the same base for all seeds."""
    build, config = kind
    base = build()
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(**config))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def output(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if any(isinstance(module, nn.Embedding) for module in model.modules()):
        return model(input_ids=torch.randint(0, WORDS, (3, 8), generator=generator)).logits
    return model(torch.randn(3, 8, generator=generator))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(4)
) -> Iterator[int]:
    for number in steps:
        model.train()
        (output(model, number).float() - 1.0).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        yield number


def predict(model: nn.Module) -> Tensor:
    """Return what a model says in eval mode; its mode stays."""
    training = model.training
    model.eval()
    with torch.no_grad():
        said = output(model, 99)
    model.train(training)
    return said


def run(kind: Kind, **options: Any) -> tuple[PeftModel, torch.optim.Optimizer, EMA]:
    """Return a model after a few steps, its optimizer, and the attached average."""
    model = adapted(kind)
    optimizer = optimizer_of(model)
    ema = EMA(model, 0.5, **options)
    ema.attach(optimizer)
    for _ in train(model, optimizer):
        pass
    return model, optimizer, ema


def parameters(model: nn.Module, *, trained: bool | None = None) -> dict[str, Tensor]:
    return {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if trained is None or p.requires_grad == trained
    }


@pytest.fixture(params=KINDS, name="kind")
def _kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


# ------------------------------------------------------------------------- what is averaged


def test_the_adapters_and_nothing_else(kind: Kind) -> None:
    """What peft trains is averaged in float32; of the frozen base nothing is copied or held."""
    model, _, ema = run(kind)
    trained = parameters(model, trained=True)
    assert set(ema.averages) == set(trained)
    assert ema.report().bytes == sum(4 * tensor.numel() for tensor in trained.values())
    frozen = {name: p for name, p in model.named_parameters() if name not in trained}
    assert frozen
    with ema.applied() as aside:
        assert all(aside[name].data_ptr() == p.data_ptr() for name, p in frozen.items())
    assert set(ema.state_dict()["averages"]) == set(trained)


def test_they_are_averages_of_what_was_trained(kind: Kind) -> None:
    """Against a float64 average of the adapters after each step."""
    model = adapted(kind)
    optimizer = optimizer_of(model)
    ema = EMA(model, 0.5)
    ema.attach(optimizer)
    expected: dict[str, Tensor] = {}
    largest = 0.0
    for _ in train(model, optimizer):
        now = {name: p.double() for name, p in parameters(model, trained=True).items()}
        expected = {n: (expected[n] + now[n]) / 2 if expected else now[n] for n in now}
        largest = max([largest, *(float(p.abs().max()) for p in now.values())])
    # A step in float32 rounds three times, by 2**-24 of the largest value at most each; at decay
    # .5 all steps together round twice as much.
    bound = 6 * 2**-24 * largest
    for name, average in ema.averages.items():
        assert float((average.double() - expected[name]).abs().max()) <= bound, name


def test_training_is_as_it_would_be_without(kind: Kind, tmp_path: Path) -> None:
    """Validated and exported at every step, a run ends at the same bits, dropout included."""
    ends = []
    for averaged in (False, True):
        model = adapted(kind)
        optimizer = optimizer_of(model)
        ema = EMA(model, 0.5)
        if averaged:
            ema.attach(optimizer)
        torch.manual_seed(5)
        for _ in train(model, optimizer):
            if averaged:
                with ema.applied():
                    predict(model)
                    model.save_pretrained(tmp_path)
        state = optimizer.state_dict()["state"]
        ends.append([parameters(model), list(state.values()), torch.get_rng_state()])
    assert bit_identical(*ends)


# ------------------------------------------------------------------------------ what is exported


def test_an_adapter_that_peft_writes_inside(kind: Kind, tmp_path: Path) -> None:
    """It is that of the averages: on the base that peft loads it into it predicts the same bits."""
    model, _, ema = run(kind)
    before, trained = parameters(model), predict(model)
    with ema.applied():
        wanted = predict(model)
        model.save_pretrained(tmp_path)
    assert not torch.equal(wanted, trained)
    assert bit_identical(parameters(model), before)
    loaded = PeftModel.from_pretrained(kind[0](), tmp_path)
    assert bit_identical(predict(loaded), wanted)


def test_the_file_of_averages_loads_into_a_peft_model(kind: Kind, tmp_path: Path) -> None:
    """`save(averages_only=True)` and `load_state_dict(strict=False)`: no name is left over."""
    model, _, ema = run(kind)
    path = tmp_path / "adapter.safetensors"
    ema.save(path, averages_only=True)
    tensors = load_file(path)
    other = adapted(kind, seed=2)
    named = other.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    assert set(tensors) == trained  # a tied tensor under each of its names
    with ema.applied():
        wanted = predict(model)
    assert not torch.equal(predict(other), wanted)
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert unexpected == []
    assert not set(missing) & trained
    assert bit_identical(predict(other), wanted)


def test_peft_picks_the_adapter_from_the_averaged_model(kind: Kind, tmp_path: Path) -> None:
    """`get_peft_model_state_dict` of `model_state_dict()` is the adapter of the averages."""
    model, _, ema = run(kind)
    with ema.applied():
        wanted = predict(model)
        model.save_pretrained(tmp_path)
    picked = get_peft_model_state_dict(model, state_dict=ema.model_state_dict())
    assert bit_identical(picked, load_file(tmp_path / "adapter_model.safetensors"))
    other = adapted(kind, seed=2)
    set_peft_model_state_dict(other, picked)
    assert bit_identical(predict(other), wanted)


def test_merged_into_a_copy(kind: Kind, tmp_path: Path) -> None:
    """The averages as a model without adapters: what peft merges after loading them itself."""
    model, _, ema = run(kind)
    before = parameters(model)
    averaged = copy.deepcopy(model)
    ema.copy_to(averaged)
    merged = averaged.merge_and_unload()
    with ema.applied():
        model.save_pretrained(tmp_path)
    wanted = PeftModel.from_pretrained(kind[0](), tmp_path).merge_and_unload()
    assert bit_identical(predict(merged), predict(wanted))
    assert bit_identical(parameters(model), before)


# ------------------------------------------------------------------------------- what is resumed


def test_a_run_goes_on_where_it_stopped(kind: Kind, tmp_path: Path) -> None:
    """The adapter by peft, the rest by torch; going on is not stopping, bit for bit."""

    def start(seed: int) -> tuple[PeftModel, torch.optim.Optimizer, EMA]:
        model = adapted(kind, seed)
        optimizer = optimizer_of(model)
        ema = EMA(model, PowerLaw(0.10))
        ema.attach(optimizer)
        return model, optimizer, ema

    model, optimizer, ema = start(1)
    for number in train(model, optimizer, range(8)):
        if number == 3:
            checkpoint = {"optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            checkpoint |= {"adapter": get_peft_model_state_dict(model)}
            checkpoint |= {"random": torch.get_rng_state()}
            torch.save(checkpoint, tmp_path / "checkpoint.pt")
    again, optimizer, resumed = start(2)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    set_peft_model_state_dict(again, checkpoint["adapter"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    resumed.load_state_dict(checkpoint["ema"])
    torch.set_rng_state(checkpoint["random"])
    for _ in train(again, optimizer, range(4, 8)):
        pass
    assert bit_identical(parameters(again), parameters(model))
    assert bit_identical(dict(resumed.averages), dict(ema.averages))
    assert resumed.clock == ema.clock == 8


# ------------------------------------------------------------------- what peft does to a model

TWO: Kind = (llama, LANGUAGE | {"target_modules": ["q_proj"]})


def with_a_second(model: PeftModel) -> PeftModel:
    torch.manual_seed(2)
    model.add_adapter("two", LoraConfig(**TWO[1]))
    return model


def test_disabled_adapters(kind: Kind) -> None:
    """Inside the block too they can be switched off, and the base is what it always was."""
    model, optimizer, ema = run(kind)
    before, base = parameters(model), predict(kind[0]())
    with ema.applied():
        inside = predict(model)
        with model.disable_adapter():
            assert bit_identical(predict(model), base)
        assert bit_identical(predict(model), inside)
    with model.disable_adapter():  # which freezes them
        averages = copy.deepcopy(dict(ema.averages))
        with ema.applied():
            pass
        assert bit_identical(dict(ema.averages), averages)
    assert bit_identical(parameters(model), before)
    for _ in train(model, optimizer, range(4, 6)):
        pass
    assert ema.clock == 6


def test_disabled_at_the_first_update() -> None:
    """Then nothing is trained, and that is said."""
    model = adapted(TWO)
    ema = EMA(model, 0.5)
    with model.disable_adapter(), pytest.raises(ValueError, match="nothing to average"):
        ema.update()


def test_a_second_adapter_that_is_not_trained() -> None:
    """Added later, it is frozen until peft activates it: it follows the model."""
    model, optimizer, ema = run(TWO)
    names = set(ema.averages)
    with_a_second(model)
    for _ in train(model, optimizer, range(4, 6)):
        pass
    assert set(ema.averages) == names
    assert ema.clock == 6


USES: dict[str, Callable[[EMA], object]] = {
    "update": lambda ema: ema.update(99),
    "applied": lambda ema: ema.applied().__enter__(),
    "state_dict": EMA.state_dict,
    "model_state_dict": EMA.model_state_dict,
    "report": EMA.report,
    "save": lambda ema: ema.save("never.safetensors"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_second_adapter_that_is_trained(use: Callable[[EMA], object]) -> None:
    """An average of the first is none of the second: refused by name, by everything."""
    model, _, ema = run(TWO)
    with_a_second(model).set_adapter("two")
    averages = copy.deepcopy(dict(ema._averages))
    text = r"q_proj\.lora_A\.two\.weight: new, or newly trainable"
    with pytest.raises(ValueError, match=text):
        use(ema)
    model.set_adapter("default")  # back to the one that is averaged, and all is well
    assert bit_identical(dict(ema.averages), averages)
    assert ema.clock == 4
    ema.update(99)


def test_an_optimizer_of_the_second_adapter() -> None:
    """Attached before its first step, after that of the first has ended: refused at its step."""
    model, _, ema = run(TWO)
    with_a_second(model).set_adapter("two")
    optimizer = optimizer_of(model)
    for attachment in ema._attachments:
        attachment.remove()

    def attach_and_train() -> None:
        ema.attach(optimizer)
        next(train(model, optimizer))

    with pytest.raises(ValueError, match=r"lora_A\.two\.weight: new, or newly trainable"):
        attach_and_train()


def test_an_average_for_each_adapter() -> None:
    """With policies that go by name, which adapter is active at the moment does not matter."""

    def named(adapter: str) -> Callable[..., Any]:
        return lambda name, tensor, module: "average" if f".{adapter}." in name else "follow"

    model = with_a_second(adapted(TWO))
    emas = {adapter: EMA(model, 0.5, policy=named(adapter)) for adapter in ("default", "two")}
    ends = {}
    for adapter, ema in emas.items():
        model.set_adapter(adapter)
        optimizer = optimizer_of(model)
        handle = ema.attach(optimizer)
        for _ in train(model, optimizer):
            pass
        handle.remove()
        with ema.applied():
            ends[adapter] = predict(model)
    for adapter, ema in emas.items():
        assert ema.clock == 4
        assert {name.split(".")[-2] for name in ema.averages} == {adapter}
        model.set_adapter(adapter)
        with ema.applied():
            assert bit_identical(predict(model), ends[adapter])


def test_a_deleted_adapter() -> None:
    """Its averages have no tensor any more, and that is said."""
    model, _, ema = run(TWO)
    with_a_second(model).set_adapter("two")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight: no longer there"):
        ema.update(99)


# ------------------------------------------------------------------------------ what is merged


@pytest.mark.parametrize("safe", [False, True])
def test_merged_inside(safe: bool) -> None:
    """Averaged adapters in frozen weights would stay there: it is told, and what to do instead."""
    model, _, ema = run(TWO)
    trained = parameters(model, trained=True)
    with pytest.raises(RuntimeError, match=r"merged averaged adapters.*copy_to"), ema.applied():
        model.merge_adapter(safe_merge=safe)
    assert bit_identical(parameters(model, trained=True), trained)


def test_merged_and_unloaded_inside() -> None:
    """The same, and peft has taken the adapters out."""
    model, _, ema = run(TWO)
    names = list(parameters(model))
    with pytest.raises(RuntimeError, match=r"merged averaged adapters.*copy_to"), ema.applied():
        model.merge_and_unload()
    assert list(parameters(model)) == names


def test_merged_before() -> None:
    """Adapters that are merged are not computed with: the averages would not be seen."""
    model, _, ema = run(TWO)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"merged.*unmerge_adapter\(\)"), ema.applied():
        pass
    model.unmerge_adapter()
    with ema.applied():
        pass


class MergesInEval(nn.Linear):
    """As loralib's layers do: `eval()` adds the adapter to the frozen weight, `train()` removes it.

    Written after loralib 0.1.2, which is not installed here.
    """

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.weight.requires_grad_(False)
        self.adapter = nn.Parameter(torch.zeros(4, 4))
        self.merged = False

    def train(self, mode: bool = True) -> MergesInEval:
        if self.merged == mode:
            self.weight.data += self.adapter if not mode else -self.adapter
            self.merged = not mode
        return super().train(mode)


def test_merged_by_eval() -> None:
    """The usual `eval()` inside the block merges: it is told; before the block it is refused."""
    model = MergesInEval()
    ema = EMA(model, 0.5)
    for _ in range(3):
        with torch.no_grad():
            model.adapter.add_(1.0)
        ema.update()
    with (
        pytest.raises(RuntimeError, match=r"MergesInEval.* merged averaged adapters"),
        ema.applied(),
    ):
        model.eval()
    assert model.merged
    with pytest.raises(RuntimeError, match=r"loralib: model.train\(\), or merge_weights=False"):
        ema.applied().__enter__()
    model.train()
    with ema.applied():
        pass


def test_unloaded() -> None:
    """A model without its adapters is not the one that was averaged."""
    model, _, ema = run(TWO)
    model.merge_and_unload()
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight: no longer there"):
        ema.update(99)
