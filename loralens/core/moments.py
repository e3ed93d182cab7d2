"""Moments: what real inputs excite in the bottleneck of every module of an adapter."""

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.lazy import Array
from loralens.core.names import natural_key, nearest
from loralens.errors import MismatchError, OptionError


@final
@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments of one module of rank r over real inputs x, uncentred.

    Attributes
    ----------
    K : float64 array, shape (r, r)
        E[z zᵀ], z = A x: symmetric, no eigenvalue below 0 but for rounding. x is the input of the module in the
        adapted model, the adapter switched on.
    count : int
        How many inputs x the mean was taken over; 0: the data never reached the module and K is 0.
    G : float64 array, shape (r, r), or None
        E[(Bᵀg)(Bᵀg)ᵀ], g = ∂loss/∂y at the output y of the module, where it was asked for.
    trace : float or None
        tr E[x xᵀ] = E‖x‖²: what of x no z shows. None where it was not measured.
    """

    K: Array
    count: int
    G: Array | None = None
    trace: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Module name → `Moment`, in natural order, and which adapter they belong to.

    Attributes
    ----------
    modules : mapping of str to Moment
    fingerprint : str
        Of the adapter, as `loralens.core.fingerprint` makes it.
    unmeasured : mapping of str to str
        Modules of the adapter without a moment, each with the reason.
    source : mapping of str to object
        What they were measured on, as JSON: how many batches, and whatever the caller adds.
    """

    modules: Mapping[str, Moment]
    fingerprint: str
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Read-only views in natural order, because a frozen object must not change through its mappings.
        for name in ("modules", "unmeasured"):
            values: Mapping[str, Any] = getattr(self, name)
            ordered = {key: values[key] for key in sorted(values, key=natural_key)}
            object.__setattr__(self, name, MappingProxyType(ordered))
        object.__setattr__(self, "source", MappingProxyType(dict(self.source)))

    def __getitem__(self, name: str) -> Moment:
        if name not in self.modules:
            why = self.unmeasured.get(name)
            what = f"no moments of {name}" + (f": {why}" if why else "")
            raise OptionError(what, fix=f"the nearest names are {nearest(name, self.modules)}")
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self.modules

    def items(self) -> ItemsView[str, Moment]:
        """Pairs of name and moment, in natural order."""
        return self.modules.items()

    @property
    def unreached(self) -> tuple[str, ...]:
        """Modules that could be measured and that no input reached."""
        return tuple(name for name, moment in self.items() if not moment.count)

    def check(self, adapter: Adapter) -> None:
        """Refuse an adapter that these moments were not measured with.

        Raises
        ------
        MismatchError
            Its names, shapes or factors are not those of the adapter at calibration.
        """
        if fingerprint(adapter) != self.fingerprint:
            turned = any(module.layout.rows for module in adapter.modules.values())
            raise MismatchError(
                "these moments belong to another adapter: names, shapes or factors differ",
                fix="give --base, the model that it was calibrated in: that puts its rows in order"
                if turned
                else "measure them again with this one: loralens calibrate",
            )
