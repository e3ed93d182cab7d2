"""Indexes from elsewhere: no command hangs, breaks, fills the memory, or touches a file outside of the index."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep

import pytest

import loralens
from tests.fleet.attacked import commands
from tests.fleet.hostile_indexes import ATTACKS, CATALOGUE, CHANGED, ENDLESS, PART
from tests.fleet.makers import random_adapter, save, save_many
from tests.marks import slow_except

HANGS = 200  # seconds; most take one or two
MOST = 500 << 20  # bytes
MINE = b"mine" * 100
QUICK = (
    "endless files",
    "sparse shared pages",
    "computed column, left behind",
    "super-journal of catalogue.sqlite",
    f"super-journal of {PART}",
    "log of another",
    "root /",
    "link catalogue.sqlite",
    f"hard link {PART}",
    f"pipe {PART}",
)
REDIRECTED = ("link", "zero", "pipe", "folder")


def expected(attack: str) -> tuple[int, int] | None:
    """The exit codes of readers and of the update; None if they depend on the value."""
    if attack.split()[0] in REDIRECTED and attack.endswith(f" {CATALOGUE}"):
        return 2, 2
    # Readers look at nothing beside the catalogue, and the update removes what it can.
    if attack == f"link to itself {PART}":
        return 0, 2
    # Readers refuse these, and the next update makes the index anew.
    if attack in CHANGED or attack in (f"hard link {CATALOGUE}", f"sparse {CATALOGUE}"):
        return 2, 0
    return None if " of " in attack else (0, 0)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    save_many(root, 3)
    save(root / "copy", random_adapter(0))
    loralens.Fleet.open(root).update(root)
    return root


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes, and asks for a right to make links")
@pytest.mark.parametrize("attack", slow_except(ATTACKS, *QUICK))
def test_an_index_that_was_made_to_do_harm(attack: str, sound: Path, tmp_path: Path) -> None:
    root, victim, out = tmp_path / "fleet", tmp_path / "victim", tmp_path / "out.html"
    shutil.copytree(sound, root)
    loralens.Fleet.open(root).update(root)
    save(root / "new", random_adapter(9))  # so that an update writes
    victim.write_bytes(MINE)
    ATTACKS[attack](root / ".loralens-fleet", victim)
    run = [sys.executable, "-m", "tests.fleet.attacked", root, out]
    ended = subprocess.run(run, capture_output=True, text=True, check=True, timeout=HANGS)
    told, memory = json.loads(ended.stdout)
    assert told.pop("written by readers") == [0, ""]
    assert told.keys() == commands(str(root), str(out)).keys()
    assert not {name: text for name, (code, text) in told.items() if code not in (0, 2)}
    assert memory < MOST
    assert victim.read_bytes() == MINE
    assert {path.name for path in tmp_path.iterdir()} <= {"fleet", "victim", "out.html"}
    codes = expected(attack)
    if codes:
        assert [told[name][0] for name in ("near", "rows", "stats", "index")] == [codes[0]] * 3 + [codes[1]]
    if codes and not codes[1]:
        assert {member.name for member in loralens.Fleet.open(root).members()} == {
            "a000",
            "a001",
            "a002",
            "copy",
            "new",
        }


# Says by a file that it begins to ask the catalogue.
TELLING = """
import sys
from pathlib import Path
from loralens.cli.main import run
from loralens.verbs.fleets import fleet_verbs
inner, mark = fleet_verbs.select_rows, Path(sys.argv.pop(1))
def select_rows(*given):
    mark.touch()
    return inner(*given)
fleet_verbs.select_rows = select_rows
run()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", slow_except((signal.SIGTERM, signal.SIGINT), signal.SIGTERM))
def test_a_signal_ends_a_query_that_has_no_end(number: signal.Signals, sound: Path, tmp_path: Path) -> None:
    """Python drops what a signal raises while SQLite is at work."""
    mark = tmp_path / "begun"
    words = [str(mark), "fleet", "rows", f"{ENDLESS} count(*) from n", "--fleet", str(sound)]
    with subprocess.Popen([sys.executable, "-c", TELLING, *words], stderr=subprocess.PIPE, text=True) as process:
        while not mark.exists():
            assert process.poll() is None
            sleep(0.02)
        sleep(0.5)
        process.send_signal(number)
        said = process.communicate(timeout=HANGS)[1]
    assert process.returncode == 128 + number
    assert said.strip() in ("terminated", "interrupted")
