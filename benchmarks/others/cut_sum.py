"""The sum of two adapters cut to the rank of one: ``loralens combine``, sd-scripts' ``svd_merge_lora``, and PEFT.

loralens and PEFT read the folders of `synthetic_pair`, and sd-scripts the same tensors in files of kohya. The process
of PEFT does what its users do: it loads the model and both adapters, combines and saves.
"""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.others import kohya
from benchmarks.others.combine import SUM, peft_process
from benchmarks.others.compress import short
from benchmarks.process import alternate_writers, read_once
from benchmarks.rivals import Checkout
from benchmarks.synthetic_pair import RANK, make_tiny

SVD = "peft_svd"


def run(data: Path, scripts: Checkout, *, runs: int) -> dict[str, object]:
    """Times, peaks and errors, for the model and adapters of `synthetic_pair` in ``data``."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_pair", str(data / "pair")], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(data / "pair", Path(folder), scripts, runs=runs)


def compare(pair: Path, folder: Path, scripts: Checkout, *, runs: int) -> dict[str, object]:
    """The same as `run`, for the files in ``pair``, with results in ``folder``."""
    missing = {
        "sd-scripts": scripts.missing,
        "peft": "" if find_spec("peft") else "not measured: peft is not installed",
    }
    missing = {name: text for name, text in missing.items() if text}

    def commands(adapters: Path) -> dict[str, list[str]]:
        return {name: one for name, one in _commands(adapters, folder, scripts).items() if name not in missing}

    exact = SUM.exact(pair)

    def judged(tool: str) -> Mapping[str, float]:
        found = _updates(tool, folder / tool, exact)
        return {"error": short(judge.error(found, exact)), "strength": short(judge.strength(found, exact))}

    read_once(pair)
    warm = commands(make_tiny(folder / "tiny"))
    tools = alternate_writers(commands(pair), runs=runs, warm=warm, folder=folder, judge=judged)
    return {"weights": SUM.weights, "least_error": short(judge.least_error(exact, RANK)), "tools": tools | missing}


def _commands(pair: Path, folder: Path, scripts: Checkout) -> dict[str, list[str]]:
    files = kohya.files_in(pair)
    names = [f"{pair / name}:{weight}" for name, weight in zip(SUM.adapters, SUM.weights, strict=True)]
    ours = [str(Path(sys.executable).with_name("loralens")), "combine", *names, "--rank", str(RANK), "--quiet"]
    theirs = scripts.python(str(scripts.folder / "networks" / "svd_merge_lora.py"), "--models")
    theirs += [*(str(files[name]) for name in SUM.adapters), "--ratios", *map(str, SUM.weights)]
    theirs += ["--new_rank", str(RANK), "--device", "cpu", "--precision", "float"]
    return {
        "loralens": [*ours, "-o", str(folder / "loralens" / "out")],
        "sd-scripts": [*theirs, "--save_to", str(folder / "sd-scripts" / "out.safetensors")],
        "peft": peft_process(pair, folder / "peft", {SVD: SUM.jobs()[SVD]}),
    }


def _updates(tool: str, folder: Path, modules: Iterable[str]) -> judge.Matrices:
    """What a tool has written; a file of kohya has other names."""
    if tool == "sd-scripts":
        named = kohya.updates(folder / "out.safetensors")
        return {module: named[kohya.name_of(module)] for module in modules}
    return judge.updates(folder / (SVD if tool == "peft" else "out"))
