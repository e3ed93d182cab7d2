"""Several adapters on the command line: lines, exit codes, what is refused, and runs that are stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.command import Command
from tests.conftest import ROOT
from tests.verbs.batches import files_under, lay_adapters, spoil

compress = Command("compress")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lay_adapters(tmp_path / "all")
    return tmp_path


def test_the_conclusion_comes_first_then_one_line_each(folder: Path) -> None:
    lines = compress.good("all", "-o", "out", "--rank", 4).stdout.splitlines()
    assert lines[0].startswith("out: 3 adapters, all compressed; 506.5 kB → ")
    assert [line.split()[0] for line in lines[4:7]] == ["a", "b", "c"]
    assert compress.good("all", "-o", "out", "--rank", 4, "-q", "--overwrite").stdout.count("\n") == 1


def test_the_exit_code_is_2_if_one_fails_else_1_if_one_answer_is_no(folder: Path) -> None:
    words = ("all", "-o", "out", "--rank", 8, "--only-if-smaller")
    no = compress.run(*words)
    assert no.exit_code == 1
    assert "Not written, as it would not become smaller: a, b and c." in no.stdout
    spoil(folder / "all" / "b")
    failed = compress.run(*words)
    assert failed.exit_code == 2
    assert "Failed: b." in failed.stdout
    assert "smaller: a and c." in failed.stdout
    assert "is a text, not the weights" in failed.stdout
    assert "Traceback" not in failed.output
    Command("doctor").good("all/a", "all/c", "-o", "found", "--fail-on", "warning")
    assert (
        Command("doctor").run("all/a", "all/c", "-o", "found", "--fail-on", "note").exit_code == 1
    )  # of what was found
    assert Command("doctor").run("all", "-o", "found", "--fail-on", "note").exit_code == 2


def test_what_only_one_adapter_has_is_refused(folder: Path) -> None:
    assert "--plot draws one adapter" in compress.refused("all", "--dry-run", "--rank", 4, "--plot", "x.png")
    assert "missing option '-o'" in compress.refused("all", "--rank", 4)
    assert "have the same name" in compress.refused("all/a", "./all/a", "--rank", 4, "-o", "out")
    assert not (folder / "out").exists()


# ---- Runs that are stopped

# Python runs this file at its start, in the run and in the processes that work for it: each output is unfinished for a
# while.
SLOW = """
import time
import loralens.formats.files.adapter_files as writing
inner = writing._write_together
def slow(*arguments):
    time.sleep(1)
    inner(*arguments)
writing._write_together = slow
"""
# A process of the pool is killed by one of the adapters, as by the system where memory is short, while another process
# works on the one before.
KILLER = """
import os, sys, time
if "spawn_main" in " ".join(sys.orig_argv):
    import loralens.verbs.batches.batch as batch
    inner = batch.perform
    def perform(task):
        if task.name == "b":
            os.kill(os.getpid(), 9)
        time.sleep(1 if task.name == "a" else 0)
        return inner(task)
    batch.perform = perform
"""


@contextmanager
def slow_run(folder: Path, jobs: int) -> "Iterator[subprocess.Popen[str]]":
    """A run over six adapters, of which some are done and none of the others will be for some time."""
    (folder / "sitecustomize.py").write_text(SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", "loralens", "compress", "all", "-o", "out", "--rank", "4", "--jobs", str(jobs)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where ours ignores it
        start_new_session=True,
    ) as process:
        while process.poll() is None and not list((folder / "out").glob("[a-f]")):
            time.sleep(0.01)
        deadline = time.monotonic() + 60
        while not list((folder / "out").glob(".*.part")) and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process


@pytest.fixture
def six(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return lay_adapters(tmp_path / "all", *["reuters-r8-r8-seed0"] * 6).parent


def check_repeated(jobs: int, done: int) -> None:
    """A repeated run does the rest, and ends with what a run makes that nobody stopped."""
    counts = compress.told("all", "-o", "out", "--rank", 4, "--jobs", jobs)["counts"]
    assert (counts["exists"], counts["written"]) == (done, 6 - done)
    compress.good("all", "-o", "whole", "--rank", 4)
    assert files_under(Path("out")) == files_under(Path("whole"))


@posix
@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_leaves_nothing_half_done(six: Path, jobs: int, number: int, code: int) -> None:
    with slow_run(six, jobs) as process:
        workers = children(process.pid)
        # Ctrl-C in a terminal goes to all processes of its group.
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert out == ""
    wait_for_ends(workers)
    done = len(list((six / "out").iterdir()))
    assert 1 <= done < 6
    # One more may have ended than the run was told.
    told = re.search(r"note: (\d) of 6 adapters were processed; the same command continues from there", err)
    assert told
    assert done - jobs <= int(told[1]) <= done
    assert not list((six / "out").rglob(".*"))
    check_repeated(jobs, done)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_is_killed_is_taken_up_again(six: Path, jobs: int) -> None:
    with slow_run(six, jobs) as process:
        workers = children(process.pid)
        process.kill()
        process.communicate()
    assert len(workers) >= (0 if jobs == 1 else jobs)
    # They end by themselves, since nobody is left who would read what they answer.
    wait_for_ends(workers)
    check_repeated(jobs, len(list((six / "out").glob("[a-f]"))))


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def wait_for_ends(processes: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and whose end nobody has noted does not."""
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return bool(listed.stdout.strip()) and not listed.stdout.strip().startswith("Z")


@pytest.mark.slow
@posix
def test_an_adapter_that_kills_its_process_fails_alone(six: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (six / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(six), str(ROOT)]))
    done = compress.run("all", "-o", "out", "--rank", 4, "--jobs", 2, "--json")
    assert done.exit_code == 2
    rows = {row["name"]: row for row in json.loads(done.stdout)["adapters"]}
    assert "was killed" in rows["b"]["reason"]
    assert [name for name, row in rows.items() if row["status"] == "failed"] == ["b"]
    assert {path.name for path in (six / "out").iterdir()} == set("acdef")
