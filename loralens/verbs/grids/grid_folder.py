"""The folder of a grid: which runs belong to it, which of them are done, and the tables of their results.

==================== ===============================================================================================
``grid.json``        every run that the folder has been asked for, in order: its settings, and what failed
``NAME/``            the finished run of that name, as ``loralens train`` writes it
``NAME.unfinished/`` a run that was interrupted or has diverged
``runs.csv``         a row for each run: settings and results, the same bytes however often the grid was interrupted
``timings.csv``      what depends on the machine and its load: seconds, and tokens or texts per second
==================== ===============================================================================================
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from io import StringIO
from os import PathLike
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, final

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.training import record_of
from loralens.errors import MismatchError, OptionError, place
from loralens.formats import load
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.disk import disk_errors
from loralens.formats.files.hold import Hold
from loralens.formats.files.location import NAMES
from loralens.formats.files.regular import read_whole
from loralens.formats.models.base_digest import base_digest
from loralens.formats.models.model_location import model_path
from loralens.formats.records.grid_record import RECORD, VERSION, is_finished, read_grid
from loralens.formats.records.training import LOG, RUN
from loralens.formats.records.training_log import history, log_entries
from loralens.tables.render import no_formula
from loralens.verbs.grids.grid_checks import Counts
from loralens.verbs.grids.spelling import value_text
from loralens.verbs.inputs.adapters import load_source
from loralens.verbs.inputs.corpus.texts import text_label
from loralens.verbs.inputs.model_identity import digest_of_model, model_name
from loralens.verbs.inputs.training_options import TrainingOptions

RUNS, TIMINGS = "runs.csv", "timings.csv"
# Options that change no number of a result, or none on one machine. They do not count as settings of a run.
FREE = ("output", "device", "threads", "save_every", "resume", "more_steps", "overwrite", "dry_run", "shard")
DIGITS = 12  # of a digest of texts, 48 bits
TAIL = 0.1  # the share of the steps over which `loss_tail` is the mean

Status = Literal["done", "diverged", "unfinished", "missing"]


@final
@dataclass(frozen=True, slots=True)
class GridRun:
    """One run of a grid.

    Attributes
    ----------
    name : str
        The values of the axes; also the name of its folder.
    output : Path
        Its folder, which exists if it is done.
    settings : mapping of str to value
        Every option that decides about its numbers, as JSON holds them.
    status : str
        ``done``, ``diverged``, ``unfinished`` or ``missing``.
    results : mapping of str to number
        The results, by the names of the columns of ``runs.csv``; empty unless it is done or has diverged.
    timings : mapping of str to number
        Seconds of all steps, and tokens (or texts) per second.
    message : str
        Why it has diverged.
    """

    name: str
    output: Path
    settings: Mapping[str, Any]
    status: Status
    results: Mapping[str, Any]
    timings: Mapping[str, float]
    message: str = ""

    @property
    def adapter(self) -> Adapter:
        """The adapter of the run, read from its folder."""
        return load(self.output)

    @property
    def log(self) -> list[dict[str, Any]]:
        """The lines of its log: every step and evaluation."""
        folder = self.output if self.output.exists() else unfinished_folder(self.output)
        return log_entries(folder / LOG)


@final
class GridFolder:
    """The folder of a grid, on disk.

    Parameters
    ----------
    folder : Path
        The folder, which need not exist.
    hold : bool
        Whether to hold it until `release`, so that no second grid writes there.

    Raises
    ------
    FormatError
        Its record is damaged.
    OptionError
        Another process holds it; or it has files of these names that no grid has written.
    """

    def __init__(self, folder: Path, *, hold: bool) -> None:
        self.folder = folder
        self._hold = Hold()
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"{folder}: is a file, but a grid is a folder", fix="choose another folder")
        # The folder is held before its record is read, so that nothing that another process adds to it is lost.
        if hold and folder.exists():
            self._hold.take(folder)
        self._done: dict[str, GridRun] = {}
        self.threads: int | None = None
        self.settings: dict[str, dict[str, Any]] = {}
        self.counts: dict[str, Counts] = {}
        self.failures: dict[str, str] = {}
        self.replaced: set[str] = set()
        self._has_record = (folder / RECORD).exists()
        if self._has_record:
            self._read()
        elif foreign := next((name for name in (RUNS, TIMINGS, RUN, NAMES[0]) if (folder / name).exists()), None):
            what = f"{folder}: holds {foreign}, which no grid has written there"
            raise OptionError(what, fix="choose another folder")

    def _read(self) -> None:
        record = read_grid(self.folder)
        runs, failed, counts = record["runs"], record["failed"], record["parameters"]
        self.settings = dict(runs)
        self.counts = {
            name: Counts(*pair)
            for name, pair in counts.items()
            if isinstance(pair, list) and len(pair) == 2 and all(isinstance(count, int) for count in pair)
        }
        self.failures = {str(name): str(message) for name, message in failed.items()}
        self.replaced = {str(name) for name in record.get("replaced") or ()}
        threads = record.get("threads")
        self.threads = threads if isinstance(threads, int) and threads > 0 else None

    def begin(self) -> None:
        """Make the folder, if it is not there, and write the record.

        Raises
        ------
        OptionError
            Another process has begun a grid there meanwhile.
        """
        with place(self.folder), disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._hold.take(self.folder)
        if not self._has_record and (self.folder / RECORD).exists():
            raise OptionError(f"{self.folder}: another grid was begun there meanwhile", fix="give the command again")
        self.write_record()
        self._has_record = True

    def release(self) -> None:
        """Let other processes write there."""
        self._hold.release()

    def add(self, name: str, settings: Mapping[str, Any], *, overwrite: bool) -> None:
        """Add a run, unless it is there already. With ``overwrite``, one with other settings is to be replaced.

        Raises
        ------
        MismatchError
            There is a run of this name with other settings, and ``overwrite`` is false.
        """
        recorded = self.settings.get(name)
        new = json.loads(json.dumps(settings))
        if recorded is None or recorded == new:
            self.settings.setdefault(name, new)
            return
        if not overwrite:
            keys = [key for key in {**recorded, **new} if recorded.get(key) != new.get(key)]
            differences = "; ".join(f"{key} is {recorded.get(key)!r} there, {new.get(key)!r} here" for key in keys[:3])
            fix = "choose another folder, give the option as an axis, or replace these runs: --overwrite"
            raise MismatchError(f"{self.folder}: {name} was made with other settings: {differences}", fix=fix)
        self.settings[name] = new
        self.failures.pop(name, None)
        # The record names it until the new run is done. After a kill the old run would otherwise pass for one with the
        # new settings.
        self.replaced.add(name)

    def finish(self, name: str, failure: str = "") -> None:
        """Record that a run is done, or that it has diverged, so that it is not tried again."""
        if failure:
            self.failures[name] = failure
        if failure or name in self.replaced:
            self.replaced.discard(name)
            self.write_record()

    def write_record(self) -> None:
        """Write the record."""
        record = {
            "version": VERSION,
            "threads": self.threads,
            "runs": self.settings,
            "parameters": self.counts,
            "failed": self.failures,
            "replaced": sorted(self.replaced),
        }
        self._write(RECORD, json.dumps(record, indent=1) + "\n")

    def status(self, name: str) -> Status:
        """Whether a run is done, has diverged, was interrupted, or has not begun."""
        target = self.folder / name
        if name in self.replaced:
            return "missing"
        if is_finished(target):
            return "done"
        if name in self.failures:
            return "diverged"
        return "unfinished" if (unfinished_folder(target) / RUN).exists() else "missing"

    def runs(self) -> list[GridRun]:
        """All runs, in the order in which they were first asked for."""
        runs = [self._done.get(name) or self._run(name, settings) for name, settings in self.settings.items()]
        # What is finished stays as it is, and the files of many runs take long to read.
        self._done = {run.name: run for run in runs if run.status in ("done", "diverged")}
        return runs

    def _run(self, name: str, settings: Mapping[str, Any]) -> GridRun:
        status, target = self.status(name), self.folder / name
        results: Mapping[str, Any] = {}
        timings: Mapping[str, float] = {}
        if status in ("done", "diverged"):
            folder = target if status == "done" else unfinished_folder(target)
            counts = self.counts.get(name)
            results = (counts._asdict() if counts else {}) | _results(folder, done=status == "done")
            timings = _timings(log_entries(folder / LOG))
        return GridRun(name, target, settings, status, results, timings, self.failures.get(name, ""))

    def write_tables(self) -> list[GridRun]:
        """Write ``runs.csv`` and ``timings.csv``; returns the runs."""
        runs = self.runs()
        self._write(RUNS, runs_csv(runs))
        self._write(TIMINGS, timings_csv(runs))
        return runs

    def _write(self, name: str, text: str) -> None:
        with place(self.folder), disk_errors(), atomic_file(self.folder / name) as file:
            file.write(text.encode())


def unfinished_folder(target: Path) -> Path:
    """The folder of a run that is not done."""
    return target.with_name(f"{target.name}.unfinished")


@final
class SettingsReader:
    """Describes runs by their settings. A file that several runs read is hashed once."""

    def __init__(self) -> None:
        self._digests: dict[tuple[str, str], str] = {}

    def read(self, options: TrainingOptions) -> dict[str, Any]:
        """Every option that decides about the numbers of a run, as JSON holds it.

        The files of the model and of the texts are described by digests, so that other numbers under the same name are
        noticed.
        """
        settings: dict[str, Any] = {}
        for name in options.__dataclass_fields__:
            if name not in FREE:
                value = getattr(options, name)
                plain = value is None or isinstance(value, bool | int | float)
                settings[name] = value if plain else value_text(value)
        settings["model"] = model_name(options.model)
        settings["base"] = self._digest("model", options.model, lambda: _base_of(options))
        for name in ("data", "eval"):
            if (source := getattr(options, name)) is not None:
                # The name alone, as in the record of the adapter, since a path means nothing on another machine.
                settings[name] = Path(text_label(source)).name
                settings[f"{name}_digest"] = self._digest("texts", source, partial(_digest_of_texts, source))
        for name in ("start_from", "first_a"):
            if (source := getattr(options, name)) is not None:
                settings[name] = self._digest("adapter", source, partial(_digest_of_adapter, source))
        return settings

    def _digest(self, kind: str, source: Any, make: Callable[[], str]) -> str:
        key = kind, str(source) if isinstance(source, str | PathLike) else str(id(source))
        if key not in self._digests:
            self._digests[key] = make()
        return self._digests[key]


def _base_of(options: TrainingOptions) -> str:
    model = options.model
    return digest_of_model(model[0]) if isinstance(model, tuple) else base_digest(model_path(Path(model)))


def _digest_of_adapter(source: Any) -> str:
    return fingerprint(load_source(source, {}, strict=False))[:DIGITS]


def _digest_of_texts(source: Any) -> str:
    """A digest of texts or of their file; empty for the name of a corpus and for a folder."""
    if not isinstance(source, str | PathLike):
        return sha256(repr(list(source)).encode(errors="replace")).hexdigest()[:DIGITS]
    if not Path(source).is_file():
        return ""
    return sha256(read_whole(Path(source))).hexdigest()[:DIGITS]


# ---- The results of a run, from its files


def _results(folder: Path, *, done: bool) -> dict[str, Any]:
    """The results of a run by column; those of a diverged run are those before its end."""
    log = history(folder / LOG)
    record: Mapping[str, Any] = {}
    modules: int | None = None
    if done:
        with place(folder):
            adapter = load(folder)
        record, modules = record_of(adapter) or {}, len(adapter)
    last = max(log.losses, default=0)
    steps = record.get("steps_done", last)
    best = record.get("best_step")
    written = steps if best is None else best
    tail = [
        loss for step, loss in log.losses.items() if step > steps - max(1, round(TAIL * steps)) and loss is not None
    ]
    results = {
        "steps_done": steps,
        "best_step": best,
        "modules": modules,
        "loss": log.losses.get(written),
        "loss_tail": fmean(tail) if tail else None,
    }
    first = next((measures for step, measures in log.evaluations if step == 0), {})
    final = next((measures for step, measures in reversed(log.evaluations) if step == written), {})
    results |= {f"before_{name}": value for name, value in first.items()}
    results |= {f"eval_{name}": value for name, value in final.items()}
    return results


def _timings(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    steps = [entry for entry in entries if isinstance(entry.get("seconds"), int | float)]
    seconds, size = sum(entry["seconds"] for entry in steps), sum(entry.get("size") or 0 for entry in steps)
    return {"seconds": round(seconds, 3), "size": size, "size_per_second": round(size / seconds, 1) if seconds else 0.0}


# ---- The tables


def runs_csv(runs: Sequence[GridRun]) -> str:
    """All runs as CSV: name, status, settings, results, and why a run has diverged."""
    return _csv([{"run": r.name, "status": r.status, **r.settings, **r.results, "message": r.message} for r in runs])


def timings_csv(runs: Sequence[GridRun]) -> str:
    """The timings of all runs that have any, as CSV."""
    return _csv([{"run": run.name, **run.timings} for run in runs if run.timings])


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    # The message comes last, although rows without results have it before the results of later rows.
    columns.sort(key=lambda column: column == "message")
    stream = StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({column: no_formula(cell) for column, cell in row.items()} for row in rows)
    return stream.getvalue()
