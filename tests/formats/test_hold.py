"""A folder that one process alone writes in."""

import subprocess
import sys
from pathlib import Path

import pytest

from loralens import OptionError
from loralens.formats.files.disk import Hold, check_free

fcntl = pytest.importorskip("fcntl")


def test_one_at_a_time(tmp_path: Path) -> None:
    one, two = Hold(), Hold()
    check_free(tmp_path)
    one.take(tmp_path)
    one.take(tmp_path)  # it has it already
    assert (one.is_taken, two.is_taken) == (True, False)
    for refused in (two.take, check_free):
        with pytest.raises(OptionError, match="a run is going on there at this moment") as error:
            refused(tmp_path)
        assert str(tmp_path) in str(error.value)
    one.release()
    one.release()
    two.take(tmp_path)
    assert (one.is_taken, two.is_taken) == (False, True)
    assert not list(tmp_path.iterdir())


def test_a_hold_that_is_forgotten_is_released(tmp_path: Path) -> None:
    Hold().take(tmp_path)
    check_free(tmp_path)


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from loralens.formats.files.disk import Hold\n"
        "hold = Hold(); hold.take(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OptionError):
            check_free(tmp_path)
        other.kill()
    check_free(tmp_path)


def test_a_disk_without_locks_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlockable(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unlockable)
    one = Hold()
    one.take(tmp_path)
    check_free(tmp_path)
    assert not one.is_taken
    monkeypatch.setitem(sys.modules, "fcntl", None)  # Windows
    one.take(tmp_path)
