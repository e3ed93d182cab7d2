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
from tests.bases import MODULES, contents, sharded, tensors
from tests.cli.command import main
from tests.cli.test_merge import done, run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")]
KILLS = 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Big enough to be killed in the middle: 2 MB in three shards."""
    rng = np.random.default_rng(0)
    held = {f"{name}.weight": rng.standard_normal((300, 300)).astype(ml_dtypes.bfloat16) for name in MODULES}
    return sharded(tmp_path_factory.mktemp("kill") / "base", held | {"big": rng.standard_normal((300, 300))})


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    rng = np.random.default_rng(1)
    modules = {
        name: loralens.LowRank(
            rng.standard_normal((300, 4)).astype(np.float32), rng.standard_normal((4, 300)).astype(np.float32), 0.01
        )
        for name in MODULES
    }
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


def test_killed_at_any_moment(base: Path, adapter: Path, tmp_path: Path) -> None:
    before, out = contents(base), tmp_path / "out"
    whole = []
    for strength in (1, 2):
        done("merge", f"{adapter}:{strength}", "--base", base, "-o", tmp_path / f"whole{strength}")
        whole.append(contents(tmp_path / f"whole{strength}"))
    start = time.perf_counter()
    assert ended(forked("merge", adapter, "--base", base, "-o", out)) == 0
    window = time.perf_counter() - start
    dice, killed = random.Random(0), 0
    for number in range(20 * KILLS):
        overwrite = ["--overwrite"] if out.exists() else []
        pid = forked("merge", f"{adapter}:{number % 2 + 1}", "--base", base, "-o", out, *overwrite)
        time.sleep(dice.uniform(0, window))
        os.kill(pid, signal.SIGKILL)
        dead = ended(pid) == -signal.SIGKILL
        killed += dead
        window *= 1.05 if dead else 0.9  # about two of three die, however fast the machine is at the moment
        if out.exists():
            assert contents(out) in whole
        if killed == KILLS:
            break
    assert contents(base) == before
    assert killed == KILLS
    done("merge", adapter, "--base", base, "-o", out, *(["--overwrite"] if out.exists() else []))
    assert contents(out) == whole[0]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole1", "whole2"}


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
    refused = run("merge", f"{adapter}:2", "--base", base, "-o", out)
    assert refused.exit_code == 2  # the old one is back
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


@pytest.mark.parametrize("command", ["merge", "unmerge", "verify"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "model-00002-of-00003.safetensors is named by"),
        ("truncated", "model-00002-of-00003.safetensors: big ends"),
    ],
)
def test_a_broken_model_is_one_message(command: str, how: str, message: str, small: Path, tmp_path: Path) -> None:
    held = tensors()
    root = sharded(tmp_path / "base", {"big": held.pop("lm_head.weight"), **held})
    done("merge", small, "--base", root, "-o", tmp_path / "out")
    shard = (tmp_path / "out" if command != "merge" else root) / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    if how == "truncated":
        shard.write_bytes(data[:-3])
    given = {
        "merge": (small, "--base", root, "-o", tmp_path / "new"),
        "unmerge": (tmp_path / "out", "-o", tmp_path / "new"),
        "verify": (tmp_path / "out", "--base", root, "--adapter", small),
    }[command]
    refused = run(command, *given)
    assert refused.exit_code == 2
    assert message.replace(": big ends", "") in refused.stderr
    assert refused.stderr.count("\n") == 2
    assert not (tmp_path / "new").exists()
