"""Processes of Python that have imported torch, transformers and PEFT before they begin.

To import them takes five seconds, which is more than most of what is run here. One process, which works for all tests
of a process of pytest, imports them and then only forks: it has one thread and computes nothing. A child runs a module
as ``python -m`` does. Every other process of Python that a child starts by `subprocess` is forked in its turn, so that
those that torchrun or a grid starts are warm too. What is about the start of a process itself needs a fresh one.

``python -m tests.warm`` is the process that forks. It takes requests as lines of JSON, and answers each with a line.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds after which a child that hangs is ended
# One thread each: the processes of a test would take the processors from each other. tokenizers warns of forks.
OWN = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


class Ended(NamedTuple):
    """How a process has ended, and what it has written."""

    code: int
    stdout: str
    stderr: str


class WarmProcess:
    """A module that runs, with words as its arguments."""

    def __init__(self, module: str, *words: object) -> None:
        self._outputs = TemporaryDirectory()
        self.pid: int = _ask("start", self._outputs.name, module, *map(str, words))
        self._code: int | None = None

    def poll(self) -> int | None:
        """How it has ended; None while it runs."""
        if self._code is None:
            self._code = _ask("ended", self.pid, os.WNOHANG)
        return self._code

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Ended:
        if self._code is None:
            self._code = _ask("ended", self.pid, 0)
        assert self._code is not None
        with self._outputs as folder:
            said = [(Path(folder) / name).read_text(encoding="utf-8", errors="replace") for name in ("1", "2")]
        return Ended(self._code, *said)


def run_warm(module: str, *words: object) -> Ended:
    """Run a module to its end."""
    return WarmProcess(module, *words).wait()


def in_children(*works: Callable[[], object]) -> None:
    """Do each of the works in a child of this process, all at once, and end this process unless all have succeeded."""
    children = [_forked(work) for work in works]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if any(codes):
        raise SystemExit(1)


def _ask(*request: object) -> Any:
    process = _forking_process()
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@cache
def _forking_process() -> "subprocess.Popen[str]":
    path = os.pathsep.join([str(ROOT), *sys.path])
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warm"], env=os.environ | OWN | {"PYTHONPATH": path}, cwd=ROOT,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(process.communicate)  # which closes its input, and so ends it
    return process


# ---- In the process that forks, and in its children


def _forked(work: Callable[[], object]) -> int:
    """The number of a child that does the work and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a child must not go on as its parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class WarmPython(subprocess.Popen[Any]):
    """`subprocess.Popen`, which forks this process where the command is this Python."""

    def _execute_child(self, *given: Any) -> None:
        """Start the process: what the standard library's class calls for it."""
        execute = super()._execute_child  # type: ignore[misc]
        how = signature(execute).bind(*given).arguments
        command = how["args"]
        if isinstance(command, str) or command[0] != sys.executable:
            execute(*given)
            return
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        pipes = {name: how[name] for name in names}
        inside = (pipes["p2cread"], pipes["c2pwrite"], pipes["errwrite"])
        environment, session = how["env"], how["start_new_session"]
        self.pid = _forked(lambda: _run_command(command, environment, inside, new_session=session))
        self._child_created = True
        self._close_pipe_fds(*pipes.values())  # type: ignore[attr-defined]


def _run_command(
    command: list[str], environment: dict[str, str] | None, files: tuple[int, ...], *, new_session: bool
) -> None:
    """Be the process of a command in this child: ``python [-u] [-P] -m MODULE …`` or ``python … -c CODE …``."""
    if new_session:
        os.setsid()
    _use_files(files)
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, usual)
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    _, *words = command
    while words[0] in ("-u", "-P"):
        words.pop(0)
    kind, what, *rest = words
    if kind == "-m":
        _run_module(what, rest)
    else:
        assert kind == "-c"
        sys.argv = ["-c", *rest]
        exec(what, {"__name__": "__main__"})


def _run_module(module: str, words: list[str]) -> None:
    signal.alarm(TIMEOUT)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _use_files(files: tuple[int, ...]) -> None:
    """Make files the standard ones, where they are not -1, and close all others."""
    for number, file in enumerate(files):
        if file >= 0:
            os.dup2(file, number)
    os.closerange(3, 4096)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one may have read ahead


def _start(folder: str, module: str, *words: str) -> int:
    def work() -> None:
        outputs = [os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT) for number in (1, 2)]
        _use_files((os.open(os.devnull, os.O_RDONLY), *outputs))
        _run_module(module, list(words))

    return _forked(work)


def _ended(pid: int, flags: int) -> int | None:
    done, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if done else None


def _import_everything() -> None:
    import peft
    import torch.distributed.fsdp
    import transformers

    import loralens.cli.messages
    import loralens.training.fitting
    import loralens.training.tasks
    import loralens.verbs.runs.grid
    import loralens.watching

    # transformers imports a model when its class is asked for.
    names = "AutoTokenizer", "BertForMaskedLM", "BertForSequenceClassification", "LlamaForCausalLM"
    assert all(getattr(transformers, name) for name in names)
    assert all((peft, torch, loralens))


def _answer_requests() -> None:
    calls: dict[str, Callable[..., Any]] = {"start": _start, "ended": _ended}
    for line in sys.stdin:
        name, *given = json.loads(line)
        print(json.dumps(calls[name](*given)), flush=True)


def _main() -> None:
    subprocess.Popen = WarmPython  # type: ignore[misc]  # before torch imports the name
    _import_everything()
    threads = Path("/proc/self/task")
    assert not threads.exists() or len(list(threads.iterdir())) == 1, "a fork takes only one of several threads along"
    # A search for garbage in a child would touch, and so copy, every object.
    gc.collect()
    gc.freeze()
    _answer_requests()


if __name__ == "__main__":
    _main()
