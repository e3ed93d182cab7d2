"""Processes that are killed (workers, coordinators) and files that kill them: nothing is lost, no process stays."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.fleet import updating
from tests.fleet.makers import indexed, random_adapter, save, save_many

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at processes under /proc")

# Run by every Python that starts with this folder in its path: the process dies when it opens a file of this name.
KILLER = """
import os, signal, sys

def watch(event, arguments):
    if event == "open" and "killer" in str(arguments[0]) and str(arguments[0]).endswith(".safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
"""


@pytest.fixture
def killing(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fleet of ten, and a file beside them by which every other process dies that opens it."""
    save_many(tmp_path / "fleet", 10)
    save(tmp_path / "fleet" / "a004-killer", random_adapter(99))
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hook), *sys.path]))
    return tmp_path / "fleet"


def same(first: loralens.Fleet, second: loralens.Fleet) -> bool:
    """Whether two indexes have the same members with the same bits."""
    names = [[member.name for member in fleet.members()] for fleet in (first, second)]
    a, b = first.sketches(), second.sketches()
    parts = [(a.codes, b.codes), (a.starts, b.starts), (a.steps, b.steps)]
    return names[0] == names[1] and all(np.array_equal(one, other) for one, other in parts)


def children(pid: int) -> set[int]:
    """The processes that a process has started, and theirs."""
    found: set[int] = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found |= {int(status.parent.name)} | children(int(status.parent.name))
    return found


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if _state(pid) != "Z"}


def _state(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return "Z"


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_file_that_kills_its_worker_is_found_and_gets_a_reason(tmp_path: Path, killing: Path) -> None:
    fleet = loralens.Fleet.open(tmp_path / "index")
    result = fleet.update(killing, jobs=2)
    assert [row.name for row in result.unreadable] == ["a004-killer"]
    assert "was killed" in result.unreadable[0].reason
    assert len(fleet.members()) == 10
    # It is not tried again as long as it does not change.
    assert not fleet.update(jobs=2).changes
    shutil.rmtree(killing / "a004-killer")
    fleet.update()
    assert same(fleet, indexed(killing, tmp_path / "undisturbed"))


@pytest.mark.slow
def test_an_executor_whose_process_was_killed_takes_no_more_work(tmp_path: Path, killing: Path) -> None:
    """Processes of our own measure the rest, and find the file."""
    fleet = loralens.Fleet.open(tmp_path / "index")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        result = fleet.update(killing, pool)
    assert [row.name for row in result.unreadable] == ["a004-killer"]
    assert len(fleet.members()) == 10


COORDINATOR = (
    "import sys, loralens; loralens.Fleet.open(sys.argv[2]).update(sys.argv[1], jobs=int(sys.argv[3]) or None)"
)
SLOW = """
import sys, time
from pathlib import Path
from loralens.fleet import updating
inner = updating._store

def store(writer, measured, files):
    inner(writer, measured, files)
    time.sleep(0.2)
    if measured:
        Path(sys.argv[2] + "-begun").touch()

updating._store = store
"""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["0", "2"], ids=["threads", "processes"])
def test_a_killed_coordinator(tmp_path: Path, jobs: str) -> None:
    """SIGKILL in the middle: no process stays, and the next call makes the same bits."""
    root = tmp_path / "fleet"
    save_many(root, 80)
    script = written(tmp_path, SLOW + COORDINATOR)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    fleet = loralens.Fleet.open(tmp_path / "index")
    process = subprocess.Popen([sys.executable, script, root, fleet.home, jobs], env=environment)
    try:
        wait_until((tmp_path / "index-begun").exists)
        started = children(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not alive(started))
    assert bool(started) == (jobs != "0")
    with pytest.raises(loralens.OptionError, match="there is no index"):
        fleet.members()
    assert len(fleet.update(root).changes) == 80
    assert same(fleet, indexed(root, tmp_path / "undisturbed"))
    assert [path.name for path in fleet.home.iterdir()] == ["catalogue.sqlite"]


def written(folder: Path, code: str) -> Path:
    """A script that runs the code, and that its processes may import."""
    script = folder / "script.py"
    script.write_text("if __name__ == '__main__':\n" + indent(code, "    "))
    return script


@pytest.mark.slow
def test_a_file_that_killed_the_coordinator_is_found_by_the_next_call(tmp_path: Path, killing: Path) -> None:
    """In threads the file kills everything; the next call measures the suspects in processes."""
    script = written(tmp_path, COORDINATOR)
    words = [sys.executable, str(script), str(killing), str(tmp_path / "index"), "0"]
    assert subprocess.run(words, check=False).returncode == -signal.SIGKILL
    assert subprocess.run(words, check=False).returncode == 0
    fleet = loralens.Fleet.open(tmp_path / "index")
    assert [row.name for row in fleet.unreadable()] == ["a004-killer"]
    assert len(fleet.members()) == 10


@pytest.mark.slow
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path) -> None:
    root = tmp_path / "fleet"
    save_many(root, 60)
    fleet = loralens.Fleet.open(tmp_path / "index")
    script = written(tmp_path, SLOW + COORDINATOR)
    process = subprocess.Popen(
        [sys.executable, script, root, fleet.home, "2"], stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until((tmp_path / "index-begun").exists)
    started = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    wait_until(lambda: not alive(started))
    kept = len(fleet.members())
    assert kept > 0
    assert len(fleet.update(root).changes) == 60 - kept


@pytest.fixture
def cluster() -> Iterator[object]:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as local,
        distributed.Client(local) as client,
    ):
        yield client


@pytest.mark.live
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_of_dask(tmp_path: Path, cluster: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends by itself, and the sketches have the same bits."""
    root = tmp_path / "fleet"
    save_many(root, 200)
    pids = list(cluster.run(os.getpid).values())  # type: ignore[attr-defined]
    inner = updating._store
    killed: list[int] = []

    def store(*given: Any) -> None:
        inner(*given)
        if not killed:
            killed.append(pids[0])
            os.kill(pids[0], signal.SIGKILL)

    monkeypatch.setattr(updating, "_store", store)
    fleet = loralens.Fleet.open(tmp_path / "index")
    result = fleet.update(root, cluster.get_executor(pure=False))  # type: ignore[attr-defined]
    assert killed
    assert result.adapters == 200
    assert not result.unreadable
    assert same(fleet, indexed(root, tmp_path / "undisturbed"))
