"""The pages of the commands say what the commands say, and every command has one."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loralens.cli.overview import COMMANDS, GROUPS
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Done:
    """How a run of the script ended, and what it wrote to standard error."""

    returncode: int
    stderr: str


# The commands that the script has started, and what they printed: every run of the script starts the same fifty.
PRINTED: dict[tuple[str, ...], subprocess.CompletedProcess[str]] = {}
Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the script in this process. It starts a command only if no earlier run has started the same one."""
    start = subprocess.run

    def start_once(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if tuple(words) not in PRINTED:
            PRINTED[tuple(words)] = start(words, **options)
        return PRINTED[tuple(words)]

    def run_script(script: Path, *arguments: str) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "run", start_once)
            patch.setattr(sys, "argv", [str(script), *arguments])
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(script), run_name="__main__")
        return Done(int(ended.value.code or 0), capsys.readouterr().err)

    return run_script


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The script and its pages, to be spoilt."""
    (tmp_path / "commands").mkdir()
    for source in [ROOT / "docs" / "usage.py", *(ROOT / "docs" / "commands").glob("*.md")]:
        target = tmp_path / source.relative_to(ROOT / "docs")
        target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_every_page_is_as_the_command_is(run: Run) -> None:
    done = run(ROOT / "docs" / "usage.py", "--check")
    assert done.returncode == 0, done.stderr


def test_a_page_that_lags_behind_is_named_and_written_anew(copy: Path, run: Run) -> None:
    page = copy / "commands" / "spectrum.md"
    right = page.read_text(encoding="utf-8")
    page.write_text(right.replace("--top", "--best"), encoding="utf-8")
    done = run(copy / "usage.py", "--check")
    assert done.returncode == 1
    assert "stale: docs/commands/spectrum.md" in done.stderr
    assert run(copy / "usage.py").returncode == 0
    assert page.read_text(encoding="utf-8").count("--top") == right.count("--top") - right.split("<!-- usage")[0].count(
        "--top"
    )
    assert run(copy / "usage.py", "--check").returncode == 0


def test_a_command_without_a_page_is_named(copy: Path, run: Run) -> None:
    (copy / "commands" / "spectrum.md").unlink()
    done = run(copy / "usage.py", "--check")
    assert done.returncode == 1
    assert "no page in docs/commands: spectrum.md" in done.stderr


def test_a_page_without_a_command_is_named(copy: Path, run: Run) -> None:
    (copy / "commands" / "sepctrum.md").write_text("<!-- usage --><!-- /usage -->", encoding="utf-8")
    assert "no such command" in run(copy / "usage.py", "--check").stderr


def test_the_overview_has_every_command() -> None:
    text = (ROOT / "docs" / "commands" / "index.md").read_text(encoding="utf-8")
    links = [line.split("`")[1] for line in text.splitlines() if line.startswith("| ") and "[`" in line]
    assert links == [name for names in GROUPS.values() for name in names]


def test_every_command_that_prints_json_has_its_contract() -> None:
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        page = (ROOT / "docs" / "commands" / f"{name}.md").read_text(encoding="utf-8")
        assert ("--json" in page) == (f"\n## {name}\n" in text), name
