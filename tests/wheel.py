"""Build the wheels, install each into an environment of its own, and use it from another folder.

Three of them, all from the source archive: as it is meant to be; without a compiler; and with flags
that would change how every number of the process is rounded.

Run by ``make wheel``; not collected by pytest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = "polyak/engine/_lerp.abi3.so"
WITHOUT = "foreach (no compiler when polyak was installed)"

USE = """
import pathlib, sys, torch, polyak
assert "site-packages" in polyak.__file__ and "-wheel-" in polyak.__file__, polyak.__file__
assert (pathlib.Path(polyak.__file__).parent / "py.typed").exists()
least = torch.full((1,), 1e-40)
model = torch.nn.Linear(3, 3)
ema = polyak.EMA(model, 0.9)
ema.update(); ema.update()
with ema.applied():
    model(torch.ones(1, 3))
ema.save("ema.safetensors")
assert polyak.files.verify("ema.safetensors") == []
assert ema.report().paths == (sys.argv[1],), ema.report().paths
assert (least * 1).item() > 0, "loading polyak has taken subnormal numbers from the process"
sys.stdout.write(f"polyak {polyak.__version__} works from its wheel: {sys.argv[1]}\\n")
"""


def main() -> None:
    """Do it; any failure ends the process with its error."""
    with tempfile.TemporaryDirectory(prefix="polyak-wheel-") as folder:
        built = Path(folder) / "built"
        run(sys.executable, "-m", "build", "--outdir", str(built), str(ROOT))
        (wheel,), (archive,) = built.glob("*.whl"), built.glob("*.tar.gz")
        names = zipfile.ZipFile(wheel).namelist()
        if not all(n.startswith(("polyak/", "polyak-")) for n in names):
            raise SystemExit(f"the wheel holds more than polyak: {names}")
        if "-cp310-abi3-" not in wheel.name:
            raise SystemExit(f"the wheel is not one for every Python: {wheel.name}")
        compiler = shutil.which(os.environ.get("CC", "cc"))
        if compiler and sys.platform != "win32":
            check_instructions(wheel, Path(folder))
        use(wheel, Path(folder) / "usual", "cpu" if compiler else WITHOUT)
        use(made(archive, folder, CC="false"), Path(folder) / "without", WITHOUT)
        if compiler:
            use(made(archive, folder, CFLAGS="-ffast-math"), Path(folder) / "fast", "cpu")


def made(archive: Path, folder: str, **environment: str) -> Path:
    """Build a wheel from the source archive, in another environment."""
    place = Path(tempfile.mkdtemp(dir=folder))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-cache-dir",
        "--wheel-dir", str(place), str(archive), **environment)  # fmt: skip
    (wheel,) = place.glob("*.whl")
    return wheel


def use(wheel: Path, place: Path, path: str) -> None:
    """Install a wheel into an environment of its own, and average there by the path expected."""
    # The environment sees this one's torch, and installs nothing but the wheel.
    venv.create(place, with_pip=False)
    (site,) = place.glob("lib/python*/site-packages")
    outer = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "outer.pth").write_text(outer + "\n")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", str(site), str(wheel))  # fmt: skip
    python = str(place / "bin" / "python")
    run(python, "-W", "error", "-c", USE, path, cwd=place)
    run(python, "-W", "error", "-m", "polyak", "inspect", "ema.safetensors", cwd=place)


def check_instructions(wheel: Path, folder: Path) -> None:
    """Refuse a library that an older x86 cannot run: wide vectors only in loops that say so."""
    library = zipfile.ZipFile(wheel).extract(LIBRARY, folder)
    objdump = shutil.which("objdump")
    if objdump is None:
        sys.stdout.write("no objdump: the instructions of the library are not looked at\n")
        return
    command = [objdump, "-d", "--no-show-raw-insn", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "x86-64" not in text:
        return
    functions = dict(re.findall(r"^[0-9a-f]+ <([^>]+)>:\n(.*?)(?:\n\n|\Z)", text, re.M | re.S))
    wide = {name for name, code in functions.items() if re.search(r"%[yz]mm|%k[1-7]|\tv", code)}
    loops = {f"{kind}_{t}" for kind in ("avx2", "avx512") for t in ("float", "bf16", "fp16")}
    plain = {"twice_float", "twice_bf16", "twice_fp16", "twice_double", "polyak_lerp"}
    if not (loops <= wide and plain <= functions.keys()):
        raise SystemExit(f"the library has not the functions that it should: {sorted(functions)}")
    if beside := {n for n in wide if not n.startswith(("avx2_", "avx512_"))}:
        raise SystemExit(f"an older processor cannot run these: {sorted(beside)}")


def run(*command: str, cwd: str | Path = ROOT, **environment: str) -> None:
    """Run a command; its failure is ours."""
    subprocess.run(command, cwd=cwd, check=True, env=os.environ | environment)


if __name__ == "__main__":
    main()
