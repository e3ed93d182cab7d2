"""`Moments`: second moments of the bottleneck of every module of an adapter over real inputs."""

from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, final

from loralens.core.adapter import Adapter
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
        E[z zᵀ] with z = A x. It is symmetric and, apart from rounding, positive semidefinite. x is the input of the
        module in the adapted model.
    count : int
        Number of inputs x. If it is 0, no input reached the module, and K is 0.
    G : float64 array, shape (r, r), or None
        E[(Bᵀg)(Bᵀg)ᵀ], where g = ∂loss/∂y at the output y of the module; None if it was not requested.
    trace : float or None
        tr E[x xᵀ] = E‖x‖², which includes the part of x that z does not depend on. None if it was not measured.
    """

    K: Array
    count: int
    G: Array | None = None
    trace: float | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Module name → `Moment`, in natural order, and the fingerprint of their adapter.

    Attributes
    ----------
    fingerprint : str
        The `loralens.core.fingerprint` of the adapter.
    unmeasured : mapping of str to str
        Modules of the adapter without a moment → the reason.
    source : mapping of str to object
        The source of the inputs, as JSON: the number of batches, and fields that the caller adds.
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

    def __reduce__(self) -> tuple[Any, ...]:  # the read-only views of mappings cannot be pickled
        named = {"unmeasured": dict(self.unmeasured), "source": dict(self.source)}
        return partial(Moments, modules=dict(self.modules), fingerprint=self.fingerprint, **named), ()

    def __getitem__(self, name: str) -> Moment:
        if name not in self.modules:
            why = self.unmeasured.get(name)
            # A module that could not be measured gets its reason; any other name is probably misspelled.
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
        """Modules that could be measured but that no input reached."""
        return tuple(name for name, moment in self.items() if not moment.count)

    def check(self, adapter: Adapter) -> None:
        """Check that these moments were measured with this adapter.

        Raises
        ------
        MismatchError
            The names, shapes or factors differ from those of the adapter at calibration.
        """
        # K and G are those of these factors: the same update with other factors has other moments.
        # Imported here because hashlib loads OpenSSL, and most commands import this module without moments.
        from loralens.core.fingerprint import fingerprint

        if fingerprint(adapter) != self.fingerprint:
            turned = any(module.layout.rows for module in adapter.modules.values())
            raise MismatchError(
                "these moments belong to another adapter: names, shapes or factors differ",
                fix="give --base, the model in which the adapter was calibrated: its rows are then put in order"
                if turned
                else "measure them again with this one: loralens calibrate",
            )
