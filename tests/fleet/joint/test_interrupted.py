"""Compression that is killed, and workers that are: the file is whole or absent, and the next run is not disturbed."""

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

import loralens
from loralens.errors import FormatError, OptionError
from loralens.fleet.joint.compress import compress_fleet
from loralens.fleet.joint.expand import expand_adapter
from tests.fleet.joint.collection import make

STEPS = [(Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "touch"), (os, "fsync")]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    sources = make(root / "adapters")
    # Two tasks, so that executors have something to divide.
    groups = [[sources[name] for name in ("run0", "run1", "run2", "copy-gauge")], [sources["stranger"]]]
    compress_fleet(groups, root / "whole.safetensors", error=0.15)
    return groups, (root / "whole.safetensors").read_bytes()


def forked(work, dies_at):
    """How a child ends that does the work and is killed before its n-th step on the disk."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, count = 1, [0]
    try:

        def deadly(inner):
            def step(*args, **named):
                count[0] += 1
                if count[0] == dies_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return inner(*args, **named)

            return step

        for home, name in STEPS:
            setattr(home, name, deadly(getattr(home, name)))
        work()
        code = 0
    finally:
        os._exit(code)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("old", [None, b"an older file"])
def test_compress_that_is_killed_at_any_step(fleet, tmp_path, old):
    groups, whole = fleet
    target = tmp_path / "fleet.safetensors"
    ended = -signal.SIGKILL
    for step in range(1, 50):
        if old is None:
            target.unlink(missing_ok=True)
        else:
            target.write_bytes(old)
        ended = forked(lambda: compress_fleet(groups, target, error=0.15, overwrite=True), step)
        assert (target.read_bytes() if target.exists() else None) in (old, whole)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert ended == 0
    assert step > 2
    # The next run to this target removes what the killed ones have left.
    compress_fleet(groups, target, error=0.15, overwrite=True)
    assert target.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_expand_that_is_killed_at_any_step(fleet, tmp_path):
    file = tmp_path / "fleet.safetensors"
    file.write_bytes(fleet[1])
    expand_adapter(file, "run1", tmp_path / "expected")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    for step in range(1, 50):
        ended = forked(lambda: expand_adapter(file, "run1", tmp_path / "out"), step)
        found = tmp_path / "out"
        seen = {path.name: path.read_bytes() for path in found.iterdir()} if found.exists() else {}
        assert seen in ({}, expected)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        if seen:
            for path in found.iterdir():
                path.unlink()
            found.rmdir()
    assert ended == 0
    assert {path.name for path in tmp_path.iterdir()} == {"fleet.safetensors", "expected", "out"}


def test_an_executor_gives_the_same_bytes(fleet, tmp_path):
    groups, whole = fleet
    with ThreadPoolExecutor(2) as executor:
        compress_fleet(groups, tmp_path / "fleet.safetensors", error=0.15, executor=executor)
    assert (tmp_path / "fleet.safetensors").read_bytes() == whole


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_leaves_nothing(fleet, tmp_path):
    groups, whole = fleet
    target = tmp_path / "fleet.safetensors"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        os.kill(executor.submit(os.getpid).result(), signal.SIGKILL)
        with pytest.raises(FormatError, match="worker was killed"):
            compress_fleet(groups, target, error=0.15, executor=executor)
    assert not list(tmp_path.iterdir())
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        compress_fleet(groups, target, error=0.15, executor=executor)
    assert target.read_bytes() == whole


class Replacing(ThreadPoolExecutor):
    """Replaces the file of the stranger when its task is done."""

    def __init__(self, replacement):
        super().__init__(1)
        self.replacement = replacement

    def submit(self, function, group, error):
        def work():
            task = function(group, error)
            for source in group:
                if source.name == "stranger":
                    loralens.save(self.replacement, source.path, overwrite=True)
            return task

        return super().submit(work)


@pytest.mark.parametrize("part", ["pairs", "head"])
def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, part):
    sources = make(tmp_path / "adapters")
    groups = [[sources["run0"], sources["run1"]], [sources["stranger"]]]
    target = tmp_path / "fleet.safetensors"
    # The other adapter has other pairs, or a head with other numbers.
    stranger, run5 = (loralens.load(sources[name].path).load() for name in ("stranger", "run5"))
    other = replace(stranger, modules=run5.modules) if part == "pairs" else replace(stranger, extra=run5.extra)
    what = "stranger: its error in the file" if part == "pairs" else "classifier.weight was changed"
    with Replacing(other) as executor, pytest.raises(FormatError, match=what):
        compress_fleet(groups, target, error=0.15, executor=executor)
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_a_target_that_is_a_source_is_refused(tmp_path):
    sources = make(tmp_path / "adapters")
    file = tmp_path / "adapters" / "run0" / "adapter_model.safetensors"
    before = file.read_bytes()
    with pytest.raises(OptionError, match="the adapter run0"):
        compress_fleet([[sources["run0"]]], file, overwrite=True)
    assert file.read_bytes() == before
