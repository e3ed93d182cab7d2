"""Adapter: the updates of a whole model, and whatever else their file carried."""

from collections.abc import Callable, Collection, ItemsView, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self, final, overload

from loralens.core.lazy import LazyArray
from loralens.core.names import matches, natural_key, nearest, wild
from loralens.errors import OptionError, UnknownModuleError
from loralens.tables.numbers import number, shape
from loralens.tables.render import html_table
from loralens.tables.table import Column, Table

if TYPE_CHECKING:  # four classes that only LyCORIS files need
    from loralens.core.structured import Update

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something a reader wants its user to know.

    Attributes
    ----------
    level : str
        ``error``: the numbers would be wrong; ``warning``: they may not mean what they seem to; ``note``: good to know.
    code : str
        A stable name for the kind of finding, for machines.
    text, fix : str
        One sentence each.
    """

    level: Level
    code: str
    text: str
    fix: str = ""

    def record(self) -> dict[str, str]:
        """As a JSON object."""
        return {"level": self.level, "code": self.code, "text": self.text, "fix": self.fix}


@dataclass(frozen=True, slots=True)
class Extra:
    """A stored tensor that is not half of a pair.

    Attributes
    ----------
    role : str
        ``magnitude`` (DoRA, one number an output), ``magnitude_in`` (one an input), ``norms`` and ``norms_in`` (the
        same where the file has none: an empty tensor, for which the lengths of W stand), ``bias``, ``lora_bias`` (a
        bias on B), ``saved`` (a module trained in full, such as a head), ``copy`` (a duplicate of one), ``embedding``
        (the full matrix of an adapted or resized one, or of a head), ``tokens`` (single rows of an embedding),
        ``diagonal`` (KaSA), ``diff`` and ``diff_b`` (differences to be added to a weight or bias), ``shape`` (ComfyUI:
        what a weight is padded to) or ``other``.
    module : str
        The base model's module that it belongs to.
    tensor : LazyArray
    parameter : str
        Which parameter of that module it stands for: ``weight``, ``bias`` …
    """

    role: str
    module: str
    tensor: LazyArray
    parameter: str = "weight"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """Module name → LowRank, in natural module order, plus whatever else the file carried.

    Works as a mapping: ``adapter["model.layers.0.self_attn.q_proj"]``, ``len``, ``in``, iteration over names,
    ``items()``. ``adapter[0]`` and ``adapter[-1]`` are the first and the last module, ``adapter["*.q_proj"]`` is the
    adapter of the modules that a glob matches. Copies share the numbers that are not read yet; a pickle holds them.

    Attributes
    ----------
    modules : mapping of str to LowRank or Structured
    extra : mapping of str to Extra
        Every stored tensor that is not half of a pair, by its key in the file. Rides along untouched.
    config : mapping or None
        The configuration beside the file, verbatim, fields unknown to us included.
    metadata : mapping or None
        The header metadata of the file, verbatim.
    format : str
        The dialect it was read from.
    base_model : str or None
        What the file says it was trained on.
    findings : tuple of Finding
        What the reader noticed.
    narrowed : bool
        Modules were taken out since it was read: a configuration that names them by pattern says too much.
    peft_fields : mapping
        Of a file in another dialect than PEFT's: fields of a PEFT configuration that it has no place for, and that an
        adapter had before it was converted (``task_type``, ``lora_dropout``, ``target_modules`` …).
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

    def __post_init__(self) -> None:
        ordered = {name: self.modules[name] for name in sorted(self.modules, key=natural_key)}
        object.__setattr__(self, "modules", MappingProxyType(ordered))
        object.__setattr__(self, "extra", MappingProxyType(dict(self.extra)))

    @overload
    def __getitem__(self, key: int) -> "Update": ...
    @overload
    def __getitem__(self, key: str) -> "Update": ...
    def __getitem__(self, key: str | int) -> "Update | Adapter":
        """A module by its name or its place in natural order; by a glob, an adapter of the modules that it matches.

        Raises
        ------
        UnknownModuleError
            No module has this name, or is matched by this glob; it is a `KeyError` too.
        IndexError
            There are not so many modules.
        """
        if isinstance(key, int):
            return self.modules[list(self.modules)[key]]
        if key in self.modules:
            return self.modules[key]
        if wild(key) and (matched := [name for name in self.modules if matches(name, key)]):
            return self.without(self.modules.keys() - {*matched})
        what = "no module is matched by" if wild(key) else "no module"
        raise UnknownModuleError(f"{what} {key!r}", fix=f"the nearest names are {nearest(key, self.modules)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def __hash__(self) -> int:  # so that an adapter can be a key of {adapter: weight}; equal ones have equal names
        return hash((self.format, self.base_model, *self.modules))

    def items(self) -> "ItemsView[str, Update]":
        """Pairs of name and module, in natural order."""
        return self.modules.items()

    def map(self, f: "Callable[[Update], Update]") -> Self:
        """The same adapter with ``f`` of every module."""
        return replace(self, modules={name: f(module) for name, module in self.items()})

    def without(self, names: Collection[str]) -> Self:
        """The same adapter, these modules left out."""
        kept = {name: module for name, module in self.items() if name not in names}
        return replace(self, modules=kept, narrowed=self.narrowed or len(kept) < len(self))

    def renamed(self, names: Mapping[str, str]) -> Self:
        """The same adapter with modules, and what belongs to them, under other names; the rest keeps its own.

        Raises
        ------
        OptionError
            Two modules would have one name, or two stored tensors one key.
        """
        new = {name: names.get(name, name) for name in self.modules}
        if len(set(new.values())) < len(new):
            twice = next(name for name in new.values() if list(new.values()).count(name) > 1)
            raise OptionError(f"two modules would be called {twice}", fix="choose other names")
        extra: dict[str, Extra] = {}
        for key, one in self.extra.items():
            name = names.get(one.module, one.module)
            renamed = _renamed_key(key, one.module, name)
            if renamed in extra:
                raise OptionError(f"two tensors would be called {renamed}", fix="choose other names")
            extra[renamed] = replace(one, module=name)
        changed = any(new[name] != name for name in new)
        modules = {new[name]: module.without_origin() if changed else module for name, module in self.items()}
        return replace(self, modules=modules, extra=extra)

    def load(self) -> Self:
        """The same adapter with all its factors held in memory."""
        return self.map(lambda module: module.load())

    def __add__(self, other: "Adapter") -> "Adapter":
        """The exact sum of both updates, module by module."""
        return _sum((self, 1.0), (other, 1.0)) if isinstance(other, Adapter) else NotImplemented

    def __radd__(self, other: object) -> "Adapter":
        """0 + a is a, so that `sum` of adapters works."""
        return self if type(other) is int and other == 0 else NotImplemented

    def __sub__(self, other: "Adapter") -> "Adapter":
        """The exact difference of both updates; a − a is 0."""
        return _sum((self, 1.0), (other, -1.0)) if isinstance(other, Adapter) else NotImplemented

    def __neg__(self) -> "Adapter":
        """The update with its sign changed, its factors untouched."""
        return _sum((self, -1.0))

    def __mul__(self, strength: float) -> "Adapter":
        """The update so many times, its factors untouched."""
        return _sum((self, strength)) if isinstance(strength, int | float) else NotImplemented

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "Adapter":
        """The update divided by a number."""
        return _sum((self, 1 / divisor)) if isinstance(divisor, int | float) else NotImplemented

    @property
    def parameters(self) -> int:
        """Numbers stored in pairs."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes stored in pairs."""
        return sum(module.nbytes for module in self.modules.values())

    def __reduce__(self) -> tuple[Any, ...]:  # views of mappings, which protect an adapter, cannot be pickled
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return partial(Adapter, **{**values, "modules": dict(self.modules), "extra": dict(self.extra)}), ()

    def _repr_html_(self) -> str:
        """The first modules as a table for a notebook."""
        return html_table(Table(repr(self), MODULE_COLUMNS, list(self.items())[:MODULES_SHOWN]))

    def __repr__(self) -> str:
        ranks = sorted({module.rank for module in self.modules.values()})
        return f"Adapter({self.format}, {len(self)} modules, rank {_span(ranks)}, {self.parameters:,} parameters)"


MODULES_SHOWN = 20  # in a notebook
MODULE_COLUMNS: "tuple[Column[tuple[str, Update]], ...]" = (
    Column("name", lambda row: row[0], "module", align="left"),
    Column("shape", lambda row: row[1].shape, "out × in", shape),
    Column("rank", lambda row: row[1].rank, "r"),
    Column("scale", lambda row: row[1].scale, "scale", number),
    Column("dtype", lambda row: row[1].dtype, "dtype"),
)


def _sum(*terms: tuple[Adapter, float]) -> Adapter:
    from loralens.core.vector import weighted_sum  # which stands on this file

    return weighted_sum(terms)


def _renamed_key(key: str, old: str, new: str) -> str:
    """A stored key that names a module, with another name of it; as it is where it does not name the module."""
    head, named, tail = f".{key}.".rpartition(f".{old}.")
    return f"{head}.{new}.{tail}"[1:-1] if named and old else key


def _span(ranks: list[int]) -> str:
    return "none" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
