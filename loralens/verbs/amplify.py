"""The verb ``amplify``: measures what ΔW amplifies of W, beside what random and the best directions would give."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, cpu_count
from statistics import median
from typing import Any, NamedTuple, Unpack

from loralens.analysis.base.amplification import FAR, Amplification, KeptRank, count_far, measure_amplification
from loralens.analysis.base.weight_norms import weight_steps
from loralens.core.carried import magnitudes
from loralens.core.messages import note, warn
from loralens.core.names import kind, natural_key, select, some
from loralens.core.progress import progress
from loralens.errors import OptionError, place
from loralens.linalg.device import Device
from loralens.tables.numbers import fixed, json_number, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import AdapterSource, Reading, labels, read_adapter
from loralens.verbs.inputs.bases import base_weights
from loralens.verbs.inputs.choices import check_at_least


class KeptDirections(NamedTuple):
    """One row: a module, and its leading directions at one rank (Table 7 of the LoRA paper)."""

    name: str
    module: Amplification
    directions: KeptRank


class KindAmplification(NamedTuple):
    """One row: the modules of a kind at their largest rank."""

    kind: str
    rows: Sequence[KeptRank]


@dataclass(frozen=True, slots=True)
class AmplifyResult(Tabular, Mapping[str, Amplification]):
    """What an adapter amplifies of its base: a mapping from module names to `Amplification`.

    Attributes
    ----------
    path : str
        What the adapter is called: its path, if it was read.
    modules : mapping of str to Amplification
        In natural order.
    phi_rank : int
        Largest i and j of the φ(i, j) that are shown.
    exact : bool
        Whether W was decomposed exactly.
    """

    path: str
    base: str
    modules: Mapping[str, Amplification]
    phi_rank: int
    device: str
    exact: bool

    def __getitem__(self, name: str) -> Amplification:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        return f"AmplifyResult({self.path!r} on {self.base!r}, {len(self)} modules)"

    @property
    def rows(self) -> list[KeptDirections]:
        """Every module at every rank that was asked for."""
        return [KeptDirections(name, module, directions) for name, module in self.items() for directions in module.rows]

    @property
    def measured(self) -> list[KeptDirections]:
        """The modules whose ΔW and W are not 0, at their largest rank."""
        largest = [KeptDirections(name, module, module.rows[-1]) for name, module in self.items()]
        return [row for row in largest if row.directions.rank and row.module.weight_norm]

    def tables(self) -> list[Table[Any]]:
        """The modules, and medians of their kinds."""
        top = any(module.top for module in self.values())
        what = f"‖UᵀWV‖F with U, V of ΔW, {'of W, ' if top else ''}random"
        title = f"{self.path} on {self.base}: {len(self)} modules; {what}"
        columns = [column for column in COLUMNS if top or column.title != "W"]
        kinds: dict[str, list[KeptRank]] = {}
        for row in self.measured:
            kinds.setdefault(kind(row.name), []).append(row.directions)
        ordered = sorted(kinds.items(), key=lambda item: natural_key(item[0]))
        medians = [KindAmplification(name, rows) for name, rows in ordered]
        return [Table(title, columns, self.rows), Table("medians by kind", KIND_COLUMNS, medians)]

    def sentences(self) -> list[str]:
        """What the tables say, in words."""
        rows = [row.directions for row in self.measured]
        if not rows:
            return ["no module has both a ΔW and a W that are not 0"]
        spans = {
            "amplification": [row.amplification for row in rows],
            "‖ΔW‖/‖W‖": [row.directions.delta_norm / row.module.weight_norm for row in self.measured],
            "excess over random": [row.excess for row in rows],
        }
        far, expected = count_far(rows)
        beyond = f"{far} of {len(rows)} modules are beyond {FAR:g} standard deviations of random directions"
        sentences = [
            "; ".join(f"{what} {_span(values)}" for what, values in spans.items()),
            f"{beyond}, where chance gives {expected:.2g}",
        ]
        # With at most a tenth of the modules beyond chance, the factor says nothing about directions.
        if 10 * far <= len(rows):
            sentences.append("the factor tells how long ΔW is beside W, not that it found particular directions of W")
        # Only a randomised SVD has an error to report; a dense one says 0.
        worst = max((row.top_error / row.top_norm for row in rows if row.top_norm > 0), default=0.0)
        if worst > 0:
            error = f"its relative error at most {worst:.1g}"
            sentences.append(f"the column of W is from a randomised SVD, {error}")
        return sentences

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object, with curves, directions and φ; what has no value is null."""
        table = Table("", (*COLUMNS, *self._matrices()), self.rows)
        records = [table.record(row) | _top_record(row) for row in self.rows]
        return {
            "adapter": self.path,
            "base": self.base,
            "device": self.device,
            "exact": self.exact,
            "modules": records,
        }

    def _matrices(self) -> tuple[Column[KeptDirections], ...]:
        """What only JSON has of every row."""
        return (
            Column("curve", lambda row: [_measures_record(kept) for kept in row.module.curve[: row.directions.rank]]),
            Column("directions", _direction_records),
            Column("phi", lambda row: _phi_record(row, self.phi_rank)),
        )


