"""The result of the verb ``trajectory`` for the log of a watched run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path
from typing import Any, NamedTuple

from loralens.analysis.groups import mean_effective_rank, total_norm
from loralens.analysis.spectrum import Spectrum
from loralens.core.adapter import Adapter
from loralens.core.naming.selection import select
from loralens.errors import OptionError, place
from loralens.formats.files.json_text import finite_number
from loralens.formats.records.watch_log import LoggedLook, LoggedModule, is_watch_log, read_watch_log
from loralens.reporting.document import Report
from loralens.reporting.watched import watched_report
from loralens.tables.numbers import count, fixed, json_number, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import AdapterSource
from loralens.watching.measures import defined_mean


class WatchedLook(NamedTuple):
    """One row: a look, and the measures of the chosen modules together; NaN for a measure that is not defined.

    ``drift``, φ, its chance level and the effective rank are means over modules, the cosine is that of the whole
    update with the look before.
    """

    step: int
    frobenius: float
    spectral: float
    effective_rank: float
    drift: float
    step_length: float
    cosine: float
    phi_out: float
    phi_in: float
    chance_out: float
    chance_in: float
    gradient_b: float
    gradient_a: float
    warnings: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class WatchedResult(Tabular):
    """A watched run: its looks in order of steps. ``len`` is their number, and iteration is over them."""

    path: Path
    rows: tuple[WatchedLook, ...]
    modules: int

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[WatchedLook]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"WatchedResult({count(len(self), 'look')})"

    @property
    def warnings(self) -> list[Mapping[str, Any]]:
        """All warnings in the order of steps."""
        return [warning for row in self.rows for warning in row.warnings]

    def tables(self) -> list[Table[WatchedLook]]:
        """The looks, one a row; the columns of gradients are left out if none were watched."""
        title = f"{count(len(self), 'look')} at {count(self.modules, 'module')}, in order of steps"
        watched = any(isfinite(row.gradient_b) for row in self.rows)
        columns = [column for column in COLUMNS if watched or not str(column.key).startswith("gradient")]
        return [Table(title, columns, self.rows)]

    def listing(self) -> list[Table[WatchedLook]]:
        """The same table with all columns, so that every run has the same CSV columns."""
        return [Table("", COLUMNS, self.rows)]

    def conclusion(self) -> list[str]:
        """How far the update has come, whether it still turns, and the warnings."""
        lines = list(self.on_run)
        for warning in self.warnings:
            lines += [
                f"Step {self.step_of(warning)}: {warning['text']} ({warning['code']}).",
                f"  fix: {warning['fix']}",
            ]
        return lines if self.warnings else [*lines, "No look showed a sign that the run went wrong."]

    @property
    def on_run(self) -> list[str]:
        """How far the update has come, and whether it still turns."""
        last = self.rows[-1]
        if not last.frobenius:
            return [f"ΔW is still 0 after step {last.step}."]
        text = f"At step {last.step} ‖ΔW‖ is {number(last.frobenius)} and the effective rank "
        lines = [f"{text}{fixed('.2f')(last.effective_rank)} on average."]
        if isfinite(last.cosine):
            lines.append(f"The cosine with the look before is {fixed('.3f')(last.cosine)}.")
        return lines

    @property
    def signs(self) -> list[str]:
        """The code of every warning with its step."""
        return [f"{warning['code']} at step {self.step_of(warning)}" for warning in self.warnings]

    def step_of(self, warning: Mapping[str, Any]) -> int:
        """The step of the look that gave a warning."""
        return next(row.step for row in self.rows if any(warning is other for other in row.warnings))

    def sentences(self) -> list[str]:
        """How to read the columns."""
        compared = [row for row in self.rows if isfinite(row.chance_out)]
        if not compared:
            return []
        out, in_ = compared[-1].chance_out, compared[-1].chance_in
        return [f"φ: with the look before; chance level out {number(out)}, in {number(in_)}"]

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object; undefined numbers are null."""
        return {
            "log": str(self.path),
            "modules": self.modules,
            "looks": Table("", COLUMNS, self.rows).records(),
            "warnings": [{**warning, "step": self.step_of(warning)} for warning in self.warnings],
        }


def watch_log_of(adapters: Sequence[AdapterSource]) -> Path | None:
    """The log of a watched run, if the only adapter that a verb was given is the path of one."""
    source = adapters[0]
    path = None if len(adapters) > 1 or isinstance(source, Adapter) else Path(source)
    return path if path is not None and is_watch_log(path) else None


def watched_page(result: WatchedResult, *, command: str) -> Report:
    """The page of a watched run."""
    return watched_report(
        result.path.name,
        result.rows,
        result.tables()[0],
        sentences=result.on_run,
        warnings=[(result.step_of(warning), warning) for warning in result.warnings],
        command=command,
        record=result.record(),
    )


