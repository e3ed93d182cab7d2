"""Ctrl-C or SIGTERM in the middle of a long command: exit code 130 or 143, one word, and nothing left behind."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import loralens
from tests.models import low_rank

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

# A module that cannot be done in a moment: told by a file, so that the signal comes in the middle of the work.
SLOW = """
import time
from importlib import import_module
from pathlib import Path
module, _, name = {work!r}.partition(":")
home = import_module(module)
*classes, name = name.split(".")
for one in classes:
    home = getattr(home, one)
inner = getattr(home, name)
def slow(*given, **named):
    Path({mark!r}).touch()
    time.sleep(0.2)
    return inner(*given, **named)
setattr(home, name, slow)
from loralens.cli.main import run
run()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of 40 modules, so that threads are started."""
    place = tmp_path_factory.mktemp("long")
    for number, name in enumerate("abc"):
        modules = {f"model.layers.{i}.self_attn.q_proj": low_rank(16, 16, 4, seed=40 * number + i) for i in range(40)}
        loralens.save(loralens.Adapter(modules=modules), place / name)
    return place


VALUES, BASES = "loralens.core.lowrank:LowRank.singular_values", "loralens.core.lowrank:LowRank.bases"
TRUNCATE = "loralens.compression.directions:truncation"
COMMANDS = {
    "spectrum": (VALUES, ["spectrum", "a", "--plot", "made.png"]),
    "similarity": (BASES, ["similarity", "a", "b", "--plot", "made.png"]),
    "survey": ("loralens.fleet.measuring:fingerprint", ["survey", ".", "--content"]),
    "doctor": ("loralens.analysis.readings:digest", ["doctor", "a", "b", "c", "--sarif", "made.sarif"]),
    "compress": (TRUNCATE, ["compress", "a", "-o", "made", "--rank", "2"]),
    "compress, measuring what it wrote": (
        "loralens.compression.loss:difference_singular_values",
        ["compress", "a", "--dry-run", "--rank", "2"],
    ),
    "curve": (TRUNCATE, ["curve", "a", "--plot", "made.png"]),
}


ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
TERMINATED = ("spectrum", "doctor", "compress")


QUICK = ("compress", signal.SIGTERM)  # of a command that writes; SIGINT is what the next test begins with
CASES = [*((name, signal.SIGINT) for name in COMMANDS), *((name, signal.SIGTERM) for name in TERMINATED)]


@pytest.mark.parametrize(
    ("name", "number"), [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES]
)
def test_interrupted(name: str, number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    work, arguments = COMMANDS[name]
    code_at_the_end, word = ENDS[number]
    mark = tmp_path / "begun"
    before = sorted(folder.rglob("*"))
    code = SLOW.format(work=work, mark=str(mark))
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # also where ours ignores it
    ) as process:
        while not mark.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == code_at_the_end, err
    assert err.strip().splitlines()[-1] == word
    assert "Traceback" not in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before


# `python -m` remembers a KeyboardInterrupt that passed through `exec` of a text, even if it is caught. Dataclasses are
# made by `exec`.
IN_EXEC = """
import loralens
def spectrum(*given, **named):
    exec("import os, signal; os.kill(os.getpid(), signal.{signal})")
loralens.spectrum = spectrum
from loralens.cli.main import run
run()
"""


@pytest.mark.some(1)
@pytest.mark.parametrize("number", ENDS)
def test_the_exit_code_does_not_depend_on_where_the_signal_comes(number: signal.Signals, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(IN_EXEC.format(signal=number.name))
    process = subprocess.run(
        [sys.executable, "-m", "interrupted", "spectrum", "a"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        check=False,
    )
    code, word = ENDS[number]
    assert (process.returncode, process.stdout, process.stderr.strip()) == (code, "", word)


@pytest.mark.parametrize("module", ["click", "loralens.cli.main"])
def test_an_interrupt_while_the_command_line_is_imported_ends_with_one_word(module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
sys.argv = ["loralens", "--help"]
from loralens.__main__ import start_commands
start_commands()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
