"""Modules of Python in processes of their own, and functions in children of such a process."""

import os
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds after which a process that hangs is ended
# One thread each: the processes of a test would take the processors from each other. tokenizers warns of forks.
OWN = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def start(module: str, *words: object) -> "subprocess.Popen[str]":
    """Start ``python -m module words``."""
    command = [sys.executable, "-m", module, *map(str, words)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | OWN, stdout=pipe, stderr=pipe, text=True)


def run_module(module: str, *words: object) -> str:
    """Run a module to its end, which must be a good one, and return its standard output."""
    return run_to_end(module, *words)[0]


def run_to_end(module: str, *words: object) -> tuple[str, str]:
    """Standard output and standard error of a module that must end well."""
    with start(module, *words) as process:
        out, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    return out, errors


def in_children(*works: Callable[[], object]) -> None:
    """Do each of the works in a child of this process, all at once, and end this process unless all have succeeded."""
    children = [get_context("fork").Process(target=work) for work in works]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise SystemExit(1)
