"""Rivals: other tools, each in an environment of its own, as their pins and ours need not agree."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = {"adaptersentry": "adaptersentry==2.0.2", "mergekit": "mergekit==0.1.5"}


@dataclass(frozen=True)
class Rival:
    """Where a tool was installed, or the words that stand in its row where it could not be."""

    requirement: str
    folder: Path
    missing: str = ""

    def program(self, name: str) -> str:
        """The path of one of its commands, or of its Python."""
        return str(self.folder / "bin" / name)


def rival(name: str, data: Path) -> Rival:
    """The tool of this name, installed under ``data`` unless it is there."""
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
            sys.stderr.write(done.stderr)  # for whoever sits here; the row is kept, and says no more than that
            return Rival(requirement, found.folder, missing=f"not measured: {requirement} could not be installed")
    ready.write_text(requirement)
    return found
