"""What `make` says before it installs, by dry runs on a copy: nothing is installed."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not here")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def said(clone: Path, goal: str) -> list[str]:
    """What the goal would echo."""
    done = subprocess.run(["make", "-n", goal], cwd=clone, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if line.startswith("echo ")]


@pytest.mark.parametrize("goal", ["demo", "test", "test-all", "test-live", "check"])
def test_every_target_says_what_it_installs_and_how_much_that_is(clone: Path, goal: str) -> None:
    line, *_ = said(clone, goal)
    assert "GB on disk" in line
    assert "minutes" in line
    assert "3 GB more to download" in line


def test_it_says_so_only_where_it_installs(clone: Path) -> None:
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").touch()
    (clone / ".venv/lib/python3.11/site-packages/torch").mkdir(parents=True)
    line, texts = said(clone, "demo")
    assert "3 GB more" not in line  # a torch is there, perhaps one for CPUs only
    assert "encoder and texts" in texts
    (clone / ".venv/.ready-test").touch()
    (clone / ".venv/.data").touch()
    # The extra of the tests contains that of the demo, but not that of the checks.
    assert said(clone, "test") == said(clone, "demo") == []
    assert len(said(clone, "check")) == 1