def amplify(
    adapter: AdapterSource,
    *,
    base: str | PathLike[str],
    rank: int | Sequence[int] = (),
    no_top: bool = False,
    directions: int | None = None,
    exact: bool = False,
    phi_rank: int = 16,
    device: str = "cpu",
    seed: int = 0,
    modules: Sequence[str] = (),
    **reading: Unpack[Reading],
) -> AmplifyResult:
    """Show what ΔW amplifies of W: ‖ΔW‖/‖UᵀWV‖, with U, V the singular directions of ΔW (Table 7 of the LoRA paper).

    The factor is shown beside three comparisons: the share of W that random directions would catch, the excess of ΔW
    over them with its z-score, and the largest share that any directions could catch. The weights of the base are read
    one at a time.

    Parameters
    ----------
    adapter : path or Adapter
    base : path
        The base model: a folder, a safetensors file, or a Hub id in the local cache.
    rank : int or sequence of int
        Look at this many leading directions of ΔW, with a row for each number; by default all.
    no_top : bool
        Leave out the comparison with the leading directions of W, which takes long.
    directions : int, optional
        The number of leading directions of W to compare with; by default as many as of ΔW.
    exact : bool
        Take a dense SVD of every W: minutes and more memory for a large weight.
    phi_rank : int
        The largest i and j of φ(i, j) between the directions of ΔW and of W.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``.
    seed : int
        Seed of the random numbers for the sketch of W and the starting vectors.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    **reading : Reading
        How the file is read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        A glob that matches nothing, a rank that no module has, no such device; ``directions`` with ``no_top``.
    FormatError
        A file that is no adapter, or no model; numbers that are NaN or Inf.
    MismatchError
        A module that has no weight in the base.
    """
    if no_top and directions:
        raise OptionError(
            "no_top leaves out the directions of W, and directions says how many of them", fix="give one of the two"
        )
    for name, value, least in (("directions", directions, 1), ("phi_rank", phi_rank, 1), ("seed", seed, 0)):
        check_at_least(name, value, least)
    linalg_device = Device.of(device, threads=cpu_count() or 1)  # what is wrong with it is said before the work
    (label,) = labels([adapter])
    loaded = read_adapter(adapter, reading, base=base, label=label)
    with place(label):
        names = select(loaded, modules)
    weights = base_weights(base, {name: loaded[name] for name in names})
    if weights.match.edit:
        note(f"{base}: {weights.match}")
    bent = magnitudes(loaded).keys() & names
    if bent:
        warn(f"{label}: {len(bent)} modules are DoRA: scale·B·A alone is measured, without their magnitudes")
    amount = weight_steps(weights.modules.values(), top=not no_top)
    with place(label), progress("reading the base", amount) as step:
        measured = measure_amplification(
            loaded,
            weights.modules,
            ranks=list(rank) if isinstance(rank, Iterable) else [rank],
            top=not no_top,
            directions=directions or 0,
            exact=exact,
            device=linalg_device,
            seed=seed,
            modules=modules,
            step=step,
        )
    zero = [name for name, module in measured.items() if not module.s.size]
    if zero:
        note(f"{label}: {len(zero)} of {len(measured)} modules do nothing (ΔW = 0): {some(zero)}")
    return AmplifyResult(label, str(base), measured, phi_rank, device, exact)


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return number(low) + (f" to {number(high)}" if high > low else "")


def _measures_record(directions: KeptRank) -> dict[str, int | float | None]:
    return {key: value if isinstance(value, int) else json_number(value) for key, value in directions._asdict().items()}


def _direction_records(row: KeptDirections) -> list[dict[str, float | None]]:
    """The directions that are kept: σ, |uᵀWv| and their ratio."""
    module = row.module
    return [
        {"sigma": float(s), "projected": abs(float(p)), "amplification": json_number(float(factor))}
        for s, p, factor in zip(module.s, module.overlap.diagonal(), module.directions, strict=True)
    ][: row.directions.rank]


