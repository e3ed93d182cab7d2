"""``loralens compress`` of a kohya file from rank 64 to 16, against ``networks/resize_lora.py`` of sd-scripts.

Both write float32. No update of rank 16 has a smaller error than ``least``.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.others import kohya
from benchmarks.process import alternate, read_once
from benchmarks.rivals import Checkout
from benchmarks.synthetic_pair import make_tiny

RANK = 16


def run(data: Path, scripts: Checkout, *, runs: int) -> dict[str, object]:
    """Times, peaks and errors for the file ``wide`` of `kohya` in ``data``."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_pair", str(data / "pair")], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(kohya.files_in(data / "pair")["wide"], Path(folder), scripts, runs=runs)


def compare(wide: Path, folder: Path, scripts: Checkout, *, runs: int) -> dict[str, object]:
    """The same as `run`, for this file, with results in ``folder``."""
    warm = _commands(kohya.files_in(make_tiny(folder / "tiny"))["wide"], folder, scripts)
    read_once(wide)
    figures = alternate(_commands(wide, folder, scripts), runs=runs, warm=warm, folder=folder)
    exact = kohya.updates(wide)
    tools: dict[str, object] = {
        name: figure.record() | kept(kohya.updates(folder / name / "out.safetensors"), exact)
        for name, figure in figures.items()
    }
    if scripts.missing:
        tools["sd-scripts"] = scripts.missing
    least = judge.least_error(exact, RANK)
    return {"least": {"error": short(least), "energy_kept": short(1 - least**2)}, "tools": tools}


def _commands(wide: Path, folder: Path, scripts: Checkout) -> dict[str, list[str]]:
    loralens = [str(Path(sys.executable).with_name("loralens")), "compress", str(wide), "--rank", str(RANK), "--quiet"]
    found = {"loralens": [*loralens, "-o", str(folder / "loralens" / "out.safetensors")]}
    if not scripts.missing:
        theirs = scripts.python(str(scripts.folder / "networks" / "resize_lora.py"), "--model", str(wide))
        theirs += ["--new_rank", str(RANK), "--device", "cpu", "--save_precision", "float"]
        found["sd-scripts"] = [*theirs, "--save_to", str(folder / "sd-scripts" / "out.safetensors")]
    return found


def kept(found: judge.Matrices, exact: judge.Matrices) -> dict[str, float]:
    """The error of a result and the energy that it keeps, which is 1 − error² for the nearest of its rank."""
    far = judge.error(found, exact)
    return {"error": short(far), "energy_kept": short(1 - far**2)}


def short(figure: float) -> float:
    """Four digits."""
    return float(f"{figure:.4g}")
