"""A merge that is killed, interrupted or out of space: the base is untouched, OUT is whole or not there."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from tests.bases import MODULES, contents, sharded
from tests.cli.command import main
from tests.cli.test_merge import done, refused
from tests.models import low_rank

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Big enough to be killed in the middle: 2 MB in three shards."""
    rng = np.random.default_rng(0)
    held = {f"{name}.weight": rng.standard_normal((300, 300)).astype(ml_dtypes.bfloat16) for name in MODULES}
    return sharded(tmp_path_factory.mktemp("kill") / "base", held | {"big": rng.standard_normal((300, 300))})


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    modules = {name: low_rank(300, 300, 4, 0.01, seed=i) for i, name in enumerate(MODULES)}
    loralens.save(loralens.Adapter(modules=modules), base.parent / "adapter")
    return base.parent / "adapter"


def forked(*args: object, before=None) -> int:
    """The number of a child that runs a command and says nothing."""
    pid = os.fork()
    if pid:
        return pid
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        if before:
            before()
        main([str(arg) for arg in args], standalone_mode=False)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the child must not return into pytest
        os._exit(1)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_between_the_two_renames(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done("merge", adapter, "--base", base, "-o", out)
    held, replace = contents(out), Path.replace

    def deadly(self: Path, target: Path) -> Path:
        if self.name.endswith(".part") and self.is_dir():
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    def arm() -> None:
        Path.replace = deadly  # type: ignore[method-assign]

    assert (
        ended(forked("merge", f"{adapter}:2", "--base", base, "-o", out, "--overwrite", before=arm)) == -signal.SIGKILL
    )
    assert not out.exists()
    refused("merge", f"{adapter}:2", "--base", base, "-o", out)
    assert contents(out) == held
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_unmerge_that_is_killed(base: Path, adapter: Path, tmp_path: Path) -> None:
    done("merge", adapter, "--base", base, "-o", tmp_path / "merged")
    merged, dice = contents(tmp_path / "merged"), random.Random(1)
    for _ in range(10):
        pid = forked("unmerge", tmp_path / "merged", "-o", tmp_path / "out")
        time.sleep(dice.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        ended(pid)
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == contents(base)
            break
    assert contents(tmp_path / "merged") == merged
    done("unmerge", tmp_path / "merged", "-o", tmp_path / "out", "--overwrite")
    assert contents(tmp_path / "out") == contents(base)
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "out"}


def test_a_full_disk_is_one_message(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: it is met in the middle."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    arguments = ["merge", str(adapter), "--base", str(base), "-o", str(tmp_path / "out")]
    command = [sys.executable, "-m", "loralens", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert found.returncode == 2
    assert "out: cannot be written: File too large" in found.stderr
    assert "Traceback" not in found.stderr
    assert found.stderr.count("\n") == 2
    assert not list(tmp_path.iterdir())
