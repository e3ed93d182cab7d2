"""Merges into one file that are killed, or run at once: the model and its records are old or new, and fit together."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from tests.verbs.test_merge_gguf import adapter_for, base_of, digest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


def forked(work: Callable[[], object], at_step: Callable[[int], None]) -> int:
    """The id of a child that does the work, and calls ``at_step`` with a number before each step on the disk."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        count = [0]

        def watched(inner: Callable[..., object]) -> Callable[..., object]:
            def step(*args: object, **named: object) -> object:
                count[0] += 1
                at_step(count[0])
                return inner(*args, **named)

            return step

        for home, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
            setattr(home, name, watched(getattr(home, name)))
        work()
        code = 0
    finally:
        os._exit(code)


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.some(1)
@pytest.mark.parametrize("overwrite", [False, True], ids=["a new file", "in place of another merge"])
def test_a_merge_that_was_killed_is_simply_repeated(
    overwrite: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_of(tmp_path / "m.gguf", "Q4_0")
    first, second = adapter_for(base), adapter_for(base, 0.4)
    loralens.merge(second, base=base, output=tmp_path / "new.gguf", bits="keep")
    loralens.merge(first, base=base, output=tmp_path / "old.gguf", bits="keep")
    new, old, states = digest(tmp_path / "new.gguf"), digest(tmp_path / "old.gguf"), set()
    for dies_at in range(1, 60):
        out = tmp_path / str(dies_at) / "o.gguf"
        out.parent.mkdir()
        if overwrite:
            loralens.merge(first, base=base, output=out, bits="keep")

        def merge() -> object:
            return loralens.merge(second, base=base, output=out, bits="keep", overwrite=overwrite)  # noqa: B023

        pid = forked(merge, lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == dies_at else None)  # noqa: B023
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert ended in (0, -signal.SIGKILL)
        # The model is the old one or the new one; without its records only while there is none.
        states.add(digest(out) if out.exists() else "")
        if out.exists():
            caplog.clear()
            assert loralens.verify(out).answer or "was killed" in caplog.text
        if digest(out) != new if out.exists() else True:
            merge()
        assert digest(out) == new
        assert loralens.verify(out).answer
        loralens.unmerge(out, output=tmp_path / "again.gguf", overwrite=True)
        assert digest(tmp_path / "again.gguf") == digest(base)
        loralens.merge(second, base=base, output=out, bits="keep", overwrite=True)
        assert hidden(out.parent) == []
        if ended == 0:
            break
    assert ended == 0
    assert states == {old if overwrite else "", new}


def test_of_two_merges_at_once_one_is_refused(tmp_path: Path) -> None:
    base, out = base_of(tmp_path / "m.gguf", "Q4_0"), tmp_path / "o.gguf"
    adapter = adapter_for(base)
    loralens.merge(adapter, base=base, output=out, bits="keep")
    (reached, reach), (go, let_go) = os.pipe(), os.pipe()

    def wait(step: int) -> None:
        if step == 1:
            os.write(reach, b"!")
            os.read(go, 1)

    pid = forked(lambda: loralens.merge(adapter, base=base, output=out, bits="keep", overwrite=True), wait)
    os.read(reached, 1)
    try:
        with pytest.raises(OptionError, match="a run is going on there at this moment"):
            loralens.merge(adapter, base=base, output=out, bits="keep", overwrite=True)
    finally:
        os.write(let_go, b"!")
        ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended == 0
    assert loralens.verify(out).answer
    assert hidden(tmp_path) == []
