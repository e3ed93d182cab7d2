"""The result of a grid: its runs, with their settings and results."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralens.tables.numbers import count, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.grids.grid_folder import RUNS, GridRun
from loralens.verbs.grids.spelling import value_text


@dataclass(frozen=True, slots=True)
class GridResult(Tabular):
    """The runs of a grid, where the last axis varies fastest; the result is a sequence of them.

    ``runs.csv`` in the folder has them too, beside those of other grids in the same folder.

    Attributes
    ----------
    output : Path
        The folder of the grid.
    runs : sequence of GridRun
    axes : tuple of str
        The options that differ between the runs.
    trained : int
        The number of runs that were made now.
    dry : bool
        Whether nothing was trained because only the plan was asked for.
    main : bool
        Whether this process reports; a grid has one.
    """

    output: Path
    runs: Sequence[GridRun]
    axes: tuple[str, ...]
    trained: int
    dry: bool = False
    main: bool = True

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> GridRun:
        return self.runs[index]

    def __repr__(self) -> str:
        return f"GridResult({str(self.output)!r}, {count(len(self.runs), 'run')})"

    def where(self, **settings: Any) -> list[GridRun]:
        """The runs that have these settings: ``result.where(rank=8, seed=0)``."""
        values = {name: _comparable(value) for name, value in settings.items()}
        return [
            run
            for run in self.runs
            if all(_comparable(run.settings.get(name)) == value for name, value in values.items())
        ]

    def tables(self) -> list[Table[GridRun]]:
        """The runs with the values of the axes and the main results."""
        axes = [Column(name, _setting(name), name.replace("_", " "), value_text, priority=ALWAYS) for name in self.axes]
        return [Table("runs", (*axes, *self._results(), STATUS), self.runs)]

    def _results(self) -> list[Column[GridRun]]:
        keys = list(dict.fromkeys(key for run in self.runs for key in run.results))
        shown = [key for key in keys if key in ("trainable", "loss_tail") or key.startswith("eval_")]
        return [
            Column(key, _result(key), key.replace("_", " "), _number, priority=2 if key.startswith("eval_") else 1)
            for key in shown
        ]

    def listing(self) -> list[Table[GridRun]]:
        """The runs with all settings and results: the content of ``runs.csv``."""
        settings = dict.fromkeys(key for run in self.runs for key in run.settings)
        results = dict.fromkeys(key for run in self.runs for key in run.results)
        columns: list[Column[GridRun]] = [
            Column("run", lambda run: run.name),
            Column("status", lambda run: run.status),
        ]
        columns += [Column(key, _setting(key)) for key in settings]
        columns += [Column(key, _result(key)) for key in results]
        return [Table("runs", (*columns, Column("message", lambda run: run.message)), self.runs)]

    def conclusion(self) -> list[str]:
        """How many runs there are, and how many of them were made now."""
        statuses = Counter(run.status for run in self.runs)
        if self.dry:
            missing = statuses["missing"] + statuses["unfinished"]
            return [f"{self.output}: {count(len(self.runs), 'run')}, of which {missing} would be trained."]
        before = statuses["done"] + statuses["diverged"] - self.trained
        earlier = f", {before} of them before" if before else ""
        lines = [f"{self.output}: {count(statuses['done'], 'run')} done{earlier}; {RUNS} has their results."]
        if statuses["diverged"]:
            lines.append(f"{count(statuses['diverged'], 'run')} diverged: the loss is no longer finite.")
        pending = statuses["missing"] + statuses["unfinished"]
        if pending:
            lines.append(
                f"{count(pending, 'run')} of an earlier grid in this folder {'is' if pending == 1 else 'are'} not done."
            )
        return lines

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "target": str(self.output),
            "axes": list(self.axes),
            "trained": self.trained,
            "runs": [
                {
                    "run": run.name,
                    "status": run.status,
                    "settings": dict(run.settings),
                    "results": dict(run.results),
                    "timings": dict(run.timings),
                    "message": run.message,
                }
                for run in self.runs
            ],
        }


def _comparable(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float) else value_text(value)


def _setting(name: str) -> Any:
    return lambda run: run.settings.get(name)


def _result(name: str) -> Any:
    return lambda run: run.results.get(name)


def _number(value: float | None) -> str:
    return f"{value:,}" if isinstance(value, int) else number(value)


STATUS: Column[GridRun] = Column("status", lambda run: run.status, "status", align="left", priority=ALWAYS)
