"""cli.py: what the commands say and write, what they refuse, and that nothing half done is left."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner, Result

from polyak import EMA, Debiased, HalfLife, PowerLaw, cli, files, formats, posthoc
from polyak.decay import Constant, Decay
from polyak.profile import History

COMMANDS = ("average", "inspect", "convert", "reconstruct", "plot")
DOCS = Path(__file__).parent.parent / "docs"


def run(*arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="polyak")
    assert done.exit_code == code, (done.output, done.exception)
    return done


def parsed(*arguments: object, code: int = 0) -> dict[str, Any]:
    done = run(*arguments, "--json", code=code)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def refused(*arguments: object, code: int = 2) -> str:
    """The error, which is the same in words and in JSON."""
    in_words = run(*arguments, code=code).stderr
    message = parsed(*arguments, code=code)["error"]
    assert in_words == f"polyak: {message}\n"
    return message


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.half": torch.randn(5, generator=generator).bfloat16(),
        "steps": torch.tensor(1000 * seed),
        "mask": torch.tensor([True, False, seed == 2]),
    }


def dcp_save(state: dict[str, Any], folder: Path) -> None:
    """Save as torch.distributed.checkpoint does, by one process, of which it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.fixture
def steps(tmp_path: Path) -> list[Path]:
    """Three checkpoints of a run, in three kinds of files."""
    paths = [
        tmp_path / f"step-{n}000.{kind}" for n, kind in enumerate(("safetensors", "pt", "ckpt"), 1)
    ]
    safetensors.torch.save_file(state(1), paths[0])
    torch.save(state(2), paths[1])
    torch.save({"state_dict": state(3), "epoch": 3}, paths[2])
    return paths


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def weighted(states: list[dict[str, Tensor]], coefficients: list[float], name: str) -> Tensor:
    exact = sum(c * s[name].double() for s, c in zip(states, coefficients, strict=True))
    assert isinstance(exact, Tensor)
    return exact


def close(average: Tensor, exact: Tensor) -> bool:
    """Accumulated in float32 or wider: a few roundings of that, and the one of what is stored."""
    unit = torch.finfo(average.dtype).eps
    scale = exact.abs().max()
    return bool(((average.double() - exact).abs() <= scale * (unit + 8 * 2**-24)).all())


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# polyak average


def test_close_can_fail() -> None:
    exact = torch.ones(2, dtype=torch.float64)
    assert close(torch.ones(2), exact)
    assert not close(torch.tensor([1.0, 1.00001]), exact)


RULES = [
    ([], [1 / 3, 1 / 3, 1 / 3]),
    (["--weights", "1,1,2"], [0.25, 0.25, 0.5]),
    (["--weights", "0,0,.5"], [0.0, 0.0, 1.0]),
    (["--ema", "0.75"], [0.5625, 0.1875, 0.25]),
    # Three files are k = 2 of the paper: w_i = 1 - i / 3, c = 1 - w_1, w_1 - w_2, w_2.
    (["--lr-decay", "linear"], [1 / 3, 1 / 3, 1 / 3]),
    (
        ["--lr-decay", "1-sqrt"],
        [(1 / 3) ** 0.5, (2 / 3) ** 0.5 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5],
    ),
]


@pytest.mark.parametrize(("options", "coefficients"), RULES)
def test_average_is_the_weighted_sum_and_integers_are_the_newest(
    steps: list[Path], out: Path, options: list[str], coefficients: list[float]
) -> None:
    answer = parsed("average", *steps, "-o", out, *options)
    assert answer["written"]
    assert [one["path"] for one in answer["files"]] == list(map(str, steps))
    found = [one["coefficient"] for one in answer["files"]]
    assert found == pytest.approx(coefficients, abs=1e-12)
    states = [state(1), state(2), state(3)]
    made = files.read(out)
    assert made.keys() == states[0].keys()
    for name in ("layer.weight", "layer.half"):
        assert made[name].dtype == states[0][name].dtype
        assert close(made[name], weighted(states, coefficients, name))
    for name in ("steps", "mask"):
        assert torch.equal(made[name], states[2][name])
    assert files.verify(out) == []


def test_average_can_be_stored_in_another_dtype(steps: list[Path], out: Path) -> None:
    answer = parsed("average", *steps, "-o", out, "--dtype", "float32")
    made = files.read(out)
    assert made["layer.half"].dtype == torch.float32
    assert made["steps"].dtype == torch.int64
    exact = weighted([state(1), state(2), state(3)], [1 / 3] * 3, "layer.half")
    assert close(made["layer.half"], exact)
    assert answer["write_bytes"] == sum(t.nbytes for t in made.values())


def test_dry_run_tells_what_the_run_does_and_writes_nothing(steps: list[Path], out: Path) -> None:
    before = names_in(out.parent)
    told = parsed("average", *steps, "-o", out, "--dry-run")
    assert names_in(out.parent) == before
    assert not told["written"]
    assert sorted(told["averaged"]) == ["layer.half", "layer.weight"]
    assert sorted(told["copied"]) == ["mask", "steps"]
    assert told["dropped"] == told["differences"] == []
    done = parsed("average", *steps, "-o", out)
    assert {**told, "written": True} == done
    assert told["write_bytes"] == sum(t.nbytes for t in files.read(out).values())
    words = run("average", *steps, "-o", out, "--dry-run", "--force").stdout
    assert re.search(r"^would write +\S+out\.safetensors$", words, re.M)
    assert re.search(r"0\.3333  \S+step-2000\.pt$", words, re.M)
    assert re.search(r"^copied +2: (mask, steps|steps, mask)$", words, re.M)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ema", "0.5", "--lr-decay", "linear"], "--ema and --lr-decay say .* Pass one of them"),
        (["--weights", "1,2"], "--weights 1,2 is not a number for each of the 3 files"),
        (["--weights", "1,2,x"], "--weights 1,2,x is not .* such as --weights 1,2,3"),
        (["--weights=-1,1,1"], "0 or more and not all 0"),
        (["--weights", "0,0,0"], "not all 0"),
        (["--weights", "1,1,inf"], "0 or more"),
        (["--ema", "1.5"], "1.5"),
        (["--shard-bytes", "5GX"], "5GX is no size .* 500MB, 5GB, 2GiB"),
        (["--shard-bytes", "0"], "no size of 1 byte or more"),
        (["--which", "averages"], "--which 'weights'"),
        (["--at", "model"], "has nothing at 'model'"),
        (["--copy-config"], "no config.json beside .* Leave it out"),
    ],
)
def test_average_refuses_and_says_what_to_type(
    steps: list[Path], out: Path, options: list[str], message: str
) -> None:
    before = names_in(out.parent)
    assert re.search(message, refused("average", *steps, "-o", out, *options), re.S)
    assert names_in(out.parent) == before