def _phi_record(row: KeptDirections, phi_rank: int) -> dict[str, Any] | None:
    """φ between the directions of ΔW and those of W, and its chance level; None without those of W."""
    top = row.module.top
    if not top:
        return None
    i, j = min(row.directions.rank, phi_rank), phi_rank
    out, in_ = top.chance(row.module.shape)
    return {
        "out": top.out[:i, :j].tolist(),
        "in": top.in_[:i, :j].tolist(),
        "chance_out": out[:i, :j].tolist(),
        "chance_in": in_[:i, :j].tolist(),
    }


def _top_record(row: KeptDirections) -> dict[str, Any]:
    """The leading singular values of W, where they were computed."""
    top = row.module.top
    return {"top": {"sigma": top.s.tolist(), "error": top.error.tolist(), "exact": top.exact}} if top else {}


def _relative_norm(row: KeptDirections) -> float | None:
    weight = row.module.weight_norm
    return row.directions.delta_norm / weight if weight else None


def _blank_if_undefined(text: Callable[[float], str]) -> Callable[[float | None], str]:
    """The text of a number; nothing where there is none, and ∞."""
    return lambda value: "" if value is None or value != value else "∞" if value == float("inf") else text(value)


def _number_column(key: str) -> Column[KeptDirections]:
    """A number for machines, which know no infinity."""
    return Column(key, lambda row: json_number(getattr(row.directions, key)))


def _shown_column(
    key: str, title: str, text: Callable[[float], str], priority: int, about: str = ""
) -> Column[KeptDirections]:
    """The same number for people; nothing where no direction is kept."""
    return Column(
        key,
        lambda row: getattr(row.directions, key) if row.directions.rank else None,
        title,
        _blank_if_undefined(text),
        priority=priority,
        json=False,
        csv=False,
        about=about,
    )


COLUMNS: tuple[Column[KeptDirections], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row.module.shape), csv=False),
    Column("out", lambda row: row.module.shape[0], json=False),
    Column("in", lambda row: row.module.shape[1], json=False),
    Column("nominal_rank", lambda row: row.module.rank),
    Column("rank", lambda row: row.directions.rank, "r", priority=5),
    Column("delta_norm", lambda row: row.directions.delta_norm, "‖ΔW‖F", number, priority=7),
    Column("weight_norm", lambda row: row.module.weight_norm, "‖W‖F", number, priority=4),
    Column("relative_norm", _relative_norm),
    *map(_number_column, KeptRank._fields[2:]),
    _shown_column("projected_norm", "UᵀWV: ΔW", number, 6),
    _shown_column("top_norm", "W", number, 2),
    _shown_column("random_norm", "random", number, 3),
    _shown_column("amplification", "amplification", number, ALWAYS, "‖ΔW‖/‖UᵀWV‖"),
    _shown_column("excess", "excess", fixed(".3f"), 8, "‖UᵀWV‖ over what random directions catch"),
    _shown_column("z", "z", fixed("+.2f"), 8, "of ‖UᵀWV‖², from random directions"),
)
KIND_COLUMNS: tuple[Column[KindAmplification], ...] = (
    Column("kind", lambda row: row.kind, "kind", align="left", priority=ALWAYS),
    Column("modules", lambda row: len(row.rows), "modules", priority=5),
    Column(
        "amplification",
        lambda row: median(kept.amplification for kept in row.rows),
        "amplification",
        number,
        priority=ALWAYS,
        about="median of ‖ΔW‖/‖UᵀWV‖",
    ),
    Column(
        "excess",
        lambda row: median(kept.excess for kept in row.rows),
        "excess",
        fixed(".3f"),
        priority=8,
        about="median of ‖UᵀWV‖ over what random directions catch",
    ),
    Column("z", lambda row: median(kept.z for kept in row.rows), "z", fixed("+.2f"), priority=8, about="median"),
    Column(
        "far",
        lambda row: count_far(row.rows)[0],
        f"|z| > {FAR:g}",
        priority=4,
        about=f"modules beyond {FAR:g} standard deviations of random directions",
    ),
    Column(
        "far_chance",
        lambda row: count_far(row.rows)[1],
        "by chance",
        lambda far: f"{far:.2g}",
        priority=4,
        about="how many of them chance gives",
    ),
)
