"""Makes the runs of a grid: one after the other in this process, or several at a time in processes that work for it."""

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import Any, NamedTuple, final

from loralens.core.messages import LEVELS, LOGGER, note
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.hold import check_free
from loralens.formats.records.grid_record import is_finished
from loralens.verbs.grids.grid_folder import unfinished_folder
from loralens.verbs.grids.grid_inputs import GridInputs, inputs_key
from loralens.verbs.inputs.training_options import TrainingOptions
from loralens.verbs.outputs.training.run_display import naming_runs
from loralens.verbs.outputs.training.train_adapter import train_adapter
from loralens.verbs.workers.worker import Worker, WorkerEnd, WorkerMessage, can_be_sent, perform_in, serve_tasks

_SERVE = "loralens.verbs.grids.grid_workers:serve_grid"
# Seconds in which a run that is told to stop may finish its step and save its state. A step of a large model on a CPU
# takes that long. A run that is killed after this time goes on from the state before.
GRACE = 60.0
# Threads that wait must not spin: two runs on two processors would slow each other down.
ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE"}
# Seconds to wait for the processes of a grid that was killed, which still finish a step and save the state.
PATIENCE = 60.0


class GridTask(NamedTuple):
    """A run that is to be made: its name, and its options."""

    name: str
    options: TrainingOptions


def make_runs(
    tasks: Sequence[GridTask], shared: GridInputs, *, jobs: int
) -> Generator[tuple[GridTask, LoraLensError | None], None, None]:
    """Make runs, and give each with its error, if it has one, when it is finished.

    Parameters
    ----------
    tasks : sequence of GridTask
        Those with the same inputs follow each other.
    shared : GridInputs
        Inputs that this process has read already.
    jobs : int
        How many runs are made at a time.
    """
    with _each_message_once():
        yield from _make_runs(tasks, shared, jobs=min(jobs, len(tasks)))


def _make_runs(
    tasks: Sequence[GridTask], shared: GridInputs, *, jobs: int
) -> Generator[tuple[GridTask, LoraLensError | None], None, None]:
    if jobs > 1 and not all(map(_can_be_sent, tasks)):
        note("a model or an optimiser that another process cannot receive: the runs are made one after the other")
        jobs = 1
    if jobs < 2 or not sys.executable:
        for task in tasks:
            yield task, make_run(task, shared)
        return
    # Every process has inputs of its own.
    shared.clear()
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    workers = [Worker(_SERVE, jobs, on_message=_log, environment=environment, grace=GRACE) for _ in range(jobs)]
    with closing(perform_in(workers, _PendingRuns(tasks), len(tasks))) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, WorkerEnd):
                what = f"the process that trained it has ended ({outcome})"
                outcome = OptionError(what, fix="give fewer --jobs if memory is short; else report this as a bug")
            yield task, outcome


def make_run(task: GridTask, shared: GridInputs) -> LoraLensError | None:
    """Make a run, or go on with it; returns the error of a run that has diverged or could not be made."""
    options, target = task.options, task.options.output
    assert target
    try:
        _wait_for(task, unfinished_folder(target))
        # A process of a grid that was killed may have done the last step meanwhile.
        if is_finished(target) and not options.overwrite:
            return None
        begun = unfinished_folder(target).exists() and not options.overwrite
        with naming_runs(task.name):
            train_adapter(replace(options, resume=begun), read=shared.read, keep_model=True)
    except LoraLensError as error:
        return error
    return None


def _wait_for(task: GridTask, folder: Path) -> None:
    """Wait until no process of an earlier grid, which was killed, writes the run."""
    begun, is_noted = monotonic(), False
    while folder.exists():
        try:
            check_free(folder)
        except OptionError:
            if monotonic() - begun > PATIENCE:
                raise
            if not is_noted:
                note(f"{task.name}: an earlier process saves its state")
            is_noted = True
            sleep(0.2)
        else:
            break


def _can_be_sent(task: GridTask) -> bool:
    optimiser = task.options.optimiser
    while isinstance(optimiser, partial):
        optimiser = optimiser.func
    # A function of the caller's script is pickled by name, and the other process has another main module.
    own = getattr(optimiser, "__module__", "") == "__main__"
    return not own and not isinstance(task.options.model, tuple) and can_be_sent(task)


@final
class _PendingRuns:
    """Runs that no worker has taken yet; a worker that has read inputs gets the runs that need them first."""

    def __init__(self, tasks: Sequence[GridTask]) -> None:
        self._waiting = list(tasks)
        self._lock = Lock()
        self._keys: dict[int, Any] = {}

    def take(self, worker: int) -> GridTask | None:
        """The next run for a worker."""
        with self._lock:
            if not self._waiting:
                return None
            own = self._keys.get(worker)
            keys_of_others = [key for number, key in self._keys.items() if number != worker]
            keys = [inputs_key(task.options) for task in self._waiting]
            # Runs whose inputs the worker has read come first, then those whose inputs no other worker has read.
            place = next((i for i, key in enumerate(keys) if key == own), None)
            if place is None:
                place = next((i for i, key in enumerate(keys) if key not in keys_of_others), 0)
            self._keys[worker] = keys[place]
            return self._waiting.pop(place)

    def finish(self, task: GridTask) -> None:
        """Note that a run is done, for which nothing waits here."""

    def close(self) -> None:
        """Give no more runs."""
        with self._lock:
            self._waiting.clear()


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Within the context, a message that several runs have appears once."""
    seen_texts: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        new = record.getMessage() not in seen_texts
        seen_texts.add(record.getMessage())
        return new

    LOGGER.addFilter(is_new)
    try:
        yield
    finally:
        LOGGER.removeFilter(is_new)


def _log(message: WorkerMessage) -> None:
    LOGGER.log(message.level, "%s", message.text)


# ---- In the process that works


def serve_grid() -> None:
    """Make the runs of a grid; the work of a process that `Worker` has started."""
    shared = GridInputs()
    serve_tasks(partial(_perform, shared))


def _perform(shared: GridInputs, task: GridTask, send: Callable[[WorkerMessage], None]) -> LoraLensError | None:
    with _sending_messages(send):
        try:
            return make_run(task, shared)
        except MemoryError:
            return OptionError("there is not enough memory", fix="give --jobs 1, or use a machine with more memory")
        # Whatever torch or transformers raise is an answer too, which the first process reports.
        except Exception as error:  # noqa: BLE001
            return OptionError(f"{type(error).__name__}: {error}", fix="report this as a bug")


@contextmanager
def _sending_messages(send: Callable[[WorkerMessage], None]) -> Iterator[None]:
    """Send the messages of the block to the first process."""

    class Sender(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            send(WorkerMessage(record.levelno, record.getMessage()))

    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    LOGGER.handlers, LOGGER.propagate = [Sender()], False
    LOGGER.setLevel(LEVELS["note"])
    try:
        yield
    finally:
        LOGGER.handlers, _, LOGGER.propagate = before
        LOGGER.setLevel(before[1])
