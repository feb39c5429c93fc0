"""cli.py: what the commands say and write, what they refuse, and that nothing half done is left."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner, Result

from polyak import EMA, Debiased, cli, files, formats

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

    monkeypatch.setattr("polyak.checkpoint._pread", never)
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


def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "polyak", *map(str, arguments)]
    environment = os.environ | {"COLUMNS": "100"}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.parametrize("arguments", [[], ["average"], ["inspect"], ["convert"]])
def test_help_comes_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['polyak', *{arguments!r}, '--help']\n"
        "try:\n    runpy.run_module('polyak', run_name='__main__')\n"
        "finally:\n    sys.stderr.write(str({'torch', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == "set()"
    assert "Usage: polyak" in done.stdout
    if arguments:
        assert "Examples:\n" in done.stdout
        assert "Exit codes: 0 done" in done.stdout


def test_without_typer_the_extra_is_named() -> None:
    code = (
        "import sys\nsys.modules['typer'] = None\nsys.argv = ['polyak']\n"
        "from polyak.__main__ import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install 'polyak[cli]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def large(tmp_path: Path) -> list[Path]:
    """Checkpoints that take a while: 200 MB each."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        safetensors.torch.save_file({f"t{n}": torch.ones(1_250_000) for n in range(40)}, path)
    return paths


def wait_for(happened: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("options", [[], ["--shard-bytes", "50MB"]])
def test_ctrl_c_leaves_nothing_behind(large: list[Path], options: list[str]) -> None:
    folder = large[0].parent
    process = start("average", *large, "-o", folder / "out", *options)
    wait_for(lambda: any(p.name.startswith(".polyak-") for p in folder.iterdir()))
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert said == "polyak: stopped by Ctrl-C, and nothing was written\n"
    assert names_in(folder) == {"a.safetensors", "b.safetensors"}


def test_what_a_killed_run_leaves_the_next_removes(large: list[Path]) -> None:
    folder = large[0].parent
    process = start("average", *large, "-o", folder / "out")
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

    for name in ("average", "inspect", "convert"):
        words = run(name, "--help").stdout
        examples = re.findall(rf"^ +polyak {name} (.*?)(?:   .*)?$", words, re.M)
        assert len(examples) >= 3
        table = words.partition("Options:")[2].partition("Examples:")[0]
        options = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", table))
        for example in examples:
            assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", example)) <= options
