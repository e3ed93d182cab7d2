"""The processes that work on the adapters of a batch, and the order in which they take them.

See `loralens.verbs.workers.worker` for the processes.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from threading import Condition
from typing import final

from loralens.verbs.batches.batch_task import BatchTask, Outcome, failure, perform
from loralens.verbs.workers.worker import Worker, WorkerEnd, can_be_sent, perform_in, serve_tasks

_SERVE = "loralens.verbs.batches.batch_workers:serve_batch"


def perform_all(tasks: Sequence[BatchTask], jobs: int) -> Generator[tuple[BatchTask, Outcome], None, None]:
    """Perform tasks, and give each with its outcome when it is finished.

    A task waits for those whose targets hold its own, since a folder is written as a whole. With one job, or if a task
    is not plain data (an adapter in memory may not be), the tasks are performed in this process.

    Parameters
    ----------
    tasks : sequence of BatchTask
    jobs : int
        How many tasks are performed at once.
    """
    jobs = min(jobs, len(tasks))
    if jobs < 2 or not sys.executable or not all(map(can_be_sent, tasks)):
        for task in tasks:
            yield task, perform(task)
        return
    workers = [Worker(_SERVE, jobs) for _ in range(jobs)]
    # Closed with the caller's generator, so that no process stays behind.
    with closing(perform_in(workers, PendingTasks(tasks), len(tasks))) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, WorkerEnd):
                what = f"the process that worked on it has ended ({outcome})"
                outcome = failure(task, what, "give fewer --jobs if memory is short; else report this as a bug")
            yield task, outcome


@final
class PendingTasks:
    """Tasks that no worker has taken yet, and those that are not finished."""

    def __init__(self, tasks: Sequence[BatchTask]) -> None:
        self._waiting, self._unfinished = list(tasks), list(tasks)
        self._changed = Condition()

    def take(self, worker: int = 0) -> BatchTask | None:
        """The next task whose target lies in no target of an unfinished task; None if no task is left."""
        del worker  # all are alike
        with self._changed:
            while self._waiting:
                # A task whose target lies in no other target never waits, so at least one worker can always go on.
                if task := next((each for each in self._waiting if self._is_free(each)), None):
                    self._waiting.remove(task)
                    return task
                self._changed.wait()
            return None

    def _is_free(self, task: BatchTask) -> bool:
        if task.target is None:
            return True
        holders = {*map(str, task.target.parents)}
        return not any(other.row.target in holders for other in self._unfinished)

    def finish(self, task: BatchTask) -> None:
        """Let the tasks go on that waited for this one."""
        with self._changed:
            self._unfinished.remove(task)
            self._changed.notify_all()

    def close(self) -> None:
        """Give no more tasks."""
        with self._changed:
            self._waiting.clear()
            self._changed.notify_all()


def serve_batch() -> None:
    """Perform the tasks of a batch; the work of a process that `Worker` has started."""
    serve_tasks(lambda task, _: perform(task))
