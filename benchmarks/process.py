"""A whole process, timed from outside: wall seconds and peak memory, several runs, alternated between commands."""

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """What one command cost: median, least and largest wall time, and the largest peak memory."""

    seconds: float
    least: float
    most: float
    peak_mib: float
    runs: int

    def record(self) -> dict[str, float]:
        """The figures, rounded to the accuracy of the measurement."""
        return {
            "seconds": round(self.seconds, 4),
            "least": round(self.least, 4),
            "most": round(self.most, 4),
            "peak_mib": round(self.peak_mib, 1),
            "runs": self.runs,
        }


def once(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of one run, its output thrown away.

    It begins when everything that was written before is on the disk. Else a command that waits for the disk would also
    wait for what the command before it left to be written.
    """
    if hasattr(os, "sync"):
        os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process.stderr:
        complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{complaint.decode(errors='replace')}")
    return seconds, usage.ru_maxrss / 1024


def alternate(commands: Mapping[str, Sequence[str]], *, runs: int) -> dict[str, Figure]:
    """Each command ``runs`` times, in turn, after one run of each that does not count."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            sample = once(command)
            if turn:
                samples[name].append(sample)
    return {name: _figure(taken) for name, taken in samples.items()}


def _figure(samples: list[tuple[float, float]]) -> Figure:
    seconds = [s for s, _ in samples]
    return Figure(statistics.median(seconds), min(seconds), max(seconds), max(m for _, m in samples), len(samples))
