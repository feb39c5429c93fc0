"""Build the wheel, install it into an environment of its own, and use it from another folder.

Run by ``make wheel``; not collected by pytest.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import pathlib, sys, torch, polyak
assert "site-packages" in polyak.__file__ and "-wheel-" in polyak.__file__, polyak.__file__
assert (pathlib.Path(polyak.__file__).parent / "py.typed").exists()
model = torch.nn.Linear(3, 3)
ema = polyak.EMA(model, 0.9)
ema.update(); ema.update()
with ema.applied():
    model(torch.ones(1, 3))
ema.save("ema.safetensors")
assert polyak.files.verify("ema.safetensors") == []
print("polyak", polyak.__version__, "works from its wheel:", ema.report().paths)
"""


def main() -> None:
    """Do it; any failure ends the process with its error."""
    with tempfile.TemporaryDirectory(prefix="polyak-wheel-") as folder:
        run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT))
        (wheel,) = Path(folder).glob("*.whl")
        names = zipfile.ZipFile(wheel).namelist()
        if not all(n.startswith(("polyak/", "polyak-")) for n in names):
            raise SystemExit(f"the wheel holds more than polyak: {names}")
        # The environment sees this one's torch, and installs nothing but the wheel.
        venv.create(Path(folder) / "env", with_pip=False)
        (site,) = (Path(folder) / "env").glob("lib/python*/site-packages")
        outer = next(p for p in sys.path if p.endswith("site-packages"))
        (site / "outer.pth").write_text(outer + "\n")
        python = Path(folder) / "env" / "bin" / "python"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
            "--target", str(site), str(wheel))  # fmt: skip
        run(str(python), "-W", "error", "-c", USE, cwd=folder)


def run(*command: str, cwd: str | Path = ROOT) -> None:
    """Run a command; its failure is ours."""
    subprocess.run(command, cwd=cwd, check=True)


if __name__ == "__main__":
    main()