def read_watched(path: Path, modules: Sequence[str]) -> WatchedResult:
    """Read the log of a watched run, and add up the chosen modules.

    Raises
    ------
    FormatError
        The file is not such a log.
    OptionError
        A glob matches nothing, or the log has no looks.
    """
    looks = read_watch_log(path)
    with place(path):
        if not looks:
            raise OptionError("holds no looks yet", fix="wait for the first look of the run")
        names = set(select(dict.fromkeys(name for look in looks for name in look.modules), modules))
    rows = tuple(_row(look, {name: look.modules[name] for name in look.modules if name in names}) for look in looks)
    return WatchedResult(path, rows, len(names))


def _row(look: LoggedLook, modules: Mapping[str, LoggedModule]) -> WatchedLook:
    spectra = [Spectrum(module.s, module.shape, module.rank) for module in modules.values()]
    norm = total_norm(spectra)
    turns = [
        (spectrum.frobenius, turn)
        for spectrum, module in zip(spectra, modules.values(), strict=True)
        if isinstance(turn := module.measures.get("previous"), dict)
    ]
    lengths = [_at(turn, "length") for _, turn in turns]
    return WatchedLook(
        step=look.step,
        frobenius=norm,
        spectral=max((spectrum.spectral for spectrum in spectra), default=0.0),
        effective_rank=mean_effective_rank(spectra),
        drift=defined_mean(_at(module.measures, "drift") for module in modules.values()),
        step_length=sum(x * x for x in lengths) ** 0.5 if lengths else nan,
        cosine=_cosine(turns, norm),
        phi_out=defined_mean(_at(turn, "phi", "out") for _, turn in turns),
        phi_in=defined_mean(_at(turn, "phi", "in") for _, turn in turns),
        chance_out=defined_mean(_at(turn, "chance", "out") for _, turn in turns),
        chance_in=defined_mean(_at(turn, "chance", "in") for _, turn in turns),
        gradient_b=_length(_at(module.measures, "gradients", "B", "norm") for module in modules.values()),
        gradient_a=_length(_at(module.measures, "gradients", "A", "norm") for module in modules.values()),
        warnings=look.warnings,
    )


def _cosine(turns: Sequence[tuple[float, Mapping[str, Any]]], norm: float) -> float:
    """The cosine of the whole update with that of the look before, from those of the modules."""
    inner = squares = 0.0
    for own, turn in turns:
        before = _at(turn, "norm")
        inner += _at(turn, "cosine") * before * own
        squares += before**2
    return inner / (norm * squares**0.5) if norm and squares else nan


def _at(measures: Mapping[str, Any], *keys: str) -> float:
    """The number at nested keys of a log; NaN if there is none."""
    value: Any = measures
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    finite = finite_number(value)
    return nan if finite is None else finite


def _length(values: Iterator[float]) -> float:
    """√Σx² of the numbers that are defined; NaN if none is."""
    defined = [value for value in values if isfinite(value)]
    return sum(value**2 for value in defined) ** 0.5 if defined else nan


def _column(key: str, title: str, text: Any, priority: int, about: str) -> Column[WatchedLook]:
    return Column(
        key, lambda row: json_number(getattr(row, key)), title, _or_blank(text), priority=priority, about=about
    )


def _or_blank(text: Any) -> Any:
    """The text of a number; blank if it is not defined, as at the first look."""
    return lambda value: "" if value is None else text(value)


COLUMNS: tuple[Column[WatchedLook], ...] = (
    Column("step", lambda row: row.step, "step", fixed("d"), priority=ALWAYS),
    _column("frobenius", "‖ΔW‖F", number, ALWAYS, "length of ΔW"),
    _column("spectral", "σ₁", number, 3, "largest singular value"),
    _column("effective_rank", "effective", fixed(".2f"), 7, "effective rank, mean over modules"),
    _column("step_length", "moved", number, 4, "‖ΔW − ΔW of the row above‖"),
    _column("cosine", "cos previous", fixed(".3f"), 6, "cosine with the row above"),
    _column("phi_out", "φ out", fixed(".3f"), 5, "share of the out side's directions that the row above has too"),
    _column("phi_in", "φ in", fixed(".3f"), 4, "the same for the in side"),
    _column("drift", "drift of A", fixed(".2%"), 5, "‖A − A₀‖/‖A₀‖, mean over modules"),
    Column("chance_out", lambda row: json_number(row.chance_out)),
    Column("chance_in", lambda row: json_number(row.chance_in)),
    _column("gradient_b", "‖∂B‖", number, 2, "norm of the gradient of B"),
    _column("gradient_a", "‖∂A‖", number, 2, "norm of the gradient of A"),
    Column(
        "warnings",
        lambda row: " ".join(str(warning["code"]) for warning in row.warnings),
        "signs",
        align="left",
        priority=8,
    ),
)
