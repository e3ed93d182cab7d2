"""`Adapter`: the updates of a whole model, and the other content of their file."""

from collections.abc import Callable, Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self, final, overload

import numpy as np

from loralens.choices import Level
from loralens.core.lazy import LazyArray
from loralens.core.names import kind, natural_key, nearest
from loralens.core.selection import matches, wild
from loralens.errors import OptionError, UnknownModuleError, spell
from loralens.exports import PublicMethods
from loralens.tables.numbers import number, shape
from loralens.tables.table import Column, Recorded, Table

if TYPE_CHECKING:  # the classes of updates are needed for LyCORIS files only
    from loralens.core.structured import Update

verbs = PublicMethods()


# Codes that say too little by themselves.
WORDS = {
    "names": "unknown names",
    "config": "config missing or incomplete",
    "structured": "updates that are not pairs B·A",
}


@dataclass(frozen=True, slots=True)
class Finding(Recorded):
    """A message of a reader about a file.

    Attributes
    ----------
    level : str
        ``error``: the numbers would be wrong. ``warning``: the numbers may mean something else than they seem to.
        ``note``: useful information.
    code : str
        A stable name for the kind of finding, for programs.
    text, fix : str
        One sentence each, which names options as Python or the command line has them, whichever made it.
    """

    level: Level
    code: str
    text: str
    fix: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", spell(self.text))
        object.__setattr__(self, "fix", spell(self.fix))

    @property
    def words(self) -> str:
        """The code in words, for a verdict."""
        return WORDS.get(self.code, self.code.replace("-", " "))


@dataclass(frozen=True, slots=True)
class Extra:
    """A stored tensor that does not belong to a pair.

    Attributes
    ----------
    role : str
        ``magnitude`` (DoRA, one number for each output), ``magnitude_in`` (one for each input), ``norms`` and
        ``norms_in`` (magnitudes that the file does not have: the tensor is empty, and the lengths in W are used),
        ``bias``, ``lora_bias`` (a bias on B), ``saved`` (a module trained in full, such as a head), ``copy`` (the
        second of two tensors that old versions of PEFT store for such a module), ``embedding`` (the full matrix of an
        embedding that is adapted or resized, or of a head), ``tokens`` (single rows of an embedding), ``diagonal``
        (KaSA), ``diff`` and ``diff_b`` (differences that are added to a weight or bias), ``shape`` (ComfyUI: the shape
        to which a weight is padded) or ``other``.
    module : str
        The module of the base model to which it belongs.
    parameter : str
        The parameter of that module: ``weight``, ``bias`` …
    """

    role: str
    module: str
    tensor: LazyArray
    parameter: str = "weight"

    def __post_init__(self) -> None:
        # A bias on B is added to the bias of its module, whatever its dialect calls it.
        if self.role == "lora_bias":
            object.__setattr__(self, "parameter", "bias")