def test_usage_errors_are_told_as_the_others(steps: list[Path], out: Path) -> None:
    assert "Missing option" in run("average", steps[0], code=2).stderr
    assert "Missing option" in parsed("average", steps[0], code=2)["error"]
    assert "No such command" in parsed("averages", code=2)["error"]
    assert "No such option" in parsed("inspect", steps[0], "--verfy", code=2)["error"]
    assert "No such option: --bogus" in parsed("--bogus", code=2)["error"]
    assert "Usage: polyak" in run("--bogus", code=2).stderr
    assert "Usage: polyak" in run(code=2).output
    missing = refused("average", steps[0], out.with_name("none.pt"), "-o", out)
    assert re.search(r"there is no '\S+none.pt'", missing)


def test_differences_are_refused_dropped_or_kept(steps: list[Path], out: Path) -> None:
    odd = {**state(4), "layer.weight": torch.zeros(4, 3), "extra": torch.ones(2)}
    del odd["layer.half"]
    torch.save(odd, steps[1])
    message = refused("average", *steps, "-o", out, code=1)
    for name in ("layer.weight", "layer.half", "extra"):
        assert name in message
    assert "--unmatched drop" in message
    assert not out.exists()
    refused("average", *steps, "-o", out, "--dry-run", code=1)

    answer = parsed("average", *steps, "-o", out, "--unmatched", "drop")
    assert sorted(answer["dropped"]) == ["extra", "layer.half", "layer.weight"]
    assert files.read(out).keys() == {"steps", "mask"}

    parsed("average", *steps, "-o", out, "--unmatched", "keep", "--force")
    kept = files.read(out)
    assert torch.equal(kept["layer.weight"], state(3)["layer.weight"])
    assert torch.equal(kept["layer.half"], state(3)["layer.half"])


def test_nothing_is_overwritten_unasked(steps: list[Path], out: Path) -> None:
    out.write_bytes(b"mine")
    assert "--force to replace it" in refused("average", *steps, "-o", out)
    assert "--force" in refused("convert", steps[0], "-o", out, "--to", "timm")
    assert out.read_bytes() == b"mine"
    run("average", *steps, "-o", out, "--force")
    assert files.read(out).keys() == state(1).keys()

    link = out.with_name("link")
    link.symlink_to(steps[0])
    for path in (steps[0], link):
        whole = path.read_bytes()
        message = refused("average", *steps, "-o", path, "--force")
        assert "is one of the inputs" in message
        assert "one of the inputs" in refused(
            "convert", steps[0], "-o", path, "--to", "timm", "--force"
        )
        assert path.read_bytes() == whole

    folder = out.with_name("folder")
    folder.mkdir()
    assert "is a folder" in refused("average", *steps, "-o", folder)
    (folder / "note").touch()
    assert "there already" in refused(
        "average", *steps, "-o", folder, "--shard-bytes", "1MB", "--force"
    )
    assert "mkdir -p" in refused("average", *steps, "-o", out.parent / "no" / "out")


def test_of_averages_and_weights_one_is_chosen(tmp_path: Path, out: Path) -> None:
    paths = [tmp_path / f"{n}.pth.tar" for n in range(2)]
    for n, path in enumerate(paths):
        ours = {"w": torch.full((2,), float(n))}
        torch.save({"state_dict": ours, "state_dict_ema": {"w": ours["w"] + 10}}, path)
    message = refused("average", *paths, "-o", out)
    assert "0.pth.tar" in message
    assert "--which 'averages' or --which 'weights'" in message
    run("average", *paths, "-o", out, "--which", "averages")
    assert files.read(out)["w"].tolist() == [10.5, 10.5]
    assert "timm (torch)" in run("inspect", paths[0]).stdout
    assert refused("inspect", paths[0], "--against", paths[1])
    answer = parsed("inspect", paths[0], "--against", paths[1], "--which", "weights")
    assert answer["against"]["tensors"] == {"w": 1.0}


