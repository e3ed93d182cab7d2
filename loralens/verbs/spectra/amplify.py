"""The verb ``amplify``: measures how strongly ΔW amplifies W, compared with random and with the best directions."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from statistics import median
from threading import Lock
from typing import Any, NamedTuple, final

from loralens.analysis.amplification import FAR, Amplification, KeptRank, count_far, measure_amplification
from loralens.core.messages import note, progress, warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import some
from loralens.core.selection import select
from loralens.core.threads import processor_count
from loralens.core.together import magnitudes
from loralens.core.weights import Weight
from loralens.errors import FormatError, OptionError, place
from loralens.exports import takes_options
from loralens.formats.records.cache import LEADING_VERSION, SvdCache, WeightHash
from loralens.linalg.device import Device
from loralens.linalg.randomized import Block, Leading
from loralens.tables.numbers import JsonMatrix, count, fixed, number, span
from loralens.tables.result import ResultMapping
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key, shape_columns
from loralens.verbs.shared.adapters import AdapterSource, base_weights, labels, read_adapter
from loralens.verbs.shared.module_groups import group_by_kind
from loralens.verbs.shared.options import ModuleChoice, Reading, SvdCaching, check_at_least
from loralens.verbs.spectra.decompositions import svd_cache


class KeptDirections(NamedTuple):
    """One row: a module, and the measures of its leading directions at one rank (Table 7 of the LoRA paper)."""

    name: str
    module: Amplification
    directions: KeptRank


class KindAmplification(NamedTuple):
    """One row: the measures of all modules of a kind, each at its largest rank."""

    kind: str
    rows: Sequence[KeptRank]


@dataclass(frozen=True, slots=True, repr=False)
class AmplifyResult(ResultMapping[Amplification]):
    """The amplification of an adapter on its base: a mapping from module names to `Amplification`.

    Attributes
    ----------
    path : str
        The label of the adapter: its path, if it was read from a file.
    modules : mapping of str to Amplification
        The requested modules, in natural order.
    phi_rank : int
        The largest i and j of the φ(i, j) in the JSON object and in the figure.
    exact : bool
        Whether a dense SVD of W was used.
    """

    path: str
    base: str
    modules: Mapping[str, Amplification]
    phi_rank: int
    device: str
    exact: bool

    @property
    def rows(self) -> list[KeptDirections]:
        """One row for every module and every requested rank."""
        return [KeptDirections(name, module, directions) for name, module in self.items() for directions in module.rows]

    @property
    def measured(self) -> list[KeptDirections]:
        """One row for every module whose ΔW and W are not 0, at its largest rank."""
        # The last row is the whole update; smaller ranks of a module would count it several times.
        largest = [KeptDirections(name, module, module.rows[-1]) for name, module in self.items()]
        return [row for row in largest if row.directions.rank and row.module.weight_norm]

    def tables(self) -> list[Table[Any]]:
        """The modules at every rank, and the medians over the modules of a kind."""
        # With --no-top the column of W would be empty, and the title must not promise it.
        top = any(module.top for module in self.values())
        what = f"‖UᵀWV‖F with U, V of ΔW, {'of W, ' if top else ''}random"
        title = f"{self.path} on {self.base}: {count(len(self), 'module')}; {what}"
        columns = [column for column in COLUMNS if top or column.title != "W"]
        modules = Table(title, columns, self.rows, lambda row: not row.directions.rank, _sum_up_zeros)
        return [modules, medians_table("medians by kind", {row.name: row.directions for row in self.measured})]

    def conclusion(self) -> list[str]:
        """How strongly W is amplified, and whether the directions of ΔW hold more of W than random ones do."""
        rows = [row.directions for row in self.measured]
        if not rows:
            return ["Nothing can be amplified: no module has both a ΔW and a W that are not 0."]
        factor, excess = (median(getattr(row, key) for row in rows) for key in ("amplification", "excess"))
        far, expected = count_far(rows)
        modules, verb = count(len(rows), "module"), "is" if far == 1 else "are"
        lines = [
            f"In its own directions ΔW is {number(factor, 3)} times as strong as W (median of {modules}).",
            f"They catch {number(excess, 3)} times as much of W as random directions do; {far} of {modules} {verb} "
            f"beyond {FAR:g} standard deviations; by chance there would be {expected:.2g} modules.",
        ]
        # The factor rises with ‖ΔW‖ alone. Where at most a tenth of the modules is beyond chance, it says nothing about
        # directions of W, although it may be large.
        if 10 * far <= len(rows):
            lines.append(
                "So the factor shows how large ΔW is compared with W, and not that it found particular directions of W."
            )
        return lines

    def sentences(self) -> list[str]:
        """The ranges over all modules, and the error of the comparison with the leading directions of W."""
        rows = [row.directions for row in self.measured]
        if not rows:
            return []
        spans = {
            "amplification": [row.amplification for row in rows],
            "‖ΔW‖/‖W‖": [row.directions.delta_norm / row.module.weight_norm for row in self.measured],
            "excess over random": [row.excess for row in rows],
        }
        sentences = ["; ".join(f"{what} {span(values, number, ' to ')}" for what, values in spans.items())]
        # Only a randomised SVD has an error to report; a dense one says 0.
        worst = max((row.top_error / row.top_norm for row in rows if row.top_norm > 0), default=0.0)
        if worst > 0:
            sentences.append(
                f"the column of W comes from a randomised SVD, whose relative error is at most {worst:.1g}"
            )
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("adapter", "path"),
            "base",
            # part of the result: those of a CPU and a GPU agree to 1e-5
            Column("device"),
            "exact",
            rows_key(
                "modules",
                json_columns(0),
                KeptDirections,
                lambda result: Table("", json_columns(result.phi_rank), result.rows),
            ),
        )


@takes_options
def amplify(
    adapter: AdapterSource,
    *,
    base: ModelPath,
    rank: int | Sequence[int] = (),
    no_top: bool = False,
    directions: int | None = None,
    exact: bool = False,
    phi_rank: int = 16,
    device: str = "cpu",
    seed: int = 0,
    caching: SvdCaching,
    selection: ModuleChoice,
    reading: Reading,
) -> AmplifyResult:
    """Show how strongly ΔW amplifies W: ‖ΔW‖/‖UᵀWV‖, with U, V the singular directions of ΔW (LoRA paper, Table 7).

    The factor is shown with three comparisons: the share of W that random directions would catch, the excess of ΔW over
    them with its z-score, and the largest share that any directions could catch. At most two weights of the base are
    read at a time. The leading directions of large weights are kept for the next run.

    Parameters
    ----------
    adapter : path, Adapter or model
    base : path or model
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    rank : int or sequence of int
        Look at the R leading directions of ΔW only. [default: all]
    no_top : bool
        Leave out the comparison with the leading directions of W, which takes long.
    directions : int, optional
        The number of leading directions of W to compare with. [default: as many as of ΔW]
    exact : bool
        Take a dense SVD of every W: minutes and more memory for a large weight.
    phi_rank : int
        The largest i and j of φ(i, j).
    device : str
        The device for computations on W: cpu, cuda or cuda:N.
    seed : int
        Seed of the random numbers for the sketch of W and the starting vectors.
    caching : SvdCaching
        The options ``cache``, ``cache_limit``, ``no_cache``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob that matches nothing, a rank that no module has, no such device; options that exclude each other.
    FormatError
        A file that is not an adapter, or not a model; numbers that are NaN or Inf.
    MismatchError
        A module that has no weight in the base.

    Examples
    --------
    $ loralens amplify adapter --base model
    """
    modules = selection.globs
    for option, role in (
        (directions, "directions says how many of them"),
        (caching.cache, "cache says where they are kept"),
    ):
        if no_top and option:
            raise OptionError(f"no_top leaves out the directions of W, and {role}", fix="give one of the two")
    # What can be refused without the base is refused before it is read.
    for name, value, least in (("directions", directions, 1), ("phi_rank", phi_rank, 1), ("seed", seed, 0)):
        check_at_least(name, value, least)
    folder = svd_cache(caching)
    linalg_device = Device.of(device, threads=processor_count())
    (label,) = labels([adapter])
    loaded = read_adapter(adapter, reading, base=base, label=label)
    with place(label):
        names = select(loaded, modules)
    weights = base_weights(base, {name: loaded[name] for name in names})
    # Names that match only after a prefix was changed are told: a wrong match would measure another weight.
    if weights.match.edit:
        note(f"{base}: {weights.match}")
    # The tuned weight of DoRA is not W + ΔW. Its ΔW can still be measured, so this is not an error.
    with_magnitude = magnitudes(loaded).keys() & names
    if with_magnitude:
        warn(f"{label}: {len(with_magnitude)} modules are DoRA: scale·B·A alone is measured, without their magnitudes")
    with place(label), progress("reading the base", len(weights.modules)) as step:
        measured = measure_amplification(
            loaded,
            weights.modules,
            ranks=list(rank) if isinstance(rank, Iterable) else [rank],
            top=not no_top,
            directions=directions or 0,  # 0: as many as ΔW has
            exact=exact,
            device=linalg_device,
            seed=seed,
            modules=modules,
            store=LeadingCache(folder) if folder else None,
            step=step,
        )
    # Their rows are blank, so the reason is given.
    zero = [name for name, module in measured.items() if not module.s.size]
    if zero:
        note(f"{label}: {len(zero)} of {len(measured)} modules do nothing (ΔW = 0): {some(zero)}")
    return AmplifyResult(label, str(base), measured, phi_rank, device, exact)


def _sum_up_zeros(rows: int) -> str:
    return f"{count(rows, 'row')} of ΔW = 0"


def json_columns(phi_rank: int) -> Sequence[Column[KeptDirections]]:
    """The columns in JSON, with the φ(i, j) up to ``phi_rank``."""
    maps = dict.fromkeys(("out", "in", "chance_out", "chance_in"), JsonMatrix)
    return (
        *COLUMNS,
        Column("curve", lambda row: row.module.curve[: row.directions.rank], type=list[KeptRank]),
        Column("directions", _direction_records, type=(dict.fromkeys(("sigma", "projected", "amplification"), float),)),
        Column("phi", lambda row: _phi_record(row, phi_rank), type=[maps, None]),
        Column(
            "top",
            # The leading singular values of W; without them JSON has no such key.
            lambda row: {"sigma": top.s, "error": top.error, "exact": top.exact} if (top := row.module.top) else ...,
            type={"sigma": list[float], "error": list[float], "exact": bool},
            may_lack=True,
        ),
    )


def _direction_records(row: KeptDirections) -> list[dict[str, float]]:
    """σ, |uᵀWv| and their ratio of every direction that is kept."""
    module = row.module
    return [
        {"sigma": s, "projected": abs(p), "amplification": factor}
        for s, p, factor in zip(module.s, module.overlap.diagonal(), module.directions, strict=True)
    ][: row.directions.rank]


def _phi_record(row: KeptDirections, phi_rank: int) -> dict[str, Any] | None:
    """φ between the directions of ΔW and those of W, and its chance level; None if those of W were not computed."""
    top = row.module.top
    if not top:
        return None
    # Maps are cut, as they grow with r² for every module and side.
    i, j = min(row.directions.rank, phi_rank), phi_rank
    out, in_ = top.chance(row.module.shape)
    maps = {"out": top.out, "in": top.in_, "chance_out": out, "chance_in": in_}
    return {key: phi[:i, :j] for key, phi in maps.items()}


def _shown_column(
    key: str, title: str, text: Callable[[float], str], priority: int, about: str = ""
) -> Column[KeptDirections]:
    """A quantity for people: blank where ΔW or W is 0, and ∞ where UᵀWV is."""

    def value(row: KeptDirections) -> float | None:
        return getattr(row.directions, key) if row.directions.rank else None

    def shown(value: float | None) -> str:
        # ∞ without the format of `text`, which may ask for a sign and for decimals.
        return "" if value is None or isnan(value) else "∞" if value == inf else text(value)

    return Column(key, value, title, shown, priority=priority, json=False, csv=False, about=about)


# The median and not the mean: the factor is infinite where UᵀWV = 0, and one such module would hide all others.
def _median_column(
    quantity: str, title: str, text: Callable[[float], str], priority: int, about: str
) -> Column[KindAmplification]:
    def value(row: KindAmplification) -> float:
        return float(median(getattr(directions, quantity) for directions in row.rows))

    return Column(quantity, value, title, text, priority=priority, about=about)


# On a narrow terminal the comparisons are left out first, including random and W: excess and z say the same in one
# number each.
COLUMNS: Columns[KeptDirections] = (
    label_column("name", "module"),
    *shape_columns("module.shape"),
    # The adapter's r; the next column is the number of directions of this row.
    Column("nominal_rank", "module.rank"),
    Column("rank", "directions.rank", "r", priority=5, about="the directions of ΔW that are kept"),
    Column("delta_norm", "directions.delta_norm", "‖ΔW‖F", number, priority=7, about="√Σσ²"),
    Column("weight_norm", "module.weight_norm", "‖W‖F", number, priority=4),
    Column(
        "relative_norm",
        lambda row: row.directions.delta_norm / row.module.weight_norm if row.module.weight_norm else None,
        type=float,
    ),
    # The other fields twice: null in JSON and CSV, which know no infinity, and as text for people.
    *(Column(key, f"directions.{key}") for key in KeptRank._fields[2:]),
    _shown_column(
        "projected_norm", "UᵀWV: ΔW", number, 6, "‖UᵀWV‖: how much of W lies in the r leading directions U, V of ΔW"
    ),
    _shown_column("top_norm", "W", number, 2, "the same in the r leading directions of W, the most that is possible"),
    _shown_column("random_norm", "random", number, 3, "the same in r random directions"),
    # The quantity of the paper is never left out, and the two that show whether it means something go last.
    _shown_column(
        "amplification",
        "amplification",
        number,
        ALWAYS,
        "‖ΔW‖/‖UᵀWV‖: how strong ΔW is compared with W in these directions",
    ),
    _shown_column("excess", "excess", fixed(".3f"), 8, "‖UᵀWV‖ over what random directions catch"),
    _shown_column("z", "z", fixed("+.2f"), 8, "standard deviations of ‖UᵀWV‖² from random directions"),
)
KIND_COLUMNS: Columns[KindAmplification] = (
    label_column("kind", "kind"),
    Column("modules", "rows.len", "modules", priority=5),
    _median_column("amplification", "amplification", number, ALWAYS, "median of ‖ΔW‖/‖UᵀWV‖"),
    _median_column("excess", "excess", fixed(".3f"), 8, "median of ‖UᵀWV‖ over what random directions catch"),
    _median_column("z", "z", fixed("+.2f"), 8, "median"),
    # The count is shown with the count by chance, because 3 standard deviations are exceeded in 2 % of cases at rank 1.
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
        "{:.2g}".format,
        priority=4,
        about="the number of them by chance",
    ),
)


def medians_table(title: str, rows: Mapping[str, KeptRank]) -> Table[KindAmplification]:
    """The medians over the modules of each kind."""
    return Table(title, KIND_COLUMNS, [KindAmplification(*own) for own in group_by_kind(rows).items()])


@final
class LeadingCache:
    """Reads and writes leading directions of weights; the first failure to write is reported, and ends the writing."""

    def __init__(self, cache: SvdCache) -> None:
        self.cache = cache
        self.writable = True
        self.lock = Lock()  # two weights with the same numbers have one file

    def of(self, weight: Weight, count: int, method: str) -> "LeadingEntry":
        """The place of the ``count`` leading directions of a weight, computed by a method with its random numbers."""
        return LeadingEntry(self, weight, count, f"{LEADING_VERSION} {count} {method}")


@final
class LeadingEntry:
    """The leading directions of one weight in a `LeadingCache`."""

    def __init__(self, store: LeadingCache, weight: Weight, count: int, version: str) -> None:
        self._store, self._weight, self._count = store, weight, count
        self._hash = WeightHash(weight, version)

    def follow(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks of the weight, and take the hash of their numbers."""
        return self._hash.follow(blocks)

    def read(self) -> Leading | None:
        """The directions of the weight whose blocks have passed; None if there are none, or their file is damaged."""
        rows, columns = self._weight.stored.shape
        return self._store.cache.read_leading(self._hash.hexdigest(), (rows, columns), self._count)

    def write(self, leading: Leading) -> None:
        """Keep the directions, if the disk allows it."""
        with self._store.lock:
            if not self._store.writable:
                return
            try:
                self._store.cache.write_leading(self._hash.hexdigest(), leading)
            except FormatError as error:  # the next run has to compute them again, and this one goes on
                error.at("the directions of W are not kept")
                warn(": ".join((*error.where, error.what)), error.fix)
                self._store.writable = False