class _Ordered(dict[str, "Update"]):
    """Modules that are in natural order already: to sort very many names takes long."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """Module name → `LowRank` or `Structured` in natural order, and the other content of the file.

    An adapter works as a mapping: ``adapter["model.layers.0.self_attn.q_proj"]``, ``len``, ``in``, iteration over
    names, ``keys()``, ``values()``, ``items()``. ``adapter[0]`` and ``adapter[-1]`` are the first and the last module,
    and ``adapter["*.q_proj"]`` is an adapter with the modules that a glob matches. A copy shares lazy arrays with its
    original and reads nothing; a pickle contains their numbers.

    Every verb whose first argument is an adapter is a method too: ``adapter.compress(rank=4)``. Two adapters are ``==``
    if they have the same modules, scales, factors and further tensors, number by number, wherever they came from;
    `loralens.equal` compares the updates, whatever their factors.

    Attributes
    ----------
    extra : mapping of str to Extra
        Stored tensors that do not belong to a pair, by their key in the file. They are kept unchanged.
    config : mapping or None
        The configuration next to the file, unchanged, including unknown fields.
    metadata : mapping or None
        The header metadata of the file, unchanged.
    format : str
        The dialect of the file.
    base_model : str or None
        The name of the base model according to the file.
    findings : tuple of Finding
        Messages of the reader.
    narrowed : bool
        Whether modules were removed after reading. A configuration that names modules by a pattern then names too many.
    peft_fields : mapping
        Fields of a PEFT configuration that the adapter had before it was converted to a dialect without them
        (``task_type``, ``lora_dropout``, ``target_modules`` …).
    source : str
        Where it came from: the path that was given, or ``in memory: …``. Tables and messages name the adapter by it.
    """

    modules: "Mapping[str, Update]"
    extra: Mapping[str, Extra] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] | None = None
    format: str = "peft"
    base_model: str | None = None
    findings: tuple[Finding, ...] = ()
    narrowed: bool = False
    peft_fields: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    # The verbs that begin with an adapter: the functions of `loralens`, which stand on floors above this one.
    amplify, intruders, merge = verbs.amplify, verbs.intruders, verbs.merge
    inspect, doctor, spectrum, report = verbs.inspect, verbs.doctor, verbs.spectrum, verbs.report
    similarity, equal, compress, curve = verbs.similarity, verbs.equal, verbs.compress, verbs.curve
    combine, scale, negate, subtract = verbs.combine, verbs.scale, verbs.negate, verbs.subtract
    interpolate, drop, convert, save = verbs.interpolate, verbs.drop, verbs.convert, verbs.save
    calibrate, evaluate, behave = verbs.calibrate, verbs.evaluate, verbs.behave
    explain, prove = verbs.explain, verbs.prove

    def __post_init__(self) -> None:
        ordered = self.modules
        if not isinstance(ordered, _Ordered):
            ordered = _Ordered((name, self.modules[name]) for name in sorted(self.modules, key=natural_key))
        # Read-only views: an adapter is frozen, and several results may share it.
        object.__setattr__(self, "modules", MappingProxyType(ordered))
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))

    @overload
    def __getitem__(self, key: int) -> "Update": ...
    @overload
    def __getitem__(self, key: str) -> "Update": ...
    def __getitem__(self, key: str | int) -> "Update | Adapter":
        """A module by its name or its index in natural order; for a glob, an adapter with the modules that match.

        Raises
        ------
        UnknownModuleError
            No module has this name or matches this glob. The error is also a `KeyError`.
        IndexError
            The index is out of range.
        """
        if isinstance(key, int):
            return self.modules[list(self.modules)[key]]
        # An exact name wins over a glob, so every module can be reached by its own name.
        if key in self.modules:
            return self.modules[key]
        if wild(key) and (matched := [name for name in self.modules if matches(name, key)]):
            return self.without(self.modules.keys() - {*matched})
        what = "no module is matched by" if wild(key) else "no module"
        # A kind does not name one module, because most adapters have many modules of it. --modules accepts kinds.
        if any(kind(name) == key for name in self.modules):
            raise UnknownModuleError(f"{what} {key!r}", fix=f"for all modules of this kind give {f'*.{key}'!r}")
        raise UnknownModuleError(f"{what} {key!r}", fix=f"the nearest names are {nearest(key, self.modules)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Adapter):
            return NotImplemented
        # What needs no reading is compared first.
        if self._outline() != other._outline():
            return False
        from loralens.core.structured import same_update  # few adapters are compared in this way

        extras = ((extra.tensor, other.extra[key].tensor) for key, extra in self.extra.items())
        return all(same_update(module, other.modules[name]) for name, module in self.items()) and all(
            np.array_equal(one.read(), another.read()) for one, another in extras
        )

    def __hash__(self) -> int:
        # So that an adapter can be a key of {adapter: weight}. Adapters that are equal have equal names and shapes.
        return hash(tuple((name, module.shape) for name, module in self.items()))

    def _outline(self) -> tuple[object, ...]:
        """Names, shapes, ranks and scales, and the places of all other tensors."""
        modules = {name: (type(m), m.shape, m.rank, m.scale) for name, m in self.items()}
        return modules, {key: (e.role, e.module, e.parameter, e.tensor.shape) for key, e in self.extra.items()}

    def keys(self) -> KeysView[str]:
        """The names of the modules, in natural order."""
        return self.modules.keys()

    def values(self) -> "ValuesView[Update]":
        """The modules, in the natural order of their names."""
        return self.modules.values()

    def items(self) -> "ItemsView[str, Update]":
        """Pairs of name and module, in natural order."""
        return self.modules.items()

    def map(self, f: "Callable[[Update], Update]") -> Self:
        """The same adapter with ``f`` applied to every module."""
        return replace(self, modules=_Ordered((name, f(module)) for name, module in self.items()))

    def without(self, names: Collection[str]) -> Self:
        """The same adapter without these modules."""
        modules = _Ordered((name, module) for name, module in self.items() if name not in names)
        return replace(self, modules=modules, narrowed=self.narrowed or len(modules) < len(self))

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same adapter with other names for some modules and for the tensors that belong to them.

        Raises
        ------
        OptionError
            Two modules would get the same name, or two stored tensors the same key.
        """
        new = {name: names.get(name, name) for name in self.modules}
        # Two modules under one name would silently become one.
        if len(set(new.values())) < len(new):
            twice = next(name for name in new.values() if list(new.values()).count(name) > 1)
            raise OptionError(f"two modules would have the name {twice}", fix="choose other names")
        extra: dict[str, Extra] = {}
        for key, tensor in self.extra.items():
            name = names.get(tensor.module, tensor.module)
            # With dots at both ends a name matches only whole parts of the key. A key without the name stays.
            head, separator, tail = f".{key}.".rpartition(f".{tensor.module}.")
            renamed = f"{head}.{name}.{tail}"[1:-1] if separator and tensor.module else key
            if renamed in extra:
                raise OptionError(f"two tensors would have the name {renamed}", fix="choose other names")
            extra[renamed] = replace(tensor, module=name)
        changed = any(new[name] != name for name in new)
        # The stored tensors have the old names, so they cannot be written back as they were.
        modules = {new[name]: module.without_origin() if changed else module for name, module in self.items()}
        return replace(self, modules=modules, extra=extra)

    def load(self) -> Self:
        """The same adapter with all its factors and extras held in memory."""
        extra = {key: replace(item, tensor=LazyArray.of(item.tensor.read())) for key, item in self.extra.items()}
        return replace(self.map(lambda module: module.load()), extra=extra)

    def __add__(self, other: "Adapter") -> "Adapter":
        """The exact sum of two updates, module by module."""
        return _weighted_sum((self, 1.0), (other, 1.0)) if isinstance(other, Adapter) else NotImplemented

    def __radd__(self, other: object) -> "Adapter":
        """0 + a is a, so that `sum` of adapters works."""
        # `sum` starts with the integer 0. Any other number has no meaning as an adapter.
        return self if type(other) is int and other == 0 else NotImplemented

    def __sub__(self, other: "Adapter") -> "Adapter":
        """The exact difference of two updates; a − a is 0."""
        return _weighted_sum((self, 1.0), (other, -1.0)) if isinstance(other, Adapter) else NotImplemented

    def __neg__(self) -> "Adapter":
        """The update with the opposite sign and the same factors."""
        return _weighted_sum((self, -1.0))

    def __mul__(self, strength: float) -> "Adapter":
        """The update multiplied by a number, with the same factors."""
        return _weighted_sum((self, strength)) if isinstance(strength, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Adapter":
        """The update divided by a number."""
        return _weighted_sum((self, 1 / divisor)) if isinstance(divisor, int | float) else NotImplemented

    @property
    def rank(self) -> int:
        """The nominal rank r; the largest one if modules differ, and 0 without modules."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def parameters(self) -> int:
        """Number of stored numbers in pairs."""
        # Experts of a stack share tensors; each module counts its own share of them.
        return sum(module.parameters for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Number of stored bytes in pairs."""
        return sum(module.nbytes for module in self.modules.values())

    def __reduce__(self) -> tuple[Any, ...]:  # the read-only views of mappings cannot be pickled
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return partial(Adapter, **{**values, "modules": dict(self.modules), "extra": dict(self.extra)}), ()

    def _repr_html_(self) -> str:
        """The first modules as a table for a notebook."""
        from loralens.tables.render import html_table  # csv and html, which only notebooks need, take 2 ms to import

        return html_table(Table(repr(self), MODULE_COLUMNS, list(self.items())[:MODULES_SHOWN]))

    def __repr__(self) -> str:
        ranks = {module.rank for module in self.modules.values()}
        # One rank, or the smallest and the largest.
        shown = "–".join(map(str, sorted({min(ranks), max(ranks)}))) if ranks else "none"
        return f"Adapter({self.format}, {len(self)} modules, rank {shown}, {self.parameters:,} parameters)"


MODULES_SHOWN = 20  # modules of the table in a notebook
MODULE_COLUMNS: "tuple[Column[tuple[str, Update]], ...]" = (
    Column("name", "0", "module", align="left"),
    Column("shape", "1.shape", "out × in", shape),
    Column("rank", "1.rank", "r"),
    Column("scale", "1.scale", "scale", number),
    Column("dtype", "1.dtype", "dtype"),
)


def _weighted_sum(*terms: tuple[Adapter, float]) -> Adapter:
    from loralens.core.together import sum_adapters  # imported here, because that file imports this one

    return sum_adapters(terms)