def test_what_has_no_names_is_refused(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "ema.pt"
    shadow = {
        "decay": 0.9,
        "num_updates": 3,
        "shadow_params": [torch.ones(2)],
        "collected_params": None,
    }
    torch.save(shadow, path)
    assert "without names" in refused("average", path, path, "-o", out)
    assert "model" in refused("convert", path, "-o", out, "--to", "safetensors")
    assert parsed("inspect", path)["sets"]["averages"]["tensors"] == 1


def test_tied_tensors_stay_equal(tmp_path: Path, out: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

    models = [Tied(), Tied()]
    paths = [tmp_path / f"{n}.pt" for n in range(2)]
    for model, path in zip(models, paths, strict=True):
        torch.save(model.state_dict(), path)
    run("average", *paths, "-o", out)
    made = files.read(out)
    assert torch.equal(made["embedding.weight"], made["head.weight"])
    exact = (models[0].head.weight.double() + models[1].head.weight.double()) / 2
    assert close(made["head.weight"], exact.detach())


def test_result_says_what_it_is(steps: list[Path], out: Path) -> None:
    run("average", *steps, "-o", out, "--weights", "1,1,2")
    facts = files.read_facts(out)["combined"]
    assert facts == {
        "rule": "weights",
        "sources": ["step-1000.safetensors", "step-2000.pt", "step-3000.ckpt"],
        "coefficients": [0.25, 0.25, 0.5],
    }
    assert parsed("inspect", out)["combined"] == facts
    assert str(out.parent) not in out.read_bytes().decode("latin1")
    words = run("inspect", out).stdout
    assert re.search(r"^producer +polyak \S+ \(safetensors\)$", words, re.M)
    assert re.search(r"^ +0\.5000  step-3000\.ckpt$", words, re.M)


def test_average_of_a_hugging_face_model_loads_with_from_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, n_positions=16, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(transformers.GPT2LMHeadModel(config))
        models[-1].save_pretrained(tmp_path / f"checkpoint-{seed}", max_shard_size="5kB")
        (tmp_path / f"checkpoint-{seed}" / "optimizer.pt").write_bytes(b"large")
        (tmp_path / f"checkpoint-{seed}" / "trainer_state.json").write_text("{}")
        (tmp_path / f"checkpoint-{seed}" / "tokenizer.json").write_text(str(seed))
    inputs = [tmp_path / "checkpoint-0", tmp_path / "checkpoint-1"]
    for name, options in (("one", []), ("many", ["--shard-bytes", "4kB"])):
        folder = tmp_path / name
        run("average", *inputs, "-o", folder, "--copy-config", *options)
        assert (folder / "tokenizer.json").read_text() == "1"
        assert not {"optimizer.pt", "trainer_state.json"} & names_in(folder)
        loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
        for key, tensor in loaded.state_dict().items():
            exact = sum(model.state_dict()[key].double() for model in models) / 2
            assert close(tensor, exact), key
    assert "model.safetensors" in names_in(tmp_path / "one")
    assert len([n for n in names_in(tmp_path / "many") if n.startswith("model-")]) > 2
    assert not [n for n in names_in(tmp_path) if n.startswith(".polyak")]
    assert parsed("inspect", tmp_path / "many", "--verify")["verified"]["damaged"] == {}


# polyak inspect


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file of EMA.save whose averages are well known."""
    path = tmp_path / "ema.safetensors"
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = EMA(model, Debiased(0.99))
    for step in range(1, 501):
        ema.update(step)
    ema.save(path)
    return path


def test_inspect_tells_what_a_file_of_polyak_is(saved: Path) -> None:
    answer = parsed("inspect", saved)
    assert answer["producer"].startswith("polyak ")
    assert answer["clock"] == 500
    # docs/profiles.md has these numbers of the same ticks.
    assert answer["horizon"]["mean_age"] == pytest.approx(95.693, abs=1e-3)
    assert answer["horizon"]["effective_samples"] == pytest.approx(196.4, abs=0.1)
    held = answer["sets"]["averages"]
    assert held["tensors"] == answer["tensors"] == 7
    assert held["bytes"] == answer["bytes"] == (6 + 2 + 2 + 2 + 2 + 2) * 4 + 8
    assert answer["averaged"] == 6
    words = run("inspect", saved).stdout
    assert re.search(r"^decay +Debiased\(", words, re.M)
    assert "mean age 95.7 ± " in words
    assert "path" in words
    assert "verified" not in words


def test_inspect_reads_headers_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("polyak.checkpoint.safetensors.read_elements", never)
    run("inspect", saved)
    done = run("inspect", saved, "--verify", code=1)
    assert isinstance(done.exception, AssertionError)


def test_inspect_lists_a_folder_of_checkpoints(steps: list[Path], saved: Path) -> None:
    folder = saved.parent
    (folder / "notes.txt").touch()
    steps[2].rename(folder / "step-11000.ckpt")
    dcp_save({"model": state(1)}, folder / "step-4000")
    answer = parsed("inspect", folder)
    names = [Path(one["path"]).name for one in answer["checkpoints"]]
    expected = [
        "ema.safetensors",
        "step-1000.safetensors",
        "step-2000.pt",
        "step-4000",
        "step-11000.ckpt",
    ]
    assert names == expected
    lines = run("inspect", folder).stdout.splitlines()
    assert lines[0].split()[:3] == ["checkpoint", "producer", "clock"]
    assert [line.split()[0] for line in lines[1:]] == expected
    assert "95.7" in lines[1]
    assert "has 5 checkpoints" in refused("inspect", folder, "--against", saved)
    assert parsed("inspect", folder / "step-4000")["container"] == "dcp"


def test_inspect_of_the_unknown_says_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"parts": {"encoder": {"w": torch.ones(2)}}}, path)
    answer = parsed("inspect", path)
    assert answer["sets"] == {}
    assert "parts.encoder" in answer["note"]
    assert parsed("inspect", path, "--at", "parts.encoder")["sets"]["weights"]["tensors"] == 1
    run("inspect", path, "--verify")


def flip(path: Path, place: int) -> None:
    """Flip a bit."""
    with path.open("r+b") as file:
        file.seek(place, 2 if place < 0 else 0)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_verify_names_the_damaged_tensor(saved: Path) -> None:
    run("inspect", saved, "--verify")
    flip(saved, -1)
    (damaged,) = files.verify(saved)
    answer = parsed("inspect", saved, "--verify", code=1)
    assert list(answer["verified"]["damaged"]) == [damaged]
    words = run("inspect", saved, "--verify", code=1).stdout
    assert re.search(rf"^DAMAGED +{re.escape(damaged)}: ", words, re.M)
    run("inspect", saved)  # the header is whole


def test_verify_finds_damage_in_the_fact_sheet(saved: Path) -> None:
    flip(saved, saved.read_bytes().index(b"clock") + 1)
    assert "checksum" in str(parsed("inspect", saved, "--verify", code=1))


def test_verify_finds_damage_in_files_of_torch(steps: list[Path]) -> None:
    answer = parsed("inspect", steps[1], "--verify")
    assert "CRC" in str(answer["verified"]["checked"])
    place = steps[1].read_bytes().index(state(2)["layer.weight"].numpy().tobytes())
    flip(steps[1], place)
    assert torch.load(steps[1]).keys() == state(2).keys()  # torch does not notice
    (name,) = parsed("inspect", steps[1], "--verify", code=1)["verified"]["damaged"]
    assert re.fullmatch(r"step-2000\.pt: .*/data/\d+", name)


def test_verify_says_what_cannot_be_checked(steps: list[Path], tmp_path: Path) -> None:
    verified = parsed("inspect", steps[0], "--verify")["verified"]
    assert "step-1000.safetensors" in str(verified["unchecked"])
    assert "CRC" not in str(verified["checked"])
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state(1), tmp_path / "unsummed.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    verified = parsed("inspect", tmp_path / "unsummed.pt", "--verify")["verified"]
    assert "unsummed.pt" in str(verified["unchecked"])
    assert verified["damaged"] == {}
    dcp_save({"model": state(1)}, tmp_path / "dcp")
    verified = parsed("inspect", tmp_path / "dcp", "--verify")["verified"]
    assert ".distcp" in str(verified["unchecked"])


def test_verify_finds_what_is_cut_short(saved: Path) -> None:
    os.truncate(saved, saved.stat().st_size - 1)
    assert "not a whole" in refused("inspect", saved, "--verify", code=1)
    assert "not a whole" in refused("inspect", saved)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
)
def test_verify_names_what_is_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    x = torch.zeros(3_000_000)
    x[[0, 1_500_000, 2_999_999]] = torch.nan
    files.write(path, {"x": x.to(dtype), "y": torch.ones(2), "n": torch.arange(3)})
    verified = parsed("inspect", path, "--verify", code=1)["verified"]
    assert verified["nonfinite"] == {"x": 3}
    assert verified["damaged"] == {}


def test_against_measures_and_names_what_is_missing(tmp_path: Path) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    files.write(a, {"w": torch.full((2, 2), 3.0), "v": torch.zeros(1), "n": torch.tensor(3)})
    files.write(b, {"w": torch.full((2, 2), 2.0), "v": torch.ones(1), "n": torch.tensor(2)})
    answer = parsed("inspect", a, "--against", b)["against"]
    assert answer["tensors"] == {"w": 0.5, "v": 1.0, "n": 0.5}
    assert answer["total"] == pytest.approx(((4 * 1 + 1) / (4 * 4 + 1)) ** 0.5, rel=1e-15)
    back = parsed("inspect", b, "--against", a)["against"]
    assert back["tensors"]["v"] is None  # it has no length to measure against

    files.write(b, {"w": torch.zeros(4), "n": torch.tensor(3), "u": torch.ones(1)})
    answer = parsed("inspect", a, "--against", b, code=1)["against"]
    assert answer["missing"] == ["u"]
    assert answer["unexpected"] == ["v"]
    assert answer["reshaped"] == {"w": [[2, 2], [4]]}
    words = run("inspect", a, "--against", b, code=1).stdout
    assert re.search(r"^MISSING +u$", words, re.M)
    assert re.search(r"^SHAPES +w \[2, 2\] and \[4\]$|^SHAPES +w \(2, 2\) and \(4,\)$", words, re.M)


# polyak convert


def test_convert_writes_what_the_other_program_loads(saved: Path, out: Path) -> None:
    answer = parsed("convert", saved, "-o", out, "--to", "averaged-model")
    assert answer["set"] == "averages"
    assert answer["tensors"] == 7
    averaged = AveragedModel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    pt = out.with_name("swa.pt")
    out.rename(pt)  # torch.load goes by the name
    averaged.load_state_dict(torch.load(pt))
    assert averaged.n_averaged == 500
    back = out.with_name("back.safetensors")
    words = run("convert", pt, "-o", back, "--to", "safetensors").stdout
    assert "the averages of torch AveragedModel, 7 tensors" in words
    assert all(torch.equal(t, files.read(saved)[name]) for name, t in files.read(back).items())


def test_convert_asks_for_what_it_needs(steps: list[Path], out: Path) -> None:
    assert "'averaged-model'" in refused("convert", steps[0], "-o", out, "--to", "swa")
    assert "Pass --clock" in refused("convert", steps[0], "-o", out, "--to", "ema-pytorch")
    pt = out.with_name("ema.pt")
    run("convert", steps[0], "-o", pt, "--to", "ema-pytorch", "--clock", 3)
    assert torch.load(pt)["step"] == 3


def test_help_names_all_formats() -> None:
    words = run("convert", "--help").stdout
    assert all(re.search(rf"\b{re.escape(name)}\b", words) for name in formats.WRITERS)


# polyak reconstruct


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a run: averages of two widths, and training checkpoints beside them."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    emas = {"narrow": EMA(model, PowerLaw(0.05)), "wide": EMA(model, PowerLaw(0.10))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(1, 161):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, ema in emas.items():
            ema.update(step)
            if step % 20 == 0:
                ema.save(folder / f"{name}-{step}.safetensors", dtype=torch.float32)
        if step % 80 == 0:
            torch.save({"model": model.state_dict(), "step": step}, folder / f"step-{step}.pt")
    return folder


@pytest.fixture
def run_folder(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(whole_run, tmp_path / "run"))


def stored_in(folder: Path) -> list[Path]:
    """The averages of a run, in the order in which a folder is listed."""
    found = [*folder.glob("narrow-*"), *folder.glob("wide-*")]
    return sorted(found, key=lambda p: (p.name[0], int(p.stem.partition("-")[2])))


ASKED: list[tuple[list[str], str, Decay]] = [
    (["--std", ".08"], "powerlaw-0.08", PowerLaw(0.08)),
    (["--std", "0.1"], "powerlaw-0.1", PowerLaw(0.1)),
    (["--half-life", "20"], "halflife-20", HalfLife(20)),
    (["--decay", ".97"], "decay-0.97", Constant(0.97)),
]


@pytest.mark.parametrize(("options", "name", "decay"), ASKED)
def test_reconstruct_writes_and_tells_what_the_library_gives(
    whole_run: Path, out: Path, options: list[str], name: str, decay: Decay
) -> None:
    answer = parsed("reconstruct", whole_run, *options, "-o", out)
    paths = stored_in(whole_run)
    solution = posthoc.solve(paths, decay)
    (averages,) = posthoc.reconstruct(paths, [decay])
    assert answer["targets"] == [
        {
            "name": name,
            "decay": repr(decay),
            "out": str(out),
            "predicted_error": solution.predicted_error,
            "amplification": solution.amplification,
            "storage_noise": solution.storage_noise,
        }
    ]
    assert [one["path"] for one in answer["files"]] == list(map(str, paths))
    assert [one["clock"] for one in answer["files"]] == [*range(20, 161, 20)] * 2
    assert [one["coefficients"] for one in answer["files"]] == [
        [coefficient] for coefficient in solution.coefficients
    ]
    assert (answer["written"], answer["at"]) == (True, 160)
    made = files.read(out)
    assert made.keys() == averages.keys()
    assert all(torch.equal(made[key], averages[key]) for key in made)
    assert files.verify(out) == []


def test_several_averages_come_in_one_pass_as_a_folder(
    whole_run: Path, tmp_path: Path, out: Path
) -> None:
    """Each is what it would be alone."""
    folder = tmp_path / "averages"
    options = [option for options, _, _ in ASKED for option in options]
    answer = parsed("reconstruct", whole_run, *options, "-o", folder)
    names = [name for _, name, _ in ASKED]
    assert names_in(folder) == {f"{name}.safetensors" for name in names}
    assert [one["name"] for one in answer["targets"]] == names
    for (options, name, _), target in zip(ASKED, answer["targets"], strict=True):
        assert target["out"] == str(folder / f"{name}.safetensors")
        alone = parsed("reconstruct", whole_run, *options, "-o", out, "--force")
        assert {**alone["targets"][0], "out": ""} == {**target, "out": ""}
        made, expected = files.read(target["out"]), files.read(out)
        assert all(torch.equal(made[key], expected[key]) for key in expected)
    assert not [name for name in names_in(tmp_path) if name.startswith(".polyak")]
    words = run("reconstruct", whole_run, *options, "-o", tmp_path / "more").stdout
    assert re.search(r"^wrote +\S+/more$", words, re.M)


def test_reconstruct_dry_run_tells_the_same_and_reads_no_tensor(
    whole_run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a tensor was read")

    arguments = ["reconstruct", whole_run, "--std", "0.08", "-o", out]
    done = parsed(*arguments)
    out.unlink()
    monkeypatch.setattr("polyak.checkpoint.safetensors.read_elements", never)
    told = parsed(*arguments, "--dry-run")
    assert {**told, "written": True} == done
    assert names_in(out.parent) == set()
    assert isinstance(run(*arguments, code=1).exception, AssertionError)
    assert names_in(out.parent) == set()


def test_reconstruct_tells_a_line_for_each_file(whole_run: Path, tmp_path: Path) -> None:
    lines = run(
        *("reconstruct", whole_run, "--std", "0.08", "--half-life", "20", "--at", "140"),
        *("-o", tmp_path / "averages", "--dry-run"),
    ).stdout.splitlines()
    assert lines[0].split() == ["would", "write", str(tmp_path / "averages")]
    assert lines[1].split() == ["at", "140"]
    assert lines[2].split() == ["powerlaw-0.08", "halflife-20"]
    assert [line.partition("  ")[0] for line in lines[3:6]] == [
        *("predicted error", "amplification", "storage noise")
    ]
    paths = stored_in(whole_run)
    assert [line.split()[-1] for line in lines[6:22]] == list(map(str, paths))
    last = lines[6 + paths.index(whole_run / "wide-160.safetensors")]
    assert last.split()[:2] == ["0", "0"]  # which is later
    expected = posthoc.solve(paths, PowerLaw(0.08), 140)
    assert lines[3].split()[2] == f"{expected.predicted_error:.2%}"
    assert lines[6].split()[0] == f"{expected.coefficients[0]:.4f}"
    taken = 14 * sum(t.nbytes for t in files.read(paths[0]).values())
    assert lines[22].split() == ["dtype", "float32"]
    assert lines[23].endswith(f"{taken / 1000:.1f} kB to read, of 14 of 16 files")
    assert re.fullmatch(
        r"left out +2: step-80.pt, step-160.pt \(no history of an average in it\)", lines[24]
    )
    assert len(lines) == 25


def test_what_is_reconstructed_says_what_it_is(whole_run: Path, out: Path, tmp_path: Path) -> None:
    """It can be inspected, and read as a stored average again."""
    run("reconstruct", whole_run, "--std", "0.08", "-o", out)
    answer = parsed("inspect", out)
    assert answer["sets"]["averages"]["decay"] == "PowerLaw(std=0.08)"
    assert (answer["clock"], answer["combined"]["rule"]) == (160, "posthoc")
    again = tmp_path / "again.safetensors"
    made = parsed("reconstruct", out, "--std", "0.08", "-o", again)
    assert made["files"] == [{"path": str(out), "clock": 160, "coefficients": [1.0]}]
    assert all(torch.equal(t, files.read(out)[name]) for name, t in files.read(again).items())
    (note,) = made["notes"]
    error = posthoc.solve(stored_in(whole_run), PowerLaw(0.08)).predicted_error
    assert "was reconstructed itself" in note
    assert f"{error:.2%}" in note


def test_a_folder_leaves_out_what_is_no_stored_average_and_says_so(run_folder: Path) -> None:
    """Nor what was reconstructed, which would count as exact. Files that are named are refused."""
    made, damaged = run_folder / "made.safetensors", run_folder / "damaged.safetensors"
    run("reconstruct", run_folder, "--std", "0.08", "-o", made)
    damaged.write_bytes(b"no")
    files.write(run_folder / "other.safetensors", {"w": torch.ones(1)})
    answer = parsed("reconstruct", run_folder, "--std", "0.06", "-o", run_folder / "next")
    assert [one["path"] for one in answer["files"]] == list(map(str, stored_in(run_folder)))
    reasons = {Path(path).name: reason for path, reason in answer["left_out"].items()}
    assert reasons.keys() == {
        *("step-80.pt", "step-160.pt", "made.safetensors", "damaged.safetensors"),
        "other.safetensors",
    }
    assert "reconstructed from others" in reasons["made.safetensors"]
    assert "cannot be read" in reasons["damaged.safetensors"]
    assert reasons["other.safetensors"] == reasons["step-80.pt"]
    words = run("reconstruct", run_folder, "--std", "0.06", "-o", run_folder / "a").stdout
    assert len(re.findall("^left out", words, re.M)) == 3

    named = [run_folder / "step-80.pt", stored_in(run_folder)[0], run_folder / "other.safetensors"]
    message = refused("reconstruct", *named, "--std", "0.06", "-o", run_folder / "b")
    assert message.startswith("2 of the files cannot take part:\n")
    assert f"  {run_folder / 'step-80.pt'}: no history" in message
    assert "polyak.posthoc.Snapshot(path, clock)" in message
    refused("reconstruct", damaged, *named, "--std", "0.06", "-o", run_folder / "b")


def test_a_name_of_another_format_is_refused(run_folder: Path, steps: list[Path]) -> None:
    """What is written is safetensors, which `torch.load` does not read."""
    out = run_folder.parent / "mean.pt"
    for command in (["average", *steps], ["reconstruct", run_folder, "--std", "0.08"]):
        assert "Pass " in refused(*command, "-o", out)
        assert "mean.safetensors" in refused(*command, "-o", out)
    assert not out.exists()


def test_small_coefficients_are_told_from_none(run_folder: Path) -> None:
    """In the table of files: what takes no part is 0, and nothing else is."""
    out = run_folder.parent / "a.safetensors"
    arguments = ["reconstruct", run_folder, "--std", "0.09", "--at", "120", "-o", out, "--dry-run"]
    answer = parsed(*arguments)
    lines = run(*arguments).stdout.splitlines()
    for one in answer["files"]:
        (line,) = [line for line in lines if line.endswith(one["path"])]
        shown = float(line.split()[0])
        (share,) = one["coefficients"]
        assert (shown == 0) == (share == 0)
        assert shown == pytest.approx(share, rel=0.5, abs=5e-5)


def test_a_file_counts_once(run_folder: Path) -> None:
    """However it is led to."""
    path = stored_in(run_folder)[0]
    out = run_folder.parent / "a.safetensors"
    once = parsed("reconstruct", run_folder, "--std", "0.08", "-o", out, "--dry-run")
    for paths in ([run_folder, path], [path, run_folder]):
        again = parsed("reconstruct", *paths, "--std", "0.08", "-o", out, "--dry-run")
        assert sorted(one["path"] for one in again["files"]) == sorted(
            one["path"] for one in once["files"]
        )


def test_a_folder_without_averages_is_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        torch.save(state(step), tmp_path / f"step-{step}.pt")
    message = refused("reconstruct", tmp_path, "--std", "0.1", "-o", tmp_path / "out")
    assert "there is no average of a run in " in message
    assert "step-2.pt: no history of an average in it" in message


def test_an_average_under_a_decay_of_ones_own_takes_no_part(run_folder: Path) -> None:
    class Own:
        def keep(self, t: int, dt: int) -> float:
            return 0.5

        def __repr__(self) -> str:
            return "Own()"

    ema = EMA(nn.Linear(4, 2), Own())
    ema.update(1)
    ema.update(2)
    ema.save(run_folder / "own.safetensors")
    answer = parsed("reconstruct", run_folder, "--std", "0.06", "-o", run_folder / "out")
    assert "Own()" in answer["left_out"][str(run_folder / "own.safetensors")]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--std", "0.001"], 1, r"cannot give --std 0.001 at the clock 160: it would be off by "),
        (["--std", "0.001"], 1, r"more than --limit 0.2. The nearest .* given is --std 0.0\d+; "),
        (["--std", "0.001"], 1, r"or pass --limit 0.\d+, and have that error$"),
        (["--decay", "0.3"], 1, r"cannot give --decay 0.3 .* is --decay 0.\d+; else"),
        (["--half-life", "1"], 1, r"cannot give --half-life 1.0 .* is --half-life [\d.]+; else"),
        (["--uniform"], 1, r"cannot give --uniform .* given is --std 0.\d+; else"),
        (["--std", "0.001", "--uniform"], 1, r"--std 0.001 .*\n.* --uniform "),
        (["--std", "0.08", "--at", "150"], 1, r"clock 140: ask for that with --at 140; else"),
        (["--std", "0.08", "--at", "999"], 1, r"clocks 1 to 160, not of --at 999: pass one of"),
        (["--std", "0.08", "--limit", "0.001"], 1, r"more than --limit 0.001"),
        ([], 2, r"no average is asked for. Pass one or more of --std 0.1, --half-life 1000, "),
        (["--std", "0.3"], 2, r"std must be .* Write --std 0.10, or --uniform .*--half-life n$"),
        (["--half-life", "-1"], 2, "half_life"),
        (["--decay", "1.5"], 2, "1.5"),
        (["--std", ".1", "--std", "0.10"], 2, r"more than once: powerlaw-0.1. Pass each"),
        (["--std", "0.08", "--shard-bytes", "5GX"], 2, "5GX is no size"),
    ],
)
def test_reconstruct_refuses_and_says_what_to_type(
    whole_run: Path, out: Path, options: list[str], code: int, message: str
) -> None:
    said = refused("reconstruct", whole_run, *options, "-o", out, code=code)
    assert re.search(message, said, re.S), said
    assert names_in(out.parent) == set()


def test_what_is_named_as_the_nearest_is_given(whole_run: Path, out: Path) -> None:
    said = refused("reconstruct", whole_run, "--std", "0.001", "-o", out, code=1)
    nearest = re.search(r"The nearest that can be given is (--std \S+);", said)
    limit = re.search(r"or pass (--limit \S+),", said)
    assert nearest
    assert limit
    run("reconstruct", whole_run, *nearest[1].split(), "-o", out)
    run("reconstruct", whole_run, "--std", "0.001", *limit[1].split(), "-o", out, "--force")


def test_averages_of_two_runs_are_not_combined(run_folder: Path, out: Path) -> None:
    ema = EMA(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), PowerLaw(0.1))
    ema.update(1)
    ema.update(2)
    ema.save(run_folder / "other.safetensors")
    said = refused("reconstruct", run_folder, "--std", "0.08", "-o", out, code=1)
    assert "the averages are of 2 runs" in said
    assert "with polyak.posthoc.Snapshot(path, history)" in said


def test_averages_of_two_models_are_not_combined(run_folder: Path, out: Path) -> None:
    """What fact sheets do not tell: it is found when the tensors are looked at."""
    path = stored_in(run_folder)[3]
    facts = files.read_facts(path)
    files.write(path, {**files.read(path), "0.weight": torch.zeros(8, 5)}, facts)
    said = refused("reconstruct", run_folder, "--std", "0.08", "-o", out, code=1)
    assert "0.weight: (8, 4)" in said
    assert not out.exists()
    several = ["--std", "0.08", "--std", "0.09", "-o", out]
    refused("reconstruct", run_folder, *several, code=1)
    assert names_in(out.parent) == {"run"}


def test_reconstruct_stores_as_it_is_asked_to(whole_run: Path, tmp_path: Path) -> None:
    asked = ["reconstruct", whole_run, "--std", "0.08", "--at", "140"]
    run(*asked, "-o", tmp_path / "half", "--dtype", "bfloat16")
    paths = stored_in(whole_run)
    (averages,) = posthoc.reconstruct(paths, [PowerLaw(0.08)], at=140, dtype=torch.bfloat16)
    half = files.read(tmp_path / "half")
    assert half["0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(half[name], averages[name]) for name in averages)

    run(*asked, "-o", tmp_path / "shards", "--shard-bytes", "100")
    run(*asked, "--decay", "0.97", "-o", tmp_path / "both", "--shard-bytes", "100")
    assert names_in(tmp_path / "both") == {"powerlaw-0.08", "decay-0.97"}
    (whole,) = posthoc.reconstruct(paths, [PowerLaw(0.08)], at=140)
    for folder in (tmp_path / "shards", tmp_path / "both" / "powerlaw-0.08"):
        assert "model.safetensors.index.json" in names_in(folder)
        assert parsed("inspect", folder)["clock"] == 140
        with formats.opened(folder) as opened:
            assert all(torch.equal(s.read(), whole[name]) for name, s in opened.tensors.items())


def test_averages_and_folders_of_them_go_together(whole_run: Path, tmp_path: Path) -> None:
    parted = tmp_path / "parted"
    parted.mkdir()
    narrow, wide = list(whole_run.glob("narrow-*")), list(whole_run.glob("wide-*"))
    for path in narrow:
        shutil.copy(path, parted)
    answer = parsed("reconstruct", *wide, parted, "--std", "0.08", "-o", tmp_path / "out")
    assert len(answer["files"]) == len(narrow) + len(wide)
    expected = posthoc.solve(stored_in(whole_run), PowerLaw(0.08)).predicted_error
    # Of the same least squares, in another order.
    assert answer["targets"][0]["predicted_error"] == pytest.approx(expected, rel=1e-6)


def test_reconstruct_overwrites_nothing_unasked(run_folder: Path, out: Path) -> None:
    paths = stored_in(run_folder)
    whole = paths[-1].read_bytes()
    said = refused("reconstruct", run_folder, "--std", "0.1", "-o", paths[-1], "--force")
    assert "is one of the inputs" in said
    assert paths[-1].read_bytes() == whole
    out.write_bytes(b"mine")
    assert "--force to replace it" in refused("reconstruct", run_folder, "--std", "0.1", "-o", out)
    several = ["reconstruct", run_folder, "--std", "0.1", "--std", "0.08", "-o"]
    assert "is there already" in refused(*several, out, "--force")
    assert "is there already" in refused(*several, run_folder, "--force")
    shards = [*several[:4], "--shard-bytes", "1MB", "-o", out, "--force"]
    assert "is there already, and a folder cannot be replaced" in refused(*shards)
    assert out.read_bytes() == b"mine"
    run("reconstruct", run_folder, "--std", "0.1", "-o", out, "--force")
    assert files.verify(out) == []
    missing = refused("reconstruct", run_folder / "none", "--std", "0.1", "-o", out)
    assert "there is no " in missing


def test_reestimated_statistics_are_noted(run_folder: Path, out: Path) -> None:
    for path in stored_in(run_folder):
        facts = files.read_facts(path)
        files.write(path, files.read(path), facts | {"reestimated": ["1.running_mean"]})
    (note,) = parsed("reconstruct", run_folder, "--std", "0.08", "-o", out)["notes"]
    assert "re-estimate" in note
    files.write(out, files.read(out), files.read_facts(out) | {"reestimated": ["1.running_mean"]})
    notes = parsed("reconstruct", out, "--std", "0.08", "-o", out.with_name("more"))["notes"]
    assert ["re-estimate" in note for note in notes] == [False, True]


def test_the_limit_is_that_of_the_library() -> None:
    default = inspect.signature(posthoc.solve).parameters["limit"].default
    words = " ".join(run("reconstruct", "--help").stdout.split())
    assert re.search(rf"--limit ERROR [^-]*\[default: {default}\]", words)


# polyak plot


KINDS = {".png": b"\x89PNG\r\n", ".svg": b"<?xml", ".pdf": b"%PDF"}


def is_picture(path: Path) -> bool:
    """Of the kind that its name says, and not empty."""
    content = path.read_bytes()
    return content.startswith(KINDS[path.suffix]) and len(content) > 5000


def test_is_picture_can_fail(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(KINDS[".pdf"] + bytes(9000))
    (tmp_path / "b.png").write_bytes(KINDS[".png"])
    assert not is_picture(tmp_path / "a.png")
    assert not is_picture(tmp_path / "b.png")


@pytest.fixture
def curve(tmp_path: Path) -> Path:
    """What a search has found."""
    points = [posthoc.Point(std, PowerLaw(std), (std - 0.1) ** 2, 0.01) for std in (0.05, 0.1, 0.2)]
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(posthoc.Curve(160, (0.03, 0.25), tuple(points)).to_dict()))
    return path


@pytest.mark.parametrize("suffix", KINDS)
def test_plot_writes_the_kind_of_picture_that_the_name_says(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"profiles{suffix}"
    run("plot", "--std", "0.1", "--clock", "100", "-o", out)
    assert is_picture(out)


def test_plot_draws_what_it_is_given(whole_run: Path, curve: Path, tmp_path: Path) -> None:
    """Decays, files, both, a folder, a folder and a decay, a curve."""
    narrow, wide = whole_run / "narrow-160.safetensors", whole_run / "wide-160.safetensors"
    everything = list(map(str, stored_in(whole_run)))
    decays = ["--std", "0.1", "--half-life", "20", "--decay", "0.9", "--uniform"]
    reprs = [*map(repr, (PowerLaw(0.1), HalfLife(20), Constant(0.9))), "Uniform()"]
    for number, (arguments, picture, paths, named) in enumerate(
        [
            ([*decays, "--at", "1000"], "profiles", [], reprs),
            ([narrow, wide], "profiles", [str(narrow), str(wide)], []),
            ([narrow, *decays], "profiles", [str(narrow)], reprs),
            ([whole_run], "errors", everything, []),
            ([whole_run, "--at", "140"], "errors", everything, []),
            ([whole_run, "--std", "0.08"], "approximation", everything, ["PowerLaw(std=0.08)"]),
            ([curve], "scores", [str(curve)], []),
        ]
    ):
        out = tmp_path / f"{number}.png"
        answer = parsed("plot", *arguments, "-o", out)
        assert is_picture(out)
        left_out = answer.pop("left_out")
        assert {Path(path).name for path in left_out} == (
            {"step-80.pt", "step-160.pt"} if whole_run in arguments else set()
        )
        assert answer == {
            "out": str(out),
            "picture": picture,
            "files": paths,
            "decays": named,
        }


def test_plot_calls_the_averages_by_what_tells_them_apart(
    run_folder: Path, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    monkeypatch.setattr("polyak.plot.profiles", lambda averages, at: drawn.update(averages))
    monkeypatch.setattr("polyak.plot.save", lambda figure, path: None)
    one, other = run_folder / "wide-160.safetensors", whole_run / "wide-160.safetensors"
    third = whole_run / "wide-80.safetensors"
    run("plot", one, other, third, "--std", "0.08", "-o", tmp_path / "a.png")
    assert list(drawn) == [str(one), str(other), third.name, "PowerLaw(std=0.08)"]
    assert drawn[third.name] == History.from_dict(files.read_facts(third)["history"])


def test_plot_tells_what_it_has_drawn(whole_run: Path, tmp_path: Path) -> None:
    lines = run("plot", whole_run, "--std", "0.08", "-o", tmp_path / "a.svg").stdout.splitlines()
    assert lines[0].split() == ["wrote", str(tmp_path / "a.svg")]
    assert lines[1].split() == ["picture", "approximation"]
    assert lines[2].split() == ["files", "16"]
    assert lines[3].split() == ["decays", "PowerLaw(std=0.08)"]
    assert lines[4].startswith("left out  2: step-80.pt, step-160.pt (no history")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to draw. Pass decays, such as --std 0.1 --at 10000, files"),
        (["--std", "0.1"], "how long it has averaged. Pass --at CLOCK"),
        (["--std", "0.9", "--at", "10"], "std must be .* Write --std 0.10"),
        (["RUN", "--std", "0.1", "--uniform"], "and 2 are asked for. Pass one of them"),
        (["RUN", "--at", "999"], "not of --at 999"),
        (["RUN/wide-160.safetensors", "--uniform", "--at", "999"], "to 160, not of --at 999"),
        (["RUN/step-80.pt"], "1 of the files cannot take part"),
        (["CURVE", "--std", "0.1"], "curve.json' is a curve, .* Pass it alone"),
        (["CURVE", "RUN"], "curve.json' is a curve"),
        (["RUN/none.json"], "there is no '.*none.json'"),
    ],
)
def test_plot_refuses_and_says_what_to_type(
    whole_run: Path, curve: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    real = [a.replace("RUN", str(whole_run)).replace("CURVE", str(curve)) for a in arguments]
    assert re.search(message, refused("plot", *real, "-o", tmp_path / "a.png"))
    assert names_in(tmp_path) == {"curve.json"}


def test_plot_refuses_what_is_no_picture_and_no_curve(tmp_path: Path, curve: Path) -> None:
    said = refused("plot", curve, "-o", tmp_path / "a.gif")
    assert ".png, .svg or .pdf" in said
    for content in ("no", "[1]", '{"at": 3}'):
        curve.write_text(content)
        said = refused("plot", curve, "-o", tmp_path / "a.png")
        assert re.search(r"curve.json' holds no curve: .*json\.dump\(curve\.to_dict", said)
    assert names_in(tmp_path) == {"curve.json"}


def test_plot_overwrites_nothing_unasked(tmp_path: Path, curve: Path, run_folder: Path) -> None:
    out = tmp_path / "a.png"
    out.write_bytes(b"mine")
    assert "--force to replace it" in refused("plot", curve, "-o", out)
    assert out.read_bytes() == b"mine"
    run("plot", curve, "-o", out, "--force")
    assert is_picture(out)
    assert "one of the inputs" in refused("plot", curve, "-o", curve, "--force")
    path = stored_in(run_folder)[0]
    assert "one of the inputs" in refused("plot", run_folder, "-o", path, "--force")
    run("plot", run_folder, "-o", run_folder / "errors.png")


def test_plot_without_matplotlib_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    said = refused("plot", "--std", "0.1", "--at", "9", "-o", tmp_path / "a.png")
    assert "pip install 'polyak[plot]'" in said


# What a reviewer tried


def test_averages_and_weights_are_not_mixed(saved: Path, steps: list[Path], out: Path) -> None:
    """A mean of an EMA and of raw weights is neither."""
    said = refused("average", saved, steps[0], "-o", out)
    assert "some files hold averages and some trained weights" in said


def test_codes_of_quantized_weights_are_not_averaged(tmp_path: Path, out: Path) -> None:
    """New codes times the mean of old scales would be no model."""
    for number in (1, 2):
        codes = torch.full((4,), number, dtype=torch.int32)
        files.write(tmp_path / str(number), {"l.qweight": codes, "l.scales": torch.ones(1)})
    done = CliRunner().invoke(
        cli.app, ["average", str(tmp_path / "1"), str(tmp_path / "2"), "-o", str(out)]
    )
    assert done.exit_code == 1
    assert "l.qweight: codes of a quantized weight" in done.output


def test_nothing_in_common_is_no_average(tmp_path: Path, out: Path) -> None:
    """Not an empty file."""
    files.write(tmp_path / "a", {"a": torch.ones(1)})
    files.write(tmp_path / "b", {"b": torch.ones(1)})
    arguments = ["average", tmp_path / "a", tmp_path / "b", "-o", out, "--unmatched", "drop"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 1
    assert "no tensor in common" in done.output
    assert not out.exists()


def test_out_is_not_put_into_an_input(tmp_path: Path) -> None:
    """Whose folder would be another checkpoint then."""
    files.write_sharded(tmp_path / "in", {"a": torch.ones(1)}, 100)
    said = refused("average", tmp_path / "in", "-o", tmp_path / "in" / "mean.safetensors")
    assert "inside of an input" in said


def test_a_file_does_not_speak_to_the_terminal(tmp_path: Path) -> None:
    """Escapes in what a file says of itself are shown, not sent."""
    files.write(tmp_path / "a", {"w": torch.ones(1)}, {"producer": "\x1b[2Jme", "averaged": ["w"]})
    words = run("inspect", tmp_path / "a").stdout
    assert "\x1b" not in words
    assert r"\x1b[2Jme" in words


def test_a_folder_shows_every_checkpoint_under_its_own_name(tmp_path: Path) -> None:
    """One file beside others, and folders of folders."""
    for name in ("checkpoint-200", "checkpoint-1000"):
        files.write_sharded(tmp_path / name, {"w": torch.ones(1)}, 100)
    files.write(tmp_path / "ema.safetensors", {"w": torch.ones(1)})
    rows = [line.split()[0] for line in run("inspect", tmp_path).stdout.splitlines()]
    assert rows == ["checkpoint", "checkpoint-200", "checkpoint-1000", "ema.safetensors"]


def test_a_made_up_sheet_is_no_traceback(tmp_path: Path) -> None:
    """Producers, recipes and checksums of wrong kinds."""
    for number, facts in enumerate(
        [{"producer": 7}, {"combined": {"rule": "x", "sources": 3, "coefficients": ["y"]}}]
    ):
        files.write(tmp_path / f"{number}.safetensors", {"w": torch.ones(1)}, facts)
    assert len(run("inspect", tmp_path).stdout.splitlines()) == 3


# In processes of their own


def start(
    *arguments: object, program: Sequence[str] = ("-m", "polyak"), **options: Any
) -> subprocess.Popen[str]:
    command = [sys.executable, *program, *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "100"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_comes_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['polyak', *{arguments!r}, '--help']\n"
        "try:\n    runpy.run_module('polyak', run_name='__main__')\n"
        "finally:\n"
        "    slow = {'torch', 'safetensors', 'numpy', 'matplotlib'}\n"
        "    sys.stderr.write(str(slow & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "set()"
    assert "Usage: polyak" in done.stdout
    if arguments:
        assert "Examples:\n" in done.stdout
        assert "Exit codes: 0 done" in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"polyak {importlib.metadata.version('polyak')}\n"


def test_without_typer_the_extra_is_named() -> None:
    code = (
        "import sys\nsys.modules['typer'] = None\nsys.argv = ['polyak']\n"
        "from polyak.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'polyak[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


SLOWLY = """
import time
from polyak import __main__, files

def slowly(tensor, slices=files._slices):
    for part in slices(tensor):
        yield part
        time.sleep(0.25)

files._slices = slowly
__main__.main()
"""


def start_slowly(*arguments: object) -> subprocess.Popen[str]:
    """Start a command that takes seconds to write 40 tensors."""
    return start(*arguments, program=["-c", SLOWLY])


@pytest.fixture
def many(tmp_path: Path) -> list[Path]:
    """Checkpoints of 40 tensors each."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        safetensors.torch.save_file({f"t{n}": torch.ones(1250) for n in range(40)}, path)
    return paths


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("options", [[], ["--shard-bytes", "50kB"]])
def test_ctrl_c_leaves_nothing_behind(many: list[Path], options: list[str]) -> None:
    folder = many[0].parent
    process = start_slowly("average", *many, "-o", folder / "out", *options)
    wait_for(lambda: any(p.name.startswith(".polyak-") for p in folder.iterdir()))
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said == "polyak: stopped by Ctrl-C, and nothing was written\n"
    assert names_in(folder) == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("options", [[], ["--std", "0.08"]])
def test_ctrl_c_leaves_no_part_of_what_is_reconstructed(
    many: list[Path], options: list[str]
) -> None:
    folder = many[0].parent
    for path, decay in zip(many, (PowerLaw(0.05), PowerLaw(0.10)), strict=True):
        history = History("a run")
        for _ in range(100):
            history.tick(decay, 1)
        tensors = {f"t{n}": torch.ones(1250) for n in range(40)}
        facts = {"averaged": list(tensors), "history": history.to_dict()}
        files.write(path, tensors, facts)
    arguments = [*many, "--std", "0.07", *options, "--limit", "inf"]
    process = start_slowly("reconstruct", *arguments, "-o", folder / "out")
    wait_for(lambda: any(p.name.startswith(".polyak-") for p in folder.iterdir()))
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said == "polyak: stopped by Ctrl-C, and nothing was written\n"
    assert names_in(folder) == {"a.safetensors", "b.safetensors"}


def test_what_a_killed_run_leaves_the_next_removes(many: list[Path]) -> None:
    folder = many[0].parent
    process = start_slowly("average", *many, "-o", folder / "out")
    wait_for(lambda: any(p.name.startswith(".polyak-") for p in folder.iterdir()))
    process.kill()
    process.communicate(timeout=60)
    assert not (folder / "out").exists()
    assert len(names_in(folder)) == 3
    small = folder / "small.safetensors"
    files.write(small, {"w": torch.ones(1)})
    run("average", small, small, "-o", folder / "out")
    assert names_in(folder) == {"a.safetensors", "b.safetensors", "small.safetensors", "out"}


def test_whoever_reads_may_stop_reading(steps: list[Path]) -> None:
    with start("inspect", steps[0].parent) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(timeout=60)
    assert "Traceback" not in said


# The page


def commands(page: str) -> list[tuple[str, str]]:
    """The commands of a page, and what it says they print."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", page, re.S):
        for part in block.split("$ ")[1:]:
            command, _, printed = part.partition("\n")
            found.append((command, printed))
    return found


def masked(printed: str) -> str:
    """Without the distances of a trained model, whose last digits are the processor's."""
    return re.sub(r"\d\.\d\de[-+]\d\d", "#", printed)


def test_the_page_shows_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "command-line.md").read_text()
    (setup,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(setup, {})
    shown = commands(page)
    assert len(shown) > 5
    for command, printed in shown:
        words = shlex.split(command)
        done = CliRunner().invoke(cli.app, words[1:], prog_name="polyak")
        assert words[0] == "polyak"
        assert masked(done.output) == masked(printed), command


def test_help_examples_are_ones_that_can_be_typed() -> None:

    for name in COMMANDS:
        words = run(name, "--help").stdout
        examples = re.findall(rf"^ +polyak {name} (.*?)(?:   .*)?$", words, re.M)
        assert len(examples) >= 3
        table = words.partition("Options:")[2].partition("Examples:")[0]
        options = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", table))
        for example in examples:
            assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", example)) <= options
