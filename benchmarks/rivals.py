"""Rivals: other tools, from a package index in an environment of their own, from a checkout, or a program.

The versions that tools pin may conflict with ours, so a tool from a package index gets its own environment. A tool that
is on no index, or whose package needs much more than the part that is measured, is run from a checkout of its sources
that an environment variable names. A checkout with a virtual environment (``.venv`` or ``venv``) runs in it, and any
other one in the environment of the benchmarks. A tool that is not there is said to be missing, and never an error.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = {"adaptersentry": "adaptersentry==2.0.2", "mergekit": "mergekit==0.1.5"}
# The variable that names a checkout of a tool, and the folder in it that Python has to find modules in.
CHECKOUTS = {"axolotl": ("LORALENS_BENCH_AXOLOTL", "src"), "sd-scripts": ("LORALENS_BENCH_SD_SCRIPTS", "")}


@dataclass(frozen=True)
class Rival:
    """Where a tool was installed; ``missing`` is the text for its row if it could not be installed."""

    requirement: str
    folder: Path
    missing: str = ""

    def program(self, name: str) -> str:
        """The path of one of its commands, or of its Python."""
        return str(self.folder / "bin" / name)


@dataclass(frozen=True)
class Checkout:
    """The sources of a tool and their version; ``missing`` is the text for its row if there are none."""

    version: str = ""
    folder: Path = Path()
    modules: Path = Path()
    missing: str = ""

    def python(self, *arguments: str) -> list[str]:
        """A command line that runs Python with the modules of the tool."""
        own = [self.folder / name / "bin" / "python" for name in (".venv", "venv")]
        python = next((str(path) for path in own if path.exists()), sys.executable)
        return ["env", f"PYTHONPATH={self.modules}", python, *arguments]


@dataclass(frozen=True)
class Program:
    """A compiled program and its version; ``missing`` is the text for its row if it is not there."""

    path: str = ""
    version: str = ""
    missing: str = ""


def rival(name: str, data: Path) -> Rival:
    """The tool of this name, installed under ``data`` if it is not there yet."""
    requirement = REQUIREMENTS[name]
    found = Rival(requirement, data.absolute() / name)
    ready = found.folder / ".ready"
    if ready.exists() and ready.read_text() == requirement:
        return found
    shutil.rmtree(found.folder, ignore_errors=True)
    found.folder.parent.mkdir(parents=True, exist_ok=True)
    for command in (
        [sys.executable, "-m", "venv", str(found.folder)],
        [found.program("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", requirement],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.stderr.write(done.stderr)  # for the user who runs this; the row that is kept has no details
            return Rival(requirement, found.folder, missing=f"not measured: {requirement} could not be installed")
    ready.write_text(requirement)
    return found


def checkout(name: str) -> Checkout:
    """The sources of the tool of this name, where its environment variable says."""
    variable, inner = CHECKOUTS[name]
    folder = Path(os.environ.get(variable, "")).absolute()
    if not os.environ.get(variable):
        return Checkout(missing=f"not measured: {variable} does not name a checkout of {name}")
    if not folder.is_dir():
        return Checkout(missing=f"not measured: {variable} names no folder")
    return Checkout(f"{name} {_commit(folder)}", folder, folder / inner)


def llama_export_lora() -> Program:
    """llama.cpp's program, where ``LLAMA_EXPORT_LORA`` or the PATH has it. It does not tell its version."""
    path = os.environ.get("LLAMA_EXPORT_LORA") or shutil.which("llama-export-lora")
    if not path:
        return Program(missing="not measured: it is not on the PATH, and LLAMA_EXPORT_LORA does not name it")
    return Program(path, os.environ.get("LLAMA_EXPORT_LORA_VERSION", "llama-export-lora of an unknown version"))


def _commit(folder: Path) -> str:
    """The commit of a checkout and its date. A folder inside another repository has no commit of its own."""
    git = ["git", "-C", str(folder)]
    top = subprocess.run([*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if top.returncode or Path(top.stdout.strip()) != folder.resolve():
        return "of an unknown commit"
    told = subprocess.run([*git, "log", "-1", "--format=%h of %cs", "--abbrev=12"], capture_output=True, text=True)
    return f"commit {told.stdout.strip()}"
