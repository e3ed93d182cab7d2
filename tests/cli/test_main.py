"""The command as a process: exit codes, closed pipes, full disks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import Command

RUN = [sys.executable, "-m", "loralens"]


def exit_code(*arguments: str) -> int:
    return subprocess.run([*RUN, *arguments], capture_output=True, check=False).returncode


def test_exit_codes(small: Path) -> None:
    assert exit_code("spectrum", str(small)) == 0
    assert exit_code("spectrum", "nowhere") == 2
    assert exit_code("spectrum", "--beauty") == 2
    assert exit_code("equal", str(small), str(small)) == 0


def test_a_path_that_the_system_refuses_is_named(small: Path) -> None:
    name = "x" * 300 + ".json"
    words = ["compress", str(small), "--size", "1KB", "--dry-run", "--weights", name]
    done = subprocess.run([*RUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("error:") == done.stderr.count("fix:") == 1
    assert name in done.stderr
    assert "output" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "{}", "--rank", "1", "--overwrite", "-o", ""],
        ["merge", ":0.7", "--base", "base", "-o", "out"],
        ["fleet", "index", ""],
    ],
    ids=lambda words: words[0],
)
def test_an_empty_path_is_not_the_current_directory(
    words: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a shell variable that is not set: an adapter in the current directory would be replaced."""
    shutil.copytree(small, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    assert "is empty; a variable of the shell may not be set" in Command().refused(
        *(word.format(small) for word in words)
    )
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


@pytest.mark.some(1)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["spectrum", "--json"], ["inspect"]])
def test_a_full_disk_behind_stdout_is_one_message(small: Path, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*RUN, *arguments, str(small)], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the output cannot be written")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_pipe_ends_the_command_quietly(small: Path) -> None:
    with subprocess.Popen([*RUN, "spectrum", str(small)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141  # as shells count SIGPIPE
