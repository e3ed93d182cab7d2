"""``loralens train``, killed at random points and resumed until it ends, in children forked from a process that has
imported everything.

``python -m tests.cli.killed KILLS FOLDER`` takes FOLDER/cases.json, options by name, leaves each run in FOLDER/NAME,
and prints as JSON how often each was killed. A child is killed when it has done some more steps, and a little later:
in the middle of a step, of writing a line, or of writing a state.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import transformers

import loralens.training.fitted
import loralens.training.tasks
from loralens.cli.main import main

_IMPORTED = (transformers.BertForSequenceClassification, loralens.training.fitted, loralens.training.tasks)


def begun(options: list[str]) -> int:
    """The number of a child that runs the command."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        main(["train", *options], standalone_mode=False)
        code = 0
    finally:
        os._exit(code)


def ended(pid: int) -> int | None:
    """How a child ended; None while it runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def lines(log: Path) -> int:
    try:
        return log.read_bytes().count(b"\n")
    except FileNotFoundError:  # not begun, or just renamed because all is done
        return 0


def run(seed: int, kills: int, out: Path, options: list[str]) -> int:
    rng, done, log = random.Random(seed), 0, Path(f"{out}.unfinished") / "log.jsonl"
    while True:
        again = ["--resume"] if (log.parent / "run.json").exists() else []
        before = lines(log)
        pid, after = begun([*options, "-o", str(out), *again]), rng.randint(1, 4)
        code: int | None = None
        killed = False
        while code is None and not killed:
            time.sleep(0.001)
            moved = lines(log) != before if again else lines(log) > 0
            if done < kills and moved and lines(log) >= after:
                time.sleep(rng.random() * 0.01)
                killed = True
            code = ended(pid)
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
        elif code:
            raise SystemExit(f"the command ended with {code}")
        else:
            return done


def main_of(kills: int, folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    done = {name: run(seed, kills, folder / name, options) for seed, (name, options) in enumerate(cases.items())}
    print(json.dumps(done))


if __name__ == "__main__":
    main_of(int(sys.argv[1]), Path(sys.argv[2]))
