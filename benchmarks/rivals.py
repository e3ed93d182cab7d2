"""Rivals: other tools, each in an environment of its own, because the versions they pin may conflict with ours."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REQUIREMENTS = {"adaptersentry": "adaptersentry==2.0.2", "mergekit": "mergekit==0.1.5"}


@dataclass(frozen=True)
class Rival:
    """Where a tool was installed; ``missing`` is the text for its row if it could not be installed."""

    requirement: str
    folder: Path
    missing: str = ""

    def program(self, name: str) -> str:
        """The path of one of its commands, or of its Python."""
        return str(self.folder / "bin" / name)


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
