"""Method: a rule that makes one update of several, what it is called, where it comes from, what it can be told."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal, final

from loralens.errors import OptionError

if TYPE_CHECKING:  # the table says what there is without NumPy; a rule is imported when it is followed
    from loralens.arithmetic.fused import Fused
    from loralens.core.joint import Core
    from loralens.core.lowrank import LowRank
    from loralens.linalg.factor import Floats

Space = Literal["full", "knots", "core"]
SPACES: tuple[Space, ...] = ("full", "knots", "core")


@final
@dataclass(frozen=True, slots=True)
class Option:
    """A number that a method can be told.

    Attributes
    ----------
    name : str
        The keyword of the rule.
    default : float
    text : str
        What it does, in a few words.
    low, high : float
        The smallest and the largest value that makes sense.
    open_low : bool
        ``low`` itself does not.
    whole : bool
        Only whole numbers do.
    infinite : bool
        ∞ makes sense too, where it is not below ``low`` or above ``high``.
    """

    name: str
    default: float
    text: str
    low: float = -inf
    high: float = inf
    open_low: bool = False
    whole: bool = False
    infinite: bool = False

    def check(self, value: float) -> float:
        """``value``, or an OptionError that says what would be right."""
        inside = self.low <= value <= self.high and not (self.open_low and value == self.low)
        number = isfinite(value) or self.infinite
        if inside and number and (not self.whole or float(value).is_integer()):
            return int(value) if self.whole else value
        opening = "(" if self.open_low or self.low == -inf else "["
        closing = ")" if self.high == inf and not self.infinite else "]"
        span = f"{opening}{self.low:g}, {self.high:g}{closing}"
        kind = "a whole number" if self.whole else "a number"
        raise OptionError(f"{self.name} {value:g} is not {kind} in {span}", fix=f"{self.name}: {self.text}")


LAM = Option("lam", 1.0, "λ, the strength of the result")
DENSITY = Option("density", 1.0, "the part of the entries that is kept, in (0, 1]", low=0.0, high=1.0, open_low=True)


@final
@dataclass(frozen=True, slots=True)
class Method:
    """A row of `loralens.arithmetic.methods.METHODS`.

    Attributes
    ----------
    name : str
    text : str
        One line for a list of methods.
    paper : str
        Where it comes from.
    home : str
        ``module:function`` under `loralens.arithmetic`, where its `rule` is.
    options : tuple of Option
    spaces : tuple of str
        Where an elementwise rule can act, the default first; empty for a rule that is orthogonally equivariant, to
        which the space makes no difference.
    seeded : bool
        It draws random numbers.
    adapters : int
        How many adapters it takes; 0: any number.
    looks : str
        ``module:function`` of its `prepare`; empty where it has none.
    linear : bool
        The result is a sum of multiples of the updates, the same in every module, whatever they are.
    """

    name: str
    text: str
    paper: str
    home: str
    options: tuple[Option, ...] = (LAM,)
    spaces: tuple[Space, ...] = ()
    seeded: bool = False
    adapters: int = 0
    looks: str = ""
    linear: bool = False

    @property
    def rule(self) -> "Callable[..., Floats | Core | LowRank | Fused]":
        """``rule(joint, **options)``: a pure function of one module.

        It returns the core matrix of the result, float64, shape (p, q), or its SVD in an order of its own, which is
        then lifted to its numerical rank; or, where the result leaves the joint space, a `LowRank` of float64 factors,
        or a `Fused`, which also says what was lost. The options are those of the row; a row with ``spaces`` also gets
        ``space``, and a ``seeded`` one ``seed``, a `numpy.random.SeedSequence` of its own for every module.
        """
        return _imported(self.home)

    @property
    def prepare(self) -> Callable[..., Mapping[str, Any]] | None:
        """A look at all modules before the first is combined, if the method needs one.

        ``prepare(modules, **options)`` is given the `loralens.arithmetic.modules.Modules` and returns more keywords for
        the rule.
        """
        return _imported(self.looks) if self.looks else None

    def settings(self, given: Mapping[str, float | None], space: Space | None = None) -> dict[str, Any]:
        """The keywords of the rule: what was given, else the defaults.

        Raises
        ------
        OptionError
            An option that this method does not have, a value that makes no sense, a space it does not know.
        """
        by_name = {option.name: option for option in self.options}
        chosen = {name: value for name, value in given.items() if value is not None}
        for name in chosen:
            if name not in by_name:
                has = ", ".join(by_name) or "none"
                raise OptionError(f"{self.name} has no option {name}", fix=f"its options are: {has}")
        values: dict[str, Any] = {name: one.check(chosen.get(name, one.default)) for name, one in by_name.items()}
        if self.spaces:
            values["space"] = space or self.spaces[0]
            if values["space"] not in self.spaces:
                raise OptionError(f"{space} is no space of {self.name}", fix=f"give one of {', '.join(self.spaces)}")
        elif space is not None and space not in SPACES:
            raise OptionError(f"{space!r} is no space", fix=f"give one of {', '.join(SPACES)}")
        return values


def _imported(home: str) -> Callable[..., Any]:
    module, _, name = home.partition(":")
    function: Callable[..., Any] = getattr(import_module(f"loralens.arithmetic.{module}"), name)
    return function


def method_named(name: str, methods: Mapping[str, Method]) -> Method:
    """The method of this name, or an OptionError that lists all of them."""
    if name not in methods:
        choices = "; ".join(f"{one.name} ({one.text})" for one in methods.values())
        raise OptionError(f"no method {name!r}", fix=f"choose one of: {choices}")
    return methods[name]
