"""A whole process, timed from outside: wall and CPU seconds and peak memory, several runs, alternated between commands.

CPU seconds are those of the process and of the children that it waited for, of the user and of the system together.
Peak memory counts the pages of files that a process has mapped, as the system does. The system also counts the peak of
the process that starts another one as memory of the new one, so a small process starts the commands.
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Commands = Mapping[str, Sequence[str]]

# Imports nothing, and so takes 9 MiB. Prints what one command took.
STARTER = """
import os, sys, time
silent = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ, file_actions=silent)
_, status, usage = os.wait4(child, 0)
seconds = time.perf_counter() - start
print(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


class Sample(NamedTuple):
    """One run of one command."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Figure:
    """What one command cost: median, least and largest wall time, median CPU time, and the largest peak memory."""

    seconds: float
    least: float
    most: float
    cpu_seconds: float
    peak_mib: float
    runs: int

    def record(self) -> dict[str, float]:
        """The figures, rounded to the accuracy of the measurement."""
        return {
            "seconds": round(self.seconds, 4),
            "least": round(self.least, 4),
            "most": round(self.most, 4),
            "cpu_seconds": round(self.cpu_seconds, 4),
            "peak_mib": round(self.peak_mib, 1),
            "runs": self.runs,
        }


def once(command: Sequence[str]) -> Sample:
    """What one run took, its output thrown away.

    It begins when everything that was written before is on the disk. Else a command that waits for the disk would also
    wait for what the command before it left to be written.
    """
    if hasattr(os, "sync"):
        os.sync()
    done = subprocess.run([sys.executable, "-I", "-S", "-c", STARTER, *command], capture_output=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr.decode(errors='replace')}")
    return Sample(*map(float, done.stdout.split()))


def alternate(commands: Commands, *, runs: int, warm: Commands | None = None) -> dict[str, Figure]:
    """Each command ``runs`` times, in turn, after one run of each that does not count.

    ``warm`` has other commands for that first run, if the commands themselves take long: the same programs on small
    files.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for turn, name, command in _turns(commands, runs, warm):
        sample = once(command)
        if turn:
            samples[name].append(sample)
    return {name: _figure(taken) for name, taken in samples.items()}


def alternate_writers(
    commands: Commands, *, runs: int, warm: Commands, folder: Path, judge: Callable[[str], Mapping[str, float]]
) -> dict[str, object]:
    """The records of commands that write into the folder of their name in ``folder``, with what the judge finds there.

    These folders are empty before a run. The judge is asked after the
    last run of each command. No result stays, because results may be large.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    judged: dict[str, Mapping[str, float]] = {}
    for turn, name, command in _turns(commands, runs, warm):
        (folder / name).mkdir(parents=True)
        sample = once(command)
        if turn:
            samples[name].append(sample)
        if turn == runs:
            judged[name] = judge(name)
        shutil.rmtree(folder / name)
    return {name: {**_figure(taken).record(), **judged[name]} for name, taken in samples.items()}


def _turns(commands: Commands, runs: int, warm: Commands | None) -> Iterator[tuple[int, str, Sequence[str]]]:
    """Turn, name and command; turn 0 does not count."""
    for turn in range(runs + 1):
        for name, command in commands.items():
            yield turn, name, command if turn or warm is None else warm[name]


def read_once(*files: Path) -> None:
    """Read files, and all files of folders, so that no command waits for the disk."""
    inside = [each for file in files if file.is_dir() for each in file.rglob("*")]
    for file in (*files, *inside):
        if file.is_file():
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass


def _figure(samples: list[Sample]) -> Figure:
    seconds = [sample.seconds for sample in samples]
    return Figure(
        statistics.median(seconds),
        min(seconds),
        max(seconds),
        statistics.median(sample.cpu_seconds for sample in samples),
        max(sample.peak_mib for sample in samples),
        len(samples),
    )
