"""What is public, and who may import whom: changing either is a decision that shows here."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import polyak
from polyak import decay

SOURCE = Path(polyak.__file__).parent

# module -> the polyak modules that it may import. Arrows point one way.
ARROWS = {
    "decay": set(),
    "profile": {"decay"},
    "selection": {"engine"},
    "engine": {
        *("engine.cpu", "engine.cuda", "engine.flag", "engine.foreach", "engine.host"),
        *("engine.shards", "engine.watch"),
    },
    "engine.cuda": {"engine.foreach", "engine.triton_lerp"},
    "engine.triton_lerp": set(),
    "engine.cpu": {"engine.foreach"},
    "engine.host": {"engine.cpu", "engine.foreach"},
    "engine.foreach": set(),
    "engine.flag": set(),
    "engine.shards": set(),
    "engine.watch": {"engine.cpu", "engine.shards"},
    "engine.reference": set(),
    "swap": {"checks", "engine", "selection"},
    "callers": set(),
    "attach": {"callers"},
    "checks": {"engine", "selection"},
    "report": set(),
    "state": {"decay", "engine", "profile", "selection"},
    "batchnorm": set(),
    "files": set(),
    "together": {"engine", "files"},
    "runs": {"profile"},
    "checkpoint": {"checkpoint.content", "checkpoint.opening", "checkpoint.stored"},
    "checkpoint.archive": set(),
    "checkpoint.boxes": set(),
    "checkpoint.broken": set(),
    "checkpoint.content": {"checkpoint.broken", "checkpoint.stored"},
    "checkpoint.dcp": {
        *("checkpoint.boxes", "checkpoint.broken", "checkpoint.content", "checkpoint.metadata"),
        *("checkpoint.pieces", "checkpoint.stored", "files"),
    },
    "checkpoint.elements": {"checkpoint.broken"},
    "checkpoint.index": {
        *("checkpoint.broken", "checkpoint.content", "checkpoint.stored"),
        "checkpoint.strict_json",
    },
    "checkpoint.metadata": {"files"},
    "checkpoint.opening": {
        *("checkpoint.broken", "checkpoint.content", "checkpoint.dcp", "checkpoint.index"),
        *("checkpoint.safetensors", "checkpoint.saved", "files"),
    },
    "checkpoint.pieces": {
        *("checkpoint.archive", "checkpoint.broken", "checkpoint.elements", "checkpoint.stored"),
    },
    "checkpoint.safetensors": {
        *("checkpoint.broken", "checkpoint.content", "checkpoint.elements", "checkpoint.stored"),
        *("checkpoint.strict_json", "files"),
    },
    "checkpoint.saved": {
        *("checkpoint.archive", "checkpoint.broken", "checkpoint.content", "checkpoint.stored"),
    },
    "checkpoint.stored": set(),
    "checkpoint.strict_json": set(),
    "combine": {"checkpoint", "files", "selection"},
    "producers": {"checkpoint", "decay", "files", "selection"},
    "writers": {"checkpoint", "decay", "files", "producers", "selection"},
    "formats": {"checkpoint", "decay", "files", "producers", "selection", "writers"},
    "examine": {"checkpoint", "files", "formats", "state"},
    "posthoc": {
        *("posthoc.curve", "posthoc.horizon", "posthoc.reconstruction", "posthoc.solution"),
        "posthoc.stored",
    },
    "posthoc.curve": {"decay"},
    "posthoc.fit": {"profile"},
    "posthoc.stored": {"checkpoint", "files", "profile", "selection"},
    "posthoc.solution": {"decay", "files", "posthoc.fit", "posthoc.stored", "profile"},
    "posthoc.reconstruction": {
        *("checkpoint", "combine", "decay", "files", "profile", "selection"),
        *("posthoc.fit", "posthoc.solution", "posthoc.stored"),
    },
    "posthoc.reach": {"decay", "posthoc.fit", "posthoc.solution", "posthoc.stored", "profile"},
    "posthoc.horizon": {
        *("decay", "files", "profile", "selection", "posthoc.curve", "posthoc.fit"),
        *("posthoc.reach", "posthoc.reconstruction", "posthoc.solution", "posthoc.stored"),
    },
    "snapshots": {
        *("background", "checks", "decay", "ema", "engine", "files", "posthoc.fit", "profile"),
        "selection",
    },
    "background": {"engine", "files"},
    "plot": {
        *("decay", "files", "posthoc", "posthoc.fit", "posthoc.solution", "posthoc.stored"),
        "profile",
    },
    "cli": {
        *("cli.averaging", "cli.converting", "cli.inspecting", "cli.plotting"),
        *("cli.program", "cli.reconstructing"),
    },
    "cli.told": set(),
    "cli.program": {"cli.told"},
    "cli.asked": {"checkpoint", "formats"},
    "cli.averages": {"cli.asked", "cli.told", "decay", "examine", "profile"},
    "cli.averaging": {
        *("checkpoint", "cli.asked", "cli.program", "cli.told"),
        *("combine", "files", "selection"),
    },
    "cli.inspecting": {"cli.asked", "cli.program", "cli.told", "examine"},
    "cli.converting": {"cli.asked", "cli.told", "formats"},
    "cli.reconstructing": {
        *("cli.asked", "cli.averages", "cli.program", "cli.told"),
        *("decay", "files", "posthoc"),
    },
    "cli.plotting": {"cli.asked", "cli.averages", "cli.told", "decay", "plot", "posthoc"},
    "__main__": {"cli"},
    "ema": {
        *("attach", "batchnorm", "callers", "checks", "decay", "engine", "files"),
        *("profile", "report", "runs", "selection", "state", "swap", "together"),
    },
    "": {"decay", "ema", "formats", "selection"},
}

# What the package may import from outside the standard library, and what one module may besides.
OUTSIDE = {"torch", "safetensors"}
BESIDES = {
    **{module: {"typer"} for module in ARROWS if module.startswith("cli")},
    "cli.told": {"rich", "typer"},
    "cli.plotting": {"matplotlib", "typer"},  # matplotlib for its types alone
    "plot": {"matplotlib"},
    "engine.triton_lerp": {"triton"},
}

SURFACE = {
    "EMA": "(model: 'nn.Module', decay: 'DecayLike | float | None' = None, *, "
    "policy: 'Policy | None' = None, into: 'nn.Module | None' = None, "
    "dtype: 'torch.dtype | None' = None, device: 'torch.device | str | None' = None) -> 'None'",
    "EMA.applied": "(self) -> 'Iterator[Mapping[str, Tensor]]'",
    "EMA.attach": "(self, optimizer: 'torch.optim.Optimizer', *, every: 'int' = 1, "
    "tick: 'int' = 1) -> 'Attachment'",
    "EMA.averages": "property",
    "EMA.clock": "property",
    "EMA.contents": "(self, *, dtype: 'torch.dtype | None' = None, "
    "averages_only: 'bool' = False) -> 'tuple[dict[str, files.Lazy], dict[str, Any]]'",
    "EMA.copy_to": "(self, module: 'nn.Module') -> 'None'",
    "EMA.decay": "property",
    "EMA.history": "property",
    "EMA.load_state_dict": "(self, state: 'Mapping[str, Any]') -> 'None'",
    "EMA.model_state_dict": "(self, part: 'str' = '') -> 'dict[str, Any]'",
    "EMA.reestimate_statistics": "(self, batches: 'Iterable[Any]', "
    "limit: 'int | None' = None) -> 'None'",
    "EMA.report": "(self, group: 'ProcessGroup | None' = None) -> 'Report'",
    "EMA.reset": "(self) -> 'None'",
    "EMA.save": "(self, path: 'str | os.PathLike[str]', *, part: 'str' = '', "
    "dtype: 'torch.dtype | None' = None, averages_only: 'bool' = False, "
    "shard_bytes: 'int | None' = None) -> 'None'",
    "EMA.start_from": "(self, averages: 'Mapping[str, Tensor]', clock: 'int') -> 'None'",
    "EMA.state_dict": "(self) -> 'dict[str, Any]'",
    "EMA.update": "(self, t: 'int | None' = None) -> 'None'",
    "After": "(start: 'int', inner: 'float | DecayLike') -> 'None'",
    "Constant": "(decay: 'float') -> None",
    "Cosine": "(start: 'float', end: 'float', steps: 'int') -> None",
    "Debiased": "(inner: 'float | Constant | HalfLife') -> 'None'",
    "HalfLife": "(half_life: 'float') -> None",
    "Linear": "(start: 'float', end: 'float', steps: 'int') -> None",
    "Only": "(*parts: 'str', policy: 'Policy' = <function everything>) -> 'None'",
    "PowerLaw": "(std: 'float') -> None",
    "Uniform": "() -> None",
    "load_averages": "(path: 'StrPath', model: 'nn.Module | None' = None, *, "
    "which: 'str | None' = None, at: 'str' = '', part: 'str' = '') -> 'Averages'",
    "everything": "(name: 'str', tensor: 'Tensor', module: 'nn.Module') -> 'Verdict'",
    "parameters": "(name: 'str', tensor: 'Tensor', module: 'nn.Module') -> 'Verdict'",
    "trainable": "(name: 'str', tensor: 'Tensor', module: 'nn.Module') -> 'Verdict'",
    "update_": "(teacher: 'nn.Module', student: 'nn.Module', "
    "decay: 'Constant | float' = 0.5) -> 'None'",
}


def signature(value: Callable[..., object]) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(inspect.signature(value)))


def surface() -> dict[str, str]:
    found = {}
    for name in polyak.__all__:
        value = getattr(polyak, name)
        found[name] = signature(value)
        if value is polyak.EMA:
            for key, member in vars(value).items():
                if isinstance(member, property):
                    found[f"{name}.{key}"] = "property"
                elif inspect.isfunction(member) and not key.startswith("_"):
                    found[f"{name}.{key}"] = signature(member)
    return found


def modules() -> dict[str, Path]:
    paths = {p: p.relative_to(SOURCE).with_suffix("") for p in SOURCE.rglob("*.py")}
    return {".".join(r.parts).removesuffix("__init__").strip("."): p for p, r in paths.items()}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """The polyak modules and the outside packages that a file imports, wherever in it."""
    inside, outside = set(), set()
    known = modules()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "polyak":
                inside.add(rest if rest in known else rest.rpartition(".")[0])
            elif package not in sys.stdlib_module_names:
                outside.add(package)
    return inside, outside


def test_the_public_surface_is_what_was_decided() -> None:
    assert surface() == SURFACE


def test_the_public_values_of_decay_are_what_was_decided() -> None:
    assert set(decay.__all__) == {
        *("After", "Constant", "Cosine", "Debiased", "Decay", "DecayLike", "ExponentialRamp"),
        *("HalfLife", "InverseGamma", "Linear", "PowerLaw", "Ramp", "Uniform"),
        *("as_decay", "from_spec", "to_spec"),
    }


def test_every_module_is_on_the_map() -> None:
    assert set(modules()) == set(ARROWS)


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_arrows_point_one_way(module: str) -> None:
    inside, outside = imports(modules()[module])
    assert inside <= ARROWS[module]
    assert outside <= OUTSIDE | BESIDES.get(module, set())


def test_the_arrow_test_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("def f():\n    from polyak import ema\n    import numpy.linalg\n")
    assert imports(path) == ({"ema"}, {"numpy"})


def new_modules(code: str) -> set[str]:
    """What a fresh process has imported besides torch and safetensors once it has run this."""
    program = (
        "import sys, torch, safetensors; before = set(sys.modules)\n"
        f"{code}\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_polyak_brings_torch_and_safetensors_and_nothing_else() -> None:
    """Not even a part of torch that is slow to import, whatever name of polyak is used."""
    new = new_modules("import polyak; [getattr(polyak, name) for name in polyak.__all__]")
    assert "polyak.ema" in new
    packages = {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)
    # The extension module of safetensors is loaded under its own name.
    assert packages <= {"polyak", "safetensors", "safetensors_rust", "torch"}
    assert not new & {"torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"}


def test_the_name_alone_brings_nothing() -> None:
    """So that a command line that only tells of itself comes at once."""
    code = "import sys, polyak; print(sorted({'torch', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_found_and_others_are_not() -> None:
    """Of the package and of its rooms; `dir` tells of them."""
    assert set(polyak.__all__) <= set(dir(polyak))
    assert polyak.files.__name__ == "polyak.files"
    assert polyak.EMA is polyak.ema.EMA
    with pytest.raises(AttributeError, match="module 'polyak' has no attribute 'nothing'"):
        _ = polyak.nothing  # type: ignore[attr-defined]
