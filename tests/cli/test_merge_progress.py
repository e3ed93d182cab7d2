"""A bar on a terminal for merge, unmerge, verify and extract; and Ctrl-C, after which nothing is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bases import contents, sharded, tensors
from tests.cli.test_merge import done
from tests.marks import slow_except

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="terminals and signals of POSIX")

# What the process does as soon as the first rows are at hand: interrupt itself, as Ctrl-C would.
# What runs in the background of a shell is born deaf to Ctrl-C, and its children with it: hence the first line.
INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import loralens.merging.{module} as module
plain = module.{name}
def interrupted(*args, **options):
    os.kill(os.getpid(), signal.SIGINT)
    return plain(*args, **options)
module.{name} = interrupted
from loralens.cli.main import run
run()
"""
PLACES = {  # where each command is when it is interrupted
    "merge": ("codec", "MergedBlock"),
    "dry run": ("codec", "MergedBlock"),
    "unmerge": ("patch", "bits"),
    "subtract": ("undo", "subtract_update"),
    "verify": ("verify", "bits"),
    "extract": ("checkpoint_difference", "compute_triplets"),
}


@pytest.fixture
def commands(small: Path, tmp_path: Path) -> dict[str, list[object]]:
    base = sharded(tmp_path / "base", tensors())
    done("merge", small, "--base", base, "-o", tmp_path / "merged")
    out = ["-o", tmp_path / "out"]
    return {
        "merge": ["merge", small, "--base", base, *out],
        "dry run": ["merge", small, "--base", base, "--dry-run"],
        "unmerge": ["unmerge", tmp_path / "merged", *out],
        "subtract": ["unmerge", tmp_path / "merged", "--adapter", small, *out],
        "verify": ["verify", tmp_path / "merged", "--base", base, "--adapter", small],
        "extract": ["extract", "--base", base, "--tuned", tmp_path / "merged", "--rank", "1", *out],
    }


@pytest.mark.some(1)
@pytest.mark.parametrize("name", slow_except(PLACES, "merge", "extract"))
def test_interrupted_it_ends_with_130_and_leaves_nothing(name: str, commands, tmp_path: Path) -> None:
    before = contents(tmp_path)
    command = [
        sys.executable,
        "-c",
        INTERRUPTED.format(module=PLACES[name][0], name=PLACES[name][1]),
        *map(str, commands[name]),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert found.returncode == 130, (found.returncode, found.stderr)
    assert found.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in found.stderr
    assert contents(tmp_path) == before
