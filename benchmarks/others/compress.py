"""``loralens compress`` of a kohya file from rank 64 to 16, against ``networks/resize_lora.py`` of sd-scripts.

Both write float32. No update of rank 16 has a smaller error than ``least``.
"""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.others import kohya
from benchmarks.process import alternate_writers
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
    exact = kohya.updates(wide)
    warm = _commands(kohya.files_in(make_tiny(folder / "tiny"))["wide"], folder, scripts)

    def kept(tool: str) -> Mapping[str, float]:
        return _quality(judge.error(kohya.updates(folder / tool / "out.safetensors"), exact))

    timed = _commands(wide, folder, scripts)
    tools = alternate_writers(timed, runs=runs, warm=warm, folder=folder, judge=kept)
    if scripts.missing:
        tools["sd-scripts"] = scripts.missing
    return {"least": _quality(judge.least_error(exact, RANK)), "tools": tools}


def _commands(wide: Path, folder: Path, scripts: Checkout) -> dict[str, list[str]]:
    loralens = [str(Path(sys.executable).with_name("loralens")), "compress", str(wide), "--rank", str(RANK), "--quiet"]
    found = {"loralens": [*loralens, "-o", str(folder / "loralens" / "out.safetensors")]}
    if not scripts.missing:
        theirs = scripts.python(str(scripts.folder / "networks" / "resize_lora.py"), "--model", str(wide))
        theirs += ["--new_rank", str(RANK), "--device", "cpu", "--save_precision", "float"]
        found["sd-scripts"] = [*theirs, "--save_to", str(folder / "sd-scripts" / "out.safetensors")]
    return found


def _quality(error: float) -> dict[str, float]:
    """The error, and the energy that is kept: the nearest update of a rank lacks the square of its error."""
    return {"error": short(error), "energy_kept": short(1 - error**2)}


def short(figure: float) -> float:
    """Four digits."""
    return float(f"{figure:.4g}")
